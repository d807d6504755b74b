//! RMSNorm: `y = x · r ⊙ w`, `r = 1 / √(mean(x²) + ε)`.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::values::{Values, operand, result, tensor};
use crate::head::layers;
use crate::kernel::{Threads, cpu};

/// Rows whose weight gradients are summed first: fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 64;

#[derive(Clone)]
pub(super) struct RmsNorm {
    pub threads: Arc<Threads>,
    pub epsilon: f32,
}

/// With a weight: `x [m, w], weight [w] → [m, w]`.
impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout, weight: &CpuStorage, weight_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let normed = layers::norm(&self.threads, operand(x, x_layout)?, operand(weight, weight_layout)?, self.epsilon);
        result(normed, x_layout.shape().clone())
    }

    fn bwd(&self, x: &Tensor, weight: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (dx, dw) = self.backward(&Values::of(x)?, &Values::of(weight)?, &Values::of(&dy)?);
        Ok((Some(tensor(dx, x.shape())?), Some(tensor(dw, weight.shape())?)))
    }
}

/// Without a weight.
impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "plain_rms_norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let ones = vec![1.0; layout.shape().dims2()?.1];
        result(layers::norm(&self.threads, operand(x, layout)?, &ones, self.epsilon), layout.shape().clone())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let (ones, dy) = (vec![1.0; x.dim(1)?], dy.contiguous()?);
        let (dx, _) = self.backward(&Values::of(x)?, &ones, &Values::of(&dy)?);
        Ok(Some(tensor(dx, x.shape())?))
    }
}

impl RmsNorm {
    /// With `n = x · r`: `dw = Σ dy ⊙ n`, `dx = r · (dn - n · mean(dn ⊙ n))` where `dn = dy ⊙ w`.
    fn backward(&self, x: &[f32], weight: &[f32], dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
        let width = weight.len();
        let ones = vec![1.0; width];
        let mut dx = vec![0.0; x.len()];
        let mut partial = vec![0.0; x.len().div_ceil(ROWS * width) * width];
        let mut work: Vec<_> = dx.chunks_mut(ROWS * width).zip(partial.chunks_exact_mut(width)).collect();
        self.threads.for_each(&mut work, |block, (dx, dw)| {
            let start = block * ROWS * width;
            let rows = x[start..].chunks_exact(width).zip(dy[start..].chunks_exact(width));
            let mut n = vec![0.0; width];
            for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
                cpu::rms_norm(x, &ones, self.epsilon, &mut n);
                let r = 1.0 / (cpu::dot(x, x) / width as f32 + self.epsilon).sqrt();
                for (((dx, dw), (dy, n)), weight) in dx.iter_mut().zip(dw.iter_mut()).zip(dy.iter().zip(&n)).zip(weight) {
                    *dx = dy * weight;
                    *dw += dy * n;
                }
                let mean = cpu::dot(dx, &n) / width as f32;
                dx.iter_mut().zip(&n).for_each(|(dx, n)| *dx = r * (*dx - n * mean));
            }
        });
        let mut dw = vec![0.0; width];
        partial.chunks_exact(width).for_each(|partial| cpu::add(&mut dw, partial));
        (dx, dw)
    }
}
