//! Muon, see [`Rule::Muon`].

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use carryon_crds::wire::memory::TILE;

use super::WEIGHT;
use super::chunks::{CHUNK, chunks, moment_chunks};
use crate::kernel::cpu::backward::transpose;
use crate::kernel::cpu::{Cpu, Panels, Threads, add, matmul};
use crate::kernel::moment::Dice;
use crate::kernel::{Change, Rule, Step};

const A: f32 = Rule::NEWTON_SCHULZ[0];
const B: f32 = Rule::NEWTON_SCHULZ[1];
const C: f32 = Rule::NEWTON_SCHULZ[2];

/// Columns of a square that are computed together: of those before them half is known.
const BAND: usize = 64;

/// One thread takes one matrix at a time.
pub fn muon(cpu: &Cpu, step: &Step, changes: &mut [Change<'_, Cpu>]) {
    let keep = step.keep();
    changes.sort_by_key(|change| std::cmp::Reverse(change.gradient.values.len())); // the large ones first: no thread ends with one alone
    cpu.threads.for_each(changes, |_, Change { name, weight, gradient, states }| {
        let [rows, columns] = weight.shape[..] else { unreachable!("Muon takes matrices") };
        let [momentum] = &mut states[..] else { unreachable!("Muon remembers a momentum") };
        let [dice, weights] = [0, WEIGHT].map(|which| Dice::new(step.seed, step.number, name, which));
        let mut ahead = std::mem::take(&mut gradient.values);
        for (chunk, (mut momentum, ahead)) in moment_chunks(Arc::make_mut(momentum)).into_iter().zip(ahead.chunks_mut(CHUNK)).enumerate() {
            momentum.with(dice, chunk * CHUNK, |momentum| {
                for (m, g) in momentum.iter_mut().zip(ahead) {
                    *m = Rule::MOMENTUM * *m + *g;
                    *g += Rule::MOMENTUM * *m;
                }
            });
        }
        let size = step.muon_size(rows, columns);
        let direction = orthogonal(cpu, ahead, rows, columns);
        for (chunk, (mut values, direction)) in chunks(&mut weight.values).into_iter().zip(direction.chunks(CHUNK)).enumerate() {
            values.with(weights, chunk * CHUNK, |values| {
                values.iter_mut().zip(direction).for_each(|(value, direction)| *value = keep * *value - size * direction);
            });
        }
    });
}

/// Newton–Schulz iteration `X ← aX + (bA + cA²)X` with `A = XXᵀ`, on the wide one of X and its transpose.
fn orthogonal(cpu: &Cpu, mut x: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    let norm = x.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt() as f32;
    x.iter_mut().for_each(|value| *value /= norm + 1e-7);
    let (short, long, tall) = (rows.min(columns), rows.max(columns), rows > columns);
    // What is one tile is turned once, and not in every step.
    let turned = tall && long <= TILE;
    if turned {
        x = transpose(&cpu.threads, &x, rows, columns);
    }
    iterate(cpu, &mut Wide { values: &mut x, rows: short, columns: long, across: tall && !turned });
    if turned { transpose(&cpu.threads, &x, columns, rows) } else { x }
}

/// A matrix of no more rows than columns.
struct Wide<'a> {
    values: &'a mut [f32],
    rows: usize,
    columns: usize,
    /// Whether its columns are what lies one after the other.
    across: bool,
}

impl Wide<'_> {
    /// Some columns, row by row.
    fn tile(&self, threads: &Threads, some: &Range<usize>) -> Cow<'_, [f32]> {
        match self.across {
            true => transpose(threads, &self.values[some.start * self.rows..some.end * self.rows], some.len(), self.rows).into(),
            false if some.len() == self.columns => Cow::Borrowed(self.values),
            false => self.values.chunks_exact(self.columns).flat_map(|row| &row[some.clone()]).copied().collect(),
        }
    }

    /// `x ← ax + moved` in some columns; `moved` is row by row.
    fn shift(&mut self, threads: &Threads, some: &Range<usize>, moved: Vec<f32>) {
        let shift = |values: &mut [f32], moved: &[f32]| values.iter_mut().zip(moved).for_each(|(x, moved)| *x = A * *x + moved);
        if self.across {
            let moved = transpose(threads, &moved, self.rows, some.len());
            return shift(&mut self.values[some.start * self.rows..some.end * self.rows], &moved);
        }
        for (row, moved) in self.values.chunks_exact_mut(self.columns).zip(moved.chunks_exact(some.len())) {
            shift(&mut row[some.clone()], moved);
        }
    }
}

