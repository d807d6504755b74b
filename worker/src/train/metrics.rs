//! `metrics.jsonl`: one object a step and one an evaluation. After a restart it reads as if there had been none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files;
use crate::train::error::TrainError;

/// One line.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Line {
    /// An evaluation. Named first: it is the one with an `eval_loss`.
    Evaluation(EvaluationLine),
    /// An optimizer step.
    Step(StepLine),
}

/// An optimizer step; figures that are not finite are null.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StepLine {
    /// Number, from 1.
    pub step: u64,
    /// Passes over the data, with fraction.
    pub epoch: f64,
    /// Mean over the step's targets, nats.
    pub loss: f64,
    /// Learning rate of AdamW.
    pub lr: f64,
    /// Mean divergence from the base on replayed samples, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub replay_kl: Option<f64>,
    /// Global norm before clipping.
    pub grad_norm: f64,
    /// Tokens of the step's samples per second.
    pub tokens_per_second: f64,
    /// Seconds of training until here, over all attempts.
    pub seconds: f64,
    /// Seconds of this step in which nothing was done but wait for hidden states.
    #[serde(default)]
    pub wait_seconds: f64,
}

/// An evaluation.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct EvaluationLine {
    /// After this step.
    pub step: u64,
    /// Passes over the data, with fraction.
    pub epoch: f64,
    /// Mean over all targets, nats.
    pub eval_loss: f64,
    /// The base's own on the same samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_eval_loss: Option<f64>,
    /// Of text that has nothing to do with what is learned, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general_loss: Option<f64>,
    /// The base's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_general_loss: Option<f64>,
    /// Share of samples a classifier gets right.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_accuracy: Option<f64>,
    /// Seconds the evaluation took.
    pub eval_seconds: f64,
}

/// The open file.
#[derive(Debug)]
pub struct Metrics {
    path: PathBuf,
    file: File,
}

impl Metrics {
    /// Opens `path` and drops what came after the checkpoint: steps beyond `step`, evaluations beyond `evaluated` (None: all of them), and a line cut by a crash.
    pub fn open(path: &Path, step: u64, evaluated: Option<u64>) -> Result<Self, TrainError> {
        let keep = |line: &Line| match line {
            Line::Step(line) => line.step <= step,
            Line::Evaluation(line) => evaluated.is_some_and(|evaluated| line.step <= evaluated),
        };
        let mut kept = String::new();
        for line in read(path)?.iter().filter(|line| keep(line)) {
            kept.push_str(&serialize(line));
        }
        files::write_atomic(path, kept.as_bytes()).map_err(TrainError::file("write", path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::file("open", path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Appends one line, whole or not at all.
    pub fn append(&mut self, line: &Line) -> Result<(), TrainError> {
        let failed = |cause| TrainError::file("write", &self.path)(cause);
        let length = self.file.metadata().map_err(failed)?.len();
        self.file.write_all(serialize(line).as_bytes()).map_err(|error| match self.file.set_len(length) {
            Ok(()) => failed(error),
            Err(worse) => failed(worse),
        })
    }

    /// Makes all lines durable; called before each checkpoint, so that a checkpoint never knows of steps the file does not.
    pub fn sync(&self) -> Result<(), TrainError> {
        self.file.sync_data().map_err(TrainError::file("write", &self.path))
    }
}

/// All whole lines of `path`; none when it does not exist.
pub fn read(path: &Path) -> Result<Vec<Line>, TrainError> {
    match fs::read(path) {
        Ok(text) => Ok(text.split(|byte| *byte == b'\n').filter_map(|line| serde_json::from_slice(line).ok()).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(TrainError::file("read", path)(error)),
    }
}

fn serialize(line: &Line) -> String {
    serde_json::to_string(line).expect("figures are plain data") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64) -> Line {
        Line::Step(StepLine { step, loss: 1.5, ..StepLine::default() })
    }

    fn evaluation(step: u64) -> Line {
        Line::Evaluation(EvaluationLine { step, eval_loss: 1.25, ..EvaluationLine::default() })
    }

    #[test]
    fn a_restart_leaves_no_step_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("metrics.jsonl");
        let mut metrics = Metrics::open(&path, 0, None).unwrap();
        for line in [evaluation(0), step(1), step(2), evaluation(2), step(3), evaluation(3)] {
            metrics.append(&line).unwrap();
        }
        fs::write(&path, [&fs::read(&path).unwrap()[..], b"\xFF\0\n{\"step\":4,\"lo"].concat()).unwrap();
        let mut metrics = Metrics::open(&path, 3, Some(2)).unwrap();
        assert_eq!(read(&path).unwrap(), [evaluation(0), step(1), step(2), evaluation(2), step(3)]);
        metrics.append(&evaluation(3)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 6);
    }
}
