//! The gateway's side of the pool: finds it, checks that it runs the head's base, keeps the head in it, asks it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use carryon_crds::wire::{ModelDescription, digest};
use futures::StreamExt as _;
use futures::stream::BoxStream;

use super::ServeError;
use super::artifact::Artifact;
use super::error::ApiError;
use super::metrics::Metrics;
use crate::exchange::wire::{ClassifyRequest, ClassifyResponse, ErrorCode, GenerateEvent, GenerateRequest};
use crate::exchange::{ClientError, Endpoint, PoolClient};
use crate::text::{ChatTemplate, Tokenizer};

/// How long a request waits for a place in a full pool before its client is told to come back.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// Pause before asking a pool again that broke off before its first word.
const PAUSE: Duration = Duration::from_millis(100);
/// How long one step of the start waits before it says so and begins again.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// A head nobody asks for is dropped by the pool after this time.
const EXPIRY: Duration = Duration::from_secs(600);
/// How often the pool is reminded of the head.
pub(super) const RENEWAL: Duration = Duration::from_secs(120);
/// How long a pod may take to say whether it holds the head, and to take it: one that hangs must not hold up the others.
const ANSWER: Duration = Duration::from_secs(10);
const PUSH: Duration = Duration::from_secs(300);
/// Answers of one request that are drawn at once where the pool does not say how many it serves: every pool has places for these.
const TOGETHER: u32 = 4;
/// How often a pod may lack the head in one request: it may be dropped between push and use, but not for ever.
const PUSHES: usize = 3;

/// What the pool generates.
pub(super) type Events = BoxStream<'static, Result<GenerateEvent, ClientError>>;

/// A head in a pool.
pub(super) struct Gateway {
    /// The head.
    pub(super) artifact: Artifact,
    /// What the pool said of its model.
    pub(super) model: ModelDescription,
    /// The pool's tokenizer.
    pub(super) tokenizer: Arc<Tokenizer>,
    /// The base's chat template, if it has one.
    pub(super) template: Option<ChatTemplate>,
    /// Shared with the routes.
    pub(super) metrics: Metrics,
    client: PoolClient,
    /// How long a request waits for a pool that restarts or is away.
    patience: Duration,
    /// Held while the head is pushed to a pod: requests that miss it together push it once.
    pushing: Mutex<HashMap<Endpoint, Arc<tokio::sync::Mutex<()>>>>,
}

impl Gateway {
    /// Waits for the pool, verifies that it runs the base of the head, and pushes the head to every pod.
    /// `patience`: how long a request waits for a pool that is away.
    pub(super) async fn connect(artifact: Artifact, pool: &[String], patience: Duration, metrics: Metrics) -> Result<Self, ServeError> {
        let client = PoolClient::connect(pool, START_PATIENCE)?;
        let model = patiently(|| client.describe()).await?;
        if let Some(member) = artifact.base.identity.difference(&model.identity) {
            return Err(ServeError::Identity { member, trained_on: artifact.base.name, pool: model.name });
        }
        let client = client.bound_to(&model.identity, None);
        let json = patiently(|| client.tokenizer()).await?;
        if digest(&json) != model.identity.tokenizer {
            return Err(ServeError::Tokenizer);
        }
        let template = match &model.chat_template {
            Some(template) => {
                let compiled = ChatTemplate::new(template, model.bos_token.as_deref(), model.eos_token.as_deref())?;
                Some(compiled.with_tool_use(model.tool_use_template.as_deref())?)
            }
            None => None,
        };
        patiently(|| client.put_head_everywhere(&artifact.digest, artifact.bytes.clone(), EXPIRY)).await?;
        metrics.head_pushes.inc();
        let client = PoolClient::connect(pool, BUSY_PATIENCE)?.bound_to(&model.identity, None);
        let tokenizer = Arc::new(Tokenizer::from_json(&json)?);
        Ok(Self { artifact, model, tokenizer, template, metrics, client, patience, pushing: Mutex::default() })
    }

