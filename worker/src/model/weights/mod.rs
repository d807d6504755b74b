//! The decoder's weights, packed once for the device.

mod attention;
mod feed_forward;
mod packer;

use super::checkpoint::Checkpoint;
use super::config::{LayerConfig, ModelConfig, Norms};
use super::error::ModelError;
use super::families::{EMBEDDING, FINAL_NORM, LM_HEAD, Name};
use super::lm_head::LmHead;
use crate::kernel::{Backend, Stored};
pub use attention::{GroupedProjection, LatentProjection, Projection};
pub use feed_forward::{Experts, FeedForward, Gated};
use packer::Packer;
pub use packer::TensorName;
use packer::full;

/// One decoder layer. Norms that the layer has not are absent.
pub struct Layer<B: Backend> {
    /// Weight of the norm before attention (D).
    pub input_norm: Option<B::Vector>,
    /// What makes queries, keys and values.
    pub projection: Projection<B>,
    /// D × heads · values of a head.
    pub output: B::Matrix,
    /// Bias of the output (D).
    pub output_bias: Option<B::Vector>,
    /// Weight of the norm behind attention (D).
    pub attention_norm: Option<B::Vector>,
    /// Weight of the norm before the feed-forward layer (D).
    pub feed_forward_norm: Option<B::Vector>,
    /// What stands behind that norm.
    pub feed_forward: FeedForward<B>,
    /// Weight of the norm behind the feed-forward layer (D).
    pub down_norm: Option<B::Vector>,
}

impl<B: Backend> Layer<B> {
    fn matrices(&self) -> impl Iterator<Item = &B::Matrix> {
        self.projection.matrices().chain([&self.output]).chain(self.feed_forward.matrices())
    }
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
    pub fn load(backend: &B, checkpoint: &Checkpoint, config: &ModelConfig, stored: Stored) -> Result<Self, ModelError> {
        let packer = Packer { backend, checkpoint, config, stored };
        // Layers are pushed as they are read: a made-up number of layers ends at the first that is missing.
        let mut layers = Vec::new();
        for (index, layer) in config.layers.iter().enumerate() {
            layers.push(packer.layer(index, layer)?);
        }
        let (hidden, vocabulary) = (config.hidden_size, config.vocab_size);
        let embedding = packer.matrix(&full(EMBEDDING, "weight"), vocabulary, hidden)?;
        let (lm_head, embedding) = match config.tie_word_embeddings {
            true => (embedding, None),
            false => (packer.matrix(&full(LM_HEAD, "weight"), vocabulary, hidden)?, Some(embedding)),
        };
        let final_norm = packer.norm(&full(FINAL_NORM, "weight"), hidden)?;
        checkpoint.refuse_unused(config)?;
        Ok(Self { layers, final_norm, lm_head: LmHead::new(backend, lm_head, stored.products(), config.logit_softcap)?, embedding })
    }

    /// Bytes of all matrices; what belongs to single heads, and vectors, are few.
    pub fn bytes(&self) -> usize {
        let heads = [self.lm_head.forward(), self.lm_head.backward()];
        let all = self.layers.iter().flat_map(Layer::matrices).chain(heads).chain(&self.embedding);
        all.map(B::bytes).sum()
    }

    /// The embedding, V × D.
    pub fn embedding(&self) -> &B::Matrix {
        self.embedding.as_ref().unwrap_or(self.lm_head.forward())
    }
}

impl<B: Backend> Packer<'_, B> {
    fn layer(&self, index: usize, LayerConfig { attention, feed_forward, norms }: &LayerConfig) -> Result<Layer<B>, ModelError> {
        let (names, hidden) = (&self.config.names, self.config.hidden_size);
        let name = |of: Name, what: &str| packer::of_layer(index, of, what);
        let norm = |wanted: bool, of: Name| if wanted { self.norm(&name(of, "weight"), hidden).map(Some) } else { Ok(None) };
        let (before, behind) = (*norms != Norms::Post, *norms != Norms::Pre);
        Ok(Layer {
            input_norm: norm(before, names.input_norm)?,
            projection: self.projection(index, attention)?,
            output: self.matrix(&name(names.output, "weight"), hidden, attention.heads * attention.value_dim())?,
            output_bias: match attention.output_bias {
                true => Some(self.backend.vector(&self.values(&name(names.output, "bias"), hidden)?)?),
                false => None,
            },
            attention_norm: norm(behind, names.attention_norm)?,
            feed_forward_norm: norm(before, names.feed_forward_norm)?,
            feed_forward: self.feed_forward(index, feed_forward)?,
            down_norm: norm(behind, names.down_norm)?,
        })
    }
}
