//! Cross entropy at the LM head.

use std::cell::RefCell;

use carryon_crds::pool::Dtype;

use super::backend::Cpu;
use super::isa::vectorised;
use super::panels::Panels;
use super::product::matmul;
use super::rows::{dot, reduce, softcap, softmax_row};
use super::sparse::{Sparse, matmul_sparse};
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
    (loss, backward.map(|backward| gradient(threads, logits, y.len(), backward)))
}

/// What of a row's absolute sum may be left out of a product in bf16: no more than rounding its largest numbers may change of it.
const LEAST: f32 = 1.0 / 1024.0;

/// The products of derivatives by logits with Wᵀ, `length` values. Most derivatives are next to nothing: in bf16 they are left out.
fn gradient(threads: &Threads, mut logits: Vec<f32>, length: usize, backward: &Panels) -> Vec<f32> {
    thread_local!(static PACKED: RefCell<Vec<u32>> = const { RefCell::new(Vec::new()) });
    let mut gradient = vec![0.0; length];
    if backward.dtype() == Dtype::Float32 {
        matmul(threads, &logits, backward, &mut gradient);
        return gradient;
    }
    let mut rows: Vec<_> = logits.chunks_exact_mut(backward.cols()).map(|row| (row, None)).collect();
    threads.for_each(&mut rows, |_, (row, sparse)| {
        leave_out(row);
        *sparse = Some(PACKED.with_borrow_mut(|packed| Sparse::of(backward.dtype(), row, packed)));
    });
    let rows: Vec<_> = rows.into_iter().filter_map(|(_, sparse)| sparse).collect();
    matmul_sparse(threads, &rows, backward, &mut gradient);
    gradient
}

/// Makes the numbers of a row zero that are nearest to it, [`LEAST`] of its absolute sum at most.
fn leave_out(row: &mut [f32]) {
    let most = LEAST * sum_below(row, f32::INFINITY);
    // Not more than that in the first place: most rows are done after one or two looks.
    let mut bound = most / 8.0;
    // Ends where so many numbers as a row has cannot be too much, if not before.
    while sum_below(row, bound) > most {
        bound /= 2.0;
    }
    clear_below(row, bound);
}

vectorised! {
    /// The absolute sum of what is nearer to zero than `bound`.
    fn sum_below(row: &[f32], bound: f32) -> f32 {
        reduce(row, 0.0, |_, sum, value| sum + if value.abs() < bound { value.abs() } else { 0.0 }, |a, b| a + b)
    }
}

vectorised! {
    fn clear_below(row: &mut [f32], bound: f32) {
        for value in row {
            *value = if value.abs() < bound { 0.0 } else { *value };
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_of_a_row_is_next_to_nothing() {
        let mut row: Vec<f32> = (0..50_000).map(|i| (-(i as f32) / 700.0).exp() * if i % 3 == 0 { -1.0 } else { 1.0 }).collect();
        let whole = row.clone();
        leave_out(&mut row);
        let sum = |values: &[f32]| values.iter().map(|value| f64::from(value.abs())).sum::<f64>();
        let (left_out, kept) = (sum(&whole) - sum(&row), row.iter().filter(|value| **value != 0.0).count());
        assert!(left_out > 0.0 && left_out <= sum(&whole) / 1024.0, "{left_out} of {}", sum(&whole));
        assert!(kept < 700 * 8, "{kept} are kept");
        assert!(row.iter().zip(&whole).all(|(kept, whole)| *kept == 0.0 || kept == whole));
    }

    #[test]
    fn numbers_that_are_none_stay_and_equal_ones_end() {
        for mut row in [vec![1e-30; 50_000], vec![0.0; 7], vec![f32::NAN, 1.0, 0.01]] {
            let whole: Vec<u32> = row.iter().map(|value| value.to_bits()).collect();
            leave_out(&mut row);
            assert_eq!(row.iter().map(|value| value.to_bits()).collect::<Vec<_>>(), whole);
        }
    }
}
