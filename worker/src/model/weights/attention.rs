//! What makes queries, keys and values.

use super::packer::{Order, Packer, Rows, TensorName, of_layer};
use crate::kernel::Backend;
use crate::model::config::{AttentionConfig, LatentConfig, QueryKeyNorm};
use crate::model::error::ModelError;
use crate::model::families::{LATENT_KEYS, LATENT_QUERIES, LATENT_SPLIT, Name};

/// What makes queries, keys and values of a layer.
pub enum Projection<B: Backend> {
    Grouped(GroupedProjection<B>),
    Latent(LatentProjection<B>),
}

impl<B: Backend> Projection<B> {
    /// Its matrices.
    pub fn matrices(&self) -> impl Iterator<Item = &B::Matrix> {
        match self {
            Self::Grouped(weights) => vec![&weights.query_key_value],
            Self::Latent(weights) => {
                [&weights.queries, &weights.keys].into_iter().chain(weights.compress.iter().map(|(matrix, _)| matrix)).collect()
            }
        }
        .into_iter()
    }
}

/// Of grouped attention.
pub struct GroupedProjection<B: Backend> {
    /// Queries, keys and values in one: (heads + 2 · key/value heads) · head_dim × D.
    pub query_key_value: B::Matrix,
    /// Their bias.
    pub bias: Option<B::Vector>,
    /// Weights of the norms of queries and of keys: of a head, or of all heads.
    pub norms: Option<[B::Vector; 2]>,
}

/// Of latent attention, whose keys are [rotated | compressed] and whose queries are [rotated | the others].
pub struct LatentProjection<B: Backend> {
    /// What queries are compressed by, query rank × D, and the weight of the norm behind it.
    pub compress: Option<(B::Matrix, B::Vector)>,
    /// Heads · (rope + nope) × query rank, or D where queries are not compressed.
    pub queries: B::Matrix,
    /// Rope + rank × D.
    pub keys: B::Matrix,
    /// Weight of the norm of what is compressed (rank).
    pub key_norm: B::Vector,
    /// Turns each head's query into one that meets compressed keys, (rope + rank) × (rope + nope): what is rotated stays as it is.
    pub absorb: B::Heads,
    /// Makes each head's value of compressed ones, value × rank.
    pub values: B::Heads,
}

