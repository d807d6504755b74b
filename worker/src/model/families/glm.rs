//! GLM-4: norms before and behind, half of each head is rotated, neighbours are pairs.

use super::{Names, plain};
use crate::model::config::{Keys, ModelConfig, Norms};
use crate::model::error::ModelError;

/// GLM-4-0414.
pub fn config(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = plain(keys)?;
    config.names = Names {
        attention_norm: ("post_self_attn_layernorm", "post_attention_norm"),
        feed_forward_norm: ("post_attention_layernorm", "ffn_norm"),
        gate_up: &[("mlp.gate_up_proj", "ffn_up")],
        down_norm: ("post_mlp_layernorm", "post_ffw_norm"),
        ..Names::default()
    };
    let has_bias = keys.optional("attention_bias")?.unwrap_or(true);
    for layer in &mut config.layers {
        layer.norms = Norms::Sandwich;
        (layer.attention.bias, layer.attention.output_bias) = (has_bias, false);
        if let Some(rotation) = &mut layer.attention.rotation {
            rotation.interleaved = true;
        }
    }
    Ok(config)
}
