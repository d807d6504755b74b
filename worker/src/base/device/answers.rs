//! From the states of a step to the next tokens: the LM head, and what is seen of its logits.

use std::ops::Range;

use super::engine::Engine;
use super::sequence::Sequence;
use crate::base::sampling::{Row, Sight};
use crate::exchange::wire::ErrorCode;
use crate::kernel::{Backend, LOGIT_BLOCK, Outline, Result};

/// Rows whose logits exist at the same time.
const LOGIT_ROWS: usize = 32;

/// A row of the LM head: place of the sequence in the step, position in the sequence.
#[derive(Clone, Copy)]
pub struct LogitRow {
    /// Place of the sequence in the step.
    pub place: usize,
    /// Position in the sequence.
    pub position: usize,
}

/// A row of logits that a sequence has still to take.
struct Open<'a> {
    row: u32,
    own: LogitRow,
    likeliest: Option<u32>,
    /// What is seen of the row, and where log probabilities are wanted what all tokens weigh at temperature 1; none where the likeliest token is
    /// enough.
    seen: Option<(Sight<'a>, f64)>,
    /// Blocks that are copied to the host.
    blocks: Vec<u32>,
}

/// An open row and the logits of its blocks.
type Shown<'a, 'l> = (Open<'a>, &'l [f32]);

/// Rows whose logits are needed, in the order of sequences and positions.
pub fn logit_rows(parts: &[&mut Sequence], rows: &[Range<usize>]) -> Vec<LogitRow> {
    let own = |(place, (part, rows)): (usize, (&&mut Sequence, &Range<usize>))| {
        part.logit_positions(rows.len()).map(move |position| LogitRow { place, position })
    };
    parts.iter().zip(rows).enumerate().flat_map(own).collect()
}

/// Lets every sequence take the logits of its rows. One whose logits are no numbers fails alone.
pub fn answer<B: Backend>(engine: &Engine<B>, parts: &mut [&mut Sequence], wanted: &[LogitRow], y: &B::Rows) -> Result<()> {
    let backend = &engine.model.backend;
    for (index, chunk) in wanted.chunks(LOGIT_ROWS).enumerate() {
        let first = (index * LOGIT_ROWS) as u32;
        let own: Vec<u32> = (first..first + chunk.len() as u32).collect();
        let logits = engine.model.lm_head().logits(backend, &backend.tap(y, Some(&own), None, engine.model.dtype)?)?;
        let likeliest = backend.greedy(&logits)?;
        let looks = looks(parts, chunk, &likeliest);
        let outline = if looks.is_empty() { Outline::default() } else { backend.outline(&logits, &looks)? };
        let mut open = open(chunk, &likeliest, &outline, &looks);
        engine.host.for_each(&mut open, |_, open| {
            let wanted = |(sight, _): &(Sight<'_>, f64)| parts[open.own.place].wanted_blocks(open.own.position, sight);
            open.blocks = open.seen.as_ref().map_or_else(Vec::new, wanted);
        });
        while !open.is_empty() {
            open = hand_out(engine, parts, &logits, open)?;
            // Who could not choose from what it saw gets everything.
            open.iter_mut().for_each(|open| open.blocks = open.seen.as_ref().map_or_else(Vec::new, |(sight, _)| sight.all()));
        }
    }
    Ok(())
}

/// Rows that are looked at and their temperatures.
fn looks(parts: &[&mut Sequence], chunk: &[LogitRow], likeliest: &[Option<u32>]) -> Vec<(u32, f32)> {
    let mut looks = Vec::new();
    for (row, own) in chunk.iter().enumerate().filter(|(row, _)| likeliest[*row].is_some()) {
        looks.extend(parts[own.place].looks_at(own.position).map(|temperature| (row as u32, temperature)));
    }
    looks
}

fn open<'a>(chunk: &[LogitRow], likeliest: &[Option<u32>], outline: &'a Outline, looks: &[(u32, f32)]) -> Vec<Open<'a>> {
    let seen = |row: u32| {
        let mut own = looks.iter().enumerate().filter(|(_, (of, _))| *of == row);
        let mut sight = || own.next().map(|(index, (_, temperature))| Sight::new(outline, index, looks.len(), *temperature));
        let first = sight()?;
        let normaliser = sight().as_ref().unwrap_or(&first).total();
        Some((first, normaliser))
    };
    let open = |(row, own): (usize, &LogitRow)| Open {
        row: row as u32,
        own: *own,
        likeliest: likeliest[row],
        seen: seen(row as u32),
        blocks: Vec::new(),
    };
    chunk.iter().enumerate().map(open).collect()
}

/// Copies the blocks that the open rows want and lets the sequences take their rows in order. Rows stay open of which more has to be there.
fn hand_out<'a, B: Backend>(
    engine: &Engine<B>,
    parts: &mut [&mut Sequence],
    logits: &B::Rows,
    mut open: Vec<Open<'a>>,
) -> Result<Vec<Open<'a>>> {
    let which: Vec<(u32, u32)> = open.iter().flat_map(|open| open.blocks.iter().map(|block| (open.row, *block))).collect();
    let values = if which.is_empty() { Vec::new() } else { engine.model.backend.blocks(logits, &which)? };
    let mut rest = values.as_slice();
    let mut work: Vec<(&mut Sequence, Vec<Shown<'a, '_>>)> = Vec::new();
    for (place, part) in parts.iter_mut().enumerate() {
        let count = open.iter().take_while(|open| open.own.place == place).count();
        let own: Vec<_> = open
            .drain(..count)
            .map(|open| {
                let (own, after) = rest.split_at(open.blocks.len() * LOGIT_BLOCK);
                rest = after;
                (open, own)
            })
            .collect();
        if !own.is_empty() {
            work.push((part, own));
        }
    }
    engine.host.for_each(&mut work, |_, (sequence, rows)| rows.retain(|(open, logits)| !take(sequence, open, logits)));
    Ok(work.into_iter().flat_map(|(_, rows)| rows).map(|(open, _)| open).collect())
}

/// Whether the sequence has what it needs of the row.
fn take(sequence: &mut Sequence, open: &Open<'_>, logits: &[f32]) -> bool {
    let Some(likeliest) = open.likeliest.filter(|_| !sequence.finished) else {
        match &sequence.head {
            _ if sequence.finished => {}
            Some(_) => sequence.fail_by_head(),
            None => sequence.fail(ErrorCode::Internal, "the base computed a number that is not finite"),
        }
        return true;
    };
    let row = open.seen.clone().map(|(sight, normaliser)| Row::new(sight, normaliser, &open.blocks, logits));
    sequence.take_logits(open.own.position, row.as_ref(), likeliest)
}
