//! What a trainer says while it runs and when it ends.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Answer of a trainer's `GET /progress`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What the trainer is doing: `waiting` (for another one to leave the output folder), `connecting`, `encoding`, `caching`, `training`, `evaluating`, `writing`, `done`.
    pub phase: String,
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all; 0 until known.
    pub total_steps: u64,
    /// Loss of the last step, nats per target.
    pub train_loss: Option<f64>,
    /// Last evaluation, nats per target.
    pub eval_loss: Option<f64>,
    /// The base's own loss on the same samples.
    pub base_eval_loss: Option<f64>,
    /// Last loss of text that has nothing to do with what is learned, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general_loss: Option<f64>,
    /// The base's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_general_loss: Option<f64>,
    /// Training tokens per second.
    pub tokens_per_second: Option<f64>,
    /// Estimated seconds to the end.
    pub eta_seconds: Option<u64>,
}

/// Last words of a trainer, in its termination log (at most 4096 bytes).
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TerminationMessage {
    /// Why it ended, one sentence.
    pub message: String,
    /// Digest of the head, when one was written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    /// Identity digest of the base the head was trained on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_model_digest: Option<String>,
    /// Those of the further bases that it reads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_base_model_digests: Vec<String>,
    /// The head's figures on held-out samples, by the names that they have in its manifest.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub evaluation: BTreeMap<String, f64>,
    /// What of the job's `evaluation.thresholds` it does not meet, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unmet_thresholds: Vec<String>,
    /// Final progress.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<Progress>,
}

/// Exit codes of the worker: part of the API.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitCode {
    /// The work is done.
    Complete = 0,
    /// Anything that may pass: tried again, counted.
    Retryable = 1,
    /// The data are wrong: permanent.
    Data = 65,
    /// Checkpointed, resume me: not counted.
    Resume = 75,
    /// The configuration is wrong: permanent.
    Configuration = 78,
}
