//! What a job's validation and status look at, in Kubernetes' own types.

use carryon_crds::job::AttemptStatus;
use carryon_crds::wire::Progress;
use carryon_crds::{BaseModelPool, CarryOnJob};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, PersistentVolumeClaim, Pod};

use super::end::has_ended;
use super::trainers::is_of;
use crate::shared::sharing::{PoolPath, PoolUser as _};

/// The world around a job at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The pool that `spec.pools[0]` names, when it is there for the job.
    pub pool: Option<BaseModelPool>,
    /// Those that the further members name, in their order.
    pub other_pools: Vec<Option<BaseModelPool>>,
    /// Those of the claims the spec names that exist.
    pub claims: Vec<PersistentVolumeClaim>,
    /// The ConfigMap with the data, when the spec names one.
    pub data: Option<ConfigMap>,
    /// Batch Job of the attempt that runs by the status, else of the next one, when it was made and not written down.
    pub attempt: Option<Job>,
    /// All trainer pods of a job of this name, be it this one or one before it: they have one output folder.
    pub pods: Vec<Pod>,
    /// Why the API server refuses the pod of [`attempt`](Self::attempt), when it has none.
    pub refused: Option<String>,
    /// What its pods were rendered as.
    pub revisions: Vec<ControllerRevision>,
    /// What the running trainer says.
    pub progress: Option<Progress>,
}

impl Observed {
    /// The pools that `job` names, in its order, and which of them are there.
    pub fn pools(&self, job: &CarryOnJob) -> Vec<(PoolPath, Option<&BaseModelPool>)> {
        let found = std::iter::once(self.pool.as_ref()).chain(self.other_pools.iter().map(Option::as_ref));
        job.pools().into_iter().zip(found.chain(std::iter::repeat(None))).collect()
    }

    /// The pods of an attempt.
    pub fn pods_of<'a>(&'a self, attempt: &'a AttemptStatus) -> impl Iterator<Item = &'a Pod> {
        self.pods.iter().filter(|pod| is_of(pod, attempt.uid.as_ref()))
    }

    /// The pods of [`attempt`](Self::attempt).
    pub fn pods_of_present(&self) -> Vec<Pod> {
        let uid = self.attempt.as_ref().and_then(|job| job.metadata.uid.as_ref());
        self.pods.iter().filter(|pod| is_of(pod, uid)).cloned().collect()
    }
}

/// Whether the batch Job of an attempt was started and has none of these pods.
pub fn lacks_pod<'a>(attempt: &Job, mut pods: impl Iterator<Item = &'a Pod>) -> bool {
    let status = attempt.status.clone().unwrap_or_default();
    pods.next().is_none() && status.start_time.is_some() && status.active.unwrap_or(0) == 0 && !has_ended(attempt)
}
