//! Inference: heads over hidden states, on any device, with keys and values kept between calls.

use std::ptr;

use carryon_crds::job::Task;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::HeadShape;

use super::artifact::Artifact;
use super::layers::HeadAttention;
use super::parameters::{self, ShapeError, Weights};
use crate::kernel::{Activation, Arena, Backend, DeviceError, Left, PageLayout, PageTable, Part, Result, Sink, Span, cpu};

/// A head ready to run. On a CPU every row's bits depend on its own sequence alone: not on batch, chunks, threads or other heads.
pub struct Runner<B: Backend> {
    shape: HeadShape,
    backend: B,
    attention: HeadAttention,
    bridge: Vec<B::Matrix>,
    blocks: Vec<Block<B>>,
    last: Last<B>,
}

struct Block<B: Backend> {
    input_norm: B::Vector,
    /// Rows `[q | k | v]`.
    qkv: B::Matrix,
    o: B::Matrix,
    post_attention_norm: B::Vector,
    gate_up: B::Matrix,
    down: B::Matrix,
}

enum Last<B: Backend> {
    Causal {
        output: B::Matrix,
        gate: Option<(B::Matrix, B::Vector)>,
    },
    /// `ones` is the weight of the norm, which has none.
    Classifier {
        ones: B::Vector,
        pooling: Vec<f32>,
        weight: B::Matrix,
        bias: Vec<f32>,
    },
}

/// Output projection, and the gate's weight and bias.
type Projections<'a, B> = (&'a <B as Backend>::Matrix, Option<&'a (<B as Backend>::Matrix, <B as Backend>::Vector)>);

/// Why a head cannot run.
#[derive(Debug, thiserror::Error)]
pub enum RunnerError {
    /// Its shape is out of bounds.
    #[error(transparent)]
    Shape(#[from] ShapeError),
    /// The device did not take it.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The rows of one sequence, and the head that runs on them.
pub struct HeadSlot<'a, B: Backend> {
    /// The head.
    pub runner: &'a Runner<B>,
    /// Rows; they follow what `table` holds.
    pub rows: usize,
    /// Where the head's keys and values of the sequence lie; it has pages for these rows too.
    pub table: &'a mut PageTable,
}

impl<B: Backend> Runner<B> {
    /// Packs the weights of `artifact`.
    ///
    /// # Errors
    /// A shape out of bounds; a device without room.
    pub fn new(artifact: &Artifact, backend: B) -> std::result::Result<Self, RunnerError> {
        Self::from_weights(&artifact.shape, &artifact.weights, backend)
    }

    /// Packs weights that are complete for `shape`.
    ///
    /// # Errors
    /// As for [`Runner::new`].
    pub fn from_weights(shape: &HeadShape, weights: &Weights, backend: B) -> std::result::Result<Self, RunnerError> {
        parameters::check(shape)?;
        let packer = Packer { weights, backend: &backend };
        let bridge = (0..shape.tap_widths().len()).map(|tap| packer.matrix(&[&format!("bridge.{tap}.weight")])).collect::<Result<_>>()?;
        let blocks = (0..shape.blocks).map(|index| packer.block(index)).collect::<Result<_>>()?;
        let last = match shape.task {
            Task::CausalLM => Last::Causal {
                output: packer.matrix(&["output.weight"])?,
                gate: match shape.gate {
                    true => Some((packer.matrix(&["gate.weight"])?, packer.vector("gate.bias")?)),
                    false => None,
                },
            },
            _ => Last::Classifier {
                ones: backend.vector(&vec![1.0; shape.width as usize])?,
                pooling: weights["pooling.weight"].values.floats().into_owned(),
                weight: packer.matrix(&["classifier.weight"])?,
                bias: weights["classifier.bias"].values.floats().into_owned(),
            },
        };
        Ok(Self { attention: HeadAttention::new(shape), bridge, blocks, last, shape: shape.clone(), backend })
    }

    /// The head's shape.
    pub fn shape(&self) -> &HeadShape {
        &self.shape
    }

    /// Bytes of the packed weights.
    pub fn bytes(&self) -> usize {
        let blocks = self.blocks.iter().flat_map(|block| [&block.qkv, &block.o, &block.gate_up, &block.down]);
        let last = match &self.last {
            Last::Causal { output, gate } => B::bytes(output) + gate.as_ref().map_or(0, |(weight, _)| B::bytes(weight)),
            Last::Classifier { weight, .. } => B::bytes(weight),
        };
        self.bridge.iter().chain(blocks).map(B::bytes).sum::<usize>() + last
    }

    /// What a page of its keys and values holds.
    pub fn page_layout(&self) -> PageLayout {
        page_layout(&self.shape)
    }

    /// Whether both can run in one call: their matrices have equal shapes and read the same taps.
    pub fn runs_with(&self, other: &Self) -> bool {
        let same = |shape: &HeadShape| HeadShape {
            format_version: 0,
            alpha: 0.0,
            max_length: None,
            pooled_tokens: None,
            split_special_tokens: true,
            labels: vec![String::new(); shape.labels.len()],
            ..shape.clone()
        };
        ptr::eq(self, other) || same(&self.shape) == same(&other.shape)
    }

