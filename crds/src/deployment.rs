//! `CarryOnDeployment`: serves heads over one OpenAI-compatible endpoint.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{ClaimPath, PodTemplate};
use crate::wire::limits;

/// Desired state of a deployment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "carryon.dev",
    version = "v1alpha1",
    kind = "CarryOnDeployment",
    plural = "carryondeployments",
    shortname = "cod",
    category = "carryon",
    namespaced,
    status = "CarryOnDeploymentStatus",
    doc = "Serves heads over one OpenAI-compatible endpoint.",
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicas", label_selector_path = ".status.selector"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Available", type_ = "integer", json_path = ".status.readyReplicas"),
    printcolumn(name = "Desired", type_ = "integer", json_path = ".status.desiredReplicas"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url", priority = 1),
    printcolumn(name = "Heads", type_ = "string", json_path = ".status.heads[*].name", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1),
    validation = ("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40", "name must be a DNS-1035 label of at most 40 characters")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.pools.all(one, self.pools.exists_one(other, other.name == one.name && has(other.__namespace__) == has(one.__namespace__) && (!has(one.__namespace__) || other.__namespace__ == one.__namespace__)))", "pools names a pool twice"))]
pub struct CarryOnDeploymentSpec {
    /// Pools that run the base model. For heads that read several bases, all of them, in the order of the heads' jobs: the first makes the answers.
    #[schemars(length(min = 1, max = limits::MAX_POOLS))]
    pub pools: Vec<DeploymentPool>,
    /// Heads behind the endpoint, each a model of its own. The base alone is served as `<name>-base`.
    #[schemars(length(min = 1, max = 64), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub heads: Vec<Head>,
    /// Gateway pods. When absent, they are left to whoever scales the workload; the first is one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: Option<i32>,
    /// The gateway's pod.
    #[serde(default)]
    pub gateway: PodTemplate,
    /// The OpenAI endpoint.
    #[serde(default)]
    pub api: Api,
}

/// A pool that runs the base model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DeploymentPool {
    /// Name of a BaseModelPool.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
    /// Its namespace; the deployment's own when absent. In another one the pool's `sharing` has to allow it: else it is as if there were no pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub namespace: Option<String>,
}

/// A head behind the endpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Head {
    /// Names the head among those of the deployment.
    #[schemars(length(min = 1, max = 40), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Model name of the OpenAI API; the head's name when absent. No other model of the endpoint may have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub served_model_name: Option<String>,
    /// Where it comes from.
    pub source: HeadSource,
    /// How another head takes its place.
    #[serde(default)]
    pub strategy: Strategy,
}

impl Head {
    /// Its model name.
    pub fn model_name(&self) -> &str {
        self.served_model_name.as_deref().unwrap_or(&self.name)
    }
}

/// Where a head comes from; exactly one member is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("(has(self.jobRef) ? 1 : 0) + (has(self.artifact) ? 1 : 0) == 1", "exactly one of jobRef, artifact must be set"))]
pub struct HeadSource {
    /// A CarryOnJob of the same namespace; resolved once, when it is complete. One made anew under its name takes over in the same way.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_ref: Option<JobReference>,
    /// An artifact folder and the digest it must have.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<Artifact>,
}

/// How another head takes the place of one that serves; exactly one member is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.rolling)", "rolling must be set"))]
pub struct Strategy {
    /// Gateways that serve it start beside those of before, which go when it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rolling: Option<Rolling>,
}

impl Default for Strategy {
    fn default() -> Self {
        Self { rolling: Some(Rolling {}) }
    }
}

/// A rolling update has no settings.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Rolling {}

/// Names a CarryOnJob.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobReference {
    /// Name of the job.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
}

/// An artifact folder (head.safetensors, head.json).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Artifact {
    /// Where the folder is.
    pub source: ArtifactSource,
    /// Digest of head.safetensors; another file is refused.
    #[schemars(regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub digest: String,
}

/// Where an artifact's folder is; exactly one member is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.persistentVolumeClaim)", "persistentVolumeClaim must be set"))]
pub struct ArtifactSource {
    /// A claim that holds it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
}

/// The OpenAI endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Api {
    /// API keys, of which clients must send one as a bearer token; each may change at any time. None is asked for when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub keys: Vec<ApiKey>,
    /// Origins whose web pages may use the API from a browser (cross-origin resource sharing), such as `https://app.example.com`; `*` is every
    /// origin. None may when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253), regex(pattern = r"^(\*|[a-z][a-z0-9+.-]*://[^/?#@\s]+)$")), extend("x-kubernetes-list-type" = "set"))]
    pub allowed_origins: Vec<String>,
}

/// An API key.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ApiKey {
    /// Names the key among those of the deployment.
    #[schemars(length(min = 1, max = 40), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
    /// Where it is.
    pub secret_ref: SecretKey,
}

/// A key of a Secret in the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SecretKey {
    /// Name of the Secret.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
    /// Key inside it.
    #[schemars(length(min = 1, max = 253))]
    pub key: String,
}

/// Observed state of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct CarryOnDeploymentStatus {
    /// Ready, Reconciling, Stalled; Available.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Generation this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Gateway pods that exist.
    pub replicas: i32,
    /// Gateway pods that are ready.
    pub ready_replicas: i32,
    /// Pods that are wanted.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub desired_replicas: Option<i32>,
    /// Label selector of the pods, for the scale subresource.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Base URL of the OpenAI API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Worker image the gateway was started with; another default image does not change it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub worker_image: Option<String>,
    /// The heads of the spec.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub heads: Vec<HeadStatus>,
}

/// Observed state of one head of a deployment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeadStatus {
    /// Its name in the spec.
    pub name: String,
    /// What the spec resolves to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolved: Option<ServedHead>,
    /// What all wanted gateways served when they were last ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable: Option<ServedHead>,
    /// Ready, Reconciling, Stalled.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// A head, resolved.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServedHead {
    /// Digest of head.safetensors.
    pub digest: String,
    /// `pvc://CLAIM/PATH` of the artifact's folder.
    pub uri: String,
    /// What it was resolved from: `CarryOnJob/NAME`, or `artifact`.
    pub source: String,
    /// UID of that job.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job_uid: Option<String>,
}
