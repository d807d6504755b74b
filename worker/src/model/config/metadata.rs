//! The metadata of a GGUF file, under the names of `config.json`.

use serde_json::{Map, Value, json};

use crate::model::error::ModelError;
use crate::model::gguf::{self, Gguf};

/// Members of `config.json`, and what its GGUF key is called behind the architecture's name. Of two keys for one member the later one counts.
pub(super) const NAMES: [(&str, &str); 34] = [
    ("hidden_size", "embedding_length"),
    ("intermediate_size", "feed_forward_length"),
    ("num_hidden_layers", "block_count"),
    ("num_nextn_predict_layers", "nextn_predict_layers"),
    ("num_attention_heads", "attention.head_count"),
    ("num_key_value_heads", "attention.head_count_kv"),
    ("head_dim", "attention.key_length"),
    ("vocab_size", "vocab_size"),
    ("max_position_embeddings", "context_length"),
    ("rms_norm_eps", "attention.layer_norm_rms_epsilon"),
    ("rope_theta", "rope.freq_base"),
    ("rope_local_base_freq", "rope.freq_base_swa"),
    ("sliding_window", "attention.sliding_window"),
    ("sliding_window_pattern", "attention.sliding_window_pattern"),
    ("attn_logit_softcapping", "attn_logit_softcapping"),
    ("final_logit_softcapping", "final_logit_softcapping"),
    ("rotary_dim", "rope.dimension_count"),
    ("qk_rope_head_dim", "rope.dimension_count"),
    ("attention_temperature", "attention.temperature_scale"),
    ("num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_intermediate_size", "expert_feed_forward_length"),
    ("n_shared_experts", "expert_shared_count"),
    ("routed_scaling_factor", "expert_weights_scale"),
    ("norm_topk_prob", "expert_weights_norm"),
    ("scoring_func", "expert_gating_func"),
    ("n_group", "expert_group_count"),
    ("topk_group", "expert_group_used_count"),
    ("first_k_dense_replace", "leading_dense_block_count"),
    ("q_lora_rank", "attention.q_lora_rank"),
    ("kv_lora_rank", "attention.kv_lora_rank"),
    // Of latent attention files before 2025 have the uncompressed widths there, later ones those that are kept.
    ("qk_head_dim", "attention.key_length"),
    ("qk_head_dim", "attention.key_length_mla"),
    ("v_head_dim", "attention.value_length_mla"),
];
/// Functions of a router's logits, by their number.
const SCORES: [&str; 2] = ["softmax", "sigmoid"];

/// The members, and what follows from which tensors there are.
pub(super) fn members(gguf: &Gguf, architecture: &str) -> Result<Map<String, Value>, ModelError> {
    let mut members = Map::new();
    for (name, key) in NAMES {
        let value = match gguf.metadata.get(&format!("{architecture}.{key}")) {
            Some(gguf::Value::Integer(value)) => json!(i64::try_from(*value).unwrap_or(i64::MAX)),
            Some(gguf::Value::Float(value)) => json!(value),
            Some(gguf::Value::Bool(value)) => json!(value),
            Some(gguf::Value::String(value)) => json!(value),
            Some(_) => json!([]),
            None => continue,
        };
        members.insert(name.to_owned(), value);
    }
    if !members.contains_key("v_head_dim")
        && let Some(width) = gguf.integer(&format!("{architecture}.attention.value_length"))?
    {
        members.insert("v_head_dim".to_owned(), json!(width));
    }
    members.insert("model_type".to_owned(), json!(architecture));
    vocabulary(gguf, &mut members);
    layers(gguf, architecture, &mut members);
    let has = |wanted: &str| gguf.rows(wanted).is_some();
    members.insert("tie_word_embeddings".to_owned(), json!(!has("output.weight")));
    members.insert("attention_bias".to_owned(), json!(has("blk.0.attn_q.bias") || has("blk.0.attn_qkv.bias")));
    members.insert("attention_output_bias".to_owned(), json!(has("blk.0.attn_output.bias")));
    let biased = || gguf.tensor_names().any(|name| name.ends_with(".exp_probs_b.bias"));
    let scores = match members.get("scoring_func").and_then(Value::as_u64) {
        None | Some(0) if biased() => json!(SCORES[1]),
        None | Some(0) => json!(SCORES[0]),
        Some(number) => SCORES.get(number as usize - 1).map_or_else(|| json!(number.to_string()), |name| json!(name)),
    };
    members.insert("scoring_func".to_owned(), scores);
    members.extend(scaling(gguf, architecture)?);
    Ok(members)
}

