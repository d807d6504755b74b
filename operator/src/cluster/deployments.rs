//! Deployments against the cluster.

use carryon_crds::{CarryOnDeployment, CarryOnDeploymentStatus};
use k8s_openapi::api::core::v1::{PersistentVolumeClaim, Secret};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{Api, ResourceExt as _};

use super::apply::Unapplied;
use super::failure::Failure;
use super::kinds::{Context, Kind, Turn, retry, settle};
use crate::deployment::{self, Applied, Children, Observed, referenced_claim};
use crate::shared::meta::{Owner, namespace};

impl Kind for CarryOnDeployment {
    type Status = CarryOnDeploymentStatus;

    async fn turn(&self, context: &Context, now: &Time) -> Result<Option<Turn<Self::Status>>, Failure> {
        let observed = observe(self, context).await?;
        let validated = deployment::validate(self, &observed, &context.settings);
        let applied = match &validated {
            Ok(validated) => Some(apply(deployment::build(validated), context).await),
            Err(_) => None,
        };
        let outcome = settle(validated, applied)?;
        let status = deployment::status(self, outcome.as_ref().map(|(validated, applied)| (validated, applied)), &observed, now);
        Ok(Some(Turn { status, again: retry(outcome.is_err()), quiet: None }))
    }

    fn status(&self) -> Option<&Self::Status> {
        self.status.as_ref()
    }

    fn set_status(&mut self, status: Self::Status) {
        self.status = Some(status);
    }

    fn conditions(status: &Self::Status) -> &[Condition] {
        &status.conditions
    }
}

async fn observe(deployment: &CarryOnDeployment, context: &Context) -> Result<Observed, Failure> {
    let caches = &context.caches;
    let (space, spec) = (namespace(deployment), &deployment.spec);
    let selector = Owner::of(deployment, "gateway").selector();
    let job = spec.head.job_ref.as_ref().and_then(|reference| caches.jobs.get(&space, &reference.name));
    let claim = referenced_claim(deployment, job.as_ref()).and_then(|claim| caches.claims.get(&space, &claim));
    let selected = |labels: &std::collections::BTreeMap<String, String>| selector.iter().all(|(key, value)| labels.get(key) == Some(value));
    Ok(Observed {
        pool: spec.pools.first().and_then(|pool| caches.pools.get(&space, &pool.name)),
        claim: claim.map(|claim| PersistentVolumeClaim { metadata: claim.metadata.clone(), ..PersistentVolumeClaim::default() }),
        secret: secret(deployment, &space, context).await?,
        pods: caches.pods.list(|pod| namespace(pod) == space && selected(pod.labels())),
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

async fn apply(children: Children, context: &Context) -> Result<Applied, Unapplied> {
    let Children { config_map, service, deployment } = children;
    let (caches, applier) = (&context.caches, &context.applier);
    let space = namespace(&deployment);
    let name = deployment.name_any();
    applier.apply(config_map, caches.config_maps.get(&space, &name)).await?;
    applier.apply(service, caches.services.get(&space, &name)).await?;
    Ok(Applied { deployment: applier.apply(deployment, caches.workloads.get(&space, &name)).await? })
}
