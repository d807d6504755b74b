//! A job's spec, its attempts and the world, checked. References are asked for only when an attempt is to start:
//! a running trainer waits for a lost pool by itself.

use std::collections::BTreeMap;

use carryon_crds::common::{ClaimPath, DataSource};
use carryon_crds::job::{HeadInit, HeadSpec, JobPool, Split, StateCache};
use carryon_crds::pool::ModelStatus;
use carryon_crds::wire::{OtherPool, TapChoice, TrainConfig};
use carryon_crds::{BaseModelPool, CarryOnJob};
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::Observed;
use super::attempts::Ledger;
use super::plan::{Plan, plan};
use crate::shared::meta::Owner;
use crate::shared::pods::Basis;
use crate::shared::revision::{Rendering, Source};
use crate::shared::sharing::{PoolPath, PoolUser as _};
use crate::shared::{Refusal, Settings, gpu};

/// Reason of a job whose ConfigMap is not there.
pub const CONFIG_MAP_NOT_FOUND: &str = "ConfigMapNotFound";
/// Reason of a job whose ConfigMap lacks a file.
pub const CONFIG_MAP_KEY_NOT_FOUND: &str = "ConfigMapKeyNotFound";

/// The field of a trainer's pods.
const TRAINER: &str = "spec.trainer";

/// A job that can be built.
#[derive(Clone, Debug, PartialEq)]
pub struct Validated {
    /// Owner of the children, and what the pods are made from.
    pub basis: Basis,
    /// Attempts up to now.
    pub ledger: Ledger,
    /// What comes next.
    pub plan: Plan,
    /// The worker's configuration.
    pub config: TrainConfig,
    /// The pools, at least one.
    pub pools: Vec<PoolPath>,
    /// Where the data are.
    pub data: DataSource,
    /// Claim and path of the job's own folder.
    pub output: ClaimPath,
    /// Claim and path of the hidden states that jobs share.
    pub state_cache: Option<ClaimPath>,
    /// Claim and path of the head that training starts from.
    pub init_head: Option<ClaimPath>,
    /// Whether the head is trained on a GPU.
    pub on_gpu: bool,
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
    let nowhere = || Refusal::permanent("NoDestination", "spec.output.destination is empty: set persistentVolumeClaim");
    let rendering = Rendering::of(&Source::of(job, spec.lasting()), &observed.revisions);
    let gpu = gpu::asked_by(&spec.trainer, TRAINER);
    let on_gpu = gpu.is_some();
    let image = match rendering.image() {
        Some(image) => image,
        None if matches!(plan, Plan::Start(_)) => gpu::image(gpu, &spec.trainer, TRAINER, "ask for none", settings)?,
        None => settings.worker_image.clone(),
    };
    Ok(Validated {
        ledger,
        plan,
        config: TrainConfig {
            name: owner.name.clone(),
            namespace: owner.namespace.clone(),
            task: spec.task,
            taps: pool.taps.as_ref().and_then(TapChoice::of),
            hidden_states_dtype: pool.hidden_states_dtype,
            other_pools: spec.pools.iter().skip(1).map(other_pool).collect(),
            head: HeadSpec { init: HeadInit::default(), ..spec.head.clone() },
            init_head: spec.head.init.from_head.as_ref().map(|head| head.digest.clone()),
            format: spec.data.format,
            split: spec.data.split.clone(),
            max_length: spec.data.max_length,
            overlong: spec.data.overlong,
            on_error: spec.data.on_error,
            targets: spec.data.targets,
            thinking: spec.data.thinking,
            add_eos_token: spec.data.add_eos_token,
            split_special_tokens: spec.data.split_special_tokens,
            training: spec.training.clone(),
            evaluation: spec.evaluation.clone(),
            checkpoint: spec.checkpoint.clone(),
        },
        pools: job.pools(),
        data: spec.data.source.clone(),
        output: output(job).ok_or_else(nowhere)?,
        state_cache: spec.state_cache.as_ref().and_then(StateCache::claim).cloned(),
        init_head: spec.head.init.claim().cloned(),
        queue_labels: job.labels().clone().into_iter().filter(|(key, _)| key.starts_with("kueue.x-k8s.io/")).collect(),
        on_gpu,
        basis: Basis { image, ..Basis::new(owner, &spec.trainer, rendering, settings) },
    })
}

