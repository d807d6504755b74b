//! Jobs against the cluster.

use std::time::Duration;

use carryon_crds::{CarryOnDeployment, CarryOnJob, CarryOnJobStatus, names};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Api, ResourceExt as _};

use super::attempts::{self, TRAINER};
use super::context::Context;
use super::failure::Failure;
use super::key::Kind;
use super::kinds::{RETRY, Reconcile, Reconciled, settle};
use super::ownership::same_configuration;
use super::refused::refused;
use super::store::{Cache, Guarded, Stores};
use crate::deployment::refers_to;
use crate::job::plan::plan;
use crate::job::record::Record;
use crate::job::trainers::{is_held, is_of, lives, outlived, recorded};
use crate::job::validate::{CONFIG_MAP_KEY_NOT_FOUND, CONFIG_MAP_NOT_FOUND};
use crate::job::{self, Applied, Children, Observed};
use crate::shared::Refusal;
use crate::shared::meta::{Owner, namespace};
use crate::shared::revision;
use crate::shared::sharing::PoolUser as _;
use crate::shared::trouble::phase;

/// How soon a job looks again for its ConfigMap.
const SOON: Duration = Duration::from_secs(5);

impl Reconcile for CarryOnJob {
    const KIND: Kind = Kind::Job;

    fn cache(stores: &Stores) -> &Cache<Guarded<Self>> {
        &stores.jobs
    }

    fn is_foreign(&self) -> bool {
        self.spec.managed_by.as_ref().is_some_and(|manager| manager != names::CONTROLLER)
    }

    /// A finished job that is served is kept; its deployments wake it when they change.
    fn is_expired(&self, stores: &Stores, now: &Time) -> bool {
        let serves = |deployment: &CarryOnDeployment| refers_to(deployment, &self.name_any());
        job::life_left(self, now) == Some(0) && stores.deployments.names_of(&namespace(self), serves).is_empty()
    }

    async fn stages(&self, context: &Context, now: &Time) -> Result<Reconciled<Self>, Failure> {
        let observed = observe(self, context).await?;
        attempts::let_go(recorded(self, &observed.pods, now), context).await?;
        for (attempt, _) in outlived(self, &observed.pods, now).filter(|(_, left)| *left == 0) {
            attempts::free(self, attempt, context).await?;
        }
        let outcome = settle(async {
            let validated = job::validate(self, &observed, &context.settings, now)?;
            let applied = apply(self, job::build(&validated), &observed, context).await?;
            Ok((validated, applied))
        });
        let outcome = outcome.await?;
        let status = job::status(self, &outcome, &observed, now);
        // Nobody watches the ConfigMaps of users, of which a cluster has many: one that is missing is looked for.
        let again =
            |refusal: &Refusal| if matches!(refusal.reason, CONFIG_MAP_NOT_FOUND | CONFIG_MAP_KEY_NOT_FOUND) { SOON } else { RETRY };
        let refused = outcome.as_ref().err().map(again);
        Ok(Reconciled { status, requeue: refused.into_iter().chain(requeue(self, &observed, now)).min() })
    }

    async fn record(&self, status: &CarryOnJobStatus, context: &Context) -> Result<bool, Failure> {
        match Record::due(self, status) {
            Some(record) => attempts::tell(self, &record, context).await,
            None => Ok(false),
        }
    }

    /// Its trainers may go without a word.
    async fn left(namespace: &str, name: &str, context: &Context) -> Result<(), Failure> {
        let pods = context.stores.pods.owned_by(namespace, TRAINER, name);
        attempts::let_go(pods.iter().filter(|pod| is_held(pod)), context).await
    }
}

async fn observe(job: &CarryOnJob, context: &Context) -> Result<Observed, Failure> {
    let (stores, owner, spec) = (&context.stores, Owner::of(job, TRAINER), &job.spec);
    let namespace = &owner.namespace;
    let attempt = attempts::present(job, namespace, context).await?;
    let pods = attempts::pods(job, attempt.as_ref(), context).await?;
    let uid = attempt.as_ref().and_then(|attempt| attempt.metadata.uid.as_ref());
    let of_present = || pods.iter().filter(|pod| is_of(pod, uid));
    let refused = match attempt.as_ref().filter(|attempt| job::lacks_pod(attempt, of_present())) {
        Some(attempt) => refused(attempt, &context.client).await,
        None => None,
    };
    let progress = of_present().find(|pod| phase(pod) == "Running" && lives(pod)).and_then(|pod| context.ask.progress(pod));
    Ok(Observed {
        pool: stores.pool(&job.pool()),
        other_pools: job.pools().iter().skip(1).map(|path| stores.pool(path)).collect(),
        claims: spec.claims().filter_map(|path| stores.claims.claim(namespace, &path.claim_name)).collect(),
        data: data(job, namespace, context).await?,
        attempt,
        pods,
        refused,
        revisions: stores.revisions_of(&owner, &names::trainer(&owner.name)),
        progress,
    })
}

