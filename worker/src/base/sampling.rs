//! From logits to a token: pure, and the same whatever else is in the batch.

use std::collections::HashMap;

use rand::SeedableRng as _;
use rand::rand_core::Rng as _;
use rand_chacha::ChaCha8Rng;

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
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        let Sampling { logit_bias, repetition_penalty, frequency_penalty, presence_penalty, .. } = &self.sampling;
        let penalised = (*repetition_penalty, *frequency_penalty, *presence_penalty) != (1.0, 0.0, 0.0);
        if !penalised && logit_bias.is_empty() {
            return self.choose(logits);
        }
        let mut moved = logits.to_vec();
        self.shift(&mut moved);
        let token = self.choose(&moved);
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

    fn choose(&mut self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return greedy(logits);
        }
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let temperature = f64::from(self.temperature);
        // The likeliest token weighs 1.
        let weight = |logit: f32| (f64::from(logit - largest) / temperature).exp();
        // One number per token, drawn before anything else, keeps the sequence of draws independent of the filter.
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        let Sampling { min_p, top_k, .. } = self.sampling;
        if self.top_p >= 1.0 && min_p == 0.0 && top_k == 0 {
            let total: f64 = logits.iter().map(|logit| weight(*logit)).sum();
            return pick(logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(*logit))), draw * total);
        }
        let mut candidates: Vec<(u32, f64)> = logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(*logit))).collect();
        candidates.retain(|(_, weight)| *weight >= f64::from(min_p));
        let kept = nucleus(&mut candidates, top_k as usize, f64::from(self.top_p));
        pick(kept.iter().copied(), draw * kept.iter().map(|(_, weight)| weight).sum::<f64>())
    }
}

/// The `top_k` largest candidates, and of these the fewest that reach `top_p` of their sum; best first.
fn nucleus(candidates: &mut Vec<(u32, f64)>, top_k: usize, top_p: f64) -> &[(u32, f64)] {
    let likelier = |one: &(u32, f64), other: &(u32, f64)| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0));
    if (1..candidates.len()).contains(&top_k) {
        candidates.select_nth_unstable_by(top_k, likelier);
        candidates.truncate(top_k);
    }
    candidates.sort_unstable_by(likelier);
    let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
    let mut sum = 0.0;
    let within = |(_, weight): &&(u32, f64)| {
        let within = sum < top_p * total;
        sum += weight;
        within
    };
    let kept = candidates.iter().take_while(within).count().max(1);
    &candidates[..kept]
}

/// The first candidate at which the running sum exceeds `target`.
fn pick(candidates: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let (mut sum, mut last) = (0.0, 0);
    for (id, weight) in candidates {
        if weight > 0.0 {
            last = id;
        }
        sum += weight;
        if sum > target {
            return id;
        }
    }
    last
}

/// The largest logit's token.
fn greedy(logits: &[f32]) -> u32 {
    let mut best = (0, f32::NEG_INFINITY);
    for (id, logit) in logits.iter().enumerate() {
        if *logit > best.1 {
            best = (id, *logit);
        }
    }
    best.0 as u32
}

