//! Damaged and unsupported checkpoints end in errors that name file and key or tensor, whatever the damage.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod f8;
mod ggml;
mod safetensors_files;
mod shards;
mod split;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_worker::model::Model;
use carryon_worker::model::gguf::{Gguf, Value};
use common::engine::cpu;
use common::tiny::{Random, Tiny};

fn digest(path: &Path) -> String {
    Model::load(path, Dtype::Float32, cpu(1)).unwrap_or_else(|error| panic!("{error}")).weights_digest().to_owned()
}

fn error(path: &Path) -> String {
    match Model::load(path, Dtype::Float32, cpu(1)) {
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
        if let Err(error) = Model::load(&path, Dtype::Float32, cpu(1)) {
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
        (b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba", "general.architecture: `mamba` is not supported; supported are"),
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

/// A metadata entry of a GGUF file: key, type, bytes of the value.
fn entry(key: &[u8], kind: u32, value: &[&[u8]]) -> Vec<u8> {
    [&(key.len() as u64).to_le_bytes(), key, &kind.to_le_bytes(), &value.concat()].concat()
}

/// The head of a list: type and number of its entries.
fn list(kind: u32, count: u64) -> [u8; 12] {
    let mut head = [0; 12];
    head[..4].copy_from_slice(&kind.to_le_bytes());
    head[4..].copy_from_slice(&count.to_le_bytes());
    head
}

/// The types are those of ggml's gguf.md: 8 is text, 9 a list, 10 an unsigned and 12 a floating-point number of 64 bits.
/// Files of most families leave the size of the vocabulary to the embedding.
#[test]
fn a_gguf_need_not_say_how_large_its_vocabulary_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("silent.gguf");
    let (mut bytes, key) = (Tiny::default().gguf(), b"llama.vocab_size");
    let place = bytes.windows(key.len()).position(|window| window == key).unwrap();
    bytes[place..place + key.len()].copy_from_slice(b"llama.vocab_sort");
    fs::write(&path, bytes).unwrap();
    assert_eq!(Model::load(&path, Dtype::Float32, cpu(1)).unwrap().config.vocab_size, Tiny::default().vocabulary);
}

#[test]
fn metadata_that_nobody_asks_for_refuse_no_model() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("rich.gguf");
    let latin = &[&4u64.to_le_bytes()[..], b"caf\xe9"].concat()[..];
    let deep: Vec<[u8; 12]> = (0..100_000).map(|_| list(9, 1)).chain([list(0, 0)]).collect();
    let entries = [
        entry(b"general.name", 8, &[latin]),
        entry(b"general.description", 8, &[latin]),
        entry(b"general.tags", 9, &[&list(8, 2), latin, &1u64.to_le_bytes(), b"a"]),
        entry(b"some.table", 9, &[&list(9, 2), &list(4, 2), &[0; 8], &list(8, 1), latin]),
        entry(b"some.empty", 9, &[&list(9, 0)]),
        entry(b"some.deep", 9, &[&deep.concat()]),
        entry(b"some.sizes", 9, &[&list(10, 2), &[0xFF; 8], &7u64.to_le_bytes()]),
        entry(b"some.signed", 9, &[&list(3, 2), &[0xFE, 0xFF, 0xFF, 0x7F]]),
        entry(b"some.bits", 9, &[&list(7, 2), &[1, 0]]),
        entry(b"some.doubles", 9, &[&list(12, 1), &0.1f64.to_le_bytes()]),
        entry(b"last.key", 4, &[&7u32.to_le_bytes()]),
    ];
    fs::write(&path, Tiny::default().gguf_with(&entries)).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    let integers = |key: &str| match &gguf.metadata[key] {
        Value::Integers(values) => values.iter().collect::<Vec<_>>(),
        other => panic!("{other:?}"),
    };
    assert_eq!(gguf.metadata["last.key"], Value::Integer(7));
    assert_eq!(integers("some.sizes"), [u64::MAX.into(), 7]);
    assert_eq!(integers("some.signed"), [-2, 0x7FFF]);
    assert_eq!(integers("some.bits"), [1, 0]);
    assert_eq!(gguf.metadata["some.doubles"], Value::Floats(vec![0.1]));
    assert_eq!(gguf.metadata["some.table"], Value::Other("a list of lists"));
    assert!(
        gguf.text("general.description")
            .unwrap_err()
            .to_string()
            .ends_with("general.description: expected text, found text that is not UTF-8")
    );
    digest(&path);
    // What does not fit into the file is refused all the same.
    for (kind, value) in [(9, [&list(9, u64::MAX)[..]].concat()), (9, [list(9, 2), list(0, u64::MAX >> 1)].concat()), (99, vec![0; 8])] {
        fs::write(&path, Tiny::default().gguf_with(&[entry(b"some.table", kind, &[&value])])).unwrap();
        assert!(error(&path).contains("some.table"), "{}", error(&path));
    }
}

/// What the decoder does not use is part of some other model: a bias, an adapter, a further layer. llama.cpp refuses such a GGUF file too.
#[test]
fn tensors_that_the_decoder_does_not_use_are_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let gguf = folder.path().join("more.gguf");
    for (name, length, in_gguf) in [
        ("model.layers.1.self_attn.q_proj.bias", 60, "blk.1.attn_q.bias"),
        ("model.layers.3.input_layernorm.weight", 40, "blk.3.attn_norm.weight"),
        ("model.layers.0.self_attn.q_norm.weight", 10, "blk.0.self_attn.q_norm.weight"),
        ("score.weight", 40, "score.weight"),
    ] {
        for tied in [true, false] {
            let tiny = Tiny { tied, extra: BTreeMap::from([(name.to_owned(), (vec![length], vec![0.5; length]))]), ..Tiny::default() };
            tiny.write(folder.path());
            let expected = format!("{}: {name}: ", folder.path().join("model.safetensors").display());
            assert!(error(folder.path()).starts_with(&expected), "{}", error(folder.path()));
            fs::write(&gguf, tiny.gguf()).unwrap();
            assert!(error(&gguf).starts_with(&format!("{}: {in_gguf}: ", gguf.display())), "{}", error(&gguf));
        }
    }
}

/// The factors of positions that llama.cpp reads (`LLM_KV_ROPE_SCALING_FACTOR` and the key before it).
#[test]
fn a_gguf_that_scales_positions_is_understood_however_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scaled.gguf");
    let kind = |kind: &str| entry(b"llama.rope.scaling.type", 8, &[&(kind.len() as u64).to_le_bytes(), kind.as_bytes()]);
    let factor = |key: &str, factor: f32| entry(key.as_bytes(), 6, &[&factor.to_le_bytes()]);
    let [new, old] = ["llama.rope.scaling.factor", "llama.rope.scale_linear"];
    let frequencies = |entries: &[Vec<u8>]| {
        fs::write(&path, Tiny::default().gguf_with(entries)).unwrap();
        let model = Model::load(&path, Dtype::Float32, cpu(1)).unwrap();
        model.config.layers[0].attention.rotation.as_ref().unwrap().rotation().frequencies
    };
    let plain = frequencies(&[]);
    for (entries, divisor) in [
        (vec![factor(new, 4.0)], 4.0),
        (vec![factor(old, 0.5)], 0.5),
        (vec![kind("linear"), factor(new, 8.0)], 8.0),
        (vec![factor(new, 1.0), factor(old, 0.0)], 1.0),
        (vec![kind("none"), factor(new, 4.0)], 1.0),
    ] {
        assert_eq!(frequencies(&entries), plain.iter().map(|frequency| frequency / divisor).collect::<Vec<f32>>());
    }
    fs::write(&path, Tiny::default().gguf_with(&[kind("other")])).unwrap();
    assert!(error(&path).ends_with("rope_type: `other` is not supported"), "{}", error(&path));
}

