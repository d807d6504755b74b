//! What chat and plain completions have in common: the model, how to sample, when to stop, how to answer.

use carryon_crds::job::Task;
use carryon_crds::wire::limits::MAX_ALPHA;
use serde_json::Value;

use super::error::ApiError;
use super::gateway::Gateway;
use super::models::Model;
use super::parameters::Parameters;
use super::sampling;
use crate::exchange::wire::{GenerateRequest, Sampling};

/// Most stop strings of a request: more than OpenAI's four, for evaluations send more.
const MAX_STOPS: usize = 16;
/// Longest stop string in bytes.
const MAX_STOP_BYTES: usize = 1024;
/// Most answers of a request: as many as OpenAI's `n` allows for one prompt.
pub(super) const MAX_CHOICES: usize = 128;

/// A request, and the model it names.
pub(super) struct Asked<'a> {
    /// The body.
    pub(super) body: &'a [u8],
    /// Its members but for `model`.
    pub(super) parameters: Parameters,
    /// The model.
    pub(super) model: Model,
}

/// What every completion request says beside its prompt.
#[derive(Debug)]
pub(super) struct Common {
    /// Who answers.
    pub(super) model: Model,
    alpha: Option<f64>,
    temperature: f64,
    top_p: f64,
    seed: Option<u64>,
    sampling: Sampling,
    /// Answers to each prompt.
    pub(super) n: usize,
    /// Strings that end the answer.
    pub(super) stops: Vec<String>,
    /// Whether the answer comes in pieces.
    pub(super) stream: bool,
    /// Whether a stream ends with the numbers of tokens.
    pub(super) include_usage: bool,
}

impl Common {
    /// Takes the common members out of a request to `model`. A head of another task continues no text; its base does.
    pub(super) fn take(parameters: &mut Parameters, model: Model, vocab_size: u32) -> Result<Self, ApiError> {
        if let Some(task) = model.head.as_ref().map(|head| head.artifact.shape.task).filter(|task| task.is_pooled()) {
            let (what, route) = match task {
                Task::Embedding => ("embeds texts", "embeddings"),
                task if task.has_labels() => ("is a classifier", "classify"),
                _ => ("scores texts", "classify"),
            };
            return Err(ApiError::parameter("model", format!("This model {what}: use /v1/{route}.")));
        }
        let alpha = parameters.number("alpha", 0.0..=MAX_ALPHA)?;
        if model.head.is_none() && alpha.is_some() {
            return Err(ApiError::parameter("alpha", format!("alpha scales a head: {:?} has none.", model.name)));
        }
        let stream = parameters.flag("stream")?;
        let include_usage = stream_options(parameters.take("stream_options"), stream)?;
        Ok(Self {
            model,
            alpha,
            temperature: parameters.number("temperature", 0.0..=2.0)?.unwrap_or(1.0),
            top_p: parameters.number("top_p", 0.0..=1.0)?.unwrap_or(1.0),
            seed: parameters.integer("seed", i64::MIN..=i64::MAX)?.map(i64::cast_unsigned),
            sampling: sampling::take(parameters, vocab_size)?,
            n: choices(parameters)?,
            stops: stops(parameters.take("stop"))?,
            stream,
            include_usage,
        })
    }

    /// What the pool is asked. `wanted` is the most tokens to generate; the answer ends where the model's context does.
    pub(super) fn generate(
        &self,
        gateway: &Gateway,
        prompt: Vec<u32>,
        wanted: Option<u32>,
        name: &str,
    ) -> Result<GenerateRequest, ApiError> {
        let limit = gateway.model.limits.max_model_len;
        let room = limit.saturating_sub(u32::try_from(prompt.len()).unwrap_or(u32::MAX));
        if room == 0 && wanted != Some(0) || prompt.len() > limit as usize {
            return Err(ApiError::context_length(name, prompt.len(), limit));
        }
        Ok(GenerateRequest {
            prompt,
            max_tokens: wanted.unwrap_or(room).min(room),
            temperature: self.temperature as f32,
            // The smallest set there is: the likeliest token.
            top_p: (self.top_p as f32).max(f32::MIN_POSITIVE),
            seed: self.seed,
            stop_token_ids: gateway.model.eos_token_ids.clone(),
            logprobs: None,
            prompt_logprobs: None,
            head: self.model.digest().map(str::to_owned),
            alpha: self.alpha,
            sampling: self.sampling.clone(),
        })
    }
}

