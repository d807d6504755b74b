//! Training: the head's formula forward, and the explicit way back through it, on any device.
//!
//! Batches are packed: the rows of all sequences one after the other, no padding. [`Pass::forward`] computes with the arithmetic of inference; what it
//! keeps, [`Pass::backward`] goes back through. A weight's gradient is handed out as soon as it is known, when nothing needs that weight any more:
//! whoever takes it may add it up, or change the weight on the spot and drop it.

mod backward;

pub use backward::Take;

use bytes::Bytes;
use carryon_crds::job::Task;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::HeadShape;

use super::layers::HeadAttention;
use super::parameters::{self, ShapeError};
use crate::kernel::{Backward, DeviceError, Gate, Result as DeviceResult, Trained};
use crate::numbers::RowFormat;

/// Hidden states of some whole sequences.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// For each tap of the head (layers ascending, `final` last, those of further bases behind) the rows of each sequence: `[length, D]` numbers, D the width
    /// of the base.
    pub taps: Vec<Vec<Bytes>>,
    /// How the rows of each tap are written.
    pub formats: Vec<RowFormat>,
    /// Rows of each sequence, in order.
    pub lengths: Vec<usize>,
    /// Rows that carry a target, ascending, for CausalLM: only these are given an output.
    pub rows: Vec<u32>,
}

/// Why a batch was not computed.
#[derive(Debug, thiserror::Error)]
pub enum PassError {
    /// The shape is out of bounds.
    #[error("the head's {0}")]
    Shape(#[from] ShapeError),
    /// Taps, lengths and rows do not fit together.
    #[error("batch: {0}")]
    Batch(String),
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What a forward pass keeps for the way back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// Nothing: there is none.
    Nothing,
    /// The rows that go into each block; what a block does with them is computed again.
    Inputs,
    /// All that the way back needs.
    All,
}

/// The head's arithmetic on packed batches, for weights that are given with each call.
pub struct Pass<B> {
    shape: HeadShape,
    /// Of the rows of each tap.
    widths: Vec<usize>,
    backend: B,
    attention: HeadAttention,
}

/// What a forward pass gives.
pub struct Forward<B: Backward> {
    /// Row-major. CausalLM: `g ⊙ Δ` without α of the rows that carry a target, `[batch.rows, D]`. All others: logits, `[sequences, outputs]`.
    pub output: B::Rows,
    /// For [`Pass::backward`]; none with [`Keep::Nothing`].
    pub saved: Option<Saved<B>>,
}

/// What was kept.
pub struct Saved<B: Backward> {
    blocks: Vec<(B::Rows, Option<Inside<B>>)>,
    /// Behind the last block, `[rows, w]`.
    u: B::Rows,
    /// CausalLM with a gate; none where it is computed again.
    gated: Option<B::Gated>,
}

/// What a block computes on its way.
struct Inside<B: Backward> {
    /// `[q | k | v]`, rotated.
    qkv: B::Rows,
    attended: B::Rows,
    /// Between attention and feed-forward.
    middle: B::Rows,
    /// `[gate | up]`.
    gate_up: B::Rows,
}

impl<B: Backward> Pass<B> {
    /// # Errors
    /// A shape out of bounds.
    pub fn new(shape: &HeadShape, backend: B) -> Result<Self, PassError> {
        parameters::check(shape)?;
        Ok(Self { attention: HeadAttention::new(shape), widths: shape.tap_widths(), shape: shape.clone(), backend })
    }

    /// The head's output for `batch`; `weights` are complete for its shape.
    ///
    /// # Errors
    /// A batch whose members do not fit together; the device failed.
    pub fn forward(&self, weights: &Trained<B>, batch: &PackedBatch, keep: Keep) -> Result<Forward<B>, PassError> {
        self.check(batch)?;
        let angles = self.angles(batch)?;
        let (mut u, mut blocks) = (self.bridge(weights, batch)?, Vec::new());
        for index in 0..self.shape.blocks {
            let (inside, out) = self.block(weights, index, &angles, &batch.lengths, &u)?;
            let input = std::mem::replace(&mut u, out);
            if keep != Keep::Nothing {
                blocks.push((input, (keep == Keep::All).then_some(inside)));
            }
        }
        let (output, gated) = match self.shape.task {
            Task::CausalLM => self.delta(weights, &self.normed_targets(batch, &u)?, keep == Keep::All)?,
            _ => (self.class_logits(weights, batch, &u)?, None),
        };
        Ok(Forward { output, saved: (keep != Keep::Nothing).then_some(Saved { blocks, u, gated }) })
    }

