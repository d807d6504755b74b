//! Pools against the cluster.

use carryon_crds::condition::{is_true, types::READY};
use carryon_crds::{BaseModelPool, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::context::Context;
use super::failure::Failure;
use super::key::Kind;
use super::kinds::{RETRY, Reconcile, Reconciled, settle};
use super::refused::refused;
use super::store::{Cache, Guarded, Stores};
use crate::pool::{self, Applied, Children, Observed};
use crate::shared::meta::Owner;
use crate::shared::rollout::Counts;
use crate::shared::trouble::is_ready;
use crate::shared::worker::fetches;

impl Reconcile for BaseModelPool {
    const KIND: Kind = Kind::Pool;

    fn cache(stores: &Stores) -> &Cache<Guarded<Self>> {
        &stores.pools
    }

    async fn stages(&self, context: &Context, now: &Time) -> Result<Reconciled<Self>, Failure> {
        let observed = observe(self, context).await;
        let outcome = settle(async {
            let validated = pool::validate(self, &observed, &context.settings)?;
            let applied = apply(self, pool::build(&validated), context).await?;
            Ok((validated, applied))
        });
        let status = pool::status(self, &outcome.await?, &observed, now);
        // Time alone ends its patience.
        let waits = !is_true(&status.conditions, READY);
        Ok(Reconciled { status, requeue: waits.then_some(RETRY) })
    }
}

async fn observe(pool: &BaseModelPool, context: &Context) -> Observed {
    let (stores, owner) = (&context.stores, Owner::of(pool, "pool"));
    let child = names::pool(&owner.name);
    let set = stores.stateful_sets.get(&owner.namespace, &child);
    let refused = match set.filter(|set| Counts::of_stateful_set(set).lacks_pods()) {
        Some(set) => refused(&set, &context.client).await,
        None => None,
    };
    let pods = stores.pods.owned_by(&owner.namespace, owner.component, &owner.name);
    Observed {
        claim: pool.spec.model.claim().and_then(|(path, _)| stores.claims.claim(&owner.namespace, &path.claim_name)),
        models: context.ask.models(pods.iter().filter(|pod| is_ready(pod))),
        fetches: context.ask.fetches(pods.iter().filter(|pod| fetches(pod))),
        pods,
        refused,
        revisions: stores.revisions_of(&owner, &child),
        nodes: stores.nodes.as_ref().map(|nodes| nodes.list(|_| true)),
    }
}

async fn apply(pool: &BaseModelPool, children: Children, context: &Context) -> Result<Applied, Failure> {
    let Children { revision, config_map, commit, service, network_policy, stateful_set, disruption_budget } = children;
    let (stores, owned, owner) = (&context.stores, context.applier.of(pool), Owner::of(pool, "pool"));
    let (namespace, name, current) = (&owner.namespace, stateful_set.name_any(), revision.name_any());
    owned.apply(revision, stores.revisions.get(namespace, &current)).await?;
    owned.apply(config_map, stores.config_maps.get(namespace, &current)).await?;
    let kept = names::pool_commit(&owner.name);
    if let Some(commit) = commit {
        // Before more pods are made, which read it.
        owned.apply(commit, stores.config_maps.get(namespace, &kept)).await?;
    }
    owned.apply(service, stores.services.get(namespace, &name)).await?;
    if let Some(policy) = network_policy {
        owned.apply(policy, stores.policies.get(namespace, &name)).await?;
    }
    owned.apply(disruption_budget, stores.budgets.get(namespace, &name)).await?;
    let applied = Applied { stateful_set: owned.apply(stateful_set, stores.stateful_sets.get(namespace, &name)).await? };
    if applied.is_rolled_out() {
        owned.collect(stores.revisions_of(&owner, &name), &current).await?;
        let read = stores.config_maps_of(&owner).into_iter().filter(|config_map| config_map.name_any() != kept);
        owned.collect(read.collect(), &current).await?;
    }
    Ok(applied)
}
