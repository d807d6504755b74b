//! The tiled loss against its formula in f64.

use carryon_crds::pool::Dtype;
use carryon_worker::head::loss::{Against, LossOutput, LossWeights, lm_loss};
use carryon_worker::kernel::Backend;
use carryon_worker::kernel::cpu::round_bf16;

use super::common::engine::{candle, cpu};
use super::fixtures::{assert_close, bits};

const V: usize = 997;
const D: usize = 48;
const ROWS: usize = 205; // more than one tile

struct Problem {
    weight: Vec<f32>,
    y: Vec<f32>,
    targets: Vec<u32>,
}

/// Values that bf16 holds exactly.
fn problem() -> Problem {
    let noise = |count: usize, seed: u32, size: f32| -> Vec<f32> {
        let draw = |i: u32| (i.wrapping_mul(2_654_435_761).wrapping_add(seed.wrapping_mul(40_503)) >> 8) as f32 / (1 << 23) as f32 - 1.0;
        let mut values: Vec<f32> = (0..count as u32).map(|i| size * draw(i ^ seed)).collect();
        round_bf16(&mut values);
        values
    };
    Problem { weight: noise(V * D, 1, 0.6), y: noise(ROWS * D, 2, 2.0), targets: (0..ROWS as u32).map(|row| row * 37 % V as u32).collect() }
}

/// Loss and gradient of one row in f64.
fn naive(problem: &Problem, row: usize) -> (f64, Vec<f32>) {
    let y = &problem.y[row * D..][..D];
    let dot = |w: &[f32]| w.iter().zip(y).map(|(w, y)| f64::from(*w) * f64::from(*y)).sum::<f64>();
    let logits: Vec<f64> = problem.weight.chunks_exact(D).map(dot).collect();
    let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>();
    let target = problem.targets[row] as usize;
    let mut gradient = vec![0.0; D];
    for (token, (logit, w)) in logits.iter().zip(problem.weight.chunks_exact(D)).enumerate() {
        let p = logit.exp() / sum - f64::from(u8::from(token == target));
        gradient.iter_mut().zip(w).for_each(|(gradient, w)| *gradient += p * f64::from(*w));
    }
    (sum.ln() - logits[target], gradient.into_iter().map(|value| value as f32).collect())
}

fn loss<B: Backend>(backend: &B, problem: &Problem, rows: std::ops::Range<usize>, dtype: Dtype, gradient: bool) -> LossOutput {
    let fill = |row: usize, values: &mut [f32]| values.copy_from_slice(&problem.weight[row * D..][..D]);
    let forward = backend.matrix(V, D, dtype.into(), &fill).unwrap();
    let backward = gradient.then(|| backend.transposed(&forward).unwrap());
    let weights = LossWeights { forward: &forward, backward: backward.as_ref(), dtype, softcap: None };
    lm_loss(backend, &weights, &problem.y[rows.start * D..rows.end * D], None, Against::Tokens(&problem.targets[rows])).unwrap()
}

fn follows_the_formula<B: Backend>(backend: &B) {
    let problem = problem();
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let output = loss(backend, &problem, 0..ROWS, dtype, true);
        for row in 0..ROWS {
            let (loss, gradient) = naive(&problem, row);
            assert!((f64::from(output.loss[row]) / loss - 1.0).abs() < 1e-5, "row {row}: {} {loss}", output.loss[row]);
            let found = &output.gradient[row * D..][..D];
            if dtype == Dtype::Float32 {
                assert_close("gradient", found, &gradient, 1e-5);
            }
            assert!(cosine(found, &gradient) >= 0.9999, "row {row}: cosine {}", cosine(found, &gradient));
        }
    }
}

#[test]
fn loss_and_gradient_follow_the_formula() {
    follows_the_formula(&cpu(2));
    follows_the_formula(&candle());
}