async fn apply(job: &CarryOnJob, children: Children, observed: &Observed, context: &Context) -> Result<Applied, Failure> {
    let Children { revision, config_map, network_policy, attempt, stop } = children;
    let (stores, owned, namespace) = (&context.stores, context.applier.of(job), namespace(job));
    let present = |name: &str| observed.attempt.clone().filter(|attempt| attempt.name_any() == name);
    for name in stop {
        let cached = || stores.attempts.get(&namespace, &name).filter(|attempt| attempts::is_owned(attempt, job));
        let attempt = present(&name).or_else(cached).filter(|attempt| attempt.metadata.deletion_timestamp.is_none());
        if let Some(attempt) = attempt {
            owned.delete(&attempt).await?;
        }
    }
    if let Some(revision) = revision {
        let known = stores.revisions.get(&namespace, &revision.name_any());
        owned.apply(revision, known).await?;
    }
    if let Some(config_map) = config_map {
        let known = stores.config_maps.get(&namespace, &config_map.name_any());
        owned.apply(config_map, known).await?;
    }
    if let Some(policy) = network_policy {
        let known = stores.policies.get(&namespace, &policy.name_any());
        owned.apply(policy, known).await?;
    }
    let Some(wanted) = attempt else { return Ok(Applied { attempt: None }) };
    let attempt = match present(&wanted.name_any()) {
        // The spec was corrected before a status could say that this attempt had started.
        Some(present) if number(job) == 0 && attempts::is_owned(&present, job) && same_configuration(&wanted, &present).is_err() => {
            owned.delete(&present).await?;
            return Err(Refusal::waiting("AttemptOutdated", "the attempt of the spec before is being deleted").into());
        }
        Some(present) => owned.adopt(&wanted, present).await?,
        None => {
            attempts::is_free(job, &wanted, context).await?;
            let attempt = owned.create_once(wanted).await?;
            collect(job, &attempt, context).await?;
            attempt
        }
    };
    Ok(Applied { attempt: Some(attempt) })
}

/// The last attempt that the status knows of.
fn number(job: &CarryOnJob) -> u32 {
    job.status.as_ref().map_or(0, |status| status.attempt)
}

/// When time alone changes something.
fn requeue(job: &CarryOnJob, observed: &Observed, now: &Time) -> Option<Duration> {
    let soon = |seconds: i64| Duration::from_secs(seconds.unsigned_abs().max(1));
    let (ledger, plan) = plan(job, observed, now);
    let next = job::until_next(job, &ledger, &plan, now).map(soon);
    let life = job::life_left(job, now).filter(|left| *left > 0).map(soon);
    let lacking = observed.attempt.as_ref().is_some_and(|attempt| job::lacks_pod(attempt, observed.pods_of_present().iter()));
    let outlived = outlived(job, &observed.pods, now).map(|(_, left)| soon(left)).min();
    [next, life, outlived, lacking.then_some(RETRY)].into_iter().flatten().min()
}

/// The user's ConfigMap, whose keys matter only before an attempt starts.
async fn data(job: &CarryOnJob, namespace: &str, context: &Context) -> Result<Option<ConfigMap>, Failure> {
    let Some(source) = &job.spec.data.source.config_map else { return Ok(None) };
    let starts = job.status.as_ref().and_then(|status| status.attempts.last()).is_none_or(|last| last.result.is_some());
    if !starts {
        return Ok(None);
    }
    let found = Api::<ConfigMap>::namespaced(context.client.clone(), namespace).get_opt(&source.name).await;
    found.map_err(Failure::of("read", format!("ConfigMap {namespace}/{}", source.name)))
}

/// No trainer but that of the new attempt is there: what those before it were rendered as goes.
async fn collect(job: &CarryOnJob, attempt: &Job, context: &Context) -> Result<(), Failure> {
    let Some(current) = attempt.spec.as_ref().and_then(|spec| revision::name_in(&spec.template)) else { return Ok(()) };
    let (owner, owned) = (Owner::of(job, TRAINER), context.applier.of(job));
    owned.collect(context.stores.revisions_of(&owner, &names::trainer(&owner.name)), current).await?;
    owned.collect(context.stores.config_maps_of(&owner), current).await
}
