//! A cache of many models: one folder for source and commit, a link that leads there, and what the operator is told.

use std::fs;
use std::path::PathBuf;

use carryon_crds::wire::{FetchFailure, FetchReport};

use crate::harness::{Fetch, model};
use crate::server::{COMMIT, Server, TOKEN, content};

/// A pod: its own link and last words, and a cache that it may share.
struct Pod {
    root: tempfile::TempDir,
    fetch: Fetch,
}

impl Pod {
    fn new(cache: &std::path::Path, args: &[&str]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let path = |path: PathBuf| path.to_str().unwrap().to_owned();
        let (link, words) = (path(root.path().join("model/n")), path(root.path().join("words")));
        let places = ["--cache", cache.to_str().unwrap(), "--link", &link, "--termination-log", &words];
        Self { fetch: Fetch::into_cache(&[&places[..], args].concat()), root }
    }

    fn env(self, name: &'static str, value: &str) -> Self {
        Self { fetch: self.fetch.env(name, value), ..self }
    }

    fn words(&self) -> FetchReport {
        serde_json::from_slice(&fs::read(self.root.path().join("words")).unwrap()).unwrap()
    }

    /// Where the link leads.
    fn target(&self) -> PathBuf {
        fs::read_link(self.root.path().join("model/n")).unwrap()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_of_one_cache_share_a_commit_s_folder_and_keep_their_commit_when_the_branch_moves_on() {
    let model = model(100_000);
    let server = Server::start(&model).await;
    let cache = tempfile::tempdir().unwrap();
    let args = ["--hugging-face", "o/n", "--endpoint", &server.url];
    let first = Pod::new(cache.path(), &args);
    first.fetch.succeeds().await;
    let target = first.target();
    assert!(target.file_name().unwrap().to_str().unwrap().starts_with(&format!("o--n--{COMMIT}--")), "{target:?}");
    assert!(model[2..5].iter().all(|(name, content)| fs::read(target.join(name)).unwrap() == *content));
    let words = first.words();
    assert_eq!((words.state.as_str(), words.commit.as_deref(), words.failure), ("complete", Some(COMMIT), None));
    assert!(words.bytes > 300_000 && words.bytes == words.total, "{words:?}");
    server.hub.take_seen();
    // The branch moves on: who has begun keeps its commit, asking nobody; so does who is told; a third one takes the new one.
    let next = "f".repeat(40);
    server.hub.commit.lock().unwrap().clone_from(&next);
    first.fetch.succeeds().await;
    let told = Pod::new(cache.path(), &args).env("CARRYON_MODEL_COMMIT", COMMIT);
    told.fetch.succeeds().await;
    assert!(server.hub.take_seen().is_empty());
    assert_eq!(first.target(), target);
    let third = Pod::new(cache.path(), &args);
    third.fetch.succeeds().await;
    assert_eq!(third.words().commit, Some(next));
    assert_ne!(third.target(), target);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_leads_to_the_one_gguf_file() {
    let server = Server::start(&[("a.gguf", content(1, 1000)), ("config.json", content(2, 10))]).await;
    let cache = tempfile::tempdir().unwrap();
    let pod = Pod::new(cache.path(), &["--hugging-face", "o/n", "--endpoint", &server.url]);
    pod.fetch.succeeds().await;
    assert_eq!(pod.target().file_name().unwrap(), "a.gguf");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_link_leads_to_the_first_of_gguf_files_that_are_one_and_all_are_fetched() {
    let names = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"];
    let server = Server::start(&[(names[0], content(1, 1000)), (names[1], content(3, 1000)), ("config.json", content(2, 10))]).await;
    let cache = tempfile::tempdir().unwrap();
    let address = format!("{}/web/{}", server.url, names[0]);
    for args in [&["--hugging-face", "o/n", "--endpoint", &server.url][..], &["--url", &address]] {
        let pod = Pod::new(cache.path(), args);
        pod.fetch.succeeds().await;
        let target = pod.target();
        assert_eq!(target.file_name().unwrap(), names[0]);
        assert_eq!(fs::read(target.with_file_name(names[1])).unwrap(), content(3, 1000));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_are_told_by_kind() {
    let server = Server::start(&model(100_000)).await;
    let cache = tempfile::tempdir().unwrap();
    let hub = |repository: &'static str| Pod::new(cache.path(), &["--hugging-face", repository, "--endpoint", &server.url]);
    let missing = hub("o/other");
    missing.fetch.fails(78).await;
    assert_eq!(missing.words().failure, Some(FetchFailure::NotFound));
    *server.hub.guarded.lock().unwrap() = true;
    let denied = hub("o/n");
    denied.fetch.fails(78).await;
    assert_eq!(denied.words().failure, Some(FetchFailure::AccessDenied));
    // What no pool can run is known before there are weights.
    server.hub.put("config.json", r#"{"model_type": "mamba"}"#.into());
    server.hub.take_seen();
    let odd = hub("o/n").env("HF_TOKEN", TOKEN);
    let log = odd.fetch.fails(78).await;
    assert!(log.contains("no pool can run it") && log.contains("`mamba` is not supported"), "{log}");
    assert_eq!((odd.words().failure, server.hub.sent("/cdn/model.safetensors")), (Some(FetchFailure::Unsupported), 0));
    let bundle = Pod::new(cache.path(), &["--hugging-face", "o/n", "--ca-bundle", "/nonexistent.pem"]);
    bundle.fetch.fails(78).await;
    assert_eq!(bundle.words().failure, Some(FetchFailure::CaBundle));
}
