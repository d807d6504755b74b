//! Jobs against the cluster.

use std::time::Duration;

use carryon_crds::{CarryOnJob, CarryOnJobStatus, names};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::api::{DeleteParams, ListParams, Preconditions};
use kube::{Api, ResourceExt as _};

use super::apply::{Owned, Unapplied, settle};
use super::failure::{Failure, code};
use super::kinds::{Context, Kind, Turn, retry};
use super::wake::refers_to;
use crate::job::{self, Applied, Children, Observed};
use crate::shared::meta::namespace;
use crate::shared::trouble::{last_end, phase};

/// How often a running trainer is asked for its progress.
const PROGRESS: Duration = Duration::from_secs(5);

impl Kind for CarryOnJob {
    async fn turn(&self, context: &Context, now: &Time) -> Result<Option<Turn<Self::Status>>, Failure> {
        let life = job::life_left(self, now);
        if life == Some(0) && !is_served(self, context) {
            delete(self, context).await?;
            return Ok(None);
        }
        let observed = observe(self, context).await?;
        let outcome = match job::validate(self, &observed, &context.settings, now) {
            Ok(validated) => settle(apply(job::build(&validated), &observed, &context.applier.of(self), context).await)?
                .map(|applied| (validated, applied)),
            Err(refusal) => Err(refusal),
        };
        let status = job::status(self, outcome.as_ref().map(|(validated, applied)| (validated, applied)), &observed, now);
        let next = outcome.as_ref().ok().and_then(|(validated, _)| validated.ledger.until_next(self, &validated.plan, now));
        let runs = observed.pods.iter().any(|pod| phase(pod) == "Running").then_some(PROGRESS);
        let soon = |seconds: Option<i64>| seconds.map(|seconds| Duration::from_secs(seconds.unsigned_abs().max(1)));
        // A finished job that is served is kept; its deployments wake it when they change.
        let life = soon(life.filter(|left| *left > 0));
        let again = [soon(next), runs, life, retry(outcome.is_err())].into_iter().flatten().min();
        Ok(Some(Turn { status, again, quiet: Some(PROGRESS) }))
    }

    fn observed_generation(status: &Self::Status) -> Option<i64> {
        status.observed_generation
    }

    fn conditions(status: &Self::Status) -> &[Condition] {
        &status.conditions
    }

    fn differs_in_figures_only(old: &Self::Status, new: &Self::Status) -> bool {
        CarryOnJobStatus { progress: new.progress.clone(), ..old.clone() } == *new
    }
}

async fn observe(job: &CarryOnJob, context: &Context) -> Result<Observed, Failure> {
    let caches = &context.caches;
    let (space, spec) = (namespace(job), &job.spec);
    let attempt = attempt(job, &space, context).await?;
    let pods = match &attempt {
        Some(attempt) => pods(attempt, &space, context).await?,
        None => Vec::new(),
    };
    let running = pods.iter().find(|pod| phase(pod) == "Running");
    let progress = match running {
        Some(pod) => context.ask.progress(pod).await,
        None => None,
    };
    let named = [spec.data.source.persistent_volume_claim.as_ref(), Some(&spec.output.persistent_volume_claim)].into_iter().flatten();
    Ok(Observed {
        pool: spec.pools.first().and_then(|pool| caches.pools.get(&space, &pool.name)),
        claims: named.filter_map(|path| caches.claims.claim(&space, &path.claim_name)).collect(),
        data: data(job, &space, context).await?,
        attempt,
        pods,
        progress,
    })
}

/// The batch Job of the last attempt. A cache that has not seen it yet would make it look deleted, so the API server is asked.
async fn attempt(job: &CarryOnJob, space: &str, context: &Context) -> Result<Option<Job>, Failure> {
    let Some(last) = job.status.as_ref().and_then(|status| status.attempts.last()) else { return Ok(None) };
    let name = names::attempt(&job.name_any(), last.number);
    let ours = |attempt: &Job| attempt.owner_references().iter().any(|owner| Some(&owner.uid) == job.uid().as_ref());
    if let Some(seen) = context.caches.attempts.get(space, &name) {
        return Ok(Some(seen).filter(ours));
    }
    if last.result.is_some() {
        return Ok(None);
    }
    let found = Api::<Job>::namespaced(context.client.clone(), space).get_opt(&name).await;
    found.map(|found| found.filter(ours)).map_err(|error| read(format!("Job {space}/{name}"), error))
}

/// Pods of an attempt. How it ended must not be judged by a cache that has not seen the end yet.
async fn pods(attempt: &Job, space: &str, context: &Context) -> Result<Vec<Pod>, Failure> {
    let ours = |pod: &Pod| pod.owner_references().iter().any(|owner| Some(&owner.uid) == attempt.uid().as_ref());
    let seen = context.caches.pods.list(|pod| pod.namespace().as_deref() == Some(space) && ours(pod));
    if !job::has_ended(attempt) || seen.iter().any(|pod| last_end(pod).is_some()) {
        return Ok(seen);
    }
    let selector = ListParams::default().labels(&format!("batch.kubernetes.io/job-name={}", attempt.name_any()));
    let list = Api::<Pod>::namespaced(context.client.clone(), space).list(&selector).await;
    list.map(|list| list.items.into_iter().filter(ours).collect())
        .map_err(|error| read(format!("pods of Job {space}/{}", attempt.name_any()), error))
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

async fn apply(children: Children, observed: &Observed, applier: &Owned<'_, CarryOnJob>, context: &Context) -> Result<Applied, Unapplied> {
    let Children { config_map, attempt, stop } = children;
    let caches = &context.caches;
    let space = namespace(&config_map);
    let name = config_map.name_any();
    applier.apply(config_map, caches.config_maps.get(&space, &name)).await?;
    if let Some(job) =
        observed.attempt.as_ref().filter(|job| stop.as_ref() == Some(&job.name_any()) && job.metadata.deletion_timestamp.is_none())
    {
        applier.delete(job).await?;
    }
    let attempt = match attempt {
        Some(wanted) => match observed.attempt.as_ref().filter(|present| present.name_any() == wanted.name_any()) {
            Some(present) => Some(present.clone()),
            None => Some(applier.create_once(wanted).await?),
        },
        None => None,
    };
    Ok(Applied { attempt })
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

fn read(what: String, error: kube::Error) -> Failure {
    Failure::Api { step: "read", what, source: Box::new(error) }
}