/// Log probability of `token` and of the `count` likeliest tokens.
pub fn logprobs(logits: &[f32], token: u32, count: usize) -> TokenLogprob {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let sum: f64 = logits.iter().map(|logit| f64::from(logit - largest).exp()).sum();
    let logprob = |logit: f32| ((f64::from(logit - largest) - sum.ln()) as f32).max(LOWEST_LOGPROB);
    let mut top: Vec<u32> = Vec::with_capacity(count + 1);
    for (id, logit) in logits.iter().enumerate().filter(|_| count > 0) {
        if top.len() == count && top.last().is_some_and(|last| logits[*last as usize] >= *logit) {
            continue;
        }
        let place = top.partition_point(|other| logits[*other as usize] >= *logit);
        top.insert(place, id as u32);
        top.truncate(count);
    }
    let top = top.into_iter().map(|id| (id, logprob(logits[id as usize]))).collect();
    TokenLogprob { token, logprob: logits.get(token as usize).map(|logit| logprob(*logit)), top }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sampler(temperature: f32, top_p: f32, seed: u64, sampling: Sampling) -> Sampler {
        Sampler::new(&GenerateRequest { temperature, top_p, seed: Some(seed), sampling, ..GenerateRequest::greedy(vec![0, 3], 1) })
    }

    /// All tokens that come when one draws often.
    fn drawn(mut sampler: Sampler, logits: &[f32]) -> Vec<u32> {
        let mut seen: Vec<_> = (0..500).map(|_| sampler.sample(logits)).collect();
        seen.sort_unstable();
        seen.dedup();
        seen
    }

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(sampler(0.0, 1.0, 0, Sampling::default()).sample(&[0.5, 2.0, 2.0, -1.0]), 1);
    }

    #[test]
    fn equal_seeds_give_equal_tokens_and_frequencies_follow_the_probabilities() {
        let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let draw = |seed| {
            let mut sampler = sampler(1.0, 1.0, seed, Sampling::default());
            (0..4000).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
        for (id, expected) in [(0, 0.7), (1, 0.2), (2, 0.1)] {
            let share = draw(7).iter().filter(|token| **token == id).count() as f64 / 4000.0;
            assert!((share - expected).abs() < 0.03, "{id}: {share}");
        }
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let logits = [0.2f32.ln(), 0.5f32.ln(), 0.3f32.ln()];
        for (top_p, allowed) in [(0.4, &[1][..]), (0.6, &[1, 2]), (0.95, &[0, 1, 2])] {
            assert_eq!(drawn(sampler(1.0, top_p, 3, Sampling::default()), &logits), allowed, "{top_p}");
        }
    }

    // vLLM's order: `min_p` counts from the likeliest token at the temperature asked for, `top_p` from what `min_p` and `top_k` left.
    #[test]
    fn filters_leave_what_vllm_leaves() {
        let logits = [0.40f32, 0.30, 0.15, 0.10, 0.05].map(f32::ln);
        for (temperature, top_p, min_p, top_k, allowed) in [
            (1.0, 1.0, 0.0, 1, &[0][..]),
            (1.0, 1.0, 0.0, 3, &[0, 1, 2]),
            (1.0, 1.0, 0.0, 5, &[0, 1, 2, 3, 4]),
            (1.0, 1.0, 0.0, 50_000, &[0, 1, 2, 3, 4]),
            (1.0, 1.0, 0.3, 0, &[0, 1, 2]),
            (1.0, 1.0, 1.0, 0, &[0]),
            // At half the temperature the shares are squared: 1, 0.5625, 0.14.
            (0.5, 1.0, 0.3, 0, &[0, 1]),
            (2.0, 1.0, 0.3, 0, &[0, 1, 2, 3, 4]),
            // `top_p` counts from what is left: of all five tokens 0.82 takes three, of the likeliest three (0.85) two.
            (1.0, 0.5, 0.0, 3, &[0, 1]),
            (1.0, 0.82, 0.0, 3, &[0, 1]),
            (1.0, 0.82, 0.0, 0, &[0, 1, 2]),
            (1.0, 0.82, 0.3, 0, &[0, 1]),
        ] {
            let sampling = Sampling { min_p, top_k, ..Sampling::default() };
            assert_eq!(drawn(sampler(temperature, top_p, 3, sampling), &logits), allowed, "{temperature} {top_p} {min_p} {top_k}");
        }
        assert_eq!(drawn(sampler(1.0, 1.0, 3, Sampling { top_k: 2, ..Sampling::default() }), &[1.0; 4]), [0, 1], "of equals the first");
    }

    // Expected logits: numpy 2.4 on float32, in vLLM's order (`logits_processors`, then `apply_penalties` of model_executor/layers/utils.py):
    // l[bias] += b; seen = prompt ∪ answer; l = where(seen, where(l > 0, l / r, l * r), l); l -= f * count(answer); l -= p * (count(answer) > 0)
    #[test]
    fn logits_move_as_in_vllm() {
        let logits = [2.0f32, 1.5, -1.0, -0.5, 0.25];
        let with = |change: fn(&mut Sampling)| {
            let mut sampling = Sampling::default();
            change(&mut sampling);
            // The prompt is [0, 3], the answer [1, 1, 2].
            let mut sampler = sampler(1.0, 1.0, 0, sampling);
            sampler.counts.extend([(1, 2), (2, 1)]);
            let mut moved = logits;
            sampler.shift(&mut moved);
            moved
        };
        for (change, expected) in [
            ((|s| s.frequency_penalty = 0.5) as fn(&mut Sampling), [2.0, 0.5, -1.5, -0.5, 0.25]),
            (|s| s.frequency_penalty = -2.0, [2.0, 5.5, 1.0, -0.5, 0.25]),
            (|s| s.presence_penalty = 0.5, [2.0, 1.0, -1.5, -0.5, 0.25]),
            (|s| s.repetition_penalty = 2.0, [1.0, 0.75, -2.0, -1.0, 0.25]),
            (|s| s.repetition_penalty = 0.5, [4.0, 3.0, -0.5, -0.25, 0.25]),
            (|s| s.logit_bias = vec![(4, 100.0), (0, -100.0)], [-98.0, 1.5, -1.0, -0.5, 100.25]),
            // The bias comes first: it decides whether a penalty divides or multiplies.
            (|s| (s.logit_bias, s.repetition_penalty) = (vec![(2, 3.0)], 2.0), [1.0, 0.75, 1.0, -1.0, 0.25]),
            (|s| (s.repetition_penalty, s.frequency_penalty, s.presence_penalty) = (2.0, 0.25, 1.0), [1.0, -0.75, -3.25, -1.0, 0.25]),
        ] {
            assert_eq!(with(change), expected);
        }
    }

    #[test]
    fn a_penalty_counts_what_was_drawn_and_greedy_heeds_it() {
        let logits = [3.0, 2.5, 2.0, 1.0];
        let greedy = |sampling| {
            let mut sampler = sampler(0.0, 1.0, 0, sampling);
            (0..6).map(|_| sampler.sample(&logits)).collect::<Vec<_>>()
        };
        assert_eq!(greedy(Sampling::default()), [0; 6]);
        assert_eq!(greedy(Sampling { presence_penalty: 0.75, ..Sampling::default() }), [0, 1, 0, 0, 0, 0]);
        assert_eq!(greedy(Sampling { frequency_penalty: 0.75, ..Sampling::default() }), [0, 1, 0, 2, 1, 0]);
        // Token 0 stands in the prompt.
        assert_eq!(greedy(Sampling { repetition_penalty: 1.25, ..Sampling::default() }), [1, 0, 0, 0, 0, 0]);
        assert_eq!(greedy(Sampling { logit_bias: vec![(3, 2.5)], ..Sampling::default() }), [3; 6]);
    }

    #[test]
    fn a_low_temperature_is_nearly_greedy() {
        let mut sampler = sampler(0.01, 1.0, 3, Sampling::default());
        assert!((0..200).all(|_| sampler.sample(&[1.0, 2.0, 1.5]) == 1));
    }

    #[test]
    fn logprobs_are_normalised_and_sorted() {
        let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
        let found = logprobs(&logits, 0, 2);
        assert!((found.logprob.unwrap() - 0.1f32.ln()).abs() < 1e-6);
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
        assert!((found.top[0].1 - 0.6f32.ln()).abs() < 1e-6);
        assert!(logprobs(&logits, 0, 0).top.is_empty());
        assert_eq!(logprobs(&[0.0, f32::NEG_INFINITY], 1, 2).logprob, Some(LOWEST_LOGPROB));
    }
}
