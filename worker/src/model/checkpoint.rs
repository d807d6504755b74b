//! A checkpoint of either layout, its tensors under Hugging Face's names.

use std::collections::BTreeSet;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::config::{self, Keys, ModelConfig, Scaling};
use super::digest::DigestBeside;
use super::error::ModelError;
use super::gguf::Gguf;
use super::safetensors::Folder;
use super::tensor::Tensor;
use super::weights::TensorName;

/// Ends of the names of tensors that only repeat what the configuration says of the rotation. transformers and vLLM pass them over too.
const ROTATION: [&str; 3] = ["rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached"];
const EMBEDDING: &str = "model.embed_tokens.weight";
const LM_HEAD: &str = "lm_head.weight";
/// Divisors of Llama 3's frequencies in a GGUF file; those of Phi-3 for short texts, and for longer ones than are answered.
const FREQUENCIES: &str = "rope_freqs.weight";
const SHORT: &str = "rope_factors_short.weight";
const LONG: &str = "rope_factors_long.weight";

/// A checkpoint, and what of it is wanted.
#[derive(Clone, Copy, Debug)]
pub struct Files<'a> {
    /// A GGUF file, the first of several that are one, or a folder.
    pub path: &'a Path,
    /// Whether the text part of a model of text and images is.
    pub text_only: bool,
}

impl<'a, P: AsRef<Path> + ?Sized> From<&'a P> for Files<'a> {
    fn from(path: &'a P) -> Self {
        Self { path: path.as_ref(), text_only: false }
    }
}

/// Where weights come from.
pub struct Checkpoint {
    layout: Layout,
    text_only: bool,
    /// Tensors that were asked for, under the names of the files.
    used: Mutex<BTreeSet<String>>,
}

enum Layout {
    /// A GGUF file, or several that are one.
    Gguf(Gguf),
    /// A folder with `config.json` and `*.safetensors`.
    Folder(PathBuf, Folder),
}

impl Checkpoint {
    /// Opens a GGUF file or a folder.
    pub fn open(Files { path, text_only }: Files<'_>) -> Result<Self, ModelError> {
        let layout = match path.is_dir() {
            true => Layout::Folder(path.to_owned(), Folder::open(path, text_only)?),
            false => Layout::Gguf(Gguf::open(path)?),
        };
        Ok(Self { layout, text_only, used: Mutex::default() })
    }

    /// Architecture and sizes.
    pub fn config(&self) -> Result<ModelConfig, ModelError> {
        match &self.layout {
            Layout::Gguf(gguf) => {
                let keys = Keys::gguf(gguf)?;
                let mut config = ModelConfig::read(&keys)?;
                if gguf.rows(FREQUENCIES).is_some() {
                    self.divide_frequencies(&mut config, FREQUENCIES, 1.0)?;
                }
                if gguf.rows(SHORT).is_some() {
                    let key = |name: &str| format!("{}.rope.scaling.{name}", config.model_type);
                    let (magnitude, original) = (gguf.float(&key("attn_factor"))?, gguf.integer(&key("original_context_length"))?);
                    self.divide_frequencies(&mut config, SHORT, magnitude.unwrap_or(1.0))?;
                    // Beyond the original context every frequency would be another one, and with it what was computed before.
                    config.max_position_embeddings =
                        original.map_or(usize::MAX, |original| original as usize).min(config.max_position_embeddings);
                    self.use_up(LONG);
                    config = config.checked(&keys)?;
                }
                Ok(config)
            }
            Layout::Folder(path, _) => config::of_folder(Files { path, text_only: self.text_only }),
        }
    }

    /// GGUF files keep a divisor for each frequency as a tensor.
    fn divide_frequencies(&self, config: &mut ModelConfig, name: &str, magnitude: f64) -> Result<(), ModelError> {
        for rotation in config.layers.iter_mut().filter_map(|layer| layer.attention.rotation.as_mut()) {
            let divisors = self.tensor(&[String::new(), name.to_owned()], 1, rotation.dims / 2)?.vector()?;
            if let Some(divisor) = divisors.iter().find(|divisor| !(divisor.is_finite() && **divisor > 0.0)) {
                return Err(ModelError::invalid(self.path(), name, format!("{divisor} is not a positive number")));
            }
            rotation.scaling = Scaling::Pairs(divisors.into_iter().map(f64::from).collect(), magnitude);
        }
        Ok(())
    }

