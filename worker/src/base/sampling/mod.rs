//! From logits to a token: pure, and the same whatever else is in the batch.
//!
//! A vocabulary has up to a few hundred thousand tokens and every row is read on the way to its answer, so nothing here sorts it or takes its
//! exponentials one by one: filters are cuts found by selection among the tokens that can matter. Rows are independent of each other and may be
//! sampled on several threads.

mod row;
mod weight;

use std::collections::HashMap;

use rand::SeedableRng as _;
use rand::rand_core::Rng as _;
use rand_chacha::ChaCha8Rng;

use row::Candidates;
pub use row::Row;
use weight::{Weight, pick, total};

use crate::exchange::wire::{GenerateRequest, LOWEST_LOGPROB, Sampling, TokenLogprob};

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
        let Sampling { logit_bias, repetition_penalty, frequency_penalty, presence_penalty, .. } = &self.sampling;
        self.temperature == 0.0 && logit_bias.is_empty() && (*repetition_penalty, *frequency_penalty, *presence_penalty) == (1.0, 0.0, 0.0)
    }

    /// Chooses a token. Of equal logits the lowest id counts as the larger.
    pub fn sample(&mut self, row: &Row<'_>) -> u32 {
        let Sampling { logit_bias, repetition_penalty, frequency_penalty, presence_penalty, .. } = &self.sampling;
        let penalised = (*repetition_penalty, *frequency_penalty, *presence_penalty) != (1.0, 0.0, 0.0);
        if !penalised && logit_bias.is_empty() {
            return self.choose(row);
        }
        let mut moved = row.logits().to_vec();
        self.shift(&mut moved);
        // What the wire allows moves no logit of a finite row beyond the finite, unless it was on the verge.
        let token = Row::read(&moved).map_or_else(|| row.likeliest(), |row| self.choose(&row));
        if penalised {
            *self.counts.entry(token).or_default() += 1;
        }
        token
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

    fn choose(&mut self, row: &Row<'_>) -> u32 {
        if self.temperature == 0.0 {
            return row.likeliest();
        }
        // One number per token, drawn before anything else, keeps the sequence of draws independent of the filter.
        let share = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let weight = Weight::new(row.largest(), self.temperature);
        if self.top_p >= 1.0 && self.sampling.min_p == 0.0 && self.sampling.top_k == 0 {
            return pick(row.logits(), weight, share) as u32;
        }
        let candidates = self.candidates(row, weight);
        candidates.ids[pick(&candidates.logits, weight, share)]
    }

    /// What the filters leave: `min_p`, then `top_k`, then `top_p`.
    fn candidates(&self, row: &Row<'_>, weight: Weight) -> Candidates {
        let Sampling { min_p, top_k, .. } = self.sampling;
        if min_p == 0.0 && top_k == 0 {
            return row.nucleus(weight, self.top_p);
        }
        let mut candidates = row.at_least(row.reached_by(top_k as usize).max(weight.logit(min_p)));
        if top_k > 0 {
            candidates.keep_count(top_k as usize);
        }
        if self.top_p < 1.0 {
            let all = total(&candidates.logits, weight);
            candidates.keep_weight(weight, f64::from(self.top_p) * all);
        }
        candidates
    }
}

/// Log probability of `token` and of the `count` likeliest tokens.
pub fn logprobs(row: &Row<'_>, token: u32, count: usize) -> TokenLogprob {
    let sum = total(row.logits(), Weight::new(row.largest(), 1.0)).ln();
    let logprob = |logit: f32| ((f64::from(logit - row.largest()) - sum) as f32).max(LOWEST_LOGPROB);
    let mut top = match count {
        0 => Vec::new(),
        _ => row.at_least(row.reached_by(count)).sorted(),
    };
    top.truncate(count);
    let top = top.into_iter().map(|(id, logit)| (id, logprob(logit))).collect();
    TokenLogprob { token, logprob: row.logits().get(token as usize).map(|logit| logprob(*logit)), top }
}

#[cfg(test)]
mod tests;
