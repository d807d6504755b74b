//! What a job's validation and status look at, in Kubernetes' own types.

use carryon_crds::BaseModelPool;
use carryon_crds::wire::Progress;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod};

/// The world around a job at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The pool that `spec.pools[0]` names.
    pub pool: Option<BaseModelPool>,
    /// Those of the claims the spec names that exist.
    pub claims: Vec<PersistentVolumeClaim>,
    /// The ConfigMap with the data, when the spec names one.
    pub data: Option<ConfigMap>,
    /// Batch Job of the attempt in `status.attempt`.
    pub attempt: Option<Job>,
    /// Pods of that attempt.
    pub pods: Vec<Pod>,
    /// What its trainer says.
    pub progress: Option<Progress>,
}
