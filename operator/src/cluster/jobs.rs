//! Jobs against the cluster.

use std::time::Duration;

use carryon_crds::CarryOnJob;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt as _};

use super::apply::{Unapplied, settle};
use super::attempts::{self, read};
use super::failure::{Failure, code};
use super::kinds::{Context, Kind, Turn, retry};
use super::refused::refused;
use super::wake::refers_to;
use crate::job::plan::plan;
use crate::job::record::Record;
use crate::job::trainers::{is_held, is_of, lives};
use crate::job::{self, Applied, Children, Observed};
use crate::shared::meta::namespace;
use crate::shared::trouble::phase;

impl Kind for CarryOnJob {
    async fn turn(&self, context: &Context, now: &Time) -> Result<Option<Turn<Self::Status>>, Failure> {
        let life = job::life_left(self, now);
        if life == Some(0) && !is_served(self, context) {
            delete(self, context).await?;
            return Ok(None);
        }
        let observed = observe(self, context).await?;
        attempts::let_go(job::trainers::recorded(self, &observed.pods, now), context).await?;
        let outcome = match job::validate(self, &observed, &context.settings, now) {
            Ok(validated) => settle(apply(self, job::build(&validated), &observed, context).await)?.map(|applied| (validated, applied)),
            Err(refusal) => Err(refusal),
        };
        let status = job::status(self, outcome.as_ref().map(|(validated, applied)| (validated, applied)), &observed, now);
        if let Some(record) = Record::due(self, &status)
            && attempts::tell(self, &record, context).await?
        {
            // The status is written once the cache has seen it.
            return Ok(None);
        }
        let (ledger, plan) = plan(self, &observed, now);
        let next = job::until_next(self, &ledger, &plan, now);
        let soon = |seconds: Option<i64>| seconds.map(|seconds| Duration::from_secs(seconds.unsigned_abs().max(1)));
        let lacking = observed.attempt.as_ref().is_some_and(|attempt| job::lacks_pod(attempt, observed.pods_of_present().iter()));
        // A finished job that is served is kept; its deployments wake it when they change.
        let life = soon(life.filter(|left| *left > 0));
        let again = [soon(next), life, retry(outcome.is_err() || lacking)].into_iter().flatten().min();
        Ok(Some(Turn { status, again }))
    }

    /// Its trainers may go without a word.
    async fn left(namespace: &str, name: &str, context: &Context) -> Result<(), Failure> {
        let pods = context.caches.pods.list(|pod| attempts::is_of_job(pod, namespace, name));
        attempts::let_go(pods.iter().filter(|pod| is_held(pod)), context).await
    }

    fn observed_generation(status: &Self::Status) -> Option<i64> {
        status.observed_generation
    }

    fn conditions(status: &Self::Status) -> &[Condition] {
        &status.conditions
    }
}

async fn observe(job: &CarryOnJob, context: &Context) -> Result<Observed, Failure> {
    let caches = &context.caches;
    let (space, spec) = (namespace(job), &job.spec);
    let attempt = attempts::present(job, &space, context).await?;
    let pods = attempts::pods(job, attempt.as_ref(), context).await?;
    let uid = attempt.as_ref().and_then(|attempt| attempt.metadata.uid.as_ref());
    let of_present = || pods.iter().filter(|pod| is_of(pod, uid));
    let refused = match attempt.as_ref().filter(|attempt| job::lacks_pod(attempt, of_present())) {
        Some(attempt) => refused(attempt, &context.client).await,
        None => None,
    };
    let progress = of_present().find(|pod| phase(pod) == "Running" && lives(pod)).and_then(|pod| context.ask.progress(pod));
    let named = [spec.data.source.persistent_volume_claim.as_ref(), Some(&spec.output.persistent_volume_claim)].into_iter().flatten();
    Ok(Observed {
        pool: spec.pools.first().and_then(|pool| caches.pools.get(&space, &pool.name)),
        claims: named.filter_map(|path| caches.claims.claim(&space, &path.claim_name)).collect(),
        data: data(job, &space, context).await?,
        attempt,
        pods,
        refused,
        progress,
    })
}

/// The user's ConfigMap, whose keys matter only before an attempt starts.
async fn data(job: &CarryOnJob, space: &str, context: &Context) -> Result<Option<ConfigMap>, Failure> {
    let Some(source) = &job.spec.data.source.config_map else { return Ok(None) };
    let starts = job.status.as_ref().and_then(|status| status.attempts.last()).is_none_or(|last| last.result.is_some());
    let caches = &context.caches;
    if !starts || (caches.data.get(space, &source.name).is_none() && caches.config_maps.get(space, &source.name).is_none()) {
        return Ok(None);
    }
    let found = Api::<ConfigMap>::namespaced(context.client.clone(), space).get_opt(&source.name).await;
    found.map_err(|error| read(format!("ConfigMap {space}/{}", source.name), error))
}

async fn apply(job: &CarryOnJob, children: Children, observed: &Observed, context: &Context) -> Result<Applied, Unapplied> {
    let Children { config_map, attempt, stop } = children;
    let (space, applier) = (namespace(job), context.applier.of(job));
    let present = |name: &str| observed.attempt.clone().filter(|attempt| attempt.name_any() == name);
    for name in stop {
        let attempt =
            present(&name).or_else(|| context.caches.attempts.get(&space, &name).filter(|attempt| attempts::is_owned(attempt, job)));
        if let Some(attempt) = attempt.filter(|attempt| attempt.metadata.deletion_timestamp.is_none()) {
            applier.delete(&attempt).await?;
        }
    }
    if let Some(config_map) = config_map {
        let known = context.caches.config_maps.get(&space, &config_map.name_any());
        applier.apply(config_map, known).await?;
    }
    let Some(wanted) = attempt else { return Ok(Applied { attempt: None }) };
    let attempt = match present(&wanted.name_any()) {
        Some(present) => applier.adopt(&wanted, present).await?,
        None => {
            attempts::is_free(job, &wanted, context).await?;
            applier.create_once(wanted).await?
        }
    };
    Ok(Applied { attempt: Some(attempt) })
}

/// Whether a deployment serves this job's head, or waits for it.
fn is_served(job: &CarryOnJob, context: &Context) -> bool {
    let (space, name) = (namespace(job), job.name_any());
    !context.caches.deployments.list(|deployment| namespace(deployment) == space && refers_to(deployment, &name)).is_empty()
}

async fn delete(job: &CarryOnJob, context: &Context) -> Result<(), Failure> {
    let space = namespace(job);
    let preconditions = Preconditions { uid: job.uid(), resource_version: job.resource_version() };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
    match Api::<CarryOnJob>::namespaced(context.client.clone(), &space).delete(&job.name_any(), &parameters).await {
        Err(error) if ![404, 409].contains(&code(&error)) => {
            Err(Failure::Api { step: "delete", what: format!("CarryOnJob {space}/{}", job.name_any()), source: Box::new(error) })
        }
        _ => Ok(()),
    }
}
