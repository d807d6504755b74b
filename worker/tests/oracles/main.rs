//! The engine and the text against PyTorch, transformers and llama.cpp (`tests/oracles/*.py` made the fixtures).

#![allow(clippy::unwrap_used)] // a test may fail by panicking, in its helpers too

mod blocks;
#[path = "../common/mod.rs"]
mod common;
mod families;
mod prompts;
mod vocabularies;

use std::collections::BTreeMap;
use std::path::PathBuf;

use carryon_crds::pool::Dtype;
use carryon_worker::kernel::{Backend, PageTable};
use carryon_worker::model::gguf::{Gguf, Value};
use carryon_worker::text::{Chat, ChatTemplate, Conversation, Ending, Lesson, Message, Pieces, Tokenizer, Vocabulary};
use common::engine::{Engine, candle, cpu};
use safetensors::SafeTensors;
use serde::Deserialize;

/// Largest norm of a row's difference over the norm of the row. A pool of f32 is PyTorch's f32 in another order of sums.
const F32_TOLERANCE: f64 = 1e-4;
/// A pool of bf16 rounds weights, products' inputs and states. No row is further off than PyTorch's own bf16, which is off by 2.5e-2 at
/// SmolLM2's final norm, by 3.3e-2 in the tiny llama, whose weights are large.
const BF16_TOLERANCE: f64 = 2.5e-2;
const TINY_BF16_TOLERANCE: f64 = 3.3e-2;
/// Logits in bf16: some thousand of a row whose state is off by 2e-2 were off by 2.0e-2 on our kernels and 4.8e-2 on candle, in another direction.
const LOGITS: f64 = 2.0;

fn fixtures() -> PathBuf {
    PathBuf::from("../tests/oracles/fixtures")
}

fn read(name: &str) -> Vec<u8> {
    let path = fixtures().join(name);
    std::fs::read(&path).unwrap_or_else(|error| panic!("failed to read {}: {error}", path.display()))
}

/// The SmolLM2 that `make test` downloads.
fn smollm2() -> PathBuf {
    let home = || PathBuf::from(std::env::var_os("HOME").unwrap()).join(".cache/carry-on/models/SmolLM2-135M-Instruct.Q4_1.gguf");
    let path = std::env::var_os("CARRYON_MODEL").map_or_else(home, PathBuf::from);
    assert!(path.is_file(), "no model at {}: run `make test`, or set CARRYON_MODEL", path.display());
    path
}

/// Tensors of 32-bit elements, as their bits.
struct Expected(BTreeMap<String, Vec<u32>>);

impl Expected {
    fn read(name: &str) -> Self {
        let bytes = read(name);
        let words = |data: &[u8]| data.as_chunks::<4>().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        Self(SafeTensors::deserialize(&bytes).unwrap().iter().map(|(name, view)| (name.to_owned(), words(view.data()))).collect())
    }

    fn integers(&self, name: &str) -> Vec<u32> {
        self.0[name].clone()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        self.0[name].iter().map(|bits| f32::from_bits(*bits)).collect()
    }
}

fn tap_names(layers: usize) -> impl Iterator<Item = String> {
    (0..=layers).map(|layer| format!("layer.{layer}")).chain(["final".to_owned()])
}

/// States of one sequence at every tap, rows × D each.
fn states<B: Backend>(model: &Engine<B>, tokens: &[u32]) -> Vec<Vec<f32>> {
    model.states(&[tokens], &mut [PageTable::default()], &model.all_taps())
}

/// Every row of `found` is within `tolerance` of the row of `expected`, by their norms.
fn assert_rows(name: &str, found: &[f32], expected: &[f32], width: usize, tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    let norm = |row: &mut dyn Iterator<Item = f64>| row.map(|value| value * value).sum::<f64>().sqrt();
    for (row, (found, expected)) in found.chunks(width).zip(expected.chunks(width)).enumerate() {
        let off = norm(&mut found.iter().zip(expected).map(|(a, b)| f64::from(*a) - f64::from(*b)));
        let relative = off / norm(&mut expected.iter().map(|value| f64::from(*value)));
        assert!(relative <= tolerance, "{name}, row {row}: relative difference {relative:.2e} > {tolerance:.0e}");
    }
}

