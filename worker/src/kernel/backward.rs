//! What training asks of a device beside [`Backend`]: the way back through each operation of a head, and the step of an optimizer.
//!
//! Activations, and gradients of weights, are [`Backend::Rows`]; a vector's gradient is one row. What a call takes by value it may free before its
//! result is made: a device keeps no more than the way back needs.
//!
//! **Invariant** on a CPU every sum runs in an order that does not depend on the number of threads, so that a resumed run has the bits of an unbroken
//! one. Another device states its tolerance.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::moment::Moment;
use super::{Attention, Backend, Result};
use crate::numbers::{RowFormat, Values};

/// One tensor, row-major.
#[derive(Clone, Debug, PartialEq)]
pub struct Weight {
    /// Length of each dimension.
    pub shape: Vec<usize>,
    /// As many values as the product of the shape.
    pub values: Values,
}

impl Weight {
    /// As many values as the product of `shape`.
    pub fn new(shape: Vec<usize>, values: impl Into<Values>) -> Self {
        Self { shape, values: values.into() }
    }

    /// Equal values.
    pub fn filled(shape: Vec<usize>, value: f32) -> Self {
        let count = shape.iter().product();
        Self::new(shape, vec![value; count])
    }
}

/// Tensors by name; the order of iteration is that of the names.
pub type Weights = BTreeMap<String, Weight>;

/// The same on a device.
pub type Trained<B> = BTreeMap<String, <B as Backward>::Trained>;

/// The output projection of a head and its gate: `g ⊙ Δ` with `g = sigmoid(G · x + b)`, `Δ = O · x`.
pub struct Gate<'a, B: Backward> {
    /// O, D × w.
    pub output: &'a B::Trained,
    /// G, D × w.
    pub gate: &'a B::Trained,
    /// b, D.
    pub bias: &'a B::Trained,
}

/// Gradients of [`Gate`].
pub struct GateGradients<R> {
    /// By x, rows × w.
    pub x: R,
    /// By O, D × w.
    pub output: R,
    /// By G, D × w.
    pub gate: R,
    /// By b, 1 × D.
    pub bias: R,
}

/// A step of an optimizer.
#[derive(Clone, Copy, Debug)]
pub struct Step {
    /// How weights move.
    pub rule: Rule,
    /// Learning rate of this step.
    pub rate: f64,
    /// λ: weights lose rate · λ of themselves.
    pub weight_decay: f64,
    /// Of the chance by which numbers are rounded.
    pub seed: u64,
    /// From 1.
    pub number: u64,
}

/// An optimizer's rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// AdamW with decoupled decay, as `torch.optim.AdamW`; remembers the first and the second moment:
    /// `m ← β₁m + (1-β₁)g`, `v ← β₂v + (1-β₂)g²`, `p ← (1-ηλ)p - η m̂ / (√v̂ + ε)`, where `m̂` and `v̂` undo the start from zero.
    AdamW,
    /// Muon, for matrices: momentum, then the nearest matrix whose singular values are about one; remembers the momentum:
    /// `m ← 0.95m + g`, `p ← (1-ηλ)p - η √max(1, rows/columns) · orthogonal(g + 0.95m)`.
    Muon,
}

/// What a step changes, and by what.
pub struct Change<'a, B: Backward> {
    /// The weight's name: part of the chance by which its numbers are rounded.
    pub name: &'a str,
    /// The weight.
    pub weight: &'a mut B::Trained,
    /// Its gradient.
    pub gradient: B::Rows,
    /// What the rule remembers of it, in the rule's order.
    pub states: Vec<B::State>,
}

impl Rule {
    /// β₁ and β₂ of AdamW.
    pub(in crate::kernel) const BETAS: [f64; 2] = [0.9, 0.999];
    /// ε of AdamW.
    pub(in crate::kernel) const EPSILON: f64 = 1e-8;
    /// What Muon keeps of its momentum.
    pub(in crate::kernel) const MOMENTUM: f32 = 0.95;
    /// Newton–Schulz steps of Muon, `X ← aX + (bA + cA²)X` with `A = XXᵀ`.
    pub(in crate::kernel) const NEWTON_SCHULZ_STEPS: usize = 5;
    /// a, b and c.
    pub(in crate::kernel) const NEWTON_SCHULZ: [f32; 3] = [3.4445, -4.7750, 2.0315];
}

