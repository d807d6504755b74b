//! A row of logits, of which most is passed over: the maxima of its blocks say where the likely tokens are.

use super::weight::{BLOCK, Cut, Weight, cut, total};
use crate::kernel::cpu::vectorised;

/// Maxima of a block: logit i counts for maximum i mod 16.
const LANES: usize = 16;
/// Logits that are compared at once.
const GROUP: usize = 32;
/// Logits from which the weight of the unlikely ones is judged.
const SAMPLE: usize = 512;

/// The logits of one position, none of them NaN and the largest finite.
pub struct Row<'a> {
    logits: &'a [f32],
    /// The largest logit of each block.
    maxima: Vec<f32>,
    largest: f32,
}

impl<'a> Row<'a> {
    /// None when the logits say nothing: one is NaN, or the largest is infinite.
    pub fn read(logits: &'a [f32]) -> Option<Self> {
        let mut maxima = vec![f32::NEG_INFINITY; logits.len().div_ceil(BLOCK)];
        let strange = block_maxima(logits, &mut maxima);
        let largest = maxima.iter().copied().fold(f32::NEG_INFINITY, larger);
        (!strange && largest.is_finite()).then_some(Self { logits, maxima, largest })
    }

    pub(super) fn logits(&self) -> &'a [f32] {
        self.logits
    }

    pub(super) fn largest(&self) -> f32 {
        self.largest
    }

    /// The first token that has the largest logit.
    pub(super) fn likeliest(&self) -> u32 {
        let block = self.maxima.iter().position(|maximum| *maximum == self.largest).unwrap_or_default();
        let blocks = &self.logits[block * BLOCK..];
        (block * BLOCK + blocks.iter().position(|logit| *logit == self.largest).unwrap_or_default()) as u32
    }

    /// A logit that at least `count` tokens reach, close to the largest such: `count` blocks have maxima that do.
    pub(super) fn reached_by(&self, count: usize) -> f32 {
        match (1..=self.maxima.len()).contains(&count) {
            true => *self.maxima.clone().select_nth_unstable_by(count - 1, |one, other| other.total_cmp(one)).1,
            false => f32::MIN,
        }
    }

    /// The tokens whose logits are at least `floor`.
    pub(super) fn at_least(&self, floor: f32) -> Candidates {
        // A token that cannot come is no candidate, whatever the floor.
        let floor = floor.max(f32::MIN);
        let mut candidates = Candidates { ids: Vec::new(), logits: Vec::new() };
        for (block, logits) in self.logits.chunks(BLOCK).enumerate().filter(|(block, _)| self.maxima[*block] >= floor) {
            append(&mut candidates, block * BLOCK, logits, floor);
        }
        candidates
    }

    /// The fewest of the likeliest tokens that have `share` of the weight of all.
    pub(super) fn nucleus(&self, weight: Weight, share: f32) -> Candidates {
        let all = total(self.logits, weight);
        let (target, tail) = (f64::from(share) * all, (1.0 - f64::from(share)) * all);
        // Tokens that weigh less than an equal part of the tail weigh less than it together. Half of it: sums are rounded.
        let proven = weight.logit((tail / self.logits.len() as f64 / 2.0) as f32);
        let likely = self.above_tail(weight, tail * 0.75);
        for floor in [likely, likely.midpoint(proven)] {
            let mut candidates = self.at_least(floor);
            if total(&candidates.logits, weight) >= target {
                candidates.keep_weight(weight, target);
                return candidates;
            }
        }
        let mut candidates = self.at_least(proven);
        candidates.keep_weight(weight, target);
        candidates
    }

    /// A logit below which the tokens weigh about `tail` together, as far as some of them tell.
    fn above_tail(&self, weight: Weight, tail: f64) -> f32 {
        let step = self.logits.len().div_ceil(SAMPLE);
        let mut sample: Vec<f32> = self.logits.iter().copied().step_by(step).collect();
        sample.sort_unstable_by(f32::total_cmp);
        let mut left = tail / step as f64;
        let beyond = |logit: &f32| {
            left -= f64::from(weight.of(*logit));
            left < 0.0
        };
        sample.into_iter().find(beyond).unwrap_or(self.largest)
    }
}

