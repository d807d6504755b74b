//! Configurations as they are published, of the members that matter (Hugging Face, transformers 4 and before), and as converters to GGUF write them.

use std::path::Path;

use serde_json::{Value, json};

use super::*;
use crate::model::config::{QueryKeyNorm, Scaling};

fn read(json: Value) -> Result<ModelConfig, ModelError> {
    let Value::Object(values) = json else { unreachable!() };
    ModelConfig::read(&Keys::json(Path::new("config.json"), values, None))
}

/// Sizes that every configuration has, and what is its own.
fn sized(model_type: &str, [hidden, wide, layers, heads, key_value_heads]: [usize; 5], own: Value) -> ModelConfig {
    let mut json = json!({
        "model_type": model_type, "hidden_size": hidden, "intermediate_size": wide, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads, "vocab_size": 32000, "max_position_embeddings": 131_072, "rms_norm_eps": 1e-6,
    });
    let (Value::Object(json), Value::Object(own)) = (&mut json, own) else { unreachable!() };
    json.extend(own);
    read(Value::Object(json.clone())).unwrap()
}

fn rotation(config: &ModelConfig, layer: usize) -> &RotationConfig {
    config.layers[layer].attention.rotation.as_ref().unwrap()
}

fn windows(config: &ModelConfig) -> Vec<usize> {
    config.layers.iter().filter_map(|layer| layer.attention.window).collect()
}

#[test]
fn llama_3_3_70b() {
    let scaling = json!({"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"});
    let config =
        sized("llama", [8192, 28672, 80, 64, 8], json!({"rope_theta": 500_000.0, "rope_scaling": scaling, "attention_bias": false}));
    assert_eq!((config.layers.len(), config.attention().head_dim, config.window()), (80, 128, None));
    assert_eq!(rotation(&config, 0).scaling, Scaling::Llama3 { factor: 8.0, low: 1.0, high: 4.0, original: 8192.0 });
}

#[test]
fn qwen_2_5_32b_has_a_window_that_is_not_in_use_and_yarn_when_asked_for() {
    let own = json!({"use_sliding_window": false, "sliding_window": 131_072, "max_window_layers": 64, "rope_theta": 1e6});
    let config = sized("qwen2", [5120, 27648, 64, 40, 8], own.clone());
    assert_eq!((config.window(), config.attention().bias, config.attention().output_bias), (None, true, false));
    let mut long = own;
    long["rope_scaling"] = json!({"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"});
    let config = sized("qwen2", [5120, 27648, 64, 40, 8], long);
    assert!((rotation(&config, 0).rotation().magnitude - (0.1 * 4f32.ln() + 1.0)).abs() < 1e-6);
}

#[test]
fn qwen_3_8b_norms_each_head() {
    let config = sized("qwen3", [4096, 12288, 36, 32, 8], json!({"head_dim": 128, "attention_bias": false, "use_sliding_window": false}));
    assert_eq!((config.attention().query_key_norm, config.attention().bias), (Some(QueryKeyNorm::Head), false));
}

#[test]
fn qwen_3_30b_a3b_and_mixtral_choose_experts() {
    let own = json!({"head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": true,
        "decoder_sparse_step": 1, "mlp_only_layers": []});
    let config = sized("qwen3_moe", [2048, 6144, 48, 32, 4], own);
    let (scores, activation) = (Scores::Softmax, Activation::Silu);
    let experts =
        ExpertsConfig { count: 128, top: 8, width: 768, activation, shared: None, scores, groups: None, normalise: true, factor: 1.0 };
    assert!(config.layers.iter().all(|layer| layer.feed_forward == FeedForwardConfig::Experts(experts.clone())));
    let config =
        sized("mixtral", [4096, 14336, 32, 32, 8], json!({"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": null}));
    assert_eq!(config.layers[0].feed_forward.width(), 14336);
}

#[test]
fn mistral_7b_sees_as_far_as_its_window() {
    assert_eq!(sized("mistral", [4096, 14336, 32, 32, 8], json!({"sliding_window": 4096})).window(), Some(4096));
    assert_eq!(sized("mistral", [4096, 14336, 32, 32, 8], json!({"sliding_window": null})).window(), None);
}