    /// `Σ_k B_k · norm(h_k)`, `[rows, w]`.
    fn bridge(&self, weights: &Trained<B>, batch: &PackedBatch) -> DeviceResult<B::Rows> {
        let mut u = B::Rows::default();
        for index in 0..batch.taps.len() {
            let projected = self.backend.linear(&self.normed_tap(batch, index)?, &[&weights[&bridge(index)]], None)?;
            match index {
                0 => u = projected,
                _ => self.backend.add(&mut u, &projected)?,
            }
        }
        Ok(u)
    }

    /// What the block does with `u`, and what it makes of it.
    fn block(
        &self,
        weights: &Trained<B>,
        index: u32,
        angles: &B::Rows,
        lengths: &[usize],
        u: &B::Rows,
    ) -> DeviceResult<(Inside<B>, B::Rows)> {
        let weight = |part: &str| &weights[&in_block(index, part)];
        let backend = &self.backend;
        let linear = |x: &B::Rows, parts: &[&str]| backend.linear(x, &parts.iter().map(|part| weight(part)).collect::<Vec<_>>(), None);
        let mut qkv = linear(&self.norm(u, weight(INPUT_NORM))?, QKV)?;
        let attended = backend.attend_whole(self.attention.attention(), angles, &mut qkv, lengths)?;
        let mut middle = linear(&attended, O)?;
        backend.add(&mut middle, u)?;
        let gate_up = linear(&self.norm(&middle, weight(POST_NORM))?, GATE_UP)?;
        let mut out = linear(&backend.silu_mul(&gate_up)?, DOWN)?;
        backend.add(&mut out, &middle)?;
        Ok((Inside { qkv, attended, middle, gate_up }, out))
    }

    /// `g ⊙ Δ` of normed rows, `[rows, D]`, and what the gate was computed from.
    fn delta(&self, weights: &Trained<B>, normed: &B::Rows, keep: bool) -> DeviceResult<(B::Rows, Option<B::Gated>)> {
        match self.shape.gate {
            true => self.backend.gated(gate(weights), normed, keep),
            false => Ok((self.backend.linear(normed, &[&weights[OUTPUT]], None)?, None)),
        }
    }

    fn class_logits(&self, weights: &Trained<B>, batch: &PackedBatch, u: &B::Rows) -> DeviceResult<B::Rows> {
        let (which, lengths) = self.pooled(batch);
        let some = self.some_of(u, which.as_deref())?;
        let pooled = self.backend.pool(&self.plain_norm(some.as_ref().unwrap_or(u))?, &weights[POOLING], &lengths)?;
        self.backend.linear(&pooled, &[&weights[CLASSIFIER]], Some(&weights[CLASSIFIER_BIAS]))
    }

    /// The rows that are pooled, where those are not all, and how many of each sequence: its last ones.
    fn pooled(&self, batch: &PackedBatch) -> (Option<Vec<u32>>, Vec<usize>) {
        let lengths: Vec<usize> = batch.lengths.iter().map(|length| self.shape.pooled(*length)).collect();
        if lengths == batch.lengths {
            return (None, lengths);
        }
        let (mut end, mut which) = (0, Vec::new());
        for (length, pooled) in batch.lengths.iter().zip(&lengths) {
            end += length;
            which.extend((end - pooled) as u32..end as u32);
        }
        (Some(which), lengths)
    }

    /// Some rows, where not all are wanted.
    fn some_of(&self, u: &B::Rows, which: Option<&[u32]>) -> DeviceResult<Option<B::Rows>> {
        which.map(|which| self.backend.tap(u, Some(which), None, Dtype::Float32)).transpose()
    }

