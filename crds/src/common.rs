//! Types that more than one kind uses.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Affinity, EnvVar, PodResourceClaim, Toleration, TopologySpreadConstraint, Volume, VolumeMount};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use kube::KubeSchema;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};

use crate::quantity;
use crate::wire::limits;

/// A folder or file inside a PersistentVolumeClaim of the object's own namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!has(self.path) || !(self.path.startsWith('/') || self.path.split('/').exists(p, p == '..'))", "path must be relative and must not contain '..'"))]
pub struct ClaimPath {
    /// Name of the claim. In local mode: a folder of that name under the state directory's `volumes/`.
    #[schemars(length(min = 1, max = 253))]
    pub claim_name: String,
    /// Path inside the volume; the volume's root when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub path: Option<String>,
}

/// Where a folder of files comes from; exactly one member is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("(has(self.persistentVolumeClaim) ? 1 : 0) + (has(self.configMap) ? 1 : 0) == 1", "exactly one of persistentVolumeClaim, configMap must be set"))]
pub struct DataSource {
    /// A claim that holds the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
    /// A ConfigMap whose keys are the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub config_map: Option<ConfigMapSource>,
}

/// A ConfigMap of the object's own namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ConfigMapSource {
    /// Name of the ConfigMap.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Compute resources of a container, as in Kubernetes.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Resources {
    /// What the scheduler sets aside.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "quantities")]
    pub requests: BTreeMap<String, Quantity>,
    /// What the container may use at most. In local mode `limits.cpu` sets the number of threads, and `limits.memory` is
    /// what keys and values have their share of.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(schema_with = "quantities")]
    pub limits: BTreeMap<String, Quantity>,
}

/// The pod that runs one role of the worker.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PodTemplate {
    /// Worker image; the operator's default image when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub image: Option<String>,
    /// Resources of the worker container.
    #[serde(default)]
    pub resources: Resources,
    /// Where the pod may run; passed to the pod as it is.
    #[serde(default)]
    pub scheduling: Scheduling,
    /// Secrets with the credentials of the image's registry.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub image_pull_secrets: Vec<LocalReference>,
    /// Labels of the pod, beside the operator's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub labels: BTreeMap<String, String>,
    /// Annotations of the pod, beside the operator's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub annotations: BTreeMap<String, String>,
    /// Environment variables of the worker container.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 128), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["name"]))]
    pub env: Vec<EnvVar>,
    /// ServiceAccount of the pod, such as one that a cloud's identity is bound to. No token of the API server is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub service_account_name: Option<String>,
    /// Volumes of the pod, beside the operator's own, in the form of a pod's spec.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "volumes")]
    pub volumes: Vec<Volume>,
    /// Where the worker container finds them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["mountPath"]))]
    pub volume_mounts: Vec<VolumeMount>,
    /// Seconds between the wish that the pod ends and its death, in which answers are finished (60 when absent) or a checkpoint is written (120).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86_400))]
    pub termination_grace_period_seconds: Option<i64>,
    /// Seconds in which a server must become ready once its container runs; then it is started anew. 3600 when absent. A trainer has no such time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 10, max = 86_400))]
    pub startup_deadline_seconds: Option<i32>,
}

/// An object of the same namespace.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct LocalReference {
    /// Its name.
    #[schemars(length(min = 1, max = 253))]
    pub name: String,
}

/// Where a pod may run, in the fields of a pod's spec.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Scheduling {
    /// Labels a node must have.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 64))]
    pub node_selector: BTreeMap<String, String>,
    /// Affinity to nodes and pods.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Affinity>,
    /// Taints the pod tolerates.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32))]
    pub tolerations: Vec<Toleration>,
    /// How the pods spread over zones and nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    pub topology_spread_constraints: Vec<TopologySpreadConstraint>,
    /// Priority of the pod.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub priority_class_name: Option<String>,
    /// Container runtime, e.g. `nvidia`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253))]
    pub runtime_class_name: Option<String>,
    /// Devices claimed by dynamic resource allocation; the worker container gets all of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16))]
    pub resource_claims: Vec<PodResourceClaim>,
}

/// Where hidden states are read from the base model, by name or by number: outputs of decoder layers and the final norm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("size(self.layers) > 0 || self.final", "at least one tap is needed: name layers, or set final"))]
#[x_kube(validation = ("self.layers.all(l, self.layers.exists_one(m, m == l))", "layers must not repeat"))]
#[x_kube(validation = ("!has(self.preset) || (size(self.layers) == 0 && self.final)", "a preset names all taps: leave layers and final out"))]
pub struct TapSelection {
    /// Taps that fit the base, whatever its depth.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub preset: Option<TapPreset>,
    /// Layer indices; 0 is the embedding output, n the output of the n-th decoder layer.
    #[serde(default)]
    #[schemars(length(max = limits::MAX_TAP_LAYERS), inner(range(min = 0, max = 1024)))]
    pub layers: Vec<u32>,
    /// Also tap the state after the final norm: what the LM head sees.
    #[serde(rename = "final", default = "yes")]
    pub final_norm: bool,
}

/// Taps by name. Of n decoder layers:
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum TapPreset {
    /// n/3, 2n/3, 5n/6, n - 2 and the final norm.
    #[default]
    Balanced,
    /// 5n/6, n - 2 and the final norm.
    Late,
    /// The final norm alone.
    Final,
}

/// Where hidden states are read: outputs of decoder layers and the final norm.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Taps {
    /// Layer indices; 0 is the embedding output, n the output of the n-th decoder layer.
    #[serde(default)]
    pub layers: Vec<u32>,
    /// Also the state after the final norm.
    #[serde(rename = "final", default = "yes")]
    pub final_norm: bool,
}

impl Taps {
    /// Number of tapped places.
    pub fn count(&self) -> usize {
        self.layers.len() + usize::from(self.final_norm)
    }

    /// Those of a model of `layers` decoder layers that a preset names.
    pub fn of(preset: TapPreset, layers: u32) -> Self {
        let late = [layers * 5 / 6, layers.saturating_sub(2)];
        let mut depths = match preset {
            TapPreset::Balanced => [layers / 3, layers * 2 / 3].into_iter().chain(late).collect(),
            TapPreset::Late => late.to_vec(),
            TapPreset::Final => Vec::new(),
        };
        depths.sort_unstable();
        depths.dedup();
        Self { layers: depths, final_norm: true }
    }
}

/// Quantities by resource name.
fn quantities(_: &mut SchemaGenerator) -> Schema {
    json_schema!({ "type": "object", "maxProperties": 32, "additionalProperties": quantity::schema() })
}

/// Volumes, whose many sources the API server knows when a pod is made of them.
fn volumes(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "array",
        "maxItems": 32,
        "x-kubernetes-list-type": "map",
        "x-kubernetes-list-map-keys": ["name"],
        "items": {
            "type": "object",
            "required": ["name"],
            "properties": { "name": { "type": "string", "minLength": 1, "maxLength": 63 } },
            "x-kubernetes-preserve-unknown-fields": true,
        },
    })
}

/// For fields that hold unless they say otherwise.
pub(crate) fn yes() -> bool {
    true
}

/// For fields that are left out where they say nothing new.
pub fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}
