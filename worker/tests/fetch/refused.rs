//! What cannot succeed is said at once, in words that help, and leaves no file that looks whole.

use crate::harness::{Fetch, model};
use crate::server::{Server, content, sha256};

#[tokio::test(flavor = "multi_thread")]
async fn without_a_token_that_may_read_it_a_guarded_model_is_refused() {
    let server = Server::start(&model(1000)).await;
    *server.hub.guarded.lock().unwrap() = true;
    for fetch in [Fetch::of_hub(&server), Fetch::of_hub(&server).env("HF_TOKEN", "hf_wrong"), Fetch::of_hub(&server).env("HF_TOKEN", "")] {
        let log = fetch.fails(78).await;
        assert!(
            log.contains("token missing or without access to") && log.contains("accept the licence") && log.contains("GatedRepo"),
            "{log}"
        );
        assert!(!log.contains("hf_wrong"), "{log}");
        assert_eq!(fetch.report().state, "failed");
        assert!(fetch.names().is_empty());
    }
    assert_eq!(server.hub.take_seen().len(), 3, "a refusal is final");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_damaged_is_fetched_anew_once_and_never_gets_its_name() {
    let server = Server::start(&model(100_000)).await;
    let promised = sha256(b"another file");
    server.hub.change("model.safetensors", |file| file.promised = Some(promised.clone()));
    let fetch = Fetch::of_hub(&server);
    let log = fetch.fails(65).await;
    let found = sha256(&content(5, 100_000));
    assert!(log.contains(&format!("model.safetensors is damaged: its SHA-256 is {found}, its source promised {promised}")), "{log}");
    assert!(!fetch.names().contains(&"model.safetensors".to_owned()));
    assert_eq!(server.hub.sent("/cdn/model.safetensors"), 200_000);
}

#[tokio::test(flavor = "multi_thread")]
async fn missing_files_repositories_and_weights_are_named() {
    let server = Server::start(&model(1000)).await;
    // The server has no bytes for it.
    server.hub.put("generation_config.json", Default::default());
    let log = Fetch::of_hub(&server).fails(78).await;
    assert!(log.contains("there is no") && log.contains("generation_config.json: 404"), "{log}");
    let log = Fetch::new(&["--hugging-face", "o/other", "--endpoint", &server.url]).fails(78).await;
    assert!(log.contains("/api/models/o/other/revision/main: 404"), "{log}");
    let empty = Server::start(&[("README.md", content(1, 10)), ("pytorch_model.bin", content(1, 10))]).await;
    let log = Fetch::of_hub(&empty).fails(78).await;
    assert!(log.contains("holds neither *.safetensors nor *.gguf"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_lead_out_of_the_folder_are_refused() {
    let server = Server::start(&[("../../model.safetensors", content(1, 10)), ("config.json", content(1, 10))]).await;
    let fetch = Fetch::of_hub(&server).arg("--files").arg("**/*.safetensors");
    let log = fetch.fails(78).await;
    assert!(log.contains("is no name for a file of a model's folder"), "{log}");
    assert!(fetch.names().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_that_does_not_fit_is_not_begun() {
    let server = Server::start(&model(1000)).await;
    server.hub.change("model.safetensors", |file| file.size = Some(1 << 60));
    let fetch = Fetch::of_hub(&server);
    let log = fetch.fails(1).await;
    assert!(log.contains("no room in") && log.contains("more are needed") && log.contains("are free"), "{log}");
    assert!(fetch.names().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_of_something_else_is_left_as_it_is() {
    let server = Server::start(&model(1000)).await;
    let fetch = Fetch::of_hub(&server);
    std::fs::create_dir(&fetch.folder).unwrap();
    std::fs::write(fetch.folder.join("config.json"), "mine").unwrap();
    let log = fetch.fails(78).await;
    assert!(log.contains("is there already, and is not known to be of this model"), "{log}");
    assert_eq!(fetch.read("config.json"), b"mine");
    std::fs::remove_file(fetch.folder.join("config.json")).unwrap();
    fetch.succeeds().await;
    let log = fetch.arg("--revision").arg("v2").fails(78).await;
    assert!(log.contains("is the folder of hf://o/n at main: empty it, or choose another one for hf://o/n at v2"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn arguments_that_name_no_source_or_two_are_refused() {
    for args in [
        &["--url", "ftp://host/x"][..],
        &["--url", "host"],
        &[],
        &["--url", "https://host/x", "--hugging-face", "o/n"],
        &["--hugging-face", "../n"],
        &["--url", "https://host/folder/", "--files", "*.gguf"],
        &["--hugging-face", "o/n", "--ca-bundle", "/nonexistent.pem"],
    ] {
        let log = Fetch::new(args).fails(78).await;
        assert!(!log.contains("panicked"), "{log}");
    }
}

/// A GGUF file that says of itself `architecture`, with a tensor of type `kind`, of `length` bytes.
fn gguf(architecture: &str, kind: u32, length: usize) -> Vec<u8> {
    let text = |text: &str| [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat();
    let word = |key: &str, value: &str| [text(key), 8u32.to_le_bytes().to_vec(), text(value)].concat();
    let number = |key: &str, value: u32| [text(&format!("{architecture}.{key}")), [4u32, value].map(u32::to_le_bytes).concat()].concat();
    let sizes = ["block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count"];
    let epsilon =
        [text(&format!("{architecture}.attention.layer_norm_rms_epsilon")), 6u32.to_le_bytes().to_vec(), 1e-5f32.to_le_bytes().to_vec()];
    // A vocabulary, before which the architecture is not known.
    let filler = [text("tokenizer.chat_template"), 8u32.to_le_bytes().to_vec(), text(&"x".repeat(3 << 20))].concat();
    let tensor =
        [text("token_embd.weight"), 1u32.to_le_bytes().to_vec(), 64u64.to_le_bytes().to_vec(), kind.to_le_bytes().to_vec(), vec![0; 8]];
    let entries = sizes.len() as u64 + 3;
    let head = [b"GGUF\x03\0\0\0".to_vec(), 1u64.to_le_bytes().to_vec(), entries.to_le_bytes().to_vec(), filler].concat();
    let sizes: Vec<u8> = sizes.iter().flat_map(|key| number(key, if key.ends_with("head_count") { 4 } else { 64 })).collect();
    let mut bytes = [head, word("general.architecture", architecture), sizes, epsilon.concat(), tensor.concat()].concat();
    bytes.resize(length, 0);
    bytes
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gguf_file_that_no_pool_can_run_is_refused_by_its_beginning() {
    const LENGTH: usize = 60_000_000;
    for (architecture, kind, expected) in [
        (
            "mamba",
            0,
            "general.architecture: `mamba` is not supported; supported are deepseek2, gemma2, gemma3, glm4, llama, olmo2, phi3, qwen2, qwen3",
        ),
        ("llama", 23, "token_embd.weight: tensor type IQ4_XS, where F32, F16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K"),
    ] {
        let server = Server::start(&[("m.gguf", gguf(architecture, kind, LENGTH).into())]).await;
        for fetch in [Fetch::of_hub(&server), Fetch::new(&["--url", &format!("{}/web/m.gguf", server.url)])] {
            let log = fetch.fails(78).await;
            assert!(log.contains("no pool can run it") && log.contains(expected), "{log}");
            assert_eq!(fetch.report().state, "failed");
            assert!(!fetch.names().contains(&"m.gguf".to_owned()));
            let there = std::fs::metadata(fetch.folder.join("m.gguf.part")).unwrap().len();
            assert!((3 << 20..12 << 20).contains(&there), "{there} of {LENGTH} bytes came");
        }
    }
    let sound = Server::start(&[("m.gguf", gguf("llama", 0, LENGTH / 4).into())]).await;
    Fetch::of_hub(&sound).succeeds().await;
}
