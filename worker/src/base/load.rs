//! From a checkpoint to a pool that can describe itself.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use carryon_crds::pool::{Dtype, WeightDtype};
use carryon_crds::wire::limits::{MAX_REQUEST_BYTES, largest_head};
use carryon_crds::wire::{BaseConfig, Identity, Limits, ModelDescription, Numerics, digest};
use serde::de::{DeserializeOwned, IgnoredAny};
use serde_json::Value as Json;

use super::ends::end_tokens;
use super::error::BaseError;
use crate::kernel::{Backend, Bits, Stored};
use crate::model::gguf::{Gguf, Value};
use crate::model::{Files, Model, ModelConfig};
use crate::text::{ChatTemplate, Pieces, TextError, Tokenizer, Vocabulary};

/// Sequences of one request at most.
pub const MAX_SEQUENCES: usize = 1024;
/// Forward batches that one request may fill.
const MAX_REQUEST_BATCHES: u32 = 16;
/// Bytes of a JSON file beside the weights.
const MAX_JSON_BYTES: u64 = 64 << 20;

/// A model with all that is said of it.
pub struct Loaded<B: Backend> {
    /// The model.
    pub model: Arc<Model<B>>,
    /// tokenizer.json as handed out.
    pub tokenizer: Vec<u8>,
    /// What the pool says of the model.
    pub description: ModelDescription,
}

/// What a checkpoint says of text.
struct Words {
    tokenizer: Tokenizer,
    chat_template: Option<String>,
    tool_use_template: Option<String>,
    bos_token: Option<String>,
    eos_token: Option<String>,
    eos_token_ids: Vec<u32>,
}

impl Words {
    /// Whether the templates can be used is found out before a trainer or gateway has to.
    fn compile(&self) -> Result<(), TextError> {
        let Some(template) = &self.chat_template else { return Ok(()) };
        let (bos, eos) = (self.bos_token.as_deref(), self.eos_token.as_deref());
        ChatTemplate::new(template, self.tool_use_template.as_deref(), bos, eos).map(drop)
    }

    fn template_digest(&self) -> String {
        let templates = [&self.chat_template, &self.tool_use_template].into_iter().flatten().map(String::as_str).collect::<Vec<_>>();
        if templates.is_empty() { String::new() } else { digest(templates.join("\n").as_bytes()) }
    }
}

/// Loads the checkpoint at `path` onto a device, in a pod with `memory` bytes.
pub fn load<B: Backend>(path: &Path, config: &BaseConfig, instance: &str, backend: B, memory: u64) -> Result<Loaded<B>, BaseError> {
    let words = words(path)?;
    words.compile().map_err(|source| BaseError::Template { path: path.to_owned(), source })?;
    let model = Model::load(Files { path, text_only: config.text_only }, stored(config), backend)?;
    let tokenizer = words.tokenizer.to_json().map_err(|source| BaseError::Tokenizer { path: path.to_owned(), source })?;
    let identity = Identity {
        weights: model.weights_digest().to_owned(),
        tokenizer: digest(&tokenizer),
        chat_template: words.template_digest(),
        norm_point: "final_norm".to_owned(),
    };
    let description = ModelDescription {
        format_version: 1,
        name: model.name().to_owned(),
        model_type: model.config.model_type.clone(),
        instance: instance.to_owned(),
        identity,
        numerics: numerics(&model),
        hidden_size: model.config.hidden_size as u32,
        num_hidden_layers: model.config.layers.len() as u32,
        vocab_size: model.config.vocab_size as u32,
        eos_token_ids: words.eos_token_ids,
        bos_token: words.bos_token,
        eos_token: words.eos_token,
        chat_template: words.chat_template,
        tool_use_template: words.tool_use_template,
        limits: limits(config, &model.config, memory),
    };
    Ok(Loaded { model: Arc::new(model), tokenizer, description })
}

fn numerics<B: Backend>(model: &Model<B>) -> Numerics {
    let (device, kernel) = model.backend.name(model.dtype);
    let kernel = match model.stored {
        Stored::As(_) => kernel,
        Stored::Blocks(Bits::Q8) => format!("{kernel}_q8"),
        Stored::Blocks(Bits::Q4) => format!("{kernel}_q4"),
    };
    Numerics { dtype: model.dtype, device, kernel }
}

