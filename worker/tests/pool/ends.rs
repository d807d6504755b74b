//! What ends an answer, as a pool says it of its checkpoint.

use carryon_crds::pool::Dtype;
use serde_json::json;

use crate::common::model_path;
use crate::harness::{ENGINE, Pool, checkpoint, tokens_of};
use carryon_worker::exchange::wire::GenerateRequest;
use carryon_worker::text::{ChatTemplate, Conversation, Message, Tokenizer};

/// The real model, as a converter left it that took the end of a text for the end of a turn.
fn with_the_end_of_a_text(folder: &std::path::Path) -> std::path::PathBuf {
    let mut bytes = std::fs::read(model_path()).unwrap();
    let key = b"tokenizer.ggml.eos_token_id";
    let at = bytes.windows(key.len()).position(|window| window == key).unwrap() + key.len();
    // A number of type 4 (u32): `<|im_end|>` is 2, `<|endoftext|>` 0.
    assert_eq!(bytes[at..at + 8], [4, 0, 0, 0, 2, 0, 0, 0]);
    bytes[at + 4] = 0;
    let path = folder.join("model.gguf");
    std::fs::write(&path, bytes).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_a_gguf_file_ends_with_the_turn_whatever_its_eos_token_is() {
    let folder = tempfile::tempdir().unwrap();
    let pool = Pool::start(&with_the_end_of_a_text(folder.path()), Dtype::Bfloat16, ENGINE).await;
    let model = &pool.description;
    assert_eq!((model.eos_token.as_deref(), &model.eos_token_ids[..]), (Some("<|endoftext|>"), &[0, 2][..]));
    let tokenizer = Tokenizer::from_json(&pool.client.tokenizer().await.unwrap()).unwrap();
    let template = ChatTemplate::new(model.chat_template.as_deref().unwrap(), None, model.bos_token.as_deref(), None).unwrap();
    let messages = vec![Message::new("user", "Say the word yes, and nothing else.")];
    let asked = Conversation { messages, ..Conversation::default() };
    let prompt = tokenizer.encode(&template.render(&asked, 1, true).unwrap(), false).unwrap();
    let request = GenerateRequest { stop_token_ids: model.eos_token_ids.clone(), ..GenerateRequest::greedy(prompt, 60) };
    let answer = tokens_of(&pool.events(&request).await.unwrap());
    assert!((1..40).contains(&answer.len()) && !answer.contains(&2), "{:?}", tokenizer.decode(&answer));
}

#[tokio::test(flavor = "multi_thread")]
async fn every_end_in_the_list_of_generation_config_ends_an_answer() {
    let folder = checkpoint(7);
    std::fs::write(folder.path().join("generation_config.json"), json!({"eos_token_id": [99, 97]}).to_string()).unwrap();
    std::fs::write(folder.path().join("tokenizer_config.json"), json!({"eos_token": {"content": "<|a|>"}}).to_string()).unwrap();
    let pool = Pool::start(folder.path(), Dtype::Float32, ENGINE).await;
    assert_eq!(pool.description.eos_token_ids, [99, 97, 96]);
}
