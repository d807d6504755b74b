//! A checkpoint of either layout, its tensors under Hugging Face's names.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::config::ModelConfig;
use super::digest::DigestBeside;
use super::error::ModelError;
use super::gguf::Gguf;
use super::safetensors::Folder;
use super::tensor::Tensor;

/// Ends of the names of tensors that only repeat what the configuration says of the rotation. transformers and vLLM pass them over too.
const ROTATION: [&str; 3] = ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"];
const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";

/// Where weights come from.
pub struct Checkpoint {
    files: Files,
    /// Tensors that were asked for, under the names of the files.
    used: Mutex<BTreeSet<String>>,
}

enum Files {
    /// One GGUF file.
    Gguf(Gguf),
    /// A folder with `config.json` and `*.safetensors`.
    Folder(PathBuf, Folder),
}

impl Checkpoint {
    /// Opens the GGUF file or the folder at `path`.
    pub fn open(path: &Path) -> Result<Self, ModelError> {
        let files = match path.is_dir() {
            true => Files::Folder(path.to_owned(), Folder::open(path)?),
            false => Files::Gguf(Gguf::open(path)?),
        };
        Ok(Self { files, used: Mutex::default() })
    }

    /// Architecture and sizes.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        match &self.files {
            Files::Gguf(gguf) => ModelConfig::from_gguf(gguf),
            Files::Folder(path, _) => ModelConfig::from_json_file(&path.join("config.json")),
        }
    }

    /// Reads the tensor with Hugging Face's `name` and checks its shape; a vector is one row.
    pub fn tensor(&self, name: &str, rows: usize, cols: usize, config: &ModelConfig) -> Result<Tensor, ModelError> {
        let (tensor, path, own_name) = match &self.files {
            Files::Gguf(gguf) => (gguf_tensor(gguf, name, config)?, gguf.path(), gguf_name(name)),
            Files::Folder(path, folder) => (folder.tensor(name)?, path.as_path(), name.to_owned()),
        };
        if (tensor.rows, tensor.cols) != (rows, cols) {
            let problem = format!("shape {} x {} is not {rows} x {cols}", tensor.rows, tensor.cols);
            return Err(ModelError::invalid(path, name, problem));
        }
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(own_name);
        Ok(tensor)
    }

    /// Refuses tensors that nobody has asked for, by name: with them it is another model than the one that was loaded.
    ///
    /// # Errors
    /// When there is one, unless it says nothing new.
    pub fn refuse_unused(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let unused = |name: &&str| !used.contains(*name);
        match &self.files {
            Files::Gguf(gguf) => refuse(gguf.tensor_names().filter(unused).collect(), |_| gguf.path()),
            Files::Folder(_, folder) => {
                let rotation = |name: &str| ROTATION.iter().any(|end| name.ends_with(end));
                let mut left: Vec<&str> = folder.tensor_names().filter(unused).filter(|name| !rotation(name)).collect();
                if config.tie_word_embeddings && left.contains(&LM_HEAD) {
                    if !folder.same(EMBEDDING, LM_HEAD)? {
                        let problem = format!("it is not {EMBEDDING}, though tie_word_embeddings says so");
                        return Err(ModelError::invalid(folder.file_of(LM_HEAD), LM_HEAD, problem));
                    }
                    left.retain(|name| *name != LM_HEAD);
                }
                refuse(left, |name| folder.file_of(name))
            }
        }
    }

    /// Starts on `sha256:…` of the GGUF file, or of `config.json` and all files with its weights, one after the other.
    ///
    /// # Errors
    /// When there is no `config.json`.
    pub fn digest_beside(&self) -> Result<DigestBeside, ModelError> {
        Ok(DigestBeside::start(match &self.files {
            Files::Gguf(gguf) => vec![(gguf.path().to_owned(), gguf.file().clone())],
            Files::Folder(path, folder) => {
                let config = path.join("config.json");
                let file = File::open(&config).map_err(ModelError::read(&config))?;
                [(config, Arc::new(file))].into_iter().chain(folder.files.iter().cloned()).collect()
            }
        }))
    }
}

fn refuse<'a>(left: Vec<&str>, file_of: impl Fn(&str) -> &'a Path) -> Result<(), ModelError> {
    let Some(name) = left.first() else { return Ok(()) };
    let others = if left.len() > 1 { format!(", nor {} others", left.len() - 1) } else { String::new() };
    Err(ModelError::invalid(file_of(name), *name, format!("a decoder of this configuration does not use this tensor{others}")))
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
