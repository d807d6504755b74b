//! The forward pass: one decoder with taps for all families.

use std::ops::ControlFlow;
use std::sync::Mutex;

use carryon_crds::common::Taps;

use super::config::ModelConfig;
use super::kv::Kv;
use super::weights::{Layer, Weights};
use crate::kernel::{self, Attention, Left, Precision, Rotation, Sink, Span, Threads, attend, product, words};

/// Rows of a block of the row operations.
const BLOCK_ROWS: usize = 32;

/// Tokens of one sequence, which continue what `kv` holds.
pub struct Slot<'a> {
    /// Token ids, each below the vocabulary's size.
    pub tokens: &'a [u32],
    /// Keys and values of the sequence so far; the new ones are appended.
    pub kv: &'a mut Kv,
}

/// Hidden states at the taps of a forward pass.
pub struct States {
    /// Rows: the tokens of all slots, one slot after the other.
    pub rows: usize,
    /// One entry per tap, layers in the order asked for, `final` last; each rows × D, rounded once to the pool's dtype.
    pub taps: Vec<Vec<f32>>,
}

/// The buffers of one forward pass, kept for the next.
#[derive(Default)]
struct Scratch {
    /// Residual stream, rows × D.
    residual: Vec<f32>,
    /// Queries, keys and values, rows × (heads + 2 · key/value heads) · head_dim.
    query_key_value: Vec<f32>,
    /// Output of attention, packed.
    context: Vec<u32>,
    /// Output of gate and up, packed.
    gated: Vec<u32>,
    /// Cosines, then sines, of each row's position, rows × head_dim.
    rotation: Vec<f32>,
}

/// Shape and constants of the pass, and its spare buffers.
pub struct Decoder {
    precision: Precision,
    rotation: Rotation,
    attention: Attention,
    spare: Mutex<Vec<Scratch>>,
}

impl Decoder {
    pub fn new(config: &ModelConfig, precision: Precision) -> Self {
        let attention =
            Attention { heads: config.num_attention_heads, scale: 1.0 / (config.head_dim as f32).sqrt(), window: config.sliding_window };
        Self { precision, rotation: Rotation::new(config.rope_theta, config.head_dim), attention, spare: Mutex::default() }
    }

