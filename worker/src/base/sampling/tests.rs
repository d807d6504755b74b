use super::*;
use crate::kernel::Threads;

/// A row of which everything is there.
fn row(logits: &[f32]) -> Row<'static> {
    at(logits, 1.0)
}

fn at(logits: &[f32], temperature: f32) -> Row<'static> {
    Row::whole(logits.to_vec(), temperature).unwrap()
}

/// Lets a sampler see of a row what it wants to see, and everything if that is too little: the token, and in how many goes.
fn sampled(sampler: &mut Sampler, logits: &[f32]) -> (u32, usize) {
    let whole = at(logits, sampler.temperature());
    let blocks = sampler.blocks(&whole.sight);
    let chunk = |block: &u32| logits.chunks(LOGIT_BLOCK).nth(*block as usize).unwrap().to_vec();
    let values: Vec<f32> = blocks.iter().flat_map(chunk).collect();
    let few = Row::new(whole.sight.clone(), 1.0, &blocks, &values);
    match sampler.sample(&few) {
        Some(token) => (token, 1),
        None => (sampler.sample(&whole).unwrap(), 2),
    }
}

fn sampler(temperature: f32, top_p: f32, seed: u64, sampling: Sampling) -> Sampler {
    Sampler::new(&GenerateRequest { temperature, top_p, seed: Some(seed), sampling, ..GenerateRequest::greedy(vec![0, 3], 1) })
}

/// All tokens that come when one draws often.
fn drawn(mut sampler: Sampler, logits: &[f32]) -> Vec<u32> {
    let mut seen: Vec<_> = (0..500).map(|_| sampled(&mut sampler, logits).0).collect();
    seen.sort_unstable();
    seen.dedup();
    seen
}

#[test]
fn greedy_takes_the_first_of_the_largest() {
    assert_eq!(sampled(&mut sampler(0.0, 1.0, 0, Sampling::default()), &[0.5, 2.0, 2.0, -1.0]).0, 1);
}

#[test]
fn equal_seeds_give_equal_tokens_and_frequencies_follow_the_probabilities() {
    let logits = [0.7f32.ln(), 0.2f32.ln(), 0.1f32.ln()];
    let draw = |seed| {
        let mut sampler = sampler(1.0, 1.0, seed, Sampling::default());
        (0..4000).map(|_| sampled(&mut sampler, &logits).0).collect::<Vec<_>>()
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
        (0..6).map(|_| sampled(&mut sampler, &logits).0).collect::<Vec<_>>()
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
    assert!((0..200).all(|_| sampled(&mut sampler, &[1.0, 2.0, 1.5]).0 == 1));
}

#[test]
fn logprobs_are_normalised_and_sorted() {
    let logits = [0.1f32.ln(), 0.6f32.ln(), 0.3f32.ln()];
    let found = logprobs(&row(&logits), 0, 2);
    assert!((found.logprob.unwrap() - 0.1f32.ln()).abs() < 1e-6);
    assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 2]);
    assert!((found.top[0].1 - 0.6f32.ln()).abs() < 1e-6);
    assert!(logprobs(&row(&logits), 0, 0).top.is_empty());
    assert_eq!(logprobs(&row(&[0.0, f32::NEG_INFINITY]), 1, 2).logprob, Some(LOWEST_LOGPROB));
}

/// Some thousand logits with many equals, of a seed.
fn noise(seed: u64, count: usize) -> Vec<f32> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let mut uniform = || random.next_u32() as f32 / u32::MAX as f32;
    (0..count).map(|_| ((uniform() + uniform() + uniform()) * 80.0).round() / 6.0).collect()
}

/// Filters by the book, in f64 and with a sort: the ids that are left, and what each weighs.
fn sorted_and_filtered(logits: &[f32], temperature: f32, top_p: f32, Sampling { min_p, top_k, .. }: &Sampling) -> Vec<(u32, f64)> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit - largest) / f64::from(temperature)).exp();
    let mut left: Vec<(u32, f64)> = logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(*logit))).collect();
    left.retain(|(_, weight)| *weight >= f64::from(*min_p));
    left.sort_by(|(one, _), (other, _)| logits[*other as usize].total_cmp(&logits[*one as usize]));
    left.truncate(if *top_k > 0 { *top_k as usize } else { usize::MAX });
    let total: f64 = left.iter().map(|(_, weight)| weight).sum();
    let mut sum = 0.0;
    let within = |(_, weight): &&(u32, f64)| {
        sum += weight;
        top_p == 1.0 || sum - weight < f64::from(top_p) * total
    };
    let count = left.iter().take_while(within).count();
    left.truncate(count);
    left.sort_by_key(|(id, _)| *id);
    left
}

