//! Training: the head's formula over candle's tape, with operations that know their own gradient.
//!
//! candle keeps the graph; each operation runs on our kernels, with the arithmetic of inference, and keeps nothing but its operands. Batches
//! are packed: the rows of all sequences one after the other, no padding.

mod attention;
mod elementwise;
mod linear;
mod norm;
mod pooling;
mod values;

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::{D, Device, Tensor, Var};
use carryon_crds::job::Task;
use carryon_crds::wire::HeadShape;

use super::layers::HeadAttention;
use super::parameters::{self, Gradients, ShapeError, Weights};
use crate::kernel::Threads;
use attention::CausalAttention;
use elementwise::{Gate, SiluMul};
use linear::Linear;
pub use linear::transpose;
use norm::RmsNorm;
use pooling::Pool;
use values::Values;

/// Hidden states of some whole sequences.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// One tensor per tap of the head (layers ascending, `final` last), `[rows, D]`, f32; not tracked: the base is frozen.
    pub taps: Vec<Tensor>,
    /// Rows of each sequence, in order.
    pub lengths: Vec<usize>,
    /// Rows that carry a target, for CausalLM: only these are given an output.
    pub rows: Vec<u32>,
}

/// Why a batch was not computed.
#[derive(Debug, thiserror::Error)]
pub enum TapeError {
    /// The shape is out of bounds.
    #[error("the head's {0}")]
    Shape(#[from] ShapeError),
    /// Taps, lengths, rows or labels do not fit together.
    #[error("batch: {0}")]
    Batch(String),
    /// Parameters that the loss does not depend on.
    #[error("no gradient reached {}", .0.join(", "))]
    NoGradient(Vec<String>),
    /// The tensor library refused.
    #[error("tensor operation failed: {0}")]
    Tensor(#[from] candle_core::Error),
}

type Result<T> = std::result::Result<T, TapeError>;

/// A head whose parameters are variables: made from the weights of one step, used for its micro-batches, dropped.
pub struct Tape {
    shape: HeadShape,
    threads: Arc<Threads>,
    variables: BTreeMap<String, Var>,
    attention: HeadAttention,
    norm: RmsNorm,
}

impl Tape {
    /// Copies weights that are complete for `shape` into variables.
    ///
    /// # Errors
    /// A shape out of bounds.
    pub fn new(shape: &HeadShape, weights: &Weights, threads: Arc<Threads>) -> Result<Self> {
        parameters::check(shape)?;
        let variable = |weight: &parameters::Weight| Var::from_slice(&weight.values, weight.shape.as_slice(), &Device::Cpu);
        let variables = weights.iter().map(|(name, weight)| Ok((name.clone(), variable(weight)?))).collect::<Result<_>>()?;
        let norm = RmsNorm { threads: threads.clone(), epsilon: shape.norm_epsilon as f32 };
        Ok(Self { shape: shape.clone(), variables, attention: HeadAttention::new(shape), norm, threads })
    }

    /// `g ⊙ Δ` without α of the rows that carry a target: `[batch.rows, D]`, tracked. For CausalLM.
    ///
    /// # Errors
    /// A batch whose members do not fit together; tracked taps.
    pub fn delta(&self, batch: &PackedBatch) -> Result<Tensor> {
        let u = self.hidden(batch)?;
        let rows = Tensor::from_slice(&batch.rows, batch.rows.len(), &Device::Cpu)?;
        let normed = self.plain_norm(&u.index_select(&rows, 0)?)?;
        let delta = self.linear(&normed, &self.variables["output.weight"])?;
        if !self.shape.gate {
            return Ok(delta);
        }
        let z = self.linear(&normed, &self.variables["gate.weight"])?;
        Ok(z.apply_op3(&self.variables["gate.bias"], &delta, Gate(self.threads.clone()))?)
    }

    /// Logits `[sequences, labels]` of a classifier, tracked.
    ///
    /// # Errors
    /// A batch whose members do not fit together; tracked taps.
    pub fn class_logits(&self, batch: &PackedBatch) -> Result<Tensor> {
        let normed = self.plain_norm(&self.hidden(batch)?)?;
        let pooled = normed.apply_op2(&self.variables["pooling.weight"], Pool(batch.lengths.clone()))?;
        let logits = self.linear(&pooled, &self.variables["classifier.weight"])?;
        Ok(logits.broadcast_add(&self.variables["classifier.bias"])?)
    }

    /// Gradients of a loss whose derivative by `output` (of [`Tape::delta`] or [`Tape::class_logits`]) is `by_output`, row-major.
    ///
    /// # Errors
    /// Parameters that got none, by name.
    pub fn gradients(&self, output: &Tensor, by_output: &[f32]) -> Result<Gradients> {
        let by_output = Tensor::from_slice(by_output, output.shape(), &Device::Cpu)?;
        self.backward(&(output * by_output)?.sum_all()?)
    }

    /// Gradients of a scalar.
    ///
    /// # Errors
    /// Parameters that got none, by name.
    pub fn backward(&self, loss: &Tensor) -> Result<Gradients> {
        let store = loss.backward()?;
        let (mut gradients, mut missing) = (Gradients::new(), Vec::new());
        for (name, variable) in &self.variables {
            match store.get(variable) {
                Some(gradient) => drop(gradients.insert(name.clone(), Values::of(&gradient.contiguous()?)?.to_vec())),
                None => missing.push(name.clone()),
            }
        }
        if missing.is_empty() { Ok(gradients) } else { Err(TapeError::NoGradient(missing)) }
    }

    /// `u = blocks(Σ_k B_k · norm(h_k))`, `[rows, w]`.
    fn hidden(&self, batch: &PackedBatch) -> Result<Tensor> {
        self.check(batch)?;
        let mut u = None;
        for (index, tap) in batch.taps.iter().enumerate() {
            let projected = self.linear(&self.plain_norm(tap)?, &self.variables[&format!("bridge.{index}.weight")])?;
            u = Some(match u {
                None => projected,
                Some(u) => (u + projected)?,
            });
        }
        let mut u = u.ok_or_else(|| TapeError::Batch("has no taps".into()))?;
        let angles = Arc::new(self.attention.angles(0..batch.lengths.iter().copied().max().unwrap_or(0)));
        for block in 0..self.shape.blocks {
            let weight = |name: &str| &self.variables[&format!("blocks.{block}.{name}.weight")];
            let stack = |names: &[&str]| Tensor::cat(&names.iter().map(|name| weight(name).as_tensor()).collect::<Vec<_>>(), 0);
            let normed = u.apply_op2(weight("input_layernorm"), self.norm.clone())?;
            let qkv = self.linear(&normed, &stack(&["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"])?)?;
            let attended = qkv.apply_op1(CausalAttention {
                threads: self.threads.clone(),
                attention: self.attention.clone(),
                angles: angles.clone(),
                lengths: batch.lengths.clone(),
            })?;
            u = (u + self.linear(&attended, weight("self_attn.o_proj"))?)?;
            let normed = u.apply_op2(weight("post_attention_layernorm"), self.norm.clone())?;
            let gate_up = self.linear(&normed, &stack(&["mlp.gate_proj", "mlp.up_proj"])?)?;
            u = (&u + self.linear(&gate_up.apply_op1(SiluMul(self.threads.clone()))?, weight("mlp.down_proj"))?)?;
        }
        Ok(u)
    }

    fn linear(&self, x: &Tensor, weight: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op2(weight, Linear(self.threads.clone()))
    }

    fn plain_norm(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        x.apply_op1(self.norm.clone())
    }

    fn check(&self, batch: &PackedBatch) -> Result<()> {
        let rows: usize = batch.lengths.iter().sum();
        let refuse = |reason: String| Err(TapeError::Batch(reason));
        if batch.taps.len() != self.shape.taps.count() {
            return refuse(format!("has {} taps, the head {}", batch.taps.len(), self.shape.taps.count()));
        }
        if batch.lengths.contains(&0) {
            return refuse("has an empty sequence".into());
        }
        for (index, tap) in batch.taps.iter().enumerate() {
            if tap.dims2()? != (rows, self.shape.hidden_size as usize) {
                return refuse(format!("tap {index} has shape {:?} for {rows} rows of {}", tap.shape(), self.shape.hidden_size));
            }
            if tap.track_op() {
                return refuse(format!("tap {index} is tracked, but the base is frozen"));
            }
        }
        if self.shape.task == Task::CausalLM && batch.rows.is_empty() {
            return refuse("has no row with a target".into());
        }
        match batch.rows.iter().find(|row| **row as usize >= rows) {
            Some(row) => refuse(format!("row {row} of {rows}")),
            None => Ok(()),
        }
    }
}

/// Mean cross entropy of logits `[sequences, labels]` against labels, in plain operations.
///
/// # Errors
/// A label out of range, or their number.
pub fn class_loss(logits: &Tensor, labels: &[u32]) -> Result<Tensor> {
    let (sequences, classes) = logits.dims2()?;
    if labels.len() != sequences || labels.iter().any(|label| *label as usize >= classes) {
        return Err(TapeError::Batch(format!("labels {labels:?} for {sequences} sequences of {classes} classes")));
    }
    let labels = Tensor::from_slice(labels, (sequences, 1), &Device::Cpu)?;
    let shifted = logits.broadcast_sub(&logits.max_keepdim(D::Minus1)?.detach())?;
    let log_sum = shifted.exp()?.sum_keepdim(D::Minus1)?.log()?;
    Ok((log_sum - shifted.gather(&labels, D::Minus1)?)?.mean_all()?)
}
