//! Products of rows of which few numbers are not zero: what is zero in a tile's rows is neither read nor multiplied.
//!
//! A step that is left out would add nothing, so the sums are those of [`matmul`](super::matmul) to the bit.

use std::ops::Range;

use carryon_crds::pool::Dtype;

use super::isa::vectorised;
use super::operand::{pack_row, words};
use super::panels::Panels;
use super::threads::{Disjoint, Threads};
use super::tile::{self, COLUMNS, ROWS};

/// Steps of a panel that all rows walk before the next: 256 KiB, which stay in a core's second-level cache.
const PART: usize = 2048;
/// Steps that are gathered at a time: 16 KiB, which stay in the first.
const GATHERED: usize = 128;

/// The words of a row that are not zero, and where they are, ascending.
pub(super) struct Sparse(Vec<(u32, u32)>);

impl Sparse {
    /// Of a row rounded to `dtype`; `packed` is room for its words.
    pub fn of(dtype: Dtype, row: &[f32], packed: &mut Vec<u32>) -> Self {
        /// Words that are looked at together.
        const RUN: usize = 16;
        packed.resize(words(dtype, row.len()), 0);
        pack_row(dtype, row, packed);
        let mut found = Vec::new();
        for (first, run) in (0..).step_by(RUN).zip(packed.chunks(RUN)) {
            if run.iter().fold(0, |all, word| all | word) != 0 {
                found.extend((first..).zip(run).filter(|(_, word)| **word != 0).map(|(at, word)| (at, *word)));
            }
        }
        Self(found)
    }
}

/// Up to [`ROWS`] rows, with the steps at which one of them is not zero.
struct Tile {
    rows: usize,
    /// Ascending.
    steps: Vec<u32>,
    /// The words of these steps, row by row.
    words: Vec<u32>,
}

impl Tile {
    /// Of rows of so many words.
    fn of(rows: &[Sparse], width: usize) -> Self {
        let mut marks = vec![0u64; width.div_ceil(64)];
        let all = || rows.iter().flat_map(|row| &row.0);
        all().for_each(|(step, _)| marks[*step as usize / 64] |= 1 << (step % 64));
        let (mut steps, mut before) = (Vec::new(), Vec::with_capacity(marks.len()));
        for (first, mark) in (0..).step_by(64).zip(&marks) {
            before.push(steps.len());
            steps.extend((0..64).filter(|bit| mark >> bit & 1 == 1).map(|bit| first + bit));
        }
        let place = |step: u32| before[step as usize / 64] + (marks[step as usize / 64] & ((1 << (step % 64)) - 1)).count_ones() as usize;
        let mut words = vec![0; rows.len() * steps.len()];
        for (Sparse(row), words) in rows.iter().zip(words.chunks_mut(steps.len().max(1))) {
            row.iter().for_each(|(step, word)| words[place(*step)] = *word);
        }
        Self { rows: rows.len(), steps, words }
    }

    /// Adds the product with some steps of a panel, whose words are `panel`; `gathered` is room for those that count.
    fn multiply(&self, dtype: Dtype, part: &Range<usize>, panel: &[u32], gathered: &mut Vec<u32>, sums: &mut [f32]) {
        let [first, end] = [part.start, part.end].map(|bound| self.steps.partition_point(|step| (*step as usize) < bound));
        let whole = end - first == part.len();
        for (index, steps) in self.steps[first..end].chunks(GATHERED).enumerate() {
            let at = index * GATHERED;
            let panel = match whole {
                true => &panel[at * COLUMNS..][..steps.len() * COLUMNS],
                false => {
                    gathered.resize(steps.len() * COLUMNS, 0);
                    gather(panel, part.start, steps, gathered);
                    &gathered[..]
                }
            };
            let left = tile::Left { words: &self.words[first + at..], stride: self.steps.len(), rows: self.rows };
            tile::multiply(dtype, left, tile::Right { panels: &[panel], steps: steps.len() }, sums);
        }
    }
}

