//! Products of activations with packed weights, fused with what comes before (norm, rounding) and after (residual, gate).

use std::cell::RefCell;
use std::ops::Range;

use carryon_crds::pool::Dtype;

use super::operand::{pack_row, widen, words};
use super::panels::Panels;
use super::rows::normalise;
use super::sink::{Sink, Target};
use super::threads::Threads;
use super::tile::{self, COLUMNS, OUTPUT, ROWS};

/// Rows of a block: its packed left side stays in a core's second-level cache while all panels pass by.
const BLOCK_ROWS: usize = 8 * ROWS;
/// Steps of a panel that many rows walk before the next: 32 KiB.
const STEPS: usize = 256;
/// Steps of a panel that are widened for few rows: four panels of 4 KiB.
const WIDENED_STEPS: usize = 32;
/// Gate and up outputs alternate in runs of this many: half a panel each.
pub(super) const RUN: usize = COLUMNS / 2;

/// The left side of a product: rows of k values.
#[derive(Clone, Copy)]
pub enum Left<'a> {
    /// f32 rows, rounded to the number type of the right side.
    Plain(&'a [f32]),
    /// f32 rows put through RMSNorm with this ε and each part's weight, then rounded.
    Normed(&'a [f32], f32),
    /// Rows that are already packed, this many words apart.
    Packed(&'a [u32], usize),
}

/// Weights and the rows that meet them; `norm` is empty where it counts as ones.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    /// Rows of the left side.
    pub rows: usize,
    /// What they are multiplied with; all parts have the same shape.
    pub panels: &'a Panels,
    /// The norm's weight, for [`Left::Normed`].
    pub norm: &'a [f32],
}

/// `out[m, n] = x[m, k] · w[n, k]ᵀ`; `out` is overwritten. In bf16 `x` is rounded first.
pub fn matmul(threads: &Threads, x: &[f32], w: &Panels, out: &mut [f32]) {
    let part = Part { rows: x.len() / w.cols().max(1), panels: w, norm: &[] };
    product(threads, Left::Plain(x), &[part], Sink::Store(out));
}

/// The product of the rows on the left, dealt to the parts in order, with the packed weights on the right.
pub fn product(threads: &Threads, left: Left<'_>, right: &[Part<'_>], mut sink: Sink<'_>) {
    check(&left, right, &sink);
    let Some(first) = right.first() else { return };
    if first.panels.rows() == 0 {
        return;
    }
    let (k, n) = (first.panels.cols(), first.panels.rows());
    let target = Target::new(&mut sink, n, first.panels.dtype());
    let lane = |first_row| Lane { first_row, left: 0, target: 0 };
    let lanes: Vec<_> = right.iter().scan(0, |row, part| Some(lane(std::mem::replace(row, *row + part.rows)))).collect();
    run(threads, left, k, right, &lanes, &target);
}

/// The product of each head's values of every row with its own weight: values `head · k ..` on the left become values `head · n ..`.
pub fn product_heads(threads: &Threads, left: Left<'_>, rows: usize, heads: &[Panels], mut sink: Sink<'_>) {
    let Some(first) = heads.first() else { return };
    let (k, n, dtype) = (first.cols(), first.rows(), first.dtype());
    check_heads(&left, rows, heads, &sink);
    let target = Target::new(&mut sink, heads.len() * n, dtype);
    let right: Vec<_> = heads.iter().map(|panels| Part { rows, panels, norm: &[] }).collect();
    let lanes: Vec<_> = (0..heads.len()).map(|head| Lane { first_row: 0, left: head * k, target: head * n }).collect();
    run(threads, left, heads.len() * k, &right, &lanes, &target);
}

/// Where the rows of a part are: the first of them, and the first of its columns on the left and in the target.
struct Lane {
    first_row: usize,
    left: usize,
    target: usize,
}

/// All parts, each in its lane; `width` is that of f32 rows on the left.
fn run(threads: &Threads, left: Left<'_>, width: usize, right: &[Part<'_>], lanes: &[Lane], target: &Target<'_>) {
    let blocks = blocks(right, lanes, threads.count());
    threads.run_blocks(blocks.len(), |index| {
        let Block { part, rows, panels } = &blocks[index];
        let (Part { panels: weights, norm, .. }, lane) = (right[*part], &lanes[*part]);
        with_packed(left, (width, lane.left), weights, norm, rows.clone(), |packed, stride| {
            multiply_block(packed, stride, rows.len(), weights, panels.clone(), |row, column, count, tile| {
                let columns = COLUMNS.min(weights.rows() - column);
                target.write(rows.start + row, lane.target + column, count, columns, tile);
            });
        });
    });
}

