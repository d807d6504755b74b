//! What clients and pools say to each other: routes, headers, JSON bodies, error codes.
//!
//! | route | request | answer |
//! |---|---|---|
//! | `GET /v1/model` | | [`carryon_crds::wire::ModelDescription`] |
//! | `GET /v1/tokenizer` | | bytes of tokenizer.json |
//! | `GET /v1/lm-head` | | safetensors: `weight` [V, D] in the pool's dtype |
//! | `POST /v1/hidden-states` | [`HiddenStatesRequest`] | a stream of safetensors files, one per sequence in any order |
//! | `POST /v1/loss` | [`super::loss::LossRequest`] as safetensors | [`super::loss::LossResponse`] as safetensors |
//! | `PUT`, `GET`, `DELETE /v1/heads/{digest}` | bytes of head.safetensors (PUT) | [`HeadStatus`] |
//! | `POST /v1/generate` | [`GenerateRequest`] | newline-delimited [`GenerateEvent`]s |
//! | `POST /v1/classify` | [`ClassifyRequest`] | [`ClassifyResponse`] |
//!
//! What heads that read several bases need beside them is in [`super::mixing`].
//!
//! Readers ignore unknown members and unknown error codes, so that a version understands the next one. What would change an answer if it were
//! ignored is refused instead ([`Sampling`]), and a pool that reads it says so ([`SAMPLING_HEADER`]).

use std::fmt;

use carryon_crds::common::Taps;
use carryon_crds::job::HiddenStatesDtype;
use carryon_crds::pool::Dtype;
use serde::{Deserialize, Serialize};

pub use super::sampling::{MAX_LOGIT_BIAS, Sampling};
use crate::numbers::RowFormat;

/// Request: digest of the identity the client expects; the pool refuses another. Response: the pool's own.
pub const IDENTITY_HEADER: &str = "x-carryon-identity";
/// Response: how the pool computes, [`carryon_crds::wire::Numerics::key`].
pub const NUMERICS_HEADER: &str = "x-carryon-numerics";
/// Response: changes when the pod restarts.
pub const INSTANCE_HEADER: &str = "x-carryon-instance";
/// Request of `PUT /v1/heads/{digest}`: seconds until the head may be dropped, counted from its last use.
pub const EXPIRY_HEADER: &str = "x-carryon-expiry-seconds";
/// Response of `POST /v1/generate`: the pool has read `sampling`. A pool of the first version does not say it.
pub const SAMPLING_HEADER: &str = "x-carryon-sampling";
/// Request of `POST /v1/generate`: the namespace of the client. Requests of one namespace share what the pool has computed of their prompts.
pub const NAMESPACE_HEADER: &str = "x-carryon-namespace";
/// The job, `NAMESPACE/NAME`, that a trainer asks for: jobs take turns, however many requests each has open.
pub const JOB_HEADER: &str = "x-carryon-job";
/// Media type of safetensors bodies.
pub const SAFETENSORS: &str = "application/vnd.safetensors";
/// Media type of newline-delimited JSON.
pub const NDJSON: &str = "application/x-ndjson";
/// Stands for a log probability of minus infinity, which JSON cannot say.
pub const LOWEST_LOGPROB: f32 = -9999.0;
/// Most alternatives that may be asked for at a position.
pub const MAX_LOGPROBS: u32 = 20;

/// Body of an answer with a 4xx or 5xx status, and of an error event in a stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The refusal.
    pub error: WireError,
}

/// A refusal: a code for programs, a sentence for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{code}: {message}")]
pub struct WireError {
    /// What went wrong.
    pub code: ErrorCode,
    /// Which member, and why.
    pub message: String,
}

impl WireError {
    /// A refusal with `code` and `message`.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

/// Codes of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the request is malformed or contradicts itself.
    InvalidRequest,
    /// 404: no such route or object.
    NotFound,
    /// 404: the pool does not hold the head: push it and ask again.
    HeadMissing,
    /// 408: the body did not come in time: ask again.
    Late,
    /// 409: the base is another than the one expected.
    IdentityMismatch,
    /// 413: more tokens, sequences or bytes than the pool accepts.
    TooLarge,
    /// 422: the bytes of a head are not what their digest or format promises.
    HeadInvalid,
    /// 429: the queue is full: ask again later.
    Busy,
    /// 503: the weights are still being loaded, or the pool shuts down: ask again later.
    Unavailable,
    /// 500: the head computed something that is not a number; in a stream, the last event.
    HeadNotFinite,
    /// 500: anything else.
    Internal,
    /// A code of a later version.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// HTTP status of the answer.
    pub fn status(self) -> u16 {
        match self {
            Self::InvalidRequest => 400,
            Self::NotFound | Self::HeadMissing => 404,
            Self::Late => 408,
            Self::IdentityMismatch => 409,
            Self::TooLarge => 413,
            Self::HeadInvalid => 422,
            Self::Busy => 429,
            Self::Unavailable => 503,
            Self::HeadNotFinite | Self::Internal | Self::Unknown => 500,
        }
    }

