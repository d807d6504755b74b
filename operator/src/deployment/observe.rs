//! What a deployment's validation and status look at, in Kubernetes' own types.

use std::collections::BTreeMap;

use carryon_crds::wire::GatewayStatus;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod};

use crate::shared::sharing::{PoolPath, PoolUser as _};

/// The world around a deployment at one moment.
#[derive(Clone, Debug, Default)]
pub struct Observed {
    /// The pool that `spec.pools[0]` names, when it is there for the deployment.
    pub pool: Option<BaseModelPool>,
    /// Those that the further members name, in their order.
    pub other_pools: Vec<Option<BaseModelPool>>,
    /// Those of the jobs that `spec.heads` names that exist.
    pub jobs: Vec<CarryOnJob>,
    /// Those of the claims that hold the artifacts that exist.
    pub claims: Vec<PersistentVolumeClaim>,
    /// The gateway's pods.
    pub pods: Vec<Pod>,
    /// What they say of themselves, by name.
    pub said: BTreeMap<String, GatewayStatus>,
    /// What its pods were rendered as.
    pub revisions: Vec<ControllerRevision>,
    /// Base URL that clients outside reach, when it is known.
    pub url: Option<String>,
}

impl Observed {
    /// The pools that `deployment` names, in its order, and which of them are there.
    pub fn pools(&self, deployment: &CarryOnDeployment) -> Vec<(PoolPath, Option<&BaseModelPool>)> {
        let found = std::iter::once(self.pool.as_ref()).chain(self.other_pools.iter().map(Option::as_ref));
        deployment.pools().into_iter().zip(found.chain(std::iter::repeat(None))).collect()
    }
}
