//! What a checkpoint says of its architecture: sizes and constants of a decoder, layer by layer.

mod checks;
mod keys;
mod metadata;
mod rotation;

use std::path::Path;

use super::checkpoint::Files;
use super::error::ModelError;
use super::families::{self, Names};
use crate::kernel::Activation;

pub use checks::checked_layers;
pub use keys::Keys;
pub use rotation::{RotationConfig, Scaling};

/// Largest `config.json` that is read, bytes.
const MAX_CONFIG: u64 = 16 << 20;

/// Sizes and constants of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Name of the model.
    pub name: String,
    /// Family, e.g. `llama`.
    pub model_type: String,
    /// Width D of the hidden states.
    pub hidden_size: usize,
    /// Size V of the vocabulary.
    pub vocab_size: usize,
    /// Positions that the model can be asked for.
    pub max_position_embeddings: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Whether the LM head is the embedding.
    pub tie_word_embeddings: bool,
    /// Factor of the embedding's rows.
    pub embedding_scale: f32,
    /// Bound c of the logits, which are `c · tanh(logit / c)`.
    pub logit_softcap: Option<f32>,
    /// Decoder layers.
    pub layers: Vec<LayerConfig>,
    /// Layers of the checkpoint behind the last one, which predict further tokens and are not run.
    pub further_layers: usize,
    /// What the checkpoint calls its tensors.
    pub names: Names,
}

/// One decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct LayerConfig {
    /// Its attention.
    pub attention: AttentionConfig,
    /// Its feed-forward layer.
    pub feed_forward: FeedForwardConfig,
    /// Where norms stand.
    pub norms: Norms,
}

/// Attention whose query heads share keys and values in groups. Latent attention is such with one key head, between projections of its own.
#[derive(Clone, Debug, PartialEq)]
pub struct AttentionConfig {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads.
    pub key_value_heads: usize,
    /// Values of a key.
    pub head_dim: usize,
    /// What latent attention keeps and makes of it.
    pub latent: Option<LatentConfig>,
    /// Whether queries, keys and values have a bias.
    pub bias: bool,
    /// Whether the output has one.
    pub output_bias: bool,
    /// Norm of queries and keys before they are rotated.
    pub query_key_norm: Option<QueryKeyNorm>,
    /// Positions each position sees at most, itself included.
    pub window: Option<usize>,
    /// Rotary embedding; a layer without one has no positions.
    pub rotation: Option<RotationConfig>,
    /// Factor of the scores.
    pub scale: f32,
    /// Bound of the scores.
    pub softcap: Option<f32>,
}

impl AttentionConfig {
    /// Values that the output projection takes of each head.
    pub fn value_dim(&self) -> usize {
        self.latent.map_or(self.head_dim, |latent| latent.value)
    }

    /// Outputs of the projection to queries, keys and values.
    pub fn rows(&self) -> usize {
        (self.heads + 2 * self.key_value_heads) * self.head_dim
    }
}

/// Sizes of latent attention (arXiv 2405.04434). A key is [`rope` rotated values | `rank` compressed ones], and its compressed part the value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LatentConfig {
    /// Values that queries are compressed to, if they are.
    pub query_rank: Option<usize>,
    /// Values that keys and values are compressed to.
    pub rank: usize,
    /// Values of a query, and of an uncompressed key, that have a position.
    pub rope: usize,
    /// The others.
    pub nope: usize,
    /// Values of an uncompressed value.
    pub value: usize,
}

/// What a norm of queries and keys goes over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QueryKeyNorm {
    /// Each head.
    Head,
    /// All heads together.
    Projection,
}

/// A feed-forward layer.
#[derive(Clone, Debug, PartialEq)]
pub enum FeedForwardConfig {
    /// `down(activation(gate(x)) · up(x))`.
    Gated {
        /// Outputs of gate and up.
        width: usize,
        /// What the gate goes through.
        activation: Activation,
    },
    /// The sum of some such layers, each row's own.
    Experts(ExpertsConfig),
}

/// Gated layers of which a router chooses some for each row.
#[derive(Clone, Debug, PartialEq)]
pub struct ExpertsConfig {
    /// All of them.
    pub count: usize,
    /// Those that a row goes to.
    pub top: usize,
    /// Outputs of gate and up.
    pub width: usize,
    /// What the gate goes through.
    pub activation: Activation,
    /// Outputs of gate and up of one more expert, to which all rows go.
    pub shared: Option<usize>,
    /// What is made of the router's logits.
    pub scores: Scores,
    /// Groups of which a row's experts come.
    pub groups: Option<Groups>,
    /// Whether the weights of a row's experts sum to 1; otherwise they are their scores.
    pub normalise: bool,
    /// Factor of the weights.
    pub factor: f32,
}

/// What is made of the logits of a router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scores {
    /// Their softmax over all experts.
    Softmax,
    /// Their sigmoid; a bias of each expert has a say in the choice.
    Sigmoid,
}

/// Experts that lie in groups of one size: a row goes to experts of its best groups only.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Groups {
    /// All of them.
    pub count: usize,
    /// Those that a row goes to.
    pub top: usize,
    /// How many of its best scores a group is judged by.
    pub best: usize,
}

impl FeedForwardConfig {
    /// Outputs of gate and up.
    pub fn width(&self) -> usize {
        match self {
            Self::Gated { width, .. } | Self::Experts(ExpertsConfig { width, .. }) => *width,
        }
    }
}

/// Where the norms of a layer stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norms {
    /// Before attention and before the feed-forward layer.
    Pre,
    /// Behind each, before it is added.
    Post,
    /// Before and behind each.
    Sandwich,
}

impl ModelConfig {
    /// Reads the configuration of a checkpoint.
    ///
    /// # Errors
    /// When a member is missing or impossible, or asks for what the decoder does not do.
    pub fn read(keys: &Keys) -> Result<Self, ModelError> {
        families::config(keys)?.checked(keys)
    }

    /// Positions that a token sees at most in any layer; none when a layer sees all.
    pub fn window(&self) -> Option<usize> {
        self.layers.iter().map(|layer| layer.attention.window).try_fold(0, |most, window| Some(most.max(window?)))
    }

    /// Attention of the first layer: heads and their sizes are those of all.
    pub fn attention(&self) -> &AttentionConfig {
        &self.layers[0].attention
    }
}

/// What the `config.json` of a folder says.
///
/// # Errors
/// When it cannot be read, or asks for what the decoder does not do.
pub fn of_folder(Files { path, text_only }: Files<'_>) -> Result<ModelConfig, ModelError> {
    let keys = read_json(&path.join("config.json"))?;
    let text = if text_only { keys.object("text_config")? } else { None };
    ModelConfig::read(&text.unwrap_or(keys))
}

/// Reads `config.json` at `path`.
///
/// # Errors
/// When it cannot be read or is no object.
pub fn read_json(path: &Path) -> Result<Keys, ModelError> {
    let length = std::fs::metadata(path).map_err(ModelError::read(path))?.len();
    if length > MAX_CONFIG {
        return Err(ModelError::invalid(path, "config", format!("it has {length} bytes, more than {MAX_CONFIG}")));
    }
    let text = std::fs::read(path).map_err(ModelError::read(path))?;
    let values = serde_json::from_slice(&text).map_err(|error| ModelError::invalid(path, "config", error.to_string()))?;
    let folder = path.parent().and_then(Path::file_name).map(|name| name.to_string_lossy().into_owned());
    Ok(Keys::json(path, values, folder))
}
