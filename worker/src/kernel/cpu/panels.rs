//! Weights packed once for the tile kernel.

use super::operand::{pack_row, words};
use super::threads::{Disjoint, Threads};
use super::tile::COLUMNS;
use carryon_crds::pool::Dtype;

/// A weight of `rows` outputs and `cols` inputs, in panels of 32 outputs: for each word of the inputs, one word of each of the 32 outputs.
/// Absent outputs of the last panel are zero.
pub struct Panels {
    words: Vec<u32>,
    rows: usize,
    cols: usize,
    dtype: Dtype,
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
    pub fn from_rows(n: usize, k: usize, dtype: Dtype, threads: &Threads, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let steps = words(dtype, k);
        let mut panels = Self::zeros(n, k, dtype);
        threads.for_rows(&mut panels.words, steps * COLUMNS, 1, |panel, words| {
            let (mut row, mut packed) = (vec![0.0; k], vec![0; steps * COLUMNS]);
            for (row_of_n, packed) in (panel * COLUMNS..n).zip(packed.chunks_exact_mut(steps)) {
                fill(row_of_n, &mut row);
                pack_row(dtype, &row, packed);
            }
            interleave(&packed, steps, words);
        });
        panels
    }

    /// Packs `k` columns of `n` values; `fill` writes the column it is asked for.
    pub fn from_columns(n: usize, k: usize, dtype: Dtype, threads: &Threads, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let (steps, per_word) = (words(dtype, k), if dtype == Dtype::Bfloat16 { 2 } else { 1 });
        let mut panels = Self::zeros(n, k, dtype);
        let target = Disjoint::new(&mut panels.words);
        threads.run_blocks(steps, |step| {
            let (mut columns, mut packed) = (vec![0.0; per_word * n], vec![0; n]);
            for (offset, column) in columns.chunks_mut(n.max(1)).enumerate().take_while(|(offset, _)| step * per_word + offset < k) {
                fill(step * per_word + offset, column);
            }
            if per_word == 2 {
                let (low, high) = columns.split_at(n);
                columns = low.iter().zip(high).flat_map(|(low, high)| [*low, *high]).collect();
            }
            pack_row(dtype, &columns, &mut packed);
            for (panel, packed) in packed.chunks(COLUMNS).enumerate() {
                // SAFETY: each step writes its own words of every panel.
                unsafe { target.slice((panel * steps + step) * COLUMNS, packed.len()) }.copy_from_slice(packed);
            }
        });
        panels
    }

    /// The transpose, packed from these panels: exact, since the values are already rounded.
    pub fn transposed(&self, threads: &Threads) -> Self {
        Self::from_columns(self.cols, self.rows, self.dtype, threads, |row, values| self.row(row, values))
    }

    fn zeros(rows: usize, cols: usize, dtype: Dtype) -> Self {
        let size = rows.div_ceil(COLUMNS) * COLUMNS * words(dtype, cols);
        Self { words: vec![0; size], rows, cols, dtype }
    }

    /// Number of outputs n.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of inputs k.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Number type of the packed values.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Bytes of the packed values.
    pub fn bytes(&self) -> usize {
        self.words.len() * 4
    }

    /// Unpacks row `row`, as rounded, into `values` (`cols` long).
    pub fn row(&self, row: usize, values: &mut [f32]) {
        assert!(row < self.rows && values.len() == self.cols, "row {row} of {} x {} panels", self.rows, self.cols);
        let panel = &self.panel(row / COLUMNS)[row % COLUMNS..];
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

    /// The panel `index`.
    pub(super) fn panel(&self, index: usize) -> &[u32] {
        let length = self.steps() * COLUMNS;
        &self.words[index * length..][..length]
    }
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
            assert_eq!(panels.words, twice.words);
            assert_eq!(panels.transposed(&threads).words, Panels::pack_transposed(&weight, n, k, dtype).words);
            for row in 0..n {
                let mut values = vec![0.0; k];
                panels.row(row, &mut values);
                assert_eq!(values, rounded[row * k..][..k]);
            }
        }
    }
}
