//! Every family against its own class in transformers: a tiny random checkpoint with each special case (`tests/oracles/families.py`).

use carryon_crds::pool::Dtype;
use carryon_worker::kernel::{Backend, PageTable};
use carryon_worker::model::{Files, Model};
use safetensors::SafeTensors;
use serde_json::json;

use super::common::engine::{Engine, candle, cpu};
use super::{Expected, F32_TOLERANCE, assert_rows, decodes, fixtures, states, tap_names};

/// In bf16 no row is further off than 2e-2, or than transformers' own bf16 is, which the generator prints.
const FAMILIES: [(&str, f64); 20] = [
    ("deepseek_v2", 2e-2),
    ("deepseek_v2_lite", 2e-2),
    ("deepseek_v3", 2e-2),
    ("deepseek_v3_halves", 2e-2),
    ("gemma2", 2e-2),
    ("gemma3", 5.0e-2),
    ("glm4", 2e-2),
    ("llama3", 2.1e-2),
    ("llama_linear", 2e-2),
    ("llama_dynamic", 2.6e-2),
    ("mistral", 2.9e-2),
    ("mixtral", 2.9e-2),
    ("olmo2", 2.5e-2),
    ("phi3", 3.5e-2),
    ("qwen2", 2e-2),
    ("qwen2_yarn", 2e-2),
    ("qwen3", 2e-2),
    ("qwen3_moe", 2.9e-2),
    ("qwen3_moe_whole", 2e-2),
    ("smollm3", 2.3e-2),
];

/// `company` is how far a sequence may be off beside others, cut or decoded from what it is alone: nothing on a CPU.
fn check<B: Backend>(name: &str, backend: B, dtype: Dtype, tolerance: f64, company: f64) {
    let folder = fixtures().join("families").join(name);
    let model = Engine::load(&folder, dtype, backend);
    let expected = Expected::read(&format!("families/{name}/states.safetensors"));
    let (width, layers) = (model.model.config.hidden_size, model.model.config.layers.len());
    let tokens: Vec<Vec<u32>> = (0..3).map(|sequence| expected.integers(&format!("{sequence}.tokens"))).collect();
    let alone: Vec<_> = tokens.iter().map(|tokens| states(&model, tokens)).collect();
    for (sequence, found) in alone.iter().enumerate() {
        for (tap, found) in tap_names(layers).zip(found) {
            assert_rows(&format!("{name}, {sequence}.{tap}"), found, &expected.floats(&format!("{sequence}.{tap}")), width, tolerance);
        }
        let logits = expected.floats(&format!("{sequence}.logits"));
        assert_rows(&format!("{name}, logits"), &model.logits(&found[layers + 1]), &logits, model.model.config.vocab_size, 2.0 * tolerance);
    }
    let sequences: Vec<&[u32]> = tokens.iter().map(Vec::as_slice).collect();
    let ragged = model.states(&sequences, &mut [(); 3].map(|()| PageTable::default()), &model.all_taps());
    for (tap, ragged) in ragged.iter().enumerate() {
        let apart: Vec<f32> = alone.iter().flat_map(|states| states[tap].clone()).collect();
        assert_rows(&format!("{name}, ragged"), ragged, &apart, width, company);
    }
    decodes(&model, &tokens[0], &alone[0], company);
}

#[test]
fn families_in_f32_have_the_states_and_logits_of_transformers() {
    for (name, _) in FAMILIES {
        check(name, cpu(2), Dtype::Float32, F32_TOLERANCE, 0.0);
        check(name, candle(), Dtype::Float32, F32_TOLERANCE, F32_TOLERANCE);
    }
}

#[test]
fn families_in_bf16_are_as_near_as_bf16_of_transformers() {
    for (name, tolerance) in FAMILIES {
        check(name, cpu(2), Dtype::Bfloat16, tolerance, 0.0);
        check(name, candle(), Dtype::Bfloat16, tolerance, tolerance);
    }
}

/// GGUF files of the families, written by llama.cpp's converter, and states of the same checkpoints in transformers (`tests/oracles/gguf_families.py`).
const GGUF: [&str; 15] = [
    "deepseek_v2",
    "deepseek_v2_lite",
    "deepseek_v3",
    "gemma2",
    "gemma3",
    "glm4",
    "llama3",
    "llama_linear",
    "mixtral",
    "olmo2",
    "phi3",
    "qwen2_yarn",
    "qwen3",
    "qwen3_moe",
    "smollm3",
];

/// What no row is further off by in bf16.
const GGUF_BF16_TOLERANCE: f64 = 2e-2;

