//! Inference: a head over hidden states, with keys and values kept between calls.

use std::sync::Arc;

use carryon_crds::job::Task;
use carryon_crds::wire::HeadShape;

use super::artifact::Artifact;
use super::layers::{self, HeadAttention, linear};
use super::parameters::{self, ShapeError, Weights};
use crate::kernel::{KeyValues, Panels, Threads};

/// A head ready to run. Every row's bits depend on its own sequence alone: not on batch, chunks, threads or other heads.
pub struct Runner {
    shape: HeadShape,
    threads: Arc<Threads>,
    attention: HeadAttention,
    bridge: Vec<Panels>,
    blocks: Vec<Block>,
    last: Last,
    /// The weight of norms without one.
    ones: Vec<f32>,
}

struct Block {
    input_norm: Vec<f32>,
    /// Rows `[q | k | v]`.
    qkv: Panels,
    o: Panels,
    post_attention_norm: Vec<f32>,
    /// Rows `[gate | up]`.
    gate_up: Panels,
    down: Panels,
}

enum Last {
    Causal { output: Panels, gate: Option<(Panels, Vec<f32>)> },
    Classifier { pooling: Vec<f32>, weight: Panels, bias: Vec<f32> },
}

/// Keys and values of one sequence in every block of one head, at absolute positions.
#[derive(Clone)]
pub struct HeadKv {
    blocks: Vec<KeyValues>,
    positions: usize,
}

impl HeadKv {
    /// An empty cache for heads of this shape, which has been checked.
    pub fn new(shape: &HeadShape) -> Self {
        let attention = HeadAttention::new(shape);
        Self { blocks: (0..shape.blocks).map(|_| attention.cache()).collect(), positions: 0 }
    }

    /// Positions seen.
    pub fn len(&self) -> usize {
        self.positions
    }

    /// Whether no position was seen.
    pub fn is_empty(&self) -> bool {
        self.positions == 0
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> usize {
        self.blocks.iter().map(KeyValues::bytes).sum()
    }

    /// Forgets all positions from `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.positions = self.positions.min(length);
        self.blocks.iter_mut().for_each(|block| block.truncate(length));
    }
}

impl Runner {
    /// Packs the weights of `artifact`.
    ///
    /// # Errors
    /// A shape out of bounds.
    pub fn new(artifact: &Artifact, threads: Arc<Threads>) -> Result<Self, ShapeError> {
        Self::from_weights(&artifact.shape, &artifact.weights, threads)
    }

    /// Packs weights that are complete for `shape`.
    ///
    /// # Errors
    /// A shape out of bounds.
    pub fn from_weights(shape: &HeadShape, weights: &Weights, threads: Arc<Threads>) -> Result<Self, ShapeError> {
        parameters::check(shape)?;
        let vector = |name: &str| weights[name].values.clone();
        let matrix = |names: &[&str]| {
            let values: Vec<f32> = names.iter().flat_map(|name| weights[*name].values.iter().copied()).collect();
            let columns = weights[names[0]].shape[1];
            layers::pack(&threads, &values, values.len() / columns, columns)
        };
        let block = |index: u32| {
            let name = |part: &str| format!("blocks.{index}.{part}.weight");
            let [q, k, v] = ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj")));
            Block {
                input_norm: vector(&name("input_layernorm")),
                qkv: matrix(&[&q, &k, &v]),
                o: matrix(&[&name("self_attn.o_proj")]),
                post_attention_norm: vector(&name("post_attention_layernorm")),
                gate_up: matrix(&[&name("mlp.gate_proj"), &name("mlp.up_proj")]),
                down: matrix(&[&name("mlp.down_proj")]),
            }
        };
        let last = match shape.task {
            Task::CausalLM => Last::Causal {
                output: matrix(&["output.weight"]),
                gate: shape.gate.then(|| (matrix(&["gate.weight"]), vector("gate.bias"))),
            },
            Task::Classification => Last::Classifier {
                pooling: vector("pooling.weight"),
                weight: matrix(&["classifier.weight"]),
                bias: vector("classifier.bias"),
            },
        };
        Ok(Self {
            attention: HeadAttention::new(shape),
            bridge: (0..shape.taps.count()).map(|tap| matrix(&[&format!("bridge.{tap}.weight")])).collect(),
            blocks: (0..shape.blocks).map(block).collect(),
            last,
            ones: vec![1.0; shape.hidden_size.max(shape.width) as usize],
            shape: shape.clone(),
            threads,
        })
    }

