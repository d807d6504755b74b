//! Damaged and unsupported checkpoints end in errors that name file and key or tensor, whatever the damage.

#![allow(clippy::unwrap_used)]

#[path = "../common/mod.rs"]
mod common;
mod ggml;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_worker::model::Model;
use carryon_worker::model::gguf::{Gguf, Value};
use common::engine::cpu;
use common::tiny::{Random, Tiny};
use safetensors::tensor::{Dtype as TensorType, SafeTensors, TensorView};
use serde_json::json;

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
    fs::write(&weights, "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22e\nsize 548105171\n")
        .unwrap();
    assert!(error(folder.path()).contains("it is a Git LFS pointer"), "{}", error(folder.path()));
    fs::remove_file(&weights).unwrap();
    assert!(error(folder.path()).contains("no such file"));
}

/// A safetensors file of `header` and `data`.
fn file(header: &serde_json::Value, data: &[u8]) -> Vec<u8> {
    let header = header.to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

/// Each is refused by the format's own reader too, so the verdict is not ours alone.
#[test]
fn bytes_of_two_tensors_or_of_none_are_refused_as_the_format_says() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let tensor = |begin: u64, end: u64| json!({"dtype": "F32", "shape": [(end.max(begin) - begin) / 4], "data_offsets": [begin, end]});
    let cases = [
        (json!({"a": tensor(0, 16), "b": tensor(8, 24)}), 24, "b: bytes 8..24 do not follow"),
        (json!({"a": tensor(0, 16), "b": tensor(0, 16)}), 16, "b: bytes 0..16 do not follow"),
        (json!({"a": tensor(0, 16), "b": tensor(4, 12)}), 16, "b: bytes 4..12 do not follow"),
        (json!({"a": tensor(0, 8), "b": tensor(12, 16)}), 16, "b: bytes 12..16 do not follow"),
        (json!({"a": tensor(4, 16)}), 16, "a: bytes 4..16 do not follow"),
        (json!({"a": tensor(0, 16)}), 20, "data: 4 bytes at the end belong to no tensor"),
        (json!({"a": tensor(0, 16)}), 12, "a: bytes 0..16 are not inside the file"),
        (json!({"a": {"dtype": "F32", "shape": [0], "data_offsets": [16, 0]}}), 16, "a: bytes 16..0 are not inside the file"),
        (json!({"__metadata__": {"format": "pt"}}), 8, "data: 8 bytes at the end belong to no tensor"),
        (json!([1]), 0, "header"),
    ];
    for (header, length, expected) in cases {
        let bytes = file(&header, &vec![0; length]);
        assert!(SafeTensors::deserialize(&bytes).is_err(), "{header} is sound");
        fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
        let text = error(folder.path());
        assert!(text.contains(expected) && text.contains("model.safetensors"), "{header}: expected {expected:?}, got {text:?}");
    }
    // Sound: nothing but room between header and data, and a tensor of no bytes.
    let mut header = json!({"a": tensor(0, 0), "b": tensor(0, 8)}).to_string();
    header.push_str("   ");
    let bytes = [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &[0; 8]].concat();
    SafeTensors::deserialize(&bytes).unwrap();
    fs::write(folder.path().join("model.safetensors"), bytes).unwrap();
    assert!(error(folder.path()).contains(": tensor is missing"));
}

/// Writes `tiny` as transformers' `save_pretrained` does with a small `max_shard_size`: two files and an index.
fn write_shards(tiny: &Tiny, folder: &Path) {
    tiny.write(folder);
    fs::remove_file(folder.join("model.safetensors")).unwrap();
    let tensors = tiny.tensors();
    let mut map = BTreeMap::new();
    for (part, first) in [(1, true), (2, false)] {
        let name = format!("model-0000{part}-of-00002.safetensors");
        let own = tensors.iter().filter(|(name, _)| name.contains("layers.0") == first);
        let views = own.map(|(tensor, (shape, values))| {
            map.insert(tensor.clone(), name.clone());
            (tensor, TensorView::new(TensorType::F32, shape.clone(), bytemuck::cast_slice(values)).unwrap())
        });
        safetensors::serialize_to_file(views.collect::<Vec<_>>(), None, &folder.join(&name)).unwrap();
    }
    let index = json!({"metadata": {"total_size": 4, "total_parameters": 1}, "weight_map": map});
    fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
}

#[test]
fn only_the_files_that_the_index_names_are_read() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_shards(&Tiny::default(), path);
    let alone = digest(path);
    fs::write(path.join("adapter_model.safetensors"), "an adapter").unwrap();
    fs::write(path.join("._model-00001-of-00002.safetensors"), "what macOS leaves").unwrap();
    fs::write(path.join("consolidated.safetensors"), fs::read(path.join("model-00001-of-00002.safetensors")).unwrap()).unwrap();
    assert_eq!(digest(path), alone);
    fs::write(path.join("model.safetensors"), "half a download").unwrap();
    assert_eq!(digest(path), alone);
}

