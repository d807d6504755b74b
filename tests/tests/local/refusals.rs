//! Damaged input is refused by name: file, line, tensor, digest.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use carryon_tests::{binary, model};

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
fn a_manifest_that_asks_for_the_impossible_is_refused_with_field_and_reason() {
    let local = Local::new("manifest");
    let path = local.manifests().join("job.yaml");
    let text_of = fs::read_to_string(&path).unwrap();
    fs::write(&path, text_of.replace("heads: 4", "heads: 5").replace("maxLength: 320", "maxLength: -1")).unwrap();
    let output = local.try_up(&[]);
    let text = text(&output);
    assert!(!output.status.success() && text.contains("maxLength") && text.contains("heads"), "{text}");
    assert!(!local.state().join("logs/smollm2-pool-0.log").exists(), "something was started");
}