    /// `g ⊙ Δ` without α, of heads for CausalLM that run together: `[outputs, D]`.
    ///
    /// `taps` holds one entry per tap of the heads, layers ascending and `final` last, those of further bases behind, each `[rows, D]`: the rows of all slots, one after the other.
    /// `outputs` names the rows (ascending) that are given an output.
    ///
    /// # Errors
    /// The device failed.
    pub fn forward(arena: &mut Arena<B>, taps: &[&B::Rows], slots: &mut [HeadSlot<'_, B>], outputs: &[u32]) -> Result<B::Rows> {
        let mut delta = B::Rows::default();
        let u = Self::hidden(arena, taps, slots)?;
        let Some(Self { backend, shape, .. }) = slots.first().map(|slot| slot.runner).filter(|_| !outputs.is_empty()) else {
            return Ok(delta);
        };
        let u = backend.tap(&u, Some(outputs), None, Dtype::Float32)?;
        let rows = rows_of(slots, outputs);
        let lasts: Vec<_> = slots.iter().zip(rows).filter_map(|(slot, rows)| Some((rows, slot.runner.causal()?))).collect();
        let left = || Left::Normed(&u, shape.norm_epsilon as f32);
        let parts: Vec<_> = lasts.iter().map(|(rows, (output, _))| Part { rows: *rows, matrix: *output, norm: None }).collect();
        backend.product(left(), &parts, Sink::Store(&mut delta))?;
        if shape.gate {
            let gates: Vec<_> = lasts.iter().filter_map(|(rows, (_, gate))| Some((*rows, (*gate)?))).collect();
            let parts: Vec<_> = gates.iter().map(|(rows, (weight, _))| Part { rows: *rows, matrix: weight, norm: None }).collect();
            let mut z = B::Rows::default();
            backend.product(left(), &parts, Sink::Store(&mut z))?;
            let biases: Vec<_> = gates.iter().map(|(rows, (_, bias))| (*rows, bias)).collect();
            backend.gate(&z, &biases, &mut delta)?;
        }
        Ok(delta)
    }

    /// `norm(u)` of classifiers that run together, `[rows, w]`, on the host: what [`Runner::classify`] takes, of all rows of a sequence.
    ///
    /// # Errors
    /// The device failed.
    pub fn features(arena: &mut Arena<B>, taps: &[&B::Rows], slots: &mut [HeadSlot<'_, B>]) -> Result<Vec<f32>> {
        let u = Self::hidden(arena, taps, slots)?;
        let Some(Self { backend, shape, last: Last::Classifier { ones, .. }, .. }) = slots.first().map(|slot| slot.runner) else {
            return Ok(Vec::new());
        };
        let features = backend.tap(&u, None, Some((ones, shape.norm_epsilon as f32)), Dtype::Float32)?;
        Ok(backend.read(&features)?.into_owned())
    }

    /// Logits of a classifier, one for each label (none for other heads), of one sequence whose features (rows × w) are whole.
    ///
    /// # Errors
    /// The device failed.
    pub fn classify(&self, features: &[f32]) -> Result<Vec<f32>> {
        let Last::Classifier { pooling, weight, bias, .. } = &self.last else { return Ok(Vec::new()) };
        let rows = features.len() / pooling.len();
        let pooled = self.shape.pooled(rows);
        let pooled = cpu::pool(&features[(rows - pooled) * pooling.len()..], pooling, &[pooled]);
        let mut logits = B::Rows::default();
        let part = Part { rows: 1, matrix: weight, norm: None };
        self.backend.product(Left::Plain(&self.backend.write(&pooled, pooling.len())?), &[part], Sink::Store(&mut logits))?;
        let mut logits = self.backend.read(&logits)?.into_owned();
        cpu::add(&mut logits, bias);
        Ok(logits)
    }

    /// None for a classifier.
    fn causal(&self) -> Option<Projections<'_, B>> {
        match &self.last {
            Last::Causal { output, gate } => Some((output, gate.as_ref())),
            Last::Classifier { .. } => None,
        }
    }

    /// `u = blocks(Σ_k B_k · norm(h_k))`, `[rows, w]`.
    fn hidden(arena: &mut Arena<B>, taps: &[&B::Rows], slots: &mut [HeadSlot<'_, B>]) -> Result<B::Rows> {
        let mut u = B::Rows::default();
        let Some(Self { backend, shape, attention, .. }) = slots.first().map(|slot| slot.runner) else { return Ok(u) };
        assert_eq!(taps.len(), shape.tap_widths().len(), "one entry per tap");
        let epsilon = shape.norm_epsilon as f32;
        for (index, &tap) in taps.iter().enumerate() {
            let parts = parts(slots, |runner| (&runner.bridge[index], None));
            let sink = if index == 0 { Sink::Store(&mut u) } else { Sink::Add(&mut u) };
            backend.product(Left::Normed(tap, epsilon), &parts, sink)?;
        }
        let positions: Vec<u32> =
            slots.iter().flat_map(|slot| slot.table.length..slot.table.length + slot.rows).map(|position| position as u32).collect();
        let (mut angles, mut qkv) = (B::Rows::default(), B::Rows::default());
        let (mut context, mut gated) = (B::Packed::default(), B::Packed::default());
        backend.angles(attention.rotation(), &positions, &mut angles)?;
        let mut spans = Vec::with_capacity(slots.len());
        for HeadSlot { rows, table, .. } in &*slots {
            spans.push(Span { rows: *rows, length: table.length + *rows, pages: &table.pages });
        }
        let places = backend.places(attention.attention(), &spans)?;
        for index in 0..shape.blocks as usize {
            let qkv_parts = parts(slots, |runner| (&runner.blocks[index].qkv, Some(&runner.blocks[index].input_norm)));
            backend.product(Left::Normed(&u, epsilon), &qkv_parts, Sink::Store(&mut qkv))?;
            backend.rotate(&mut qkv, 2 * attention.width, attention.head_dim(), &angles)?;
            arena.attend(backend, index, &qkv, (&qkv, attention.width), &places, &mut context)?;
            backend.product(Left::Packed(&context), &parts(slots, |runner| (&runner.blocks[index].o, None)), Sink::Add(&mut u))?;
            let wide = parts(slots, |runner| (&runner.blocks[index].gate_up, Some(&runner.blocks[index].post_attention_norm)));
            backend.product(Left::Normed(&u, epsilon), &wide, Sink::Gated(&mut gated, Activation::Silu))?;
            backend.product(Left::Packed(&gated), &parts(slots, |runner| (&runner.blocks[index].down, None)), Sink::Add(&mut u))?;
        }
        slots.iter_mut().for_each(|slot| slot.table.length += slot.rows);
        Ok(u)
    }
}

/// What a page of keys and values of a head of this shape holds.
pub fn page_layout(shape: &HeadShape) -> PageLayout {
    let (layers, heads) = (shape.blocks as usize, shape.heads as usize);
    PageLayout { layers, heads, head_dim: shape.width as usize / heads, latent: None, dtype: Dtype::Float32 }
}

/// The parts of a product: sequences of one head that follow each other meet its matrix together.
fn parts<'a, B: Backend>(
    slots: &[HeadSlot<'a, B>],
    weights: impl Fn(&'a Runner<B>) -> (&'a B::Matrix, Option<&'a B::Vector>),
) -> Vec<Part<'a, B>> {
    let same_head = slots.chunk_by(|one, next| ptr::eq(one.runner, next.runner));
    same_head
        .map(|slots| {
            let (matrix, norm) = weights(slots[0].runner);
            Part { rows: slots.iter().map(|slot| slot.rows).sum(), matrix, norm }
        })
        .collect()
}

/// How many of `outputs` belong to each slot.
fn rows_of<B: Backend>(slots: &[HeadSlot<'_, B>], outputs: &[u32]) -> Vec<usize> {
    let mut end = 0;
    let mut before = 0;
    let own = |slot: &HeadSlot<'_, B>| {
        end += slot.rows;
        let upto = outputs.partition_point(|row| (*row as usize) < end);
        upto - std::mem::replace(&mut before, upto)
    };
    slots.iter().map(own).collect()
}

struct Packer<'a, B> {
    weights: &'a Weights,
    backend: &'a B,
}

impl<B: Backend> Packer<'_, B> {
    fn vector(&self, name: &str) -> Result<B::Vector> {
        self.backend.vector(&self.weights[name].values.floats())
    }