    /// Starts an answer and waits for its first event, so that everything that can fail before it still can be told as a
    /// refusal: a missing head is pushed, a pool that restarts is waited for.
    pub(super) async fn generate(&self, request: &GenerateRequest) -> Result<Events, ApiError> {
        let started = Instant::now();
        let mut attempts = self.attempts();
        loop {
            let asked = self.client.generate(attempts.endpoint.as_ref(), request).await;
            let error = match asked {
                Ok(events) => {
                    let mut events = events.boxed();
                    match events.next().await {
                        Some(Ok(GenerateEvent::Error { error })) => return Err(error.into()),
                        Some(Ok(first)) => {
                            self.metrics.first_token.observe(started.elapsed().as_secs_f64());
                            return Ok(futures::stream::once(async { Ok(first) }).chain(events).boxed());
                        }
                        Some(Err(error)) => error,
                        None => return Err(ApiError::unavailable("The pool gave no answer.")),
                    }
                }
                Err(error) => error,
            };
            self.recover(error, &mut attempts).await?;
        }
    }

    /// Answers of one request that are drawn at once; the others wait here, where they take no place of somebody else's.
    pub(super) fn together(&self) -> usize {
        self.model.limits.max_num_seqs.unwrap_or(TOGETHER).max(1) as usize
    }

    /// Logits of the classification head.
    pub(super) async fn classify(&self, request: &ClassifyRequest) -> Result<ClassifyResponse, ClientError> {
        let mut attempts = self.attempts();
        loop {
            match self.client.classify(attempts.endpoint.as_ref(), request).await {
                Ok(answer) => return Ok(answer),
                Err(error) => self.recover(error, &mut attempts).await?,
            }
        }
    }

    /// Attempts of a request that begins now.
    pub(super) fn attempts(&self) -> Attempts {
        Attempts { deadline: Instant::now() + self.patience, pushes: 0, endpoint: None }
    }

    /// Does something about a failed attempt, if another may succeed: a pod that lacks the head gets it and is the one to ask
    /// again, a pool that is away is waited for.
    pub(super) async fn recover(&self, error: ClientError, attempts: &mut Attempts) -> Result<(), ClientError> {
        let error = match error {
            ClientError::HeadMissing { endpoint, .. } if attempts.pushes < PUSHES => {
                attempts.pushes += 1;
                match self.ensure(&endpoint).await {
                    Ok(()) => {
                        attempts.endpoint = Some(endpoint);
                        return Ok(());
                    }
                    Err(error) => error,
                }
            }
            error => error,
        };
        if !error.is_transient() || is_busy(&error) || Instant::now() >= attempts.deadline {
            return Err(error);
        }
        tracing::warn!("{error}; asking again");
        attempts.endpoint = None;
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }

    /// Reminds every pod of the head, and gives it to those that lack it, whatever the others answer.
    pub(super) async fn renew(&self) -> Result<(), ClientError> {
        let endpoints = self.client.endpoints().await?;
        self.pushing.lock().unwrap_or_else(PoisonError::into_inner).retain(|endpoint, _| endpoints.contains(endpoint));
        futures::future::join_all(endpoints.iter().map(|endpoint| self.ensure(endpoint))).await.into_iter().collect()
    }

    async fn ensure(&self, endpoint: &Endpoint) -> Result<(), ClientError> {
        let pushing = self.pushing.lock().unwrap_or_else(PoisonError::into_inner).entry(endpoint.clone()).or_default().clone();
        let _alone = pushing.lock().await;
        let digest = &self.artifact.digest;
        if within(ANSWER, endpoint, self.client.has_head(endpoint, digest)).await? {
            return Ok(());
        }
        tracing::info!("pushing the head to {endpoint}");
        self.metrics.head_pushes.inc();
        within(PUSH, endpoint, self.client.put_head(endpoint, digest, self.artifact.bytes.clone(), EXPIRY)).await
    }
}

/// What a request has tried so far.
pub(super) struct Attempts {
    deadline: Instant,
    pushes: usize,
    /// The pod to ask; the next in turn when absent.
    endpoint: Option<Endpoint>,
}

fn is_busy(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { error, .. } if error.code == ErrorCode::Busy)
}

/// The answer of a pod that has `limit` for it.
async fn within<T>(limit: Duration, endpoint: &Endpoint, answer: impl Future<Output = Result<T, ClientError>>) -> Result<T, ClientError> {
    let late = |_| ClientError::Unreachable { address: endpoint.to_string(), reason: format!("no answer within {limit:?}") };
    tokio::time::timeout(limit, answer).await.map_err(late)?
}

/// Waits for the pool without end: pods come when they come.
async fn patiently<T, F: Future<Output = Result<T, ClientError>>>(ask: impl Fn() -> F) -> Result<T, ClientError> {
    loop {
        match ask().await {
            Err(error) if error.is_transient() => tracing::warn!("waiting for the pool: {error}"),
            answer => return answer,
        }
    }
}
