//! One step of all served sequences: base, each sequence's own head on its own rows, LM head, next tokens.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Instant;

use super::answers::{LogitRow, answer, logit_rows};
use super::engine::Engine;
use super::heads::{self, Group};
use super::sequence::{Purpose, Sequence};
use super::{outside, prompts};
use crate::base::metrics::Class;
use crate::base::schedule::Demand;
use crate::head::Runner;
use crate::kernel::{Backend, PAGE, Result};
use crate::model::{Capture, Slot, Tap};
use crate::numbers::number_bytes;

/// Rows of the step that are kept with a block: place of the sequence, block of it, first row.
struct BlockRows {
    place: usize,
    block: usize,
    first: usize,
}

/// What each sequence needs to go on.
pub fn demands(sequences: &[Sequence]) -> Vec<Demand> {
    let demand = |place: usize| match prompts::waits(sequences, place) {
        true => Demand::Prefill(0),
        false => sequences[place].demand(),
    };
    (0..sequences.len()).map(demand).collect()
}

/// Runs so many tokens of each sequence. **Invariant** what ran is counted before anybody hears of it.
pub fn step<B: Backend>(engine: &mut Engine<B>, sequences: &mut [Sequence], grants: &[usize]) -> Result<()> {
    let mut parts: Vec<&mut Sequence> = Vec::new();
    let mut rows: Vec<Range<usize>> = Vec::new();
    for (sequence, granted) in sequences.iter_mut().zip(grants.iter().copied()).filter(|(_, granted)| *granted > 0) {
        let start = rows.last().map_or(0, |rows| rows.end);
        engine.memory.grow(sequence, granted)?;
        parts.push(sequence);
        rows.push(start..start + granted);
    }
    if !parts.is_empty() {
        run(engine, &mut parts, &rows)?;
    }
    prompts::hand_over(&mut engine.memory, sequences)
}

fn run<B: Backend>(engine: &mut Engine<B>, parts: &mut [&mut Sequence], rows: &[Range<usize>]) -> Result<()> {
    let heads = parts.iter().enumerate().filter_map(|(place, part)| Some((place, &part.head.as_ref()?.head)));
    let groups = heads::groups::<B>(heads);
    let logit_rows = logit_rows(parts, rows);
    let blocks = whole_blocks(parts, rows);
    let kept_taps: Vec<Tap> = if blocks.is_empty() { Vec::new() } else { engine.registry.taps(Instant::now()).into_iter().collect() };

    let row = |wanted: &LogitRow| (rows[wanted.place].start + wanted.position - parts[wanted.place].done) as u32;
    let mut captures = vec![Capture { tap: Tap::Final, rows: Some(logit_rows.iter().map(row).collect()) }];
    let followers = outside::followers(parts);
    groups.iter().chain(&followers).for_each(|group| captures.extend(heads::captures(group, rows)));
    let kept_rows: Vec<u32> = blocks.iter().flat_map(|block| block.first as u32..(block.first + PAGE) as u32).collect();
    captures.extend(kept_taps.iter().map(|tap| Capture { tap: *tap, rows: Some(kept_rows.clone()) }));

    let states = forward(engine, parts, rows, &captures)?;
    engine.metrics.batch(Class::Serving, rows.last().map_or(0, |rows| rows.end));
    let mut states = states.into_iter();
    let mut y = states.next().unwrap_or_default();
    for group in &groups {
        let mut columns: Vec<B::Rows> = states.by_ref().take(group.taps.len()).collect();
        columns.extend(outside::columns(engine, parts, rows, group)?);
        run_heads(engine, parts, rows, group, &columns, &logit_rows, &mut y)?;
    }
    for group in &followers {
        let columns: Vec<B::Rows> = states.by_ref().take(group.taps.len()).collect();
        outside::send(engine, parts, rows, group, &columns)?;
    }
    for (part, rows) in parts.iter_mut().zip(rows) {
        part.done += rows.len();
        part.forget_read();
    }
    answer(engine, parts, &logit_rows, &y)?;
    for part in parts.iter_mut() {
        part.end_scoring();
        engine.memory.settle(part)?;
        engine.memory.trim(part);
    }
    let kept: Vec<(Tap, B::Rows)> = kept_taps.into_iter().zip(states).collect();
    keep(engine, parts, &blocks, &kept)
}

fn forward<B: Backend>(
    engine: &mut Engine<B>,
    parts: &mut [&mut Sequence],
    rows: &[Range<usize>],
    captures: &[Capture],
) -> Result<Vec<B::Rows>> {
    let mut slots: Vec<Slot<'_>> = Vec::new();
    for (part, rows) in parts.iter_mut().zip(rows) {
        let Sequence { tokens, done, table, .. } = &mut **part;
        slots.push(Slot { tokens: &tokens[*done..*done + rows.len()], kv: table });
    }
    engine.model.forward(engine.memory.base_arena(), &mut slots, captures)
}

