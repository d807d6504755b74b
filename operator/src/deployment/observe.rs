//! What a deployment's validation and status look at, in Kubernetes' own types.

use carryon_crds::{BaseModelPool, CarryOnJob};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};

/// The world around a deployment at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The pool that `spec.pools[0]` names.
    pub pool: Option<BaseModelPool>,
    /// Those of the jobs that `spec.heads` names that exist.
    pub jobs: Vec<CarryOnJob>,
    /// Those of the claims that hold the artifacts that exist.
    pub claims: Vec<PersistentVolumeClaim>,
    /// Those of the Secrets with API keys that exist.
    pub secrets: Vec<Secret>,
    /// The gateway's pods.
    pub pods: Vec<Pod>,
    /// What its pods were rendered as.
    pub revisions: Vec<ControllerRevision>,
    /// Base URL that clients outside reach, when it is known.
    pub url: Option<String>,
}