    fn use_up(&self, name: &str) {
        self.used.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned());
    }

    fn path(&self) -> &Path {
        match &self.layout {
            Layout::Gguf(gguf) => gguf.path(),
            Layout::Folder(path, _) => path,
        }
    }

    /// Whether the tensors lie in a GGUF file.
    pub fn is_gguf(&self) -> bool {
        matches!(self.layout, Layout::Gguf(_))
    }

    /// Reads a tensor and checks its shape; a vector is one row.
    pub fn tensor(&self, [safetensors, gguf]: &TensorName, rows: usize, cols: usize) -> Result<Tensor, ModelError> {
        let (tensor, name) = match &self.layout {
            Layout::Gguf(file) => (file.tensor(gguf)?, gguf),
            Layout::Folder(_, folder) => (folder.tensor(safetensors)?, safetensors),
        };
        if (tensor.rows, tensor.cols) != (rows, cols) {
            let problem = format!("shape {} x {} is not {rows} x {cols}", tensor.rows, tensor.cols);
            return Err(ModelError::invalid(self.path(), name, problem));
        }
        self.use_up(name);
        Ok(tensor)
    }

    /// Whether there is such a tensor.
    pub fn has(&self, [safetensors, gguf]: &TensorName) -> bool {
        match &self.layout {
            Layout::Gguf(file) => file.rows(gguf).is_some(),
            Layout::Folder(_, folder) => folder.tensor_names().any(|name| name == safetensors),
        }
    }

    /// Refuses tensors that nobody has asked for, by name: with them it is another model than the one that was loaded.
    ///
    /// # Errors
    /// When there is one, unless it says nothing new.
    pub fn refuse_unused(&self, config: &ModelConfig) -> Result<(), ModelError> {
        let used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let unused = |name: &&str| !used.contains(*name);
        match &self.layout {
            Layout::Gguf(gguf) => {
                let left = gguf.tensor_names().filter(unused).filter(|name| !further(name, config)).collect();
                refuse(left, |name| gguf.file_of(name))
            }
            Layout::Folder(_, folder) => {
                let rotation = |name: &str| ROTATION.iter().any(|end| name.ends_with(end));
                let mut left: Vec<&str> =
                    folder.tensor_names().filter(unused).filter(|name| !rotation(name) && !further(name, config)).collect();
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

    /// Starts on `sha256:…` of the GGUF files, or of `config.json` and all files with its weights, one after the other.
    ///
    /// # Errors
    /// When there is no `config.json`.
    pub fn digest_beside(&self) -> Result<DigestBeside, ModelError> {
        Ok(DigestBeside::start(match &self.layout {
            Layout::Gguf(gguf) => gguf.files().collect(),
            Layout::Folder(path, folder) => {
                let config = path.join("config.json");
                let file = File::open(&config).map_err(ModelError::read(&config))?;
                [(config, Arc::new(file))].into_iter().chain(folder.files.iter().cloned()).collect()
            }
        }))
    }
}

/// Whether a tensor is one of the layers behind the last.
fn further(name: &str, config: &ModelConfig) -> bool {
    let layer = name
        .strip_prefix("model.layers.")
        .or_else(|| name.strip_prefix("blk."))
        .and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    let last = config.layers.len();
    layer.is_some_and(|layer| (last..last.saturating_add(config.further_layers)).contains(&layer))
}

fn refuse<'a>(left: Vec<&str>, file_of: impl Fn(&str) -> &'a Path) -> Result<(), ModelError> {
    let Some(name) = left.first() else { return Ok(()) };
    let others = if left.len() > 1 { format!(", nor {} others", left.len() - 1) } else { String::new() };
    Err(ModelError::invalid(file_of(name), *name, format!("a decoder of this configuration does not use this tensor{others}")))
}
