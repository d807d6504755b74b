//! Checkpoints: one safetensors file each, whole or not there at all, refused when a bit of it changed.
//!
//! Metadata: [`STATE_KEY`] holds [`State`] as JSON, [`DIGEST_KEY`] a digest over it and all tensors. Tensors: `weights.*` (now), `best.*`
//! (at the best evaluation, when there was one) and `optimizer.*`.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carryon_crds::wire::limits::{CHECKPOINT_HEADER_BYTES, MAX_CHECKPOINT_BYTES};
use carryon_crds::wire::{Identity, Numerics};
use half::bf16;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::head::{Weight, Weights};
use crate::train::batches::Cursor;
use crate::train::error::TrainError;
use crate::train::optim::{Moment, OptimizerState, map_of};
use crate::{files, tensor_file};

/// Version of the format this code writes and reads.
const FORMAT_VERSION: u32 = 1;
/// Metadata key of the state.
const STATE_KEY: &str = "carryon.checkpoint";
/// Metadata key of the digest.
const DIGEST_KEY: &str = "carryon.digest";

/// All that is not a tensor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// Version of the format.
    pub format_version: u32,
    /// Digest of configuration and data: another run does not go on from here.
    pub run: String,
    /// The base.
    pub identity: Identity,
    /// How it computed.
    pub numerics: Numerics,
    /// When the run began, milliseconds of Unix time: what a chat template that asks for the date is told on any day.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub began: Option<i64>,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all.
    #[serde(default)]
    pub total_steps: u64,
    /// Where the data stand.
    pub cursor: Cursor,
    /// Step of the last evaluation.
    pub evaluated: Option<u64>,
    /// Evaluations since the best one.
    pub without_improvement: u32,
    /// The best evaluation; its weights are `best.*`.
    pub best: Option<Best>,
    /// The base's own evaluation loss, nats per target.
    pub base_eval_loss: Option<f64>,
    /// The last evaluation's loss, nats per target.
    #[serde(default)]
    pub eval_loss: Option<f64>,
    /// Loss of the last step, nats per target.
    pub train_loss: Option<f64>,
    /// Norm of the last step's gradients, before they were scaled down.
    #[serde(default)]
    pub grad_norm: Option<f64>,
    /// Seconds of training, over all attempts.
    pub train_seconds: f64,
    /// Highest anonymous memory, over all attempts, bytes.
    pub peak_anonymous_bytes: u64,
    /// Steps the optimizers made.
    pub optimizer_steps: u64,
}

/// An evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Best {
    /// After this step.
    pub step: u64,
    /// Nats per target.
    pub loss: f64,
    /// Share a classifier gets right.
    pub accuracy: Option<f64>,
}

/// A state of training to go on from.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// All but the tensors.
    pub state: State,
    /// The head's tensors.
    pub weights: Arc<Weights>,
    /// Those of the best evaluation, unless they are the present ones' ancestors no more asked for.
    pub best: Option<Arc<Weights>>,
    /// What the optimizers remember.
    pub optimizer: OptimizerState,
}

impl Checkpoint {
    /// Where training starts.
    pub fn start(state: State, weights: Weights) -> Self {
        Self { state, weights: weights.into(), best: None, optimizer: OptimizerState::default() }
    }
}

/// What [`Folder::latest`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The newest whole checkpoint of this run.
    pub checkpoint: Option<Checkpoint>,
    /// What was passed over, and why.
    pub warnings: Vec<String>,
}

/// The folder of a run's checkpoints.
#[derive(Clone, Debug)]
pub struct Folder {
    path: PathBuf,
    keep: usize,
}

impl Folder {
    /// `path` need not exist yet; the newest `keep` checkpoints are kept.
    pub fn new(path: PathBuf, keep: u32) -> Self {
        Self { path, keep: keep.max(1) as usize }
    }

