//! What the worker's tests share.
#![allow(dead_code)]

pub mod engine;
pub mod tiny;

use std::path::PathBuf;

/// The real model: SmolLM2-135M-Instruct, from the environment variable `CARRYON_MODEL` or the cache that `make test` fills.
pub fn model_path() -> PathBuf {
    let cached = || {
        let home = std::env::var("HOME").expect("HOME is set");
        PathBuf::from(home).join(".cache/carry-on/models/SmolLM2-135M-Instruct.Q4_1.gguf")
    };
    let path = std::env::var("CARRYON_MODEL").map_or_else(|_| cached(), PathBuf::from);
    assert!(path.is_file(), "{} is missing: `make model` downloads it, or set CARRYON_MODEL", path.display());
    path
}

/// `count` token ids below `vocabulary`, the same for the same seed.
pub fn tokens(count: usize, vocabulary: usize, seed: u64) -> Vec<u32> {
    let mut random = tiny::Random(seed);
    (0..count).map(|_| (random.next() % vocabulary as u64) as u32).collect()
}
