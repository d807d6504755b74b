//! Observed state of a `CarryOnJob`.

use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::wire::limits;

/// Observed state of a job.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CarryOnJobStatus {
    /// Ready, Reconciling, Stalled; Complete, Failed, Suspended, Promotable.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Generation this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Number of the current or last attempt, from 1; 0 before the first.
    pub attempt: u32,
    /// Attempts that failed and counted.
    pub failures: u32,
    /// When the first attempt was started.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_time: Option<Time>,
    /// When the job became Complete or Failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// Seconds that trainers ran, up to `activeUntil`, for `activeDeadlineSeconds`. Waiting for a pod to run does not count.
    pub active_seconds: i64,
    /// When the last pod ended that `activeSeconds` counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_until: Option<Time>,
    /// Since when the pool has been missing or not ready, with `poolUnavailablePolicy: Fail`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool_unavailable_since: Option<Time>,
    /// The last attempts, oldest first.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 10), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["number"]))]
    pub attempts: Vec<AttemptStatus>,
    /// Worker image the job was started with; another default image does not change it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_image: Option<String>,
    /// What the trainer last said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<ProgressStatus>,
    /// The trained head.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub artifact: Option<ArtifactStatus>,
}

/// One attempt: one batch Job `<name>-<number>`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct AttemptStatus {
    /// Its number, from 1.
    pub number: u32,
    /// UID of its batch Job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 64))]
    pub uid: Option<String>,
    /// When it was started.
    pub start_time: Time,
    /// When it ended; absent while it runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub completion_time: Option<Time>,
    /// The trainer's exit code, when it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exit_code: Option<i32>,
    /// How it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub result: Option<AttemptResult>,
    /// The trainer's last words.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 1024))]
    pub message: Option<String>,
}

/// How an attempt ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum AttemptResult {
    /// The head is written.
    Complete,
    /// It left a checkpoint and wants to go on; not counted.
    Resumable,
    /// It was stopped because the job was suspended or its batch Job was deleted; not counted.
    Stopped,
    /// It failed in a way that may pass; counted.
    Failed,
    /// It failed for good: data or configuration are wrong.
    Refused,
}

/// Progress; measured figures are strings, absent when not finite.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ProgressStatus {
    /// Optimizer steps done.
    pub step: u64,
    /// Optimizer steps in all.
    pub total_steps: u64,
    /// Mean loss per target of the last step, nats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub train_loss: Option<String>,
    /// Last evaluation's loss, nats per target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eval_loss: Option<String>,
    /// The base's own loss on the same samples.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_eval_loss: Option<String>,
    /// Last loss of `data.split.general`, nats per token.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general_loss: Option<String>,
    /// The base's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_general_loss: Option<String>,
    /// Training tokens per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tokens_per_second: Option<String>,
    /// Estimated seconds to the end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
}

/// A trained head.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ArtifactStatus {
    /// `pvc://CLAIM/PATH` of the artifact's folder.
    pub uri: String,
    /// Digest of head.safetensors.
    pub digest: String,
    /// Identity of the base it was trained on.
    pub base_model_digest: String,
    /// Those of the further bases that it reads, in their order.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::MAX_POOLS))]
    pub other_base_model_digests: Vec<String>,
    /// Its figures on held-out samples, by the names that they have in head.json.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = limits::MAX_FIGURES))]
    pub evaluation: BTreeMap<String, String>,
    /// What of `evaluation.thresholds` they do not meet: a head with any such is served by no `jobRef`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::MAX_FIGURES))]
    pub unmet_thresholds: Vec<String>,
}