fn check_gguf<B: Backend>(name: &str, backend: B, dtype: Dtype, tolerance: f64) {
    let path = |name: &str| fixtures().join("gguf").join(format!("{name}.gguf"));
    // One is cut in several files.
    let whole = Some(path(name)).filter(|path| path.exists());
    let model = Engine::load(&whole.unwrap_or_else(|| path(&format!("{name}-00001-of-00003"))), dtype, backend);
    let expected = Expected::read(&format!("gguf/{name}.safetensors"));
    let (width, layers) = (model.model.config.hidden_size, model.model.config.layers.len());
    let tokens = expected.integers("tokens");
    let found = states(&model, &tokens);
    for (tap, found) in tap_names(layers).zip(&found) {
        assert_rows(&format!("{name}.gguf, {tap}"), found, &expected.floats(&tap), width, tolerance);
    }
    let logits = expected.floats("logits");
    assert_rows(
        &format!("{name}.gguf, logits"),
        &model.logits(&found[layers + 1]),
        &logits,
        model.model.config.vocab_size,
        2.0 * tolerance,
    );
    decodes(&model, &tokens, &found, if dtype == Dtype::Float32 { F32_TOLERANCE } else { tolerance });
}

#[test]
fn gguf_files_of_all_families_have_the_states_and_logits_of_transformers() {
    for name in GGUF {
        check_gguf(name, cpu(2), Dtype::Float32, F32_TOLERANCE);
        check_gguf(name, candle(), Dtype::Float32, F32_TOLERANCE);
        check_gguf(name, cpu(2), Dtype::Bfloat16, GGUF_BF16_TOLERANCE);
        check_gguf(name, candle(), Dtype::Bfloat16, GGUF_BF16_TOLERANCE);
    }
}

#[test]
fn every_gguf_fixture_is_compared() {
    let found = std::fs::read_dir(fixtures().join("gguf")).unwrap().map(|entry| entry.unwrap().path());
    let mut found: Vec<_> =
        found.filter(|path| path.extension().unwrap() == "safetensors").map(|path| path.file_stem().unwrap().to_owned()).collect();
    found.sort();
    assert_eq!(found, GGUF.map(std::ffi::OsString::from));
}

/// With another value behind a key the states are others: every key is read.
#[test]
fn what_is_special_in_a_gguf_file_can_be_seen_in_its_states() {
    for (name, key, value) in [
        ("deepseek_v2", "deepseek2.expert_weights_scale", 1f32.to_bits()),
        ("deepseek_v2", "deepseek2.rope.scaling.yarn_log_multiplier", 0.2f32.to_bits()),
        ("deepseek_v2_lite", "deepseek2.expert_used_count", 1),
        ("deepseek_v3", "deepseek2.expert_group_count", 2),
        ("deepseek_v3", "deepseek2.expert_group_used_count", 4),
        ("gemma2", "gemma2.attn_logit_softcapping", 50f32.to_bits()),
        ("gemma2", "gemma2.attention.sliding_window", 64),
        ("gemma3", "gemma3.attention.sliding_window", 64),
        ("gemma3", "gemma3.rope.freq_base_swa", 5000f32.to_bits()),
        ("gemma3", "gemma3.rope.scaling.factor", 1f32.to_bits()),
        ("glm4", "glm4.rope.dimension_count", 16),
        ("llama_linear", "llama.rope.scaling.factor", 1f32.to_bits()),
        ("mixtral", "llama.expert_used_count", 1),
        ("phi3", "phi3.attention.sliding_window", 0),
        ("phi3", "phi3.rope.scaling.attn_factor", 1f32.to_bits()),
        ("qwen2_yarn", "qwen2.rope.scaling.factor", 2f32.to_bits()),
        ("qwen3_moe", "qwen3moe.expert_used_count", 1),
    ] {
        let mut bytes = std::fs::read(fixtures().join(format!("gguf/{name}.gguf"))).unwrap();
        // A number of four bytes follows key and type.
        let place = bytes.windows(key.len()).position(|window| window == key.as_bytes()).unwrap() + key.len() + 4;
        assert_ne!(bytes[place..place + 4], value.to_le_bytes(), "{name}: {key}");
        bytes[place..place + 4].copy_from_slice(&value.to_le_bytes());
        let changed = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(changed.path(), bytes).unwrap();
        let expected = Expected::read(&format!("gguf/{name}.safetensors"));
        let found = states(&Engine::load(changed.path(), Dtype::Float32, cpu(2)), &expected.integers("tokens")).pop().unwrap();
        let off = apart(&found, &expected.floats("final"));
        assert!(off > 1e-2, "{name}: {key} changes the final states by {off:.1e} alone");
    }
}

/// Norm of the difference over the norm of what is expected.
fn apart(found: &[f32], expected: &[f32]) -> f64 {
    let off: f64 = found.iter().zip(expected).map(|(found, expected)| f64::from(found - expected).powi(2)).sum();
    (off / expected.iter().map(|expected| f64::from(*expected).powi(2)).sum::<f64>()).sqrt()
}

