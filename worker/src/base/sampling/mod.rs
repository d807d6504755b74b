//! From logits to a token: pure, and the same whatever else is in the batch.
//!
//! A vocabulary has up to a few hundred thousand tokens and every row is read on the way to its answer, so nothing here sorts it or takes its
//! exponentials one by one. The device says of every block of logits how large and how heavy it is; that tells in which few of them the token is
//! to be found, and only those are copied to the host. Filters are cuts found by selection among them. Rows are independent of each other and may
//! be sampled on several threads.

mod row;
mod weight;

use std::collections::HashMap;

use rand::SeedableRng as _;
use rand::rand_core::Rng as _;
use rand_chacha::ChaCha8Rng;

use row::Candidates;
pub use row::{Row, Sight};
use weight::{pick, total};

use crate::exchange::wire::{GenerateRequest, LOWEST_LOGPROB, Sampling, TokenLogprob};
use crate::kernel::LOGIT_BLOCK;
use crate::kernel::cpu::Weight;

/// How tokens of one answer are chosen.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    sampling: Sampling,
    /// How often the answer holds each of its tokens; the prompt's own are there with 0. Empty while no penalty asks for it.
    counts: HashMap<u32, u32>,
    random: ChaCha8Rng,
}

impl Sampler {
    /// The sampler of a request that has been checked.
    pub fn new(request: &GenerateRequest) -> Self {
        let GenerateRequest { temperature, top_p, sampling, .. } = request;
        let counted = if sampling.repetition_penalty == 1.0 { &[] } else { request.prompt.as_slice() };
        Self {
            temperature: *temperature,
            top_p: *top_p,
            sampling: sampling.clone(),
            counts: counted.iter().map(|token| (*token, 0)).collect(),
            random: ChaCha8Rng::seed_from_u64(request.seed.unwrap_or_else(rand::random)),
        }
    }

    /// Whether the likeliest token is taken, as the logits are.
    pub fn is_greedy(&self) -> bool {
        self.temperature == 0.0 && !self.moves_logits()
    }

    fn is_penalising(&self) -> bool {
        let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = &self.sampling;
        (*repetition_penalty, *frequency_penalty, *presence_penalty) != (1.0, 0.0, 0.0)
    }

    fn moves_logits(&self) -> bool {
        self.is_penalising() || !self.sampling.logit_bias.is_empty()
    }

    /// The temperature at which a row is looked at, above 0.
    pub fn temperature(&self) -> f32 {
        if self.temperature == 0.0 { 1.0 } else { self.temperature }
    }

    /// Blocks of a row from which a token can be chosen, as far as one sees from afar.
    pub fn blocks(&self, sight: &Sight<'_>) -> Vec<u32> {
        if self.moves_logits() {
            return sight.all();
        }
        if self.temperature == 0.0 {
            return sight.reaching(sight.largest());
        }
        match self.is_filtering() {
            true => sight.reaching(self.floor(sight)),
            false => vec![sight.pick(self.draw().0).0 as u32],
        }
    }

    /// Chooses a token; none when more of the row has to be here. Of equal logits the lowest id counts as the larger.
    pub fn sample(&mut self, row: &Row<'_>) -> Option<u32> {
        if !self.moves_logits() {
            return self.choose(row);
        }
        let mut moved = row.all()?.to_vec();
        self.shift(&mut moved);
        // What the wire allows moves no logit of a finite row beyond the finite, unless it was on the verge.
        let token = match Row::whole(moved, self.temperature()) {
            Some(row) => self.choose(&row)?,
            None => row.likeliest()?,
        };
        if self.is_penalising() {
            *self.counts.entry(token).or_default() += 1;
        }
        Some(token)
    }

    /// Adds the bias, then takes the penalties.
    fn shift(&self, logits: &mut [f32]) {
        let Sampling { logit_bias, repetition_penalty, frequency_penalty, presence_penalty, .. } = &self.sampling;
        for (token, bias) in logit_bias {
            logits[*token as usize] += bias;
        }
        for (token, count) in &self.counts {
            let logit = &mut logits[*token as usize];
            *logit = if *logit > 0.0 { *logit / repetition_penalty } else { *logit * repetition_penalty };
            *logit -= frequency_penalty * *count as f32;
            *logit -= if *count > 0 { *presence_penalty } else { 0.0 };
        }
    }

