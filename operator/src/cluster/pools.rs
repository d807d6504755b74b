//! Pools against the cluster.

use std::time::Duration;

use carryon_crds::condition::{is_true, types::READY};
use carryon_crds::{BaseModelPool, BaseModelPoolStatus, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::apply::Unapplied;
use super::context::Context;
use super::failure::Failure;
use super::key::Kind;
use super::kinds::{Outcome, RETRY, Reconcile};
use super::refused::refused;
use super::store::{Cache, Guarded, Stores};
use crate::pool::{self, Applied, Children, Observed, Validated};
use crate::shared::meta::{Owner, namespace};
use crate::shared::rollout::Counts;
use crate::shared::trouble::is_ready;
use crate::shared::{Refusal, Settings};

impl Reconcile for BaseModelPool {
    const KIND: Kind = Kind::Pool;
    type Observed = Observed;
    type Validated = Validated;
    type Children = Children;
    type Applied = Applied;

    fn cache(stores: &Stores) -> &Cache<Guarded<Self>> {
        &stores.pools
    }

    async fn observe(&self, context: &Context) -> Result<Observed, Failure> {
        let (stores, namespace) = (&context.stores, namespace(self));
        let source = self.spec.model.source.persistent_volume_claim.as_ref();
        let set = stores.stateful_sets.get(&namespace, &names::pool(&self.name_any()));
        let refused = match set.filter(|set| Counts::of_stateful_set(set).lacks_pods()) {
            Some(set) => refused(&set, &context.client).await,
            None => None,
        };
        let claim = source.and_then(|path| stores.claims.claim(&namespace, &path.claim_name));
        let pods = stores.pods.owned_by(&namespace, Kind::Pool.component(), &self.name_any());
        let models = context.ask.models(pods.iter().filter(|pod| is_ready(pod)));
        let revisions = stores.revisions_of(&Owner::of(self, "pool"), &names::pool(&self.name_any()));
        Ok(Observed { claim, pods, refused, models, revisions, nodes: stores.nodes.as_ref().map(|nodes| nodes.list(|_| true)) })
    }

    fn validate(&self, observed: &Observed, settings: &Settings, _: &Time) -> Result<Validated, Refusal> {
        pool::validate(self, observed, settings)
    }

    fn build(validated: &Validated) -> Children {
        pool::build(validated)
    }

    async fn apply(&self, children: Children, _: &Observed, context: &Context) -> Result<Applied, Unapplied> {
        let Children { revision, config_map, service, stateful_set, disruption_budget } = children;
        let (stores, owned, namespace) = (&context.stores, context.applier.of(self), namespace(self));
        let (name, current) = (stateful_set.name_any(), revision.name_any());
        owned.apply(revision, stores.revisions.get(&namespace, &current)).await?;
        owned.apply(config_map, stores.config_maps.get(&namespace, &current)).await?;
        owned.apply(service, stores.services.get(&namespace, &name)).await?;
        owned.apply(disruption_budget, stores.budgets.get(&namespace, &name)).await?;
        let applied = Applied { stateful_set: owned.apply(stateful_set, stores.stateful_sets.get(&namespace, &name)).await? };
        if applied.is_settled() {
            let owner = Owner::of(self, "pool");
            owned.collect(stores.revisions_of(&owner, &name), &current).await?;
            owned.collect(stores.config_maps_of(&owner), &current).await?;
        }
        Ok(applied)
    }

    fn judge(&self, outcome: Outcome<'_, Self>, observed: &Observed, now: &Time) -> BaseModelPoolStatus {
        pool::status(self, outcome, observed, now)
    }

    fn requeue(&self, _: Outcome<'_, Self>, _: &Observed, status: &BaseModelPoolStatus, _: &Time) -> Option<Duration> {
        // Time alone ends its patience.
        (!is_true(&status.conditions, READY)).then_some(RETRY)
    }
}
