//! Products of activations with packed weights, fused with what comes before (norm, rounding) and after (residual, SwiGLU).

use std::cell::RefCell;

use super::Precision;
use super::cpu::vectorised;
use super::operand::{pack_into, pack_row, widen, words};
use super::panels::Panels;
use super::rows::{normalise, silu};
use super::threads::{Disjoint, Threads};
use super::tile::{self, COLUMNS, OUTPUT, ROWS};

/// Rows of a block: its packed left side stays in a core's second-level cache while all panels pass by.
const BLOCK_ROWS: usize = 8 * ROWS;

/// The left side of a product: `m` rows of k values.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// f32 rows, rounded to the precision of the right side.
    Plain(&'a [f32]),
    /// f32 rows put through RMSNorm with a weight (k long) and ε, then rounded.
    Normed(&'a [f32], &'a [f32], f32),
    /// Rows that are already packed: [`words`]`(precision, k)` words each.
    Packed(&'a [u32]),
}

/// Where a product goes.
pub enum Sink<'a> {
    /// Overwrites f32 rows of n values.
    Store(&'a mut [f32]),
    /// Adds to f32 rows of n values.
    Add(&'a mut [f32]),
    /// Overwrites packed rows of n values (a multiple of 32), rounded to the precision of the right side.
    Pack(&'a mut [u32]),
    /// The right side holds 16 gate and 16 up outputs in turn; writes packed rows of `silu(gate) · up`, n / 2 values each.
    SwiGlu(&'a mut [u32]),
}

/// `out[m, n] = x[m, k] · w[n, k]ᵀ`; `out` is overwritten. In bf16 `x` is rounded first.
pub fn matmul(threads: &Threads, x: &[f32], w: &Panels, out: &mut [f32]) {
    product(threads, x.len() / w.cols().max(1), Left::Plain(x), w, Sink::Store(out));
}

/// The product of `m` rows on the left with the packed weights on the right.
pub fn product(threads: &Threads, m: usize, left: Left<'_>, right: &Panels, mut sink: Sink<'_>) {
    let (k, n) = (right.cols(), right.rows());
    check(m, &left, right, &sink);
    if m == 0 || n == 0 {
        return;
    }
    let target = Target::new(&mut sink, right);
    let split = Split::new(m, right.count(), threads.count());
    threads.run_blocks(split.row_blocks * split.column_groups, |index| {
        let (block, group) = (index / split.column_groups, index % split.column_groups);
        let (first, last) =
            (share(split.tiles, split.row_blocks, block) * ROWS, (share(split.tiles, split.row_blocks, block + 1) * ROWS).min(m));
        let panels = share(right.count(), split.column_groups, group)..share(right.count(), split.column_groups, group + 1);
        with_packed(left, right.precision(), k, first, last - first, |packed| {
            multiply_block(packed, last - first, right, panels, |row, column, rows, tile| target.write(first + row, column, rows, tile));
        });
    });
}

/// How a product is cut: large ones by rows (a block keeps its left side in cache), small ones by columns.
struct Split {
    tiles: usize,
    row_blocks: usize,
    column_groups: usize,
}

impl Split {
    fn new(m: usize, panels: usize, threads: usize) -> Self {
        let tiles = m.div_ceil(ROWS);
        if m <= BLOCK_ROWS {
            return Self { tiles, row_blocks: 1, column_groups: (panels / 8).clamp(1, 4 * threads) };
        }
        Self { tiles, row_blocks: (threads * m.div_ceil(BLOCK_ROWS * threads)).min(tiles), column_groups: 1 }
    }
}

/// Start of share `index` when `total` is dealt to `parts` as evenly as possible.
fn share(total: usize, parts: usize, index: usize) -> usize {
    total * index / parts
}

fn multiply_block(left: &[u32], m: usize, right: &Panels, panels: std::ops::Range<usize>, write: impl Fn(usize, usize, usize, &[f32])) {
    if right.precision() == Precision::Bf16 && m > ROWS && !tile::multiplies_bf16() {
        return multiply_widened(left, m, right, panels, write);
    }
    let together = tile::panels_together(m);
    for first in panels.clone().step_by(together) {
        let count = together.min(panels.end - first);
        multiply_panels(right.precision(), left, m, right.panel(first), count, |row, panel, rows, tile| {
            write(row, (first + panel) * COLUMNS, rows, tile);
        });
    }
}

/// bf16 values are f32 values, and their products have the same chain: for many rows one that knows no bf16 is faster with them spread out first.
fn multiply_widened(left: &[u32], m: usize, right: &Panels, panels: std::ops::Range<usize>, write: impl Fn(usize, usize, usize, &[f32])) {
    WIDE.with_borrow_mut(|(wide, wide_panel)| {
        wide.resize(2 * left.len(), 0);
        widen(left, 1, wide);
        for panel in panels {
            let narrow = right.panel(panel);
            wide_panel.resize(2 * narrow.panel_stride, 0);
            widen(&narrow.words[..narrow.panel_stride], COLUMNS, wide_panel);
            let right = tile::Right { words: wide_panel, panel_stride: 2 * narrow.panel_stride, steps: 2 * narrow.steps, ..narrow };
            multiply_panels(Precision::F32, wide, m, right, 1, |row, _, rows, tile| write(row, panel * COLUMNS, rows, tile));
        }
    });
}

/// All rows times `count` panels, which no more rows than [`tile::panels_together`] allows may walk together.
fn multiply_panels(
    precision: Precision,
    left: &[u32],
    m: usize,
    right: tile::Right<'_>,
    count: usize,
    write: impl Fn(usize, usize, usize, &[f32]),
) {
    let stride = right.steps * right.segments;
    let mut output = [0.0; OUTPUT];
    for row in (0..m).step_by(ROWS) {
        let rows = ROWS.min(m - row);
        // Only a block of few rows walks several panels at once; the last rows of a large one take them singly.
        let left = tile::Left { words: &left[row * stride..], stride, rows };
        tile::multiply(precision, left, right, count, &mut output);
        for (panel, tile) in output.chunks(rows * COLUMNS).take(count).enumerate() {
            write(row, panel, rows, tile);
        }
    }
}

thread_local! {
    /// The packed rows of the block at hand, and one row of f32.
    static SCRATCH: RefCell<(Vec<u32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    /// The rows of the block at hand and one panel, widened.
    static WIDE: RefCell<(Vec<u32>, Vec<u32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
}

/// Calls `run` with rows `first..first + rows` of the left side, packed.
fn with_packed(left: Left<'_>, precision: Precision, k: usize, first: usize, rows: usize, run: impl FnOnce(&[u32])) {
    let stride = words(precision, k);
    let source = match left {
        Left::Packed(packed) => return run(&packed[first * stride..][..rows * stride]),
        Left::Plain(values) | Left::Normed(values, ..) => &values[first * k..][..rows * k],
    };
    SCRATCH.with_borrow_mut(|(packed, row)| {
        packed.resize(rows * stride, 0);
        row.resize(k, 0.0);
        for (values, words) in source.chunks_exact(k.max(1)).zip(packed.chunks_exact_mut(stride.max(1))) {
            if let Left::Normed(_, weight, epsilon) = left {
                normalise(values, weight, epsilon, row);
                pack_row(precision, row, words);
            } else {
                pack_row(precision, values, words);
            }
        }
        run(packed);
    });
}

/// The sink, shared between the blocks of one product.
enum Target<'a> {
    Store(Disjoint<'a, f32>, usize),
    Add(Disjoint<'a, f32>, usize),
    Pack(Disjoint<'a, u32>, usize, Precision),
    SwiGlu(Disjoint<'a, u32>, usize, Precision),
}

impl<'a> Target<'a> {
    fn new(sink: &'a mut Sink<'_>, right: &Panels) -> Self {
        match sink {
            Sink::Store(out) => Self::Store(Disjoint::new(out), right.rows()),
            Sink::Add(out) => Self::Add(Disjoint::new(out), right.rows()),
            Sink::Pack(out) => Self::Pack(Disjoint::new(out), words(right.precision(), right.rows()), right.precision()),
            Sink::SwiGlu(out) => Self::SwiGlu(Disjoint::new(out), words(right.precision(), right.rows() / 2), right.precision()),
        }
    }

    /// Takes `rows` rows of 32 columns that start at `row`, `column`.
    fn write(&self, row: usize, column: usize, rows: usize, tile: &[f32]) {
        let tile = &tile[..rows * COLUMNS];
        match self {
            Self::Store(out, n) => store(out, row * n + column, *n, COLUMNS.min(n - column), tile),
            Self::Add(out, n) => accumulate(out, row * n + column, *n, COLUMNS.min(n - column), tile),
            Self::Pack(out, stride, precision) => round(out, row * stride + words(*precision, column), *stride, *precision, tile),
            Self::SwiGlu(out, stride, precision) => gate(out, row * stride + words(*precision, column / 2), *stride, *precision, tile),
        }
    }
}

vectorised! {
    fn store(out: &Disjoint<'_, f32>, start: usize, stride: usize, width: usize, tile: &[f32]) {
        for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: each tile is computed once, and tiles do not overlap.
            put(unsafe { out.slice(start + row * stride, width) }, sums, |value, sum| *value = sum);
        }
    }
}

vectorised! {
    fn accumulate(out: &Disjoint<'_, f32>, start: usize, stride: usize, width: usize, tile: &[f32]) {
        for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: as in `store`.
            put(unsafe { out.slice(start + row * stride, width) }, sums, |value, sum| *value += sum);
        }
    }
}

vectorised! {
    fn round(out: &Disjoint<'_, u32>, start: usize, stride: usize, precision: Precision, tile: &[f32]) {
        for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
            // SAFETY: as in `store`.
            pack_into(precision, sums, unsafe { out.slice(start + row * stride, words(precision, COLUMNS)) });
        }
    }
}

vectorised! {
    fn gate(out: &Disjoint<'_, u32>, start: usize, stride: usize, precision: Precision, tile: &[f32]) {
        for (row, sums) in tile.as_chunks::<COLUMNS>().0.iter().enumerate() {
            let mut gated = [0.0; COLUMNS / 2];
            for (index, gated) in gated.iter_mut().enumerate() {
                *gated = silu(sums[index]) * sums[index + COLUMNS / 2];
            }
            // SAFETY: as in `store`.
            pack_into(precision, &gated, unsafe { out.slice(start + row * stride, words(precision, COLUMNS / 2)) });
        }
    }
}

/// Puts the sums of one row where they belong; a whole panel takes a loop of known length.
#[inline(always)]
fn put(target: &mut [f32], sums: &[f32; COLUMNS], store: impl Fn(&mut f32, f32)) {
    if let Ok(target) = <&mut [f32; COLUMNS]>::try_from(&mut *target) {
        target.iter_mut().zip(sums).for_each(|(value, sum)| store(value, *sum));
    } else {
        target.iter_mut().zip(sums).for_each(|(value, sum)| store(value, *sum));
    }
}

fn check(m: usize, left: &Left<'_>, right: &Panels, sink: &Sink<'_>) {
    let (k, n) = (right.cols(), right.rows());
    match left {
        Left::Plain(values) => assert_eq!(values.len(), m * k, "left side is not {m} x {k}"),
        Left::Normed(values, weight, _) => assert!(values.len() == m * k && weight.len() == k, "left side is not {m} x {k}"),
        Left::Packed(packed) => assert_eq!(packed.len(), m * words(right.precision(), k), "left side is not {m} x {k}"),
    }
    match sink {
        Sink::Store(out) | Sink::Add(out) => assert_eq!(out.len(), m * n, "output is not {m} x {n}"),
        Sink::Pack(out) => {
            assert!(n.is_multiple_of(COLUMNS), "{n} outputs do not fill their panels");
            assert_eq!(out.len(), m * words(right.precision(), n), "output is not {m} x {n}");
        }
        Sink::SwiGlu(out) => {
            assert_eq!(n % COLUMNS, 0, "gate and up do not fill their panels");
            assert_eq!(out.len(), m * words(right.precision(), n / 2), "output is not {m} x {}", n / 2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::round_bf16;

    #[test]
    fn sinks_agree_for_any_number_of_rows_and_threads() {
        let (n, k) = (96, 50);
        let values = |count: usize| (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        for precision in [Precision::F32, Precision::Bf16] {
            let (weight, x) = (Panels::pack(&values(n * k), n, k, precision), values(230 * k));
            let mut whole = vec![0.0; 230 * n];
            matmul(&Threads::new(1), &x, &weight, &mut whole);
            for (m, threads) in [(1, 2), (5, 3), (13, 2), (97, 2), (230, 2)] {
                let (threads, left) = (Threads::new(threads), Left::Plain(&x[..m * k]));
                let (mut out, mut sum, mut packed) = (vec![9.0; m * n], vec![0.5; m * n], vec![0; m * words(precision, n)]);
                product(&threads, m, left, &weight, Sink::Store(&mut out));
                product(&threads, m, left, &weight, Sink::Add(&mut sum));
                product(&threads, m, left, &weight, Sink::Pack(&mut packed));
                assert_eq!(out, whole[..m * n]);
                assert!(sum.iter().zip(&out).all(|(sum, value)| *sum == 0.5 + value));
                let mut rounded = vec![0.0; m * n];
                crate::kernel::unpack_row(precision, &packed, &mut rounded);
                if precision == Precision::Bf16 {
                    round_bf16(&mut out);
                }
                assert_eq!(rounded, out);
            }
        }
    }

    #[test]
    fn widened_rows_have_the_same_products() {
        let (m, n, k) = (40, 70, 33);
        let values = |count: usize| (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        let (weight, mut left) = (Panels::pack(&values(n * k), n, k, Precision::Bf16), vec![0; m * words(Precision::Bf16, k)]);
        for (row, words) in values(m * k).chunks(k).zip(left.chunks_mut(words(Precision::Bf16, k))) {
            pack_row(Precision::Bf16, row, words);
        }
        let [mut direct, mut widened] = [(); 2].map(|()| vec![0.0; m * n]);
        product(&Threads::new(1), m, Left::Packed(&left), &weight, Sink::Store(&mut direct));
        let mut sink = Sink::Store(&mut widened);
        let target = Target::new(&mut sink, &weight);
        multiply_widened(&left, m, &weight, 0..weight.count(), |row, column, rows, tile| target.write(row, column, rows, tile));
        for (direct, widened) in direct.iter().zip(&widened) {
            assert!((direct - widened).abs() <= 1e-5 * direct.abs().max(1.0), "{direct} {widened}");
        }
    }
}
