//! Damaged and unsupported checkpoints end in errors that name file and key or tensor, whatever the damage.

#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_worker::kernel::Threads;
use carryon_worker::model::Model;
use common::tiny::{Random, Tiny};

fn error(path: &Path) -> String {
    match Model::load(path, Dtype::Float32, Threads::new(1)) {
        Ok(_) => panic!("{} was accepted", path.display()),
        Err(error) => error.to_string(),
    }
}

#[test]
fn gguf_cut_short_anywhere_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cut.gguf");
    let whole = Tiny::default().gguf();
    let directory = whole.windows(13).position(|window| window == b"output.weight").unwrap();
    let lengths = (0..directory + 200).step_by(7).chain((directory..whole.len()).step_by(1009)).chain([whole.len() - 1]);
    for length in lengths {
        fs::write(&path, &whole[..length]).unwrap();
        let text = error(&path);
        assert!(text.contains("cut.gguf"), "{length}: {text}");
    }
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(error(&path).contains("tensor reaches beyond the end of the file"), "{}", error(&path));
}

#[test]
fn gguf_with_any_wrong_byte_in_its_header_neither_panics_nor_hogs_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("wrong.gguf");
    let whole = Tiny::default().gguf();
    let header = whole.len() - Tiny::default().tensors().values().map(|(_, values)| values.len().next_multiple_of(8) * 4).sum::<usize>();
    let mut random = Random(3);
    for place in 0..header {
        let mut bytes = whole.clone();
        bytes[place] = [0xff, 0, bytes[place] ^ (1 << (random.next() % 8))][place % 3];
        fs::write(&path, bytes).unwrap();
        // Some bytes make another sound file (a renamed key, another ε): what matters is that the rest are errors.
        if let Err(error) = Model::load(&path, Dtype::Float32, Threads::new(1)) {
            assert!(error.to_string().contains("wrong.gguf"), "{error}");
        }
    }
}

#[test]
fn gguf_errors_name_key_and_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("named.gguf");
    let whole = Tiny::default().gguf();
    let replaced = |from: &[u8], to: &[u8]| {
        let start = whole.windows(from.len()).position(|window| window == from).unwrap();
        [&whole[..start], to, &whole[start + from.len()..]].concat()
    };
    for (from, to, expected) in [
        (&b"llama.block_count"[..], &b"llama.block_c0unt"[..], "llama.block_count: key is missing"),
        (b"blk.1.ffn_up", b"blk.1.ffn_pu", "blk.1.ffn_up.weight: tensor is missing"),
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0qwen2", "general.architecture: `qwen2` is not supported"),
        (b"GGUF\x03", b"GGUF\x09", "GGUF version 9 is not supported"),
        (b"GGUF", b"GGML", "not a GGUF file"),
        (
            b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0\x02\0\0\0\0\0\0\0",
            b"tokenizer.ggml.tokens\x09\0\0\0\x08\0\0\0\x02\0\0\0\0\0\0\x70",
            "tokenizer.ggml.tokens",
        ),
    ] {
        fs::write(&path, replaced(from, to)).unwrap();
        let text = error(&path);
        assert!(text.contains(expected) && text.contains("named.gguf"), "expected {expected:?}, got {text:?}");
    }
}

#[test]
fn folders_with_damage_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let weights = folder.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    for length in [0, 7, 8, 9, 500, whole.len() / 2, whole.len() - 1] {
        fs::write(&weights, &whole[..length]).unwrap();
        assert!(error(folder.path()).contains("model.safetensors"), "{length}: {}", error(folder.path()));
    }
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    fs::write(&weights, huge).unwrap();
    assert!(error(folder.path()).contains("bytes of header"));
    fs::remove_file(&weights).unwrap();
    assert!(error(folder.path()).contains("no such file"));
}

#[test]
fn configurations_beyond_the_decoder_are_refused_by_field() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Tiny::default();
    tiny.write(folder.path());
    for (field, value, expected) in [
        ("model_type", serde_json::json!("qwen2"), "model_type: `qwen2` is not supported"),
        ("rope_scaling", serde_json::json!({"rope_type": "yarn", "factor": 4.0}), "rope_scaling: \"yarn\" is not supported"),
        ("quantization_config", serde_json::json!({"quant_method": "awq"}), "quantization_config"),
        ("attention_bias", serde_json::json!(true), "attention_bias: true is not supported"),
        ("hidden_act", serde_json::json!("gelu"), "hidden_act: `gelu` is not supported"),
        ("num_hidden_layers", serde_json::json!(4), "model.layers.3"),
        ("num_hidden_layers", serde_json::json!(0), "num_hidden_layers: 0 is not between"),
        ("vocab_size", serde_json::json!(u64::MAX), "vocab_size"),
        ("hidden_size", serde_json::json!(41), "shape"),
        ("num_key_value_heads", serde_json::json!(4), "num_key_value_heads: 6 query heads are no multiple of 4"),
        ("rms_norm_eps", serde_json::json!("small"), "config.json"),
    ] {
        let mut config = tiny.config();
        config[field] = value;
        fs::write(folder.path().join("config.json"), config.to_string()).unwrap();
        let text = error(folder.path());
        assert!(text.contains(expected), "{field}: expected {expected:?}, got {text:?}");
    }
}
