//! SwiGLU's product and the gate.

use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor};

use super::values::{Values, operand, result, tensor};
use crate::head::layers;
use crate::kernel::{Threads, cpu};

/// Rows that one thread takes at a time; also the order in which the bias' gradient is summed.
const ROWS: usize = 64;

/// `silu(gate) · up` of rows `[gate | up]`: `[m, 2f] → [m, f]`.
pub(super) struct SiluMul(pub Arc<Threads>);

impl CustomOp1 for SiluMul {
    fn name(&self) -> &'static str {
        "silu_mul"
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (m, f) = halves(layout.shape())?;
        result(layers::silu_mul(&self.0, operand(gate_up, layout)?, f), (m, f))
    }

    /// With `s = sigmoid(gate)`: `dgate = dy · up · s · (1 + gate · (1 - s))`, `dup = dy · gate · s`.
    fn bwd(&self, gate_up: &Tensor, _y: &Tensor, dy: &Tensor) -> Result<Option<Tensor>> {
        let ((_, f), dy) = (halves(gate_up.shape())?, dy.contiguous()?);
        let (gate_up_values, dy) = (Values::of(gate_up)?, Values::of(&dy)?);
        let (values, dy) = (&*gate_up_values, &*dy);
        let mut out = vec![0.0; values.len()];
        self.0.for_rows(&mut out, 2 * f, ROWS, |first, out| {
            let rows = values[first * 2 * f..].chunks_exact(2 * f).zip(dy[first * f..].chunks_exact(f));
            for (out, (row, dy)) in out.chunks_exact_mut(2 * f).zip(rows) {
                let (dgate, dup) = out.split_at_mut(f);
                silu_backward(&row[..f], &row[f..], dy, dgate, dup);
            }
        });
        Ok(Some(tensor(out, gate_up.shape())?))
    }
}

fn halves(shape: &Shape) -> Result<(usize, usize)> {
    let (m, columns) = shape.dims2()?;
    Ok((m, columns / 2))
}

cpu::vectorised! {
    fn silu_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let outputs = dgate.iter_mut().zip(dup);
        for ((dgate, dup), ((gate, up), dy)) in outputs.zip(gate.iter().zip(up).zip(dy)) {
            let s = layers::openness(*gate, 0.0);
            *dgate = dy * up * s * (1.0 + gate * (1.0 - s));
            *dup = dy * gate * s;
        }
    }
}

/// `sigmoid(z + b) ⊙ Δ`: `z [m, D], b [D], Δ [m, D] → [m, D]`.
pub(super) struct Gate(pub Arc<Threads>);

impl CustomOp3 for Gate {
    fn name(&self) -> &'static str {
        "gate"
    }

    fn cpu_fwd(
        &self,
        z: &CpuStorage,
        z_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
        delta: &CpuStorage,
        delta_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let gated = layers::gated(&self.0, operand(z, z_layout)?, operand(bias, bias_layout)?, operand(delta, delta_layout)?);
        result(gated, z_layout.shape().clone())
    }

    /// `dΔ = g ⊙ dy`, `dz = g (1 - g) ⊙ Δ ⊙ dy`, `db = Σ dz`.
    fn bwd(
        &self,
        z: &Tensor,
        bias: &Tensor,
        delta: &Tensor,
        _y: &Tensor,
        dy: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let dy = dy.contiguous()?;
        let (z_values, bias_values, delta_values, dy) = (Values::of(z)?, Values::of(bias)?, Values::of(delta)?, Values::of(&dy)?);
        let (zs, biases, deltas, dys) = (&*z_values, &*bias_values, &*delta_values, &*dy);
        let width = biases.len();
        let (mut dz, mut ddelta) = (vec![0.0; zs.len()], vec![0.0; zs.len()]);
        let mut partial = vec![0.0; zs.len().div_ceil(ROWS * width) * width];
        let blocks = dz.chunks_mut(ROWS * width).zip(ddelta.chunks_mut(ROWS * width)).zip(partial.chunks_exact_mut(width));
        let mut work: Vec<_> = blocks.collect();
        self.0.for_each(&mut work, |block, ((dz, ddelta), dbias)| {
            let start = block * ROWS * width;
            let rows = dz.chunks_exact_mut(width).zip(ddelta.chunks_exact_mut(width));
            for (offset, (dz, ddelta)) in rows.enumerate() {
                let row = start + offset * width..start + (offset + 1) * width;
                gate_backward(&zs[row.clone()], biases, &deltas[row.clone()], &dys[row], dz, ddelta);
                cpu::add(dbias, dz);
            }
        });
        let mut dbias = vec![0.0; width];
        partial.chunks_exact(width).for_each(|partial| cpu::add(&mut dbias, partial));
        Ok((Some(tensor(dz, z.shape())?), Some(tensor(dbias, bias.shape())?), Some(tensor(ddelta, delta.shape())?)))
    }
}

cpu::vectorised! {
    fn gate_backward(z: &[f32], bias: &[f32], delta: &[f32], dy: &[f32], dz: &mut [f32], ddelta: &mut [f32]) {
        let inputs = z.iter().zip(bias).zip(delta.iter().zip(dy));
        for ((dz, ddelta), ((z, bias), (delta, dy))) in dz.iter_mut().zip(ddelta).zip(inputs) {
            let g = layers::openness(*z, *bias);
            *ddelta = g * dy;
            *dz = g * (1.0 - g) * delta * dy;
        }
    }
}
