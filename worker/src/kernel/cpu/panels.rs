//! Weights packed once for the tile kernel.

use std::ops::Range;

use super::blocks::Blocks;
use super::operand::{pack_pairs, pack_row, words};
use super::threads::{Disjoint, Threads};
use super::tile::COLUMNS;
use crate::kernel::Stored;
use carryon_crds::pool::Dtype;

/// A weight of `rows` outputs and `cols` inputs, in panels of 32 outputs: for each word of the inputs, one word of each of the 32 outputs.
/// Absent outputs of the last panel are zero. Panels that are kept in blocks are widened to such words some steps at a time.
pub struct Panels {
    kept: Kept,
    rows: usize,
    cols: usize,
    dtype: Dtype,
}

#[derive(PartialEq)]
enum Kept {
    Words(Vec<u32>),
    Blocks(Blocks),
}

impl Panels {
    /// Packs `weight` (`n × k`, row-major), rounding it to `dtype`.
    pub fn pack(weight: &[f32], n: usize, k: usize, dtype: Dtype) -> Self {
        assert_eq!(weight.len(), n * k, "weight is not {n} x {k}");
        Self::from_rows(n, k, dtype, &Threads::new(1), |row, values| values.copy_from_slice(&weight[row * k..][..k]))
    }

    /// Packs the transpose of `weight` (`n × k`, row-major): the product with it is `x[m, n] · weight -> [m, k]`.
    pub fn pack_transposed(weight: &[f32], n: usize, k: usize, dtype: Dtype) -> Self {
        assert_eq!(weight.len(), n * k, "weight is not {n} x {k}");
        Self::from_columns(k, n, dtype, &Threads::new(1), |column, values| values.copy_from_slice(&weight[column * k..][..k]))
    }

    /// Packs `n` rows of `k` values; `fill` writes the row it is asked for.
    pub fn from_rows(n: usize, k: usize, stored: impl Into<Stored>, threads: &Threads, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let dtype = match stored.into() {
            Stored::As(dtype) => dtype,
            Stored::Blocks(bits) => {
                let kept = Kept::Blocks(Blocks::from_rows(n, k, bits, threads, fill));
                return Self { kept, rows: n, cols: k, dtype: Dtype::Bfloat16 };
            }
        };
        let (steps, mut all) = (words(dtype, k), zeros(n, k, dtype));
        threads.for_rows(&mut all, steps * COLUMNS, 1, |panel, words| {
            let (mut row, mut packed) = (vec![0.0; k], vec![0; steps * COLUMNS]);
            for (row_of_n, packed) in (panel * COLUMNS..n).zip(packed.chunks_exact_mut(steps)) {
                fill(row_of_n, &mut row);
                pack_row(dtype, &row, packed);
            }
            interleave(&packed, steps, words);
        });
        Self { kept: Kept::Words(all), rows: n, cols: k, dtype }
    }

    /// Packs `k` columns of `n` values; `fill` writes the column it is asked for.
    pub fn from_columns(n: usize, k: usize, dtype: Dtype, threads: &Threads, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        /// Steps that a thread takes at a time.
        const STEPS: usize = 8;
        let (steps, per_word) = (words(dtype, k), if dtype == Dtype::Bfloat16 { 2 } else { 1 });
        let mut all = zeros(n, k, dtype);
        let target = Disjoint::new(&mut all);
        threads.run_blocks(steps.div_ceil(STEPS), |block| {
            let (mut columns, mut packed) = (vec![0.0; per_word * n], vec![0; n]);
            for step in block * STEPS..steps.min((block + 1) * STEPS) {
                for (offset, column) in columns.chunks_mut(n.max(1)).enumerate() {
                    match step * per_word + offset {
                        index if index < k => fill(index, column),
                        _ => column.fill(0.0),
                    }
                }
                match columns.split_at(n) {
                    (low, high) if per_word == 2 => pack_pairs(low, high, &mut packed),
                    (low, _) => pack_row(dtype, low, &mut packed),
                }
                for (panel, packed) in packed.chunks(COLUMNS).enumerate() {
                    // SAFETY: each step writes its own words of every panel.
                    unsafe { target.slice((panel * steps + step) * COLUMNS, packed.len()) }.copy_from_slice(packed);
                }
            }
        });
        Self { kept: Kept::Words(all), rows: n, cols: k, dtype }
    }

    /// The transpose, packed from these panels: exact, since the values are already rounded.
    pub fn transposed(&self, threads: &Threads) -> Self {
        match &self.kept {
            Kept::Words(_) => Self::from_columns(self.cols, self.rows, self.dtype, threads, |row, values| self.row(row, values)),
            Kept::Blocks(blocks) => {
                let kept = Kept::Blocks(blocks.transposed(self.rows, self.cols, threads));
                Self { kept, rows: self.cols, cols: self.rows, dtype: self.dtype }
            }
        }
    }