/// What weights are kept as; the operator refuses blocks for a pool of another type than bf16.
fn stored(config: &BaseConfig) -> Stored {
    match config.engine.weight_dtype.filter(|_| config.dtype == Dtype::Bfloat16) {
        None | Some(WeightDtype::Bfloat16) => Stored::As(config.dtype),
        Some(WeightDtype::Q8) => Stored::Blocks(Bits::Q8),
        Some(WeightDtype::Q4) => Stored::Blocks(Bits::Q4),
    }
}

fn limits(config: &BaseConfig, model: &ModelConfig, memory: u64) -> Limits {
    let max_model_len = config.engine.max_model_len.min(model.max_position_embeddings as u32);
    Limits {
        max_model_len,
        max_sequences: MAX_SEQUENCES as u32,
        max_request_tokens: config.engine.max_num_batched_tokens.saturating_mul(MAX_REQUEST_BATCHES).max(max_model_len),
        max_body_bytes: MAX_REQUEST_BYTES,
        max_num_seqs: Some(config.engine.max_num_seqs),
        max_head_bytes: Some(largest_head(memory)),
    }
}

/// The tokenizer of the checkpoint at `path`, and nothing else of it.
///
/// # Errors
/// When a file with text in it cannot be read, or the tokenizer is none that we know.
pub fn tokenizer(path: &Path) -> Result<Tokenizer, BaseError> {
    words(path).map(|words| words.tokenizer)
}

fn words(path: &Path) -> Result<Words, BaseError> {
    if path.is_dir() { words_of_folder(path) } else { words_of_gguf(path) }
}

fn words_of_gguf(path: &Path) -> Result<Words, BaseError> {
    let gguf = Gguf::open(path)?;
    let wrong = |reason: String| BaseError::Tokenizer { path: path.to_owned(), source: TextError::Vocabulary(reason) };
    let key = |name: &str| format!("tokenizer.ggml.{name}");
    let strings = |name: &str| match gguf.metadata.get(&key(name)) {
        Some(Value::Strings(values)) => Ok(values.clone()),
        other => Err(wrong(format!(
            "{} must be a list of strings, found {}",
            key(name),
            if other.is_some() { "another type" } else { "nothing" }
        ))),
    };
    let pieces = match gguf.text(&key("model"))? {
        None | Some("gpt2") => None,
        Some("llama") => {
            let Some(Value::Floats(scores)) = gguf.metadata.get(&key("scores")) else {
                return Err(wrong(format!("{} must be a list of floats", key("scores"))));
            };
            let add_space_prefix = gguf.metadata.get(&key("add_space_prefix")) != Some(&Value::Bool(false));
            let strips = gguf.text("general.architecture")? == Some("phi3");
            Some(Pieces { scores: scores.iter().map(|score| *score as f32).collect(), add_space_prefix, strips })
        }
        Some(kind) => return Err(wrong(format!("{} is {kind:?}: only BPE (gpt2, llama) is supported", key("model")))),
    };
    let token_types = match gguf.metadata.get(&key("token_type")) {
        Some(Value::Integers(values)) => values.iter().map(|value| value as u32).collect(),
        _ => return Err(wrong(format!("{} must be a list of integers", key("token_type")))),
    };
    let vocabulary = Vocabulary {
        tokens: strings("tokens")?,
        merges: if pieces.is_some() { Vec::new() } else { strings("merges")? },
        token_types,
        pre: gguf.text(&key("pre"))?.map(str::to_owned),
        bos: gguf.integer(&key("bos_token_id"))?,
        eos: gguf.integer(&key("eos_token_id"))?,
        add_bos: gguf.metadata.get(&key("add_bos_token")).map_or(pieces.is_some(), |value| *value == Value::Bool(true)),
        pieces,
        chat_template: gguf.text("tokenizer.chat_template")?.map(str::to_owned),
    };
    let tokenizer = Tokenizer::from_vocabulary(&vocabulary).map_err(|source| BaseError::Tokenizer { path: path.to_owned(), source })?;
    let text = |id: Option<u32>| id.and_then(|id| vocabulary.token(id)).map(str::to_owned);
    let named = [vocabulary.eos, gguf.integer(&key("eot_token_id"))?, gguf.integer(&key("eom_token_id"))?];
    let eos_token_ids = end_tokens(&tokenizer, named.into_iter().flatten());
    Ok(Words {
        bos_token: text(vocabulary.bos),
        eos_token: text(vocabulary.eos),
        eos_token_ids,
        chat_template: vocabulary.chat_template,
        tool_use_template: gguf.text("tokenizer.chat_template.tool_use")?.map(str::to_owned),
        tokenizer,
    })
}

