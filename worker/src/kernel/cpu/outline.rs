//! Rows of logits block by block, in an order that does not depend on the instructions: maxima, and sums of weights.

use super::{exp, reduce, vectorised};
use crate::kernel::LOGIT_BLOCK;

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

#[inline(always)]
fn larger(one: f32, other: f32) -> f32 {
    if other > one { other } else { one }
}

vectorised! {
    /// The largest logit of each block.
    pub fn block_maxima(logits: &[f32], maxima: &mut [f32]) {
        for (block, maximum) in logits.chunks(LOGIT_BLOCK).zip(maxima) {
            *maximum = reduce(block, f32::NEG_INFINITY, |_, one, other| larger(one, other), larger);
        }
    }
}

vectorised! {
    /// What each block weighs.
    pub fn block_weights(logits: &[f32], weight: Weight, weights: &mut [f32]) {
        for (block, out) in logits.chunks(LOGIT_BLOCK).zip(weights) {
            *out = reduce(block, 0.0, |_, sum, logit| sum + weight.of(logit), |one, other| one + other);
        }
    }
}

/// Maxima and weights of a row's blocks at a temperature above 0.
pub fn outline(logits: &[f32], temperature: f32, maxima: &mut [f32], weights: &mut [f32]) {
    block_maxima(logits, maxima);
    let largest = maxima.iter().copied().fold(f32::NEG_INFINITY, larger);
    block_weights(logits, Weight::new(largest, temperature), weights);
}