    /// Whether asking again later may succeed.
    pub fn is_transient(self) -> bool {
        matches!(self, Self::Late | Self::Busy | Self::Unavailable)
    }
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::InvalidRequest => "invalid_request",
            Self::NotFound => "not_found",
            Self::HeadMissing => "head_missing",
            Self::Late => "late",
            Self::IdentityMismatch => "identity_mismatch",
            Self::TooLarge => "too_large",
            Self::HeadInvalid => "head_invalid",
            Self::Busy => "busy",
            Self::Unavailable => "unavailable",
            Self::HeadNotFinite => "head_not_finite",
            Self::Internal => "internal",
            Self::Unknown => "unknown",
        })
    }
}

/// Asks for hidden states of whole sequences.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HiddenStatesRequest {
    /// Token ids; every sequence starts at position 0.
    pub sequences: Vec<Vec<u32>>,
    /// Where to read.
    pub taps: Taps,
    /// How the rows of layers travel. A pool of the first versions does not read it: what came says how it came.
    #[serde(default, skip_serializing_if = "carryon_crds::common::is_default")]
    pub dtype: HiddenStatesDtype,
}

impl HiddenStatesRequest {
    /// Rows of the model's own numbers.
    pub fn new(sequences: Vec<Vec<u32>>, taps: Taps) -> Self {
        Self { sequences, taps, dtype: HiddenStatesDtype::Model }
    }
}

/// How the rows of each tap are written, in the order of [`tap_names`]. `final` is what the loss is measured on: as the LM head sees it, always.
pub fn row_formats(taps: &Taps, model: Dtype, dtype: HiddenStatesDtype) -> Vec<RowFormat> {
    let layers = match dtype {
        HiddenStatesDtype::Model => RowFormat::Plain(model),
        HiddenStatesDtype::Float8E4M3 => RowFormat::Float8,
    };
    let layers = std::iter::repeat_n(layers, taps.layers.len());
    layers.chain(taps.final_norm.then_some(RowFormat::Plain(model))).collect()
}

/// Name of the tensor of what the LM head sees.
pub const FINAL: &str = "final";

/// Names of the tensors of a frame, in the order of [`super::SequenceStates::taps`]: layers as asked, `final` last.
pub fn tap_names(taps: &Taps) -> Vec<String> {
    let layers = taps.layers.iter().map(|layer| format!("layer.{layer}"));
    layers.chain(taps.final_norm.then(|| FINAL.to_owned())).collect()
}

/// Asks for a continuation of `prompt`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct GenerateRequest {
    /// Token ids, at least one.
    pub prompt: Vec<u32>,
    /// Most tokens to generate; 0 with `prompt_logprobs` scores the prompt alone.
    pub max_tokens: u32,
    /// 0 is greedy.
    #[serde(default)]
    pub temperature: f32,
    /// Smallest set of tokens whose probabilities reach this sum; 1 is all.
    #[serde(default = "one")]
    pub top_p: f32,
    /// Seed of the sampling; one is drawn when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Tokens that end the answer; they are not part of it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stop_token_ids: Vec<u32>,
    /// Log probabilities of generated tokens, with this many alternatives, at most [`MAX_LOGPROBS`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprobs: Option<u32>,
    /// The same for the prompt's tokens, sent first.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prompt_logprobs: Option<u32>,
    /// Digest of the head; the base alone when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub head: Option<String>,
    /// Scale of the head's output; the head's own when absent. 0 bypasses the head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub alpha: Option<f64>,
    /// What happens to the logits before a token is drawn.
    #[serde(default, skip_serializing_if = "Sampling::is_nothing")]
    pub sampling: Sampling,
}

