//! The forward arithmetic that inference and training share, so that both give the same bits. Matrices are row-major slices, in f32.

use carryon_crds::pool::Dtype;
use carryon_crds::wire::HeadShape;

use crate::kernel::cpu::{self, Pages, Panels};
use crate::kernel::{Attention, PageLayout, Rotation, Span, Threads, pages_for};

/// Rows that one thread takes at a time in element-wise loops.
const ROWS: usize = 32;

/// Packs `weight` (`n × k`) for [`linear`].
pub(super) fn pack(threads: &Threads, weight: &[f32], n: usize, k: usize) -> Panels {
    Panels::from_rows(n, k, Dtype::Float32, threads, |row, values| values.copy_from_slice(&weight[row * k..][..k]))
}

/// `x · wᵀ`: `[rows, k] → [rows, n]`.
pub(super) fn linear(threads: &Threads, x: &[f32], weight: &Panels) -> Vec<f32> {
    let mut out = vec![0.0; x.len() / weight.cols() * weight.rows()];
    cpu::matmul(threads, x, weight, &mut out);
    out
}

/// RMSNorm of rows as long as `weight`.
pub(super) fn norm(threads: &Threads, x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0; x.len()];
    threads.for_rows(&mut out, width, ROWS, |first, out| cpu::rms_norm(&x[first * width..][..out.len()], weight, epsilon, out));
    out
}

/// `silu(gate) · up` of rows `[gate | up]`: `[rows, 2f] → [rows, f]`.
pub(super) fn silu_mul(threads: &Threads, gate_up: &[f32], f: usize) -> Vec<f32> {
    let mut out = vec![0.0; gate_up.len() / 2];
    threads.for_rows(&mut out, f, ROWS, |first, out| {
        for (row, out) in gate_up[2 * first * f..].chunks_exact(2 * f).zip(out.chunks_exact_mut(f)) {
            cpu::silu_mul(&row[..f], &row[f..], out);
        }
    });
    out
}

/// `sigmoid(z + b)`: how far the gate is open.
#[inline(always)]
pub(super) fn openness(z: f32, bias: f32) -> f32 {
    1.0 / (1.0 + cpu::exp(-(z + bias)))
}