impl Step {
    /// What a weight keeps of itself.
    pub(in crate::kernel) fn keep(&self) -> f32 {
        (1.0 - self.rate * self.weight_decay) as f32
    }

    /// Of Muon: what a matrix of this shape moves by.
    pub(in crate::kernel) fn muon_size(&self, rows: usize, columns: usize) -> f32 {
        (self.rate * (rows as f64 / columns as f64).max(1.0).sqrt()) as f32
    }

    /// Of AdamW: η over what undoes the first moment's start, and the root of what undoes the second's.
    pub(in crate::kernel) fn adamw_size(&self) -> [f32; 2] {
        let [correction, correction_squared] = Rule::BETAS.map(|beta| 1.0 - beta.powf(self.number as f64));
        [(self.rate / correction) as f32, correction_squared.sqrt() as f32]
    }
}

/// A device that trains.
pub trait Backward: Backend {
    /// A weight in training, in f32 or bf16.
    type Trained: Clone + Send + Sync;
    /// Numbers that an optimizer remembers of a weight, one for each of its values.
    type State: Send;
    /// Inputs of a product, laid out for the gradients of its weights.
    type Inputs: Send;
    /// What a gate was computed from.
    type Gated: Send;

    /// Weights to train. On a CPU they are not copied.
    fn train(&self, weights: Arc<Weights>) -> Result<Arc<Trained<Self>>>;

    /// Weights as they are now, on the host. On a CPU they are not copied.
    fn trained(&self, weights: &Arc<Trained<Self>>) -> Result<Arc<Weights>>;

    /// Length of each dimension.
    fn dimensions(weight: &Self::Trained) -> &[usize];

    /// What an optimizer goes on from. On a CPU it is not copied.
    fn remember(&self, moment: Arc<Moment>) -> Result<Self::State>;

    /// What an optimizer remembers, on the host. On a CPU it is not copied.
    fn remembered(&self, state: &Self::State) -> Result<Arc<Moment>>;

    /// Rows of `width` values from the host. On a CPU they are not copied.
    fn receive(&self, values: Vec<f32>, width: usize) -> Result<Self::Rows>;

    /// Rows for the host. On a CPU they are not copied.
    fn hand_over(&self, rows: Self::Rows) -> Result<Vec<f32>>;

    /// Number of values.
    fn size(rows: &Self::Rows) -> usize;

    /// Rows of `width` numbers as they travel, put through RMSNorm.
    fn normed_states(&self, parts: &[Bytes], format: RowFormat, width: usize, epsilon: f32) -> Result<Self::Rows>;

    /// `x · Wᵀ + b` of weights (nᵢ × k) one below the other: m × k → m × Σ nᵢ.
    fn linear(&self, x: &Self::Rows, weights: &[&Self::Trained], bias: Option<&Self::Trained>) -> Result<Self::Rows>;

    /// `dx = dy · W` of the same weights: m × Σ nᵢ → m × k.
    fn linear_back(&self, dy: &Self::Rows, weights: &[&Self::Trained]) -> Result<Self::Rows>;

    /// The inputs of [`Self::linear`], for [`Self::gradient`].
    fn inputs(&self, x: Self::Rows) -> Result<Self::Inputs>;

    /// `dW = dyᵀ · x`, n × k, of the weight whose outputs are these n columns.
    fn gradient(&self, dy: &Self::Rows, columns: Range<usize>, x: &Self::Inputs) -> Result<Self::Rows>;

    /// RMSNorm: `y = x · r ⊙ w`, `r = 1 / √(mean(x²) + ε)`; without a weight w is one.
    fn norm(&self, x: &Self::Rows, weight: Option<&Self::Trained>, epsilon: f32) -> Result<Self::Rows>;