    /// The head's shape.
    pub fn shape(&self) -> &HeadShape {
        &self.shape
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        let blocks = self.blocks.iter().flat_map(|block| [&block.qkv, &block.o, &block.gate_up, &block.down]);
        let last = match &self.last {
            Last::Causal { output, gate } => output.bytes() + gate.as_ref().map_or(0, |(weight, _)| weight.bytes()),
            Last::Classifier { weight, .. } => weight.bytes(),
        };
        self.bridge.iter().chain(blocks).map(Panels::bytes).sum::<usize>() + last
    }

    /// `g ⊙ Δ` without α, `[rows, D]`, of a head for CausalLM (empty for a classifier).
    ///
    /// `taps` holds one slice per tap of the head, layers ascending and `final` last, each `[rows, D]`: the rows of all sequences, one after
    /// the other. `sequences` says how many rows belong to each; they follow what its cache holds and are appended to it.
    pub fn forward(&self, taps: &[&[f32]], sequences: &mut [(usize, &mut HeadKv)]) -> Vec<f32> {
        let u = self.hidden(taps, sequences);
        let Last::Causal { output, gate } = &self.last else { return Vec::new() };
        let normed = self.plain_norm(&u, self.attention.width);
        let delta = linear(&self.threads, &normed, output);
        match gate {
            None => delta,
            Some((weight, bias)) => layers::gated(&self.threads, &linear(&self.threads, &normed, weight), bias, &delta),
        }
    }

    /// Logits of a classifier, `[sequences, labels]` (empty for other heads); every sequence is whole, `lengths` rows each.
    pub fn classify(&self, taps: &[&[f32]], lengths: &[usize]) -> Vec<f32> {
        let Last::Classifier { pooling, weight, bias } = &self.last else { return Vec::new() };
        let mut caches: Vec<HeadKv> = lengths.iter().map(|_| HeadKv::new(&self.shape)).collect();
        let mut sequences: Vec<_> = lengths.iter().copied().zip(&mut caches).collect();
        let normed = self.plain_norm(&self.hidden(taps, &mut sequences), self.attention.width);
        let pooled = layers::pool(&normed, pooling, lengths);
        let mut logits = linear(&self.threads, &pooled, weight);
        layers::add_bias(&mut logits, bias);
        logits
    }

    /// `u = blocks(Σ_k B_k · norm(h_k))`, `[rows, w]`.
    fn hidden(&self, taps: &[&[f32]], sequences: &mut [(usize, &mut HeadKv)]) -> Vec<f32> {
        assert_eq!(taps.len(), self.bridge.len(), "one slice per tap");
        let rows: usize = sequences.iter().map(|(rows, _)| rows).sum();
        let (threads, hidden_size) = (&*self.threads, self.shape.hidden_size as usize);
        let mut u = Vec::new();
        for (tap, weight) in taps.iter().zip(&self.bridge) {
            assert_eq!(tap.len(), rows * hidden_size, "rows of a tap");
            let projected = linear(threads, &self.plain_norm(tap, hidden_size), weight);
            if u.is_empty() { u = projected } else { layers::add(&mut u, &projected) }
        }
        let angles: Vec<_> = sequences.iter().map(|(rows, kv)| self.attention.angles(kv.positions..kv.positions + rows)).collect();
        let angles: Vec<_> = angles.iter().collect();
        for (index, block) in self.blocks.iter().enumerate() {
            let mut qkv = linear(threads, &self.norm(&u, &block.input_norm), &block.qkv);
            let mut caches: Vec<_> = sequences.iter_mut().map(|(rows, kv)| (*rows, &mut kv.blocks[index])).collect();
            let attended = self.attention.forward(threads, &angles, &mut qkv, &mut caches);
            layers::add(&mut u, &linear(threads, &attended, &block.o));
            let gate_up = linear(threads, &self.norm(&u, &block.post_attention_norm), &block.gate_up);
            layers::add(&mut u, &linear(threads, &layers::silu_mul(threads, &gate_up, block.down.cols()), &block.down));
        }
        sequences.iter_mut().for_each(|(rows, kv)| kv.positions += *rows);
        u
    }

    /// RMSNorm without weight of rows `width` long.
    fn plain_norm(&self, x: &[f32], width: usize) -> Vec<f32> {
        self.norm(x, &self.ones[..width])
    }

    fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        layers::norm(&self.threads, x, weight, self.shape.norm_epsilon as f32)
    }
}
