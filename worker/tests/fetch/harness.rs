//! The worker's process, what it leaves behind, and a model to fetch.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use axum::body::Bytes;
use carryon_crds::wire::FetchReport;
use carryon_worker::fetch::manifest::Manifest;
use carryon_worker::fetch::progress::{self, REPORT};

use crate::server::{Server, content, sha256};

/// `carryon-worker fetch` into a folder of its own.
pub struct Fetch {
    pub folder: PathBuf,
    args: Vec<String>,
    environment: Vec<(&'static str, String)>,
    _root: tempfile::TempDir,
}

/// How it ended.
pub struct Ended {
    pub status: ExitStatus,
    pub log: String,
}

impl Fetch {
    pub fn new(args: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let args = args.iter().map(|&text| text.to_owned()).collect::<Vec<_>>();
        let folder = root.path().join("model");
        let args = [vec!["--output".to_owned(), folder.to_str().unwrap().to_owned()], args].concat();
        Self { folder, args, environment: Vec::new(), _root: root }
    }

    /// Into the cache that the arguments name.
    pub fn into_cache(args: &[&str]) -> Self {
        let args = args.iter().map(|&text| text.to_owned()).collect();
        Self { args, ..Self::new(&[]) }
    }

    pub fn of_hub(server: &Server) -> Self {
        Self::new(&["--hugging-face", "o/n", "--endpoint", &server.url])
    }

    pub fn env(mut self, name: &'static str, value: &str) -> Self {
        self.environment.push((name, value.to_owned()));
        self
    }

    pub fn arg(mut self, text: &str) -> Self {
        self.args.push(text.to_owned());
        self
    }

    pub fn start(&self) -> Child {
        let mut command = Command::new(env!("CARGO_BIN_EXE_carryon-worker"));
        command.arg("fetch").args(&self.args);
        for name in ["HF_TOKEN", "HF_ENDPOINT", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"] {
            command.env_remove(name);
        }
        command.envs(self.environment.iter().map(|(name, value)| (name, value))).env("RUST_LOG", "info");
        command.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    pub async fn run(&self) -> Ended {
        ended(self.start()).await
    }

    pub async fn succeeds(&self) -> String {
        let ended = self.run().await;
        assert!(ended.status.success(), "{}", ended.log);
        ended.log
    }

    pub async fn fails(&self, code: i32) -> String {
        let ended = self.run().await;
        assert_eq!(ended.status.code(), Some(code), "{}", ended.log);
        ended.log
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.folder.join(name)).unwrap()
    }

    pub fn manifest(&self) -> Manifest {
        Manifest::read(&self.folder).unwrap().unwrap()
    }

    pub fn report(&self) -> FetchReport {
        progress::read(&self.folder.join(REPORT)).unwrap()
    }

    /// Names in the folder but those that a fetch keeps for itself.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.folder).into_iter().flatten();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| !name.starts_with(".fetch"));
        names.sort();
        names
    }
}

pub async fn ended(child: Child) -> Ended {
    let output = tokio::task::spawn_blocking(move || child.wait_with_output().unwrap()).await.unwrap();
    Ended { status: output.status, log: String::from_utf8(output.stderr).unwrap() }
}

/// What a model says of itself that could be loaded.
pub const CONFIG: &str = r#"{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16,
    "vocab_size": 32, "max_position_embeddings": 64, "rms_norm_eps": 1e-5}"#;

/// A small model.
pub fn model(weights: usize) -> Vec<(&'static str, Bytes)> {
    vec![
        (".gitattributes", content(1, 100)),
        ("README.md", content(2, 1000)),
        ("config.json", CONFIG.into()),
        ("tokenizer.json", content(4, 200_000)),
        ("model.safetensors", content(5, weights)),
        ("pytorch_model.bin", content(6, 5000)),
        ("onnx/model.onnx", content(7, 5000)),
    ]
}

pub fn check_content(fetch: &Fetch, files: &[(&str, Bytes)]) {
    for (name, content) in files {
        assert_eq!(sha256(&fetch.read(name)), sha256(content), "{name}");
    }
}

/// Bytes of `path`, or 0.
pub fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

/// Waits for `condition`, a minute at most.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    let begun = Instant::now();
    while !condition() {
        assert!(begun.elapsed() < Duration::from_secs(60), "waited in vain: {what}");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}