/// A fixture whose special case was not computed would be no oracle of it: with another value the states are others.
#[test]
fn what_is_special_in_a_family_can_be_seen_in_its_states() {
    for (name, member, value) in [
        ("deepseek_v2", "/rope_parameters/mscale", json!(0.2)),
        ("deepseek_v2", "/rope_parameters/mscale_all_dim", json!(0.2)),
        ("deepseek_v2", "/topk_method", json!("greedy")),
        ("deepseek_v2", "/topk_group", json!(3)),
        ("deepseek_v2", "/routed_scaling_factor", json!(1.0)),
        ("deepseek_v3", "/topk_group", json!(3)),
        ("deepseek_v3", "/norm_topk_prob", json!(false)),
        ("deepseek_v3", "/rope_interleave", json!(false)),
        ("deepseek_v3_halves", "/rope_interleave", json!(true)),
        ("gemma2", "/attn_logit_softcapping", json!(50.0)),
        ("gemma2", "/sliding_window", json!(64)),
        ("gemma2", "/query_pre_attn_scalar", json!(16)),
        ("gemma3", "/sliding_window", json!(64)),
        ("gemma3", "/rope_parameters/sliding_attention/rope_theta", json!(5000.0)),
        ("gemma3", "/rope_parameters/full_attention/factor", json!(1.0)),
        ("glm4", "/rope_parameters/partial_rotary_factor", json!(1.0)),
        ("llama3", "/rope_parameters/factor", json!(1.0)),
        ("llama3", "/rope_parameters/high_freq_factor", json!(2.0)),
        ("llama_linear", "/rope_parameters/factor", json!(1.0)),
        ("mistral", "/sliding_window", json!(null)),
        ("phi3", "/sliding_window", json!(null)),
        ("phi3", "/rope_parameters/short_factor", json!([1.0, 1.0, 1.0])),
        ("phi3", "/max_position_embeddings", json!(64)),
        ("qwen2", "/use_sliding_window", json!(false)),
        ("qwen2_yarn", "/rope_parameters/factor", json!(2.0)),
        ("qwen3_moe", "/norm_topk_prob", json!(false)),
        ("qwen3_moe_whole", "/num_experts_per_tok", json!(1)),
        ("smollm3", "/no_rope_layers", json!([1, 1, 1])),
    ] {
        let (own, changed) = (fixtures().join("families").join(name), tempfile::tempdir().unwrap());
        let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(own.join("config.json")).unwrap()).unwrap();
        assert_ne!(config.pointer(member), Some(&value), "{name} {member}");
        *config.pointer_mut(member).unwrap() = value;
        std::fs::write(changed.path().join("config.json"), config.to_string()).unwrap();
        std::fs::copy(own.join("model.safetensors"), changed.path().join("model.safetensors")).unwrap();
        let expected = Expected::read(&format!("families/{name}/states.safetensors"));
        let model = Engine::load(changed.path(), Dtype::Float32, cpu(2));
        let found = states(&model, &expected.integers("0.tokens")).pop().unwrap();
        let off = apart(&found, &expected.floats("0.final")[..found.len()]);
        assert!(off > 1e-2, "{name}: {member} changes the final states by {off:.1e} alone");
    }
}

#[test]
fn every_fixture_is_compared() {
    let mut found: Vec<_> = std::fs::read_dir(fixtures().join("families")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    let mut known = FAMILIES.map(|(name, _)| std::ffi::OsString::from(name));
    found.sort();
    known.sort();
    assert_eq!(found, known);
}

/// A model of text and images holds the text part under other names; without it being asked for, it is refused by name.
#[test]
fn the_text_part_of_a_model_of_text_and_images_is_the_model_that_it_is_alone() {
    let own = fixtures().join("families/gemma3");
    let weights = std::fs::read(own.join("model.safetensors")).unwrap();
    let alone = Engine::load(&own, Dtype::Float32, cpu(2));
    let tokens = Expected::read("families/gemma3/states.safetensors").integers("0.tokens");
    let read = |path: &std::path::Path| -> serde_json::Value { serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap() };
    // Today's names, and those before: of the decoder, and of what is beside it.
    for (decoder, beside) in [("model.language_model.", "model.vision_tower."), ("language_model.model.", "vision_tower.")] {
        let whole = tempfile::tempdir().unwrap();
        let tensors = SafeTensors::deserialize(&weights).unwrap();
        let renamed = tensors.iter().map(|(name, view)| (name.replacen("model.", decoder, 1), view));
        let image = tensors.tensor("model.norm.weight").unwrap();
        let all: Vec<_> = renamed.chain([(format!("{beside}patches.weight"), image)]).collect();
        std::fs::write(whole.path().join("model.safetensors"), safetensors::serialize(all, None).unwrap()).unwrap();
        let config = json!({"model_type": "gemma3", "text_config": read(&own.join("config.json")), "vision_config": {"hidden_size": 8}});
        std::fs::write(whole.path().join("config.json"), config.to_string()).unwrap();
        let text = Files { path: whole.path(), text_only: true };
        let found = Engine::load(text, Dtype::Float32, cpu(2));
        assert_eq!(states(&found, &tokens), states(&alone, &tokens), "{decoder}");
        let refused = Model::load(whole.path(), Dtype::Float32, cpu(1)).err().unwrap().to_string();
        assert!(refused.ends_with("`gemma3` is a model of text and more: ask for its text part alone (model.textOnly)"), "{refused}");
    }
}
