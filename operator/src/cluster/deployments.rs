//! Deployments against the cluster.

use carryon_crds::CarryOnDeployment;
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{Api, ResourceExt as _};

use super::apply::{Owned, Unapplied, settle};
use super::failure::Failure;
use super::kinds::{Context, Kind, Turn, retry};
use crate::deployment::{self, Applied, Children, Observed, referenced_claim};
use crate::shared::meta::{Owner, namespace};

impl Kind for CarryOnDeployment {
    async fn turn(&self, context: &Context, now: &Time) -> Result<Option<Turn<Self::Status>>, Failure> {
        let observed = observe(self, context).await?;
        let outcome = match deployment::validate(self, &observed, &context.settings) {
            Ok(validated) => {
                settle(apply(deployment::build(&validated), &context.applier.of(self), context).await)?.map(|applied| (validated, applied))
            }
            Err(refusal) => Err(refusal),
        };
        let status = deployment::status(self, outcome.as_ref().map(|(validated, applied)| (validated, applied)), &observed, now);
        Ok(Some(Turn { status, again: retry(outcome.is_err()) }))
    }

    fn observed_generation(status: &Self::Status) -> Option<i64> {
        status.observed_generation
    }

    fn conditions(status: &Self::Status) -> &[Condition] {
        &status.conditions
    }
}

async fn observe(deployment: &CarryOnDeployment, context: &Context) -> Result<Observed, Failure> {
    let caches = &context.caches;
    let (space, spec) = (namespace(deployment), &deployment.spec);
    let job = spec.head.job_ref.as_ref().and_then(|reference| caches.jobs.get(&space, &reference.name));
    let claim = referenced_claim(deployment, job.as_ref());
    Ok(Observed {
        pool: spec.pools.first().and_then(|pool| caches.pools.get(&space, &pool.name)),
        claim: claim.and_then(|claim| caches.claims.claim(&space, &claim)),
        secret: secret(deployment, &space, context).await?,
        pods: caches.pods_of(&Owner::of(deployment, "gateway")),
        url: None,
        job,
    })
}

/// The Secret with the API key: only one that is named is read, and only when it exists.
async fn secret(deployment: &CarryOnDeployment, space: &str, context: &Context) -> Result<Option<Secret>, Failure> {
    let Some(key) = deployment.spec.api.key_secret_ref.as_ref().filter(|key| context.caches.secrets.get(space, &key.name).is_some()) else {
        return Ok(None);
    };
    let found = Api::<Secret>::namespaced(context.client.clone(), space).get_opt(&key.name).await;
    found.map_err(|error| Failure::Api { step: "read", what: format!("Secret {space}/{}", key.name), source: Box::new(error) })
}

async fn apply(children: Children, applier: &Owned<'_, CarryOnDeployment>, context: &Context) -> Result<Applied, Unapplied> {
    let Children { config_map, service, deployment } = children;
    let caches = &context.caches;
    let space = namespace(&deployment);
    let name = deployment.name_any();
    applier.apply(config_map, caches.config_maps.get(&space, &name)).await?;
    applier.apply(service, caches.services.get(&space, &name)).await?;
    Ok(Applied { deployment: applier.apply(deployment, caches.workloads.get(&space, &name)).await? })
}
