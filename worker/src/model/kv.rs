//! Keys and values of one sequence in all layers.

use crate::kernel::{KeyValues, Precision};

use super::config::ModelConfig;

/// The cache of one sequence.
#[derive(Clone)]
pub struct Kv {
    layers: Vec<KeyValues>,
    /// One layer's cache, emptied for each: enough for a sequence that comes in one pass and is not continued.
    single_pass: bool,
}

impl Kv {
    pub(super) fn new(config: &ModelConfig, precision: Precision) -> Self {
        let layer = KeyValues::new(config.num_key_value_heads, config.head_dim, precision);
        Self { layers: vec![layer; config.num_hidden_layers], single_pass: false }
    }

    pub(super) fn single_pass(config: &ModelConfig, precision: Precision) -> Self {
        Self { layers: vec![KeyValues::new(config.num_key_value_heads, config.head_dim, precision)], single_pass: true }
    }

    /// Positions held: the next token's position.
    pub fn len(&self) -> usize {
        if self.single_pass { 0 } else { self.layers[0].len() }
    }

    /// Whether no position is held.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Forgets all positions from `length` on.
    pub fn truncate(&mut self, length: usize) {
        self.layers.iter_mut().for_each(|layer| layer.truncate(length));
    }

    /// Bytes of memory in use.
    pub fn bytes(&self) -> usize {
        self.layers.iter().map(KeyValues::bytes).sum()
    }

    /// Bytes that `positions` positions take.
    pub fn bytes_for(&self, positions: usize) -> usize {
        self.layers.iter().map(|layer| layer.bytes_for(positions)).sum()
    }

    /// The cache of layer `index`, ready for appending.
    pub(super) fn layer_mut(&mut self, index: usize) -> &mut KeyValues {
        if self.single_pass {
            self.layers[0].truncate(0);
            return &mut self.layers[0];
        }
        &mut self.layers[index]
    }

    /// The cache of layer `index`.
    pub(super) fn layer(&self, index: usize) -> &KeyValues {
        &self.layers[if self.single_pass { 0 } else { index }]
    }
}
