//! From logits to a token: pure, and the same whatever else is in the batch.

use rand::SeedableRng as _;
use rand::rand_core::Rng as _;
use rand_chacha::ChaCha8Rng;

use crate::exchange::wire::{LOWEST_LOGPROB, TokenLogprob};

/// How tokens of one answer are chosen.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: f32,
    random: ChaCha8Rng,
}

impl Sampler {
    /// `temperature` 0 is greedy; `top_p` in (0, 1].
    pub fn new(temperature: f32, top_p: f32, seed: u64) -> Self {
        Self { temperature, top_p, random: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Chooses a token. Of equal logits the lowest id counts as the larger.
    pub fn sample(&mut self, logits: &[f32]) -> u32 {
        if self.temperature == 0.0 {
            return greedy(logits);
        }
        let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let temperature = f64::from(self.temperature);
        let weight = |logit: f32| (f64::from(logit - largest) / temperature).exp();
        // One number per token, drawn before anything else, keeps the sequence of draws independent of the filter.
        let draw = (self.random.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        if self.top_p >= 1.0 {
            let total: f64 = logits.iter().map(|logit| weight(*logit)).sum();
            return pick(logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(*logit))), draw * total);
        }
        let mut candidates: Vec<(u32, f64)> = logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(*logit))).collect();
        candidates.sort_unstable_by(|one, other| other.1.total_cmp(&one.1).then(one.0.cmp(&other.0)));
        let total: f64 = candidates.iter().map(|(_, weight)| weight).sum();
        let mut sum = 0.0;
        let kept = candidates.iter().take_while(|(_, weight)| {
            let within = sum < f64::from(self.top_p) * total;
            sum += if within { *weight } else { 0.0 };
            within
        });
        let kept = kept.count().max(1);
        pick(candidates[..kept].iter().copied(), draw * sum)
    }
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

    #[test]
    fn greedy_takes_the_first_of_the_largest() {
        assert_eq!(Sampler::new(0.0, 1.0, 0).sample(&[0.5, 2.0, 2.0, -1.0]), 1);
    }

    #[test]
    fn equal_seeds_give_equal_tokens_and_frequencies_follow_the_probabilities() {
        let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
        let draw = |seed| {
            let mut sampler = Sampler::new(1.0, 1.0, seed);
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
            let mut sampler = Sampler::new(1.0, top_p, 3);
            let mut seen: Vec<_> = (0..500).map(|_| sampler.sample(&logits)).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, allowed, "{top_p}");
        }
    }

    #[test]
    fn a_low_temperature_is_nearly_greedy() {
        let mut sampler = Sampler::new(0.01, 1.0, 3);
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
