//! Connections that break, processes that are killed, files that change: nothing is fetched twice but the last chunk.

use std::process::Command;
use std::time::{Duration, Instant};

use carryon_worker::fetch::part::CHUNK;

use crate::harness::{CONFIG, Fetch, check_content, ended, length, model, until};
use crate::server::{COMMIT, Fault, Server, content, sha256};

#[tokio::test(flavor = "multi_thread")]
async fn broken_connections_and_busy_servers_cost_no_byte() {
    let size = (2 * CHUNK + 12345) as usize;
    let model = model(size);
    let server = Server::start(&model).await;
    // What comes after the first ones begins beyond the last ones' byte.
    let breaks = [300_001, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 12344, 0, 1].map(Fault::Break);
    let busy = [Fault::Status(429, Some("1")), Fault::Status(503, None), Fault::Status(403, None), Fault::Status(500, None)];
    server.hub.faults("model.safetensors", busy.into_iter().chain(breaks));
    server.hub.faults("config.json", [Fault::Status(502, None), Fault::Break(10)]);
    let fetch = Fetch::of_hub(&server);
    let begun = Instant::now();
    let log = fetch.succeeds().await;
    assert!(begun.elapsed() >= Duration::from_secs(1), "Retry-After was not honoured");
    assert!(log.contains("429 Too Many Requests; asking again in 1.0 s"), "{log}");
    check_content(&fetch, &model[2..5]);
    // A server may have sent a little that was lost with its connection.
    let sent = server.hub.sent("/cdn/model.safetensors");
    assert!((size as u64..size as u64 + 7 * (2 << 20)).contains(&sent), "{sent} for {size}");
}

#[tokio::test(flavor = "multi_thread")]
async fn killed_at_twenty_bytes_it_goes_on_where_it_was() {
    let size = 6 * CHUNK + 54321;
    let model = model(size as usize);
    let server = Server::start(&model).await;
    let fetch = Fetch::of_hub(&server);
    let part = fetch.folder.join("model.safetensors.part");
    let mut kills: Vec<u64> = (0..20).map(|_| rand::random_range(1..size)).collect();
    kills.sort_unstable();
    let (mut expected, mut durable) = (0, 0);
    for &at in &kills {
        server.hub.faults("model.safetensors", [Fault::Pause(at)]);
        let mut process = fetch.start();
        until("the part reaches the byte", || length(&part) == at).await;
        process.kill().unwrap();
        process.wait().unwrap();
        // What is durable is not sent again, what is beyond the last whole chunk is.
        expected += at - durable;
        durable = at / CHUNK * CHUNK;
        assert_eq!(server.hub.sent("/cdn/model.safetensors"), expected, "killed at {at} of {kills:?}");
        assert!(!fetch.manifest().complete);
    }
    fetch.succeeds().await;
    expected += size - durable;
    assert_eq!(server.hub.sent("/cdn/model.safetensors"), expected);
    assert!(expected <= size + 20 * CHUNK, "{expected} bytes for {size}");
    check_content(&fetch, &model[2..5]);
    assert_eq!(fetch.names(), ["config.json", "model.safetensors", "tokenizer.json"]);
    let small = server.hub.take_seen().iter().filter(|seen| seen.path.ends_with("config.json") && seen.sent > 0).count();
    assert_eq!(small, 1, "what was whole is not fetched again");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_commit_that_was_begun_with_is_kept() {
    let model = model(2 << 20);
    let server = Server::start(&model).await;
    server.hub.faults("model.safetensors", [Fault::Pause(1 << 20)]);
    let fetch = Fetch::of_hub(&server);
    let process = fetch.start();
    until("it is under way", || length(&fetch.folder.join("model.safetensors.part")) == 1 << 20).await;
    until("the report says so", || fetch.report().state == "fetching" && fetch.report().bytes > 1 << 20).await;
    assert_eq!(fetch.report().total, (2 << 20) + CONFIG.len() as u64 + 200_000);
    // As kubelets do it.
    assert!(Command::new("kill").arg(process.id().to_string()).status().unwrap().success());
    let stopped = ended(process).await;
    assert_eq!(stopped.status.code(), Some(75), "{}", stopped.log);
    assert_eq!(fetch.report().state, "stopped");
    *server.hub.commit.lock().unwrap() = "f".repeat(40);
    server.hub.take_seen();
    fetch.succeeds().await;
    assert_eq!(fetch.manifest().commit.as_deref(), Some(COMMIT));
    assert!(server.hub.take_seen().iter().all(|seen| seen.path.starts_with("/cdn") || seen.path.contains(COMMIT)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_changed_is_begun_anew_whether_it_was_killed_or_cut_off() {
    let (old, new) = (content(1, 2 * CHUNK as usize), content(2, 2 * CHUNK as usize + 5));
    let server = Server::start(&[("a.gguf", old.clone())]).await;
    let fetch = Fetch::new(&["--url", &format!("{}/web/a.gguf", server.url)]);
    server.hub.faults("a.gguf", [Fault::Pause(CHUNK + 9)]);
    let mut process = fetch.start();
    until("it is under way", || length(&fetch.folder.join("a.gguf.part")) == CHUNK + 9).await;
    process.kill().unwrap();
    process.wait().unwrap();
    server.hub.put("a.gguf", new.clone());
    let log = fetch.succeeds().await;
    assert!(log.contains("a.gguf has changed at its source: what was fetched of it is thrown away"), "{log}");
    assert_eq!(sha256(&fetch.read("a.gguf")), sha256(&new));
    // Within one process.
    let fetch = Fetch::new(&["--url", &format!("{}/web/a.gguf", server.url)]);
    server.hub.faults("a.gguf", [Fault::Break(CHUNK + 9), Fault::Status(503, Some("2"))]);
    let process = fetch.start();
    until("it is under way", || length(&fetch.folder.join("a.gguf.part")) > 0).await;
    server.hub.put("a.gguf", old.clone());
    let ended = ended(process).await;
    assert!(ended.status.success() && ended.log.contains("its files are listed anew"), "{}", ended.log);
    assert_eq!(sha256(&fetch.read("a.gguf")), sha256(&old));
}
