//! The innermost product: a few rows times panels of 32 columns, sums kept in registers.
//!
//! One step multiplies one word of each row with one word of each column: two bf16 products or one f32 product. The steps of an output are
//! one chain in ascending order, whatever the number of rows and panels walked together. A call goes on from the sums that the one before left.

use super::isa::{Isa, isa};
use carryon_crds::pool::Dtype;

/// Rows walked together at most.
pub(super) const ROWS: usize = 12;
/// Columns of a panel.
pub(super) const COLUMNS: usize = 32;
/// Floats that hold the output of one call of [`multiply`] for any number of rows: see [`panels_together`].
pub(super) const OUTPUT: usize = ROWS * COLUMNS;

/// The right side: panels, at most [`panels_together`], of `steps` steps (32 words each).
#[derive(Clone, Copy)]
pub(super) struct Right<'a> {
    pub panels: &'a [&'a [u32]],
    pub steps: usize,
}

/// The left side: rows `stride` words apart, of each as many words are read as the right side has steps.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub words: &'a [u32],
    pub stride: usize,
    pub rows: usize,
}

/// Panels walked together for `rows` rows: with few rows more panels keep enough sums in flight.
pub(super) fn panels_together(rows: usize) -> usize {
    match rows {
        0..=3 => 4,
        4..=6 => 2,
        _ => 1,
    }
}

/// Whether this machine multiplies bf16 as it is, and not as f32.
pub(super) fn multiplies_bf16() -> bool {
    isa() == Isa::Avx512Bf16
}

/// `output[panel][row][column] += Σ left · right`, step by step.
pub(super) fn multiply(dtype: Dtype, left: Left<'_>, right: Right<'_>, output: &mut [f32]) {
    multiply_with(isa(), dtype, left, right, output);
}

fn multiply_with(isa: Isa, dtype: Dtype, left: Left<'_>, right: Right<'_>, output: &mut [f32]) {
    check(&left, &right, output);
    #[cfg(target_arch = "x86_64")]
    match (isa, dtype) {
        // SAFETY: the features were detected, the bounds checked.
        (Isa::Avx512Bf16, Dtype::Bfloat16) => return unsafe { avx512_bf16::dispatch(left, right, output) },
        // SAFETY: as above.
        (Isa::Avx512Bf16 | Isa::Avx512, Dtype::Float32) => return unsafe { avx512_f32::dispatch(left, right, output) },
        // SAFETY: as above.
        (Isa::Avx512 | Isa::Avx2, _) => return unsafe { avx2::dispatch(dtype, left, right, output) },
        (Isa::Portable, _) => {}
    }
    let _ = isa;
    portable(dtype, left, right, output);
}

/// The bounds that the register kernels rely on.
fn check(left: &Left<'_>, right: &Right<'_>, output: &[f32]) {
    let panels = right.panels.len();
    assert!((1..=ROWS).contains(&left.rows) && (1..=panels_together(left.rows)).contains(&panels), "no kernel for this tile");
    assert!(left.words.len() >= (left.rows - 1) * left.stride + right.steps, "left side is too short");
    assert!(right.panels.iter().all(|panel| panel.len() >= right.steps * COLUMNS), "right side is too short");
    assert!(output.len() >= left.rows * panels * COLUMNS, "output is too short");
}

