//! Training: the head's formula forward, and the explicit way back through it.
//!
//! Batches are packed: the rows of all sequences one after the other, no padding. [`Pass::forward`] computes with the arithmetic of inference; what it
//! keeps, [`Pass::backward`] goes back through. A weight's gradient is handed out as soon as it is known, when nothing needs that weight any more:
//! whoever takes it may add it up, or change the weight on the spot and drop it.

mod attention;
mod backward;
mod elementwise;
mod linear;
mod norm;
mod output;
mod pooling;

pub use backward::Take;

use std::borrow::Cow;
use std::sync::Arc;

use bytes::Bytes;
use carryon_crds::job::Task;
use carryon_crds::wire::HeadShape;

use super::layers::{self, Angles, HeadAttention};
use super::parameters::{self, ShapeError, Weight, Weights};
use crate::kernel::{Threads, cpu};
use crate::numbers::RowFormat;
use linear::Stack;
pub use linear::transpose;
use output::Tile;

/// Hidden states of some whole sequences.
#[derive(Clone, Debug)]
pub struct PackedBatch {
    /// For each tap of the head (layers ascending, `final` last) the rows of each sequence: `[length, D]` numbers.
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
pub struct Pass {
    shape: HeadShape,
    threads: Arc<Threads>,
    attention: HeadAttention,
}

/// What a forward pass gives.
pub struct Forward {
    /// Row-major. CausalLM: `g ⊙ Δ` without α of the rows that carry a target, `[batch.rows, D]`. All others: logits, `[sequences, outputs]`.
    pub output: Vec<f32>,
    /// For [`Pass::backward`]; none with [`Keep::Nothing`].
    pub saved: Option<Saved>,
}

/// What was kept.
pub struct Saved {
    blocks: Vec<(Vec<f32>, Option<Inside>)>,
    /// Behind the last block, `[rows, w]`.
    u: Vec<f32>,
    /// CausalLM with a gate; empty where they are computed again.
    tiles: Vec<Tile>,
}

/// What a block computes on its way.
struct Inside {
    /// `[q | k | v]`, rotated.
    qkv: Vec<f32>,
    attended: Vec<f32>,
    /// Between attention and feed-forward.
    middle: Vec<f32>,
    /// `[gate | up]`.
    gate_up: Vec<f32>,
}

impl Pass {
    /// # Errors
    /// A shape out of bounds.
    pub fn new(shape: &HeadShape, threads: Arc<Threads>) -> Result<Self, PassError> {
        parameters::check(shape)?;
        Ok(Self { attention: HeadAttention::new(shape), shape: shape.clone(), threads })
    }

    /// The head's output for `batch`; `weights` are complete for its shape.
    ///
    /// # Errors
    /// A batch whose members do not fit together.
    pub fn forward(&self, weights: &Weights, batch: &PackedBatch, keep: Keep) -> Result<Forward, PassError> {
        self.check(batch)?;
        let angles = self.angles(batch);
        let (mut u, mut blocks) = (self.bridge(weights, batch), Vec::new());
        for index in 0..self.shape.blocks {
            let (inside, out) = self.block(weights, index, &angles, &batch.lengths, &u);
            let input = std::mem::replace(&mut u, out);
            if keep != Keep::Nothing {
                blocks.push((input, (keep == Keep::All).then_some(inside)));
            }
        }
        let mut tiles = Vec::new();
        let keep_tile = |tile| {
            if keep == Keep::All {
                tiles.push(tile);
            }
        };
        let output = match self.shape.task {
            Task::CausalLM => self.delta(weights, &self.normed_targets(batch, &u), keep_tile),
            _ => self.class_logits(weights, batch, &u),
        };
        Ok(Forward { output, saved: (keep != Keep::Nothing).then_some(Saved { blocks, u, tiles }) })
    }

    /// `Σ_k B_k · norm(h_k)`, `[rows, w]`.
    fn bridge(&self, weights: &Weights, batch: &PackedBatch) -> Vec<f32> {
        let mut u = Vec::new();
        for (index, (tap, format)) in batch.taps.iter().zip(&batch.formats).enumerate() {
            let projected = Stack::of([&weights[&bridge(index)]]).forward(&self.threads, &self.normed_tap(tap, *format));
            match u.is_empty() {
                true => u = projected,
                false => cpu::add(&mut u, &projected),
            }
        }
        u
    }