/// Claim and path of the job's own folder.
pub fn output(job: &CarryOnJob) -> Option<ClaimPath> {
    let claim = job.spec.output.claim()?;
    let folder = claim.path.iter().map(|path| path.trim_matches('/').to_owned()).chain([job.name_any()]);
    Some(ClaimPath { claim_name: claim.claim_name.clone(), path: Some(folder.collect::<Vec<_>>().join("/")) })
}

fn references(job: &CarryOnJob, observed: &Observed, owner: &Owner) -> Result<(), Refusal> {
    pools(job, observed)?;
    data(job, observed, owner)?;
    let claims = [
        (job.spec.output.claim(), "spec.output.destination"),
        (job.spec.state_cache.as_ref().and_then(StateCache::claim), "spec.stateCache"),
        (job.spec.head.init.claim(), "spec.head.init.fromHead.source"),
    ];
    claims.into_iter().try_for_each(|(wanted, field)| wanted.map_or(Ok(()), |wanted| claim(wanted, field, observed, owner)))
}

fn pools(job: &CarryOnJob, observed: &Observed) -> Result<(), Refusal> {
    let mut first: Option<(PoolPath, &ModelStatus)> = None;
    for ((path, pool), wanted) in observed.pools(job).into_iter().zip(&job.spec.pools) {
        let pool = pool.ok_or_else(|| path.lacks())?;
        let waits = || Refusal::waiting("PoolNotReady", format!("waiting for BaseModelPool {path} to be ready"));
        let model = loaded(pool).ok_or_else(waits)?;
        let deepest = wanted.taps.iter().flat_map(|taps| &taps.layers).max();
        if let Some(layer) = deepest.filter(|layer| **layer > model.layers) {
            let (field, layers, name) = (path.field(), model.layers, &model.name);
            let message = format!(
                "{field}.taps.layers: {layer} is beyond the last layer, {layers}, of {name} in BaseModelPool {path}: correct the spec"
            );
            return Err(Refusal::permanent("TapBeyondLastLayer", message));
        }
        match &first {
            Some((one, other)) if other.tokenizer_digest != model.tokenizer_digest => {
                let message = format!(
                    "BaseModelPool {} has another tokenizer ({}) than {one} ({}): only bases with the same one can be mixed; correct spec.pools",
                    path, model.tokenizer_digest, other.tokenizer_digest
                );
                return Err(Refusal::permanent("TokenizersDiffer", message));
            }
            Some(_) => {}
            None => first = Some((path, model)),
        }
    }
    Ok(())
}

/// What the trainer is told of a further pool.
fn other_pool(pool: &JobPool) -> OtherPool {
    OtherPool { taps: pool.taps.as_ref().and_then(TapChoice::of), hidden_states_dtype: pool.hidden_states_dtype }
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
        return Err(Refusal::permanent("NoDataSource", "spec.data.source is empty: set persistentVolumeClaim or configMap"));
    };
    let found = observed.data.as_ref().ok_or_else(|| owner.lacks(CONFIG_MAP_NOT_FOUND, "ConfigMap", &wanted.name, "spec.data.source"))?;
    let named = data.split.names().filter(|name| !Split::is_pattern(name));
    let missing = named.into_iter().find(|key| !has_key(found, key));
    missing.map_or(Ok(()), |key| {
        let message = format!("ConfigMap {}/{} (spec.data.source) has no key {key:?}: add it", owner.namespace, wanted.name);
        Err(Refusal::waiting(CONFIG_MAP_KEY_NOT_FOUND, message))
    })
}

fn has_key(config_map: &ConfigMap, key: &str) -> bool {
    config_map.data.as_ref().is_some_and(|data| data.contains_key(key))
        || config_map.binary_data.as_ref().is_some_and(|data| data.contains_key(key))
}

fn claim(wanted: &ClaimPath, field: &str, observed: &Observed, owner: &Owner) -> Result<(), Refusal> {
    match observed.claims.iter().any(|claim| claim.name_any() == wanted.claim_name) {
        true => Ok(()),
        false => Err(owner.lacks("ClaimNotFound", "PersistentVolumeClaim", &wanted.claim_name, field)),
    }
}
