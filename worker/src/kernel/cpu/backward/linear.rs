//! `y = x · Wᵀ`, of one weight or of some below each other, and its way back.

use std::ops::Range;

use carryon_crds::pool::Dtype;

use crate::kernel::Weight;
use crate::kernel::cpu::isa::vectorised;
use crate::kernel::cpu::operand::pack_pairs;
use crate::kernel::cpu::{Cpu, Left, Panels, Part, Sink, Threads, matmul, product};

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
    pub fn forward(&self, cpu: &Cpu, x: &[f32]) -> Vec<f32> {
        let fill = |row: usize, values: &mut [f32]| self.row(row, values);
        times(&cpu.threads, x, &Panels::from_rows(self.rows(), self.columns(), cpu.training, &cpu.threads, fill))
    }

    /// `dx = dy · W`: `[m, n] → [m, k]`.
    pub fn backward(&self, cpu: &Cpu, dy: &[f32]) -> Vec<f32> {
        let fill = |row: usize, values: &mut [f32]| self.row(row, values);
        times(&cpu.threads, dy, &Panels::from_columns(self.columns(), self.rows(), cpu.training, &cpu.threads, fill))
    }
}

/// The right side of `a · bᵀ` from `b`, `n` rows of `k` values.
pub(super) fn rows_down(threads: &Threads, b: &[f32], n: usize, k: usize) -> Panels {
    Panels::from_rows(n, k, Dtype::Float32, threads, |row, values| values.copy_from_slice(&b[row * k..][..k]))
}

/// The right side of `a · b` from `b`, rows of `k` values.
pub(super) fn rows_across(threads: &Threads, b: &[f32], k: usize, dtype: Dtype) -> Panels {
    Panels::from_columns(k, b.len() / k, dtype, threads, |row, values| values.copy_from_slice(&b[row * k..][..k]))
}

/// The product of rows with a right side: `[rows, inner] → [rows, k]`.
pub(super) fn times(threads: &Threads, a: &[f32], b: &Panels) -> Vec<f32> {
    let mut out = vec![0.0; a.len() / b.cols() * b.rows()];
    matmul(threads, a, b, &mut out);
    out
}

/// `dyᵀ · x` of some columns of dy, rows of `width` values, and as many rows of x lying across: `[columns, k]`.
pub(super) fn columns_times(threads: &Threads, dy: &[f32], width: usize, some: Range<usize>, x: &Panels) -> Vec<f32> {
    let mut out = vec![0.0; some.len() * x.rows()];
    let part = [Part { rows: some.len(), panels: x, norm: &[] }];
    match x.dtype() {
        Dtype::Float32 => {
            let left = transpose_columns(threads, dy, dy.len() / width, width, some);
            product(threads, Left::Plain(&left), &part, Sink::Store(&mut out));
        }
        Dtype::Bfloat16 => {
            let mut left = vec![0; some.len() * x.steps()];
            threads.for_rows(&mut left, x.steps(), TOGETHER, |first, words| pair_columns(dy, width, some.start + first, x.steps(), words));
            product(threads, Left::Packed(&left, x.steps()), &part, Sink::Store(&mut out));
        }
    }
    out
}

/// Columns that are gathered together: a cache line.
const TOGETHER: usize = 16;

vectorised! {
    /// Columns of rows, [`TOGETHER`] from `first` on at most, as rows of `stride` words of bf16 pairs.
    fn pair_columns(values: &[f32], width: usize, first: usize, stride: usize, words: &mut [u32]) {
        let count = words.len() / stride;
        for (pair, rows) in values.chunks(2 * width).enumerate() {
            let (mut low, mut high, mut packed) = ([0.0; TOGETHER], [0.0; TOGETHER], [0; TOGETHER]);
            low[..count].copy_from_slice(&rows[first..][..count]);
            if rows.len() > width {
                high[..count].copy_from_slice(&rows[width + first..][..count]);
            }
            pack_pairs(&low, &high, &mut packed);
            for (word, row) in packed.iter().zip(words.chunks_exact_mut(stride)) {
                row[pair] = *word;
            }
        }
    }
}

/// `[rows, columns] → [columns, rows]`.
pub(in crate::kernel::cpu) fn transpose(threads: &Threads, values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    transpose_columns(threads, values, rows, columns, 0..columns)
}

/// Some columns of `[rows, columns]`, as rows.
pub(super) fn transpose_columns(threads: &Threads, values: &[f32], rows: usize, columns: usize, some: Range<usize>) -> Vec<f32> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_multiplied_as_rows_that_were_turned() {
        let (width, k, threads) = (50, 33, Threads::new(2));
        let values = |count: usize| (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        for m in [1, 6, 77] {
            let (dy, x) = (values(m * width), values(m * k));
            for (dtype, some) in [Dtype::Float32, Dtype::Bfloat16].into_iter().flat_map(|dtype| [(dtype, 0..50), (dtype, 3..44)]) {
                let x = rows_across(&threads, &x, k, dtype);
                let turned = transpose_columns(&threads, &dy, m, width, some.clone());
                assert_eq!(columns_times(&threads, &dy, width, some, &x), times(&threads, &turned, &x), "{m} rows, {dtype:?}");
            }
        }
    }
}
