//! RMSNorm: `y = x · r ⊙ w`, `r = 1 / √(mean(x²) + ε)`.

use bytes::Bytes;

use crate::kernel::cpu::{self, Threads};
use crate::numbers::RowFormat;

/// Rows whose weight gradients are summed first: fixed, so that sums do not depend on the number of threads.
const ROWS: usize = 64;

/// Rows that one thread takes at a time on the way there.
const FORWARD_ROWS: usize = 32;

/// Of rows as long as `weight`.
pub(super) fn norm(threads: &Threads, x: &[f32], weight: &[f32], epsilon: f32) -> Vec<f32> {
    let width = weight.len();
    let mut out = vec![0.0; x.len()];
    threads.for_rows(&mut out, width, FORWARD_ROWS, |first, out| cpu::rms_norm(&x[first * width..][..out.len()], weight, epsilon, out));
    out
}

/// Of rows as they travel, without a weight.
pub(super) fn normed_states(threads: &Threads, parts: &[Bytes], format: RowFormat, width: usize, epsilon: f32) -> Vec<f32> {
    let rows: Vec<&[u8]> = parts.iter().flat_map(|bytes| bytes.chunks_exact(format.row_bytes(width))).collect();
    let (ones, mut out) = (vec![1.0; width], vec![0.0; rows.len() * width]);
    threads.for_rows(&mut out, width, FORWARD_ROWS, |first, out| {
        let mut values = vec![0.0; width];
        for (row, out) in rows[first..].iter().zip(out.chunks_exact_mut(width)) {
            format.read(row, &mut values);
            cpu::rms_norm(&values, &ones, epsilon, out);
        }
    });
    out
}

/// With `n = x · r`: `dx = r · (dn - n · mean(dn ⊙ n))` where `dn = dy ⊙ w`, and `dw = Σ dy ⊙ n`. `x` and `dy` are `[m, w]`.
pub(super) fn norm_backward(threads: &Threads, x: &[f32], weight: &[f32], epsilon: f32, dy: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let width = weight.len();
    let ones = vec![1.0; width];
    let mut dx = vec![0.0; x.len()];
    let mut partial = vec![0.0; x.len().div_ceil(ROWS * width) * width];
    let mut work: Vec<_> = dx.chunks_mut(ROWS * width).zip(partial.chunks_exact_mut(width)).collect();
    threads.for_each(&mut work, |block, (dx, dw)| {
        let start = block * ROWS * width;
        let rows = x[start..].chunks_exact(width).zip(dy[start..].chunks_exact(width));
        let mut n = vec![0.0; width];
        for ((x, dy), dx) in rows.zip(dx.chunks_exact_mut(width)) {
            cpu::rms_norm(x, &ones, epsilon, &mut n);
            let r = 1.0 / (cpu::dot(x, x) / width as f32 + epsilon).sqrt();
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