    /// The share of all weight at which the next token lies, and what the draws after it come from. One number per token keeps their sequence
    /// independent of the filter.
    fn draw(&self) -> (f64, ChaCha8Rng) {
        let mut random = self.random.clone();
        ((random.next_u64() >> 11) as f64 / (1u64 << 53) as f64, random)
    }

    fn choose(&mut self, row: &Row<'_>) -> Option<u32> {
        if self.temperature == 0.0 {
            return row.likeliest();
        }
        let (share, random) = self.draw();
        let token = if self.is_filtering() {
            let candidates = self.candidates(row)?;
            candidates.ids[pick(&candidates.logits, row.sight.weight(), share)]
        } else {
            row.pick(share)?
        };
        self.random = random;
        Some(token)
    }

    fn is_filtering(&self) -> bool {
        self.top_p < 1.0 || self.is_cutting()
    }

    /// Whether something is cut off before `top_p`.
    fn is_cutting(&self) -> bool {
        self.sampling.min_p > 0.0 || self.sampling.top_k > 0
    }

    /// A logit that all reach which the filters leave.
    fn floor(&self, sight: &Sight<'_>) -> f32 {
        let Sampling { min_p, top_k, .. } = self.sampling;
        match self.is_cutting() {
            true => sight.reached_by(top_k as usize).max(sight.weight().logit(min_p)),
            false => sight.nucleus(self.top_p),
        }
    }

    /// What the filters leave: `min_p`, then `top_k`, then `top_p`. None when that is not here for certain.
    fn candidates(&self, row: &Row<'_>) -> Option<Candidates> {
        let (top_k, weight) = (self.sampling.top_k as usize, row.sight.weight());
        if !self.is_cutting() {
            return self.nucleus(row, weight);
        }
        let mut candidates = row.at_least(self.floor(&row.sight));
        if top_k > 0 {
            candidates.keep_count(top_k);
        }
        if self.top_p < 1.0 {
            let here = total(&candidates.logits, weight);
            candidates.keep_weight(weight, f64::from(self.top_p) * here);
        }
        Some(candidates)
    }

    /// The fewest of the likeliest tokens that have `top_p` of the weight of all.
    fn nucleus(&self, row: &Row<'_>, weight: Weight) -> Option<Candidates> {
        let target = f64::from(self.top_p) * row.sight.total();
        let floors = if row.all().is_some() { row.nucleus(self.top_p).to_vec() } else { vec![self.floor(&row.sight)] };
        for floor in floors {
            let mut candidates = row.at_least(floor);
            if total(&candidates.logits, weight) >= target {
                candidates.keep_weight(weight, target);
                return Some(candidates);
            }
        }
        // As much as there is: sums are rounded.
        row.all().map(|_| row.at_least(f32::MIN))
    }
}

/// The blocks of a row that [`logprobs`] reads.
pub fn logprob_blocks(sight: &Sight<'_>, token: Option<u32>, count: usize) -> Vec<u32> {
    let mut blocks = if count == 0 { Vec::new() } else { sight.reaching(sight.reached_by(count)) };
    blocks.extend(token.map(|token| token / LOGIT_BLOCK as u32));
    blocks
}

/// Log probability of `token` and of the `count` likeliest tokens.
pub fn logprobs(row: &Row<'_>, token: u32, count: usize) -> TokenLogprob {
    let mut top = match count {
        0 => Vec::new(),
        _ => row.at_least(row.sight.reached_by(count)).sorted(),
    };
    top.truncate(count);
    let top = top.into_iter().map(|(id, logit)| (id, row.logprob_of(logit).max(LOWEST_LOGPROB))).collect();
    TokenLogprob { token, logprob: row.logprob(token).map(|logprob| logprob.max(LOWEST_LOGPROB)), top }
}

#[cfg(test)]
mod tests;