    /// Writes a checkpoint and removes the oldest beyond the limit.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn save(&self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let path = self.path.join(format!("step-{:010}.safetensors", checkpoint.state.step));
        write(&path, checkpoint).map_err(TrainError::file("write", &path))?;
        let files = self.files()?;
        // Later ones are damaged, or they would have been gone on from: they take no place.
        for old in files.iter().rev().filter(|file| **file <= path).skip(self.keep) {
            fs::remove_file(old).map_err(TrainError::file("remove", old))?;
        }
        Ok(())
    }

    /// The newest whole checkpoint of `run` on `base`. A damaged one is passed over by name; those of another run are removed, those of another
    /// base are set aside, and those of this one that were are taken back.
    ///
    /// # Errors
    /// The folder cannot be read or changed.
    pub fn latest(&self, run: &str, base: &Identity) -> Result<Found, TrainError> {
        self.take_back(base)?;
        let mut found = Found::default();
        for path in self.files()?.into_iter().rev() {
            match read(&path) {
                Ok(other) if other.state.identity != *base => {
                    let aside = self.set_aside(&path, &other.state.identity)?;
                    let member = other.state.identity.difference(base).unwrap_or_default();
                    found.warnings.push(format!(
                        "checkpoint {path:?} is of another base (identity member `{member}` differs): set aside as {aside:?}"
                    ));
                }
                Ok(checkpoint) if checkpoint.state.run == run => {
                    found.checkpoint = Some(checkpoint);
                    break;
                }
                Ok(_) => {
                    found.warnings.push(format!("checkpoint {path:?} belongs to another configuration or other data: removed"));
                    fs::remove_file(&path).map_err(TrainError::file("remove", &path))?;
                }
                Err(reason) => found.warnings.push(format!("checkpoint {path:?} is damaged ({reason}): falling back to the one before")),
            }
        }
        Ok(found)
    }

    /// When `run` on `base` began, as its newest checkpoint says. Changes nothing.
    pub fn began(&self, run: &str, base: &Identity) -> Option<i64> {
        let aside = Self { path: self.aside(base), keep: self.keep };
        let files = [&aside, self].into_iter().filter_map(|folder| folder.files().ok()).flatten();
        let states: Vec<State> = files.filter_map(|path| state(&path)).collect();
        states.into_iter().rev().find(|state| state.run == run && state.identity == *base)?.began
    }

    /// Where checkpoints of `base` are while another one is the pool's.
    fn aside(&self, base: &Identity) -> PathBuf {
        self.path.join(format!("base-{:.12}", base.digest().trim_start_matches("sha256:")))
    }

    /// Moves back what was set aside while the pool had another base than `base`.
    fn take_back(&self, base: &Identity) -> Result<(), TrainError> {
        let folder = self.aside(base);
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            fs::rename(entry.path(), self.path.join(entry.file_name())).map_err(TrainError::file("take back", entry.path()))?;
        }
        // It is not empty where somebody has put something else into it.
        let _ = fs::remove_dir(folder);
        Ok(())
    }

    /// Moves a checkpoint of `base`, which is not the pool's, to a folder that is named by it.
    fn set_aside(&self, path: &Path, base: &Identity) -> Result<PathBuf, TrainError> {
        let folder = self.aside(base);
        fs::create_dir_all(&folder).map_err(TrainError::file("create", &folder))?;
        let aside = folder.join(path.file_name().unwrap_or_default());
        fs::rename(path, &aside).map_err(TrainError::file("set aside", path))?;
        Ok(aside)
    }

    /// Checkpoint files, oldest first.
    fn files(&self) -> Result<Vec<PathBuf>, TrainError> {
        let entries = match fs::read_dir(&self.path) {
            Ok(entries) => entries,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(TrainError::file("read", &self.path)(error)),
        };
        let is_checkpoint = |path: &PathBuf| {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            name.starts_with("step-") && name.ends_with(".safetensors")
        };
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(is_checkpoint).collect();
        files.sort_unstable();
        Ok(files)
    }
}

/// A tensor of the file: number type, shape, bytes as they lie there; the worker runs on little-endian machines only.
type Stored<'a> = (Dtype, Vec<usize>, &'a [u8]);

/// Behind the name of codes, that of their blocks' scales.
const SCALES: &str = ".scales";

fn write(path: &Path, checkpoint: &Checkpoint) -> std::io::Result<()> {
    let mut tensors: BTreeMap<String, Stored<'_>> = BTreeMap::new();
    for (group, weights) in [("weights", Some(&checkpoint.weights)), ("best", checkpoint.best.as_ref())] {
        for (name, Weight { shape, values }) in weights.into_iter().flat_map(|weights| weights.iter()) {
            tensors.insert(format!("{group}.{name}"), (Dtype::F32, shape.clone(), bytemuck::cast_slice(values)));
        }
    }
    for (name, (shape, moment)) in &checkpoint.optimizer.tensors {
        let (name, shape) = (format!("optimizer.{name}"), shape.clone());
        let stored = match &**moment {
            Moment::Float32(values) => (Dtype::F32, shape, bytemuck::cast_slice(values)),
            Moment::Bfloat16(values) => (Dtype::BF16, shape, bytemuck::cast_slice(values)),
            Moment::Int8 { codes, scales, .. } => {
                tensors.insert(format!("{name}{SCALES}"), (Dtype::F32, vec![scales.len()], bytemuck::cast_slice(scales)));
                (Dtype::U8, shape, &codes[..])
            }
        };
        tensors.insert(name, stored);
    }
    let state = serde_json::to_string(&checkpoint.state).expect("a state is plain data");
    let digest = digest(&state, tensors.iter().map(|(name, (_, shape, bytes))| (name.as_str(), shape.as_slice(), *bytes)));
    let infos = tensors.iter().map(|(name, (dtype, shape, _))| (name.as_str(), *dtype, shape.as_slice()));
    let header = tensor_file::header(&[(STATE_KEY, &state), (DIGEST_KEY, &digest)], infos);
    files::write_atomic_with(path, |file| {
        file.write_all(&header)?;
        tensors.values().try_for_each(|(_, _, bytes)| file.write_all(bytes))
    })
}

