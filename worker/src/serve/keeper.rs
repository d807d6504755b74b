//! Keeps the heads in the pool's pods, each of which is looked after on its own: one that hangs holds up no other.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use carryon_crds::wire::limits::upload_time;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::time::MissedTickBehavior;

use super::ServeError;
use super::artifact::HeadFile;
use super::metrics::Metrics;
use super::models::{Head, Models};
use crate::exchange::{ClientError, Endpoint, PoolClient};

/// A head nobody asks for is dropped by the pool after this time.
const EXPIRY: Duration = Duration::from_secs(600);
/// How often the pool is reminded of the heads.
pub(super) const RENEWAL: Duration = Duration::from_secs(120);
/// How long a pod that took a head may prepare it.
const PREPARED: Duration = Duration::from_secs(180);
/// Pause before the pods are asked once more of which none took the heads.
const PAUSE: Duration = Duration::from_secs(1);
/// How long the start waits for another pod once one holds all heads.
const OTHERS: Duration = Duration::from_secs(5);

/// By pod and head: held while it is pushed there, so that requests that miss it together push it once.
type Pushing = HashMap<(Endpoint, String), Arc<tokio::sync::Mutex<()>>>;

/// Who keeps the heads.
pub(super) struct Keeper {
    client: PoolClient,
    models: Arc<Models>,
    metrics: Metrics,
    pushing: Mutex<Pushing>,
}

/// Heads that a pod does not take, and why.
type Refused<'a> = Vec<(&'a Head, ClientError)>;

impl Keeper {
    pub(super) fn new(client: PoolClient, models: Arc<Models>, metrics: Metrics) -> Self {
        Self { client, models, metrics, pushing: Mutex::default() }
    }

    /// Waits until a pod holds every head, and the others had time to. A head that a pod refuses for good is an error.
    pub(super) async fn start(&self) -> Result<(), ServeError> {
        loop {
            match self.client.endpoints().await {
                Ok(endpoints) => {
                    if self.first(&endpoints).await? {
                        return Ok(());
                    }
                }
                Err(error) if error.is_transient() => tracing::warn!("waiting for the pool: {error}"),
                Err(error) => return Err(error.into()),
            }
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Whether one of the pods holds every head now.
    async fn first(&self, endpoints: &[Endpoint]) -> Result<bool, ServeError> {
        let mut reminded: FuturesUnordered<_> = endpoints.iter().map(|endpoint| self.remind(endpoint)).collect();
        let mut held = false;
        loop {
            let refused = tokio::select! {
                refused = reminded.next() => match refused {
                    Some(refused) => refused,
                    None => return Ok(held),
                },
                () = tokio::time::sleep(OTHERS), if held => return Ok(true),
            };
            held |= refused.is_empty();
            for (head, cause) in refused {
                if !cause.is_transient() {
                    return Err(ServeError::Push { head: head.name.clone(), cause });
                }
                tracing::warn!("waiting for the pool to take head {:?}: {cause}", head.name);
            }
        }
    }

    /// Reminds every pod of the heads, and gives it those that it lacks, again and again.
    pub(super) async fn keep(&self, every: Duration) -> ! {
        let (mut reminded, mut busy) = (FuturesUnordered::new(), HashSet::new());
        let mut clock = tokio::time::interval_at(tokio::time::Instant::now() + every, every);
        clock.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = clock.tick() => for endpoint in self.present().await {
                    if busy.insert(endpoint.clone()) {
                        reminded.push(async move { (self.remind(&endpoint).await, endpoint) });
                    }
                },
                Some((refused, endpoint)) = reminded.next() => {
                    busy.remove(&endpoint);
                    for (head, error) in refused {
                        tracing::warn!("failed to renew head {:?}: {error}", head.name);
                    }
                }
            }
        }
    }

    /// The pods as they are now; what was noted of others is forgotten.
    async fn present(&self) -> Vec<Endpoint> {
        let endpoints = self.client.endpoints().await.unwrap_or_else(|error| {
            tracing::warn!("failed to renew the heads: {error}");
            Vec::new()
        });
        self.pushing().retain(|(endpoint, _), pushing| endpoints.contains(endpoint) || Arc::strong_count(pushing) > 1);
        endpoints
    }

    /// One head after the other: what a pod says of one is nothing to the next.
    async fn remind(&self, endpoint: &Endpoint) -> Refused<'_> {
        let mut refused = Vec::new();
        for head in self.models.heads() {
            let Err(error) = self.ensure(endpoint, head).await else { continue };
            let away = matches!(error, ClientError::Unreachable { .. } | ClientError::Interrupted { .. });
            refused.push((head, error));
            if away {
                // A pod that is away is asked again the next time.
                break;
            }
        }
        refused
    }

    /// Gives a pod a head, unless it holds it.
    pub(super) async fn ensure(&self, endpoint: &Endpoint, head: &Head) -> Result<(), ClientError> {
        let Head { name, artifact } = head;
        let HeadFile { digest, length, .. } = artifact;
        let pushing = self.pushing().entry((endpoint.clone(), digest.clone())).or_default().clone();
        let _alone = pushing.lock().await;
        if self.client.has_head(endpoint, digest).await? {
            return Ok(());
        }
        tracing::info!("pushing head {name:?} to {endpoint}");
        self.metrics.head_pushes.inc();
        let limit = upload_time(*length) + PREPARED;
        let pushed = tokio::time::timeout(limit, self.client.put_head(endpoint, digest, artifact.payload(), EXPIRY)).await;
        pushed.map_err(|_| ClientError::Unreachable { address: endpoint.to_string(), reason: format!("took no head within {limit:?}") })?
    }

    fn pushing(&self) -> std::sync::MutexGuard<'_, Pushing> {
        self.pushing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
