//! Cross entropy at the LM head.

use super::backend::Cpu;
use super::panels::Panels;
use super::product::matmul;
use super::rows::{dot, softcap, softmax_row};
use super::threads::Threads;
use crate::kernel::Aim;

/// Loss of rows `y` (`[rows, D]`), and their gradient by `y` where `backward` is given: see [`crate::kernel::Backend::losses`].
/// A row's result does not depend on the other rows.
pub fn losses(
    threads: &Threads,
    y: &[f32],
    forward: &Panels,
    backward: Option<&Panels>,
    aim: &Aim<'_, Cpu>,
    cap: Option<f32>,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let (vocabulary, count) = (forward.rows(), y.len() / forward.cols());
    let logits_of = |rows: &[f32]| {
        let mut logits = vec![0.0; count * vocabulary];
        matmul(threads, rows, forward, &mut logits);
        logits
    };
    let (mut loss, mut logits) = (vec![0.0; count], logits_of(y));
    let rows = logits.chunks_exact_mut(vocabulary);
    match aim {
        Aim::Tokens(targets) => {
            assert_eq!(targets.len(), count, "a target per row");
            let mut work: Vec<_> = rows.zip(*targets).zip(&mut loss).collect();
            threads.for_each(&mut work, |_, ((row, target), loss)| {
                **loss = bounded(row, cap, |row| row_loss(row, **target as usize));
            });
        }
        Aim::Rows(others) => {
            let mut others = logits_of(&others.values);
            let mut work: Vec<_> = rows.zip(others.chunks_exact_mut(vocabulary)).zip(&mut loss).collect();
            threads.for_each(&mut work, |_, ((row, other), loss)| {
                cap.into_iter().for_each(|cap| softcap(other, cap));
                **loss = bounded(row, cap, |row| row_divergence(row, other));
            });
        }
    }
    let gradient = backward.map(|backward| {
        let mut gradient = vec![0.0; y.len()];
        matmul(threads, &logits, backward, &mut gradient);
        gradient
    });
    (loss, gradient)
}

/// What `loss` says of one row of logits, which are bounded by `cap` before; the row becomes the derivative by what they were.
fn bounded(row: &mut [f32], cap: Option<f32>, loss: impl FnOnce(&mut [f32]) -> f32) -> f32 {
    let Some(cap) = cap else { return loss(row) };
    softcap(row, cap);
    let slopes: Vec<f32> = row.iter().map(|logit| 1.0 - (logit / cap) * (logit / cap)).collect();
    let loss = loss(row);
    row.iter_mut().zip(slopes).for_each(|(value, slope)| *value *= slope);
    loss
}

/// Divergence `Σ p₀ (ln p₀ - ln p)` of one row of logits from another's, exactly zero from its own; the row becomes `p - p₀`, the other p₀.
fn row_divergence(row: &mut [f32], other: &mut [f32]) -> f32 {
    let apart: Vec<f32> = other.iter().zip(&*row).map(|(other, logit)| other - logit).collect();
    let log_sums = softmax_row(row) - softmax_row(other);
    let loss = log_sums + dot(other, &apart);
    row.iter_mut().zip(&*other).for_each(|(p, other)| *p -= other);
    loss
}

/// Loss of one row of logits, which becomes `softmax - onehot(target)`.
fn row_loss(row: &mut [f32], target: usize) -> f32 {
    let logit = row[target];
    let log_sum = softmax_row(row);
    row[target] -= 1.0;
    log_sum - logit
}