#[test]
fn without_an_index_a_whole_model_is_one_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    Tiny::default().write(path);
    let alone = digest(path);
    for name in ["adapter_model.safetensors", "._model.safetensors", "model-00001-of-00002.safetensors"] {
        fs::write(path.join(name), "something else").unwrap();
        assert_eq!(digest(path), alone, "{name}");
    }
    fs::remove_file(path.join("model-00001-of-00002.safetensors")).unwrap();
    fs::rename(path.join("model.safetensors"), path.join("weights.safetensors")).unwrap();
    assert_eq!(digest(path), alone);
}

/// Heads and caches know their base by it.
#[test]
fn the_digest_is_over_the_configuration_and_the_files_in_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_shards(&Tiny::default(), path);
    let files = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let bytes = files.map(|name| fs::read(path.join(name)).unwrap()).concat();
    assert_eq!(digest(path), carryon_crds::wire::digest(&bytes));
    let gguf = path.join("whole.gguf");
    fs::write(&gguf, Tiny::default().gguf()).unwrap();
    assert_eq!(digest(&gguf), carryon_crds::wire::digest(&fs::read(&gguf).unwrap()));
}

#[test]
fn a_shard_that_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_shards(&Tiny::default(), path);
    let shard = path.join("model-00002-of-00002.safetensors");
    let whole = fs::read(&shard).unwrap();
    fs::remove_file(&shard).unwrap();
    let missing = format!("{}: model.safetensors.index.json: names this file, but it is missing", shard.display());
    assert_eq!(error(path), missing);
    std::os::unix::fs::symlink(path.join("no-such-blob"), &shard).unwrap();
    assert_eq!(error(path), missing);
    fs::remove_file(&shard).unwrap();
    fs::write(&shard, &whole[..whole.len() - 1]).unwrap();
    assert!(error(path).starts_with(&*shard.to_string_lossy()), "{}", error(path));
}

#[test]
fn an_index_that_cannot_be_followed_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    for (index, expected) in [
        ("", "EOF while parsing"),
        ("{\"weight_map\": {\"a\": ", "EOF while parsing"),
        ("{}", "missing field `weight_map`"),
        ("{\"weight_map\": {}}", "weight_map: it names no file"),
        ("{\"weight_map\": {\"a\": \"../model.safetensors\"}}", "\"../model.safetensors\" is not the name of a file in the folder"),
        ("{\"weight_map\": {\"a\": \"/etc/passwd\"}}", "\"/etc/passwd\" is not the name of a file in the folder"),
        ("{\"weight_map\": {\"a\": \"\"}}", "\"\" is not the name of a file in the folder"),
        ("{\"weight_map\": {\"a\": 3}}", "invalid type: integer `3`"),
    ] {
        fs::write(folder.path().join("model.safetensors.index.json"), index).unwrap();
        let text = error(folder.path());
        assert!(text.contains("model.safetensors.index.json") && text.contains(expected), "{index}: {text}");
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
        entry(b"some.doubles", 9, &[&list(12, 1), &0.1f64.to_le_bytes()]),
        entry(b"last.key", 4, &[&7u32.to_le_bytes()]),
    ];
    fs::write(&path, Tiny::default().gguf_with(&entries)).unwrap();
    let gguf = Gguf::open(&path).unwrap();
    assert_eq!(gguf.metadata["last.key"], Value::Integer(7));
    assert_eq!(gguf.metadata["some.sizes"], Value::Integers(vec![u64::MAX.into(), 7]));
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
fn a_gguf_that_scales_positions_is_refused_however_it_says_so() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("scaled.gguf");
    let kind = |kind: &str| entry(b"llama.rope.scaling.type", 8, &[&(kind.len() as u64).to_le_bytes(), kind.as_bytes()]);
    let factor = |key: &str, factor: f32| entry(key.as_bytes(), 6, &[&factor.to_le_bytes()]);
    let [new, old] = ["llama.rope.scaling.factor", "llama.rope.scale_linear"];
    for (entries, refused) in [
        (vec![factor(new, 4.0)], Some("llama.rope.scaling.factor: 4 is not supported")),
        (vec![factor(old, 0.5)], Some("llama.rope.scale_linear: 0.5 is not supported")),
        (vec![kind("linear"), factor(new, 1.0)], Some("llama.rope.scaling.type: `linear` is not supported")),
        (vec![factor(new, 1.0), factor(old, 0.0)], None),
        (vec![kind("none"), factor(new, 4.0)], None),
    ] {
        fs::write(&path, Tiny::default().gguf_with(&entries)).unwrap();
        match refused {
            Some(expected) => assert!(error(&path).ends_with(expected), "{}", error(&path)),
            None => drop(digest(&path)),
        }
    }
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
