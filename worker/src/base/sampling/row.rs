//! What is seen of a row of logits: of every block its maximum and weight, of few the logits themselves.

use std::borrow::Cow;

use super::weight::{Cut, cut, pick_block, pick_within, sum};
use crate::kernel::cpu::{Weight, outline, vectorised};
use crate::kernel::{LOGIT_BLOCK, Outline};

/// Logits that are compared at once.
const GROUP: usize = 32;
/// Logits from which the weight of the unlikely ones is judged.
const SAMPLE: usize = 512;

/// The logits of one position from afar.
#[derive(Clone)]
pub struct Sight<'a> {
    /// The largest logit of each block.
    maxima: Cow<'a, [f32]>,
    /// What each block weighs at `temperature`.
    weights: Cow<'a, [f32]>,
    temperature: f32,
    largest: f32,
}

impl<'a> Sight<'a> {
    /// Look number `index` of `count`, at a temperature above 0.
    pub fn new(outline: &'a Outline, index: usize, count: usize, temperature: f32) -> Self {
        let blocks = outline.maxima.len() / count;
        let own = index * blocks..(index + 1) * blocks;
        Self::of(Cow::Borrowed(&outline.maxima[own.clone()]), Cow::Borrowed(&outline.weights[own]), temperature)
    }

    fn of(maxima: Cow<'a, [f32]>, weights: Cow<'a, [f32]>, temperature: f32) -> Self {
        let largest = maxima.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        Self { maxima, weights, temperature, largest }
    }

    /// The weights of tokens.
    pub(super) fn weight(&self) -> Weight {
        Weight::new(self.largest, self.temperature)
    }

    /// What all tokens weigh together.
    pub fn total(&self) -> f64 {
        sum(&self.weights)
    }

    /// All blocks.
    pub fn all(&self) -> Vec<u32> {
        (0..self.maxima.len() as u32).collect()
    }

    /// The blocks that hold a logit of at least `floor`.
    pub(super) fn reaching(&self, floor: f32) -> Vec<u32> {
        self.all().into_iter().filter(|block| self.maxima[*block as usize] >= floor).collect()
    }

    /// Where the running sum of the weights exceeds `share` of their total: a block, and what is left for it.
    pub(super) fn pick(&self, share: f64) -> (usize, f64) {
        pick_block(&self.weights, share)
    }

    pub(super) fn largest(&self) -> f32 {
        self.largest
    }

    /// A logit that at least `count` tokens reach, close to the largest such: `count` blocks have maxima that do.
    pub(super) fn reached_by(&self, count: usize) -> f32 {
        match (1..=self.maxima.len()).contains(&count) {
            true => *self.maxima.to_vec().select_nth_unstable_by(count - 1, |one, other| other.total_cmp(one)).1,
            false => f32::MIN,
        }
    }

    /// A logit that the likeliest tokens with `share` of the weight of all probably reach: the maximum of the heaviest block beyond those that have
    /// more than that share together. What stays below in them may weigh half of the rest.
    pub(super) fn nucleus(&self, share: f32) -> f32 {
        let mut blocks: Vec<(f32, f32)> = self.maxima.iter().copied().zip(self.weights.iter().copied()).collect();
        blocks.sort_unstable_by(|(one, _), (other, _)| other.total_cmp(one));
        let mut left = self.total() * (1.0 + f64::from(share)) / 2.0;
        let within = |(_, weight): &&(f32, f32)| {
            left -= f64::from(*weight);
            left > 0.0
        };
        let count = blocks.iter().take_while(within).count();
        blocks.get(count + 1).map_or(f32::MIN, |(maximum, _)| *maximum)
    }
}

/// The logits of one position, none of them NaN and the largest finite: those of some blocks.
pub struct Row<'a> {
    pub(super) sight: Sight<'a>,
    /// Σ e^(logit - largest).
    normaliser: f64,
    /// Blocks that are here, ascending.
    blocks: Cow<'a, [u32]>,
    /// Their logits, one after the other.
    logits: Cow<'a, [f32]>,
}

