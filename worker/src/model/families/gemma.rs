//! Gemma 2 and 3, the text part.

use serde_json::json;

use super::{Names, plain, set_windows, windowed};
use crate::kernel::Activation;
use crate::model::config::{FeedForwardConfig, Keys, ModelConfig, Norms, QueryKeyNorm, RotationConfig};
use crate::model::error::ModelError;

const NAMES: fn() -> Names =
    || Names { feed_forward_norm: ("pre_feedforward_layernorm", "ffn_norm"), norms_less_one: true, ..Names::default() };

/// Gemma 2: every second layer is windowed; scores and logits are bounded.
pub fn second(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let mut config = gemma(keys)?;
    let windowed = windowed(keys, config.layers.len(), |layer| layer.is_multiple_of(2))?;
    set_windows(keys, &mut config, &windowed)?;
    // GGUF files say how large they are, and so do those of transformers; what says nothing has them all the same.
    let softcap = keys.optional("attn_logit_softcapping")?.or(Some(50.0));
    config.layers.iter_mut().for_each(|layer| layer.attention.softcap = softcap);
    config.logit_softcap = keys.optional("final_logit_softcapping")?.or(Some(30.0));
    Ok(config)
}

/// Gemma 3: five layers of six are windowed and rotate faster; each head of queries and keys is normed.
pub fn third(keys: &Keys) -> Result<ModelConfig, ModelError> {
    // What is not written, as in the text part of larger models, is as in transformers' Gemma3TextConfig.
    let keys = &keys.with_defaults(json!({
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262_208, "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-6,
    }));
    let mut config = gemma(keys)?;
    let pattern = keys.optional::<usize>("sliding_window_pattern")?.unwrap_or(6).max(1);
    let windowed = windowed(keys, config.layers.len(), |layer| !(layer + 1).is_multiple_of(pattern))?;
    set_windows(keys, &mut config, &windowed)?;
    let [local, global] = rotations(keys, config.attention().head_dim)?;
    let softcap = keys.optional("attn_logit_softcapping")?;
    config.logit_softcap = keys.optional("final_logit_softcapping")?;
    for (layer, windowed) in config.layers.iter_mut().zip(windowed) {
        let attention = &mut layer.attention;
        attention.query_key_norm = Some(QueryKeyNorm::Head);
        attention.softcap = softcap;
        attention.rotation = Some(if windowed { local.clone() } else { global.clone() });
    }
    Ok(config)
}

/// What both have: norms before and behind, GELU, a scaled embedding that is the LM head too.
fn gemma(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("use_bidirectional_attention", &[json!(false)])?;
    let mut config = plain(keys)?;
    config.names = NAMES();
    config.embedding_scale = (config.hidden_size as f32).sqrt();
    config.tie_word_embeddings = keys.optional("tie_word_embeddings")?.unwrap_or(true);
    let scalar = match keys.optional::<f32>("query_pre_attn_scalar")? {
        Some(scalar) => scalar,
        // A GGUF file does not say it: the models of 27B alone, which llama.cpp knows by their layers, have another.
        None if matches!(config.layers.len(), 46 | 62) => config.hidden_size as f32 / config.attention().heads as f32,
        None => config.attention().head_dim as f32,
    };
    for layer in &mut config.layers {
        layer.norms = Norms::Sandwich;
        layer.feed_forward = FeedForwardConfig::Gated { width: layer.feed_forward.width(), activation: Activation::GeluTanh };
        layer.attention.scale = 1.0 / scalar.sqrt();
    }
    Ok(config)
}

/// Rotations of windowed layers and of the others.
fn rotations(keys: &Keys, head_dim: usize) -> Result<[RotationConfig; 2], ModelError> {
    let global = keys.optional("rope_theta")?.unwrap_or(1e6);
    let local = keys.optional("rope_local_base_freq")?.unwrap_or(1e4);
    let by_type = keys.object("rope_parameters")?;
    let of = |kind: &str, theta: f64| match &by_type {
        Some(types) => match types.object(kind)? {
            Some(parameters) => Ok(RotationConfig::of(keys, &parameters, theta, head_dim)?.0),
            None => RotationConfig::plain(keys, theta, head_dim),
        },
        None if kind == "full_attention" => Ok(RotationConfig::read(keys, theta, head_dim)?.0),
        None => RotationConfig::plain(keys, theta, head_dim),
    };
    Ok([of("sliding_attention", local)?, of("full_attention", global)?])
}