    /// The matrices named, one below the other.
    fn matrix(&self, names: &[&str]) -> Result<B::Matrix> {
        let rows = names.iter().map(|name| self.weights[*name].shape[0]).sum();
        self.backend.matrix(rows, self.columns(names), Dtype::Float32.into(), &|row, values| self.row(names, row, values))
    }

    fn block(&self, index: u32) -> Result<Block<B>> {
        let name = |part: &str| format!("blocks.{index}.{part}.weight");
        let [q, k, v] = ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj")));
        let (gate, up) = (name("mlp.gate_proj"), name("mlp.up_proj"));
        let (wide, width) = (self.weights[&gate].shape[0], self.columns(&[&gate]));
        let fill = |row: usize, values: &mut [f32]| self.row(&[&gate, &up], row, values);
        Ok(Block {
            input_norm: self.vector(&name("input_layernorm"))?,
            qkv: self.matrix(&[&q, &k, &v])?,
            o: self.matrix(&[&name("self_attn.o_proj")])?,
            post_attention_norm: self.vector(&name("post_attention_layernorm"))?,
            gate_up: self.backend.gate_up(wide, width, Dtype::Float32.into(), &fill)?,
            down: self.matrix(&[&name("mlp.down_proj")])?,
        })
    }

    fn columns(&self, names: &[&str]) -> usize {
        self.weights[names[0]].shape[1]
    }

    /// Writes a row of the matrices named, one below the other.
    fn row(&self, names: &[&str], mut row: usize, values: &mut [f32]) {
        for name in names {
            let weight = &self.weights[*name];
            if row < weight.shape[0] {
                return weight.values.read(row * values.len(), values);
            }
            row -= weight.shape[0];
        }
    }
}