impl<B: Backend> Packer<'_, B> {
    /// What makes queries, keys and values of layer `index`.
    pub fn projection(&self, index: usize, attention: &AttentionConfig) -> Result<Projection<B>, ModelError> {
        match &attention.latent {
            None => self.grouped(index, attention).map(Projection::Grouped),
            Some(latent) => self.latent(index, attention, latent).map(Projection::Latent),
        }
    }

    fn grouped(&self, index: usize, attention: &AttentionConfig) -> Result<GroupedProjection<B>, ModelError> {
        let (names, hidden) = (&self.config.names, self.config.hidden_size);
        let parts = parts(attention, names.query_key_value.len());
        let mut tensors = Vec::new();
        for (name, (rows, _)) in names.query_key_value.iter().zip(&parts) {
            tensors.push(self.tensor(&of_layer(index, *name, "weight"), *rows, hidden)?);
        }
        let rows: Vec<_> = tensors.iter().zip(&parts).map(|(tensor, (_, order))| Rows::ordered(tensor, *order)).collect();
        let mut bias = Vec::new();
        for (name, (rows, order)) in names.query_key_value.iter().zip(&parts).filter(|_| attention.bias) {
            let values = self.values(&of_layer(index, *name, "bias"), *rows)?;
            bias.extend((0..*rows).map(|row| values[order.map_or(row, |order| order.of(row))]));
        }
        let width = |kind: QueryKeyNorm, heads: usize| match kind {
            QueryKeyNorm::Head => attention.head_dim,
            QueryKeyNorm::Projection => heads * attention.head_dim,
        };
        let [of_queries, of_keys] = names.query_key_norm.map(|name| of_layer(index, name, "weight"));
        Ok(GroupedProjection {
            query_key_value: self.stacked(&rows, hidden, B::matrix, attention.rows())?,
            bias: if attention.bias { Some(self.backend.vector(&bias)?) } else { None },
            norms: match attention.query_key_norm {
                Some(kind) => Some([
                    self.norm(&of_queries, width(kind, attention.heads))?,
                    self.norm(&of_keys, width(kind, attention.key_value_heads))?,
                ]),
                None => None,
            },
        })
    }

    fn latent(&self, index: usize, attention: &AttentionConfig, latent: &LatentConfig) -> Result<LatentProjection<B>, ModelError> {
        let (hidden, heads) = (self.config.hidden_size, attention.heads);
        let LatentConfig { query_rank, rank, rope, nope, .. } = *latent;
        let name = |of: Name| of_layer(index, of, "weight");
        let interleaved = attention.rotation.as_ref().is_some_and(|rotation| rotation.interleaved);
        let ordered = |of, head_dim: usize, count: usize, begin, cols| {
            let tensor = self.tensor(&name(of), count * head_dim, cols)?;
            let order = Some(Order { head_dim, dims: rope, begin, interleaved });
            self.stacked(&[Rows::ordered(&tensor, order)], cols, B::matrix, tensor.rows)
        };
        let [plain, compressing, norm, compressed] = LATENT_QUERIES;
        let (compress, queries) = match query_rank {
            None => (None, ordered(plain, rope + nope, heads, nope, hidden)?),
            Some(query_rank) => {
                let matrix = self.matrix(&name(compressing), query_rank, hidden)?;
                let norm = self.norm(&name(norm), query_rank)?;
                (Some((matrix, norm)), ordered(compressed, rope + nope, heads, nope, query_rank)?)
            }
        };
        let [keys, key_norm, made] = LATENT_KEYS;
        let split = LATENT_SPLIT.map(|of| of_layer(index, ("", of), "weight"));
        let (absorb, values) = match self.checkpoint.has(&split[0]) {
            true => self.split(&split, heads, latent)?,
            false => self.joined(&name(made), heads, latent)?,
        };
        Ok(LatentProjection {
            compress,
            queries,
            keys: ordered(keys, rope + rank, 1, rank, hidden)?,
            key_norm: self.norm(&name(key_norm), rank)?,
            absorb,
            values,
        })
    }

    /// What queries are absorbed by and what makes values, of a tensor that has of each head what makes keys without a position, nope × rank, then what
    /// makes values.
    fn joined(&self, name: &TensorName, heads: usize, latent: &LatentConfig) -> Result<(B::Heads, B::Heads), ModelError> {
        let LatentConfig { rank, nope, value, .. } = *latent;
        let made = self.tensor(name, heads * (nope + value), rank)?;
        let mut turned = vec![0.0; heads * rank * nope];
        let mut row = vec![0.0; rank];
        for (head, turned) in turned.chunks_exact_mut(rank * nope).enumerate() {
            for key in 0..nope {
                made.row(head * (nope + value) + key, &mut row);
                turned.iter_mut().skip(key).step_by(nope).zip(&row).for_each(|(turned, value)| *turned = *value);
            }
        }
        let absorb = self.absorb(heads, latent, &|row, values| values.copy_from_slice(&turned[row * nope..][..nope]))?;
        let value_of = |row: usize, values: &mut [f32]| made.row(row / value * (nope + value) + nope + row % value, values);
        let values = self.backend.heads(heads, value, rank, self.stored.products(), &value_of)?;
        made.finish()?;
        Ok((absorb, values))
    }

    /// The same of two tensors, of which the first is turned already.
    fn split(&self, [turned, values]: &[TensorName; 2], heads: usize, latent: &LatentConfig) -> Result<(B::Heads, B::Heads), ModelError> {
        let LatentConfig { rank, nope, value, .. } = *latent;
        let (turned, made) = (self.tensor(turned, heads * rank, nope)?, self.tensor(values, heads * value, rank)?);
        let absorb = self.absorb(heads, latent, &|row, values| turned.row(row, values))?;
        let values = self.backend.heads(heads, value, rank, self.stored.products(), &|row, values| made.row(row, values))?;
        turned.finish()?;
        made.finish()?;
        Ok((absorb, values))
    }

    /// `turned` fills in row `rank · head + r` of what turns queries into those of compressed keys; what is rotated stays as it is.
    fn absorb(&self, heads: usize, latent: &LatentConfig, turned: &Turned<'_>) -> Result<B::Heads, ModelError> {
        let LatentConfig { rank, rope, nope, .. } = *latent;
        let fill = |row: usize, values: &mut [f32]| {
            let (head, row) = (row / (rope + rank), row % (rope + rank));
            values.fill(0.0);
            match row.checked_sub(rope) {
                None => values[row] = 1.0,
                Some(compressed) => turned(head * rank + compressed, &mut values[rope..]),
            }
        };
        Ok(self.backend.heads(heads, rope + rank, rope + nope, self.stored.products(), &fill)?)
    }
}

/// Fills in a row.
type Turned<'a> = dyn Fn(usize, &mut [f32]) + Sync + 'a;

/// Rows of queries, keys and values, in one tensor or three, and their order.
fn parts(attention: &AttentionConfig, tensors: usize) -> Vec<(usize, Option<Order>)> {
    let AttentionConfig { heads, key_value_heads, head_dim, rotation, .. } = attention;
    let order = rotation.as_ref().filter(|rotation| rotation.interleaved);
    let order = order.map(|rotation| Order { head_dim: *head_dim, dims: rotation.dims, begin: 0, interleaved: true });
    match tensors {
        1 => vec![(attention.rows(), None)],
        _ => vec![(heads * head_dim, order), (key_value_heads * head_dim, order), (key_value_heads * head_dim, None)],
    }
}
