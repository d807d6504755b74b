//! Attention pooling of a classifier.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};

use super::values::{Values, operand, result, tensor};
use crate::head::layers;
use crate::kernel::cpu;

/// `rows [m, w], pooling [w] → [sequences, w]`; holds the number of rows of each sequence.
pub(super) struct Pool(pub Vec<usize>);

impl CustomOp2 for Pool {
    fn name(&self) -> &'static str {
        "pool"
    }

    fn cpu_fwd(&self, rows: &CpuStorage, layout: &Layout, pooling: &CpuStorage, pooling_layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let pooling = operand(pooling, pooling_layout)?;
        result(layers::pool(operand(rows, layout)?, pooling, &self.0), (self.0.len(), pooling.len()))
    }

    /// With weights `p = softmax(s)`, `s = rows · pooling`: `dp = rows · dy`, `ds = p (dp - Σ p dp)`,
    /// `drows = p dyᵀ + ds poolingᵀ`, `dpooling = Σ ds · rows`.
    fn bwd(&self, rows: &Tensor, pooling: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (values, weight, dy) = (Values::of(rows)?, Values::of(pooling)?, Values::of(&dy)?);
        let width = weight.len();
        let (mut drows, mut dpooling) = (vec![0.0; values.len()], vec![0.0; width]);
        let (mut rest, mut drest) = (&*values, &mut drows[..]);
        for (length, dy) in self.0.iter().zip(dy.chunks_exact(width)) {
            let (sequence, after) = rest.split_at(length * width);
            let (dsequence, dafter) = drest.split_at_mut(length * width);
            (rest, drest) = (after, dafter);
            let p = layers::pooling_weights(sequence, &weight);
            let dp: Vec<f32> = sequence.chunks_exact(width).map(|row| cpu::dot(row, dy)).collect();
            let mean = cpu::dot(&p, &dp);
            for ((row, drow), (p, dp)) in sequence.chunks_exact(width).zip(dsequence.chunks_exact_mut(width)).zip(p.iter().zip(&dp)) {
                let ds = p * (dp - mean);
                for (index, drow) in drow.iter_mut().enumerate() {
                    *drow = p * dy[index] + ds * weight[index];
                    dpooling[index] += ds * row[index];
                }
            }
        }
        Ok((Some(tensor(drows, rows.shape())?), Some(tensor(dpooling, pooling.shape())?)))
    }
}
