//! A checkpoint of either layout, its tensors under Hugging Face's names.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::config::ModelConfig;
use super::digest::DigestBeside;
use super::error::ModelError;
use super::gguf::Gguf;
use super::safetensors::Folder;
use super::tensor::Tensor;

/// Where weights come from.
pub enum Checkpoint {
    /// One GGUF file.
    Gguf(Gguf),
    /// A folder with `config.json` and `*.safetensors`.
    Folder(PathBuf, Folder),
}

impl Checkpoint {
    /// Opens the GGUF file or the folder at `path`.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        if path.is_dir() {
            return Ok(Self::Folder(path.to_owned(), Folder::open(path)?));
        }
        Gguf::open(path).map(Self::Gguf)
    }

    /// Architecture and sizes.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        match self {
            Self::Gguf(gguf) => ModelConfig::from_gguf(gguf),
            Self::Folder(path, _) => ModelConfig::from_json_file(&path.join("config.json")),
        }
    }

    /// Reads the tensor with Hugging Face's `name` and checks its shape; a vector is one row.
    pub fn tensor(&self, name: &str, rows: usize, cols: usize, config: &ModelConfig) -> Result<Tensor, ModelError> {
        let (tensor, path) = match self {
            Self::Gguf(gguf) => (gguf_tensor(gguf, name, config)?, gguf.path()),
            Self::Folder(path, folder) => (folder.tensor(name)?, path.as_path()),
        };
        if (tensor.rows, tensor.cols) != (rows, cols) {
            let problem = format!("shape {} x {} is not {rows} x {cols}", tensor.rows, tensor.cols);
            return Err(ModelError::invalid(path, name, problem));
        }
        Ok(tensor)
    }

    /// Starts on `sha256:…` of the GGUF file, or of `config.json` and all files with its weights, one after the other.
    ///
    /// # Errors
    /// When there is no `config.json`.
    pub fn digest_beside(&self) -> Result<DigestBeside, ModelError> {
        Ok(DigestBeside::start(match self {
            Self::Gguf(gguf) => vec![(gguf.path().to_owned(), gguf.file().clone())],
            Self::Folder(path, folder) => {
                let config = path.join("config.json");
                let file = File::open(&config).map_err(ModelError::read(&config))?;
                [(config, Arc::new(file))].into_iter().chain(folder.files.iter().cloned()).collect()
            }
        }))
    }
}

/// Reads a tensor of the Llama architecture, whose queries and keys GGUF keeps interleaved.
fn gguf_tensor(gguf: &Gguf, name: &str, config: &ModelConfig) -> Result<Tensor, ModelError> {
    let tensor = gguf.tensor(&gguf_name(name))?;
    let heads = match name {
        _ if name.ends_with("q_proj.weight") => config.num_attention_heads,
        _ if name.ends_with("k_proj.weight") => config.num_key_value_heads,
        _ => return Ok(tensor),
    };
    if tensor.rows != heads * config.head_dim {
        let problem = format!("{} rows are not {heads} heads of {}", tensor.rows, config.head_dim);
        return Err(ModelError::invalid(gguf.path(), name, problem));
    }
    Ok(tensor.with_interleaved_heads(heads))
}

/// GGUF's name of a tensor: `model.layers.3.mlp.up_proj.weight` is `blk.3.ffn_up.weight`.
fn gguf_name(name: &str) -> String {
    let parts = [
        ("model.layers.", "blk."),
        ("model.embed_tokens", "token_embd"),
        ("model.norm", "output_norm"),
        ("lm_head", "output"),
        ("post_attention_layernorm", "ffn_norm"),
        ("input_layernorm", "attn_norm"),
        ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"),
        ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"),
        ("mlp.gate_proj", "ffn_gate"),
        ("mlp.up_proj", "ffn_up"),
        ("mlp.down_proj", "ffn_down"),
    ];
    parts.iter().fold(name.to_owned(), |name, (theirs, ours)| name.replace(theirs, ours))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_gguf() {
        assert_eq!(gguf_name("model.layers.3.mlp.up_proj.weight"), "blk.3.ffn_up.weight");
        assert_eq!(gguf_name("model.layers.0.post_attention_layernorm.weight"), "blk.0.ffn_norm.weight");
        assert_eq!(gguf_name("model.embed_tokens.weight"), "token_embd.weight");
        assert_eq!(gguf_name("lm_head.weight"), "output.weight");
    }
}
