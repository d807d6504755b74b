//! DeepSeek V2 and V3, and R1, which is built like V3: latent attention, first layers that are dense, experts beside a shared one.

use serde_json::json;

use super::{ExpertsConfig, Groups, LatentConfig, RotationConfig, Scores, experts, plain, set_experts};
use crate::model::config::{Keys, ModelConfig, Scaling};
use crate::model::error::ModelError;

/// GGUF files of V2, V3 and what is built like them have one name.
pub fn gguf(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("attention_temperature", &[])?;
    let normalise = keys.optional("norm_topk_prob")?.unwrap_or(false);
    let (scores, best) = match keys.optional::<String>("scoring_func")?.as_deref() {
        None | Some("softmax") => (Scores::Softmax, 1),
        Some("sigmoid") => (Scores::Sigmoid, 2),
        Some(other) => return Err(keys.unsupported("scoring_func", other)),
    };
    config(keys, true, ExpertsConfig { scores, groups: groups(keys, best)?, ..routed(keys, normalise)? })
}

/// V2: experts are chosen by their softmax; a group of them is as good as its best one.
pub fn second(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("topk_method", &[json!("greedy"), json!("group_limited_greedy")])?;
    keys.refuse_unless("norm_topk_prob", &[json!(false)])?;
    keys.refuse_unless("scoring_func", &[json!("softmax")])?;
    let grouped = keys.optional::<String>("topk_method")?.as_deref() == Some("group_limited_greedy");
    let groups = if grouped { groups(keys, 1)? } else { None };
    config(keys, true, ExpertsConfig { groups, ..routed(keys, false)? })
}

/// V3: experts are chosen by their sigmoid and a bias, a group of them by its best two.
pub fn third(keys: &Keys) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("topk_method", &[json!("noaux_tc")])?;
    keys.refuse_unless("scoring_func", &[json!("sigmoid")])?;
    let normalise = keys.optional("norm_topk_prob")?.unwrap_or(true);
    let experts = ExpertsConfig { scores: Scores::Sigmoid, groups: groups(keys, 2)?, ..routed(keys, normalise)? };
    let interleaved = keys.optional("rope_interleave")?.unwrap_or(true);
    config(keys, interleaved, experts)
}

fn config(keys: &Keys, interleaved: bool, experts: ExpertsConfig) -> Result<ModelConfig, ModelError> {
    keys.refuse_unless("attention_bias", &[json!(false)])?;
    keys.refuse_unless("moe_layer_freq", &[json!(1)])?;
    let mut config = plain(keys)?;
    config.further_layers = keys.optional("num_nextn_predict_layers")?.unwrap_or(0);
    let latent = LatentConfig {
        query_rank: keys.optional("q_lora_rank")?,
        rank: keys.required("kv_lora_rank")?,
        rope: keys.required("qk_rope_head_dim")?,
        nope: nope(keys)?,
        value: keys.required("v_head_dim")?,
    };
    let theta = keys.optional("rope_theta")?.unwrap_or(10_000.0);
    let (mut rotation, _) = RotationConfig::read(keys, theta, latent.rope)?;
    rotation.interleaved = interleaved;
    let lengthened = match &rotation.scaling {
        Scaling::Yarn { all_dims, .. } => all_dims * all_dims,
        _ => 1.0,
    };
    for layer in &mut config.layers {
        let attention = &mut layer.attention;
        (attention.key_value_heads, attention.head_dim) = (1, latent.rope.saturating_add(latent.rank));
        (attention.latent, attention.rotation) = (Some(latent), Some(rotation.clone()));
        attention.scale = lengthened as f32 / (latent.rope.saturating_add(latent.nope) as f32).sqrt();
    }
    let dense = keys.optional("first_k_dense_replace")?.unwrap_or(0);
    set_experts(&mut config, &experts, |layer| layer >= dense);
    Ok(config)
}

/// GGUF files say how wide all of a key is.
fn nope(keys: &Keys) -> Result<usize, ModelError> {
    let Some(all) = keys.optional::<usize>("qk_head_dim")? else { return keys.required("qk_nope_head_dim") };
    let rope: usize = keys.required("qk_rope_head_dim")?;
    all.checked_sub(rope).ok_or_else(|| keys.invalid("qk_head_dim", format!("{all} is less than the {rope} that are rotated")))
}

fn routed(keys: &Keys, normalise: bool) -> Result<ExpertsConfig, ModelError> {
    let width: usize = keys.required("moe_intermediate_size")?;
    let shared = keys.optional::<usize>("n_shared_experts")?.filter(|count| *count > 0).map(|count| count.saturating_mul(width));
    let factor = keys.optional("routed_scaling_factor")?.unwrap_or(1.0);
    Ok(ExpertsConfig { shared, factor, ..experts(keys, width, normalise)? })
}

fn groups(keys: &Keys, best: usize) -> Result<Option<Groups>, ModelError> {
    let Some(count) = keys.optional("n_group")? else { return Ok(None) };
    Ok(Some(Groups { count, top: keys.required("topk_group")?, best }))
}
