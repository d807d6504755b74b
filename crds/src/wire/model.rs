//! What a pool says of its model.

use serde::{Deserialize, Serialize};

use crate::pool::Dtype;

/// Answer of `GET /v1/model`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelDescription {
    /// Version of this description; readers accept their own and the one before.
    pub format_version: u32,
    /// Model name from the checkpoint, e.g. `SmolLM2 135M Instruct`.
    pub name: String,
    /// `model_type` of the checkpoint, e.g. `llama`.
    pub model_type: String,
    /// Changes when the pod restarts.
    pub instance: String,
    /// What heads depend on: a difference is refused.
    pub identity: Identity,
    /// How numbers are computed: a difference invalidates caches.
    pub numerics: Numerics,
    /// Width D of the hidden states.
    pub hidden_size: u32,
    /// Decoder layers: taps run from 0 to this number.
    pub num_hidden_layers: u32,
    /// Size V of the vocabulary.
    pub vocab_size: u32,
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// Text of the beginning-of-sequence token, for the template.
    pub bos_token: Option<String>,
    /// Text of the end-of-sequence token, for the template.
    pub eos_token: Option<String>,
    /// Jinja chat template.
    pub chat_template: Option<String>,
    /// The one for conversations with tools, where the checkpoint has another for them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tool_use_template: Option<String>,
    /// Bounds of one request.
    pub limits: Limits,
}

/// The half of the fingerprint that a head is bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Digest of the weights.
    pub weights: String,
    /// Digest of tokenizer.json as the pool hands it out.
    pub tokenizer: String,
    /// Digest of the chat template (and, behind a line feed, of the one for tools), empty when there is none.
    pub chat_template: String,
    /// Where `final` is read: always `final_norm` today.
    pub norm_point: String,
}

impl Identity {
    /// One digest over the four members, in the order of their declaration.
    pub fn digest(&self) -> String {
        let text = [&self.weights, &self.tokenizer, &self.chat_template, &self.norm_point].map(String::as_str).join("\n");
        super::digest(text.as_bytes())
    }

    /// Name of the first member that differs.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        [
            ("weights", self.weights != other.weights),
            ("tokenizer", self.tokenizer != other.tokenizer),
            ("chat_template", self.chat_template != other.chat_template),
            ("norm_point", self.norm_point != other.norm_point),
        ]
        .into_iter()
        .find_map(|(name, differs)| differs.then_some(name))
    }
}

/// The half of the fingerprint that caches are bound to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numerics {
    /// Number type of states and LM head.
    pub dtype: Dtype,
    /// `cpu`.
    pub device: String,
    /// What rounds in its products, e.g. `fma_f32`: pods that say the same, whatever their instructions, compute the same bits.
    pub kernel: String,
}

impl Numerics {
    /// One line that names all three, used as a cache key.
    pub fn key(&self) -> String {
        let dtype = match self.dtype {
            Dtype::Bfloat16 => "bfloat16",
            Dtype::Float32 => "float32",
        };
        format!("{dtype}/{}/{}", self.device, self.kernel)
    }
}

/// Bounds of one request; a pool refuses more, by name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Tokens of one sequence.
    pub max_model_len: u32,
    /// Sequences of one request.
    pub max_sequences: u32,
    /// Tokens of one request over all sequences.
    pub max_request_tokens: u32,
    /// Bytes of one request body.
    pub max_body_bytes: u64,
    /// Sequences that are served at once; pools of the first version do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_num_seqs: Option<u32>,
    /// Bytes of a head that can be served; earlier pools do not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_head_bytes: Option<u64>,
}
