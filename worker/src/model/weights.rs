//! The decoder's weights, packed once for the device.

use carryon_crds::pool::Dtype;

use super::checkpoint::Checkpoint;
use super::config::{AttentionConfig, ExpertsConfig, FeedForwardConfig, LayerConfig, ModelConfig, Norms, QueryKeyNorm};
use super::error::ModelError;
use super::families::{EMBEDDING, FINAL_NORM, LM_HEAD, Name};
use super::lm_head::LmHead;
use super::tensor::Tensor;
use crate::kernel::Backend;

/// One decoder layer. Norms that the layer has not are absent.
pub struct Layer<B: Backend> {
    /// Weight of the norm before attention (D).
    pub input_norm: Option<B::Vector>,
    /// Queries, keys and values in one: (heads + 2 · key/value heads) · head_dim × D.
    pub query_key_value: B::Matrix,
    /// Their bias.
    pub bias: Option<B::Vector>,
    /// Weights of the norms of queries and of keys: of a head, or of all heads.
    pub query_key_norm: Option<[B::Vector; 2]>,
    /// D × heads · head_dim.
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

/// A feed-forward layer.
pub enum FeedForward<B: Backend> {
    /// The same for all rows.
    Gated(Gated<B>),
    /// Chosen for each row.
    Experts {
        /// Experts × D.
        router: B::Matrix,
        /// All of one shape.
        experts: Vec<Gated<B>>,
    },
}

/// Matrices of a gated layer.
pub struct Gated<B: Backend> {
    /// Gate and up, width × D each.
    pub gate_up: B::Matrix,
    /// D × width.
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
        Ok(Self { layers, final_norm, lm_head: LmHead::new(backend, lm_head, dtype, config.logit_softcap)?, embedding })
    }

    /// The embedding, V × D.
    pub fn embedding(&self) -> &B::Matrix {
        self.embedding.as_ref().unwrap_or(self.lm_head.forward())
    }
}

/// Names of one tensor, in safetensors and in GGUF.
pub type TensorName = [String; 2];

fn full((safetensors, gguf): Name, what: &str) -> TensorName {
    [format!("{safetensors}.{what}"), format!("{gguf}.{what}")]
}

/// A tensor of several that lie one below the other, and which of its rows comes when: see [`Pairs`].
struct Stacked {
    tensor: Tensor,
    pairs: Option<Pairs>,
}

/// Heads whose first `dims` values are pairs of neighbours in the file, and are put into halves: of `dims` 4, rows (0, 1, 2, 3) of the file are
/// rows (0, 2, 1, 3).
#[derive(Clone, Copy)]
struct Pairs {
    head_dim: usize,
    dims: usize,
}

impl Pairs {
    /// The row in the file.
    fn of(self, row: usize) -> usize {
        let (head, index) = (row / self.head_dim, row % self.head_dim);
        let half = self.dims / 2;
        let index = if index < self.dims { 2 * (index % half) + index / half } else { index };
        head * self.head_dim + index
    }
}

impl Stacked {
    fn row(&self, row: usize, values: &mut [f32]) {
        self.tensor.row(self.pairs.map_or(row, |pairs| pairs.of(row)), values);
    }
}

struct Packer<'a, B> {
    backend: &'a B,
    checkpoint: &'a Checkpoint,
    config: &'a ModelConfig,
    dtype: Dtype,
}

