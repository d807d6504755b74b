//! `carryon-worker fetch` against servers on this machine.

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

mod cache;
mod harness;
mod interrupted;
mod refused;
mod s3;
mod server;
mod tls;

use harness::{CONFIG, Fetch, check_content, length, model, until};
use server::{COMMIT, Server, TOKEN, content, sha256};

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
    // What was lost is fetched, and nothing else.
    std::fs::remove_file(fetch.folder.join("tokenizer.json")).unwrap();
    fetch.succeeds().await;
    check_content(&fetch, &model[2..5]);
    let sent = ["config.json", "tokenizer.json", "model.safetensors"].map(|name| server.hub.sent(name));
    assert_eq!(sent[0] + sent[2], 0);
    assert!(sent[1] >= 200_000, "{sent:?}");
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
        ("config.json", CONFIG.into()),
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
    until("the first is in the middle", || length(&fetch.folder.join("model.safetensors.part")) == 9 << 20).await;
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