vectorised! {
    /// Copies the words of some steps of a panel, which begins at step `first`.
    fn gather(panel: &[u32], first: usize, steps: &[u32], gathered: &mut [u32]) {
        let panel = panel.as_chunks::<COLUMNS>().0;
        for (step, words) in steps.iter().zip(gathered.as_chunks_mut::<COLUMNS>().0) {
            *words = panel[*step as usize - first];
        }
    }
}

/// `out[m, n] = rows[m, k] · right[n, k]ᵀ`; `out` is overwritten.
pub(super) fn matmul_sparse(threads: &Threads, rows: &[Sparse], right: &Panels, out: &mut [f32]) {
    let (n, count, width) = (right.rows(), right.count(), right.steps());
    assert_eq!(out.len(), rows.len() * n, "output is not {} x {n}", rows.len());
    let mut tiles: Vec<_> = rows.chunks(ROWS).map(|rows| (rows, None)).collect();
    threads.for_each(&mut tiles, |_, (rows, tile)| *tile = Some(Tile::of(rows, width)));
    let tiles: Vec<Tile> = tiles.into_iter().filter_map(|(_, tile)| tile).collect();
    // A panel is read once, unless there are more threads than panels.
    let together = tiles.len().div_ceil(threads.count().div_ceil(count.max(1))).max(1);
    let groups = tiles.len().div_ceil(together);
    let out = Disjoint::new(out);
    threads.run_blocks(count * groups, |index| {
        let (panel, first) = (index / groups, index % groups * together);
        let tiles = &tiles[first..tiles.len().min(first + together)];
        let (mut sums, mut widened, mut gathered) = (vec![0.0; tiles.len() * ROWS * COLUMNS], Vec::new(), Vec::new());
        for start in (0..width).step_by(PART) {
            let part = start..width.min(start + PART);
            let words = right.walk(panel, part.clone(), &mut widened);
            for (tile, sums) in tiles.iter().zip(sums.chunks_mut(ROWS * COLUMNS)) {
                tile.multiply(right.dtype(), &part, words, &mut gathered, sums);
            }
        }
        let columns = COLUMNS.min(n - panel * COLUMNS);
        for (row, sums) in sums.chunks(COLUMNS).take(rows.len() - first * ROWS).enumerate() {
            // SAFETY: each row of each panel is written once.
            unsafe { out.slice((first * ROWS + row) * n + panel * COLUMNS, columns) }.copy_from_slice(&sums[..columns]);
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::cpu::matmul;
    use crate::kernel::{Bits, Stored};

    #[test]
    fn sums_are_those_of_whole_rows() {
        let (n, k) = (70, 2 * PART + 2 * 300 + 1);
        let value = |index: usize| ((index * 7919 % 1009) as f32 - 500.0) / 300.0;
        for stored in [Stored::As(Dtype::Bfloat16), Stored::As(Dtype::Float32), Stored::Blocks(Bits::Q8)] {
            let fill = |row: usize, values: &mut [f32]| values.iter_mut().enumerate().for_each(|(at, out)| *out = value(row * k + at));
            let right = Panels::from_rows(n, k, stored, &Threads::new(2), fill);
            // Of some rows every number counts, of some none.
            for (m, every) in [(1, 37), (13, 5), (40, 211), (30, 1), (14, usize::MAX)] {
                let kept = |index: usize| if (index / k + index % k) % every == every - 1 { value(index) } else { 0.0 };
                let x: Vec<f32> = (0..m * k).map(kept).collect();
                let rows: Vec<_> = x.chunks(k).map(|row| Sparse::of(right.dtype(), row, &mut Vec::new())).collect();
                let mut expected = vec![0.0; m * n];
                matmul(&Threads::new(1), &x, &right, &mut expected);
                for threads in [1, 2, 5] {
                    let mut found = vec![9.0; m * n];
                    matmul_sparse(&Threads::new(threads), &rows, &right, &mut found);
                    assert_eq!(found, expected, "{stored:?}, {m} rows, every {every}, {threads} threads");
                }
            }
        }
    }
}