/// Prompts in two passes and beside another, then token by token together: the states of one pass, within the tolerance.
fn decodes<B: Backend>(model: &Engine<B>, tokens: &[u32], whole: &[Vec<f32>], tolerance: f64) {
    let (width, length) = (model.model.config.hidden_size, tokens.len());
    let (cut, known, taps) = (length / 2, length - 3, model.all_taps());
    let mut tables = [(); 2].map(|()| PageTable::default());
    model.states(&[&tokens[..cut], &tokens[..5]], &mut tables, &taps);
    let rest = model.states(&[&tokens[cut..known], &tokens[5..6]], &mut tables, &taps);
    for (tap, whole) in rest.iter().zip(whole) {
        assert_rows("second pass", &tap[..(known - cut) * width], &whole[cut * width..known * width], width, tolerance);
    }
    for (step, position) in (known..length).enumerate() {
        let states = model.states(&[&tokens[position..=position], &tokens[6 + step..7 + step]], &mut tables, &taps);
        for (tap, whole) in states.iter().zip(whole) {
            assert_rows("decoding", &tap[..width], &whole[position * width..][..width], width, tolerance);
            assert_rows("decoding beside it", &tap[width..], &whole[(6 + step) * width..][..width], width, tolerance);
        }
    }
}

fn check_tiny<B: Backend>(backend: B, dtype: Dtype, tolerance: f64) {
    let model = Engine::load(&fixtures().join("tiny_llama"), dtype, backend);
    let expected = Expected::read("tiny_llama_states.safetensors");
    let (width, layers) = (model.model.config.hidden_size, model.model.config.layers.len());
    for sequence in 0..4 {
        let found = states(&model, &expected.integers(&format!("{sequence}.tokens")));
        for (name, found) in tap_names(layers).zip(&found) {
            let name = format!("{sequence}.{name}");
            assert_rows(&name, found, &expected.floats(&name), width, tolerance);
        }
        let name = format!("{sequence}.logits");
        assert_rows(&name, &model.logits(&found[layers + 1]), &expected.floats(&name), model.model.config.vocab_size, tolerance);
    }
}

#[test]
fn tiny_llama_in_f32_has_the_states_and_logits_of_transformers() {
    check_tiny(cpu(2), Dtype::Float32, F32_TOLERANCE);
    check_tiny(candle(), Dtype::Float32, F32_TOLERANCE);
}

#[test]
fn tiny_llama_in_bf16_is_near_the_states_and_logits_of_transformers() {
    check_tiny(cpu(2), Dtype::Bfloat16, TINY_BF16_TOLERANCE);
    check_tiny(candle(), Dtype::Bfloat16, TINY_BF16_TOLERANCE);
}

fn check_smollm2<B: Backend>(backend: B, dtype: Dtype, tolerance: f64) {
    let model = Engine::load(&smollm2(), dtype, backend);
    let expected = Expected::read("smollm2_states.safetensors");
    let (width, layers) = (model.model.config.hidden_size, model.model.config.layers.len());
    let rows: Vec<usize> = expected.integers("rows").into_iter().map(|row| row as usize).collect();
    let chosen = |state: &[f32]| rows.iter().flat_map(|row| state[row * width..][..width].to_vec()).collect::<Vec<f32>>();
    let found = states(&model, &expected.integers("tokens"));
    decodes(&model, &expected.integers("tokens"), &found, tolerance);
    for (name, found) in tap_names(layers).zip(&found) {
        assert_rows(&name, &chosen(found), &expected.floats(&name), width, tolerance);
    }
    let (columns, logits) = (expected.integers("columns"), model.logits(&chosen(&found[layers + 1])));
    let logits: Vec<&[f32]> = logits.chunks(model.model.config.vocab_size).collect();
    let subset: Vec<f32> = logits.iter().flat_map(|row| columns.iter().map(|column| row[*column as usize])).collect();
    assert_rows("logits", &subset, &expected.floats("logits"), columns.len(), LOGITS * tolerance);
    let sums: Vec<f32> = logits.iter().map(|row| row.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln() as f32).collect();
    assert_rows("log_sum_exp", &sums, &expected.floats("log_sum_exp"), 1, tolerance);
}

