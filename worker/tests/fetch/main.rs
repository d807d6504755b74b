//! `carryon-worker fetch` against servers on this machine.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

mod interrupted;
mod refused;
mod s3;
mod server;
mod tls;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use axum::body::Bytes;
use carryon_worker::fetch::manifest::Manifest;
use carryon_worker::fetch::progress::{self, REPORT, Report};

use server::{COMMIT, Server, TOKEN, content, sha256};

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
        let args = args.iter().map(|&text| text.to_owned()).collect();
        Self { folder: root.path().join("model"), args, environment: Vec::new(), _root: root }
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
        command.arg("fetch").arg("--output").arg(&self.folder).args(&self.args);
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

    pub fn report(&self) -> Report {
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

/// A small model.
pub fn model(weights: usize) -> Vec<(&'static str, Bytes)> {
    vec![
        (".gitattributes", content(1, 100)),
        ("README.md", content(2, 1000)),
        ("config.json", content(3, 700)),
        ("tokenizer.json", content(4, 200_000)),
        ("model.safetensors", content(5, weights)),
        ("pytorch_model.bin", content(6, 5000)),
        ("onnx/model.onnx", content(7, 5000)),
    ]
}

fn check_content(fetch: &Fetch, files: &[(&str, Bytes)]) {
    for (name, content) in files {
        assert_eq!(sha256(&fetch.read(name)), sha256(content), "{name}");
    }
}

/// Bytes of `path`, or 0.
pub fn length(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.len())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hub_s_model_is_fetched_verified_and_not_asked_for_again() {
    let model = model(9 << 20);
    let server = Server::start(&model).await;
    *server.hub.guarded.lock().unwrap() = true;
    let fetch = Fetch::of_hub(&server).env("HF_TOKEN", &format!("{TOKEN}\n"));
    fetch.succeeds().await;
    assert_eq!(fetch.names(), ["config.json", "model.safetensors", "tokenizer.json"]);
    check_content(&fetch, &model[2..5]);
    let manifest = fetch.manifest();
    assert!(manifest.complete && manifest.commit.as_deref() == Some(COMMIT));
    let digests: Vec<_> = manifest.entries.iter().map(|entry| entry.verified.clone().unwrap()).collect();
    assert_eq!(digests, [&model[2], &model[4], &model[3]].map(|(_, content)| sha256(content)));
    let report = fetch.report();
    assert_eq!((report.state.as_str(), report.bytes), ("complete", report.total));
    // The token is for the hub, not for where it sends us; the revision is resolved once.
    let seen = server.hub.take_seen();
    for seen in &seen {
        assert_eq!(seen.authorization.is_some(), !seen.path.starts_with("/cdn"), "{seen:?}");
        assert!(!seen.path.starts_with("/resolve") || seen.path.contains(COMMIT), "{seen:?}");
    }
    assert_eq!(seen.iter().filter(|seen| seen.path == "/cdn/model.safetensors").map(|seen| seen.sent).sum::<u64>(), 9 << 20);
    let log = fetch.succeeds().await;
    assert!(log.contains("is complete already") && server.hub.take_seen().is_empty(), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_gguf_file_is_chosen_by_a_pattern() {
    let files = [("a-Q4_K_M.gguf", content(1, 3_000_000)), ("a-Q8_0.gguf", content(2, 4_000_000))];
    let server = Server::start(&files).await;
    let log = Fetch::of_hub(&server).fails(78).await;
    assert!(log.contains("several GGUF files") && log.contains("a-Q8_0.gguf"), "{log}");
    let fetch = Fetch::of_hub(&server).arg("--files").arg("*Q4*.gguf");
    fetch.succeeds().await;
    assert_eq!(fetch.names(), ["a-Q4_K_M.gguf"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_web_server_s_folder_is_fetched_with_the_shards_that_its_index_names() {
    let index = r#"{"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors", "c": "model-1.safetensors"}}"#;
    let files = [
        ("config.json", content(1, 500)),
        ("model-1.safetensors", content(2, 3_000_000)),
        ("model-2.safetensors", content(3, 2_000_000)),
        ("model-3.safetensors", content(4, 1_000_000)),
        ("model.safetensors.index.json", index.into()),
    ];
    let server = Server::start(&files).await;
    let folder = Fetch::new(&["--url", &format!("{}/web/?secret=1", server.url)]);
    folder.succeeds().await;
    assert_eq!(folder.names(), ["config.json", "model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"]);
    check_content(&folder, &files[..3]);
    assert_eq!(folder.manifest().origin.source, format!("{}/web/", server.url));
    let single = Fetch::new(&["--url", &format!("{}/web/model-3.safetensors", server.url)]);
    single.succeeds().await;
    check_content(&single, &files[3..4]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_that_fetch_into_one_folder_one_does_and_the_other_waits() {
    let model = model(12 << 20);
    let server = Server::start(&model).await;
    server.hub.faults("model.safetensors", [server::Fault::Pause(9 << 20)]);
    let fetch = Fetch::of_hub(&server);
    let mut first = fetch.start();
    interrupted::until("the first is in the middle", || length(&fetch.folder.join("model.safetensors.part")) == 9 << 20).await;
    let mut second = fetch.start();
    let log = std::io::BufReader::new(second.stderr.take().unwrap());
    let waits = tokio::task::spawn_blocking(move || {
        let mut lines = std::io::BufRead::lines(log).map(Result::unwrap);
        let waits = lines.find(|line| line.contains("waiting for another process"));
        (waits, lines.collect::<Vec<_>>())
    });
    // It says so before the first ends.
    tokio::time::sleep(std::time::Duration::from_millis(400)).await;
    first.kill().unwrap();
    first.wait().unwrap();
    let (line, rest) = waits.await.unwrap();
    assert!(line.is_some() && second.wait().unwrap().success(), "{rest:?}");
    check_content(&fetch, &model[2..5]);
    // The second went on where the first was.
    assert_eq!(server.hub.sent("/cdn/model.safetensors"), (12 << 20) + (1 << 20));
}