/// `n`. `best_of` may repeat it: to draw more than is shown takes a ranking that the client can do as well.
fn choices(parameters: &mut Parameters) -> Result<usize, ApiError> {
    let n = parameters.integer("n", 1..=MAX_CHOICES as i64)?.unwrap_or(1);
    match parameters.integer("best_of", 1..=MAX_CHOICES as i64)?.is_none_or(|best_of| best_of == n) {
        true => Ok(n as usize),
        false => Err(ApiError::parameter("best_of", format!("best_of must be n, which is {n}."))),
    }
}

fn stream_options(value: Option<Value>, stream: bool) -> Result<bool, ApiError> {
    let Some(value) = value else { return Ok(false) };
    let refusal = |message: &str| Err(ApiError::parameter("stream_options", message));
    let Value::Object(mut options) = value else { return refusal("stream_options must be an object.") };
    if !stream {
        return refusal("stream_options goes with stream: true.");
    }
    let include_usage = options.remove("include_usage").unwrap_or_default();
    // OpenAI pads chunks to hide their lengths; whoever declines that gets what they ask for.
    let padding = options.remove("include_obfuscation").unwrap_or_default();
    match (include_usage, padding, options.keys().next()) {
        (_, _, Some(name)) => refusal(&format!("Unrecognized request argument supplied: stream_options.{name}.")),
        (Value::Null | Value::Bool(false), Value::Null | Value::Bool(false), None) => Ok(false),
        (Value::Bool(true), Value::Null | Value::Bool(false), None) => Ok(true),
        (_, Value::Bool(true), None) => refusal("stream_options.include_obfuscation is not supported by this endpoint: leave it out."),
        _ => refusal("stream_options.include_usage must be true or false."),
    }
}

fn stops(value: Option<Value>) -> Result<Vec<String>, ApiError> {
    let refusal = || {
        ApiError::parameter(
            "stop",
            format!("stop must be a string or up to {MAX_STOPS} strings, none empty or over {MAX_STOP_BYTES} bytes."),
        )
    };
    let texts = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(texts)) => texts,
        Some(text) => vec![text],
    };
    let stop = |text| match text {
        Value::String(text) if (1..=MAX_STOP_BYTES).contains(&text.len()) => Ok(text),
        _ => Err(refusal()),
    };
    match texts.len() > MAX_STOPS {
        true => Err(refusal()),
        false => texts.into_iter().map(stop).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::models::tests::models;
    use super::*;

    fn common_of(model: &str, body: &str) -> Result<Common, Value> {
        let mut parameters = Parameters::parse(body.as_bytes()).unwrap();
        let model = models(&[("maths", "CausalLM"), ("spam", "Classification")]).find(model).unwrap().clone();
        Common::take(&mut parameters, model, 50).map_err(|error| error.body()["error"]["param"].clone())
    }

    fn common(body: &str) -> Result<Common, Value> {
        common_of("maths", body)
    }

    #[test]
    fn alpha_goes_with_a_head_and_text_with_no_classifier() {
        assert_eq!(common_of("maths", r#"{"alpha": 0.5}"#).unwrap().model.digest(), Some("maths"));
        assert_eq!(common_of("base", "{}").unwrap().model.digest(), None);
        assert_eq!(common_of("base", r#"{"alpha": 1}"#).unwrap_err(), "alpha");
        assert_eq!(common_of("spam", "{}").unwrap_err(), "model");
    }

    #[test]
    fn each_member_is_checked_and_named() {
        for (member, wrong) in [
            ("temperature", "2.5"),
            ("top_p", "\"1\""),
            ("seed", "1.5"),
            ("alpha", "17"),
            ("stream", "1"),
            ("n", "0"),
            ("n", "129"),
            ("n", "\"2\""),
            ("best_of", "2"),
            ("logit_bias", "{\"50\": 1}"),
            ("frequency_penalty", "3"),
            ("stop", &format!("[{}\"a\"]", "\"a\",".repeat(16))),
            ("stop", "\"\""),
            ("stop", "[1]"),
            ("stream_options", "{\"include_usage\": true}"),
            ("stream_options", "[]"),
        ] {
            assert_eq!(common(&format!(r#"{{"{member}": {wrong}}}"#)).unwrap_err(), member, "{wrong}");
        }
        let options = |options: &str| common(&format!(r#"{{"stream": true, "stream_options": {options}}}"#));
        assert!(options(r#"{"include_usage": true}"#).unwrap().include_usage);
        assert_eq!(options(r#"{"usage": true}"#).unwrap_err(), "stream_options");
        assert_eq!(common(r#"{"stop": "x", "seed": -1}"#).unwrap().stops, ["x"]);
        assert_eq!(common(r#"{"n": 3, "best_of": 3}"#).unwrap().n, 3);
        assert_eq!(common(r#"{"n": null, "best_of": 1}"#).unwrap().n, 1);
    }
}
