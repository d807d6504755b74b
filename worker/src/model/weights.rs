//! The decoder's weights, packed once for the device.

use carryon_crds::pool::Dtype;

use super::checkpoint::Checkpoint;
use super::config::ModelConfig;
use super::error::ModelError;
use super::lm_head::LmHead;
use crate::kernel::Backend;

/// One decoder layer.
pub struct Layer<B: Backend> {
    /// Weight of the norm before attention (D).
    pub input_norm: B::Vector,
    /// Queries, keys and values in one: (heads + 2 · key/value heads) · head_dim × D.
    pub query_key_value: B::Matrix,
    /// D × heads · head_dim.
    pub output: B::Matrix,
    /// Weight of the norm before the feed-forward layer (D).
    pub feed_forward_norm: B::Vector,
    /// Gate and up, feed-forward width × D each.
    pub gate_up: B::Matrix,
    /// D × feed-forward width.
    pub down: B::Matrix,
}

/// All weights of a model.
pub struct Weights<B: Backend> {
    /// Decoder layers.
    pub layers: Vec<Layer<B>>,
    /// Weight of the final norm (D).
    pub final_norm: B::Vector,
    /// The LM head; also the embedding when they are tied.
    pub lm_head: LmHead<B>,
    /// The embedding (V × D) when it is not the LM head.
    embedding: Option<B::Matrix>,
}

impl<B: Backend> Weights<B> {
    /// Reads and packs all tensors of `checkpoint`.
    ///
    /// # Errors
    /// When a tensor is missing, damaged or not of the shape that `config` asks for; when the device has no room for it.
    pub fn load(backend: &B, checkpoint: &Checkpoint, config: &ModelConfig, dtype: Dtype) -> Result<Self, ModelError> {
        let packer = Packer { backend, checkpoint, config, dtype };
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
        Ok(Self { layers, final_norm, lm_head: LmHead::new(backend, lm_head, dtype)?, embedding })
    }

    /// The embedding, V × D.
    pub fn embedding(&self) -> &B::Matrix {
        self.embedding.as_ref().unwrap_or(self.lm_head.forward())
    }
}

struct Packer<'a, B> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    dtype: Dtype,
}

impl<B: Backend> Packer<'_, B> {
    fn layer(&self, index: usize) -> Result<Layer<B>, ModelError> {
        let config = self.config;
        let name = |part: &str| format!("model.layers.{index}.{part}.weight");
        let (hidden, wide) = (config.hidden_size, config.intermediate_size);
        let (queries, keys) = (config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim);
        Ok(Layer {
            input_norm: self.vector(&name("input_layernorm"), hidden)?,
            query_key_value: self.stacked(
                &[(&name("self_attn.q_proj"), queries), (&name("self_attn.k_proj"), keys), (&name("self_attn.v_proj"), keys)],
                hidden,
                B::matrix,
                queries + 2 * keys,
            )?,
            output: self.matrix(&name("self_attn.o_proj"), hidden, queries)?,
            feed_forward_norm: self.vector(&name("post_attention_layernorm"), hidden)?,
            gate_up: self.stacked(&[(&name("mlp.gate_proj"), wide), (&name("mlp.up_proj"), wide)], hidden, B::gate_up, wide)?,
            down: self.matrix(&name("mlp.down_proj"), hidden, wide)?,
        })
    }

    /// Tensors of `cols` columns and the rows named, one below the other.
    fn stacked(&self, parts: &[(&str, usize)], cols: usize, pack: Pack<B>, rows: usize) -> Result<B::Matrix, ModelError> {
        let mut tensors = Vec::new();
        for (name, rows) in parts {
            tensors.push(self.checkpoint.tensor(name, *rows, cols, self.config)?);
        }
        let fill = |mut row: usize, values: &mut [f32]| {
            for tensor in &tensors {
                if row < tensor.rows {
                    return tensor.row(row, values);
                }
                row -= tensor.rows;
            }
        };
        Ok(pack(self.backend, rows, cols, self.dtype, &fill)?)
    }

    fn matrix(&self, name: &str, rows: usize, cols: usize) -> Result<B::Matrix, ModelError> {
        self.stacked(&[(name, rows)], cols, B::matrix, rows)
    }

    fn vector(&self, name: &str, length: usize) -> Result<B::Vector, ModelError> {
        Ok(self.backend.vector(&self.checkpoint.tensor(name, 1, length, self.config)?.vector())?)
    }
}

/// [`Backend::matrix`] or [`Backend::gate_up`].
type Pack<B> = fn(&B, usize, usize, Dtype, crate::kernel::Fill<'_>) -> crate::kernel::Result<<B as Backend>::Matrix>;
