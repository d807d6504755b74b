//! The heads of a deployment, resolved one by one: a jobRef once, to what its job has written. What the status holds is kept, until another job of
//! that name is complete. A head that cannot be resolved is left out, or goes on as it was: it keeps none of the others.

use carryon_crds::condition::{is_true, types};
use carryon_crds::deployment::{Head, HeadStatus, ServedHead};
use carryon_crds::{CarryOnDeployment, CarryOnJob, names};
use kube::ResourceExt as _;

use super::Observed;
use crate::shared::Refusal;
use crate::shared::meta::Owner;

/// A head of the spec.
#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    /// Its name.
    pub name: String,
    /// Its model name.
    pub model_name: String,
    /// What the spec resolves to.
    pub resolved: Result<ServedHead, Refusal>,
    /// What is to be served for it: that, or what was served before; nothing when there was none.
    pub served: Option<Served>,
}

/// A head that can be served.
#[derive(Clone, Debug, PartialEq)]
pub struct Served {
    /// The head.
    pub head: ServedHead,
    /// Claim that holds the artifact.
    pub claim: String,
    /// Path of the artifact's folder in it.
    pub path: String,
}

/// The heads of `deployment`.
///
/// # Errors
/// None can be served; one that serves now is the very one that cannot any more.
pub fn entries(deployment: &CarryOnDeployment, observed: &Observed, owner: &Owner) -> Result<Vec<Entry>, Refusal> {
    let entries: Vec<Entry> =
        deployment.spec.heads.iter().map(|head| entry(deployment, head, observed, owner)).collect::<Result<_, _>>()?;
    let refused = entries.iter().find_map(|entry| entry.resolved.as_ref().err());
    match refused.filter(|_| entries.iter().all(|entry| entry.served.is_none())) {
        Some(refusal) => Err(refusal.clone()),
        None => Ok(entries),
    }
}

fn entry(deployment: &CarryOnDeployment, head: &Head, observed: &Observed, owner: &Owner) -> Result<Entry, Refusal> {
    let found = resolve(deployment, head, observed, owner);
    let usable = found.clone().and_then(|found| {
        same_bases(head, &found, observed, deployment)?;
        served(&found, observed, owner)
    });
    let stable = status_of(deployment, &head.name).and_then(|status| status.stable.as_ref());
    let served = match (&usable, stable) {
        (Ok(served), _) => Some(served.clone()),
        (Err(refusal), Some(stable)) if found.as_ref().is_ok_and(|found| found.digest == stable.digest) => return Err(refusal.clone()),
        (Err(_), Some(stable)) => Some(self::served(stable, observed, owner)?),
        (Err(_), None) => None,
    };
    let resolved = usable.and(found);
    Ok(Entry { name: head.name.clone(), model_name: head.model_name().to_owned(), resolved, served })
}

/// What the status holds of a head.
pub fn status_of<'a>(deployment: &'a CarryOnDeployment, name: &str) -> Option<&'a HeadStatus> {
    deployment.status.as_ref()?.heads.iter().find(|head| head.name == name)
}

/// The head that a jobRef to `name` stands for: what the job has written once it is complete. Until then, and when it is gone, what was resolved
/// from that name before.
fn of_job(deployment: &CarryOnDeployment, head: &Head, name: &str, job: Option<&CarryOnJob>) -> Option<ServedHead> {
    let source = format!("CarryOnJob/{name}");
    // Resolved before, or proven.
    let status = status_of(deployment, &head.name);
    let before = status.into_iter().flat_map(|status| [&status.resolved, &status.stable]).flatten();
    let kept = before.into_iter().find(|head| head.source == source).cloned();
    let written = || {
        let (job, status) = (job?, job?.status.as_ref()?);
        let complete = is_true(&status.conditions, types::COMPLETE);
        let artifact = status.artifact.clone().filter(|artifact| complete && artifact.unmet_thresholds.is_empty())?;
        Some(ServedHead { digest: artifact.digest, uri: artifact.uri, source, job_uid: job.uid() })
    };
    match kept {
        Some(kept) if job.is_none_or(|job| job.uid() == kept.job_uid) => Some(kept),
        kept => written().or(kept),
    }
}

/// What is known of the head without a refusal.
fn known(deployment: &CarryOnDeployment, head: &Head, jobs: &[CarryOnJob]) -> Option<ServedHead> {
    if let Some(artifact) = &head.source.artifact {
        let claim = artifact.source.persistent_volume_claim.as_ref()?;
        let uri = names::claim_uri(&claim.claim_name, claim.path.as_deref().unwrap_or_default());
        return Some(ServedHead { digest: artifact.digest.clone(), uri, source: "artifact".to_owned(), job_uid: None });
    }
    let name = &head.source.job_ref.as_ref()?.name;
    of_job(deployment, head, name, jobs.iter().find(|job| job.name_any() == *name))
}

