//! A prompt runs once, however many answers are asked of it: the choices of a request differ in what is drawn only.
//!
//! Whoever comes later waits while an earlier sequence runs the same prompt, and goes on from a copy of its keys and values. Bits do not
//! depend on how a sequence is cut into passes, so the answers are those of sequences that ran alone.

use std::sync::Arc;

use super::sequence::{HeadUse, Purpose, Sequence};

/// Whether the sequence at `place` leaves its prompt to one before it.
pub fn waits(sequences: &[Sequence], place: usize) -> bool {
    let own = &sequences[place];
    own.kv.is_none() && sequences[..place].iter().any(|other| !other.finished && same_prompt(own, other))
}

/// Gives every sequence that waits what an earlier one has computed of their prompt, as soon as all of it has run.
pub fn hand_over(sequences: &mut [Sequence]) {
    for place in 1..sequences.len() {
        let (earlier, later) = sequences.split_at_mut(place);
        let own = &mut later[0];
        if own.kv.is_some() {
            continue;
        }
        if let Some(other) = earlier.iter().find(|other| other.done >= other.prompt && same_prompt(own, other)) {
            take_over(own, other);
        }
    }
}

/// Whether the prompts' keys and values are the same numbers: α scales what a head gives, not what it computes from.
fn same_prompt(own: &Sequence, other: &Sequence) -> bool {
    let heads = match (&own.head, &other.head) {
        (None, None) => true,
        (Some(own), Some(other)) => Arc::ptr_eq(&own.head, &other.head),
        _ => false,
    };
    // Who scores its prompt needs the logits of every position, and a classifier collects its states.
    let shareable = matches!(&own.purpose, Purpose::Answer(answer) if answer.prompt_logprobs.is_none());
    let whole = matches!(other.purpose, Purpose::Answer(_));
    heads && shareable && whole && own.tokens == other.tokens[..other.prompt]
}

/// All but the prompt's last token, which runs for its logits.
fn take_over(own: &mut Sequence, other: &Sequence) {
    let known = own.prompt - 1;
    own.kv = other.kv.clone().map(|mut kv| {
        kv.truncate(known);
        kv
    });
    if let (Some(HeadUse { kv, .. }), Some(HeadUse { kv: computed, .. })) = (&mut own.head, &other.head) {
        kv.clone_from(computed);
        kv.truncate(known);
    }
    own.done = known;
}