    /// See [`super::Model::forward`].
    pub fn forward(
        &self,
        pass: Pass<'_>,
        slots: &mut [Slot<'_>],
        taps: &Taps,
        pause: &mut dyn FnMut() -> ControlFlow<()>,
    ) -> Option<States> {
        let starts: Vec<usize> = slots.iter().map(|slot| slot.kv.len()).collect();
        let mut scratch = self.spare.lock().map_or_else(|_| Scratch::default(), |mut spare| spare.pop().unwrap_or_default());
        let states = self.layers(&pass, slots, taps, pause, &mut scratch);
        if let Ok(mut spare) = self.spare.lock() {
            spare.push(scratch);
        }
        if states.is_none() {
            // Some layers have the new positions, some have not.
            slots.iter_mut().zip(starts).for_each(|(slot, start)| slot.kv.truncate(start));
        }
        states
    }

    fn layers(
        &self,
        pass: &Pass<'_>,
        slots: &mut [Slot<'_>],
        taps: &Taps,
        pause: &mut dyn FnMut() -> ControlFlow<()>,
        scratch: &mut Scratch,
    ) -> Option<States> {
        let rows = self.embed(pass, slots, scratch);
        let mut states = States { rows, taps: vec![Vec::new(); taps.count()] };
        self.tap(pass, 0, taps, scratch, &mut states);
        for (index, layer) in pass.weights.layers.iter().enumerate() {
            if index > 0 && pause().is_break() {
                return None;
            }
            self.attention(pass, index, layer, slots, rows, scratch);
            self.feed_forward(pass, layer, rows, scratch);
            self.tap(pass, index + 1, taps, scratch, &mut states);
        }
        if let Some(target) = states.taps.last_mut().filter(|_| taps.final_norm) {
            let (hidden, epsilon) = (pass.config.hidden_size, pass.config.rms_norm_eps);
            target.resize(rows * hidden, 0.0);
            pass.threads.for_rows(target, hidden, BLOCK_ROWS, |first, block| {
                kernel::rms_norm(&scratch.residual[first * hidden..][..block.len()], &pass.weights.final_norm, epsilon, block);
                self.round(block);
            });
        }
        Some(states)
    }

    /// Fills the residual stream and the rotations; returns the number of rows.
    fn embed(&self, pass: &Pass<'_>, slots: &[Slot<'_>], scratch: &mut Scratch) -> usize {
        let config = pass.config;
        let (hidden, half) = (config.hidden_size, config.head_dim / 2);
        let place = |slot: &Slot<'_>| (0..slot.tokens.len()).map(|index| slot.kv.len() + index).collect::<Vec<_>>();
        let positions: Vec<usize> = slots.iter().flat_map(place).collect();
        let tokens: Vec<u32> = slots.iter().flat_map(|slot| slot.tokens).copied().collect();
        let rows = tokens.len();
        scratch.residual.resize(rows * hidden, 0.0);
        scratch.rotation.resize(rows * 2 * half, 0.0);
        scratch.query_key_value.resize(rows * pass.weights.layers[0].query_key_value.rows(), 0.0);
        scratch.context.resize(rows * words(self.precision, config.num_attention_heads * config.head_dim), 0);
        scratch.gated.resize(rows * words(self.precision, pass.weights.layers[0].down.cols()), 0);
        pass.threads.for_rows(&mut scratch.residual, hidden, BLOCK_ROWS, |first, block| {
            for (token, row) in tokens[first..].iter().zip(block.chunks_exact_mut(hidden)) {
                pass.weights.embed(*token, row);
            }
        });
        pass.threads.for_rows(&mut scratch.rotation, 2 * half, BLOCK_ROWS, |first, block| {
            for (position, row) in positions[first..].iter().zip(block.chunks_exact_mut(2 * half)) {
                let (cosine, sine) = row.split_at_mut(half);
                self.rotation.at(*position, cosine, sine);
            }
        });
        rows
    }

    /// `residual += output(attention(norm(residual)))`.
    fn attention(&self, pass: &Pass<'_>, index: usize, layer: &Layer, slots: &mut [Slot<'_>], rows: usize, scratch: &mut Scratch) {
        let config = pass.config;
        let (width, keys) = (layer.query_key_value.rows(), config.num_key_value_heads * config.head_dim);
        let queries = width - 2 * keys;
        let normed = Left::Normed(&scratch.residual, &layer.input_norm, config.rms_norm_eps);
        product(pass.threads, rows, normed, &layer.query_key_value, Sink::Store(&mut scratch.query_key_value));

        let (half, rotation) = (config.head_dim / 2, &scratch.rotation);
        pass.threads.for_rows(&mut scratch.query_key_value, width, BLOCK_ROWS, |first, block| {
            for (row, rotation) in block.chunks_exact_mut(width).zip(rotation[first * 2 * half..].chunks_exact(2 * half)) {
                kernel::rope(&mut row[..queries + keys], &rotation[..half], &rotation[half..]);
            }
        });
        let mut first = 0;
        for slot in slots.iter_mut() {
            let rows = &scratch.query_key_value[first * width..];
            let row = |index: usize| rows[index * width + queries..][..2 * keys].split_at(keys);
            slot.kv.layer_mut(index).append(pass.threads, slot.tokens.len(), row);
            first += slot.tokens.len();
        }
        let spans: Vec<Span<'_>> = slots.iter().map(|slot| Span { rows: slot.tokens.len(), cache: slot.kv.layer(index) }).collect();
        attend(pass.threads, self.attention, &scratch.query_key_value, width, &spans, &mut scratch.context);
        product(pass.threads, rows, Left::Packed(&scratch.context), &layer.output, Sink::Add(&mut scratch.residual));
    }

    /// `residual += down(silu(gate(norm(residual))) · up(norm(residual)))`.
    fn feed_forward(&self, pass: &Pass<'_>, layer: &Layer, rows: usize, scratch: &mut Scratch) {
        let normed = Left::Normed(&scratch.residual, &layer.feed_forward_norm, pass.config.rms_norm_eps);
        product(pass.threads, rows, normed, &layer.gate_up, Sink::SwiGlu(&mut scratch.gated));
        product(pass.threads, rows, Left::Packed(&scratch.gated), &layer.down, Sink::Add(&mut scratch.residual));
    }

    /// Copies the residual stream where `layer` is tapped.
    fn tap(&self, pass: &Pass<'_>, layer: usize, taps: &Taps, scratch: &Scratch, states: &mut States) {
        let hidden = pass.config.hidden_size;
        for (target, _) in states.taps.iter_mut().zip(&taps.layers).filter(|(_, tapped)| **tapped as usize == layer) {
            target.resize(states.rows * hidden, 0.0);
            pass.threads.for_rows(target, hidden, BLOCK_ROWS, |first, block| {
                block.copy_from_slice(&scratch.residual[first * hidden..][..block.len()]);
                self.round(block);
            });
        }
    }

    fn round(&self, values: &mut [f32]) {
        if self.precision == Precision::Bf16 {
            kernel::round_bf16(values);
        }
    }
}

/// What every step of a forward pass reads.
pub struct Pass<'a> {
    pub config: &'a ModelConfig,
    pub weights: &'a Weights,
    pub threads: &'a Threads,
}
