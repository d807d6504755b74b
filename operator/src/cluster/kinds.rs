//! What the three kinds tell of themselves, so that one [`reconcile`](super::reconcile) does for all: observe, validate, build, apply, status.

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

use super::apply::Unapplied;
use super::context::Context;
use super::failure::Failure;
use super::key::Kind;
use super::store::{Cache, Guarded, Stores};
use crate::shared::{Refusal, Settings};

/// How often what the cluster refuses, or nobody watches, is tried again.
pub const RETRY: Duration = Duration::from_secs(30);

/// What came of validating and applying.
pub type Outcome<'a, K> = Result<(&'a <K as Reconcile>::Validated, &'a <K as Reconcile>::Applied), &'a Refusal>;

/// One of the three kinds. What has no `async` is pure.
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

    /// The world around an object at one moment.
    type Observed: Send + Sync;
    /// An object that can be built.
    type Validated: Send + Sync;
    /// The children it is to have.
    type Children: Send;
    /// The children as the cluster holds them.
    type Applied: Send + Sync;

    /// Where objects of this kind are kept.
    fn cache(stores: &Stores) -> &Cache<Guarded<Self>>;

    /// Whether the object has had its time, and nobody needs it any more: it is deleted.
    fn is_expired(&self, _: &Stores, _: &Time) -> bool {
        false
    }

    /// Looks around.
    fn observe(&self, context: &Context) -> impl Future<Output = Result<Self::Observed, Failure>> + Send;

    /// What is done whatever the spec says.
    fn let_go(&self, _: &Self::Observed, _: &Context, _: &Time) -> impl Future<Output = Result<(), Failure>> + Send {
        ready(Ok(()))
    }

    /// Checks the spec against what was observed.
    ///
    /// # Errors
    /// What is missing or wrong.
    fn validate(&self, observed: &Self::Observed, settings: &Settings, now: &Time) -> Result<Self::Validated, Refusal>;

    /// Renders the children.
    fn build(validated: &Self::Validated) -> Self::Children;

    /// Makes the children so.
    fn apply(
        &self,
        children: Self::Children,
        observed: &Self::Observed,
        context: &Context,
    ) -> impl Future<Output = Result<Self::Applied, Unapplied>> + Send;

    /// The status as it is now.
    fn judge(&self, outcome: Outcome<'_, Self>, observed: &Self::Observed, now: &Time) -> Self::Status;

    /// Writes down what has to outlive the status. When there was something, the status is written once the cache has seen it.
    fn record(&self, _: &Self::Status, _: &Context) -> impl Future<Output = Result<bool, Failure>> + Send {
        ready(Ok(false))
    }

    /// The object is gone, or on its way: nobody waits for what was held back for it.
    fn left(_namespace: &str, _name: &str, _: &Context) -> impl Future<Output = Result<(), Failure>> + Send {
        ready(Ok(()))
    }

    /// When to reconcile again at the latest.
    fn requeue(&self, outcome: Outcome<'_, Self>, observed: &Self::Observed, status: &Self::Status, now: &Time) -> Option<Duration>;
}
