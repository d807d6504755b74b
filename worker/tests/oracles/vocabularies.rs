//! Tokenizers of every kind against transformers, and published vocabularies against llama.cpp.

use std::collections::BTreeMap;

use carryon_worker::model::gguf::Gguf;
use carryon_worker::text::{Tokenizer, Vocabulary};
use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::NormalizedString;

use super::{digest, published, read, vocabulary};

#[derive(Deserialize)]
struct Fixture {
    texts: Vec<String>,
    models: BTreeMap<String, Value>,
    kinds: BTreeMap<String, Value>,
    /// Of each kind, a digest for each text.
    rows: BTreeMap<String, String>,
    published: BTreeMap<String, String>,
}

impl Fixture {
    fn read() -> (Self, Vec<String>) {
        let fixture: Self = serde_json::from_slice(&read("vocabularies.json")).unwrap();
        let rows: Vec<(String, Vec<u32>)> = serde_json::from_slice(&read("tokens.json")).unwrap();
        let texts = rows.into_iter().map(|(text, _)| text).chain(fixture.texts.clone()).collect();
        (fixture, texts)
    }

    fn tokenizer(&self, kind: &str) -> Tokenizer {
        let mut whole = self.kinds[kind].clone();
        let mut model = self.models[whole["model"].as_str().unwrap()].clone();
        model["ignore_merges"] = json!(matches!(kind, "llama3" | "tekken"));
        whole["model"] = model;
        whole["version"] = json!("1.0");
        Tokenizer::from_json(whole.to_string().as_bytes()).unwrap()
    }
}

/// Ids without and with special tokens, and what they decode to, whole and piece by piece.
fn row(tokenizer: &Tokenizer, text: &str) -> String {
    let (ids, around) = (tokenizer.encode(text, false).unwrap(), tokenizer.encode(text, true).unwrap());
    let decoded = tokenizer.decode(&around);
    let mut stream = tokenizer.stream();
    let mut pieces: String = around.iter().map(|id| stream.push(*id)).collect();
    pieces.push_str(&stream.finish());
    assert_eq!(pieces, decoded, "{text:?}, piece by piece");
    serde_json::to_string(&(ids, around, decoded)).unwrap()
}

fn composed(text: &str) -> String {
    let mut normalized = NormalizedString::from(text);
    normalized.nfc();
    normalized.get().to_owned()
}

fn compare(name: &str, texts: &[String], expected: &str, found: impl Fn(&str) -> String) {
    let expected: Vec<&str> = expected.split(' ').collect();
    assert_eq!(expected.len(), texts.len(), "{name}");
    let rows = texts.iter().zip(expected).map(|(text, expected)| (text, expected, found(text)));
    let wrong: Vec<_> = rows.filter(|(_, expected, found)| digest(found.as_bytes()) != *expected).collect();
    println!("{name}: {} of {} texts", texts.len() - wrong.len(), texts.len());
    assert!(wrong.is_empty(), "{name}: {} of {} differ: {:#?}", wrong.len(), texts.len(), &wrong[..wrong.len().min(5)]);
}

#[test]
fn tokens_and_texts_of_every_kind_are_those_of_transformers() {
    let (fixture, texts) = Fixture::read();
    assert!(texts.len() > 300 && fixture.rows.len() > 10);
    for (kind, expected) in &fixture.rows {
        let tokenizer = fixture.tokenizer(kind);
        compare(kind, &texts, expected, |text| row(&tokenizer, text));
        let again = Tokenizer::from_json(&tokenizer.to_json().unwrap()).unwrap();
        compare(kind, &texts, expected, |text| row(&again, text));
    }
}

/// What the names in a GGUF file stand for is what publishers' `tokenizer.json` says.
#[test]
fn pre_tokenizers_by_name_are_those_of_their_publishers() {
    let (fixture, texts) = Fixture::read();
    for (name, kind) in [
        ("gpt-2", "gpt2"),
        ("smollm", "smollm"),
        ("llama-bpe", "llama3"),
        ("qwen2", "qwen2"),
        ("glm4", "glm4, olmo2, phi4"),
        ("dbrx", "glm4, olmo2, phi4"),
        ("tekken", "tekken"),
        ("deepseek-v3", "deepseek3"),
    ] {
        let json = fixture.tokenizer(kind);
        let model = &fixture.models["bytes"];
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        let mut tokens = vec![String::new(); model["vocab"].as_object().unwrap().len()];
        for (token, id) in model["vocab"].as_object().unwrap() {
            tokens[id.as_u64().unwrap() as usize] = token.clone();
        }
        let merges = model["merges"].as_array().unwrap().iter().map(|pair| format!("{} {}", text(&pair[0]), text(&pair[1]))).collect();
        let token_types = vec![1; tokens.len()];
        let named = Vocabulary { tokens, token_types, merges, pre: Some(name.to_owned()), ..Vocabulary::default() };
        let named = Tokenizer::from_vocabulary(&named).unwrap();
        for text in texts.iter().filter(|text| json.control_tokens(text).is_empty() && !text.contains("<tool>")) {
            assert_eq!(named.encode(text, false).unwrap(), json.encode(text, false).unwrap(), "{name}, {text:?}");
        }
    }
}

#[test]
fn tokens_of_published_vocabularies_are_those_of_transformers_and_llama_cpp() {
    let (fixture, texts) = Fixture::read();
    for (name, expected) in &fixture.published {
        if name == "deepseek" {
            let tokenizer = Tokenizer::from_json(&std::fs::read(published("deepseek.json")).unwrap()).unwrap();
            compare(name, &texts, expected, |text| row(&tokenizer, text));
        } else {
            let gguf = Gguf::open(&published(&format!("{name}.gguf"))).unwrap();
            let tokenizer = Tokenizer::from_vocabulary(&vocabulary(&gguf)).unwrap();
            // Qwen's own tokenizer composes characters first, as ours does; llama.cpp reads them as they are. And it takes `</s>` for an end token
            // by its looks, which it is not in this file.
            let is_plain = |text: &str| composed(text) == text && !text.contains("</s>");
            let (texts, expected): (Vec<String>, Vec<&str>) =
                texts.iter().cloned().zip(expected.split(' ')).filter(|(text, _)| name != "qwen2" || is_plain(text)).unzip();
            assert!(texts.len() >= 325, "{name}");
            compare(name, &texts, &expected.join(" "), |text| serde_json::to_string(&tokenizer.encode(text, false).unwrap()).unwrap());
        }
    }
}
