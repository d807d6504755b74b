//! What the worker's tests share.
#![allow(dead_code)]

pub mod engine;
pub mod tiny;

use std::path::PathBuf;
use std::time::Duration;

use carryon_crds::pool::{Dtype, Engine};
use carryon_crds::wire::BaseConfig;
use carryon_worker::base;
use tokio::net::TcpListener;

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

/// Address of a pool that runs the real model; it ends with the test's runtime.
pub async fn real_pool(engine: Engine) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let config = BaseConfig { name: "real".into(), dtype: Dtype::Bfloat16, engine, text_only: false };
    tokio::spawn(base::serve(listener, config, model_path(), base::Placement::cpu(2), Duration::ZERO, std::future::pending()));
    url
}

/// `count` token ids below `vocabulary`, the same for the same seed.
pub fn tokens(count: usize, vocabulary: usize, seed: u64) -> Vec<u32> {
    let mut random = tiny::Random(seed);
    (0..count).map(|_| (random.next() % vocabulary as u64) as u32).collect()
}
