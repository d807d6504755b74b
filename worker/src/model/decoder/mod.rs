//! The forward pass: one decoder with taps for all families, on any device.

mod attention;
mod feed_forward;

use std::ops::ControlFlow;
use std::sync::Mutex;

use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use half::bf16;

use super::Model;
use super::config::{AttentionConfig, ModelConfig, RotationConfig};
use crate::kernel::{Arena, Attention, Backend, Left, PageTable, Part, Result, Rotation, Sink, Span};

/// Tokens of one sequence, which continue what `kv` holds.
pub struct Slot<'a> {
    /// Token ids, each below the vocabulary's size.
    pub tokens: &'a [u32],
    /// Its page table, which has pages for these tokens too.
    pub kv: &'a mut PageTable,
}

/// A place where hidden states are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tap {
    /// Output of this layer; 0 is the embedding.
    Layer(u32),
    /// After the final norm: what the LM head sees.
    Final,
}

impl Tap {
    /// These taps in the order in which heads read them: layers as they stand, the final norm last.
    pub fn all(taps: &Taps) -> impl Iterator<Item = Self> {
        taps.layers.iter().map(|layer| Self::Layer(*layer)).chain(taps.final_norm.then_some(Self::Final))
    }
}

/// Rows that are read at a tap, all when none are named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Capture {
    /// Where.
    pub tap: Tap,
    /// Which rows of the pass.
    pub rows: Option<Vec<u32>>,
}

/// How a pass is run.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    /// Rows of a layer that are run together at most.
    pub piece_rows: usize,
    /// What is read.
    pub captures: &'a [Capture],
}

/// What is made of the states: index of the capture, the first of the rows that they belong to, and the states, rounded once to the pool's number
/// type. A pass that runs in pieces calls it once for each.
pub type States<'a, B> = &'a mut dyn FnMut(usize, usize, <B as Backend>::Rows) -> Result<()>;

/// Called between two pieces of a layer with the rows of the one that has run; when it breaks, the pass ends unfinished.
pub type Pause<'a> = &'a mut dyn FnMut(usize) -> Result<ControlFlow<()>>;

/// Constants of the pass, and its spare buffers.
pub struct Decoder<B: Backend> {
    /// Ways in which layers attend.
    ways: Vec<Way>,
    /// The way of each layer.
    way_of: Vec<usize>,
    spare: Mutex<Vec<Scratch<B>>>,
}

/// What layers have in common that see as far and rotate alike.
#[derive(PartialEq)]
struct Way {
    attention: Attention,
    rotation: Option<Rotation>,
}

/// The buffers of one forward pass, kept for the next: another pass may run between two pieces of one.
struct Scratch<B: Backend> {
    pieces: Vec<Buffers<B>>,
    attention: attention::Scratch<B>,
    /// Output of gate and up.
    gated: B::Packed,
    /// What is normed before it is added.
    added: B::Rows,
}

/// The buffers of one piece.
struct Buffers<B: Backend> {
    /// Residual stream, rows × D.
    residual: B::Rows,
    /// For each way, where keys and values lie, and the angles of each row's position.
    ways: Vec<(B::Places, B::Rows)>,
}

/// Some rows of a pass, which go through a layer together.
struct Piece {
    first: usize,
    rows: usize,
    /// Slot, rows of it, and its positions up to the last of them.
    spans: Vec<(usize, usize, usize)>,
}

impl<B: Backend> Decoder<B> {
    pub fn new(config: &ModelConfig) -> Self {
        let (mut ways, mut way_of): (Vec<Way>, Vec<usize>) = (Vec::new(), Vec::new());
        for AttentionConfig { heads, scale, window, softcap, rotation, .. } in config.layers.iter().map(|layer| &layer.attention) {
            let attention = Attention { heads: *heads, scale: *scale, window: *window, softcap: *softcap };
            let way = Way { attention, rotation: rotation.as_ref().map(RotationConfig::rotation) };
            way_of.push(ways.iter().position(|known| *known == way).unwrap_or_else(|| {
                ways.push(way);
                ways.len() - 1
            }));
        }
        Self { ways, way_of, spare: Mutex::default() }
    }

