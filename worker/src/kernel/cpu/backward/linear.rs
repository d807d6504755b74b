//! `y = x · Wᵀ`, of one weight or of some below each other, and its way back.

use std::ops::Range;

use carryon_crds::pool::Dtype;

use crate::kernel::Weight;
use crate::kernel::cpu::{Panels, Threads, matmul};

/// Rows of matrices `[nᵢ, k]` of one k, one below the other: `[Σ nᵢ, k]`.
pub(super) struct Stack<'a>(Vec<(&'a Weight, Range<usize>)>);

impl<'a> Stack<'a> {
    /// All rows of `weights`.
    pub fn of(weights: impl IntoIterator<Item = &'a Weight>) -> Self {
        Self(weights.into_iter().map(|weight| (weight, 0..weight.shape[0])).collect())
    }

    /// Some rows of `weight`.
    pub fn part(weight: &'a Weight, rows: Range<usize>) -> Self {
        Self(vec![(weight, rows)])
    }

    pub fn rows(&self) -> usize {
        self.0.iter().map(|(_, rows)| rows.len()).sum()
    }

    pub fn columns(&self) -> usize {
        self.0[0].0.shape[1]
    }

    fn row(&self, mut row: usize, values: &mut [f32]) {
        for (weight, rows) in &self.0 {
            match row.checked_sub(rows.len()) {
                Some(further) => row = further,
                None => return weight.values.read((rows.start + row) * values.len(), values),
            }
        }
    }

    /// `x · Wᵀ`: `[m, k] → [m, n]`.
    pub fn forward(&self, threads: &Threads, x: &[f32]) -> Vec<f32> {
        let fill = |row: usize, values: &mut [f32]| self.row(row, values);
        times(threads, x, &Panels::from_rows(self.rows(), self.columns(), Dtype::Float32, threads, fill))
    }

    /// `dx = dy · W`: `[m, n] → [m, k]`.
    pub fn backward(&self, threads: &Threads, dy: &[f32]) -> Vec<f32> {
        times(threads, dy, &across(threads, self.rows(), self.columns(), |row, values| self.row(row, values)))
    }
}

/// The right side of `a · bᵀ` from `b`, `n` rows of `k` values.
pub(super) fn rows_down(threads: &Threads, b: &[f32], n: usize, k: usize) -> Panels {
    Panels::from_rows(n, k, Dtype::Float32, threads, |row, values| values.copy_from_slice(&b[row * k..][..k]))
}

/// The right side of `a · b` from `b`, rows of `k` values.
pub(super) fn rows_across(threads: &Threads, b: &[f32], k: usize) -> Panels {
    across(threads, b.len() / k, k, |row, values| values.copy_from_slice(&b[row * k..][..k]))
}

fn across(threads: &Threads, inner: usize, k: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Panels {
    Panels::from_columns(k, inner, Dtype::Float32, threads, row)
}

/// The product of rows with a right side: `[rows, inner] → [rows, k]`.
pub(super) fn times(threads: &Threads, a: &[f32], b: &Panels) -> Vec<f32> {
    let mut out = vec![0.0; a.len() / b.cols() * b.rows()];
    matmul(threads, a, b, &mut out);
    out
}

/// `[rows, columns] → [columns, rows]`.
pub(in crate::kernel::cpu) fn transpose(threads: &Threads, values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    transpose_columns(threads, values, rows, columns, 0..columns)
}

/// Some columns of `[rows, columns]`, as rows.
pub(super) fn transpose_columns(threads: &Threads, values: &[f32], rows: usize, columns: usize, some: Range<usize>) -> Vec<f32> {
    /// Columns that are gathered together: a cache line.
    const TOGETHER: usize = 16;
    let mut out = vec![0.0; rows * some.len()];
    threads.for_rows(&mut out, rows, TOGETHER, |first, out| {
        for (row, values) in values.chunks_exact(columns).enumerate() {
            for (offset, value) in values[some.start + first..].iter().take(out.len() / rows).enumerate() {
                out[offset * rows + row] = *value;
            }
        }
    });
    out
}

/// Some columns of rows of `width` values.
pub(super) fn columns(values: &[f32], width: usize, some: Range<usize>) -> Vec<f32> {
    values.chunks_exact(width).flat_map(|row| &row[some.clone()]).copied().collect()
}
