//! `BaseModelPool`: the pods that run one frozen base model.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::PodTemplate;
use crate::quantity::Bytes;
use crate::wire::limits;

mod device;
mod source;
mod status;

pub use device::{Device, NoDevice};
pub use source::{
    CaBundle, EmptyDirCache, HostPathCache, HuggingFaceSource, ImageMount, KeyReference, ModelCache, ModelImage, ModelReference,
    ModelSource, ObjectStoreSource,
};
pub use status::{BaseModelPoolStatus, DownloadStatus, ModelStatus};

/// Desired state of a pool.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "carryon.dev",
    version = "v1alpha1",
    kind = "BaseModelPool",
    plural = "basemodelpools",
    shortname = "bmp",
    category = "carryon",
    namespaced,
    status = "BaseModelPoolStatus",
    doc = "Pods that run one frozen base model and exchange hidden states, losses and tokens.",
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicas", label_selector_path = ".status.selector"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Available", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".status.desiredReplicas"),
    printcolumn(name = "Model", type_ = "string", json_path = ".status.model.name", priority = 1),
    printcolumn(name = "Fetched", type_ = "string", json_path = ".status.download.progress", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1),
    validation = ("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40", "name must be a DNS-1035 label of at most 40 characters")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.model == oldSelf.model", "model is immutable; create a new pool"))]
#[x_kube(validation = ("self.dtype == oldSelf.dtype", "dtype is immutable; create a new pool"))]
#[x_kube(validation = ("self.dtype == 'bfloat16' || !has(self.engine.weightDtype)", "engine.weightDtype is for pools of dtype bfloat16"))]
pub struct BaseModelPoolSpec {
    /// The frozen model.
    pub model: ModelReference,
    /// Number type of the packed weights and of the states on the wire.
    #[serde(default)]
    pub dtype: Dtype,
    /// Pods, each with a whole copy of the model. When absent, they are left to whoever scales the workload; the first is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: Option<i32>,
    /// The inference engine: its device and its limits.
    #[serde(default)]
    pub engine: Engine,
    /// The pool's pods.
    #[serde(default)]
    pub server: PodTemplate,
    /// Who may use the pool.
    #[serde(default)]
    pub sharing: Sharing,
}

/// Who may use a pool.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Sharing {
    /// Namespaces whose jobs and deployments may name the pool, beside its own.
    #[serde(default)]
    pub namespaces: SharedNamespaces,
}

/// Namespaces, as a Gateway's listener allows routes of them.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("(self.from == 'Selector') == has(self.selector)", "selector is needed by from Selector and by no other"))]
#[x_kube(validation = ("!has(self.selector) || !has(self.selector.matchExpressions) || self.selector.matchExpressions.all(e, e.operator in ['In', 'NotIn'] ? has(e.values) && size(e.values) > 0 : e.operator in ['Exists', 'DoesNotExist'] && !has(e.values))", "selector.matchExpressions have an operator In or NotIn with values, or Exists or DoesNotExist without"))]
pub struct SharedNamespaces {
    /// Which ones.
    #[serde(default)]
    pub from: FromNamespaces,
    /// Labels of the namespaces of `from: Selector`; an empty selector is all of them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub selector: Option<LabelSelector>,
}

/// Where users of a pool may be.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum FromNamespaces {
    /// In the pool's own namespace; the default.
    #[default]
    Same,
    /// In any namespace.
    All,
    /// In its own, and in those with the labels of `selector`.
    Selector,
}
/// Number type, under PyTorch's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Dtype {
    /// 16-bit brain float; the default.
    #[default]
    #[serde(rename = "bfloat16")]
    Bfloat16,
    /// 32-bit float: exact reference, about half the speed.
    #[serde(rename = "float32")]
    Float32,
}

/// The inference engine: its device, and its limits under vLLM's names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Engine {
    /// What a pod computes on: `cpu`, `cuda` (`cuda:1` is the second of its devices), or `auto`, which is a CUDA device where it has one. Pods
    /// that ask for a GPU, be it by `cuda` or with `auto` by an NVIDIA resource or a resource claim of the server's, are started with the
    /// operator's CUDA image when server.image is absent.
    pub device: Device,
    /// Memory of a pod for keys and values: those of all its sequences, of their heads too, and what is kept of shared prefixes. When absent,
    /// a quarter of the pod's memory limit (of its node's memory when it has none), or on a GPU four fifths of what the weights leave free.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Bytes")]
    pub kv_cache_memory: Option<Bytes>,
    /// What the weights of a pool of `dtype: bfloat16` are kept as: `bfloat16`, the default, or blocks of 32 in 8 bits (`q8`) or 4 (`q4`) that are
    /// widened to bfloat16 for each product. Another one is another arithmetic: states that trainers have cached are computed anew.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_dtype: Option<WeightDtype>,
    /// Longest sequence in tokens; the model's own limit when that is smaller.
    #[schemars(range(min = 16, max = limits::MAX_TOKENS))]
    pub max_model_len: u32,
    /// Sequences decoded at once.
    #[schemars(range(min = 1, max = 4096))]
    pub max_num_seqs: u32,
    /// Tokens of one forward batch.
    #[schemars(range(min = 16, max = limits::MAX_TOKENS))]
    pub max_num_batched_tokens: u32,
    /// GPUs that share one copy of the model. Reserved: only 1 is built yet, and a pool that asks for more is refused.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1024))]
    pub tensor_parallel_size: Option<u32>,
}

impl Default for Engine {
    fn default() -> Self {
        Self {
            device: Device::Auto,
            kv_cache_memory: None,
            weight_dtype: None,
            max_model_len: 4096,
            max_num_seqs: 32,
            max_num_batched_tokens: 2048,
            tensor_parallel_size: None,
        }
    }
}

/// What weights are kept as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum WeightDtype {
    /// Numbers of 16 bits.
    Bfloat16,
    /// 8.5 bits a weight, GGUF's Q8_0.
    Q8,
    /// 5 bits a weight, GGUF's Q4_1.
    Q4,
}
