//! A checkpoint that is not whole ends its pool by name, with one exit code, whatever is missing of which file.

use std::fs;
use std::path::Path;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::{BaseConfig, ExitCode};
use carryon_worker::base;
use tokio::net::TcpListener;

use crate::common::tiny::Tiny;
use crate::harness::{ENGINE, checkpoint};

/// How a pool on `path` ends: what it says, and its exit code.
async fn end(path: &Path) -> (String, ExitCode) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = BaseConfig { name: "test".to_owned(), dtype: Dtype::Float32, engine: ENGINE, text_only: false };
    let error = base::serve(listener, config, path.to_owned(), base::Placement::cpu(1), std::time::Duration::ZERO, std::future::pending())
        .await
        .unwrap_err();
    (error.to_string(), error.exit_code())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_empty_a_truncated_and_a_damaged_file_end_alike() {
    let folder = checkpoint(7);
    for name in ["tokenizer_config.json", "generation_config.json"] {
        fs::write(folder.path().join(name), "{\"eos_token_id\": 96}").unwrap();
    }
    for name in ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        let path = folder.path().join(name);
        let whole = fs::read(&path).unwrap();
        let mut damaged = whole.clone();
        damaged[8..14].fill(0xFF);
        for (kind, content) in [("empty", &whole[..0]), ("truncated", &whole[..whole.len() - 2]), ("damaged", &damaged)] {
            fs::write(&path, content).unwrap();
            let (text, code) = end(folder.path()).await;
            assert_eq!(code, ExitCode::Data, "{kind} {name}: {text}");
            assert!(text.contains(&*path.to_string_lossy()), "{kind} {name}: {text}");
        }
        fs::write(&path, whole).unwrap();
    }
    let path = folder.path().join("model.gguf");
    let whole = Tiny::default().gguf();
    for content in [&[][..], &whole[..200], &[&b"GGML"[..], &whole[4..]].concat()] {
        fs::write(&path, content).unwrap();
        let (text, code) = end(&path).await;
        assert_eq!(code, ExitCode::Data, "{text}");
        assert!(text.contains("model.gguf"), "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tokenizer_that_is_sound_and_of_another_kind_is_a_matter_of_configuration() {
    let folder = checkpoint(7);
    let word_level = r#"{"version":"1.0","added_tokens":[],"model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}"#;
    fs::write(folder.path().join("tokenizer.json"), word_level).unwrap();
    let (text, code) = end(folder.path()).await;
    assert!(text.contains("only BPE is supported, of bytes (ByteLevel) or with ByteFallback"), "{text}");
    assert_eq!(code, ExitCode::Configuration);
}
