//! What a `tokenizer.json` is made of, before the library reads it: that ends the process, or takes any time and memory, over some of what it may say.

use std::collections::HashMap;

use serde::Deserialize;
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value;

/// Normalizers that BPE tokenizers have.
const NORMALIZERS: [&str; 9] = ["Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Prepend", "Replace", "Sequence", "Strip"];
/// Pre-tokenizers that they have.
const PRE_TOKENIZERS: [&str; 8] = ["ByteLevel", "Digits", "Metaspace", "Punctuation", "Sequence", "Split", "Whitespace", "WhitespaceSplit"];
/// What puts control tokens around a text.
const POST_PROCESSORS: [&str; 3] = ["ByteLevel", "Sequence", "TemplateProcessing"];
/// Most parts in all.
const MAX_PARTS: usize = 32;
/// Bytes of all expressions together.
const MAX_PATTERNS: usize = 2 << 10;
/// Bytes of each compiled part of an expression.
const MAX_COMPILED: usize = 256 << 10;
/// Bytes of what is put in front of a text, or for a part of it.
const MAX_REPLACED: usize = 4;

/// Which model it is of.
#[derive(Deserialize)]
struct Kind {
    model: Type,
}

#[derive(Deserialize)]
struct Type {
    #[serde(rename = "type")]
    name: Option<String>,
}

#[derive(Deserialize)]
struct Outline {
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: Model,
}

#[derive(Deserialize)]
struct Model {
    dropout: Option<f64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    vocab: HashMap<String, IgnoredAny>,
    merges: Vec<Merge>,
}

/// `a b` or `["a", "b"]`.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Words(String),
    Pair(String, String),
}

/// Refuses what the library does not survive, by name.
pub(super) fn check(json: &[u8]) -> Result<(), String> {
    let Kind { model } = parse(json)?;
    if let Some(other) = model.name.filter(|name| name != "BPE") {
        return Err(format!("its model is {other}: only BPE is supported, of bytes (ByteLevel) or with ByteFallback"));
    }
    let outline: Outline = parse(json)?;
    outline.model.check()?;
    let mut parts = Parts::default();
    parts.collect("normalizer", outline.normalizer.as_ref(), &NORMALIZERS)?;
    parts.collect("pre_tokenizer", outline.pre_tokenizer.as_ref(), &PRE_TOKENIZERS)?;
    parts.collect("post_processor", outline.post_processor.as_ref(), &POST_PROCESSORS)?;
    parts.collect("decoder", outline.decoder.as_ref(), &[])?;
    parts.check_patterns()
}

fn parse<T: DeserializeOwned>(json: &[u8]) -> Result<T, String> {
    serde_json::from_slice(json).map_err(|error| error.to_string())
}

impl Model {
    fn check(&self) -> Result<(), String> {
        if self.dropout.is_some_and(|dropout| dropout != 0.0) {
            return Err("model.dropout: the same text would have other tokens each time".to_owned());
        }
        for (name, value) in [("prefix", &self.continuing_subword_prefix), ("suffix", &self.end_of_word_suffix)] {
            if value.as_ref().is_some_and(|value| !value.is_empty()) {
                return Err(format!("model: a {name} of parts of words is not supported"));
            }
        }
        let longest = self.vocab.keys().map(String::len).max().unwrap_or(0);
        let length = |merge: &Merge| match merge {
            Merge::Words(words) => words.len().saturating_sub(1),
            Merge::Pair(left, right) => left.len() + right.len(),
        };
        match self.merges.iter().position(|merge| length(merge) > longest) {
            Some(rank) => Err(format!("model.merges: merge {rank} is longer than any token")),
            None => Ok(()),
        }
    }
}

#[derive(Default)]
struct Parts<'a> {
    count: usize,
    patterns: Vec<&'a str>,
}

impl<'a> Parts<'a> {
    /// Goes through a part and those within it; `known` are all the kinds that it may have, if any are.
    fn collect(&mut self, at: &str, part: Option<&'a Value>, known: &[&str]) -> Result<(), String> {
        let Some(part) = part.filter(|part| !part.is_null()) else { return Ok(()) };
        self.count += 1;
        if self.count > MAX_PARTS {
            return Err(format!("{at}: it has more than {MAX_PARTS} parts"));
        }
        let kind = part["type"].as_str().unwrap_or_default();
        if !known.is_empty() && !known.contains(&kind) {
            return Err(format!("{at}: {kind:?} is not supported; supported are {}", known.join(", ")));
        }
        let checked = match kind {
            "TemplateProcessing" => check_template(part),
            "Replace" => check_replaced(part, &part["content"]),
            "Prepend" => check_replaced(part, &part["prepend"]),
            "Strip" if part["stop"].as_u64().is_some_and(|stop| stop > 0) => Err("it strips the end of a text".to_owned()),
            _ => Ok(()),
        };
        checked.map_err(|problem| format!("{at}: {kind}: {problem}"))?;
        self.patterns.extend(part["pattern"]["Regex"].as_str());
        self.patterns.extend(part["pattern"]["String"].as_str());
        for name in ["normalizers", "pretokenizers", "processors", "decoders"] {
            for part in part[name].as_array().into_iter().flatten() {
                self.collect(at, Some(part), known)?;
            }
        }
        Ok(())
    }

