//! A job's spec, its attempts and the world, checked. References are asked for only when an attempt is to start:
//! a running trainer waits for a lost pool by itself.

use std::collections::BTreeMap;

use carryon_crds::common::{ClaimPath, DataSource, PodTemplate};
use carryon_crds::job::PoolUnavailablePolicy;
use carryon_crds::pool::ModelStatus;
use carryon_crds::wire::TrainConfig;
use carryon_crds::{BaseModelPool, CarryOnJob, CarryOnJobSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::Observed;
use super::attempts::Ledger;
use super::plan::{Plan, plan};
use crate::shared::meta::Owner;
use crate::shared::revision::{Rendering, Source};
use crate::shared::{Refusal, Settings};

/// A job that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// Owner of the children.
    pub owner: Owner,
    /// Attempts up to now.
    pub ledger: Ledger,
    /// What comes next.
    pub plan: Plan,
    /// The worker's configuration.
    pub config: TrainConfig,
    /// Name of the pool.
    pub pool: String,
    /// Where the data are.
    pub data: DataSource,
    /// Claim and path of the job's own folder.
    pub output: ClaimPath,
    /// The trainer's template.
    pub template: PodTemplate,
    /// Image when the template names none.
    pub image: String,
    /// User of the pods; none where the cluster picks one.
    pub user: Option<i64>,
    /// Whether the pods stay what they were rendered as: all attempts do.
    pub rendering: Rendering,
    /// Labels by which a queue such as Kueue takes charge of the attempts.
    pub queue_labels: BTreeMap<String, String>,
}

/// Checks a job against the world.
///
/// # Errors
/// A [`Refusal`] that names what is missing or wrong.
pub fn validate(job: &CarryOnJob, observed: &Observed, settings: &Settings, now: &Time) -> Result<Validated, Refusal> {
    let owner = Owner::of(job, "trainer");
    let spec = &job.spec;
    let (ledger, plan) = plan(job, observed, now);
    let pool = spec.pools.first().ok_or_else(|| Refusal::permanent("NoPool", "spec.pools is empty: name a pool"))?;
    if matches!(plan, Plan::Start(_)) {
        references(job, observed, &owner)?;
    }
    let rendering = Rendering::of(&Source::of(job, shaping(spec)), &observed.revisions);
    Ok(Validated {
        ledger,
        plan,
        config: TrainConfig {
            name: owner.name.clone(),
            namespace: owner.namespace.clone(),
            task: spec.task,
            taps: pool.taps.clone(),
            head: spec.head.clone(),
            format: spec.data.format,
            split: spec.data.split.clone(),
            max_length: spec.data.max_length,
            overlong: spec.data.overlong,
            training: spec.training.clone(),
            evaluation: spec.evaluation.clone(),
            checkpoint: spec.checkpoint.clone(),
        },
        pool: pool.name.clone(),
        data: spec.data.source.clone(),
        output: output(job),
        template: spec.trainer.clone(),
        user: settings.pod_user,
        image: rendering.image(settings),
        rendering,
        queue_labels: job.labels().clone().into_iter().filter(|(key, _)| key.starts_with("kueue.x-k8s.io/")).collect(),
        owner,
    })
}

/// The spec without what a job may change while it runs.
fn shaping(spec: &CarryOnJobSpec) -> CarryOnJobSpec {
    CarryOnJobSpec {
        suspend: false,
        backoff_limit: 0,
        active_deadline_seconds: None,
        ttl_seconds_after_finished: None,
        pool_unavailable_policy: PoolUnavailablePolicy::default(),
        pool_unavailable_grace_seconds: 0,
        ..spec.clone()
    }
}

/// Claim and path of the job's own folder.
pub fn output(job: &CarryOnJob) -> ClaimPath {
    let claim = &job.spec.output.persistent_volume_claim;
    let folder = claim.path.iter().map(|path| path.trim_matches('/').to_owned()).chain([job.name_any()]);
    ClaimPath { claim_name: claim.claim_name.clone(), path: Some(folder.collect::<Vec<_>>().join("/")) }
}

fn references(job: &CarryOnJob, observed: &Observed, owner: &Owner) -> Result<(), Refusal> {
    pool(job, observed, owner)?;
    data(job, observed, owner)?;
    claim(&job.spec.output.persistent_volume_claim, "spec.output", observed, owner)
}

fn pool(job: &CarryOnJob, observed: &Observed, owner: &Owner) -> Result<(), Refusal> {
    let wanted = &job.spec.pools[0];
    let path = format!("{}/{}", owner.namespace, wanted.name);
    let Some(pool) = &observed.pool else {
        return Err(Refusal::waiting("PoolNotFound", format!("BaseModelPool {path} (spec.pools[0]) not found: create it")));
    };
    let model = loaded(pool).ok_or_else(|| Refusal::waiting("PoolNotReady", format!("waiting for BaseModelPool {path} to be ready")))?;
    let deepest = wanted.taps.iter().flat_map(|taps| &taps.layers).max();
    match deepest {
        Some(layer) if *layer > model.layers => Err(Refusal::permanent(
            "TapBeyondLastLayer",
            format!(
                "spec.pools[0].taps.layers: {layer} is beyond the last layer, {}, of {} in BaseModelPool {path}; create a new job",
                model.layers, model.name
            ),
        )),
        _ => Ok(()),
    }
}

/// The model of a pool that has a ready pod.
pub fn loaded(pool: &BaseModelPool) -> Option<&ModelStatus> {
    let status = pool.status.as_ref()?;
    status.model.as_ref().filter(|_| status.ready_replicas > 0)
}

fn data(job: &CarryOnJob, observed: &Observed, owner: &Owner) -> Result<(), Refusal> {
    let data = &job.spec.data;
    if let Some(path) = &data.source.persistent_volume_claim {
        return claim(path, "spec.data.source", observed, owner);
    }
    let Some(wanted) = &data.source.config_map else {
        return Err(Refusal::permanent(
            "NoDataSource",
            "spec.data.source is empty: set persistentVolumeClaim or configMap; create a new job",
        ));
    };
    let path = format!("{}/{}", owner.namespace, wanted.name);
    let Some(found) = &observed.data else {
        return Err(Refusal::waiting("ConfigMapNotFound", format!("ConfigMap {path} (spec.data.source) not found: create it")));
    };
    let missing = [Some(&data.split.train), data.split.evaluation.as_ref()].into_iter().flatten().find(|key| !has_key(found, key));
    missing.map_or(Ok(()), |key| {
        Err(Refusal::waiting("ConfigMapKeyNotFound", format!("ConfigMap {path} (spec.data.source) has no key {key:?}: add it")))
    })
}

fn has_key(config_map: &k8s_openapi::api::core::v1::ConfigMap, key: &str) -> bool {
    config_map.data.as_ref().is_some_and(|data| data.contains_key(key))
        || config_map.binary_data.as_ref().is_some_and(|data| data.contains_key(key))
}

fn claim(wanted: &ClaimPath, field: &str, observed: &Observed, owner: &Owner) -> Result<(), Refusal> {
    if observed.claims.iter().any(|claim| claim.name_any() == wanted.claim_name) {
        return Ok(());
    }
    let path = format!("{}/{}", owner.namespace, wanted.claim_name);
    Err(Refusal::waiting("ClaimNotFound", format!("PersistentVolumeClaim {path} ({field}) not found: create it")))
}