/// Divergence of one row from the base and its gradient by y, in f64; `y` is x̂ and what the head adds, rounded.
fn naive_divergence(problem: &Problem, y: &[f32], row: usize) -> (f64, Vec<f32>) {
    let probabilities = |values: &[f32]| {
        let dot = |w: &[f32]| w.iter().zip(&values[row * D..][..D]).map(|(w, y)| f64::from(*w) * f64::from(*y)).sum::<f64>();
        let logits: Vec<f64> = problem.weight.chunks_exact(D).map(dot).collect();
        let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>();
        logits.into_iter().map(|logit| logit.exp() / sum).collect::<Vec<_>>()
    };
    let (base, head) = (probabilities(&problem.y), probabilities(y));
    let mut gradient = vec![0.0; D];
    for ((p, base), w) in head.iter().zip(&base).zip(problem.weight.chunks_exact(D)) {
        gradient.iter_mut().zip(w).for_each(|(gradient, w)| *gradient += (p - base) * f64::from(*w));
    }
    (base.iter().zip(&head).map(|(base, p)| base * (base / p).ln()).sum(), gradient.into_iter().map(|value| value as f32).collect())
}

fn diverges_as_the_formula_says<B: Backend>(backend: &B) {
    let problem = problem();
    let delta: Vec<f32> = problem.y.iter().map(|y| (y * 7.0).sin() * 0.25).collect();
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let fill = |row: usize, values: &mut [f32]| values.copy_from_slice(&problem.weight[row * D..][..D]);
        let forward = backend.matrix(V, D, dtype.into(), &fill).unwrap();
        let backward = backend.transposed(&forward).unwrap();
        let weights = LossWeights { forward: &forward, backward: Some(&backward), dtype, softcap: None };
        let output = lm_loss(backend, &weights, &problem.y, Some((&delta, 1.0)), Against::Base).unwrap();
        let mut y: Vec<f32> = problem.y.iter().zip(&delta).map(|(y, delta)| y + delta).collect();
        if dtype == Dtype::Bfloat16 {
            round_bf16(&mut y);
        }
        for row in 0..ROWS {
            let (loss, gradient) = naive_divergence(&problem, &y, row);
            assert!((f64::from(output.loss[row]) - loss).abs() < 1e-5 * loss.max(1.0), "row {row}: {} {loss}", output.loss[row]);
            assert!(cosine(&output.gradient[row * D..][..D], &gradient) >= 0.999, "row {row}");
        }
        let untrained = lm_loss(backend, &weights, &problem.y, None, Against::Base).unwrap();
        assert!(untrained.loss.iter().chain(&untrained.gradient).all(|value| *value == 0.0), "the base does not diverge from itself");
    }
}

#[test]
fn divergence_from_the_base_follows_the_formula() {
    diverges_as_the_formula_says(&cpu(2));
    diverges_as_the_formula_says(&candle());
}

#[test]
fn a_row_does_not_depend_on_its_company() {
    let problem = problem();
    for dtype in [Dtype::Float32, Dtype::Bfloat16] {
        let together = loss(&cpu(2), &problem, 0..ROWS, dtype, true);
        for row in [0, 100, ROWS - 1] {
            let alone = loss(&cpu(1), &problem, row..row + 1, dtype, true);
            assert_eq!(alone.loss[0].to_bits(), together.loss[row].to_bits());
            assert_eq!(bits(&alone.gradient), bits(&together.gradient[row * D..][..D]));
        }
    }
}

#[test]
fn nan_rows_and_losses_without_gradient_leave_the_rest_as_it_is() {
    let mut problem = problem();
    let clean = loss(&cpu(2), &problem, 0..ROWS, Dtype::Float32, true);
    problem.y[7 * D..8 * D].fill(f32::NAN);
    let dirty = loss(&cpu(2), &problem, 0..ROWS, Dtype::Float32, false);
    assert!(dirty.loss[7].is_nan() && dirty.gradient.is_empty());
    assert_eq!(bits(&dirty.loss[8..]), bits(&clean.loss[8..]));
}

pub fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}