/// Runs the heads of a group over their rows: adds what they give to the rows of `y`, or collects it for a classification.
fn run_heads<B: Backend>(
    engine: &mut Engine<B>,
    parts: &mut [&mut Sequence],
    rows: &[Range<usize>],
    group: &Group,
    columns: &[B::Rows],
    logit_rows: &[LogitRow],
    y: &mut B::Rows,
) -> Result<()> {
    let columns: Vec<&B::Rows> = columns.iter().collect();
    let counts: Vec<usize> = group.members.iter().map(|place| rows[*place].len()).collect();
    if matches!(parts[group.members[0]].purpose, Purpose::Classify { .. }) {
        let features = heads::run(&mut engine.memory, parts, group, &counts, |arena, slots| Runner::features(arena, &columns, slots))?;
        return classify::<B>(parts, group, &counts, &features.unwrap_or_default());
    }
    let (mut outputs, mut at, mut alphas, mut first) = (Vec::new(), Vec::new(), Vec::new(), 0);
    for (place, count) in group.members.iter().zip(&counts) {
        let own = logit_rows.iter().enumerate().filter(|(_, row)| row.place == *place);
        for (index, row) in own {
            outputs.push((first + row.position - parts[*place].done) as u32);
            at.push(index as u32);
            alphas.push(parts[*place].head.as_ref().map_or(0.0, |own| own.alpha as f32));
        }
        first += count;
    }
    let delta = heads::run(&mut engine.memory, parts, group, &counts, |arena, slots| Runner::forward(arena, &columns, slots, &outputs))?;
    match delta.filter(|_| !at.is_empty()) {
        Some(delta) => engine.model.backend.combine(y, &at, &alphas, &delta, engine.model.dtype),
        None => Ok(()),
    }
}

/// Adds the features of a step to what was collected, and scores each sequence that is whole.
fn classify<B: Backend>(parts: &mut [&mut Sequence], group: &Group, counts: &[usize], features: &[f32]) -> Result<()> {
    let width = features.len() / counts.iter().sum::<usize>().max(1);
    let mut rest = features;
    for (place, count) in group.members.iter().zip(counts) {
        let part = &mut *parts[*place];
        let (own, after) = rest.split_at(count * width);
        rest = after;
        let complete = part.done + count == part.tokens.len();
        let (Purpose::Classify { features, place, scores }, Some(head)) = (&mut part.purpose, &part.head) else { continue };
        features.extend_from_slice(own);
        if complete {
            let logits = head.head.runner::<B>().classify(features)?;
            if logits.iter().all(|logit| logit.is_finite()) {
                // A reader that went away needs no score.
                let _ = scores.send((*place, Ok(logits)));
                part.finished = true;
            } else {
                part.fail_by_head();
            }
        }
    }
    Ok(())
}

/// Blocks of shareable sequences that run whole in this step.
fn whole_blocks(parts: &[&mut Sequence], rows: &[Range<usize>]) -> Vec<BlockRows> {
    let own = |(place, (part, rows)): (usize, (&&mut Sequence, &Range<usize>))| {
        let (done, start) = (part.done, rows.start);
        let blocks = if part.is_shareable() { done.div_ceil(PAGE)..(done + rows.len()) / PAGE } else { 0..0 };
        blocks.map(move |block| BlockRows { place, block, first: start + block * PAGE - done })
    };
    parts.iter().zip(rows).enumerate().flat_map(own).collect()
}

/// Keeps what heads that come later need of the blocks that ran whole.
fn keep<B: Backend>(engine: &mut Engine<B>, parts: &[&mut Sequence], blocks: &[BlockRows], kept: &[(Tap, B::Rows)]) -> Result<()> {
    let (backend, dtype) = (engine.model.backend.clone(), engine.model.dtype);
    let bytes = kept.len() * PAGE * engine.model.config.hidden_size * number_bytes(dtype);
    let wanted: BTreeSet<Tap> = kept.iter().map(|(tap, _)| *tap).collect();
    for (index, BlockRows { place, block, .. }) in blocks.iter().enumerate() {
        let hash = parts[*place].chain.names()[*block];
        if kept.is_empty() || engine.memory.has_taps(&hash, &wanted) {
            continue;
        }
        let own = index * PAGE..(index + 1) * PAGE;
        let pack = |(tap, rows): &(Tap, B::Rows)| Ok((*tap, backend.pack(rows, own.clone(), dtype)?));
        let rows = kept.iter().map(pack).collect::<Result<_>>()?;
        engine.memory.keep_taps(&hash, rows, bytes as u64);
    }
    Ok(())
}