#[inline(always)]
fn larger(one: f32, other: f32) -> f32 {
    if other > one { other } else { one }
}

vectorised! {
    /// Writes the maximum of each block, passing NaN over; returns whether there was one.
    fn block_maxima(logits: &[f32], maxima: &mut [f32]) -> bool {
        let mut strange = [0u32; LANES];
        for (block, maximum) in logits.chunks(BLOCK).zip(maxima) {
            let mut lanes = [f32::NEG_INFINITY; LANES];
            let groups = block.chunks_exact(LANES);
            let rest = groups.remainder();
            for group in groups {
                for ((lane, strange), logit) in lanes.iter_mut().zip(&mut strange).zip(group) {
                    *lane = larger(*lane, *logit);
                    *strange |= u32::from(logit.is_nan());
                }
            }
            for ((lane, strange), logit) in lanes.iter_mut().zip(&mut strange).zip(rest) {
                *lane = larger(*lane, *logit);
                *strange |= u32::from(logit.is_nan());
            }
            let mut width = LANES;
            while width > 1 {
                width /= 2;
                for lane in 0..width {
                    lanes[lane] = larger(lanes[lane], lanes[lane + width]);
                }
            }
            *maximum = lanes[0];
        }
        strange != [0; LANES]
    }
}

/// One bit for each logit that reaches `floor`.
#[inline(always)]
fn bits(group: &[f32], floor: f32) -> u32 {
    group.iter().enumerate().fold(0, |bits, (place, logit)| bits | (u32::from(*logit >= floor) << place))
}

vectorised! {
    /// Appends the tokens of a block that reach `floor`; the first has the id `first`.
    fn append(candidates: &mut Candidates, first: usize, block: &[f32], floor: f32) {
        let groups = block.chunks_exact(GROUP);
        let rest = bits(groups.remainder(), floor);
        for (index, mut bits) in groups.map(|group| bits(group, floor)).chain([rest]).enumerate() {
            while bits != 0 {
                let place = index * GROUP + bits.trailing_zeros() as usize;
                candidates.ids.push((first + place) as u32);
                candidates.logits.push(block[place]);
                bits &= bits - 1;
            }
        }
    }
}

/// Tokens that may be drawn, in the order of their ids.
pub struct Candidates {
    pub ids: Vec<u32>,
    pub logits: Vec<f32>,
}

impl Candidates {
    /// Leaves the `count` largest.
    pub fn keep_count(&mut self, count: usize) {
        if count < self.ids.len() {
            self.keep(cut(&self.logits, Weight::ONE, count as f64));
        }
    }

    /// Leaves the fewest of the largest that weigh `target` together.
    pub fn keep_weight(&mut self, weight: Weight, target: f64) {
        self.keep(cut(&self.logits, weight, target));
    }

    /// What is cut off stays, and weighs nothing.
    fn keep(&mut self, Cut { logit: least, mut equals }: Cut) {
        for logit in &mut self.logits {
            *logit = if *logit < least { f32::NEG_INFINITY } else { *logit };
        }
        for logit in self.logits.iter_mut().filter(|logit| **logit == least) {
            match equals.checked_sub(1) {
                Some(left) => equals = left,
                None => *logit = f32::NEG_INFINITY,
            }
        }
    }

    /// Ids and logits, the largest first, of equals the lowest id.
    pub fn sorted(self) -> Vec<(u32, f32)> {
        let mut pairs: Vec<_> = self.ids.into_iter().zip(self.logits).collect();
        pairs.sort_by(|(_, one), (_, other)| other.total_cmp(one));
        pairs
    }
}
