//! Checkpoints: one file each (`file`), whole or not there at all, refused when a bit of it changed.

mod file;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use carryon_crds::wire::{Identity, Numerics};
use serde::{Deserialize, Serialize};

use crate::head::Weights;
use crate::train::batches::Cursor;
use crate::train::error::TrainError;
use crate::train::optim::OptimizerState;

/// Version of the format this code writes and reads.
const FORMAT_VERSION: u32 = 1;

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
    /// How the further bases did, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_numerics: Vec<Numerics>,
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
    /// The last evaluation's loss of text that has nothing to do with what is learned, nats per token, and the base's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general: Option<General>,
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
    /// Of text that has nothing to do with what is learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general: Option<General>,
    /// What `evaluation.metric` names, the higher the better, where that is another than the loss and could be told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figure: Option<f64>,
}

/// Losses of text that has nothing to do with what is learned, nats per token.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct General {
    /// With the head.
    pub head: f64,
    /// The base's own.
    pub base: f64,
}

impl General {
    /// What the head costs.
    pub fn increase(&self) -> f64 {
        self.head - self.base
    }
}

impl Best {
    /// Whether it is better than `other`: one whose general text costs no more than `bound` is better than one whose does; then by the figure, and of
    /// equal ones, or where there is none, by the loss.
    pub fn is_better(&self, other: &Self, bound: Option<f64>) -> bool {
        let of = |best: &Self| best.figure.unwrap_or(f64::NEG_INFINITY);
        match (self.keeps_general(bound), other.keeps_general(bound)) {
            (true, true) | (false, false) => of(self) > of(other) || of(self) == of(other) && self.loss < other.loss,
            (keeps, _) => keeps,
        }
    }

    /// Whether general text costs no more than `bound`, nats per token.
    pub fn keeps_general(&self, bound: Option<f64>) -> bool {
        self.general.zip(bound).is_none_or(|(general, bound)| general.increase() <= bound)
    }
}

/// A state of training to go on from.
#[derive(Clone, Debug, PartialEq)]
pub struct Checkpoint {
    /// All but the tensors.
    pub state: State,
    /// The head's tensors.
    pub weights: Arc<Weights>,
    /// Their average, where there is one.
    pub average: Option<Arc<Weights>>,
    /// Those of the best evaluation, unless they are the present ones' ancestors no more asked for.
    pub best: Option<Arc<Weights>>,
    /// What the optimizers remember.
    pub optimizer: OptimizerState,
}

impl Checkpoint {
    /// Where training starts.
    pub fn start(state: State, weights: Weights) -> Self {
        Self { state, weights: weights.into(), average: None, best: None, optimizer: OptimizerState::default() }
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
        file::write(&path, checkpoint).map_err(TrainError::file("write", &path))?;
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
            match file::read(&path) {
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
        let states: Vec<State> = files.filter_map(|path| file::state(&path)).collect();
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

impl State {
    /// The state before the first step.
    pub fn new(run: String, identity: Identity, numerics: Numerics, began: i64) -> Self {
        Self {
            format_version: FORMAT_VERSION,
            run,
            identity,
            numerics,
            other_numerics: Vec::new(),
            began: Some(began),
            step: 0,
            total_steps: 0,
            cursor: Cursor::default(),
            evaluated: None,
            without_improvement: 0,
            best: None,
            base_eval_loss: None,
            eval_loss: None,
            general: None,
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