/// The state of a checkpoint, whose tensors are not looked at.
fn state(path: &Path) -> Option<State> {
    let mut file = fs::File::open(path).ok()?;
    let mut length = [0; 8];
    file.read_exact(&mut length).ok()?;
    let mut header = Vec::new();
    file.take(u64::from_le_bytes(length).min(CHECKPOINT_HEADER_BYTES)).read_to_end(&mut header).ok()?;
    let header: serde_json::Value = serde_json::from_slice(&header).ok()?;
    serde_json::from_str(header["__metadata__"][STATE_KEY].as_str()?).ok()
}

fn read(path: &Path) -> Result<Checkpoint, String> {
    let length = fs::metadata(path).map_err(|error| error.to_string())?.len();
    if length > MAX_CHECKPOINT_BYTES {
        return Err(format!("{length} bytes, more than {MAX_CHECKPOINT_BYTES}"));
    }
    let content = fs::read(path).map_err(|error| error.to_string())?;
    let (_, header) = SafeTensors::read_metadata(&content).map_err(|error| error.to_string())?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let state = metadata.get(STATE_KEY).ok_or("no state in its metadata")?;
    let file = SafeTensors::deserialize(&content).map_err(|error| error.to_string())?;
    let mut tensors: Vec<_> = file.iter().collect();
    tensors.sort_unstable_by_key(|(name, _)| *name);
    let found = digest(state, tensors.iter().map(|(name, tensor)| (*name, tensor.shape(), tensor.data())));
    if metadata.get(DIGEST_KEY) != Some(&found) {
        return Err("its digest does not fit its content".to_owned());
    }
    let state: State = serde_json::from_str(state).map_err(|error| error.to_string())?;
    if state.format_version != FORMAT_VERSION {
        return Err(format!("format version {}, this worker reads {FORMAT_VERSION}", state.format_version));
    }
    let mut groups: BTreeMap<&str, Weights> = BTreeMap::new();
    let mut optimizer = OptimizerState { steps: state.optimizer_steps, tensors: BTreeMap::new() };
    for (name, tensor) in tensors {
        let (group, name) = name.split_once('.').ok_or_else(|| format!("tensor {name:?} is of no group"))?;
        let shape = tensor.shape().to_vec();
        if group == "optimizer" {
            let scales = || file.tensor(&format!("{group}.{name}{SCALES}")).map_err(|error| error.to_string());
            let moment = match tensor.dtype() {
                Dtype::F32 if name.ends_with(SCALES) => continue,
                Dtype::U8 => Moment::Int8 { map: map_of(name), codes: tensor.data().to_vec(), scales: floats(&scales()?)? },
                Dtype::BF16 => Moment::Bfloat16(tensor.data().as_chunks::<2>().0.iter().map(|bytes| bf16::from_le_bytes(*bytes)).collect()),
                _ => Moment::Float32(floats(&tensor).map_err(|problem| format!("tensor {name:?} {problem}"))?),
            };
            optimizer.tensors.insert(name.to_owned(), (shape, moment.into()));
        } else {
            let values = floats(&tensor).map_err(|problem| format!("tensor {name:?} {problem}"))?;
            groups.entry(group).or_default().insert(name.to_owned(), Weight { shape, values });
        }
    }
    let (weights, best) = (groups.remove("weights").unwrap_or_default(), groups.remove("best"));
    Ok(Checkpoint { state, weights: weights.into(), best: best.map(Arc::new), optimizer })
}

fn floats(tensor: &TensorView<'_>) -> Result<Vec<f32>, String> {
    match tensor.dtype() {
        Dtype::F32 => Ok(tensor.data().as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
        other => Err(format!("has type {other:?}, expected F32")),
    }
}

/// Over the state and every tensor's name, shape and bytes, in the order of names.
fn digest<'a>(state: &str, tensors: impl Iterator<Item = (&'a str, &'a [usize], &'a [u8])>) -> String {
    let mut hasher = Sha256::new_with_prefix(state);
    for (name, shape, bytes) in tensors {
        hasher.update(format!("\n{name} {shape:?}\n"));
        hasher.update(bytes);
    }
    carryon_crds::wire::digest_of(hasher)
}

impl State {
    /// The state before the first step.
    pub fn new(run: String, identity: Identity, numerics: Numerics, began: i64) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            run,
            identity,
            numerics,
            began: Some(began),
            step: 0,
            total_steps: 0,
            cursor: Cursor::default(),
            evaluated: None,
            without_improvement: 0,
            best: None,
            base_eval_loss: None,
            eval_loss: None,
            train_loss: None,
            grad_norm: None,
            train_seconds: 0.0,
            peak_anonymous_bytes: 0,
            optimizer_steps: 0,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
