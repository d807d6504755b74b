//! What tokens weigh, summed over rows of logits: in f32 within a block, in f64 over the blocks.

use crate::kernel::LOGIT_BLOCK;
use crate::kernel::cpu::{Weight, block_weights, reduce, vectorised};

/// Logits from which a pivot is taken.
const PIVOTS: usize = 31;

vectorised! {
    /// What the logits above `pivot` weigh together, and how many are equal to it.
    fn above_and_equal(logits: &[f32], weight: Weight, pivot: f32) -> (f64, f64) {
        let (mut above, mut equal) = (0.0, 0.0);
        let plus = |one: f32, other: f32| one + other;
        for block in logits.chunks(LOGIT_BLOCK) {
            above += f64::from(reduce(block, 0.0, |_, sum, logit| if logit > pivot { sum + weight.of(logit) } else { sum }, plus));
            equal += f64::from(reduce(block, 0.0, |_, sum, logit| if logit == pivot { sum + 1.0 } else { sum }, plus));
        }
        (above, equal)
    }
}

fn weights(logits: &[f32], weight: Weight) -> Vec<f32> {
    let mut weights = vec![0.0; logits.len().div_ceil(LOGIT_BLOCK)];
    block_weights(logits, weight, &mut weights);
    weights
}

/// Σ of what blocks weigh.
pub fn sum(weights: &[f32]) -> f64 {
    weights.iter().copied().map(f64::from).sum()
}

/// What all tokens weigh together.
pub fn total(logits: &[f32], weight: Weight) -> f64 {
    sum(&weights(logits, weight))
}

/// The first token at which the running sum of the weights exceeds `share` (below 1) of their total.
pub fn pick(logits: &[f32], weight: Weight, share: f64) -> usize {
    let (block, left) = pick_block(&weights(logits, weight), share);
    let first = block * LOGIT_BLOCK;
    first + pick_within(&logits[first..logits.len().min(first + LOGIT_BLOCK)], weight, left)
}

/// The first block at which the running sum of the weights exceeds `share` (below 1) of their total, and what of that is left for it.
pub fn pick_block(weights: &[f32], share: f64) -> (usize, f64) {
    let (mut left, mut chosen) = (share * sum(weights), (0, 0.0));
    // Sums are rounded: when the last one is not exceeded, it is the last block that weighs anything.
    for (block, weight) in weights.iter().enumerate().filter(|(_, weight)| **weight > 0.0) {
        chosen = (block, left);
        left -= f64::from(*weight);
        if left < 0.0 {
            break;
        }
    }
    chosen
}

/// The first token of a block at which the running sum of the weights exceeds `left`, or the last that weighs anything.
pub fn pick_within(block: &[f32], weight: Weight, mut left: f64) -> usize {
    let mut last = 0;
    for (index, logit) in block.iter().enumerate() {
        let own = f64::from(weight.of(*logit));
        last = if own > 0.0 { index } else { last };
        left -= own;
        if left < 0.0 {
            break;
        }
    }
    last
}

/// The largest logits: all above `logit`, and the first `equals` of those that are equal to it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Cut {
    pub logit: f32,
    pub equals: usize,
}

/// The fewest of the largest `logits` that weigh `target` together, at least one; found by selection.
pub fn cut(logits: &[f32], weight: Weight, mut target: f64) -> Cut {
    let mut rest = logits.to_vec();
    target = target.max(f64::MIN_POSITIVE);
    loop {
        let pivot = middle(&rest);
        let (above, equals) = above_and_equal(&rest, weight, pivot);
        let each = f64::from(weight.of(pivot));
        if above >= target {
            keep(&mut rest, |logit| logit > pivot);
            continue;
        }
        target -= above;
        if equals * each >= target {
            return Cut { logit: pivot, equals: (target / each).ceil() as usize };
        }
        target -= equals * each;
        keep(&mut rest, |logit| logit < pivot);
        if rest.is_empty() {
            return Cut { logit: pivot, equals: usize::MAX };
        }
    }
}

/// The median of some logits that lie evenly spaced.
fn middle(logits: &[f32]) -> f32 {
    let mut some: Vec<f32> = logits.iter().copied().step_by(logits.len().div_ceil(PIVOTS).max(1)).collect();
    let middle = some.len() / 2;
    *some.select_nth_unstable_by(middle, f32::total_cmp).1
}

/// `Vec::retain` without a jump for each value: half of them would be mispredicted.
fn keep(values: &mut Vec<f32>, wanted: impl Fn(f32) -> bool) {
    let mut kept = 0;
    for index in 0..values.len() {
        let value = values[index];
        values[kept] = value;
        kept += usize::from(wanted(value));
    }
    values.truncate(kept);
}