#[cfg(target_arch = "x86_64")]
macro_rules! avx512_tiles {
    ($module:ident, $features:literal, |$sum:ident, $left:ident, $right:ident| $step:expr) => {
        mod $module {
            use std::arch::x86_64::*;

            use super::{COLUMNS, Left, Right};

            /// # Safety
            /// The CPU has the features, `check` passed, `R = left.rows` and `P` is the number of panels; `R · P ≤ 12`.
            #[target_feature(enable = $features)]
            unsafe fn tile<const R: usize, const P: usize>(left: Left<'_>, right: Right<'_>, output: *mut f32) {
                let mut sums = [[[_mm512_setzero_ps(); 2]; P]; R];
                // SAFETY: all offsets stay inside the slices: `check`.
                unsafe {
                    for (row, sums) in sums.iter_mut().enumerate() {
                        for (panel, sums) in sums.iter_mut().enumerate() {
                            let start = output.add((panel * R + row) * COLUMNS);
                            *sums = [_mm512_loadu_ps(start), _mm512_loadu_ps(start.add(16))];
                        }
                    }
                    let mut a = left.words.as_ptr();
                    let mut b: [*const u32; P] = std::array::from_fn(|panel| right.panels[panel].as_ptr());
                    for _ in 0..right.steps {
                        let mut columns = [[_mm512_setzero_si512(); 2]; P];
                        for (columns, start) in columns.iter_mut().zip(b) {
                            *columns = [_mm512_loadu_si512(start.cast()), _mm512_loadu_si512(start.add(16).cast())];
                        }
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let $left = _mm512_set1_epi32(*a.add(row * left.stride) as i32);
                            for (sums, columns) in sums.iter_mut().zip(&columns) {
                                for half in 0..2 {
                                    let ($sum, $right) = (sums[half], columns[half]);
                                    sums[half] = $step;
                                }
                            }
                        }
                        a = a.add(1);
                        b = b.map(|start| start.add(COLUMNS));
                    }
                    for (row, sums) in sums.iter().enumerate() {
                        for (panel, sums) in sums.iter().enumerate() {
                            let start = output.add((panel * R + row) * COLUMNS);
                            _mm512_storeu_ps(start, sums[0]);
                            _mm512_storeu_ps(start.add(16), sums[1]);
                        }
                    }
                }
            }

            /// # Safety
            /// The CPU has the features and `check` passed.
            #[target_feature(enable = $features)]
            pub unsafe fn dispatch(left: Left<'_>, right: Right<'_>, output: &mut [f32]) {
                let output = output.as_mut_ptr();
                // SAFETY: the caller's.
                unsafe {
                    match (left.rows, right.panels.len()) {
                        (1, 1) => tile::<1, 1>(left, right, output),
                        (1, 2) => tile::<1, 2>(left, right, output),
                        (1, 3) => tile::<1, 3>(left, right, output),
                        (1, _) => tile::<1, 4>(left, right, output),
                        (2, 1) => tile::<2, 1>(left, right, output),
                        (2, 2) => tile::<2, 2>(left, right, output),
                        (2, 3) => tile::<2, 3>(left, right, output),
                        (2, _) => tile::<2, 4>(left, right, output),
                        (3, 1) => tile::<3, 1>(left, right, output),
                        (3, 2) => tile::<3, 2>(left, right, output),
                        (3, 3) => tile::<3, 3>(left, right, output),
                        (3, _) => tile::<3, 4>(left, right, output),
                        (4, 1) => tile::<4, 1>(left, right, output),
                        (4, _) => tile::<4, 2>(left, right, output),
                        (5, 1) => tile::<5, 1>(left, right, output),
                        (5, _) => tile::<5, 2>(left, right, output),
                        (6, 1) => tile::<6, 1>(left, right, output),
                        (6, _) => tile::<6, 2>(left, right, output),
                        (7, _) => tile::<7, 1>(left, right, output),
                        (8, _) => tile::<8, 1>(left, right, output),
                        (9, _) => tile::<9, 1>(left, right, output),
                        (10, _) => tile::<10, 1>(left, right, output),
                        (11, _) => tile::<11, 1>(left, right, output),
                        _ => tile::<12, 1>(left, right, output),
                    }
                }
            }
        }
    };
}

#[cfg(target_arch = "x86_64")]
avx512_tiles!(avx512_bf16, "avx512f,avx512bw,avx512bf16", |sum, left, right| {
    // The same 512 bits, read as pairs of bf16.
    _mm512_dpbf16_ps(sum, std::mem::transmute::<__m512i, __m512bh>(left), std::mem::transmute::<__m512i, __m512bh>(right))
});
#[cfg(target_arch = "x86_64")]
avx512_tiles!(avx512_f32, "avx512f", |sum, left, right| _mm512_fmadd_ps(_mm512_castsi512_ps(left), _mm512_castsi512_ps(right), sum));