/// Some rows of one part times some panels.
struct Block {
    part: usize,
    rows: Range<usize>,
    panels: Range<usize>,
}

/// How a product is cut: large ones by rows (a block keeps its left side in cache), small ones by columns, many parts by parts.
fn blocks(right: &[Part<'_>], lanes: &[Lane], threads: usize) -> Vec<Block> {
    let mut blocks = Vec::new();
    let threads_each = threads.div_ceil(right.len());
    for (part, Part { rows: m, panels, .. }) in right.iter().enumerate() {
        let (tiles, count) = (m.div_ceil(ROWS), panels.count());
        let (row_blocks, column_groups) = match *m {
            0 => (0, 0),
            // As many groups for each thread: none waits for the last.
            1..=BLOCK_ROWS => (1, (count / 8).clamp(1, 4 * threads_each).next_multiple_of(threads_each).min(count)),
            _ => ((threads_each * m.div_ceil(BLOCK_ROWS * threads_each)).min(tiles), 1),
        };
        for block in 0..row_blocks {
            let start = |index| lanes[part].first_row + (share(tiles, row_blocks, index) * ROWS).min(*m);
            for group in 0..column_groups {
                let panels = share(count, column_groups, group)..share(count, column_groups, group + 1);
                blocks.push(Block { part, rows: start(block)..start(block + 1), panels });
            }
        }
    }
    blocks
}

/// Start of share `index` when `total` is dealt to `parts` as evenly as possible.
fn share(total: usize, parts: usize, index: usize) -> usize {
    total * index / parts
}

fn multiply_block(
    left: &[u32],
    stride: usize,
    m: usize,
    right: &Panels,
    panels: Range<usize>,
    write: impl Fn(usize, usize, usize, &[f32]),
) {
    if m > ROWS {
        return multiply_many(left, stride, m, right, panels, write);
    }
    let together = tile::panels_together(m);
    let parts = parts(right, WIDENED_STEPS);
    WIDENED.with_borrow_mut(|widened| {
        for first in panels.clone().step_by(together) {
            let count = together.min(panels.end - first);
            let mut output = [0.0; OUTPUT];
            for part in 0..parts {
                let steps = part_of(right, parts, part);
                let mut room = widened.iter_mut();
                let mut walked: [&[u32]; 4] = [&[]; 4];
                for (panel, (walked, room)) in walked.iter_mut().zip(&mut room).take(count).enumerate() {
                    *walked = right.walk(first + panel, steps.clone(), room);
                }
                let left = tile::Left { words: &left[steps.start..], stride, rows: m };
                tile::multiply(right.dtype(), left, tile::Right { panels: &walked[..count], steps: steps.len() }, &mut output);
            }
            for (panel, tile) in output.chunks(m * COLUMNS).take(count).enumerate() {
                write(0, (first + panel) * COLUMNS, m, tile);
            }
        }
    });
}

/// Parts of a panel that are walked one after the other: of about `steps` steps each, or all of it where nothing has to be widened for it.
fn parts(right: &Panels, steps: usize) -> usize {
    if right.stride().is_some() { right.steps().div_ceil(steps) } else { 1 }
}

/// The steps of a part.
fn part_of(right: &Panels, parts: usize, part: usize) -> Range<usize> {
    let stride = right.stride().unwrap_or(1);
    let start = |part| (share(right.steps().div_ceil(stride), parts, part) * stride).min(right.steps());
    start(part)..start(part + 1)
}

/// Many rows: all of them walk some steps of a panel before the next, so that what is read again and again lies in the nearest caches.
///
/// bf16 values are f32 values, and their products have the same chain: where a machine knows no bf16 both sides are spread out first.
fn multiply_many(left: &[u32], stride: usize, m: usize, right: &Panels, panels: Range<usize>, write: impl Fn(usize, usize, usize, &[f32])) {
    let wide = right.dtype() == Dtype::Bfloat16 && !tile::multiplies_bf16();
    let (dtype, words) = if wide { (Dtype::Float32, 2) } else { (right.dtype(), 1) };
    MANY.with_borrow_mut(|Many { left: wide_left, widened, panel: wide_panel, sums }| {
        let left = if wide { spread(&left[..stride * (m - 1) + right.steps()], 1, wide_left) } else { left };
        let parts = (words * right.steps() / STEPS).max(1);
        for panel in panels {
            sums.clear();
            sums.resize(m * COLUMNS, 0.0);
            for part in 0..parts {
                let steps = part_of(right, parts, part);
                let narrow = right.walk(panel, steps.clone(), widened);
                let panel = if wide { spread(narrow, COLUMNS, wide_panel) } else { narrow };
                let right = tile::Right { panels: &[panel], steps: words * steps.len() };
                for (index, sums) in sums.chunks_mut(ROWS * COLUMNS).enumerate() {
                    let first = words * (index * ROWS * stride + steps.start);
                    let left = tile::Left { words: &left[first..], stride: words * stride, rows: sums.len() / COLUMNS };
                    tile::multiply(dtype, left, right, sums);
                }
            }
            for (index, sums) in sums.chunks(ROWS * COLUMNS).enumerate() {
                write(index * ROWS, panel * COLUMNS, sums.len() / COLUMNS, sums);
            }
        }
    });
}

/// [`widen`] into a buffer of its own.
fn spread<'a>(words: &[u32], run: usize, wide: &'a mut Vec<u32>) -> &'a [u32] {
    wide.resize(2 * words.len(), 0);
    widen(words, run, wide);
    wide
}