impl<B: Backend> Packer<'_, B> {
    fn layer(&self, index: usize, LayerConfig { attention, feed_forward, norms }: &LayerConfig) -> Result<Layer<B>, ModelError> {
        let (names, hidden) = (&self.config.names, self.config.hidden_size);
        let name = |(safetensors, gguf): Name, what: &str| {
            [format!("model.layers.{index}.{safetensors}.{what}"), format!("blk.{index}.{gguf}.{what}")]
        };
        let norm = |wanted: bool, of: Name| if wanted { self.norm(&name(of, "weight"), hidden).map(Some) } else { Ok(None) };
        let (before, behind) = (*norms != Norms::Post, *norms != Norms::Pre);
        let queries = attention.heads * attention.head_dim;
        let fused: Vec<TensorName> = names.query_key_value.iter().map(|of| name(*of, "weight")).collect();
        Ok(Layer {
            input_norm: norm(before, names.input_norm)?,
            query_key_value: self.stacked(&parts(&fused, attention), hidden, B::matrix, attention.rows())?,
            bias: match attention.bias {
                true => Some(self.bias(&names.query_key_value.iter().map(|of| name(*of, "bias")).collect::<Vec<_>>(), attention)?),
                false => None,
            },
            query_key_norm: match attention.query_key_norm {
                Some(kind) => Some(self.query_key_norm(kind, attention, names.query_key_norm.map(|of| name(of, "weight")))?),
                None => None,
            },
            output: self.matrix(&name(names.output, "weight"), hidden, queries)?,
            output_bias: match attention.output_bias {
                true => Some(self.backend.vector(&self.values(&name(names.output, "bias"), hidden)?)?),
                false => None,
            },
            attention_norm: norm(behind, names.attention_norm)?,
            feed_forward_norm: norm(before, names.feed_forward_norm)?,
            feed_forward: match feed_forward {
                FeedForwardConfig::Gated { width, .. } => {
                    let gate_up: Vec<TensorName> = names.gate_up.iter().map(|of| name(*of, "weight")).collect();
                    FeedForward::Gated(self.gated(&gate_up, &name(names.down, "weight"), *width)?)
                }
                FeedForwardConfig::Experts(config) => self.experts(index, config)?,
            },
            down_norm: norm(behind, names.down_norm)?,
        })
    }

    fn gated(&self, gate_up: &[TensorName], down: &TensorName, width: usize) -> Result<Gated<B>, ModelError> {
        let hidden = self.config.hidden_size;
        Ok(Gated { gate_up: self.stacked(&halves(gate_up, width), hidden, B::gate_up, width)?, down: self.matrix(down, hidden, width)? })
    }

    fn experts(&self, index: usize, config: &ExpertsConfig) -> Result<FeedForward<B>, ModelError> {
        let names = &self.config.names;
        let name = |of: &str| [format!("model.layers.{index}.{of}.weight"), String::new()];
        let router = self.matrix(&name(names.router), config.count, self.config.hidden_size)?;
        let mut experts = Vec::new();
        for number in 0..config.count {
            let [gate, up, down] = names.expert.map(|of| name(&of.replace("{}", &number.to_string())));
            experts.push(self.gated(&[gate, up], &down, config.width)?);
        }
        Ok(FeedForward::Experts { router, experts })
    }

    /// Tensors of `cols` columns and the rows named, one below the other.
    fn stacked(&self, parts: &[PartOf<'_>], cols: usize, pack: Pack<B>, rows: usize) -> Result<B::Matrix, ModelError> {
        let mut tensors = Vec::new();
        for PartOf { name, rows, pairs } in parts {
            tensors.push(Stacked { tensor: self.checkpoint.tensor(name, *rows, cols)?, pairs: *pairs });
        }
        let fill = |mut row: usize, values: &mut [f32]| {
            for part in &tensors {
                if row < part.tensor.rows {
                    return part.row(row, values);
                }
                row -= part.tensor.rows;
            }
        };
        Ok(pack(self.backend, rows, cols, self.dtype, &fill)?)
    }

    fn matrix(&self, name: &TensorName, rows: usize, cols: usize) -> Result<B::Matrix, ModelError> {
        self.stacked(&[PartOf { name, rows, pairs: None }], cols, B::matrix, rows)
    }

    /// The bias of queries, keys and values, in the order of their rows.
    fn bias(&self, names: &[TensorName], attention: &AttentionConfig) -> Result<B::Vector, ModelError> {
        let mut bias = Vec::with_capacity(attention.rows());
        for PartOf { name, rows, pairs } in parts(names, attention) {
            let values = self.values(name, rows)?;
            bias.extend((0..rows).map(|row| values[pairs.map_or(row, |pairs| pairs.of(row))]));
        }
        Ok(self.backend.vector(&bias)?)
    }

    fn query_key_norm(
        &self,
        kind: QueryKeyNorm,
        attention: &AttentionConfig,
        names: [TensorName; 2],
    ) -> Result<[B::Vector; 2], ModelError> {
        let width = |heads: usize| match kind {
            QueryKeyNorm::Head => attention.head_dim,
            QueryKeyNorm::Projection => heads * attention.head_dim,
        };
        let [queries, keys] = names;
        Ok([self.norm(&queries, width(attention.heads))?, self.norm(&keys, width(attention.key_value_heads))?])
    }

    fn values(&self, name: &TensorName, length: usize) -> Result<Vec<f32>, ModelError> {
        Ok(self.checkpoint.tensor(name, 1, length)?.vector())
    }

    fn norm(&self, name: &TensorName, length: usize) -> Result<B::Vector, ModelError> {
        let mut values = self.values(name, length)?;
        if self.config.names.norms_less_one && !self.checkpoint.is_gguf() {
            values.iter_mut().for_each(|value| *value += 1.0);
        }
        Ok(self.backend.vector(&values)?)
    }
}

/// A tensor of several, and its rows.
struct PartOf<'a> {
    name: &'a TensorName,
    rows: usize,
    pairs: Option<Pairs>,
}

/// Queries, keys and values, in one tensor or three.
fn parts<'a>(names: &'a [TensorName], attention: &AttentionConfig) -> Vec<PartOf<'a>> {
    let AttentionConfig { heads, key_value_heads, head_dim, rotation, .. } = attention;
    let pairs =
        rotation.as_ref().filter(|rotation| rotation.interleaved).map(|rotation| Pairs { head_dim: *head_dim, dims: rotation.dims });
    match names {
        [name] => vec![PartOf { name, rows: attention.rows(), pairs: None }],
        _ => {
            let (queries, keys) = (heads * head_dim, key_value_heads * head_dim);
            names
                .iter()
                .zip([(queries, pairs), (keys, pairs), (keys, None)])
                .map(|(name, (rows, pairs))| PartOf { name, rows, pairs })
                .collect()
        }
    }
}

/// Gate and up, in one tensor or two.
fn halves(names: &[TensorName], width: usize) -> Vec<PartOf<'_>> {
    names.iter().map(|name| PartOf { name, rows: 2 * width / names.len(), pairs: None }).collect()
}

/// [`Backend::matrix`] or [`Backend::gate_up`].
type Pack<B> = fn(&B, usize, usize, Dtype, crate::kernel::Fill<'_>) -> crate::kernel::Result<<B as Backend>::Matrix>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_of_neighbours_are_put_into_halves() {
        let order = |head_dim, dims| (0..8).map(|row| Pairs { head_dim, dims }.of(row)).collect::<Vec<_>>();
        assert_eq!(order(4, 4), [0, 2, 1, 3, 4, 6, 5, 7]);
        assert_eq!(order(8, 4), [0, 2, 1, 3, 4, 5, 6, 7]);
    }
}
