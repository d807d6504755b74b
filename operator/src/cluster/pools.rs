//! Pools against the cluster.

use carryon_crds::condition::{is_true, types::READY};
use carryon_crds::{BaseModelPool, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::ResourceExt as _;

use super::apply::{Owned, Unapplied, settle};
use super::failure::Failure;
use super::kinds::{Context, Kind, Turn, retry};
use super::refused::refused;
use crate::pool::{self, Applied, Children, Observed};
use crate::shared::meta::{Owner, namespace};
use crate::shared::rollout::Counts;
use crate::shared::trouble::is_ready;

impl Kind for BaseModelPool {
    async fn turn(&self, context: &Context, now: &Time) -> Result<Option<Turn<Self::Status>>, Failure> {
        let observed = observe(self, context).await;
        let outcome = match pool::validate(self, &observed, &context.settings) {
            Ok(validated) => {
                settle(apply(pool::build(&validated), &context.applier.of(self), context).await)?.map(|applied| (validated, applied))
            }
            Err(refusal) => Err(refusal),
        };
        let status = pool::status(self, outcome.as_ref().map(|(validated, applied)| (validated, applied)), &observed, now);
        // Time alone ends its patience.
        let unready = !is_true(&status.conditions, READY);
        Ok(Some(Turn { status, again: retry(unready) }))
    }

    fn observed_generation(status: &Self::Status) -> Option<i64> {
        status.observed_generation
    }

    fn conditions(status: &Self::Status) -> &[Condition] {
        &status.conditions
    }
}

async fn observe(pool: &BaseModelPool, context: &Context) -> Observed {
    let caches = &context.caches;
    let source = pool.spec.model.source.persistent_volume_claim.as_ref();
    let set = caches.stateful_sets.get(&namespace(pool), &names::pool(&pool.name_any()));
    let refused = match set.filter(|set| Counts::of_stateful_set(set).lacks_pods()) {
        Some(set) => refused(&set, &context.client).await,
        None => None,
    };
    let claim = source.and_then(|path| caches.claims.claim(&namespace(pool), &path.claim_name));
    let pods = caches.pods_of(&Owner::of(pool, "pool"));
    let models = context.ask.models(pods.iter().filter(|pod| is_ready(pod)));
    Observed { claim, pods, refused, models, nodes: caches.nodes.as_ref().map(|nodes| nodes.list(|_| true)) }
}

async fn apply(children: Children, applier: &Owned<'_, BaseModelPool>, context: &Context) -> Result<Applied, Unapplied> {
    let Children { config_map, service, stateful_set, disruption_budget } = children;
    let caches = &context.caches;
    let space = namespace(&stateful_set);
    let name = stateful_set.name_any();
    applier.apply(config_map, caches.config_maps.get(&space, &name)).await?;
    applier.apply(service, caches.services.get(&space, &name)).await?;
    applier.apply(disruption_budget, caches.budgets.get(&space, &name)).await?;
    Ok(Applied { stateful_set: applier.apply(stateful_set, caches.stateful_sets.get(&space, &name)).await? })
}