/// Buffers of [`multiply_many`].
#[derive(Default)]
struct Many {
    /// The rows of the block at hand, spread out.
    left: Vec<u32>,
    /// Part of a panel as it is widened.
    widened: Vec<u32>,
    /// The same spread out.
    panel: Vec<u32>,
    /// The sums of all rows.
    sums: Vec<f32>,
}

thread_local! {
    /// The packed rows of the block at hand, and one row of f32.
    static SCRATCH: RefCell<(Vec<u32>, Vec<f32>)> = const { RefCell::new((Vec::new(), Vec::new())) };
    static MANY: RefCell<Many> = RefCell::default();
    /// Parts of panels that are walked together, widened.
    static WIDENED: RefCell<[Vec<u32>; 4]> = const { RefCell::new([const { Vec::new() }; 4]) };
}

/// Calls `run` with these rows of the left side, packed, and the words between them. Of f32 rows of `width` values those from `column` on count.
fn with_packed(
    left: Left<'_>,
    (width, column): (usize, usize),
    panels: &Panels,
    norm: &[f32],
    rows: Range<usize>,
    run: impl FnOnce(&[u32], usize),
) {
    let (dtype, k, stride) = (panels.dtype(), panels.cols(), panels.steps());
    let source = match left {
        Left::Packed(packed, stride) => return run(&packed[rows.start * stride + words(dtype, column)..rows.end * stride], stride),
        Left::Plain(values) | Left::Normed(values, _) => &values[rows.start * width..rows.end * width],
    };
    SCRATCH.with_borrow_mut(|(packed, row)| {
        packed.resize(rows.len() * stride, 0);
        row.resize(k, 0.0);
        for (values, words) in source.chunks_exact(width.max(1)).zip(packed.chunks_exact_mut(stride.max(1))) {
            let values = &values[column..][..k];
            if let Left::Normed(_, epsilon) = left {
                normalise(values, norm, epsilon, row);
                pack_row(dtype, row, words);
            } else {
                pack_row(dtype, values, words);
            }
        }
        run(packed, stride);
    });
}

fn check(left: &Left<'_>, right: &[Part<'_>], sink: &Sink<'_>) {
    let Some(Part { panels: first, .. }) = right.first() else { return };
    let (m, k, n, dtype) = (right.iter().map(|part| part.rows).sum::<usize>(), first.cols(), first.rows(), first.dtype());
    let alike = |part: &Part<'_>| (part.panels.rows(), part.panels.cols(), part.panels.dtype()) == (n, k, dtype);
    assert!(right.iter().all(alike), "parts of one product have different shapes");
    match left {
        Left::Plain(values) => assert_eq!(values.len(), m * k, "left side is not {m} x {k}"),
        Left::Normed(values, _) => {
            assert_eq!(values.len(), m * k, "left side is not {m} x {k}");
            assert!(right.iter().all(|part| part.norm.is_empty() || part.norm.len() == k), "a norm's weight has not {k} values");
        }
        Left::Packed(packed, stride) => {
            assert!(packed.len() == m * stride && *stride >= words(dtype, k), "left side is not {m} x {k}");
        }
    }
    match sink {
        Sink::Store(out) | Sink::Add(out) => assert_eq!(out.len(), m * n, "output is not {m} x {n}"),
        Sink::Pack(out) => assert_eq!(out.len(), m * words(dtype, n), "output is not {m} x {n}"),
        Sink::Gated(out, _) => {
            assert_eq!(n % COLUMNS, 0, "gate and up do not fill their panels");
            assert_eq!(out.len(), m * words(dtype, n / 2), "output is not {m} x {}", n / 2);
        }
    }
}

