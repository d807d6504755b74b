//! SwiGLU's product and the gate, there and back.

use crate::kernel::cpu::{self, Threads};

/// Rows that one thread takes at a time; also the order in which the bias' gradient is summed.
const ROWS: usize = 64;

/// Rows that one thread takes at a time on the way there.
const FORWARD_ROWS: usize = 32;

/// `silu(gate) · up` of rows `[gate | up]`: `[rows, 2f] → [rows, f]`.
pub(super) fn silu_mul(threads: &Threads, gate_up: &[f32], f: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len() / 2];
    threads.for_rows(&mut out, f, FORWARD_ROWS, |first, out| {
        for (row, out) in gate_up[2 * first * f..].chunks_exact(2 * f).zip(out.chunks_exact_mut(f)) {
            cpu::silu_mul(&row[..f], &row[f..], out);
        }
    });
    out
}

/// `sigmoid(z + b)`: how far the gate is open.
#[inline(always)]
fn openness(z: f32, bias: f32) -> f32 {
    1.0 / (1.0 + cpu::exp(-(z + bias)))
}

/// `sigmoid(z + b) ⊙ Δ`, rows as long as `bias`.
pub(super) fn gated(threads: &Threads, z: &[f32], bias: &[f32], delta: &[f32]) -> Vec<f32> {
    let width = bias.len();
    let mut out = vec![0.0; delta.len()];
    threads.for_rows(&mut out, width, FORWARD_ROWS, |first, out| {
        let rows = z[first * width..].chunks_exact(width).zip(delta[first * width..].chunks_exact(width));
        for (out, (z, delta)) in out.chunks_exact_mut(width).zip(rows) {
            gate_row(z, bias, delta, out);
        }
    });
    out
}

cpu::vectorised! {
    fn gate_row(z: &[f32], bias: &[f32], delta: &[f32], out: &mut [f32]) {
        for (out, ((z, bias), delta)) in out.iter_mut().zip(z.iter().zip(bias).zip(delta)) {
            *out = openness(*z, *bias) * delta;
        }
    }
}

/// Of `silu(gate) · up`, rows `[gate | up]`, with `s = sigmoid(gate)`: `dgate = dy · up · s · (1 + gate · (1 - s))`, `dup = dy · gate · s`.
/// `[m, 2f]` from `gate_up [m, 2f]` and `dy [m, f]`.
pub(super) fn silu_mul_backward(threads: &Threads, gate_up: &[f32], dy: &[f32], f: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len()];
    threads.for_rows(&mut out, 2 * f, ROWS, |first, out| {
        let rows = gate_up[first * 2 * f..].chunks_exact(2 * f).zip(dy[first * f..].chunks_exact(f));
        for (out, (row, dy)) in out.chunks_exact_mut(2 * f).zip(rows) {
            let (dgate, dup) = out.split_at_mut(f);
            silu_backward(&row[..f], &row[f..], dy, dgate, dup);
        }
    });
    out
}

cpu::vectorised! {
    fn silu_backward(gate: &[f32], up: &[f32], dy: &[f32], dgate: &mut [f32], dup: &mut [f32]) {
        let outputs = dgate.iter_mut().zip(dup);
        for ((dgate, dup), ((gate, up), dy)) in outputs.zip(gate.iter().zip(up).zip(dy)) {
            let s = openness(*gate, 0.0);
            *dgate = dy * up * s * (1.0 + gate * (1.0 - s));
            *dup = dy * gate * s;
        }
    }
}

/// Gradients of `sigmoid(z + b) ⊙ Δ`.
pub(super) struct Gradients {
    /// `[m, D]`.
    pub z: Vec<f32>,
    /// `[D]`.
    pub bias: Vec<f32>,
    /// `[m, D]`.
    pub delta: Vec<f32>,
}

/// With `g = sigmoid(z + b)`: `dΔ = g ⊙ dy`, `dz = g (1 - g) ⊙ Δ ⊙ dy`, `db = Σ dz`. All are `[m, D]` but b, which is `[D]`.
pub(super) fn gated_backward(threads: &Threads, z: &[f32], bias: &[f32], delta: &[f32], dy: &[f32]) -> Gradients {
    let width = bias.len();
    let (mut dz, mut ddelta) = (vec![0.0; z.len()], vec![0.0; z.len()]);
    let mut partial = vec![0.0; z.len().div_ceil(ROWS * width) * width];
    let blocks = dz.chunks_mut(ROWS * width).zip(ddelta.chunks_mut(ROWS * width)).zip(partial.chunks_exact_mut(width));
    let mut work: Vec<_> = blocks.collect();
    threads.for_each(&mut work, |block, ((dz, ddelta), dbias)| {
        let start = block * ROWS * width;
        let rows = dz.chunks_exact_mut(width).zip(ddelta.chunks_exact_mut(width));
        for (offset, (dz, ddelta)) in rows.enumerate() {
            let row = start + offset * width..start + (offset + 1) * width;
            gate_backward(&z[row.clone()], bias, &delta[row.clone()], &dy[row], dz, ddelta);
            cpu::add(dbias, dz);
        }
    });
    let mut dbias = vec![0.0; width];
    partial.chunks_exact(width).for_each(|partial| cpu::add(&mut dbias, partial));
    Gradients { z: dz, bias: dbias, delta: ddelta }
}

cpu::vectorised! {
    fn gate_backward(z: &[f32], bias: &[f32], delta: &[f32], dy: &[f32], dz: &mut [f32], ddelta: &mut [f32]) {
        let inputs = z.iter().zip(bias).zip(delta.iter().zip(dy));
        for ((dz, ddelta), ((z, bias), (delta, dy))) in dz.iter_mut().zip(ddelta).zip(inputs) {
            let g = openness(*z, *bias);
            *ddelta = g * dy;
            *dz = g * (1.0 - g) * delta * dy;
        }
    }
}