fn resolve(deployment: &CarryOnDeployment, head: &Head, observed: &Observed, owner: &Owner) -> Result<ServedHead, Refusal> {
    promotable(head, observed, owner)?;
    if let Some(known) = known(deployment, head, &observed.jobs) {
        return Ok(known);
    }
    let field = format!("spec.heads[{}].source", head.name);
    let Some(reference) = &head.source.job_ref else {
        return Err(Refusal::permanent("NoHead", format!("{field} is empty: set jobRef or artifact")));
    };
    let path = format!("{}/{}", owner.namespace, reference.name);
    let lacks = || owner.lacks("JobNotFound", "CarryOnJob", &reference.name, &format!("{field}.jobRef"));
    let job = observed.jobs.iter().find(|job| job.name_any() == reference.name).ok_or_else(lacks)?;
    match job.status.as_ref().is_some_and(|status| is_true(&status.conditions, types::FAILED)) {
        true => Err(Refusal::permanent("JobFailed", format!("CarryOnJob {path} has failed: refer to another job"))),
        false => Err(Refusal::waiting("JobNotComplete", format!("waiting for CarryOnJob {path} to complete"))),
    }
}

/// A job's head that does not meet its thresholds is not served, whatever was served by that name before.
fn promotable(head: &Head, observed: &Observed, owner: &Owner) -> Result<(), Refusal> {
    let Some(reference) = &head.source.job_ref else { return Ok(()) };
    let job = observed.jobs.iter().find(|job| job.name_any() == reference.name);
    let unmet = job.and_then(|job| job.status.as_ref()?.artifact.as_ref()).map_or(&[][..], |artifact| &artifact.unmet_thresholds);
    if unmet.is_empty() {
        return Ok(());
    }
    let (unmet, job) = (unmet.join("; "), format!("{}/{}", owner.namespace, reference.name));
    Err(Refusal::permanent("NotPromotable", format!("head {} of CarryOnJob {job} is not promotable: {unmet}", head.name)))
}

fn served(head: &ServedHead, observed: &Observed, owner: &Owner) -> Result<Served, Refusal> {
    let Some((claim, path)) = names::parse_claim_uri(&head.uri) else {
        return Err(Refusal::permanent("BadArtifactUri", format!("artifact uri {:?} is not pvc://CLAIM/PATH", head.uri)));
    };
    if observed.claims.iter().all(|known| known.name_any() != claim) {
        let message = format!("PersistentVolumeClaim {}/{claim} with the head not found: create it", owner.namespace);
        return Err(Refusal::waiting("ClaimNotFound", message));
    }
    Ok(Served { head: head.clone(), claim: claim.to_owned(), path: path.to_owned() })
}

/// Of a kept head whose job is gone the bases are not known here; the gateway refuses one whose bases are not those of the pools.
fn same_bases(entry: &Head, head: &ServedHead, observed: &Observed, deployment: &CarryOnDeployment) -> Result<(), Refusal> {
    let mut artifacts = observed.jobs.iter().filter_map(|job| job.status.as_ref()?.artifact.as_ref());
    let Some(artifact) = artifacts.find(|artifact| artifact.digest == head.digest) else { return Ok(()) };
    let (pools, others) = (observed.pools(deployment), &artifact.other_base_model_digests);
    if !others.is_empty() && pools.len() != others.len() + 1 {
        let (bases, named) = (others.len() + 1, pools.len());
        let message =
            format!("head {} reads {bases} bases, spec.pools names {named}: name the pools of its job, in their order", entry.name);
        return Err(Refusal::permanent("PoolsMissing", message));
    }
    for (base, (path, pool)) in std::iter::once(&artifact.base_model_digest).chain(others).zip(pools) {
        let model = pool.and_then(|pool| pool.status.as_ref()?.model.as_ref()).map(|model| &model.identity_digest);
        if let Some(model) = model.filter(|model| !base.is_empty() && *model != base) {
            let message =
                format!("head {} was trained on base {base}, BaseModelPool {path} runs {model}: name a pool of the same model", entry.name);
            return Err(Refusal::permanent("BaseModelDiffers", message));
        }
    }
    Ok(())
}

/// Claims that hold the heads `deployment` is to serve: named by the spec, kept in the status, or by complete jobs.
pub fn referenced_claims(deployment: &CarryOnDeployment, jobs: &[CarryOnJob]) -> Vec<String> {
    let stable = deployment.status.iter().flat_map(|status| &status.heads).filter_map(|head| head.stable.clone());
    let known = deployment.spec.heads.iter().filter_map(|head| known(deployment, head, jobs)).chain(stable);
    let mut claims: Vec<String> = known.filter_map(|head| Some(names::parse_claim_uri(&head.uri)?.0.to_owned())).collect();
    claims.sort();
    claims.dedup();
    claims
}

/// Whether one of the deployment's heads is that of job `name`.
pub fn refers_to(deployment: &CarryOnDeployment, name: &str) -> bool {
    referenced_jobs(deployment).any(|job| job == name)
}

/// Names of the jobs whose heads the deployment serves.
pub fn referenced_jobs(deployment: &CarryOnDeployment) -> impl Iterator<Item = &str> {
    deployment.spec.heads.iter().filter_map(|head| Some(head.source.job_ref.as_ref()?.name.as_str()))
}
