//! `CarryOnDeployment`: serves one head over an OpenAI-compatible endpoint.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::{ClaimPath, PodTemplate};

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
    doc = "Serves one head over an OpenAI-compatible endpoint.",
    scale(spec_replicas_path = ".spec.replicas", status_replicas_path = ".status.replicas", label_selector_path = ".status.selector"),
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "URL", type_ = "string", json_path = ".status.url"),
    printcolumn(name = "Head", type_ = "string", json_path = ".status.stable.digest"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = ("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40", "name must be a DNS-1035 label of at most 40 characters")
)]
#[serde(rename_all = "camelCase")]
pub struct CarryOnDeploymentSpec {
    /// Pools that run the base model.
    #[schemars(length(min = 1, max = 1))]
    pub pools: Vec<DeploymentPool>,
    /// Model name of the OpenAI API; the object's name when absent. The base alone is served as `<name>-base`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 128))]
    pub served_model_name: Option<String>,
    /// The head.
    pub head: HeadSource,
    /// Gateway pods.
    #[serde(default = "one")]
    #[schemars(range(min = 0, max = 1000))]
    pub replicas: i32,
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
    /// Name of a BaseModelPool in the deployment's namespace.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
}

/// The head; exactly one member is set.
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
    pub persistent_volume_claim: ClaimPath,
    /// Digest of head.safetensors; another file is refused.
    #[schemars(regex(pattern = r"^sha256:[0-9a-f]{64}$"))]
    pub digest: String,
}

/// The OpenAI endpoint.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Api {
    /// Secret with the API key clients must send as a bearer token; it may change at any time. None is asked for when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_secret_ref: Option<SecretKey>,
    /// Origins whose web pages may use the API from a browser (cross-origin resource sharing), such as `https://app.example.com`; `*` is every
    /// origin. None may when empty.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(max = 253), regex(pattern = r"^(\*|[a-z][a-z0-9+.-]*://[^/?#@\s]+)$")), extend("x-kubernetes-list-type" = "set"))]
    pub allowed_origins: Vec<String>,
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
    /// Ready, Reconciling, Stalled.
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
    /// Generation this status speaks of.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Gateway pods that exist.
    pub replicas: i32,
    /// Gateway pods that are ready.
    pub ready_replicas: i32,
    /// Label selector of the pods, for the scale subresource.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub selector: Option<String>,
    /// Base URL of the OpenAI API.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// Worker image the gateway was started with; another default image does not change it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub image: Option<String>,
    /// The head that the spec resolves to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resolved: Option<ServedHead>,
    /// The head that served when all wanted gateways were last ready.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stable: Option<ServedHead>,
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

fn one() -> i32 {
    1
}