    fn check_patterns(&self) -> Result<(), String> {
        let length: usize = self.patterns.iter().map(|pattern| pattern.len()).sum();
        if length > MAX_PATTERNS {
            return Err(format!("its expressions have {length} bytes, more than {MAX_PATTERNS}"));
        }
        for pattern in &self.patterns {
            let compiled = fancy_regex::RegexBuilder::new(pattern).delegate_size_limit(MAX_COMPILED).build();
            compiled.map_err(|error| format!("expression {pattern:?}: {error}"))?;
        }
        Ok(())
    }
}

/// What is replaced is a text and not nothing, and does not become many times as long.
fn check_replaced(part: &Value, by: &Value) -> Result<(), String> {
    if by.as_str().is_some_and(|by| by.len() > MAX_REPLACED) {
        return Err(format!("{by} has more than {MAX_REPLACED} bytes"));
    }
    match part.get("pattern").map(|pattern| pattern["String"].as_str().unwrap_or_default()) {
        Some("") => Err("what it replaces is not a text".to_owned()),
        _ => Ok(()),
    }
}

/// A text's template names one text, and control tokens that it says the ids of.
fn check_template(part: &Value) -> Result<(), String> {
    for piece in part["single"].as_array().into_iter().flatten() {
        if piece["Sequence"]["id"].as_str().is_some_and(|id| id != "A") {
            return Err("single: it has one text, A".to_owned());
        }
        if let Some(id) = piece["SpecialToken"]["id"].as_str().filter(|id| part["special_tokens"].get(id).is_none()) {
            return Err(format!("special_tokens: {id:?} is missing"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn refusal(own: Value) -> String {
        let mut json = json!({"model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b", ["a", "b"]]}});
        check(json.to_string().as_bytes()).unwrap();
        let (Value::Object(members), Value::Object(own)) = (&mut json, own) else { unreachable!() };
        members.extend(own);
        check(json.to_string().as_bytes()).unwrap_err()
    }

    #[test]
    fn models_that_the_library_does_not_survive_are_refused_by_name() {
        let model = |name: &str, value: Value| {
            let mut model = json!({"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []});
            model[name] = value;
            refusal(json!({ "model": model }))
        };
        assert_eq!(
            model("type", json!("Unigram")),
            "its model is Unigram: only BPE is supported, of bytes (ByteLevel) or with ByteFallback"
        );
        assert_eq!(model("merges", json!(["a b"])), "model.merges: merge 0 is longer than any token");
        assert_eq!(model("merges", json!([["a", "b"]])), "model.merges: merge 0 is longer than any token");
        assert!(model("dropout", json!(0.5)).starts_with("model.dropout: "));
        assert_eq!(model("continuing_subword_prefix", json!("##")), "model: a prefix of parts of words is not supported");
        assert_eq!(model("end_of_word_suffix", json!("</w>")), "model: a suffix of parts of words is not supported");
    }

    #[test]
    fn parts_that_the_library_does_not_survive_are_refused_by_name() {
        let replace = |pattern: Value| json!({"type": "Replace", "pattern": pattern, "content": "▁"});
        for (own, expected) in [
            (json!({"normalizer": {"type": "Precompiled"}}), "normalizer: \"Precompiled\" is not supported; supported are Lowercase, NFC,"),
            (json!({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{}]}}), "pre_tokenizer: \"\" is not supported;"),
            (json!({"normalizer": replace(json!({"Regex": "a*"}))}), "normalizer: Replace: what it replaces is not a text"),
            (json!({"normalizer": replace(json!({"String": ""}))}), "normalizer: Replace: what it replaces is not a text"),
            (json!({"normalizer": {"type": "Prepend", "prepend": "aaaaa"}}), "normalizer: Prepend: \"aaaaa\" has more than 4 bytes"),
            (json!({"decoder": {"type": "Strip", "content": " ", "start": 0, "stop": 1}}), "decoder: Strip: it strips the end of a text"),
            (
                json!({"post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}], "special_tokens": {}}}),
                "post_processor: TemplateProcessing: special_tokens: \"<s>\" is missing",
            ),
            (
                json!({"post_processor": {"type": "TemplateProcessing", "single": [{"Sequence": {"id": "B"}}], "special_tokens": {}}}),
                "post_processor: TemplateProcessing: single: it has one text, A",
            ),
            (
                json!({"normalizer": {"type": "Sequence", "normalizers": vec![json!({"type": "NFC"}); 32]}}),
                "normalizer: it has more than 32 parts",
            ),
        ] {
            let found = refusal(own);
            assert!(found.starts_with(expected), "{found}");
        }
    }

    #[test]
    fn expressions_that_become_large_are_refused() {
        let split = |pattern: String| refusal(json!({"pre_tokenizer": {"type": "Split", "pattern": {"Regex": pattern}}}));
        assert!(split("(\\w{30}){30}".to_owned()).starts_with("expression \"(\\\\w{30}){30}\": "));
        assert_eq!(split("a".repeat(2049)), "its expressions have 2049 bytes, more than 2048");
    }
}
