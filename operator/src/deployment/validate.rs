//! A deployment's spec and the world, checked. A jobRef is resolved once: what the status holds is kept, until another job of that name is complete.

use carryon_crds::condition::{is_true, types};
use carryon_crds::deployment::{SecretKey, ServedHead};
use carryon_crds::wire::ServeConfig;
use carryon_crds::{CarryOnDeployment, CarryOnDeploymentSpec, CarryOnJob, names};
use kube::ResourceExt as _;

use super::Observed;
use crate::shared::meta::Owner;
use crate::shared::pods::Basis;
use crate::shared::revision::{Rendering, Source};
use crate::shared::{Refusal, Settings};

/// A deployment that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// Owner of the children, and what the pods are made from.
    pub basis: Basis,
    /// The worker's configuration.
    pub config: ServeConfig,
    /// The head, resolved.
    pub head: ServedHead,
    /// Claim that holds the artifact.
    pub claim: String,
    /// Path of the artifact's folder in it.
    pub path: String,
    /// Name of the pool.
    pub pool: String,
    /// Secret key with the API key.
    pub key: Option<SecretKey>,
    /// What its owner should know of the key, though it works.
    pub key_remark: Option<String>,
    /// Gateway pods.
    pub replicas: i32,
}

/// Checks a deployment against the world.
///
/// # Errors
/// A [`Refusal`] that names what is missing or wrong.
pub fn validate(deployment: &CarryOnDeployment, observed: &Observed, settings: &Settings) -> Result<Validated, Refusal> {
    let owner = Owner::of(deployment, "gateway");
    let spec = &deployment.spec;
    let head = resolve(deployment, observed, &owner)?;
    let (claim, path) = names::parse_claim_uri(&head.uri)
        .map(|(claim, path)| (claim.to_owned(), path.to_owned()))
        .ok_or_else(|| Refusal::permanent("BadArtifactUri", format!("artifact uri {:?} is not pvc://CLAIM/PATH", head.uri)))?;
    if observed.claim.is_none() {
        let message = format!("PersistentVolumeClaim {}/{claim} with the head not found: create it", owner.namespace);
        return Err(Refusal::waiting("ClaimNotFound", message));
    }
    let pool = pool(deployment, &head, observed, &owner)?;
    let key = spec.api.key_secret_ref.clone();
    let key_remark = match &key {
        Some(key) => secret(key, observed, &owner)?,
        None => None,
    };
    // Of the head, what pods see of it.
    let shaping = (CarryOnDeploymentSpec { replicas: 0, ..spec.clone() }, head.digest.clone(), head.uri.clone());
    let rendering = Rendering::of(&Source::of(deployment, shaping), &observed.revisions);
    Ok(Validated {
        config: ServeConfig {
            served_model_name: spec.served_model_name.clone().unwrap_or_else(|| deployment.name_any()),
            digest: head.digest.clone(),
            allowed_origins: spec.api.allowed_origins.clone(),
        },
        head,
        claim,
        path,
        pool,
        key,
        key_remark,
        replicas: spec.replicas,
        basis: Basis::new(owner, &spec.gateway, rendering, settings),
    })
}

/// The head that a jobRef to `name` stands for: what the job has written once it is complete. Until then, and when it is gone, what was resolved
/// from that name before.
pub(super) fn of_job(deployment: &CarryOnDeployment, name: &str, job: Option<&CarryOnJob>) -> Option<ServedHead> {
    let source = format!("CarryOnJob/{name}");
    let kept = kept(deployment, &source).cloned();
    let written = || {
        let (job, status) = (job?, job?.status.as_ref()?);
        let artifact = status.artifact.clone().filter(|_| is_true(&status.conditions, types::COMPLETE))?;
        Some(ServedHead { digest: artifact.digest, uri: artifact.uri, source, job_uid: job.uid() })
    };
    match kept {
        Some(kept) if job.is_none_or(|job| job.uid() == kept.job_uid) => Some(kept),
        kept => written().or(kept),
    }
}

