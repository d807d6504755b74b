//! The loss at the frozen LM head: behind the pool's remote loss and the trainer's local one.

use crate::kernel::{self, Panels, Threads};

/// Rows whose logits exist at the same time: bounds memory at `TILE · V` floats.
const TILE: usize = 192;

/// Loss and gradient of each row.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct LossOutput {
    /// `logsumexp(W y) - (W y)[target]` per row, in nats.
    pub loss: Vec<f32>,
    /// Its derivative by `y`, `[rows, D]`, not divided by anything; empty when not asked for.
    pub gradient: Vec<f32>,
}

/// Logits `W · y` of rows of D values: `[rows, V]`. The caller bounds the number of rows.
pub fn lm_logits(threads: &Threads, forward: &Panels, y: &[f32]) -> Vec<f32> {
    let mut logits = vec![0.0; y.len() / forward.cols() * forward.rows()];
    kernel::matmul(threads, y, forward, &mut logits);
    logits
}

/// Loss of rows `y` (`[rows, D]`, already rounded to the pool's number type) against `targets`, all below V. `forward` packs W (`[V, D]`);
/// `backward`, its transpose, asks for the gradient too: `(softmax(W y) - onehot(target)) · W`, with the bracket rounded to the panels' precision.
/// A row's result does not depend on the other rows.
pub fn lm_loss(threads: &Threads, forward: &Panels, backward: Option<&Panels>, y: &[f32], targets: &[u32]) -> LossOutput {
    let (vocabulary, width) = (forward.rows(), forward.cols());
    assert_eq!(y.len(), targets.len() * width, "a target per row");
    let mut loss = vec![0.0; targets.len()];
    let mut gradient = vec![0.0; if backward.is_some() { y.len() } else { 0 }];
    let mut logits = vec![0.0; targets.len().min(TILE) * vocabulary];
    for (first, targets) in (0..).step_by(TILE).zip(targets.chunks(TILE)) {
        let rows = targets.len();
        let logits = &mut logits[..rows * vocabulary];
        kernel::matmul(threads, &y[first * width..][..rows * width], forward, logits);
        let mut work: Vec<_> = logits.chunks_exact_mut(vocabulary).zip(targets).zip(&mut loss[first..]).collect();
        threads.for_each(&mut work, |_, ((row, target), loss)| **loss = row_loss(row, **target as usize));
        if let Some(backward) = backward {
            kernel::matmul(threads, logits, backward, &mut gradient[first * width..][..rows * width]);
        }
    }
    LossOutput { loss, gradient }
}

/// Loss of one row of logits, which becomes `softmax - onehot(target)`.
fn row_loss(row: &mut [f32], target: usize) -> f32 {
    let logit = row[target];
    let log_sum = kernel::softmax_row(row);
    row[target] -= 1.0;
    log_sum - logit
}