#[test]
fn smollm2_in_f32_has_the_states_and_logits_of_transformers() {
    check_smollm2(cpu(2), Dtype::Float32, F32_TOLERANCE);
    check_smollm2(candle(), Dtype::Float32, F32_TOLERANCE);
}

#[test]
fn smollm2_in_bf16_is_near_the_states_and_logits_of_transformers() {
    check_smollm2(cpu(2), Dtype::Bfloat16, BF16_TOLERANCE);
    check_smollm2(candle(), Dtype::Bfloat16, BF16_TOLERANCE);
}

fn vocabulary(gguf: &Gguf) -> Vocabulary {
    let strings = |key: &str| match gguf.metadata.get(key) {
        Some(Value::Strings(list)) => list.clone(),
        other => panic!("{key} is {other:?}"),
    };
    let Value::Integers(types) = &gguf.metadata["tokenizer.ggml.token_type"] else { panic!("token types are no integers") };
    let pieces = match gguf.metadata.get("tokenizer.ggml.scores") {
        Some(Value::Floats(scores)) => {
            let strips = gguf.text("general.architecture").unwrap() == Some("phi3");
            Some(Pieces { scores: scores.iter().map(|score| *score as f32).collect(), add_space_prefix: true, strips })
        }
        _ => None,
    };
    Vocabulary {
        tokens: strings("tokenizer.ggml.tokens"),
        merges: if pieces.is_some() { Vec::new() } else { strings("tokenizer.ggml.merges") },
        pieces,
        token_types: types.iter().map(|kind| kind as u32).collect(),
        pre: gguf.text("tokenizer.ggml.pre").unwrap().map(String::from),
        bos: gguf.integer("tokenizer.ggml.bos_token_id").unwrap(),
        eos: gguf.integer("tokenizer.ggml.eos_token_id").unwrap(),
        add_bos: false,
        chat_template: gguf.text("tokenizer.chat_template").unwrap().map(String::from),
    }
}

/// What was downloaded of others' vocabularies and templates.
fn published(name: &str) -> PathBuf {
    let folder = std::env::var_os("CARRYON_VOCABULARIES").map(PathBuf::from);
    folder.unwrap_or_else(|| std::env::home_dir().unwrap().join(".cache/carry-on/vocabularies")).join(name)
}

/// The beginning of a SHA-256, for fixtures of thousands of texts.
fn digest(bytes: &[u8]) -> String {
    let digest = carryon_crds::wire::digest(bytes);
    digest.rsplit(':').next().unwrap()[..8].to_owned()
}

#[test]
fn tokens_are_those_of_llama_cpp() {
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary(&Gguf::open(&smollm2()).unwrap())).unwrap();
    let again = Tokenizer::from_json(&tokenizer.to_json().unwrap()).unwrap();
    let rows: Vec<(String, Vec<u32>)> = serde_json::from_slice(&read("tokens.json")).unwrap();
    assert!(rows.len() >= 300);
    for (text, ids) in rows {
        assert_eq!(tokenizer.encode(&text, false).unwrap(), ids, "{text:?}");
        assert_eq!(again.encode(&text, false).unwrap(), ids, "{text:?}, through tokenizer.json");
        // Special tokens are recognised in text, but are no text.
        if !ids.iter().any(|id| tokenizer.is_special(*id)) {
            assert_eq!(tokenizer.decode(&ids), text);
        }
    }
}

#[derive(Deserialize)]
struct Chats {
    bos_token: String,
    eos_token: String,
    templates: BTreeMap<String, String>,
    cases: Vec<Rendered>,
}

#[derive(Deserialize)]
struct Rendered {
    template: String,
    messages: Vec<Turn>,
    add_generation_prompt: bool,
    text: String,
}

