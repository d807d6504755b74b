//! The one way of reconciling for all three kinds.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use kube::api::PropagationPolicy;

use super::context::Context;
use super::failure::Failure;
use super::key::Key;
use super::kinds::{Reconcile, Reconciled};
use super::write_status::{StatusWrite, write_status};
use crate::shared::meta::Owner;

/// How often an object is reconciled when nothing happens; spread so that not all are at once.
const RESYNC: Duration = Duration::from_secs(600);
/// Wait for a change that the cache has yet to see; it ends when it does.
pub const BEHIND: Duration = Duration::from_secs(1);

/// Reconciles an object; how long until the next time when nothing happens, and none when the object goes.
pub async fn reconcile<K: Reconcile>(object: &K, context: &Context, now: &Time) -> Result<Option<Duration>, Failure> {
    if object.is_foreign() {
        return Ok(None);
    }
    if object.is_expired(&context.stores, now) {
        let deleted = context.applier.delete(object, object.resource_version(), PropagationPolicy::Background);
        return deleted.await.map(|()| None);
    }
    if context.settings.peers.is_none() {
        remove_policies(object, context).await?;
    }
    let Reconciled { status, requeue } = object.stages(context, now).await?;
    if object.record(&status, context).await? {
        return Ok(None);
    }
    match write_status(object, &status, context).await? {
        StatusWrite::Done => {}
        StatusWrite::Conflict => return Ok(Some(BEHIND)),
        StatusWrite::Gone => return Ok(None),
    }
    Ok(Some(requeue.map_or_else(|| spread(RESYNC, &Key::of(K::KIND, object)), |requeue| requeue.min(RESYNC))))
}

/// Removes the NetworkPolicies that an operator before this one has made, whatever else becomes of the object.
async fn remove_policies<K: Reconcile>(object: &K, context: &Context) -> Result<(), Failure> {
    for policy in context.stores.policies_of(&Owner::of(object, K::KIND.component())) {
        context.applier.delete(&policy, None, PropagationPolicy::Background).await?;
    }
    Ok(())
}

/// Between one and one and a half times `wait`, by the object's name.
fn spread(wait: Duration, key: &Key) -> Duration {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    wait + wait * u32::try_from(hasher.finish() % 500).unwrap_or(0) / 1000
}
