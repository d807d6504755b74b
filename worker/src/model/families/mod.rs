//! The families of models: what each says in its configuration, and what it calls its tensors. One decoder runs them all.

mod deepseek;
mod gemma;
mod glm;
mod llama;
mod names;
mod olmo;
mod phi;
mod qwen;

use serde_json::json;

use super::config::{
    AttentionConfig, ExpertsConfig, FeedForwardConfig, Groups, Keys, LatentConfig, LayerConfig, ModelConfig, Norms, RotationConfig, Scores,
    checked_layers,
};
use super::error::ModelError;
use super::quantization;
use crate::kernel::Activation;
pub use names::{CHOICE_BIAS, EMBEDDING, FINAL_NORM, LATENT_KEYS, LATENT_QUERIES, LATENT_SPLIT, LM_HEAD, Name, Names, SHARED_EXPERT};

type Read = fn(&Keys) -> Result<ModelConfig, ModelError>;

/// `model_type` of `config.json`, and how such a configuration is read.
const FAMILIES: [(&str, Read); 15] = [
    ("deepseek_v2", deepseek::second),
    ("deepseek_v3", deepseek::third),
    ("gemma2", gemma::second),
    ("gemma3", gemma::third),
    ("gemma3_text", gemma::third),
    ("glm4", glm::config),
    ("llama", llama::config),
    ("mistral", llama::mistral),
    ("mixtral", llama::mixtral),
    ("olmo2", olmo::config),
    ("phi3", phi::config),
    ("qwen2", qwen::second),
    ("qwen3", qwen::third),
    ("qwen3_moe", qwen::experts),
    ("smollm3", llama::smollm3),
];

/// The same for GGUF's architectures.
const ARCHITECTURES: [(&str, Read); 11] = [
    ("deepseek2", deepseek::gguf),
    ("gemma2", gemma::second),
    ("gemma3", gemma::third),
    ("glm4", glm::config),
    ("llama", llama::config),
    ("olmo2", olmo::config),
    ("phi3", phi::config),
    ("qwen2", qwen::second),
    ("qwen3", qwen::third),
    ("qwen3moe", qwen::experts),
    ("smollm3", llama::smollm3),
];

/// Reads a configuration of any family.
///
/// # Errors
/// When the family is not known, a member is missing or of another type, or asks for what the decoder does not do.
pub fn config(keys: &Keys) -> Result<ModelConfig, ModelError> {
    let family: String = keys.required("model_type")?;
    if keys.object("text_config")?.is_some() {
        return Err(
            keys.invalid("text_config", format!("`{family}` is a model of text and more: ask for its text part alone (model.textOnly)"))
        );
    }
    let known: &[(&str, Read)] = if keys.is_gguf() { &ARCHITECTURES } else { &FAMILIES };
    let Some((_, read)) = known.iter().find(|(name, _)| *name == family) else {
        let known: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        return Err(keys.invalid("model_type", format!("`{family}` is not supported; supported are {}", known.join(", "))));
    };
    let config = read(keys)?;
    if keys.is_gguf() && !config.layers.iter().any(|layer| matches!(layer.feed_forward, FeedForwardConfig::Experts(_))) {
        keys.refuse_unless("num_experts", &[json!(0)])?;
    }
    Ok(config)
}

