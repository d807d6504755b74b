//! One way of reconciling for all three kinds: observe, validate, build, apply, status; then the status is written, if it
//! is news, and its transitions become events.

use std::collections::HashMap;
use std::fmt::Debug;
use std::future::Future;
use std::hash::{DefaultHasher, Hash, Hasher as _};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use carryon_crds::condition::types::READY;
use carryon_crds::names;
use futures::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Patch, PatchParams};
use kube::core::NamespaceResourceScope;
use kube::core::object::HasStatus;
use kube::runtime::events::{Event, EventType};
use kube::runtime::reflector::Store;
use kube::{Api, Client, Resource, ResourceExt as _};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::apply::Applier;
use super::ask::Ask;
use super::caches::{Caches, Guarded};
use super::events::Events;
use super::failure::{Failure, code};
use super::metrics::{Metrics, Outcome};
use super::queue::Queue;
use super::status_patch::difference;
use crate::shared::Settings;

/// Objects of a kind that are reconciled at the same time. Most of them wait: Services are made a few at a time.
const CONCURRENCY: usize = 192;
/// How often an object is looked at when nothing happens; spread so that not all are looked at together.
const RESYNC: Duration = Duration::from_secs(600);
/// Wait after the first failure; doubled by each further one.
const BACK_OFF: Duration = Duration::from_millis(500);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(120);
/// How long a status that was written is remembered; the cache sees it long before.
const FRESH: Duration = Duration::from_secs(60);
/// Wait for a change that the cache has yet to see; it ends when it does.
const CONFLICT: Duration = Duration::from_secs(1);
/// How often an object that the cluster refuses, or that waits for something nobody watches, is tried again.
const RETRY: Duration = Duration::from_secs(30);

/// What reconciling needs beside the object.
pub struct Context {
    /// The API server.
    pub client: Client,
    /// What the cluster holds.
    pub caches: Arc<Caches>,
    /// The writer of children.
    pub applier: Applier,
    /// Talks to workers.
    pub ask: Ask,
    /// Where transitions are told.
    pub events: Events,
    /// Counts.
    pub metrics: Metrics,
    /// The operator's settings.
    pub settings: Settings,
    /// Failures in a row, by kind and path.
    failures: Mutex<HashMap<String, u32>>,
    /// The statuses written of late, by kind and path.
    written: Mutex<HashMap<String, Written>>,
}

/// A status that was written.
struct Written {
    at: Instant,
    /// The version of the object that it has replaced, and that a cache may still hold.
    replaced: Option<String>,
}

impl Context {
    /// A context in which nothing has happened yet.
    pub fn new(
        applier: Applier,
        client: Client,
        caches: Arc<Caches>,
        ask: Ask,
        events: Events,
        metrics: Metrics,
        settings: Settings,
    ) -> Self {
        Self { client, caches, applier, ask, events, metrics, settings, failures: Mutex::default(), written: Mutex::default() }
    }
}

/// What came of one look at an object.
pub struct Turn<S> {
    /// The status as it is now.
    pub status: S,
    /// When to look again at the latest.
    pub again: Option<Duration>,
}

/// One of the three kinds.
pub trait Kind:
    Resource<DynamicType = (), Scope = NamespaceResourceScope>
    + HasStatus<Status: Clone + PartialEq + Serialize + Send + Sync>
    + Clone
    + Debug
    + Serialize
    + DeserializeOwned
    + Send
    + Sync
    + 'static
{
    /// Observes, validates, builds, applies and judges; none when the object itself was deleted.
    fn turn(&self, context: &Context, now: &Time) -> impl Future<Output = Result<Option<Turn<Self::Status>>, Failure>> + Send;

    /// The object is gone, or on its way: nobody waits for what was held back for it.
    fn left(_namespace: &str, _name: &str, _context: &Context) -> impl Future<Output = Result<(), Failure>> + Send {
        std::future::ready(Ok(()))
    }

    /// The generation of the spec that a status speaks of.
    fn observed_generation(status: &Self::Status) -> Option<i64>;

    /// The conditions of a status.
    fn conditions(status: &Self::Status) -> &[Condition];
}

/// Reconciles the objects of a kind that come out of `queue`, without end.
pub async fn run<K: Kind>(context: Arc<Context>, queue: Queue<K>, store: Store<Guarded<K>>) {
    let (context, queue, store) = (&*context, &queue, &store);
    let looks = queue.objects().for_each_concurrent(CONCURRENCY, |reference| async move {
        let again = match store.get(&reference) {
            Some(object) => reconcile(&object, context).await.unwrap_or_else(|failure| Some(back_off(&*object, &failure, context))),
            // Deleted, as its children will be.
            None => {
                let path = path_of::<K>(reference.namespace.as_deref(), &reference.name);
                lock(&context.failures).remove(&path);
                let left = K::left(reference.namespace.as_deref().unwrap_or_default(), &reference.name, context).await;
                left.inspect_err(|failure| tracing::warn!("{path}: {failure}")).err().and_then(|_| retry(true))
            }
        };
        queue.ended(reference, again);
    });
    looks.await;
}

