//! Deployments against the cluster.

use carryon_crds::condition::{is_true, types::READY};
use carryon_crds::{CarryOnDeployment, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::api::PropagationPolicy;

use super::context::Context;
use super::failure::Failure;
use super::key::Kind;
use super::kinds::{RETRY, Reconcile, Reconciled, settle};
use super::store::{Cache, Guarded, Stores};
use crate::deployment::{self, Applied, Children, Observed, referenced_claims, referenced_jobs};
use crate::shared::meta::Owner;
use crate::shared::sharing::{PoolPath, PoolUser as _};

impl Reconcile for CarryOnDeployment {
    const KIND: Kind = Kind::Deployment;

    fn cache(stores: &Stores) -> &Cache<Guarded<Self>> {
        &stores.deployments
    }

    async fn stages(&self, context: &Context, now: &Time) -> Result<Reconciled<Self>, Failure> {
        let observed = observe(self, context);
        let outcome = settle(async {
            end_withheld(self, &observed, context).await?;
            let validated = deployment::validate(self, &observed, &context.settings)?;
            let applied = apply(self, deployment::build(&validated), context).await?;
            Ok((validated, applied))
        });
        let outcome = outcome.await?;
        let status = deployment::status(self, &outcome, &observed, now);
        // Gateways of before may work with a pool that the spec does not name any more, and of which no change tells.
        let waits = !is_true(&status.conditions, READY);
        Ok(Reconciled { status, requeue: waits.then_some(RETRY) })
    }
}

fn observe(deployment: &CarryOnDeployment, context: &Context) -> Observed {
    let (stores, owner) = (&context.stores, Owner::of(deployment, "gateway"));
    let namespace = &owner.namespace;
    let jobs: Vec<_> = referenced_jobs(deployment).filter_map(|job| stores.jobs.get(namespace, job)).collect();
    let claims = referenced_claims(deployment, &jobs);
    let pods = stores.pods.owned_by(namespace, owner.component, &owner.name);
    Observed {
        pool: stores.pool(&deployment.pool()),
        other_pools: deployment.pools().iter().skip(1).map(|path| stores.pool(path)).collect(),
        claims: claims.iter().filter_map(|claim| stores.claims.claim(namespace, claim)).collect(),
        said: context.ask.gateways(deployment::asked(deployment, &pods)),
        pods,
        revisions: stores.revisions_of(&owner, &names::gateway(&owner.name)),
        url: None,
        jobs,
    }
}

async fn apply(gateway: &CarryOnDeployment, children: Children, context: &Context) -> Result<Applied, Failure> {
    let Children { revision, config_map, service, network_policy, deployment, disruption_budget } = children;
    let (stores, owned, owner) = (&context.stores, context.applier.of(gateway), Owner::of(gateway, "gateway"));
    let (namespace, name, current) = (&owner.namespace, deployment.name_any(), revision.name_any());
    owned.apply(revision, stores.revisions.get(namespace, &current)).await?;
    owned.apply(config_map, stores.config_maps.get(namespace, &current)).await?;
    owned.apply(service, stores.services.get(namespace, &name)).await?;
    if let Some(policy) = network_policy {
        owned.apply(policy, stores.policies.get(namespace, &name)).await?;
    }
    owned.apply(disruption_budget, stores.budgets.get(namespace, &name)).await?;
    let applied = Applied { deployment: owned.apply(deployment, stores.workloads.get(namespace, &name)).await? };
    if applied.is_rolled_out() {
        owned.collect(stores.revisions_of(&owner, &name), &current).await?;
        owned.collect(stores.config_maps_of(&owner), &current).await?;
    }
    Ok(applied)
}

/// Ends the gateways when a pool that they work with is not there for them any more; what they were rendered as stays.
async fn end_withheld(gateway: &CarryOnDeployment, observed: &Observed, context: &Context) -> Result<(), Failure> {
    let (stores, owner) = (&context.stores, Owner::of(gateway, "gateway"));
    let present = stores.workloads.get(&owner.namespace, &names::gateway(&owner.name));
    let Some(present) = present.filter(|present| owner.controls(present)) else { return Ok(()) };
    let is_withheld = |pool: PoolPath| pool.withheld(stores.pool(&pool).as_ref()).is_some();
    if present.metadata.deletion_timestamp.is_some() || !deployment::pools(&present, &observed.pods).into_iter().any(is_withheld) {
        return Ok(());
    }
    context.applier.delete(&present, None, PropagationPolicy::Background).await
}