    fn normed_targets(&self, batch: &PackedBatch, u: &B::Rows) -> DeviceResult<B::Rows> {
        self.plain_norm(&self.targets(batch, u)?)
    }

    /// The rows with a target.
    fn targets(&self, batch: &PackedBatch, u: &B::Rows) -> DeviceResult<B::Rows> {
        self.backend.tap(u, Some(&batch.rows), None, Dtype::Float32)
    }

    /// `norm(ĥ)` of a tap, `[rows, D]`.
    fn normed_tap(&self, batch: &PackedBatch, tap: usize) -> DeviceResult<B::Rows> {
        self.backend.normed_states(&batch.taps[tap], batch.formats[tap], self.widths[tap], self.epsilon())
    }

    fn norm(&self, x: &B::Rows, weight: &B::Trained) -> DeviceResult<B::Rows> {
        self.backend.norm(x, Some(weight), self.epsilon())
    }

    fn plain_norm(&self, u: &B::Rows) -> DeviceResult<B::Rows> {
        self.backend.norm(u, None, self.epsilon())
    }

    fn epsilon(&self) -> f32 {
        self.shape.norm_epsilon as f32
    }

    /// Of the positions of the longest sequence.
    fn angles(&self, batch: &PackedBatch) -> DeviceResult<B::Rows> {
        let longest = batch.lengths.iter().copied().max().unwrap_or(0);
        let (positions, mut angles) = ((0..longest as u32).collect::<Vec<_>>(), B::Rows::default());
        self.backend.angles(self.attention.rotation(), &positions, &mut angles)?;
        Ok(angles)
    }

    fn check(&self, batch: &PackedBatch) -> Result<(), PassError> {
        let refuse = |reason: String| Err(PassError::Batch(reason));
        if [batch.taps.len(), batch.formats.len()] != [self.widths.len(); 2] {
            return refuse(format!("has {} taps, the head {}", batch.taps.len(), self.widths.len()));
        }
        if batch.lengths.contains(&0) {
            return refuse("has an empty sequence".into());
        }
        for (index, (tap, (format, width))) in batch.taps.iter().zip(batch.formats.iter().zip(&self.widths)).enumerate() {
            let row_bytes = format.row_bytes(*width);
            if !tap.iter().map(Bytes::len).eq(batch.lengths.iter().map(|length| length * row_bytes)) {
                return refuse(format!("tap {index} does not have {:?} rows of {width}", batch.lengths));
            }
        }
        if self.shape.task == Task::CausalLM && batch.rows.is_empty() {
            return refuse("has no row with a target".into());
        }
        let rows: usize = batch.lengths.iter().sum();
        match batch.rows.iter().find(|row| **row as usize >= rows) {
            Some(row) => refuse(format!("row {row} of {rows}")),
            None => Ok(()),
        }
    }
}

/// Output and gate of a head that has one.
fn gate<B: Backward>(weights: &Trained<B>) -> Gate<'_, B> {
    Gate { output: &weights[OUTPUT], gate: &weights[GATE], bias: &weights[GATE_BIAS] }
}

const OUTPUT: &str = "output.weight";
const GATE: &str = "gate.weight";
const GATE_BIAS: &str = "gate.bias";
const POOLING: &str = "pooling.weight";
const CLASSIFIER: &str = "classifier.weight";
const CLASSIFIER_BIAS: &str = "classifier.bias";
const INPUT_NORM: &str = "input_layernorm";
const POST_NORM: &str = "post_attention_layernorm";
const QKV: &[&str] = &["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"];
const O: &[&str] = &["self_attn.o_proj"];
const GATE_UP: &[&str] = &["mlp.gate_proj", "mlp.up_proj"];
const DOWN: &[&str] = &["mlp.down_proj"];

fn bridge(tap: usize) -> String {
    format!("bridge.{tap}.weight")
}

fn in_block(index: u32, part: &str) -> String {
    format!("blocks.{index}.{part}.weight")
}
