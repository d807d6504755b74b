//! One step of all served sequences: base, each sequence's own head on its own rows, LM head, next tokens.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Arc;

use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;

use super::prompts;
use super::sequence::{HeadUse, Purpose, Sequence};
use crate::base::metrics::{Class, Metrics};
use crate::base::queue::{Demand, serving_batch};
use crate::base::registry::LoadedHead;
use crate::exchange::wire::ErrorCode;
use crate::head::combine;
use crate::model::{Model, Slot, States};

/// Rows whose logits exist at the same time.
const LOGIT_ROWS: usize = 32;

/// The rows of one sequence in a step.
struct Part<'a> {
    sequence: &'a mut Sequence,
    /// Index of its first row in the step.
    start: usize,
    rows: usize,
    /// Output of its head, rows × D.
    delta: Option<Vec<f32>>,
}

/// A row of the LM head: part, position in the sequence, state y.
type LogitRow = (usize, usize, Vec<f32>);

/// Runs up to `budget` tokens of `sequences`. **Invariant** what ran is counted before anybody hears of it.
pub fn step(model: &Model, dtype: Dtype, sequences: &mut [Sequence], budget: usize, metrics: &Metrics) {
    let demand = |place: usize| match prompts::waits(sequences, place) {
        true => Demand::Prefill(0),
        false => sequences[place].demand(),
    };
    let demands: Vec<_> = (0..sequences.len()).map(demand).collect();
    let grants = serving_batch(&demands, budget);
    let mut start = 0;
    let mut parts: Vec<Part<'_>> = Vec::new();
    for (sequence, rows) in sequences.iter_mut().zip(grants).filter(|(_, rows)| *rows > 0) {
        parts.push(Part { sequence, start, rows, delta: None });
        start += rows;
    }
    let taps = union(&parts);
    let Some(states) = forward(model, &mut parts, &taps) else { return };
    metrics.batch(Class::Serving, start);
    run_heads(&mut parts, &taps, &states, model.config.hidden_size);
    let rows = logit_rows(&mut parts, &states, model.config.hidden_size, dtype);
    for part in &mut parts {
        part.sequence.advance(part.rows);
    }
    for chunk in rows.chunks(LOGIT_ROWS) {
        let y: Vec<f32> = chunk.iter().flat_map(|(_, _, y)| y.iter().copied()).collect();
        let logits = model.lm_head().logits(&y);
        for ((part, position, _), logits) in chunk.iter().zip(logits.chunks_exact(model.lm_head().vocab_size())) {
            parts[*part].sequence.take_logits(*position, logits);
        }
    }
    parts.iter_mut().for_each(|part| part.sequence.settle());
    prompts::hand_over(sequences);
}

