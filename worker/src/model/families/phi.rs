//! Phi-3, Phi-3.5 and Phi-4: fused projections, frequencies with a divisor each.

use super::{Names, plain, set_windows};
use crate::model::config::{Keys, ModelConfig};
use crate::model::error::ModelError;

/// Phi-3 and what is built like it. Every layer has the window, where there is one.
pub fn config(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = plain(keys)?;
    config.names =
        Names { query_key_value: &[("self_attn.qkv_proj", "attn_qkv")], gate_up: &[("mlp.gate_up_proj", "ffn_up")], ..Names::default() };
    let all = vec![true; config.layers.len()];
    set_windows(keys, &mut config, &all)?;
    Ok(config)
}
