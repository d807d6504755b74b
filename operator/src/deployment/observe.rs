//! What a deployment's validation and status look at, in Kubernetes' own types.

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Pod, Secret};

use super::validate::of_job;

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
    /// What its pods were rendered as.
    pub revisions: Vec<ControllerRevision>,
    /// Base URL that clients outside reach, when it is known.
    pub url: Option<String>,
}

/// Claim that holds the head `deployment` is to serve: named by the spec, kept in the status, or by the complete job.
pub fn referenced_claim(deployment: &CarryOnDeployment, job: Option<&CarryOnJob>) -> Option<String> {
    if let Some(artifact) = &deployment.spec.head.artifact {
        return Some(artifact.persistent_volume_claim.claim_name.clone());
    }
    let head = of_job(deployment, &deployment.spec.head.job_ref.as_ref()?.name, job)?;
    names::parse_claim_uri(&head.uri).map(|(claim, _)| claim.to_owned())
}

/// Whether the deployment's head is that of job `name`.
pub fn refers_to(deployment: &CarryOnDeployment, name: &str) -> bool {
    deployment.spec.head.job_ref.as_ref().is_some_and(|job| job.name == name)
}
