//! What a checkpoint says of its architecture, under Hugging Face's names.

use std::path::Path;

use serde::Deserialize;

use super::error::ModelError;
use super::gguf::Gguf;
use super::quantization;

/// Largest value of any size in a configuration: far beyond what exists, small enough that products of two do not overflow.
const MAX_SIZE: usize = 1 << 24;

/// Sizes and constants of a decoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelConfig {
    /// Name of the model.
    pub name: String,
    /// Family, e.g. `llama`.
    pub model_type: String,
    /// Width D of the hidden states.
    pub hidden_size: usize,
    /// Width of the feed-forward layer.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: usize,
    /// Key and value heads.
    pub num_key_value_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Size V of the vocabulary.
    pub vocab_size: usize,
    /// Positions the model was trained for.
    pub max_position_embeddings: usize,
    /// ε of every RMSNorm.
    pub rms_norm_eps: f32,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// Positions each position sees at most, itself included.
    pub sliding_window: Option<usize>,
    /// Whether the LM head is the embedding.
    pub tie_word_embeddings: bool,
}

/// The members of `config.json` that are read; those that must have one value are checked for it.
#[derive(Deserialize)]
struct ConfigJson {
    model_type: String,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f64>,
    rope_scaling: Option<serde_json::Value>,
    /// Where transformers 5 keeps `rope_theta` and the scaling.
    rope_parameters: Option<serde_json::Value>,
    sliding_window: Option<usize>,
    hidden_act: Option<String>,
    #[serde(default)]
    attention_bias: bool,
    #[serde(default)]
    mlp_bias: bool,
    #[serde(default)]
    tie_word_embeddings: bool,
    quantization_config: Option<serde_json::Value>,
}

impl ModelConfig {
    /// Reads `config.json` at `path`.
    ///
    /// # Errors
    /// When it cannot be read, a member is missing or impossible, or asks for what the decoder does not do.
    pub fn from_json_file(path: &Path) -> Result<Self, ModelError> {
        let text = std::fs::read(path).map_err(ModelError::read(path))?;
        let json: ConfigJson = serde_json::from_slice(&text).map_err(|error| ModelError::invalid(path, "config", error.to_string()))?;
        json.refuse_unsupported(path)?;
        let folder =
            path.parent().and_then(Path::file_name).map_or_else(|| json.model_type.clone(), |name| name.to_string_lossy().into_owned());
        let theta = json.rope_parameters.as_ref().and_then(|rope| rope.get("rope_theta")).and_then(serde_json::Value::as_f64);
        let config = Self {
            name: folder,
            hidden_size: json.hidden_size,
            intermediate_size: json.intermediate_size,
            num_hidden_layers: json.num_hidden_layers,
            num_attention_heads: json.num_attention_heads,
            num_key_value_heads: json.num_key_value_heads.unwrap_or(json.num_attention_heads),
            head_dim: json.head_dim.or_else(|| json.hidden_size.checked_div(json.num_attention_heads)).unwrap_or(0),
            vocab_size: json.vocab_size,
            max_position_embeddings: json.max_position_embeddings,
            rms_norm_eps: json.rms_norm_eps,
            rope_theta: json.rope_theta.or(theta).unwrap_or(10_000.0),
            sliding_window: json.sliding_window.filter(|_| json.model_type == "mistral"),
            tie_word_embeddings: json.tie_word_embeddings,
            model_type: json.model_type,
        };
        config.checked(path)
    }

