//! Cross entropy at the LM head.

use super::panels::Panels;
use super::product::matmul;
use super::rows::{softcap, softmax_row};
use super::threads::Threads;

/// Loss of rows `y` (`[rows, D]`) against `targets`, and their gradient by `y` where `backward` is given: see [`crate::kernel::Backend::losses`].
/// A row's result does not depend on the other rows.
pub fn losses(
    threads: &Threads,
    y: &[f32],
    forward: &Panels,
    backward: Option<&Panels>,
    targets: &[u32],
    cap: Option<f32>,
) -> (Vec<f32>, Option<Vec<f32>>) {
    let vocabulary = forward.rows();
    assert_eq!(y.len(), targets.len() * forward.cols(), "a target per row");
    let (mut loss, mut logits) = (vec![0.0; targets.len()], vec![0.0; targets.len() * vocabulary]);
    matmul(threads, y, forward, &mut logits);
    let mut work: Vec<_> = logits.chunks_exact_mut(vocabulary).zip(targets).zip(&mut loss).collect();
    threads.for_each(&mut work, |_, ((row, target), loss)| {
        **loss = match cap {
            Some(cap) => capped_loss(row, **target as usize, cap),
            None => row_loss(row, **target as usize),
        }
    });
    let gradient = backward.map(|backward| {
        let mut gradient = vec![0.0; y.len()];
        matmul(threads, &logits, backward, &mut gradient);
        gradient
    });
    (loss, gradient)
}

/// Loss of one row of logits that are bounded by `cap`; it becomes the derivative by what they were before.
fn capped_loss(row: &mut [f32], target: usize, cap: f32) -> f32 {
    softcap(row, cap);
    let slopes: Vec<f32> = row.iter().map(|logit| 1.0 - (logit / cap) * (logit / cap)).collect();
    let loss = row_loss(row, target);
    row.iter_mut().zip(slopes).for_each(|(value, slope)| *value *= slope);
    loss
}

/// Loss of one row of logits, which becomes `softmax - onehot(target)`.
fn row_loss(row: &mut [f32], target: usize) -> f32 {
    let logit = row[target];
    let log_sum = softmax_row(row);
    row[target] -= 1.0;
    log_sum - logit
}