#[test]
fn gemma_2_2b_bounds_scores_and_logits() {
    let own = json!({"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4096, "query_pre_attn_scalar": 256,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0});
    let config = sized("gemma2", [2304, 9216, 26, 8, 4], own);
    assert_eq!((config.attention().softcap, config.logit_softcap, config.tie_word_embeddings), (Some(50.0), Some(30.0), true));
    assert_eq!((windows(&config), config.layers[1].attention.window), (vec![4096; 13], None));
    assert_eq!((config.embedding_scale, config.attention().scale), (48.0, 0.0625));
}

/// GGUF files do not say it; `gemma2.cpp` and `gemma3.cpp` of llama.cpp: 27B scales by D / heads.
#[test]
fn gemma_27b_scales_by_another_width_than_its_heads() {
    let scale = |family: &str, [hidden, layers, heads]: [usize; 3]| {
        sized(family, [hidden, 21504, layers, heads, 16], json!({"head_dim": 128, "sliding_window": 1024})).attention().scale
    };
    assert_eq!((scale("gemma2", [4608, 46, 32]), scale("gemma3_text", [5376, 62, 32])), (1.0 / 12.0, 1.0 / 168f32.sqrt()));
    assert_eq!(scale("gemma2", [3584, 42, 16]), 1.0 / 128f32.sqrt());
}

#[test]
fn gemma_3_1b_rotates_windowed_layers_faster() {
    let own = json!({"head_dim": 256, "hidden_activation": "gelu_pytorch_tanh", "sliding_window": 512, "sliding_window_pattern": 6,
        "query_pre_attn_scalar": 256, "rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": null, "final_logit_softcapping": null});
    let config = sized("gemma3_text", [1152, 6912, 26, 4, 1], own);
    let theta = |layer| (rotation(&config, layer).theta, config.layers[layer].attention.window);
    assert_eq!((theta(0), theta(5), theta(11), theta(25)), ((1e4, Some(512)), (1e6, None), (1e6, None), (1e4, Some(512))));
    assert_eq!(config.logit_softcap, None);
}

#[test]
fn phi_3_5_mini_is_good_for_its_short_context() {
    let scaling = json!({"type": "longrope", "short_factor": vec![1.0; 48], "long_factor": vec![64.0; 48]});
    let config = sized(
        "phi3",
        [3072, 8192, 32, 32, 32],
        json!({"original_max_position_embeddings": 4096, "rope_scaling": scaling, "sliding_window": 262_144}),
    );
    assert_eq!((config.max_position_embeddings, rotation(&config, 0).dims, config.window()), (4096, 96, Some(262_144)));
    assert!((rotation(&config, 0).rotation().magnitude - (1.0 + 32f32.ln() / 4096f32.ln()).sqrt()).abs() < 1e-6);
}

#[test]
fn glm_4_9b_rotates_half_of_each_head() {
    let config = sized("glm4", [4096, 13696, 40, 32, 2], json!({"head_dim": 128, "partial_rotary_factor": 0.5, "attention_bias": true}));
    assert_eq!((rotation(&config, 0).dims, rotation(&config, 0).interleaved, config.attention().bias), (64, true, true));
}

#[test]
fn smollm_3_leaves_every_fourth_layer_without_positions() {
    let config = sized("smollm3", [2048, 11008, 36, 16, 4], json!({"rope_theta": 5e6, "no_rope_layer_interval": 4}));
    let rotated: Vec<bool> = config.layers[..5].iter().map(|layer| layer.attention.rotation.is_some()).collect();
    assert_eq!(rotated, [true, true, true, false, true]);
}

#[test]
fn what_is_not_done_is_refused_by_name() {
    let vision = json!({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}, "vision_config": {}});
    assert_eq!(
        read(vision).unwrap_err().to_string(),
        "config.json: text_config: `gemma3` is a model of text and more: ask for its text part alone (model.textOnly)"
    );
    let error = read(json!({"model_type": "qwen2_vl"})).unwrap_err().to_string();
    assert!(
        error.starts_with("config.json: model_type: `qwen2_vl` is not supported; supported are deepseek_v2, deepseek_v3, gemma2,"),
        "{error}"
    );
}

/// What DeepSeek's configurations have in common.
fn latent(model_type: &str, [hidden, wide, layers, heads]: [usize; 4], own: Value) -> ModelConfig {
    let mut json = json!({
        "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_layer_freq": 1, "attention_bias": false,
    });
    let (Value::Object(members), Value::Object(own)) = (&mut json, own) else { unreachable!() };
    members.extend(own);
    sized(model_type, [hidden, wide, layers, heads, heads], json)
}

fn routing(config: &ModelConfig, layer: usize) -> &ExpertsConfig {
    let FeedForwardConfig::Experts(experts) = &config.layers[layer].feed_forward else { panic!("layer {layer} is dense") };
    experts
}

#[test]
fn deepseek_v2_lite_keeps_512_compressed_and_64_rotated_values() {
    let scaling = json!({"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
                         "original_max_position_embeddings": 4096, "type": "yarn"});
    let own = json!({
        "q_lora_rank": null, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "norm_topk_prob": false, "scoring_func": "softmax",
        "routed_scaling_factor": 1.0, "rope_scaling": scaling, "max_position_embeddings": 163_840,
    });
    let config = latent("deepseek_v2", [2048, 10944, 27, 16], own);
    let attention = config.attention();
    assert_eq!((attention.key_value_heads, attention.head_dim, attention.value_dim()), (1, 576, 128));
    let lengthened = 0.1 * 0.707 * 40f32.ln() + 1.0;
    assert!((attention.scale - lengthened * lengthened / 192f32.sqrt()).abs() < 1e-6);
    assert!((rotation(&config, 0).rotation().magnitude - 1.0).abs() < 1e-6, "mscale over mscale_all_dim");
    assert_eq!(config.layers[0].feed_forward.width(), 10944);
    let experts = routing(&config, 1);
    assert_eq!((experts.count, experts.top, experts.shared, experts.groups), (64, 6, Some(2816), None));
}

#[test]
fn deepseek_v3_chooses_from_four_of_eight_groups_and_its_61st_layer_is_not_run() {
    let own = json!({
        "q_lora_rank": 1536, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "moe_intermediate_size": 2048,
        "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc", "norm_topk_prob": true, "scoring_func": "sigmoid",
        "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1,
        "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
    });
    let config = latent("deepseek_v3", [7168, 18432, 61, 128], own);
    assert_eq!((config.attention().latent.unwrap().query_rank, config.further_layers), (Some(1536), 1));
    assert!(matches!(config.layers[2].feed_forward, FeedForwardConfig::Gated { .. }));
    let experts = routing(&config, 3);
    assert_eq!((experts.scores, experts.groups), (Scores::Sigmoid, Some(Groups { count: 8, top: 4, best: 2 })));
    assert_eq!((experts.shared, experts.normalise, experts.factor), (Some(2048), true, 2.5));
}

#[test]
fn experts_that_no_row_could_reach_are_refused() {
    let own = json!({"model_type": "deepseek_v3", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "vocab_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 8, "num_experts_per_tok": 5, "moe_intermediate_size": 8, "n_group": 4,
        "topk_group": 2});
    assert_eq!(read(own).unwrap_err().to_string(), "config.json: n_group: 2 of 4 groups for 5 of 8 experts");
}

#[test]
fn what_thousands_of_layers_have_in_common_is_made_once() {
    let deep = |head_dim: usize, factors: usize| {
        read(json!({"model_type": "phi3", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4096, "num_attention_heads": 4,
            "head_dim": head_dim, "vocab_size": 100, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_scaling": {
                "type": "longrope", "short_factor": vec![1; factors], "long_factor": vec![1; factors]}}))
    };
    let started = std::time::Instant::now();
    assert_eq!(deep(1 << 14, 1 << 13).unwrap().layers.len(), 4096);
    assert_eq!(deep(1 << 24, 1 << 13).unwrap_err().to_string(), "config.json: head_dim: 16777216 is not supported");
    assert_eq!(deep(8, 1 << 20).unwrap_err().to_string(), "config.json: rope_scaling: 1048576 factors for 4 frequencies");
    assert!(started.elapsed().as_secs() < 10);
}
