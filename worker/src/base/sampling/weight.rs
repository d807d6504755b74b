//! What tokens weigh, summed over rows of logits: in f32 and blocks, in an order that does not depend on the instructions.

use crate::kernel::cpu::{exp, vectorised};

/// Logits that are summed in f32; the sums of blocks are summed in f64.
pub const BLOCK: usize = 128;
/// Partial sums of a block: logit i goes to sum i mod 16.
const LANES: usize = 16;
/// Logits from which a pivot is taken.
const PIVOTS: usize = 31;

/// The weight e^((logit - largest) / temperature) of a token: the likeliest weighs 1.
#[derive(Clone, Copy, Debug)]
pub struct Weight {
    largest: f32,
    /// 1 / temperature, finite also for the lowest temperatures.
    inverse: f32,
}

impl Weight {
    /// At an infinite temperature every token weighs 1: weighing is counting.
    pub const ONE: Self = Self { largest: 0.0, inverse: 0.0 };

    /// Weights at a temperature above 0.
    pub fn new(largest: f32, temperature: f32) -> Self {
        Self { largest, inverse: (1.0 / temperature).min(f32::MAX) }
    }

    /// The logit of a token that weighs `weight`.
    pub fn logit(self, weight: f32) -> f32 {
        self.largest + weight.ln() / self.inverse
    }

    /// What a token of this logit weighs.
    #[inline(always)]
    pub fn of(self, logit: f32) -> f32 {
        exp((logit - self.largest) * self.inverse)
    }
}

/// Σ `value` over a block.
#[inline(always)]
fn sum(block: &[f32], value: impl Fn(f32) -> f32) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let groups = block.chunks_exact(LANES);
    let rest = groups.remainder();
    for group in groups {
        for (lane, logit) in lanes.iter_mut().zip(group) {
            *lane += value(*logit);
        }
    }
    for (lane, logit) in lanes.iter_mut().zip(rest) {
        *lane += value(*logit);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
    }
    lanes[0]
}

vectorised! {
    fn block_sums(logits: &[f32], weight: Weight, sums: &mut [f32]) {
        for (block, out) in logits.chunks(BLOCK).zip(sums) {
            *out = sum(block, |logit| weight.of(logit));
        }
    }
}

vectorised! {
    /// What the logits above `pivot` weigh together, and how many are equal to it.
    fn above_and_equal(logits: &[f32], weight: Weight, pivot: f32) -> (f64, f64) {
        let (mut above, mut equal) = (0.0, 0.0);
        for block in logits.chunks(BLOCK) {
            above += f64::from(sum(block, |logit| if logit > pivot { weight.of(logit) } else { 0.0 }));
            equal += f64::from(sum(block, |logit| if logit == pivot { 1.0 } else { 0.0 }));
        }
        (above, equal)
    }
}

fn sums(logits: &[f32], weight: Weight) -> (Vec<f32>, f64) {
    let mut sums = vec![0.0; logits.len().div_ceil(BLOCK)];
    block_sums(logits, weight, &mut sums);
    let total = sums.iter().copied().map(f64::from).sum();
    (sums, total)
}

/// What all tokens weigh together.
pub fn total(logits: &[f32], weight: Weight) -> f64 {
    sums(logits, weight).1
}

/// The first token at which the running sum of the weights exceeds `share` (below 1) of their total.
pub fn pick(logits: &[f32], weight: Weight, share: f64) -> usize {
    let (sums, total) = sums(logits, weight);
    let (mut left, mut chosen) = (share * total, (0, 0.0));
    // Sums are rounded: when the last one is not exceeded, it is the last token that weighs anything.
    for (block, sum) in sums.iter().enumerate().filter(|(_, sum)| **sum > 0.0) {
        chosen = (block, left);
        left -= f64::from(*sum);
        if left < 0.0 {
            break;
        }
    }
    let (block, mut left) = chosen;
    let mut last = block * BLOCK;
    for (index, logit) in logits.iter().enumerate().skip(block * BLOCK).take(BLOCK) {
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
