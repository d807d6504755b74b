//! Attention of a layer, up to its output projection.

use super::{Buffers, Pass, left};
use crate::kernel::{Backend, Left, Part, Result, Sink};
use crate::model::config::{AttentionConfig, LatentConfig};
use crate::model::weights::{GroupedProjection, LatentProjection, Layer, Projection};

/// ε of the norms within latent attention, which transformers does not take from the configuration (`DeepseekV2RMSNorm`).
const LATENT_EPSILON: f32 = 1e-6;

/// Buffers that all layers use in turn.
pub(super) struct Scratch<B: Backend> {
    /// Queries, keys and values, rows × (heads + 2 · key/value heads) · head_dim; of latent attention keys alone, rows × head_dim.
    projected: B::Rows,
    /// What queries are compressed to, rows × query rank.
    compressed: B::Rows,
    /// Queries of latent attention, rows × heads · (rope + nope).
    queries: B::Rows,
    /// The same as they meet keys, rows × heads · head_dim.
    absorbed: B::Rows,
    /// Sums of latent values, rows × heads · key/value rank.
    latent: B::Packed,
    /// Output of attention.
    pub context: B::Packed,
}

impl<B: Backend> Default for Scratch<B> {
    fn default() -> Self {
        let (projected, compressed, queries, absorbed) = Default::default();
        Self { projected, compressed, queries, absorbed, latent: B::Packed::default(), context: B::Packed::default() }
    }
}

impl<B: Backend> Pass<'_, '_, B> {
    /// `context = attention(norm(residual))`.
    pub(super) fn attend(
        &mut self,
        index: usize,
        layer: &Layer<B>,
        rows: usize,
        buffers: &Buffers<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        let part = |matrix| Part { rows, matrix, norm: layer.input_norm.as_ref() };
        let normed = || left(&buffers.residual, layer.input_norm.as_ref(), self.model.config.rms_norm_eps);
        match &layer.projection {
            Projection::Grouped(weights) => {
                self.model.backend.product(normed(), &[part(&weights.query_key_value)], Sink::Store(&mut scratch.projected))?;
                self.grouped(index, weights, buffers, scratch)
            }
            Projection::Latent(weights) => {
                let backend = &self.model.backend;
                backend.product(normed(), &[part(&weights.keys)], Sink::Store(&mut scratch.projected))?;
                match &weights.compress {
                    None => backend.product(normed(), &[part(&weights.queries)], Sink::Store(&mut scratch.queries))?,
                    Some((compress, norm)) => {
                        backend.product(normed(), &[part(compress)], Sink::Store(&mut scratch.compressed))?;
                        let part = Part { rows, matrix: &weights.queries, norm: Some(norm) };
                        backend.product(Left::Normed(&scratch.compressed, LATENT_EPSILON), &[part], Sink::Store(&mut scratch.queries))?;
                    }
                }
                let latent = self.model.config.layers[index].attention.latent.expect("weights are loaded as the configuration says");
                self.latent(index, latent, weights, buffers, scratch)
            }
        }
    }

    fn grouped(&mut self, index: usize, weights: &GroupedProjection<B>, buffers: &Buffers<B>, scratch: &mut Scratch<B>) -> Result<()> {
        let (backend, epsilon) = (&self.model.backend, self.model.config.rms_norm_eps);
        let AttentionConfig { heads, key_value_heads, head_dim, .. } = &self.model.config.layers[index].attention;
        let (queries, keys) = (heads * head_dim, key_value_heads * head_dim);
        let Scratch { projected, context, .. } = scratch;
        if let Some(bias) = &weights.bias {
            backend.add_bias(projected, bias)?;
        }
        if let Some([of_queries, of_keys]) = &weights.norms {
            backend.norm_columns(projected, 0..queries, of_queries, epsilon)?;
            backend.norm_columns(projected, queries..queries + keys, of_keys, epsilon)?;
        }
        let way = self.decoder.way_of[index];
        let (places, angles) = &buffers.ways[way];
        if self.decoder.ways[way].rotation.is_some() {
            backend.rotate(projected, queries + keys, *head_dim, angles)?;
        }
        self.arena.attend(backend, index, projected, (projected, queries), places, context)
    }

    /// Latent attention in its absorbed form (arXiv 2405.04434, section 2.1): keys and values are never made of the compressed row. Instead each head's
    /// query is multiplied by what would have made its keys, and the sum of compressed rows by what would have made its values.
    fn latent(
        &mut self,
        index: usize,
        latent: LatentConfig,
        weights: &LatentProjection<B>,
        buffers: &Buffers<B>,
        scratch: &mut Scratch<B>,
    ) -> Result<()> {
        let backend = &self.model.backend;
        let AttentionConfig { heads, head_dim, .. } = self.model.config.layers[index].attention;
        let Scratch { projected, queries, absorbed, latent: sums, context, .. } = scratch;
        backend.norm_columns(projected, latent.rope..head_dim, &weights.key_norm, LATENT_EPSILON)?;
        let (places, angles) = &buffers.ways[self.decoder.way_of[index]];
        backend.rotate(projected, head_dim, head_dim, angles)?;
        let query = latent.rope + latent.nope;
        backend.rotate(queries, heads * query, query, angles)?;
        backend.product_heads(Left::Plain(queries), &weights.absorb, Sink::Store(absorbed))?;
        self.arena.attend(backend, index, absorbed, (projected, 0), places, sums)?;
        backend.product_heads(Left::Packed(sums), &weights.values, Sink::Pack(context))
    }
}
