//! Observed state of a `BaseModelPool`.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Observed state of a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct BaseModelPoolStatus {
    /// Ready, Reconciling, Stalled; Available.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Generation this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Pods that exist.
    pub replicas: i32,
    /// Pods whose weights are loaded.
    pub ready_replicas: i32,
    /// Pods that are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_replicas: Option<i32>,
    /// Since when no pod has become ready while fewer than wanted are: when that is too long, the pool is Stalled.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub waiting_since: Option<Time>,
    /// Label selector of the pods, for the scale subresource.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// What the loaded model says of itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub model: Option<ModelStatus>,
    /// How far the model is fetched, and what its revision was resolved to; of a model that is fetched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub download: Option<DownloadStatus>,
    /// Worker image the pool was started with; another default image does not change it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_image: Option<String>,
    /// Address of the pool for trainers and gateways.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
}

/// What a loaded model says of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ModelStatus {
    /// Name from the checkpoint.
    pub name: String,
    /// Digest of the weights.
    pub digest: String,
    /// Digest of the tokenizer.
    pub tokenizer_digest: String,
    /// Identity that heads are bound to: weights, tokenizer, template and norm point in one digest.
    pub identity_digest: String,
    /// Width D of the hidden states.
    pub hidden_size: u32,
    /// Decoder layers.
    pub layers: u32,
    /// Size of the vocabulary.
    pub vocab_size: u32,
    /// Commit that the revision of a hub's repository was resolved to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
}

/// How far a model is fetched, by the pod that is furthest behind.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct DownloadStatus {
    /// Commit that the revision of a hub's repository was resolved to, once: every pod of the pool fetches this one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub revision: Option<String>,
    /// How far it is, for people: `35 %, 21.4 GB of 61.1 GB, 7 min left`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub progress: Option<String>,
    /// Bytes that are there.
    pub bytes: u64,
    /// Bytes of the whole model; 0 until known.
    pub total_bytes: u64,
    /// Estimated seconds to the end.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub eta_seconds: Option<u64>,
}
