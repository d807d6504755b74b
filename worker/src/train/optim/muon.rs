//! Muon: momentum, then the nearest matrix whose singular values are about one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use carryon_crds::job::StateDtype;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::memory::TILE;

use super::moment::{CHUNK, Dice, Map, Moment, chunks};
use super::{At, Parameter, WEIGHT};
use crate::head::{Weight, transpose};
use crate::kernel::Threads;
use crate::kernel::cpu::{Left, Panels, Part, Sink, matmul, product};

const MOMENTUM: f32 = 0.95;
const NEWTON_SCHULZ_STEPS: usize = 5;
const A: f32 = 3.4445;
const B: f32 = -4.7750;
const C: f32 = 2.0315;

pub(super) struct Muon {
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub dtype: StateDtype,
    pub momenta: BTreeMap<String, Arc<Moment>>,
}

impl Muon {
    /// `m ← 0.95m + g`, `p ← (1-ηλ)p - η √max(1, rows/columns) · orthogonal(g + 0.95m)` for each matrix; one thread takes one matrix at a time.
    pub fn step(&mut self, at: &At<'_>, matrices: Vec<Parameter<'_>>) {
        let rate = self.learning_rate * at.factor;
        let keep = (1.0 - rate * self.weight_decay) as f32;
        let (momenta, dtype) = (&mut self.momenta, self.dtype);
        let mut momentum = |name: &str, weight: &Weight| {
            momenta.remove(name).unwrap_or_else(|| Moment::zeros(weight.values.len(), dtype, Map::Signed).into())
        };
        let mut work: Vec<_> = matrices.into_iter().map(|matrix| (momentum(matrix.name, matrix.weight), matrix)).collect();
        work.sort_by_key(|(_, matrix)| std::cmp::Reverse(matrix.gradient.len())); // the large ones first: no thread ends with one alone
        at.threads.for_each(&mut work, |_, (momentum, Parameter { name, weight, gradient })| {
            let [rows, columns] = weight.shape[..] else { unreachable!("Muon takes matrices") };
            let [dice, weights] = [0, WEIGHT].map(|which| Dice::new(at.seed, at.step, name, which));
            let mut ahead = std::mem::take(gradient);
            for (chunk, (mut momentum, ahead)) in Arc::make_mut(momentum).chunks().into_iter().zip(ahead.chunks_mut(CHUNK)).enumerate() {
                momentum.with(dice, chunk * CHUNK, |momentum| {
                    for (m, g) in momentum.iter_mut().zip(ahead) {
                        *m = MOMENTUM * *m + *g;
                        *g += MOMENTUM * *m;
                    }
                });
            }
            let size = (rate * (rows as f64 / columns as f64).max(1.0).sqrt()) as f32;
            let direction = orthogonal(at.threads, ahead, rows, columns);
            for (chunk, (mut values, direction)) in chunks(&mut weight.values).into_iter().zip(direction.chunks(CHUNK)).enumerate() {
                values.with(weights, chunk * CHUNK, |values| {
                    values.iter_mut().zip(direction).for_each(|(value, direction)| *value = keep * *value - size * direction);
                });
            }
        });
        self.momenta.extend(work.into_iter().map(|(momentum, matrix)| (matrix.name.to_owned(), momentum)));
    }
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
    for _ in 0..NEWTON_SCHULZ_STEPS {
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