/// transformers ignores them: what rotation is said twice, and an LM head beside the embedding that it is.
#[test]
fn tensors_that_say_nothing_new_are_taken() {
    let folder = tempfile::tempdir().unwrap();
    let rotation = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"].map(str::to_owned);
    let rotation: BTreeMap<_, _> = rotation.into_iter().map(|name| (name, (vec![5], vec![1.0; 5]))).collect();
    Tiny { extra: rotation.clone(), ..Tiny::default() }.write(folder.path());
    digest(folder.path());
    let embedding = Tiny::default().tensors()["model.embed_tokens.weight"].clone();
    let mut tied = Tiny { tied: true, extra: rotation, ..Tiny::default() };
    tied.extra.insert("lm_head.weight".to_owned(), embedding);
    tied.write(folder.path());
    digest(folder.path());
    tied.extra.get_mut("lm_head.weight").unwrap().1[40] += 1.0;
    tied.write(folder.path());
    let text = error(folder.path());
    assert!(text.contains("model.safetensors: lm_head.weight: ") && text.contains("tie_word_embeddings"), "{text}");
}

/// ggml refuses such files too (`gguf_init_from_file`: a tensor whose offset is not where the one before ends).
#[test]
fn gguf_tensors_that_overlap_or_are_not_aligned_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("overlap.gguf");
    let whole = Tiny::default().gguf();
    // The offset ends the tensor's entry, behind its name, two dimensions and its type.
    let name = whole.windows(19).position(|window| window == b"blk.0.ffn_up.weight").unwrap();
    let place = name + 19 + 4 + 16 + 4;
    let offset = u64::from_le_bytes(whole[place..place + 8].try_into().unwrap());
    for (wrong, expected) in [(offset - 32, "lies inside the tensor before"), (offset + 4, "is no multiple of 32")] {
        let mut bytes = whole.clone();
        bytes[place..place + 8].copy_from_slice(&wrong.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        assert!(error(&path).contains(expected), "{}", error(&path));
    }
}

#[test]
fn configurations_beyond_the_decoder_are_refused_by_field() {
    let folder = tempfile::tempdir().unwrap();
    let tiny = Tiny::default();
    tiny.write(folder.path());
    for (field, value, expected) in [
        ("model_type", serde_json::json!("mamba"), "model_type: `mamba` is not supported; supported are deepseek_v2, "),
        ("rope_scaling", serde_json::json!({"rope_type": "proportional"}), "rope_type: `proportional` is not supported"),
        ("rope_scaling", serde_json::json!({"rope_type": "linear"}), "factor: key is missing"),
        ("rope_scaling", serde_json::json!({"rope_type": "linear", "factor": 0.0}), "rope_scaling: a frequency would be no finite number"),
        ("partial_rotary_factor", serde_json::json!(0.05), "rotary_dim: 0 of 10 is not supported"),
        ("quantization_config", serde_json::json!({"quant_method": "awq"}), "quantization_config"),
        ("attention_bias", serde_json::json!(true), "model.layers.0.self_attn.q_proj.bias: tensor is missing"),
        ("hidden_act", serde_json::json!("gelu"), "hidden_act: `gelu` is not supported"),
        ("num_hidden_layers", serde_json::json!(4), "model.layers.3"),
        ("num_hidden_layers", serde_json::json!(0), "num_hidden_layers: 0 is not between"),
        ("num_hidden_layers", serde_json::json!(1u64 << 40), "num_hidden_layers: 1099511627776 is not between"),
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