#[test]
fn selection_leaves_what_a_sort_leaves_and_draws_the_same_token() {
    // Shares that no sum of equal weights hits: there rounding may decide otherwise.
    for (seed, count, temperature) in
        [(1, 5, 1.0), (2, 700, 1.0), (3, 5003, 0.3), (4, 5003, 1.0), (5, 5003, 3.0), (6, 5003, 1e6), (7, 64, 1e-30)]
    {
        let logits = noise(seed, count);
        for top_p in [1e-6, 0.1234, 0.5077, 0.9031, 0.99913, 1.0] {
            for (min_p, top_k) in [(0.0, 0), (0.0, 1), (0.0, 40), (0.0, 700), (0.0, 100_000), (0.0107, 0), (0.0107, 40), (1.0, 0), (1.0, 2)]
            {
                let sampling = Sampling { min_p, top_k, ..Sampling::default() };
                let expected = sorted_and_filtered(&logits, temperature, top_p, &sampling);
                let case = format!("{seed} {top_p} {min_p} {top_k}");
                let (row, mut sampler) = (at(&logits, temperature), sampler(temperature, top_p, seed, sampling));
                if sampler.is_filtering() {
                    let Candidates { ids, logits } = sampler.candidates(&row).unwrap();
                    let found: Vec<_> = ids.into_iter().zip(logits).filter(|(_, logit)| logit.is_finite()).map(|(id, _)| id).collect();
                    let same = found.iter().eq(expected.iter().map(|(id, _)| id));
                    assert!(same, "{case}: {} instead of {} tokens", found.len(), expected.len());
                }
                let share = (sampler.random.clone().next_u64() >> 11) as f64 / (1u64 << 53) as f64;
                let mut left = share * expected.iter().map(|(_, weight)| weight).sum::<f64>();
                let drawn = expected.iter().find(|(_, weight)| {
                    left -= weight;
                    left < 0.0
                });
                let mut other = sampler.clone();
                assert_eq!(sampler.sample(&row), drawn.map(|(id, _)| *id), "{case}");
                assert_eq!(Some(sampled(&mut other, &logits).0), drawn.map(|(id, _)| *id), "{case}, of few blocks");
                assert_eq!(sampler.random, other.random, "{case}: one draw per token");
            }
        }
    }
}

#[test]
fn log_probabilities_are_those_of_f64() {
    let logits = noise(9, 5003);
    let sum = logits.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln();
    let mut order: Vec<u32> = (0..5003).collect();
    order.sort_by(|one, other| logits[*other as usize].total_cmp(&logits[*one as usize]));
    for count in [1, 20, 200] {
        let found = logprobs(&row(&logits), 17, count);
        assert!((f64::from(found.logprob.unwrap()) - (f64::from(logits[17]) - sum)).abs() < 2e-6);
        assert_eq!(found.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), order[..count]);
        assert!(found.top.iter().all(|(id, found)| (f64::from(*found) - (f64::from(logits[*id as usize]) - sum)).abs() < 2e-6));
    }
}

// Logits as language models have them: a few likely tokens, and a long tail far below.
#[test]
fn a_token_is_chosen_from_few_blocks_of_a_large_vocabulary() {
    let mut logits = noise(11, 150_000);
    logits.iter_mut().for_each(|logit| *logit = *logit / 4.0 - 10.0);
    for (place, logit) in [(17, 9.0), (90_000, 8.5), (90_001, 8.0), (149_999, 6.0)] {
        logits[place] = logit;
    }
    let whole = row(&logits);
    for (temperature, top_p, min_p, top_k, most) in
        [(0.0, 1.0, 0.0, 0, 1), (1.0, 1.0, 0.0, 0, 1), (0.7, 0.9, 0.0, 0, 3), (1.0, 1.0, 0.05, 0, 3), (1.0, 0.9, 0.0, 20, 30)]
    {
        let mut sampler = sampler(temperature, top_p, 5, Sampling { min_p, top_k, ..Sampling::default() });
        let count = sampler.blocks(&at(&logits, sampler.temperature()).sight).len();
        assert!((1..=most).contains(&count), "{count} blocks at {temperature} {top_p} {min_p} {top_k}");
        assert!((0..200).all(|_| sampled(&mut sampler, &logits).1 == 1), "{temperature} {top_p} {min_p} {top_k}");
    }
    assert_eq!(logprob_blocks(&whole.sight, Some(90_000), 2).len(), 3);
    let moved = Sampling { logit_bias: vec![(3, 1.0)], ..Sampling::default() };
    assert_eq!(sampler(1.0, 1.0, 5, moved).blocks(&whole.sight).len(), 150_000usize.div_ceil(LOGIT_BLOCK));
}

#[test]
fn a_row_whose_largest_logit_is_infinite_is_refused() {
    assert!(Row::whole(vec![0.5, f32::INFINITY], 1.0).is_none());
    assert!(Row::whole(vec![f32::NEG_INFINITY; 3], 1.0).is_none() && Row::whole(Vec::new(), 1.0).is_none());
}

#[test]
fn rows_on_several_threads_give_the_tokens_of_one() {
    let rows: Vec<_> = (0..9).map(|seed| noise(seed, 2000)).collect();
    let tokens = |threads: usize| {
        let mut samplers: Vec<_> = (0..9).map(|seed| (sampler(0.8, 0.9, seed, Sampling::default()), 0)).collect();
        Threads::new(threads).for_each(&mut samplers, |index, (sampler, token)| *token = sampled(sampler, &rows[index]).0);
        samplers.into_iter().map(|(_, token)| token).collect::<Vec<_>>()
    };
    assert_eq!(tokens(1), tokens(3));
}

#[test]
fn tokens_that_cannot_come_are_never_drawn() {
    let logits = [f32::NEG_INFINITY, 1.0, f32::NEG_INFINITY, 0.5];
    for (top_p, top_k) in [(1.0, 0), (0.999, 0), (1.0, 3), (1.0, 100)] {
        assert_eq!(drawn(sampler(f32::MAX, top_p, 3, Sampling { top_k, ..Sampling::default() }), &logits), [1, 3], "{top_p} {top_k}");
    }
    // As when rounding leaves something of the draw behind the last token.
    let logits: Vec<f32> = (0..300).map(|index| if index < 3 { 0.0 } else { f32::NEG_INFINITY }).collect();
    assert_eq!(pick(&logits, Weight::new(0.0, 1.0), 1.0), 2);
}
