//! Heads on the rows of a step: those that can run together in one call.

use std::sync::Arc;

use super::memory::Memory;
use super::sequence::{HeadUse, Sequence};
use crate::base::registry::LoadedHead;
use crate::head::{HeadSlot, Runner};
use crate::kernel::{Arena, Backend, PAGE, Result};
use crate::model::{Capture, Model, Tap};

/// Sequences whose heads run together, by their places in the step; those of one head follow each other.
pub struct Group {
    /// Places of the sequences.
    pub members: Vec<usize>,
    /// Where their heads read.
    pub taps: Vec<Tap>,
}

/// Place of a sequence, and its head.
type Member<'a> = (usize, &'a Arc<LoadedHead>);

/// Deals sequences with heads to groups.
pub fn groups<'a, B: Backend>(heads: impl Iterator<Item = Member<'a>>) -> Vec<Group> {
    let mut groups: Vec<(&LoadedHead, Vec<Member<'_>>)> = Vec::new();
    for (place, head) in heads {
        match groups.iter_mut().find(|(first, _)| first.runner::<B>().runs_with(head.runner())) {
            Some((_, members)) => members.push((place, head)),
            None => groups.push((head, vec![(place, head)])),
        }
    }
    let group = |(first, mut members): (&LoadedHead, Vec<Member<'_>>)| {
        members.sort_by_key(|(_, head)| Arc::as_ptr(head));
        Group { members: members.into_iter().map(|(place, _)| place).collect(), taps: Tap::all(&first.shape.taps).collect() }
    };
    groups.into_iter().map(group).collect()
}

/// What a group reads of a step whose sequences have these rows: one capture for each tap.
pub fn captures(group: &Group, rows: &[std::ops::Range<usize>]) -> impl Iterator<Item = Capture> {
    let own: Vec<u32> = group.members.iter().flat_map(|place| rows[*place].clone()).map(|row| row as u32).collect();
    group.taps.iter().map(move |tap| Capture { tap: *tap, rows: Some(own.clone()) })
}

/// Runs the heads of a group: `rows` for each member, in order. `call` is [`Runner::forward`] or [`Runner::features`].
pub fn run<B: Backend, T>(
    memory: &mut Memory<B>,
    sequences: &mut [&mut Sequence],
    group: &Group,
    rows: &[usize],
    call: impl FnOnce(&mut Arena<B>, &mut [HeadSlot<'_, B>]) -> Result<T>,
) -> Result<Option<T>> {
    let mut uses: Vec<_> = sequences.iter_mut().map(|sequence| sequence.head.as_mut()).collect();
    let uses: Vec<_> = group.members.iter().filter_map(|place| uses[*place].take()).collect();
    let Some(head) = uses.first().map(|own| own.head.clone()) else { return Ok(None) };
    let mut slots = Vec::with_capacity(uses.len());
    for (HeadUse { head, table, .. }, rows) in uses.into_iter().zip(rows) {
        slots.push(HeadSlot { runner: head.runner(), rows: *rows, table });
    }
    call(memory.head_arena(&head)?, &mut slots).map(Some)
}

/// Computes the heads' own keys and values of blocks that others have computed of the base, from the tap rows kept with them.
pub fn catch_up<B: Backend>(model: &Model<B>, memory: &mut Memory<B>, sequences: &mut [Sequence]) -> Result<()> {
    let mut sequences: Vec<&mut Sequence> = sequences.iter_mut().collect();
    let known = |sequence: &Sequence| sequence.head.as_ref().map_or(sequence.shared, |own| own.table.length / PAGE);
    let behind = sequences.iter().enumerate().filter(|(_, sequence)| known(sequence) < sequence.shared);
    let groups = groups::<B>(behind.filter_map(|(place, sequence)| Some((place, &sequence.head.as_ref()?.head))));
    for group in groups {
        let (mut columns, mut rows) = (Vec::new(), Vec::new());
        for tap in &group.taps {
            let own = group.members.iter().map(|place| &sequences[*place]);
            let blocks = own.flat_map(|sequence| &sequence.chain.names()[known(sequence)..sequence.shared]);
            let parts: Vec<_> = blocks.filter_map(|hash| memory.tap_rows(hash, *tap)).collect();
            columns.push(model.backend.unpack(&parts, model.config.hidden_size, model.dtype)?);
        }
        for place in &group.members {
            rows.push((sequences[*place].shared - known(sequences[*place])) * PAGE);
            memory.grow(sequences[*place], 0)?;
        }
        let columns: Vec<&B::Rows> = columns.iter().collect();
        run(memory, &mut sequences, &group, &rows, |arena, slots| Runner::forward(arena, &columns, slots, &[]))?;
        for place in &group.members {
            memory.settle(sequences[*place])?;
        }
    }
    Ok(())
}
