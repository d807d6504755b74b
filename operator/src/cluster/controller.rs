//! The loop: keys out of the queue, each reconciled as the object that it names.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use futures::StreamExt as _;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use tokio::sync::watch;

use super::context::Context;
use super::failure::Failure;
use super::key::{Key, Kind};
use super::kinds::{RETRY, Reconcile};
use super::lock::lock;
use super::metrics::Counters;
use super::queue::Queue;
use super::reconcile::{BEHIND, reconcile};
use super::synced::Synced;
use super::tenure::Tenures;

/// Objects that are reconciled at the same time. Most of them wait: Services are made a few at a time.
const CONCURRENCY: usize = 192;
/// Wait after the first failure; doubled by each further one.
const BACK_OFF: Duration = Duration::from_millis(500);
const BACK_OFF_LIMIT: Duration = Duration::from_secs(120);

/// Reconciles what comes out of a queue.
pub struct Controller<'a> {
    context: &'a Context,
    queue: &'a Queue,
    counters: &'a Counters,
    /// In which namespaces this operator is to work, and in which it can.
    scope: (watch::Receiver<Tenures>, Arc<Synced>),
    /// Failures in a row.
    failures: Mutex<HashMap<Key, u32>>,
}

impl<'a> Controller<'a> {
    /// Nothing has failed yet.
    pub fn new(context: &'a Context, queue: &'a Queue, counters: &'a Counters, scope: (watch::Receiver<Tenures>, Arc<Synced>)) -> Self {
        Self { context, queue, counters, scope, failures: Mutex::default() }
    }

    /// Works without end.
    pub async fn run(&self) {
        let keys = futures::stream::unfold((), |()| async { Some((self.queue.pop().await, ())) });
        let reconciles = keys.for_each_concurrent(CONCURRENCY, |key| async move {
            let requeue = match key.kind {
                Kind::Pool => self.one::<BaseModelPool>(&key).await,
                Kind::Job => self.one::<CarryOnJob>(&key).await,
                Kind::Deployment => self.one::<CarryOnDeployment>(&key).await,
            };
            self.queue.done(&key, requeue);
        });
        reconciles.await;
    }

    /// Reconciles one object; how long until the next time when nothing happens.
    async fn one<K: Reconcile>(&self, key: &Key) -> Option<Duration> {
        let (tenures, synced) = &self.scope;
        if !tenures.borrow().leads_in(&key.namespace) || !synced.has(&key.namespace) {
            return Some(RETRY);
        }
        // When it is not there, it was deleted, as its children will be.
        let Some(shown) = K::cache(&self.context.stores).shown(&key.namespace, &key.name) else { return self.left::<K>(key).await };
        let object = match &shown.0 {
            Ok(object) if object.meta().deletion_timestamp.is_some() => return self.left::<K>(key).await,
            Ok(object) => object,
            Err(invalid) => {
                tracing::error!("{key} cannot be decoded and is left alone: {}", invalid.error);
                self.counters.undecodable(key.kind);
                return self.forget(key);
            }
        };
        // What would be done on the old one is done already.
        if self.context.written.is_ahead_of(object) {
            return Some(BEHIND);
        }
        let started = Instant::now();
        let requeue = match reconcile(object, self.context, &Time(Timestamp::now())).await {
            Ok(requeue) => requeue,
            Err(Failure::Deleted) => None,
            Err(failure) => return Some(self.back_off(key, &failure)),
        };
        self.counters.done(key.kind, started.elapsed());
        self.forget(key);
        requeue
    }

    async fn left<K: Reconcile>(&self, key: &Key) -> Option<Duration> {
        match K::left(&key.namespace, &key.name, self.context).await {
            Ok(()) => self.forget(key),
            Err(failure) => Some(self.back_off(key, &failure)),
        }
    }

    fn forget(&self, key: &Key) -> Option<Duration> {
        lock(&self.failures).remove(key);
        None
    }

    fn back_off(&self, key: &Key, failure: &Failure) -> Duration {
        tracing::warn!("{key}: {failure}");
        self.counters.failed(key.kind, failure.step());
        let mut failures = lock(&self.failures);
        let times = failures.entry(key.clone()).and_modify(|times| *times += 1).or_insert(1);
        (BACK_OFF * 2u32.pow((*times - 1).min(10))).min(BACK_OFF_LIMIT)
    }
}
