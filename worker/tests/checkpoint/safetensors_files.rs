//! Damaged safetensors files.

use std::fs;

use carryon_crds::pool::Dtype;
use carryon_worker::model::Model;
use safetensors::SafeTensors;
use serde_json::json;

use crate::common::engine::cpu;
use crate::common::tiny::{Random, Tiny};
use crate::error;

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
        (json!({"a": {"dtype": "F32", "shape": [1]}}), 4, "header: a: missing field `data_offsets`"),
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

#[test]
fn any_wrong_byte_in_a_header_neither_panics_nor_hogs_memory() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let weights = folder.path().join("model.safetensors");
    let whole = fs::read(&weights).unwrap();
    let header = 8 + u64::from_le_bytes(whole[..8].try_into().unwrap()) as usize;
    let mut random = Random(4);
    for place in 0..header {
        let mut bytes = whole.clone();
        bytes[place] = [bytes[place] ^ (1 << (random.next() % 8)), b'0' + (random.next() % 10) as u8][place % 2];
        fs::write(&weights, bytes).unwrap();
        // Some bytes make another sound file, or change nothing.
        if let Err(error) = Model::load(folder.path(), Dtype::Float32, cpu(1)) {
            assert!(error.to_string().contains(folder.path().to_str().unwrap()), "{error}");
        }
    }
}

/// The file has the bytes, but nobody is to allocate them.
#[test]
fn a_header_longer_than_the_format_allows_or_than_its_file_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    Tiny::default().write(folder.path());
    let weights = folder.path().join("model.safetensors");
    for (length, header) in [(200_000_000, 100_000_001u64), (1000, 993), (1000, u64::MAX)] {
        fs::write(&weights, header.to_le_bytes()).unwrap();
        fs::File::options().write(true).open(&weights).unwrap().set_len(length).unwrap();
        let expected = format!("{}: header: {header} bytes of header in a file of {length} bytes", weights.display());
        assert_eq!(error(folder.path()), expected);
    }
}
