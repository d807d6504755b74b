//! The decoder's weights, packed once for the matrix kernel.

use std::sync::Arc;

use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::error::ModelError;
use super::lm_head::LmHead;
use super::tensor::Tensor;
use crate::kernel::{Panels, Precision, Threads};

/// Gate and up outputs alternate in runs of this many, as [`crate::kernel::Sink::SwiGlu`] wants them.
const RUN: usize = 16;

/// One decoder layer.
pub struct Layer {
    /// Weight of the norm before attention (D).
    pub input_norm: Vec<f32>,
    /// Queries, keys and values in one: (heads + 2 · key/value heads) · head_dim × D.
    pub query_key_value: Panels,
    /// D × heads · head_dim.
    pub output: Panels,
    /// Weight of the norm before the feed-forward layer (D).
    pub feed_forward_norm: Vec<f32>,
    /// Gate and up in runs of 16: 2 · padded feed-forward width × D.
    pub gate_up: Panels,
    /// D × padded feed-forward width.
    pub down: Panels,
}

/// All weights of a model.
pub struct Weights {
    /// Decoder layers.
    pub layers: Vec<Layer>,
    /// Weight of the final norm (D).
    pub final_norm: Vec<f32>,
    /// The LM head; also the embedding when they are tied.
    pub lm_head: LmHead,
    /// The embedding (V × D) when it is not the LM head.
    pub embedding: Option<Panels>,
}

impl Weights {
    /// Reads and packs all tensors of `checkpoint`.
    ///
    /// # Errors
    /// When a tensor is missing, damaged or not of the shape that `config` asks for.
    pub fn load(checkpoint: &Checkpoint, config: &ModelConfig, precision: Precision, threads: &Arc<Threads>) -> Result<Self, ModelError> {
        let packer = Packer { checkpoint, config, precision, threads };
        // Layers are pushed as they are read: a made-up number of layers ends at the first that is missing.
        let mut layers = Vec::new();
        for index in 0..config.num_hidden_layers {
            layers.push(packer.layer(index)?);
        }
        let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
        let embedding = packer.matrix("model.embed_tokens.weight", vocabulary, hidden)?;
        let (lm_head, embedding) = match config.tie_word_embeddings {
            true => (embedding, None),
            false => (packer.matrix("lm_head.weight", vocabulary, hidden)?, Some(embedding)),
        };
        let final_norm = packer.vector("model.norm.weight", hidden)?;
        checkpoint.refuse_unused(config)?;
        Ok(Self { layers, final_norm, lm_head: LmHead::new(lm_head, threads.clone()), embedding })
    }

    /// Writes the embedding of `token` (D values).
    pub fn embed(&self, token: u32, values: &mut [f32]) {
        self.embedding.as_ref().unwrap_or(self.lm_head.forward()).row(token as usize, values);
    }
}

struct Packer<'a> {
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    precision: Precision,
    threads: &'a Arc<Threads>,
}

impl Packer<'_> {
    fn layer(&self, index: usize) -> Result<Layer, ModelError> {
        let config = self.config;
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        let tensor = |part: &str, rows, cols| self.checkpoint.tensor(&name(part), rows, cols, config);

        let parts = [
            tensor("self_attn.q_proj", queries, hidden)?,
            tensor("self_attn.k_proj", keys, hidden)?,
            tensor("self_attn.v_proj", keys, hidden)?,
        ];
        let query_key_value = self.pack(queries + 2 * keys, hidden, |mut row, values| {
            for part in &parts {
                if row < part.rows {
                    return part.row(row, values);
                }
                row -= part.rows;
            }
        });
        let (gate, up) = (tensor("mlp.gate_proj", wide, hidden)?, tensor("mlp.up_proj", wide, hidden)?);
        let padded = wide.next_multiple_of(RUN);
        let gate_up = self.pack(2 * padded, hidden, |row, values| {
            let (part, row) = (if row % (2 * RUN) < RUN { &gate } else { &up }, row / (2 * RUN) * RUN + row % RUN);
            if row < wide { part.row(row, values) } else { values.fill(0.0) }
        });
        let down = tensor("mlp.down_proj", hidden, wide)?;
        Ok(Layer {
            input_norm: self.vector(&name("input_layernorm"), hidden)?,
            query_key_value,
            output: self.matrix(&name("self_attn.o_proj"), hidden, queries)?,
            feed_forward_norm: self.vector(&name("post_attention_layernorm"), hidden)?,
            gate_up,
            down: self.pack(hidden, padded, |row, values| {
                down.row(row, &mut values[..wide]);
                values[wide..].fill(0.0);
            }),
        })
    }

    fn pack(&self, rows: usize, cols: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Panels {
        Panels::from_rows(rows, cols, self.precision, self.threads, fill)
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<Panels, ModelError> {
        let tensor: Tensor = self.checkpoint.tensor(name, rows, cols, self.config)?;
        Ok(self.pack(rows, cols, |row, values| tensor.row(row, values)))
    }

    fn vector(&self, name: &str, length: usize) -> Result<Vec<f32>, ModelError> {
        Ok(self.checkpoint.tensor(name, 1, length, self.config)?.vector())
    }
}
