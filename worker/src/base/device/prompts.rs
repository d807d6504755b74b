//! What several sequences have in common runs once: the choices of a request differ in what is drawn only, and the heads of many tenants see
//! the same words of the system.
//!
//! Whoever comes later waits while an earlier sequence computes a block that both begin with, and goes on from it. Bits do not depend on how a
//! sequence is cut into passes, so the answers are those of sequences that ran alone.

use std::sync::Arc;

use super::memory::Memory;
use super::sequence::{Purpose, Sequence};
use crate::kernel::{Backend, PAGE, Result};

/// Whether the sequence at `place` leaves its next block, or its whole prompt, to one before it.
pub fn waits(sequences: &[Sequence], place: usize) -> bool {
    let own = &sequences[place];
    let next = own.shareable_chain().get(own.shared);
    let computes = |other: &Sequence| {
        let common = next.is_some() && other.chain.names().get(own.shared) == next && other.done < (own.shared + 1) * PAGE;
        common && other.is_shareable() || same_prompt(own, other) && other.done < other.prompt
    };
    own.is_shareable() && !own.has_begun() && sequences[..place].iter().any(|other| !other.finished && computes(other))
}

/// Gives every sequence that has not begun what is known of its prompt by now.
pub fn hand_over<B: Backend>(memory: &mut Memory<B>, sequences: &mut [Sequence]) -> Result<()> {
    for place in 1..sequences.len() {
        let (earlier, later) = sequences.split_at_mut(place);
        let own = &mut later[0];
        if own.has_begun() || !own.is_shareable() {
            continue;
        }
        memory.look_again(own)?;
        let has_all = |other: &Sequence| other.done >= other.prompt && other.gone <= own.shared;
        if let Some(other) = earlier.iter().find(|other| has_all(other) && same_prompt(own, other)) {
            memory.copy_prompt(own, other)?;
        }
    }
    Ok(())
}

/// Whether the prompts' keys and values are the same numbers: α scales what a head gives, not what it computes from.
fn same_prompt(own: &Sequence, other: &Sequence) -> bool {
    let heads = match (&own.head, &other.head) {
        (None, None) => true,
        (Some(own), Some(other)) => Arc::ptr_eq(&own.head, &other.head),
        _ => false,
    };
    let whole = matches!(other.purpose, Purpose::Answer(_));
    heads && whole && own.tokens == other.tokens[..other.prompt]
}
