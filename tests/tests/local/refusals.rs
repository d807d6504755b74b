//! Damaged input is refused by name: file, line, tensor, digest.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use carryon_tests::{binary, model, repository};

use crate::setup::Local;

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

fn worker(arguments: &[&str]) -> Output {
    Command::new(binary("carryon-worker")).args(arguments).output().unwrap()
}

fn write_config(folder: &Path, config: &str) -> String {
    let path = folder.join("config.json");
    fs::write(&path, config).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_damaged_line_of_data_fails_the_job_by_file_and_line() {
    let local = Local::new("line");
    let path = local.data().join("train.jsonl");
    let damaged = fs::read_to_string(&path).unwrap().replacen("\n{\"prompt\"", "\n{\"prompt", 1);
    fs::write(&path, damaged).unwrap();
    let output = local.try_up(&["--until", "complete", "--timeout", "120"]);
    assert!(!output.status.success() && text(&output).contains("train.jsonl") && text(&output).contains('2'), "{}", text(&output));
    assert!(local.condition("CarryOnJob", "Failed"), "{}", local.logs());
}

#[test]
fn a_truncated_gguf_file_is_named_with_what_is_missing() {
    let local = Local::new("gguf");
    let bytes = fs::read(model()).unwrap();
    let path = local.data().join("half.gguf");
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let config = r#"{"name": "p", "dtype": "bfloat16", "engine": {}}"#;
    let output =
        worker(&["base", "--config", &write_config(&local.data(), config), "--model", path.to_str().unwrap(), "--listen", "127.0.0.1:0"]);
    assert!(!output.status.success() && text(&output).contains("half.gguf"), "{}", text(&output));
}

#[test]
fn a_device_that_the_worker_is_not_built_for_is_refused_by_name() {
    let local = Local::new("device");
    let config = write_config(&local.data(), r#"{"name": "p", "dtype": "bfloat16", "engine": {"device": "cuda:1"}}"#);
    let output = worker(&["base", "--config", &config, "--model", "/nowhere/model.gguf", "--listen", "127.0.0.1:0"]);
    assert_eq!(output.status.code(), Some(78), "{}", text(&output));
    assert!(text(&output).contains("engine.device is cuda:1, and this worker is built without CUDA"), "{}", text(&output));
}

#[test]
fn another_artifact_than_the_one_asked_for_is_refused_by_file_and_digest() {
    let local = Local::new("artifact");
    fs::copy(repository().join("tests/oracles/fixtures/head_gated.safetensors"), local.data().join("head.safetensors")).unwrap();
    let digest = format!("sha256:{}", "0".repeat(64));
    let head = format!(r#"{{"name": "h", "servedModelName": "m", "digest": "{digest}"}}"#);
    let config = write_config(&local.data(), &format!(r#"{{"baseModelName": "b", "heads": [{head}]}}"#));
    let head = local.data();
    let output = worker(&[
        "serve",
        "--config",
        &config,
        "--pool",
        "http://127.0.0.1:9",
        "--head",
        head.to_str().unwrap(),
        "--listen",
        "127.0.0.1:0",
    ]);
    let text = text(&output);
    assert!(output.status.code() == Some(65) && text.contains("head.safetensors") && text.contains(&digest), "{text}");
}

#[test]
fn manifests_that_ask_for_the_impossible_are_refused_with_field_and_reason() {
    for (from, to, field) in
        [("maxLength: 320", "maxLength: -1", "spec.data.maxLength"), ("attentionHeads: 4", "attentionHeads: 5", "head.width must be")]
    {
        let local = Local::new("manifest");
        let path = local.manifests().join("job.yaml");
        let manifest = fs::read_to_string(&path).unwrap();
        assert!(manifest.contains(from));
        fs::write(&path, manifest.replace(from, to)).unwrap();
        let output = local.try_up(&[]);
        let text = text(&output);
        assert!(!output.status.success() && text.contains("job.yaml") && text.contains(field), "{text}");
        assert!(!local.state().join("logs/smollm2-pool-0.log").exists(), "something was started");
    }
}