/// In place, some columns at a time: beside `x` there are two squares and what a tile takes.
fn iterate(cpu: &Cpu, x: &mut Wide<'_>) {
    let (rows, columns, threads) = (x.rows, x.columns, &cpu.threads);
    let (mut a, mut square) = (vec![0.0; rows * rows], vec![0.0; rows * rows]);
    let tiles = || (0..columns).step_by(TILE).map(|first| first..(first + TILE).min(columns));
    for _ in 0..Rule::NEWTON_SCHULZ_STEPS {
        a.fill(0.0);
        for tile in tiles() {
            add_square(cpu, &x.tile(threads, &tile), rows, &mut a);
        }
        square.fill(0.0);
        add_square(cpu, &a, rows, &mut square); // A is symmetric: A·Aᵀ = A²
        a.iter_mut().zip(&square).for_each(|(a, square)| *a = B * *a + C * square);
        for tile in tiles() {
            let panels = Panels::pack_transposed(&x.tile(threads, &tile), rows, tile.len(), cpu.training);
            let mut moved = vec![0.0; rows * tile.len()];
            matmul(threads, &a, &panels, &mut moved);
            drop(panels);
            x.shift(threads, &tile, moved);
        }
    }
}

/// Adds `x · xᵀ` of `n` rows to `sum`. Of a symmetric matrix, whose halves have the same bits, little more than one is computed.
fn add_square(cpu: &Cpu, x: &[f32], n: usize, sum: &mut [f32]) {
    let k = x.len() / n.max(1);
    for first in (0..n).step_by(BAND) {
        let band = first..(first + BAND).min(n);
        let panels = Panels::pack(&x[band.start * k..band.end * k], band.len(), k, cpu.training);
        let mut product = vec![0.0; band.end * band.len()];
        matmul(&cpu.threads, &x[..band.end * k], &panels, &mut product);
        for (row, values) in product.chunks_exact(band.len()).enumerate() {
            add(&mut sum[row * n..][band.clone()], values);
            if row < band.start {
                band.clone().zip(values).for_each(|(column, value)| sum[column * n + row] += value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use carryon_crds::pool::Dtype;

    use super::*;

    fn values(count: usize) -> Vec<f32> {
        (0..count).map(|i| ((i * 7919 % 1009) as f32 - 500.0) / 300.0).collect()
    }

    #[test]
    fn a_square_is_the_product_of_rows_with_themselves() {
        for (n, k) in [(1, 7), (70, 33), (3 * BAND, 300)] {
            for dtype in [Dtype::Float32, Dtype::Bfloat16] {
                let (x, cpu) = (values(n * k), Cpu::new(Threads::new(2)).training_in(dtype));
                let (mut expected, mut found) = (vec![0.0; n * n], vec![0.5; n * n]);
                matmul(&cpu.threads, &x, &Panels::pack(&x, n, k, dtype), &mut expected);
                add_square(&cpu, &x, n, &mut found);
                assert!(found.iter().zip(&expected).all(|(found, expected)| *found == 0.5 + expected), "{n} x {k} {dtype:?}");
            }
        }
    }

    #[test]
    fn a_matrix_and_its_transpose_move_alike() {
        for dtype in [Dtype::Float32, Dtype::Bfloat16] {
            let cpu = Cpu::new(Threads::new(2)).training_in(dtype);
            for (rows, columns) in [(40, 70), (40, TILE + 30)] {
                let x = values(rows * columns);
                let turned = orthogonal(&cpu, transpose(&cpu.threads, &x, rows, columns), columns, rows);
                assert_eq!(
                    transpose(&cpu.threads, &turned, columns, rows),
                    orthogonal(&cpu, x, rows, columns),
                    "{rows} x {columns} {dtype:?}"
                );
            }
        }
    }

    #[test]
    fn directions_in_bf16_are_near_those_in_f32() {
        let x = values(96 * 200);
        let [exact, rounded] =
            [Dtype::Float32, Dtype::Bfloat16].map(|dtype| orthogonal(&Cpu::new(Threads::new(2)).training_in(dtype), x.clone(), 96, 200));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
        let cosine = dot(&exact, &rounded) / (dot(&exact, &exact) * dot(&rounded, &rounded)).sqrt();
        assert!(cosine >= 0.999, "{cosine}");
    }
}