fn check_heads(left: &Left<'_>, m: usize, heads: &[Panels], sink: &Sink<'_>) {
    let (k, n, dtype, count) = (heads[0].cols(), heads[0].rows(), heads[0].dtype(), heads.len());
    assert!(k.is_multiple_of(2) && n.is_multiple_of(2), "heads of {n} x {k} have no words of their own");
    assert!(heads.iter().all(|head| (head.rows(), head.cols(), head.dtype()) == (n, k, dtype)), "heads have different shapes");
    match left {
        Left::Plain(values) => assert_eq!(values.len(), m * count * k, "left side is not {m} x {count} x {k}"),
        Left::Packed(packed, stride) => {
            assert!(packed.len() == m * stride && *stride >= words(dtype, count * k), "left side is not {m} x {count} x {k}");
        }
        Left::Normed(..) => panic!("heads are not normed"),
    }
    match sink {
        Sink::Store(out) => assert_eq!(out.len(), m * count * n, "output is not {m} x {count} x {n}"),
        Sink::Pack(out) => assert_eq!(out.len(), m * words(dtype, count * n), "output is not {m} x {count} x {n}"),
        Sink::Add(_) | Sink::Gated(..) => panic!("products of heads are neither added nor gated"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::cpu::round_bf16;
    use crate::kernel::{Bits, Stored};

    #[test]
    fn sinks_agree_for_any_number_of_rows_and_threads() {
        let (n, k) = (96, 50);
        let values = |count: usize| (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let (weight, x) = (Panels::pack(&values(n * k), n, k, dtype), values(230 * k));
            let mut whole = vec![0.0; 230 * n];
            matmul(&Threads::new(1), &x, &weight, &mut whole);
            for (m, threads) in [(1, 2), (5, 3), (13, 2), (97, 2), (230, 2)] {
                let (threads, left) = (Threads::new(threads), Left::Plain(&x[..m * k]));
                let part = [Part { rows: m, panels: &weight, norm: &[] }];
                let (mut out, mut sum, mut packed) = (vec![9.0; m * n], vec![0.5; m * n], vec![0; m * words(dtype, n)]);
                product(&threads, left, &part, Sink::Store(&mut out));
                product(&threads, left, &part, Sink::Add(&mut sum));
                product(&threads, left, &part, Sink::Pack(&mut packed));
                assert_eq!(out, whole[..m * n]);
                assert!(sum.iter().zip(&out).all(|(sum, value)| *sum == 0.5 + value));
                let mut rounded = vec![0.0; m * n];
                crate::kernel::cpu::unpack_row(dtype, &packed, &mut rounded);
                if dtype == Dtype::Bfloat16 {
                    round_bf16(&mut out);
                }
                assert_eq!(rounded, out);
            }
        }
    }

    #[test]
    fn weights_in_blocks_have_the_products_of_the_numbers_that_they_stand_for() {
        let (n, threads) = (70, Threads::new(2));
        let values = |count: usize| (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        for (bits, k) in [Bits::Q8, Bits::Q4].into_iter().flat_map(|bits| [(bits, 33), (bits, 160), (bits, 4 * STEPS + 70)]) {
            let weight = values(n * k);
            let blocks =
                Panels::from_rows(n, k, Stored::Blocks(bits), &threads, |row, values| values.copy_from_slice(&weight[row * k..][..k]));
            let plain = Panels::from_rows(n, k, Dtype::Bfloat16, &threads, |row, values| blocks.row(row, values));
            for m in [1, 3, 12, 40, 130] {
                let (x, y) = (values(m * k), values(m * n));
                let (mut found, mut expected) = (vec![0.0; m * n], vec![0.0; m * n]);
                matmul(&threads, &x, &blocks, &mut found);
                matmul(&threads, &x, &plain, &mut expected);
                assert_eq!(found, expected, "{bits:?} {m} x {k}");
                let (mut found, mut expected) = (vec![0.0; m * k], vec![0.0; m * k]);
                matmul(&threads, &y, &blocks.transposed(&threads), &mut found);
                matmul(&threads, &y, &plain.transposed(&threads), &mut expected);
                assert_eq!(found, expected, "{bits:?} {m} x {k}, transposed");
            }
        }
    }

    #[test]
    fn parts_have_the_products_that_they_have_alone() {
        let (n, k, threads) = (70, 33, Threads::new(2));
        let values =
            |count: usize, seed: usize| (0..count).map(|i| (((i + seed) * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        let sizes = [1, 0, 13, 200, 1];
        let weights: Vec<_> = (0..sizes.len()).map(|seed| Panels::pack(&values(n * k, seed), n, k, Dtype::Float32)).collect();
        let norms: Vec<_> = (0..sizes.len()).map(|seed| values(k, 31 * seed)).collect();
        let x = values(sizes.iter().sum::<usize>() * k, 5);
        let part = |index: usize| Part { rows: sizes[index], panels: &weights[index], norm: &norms[index] };
        let parts: Vec<_> = (0..sizes.len()).map(part).collect();
        let mut together = vec![0.0; x.len() / k * n];
        product(&threads, Left::Normed(&x, 1e-5), &parts, Sink::Store(&mut together));
        let mut first = 0;
        for (index, rows) in sizes.into_iter().enumerate() {
            let mut alone = vec![0.0; rows * n];
            product(&threads, Left::Normed(&x[first * k..][..rows * k], 1e-5), &[part(index)], Sink::Store(&mut alone));
            assert_eq!(together[first * n..][..rows * n], alone);
            first += rows;
        }
    }

    #[test]
    fn heads_have_the_products_that_their_columns_have_alone() {
        let (m, n, k, count, threads) = (29, 38, 34, 3, Threads::new(2));
        let values = |count: usize| (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        let x = values(m * count * k);
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let heads: Vec<_> = (1..=count).map(|head| Panels::pack(&values((head + 1) * n * k)[head * n * k..], n, k, dtype)).collect();
            let mut packed = vec![0; m * words(dtype, count * k)];
            x.chunks(count * k).zip(packed.chunks_mut(words(dtype, count * k))).for_each(|(row, words)| pack_row(dtype, row, words));
            let (mut out, mut rounded) = (vec![0.0; m * count * n], vec![0; m * words(dtype, count * n)]);
            product_heads(&threads, Left::Plain(&x), m, &heads, Sink::Store(&mut out));
            product_heads(&threads, Left::Packed(&packed, words(dtype, count * k)), m, &heads, Sink::Pack(&mut rounded));
            for (head, weight) in heads.iter().enumerate() {
                let own: Vec<f32> = x.chunks(count * k).flat_map(|row| &row[head * k..][..k]).copied().collect();
                let mut alone = vec![0.0; m * n];
                matmul(&threads, &own, weight, &mut alone);
                for (row, alone) in alone.chunks(n).enumerate() {
                    assert_eq!(alone, &out[(row * count + head) * n..][..n], "{dtype:?}");
                    let mut words_of = vec![0; words(dtype, n)];
                    pack_row(dtype, alone, &mut words_of);
                    assert_eq!(words_of, rounded[row * words(dtype, count * n) + words(dtype, head * n)..][..words(dtype, n)], "{dtype:?}");
                }
            }
        }
    }

    #[test]
    fn rows_have_the_same_products_alone_and_among_many() {
        let (m, n) = (40, 70);
        let values = |count: usize| (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect::<Vec<f32>>();
        for (k, dtype) in [33, 2 * STEPS + 1, 5 * STEPS - 3].into_iter().flat_map(|k| [(k, Dtype::Float32), (k, Dtype::Bfloat16)]) {
            let (weight, x, threads) = (Panels::pack(&values(n * k), n, k, dtype), values(m * k), Threads::new(1));
            let mut many = vec![0.0; m * n];
            matmul(&threads, &x, &weight, &mut many);
            for (x, many) in x.chunks(k).zip(many.chunks(n)) {
                let mut alone = vec![0.0; n];
                matmul(&threads, x, &weight, &mut alone);
                assert_eq!(alone, many, "{k} {dtype:?}");
            }
        }
    }
}