/// A decoder whose layers are all alike: grouped attention that sees everything, a gated feed-forward layer with SiLU, norms before both. The
/// families change what is different in theirs. Absent is `theta` 10,000.
fn plain(keys: &Keys) -> Result<ModelConfig, ModelError> {
    if let Some(found) = keys.optional("quantization_config")?.as_ref().and_then(quantization::unsupported) {
        return Err(keys.unsupported("quantization_config", found));
    }
    keys.refuse_unless("mlp_bias", &[json!(false)])?;
    let activation = activation(keys)?;
    let layers = checked_layers(keys)?;
    let (hidden_size, heads): (usize, usize) = (keys.required("hidden_size")?, keys.required("num_attention_heads")?);
    let head_dim = match keys.optional("head_dim")? {
        Some(head_dim) => head_dim,
        None => hidden_size.checked_div(heads).unwrap_or(0),
    };
    let theta = keys.optional("rope_theta")?.unwrap_or(10_000.0);
    let (rotation, reach) = RotationConfig::read(keys, theta, head_dim)?;
    let context: usize = keys.required("max_position_embeddings")?;
    let bias = keys.optional("attention_bias")?.unwrap_or(false);
    // In a GGUF file they are seen one by one.
    let output_bias = if keys.is_gguf() { keys.optional("attention_output_bias")?.unwrap_or(false) } else { bias };
    let layer = LayerConfig {
        attention: AttentionConfig {
            heads,
            key_value_heads: keys.optional("num_key_value_heads")?.unwrap_or(heads),
            head_dim,
            latent: None,
            bias,
            output_bias,
            query_key_norm: None,
            window: None,
            rotation: Some(rotation),
            scale: 1.0 / (head_dim as f32).sqrt(),
            softcap: None,
        },
        feed_forward: FeedForwardConfig::Gated { width: keys.required("intermediate_size")?, activation },
        norms: Norms::Pre,
    };
    let model_type: String = keys.required("model_type")?;
    Ok(ModelConfig {
        name: keys.name().unwrap_or(&model_type).to_owned(),
        model_type,
        hidden_size,
        vocab_size: keys.required("vocab_size")?,
        max_position_embeddings: reach.map_or(context, |reach| reach.min(context)),
        rms_norm_eps: keys.required("rms_norm_eps")?,
        tie_word_embeddings: keys.optional("tie_word_embeddings")?.unwrap_or(false),
        embedding_scale: 1.0,
        logit_softcap: None,
        layers: vec![layer; layers],
        further_layers: 0,
        names: Names::default(),
    })
}

/// Experts whose weights are a softmax.
fn experts(keys: &Keys, width: usize, normalise: bool) -> Result<ExpertsConfig, ModelError> {
    let mut named = None;
    for name in ["num_experts", "num_local_experts", "n_routed_experts"] {
        named = named.or(keys.optional(name)?);
    }
    let count = named.ok_or_else(|| keys.invalid("num_experts", "key is missing"))?;
    let (top, activation) = (keys.required("num_experts_per_tok")?, activation(keys)?);
    let factor = if keys.is_gguf() { keys.optional("routed_scaling_factor")? } else { None };
    let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
    Ok(ExpertsConfig { count, top, width, activation, shared: None, scores: Scores::Softmax, groups: None, normalise, factor })
}

/// Gives the layers that are `sparse` experts in place of their feed-forward layer.
fn set_experts(config: &mut ModelConfig, experts: &ExpertsConfig, sparse: impl Fn(usize) -> bool) {
    for (_, layer) in config.layers.iter_mut().enumerate().filter(|(index, _)| sparse(*index)) {
        layer.feed_forward = FeedForwardConfig::Experts(experts.clone());
    }
}

fn activation(keys: &Keys) -> Result<Activation, ModelError> {
    for name in ["hidden_activation", "hidden_act"] {
        return match keys.optional::<String>(name)?.as_deref() {
            None => continue,
            Some("silu") => Ok(Activation::Silu),
            Some("gelu_pytorch_tanh" | "gelu_tanh") => Ok(Activation::GeluTanh),
            Some(other) => Err(keys.unsupported(name, format!("`{other}`"))),
        };
    }
    Ok(Activation::Silu)
}

/// Which layers see no further than the window: as `layer_types` says, or by their index.
fn windowed(keys: &Keys, layers: usize, by_index: impl Fn(usize) -> bool) -> Result<Vec<bool>, ModelError> {
    let Some(types) = keys.optional::<Vec<String>>("layer_types")? else { return Ok((0..layers).map(by_index).collect()) };
    if types.len() != layers {
        return Err(keys.invalid("layer_types", format!("{} types of {layers} layers", types.len())));
    }
    let is_windowed = |kind: &String| match kind.as_str() {
        "sliding_attention" => Ok(true),
        "full_attention" => Ok(false),
        other => Err(keys.unsupported("layer_types", format!("`{other}`"))),
    };
    types.iter().map(is_windowed).collect()
}

/// Gives the layers that are windowed their window.
fn set_windows(keys: &Keys, config: &mut ModelConfig, windowed: &[bool]) -> Result<(), ModelError> {
    let window = keys.optional("sliding_window")?;
    for (layer, windowed) in config.layers.iter_mut().zip(windowed) {
        layer.attention.window = window.filter(|_| *windowed);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
