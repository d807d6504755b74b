//! What a deployment's validation and status look at, in Kubernetes' own types.

use carryon_crds::{BaseModelPool, CarryOnJob};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};

/// The world around a deployment at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The pool that `spec.pools[0]` names.
    pub pool: Option<BaseModelPool>,
    /// The job that `spec.head.jobRef` names.
    pub job: Option<CarryOnJob>,
    /// The claim that holds the artifact, when it exists.
    pub claim: Option<PersistentVolumeClaim>,
    /// The Secret with the API key, when the spec names one and it exists.
    pub secret: Option<Secret>,
    /// The gateway's pods.
    pub pods: Vec<Pod>,
    /// Base URL that clients outside reach, when it is known.
    pub url: Option<String>,
}