/// `sigmoid(z + b) ⊙ Δ`, rows as long as `bias`.
pub(super) fn gated(threads: &Threads, z: &[f32], bias: &[f32], delta: &[f32]) -> Vec<f32> {
    let width = bias.len();
    let mut out = vec![0.0; delta.len()];
    threads.for_rows(&mut out, width, ROWS, |first, out| {
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

/// Adds `bias` to every row.
pub(super) fn add_bias(rows: &mut [f32], bias: &[f32]) {
    rows.chunks_exact_mut(bias.len()).for_each(|row| cpu::add(row, bias));
}

/// Attention weights of one sequence's rows: the softmax of `pooling · row` over positions.
pub(super) fn pooling_weights(rows: &[f32], pooling: &[f32]) -> Vec<f32> {
    let mut scores: Vec<f32> = rows.chunks_exact(pooling.len()).map(|row| cpu::dot(row, pooling)).collect();
    cpu::softmax_row(&mut scores);
    scores
}

/// Attention pooling: `[rows, w] → [sequences, w]`, `lengths` rows each.
pub(super) fn pool(rows: &[f32], pooling: &[f32], lengths: &[usize]) -> Vec<f32> {
    let width = pooling.len();
    let mut out = vec![0.0; lengths.len() * width];
    let mut rest = rows;
    for (length, out) in lengths.iter().zip(out.chunks_exact_mut(width)) {
        let (sequence, after) = rest.split_at(length * width);
        rest = after;
        for (row, weight) in sequence.chunks_exact(width).zip(pooling_weights(sequence, pooling)) {
            out.iter_mut().zip(row).for_each(|(out, value)| *out += weight * value);
        }
    }
    out
}

/// Attention of the head's blocks: rotary positions, causal, over a window.
#[derive(Clone)]
pub(super) struct HeadAttention {
    pub width: usize,
    pub heads: usize,
    pub window: usize,
    rotation: Rotation,
}

/// Cosines and sines of positions `first..`, a row each.
pub(super) struct Angles {
    first: usize,
    half: usize,
    cosines: Vec<f32>,
    sines: Vec<f32>,
}

impl Angles {
    pub fn at(&self, position: usize) -> (&[f32], &[f32]) {
        let start = (position - self.first) * self.half;
        (&self.cosines[start..start + self.half], &self.sines[start..start + self.half])
    }
}

impl HeadAttention {
    pub fn new(shape: &HeadShape) -> Self {
        let (width, heads) = (shape.width as usize, shape.heads as usize);
        Self { width, heads, window: shape.window as usize, rotation: Rotation::new(shape.rope_theta, width / heads) }
    }

    pub fn head_dim(&self) -> usize {
        self.width / self.heads
    }

    pub fn scale(&self) -> f32 {
        1.0 / (self.head_dim() as f32).sqrt()
    }

    pub fn rotation(&self) -> &Rotation {
        &self.rotation
    }

    pub fn attention(&self) -> Attention {
        Attention { heads: self.heads, scale: self.scale(), window: Some(self.window), softcap: None }
    }

    pub fn angles(&self, positions: std::ops::Range<usize>) -> Angles {
        let half = self.head_dim() / 2;
        let (mut cosines, mut sines) = (vec![0.0; positions.len() * half], vec![0.0; positions.len() * half]);
        for (position, (cosine, sine)) in positions.clone().zip(cosines.chunks_exact_mut(half).zip(sines.chunks_exact_mut(half))) {
            self.rotation.at(position, cosine, sine);
        }
        Angles { first: positions.start, half, cosines, sines }
    }

    /// Rotates queries and keys of rows `[q | k | v]` of one sequence, the first of which is at `position`.
    pub fn rotate(&self, angles: &Angles, position: usize, rows: &mut [f32]) {
        for (offset, row) in rows.chunks_exact_mut(3 * self.width).enumerate() {
            let (cosine, sine) = angles.at(position + offset);
            cpu::rope(&mut row[..2 * self.width], self.head_dim(), cosine, sine);
        }
    }

    /// Attention of whole sequences, `lengths` rows `[q | k | v]` each, which are rotated here: `[rows, 3w] → [rows, w]`.
    pub fn forward(&self, threads: &Threads, angles: &Angles, qkv: &mut [f32], lengths: &[usize]) -> Vec<f32> {
        let (width, stride) = (self.width, 3 * self.width);
        let (mut rest, mut sequences) = (&mut *qkv, Vec::new());
        for length in lengths {
            let (rows, after) = rest.split_at_mut(length * stride);
            rest = after;
            sequences.push(rows);
        }
        threads.for_each(&mut sequences, |_, rows| self.rotate(angles, 0, rows));
        let mut next = 0..;
        let tables: Vec<Vec<u32>> = lengths.iter().map(|length| next.by_ref().take(pages_for(*length)).collect()).collect();
        let count = next.start;
        let layout = PageLayout { layers: 1, heads: self.heads, head_dim: self.head_dim(), latent: None, dtype: Dtype::Float32 };
        let mut pages = Pages::new(layout, count as usize);
        (0..count).for_each(|page| pages.take(page));
        let spans: Vec<_> = lengths.iter().zip(&tables).map(|(length, pages)| Span { rows: *length, length: *length, pages }).collect();
        pages.append(threads, 0, qkv, stride, width, &spans);
        let mut out = vec![0.0; qkv.len() / 3];
        let queries = cpu::Queries { values: qkv, stride };
        cpu::attend(threads, &pages, 0, self.attention(), queries, &spans, bytemuck::cast_slice_mut(&mut out));
        out
    }
}