#[derive(Debug, Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[test]
fn prompts_are_those_of_apply_chat_template() {
    let mut chats: Chats = serde_json::from_slice(&read("chat.json")).unwrap();
    let own = vocabulary(&Gguf::open(&smollm2()).unwrap()).chat_template.unwrap();
    chats.templates.insert("model".to_owned(), own);
    for chat in &chats.cases {
        let template = ChatTemplate::new(&chats.templates[&chat.template], None, Some(&chats.bos_token), Some(&chats.eos_token)).unwrap();
        let messages: Vec<Message> = chat.messages.iter().map(|turn| Message::new(&turn.role, turn.content.as_str())).collect();
        let (turns, conversation) = (messages.len(), Conversation { messages, ..Conversation::default() });
        let text = template.render(&conversation, turns, chat.add_generation_prompt).unwrap();
        assert_eq!(text, chat.text, "template {:?}, {:?}", chat.template, chat.messages);
    }
}

#[derive(Deserialize)]
struct Lessons {
    template: String,
    masked: Vec<Masked>,
    apart: Vec<Apart>,
    forged: Vec<Apart>,
}

/// A conversation with the mask that transformers makes of `{% generation %}`.
#[derive(Deserialize)]
struct Masked {
    line: String,
    ids: Vec<u32>,
    mask: Vec<u8>,
}

/// A question and its answer, encoded apart.
#[derive(Deserialize)]
struct Apart {
    line: String,
    prompt: Vec<u32>,
    answer: Vec<u32>,
}

#[test]
fn what_is_learned_of_a_conversation_is_what_transformers_masks() {
    let lessons: Lessons = serde_json::from_slice(&read("lessons.json")).unwrap();
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary(&Gguf::open(&smollm2()).unwrap())).unwrap();
    let template = ChatTemplate::new(&lessons.template, None, None, None).unwrap();
    let end = tokenizer.token_id("<|im_end|>").unwrap();
    let learn = |line: &str| {
        let conversation = Conversation::parse(line).unwrap();
        let assistants = (0..conversation.messages.len()).filter(|turn| conversation.messages[*turn].role == "assistant");
        Chat::new(&tokenizer, &template, &conversation, true).unwrap().lessons(&assistants.collect::<Vec<_>>(), &[end]).unwrap()
    };
    for Masked { line, ids, mask } in &lessons.masked {
        let found = learn(line);
        assert_eq!(found.len(), 1, "{line}");
        let known = found[0].ids.len();
        assert_eq!(found[0].ids, ids[..known], "{line}");
        assert!(!mask[known..].contains(&1), "{line}: the mask goes on");
        let learned: Vec<u8> = (0..known).map(|place| u8::from(found[0].learned.iter().any(|range| range.contains(&place)))).collect();
        assert_eq!(learned, mask[..known], "{line}");
    }
    for Apart { line, prompt, answer } in lessons.apart.iter().chain(&lessons.forged) {
        let ids = [prompt.as_slice(), answer].concat();
        assert_eq!(learn(line), [Lesson { learned: vec![prompt.len()..ids.len(); 1], ids }], "{line}");
        let mut asked = Conversation::parse(line).unwrap();
        asked.messages.pop();
        let found = Chat::new(&tokenizer, &template, &asked, true).unwrap().prompt(Ending::GenerationPrompt).unwrap();
        assert_eq!(found, *prompt, "{line}: a request's prompt");
    }
}

/// Encoded piece by piece between control tokens, as conversations are, a text has the tokens of llama.cpp too.
#[test]
fn tokens_of_conversations_are_those_of_llama_cpp() {
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary(&Gguf::open(&smollm2()).unwrap())).unwrap();
    let template = ChatTemplate::new("{{ messages[0].content }}", None, None, None).unwrap();
    let rows: Vec<(String, Vec<u32>)> = serde_json::from_slice(&read("tokens.json")).unwrap();
    for (text, ids) in rows {
        let conversation = Conversation { messages: vec![Message::new("user", text.as_str())], ..Conversation::default() };
        let encode = |split| Chat::new(&tokenizer, &template, &conversation, split).unwrap().prompt(Ending::GenerationPrompt).unwrap();
        assert_eq!(encode(false), ids, "{text:?}");
        if ids.iter().any(|id| tokenizer.is_special(*id)) {
            assert!(!encode(true).iter().any(|id| tokenizer.is_special(*id)), "{text:?}");
            assert_eq!(tokenizer.decode(&encode(true)), text);
        } else {
            assert_eq!(encode(true), ids, "{text:?}");
        }
    }
}
