//! `y = x · Wᵀ`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::values::{Values, operand, result, tensor};
use crate::head::layers;
use carryon_crds::pool::Dtype;

use crate::kernel::Threads;
use crate::kernel::cpu::{self, Panels};

/// `x [m, k], W [n, k] → [m, n]`.
pub(super) struct Linear(pub Arc<Threads>);

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout, w: &CpuStorage, w_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, _) = x_layout.shape().dims2()?;
        let (n, k) = w_layout.shape().dims2()?;
        let weight = layers::pack(&self.0, operand(w, w_layout)?, n, k);
        result(layers::linear(&self.0, operand(x, x_layout)?, &weight), (m, n))
    }

    /// `dx = dy · W` where `x` is tracked, `dW = dyᵀ · x`.
    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let ((m, k), (n, _), dy) = (x.dims2()?, w.dims2()?, dy.contiguous()?);
        let dy = Values::of(&dy)?;
        let dx = if x.track_op() {
            let dx = times(&self.0, &dy, &Values::of(w)?, n, k);
            Some(tensor(dx, x.shape())?)
        } else {
            None
        };
        let dw = times(&self.0, &transpose(&self.0, &dy, m, n), &Values::of(x)?, m, k);
        Ok((dx, Some(tensor(dw, w.shape())?)))
    }
}

/// `a · b`: `[rows, inner] · [inner, k] → [rows, k]`.
pub(super) fn times(threads: &Threads, a: &[f32], b: &[f32], inner: usize, k: usize) -> Vec<f32> {
    let panels = Panels::from_columns(k, inner, Dtype::Float32, threads, |column, values| values.copy_from_slice(&b[column * k..][..k]));
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