/// All layers that some head of the step reads, and `final`.
fn union(parts: &[Part<'_>]) -> Taps {
    let heads = parts.iter().filter_map(|part| part.sequence.head.as_ref());
    let layers: BTreeSet<u32> = heads.flat_map(|head| head.head.shape().taps.layers.iter().copied()).collect();
    Taps { layers: layers.into_iter().collect(), final_norm: true }
}

fn forward(model: &Model, parts: &mut [Part<'_>], taps: &Taps) -> Option<States> {
    let mut slots: Vec<Slot<'_>> = parts
        .iter_mut()
        .map(|part| {
            let Sequence { tokens, done, kv, .. } = &mut *part.sequence;
            Slot { tokens: &tokens[*done..*done + part.rows], kv: kv.get_or_insert_with(|| model.new_kv()) }
        })
        .collect();
    model.forward(&mut slots, taps, &mut || ControlFlow::Continue(()))
}

/// Runs each head once over the rows of all sequences that use it.
fn run_heads(parts: &mut [Part<'_>], taps: &Taps, states: &States, hidden_size: usize) {
    let mut heads: Vec<Arc<LoadedHead>> = Vec::new();
    for head in parts.iter().filter_map(|part| part.sequence.head.as_ref()) {
        if !heads.iter().any(|known| Arc::ptr_eq(known, &head.head)) {
            heads.push(head.head.clone());
        }
    }
    for head in heads {
        let mut group: Vec<_> = parts.iter_mut().filter(|part| uses(part, &head)).collect();
        let columns = tap_columns(&head, taps, states);
        let rows: Vec<Vec<f32>> = columns.iter().map(|column| gather(column, &group, hidden_size)).collect();
        match group.first().is_some_and(|part| matches!(part.sequence.purpose, Purpose::Classify { .. })) {
            true => group.iter_mut().fold(0, |at, part| classify(part, &head, &rows, at, hidden_size)),
            false => answer(&mut group, &head, &rows, hidden_size),
        };
    }
}

fn uses(part: &Part<'_>, head: &Arc<LoadedHead>) -> bool {
    part.sequence.head.as_ref().is_some_and(|own| Arc::ptr_eq(&own.head, head))
}

/// The step's states at the taps of `head`, in the head's order.
fn tap_columns<'a>(head: &LoadedHead, taps: &Taps, states: &'a States) -> Vec<&'a [f32]> {
    let own = &head.shape().taps;
    let layers = own.layers.iter().filter_map(|layer| taps.layers.iter().position(|other| other == layer));
    layers.chain(own.final_norm.then_some(taps.layers.len())).map(|place| states.taps[place].as_slice()).collect()
}

/// The rows of a group, one sequence after the other.
fn gather(column: &[f32], group: &[&mut Part<'_>], hidden_size: usize) -> Vec<f32> {
    let rows = group.iter().flat_map(|part| &column[part.start * hidden_size..(part.start + part.rows) * hidden_size]);
    rows.copied().collect()
}

/// Runs a CausalLM head over the group's rows; a sequence for which it is not finite fails alone.
fn answer(group: &mut [&mut Part<'_>], head: &LoadedHead, rows: &[Vec<f32>], hidden_size: usize) -> usize {
    let columns: Vec<&[f32]> = rows.iter().map(Vec::as_slice).collect();
    let mut sequences: Vec<_> =
        group.iter_mut().filter_map(|part| part.sequence.head.as_mut().map(|HeadUse { kv, .. }| (part.rows, kv))).collect();
    let delta = head.runner.forward(&columns, &mut sequences);
    let mut at = 0;
    for part in group {
        let own = &delta[at * hidden_size..(at + part.rows) * hidden_size];
        at += part.rows;
        match own.iter().all(|value| value.is_finite()) {
            true => part.delta = Some(own.to_vec()),
            false => part.sequence.fail(ErrorCode::HeadNotFinite, &format!("head {} computed a number that is not finite", head.digest)),
        }
    }
    at
}

/// Adds the rows of one sequence to what was collected, and scores it when it is whole. Returns the group's next row.
fn classify(part: &mut Part<'_>, head: &LoadedHead, rows: &[Vec<f32>], at: usize, hidden_size: usize) -> usize {
    let next = at + part.rows;
    let complete = part.sequence.done + part.rows == part.sequence.tokens.len();
    let length = part.sequence.tokens.len();
    let Purpose::Classify { taps, place, scores } = &mut part.sequence.purpose else { return next };
    for (collected, rows) in taps.iter_mut().zip(rows) {
        collected.extend_from_slice(&rows[at * hidden_size..next * hidden_size]);
    }
    if complete {
        let columns: Vec<&[f32]> = taps.iter().map(Vec::as_slice).collect();
        let logits = head.runner.classify(&columns, &[length]);
        if !logits.iter().all(|logit| logit.is_finite()) {
            part.sequence.fail(ErrorCode::HeadNotFinite, &format!("head {} computed a number that is not finite", head.digest));
            return next;
        }
        // A reader that went away needs no score.
        let _ = scores.send((*place, Ok(logits)));
        part.sequence.finished = true;
    }
    next
}

/// The states y that the LM head must see, in the order of parts and positions.
fn logit_rows(parts: &mut [Part<'_>], states: &States, hidden_size: usize, dtype: Dtype) -> Vec<LogitRow> {
    let Some(x) = states.taps.last() else { return Vec::new() };
    let mut rows = Vec::new();
    for (index, part) in parts.iter_mut().enumerate().filter(|(_, part)| !part.sequence.finished) {
        let done = part.sequence.done;
        let mut own = Vec::new();
        for position in part.sequence.logit_positions(part.rows) {
            let row = position - done;
            let x = &x[(part.start + row) * hidden_size..][..hidden_size];
            let y = match (&part.delta, &part.sequence.head) {
                (Some(delta), Some(head)) => combine(x, head.alpha, &delta[row * hidden_size..][..hidden_size], dtype),
                _ => x.to_vec(),
            };
            own.push((index, position, y));
        }
        match own.iter().all(|(_, _, y)| y.iter().all(|value| value.is_finite())) {
            true => rows.append(&mut own),
            false => part.sequence.fail(ErrorCode::HeadNotFinite, "the sum of base and head is not finite"),
        }
    }
    rows
}
