//! What the three kinds tell of themselves, so that one [`reconcile`](super::reconcile) does for all.

use std::fmt::Debug;
use std::future::{Future, ready};
use std::time::Duration;

use carryon_crds::condition::ObservedStatus;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource;
use kube::core::NamespaceResourceScope;
use kube::core::object::HasStatus;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::context::Context;
use super::failure::Failure;
use super::key::Kind;
use super::store::{Cache, Guarded, Stores};
use crate::shared::Refusal;

/// How often what the cluster refuses, or nobody watches, is tried again.
pub const RETRY: Duration = Duration::from_secs(30);

/// What has come of an object's stages.
pub struct Reconciled<K: HasStatus> {
    /// Its status as it is now.
    pub status: K::Status,
    /// When to reconcile again at the latest, when nothing happens; none where that does not matter.
    pub requeue: Option<Duration>,
}

/// One of the three kinds.
pub trait Reconcile:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + HasStatus<Status: ObservedStatus + Clone + PartialEq + Serialize + Send + Sync>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// Which one.
    const KIND: Kind;

    /// Where objects of this kind are kept.
    fn cache(stores: &Stores) -> &Cache<Guarded<Self>>;

    /// Whether its spec leaves the object to another controller.
    fn is_foreign(&self) -> bool {
        false
    }

    /// Whether the object has had its time, and nobody needs it any more: it is deleted.
    fn is_expired(&self, _: &Stores, _: &Time) -> bool {
        false
    }

    /// Observes, validates, builds, applies, and judges what has come of it.
    fn stages(&self, context: &Context, now: &Time) -> impl Future<Output = Result<Reconciled<Self>, Failure>> + Send;

    /// Writes down what has to outlive the status. When there was something, the status is written once the cache has seen it.
    fn record(&self, _: &Self::Status, _: &Context) -> impl Future<Output = Result<bool, Failure>> + Send {
        ready(Ok(false))
    }

    /// The object is gone, or on its way: nobody waits for what was held back for it.
    fn left(_namespace: &str, _name: &str, _: &Context) -> impl Future<Output = Result<(), Failure>> + Send {
        ready(Ok(()))
    }
}

/// What was validated and applied, or the refusal that becomes the object's conditions; any other failure is worth another try.
pub async fn settle<T>(stages: impl Future<Output = Result<T, Failure>>) -> Result<Result<T, Refusal>, Failure> {
    match stages.await {
        Ok(applied) => Ok(Ok(applied)),
        Err(Failure::Refused(refusal)) => Ok(Err(refusal)),
        Err(failure) => Err(failure),
    }
}