impl<'a> Row<'a> {
    /// `blocks` of the row, ascending, with their `logits`. `normaliser` is what all tokens weigh at temperature 1.
    pub fn new(sight: Sight<'a>, normaliser: f64, blocks: &'a [u32], logits: &'a [f32]) -> Self {
        Self { sight, normaliser, blocks: Cow::Borrowed(blocks), logits: Cow::Borrowed(logits) }
    }

    /// A row of which everything is here; none when the largest logit is infinite. Log probabilities have no meaning in it.
    pub(super) fn whole(logits: Vec<f32>, temperature: f32) -> Option<Self> {
        let blocks = logits.len().div_ceil(LOGIT_BLOCK);
        let (mut maxima, mut weights) = (vec![0.0; blocks], vec![0.0; blocks]);
        outline(&logits, temperature, &mut maxima, &mut weights);
        let sight = Sight::of(maxima.into(), weights.into(), temperature);
        let blocks = sight.all().into();
        sight.largest.is_finite().then_some(Self { normaliser: sight.total(), sight, blocks, logits: logits.into() })
    }

    /// All logits, if they are here.
    pub(super) fn all(&self) -> Option<&[f32]> {
        (self.blocks.len() == self.sight.maxima.len()).then_some(&self.logits)
    }

    /// The blocks that are here: number, logits.
    fn blocks(&self) -> impl Iterator<Item = (usize, &[f32])> {
        self.blocks.iter().map(|block| *block as usize).zip(self.logits.chunks(LOGIT_BLOCK))
    }

    fn block(&self, number: usize) -> Option<&[f32]> {
        let place = self.blocks.binary_search(&(number as u32)).ok()?;
        self.logits.chunks(LOGIT_BLOCK).nth(place)
    }

    /// The first token that has the largest logit.
    pub(super) fn likeliest(&self) -> Option<u32> {
        let first =
            |(block, logits): (usize, &[f32])| Some(block * LOGIT_BLOCK + logits.iter().position(|logit| *logit == self.sight.largest)?);
        self.blocks().find_map(first).map(|token| token as u32)
    }

    /// The first token at which the running sum of the weights exceeds `share` (below 1) of their total.
    pub(super) fn pick(&self, share: f64) -> Option<u32> {
        let (block, left) = self.sight.pick(share);
        Some((block * LOGIT_BLOCK + pick_within(self.block(block)?, self.sight.weight(), left)) as u32)
    }

    /// The log probability of a token, if it is here.
    pub(super) fn logprob(&self, token: u32) -> Option<f32> {
        let logits = self.block(token as usize / LOGIT_BLOCK)?;
        logits.get(token as usize % LOGIT_BLOCK).map(|logit| self.logprob_of(*logit))
    }

    pub(super) fn logprob_of(&self, logit: f32) -> f32 {
        (f64::from(logit - self.sight.largest) - self.normaliser.ln()) as f32
    }

    /// Logits that the likeliest tokens with `share` of the weight of all reach, from probably to certainly; of a whole row.
    pub(super) fn nucleus(&self, share: f32) -> [f32; 3] {
        let weight = self.sight.weight();
        let rest = (1.0 - f64::from(share)) * self.sight.total();
        // Tokens that weigh less than an equal part of the rest weigh less than it together. Half of it: sums are rounded.
        let certain = weight.logit((rest / self.logits.len() as f64 / 2.0) as f32);
        let likely = self.above_tail(weight, rest * 0.75);
        [likely, likely.midpoint(certain), certain]
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
        sample.into_iter().find(beyond).unwrap_or(self.sight.largest)
    }

    /// The tokens whose logits are at least `floor`, which all of them are here.
    pub(super) fn at_least(&self, floor: f32) -> Candidates {
        // A token that cannot come is no candidate, whatever the floor.
        let floor = floor.max(f32::MIN);
        let mut candidates = Candidates { ids: Vec::new(), logits: Vec::new() };
        for (block, logits) in self.blocks().filter(|(block, _)| self.sight.maxima[*block] >= floor) {
            append(&mut candidates, block * LOGIT_BLOCK, logits, floor);
        }
        candidates
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
