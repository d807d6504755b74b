//! Muon, see [`Rule::Muon`].

use std::ops::Range;
use std::sync::Arc;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::memory::TILE;

use super::WEIGHT;
use super::chunks::{CHUNK, chunks, moment_chunks};
use crate::kernel::cpu::backward::transpose;
use crate::kernel::cpu::{Cpu, Left, Panels, Part, Sink, Threads, matmul, product};
use crate::kernel::moment::Dice;
use crate::kernel::{Change, Rule, Step};

const A: f32 = Rule::NEWTON_SCHULZ[0];
const B: f32 = Rule::NEWTON_SCHULZ[1];
const C: f32 = Rule::NEWTON_SCHULZ[2];

/// One thread takes one matrix at a time.
pub fn muon(threads: &Threads, step: &Step, changes: &mut [Change<'_, Cpu>]) {
    let keep = step.keep();
    changes.sort_by_key(|change| std::cmp::Reverse(change.gradient.values.len())); // the large ones first: no thread ends with one alone
    threads.for_each(changes, |_, Change { name, weight, gradient, states }| {
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
        let direction = orthogonal(threads, ahead, rows, columns);
        for (chunk, (mut values, direction)) in chunks(&mut weight.values).into_iter().zip(direction.chunks(CHUNK)).enumerate() {
            values.with(weights, chunk * CHUNK, |values| {
                values.iter_mut().zip(direction).for_each(|(value, direction)| *value = keep * *value - size * direction);
            });
        }
    });
}

/// Newton–Schulz iteration `X ← aX + (bA + cA²)X` with `A = XXᵀ`, on the wide one of X and its transpose.
fn orthogonal(threads: &Threads, mut x: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    let norm = x.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt() as f32;
    x.iter_mut().for_each(|value| *value /= norm + 1e-7);
    iterate(threads, &mut Wide { values: &mut x, rows: rows.min(columns), columns: rows.max(columns), across: rows > columns });
    x
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
    /// A copy of some columns, row by row.
    fn tile(&self, threads: &Threads, some: &Range<usize>) -> Vec<f32> {
        match self.across {
            true => transpose(threads, &self.values[some.start * self.rows..some.end * self.rows], some.len(), self.rows),
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
fn iterate(threads: &Threads, x: &mut Wide<'_>) {
    let (rows, columns) = (x.rows, x.columns);
    let (mut a, mut square) = (vec![0.0; rows * rows], vec![0.0; rows * rows]);
    let tiles = || (0..columns).step_by(TILE).map(|first| first..(first + TILE).min(columns));
    for _ in 0..Rule::NEWTON_SCHULZ_STEPS {
        a.fill(0.0);
        for tile in tiles() {
            let part = x.tile(threads, &tile);
            let right = [Part { rows, panels: &Panels::pack(&part, rows, tile.len(), Dtype::Float32), norm: &[] }];
            product(threads, Left::Plain(&part), &right, Sink::Add(&mut a));
        }
        matmul(threads, &a, &Panels::pack(&a, rows, rows, Dtype::Float32), &mut square); // A is symmetric: A·Aᵀ = A²
        a.iter_mut().zip(&square).for_each(|(a, square)| *a = B * *a + C * square);
        for tile in tiles() {
            let panels = Panels::pack_transposed(&x.tile(threads, &tile), rows, tile.len(), Dtype::Float32);
            let mut moved = vec![0.0; rows * tile.len()];
            matmul(threads, &a, &panels, &mut moved);
            drop(panels);
            x.shift(threads, &tile, moved);
        }
    }
}