/// Twelve sums, and what one step reads, fill AVX2's sixteen registers: up to three rows of a whole panel, or six of half a panel.
#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use super::{COLUMNS, Dtype, Left, Right};

    const LANES: usize = 8;

    /// # Safety
    /// The CPU has the features; `R` rows from `rows` on and the `steps` of `panel` are as `check` wants them, `output` holds `R` rows.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tile<const R: usize, const V: usize, const BF16: bool>(
        rows: *const u32,
        stride: usize,
        panel: &[u32],
        steps: usize,
        output: *mut f32,
    ) {
        let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
        for part in (0..COLUMNS).step_by(V * LANES) {
            let mut sums = [[_mm256_setzero_ps(); V]; R];
            // SAFETY: all offsets stay inside the slices: the caller's.
            unsafe {
                for (row, sums) in sums.iter_mut().enumerate() {
                    for (vector, sum) in sums.iter_mut().enumerate() {
                        *sum = _mm256_loadu_ps(output.add(row * COLUMNS + part + vector * LANES));
                    }
                }
                let (mut a, mut b) = (rows, panel.as_ptr().add(part));
                for _ in 0..steps {
                    let mut columns = [_mm256_setzero_si256(); V];
                    for (vector, columns) in columns.iter_mut().enumerate() {
                        *columns = _mm256_loadu_si256(b.add(vector * LANES).cast());
                    }
                    for (row, sums) in sums.iter_mut().enumerate() {
                        let left = _mm256_set1_epi32(*a.add(row * stride) as i32);
                        for (sum, right) in sums.iter_mut().zip(columns) {
                            let (left, right) =
                                if BF16 { (_mm256_slli_epi32(left, 16), _mm256_slli_epi32(right, 16)) } else { (left, right) };
                            *sum = _mm256_fmadd_ps(_mm256_castsi256_ps(left), _mm256_castsi256_ps(right), *sum);
                        }
                    }
                    if BF16 {
                        for (row, sums) in sums.iter_mut().enumerate() {
                            let left = _mm256_and_si256(_mm256_set1_epi32(*a.add(row * stride) as i32), high);
                            for (sum, right) in sums.iter_mut().zip(columns) {
                                let right = _mm256_and_si256(right, high);
                                *sum = _mm256_fmadd_ps(_mm256_castsi256_ps(left), _mm256_castsi256_ps(right), *sum);
                            }
                        }
                    }
                    a = a.add(1);
                    b = b.add(COLUMNS);
                }
                for (row, sums) in sums.iter().enumerate() {
                    for (vector, sum) in sums.iter().enumerate() {
                        _mm256_storeu_ps(output.add(row * COLUMNS + part + vector * LANES), *sum);
                    }
                }
            }
        }
    }

    /// # Safety
    /// The CPU has the features and `check` passed.
    #[target_feature(enable = "avx2,fma")]
    unsafe fn tiles<const BF16: bool>(left: Left<'_>, right: &Right<'_>, output: *mut f32) {
        for (index, panel) in right.panels.iter().enumerate() {
            for row in (0..left.rows).step_by(6) {
                let rows = left.words.as_ptr().wrapping_add(row * left.stride);
                // SAFETY: the caller's.
                unsafe {
                    let output = output.add((index * left.rows + row) * COLUMNS);
                    match left.rows - row {
                        1 => tile::<1, 4, BF16>(rows, left.stride, panel, right.steps, output),
                        2 => tile::<2, 4, BF16>(rows, left.stride, panel, right.steps, output),
                        3 => tile::<3, 4, BF16>(rows, left.stride, panel, right.steps, output),
                        4 => tile::<4, 2, BF16>(rows, left.stride, panel, right.steps, output),
                        5 => tile::<5, 2, BF16>(rows, left.stride, panel, right.steps, output),
                        _ => tile::<6, 2, BF16>(rows, left.stride, panel, right.steps, output),
                    }
                }
            }
        }
    }

    /// # Safety
    /// As for [`tiles`].
    #[target_feature(enable = "avx2,fma")]
    pub unsafe fn dispatch(dtype: Dtype, left: Left<'_>, right: Right<'_>, output: &mut [f32]) {
        // SAFETY: the caller's.
        unsafe {
            match dtype {
                Dtype::Float32 => tiles::<false>(left, &right, output.as_mut_ptr()),
                Dtype::Bfloat16 => tiles::<true>(left, &right, output.as_mut_ptr()),
            }
        }
    }
}

