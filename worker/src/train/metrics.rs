//! `metrics.jsonl`: one object a step and one an evaluation; and the same as TensorBoard's event file. After a restart they read as if there had been none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::files;
use crate::train::error::TrainError;
use crate::train::tensorboard;

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

/// The open files.
#[derive(Debug)]
pub struct Metrics {
    lines: Growing,
    events: Growing,
    /// When the run began, seconds of Unix time.
    began: f64,
    /// Seconds of training up to the last step.
    seconds: f64,
}

/// Where they lie.
#[derive(Clone, Debug)]
pub struct MetricsPaths {
    /// `metrics.jsonl`.
    pub lines: PathBuf,
    /// TensorBoard's event file.
    pub events: PathBuf,
}

impl MetricsPaths {
    /// Removes what there is.
    ///
    /// # Errors
    /// A file cannot be removed.
    pub fn remove(&self) -> Result<(), TrainError> {
        for path in [&self.lines, &self.events] {
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(TrainError::file("remove", path)(error)),
                _ => {}
            }
        }
        Ok(())
    }
}

impl Metrics {
    /// Opens `paths` of a run that began at `began`, milliseconds of Unix time, and drops what came after the checkpoint: steps beyond `step`, evaluations
    /// beyond `evaluated` (None: all of them), and a line cut by a crash. Of the event file nothing is read: it says what the lines say.
    pub fn open(paths: &MetricsPaths, began: i64, step: u64, evaluated: Option<u64>) -> Result<Self, TrainError> {
        let keep = |line: &Line| match line {
            Line::Step(line) => line.step <= step,
            Line::Evaluation(line) => evaluated.is_some_and(|evaluated| line.step <= evaluated),
        };
        let (began, mut seconds) = (began as f64 / 1e3, 0.0);
        let (mut kept, mut events) = (String::new(), tensorboard::head(began));
        for line in read(&paths.lines)?.iter().filter(|line| keep(line)) {
            kept.push_str(&serialize(line));
            seconds = until(line).unwrap_or(seconds);
            events.extend(tensorboard::event(line, began + seconds));
        }
        let (lines, events) = (Growing::begin(&paths.lines, kept.as_bytes())?, Growing::begin(&paths.events, &events)?);
        Ok(Self { lines, events, began, seconds })
    }

    /// Appends one line, whole or not at all. Where it is tried again, the event may be there twice: TensorBoard takes that for the same point.
    pub fn append(&mut self, line: &Line) -> Result<(), TrainError> {
        self.seconds = until(line).unwrap_or(self.seconds);
        self.events.append(&tensorboard::event(line, self.began + self.seconds))?;
        self.lines.append(serialize(line).as_bytes())
    }

    /// Makes all lines durable; called before each checkpoint, so that a checkpoint never knows of steps the file does not.
    pub fn sync(&self) -> Result<(), TrainError> {
        self.lines.file.sync_data().map_err(TrainError::file("write", &self.lines.path))
    }
}

/// Seconds of training that a step tells of.
fn until(line: &Line) -> Option<f64> {
    if let Line::Step(line) = line { Some(line.seconds) } else { None }
}

/// A file that is appended to.
#[derive(Debug)]
struct Growing {
    path: PathBuf,
    file: File,
}

impl Growing {
    /// One that holds `bytes`, whatever was there.
    fn begin(path: &Path, bytes: &[u8]) -> Result<Self, TrainError> {
        path.parent().map_or(Ok(()), fs::create_dir_all).map_err(TrainError::file("create the folder of", path))?;
        files::write_atomic(path, bytes).map_err(TrainError::file("write", path))?;
        let file = OpenOptions::new().append(true).open(path).map_err(TrainError::file("open", path))?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), TrainError> {
        let failed = |cause| TrainError::file("write", &self.path)(cause);
        let length = self.file.metadata().map_err(failed)?.len();
        self.file.write_all(bytes).map_err(|error| match self.file.set_len(length) {
            Ok(()) => failed(error),
            Err(worse) => failed(worse),
        })
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

/// A figure where it is one: JSON has no others.
pub(super) fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
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
        let paths = MetricsPaths { lines: folder.path().join("metrics.jsonl"), events: folder.path().join("tensorboard/events") };
        let path = paths.lines.clone();
        let mut metrics = Metrics::open(&paths, 1_000, 0, None).unwrap();
        for line in [evaluation(0), step(1), step(2), evaluation(2), step(3), evaluation(3)] {
            metrics.append(&line).unwrap();
        }
        fs::write(&path, [&fs::read(&path).unwrap()[..], b"\xFF\0\n{\"step\":4,\"lo"].concat()).unwrap();
        let events = fs::read(&paths.events).unwrap();
        let mut metrics = Metrics::open(&paths, 1_000, 3, Some(2)).unwrap();
        assert_eq!(read(&path).unwrap(), [evaluation(0), step(1), step(2), evaluation(2), step(3)]);
        metrics.append(&evaluation(3)).unwrap();
        assert_eq!(read(&path).unwrap().len(), 6);
        assert!(fs::read(&paths.events).unwrap() == events, "as if there had been no restart");
    }
}
