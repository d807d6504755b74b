//! Llama 1 to 3.3 and what is built like it: Mistral, SmolLM, distillations.

use serde_json::json;

use super::{Names, experts, plain, set_experts, set_windows, windowed};
use crate::model::config::{Keys, ModelConfig};
use crate::model::error::ModelError;

/// Llama. Its GGUF files keep pairs of queries and keys as neighbours, and are those of Mistral and Mixtral too.
pub fn config(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = plain(keys)?;
    for rotation in config.layers.iter_mut().filter_map(|layer| layer.attention.rotation.as_mut()) {
        rotation.interleaved = keys.is_gguf();
    }
    if keys.is_gguf() && keys.optional::<usize>("num_experts")?.is_some_and(|count| count > 0) {
        keys.refuse_unless("scoring_func", &[json!("softmax")])?;
        set_experts(&mut config, &experts(keys, expert_width(keys)?, true)?, |_| true);
    }
    Ok(config)
}

/// Older files do not tell experts' width from that of other layers, which there are none of.
fn expert_width(keys: &Keys) -> Result<usize, ModelError> {
    keys.optional("moe_intermediate_size")?.map_or_else(|| keys.required("intermediate_size"), Ok)
}

/// Mistral: every layer has the window, where there is one.
pub fn mistral(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = config(keys)?;
    let windowed = windowed(keys, config.layers.len(), |_| true)?;
    set_windows(keys, &mut config, &windowed)?;
    Ok(config)
}

/// Mixtral: Mistral with experts in every layer, whose weights sum to 1.
pub fn mixtral(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = mistral(keys)?;
    config.names = Names {
        router: ("block_sparse_moe.gate", "ffn_gate_inp"),
        expert: [
            ("block_sparse_moe.experts.{}.w1", "ffn_gate_exps"),
            ("block_sparse_moe.experts.{}.w3", "ffn_up_exps"),
            ("block_sparse_moe.experts.{}.w2", "ffn_down_exps"),
        ],
        ..Names::default()
    };
    set_experts(&mut config, &experts(keys, keys.required("intermediate_size")?, true)?, |_| true);
    Ok(config)
}

/// SmolLM3: some layers have no positions.
pub fn smollm3(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("use_sliding_window", &[json!(false)])?;
    let mut config = config(keys)?;
    let interval = keys.optional::<usize>("no_rope_layer_interval")?.unwrap_or(4);
    let rotated = match keys.optional::<Vec<u8>>("no_rope_layers")? {
        Some(rotated) if rotated.len() < config.layers.len() => {
            return Err(keys.invalid("no_rope_layers", format!("{} entries for {} layers", rotated.len(), config.layers.len())));
        }
        Some(rotated) => rotated,
        None => (1..=config.layers.len()).map(|layer| u8::from(interval == 0 || !layer.is_multiple_of(interval))).collect(),
    };
    for (layer, rotated) in config.layers.iter_mut().zip(rotated) {
        layer.attention.rotation = layer.attention.rotation.take().filter(|_| rotated != 0);
    }
    Ok(config)
}
