//! What chat and plain completions have in common: the model, how to sample, when to stop, how to answer.

use serde_json::Value;

use super::error::ApiError;
use super::gateway::Gateway;
use super::parameters::Parameters;
use super::sampling;
use crate::exchange::wire::{GenerateRequest, Sampling};

/// Most stop strings of a request: more than OpenAI's four, for evaluations send more.
const MAX_STOPS: usize = 16;
/// Longest stop string in bytes.
const MAX_STOP_BYTES: usize = 1024;
/// Most answers of a request: as many as OpenAI's `n` allows for one prompt.
pub(super) const MAX_CHOICES: usize = 128;
/// Largest scale of a head's output.
const MAX_ALPHA: f64 = 16.0;

/// The names under which a gateway serves.
#[derive(Clone, Debug)]
pub(super) struct Names {
    /// The head.
    pub(super) head: String,
    /// The base alone.
    pub(super) base: String,
}

impl Names {
    /// `name` and `name-base`.
    pub(super) fn new(name: &str) -> Self {
        Self { head: name.to_owned(), base: format!("{name}-base") }
    }
}

/// What every completion request says beside its prompt.
#[derive(Debug)]
pub(super) struct Common {
    /// Model name as the client wrote it.
    pub(super) model: String,
    /// Digest of the head; the base alone when absent.
    pub(super) head: Option<String>,
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
    /// Takes the common members out of a request; the model must be the head or its base.
    pub(super) fn take(parameters: &mut Parameters, names: &Names, digest: &str, vocab_size: u32) -> Result<Self, ApiError> {
        let model = parameters.text("model")?.ok_or_else(|| ApiError::parameter("model", "model is required."))?;
        let head = match &model {
            name if *name == names.head => Some(digest.to_owned()),
            name if *name == names.base => None,
            name => return Err(ApiError::model(name, &[&names.head, &names.base])),
        };
        let alpha = parameters.number("alpha", 0.0..=MAX_ALPHA)?;
        if head.is_none() && alpha.is_some() {
            return Err(ApiError::parameter("alpha", format!("alpha scales the head: it goes with model {:?}.", names.head)));
        }
        let stream = parameters.flag("stream")?;
        let include_usage = stream_options(parameters.take("stream_options"), stream)?;
        Ok(Self {
            model,
            head,
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
            head: self.head.clone(),
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
    use super::*;

    fn common(body: &str) -> Result<Common, (Value, Value)> {
        let mut parameters = Parameters::parse(body.as_bytes()).unwrap();
        let named = |error: ApiError| (error.body()["error"]["param"].clone(), error.body()["error"]["code"].clone());
        Common::take(&mut parameters, &Names::new("maths"), "sha256:d", 50).map_err(named)
    }

    #[test]
    fn the_model_is_the_head_or_its_base() {
        assert_eq!(common(r#"{"model": "maths", "alpha": 0.5}"#).unwrap().head.unwrap(), "sha256:d");
        assert_eq!(common(r#"{"model": "maths-base"}"#).unwrap().head, None);
        assert_eq!(common(r#"{"model": "gpt-4"}"#).unwrap_err(), ("model".into(), "model_not_found".into()));
        assert_eq!(common(r#"{"model": "maths-base", "alpha": 1}"#).unwrap_err().0, "alpha");
        assert_eq!(common("{}").unwrap_err().0, "model");
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
            assert_eq!(common(&format!(r#"{{"model": "maths", "{member}": {wrong}}}"#)).unwrap_err().0, member, "{wrong}");
        }
        let options = |options: &str| common(&format!(r#"{{"model": "maths", "stream": true, "stream_options": {options}}}"#));
        assert!(options(r#"{"include_usage": true}"#).unwrap().include_usage);
        assert_eq!(options(r#"{"usage": true}"#).unwrap_err().0, "stream_options");
        assert_eq!(common(r#"{"model": "maths", "stop": "x", "seed": -1}"#).unwrap().stops, ["x"]);
        assert_eq!(common(r#"{"model": "maths", "n": 3, "best_of": 3}"#).unwrap().n, 3);
        assert_eq!(common(r#"{"model": "maths", "n": null, "best_of": 1}"#).unwrap().n, 1);
    }
}
