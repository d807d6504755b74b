//! Deployments against the cluster.

use std::time::Duration;

use carryon_crds::{CarryOnDeployment, CarryOnDeploymentStatus, names};
use k8s_openapi::api::core::v1::Secret;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Api, ResourceExt as _};

use super::apply::Unapplied;
use super::context::Context;
use super::failure::Failure;
use super::key::Kind;
use super::kinds::{Outcome, Reconcile};
use super::store::{Cache, Guarded, Stores};
use crate::deployment::{self, Applied, Children, Observed, Validated, referenced_claim};
use crate::shared::meta::{Owner, namespace};
use crate::shared::{Refusal, Settings};

impl Reconcile for CarryOnDeployment {
    const KIND: Kind = Kind::Deployment;
    type Observed = Observed;
    type Validated = Validated;
    type Children = Children;
    type Applied = Applied;

    fn cache(stores: &Stores) -> &Cache<Guarded<Self>> {
        &stores.deployments
    }

    async fn observe(&self, context: &Context) -> Result<Observed, Failure> {
        let (stores, namespace, spec) = (&context.stores, namespace(self), &self.spec);
        let job = spec.head.job_ref.as_ref().and_then(|reference| stores.jobs.get(&namespace, &reference.name));
        let claim = referenced_claim(self, job.as_ref());
        Ok(Observed {
            pool: spec.pools.first().and_then(|pool| stores.pools.get(&namespace, &pool.name)),
            claim: claim.and_then(|claim| stores.claims.claim(&namespace, &claim)),
            secret: secret(self, &namespace, context).await?,
            pods: stores.pods.owned_by(&namespace, Kind::Deployment.component(), &self.name_any()),
            revisions: stores.revisions_of(&Owner::of(self, "gateway"), &names::gateway(&self.name_any())),
            url: None,
            job,
        })
    }

    fn validate(&self, observed: &Observed, settings: &Settings, _: &Time) -> Result<Validated, Refusal> {
        deployment::validate(self, observed, settings)
    }

    fn build(validated: &Validated) -> Children {
        deployment::build(validated)
    }

    async fn apply(&self, children: Children, _: &Observed, context: &Context) -> Result<Applied, Unapplied> {
        let Children { revision, config_map, service, deployment } = children;
        let (stores, owned, namespace) = (&context.stores, context.applier.of(self), namespace(self));
        let (name, current) = (deployment.name_any(), revision.name_any());
        owned.apply(revision, stores.revisions.get(&namespace, &current)).await?;
        owned.apply(config_map, stores.config_maps.get(&namespace, &current)).await?;
        owned.apply(service, stores.services.get(&namespace, &name)).await?;
        let applied = Applied { deployment: owned.apply(deployment, stores.workloads.get(&namespace, &name)).await? };
        if applied.is_settled() {
            let owner = Owner::of(self, "gateway");
            owned.collect(stores.revisions_of(&owner, &name), &current).await?;
            owned.collect(stores.config_maps_of(&owner), &current).await?;
        }
        Ok(applied)
    }

    fn judge(&self, outcome: Outcome<'_, Self>, observed: &Observed, now: &Time) -> CarryOnDeploymentStatus {
        deployment::status(self, outcome, observed, now)
    }

    fn requeue(&self, _: Outcome<'_, Self>, _: &Observed, _: &CarryOnDeploymentStatus, _: &Time) -> Option<Duration> {
        None
    }
}

/// The Secret with the API key: only one that is named is read, and only when it exists.
async fn secret(deployment: &CarryOnDeployment, namespace: &str, context: &Context) -> Result<Option<Secret>, Failure> {
    let Some(key) = deployment.spec.api.key_secret_ref.as_ref().filter(|key| context.stores.secrets.shown(namespace, &key.name).is_some())
    else {
        return Ok(None);
    };
    let found = Api::<Secret>::namespaced(context.client.clone(), namespace).get_opt(&key.name).await;
    found.map_err(|error| Failure::Api { step: "read", what: format!("Secret {namespace}/{}", key.name), source: Box::new(error) })
}