    /// Reads the metadata of a GGUF file.
    ///
    /// # Errors
    /// As for [`ModelConfig::from_json_file`].
    pub fn from_gguf(gguf: &Gguf) -> Result<Self, ModelError> {
        let path = gguf.path();
        let missing = |key: &str| ModelError::invalid(path, key, "key is missing");
        let architecture = gguf.text("general.architecture")?.ok_or_else(|| missing("general.architecture"))?;
        if architecture != "llama" {
            return Err(ModelError::unsupported(path, "general.architecture", format!("`{architecture}`")));
        }
        let optional = |key: &str| gguf.integer(&format!("llama.{key}")).map(|value| value.map(|value| value as usize));
        let required = |key: &str| optional(key)?.ok_or_else(|| missing(&format!("llama.{key}")));
        let scaling = gguf.text("llama.rope.scaling.type")?;
        if let Some(scaling) = scaling.filter(|scaling| *scaling != "none") {
            return Err(ModelError::unsupported(path, "llama.rope.scaling.type", format!("`{scaling}`")));
        }
        // llama.cpp scales by them too where no type is named; the second is the name of old files.
        for key in ["llama.rope.scaling.factor", "llama.rope.scale_linear"].into_iter().filter(|_| scaling.is_none()) {
            if let Some(factor) = gguf.float(key)?.filter(|factor| ![0.0, 1.0].contains(factor)) {
                return Err(ModelError::unsupported(path, key, factor.to_string()));
            }
        }
        if let Some(experts) = optional("expert_count")?.filter(|experts| *experts > 0) {
            return Err(ModelError::unsupported(path, "llama.expert_count", experts.to_string()));
        }
        if gguf.tensor_names().any(|name| name == "rope_freqs.weight") {
            return Err(ModelError::unsupported(path, "rope_freqs.weight", "scaling of rotary frequencies"));
        }
        let (hidden_size, heads) = (required("embedding_length")?, required("attention.head_count")?);
        let head_dim = optional("attention.key_length")?.or_else(|| hidden_size.checked_div(heads)).unwrap_or(0);
        if let Some(rotated) = optional("rope.dimension_count")?.filter(|rotated| *rotated != head_dim) {
            return Err(ModelError::unsupported(path, "llama.rope.dimension_count", format!("{rotated} of {head_dim}")));
        }
        let epsilon_key = "llama.attention.layer_norm_rms_epsilon";
        let config = Self {
            // For people alone: no reason to refuse a model.
            name: gguf.text("general.name").ok().flatten().unwrap_or("llama").to_owned(),
            model_type: architecture.to_owned(),
            hidden_size,
            intermediate_size: required("feed_forward_length")?,
            num_hidden_layers: required("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            vocab_size: required("vocab_size")?,
            max_position_embeddings: required("context_length")?,
            rms_norm_eps: gguf.float(epsilon_key)?.ok_or_else(|| missing(epsilon_key))? as f32,
            rope_theta: gguf.float("llama.rope.freq_base")?.unwrap_or(10_000.0),
            sliding_window: None,
            tie_word_embeddings: !gguf.tensor_names().any(|name| name == "output.weight"),
        };
        config.checked(path)
    }

    /// Refuses sizes that are zero, huge or do not divide.
    fn checked(self, path: &Path) -> Result<Self, ModelError> {
        let sizes = [
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
            ("num_hidden_layers", self.num_hidden_layers),
            ("num_attention_heads", self.num_attention_heads),
            ("num_key_value_heads", self.num_key_value_heads),
            ("head_dim", self.head_dim),
            ("vocab_size", self.vocab_size),
            ("max_position_embeddings", self.max_position_embeddings),
            ("sliding_window", self.sliding_window.unwrap_or(1)),
        ];
        for (name, size) in sizes {
            if size == 0 || size > MAX_SIZE {
                return Err(ModelError::invalid(path, name, format!("{size} is not between 1 and {MAX_SIZE}")));
            }
        }
        if !self.num_attention_heads.is_multiple_of(self.num_key_value_heads) {
            let problem = format!("{} query heads are no multiple of {}", self.num_attention_heads, self.num_key_value_heads);
            return Err(ModelError::invalid(path, "num_key_value_heads", problem));
        }
        if !self.head_dim.is_multiple_of(2) {
            return Err(ModelError::unsupported(path, "head_dim", self.head_dim.to_string()));
        }
        for (name, value) in [("rms_norm_eps", f64::from(self.rms_norm_eps)), ("rope_theta", self.rope_theta)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(ModelError::invalid(path, name, format!("{value} is not a positive number")));
            }
        }
        Ok(self)
    }
}

impl ConfigJson {
    fn refuse_unsupported(&self, path: &Path) -> Result<(), ModelError> {
        let kind =
            |rope: &serde_json::Value| rope.get("rope_type").or_else(|| rope.get("type")).cloned().unwrap_or(serde_json::Value::Null);
        let scaled = |rope: &Option<serde_json::Value>| {
            let kind = rope.as_ref().filter(|rope| !rope.is_null()).map(kind);
            kind.filter(|kind| !kind.is_null() && kind != "default").map(|kind| kind.to_string())
        };
        let act = self.hidden_act.as_deref().unwrap_or("silu");
        let quantized = self.quantization_config.as_ref().filter(|value| !value.is_null());
        let family = &self.model_type;
        [
            ("model_type", (!matches!(family.as_str(), "llama" | "mistral")).then(|| format!("`{family}`"))),
            ("rope_scaling", scaled(&self.rope_scaling)),
            ("rope_parameters", scaled(&self.rope_parameters)),
            ("hidden_act", (act != "silu").then(|| format!("`{act}`"))),
            ("attention_bias", self.attention_bias.then(|| "true".into())),
            ("mlp_bias", self.mlp_bias.then(|| "true".into())),
            ("quantization_config", quantized.and_then(quantization::unsupported)),
        ]
        .into_iter()
        .find_map(|(at, found)| found.map(|found| ModelError::unsupported(path, at, found)))
        .map_or(Ok(()), Err)
    }
}