fn words_of_folder(folder: &Path) -> Result<Words, BaseError> {
    let path = folder.join("tokenizer.json");
    let bytes = read(&path)?.ok_or_else(|| BaseError::File { path: path.clone(), reason: "there is no such file".to_owned() })?;
    // Damaged, or sound and of a kind that we do not know: two ends.
    parse::<IgnoredAny>(&path, &bytes)?;
    let tokenizer = Tokenizer::from_json(&bytes).map_err(|source| BaseError::Tokenizer { path, source })?;
    let settings = json(folder.join("tokenizer_config.json"))?;
    let token = |name: &str| {
        let value = settings.get(name)?;
        value.as_str().or_else(|| value.get("content")?.as_str()).map(str::to_owned)
    };
    let (chat_template, tool_use_template) = templates_of_folder(folder, &settings)?;
    let eos_token = token("eos_token");
    let mut named = Vec::new();
    for file in ["generation_config.json", "config.json"] {
        named.extend(numbers(json(folder.join(file))?.get("eos_token_id")));
    }
    named.extend(eos_token.as_deref().and_then(|token| tokenizer.token_id(token)));
    let eos_token_ids = end_tokens(&tokenizer, named);
    Ok(Words { tokenizer, chat_template, tool_use_template, bos_token: token("bos_token"), eos_token, eos_token_ids })
}

/// The chat template, and the one for conversations with tools, wherever transformers has written them: in files of their own, or in the
/// tokenizer's settings, as one text or as a list of named ones.
fn templates_of_folder(folder: &Path, settings: &Json) -> Result<(Option<String>, Option<String>), BaseError> {
    let file = |path: PathBuf| match read(&path)? {
        Some(bytes) => String::from_utf8(bytes).map(Some).map_err(|error| BaseError::Damaged { path, reason: error.to_string() }),
        None => Ok(None),
    };
    let written = json(folder.join("chat_template.json"))?;
    let setting = written.get("chat_template").or_else(|| settings.get("chat_template"));
    let named = |name: &str| {
        let mut list = setting.and_then(Json::as_array).into_iter().flatten();
        list.find(|template| template["name"] == name).and_then(|template| template["template"].as_str()).map(str::to_owned)
    };
    let one = setting.and_then(Json::as_str).map(str::to_owned);
    let chat_template = file(folder.join("chat_template.jinja"))?.or(one).or_else(|| named("default"));
    let tool_use_template = file(folder.join("additional_chat_templates/tool_use.jinja"))?.or_else(|| named("tool_use"));
    Ok((chat_template, tool_use_template))
}

/// One number, or a list of them.
fn numbers(value: Option<&Json>) -> Vec<u32> {
    let one = |value: &Json| value.as_u64().and_then(|number| u32::try_from(number).ok());
    match value {
        Some(Json::Array(values)) => values.iter().filter_map(one).collect(),
        Some(value) => one(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// A JSON file, or null when there is none.
fn json(path: PathBuf) -> Result<Json, BaseError> {
    match read(&path)? {
        Some(bytes) => parse(&path, &bytes),
        None => Ok(Json::Null),
    }
}

fn parse<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, BaseError> {
    serde_json::from_slice(bytes).map_err(|error| BaseError::Damaged { path: path.to_owned(), reason: error.to_string() })
}

/// The bytes of a file of bounded size, if there is one.
pub fn read(path: &Path) -> Result<Option<Vec<u8>>, BaseError> {
    let error = |reason: String| BaseError::File { path: path.to_owned(), reason };
    match std::fs::metadata(path) {
        Err(cause) if cause.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(cause) => Err(error(cause.to_string())),
        Ok(metadata) if metadata.len() > MAX_JSON_BYTES => {
            Err(error(format!("it has {} bytes, more than {MAX_JSON_BYTES}", metadata.len())))
        }
        Ok(_) => std::fs::read(path).map(Some).map_err(|cause| error(cause.to_string())),
    }
}
