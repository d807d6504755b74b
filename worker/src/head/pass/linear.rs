//! `y = x · Wᵀ`, of one weight or of some below each other.

use carryon_crds::pool::Dtype;

use crate::head::Weight;
use crate::head::layers;
use crate::kernel::Threads;
use crate::kernel::cpu::{self, Panels};

/// Matrices `[nᵢ, k]` of one k, one below the other: `[Σ nᵢ, k]`.
pub(super) struct Stack<'a>(pub Vec<&'a Weight>);

impl Stack<'_> {
    fn rows(&self) -> usize {
        self.0.iter().map(|weight| weight.shape[0]).sum()
    }

    fn columns(&self) -> usize {
        self.0[0].shape[1]
    }

    fn row(&self, mut row: usize) -> &[f32] {
        let columns = self.columns();
        for weight in &self.0 {
            match row.checked_sub(weight.shape[0]) {
                Some(further) => row = further,
                None => return &weight.values[row * columns..][..columns],
            }
        }
        &[]
    }

    /// `x · Wᵀ`: `[m, k] → [m, n]`.
    pub fn forward(&self, threads: &Threads, x: &[f32]) -> Vec<f32> {
        let fill = |row: usize, values: &mut [f32]| values.copy_from_slice(self.row(row));
        layers::linear(threads, x, &Panels::from_rows(self.rows(), self.columns(), Dtype::Float32, threads, fill))
    }

    /// `dx = dy · W`: `[m, n] → [m, k]`.
    pub fn backward(&self, threads: &Threads, dy: &[f32]) -> Vec<f32> {
        times(threads, dy, self.rows(), self.columns(), |row| self.row(row))
    }
}

/// `dW = dyᵀ · x` from `dyᵀ [n, m]` and `x [m, k]`: `[n, k]`.
pub(super) fn weight_gradient(threads: &Threads, dy_transposed: &[f32], x: &[f32], m: usize) -> Vec<f32> {
    let k = x.len() / m;
    times(threads, dy_transposed, m, k, |row| &x[row * k..][..k])
}

/// `a · b`: `[rows, inner] · [inner, k] → [rows, k]`; `row` gives the rows of `b`.
pub(super) fn times<'b>(threads: &Threads, a: &[f32], inner: usize, k: usize, row: impl Fn(usize) -> &'b [f32] + Sync) -> Vec<f32> {
    let panels = Panels::from_columns(k, inner, Dtype::Float32, threads, |column, values| values.copy_from_slice(row(column)));
    let mut out = vec![0.0; a.len() / inner * k];
    cpu::matmul(threads, a, &panels, &mut out);
    out
}

/// `[rows, columns] → [columns, rows]`.
pub fn transpose(threads: &Threads, values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    /// Columns that are gathered together: a cache line.
    const TOGETHER: usize = 16;
    let mut out = vec![0.0; values.len()];
    threads.for_rows(&mut out, rows, TOGETHER, |first, out| {
        for (row, values) in values.chunks_exact(columns).enumerate() {
            for (offset, value) in values[first..].iter().take(out.len() / rows).enumerate() {
                out[offset * rows + row] = *value;
            }
        }
    });
    out
}
