//! Muon: momentum, then the nearest matrix whose singular values are about one.

use carryon_crds::pool::Dtype;

use crate::head::{Gradients, Weight, Weights, transpose};
use crate::kernel::Threads;
use crate::kernel::cpu::{Panels, matmul};

const MOMENTUM: f32 = 0.95;
const NEWTON_SCHULZ_STEPS: usize = 5;
const A: f32 = 3.4445;
const B: f32 = -4.7750;
const C: f32 = 2.0315;

pub(super) struct Muon {
    learning_rate: f64,
    weight_decay: f64,
    pub momenta: Weights,
}

/// One matrix on its way through a step.
struct Work<'a> {
    name: &'a String,
    weight: &'a mut Weight,
    momentum: Weight,
    gradient: &'a [f32],
}

impl Muon {
    pub fn new(learning_rate: f64, weight_decay: f64) -> Self {
        Self { learning_rate, weight_decay, momenta: Weights::new() }
    }

    /// `m ← 0.95m + g`, `p ← (1-ηλ)p - η √max(1, rows/columns) · orthogonal(g + 0.95m)` for each matrix; one thread takes one matrix at a time.
    pub fn step(&mut self, threads: &Threads, matrices: Vec<(&String, &mut Weight)>, gradients: &Gradients, factor: f64) {
        let rate = self.learning_rate * factor;
        let keep = (1.0 - rate * self.weight_decay) as f32;
        let mut work: Vec<Work> = matrices
            .into_iter()
            .map(|(name, weight)| {
                let momentum = self.momenta.remove(name).unwrap_or_else(|| Weight::filled(weight.shape.clone(), 0.0));
                Work { name, weight, momentum, gradient: &gradients[name] }
            })
            .collect();
        work.sort_by_key(|work| std::cmp::Reverse(work.gradient.len())); // the large ones first: no thread ends with one alone
        threads.for_each(&mut work, |_, Work { weight, momentum, gradient, .. }| {
            let [rows, columns] = weight.shape[..] else { unreachable!("Muon takes matrices") };
            for (m, g) in momentum.values.iter_mut().zip(*gradient) {
                *m = MOMENTUM * *m + g;
            }
            let ahead = momentum.values.iter().zip(*gradient).map(|(m, g)| g + MOMENTUM * m).collect();
            let size = (rate * (rows as f64 / columns as f64).max(1.0).sqrt()) as f32;
            for (value, direction) in weight.values.iter_mut().zip(orthogonal(threads, ahead, rows, columns)) {
                *value = keep * *value - size * direction;
            }
        });
        self.momenta = work.into_iter().map(|work| (work.name.clone(), work.momentum)).collect();
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