    /// See [`Model::run`].
    pub fn run(
        &self,
        model: &Model<B>,
        arena: &mut Arena<B>,
        slots: &mut [Slot<'_>],
        plan: Plan<'_>,
        states: States<'_, B>,
        pause: Pause<'_>,
    ) -> Result<ControlFlow<()>> {
        let mut scratch = self.spare.lock().map_or_else(|_| Scratch::default(), |mut spare| spare.pop().unwrap_or_default());
        let pieces = pieces(slots, plan.piece_rows);
        scratch.pieces.resize_with(scratch.pieces.len().max(pieces.len()), Buffers::default);
        let mut pass = Pass { decoder: self, model, arena, slots, captures: plan.captures };
        let flow = pass.layers(&pieces, &mut scratch, states, pause)?;
        if let Ok(mut spare) = self.spare.lock() {
            spare.push(scratch);
        }
        if flow.is_continue() {
            slots.iter_mut().for_each(|slot| slot.kv.length += slot.tokens.len());
        }
        Ok(flow)
    }
}

/// Cuts the rows of all slots, one slot after the other, into pieces of at most `most` rows.
fn pieces(slots: &[Slot<'_>], most: usize) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::new();
    let mut first = 0;
    for (index, slot) in slots.iter().enumerate() {
        let mut done = 0;
        while done < slot.tokens.len() {
            let piece = match pieces.last_mut() {
                Some(piece) if piece.rows < most => piece,
                _ => pieces.push_mut(Piece { first, rows: 0, spans: Vec::new() }),
            };
            let rows = (most - piece.rows).min(slot.tokens.len() - done);
            (piece.rows, first, done) = (piece.rows + rows, first + rows, done + rows);
            piece.spans.push((index, rows, slot.kv.length + done));
        }
    }
    pieces
}

/// A pass and what all of its steps read.
struct Pass<'a, 's, B: Backend> {
    decoder: &'a Decoder<B>,
    model: &'a Model<B>,
    arena: &'a mut Arena<B>,
    slots: &'a [Slot<'s>],
    captures: &'a [Capture],
}

impl<B: Backend> Pass<'_, '_, B> {
    fn layers(&mut self, pieces: &[Piece], scratch: &mut Scratch<B>, states: States<'_, B>, pause: Pause<'_>) -> Result<ControlFlow<()>> {
        let Scratch { pieces: buffers, attention, gated, added } = scratch;
        for (piece, buffers) in pieces.iter().zip(&mut *buffers) {
            self.embed(piece, buffers)?;
            self.tap(Tap::Layer(0), piece, buffers, states)?;
        }
        let mut ran = None;
        for (index, layer) in self.model.weights.layers.iter().enumerate() {
            for (piece, buffers) in pieces.iter().zip(&mut *buffers) {
                if let Some(rows) = ran.replace(piece.rows)
                    && pause(rows)?.is_break()
                {
                    return Ok(ControlFlow::Break(()));
                }
                self.attend(index, layer, piece.rows, buffers, attention)?;
                self.add(&layer.output, &attention.context, layer.attention_norm.as_ref(), buffers, added)?;
                if let Some(bias) = &layer.output_bias {
                    self.model.backend.add_bias(&mut buffers.residual, bias)?;
                }
                self.feed_forward(index, layer, piece.rows, buffers, gated, added)?;
                self.tap(Tap::Layer(index as u32 + 1), piece, buffers, states)?;
            }
        }
        for (piece, buffers) in pieces.iter().zip(&*buffers) {
            self.tap(Tap::Final, piece, buffers, states)?;
        }
        Ok(ControlFlow::Continue(()))
    }

    /// Fills the residual stream, places and angles.
    fn embed(&self, piece: &Piece, buffers: &mut Buffers<B>) -> Result<()> {
        let (mut tokens, mut positions) = (Vec::with_capacity(piece.rows), Vec::with_capacity(piece.rows));
        for (slot, rows, length) in &piece.spans {
            let slot = &self.slots[*slot];
            tokens.extend_from_slice(&slot.tokens[length - rows - slot.kv.length..length - slot.kv.length]);
            positions.extend((length - rows..*length).map(|position| position as u32));
        }
        let (backend, scale) = (&self.model.backend, self.model.config.embedding_scale);
        // A pool of bf16 scales by what bf16 holds, as the families that scale were trained.
        let scale = if self.model.dtype == Dtype::Bfloat16 { bf16::from_f32(scale).to_f32() } else { scale };
        backend.embed(self.model.weights.embedding(), &tokens, scale, &mut buffers.residual)?;
        let span = |(slot, rows, length): &(usize, usize, usize)| Span { rows: *rows, length: *length, pages: &self.slots[*slot].kv.pages };
        let spans: Vec<_> = piece.spans.iter().map(span).collect();
        buffers.ways.clear();
        for Way { attention, rotation } in &self.decoder.ways {
            let mut angles = B::Rows::default();
            if let Some(rotation) = rotation {
                backend.angles(rotation, &positions, &mut angles)?;
            }
            buffers.ways.push((backend.places(*attention, &spans)?, angles));
        }
        Ok(())
    }

    /// `residual += norm(matrix(packed))`, without the norm where there is none.
    fn add(
        &self,
        matrix: &B::Matrix,
        packed: &B::Packed,
        norm: Option<&B::Vector>,
        buffers: &mut Buffers<B>,
        added: &mut B::Rows,
    ) -> Result<()> {
        let backend = &self.model.backend;
        let part = [Part { rows: B::count(&buffers.residual), matrix, norm: None }];
        let Some(norm) = norm else {
            return backend.product(Left::Packed(packed), &part, Sink::Add(&mut buffers.residual));
        };
        backend.product(Left::Packed(packed), &part, Sink::Store(added))?;
        backend.add_normed(&mut buffers.residual, added, norm, self.model.config.rms_norm_eps)
    }

    /// Hands the residual stream over where `tap` is captured.
    fn tap(&self, tap: Tap, piece: &Piece, buffers: &Buffers<B>, states: States<'_, B>) -> Result<()> {
        let norm = (tap == Tap::Final).then_some((&self.model.weights.final_norm, self.model.config.rms_norm_eps));
        for (index, capture) in self.captures.iter().enumerate().filter(|(_, capture)| capture.tap == tap) {
            let own = |row: &u32| (*row as usize).checked_sub(piece.first).filter(|row| *row < piece.rows).map(|row| row as u32);
            let which = capture.rows.as_ref().map(|rows| rows.iter().filter_map(own).collect::<Vec<_>>());
            if which.as_ref().is_none_or(|which| !which.is_empty()) {
                states(index, piece.first, self.model.backend.tap(&buffers.residual, which.as_deref(), norm, self.model.dtype)?)?;
            }
        }
        Ok(())
    }
}

/// Rows that go through a norm where there is one.
fn left<'a, B: Backend>(rows: &'a B::Rows, norm: Option<&B::Vector>, epsilon: f32) -> Left<'a, B> {
    if norm.is_some() { Left::Normed(rows, epsilon) } else { Left::Plain(rows) }
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        Self { pieces: Vec::new(), attention: attention::Scratch::default(), gated: B::Packed::default(), added: B::Rows::default() }
    }
}

impl<B: Backend> Default for Buffers<B> {
    fn default() -> Self {
        Self { residual: B::Rows::default(), ways: Vec::new() }
    }
}