/// Llama's files say how large it is, those of most others leave it to the embedding, which may lie in another part of the model.
fn vocabulary(gguf: &Gguf, members: &mut Map<String, Value>) {
    let tokens = || match gguf.metadata.get("tokenizer.ggml.tokens") {
        Some(gguf::Value::Strings(tokens)) => Some(tokens.len()),
        _ => None,
    };
    if !members.contains_key("vocab_size")
        && let Some(size) = gguf.rows("token_embd.weight").or_else(tokens)
    {
        members.insert("vocab_size".to_owned(), json!(size));
    }
}

/// Which layers have a window, and how many there are: GGUF counts those that predict further tokens.
fn layers(gguf: &Gguf, architecture: &str, members: &mut Map<String, Value>) {
    if let Some(gguf::Value::Integers(windowed)) = gguf.metadata.get(&format!("{architecture}.attention.sliding_window_pattern")) {
        let kind = |windowed: i128| if windowed == 0 { "full_attention" } else { "sliding_attention" };
        members.remove("sliding_window_pattern");
        members.insert("layer_types".to_owned(), windowed.iter().map(kind).collect());
    }
    if members.get("sliding_window").and_then(Value::as_u64) == Some(0) {
        members.remove("sliding_window");
    }
    let number = |name: &str| members.get(name).and_then(Value::as_u64);
    if let (Some(all), Some(further)) = (number("num_hidden_layers"), number("num_nextn_predict_layers")) {
        members.insert("num_hidden_layers".to_owned(), json!(all.saturating_sub(further)));
    }
}

/// Scaling of the rotation, as `rope_scaling`.
fn scaling(gguf: &Gguf, architecture: &str) -> Result<Option<(String, Value)>, ModelError> {
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    let named = gguf.text(&key("type"))?;
    let factor = gguf.float(&key("factor"))?;
    let original = gguf.integer(&key("original_context_length"))?;
    if let Some(extrapolated) = gguf.float(&key("yarn_ext_factor"))?.filter(|factor| *factor != 1.0) {
        return Err(ModelError::unsupported(gguf.path(), key("yarn_ext_factor"), extrapolated.to_string()));
    }
    let scaling = match named {
        // That of Phi-3 follows from tensors, whatever is written here.
        Some("none" | "longrope") => return Ok(None),
        Some("yarn") => {
            // There is one number for `mscale` and `mscale_all_dim`: a tenth of it.
            let scale =
                gguf.float(&key("yarn_log_multiplier"))?.filter(|scale| *scale != 0.0).map(|scale| f64::from((scale * 10.0) as f32));
            json!({
                "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "mscale": scale, "mscale_all_dim": scale,
                "attention_factor": gguf.float(&key("yarn_attn_factor"))?, "beta_fast": gguf.float(&key("yarn_beta_fast"))?,
                "beta_slow": gguf.float(&key("yarn_beta_slow"))?,
            })
        }
        Some(kind) => json!({"rope_type": kind, "factor": factor, "original_max_position_embeddings": original}),
        // llama.cpp scales by them too where no type is named; the second is the name of old files.
        None => {
            let old = gguf.float(&format!("{architecture}.rope.scale_linear"))?;
            let Some(factor) = factor.or(old).filter(|factor| ![0.0, 1.0].contains(factor)) else { return Ok(None) };
            json!({"rope_type": "linear", "factor": factor})
        }
    };
    Ok(Some(("rope_scaling".to_owned(), scaling)))
}
