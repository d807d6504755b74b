//! The one way of reconciling for all three kinds.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::api::{DeleteParams, Preconditions};
use kube::{Api, ResourceExt as _};

use super::apply::settle;
use super::context::Context;
use super::failure::{Failure, code};
use super::key::Key;
use super::kinds::{RETRY, Reconcile};
use super::write_status::{StatusWrite, write_status};

/// How often an object is reconciled when nothing happens; spread so that not all are at once.
const RESYNC: Duration = Duration::from_secs(600);
/// Wait for a change that the cache has yet to see; it ends when it does.
pub const BEHIND: Duration = Duration::from_secs(1);

/// Reconciles an object; how long until the next time when nothing happens, and none when the object goes.
///
/// # Errors
/// What is worth another try.
pub async fn reconcile<K: Reconcile>(object: &K, context: &Context, now: &Time) -> Result<Option<Duration>, Failure> {
    if object.is_expired(&context.stores, now) {
        return delete(object, context).await.map(|()| None);
    }
    let observed = object.observe(context).await?;
    object.let_go(&observed, context, now).await?;
    let outcome = match object.validate(&observed, &context.settings, now) {
        Ok(validated) => {
            let applied = object.apply(K::build(&validated), &observed, context).await;
            settle(applied)?.map(|applied| (validated, applied))
        }
        Err(refusal) => Err(refusal),
    };
    let outcome = outcome.as_ref().map(|(validated, applied)| (validated, applied));
    let status = object.judge(outcome, &observed, now);
    if object.record(&status, context).await? {
        return Ok(None);
    }
    match write_status(object, &status, context).await? {
        StatusWrite::Done => {}
        StatusWrite::Conflict => return Ok(Some(BEHIND)),
        StatusWrite::Gone => return Ok(None),
    }
    let refused = outcome.is_err().then_some(RETRY);
    let requeue = refused.into_iter().chain(object.requeue(outcome, &observed, &status, now)).min();
    Ok(Some(requeue.map_or_else(|| spread(RESYNC, &Key::of(K::KIND, object)), |requeue| requeue.min(RESYNC))))
}

async fn delete<K: Reconcile>(object: &K, context: &Context) -> Result<(), Failure> {
    let preconditions = Preconditions { uid: object.uid(), resource_version: object.resource_version() };
    let parameters = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::background() };
    let api = Api::<K>::namespaced(context.client.clone(), &object.namespace().unwrap_or_default());
    match api.delete(&object.name_any(), &parameters).await {
        Err(error) if ![404, 409].contains(&code(&error)) => {
            Err(Failure::Api { step: "delete", what: Key::of(K::KIND, object).to_string(), source: Box::new(error) })
        }
        _ => Ok(()),
    }
}

/// Between one and one and a half times `wait`, by the object's name.
fn spread(wait: Duration, key: &Key) -> Duration {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    wait + wait * u32::try_from(hasher.finish() % 500).unwrap_or(0) / 1000
}