/// Looks at an object; how long until the next look when nothing happens.
async fn reconcile<K: Kind>(object: &Guarded<K>, context: &Context) -> Result<Option<Duration>, Failure> {
    let kind = K::kind(&());
    let object = match &object.0 {
        Ok(object) if object.meta().deletion_timestamp.is_some() => {
            return K::left(&object.namespace().unwrap_or_default(), &object.name_any(), context).await.map(|()| None);
        }
        Ok(object) => object,
        Err(invalid) => {
            let name = invalid.metadata.name.as_deref().unwrap_or_default();
            let space = invalid.metadata.namespace.as_deref().unwrap_or_default();
            tracing::error!("{kind} {space}/{name} cannot be decoded and is left alone: {}", invalid.error);
            context.metrics.count(&kind, Outcome::Undecodable, Duration::ZERO);
            return Ok(None);
        }
    };
    if is_outdated(object, context) {
        return Ok(Some(CONFLICT));
    }
    let started = Instant::now();
    let now = Time(Timestamp::now());
    let again = match object.turn(context, &now).await {
        Ok(Some(turn)) => conclude(object, turn, context).await?,
        Ok(None) | Err(Failure::Deleted) => None,
        Err(failure) => return Err(failure),
    };
    lock(&context.failures).remove(&path(object));
    context.metrics.count(&kind, Outcome::Done, started.elapsed());
    Ok(again)
}

/// Writes the status when it is news, and says when to look again.
async fn conclude<K: Kind>(object: &K, turn: Turn<K::Status>, context: &Context) -> Result<Option<Duration>, Failure> {
    let again = Some(turn.again.map_or_else(|| spread(RESYNC, &path(object)), |again| again.min(RESYNC)));
    if object.status() == Some(&turn.status) {
        return Ok(again);
    }
    // Of this version only: a status that somebody else has changed meanwhile is looked at first.
    let version = json!({ "resourceVersion": object.resource_version() });
    let patch = Patch::Merge(json!({ "metadata": version, "status": difference(object.status(), &turn.status) }));
    let api: Api<K> = Api::namespaced(context.client.clone(), &object.namespace().unwrap_or_default());
    let parameters = PatchParams { field_manager: Some(names::MANAGER.to_owned()), ..PatchParams::default() };
    match api.patch_status(&object.name_any(), &parameters, &patch).await {
        Ok(new) => {
            remember(object, &new, context);
            announce(object, &turn.status, context);
            Ok(again)
        }
        // Deleted meanwhile.
        Err(error) if code(&error) == 404 => Ok(None),
        // Changed meanwhile: the change is on its way to the cache and wakes us.
        Err(error) if code(&error) == 409 => Ok(Some(CONFLICT)),
        Err(error) => Err(Failure::Api { step: "write the status of", what: path(object), source: Box::new(error) }),
    }
}

fn remember<K: Kind>(object: &K, new: &K, context: &Context) {
    let replaced = object.resource_version().filter(|_| new.resource_version() != object.resource_version());
    let mut written = lock(&context.written);
    written.retain(|_, written| written.at.elapsed() < FRESH);
    written.insert(path(object), Written { at: Instant::now(), replaced });
}

/// Whether the cache has yet to see the status we wrote last: it will, and wakes us. What we would do on an older one is done already.
fn is_outdated<K: Kind>(object: &K, context: &Context) -> bool {
    let written = lock(&context.written);
    let last = written.get(&path(object)).filter(|written| written.at.elapsed() < FRESH);
    last.is_some_and(|written| written.replaced.is_some() && written.replaced == object.resource_version())
}

/// An event for each transition of Ready: its status or its reason.
fn announce<K: Kind>(object: &K, status: &K::Status, context: &Context) {
    let ready = |status: &K::Status| K::conditions(status).iter().find(|condition| condition.type_ == READY).cloned();
    let Some(now) = ready(status) else { return };
    let before = object.status().and_then(ready);
    if before.is_some_and(|before| (&before.status, &before.reason) == (&now.status, &now.reason)) {
        return;
    }
    let stalled = K::conditions(status).iter().any(|condition| condition.type_ == "Stalled" && condition.status == "True");
    let event = Event {
        type_: if stalled { EventType::Warning } else { EventType::Normal },
        reason: now.reason.clone(),
        note: Some(now.message.chars().take(1000).collect()),
        action: "Reconcile".to_owned(),
        secondary: None,
    };
    context.events.publish(event, object.object_ref(&()));
}

fn back_off<K: Kind>(object: &Guarded<K>, failure: &Failure, context: &Context) -> Duration {
    let kind = K::kind(&());
    let key = path(object);
    let times = {
        let mut failures = lock(&context.failures);
        let times = failures.entry(key.clone()).or_default();
        *times += 1;
        *times
    };
    tracing::warn!("{key}: {failure}");
    context.metrics.count_error(&kind, failure.step());
    (BACK_OFF * 2u32.pow((times - 1).min(10))).min(BACK_OFF_LIMIT)
}

/// Wait before something that nobody watches is looked at again.
pub fn retry(refused: bool) -> Option<Duration> {
    refused.then_some(RETRY)
}

fn path<K: Resource<DynamicType = ()>>(object: &K) -> String {
    path_of::<K>(object.meta().namespace.as_deref(), &object.name_any())
}

fn path_of<K: Resource<DynamicType = ()>>(namespace: Option<&str>, name: &str) -> String {
    format!("{} {}/{name}", K::kind(&()), namespace.unwrap_or_default())
}

/// Between one and one and a half times `wait`, by the object's name.
fn spread(wait: Duration, key: &str) -> Duration {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    wait + wait * u32::try_from(hasher.finish() % 500).unwrap_or(0) / 1000
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
