//! Muon: momentum, then the nearest matrix whose singular values are about one.

use std::collections::BTreeMap;
use std::sync::Arc;

use carryon_crds::job::StateDtype;
use carryon_crds::pool::Dtype;

use super::moment::{CHUNK, Dice, Map, Moment};
use super::{At, Parameter};
use crate::head::{Weight, transpose};
use crate::kernel::Threads;
use crate::kernel::cpu::{Panels, matmul};

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
            let (dice, mut ahead) = (Dice::new(at.seed, at.step, name, 0), gradient.to_vec());
            let chunks = Arc::make_mut(momentum).chunks().into_iter().zip(gradient.chunks(CHUNK)).zip(ahead.chunks_mut(CHUNK));
            for (chunk, ((mut momentum, gradient), ahead)) in chunks.enumerate() {
                momentum.with(dice, chunk * CHUNK, |momentum| {
                    for ((m, g), ahead) in momentum.iter_mut().zip(gradient).zip(ahead) {
                        *m = MOMENTUM * *m + g;
                        *ahead = g + MOMENTUM * *m;
                    }
                });
            }
            let size = (rate * (rows as f64 / columns as f64).max(1.0).sqrt()) as f32;
            for (value, direction) in weight.values.iter_mut().zip(orthogonal(at.threads, ahead, rows, columns)) {
                *value = keep * *value - size * direction;
            }
        });
        self.momenta.extend(work.into_iter().map(|(momentum, matrix)| (matrix.name.to_owned(), momentum)));
    }
}

/// Newton–Schulz iteration `X ← aX + (bA + cA²)X` with `A = XXᵀ`, on the wide one of X and its transpose.
fn orthogonal(threads: &Threads, mut x: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    let norm = x.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt() as f32;
    x.iter_mut().for_each(|value| *value /= norm + 1e-7);
    if rows > columns {
        let wide = iterate(threads, transpose(threads, &x, rows, columns), columns, rows);
        return transpose(threads, &wide, columns, rows);
    }
    iterate(threads, x, rows, columns)
}

fn iterate(threads: &Threads, mut x: Vec<f32>, rows: usize, columns: usize) -> Vec<f32> {
    let (mut a, mut square, mut product) = (vec![0.0; rows * rows], vec![0.0; rows * rows], vec![0.0; rows * columns]);
    for _ in 0..NEWTON_SCHULZ_STEPS {
        matmul(threads, &x, &Panels::pack(&x, rows, columns, Dtype::Float32), &mut a);
        matmul(threads, &a, &Panels::pack(&a, rows, rows, Dtype::Float32), &mut square); // A is symmetric: A·Aᵀ = A²
        a.iter_mut().zip(&square).for_each(|(a, square)| *a = B * *a + C * square);
        matmul(threads, &a, &Panels::pack_transposed(&x, rows, columns, Dtype::Float32), &mut product);
        x.iter_mut().zip(&product).for_each(|(x, product)| *x = A * *x + product);
    }
    x
}