/// What the status holds of a head from `source`: resolved before, or proven.
fn kept<'a>(deployment: &'a CarryOnDeployment, source: &str) -> Option<&'a ServedHead> {
    let status = deployment.status.as_ref()?;
    [&status.resolved, &status.stable].into_iter().flatten().find(|head| head.source == source)
}

fn resolve(deployment: &CarryOnDeployment, observed: &Observed, owner: &Owner) -> Result<ServedHead, Refusal> {
    let head = &deployment.spec.head;
    if let Some(artifact) = &head.artifact {
        let claim = &artifact.persistent_volume_claim;
        let uri = names::claim_uri(&claim.claim_name, claim.path.as_deref().unwrap_or_default());
        return Ok(ServedHead { digest: artifact.digest.clone(), uri, source: "artifact".to_owned(), job_uid: None });
    }
    let Some(reference) = &head.job_ref else {
        return Err(Refusal::permanent("NoHead", "spec.head is empty: set jobRef or artifact"));
    };
    if let Some(head) = of_job(deployment, &reference.name, observed.job.as_ref()) {
        return Ok(head);
    }
    let path = format!("{}/{}", owner.namespace, reference.name);
    let lacks = || owner.lacks("JobNotFound", "CarryOnJob", &reference.name, "spec.head.jobRef");
    let job = observed.job.as_ref().ok_or_else(lacks)?;
    match job.status.as_ref().is_some_and(|status| is_true(&status.conditions, types::FAILED)) {
        true => Err(Refusal::permanent("JobFailed", format!("CarryOnJob {path} has failed: refer to another job"))),
        false => Err(Refusal::waiting("JobNotComplete", format!("waiting for CarryOnJob {path} to complete"))),
    }
}

fn pool(deployment: &CarryOnDeployment, head: &ServedHead, observed: &Observed, owner: &Owner) -> Result<String, Refusal> {
    let name = deployment.spec.pools.first().map(|pool| pool.name.clone()).unwrap_or_default();
    let pool = observed.pool.as_ref().ok_or_else(|| owner.lacks("PoolNotFound", "BaseModelPool", &name, "spec.pools[0]"))?;
    // Of a kept head whose job is gone the base is not known here; the pool refuses one that is not its own.
    let artifact =
        observed.job.as_ref().and_then(|job| job.status.as_ref()?.artifact.as_ref()).filter(|artifact| artifact.digest == head.digest);
    let model = pool.status.as_ref().and_then(|status| status.model.as_ref());
    match (artifact.map(|artifact| artifact.base_model_digest.as_str()), model.map(|model| model.identity_digest.as_str())) {
        (Some(head), Some(pool)) if !head.is_empty() && head != pool => Err(Refusal::permanent(
            "BaseModelDiffers",
            format!(
                "the head was trained on base {head}, BaseModelPool {}/{name} runs {pool}: name a pool of the same model",
                owner.namespace
            ),
        )),
        _ => Ok(name),
    }
}

/// Whether clients can send the API key that the Secret holds, and what is to be said of it. Of itself nothing is said.
fn secret(key: &SecretKey, observed: &Observed, owner: &Owner) -> Result<Option<String>, Refusal> {
    let secret = observed.secret.as_ref().ok_or_else(|| owner.lacks("SecretNotFound", "Secret", &key.name, "spec.api.keySecretRef"))?;
    let SecretKey { name, key } = key;
    let what = format!("Secret {}/{name}", owner.namespace);
    let Some(value) = secret.data.as_ref().and_then(|data| data.get(key)) else {
        return Err(Refusal::waiting("SecretKeyNotFound", format!("{what} has no key {key:?}: add it")));
    };
    match value.0.trim_ascii() {
        [] => Err(Refusal::waiting("SecretKeyEmpty", format!("{what} holds nothing under {key:?}: give it the API key"))),
        sent if sent.iter().any(u8::is_ascii_control) => {
            let message =
                format!("{what} holds a line break or control character within {key:?}, which no request can carry: give it one line");
            Err(Refusal::waiting("SecretKeyUnusable", message))
        }
        sent if sent.len() < value.0.len() => Ok(Some(format!("the white space around {key:?} in {what} is not part of the API key"))),
        _ => Ok(None),
    }
}
