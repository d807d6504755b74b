//! Every family against its own class in transformers: a tiny random checkpoint with each special case (`tests/oracles/families.py`).

use carryon_crds::pool::Dtype;
use carryon_worker::kernel::{Backend, PageTable};

use super::common::engine::{Engine, candle, cpu};
use super::{Expected, F32_TOLERANCE, assert_rows, decodes, fixtures, states, tap_names};

/// In bf16 no row is further off than 2e-2, or than transformers' own bf16 is, which the generator prints.
const FAMILIES: [(&str, f64); 13] = [
    ("gemma2", 2.2e-2),
    ("gemma3", 5.0e-2),
    ("glm4", 3.0e-2),
    ("llama3", 2e-2),
    ("llama_linear", 2e-2),
    ("llama_dynamic", 2.5e-2),
    ("mistral", 2.9e-2),
    ("olmo2", 2.4e-2),
    ("phi3", 3.5e-2),
    ("qwen2", 2e-2),
    ("qwen2_yarn", 2e-2),
    ("qwen3", 2e-2),
    ("smollm3", 2.3e-2),
];

fn check<B: Backend>(name: &str, backend: B, dtype: Dtype, tolerance: f64) {
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
        assert_rows(&format!("{name}, ragged"), ragged, &apart, width, tolerance);
    }
    decodes(&model, &tokens[0], &alone[0], tolerance);
}

#[test]
fn families_in_f32_have_the_states_and_logits_of_transformers() {
    for (name, _) in FAMILIES {
        check(name, cpu(2), Dtype::Float32, F32_TOLERANCE);
        check(name, candle(), Dtype::Float32, F32_TOLERANCE);
    }
}

#[test]
fn families_in_bf16_are_as_near_as_bf16_of_transformers() {
    for (name, tolerance) in FAMILIES {
        check(name, cpu(2), Dtype::Bfloat16, tolerance);
        check(name, candle(), Dtype::Bfloat16, tolerance);
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
