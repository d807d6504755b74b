//! Models in several files, and an index that names them.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::tensor::{Dtype as TensorType, TensorView};
use serde_json::{Value, json};

use crate::common::tiny::Tiny;
use crate::{digest, error};

const INDEX: &str = "model.safetensors.index.json";
const FIRST: &str = "model-00001-of-00002.safetensors";
const SECOND: &str = "model-00002-of-00002.safetensors";

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

/// Changes the index of `folder`.
fn reindex(folder: &Path, change: impl FnOnce(&mut Value)) {
    let mut index = serde_json::from_slice(&fs::read(folder.join(INDEX)).unwrap()).unwrap();
    change(&mut index);
    fs::write(folder.join(INDEX), index.to_string()).unwrap();
}

#[test]
fn a_tensor_that_is_not_where_the_index_says_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    for (tensor, shard) in [("model.norm.weight", FIRST), ("model.layers.0.input_layernorm.weight", SECOND), ("model.none.weight", SECOND)]
    {
        write_shards(&Tiny::default(), path);
        reindex(path, |index| index["weight_map"][tensor] = json!(shard));
        let expected = format!("{}: {tensor}: {INDEX} says that this tensor is here, but it is not", path.join(shard).display());
        assert_eq!(error(path), expected);
    }
    // What a shard has beyond the index is a tensor like any other: transformers takes it too.
    write_shards(&Tiny::default(), path);
    reindex(path, |index| drop(index["weight_map"].as_object_mut().unwrap().remove("model.norm.weight")));
    digest(path);
}

#[test]
fn a_tensor_in_two_shards_is_refused_with_both_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_shards(&Tiny::default(), path);
    fs::copy(path.join(FIRST), path.join(SECOND)).unwrap();
    let (first, second) = (path.join(FIRST), path.join(SECOND));
    let text = error(path);
    assert!(text.starts_with(&format!("{}: model.layers.0.", second.display())), "{text}");
    assert!(text.ends_with(&format!(": tensor appears twice, the other is in {}", first.display())), "{text}");
}

/// Half of a model under a whole one's name; what is left of an upload in other pieces is no part of it.
#[test]
fn a_shard_that_the_index_leaves_out_is_refused_by_name() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_shards(&Tiny::default(), path);
    for other in ["model-00002-of-00003.safetensors", "other-00002-of-00002.safetensors", "model-x-of-00002.safetensors"] {
        fs::copy(path.join(SECOND), path.join(other)).unwrap();
    }
    digest(path);
    reindex(path, |index| index["weight_map"].as_object_mut().unwrap().retain(|_, file| file == FIRST));
    let expected = format!("{}: {INDEX}: does not name this file, but others of the same set", path.join(SECOND).display());
    assert_eq!(error(path), expected);
}

#[test]
fn damage_in_a_shard_names_the_shard_and_the_tensor() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    write_shards(&Tiny::default(), path);
    let shard = path.join(SECOND);
    let whole = fs::read(&shard).unwrap();
    let (head, data) = whole[8..].split_at(u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize);
    let header: Value = serde_json::from_slice(head).unwrap();
    let tensor = "model.layers.1.mlp.up_proj.weight";
    let [begin, end]: [u64; 2] = serde_json::from_value(header[tensor]["data_offsets"].clone()).unwrap();
    for (offsets, expected) in [
        ([begin, end + 4], "do not follow those of the tensor before"),
        ([begin - 4, end], "do not follow those of the tensor before"),
        ([end, begin], "are not inside the file"),
        ([begin, end + 1_000_000], "are not inside the file"),
        ([begin, u64::MAX], "are not inside the file"),
    ] {
        let mut header = header.clone();
        header[tensor]["data_offsets"] = json!(offsets);
        let head = header.to_string();
        fs::write(&shard, [&(head.len() as u64).to_le_bytes(), head.as_bytes(), data].concat()).unwrap();
        let text = error(path);
        assert!(text.starts_with(&format!("{}: model.", shard.display())) && text.contains(expected), "{offsets:?}: {text}");
    }
}