impl GenerateRequest {
    /// Greedy continuation of `prompt` by the base.
    pub fn greedy(prompt: Vec<u32>, max_tokens: u32) -> Self {
        Self {
            prompt,
            max_tokens,
            temperature: 0.0,
            top_p: 1.0,
            seed: None,
            stop_token_ids: Vec::new(),
            logprobs: None,
            prompt_logprobs: None,
            head: None,
            alpha: None,
            sampling: Sampling::default(),
        }
    }
}

fn one() -> f32 {
    1.0
}

/// A line of the answer of `POST /v1/generate`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum GenerateEvent {
    /// First, when asked for: one entry per prompt token; the first token has none.
    Prompt {
        /// Log probability of each prompt token given those before it.
        prompt_logprobs: Vec<Option<TokenLogprob>>,
    },
    /// A generated token.
    Token(TokenLogprob),
    /// Alone: what a head that pools a text puts out for the prompt.
    Scores {
        /// One logit per label, or what its task has in their place.
        scores: Vec<f32>,
    },
    /// Last: the answer is complete.
    Finish {
        /// Why it ended.
        finish_reason: FinishReason,
        /// What it took.
        usage: Usage,
    },
    /// Last: the answer cannot be completed.
    Error {
        /// Why.
        error: WireError,
    },
}

/// A token and, when asked for, how likely it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenLogprob {
    /// Token id.
    pub token: u32,
    /// Natural logarithm of its probability at temperature 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub logprob: Option<f32>,
    /// The likeliest tokens of the position with their log probabilities, best first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub top: Vec<(u32, f32)>,
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// A stop token came.
    Stop,
    /// `max_tokens` or the longest sequence of the model was reached.
    Length,
}

/// Tokens of a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
    /// Tokens generated; a stop token is not counted.
    pub completion_tokens: u32,
}

/// Asks a classification head for its logits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassifyRequest {
    /// Token ids.
    pub sequences: Vec<Vec<u32>>,
    /// Digest of the head.
    pub head: String,
}

/// Logits of a classification head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ClassifyResponse {
    /// Per sequence, one logit per label.
    pub scores: Vec<Vec<f32>>,
}

/// What the pool knows of a head.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeadStatus {
    /// Its digest.
    pub digest: String,
    /// Size of its file.
    pub bytes: u64,
    /// Seconds until it may be dropped if nobody uses it.
    pub expires_in_seconds: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_keep_their_shape() {
        let cases = [
            (r#"{"token":5}"#, GenerateEvent::Token(TokenLogprob { token: 5, logprob: None, top: vec![] })),
            (r#"{"token":5,"logprob":-0.5,"top":[[5,-0.5],[7,-1.5]]}"#, {
                GenerateEvent::Token(TokenLogprob { token: 5, logprob: Some(-0.5), top: vec![(5, -0.5), (7, -1.5)] })
            }),
            (r#"{"prompt_logprobs":[null,{"token":3,"logprob":-2.0}]}"#, {
                GenerateEvent::Prompt { prompt_logprobs: vec![None, Some(TokenLogprob { token: 3, logprob: Some(-2.0), top: vec![] })] }
            }),
            (r#"{"finish_reason":"stop","usage":{"prompt_tokens":2,"completion_tokens":1}}"#, {
                GenerateEvent::Finish { finish_reason: FinishReason::Stop, usage: Usage { prompt_tokens: 2, completion_tokens: 1 } }
            }),
            (r#"{"error":{"code":"head_not_finite","message":"x"}}"#, {
                GenerateEvent::Error { error: WireError::new(ErrorCode::HeadNotFinite, "x") }
            }),
        ];
        for (text, event) in cases {
            assert_eq!(serde_json::to_string(&event).unwrap(), text);
            assert_eq!(serde_json::from_str::<GenerateEvent>(text).unwrap(), event);
        }
    }

    #[test]
    fn code_of_a_later_version_is_understood() {
        let error: WireError = serde_json::from_str(r#"{"code":"quota_of_2031","message":"m","hint":"h"}"#).unwrap();
        assert_eq!(error.code, ErrorCode::Unknown);
    }

    #[test]
    fn displayed_code_is_the_one_on_the_wire() {
        for code in [ErrorCode::InvalidRequest, ErrorCode::HeadMissing, ErrorCode::Busy, ErrorCode::HeadNotFinite] {
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{code}\""));
        }
    }
}