fn portable(dtype: Dtype, left: Left<'_>, right: Right<'_>, output: &mut [f32]) {
    for (index, panel) in right.panels.iter().enumerate() {
        for row in 0..left.rows {
            let (a, b) = (&left.words[row * left.stride..], &panel[..right.steps * COLUMNS]);
            let sums = &mut output[(index * left.rows + row) * COLUMNS..][..COLUMNS];
            match dtype {
                Dtype::Float32 => chain(a, b, sums, |sum, a, b| f32::from_bits(a).mul_add(f32::from_bits(b), sum)),
                Dtype::Bfloat16 => chain(a, b, sums, |sum, a, b| {
                    let low = f32::from_bits(a << 16).mul_add(f32::from_bits(b << 16), sum);
                    f32::from_bits(a & 0xffff_0000).mul_add(f32::from_bits(b & 0xffff_0000), low)
                }),
            }
        }
    }
}

#[inline(always)]
fn chain(a: &[u32], b: &[u32], sums: &mut [f32], step: impl Fn(f32, u32, u32) -> f32) {
    for (a, b) in a.iter().zip(b.chunks_exact(COLUMNS)) {
        for (sum, b) in sums.iter_mut().zip(b) {
            *sum = step(*sum, *a, *b);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::cpu::isa::rounding;
    use crate::kernel::cpu::{pack_row, words};

    fn values(count: usize, seed: u32) -> Vec<f32> {
        (0..count as u32).map(|i| ((i.wrapping_mul(2_654_435_761).wrapping_add(seed) >> 9) as f32 / 4_194_304.0) - 1.0).collect()
    }

    #[test]
    fn every_instruction_set_agrees() {
        let (k, rows) = (96, 12);
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let steps = words(dtype, k);
            let mut left = vec![0; rows * steps];
            for (row, words) in left.chunks_mut(steps).enumerate() {
                pack_row(dtype, &values(k, row as u32), words);
            }
            let mut right = vec![0; 4 * steps * COLUMNS];
            pack_row(dtype, &values(4 * k * COLUMNS, 99), &mut right);
            for rows in 1..=rows {
                for panels in 1..=panels_together(rows) {
                    // At once, and in two calls of which the second goes on from the first.
                    let multiply = |isa: Isa, calls: usize| {
                        let (mut output, steps_each) = ([0.0; OUTPUT], steps / calls);
                        for first in (0..steps).step_by(steps_each) {
                            let panel = |panel: usize| &right[(panel * steps + first) * COLUMNS..][..steps_each * COLUMNS];
                            let panels: Vec<&[u32]> = (0..panels).map(panel).collect();
                            let left = Left { words: &left[first..], stride: steps, rows };
                            multiply_with(isa, dtype, left, Right { panels: &panels, steps: steps_each }, &mut output);
                        }
                        output
                    };
                    let portable = multiply(Isa::Portable, 1);
                    assert_eq!(portable, multiply(Isa::Portable, 2), "portable {rows} rows {panels} panels");
                    for isa in [Isa::Avx2, Isa::Avx512, Isa::Avx512Bf16].into_iter().filter(|i| *i <= isa()) {
                        let fast = multiply(isa, 1);
                        assert_eq!(fast, multiply(isa, 2), "{isa:?} {rows} rows {panels} panels");
                        if rounding(isa, dtype) == rounding(Isa::Portable, dtype) {
                            assert_eq!(portable, fast, "{isa:?} {rows} rows {panels} panels");
                        }
                        for (a, b) in portable.iter().zip(&fast) {
                            assert!((a - b).abs() <= 1e-5 * a.abs().max(1.0), "{isa:?} {rows} rows {panels} panels: {a} {b}");
                        }
                    }
                }
            }
        }
    }
}