    /// With `n = x · r`: `dx = r · (dn - n · mean(dn ⊙ n))` where `dn = dy ⊙ w`, and `dw = Σ dy ⊙ n`.
    fn norm_back(&self, x: &Self::Rows, weight: Option<&Self::Trained>, epsilon: f32, dy: &Self::Rows) -> Result<(Self::Rows, Self::Rows)>;

    /// `silu(gate) · up` of rows `[gate | up]`: m × 2f → m × f.
    fn silu_mul(&self, gate_up: &Self::Rows) -> Result<Self::Rows>;

    /// With `s = sigmoid(gate)`: `dgate = dy · up · s · (1 + gate · (1 - s))`, `dup = dy · gate · s`; rows `[dgate | dup]`.
    fn silu_mul_back(&self, gate_up: &Self::Rows, dy: &Self::Rows) -> Result<Self::Rows>;

    /// Causal attention of whole sequences, `lengths` rows `[q | k | v]` each, whose queries and keys are rotated here, in place: m × 3w → m × w.
    /// `angles` are those of positions from 0 to the end of the longest, see [`Backend::angles`].
    fn attend_whole(&self, attention: Attention, angles: &Self::Rows, qkv: &mut Self::Rows, lengths: &[usize]) -> Result<Self::Rows>;

    /// The gradient by the unrotated `[q | k | v]`, from the rotated ones and the gradient by the result. The probabilities are computed again.
    fn attend_whole_back(
        &self,
        attention: Attention,
        angles: &Self::Rows,
        qkv: &Self::Rows,
        lengths: &[usize],
        dy: &Self::Rows,
    ) -> Result<Self::Rows>;

    /// `g ⊙ Δ` of rows x (m × w), m × D; and, to be kept, what the gate was computed from.
    fn gated(&self, gate: Gate<'_, Self>, x: &Self::Rows, keep: bool) -> Result<(Self::Rows, Option<Self::Gated>)>;

    /// The way back through [`Self::gated`]; what was not kept is computed again.
    fn gated_back(
        &self,
        gate: Gate<'_, Self>,
        x: &Self::Rows,
        kept: Option<Self::Gated>,
        dy: Self::Rows,
    ) -> Result<GateGradients<Self::Rows>>;

    /// Attention pooling of sequences of `lengths` rows: `Σ p · row` with `p = softmax(row · pooling)`, one row a sequence.
    fn pool(&self, rows: &Self::Rows, pooling: &Self::Trained, lengths: &[usize]) -> Result<Self::Rows>;

    /// With `dp = rows · dy`, `ds = p (dp - Σ p dp)`: `drows = p dyᵀ + ds poolingᵀ`, `dpooling = Σ ds · rows`.
    fn pool_back(&self, rows: &Self::Rows, pooling: &Self::Trained, lengths: &[usize], dy: &Self::Rows)
    -> Result<(Self::Rows, Self::Rows)>;

    /// As many rows as `count`, of which those at `at` are `rows` and all others zero.
    fn spread(&self, rows: &Self::Rows, at: &[u32], count: usize) -> Result<Self::Rows>;

    /// The sum of all rows, as one.
    fn sum(&self, rows: &Self::Rows) -> Result<Self::Rows>;

    /// `target += rows`.
    fn add(&self, target: &mut Self::Rows, rows: &Self::Rows) -> Result<()>;

    /// Multiplies all values by `factor`.
    fn scale(&self, rows: &mut Self::Rows, factor: f32) -> Result<()>;

    /// L2 norm of all values of all `parts` together, summed in f64; NaN where one is.
    fn length<'a>(&self, parts: impl IntoIterator<Item = &'a Self::Rows>) -> Result<f64>
    where
        Self::Rows: 'a;

    /// Changes weights and what is remembered of them; gradients are of no meaning then. The order of `changes` may change.
    fn update(&self, step: &Step, changes: &mut [Change<'_, Self>]) -> Result<()>;

    /// `average += share · (weight - average)`; the average is in f32.
    fn average(&self, average: &mut Self::Trained, weight: &Self::Trained, share: f32) -> Result<()>;
}
