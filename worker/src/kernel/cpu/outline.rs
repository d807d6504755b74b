//! Rows of logits block by block, in an order that does not depend on the instructions: maxima, and sums of weights.

use super::{exp, vectorised};
use crate::kernel::LOGIT_BLOCK;

/// Partial results of a block: logit i goes to number i mod 16.
const LANES: usize = 16;

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
        Self { largest, inverse: inverse(temperature) }
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

/// 1 / temperature, finite also for the lowest temperatures.
pub fn inverse(temperature: f32) -> f32 {
    (1.0 / temperature).min(f32::MAX)
}

/// Folds a block in lanes.
#[inline(always)]
pub fn folded(block: &[f32], start: f32, fold: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LANES];
    let groups = block.chunks_exact(LANES);
    let rest = groups.remainder();
    for group in groups {
        for (lane, logit) in lanes.iter_mut().zip(group) {
            *lane = fold(*lane, *logit);
        }
    }
    for (lane, logit) in lanes.iter_mut().zip(rest) {
        *lane = fold(*lane, *logit);
    }
    let mut width = LANES;
    while width > 1 {
        width /= 2;
        for lane in 0..width {
            lanes[lane] = join(lanes[lane], lanes[lane + width]);
        }
    }
    lanes[0]
}

#[inline(always)]
fn larger(one: f32, other: f32) -> f32 {
    if other > one { other } else { one }
}

vectorised! {
    /// The largest logit of each block.
    pub fn block_maxima(logits: &[f32], maxima: &mut [f32]) {
        for (block, maximum) in logits.chunks(LOGIT_BLOCK).zip(maxima) {
            *maximum = folded(block, f32::NEG_INFINITY, larger, larger);
        }
    }
}

vectorised! {
    /// What each block weighs.
    pub fn block_weights(logits: &[f32], weight: Weight, weights: &mut [f32]) {
        for (block, out) in logits.chunks(LOGIT_BLOCK).zip(weights) {
            *out = folded(block, 0.0, |sum, logit| sum + weight.of(logit), |one, other| one + other);
        }
    }
}

/// Maxima and weights of a row's blocks at a temperature above 0.
pub fn outline(logits: &[f32], temperature: f32, maxima: &mut [f32], weights: &mut [f32]) {
    block_maxima(logits, maxima);
    let largest = maxima.iter().copied().fold(f32::NEG_INFINITY, larger);
    block_weights(logits, Weight::new(largest, temperature), weights);
}