    /// What the block does with `u`, and what it makes of it.
    fn block(&self, weights: &Weights, index: u32, angles: &Angles, lengths: &[usize], u: &[f32]) -> (Inside, Vec<f32>) {
        let weight = |part: &str| &weights[&in_block(index, part)];
        let stack = |parts: &[&str]| Stack::of(parts.iter().map(|part| weight(part)));
        let (threads, f) = (&*self.threads, self.shape.feed_forward as usize);
        let mut qkv = stack(QKV).forward(threads, &self.norm(u, weight(INPUT_NORM)));
        let attended = self.attention.forward(threads, angles, &mut qkv, lengths);
        let mut middle = stack(O).forward(threads, &attended);
        cpu::add(&mut middle, u);
        let gate_up = stack(GATE_UP).forward(threads, &self.norm(&middle, weight(POST_NORM)));
        let mut out = stack(DOWN).forward(threads, &layers::silu_mul(threads, &gate_up, f));
        cpu::add(&mut out, &middle);
        (Inside { qkv, attended, middle, gate_up }, out)
    }

    fn class_logits(&self, weights: &Weights, batch: &PackedBatch, u: &[f32]) -> Vec<f32> {
        let (rows, lengths) = self.pooled(batch, u);
        let pooled = layers::pool(&self.plain_norm(&rows), &weights["pooling.weight"].values.floats(), &lengths);
        let mut logits = Stack::of([&weights["classifier.weight"]]).forward(&self.threads, &pooled);
        layers::add_bias(&mut logits, &weights["classifier.bias"].values.floats());
        logits
    }

    /// The rows of `u` that are pooled, and how many of each sequence: its last ones.
    fn pooled<'a>(&self, batch: &PackedBatch, u: &'a [f32]) -> (Cow<'a, [f32]>, Vec<usize>) {
        let lengths: Vec<usize> = batch.lengths.iter().map(|length| self.shape.pooled(*length)).collect();
        if lengths == batch.lengths {
            return (u.into(), lengths);
        }
        let (width, mut end, mut rows) = (self.attention.width, 0, Vec::new());
        for (length, pooled) in batch.lengths.iter().zip(&lengths) {
            end += length;
            rows.extend_from_slice(&u[(end - pooled) * width..end * width]);
        }
        (rows.into(), lengths)
    }

    /// `norm(u)` of the rows with a target.
    fn normed_targets(&self, batch: &PackedBatch, u: &[f32]) -> Vec<f32> {
        self.plain_norm(&self.targets(batch, u))
    }

    fn targets(&self, batch: &PackedBatch, u: &[f32]) -> Vec<f32> {
        let width = self.attention.width;
        batch.rows.iter().flat_map(|row| &u[*row as usize * width..][..width]).copied().collect()
    }

    /// `norm(ĥ)`, `[rows, D]`.
    fn normed_tap(&self, tap: &[Bytes], format: RowFormat) -> Vec<f32> {
        let width = self.shape.hidden_size as usize;
        let rows: Vec<&[u8]> = tap.iter().flat_map(|bytes| bytes.chunks_exact(format.row_bytes(width))).collect();
        let (ones, mut out) = (vec![1.0; width], vec![0.0; rows.len() * width]);
        self.threads.for_rows(&mut out, width, ROWS, |first, out| {
            let mut values = vec![0.0; width];
            for (row, out) in rows[first..].iter().zip(out.chunks_exact_mut(width)) {
                format.read(row, &mut values);
                cpu::rms_norm(&values, &ones, self.epsilon(), out);
            }
        });
        out
    }

    fn norm(&self, x: &[f32], weight: &Weight) -> Vec<f32> {
        layers::norm(&self.threads, x, &weight.values.floats(), self.epsilon())
    }

    fn plain_norm(&self, u: &[f32]) -> Vec<f32> {
        layers::norm(&self.threads, u, &vec![1.0; self.attention.width], self.epsilon())
    }

    fn epsilon(&self) -> f32 {
        self.shape.norm_epsilon as f32
    }

    fn angles(&self, batch: &PackedBatch) -> Angles {
        self.attention.angles(0..batch.lengths.iter().copied().max().unwrap_or(0))
    }

    fn check(&self, batch: &PackedBatch) -> Result<(), PassError> {
        let refuse = |reason: String| Err(PassError::Batch(reason));
        if (batch.taps.len(), batch.formats.len()) != (self.shape.taps.count(), self.shape.taps.count()) {
            return refuse(format!("has {} taps, the head {}", batch.taps.len(), self.shape.taps.count()));
        }
        if batch.lengths.contains(&0) {
            return refuse("has an empty sequence".into());
        }
        for (index, (tap, format)) in batch.taps.iter().zip(&batch.formats).enumerate() {
            let row_bytes = format.row_bytes(self.shape.hidden_size as usize);
            if !tap.iter().map(Bytes::len).eq(batch.lengths.iter().map(|length| length * row_bytes)) {
                return refuse(format!("tap {index} does not have {:?} rows of {}", batch.lengths, self.shape.hidden_size));
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

/// Rows that one thread takes at a time.
const ROWS: usize = 32;
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