    /// Number of outputs n.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs k.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number type of the products.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of the packed values.
    pub fn bytes(&self) -> usize {
        match &self.kept {
            Kept::Words(words) => words.len() * 4,
            Kept::Blocks(blocks) => blocks.bytes(),
        }
    }

    /// Unpacks row `row`, as rounded, into `values` (`cols` long).
    pub fn row(&self, row: usize, values: &mut [f32]) {
        assert!(row < self.rows && values.len() == self.cols, "row {row} of {} x {} panels", self.rows, self.cols);
        let words = match &self.kept {
            Kept::Words(words) => words,
            Kept::Blocks(blocks) => return blocks.row(row, values),
        };
        let panel = &words[row / COLUMNS * self.steps() * COLUMNS..][row % COLUMNS..self.steps() * COLUMNS];
        match self.dtype {
            Dtype::Float32 => values.iter_mut().zip(panel.iter().step_by(COLUMNS)).for_each(|(value, word)| *value = f32::from_bits(*word)),
            Dtype::Bfloat16 => {
                for (pair, word) in values.chunks_mut(2).zip(panel.iter().step_by(COLUMNS)) {
                    pair[0] = f32::from_bits(word << 16);
                    if let Some(high) = pair.get_mut(1) {
                        *high = f32::from_bits(word & 0xffff_0000);
                    }
                }
            }
        }
    }

    /// Number of panels.
    pub(super) fn count(&self) -> usize {
        self.rows.div_ceil(COLUMNS)
    }

    /// Steps of a panel.
    pub(super) fn steps(&self) -> usize {
        words(self.dtype, self.cols)
    }

    /// Steps that are walked at a time and begin together: all panels where one has to be widened, and no bound where it lies there as it is.
    pub(super) fn stride(&self) -> Option<usize> {
        match self.kept {
            Kept::Words(_) => None,
            Kept::Blocks(_) => Some(Blocks::STEPS),
        }
    }

    /// Some steps of the panel `index`; `widened` is room for those that have to be made, whose first step is a multiple of [`Self::stride`].
    pub(super) fn walk<'a>(&'a self, index: usize, steps: Range<usize>, widened: &'a mut Vec<u32>) -> &'a [u32] {
        match &self.kept {
            Kept::Words(words) => &words[(index * self.steps() + steps.start) * COLUMNS..][..steps.len() * COLUMNS],
            Kept::Blocks(blocks) => blocks.widen(index, steps, widened),
        }
    }
}

fn zeros(rows: usize, cols: usize, dtype: Dtype) -> Vec<u32> {
    in_large_pages(vec![0; rows.div_ceil(COLUMNS) * COLUMNS * words(dtype, cols)])
}

/// Asks for large pages for memory that nothing was written to yet: it is there sooner, and walked without looking its pages up.
pub(super) fn in_large_pages<T>(values: Vec<T>) -> Vec<T> {
    /// Of x86-64 and of 64-bit Arm with small pages.
    const LARGE_PAGE: usize = 2 << 20;
    let (begin, bytes) = (values.as_ptr().addr().next_multiple_of(LARGE_PAGE), std::mem::size_of_val(values.as_slice()));
    let end = (values.as_ptr().addr() + bytes) / LARGE_PAGE * LARGE_PAGE;
    if begin < end {
        let first = values.as_ptr().with_addr(begin).cast_mut().cast();
        // SAFETY: advice on how memory of our own is kept, which changes nothing that is in it.
        _ = unsafe { rustix::mm::madvise(first, end - begin, rustix::mm::Advice::LinuxHugepage) };
    }
    values
}

/// Writes the words of 32 rows step by step: a cache line of each row at a time, so that what is written meanwhile stays in the first-level cache.
fn interleave(rows: &[u32], steps: usize, words: &mut [u32]) {
    const LINE: usize = 16;
    for (line, words) in words.chunks_mut(LINE * COLUMNS).enumerate() {
        for (column, row) in rows.chunks_exact(steps).enumerate() {
            for (word, target) in row[line * LINE..].iter().zip(words.chunks_exact_mut(COLUMNS)) {
                target[column] = *word;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_and_transposing_twice_changes_nothing() {
        let threads = Threads::new(2);
        let (n, k) = (70, 33);
        let weight: Vec<f32> = (0..n * k).map(|i| i as f32 / 8.0 - 100.0).collect();
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let panels = Panels::pack(&weight, n, k, dtype);
            let mut rounded = weight.clone();
            if dtype == Dtype::Bfloat16 {
                crate::kernel::cpu::round_bf16(&mut rounded);
            }
            let twice = panels.transposed(&threads).transposed(&threads);
            assert!(panels.kept == twice.kept);
            assert!(panels.transposed(&threads).kept == Panels::pack_transposed(&weight, n, k, dtype).kept);
            for row in 0..n {
                let mut values = vec![0.0; k];
                panels.row(row, &mut values);
                assert_eq!(values, rounded[row * k..][..k]);
            }
        }
    }
}
