//! Causal attention with rotary positions over the sequences of a packed batch, there and back.

use std::ops::Range;

use carryon_crds::pool::Dtype;

use super::linear::{rows_across, rows_down, times, transpose};
use crate::kernel::cpu::{self, Pages, Rows, Threads};
use crate::kernel::{Attention, PageLayout, Span, pages_for};

/// Queries whose scores exist at the same time: nothing grows with the square of a sequence's length.
const TILE: usize = 96;

/// Whole sequences that attend to themselves.
pub(super) struct Whole<'a> {
    pub threads: &'a Threads,
    pub attention: Attention,
    /// w.
    pub width: usize,
    /// A row `[cosines | sines]` for each position of the longest sequence.
    pub angles: &'a Rows,
    /// Rows of each sequence.
    pub lengths: &'a [usize],
}

/// One head of one sequence: contiguous rows of `head_dim` values.
struct Strip {
    first_row: usize,
    rows: usize,
    head: usize,
    dq: Vec<f32>,
    dk: Vec<f32>,
    dv: Vec<f32>,
}

impl Whole<'_> {
    fn head_dim(&self) -> usize {
        self.width / self.attention.heads
    }

    fn window(&self) -> usize {
        self.attention.window.unwrap_or(usize::MAX)
    }

    /// Rows `[q | k | v]`, which are rotated here: `[rows, 3w] → [rows, w]`.
    pub fn forward(&self, qkv: &mut [f32]) -> Vec<f32> {
        let (width, stride) = (self.width, 3 * self.width);
        let (mut rest, mut sequences) = (&mut *qkv, Vec::new());
        for length in self.lengths {
            let (rows, after) = rest.split_at_mut(length * stride);
            rest = after;
            sequences.push(rows);
        }
        self.threads.for_each(&mut sequences, |_, rows| {
            for (position, row) in rows.chunks_exact_mut(stride).enumerate() {
                let (cosine, sine) = self.angles_at(position);
                cpu::rope(&mut row[..2 * width], self.head_dim(), cosine, sine);
            }
        });
        let mut next = 0..;
        let tables: Vec<Vec<u32>> = self.lengths.iter().map(|length| next.by_ref().take(pages_for(*length)).collect()).collect();
        let count = next.start;
        let heads = self.attention.heads;
        let layout = PageLayout { layers: 1, heads, head_dim: self.head_dim(), latent: None, dtype: Dtype::Float32 };
        let mut pages = Pages::new(layout, count as usize);
        (0..count).for_each(|page| pages.take(page));
        let spans: Vec<_> =
            self.lengths.iter().zip(&tables).map(|(length, pages)| Span { rows: *length, length: *length, pages }).collect();
        pages.append(self.threads, 0, qkv, stride, width, &spans);
        let mut out = vec![0.0; qkv.len() / 3];
        let queries = cpu::Queries { values: qkv, stride };
        cpu::attend(self.threads, &pages, 0, self.attention, queries, &spans, bytemuck::cast_slice_mut(&mut out));
        out
    }

    fn angles_at(&self, position: usize) -> (&[f32], &[f32]) {
        self.angles.row(position).split_at(self.head_dim() / 2)
    }

    /// The gradient by the unrotated `[q | k | v] [m, 3w]`, from the rotated ones and the gradient by the result, `[m, w]`. The probabilities are
    /// computed again.
    pub fn gradient(&self, qkv: &[f32], dy: &[f32]) -> Vec<f32> {
        let (width, heads, d) = (self.width, self.attention.heads, self.head_dim());
        let mut strips = Vec::new();
        let mut position_of_row = Vec::new();
        for (index, rows) in self.lengths.iter().copied().enumerate() {
            let first_row = position_of_row.len();
            strips.extend((0..heads).map(|head| Strip { first_row, rows, head, dq: Vec::new(), dk: Vec::new(), dv: Vec::new() }));
            position_of_row.extend((0..rows).map(|position| (index, position)));
        }
        self.threads.for_each(&mut strips, |_, strip| self.strip_backward(qkv, dy, strip));

        let mut gradient = vec![0.0; qkv.len()];
        self.threads.for_rows(&mut gradient, 3 * width, TILE, |first, block| {
            for (row, (sequence, position)) in block.chunks_exact_mut(3 * width).zip(&position_of_row[first..]) {
                for strip in &strips[sequence * heads..(sequence + 1) * heads] {
                    for (part, values) in [&strip.dq, &strip.dk, &strip.dv].into_iter().enumerate() {
                        row[part * width + strip.head * d..][..d].copy_from_slice(&values[position * d..][..d]);
                    }
                }
                let (cosine, sine) = self.angles_at(*position);
                let back: Vec<f32> = sine.iter().map(|sine| -sine).collect();
                cpu::rope(&mut row[..2 * width], d, cosine, &back);
            }
        });
        gradient
    }

    /// With `s = scale · q · k`, `p = softmax(s)` over the visible positions, `y = p · v`:
    /// `dv = pᵀ · dy`, `dp = dy · vᵀ`, `ds = p (dp - Σ p dp)`, `dq = scale · ds · k`, `dk = scale · dsᵀ · q`.
    fn strip_backward(&self, qkv: &[f32], dy: &[f32], strip: &mut Strip) {
        let (width, d, scale) = (self.width, self.head_dim(), self.attention.scale);
        let gather = |source: &[f32], stride: usize, column: usize, factor: f32| -> Vec<f32> {
            let rows = (strip.first_row..strip.first_row + strip.rows).map(|row| &source[row * stride + column..][..d]);
            rows.flatten().map(|value| factor * value).collect()
        };
        let column = strip.head * d;
        let q = gather(qkv, 3 * width, column, scale);
        let [k, v] = [1, 2].map(|part| gather(qkv, 3 * width, part * width + column, 1.0));
        let dy = gather(dy, width, column, 1.0);
        let [mut dq, mut dk, mut dv] = [(); 3].map(|()| vec![0.0; k.len()]);
        for first in (0..strip.rows).step_by(TILE) {
            let queries = first..(first + TILE).min(strip.rows);
            let keys = (first + 1).saturating_sub(self.window())..queries.end;
            let part = |values: &[f32], range: &Range<usize>| values[range.start * d..range.end * d].to_vec();
            let (q, dy, k, v) = (part(&q, &queries), part(&dy, &queries), part(&k, &keys), part(&v, &keys));
            let mut p = times(self.threads, &q, &rows_down(self.threads, &k, keys.len(), d));
            let mut ds = times(self.threads, &dy, &rows_down(self.threads, &v, keys.len(), d));
            for (query, (p, ds)) in queries.clone().zip(p.chunks_exact_mut(keys.len()).zip(ds.chunks_exact_mut(keys.len()))) {
                let visible = (query + 1).saturating_sub(self.window()).max(keys.start) - keys.start..query + 1 - keys.start;
                softmax_backward(p, ds, visible);
            }
            dq[queries.start * d..queries.end * d].copy_from_slice(&times(
                self.threads,
                &ds,
                &rows_across(self.threads, &k, d, Dtype::Float32),
            ));
            let into = |target: &mut [f32], left: &[f32], right: &[f32]| {
                let left = transpose(self.threads, left, queries.len(), keys.len());
                let product = times(self.threads, &left, &rows_across(self.threads, right, d, Dtype::Float32));
                cpu::add(&mut target[keys.start * d..keys.end * d], &product);
            };
            into(&mut dk, &ds, &q);
            into(&mut dv, &p, &dy);
        }
        dq.iter_mut().for_each(|value| *value *= scale);
        (strip.dq, strip.dk, strip.dv) = (dq, dk, dv);
    }
}

/// Turns scores into probabilities, zero outside `visible`, and their gradient `dp` into that of the scores.
fn softmax_backward(scores: &mut [f32], dp: &mut [f32], visible: Range<usize>) {
    for values in [&mut *scores, &mut *dp] {
        values[..visible.start].fill(0.0);
        values[visible.end..].fill(0.0);
    }
    let (p, dp) = (&mut scores[visible.clone()], &mut dp[visible]);
    cpu::softmax_row(p);
    let mean = cpu::dot(p, dp);
    dp.iter_mut().zip(p).for_each(|(dp, p)| *dp = *p * (*dp - mean));
}
