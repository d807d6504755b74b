//! Qwen 2, 2.5 and 3, with and without experts.

use std::collections::BTreeSet;

use serde_json::json;

use super::{plain, set_experts, set_windows, windowed};
use crate::model::config::{Keys, ModelConfig, QueryKeyNorm};
use crate::model::error::ModelError;

/// Qwen 2 and 2.5: queries, keys and values have a bias.
pub fn second(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = plain(keys)?;
    for layer in &mut config.layers {
        (layer.attention.bias, layer.attention.output_bias) = (true, false);
    }
    windows(keys, config)
}

/// Qwen 3: each head of queries and keys is normed.
pub fn third(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = plain(keys)?;
    config.layers.iter_mut().for_each(|layer| layer.attention.query_key_norm = Some(QueryKeyNorm::Head));
    windows(keys, config)
}

/// Qwen 3 with experts, in all layers or some.
pub fn experts(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("scoring_func", &[json!("softmax")])?;
    let mut config = third(keys)?;
    let dense: BTreeSet<usize> = keys.optional("mlp_only_layers")?.unwrap_or_default();
    let step = keys.optional::<usize>("decoder_sparse_step")?.unwrap_or(1).max(1);
    // A GGUF file does not say it: all that were published so have it.
    let normalise = keys.optional("norm_topk_prob")?.unwrap_or(keys.is_gguf());
    let is_sparse = |layer: usize| !dense.contains(&layer) && (layer + 1).is_multiple_of(step);
    set_experts(&mut config, &super::experts(keys, keys.required("moe_intermediate_size")?, normalise)?, is_sparse);
    Ok(config)
}

/// The window is in use only where the configuration says so, and only in the upper layers.
fn windows(keys: &Keys, mut config: ModelConfig) -> Result<ModelConfig, ModelError> {
    if keys.optional("use_sliding_window")?.unwrap_or(false) {
        let first = keys.optional("max_window_layers")?.unwrap_or(28);
        let windowed = windowed(keys, config.layers.len(), |layer| layer >= first)?;
        set_windows(keys, &mut config, &windowed)?;
    }
    Ok(config)
}
