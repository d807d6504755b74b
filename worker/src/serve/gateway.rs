//! The gateway's side of the pool: finds it, checks that it runs the head's base, keeps the head in it, asks it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use carryon_crds::wire::{ModelDescription, digest};
use futures::StreamExt as _;
use futures::stream::BoxStream;

use super::ServeError;
use super::artifact::Artifact;
use super::error::ApiError;
use super::metrics::Metrics;
use crate::exchange::wire::{ClassifyRequest, ClassifyResponse, GenerateEvent, GenerateRequest};
use crate::exchange::{ClientError, Endpoint, PoolClient};
use crate::text::{ChatTemplate, Tokenizer};

/// How long a request waits for a pool that is full, restarts or is away.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// How long one step of the start waits before it says so and begins again.
const START_PATIENCE: Duration = Duration::from_secs(10);
/// A head nobody asks for is dropped by the pool after this time.
const EXPIRY: Duration = Duration::from_secs(600);
/// How often the pool is reminded of the head.
pub(super) const RENEWAL: Duration = Duration::from_secs(120);
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
    /// Held while the head is pushed: requests that miss it together push it once.
    pushing: tokio::sync::Mutex<()>,
}

impl Gateway {
    /// Waits for the pool, verifies that it runs the base of the head, and pushes the head to every pod.
    pub(super) async fn connect(artifact: Artifact, pool: &[String], metrics: Metrics) -> Result<Self, ServeError> {
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
            Some(template) => Some(ChatTemplate::new(template, model.bos_token.as_deref(), model.eos_token.as_deref())?),
            None => None,
        };
        patiently(|| client.put_head_everywhere(&artifact.digest, artifact.bytes.clone(), EXPIRY)).await?;
        metrics.head_pushes.inc();
        let client = PoolClient::connect(pool, PATIENCE)?.bound_to(&model.identity, None);
        let tokenizer = Arc::new(Tokenizer::from_json(&json)?);
        Ok(Self { artifact, model, tokenizer, template, metrics, client, pushing: tokio::sync::Mutex::default() })
    }

    /// Starts an answer and waits for its first event, so that everything that can fail before it still can be told as a
    /// refusal: a missing head is pushed, a pool that restarts is waited for.
    pub(super) async fn generate(&self, request: &GenerateRequest) -> Result<Events, ApiError> {
        let started = Instant::now();
        loop {
            let mut events = self.begin(request).await?;
            match events.next().await {
                Some(Ok(GenerateEvent::Error { error })) => return Err(error.into()),
                Some(Ok(first)) => {
                    self.metrics.first_token.observe(started.elapsed().as_secs_f64());
                    return Ok(futures::stream::once(async { Ok(first) }).chain(events).boxed());
                }
                Some(Err(error)) if error.is_transient() && started.elapsed() < PATIENCE => tracing::warn!("{error}; asking again"),
                Some(Err(error)) => return Err(error.into()),
                None => return Err(ApiError::unavailable("The pool gave no answer.")),
            }
        }
    }

    async fn begin(&self, request: &GenerateRequest) -> Result<Events, ClientError> {
        let (mut endpoint, mut pushes) = (None, 0);
        loop {
            match self.client.generate(endpoint.as_ref(), request).await {
                Ok(events) => return Ok(events.boxed()),
                Err(error) => endpoint = self.give_head(error, &mut pushes).await?,
            }
        }
    }

    /// Logits of the classification head.
    pub(super) async fn classify(&self, request: &ClassifyRequest) -> Result<ClassifyResponse, ClientError> {
        let (mut endpoint, mut pushes) = (None, 0);
        loop {
            match self.client.classify(endpoint.as_ref(), request).await {
                Ok(answer) => return Ok(answer),
                Err(error) => endpoint = self.give_head(error, &mut pushes).await?,
            }
        }
    }

    /// Reminds every pod of the head, and gives it to those that lack it.
    pub(super) async fn renew(&self) -> Result<(), ClientError> {
        for endpoint in self.client.endpoints().await? {
            self.ensure(&endpoint).await?;
        }
        Ok(())
    }

    /// What to do about a pod that lacks the head: it gets it, and is the one to ask again. Other errors stay errors.
    async fn give_head(&self, error: ClientError, pushes: &mut usize) -> Result<Option<Endpoint>, ClientError> {
        match error {
            ClientError::HeadMissing { endpoint, .. } if *pushes < PUSHES => {
                *pushes += 1;
                match self.ensure(&endpoint).await {
                    Ok(()) => Ok(Some(endpoint)),
                    // The pod went away meanwhile: another may answer.
                    Err(error) if error.is_transient() => Ok(None),
                    Err(error) => Err(error),
                }
            }
            error => Err(error),
        }
    }

    async fn ensure(&self, endpoint: &Endpoint) -> Result<(), ClientError> {
        let _alone = self.pushing.lock().await;
        if self.client.has_head(endpoint, &self.artifact.digest).await? {
            return Ok(());
        }
        tracing::info!("pushing the head to {endpoint}");
        self.metrics.head_pushes.inc();
        self.client.put_head(endpoint, &self.artifact.digest, self.artifact.bytes.clone(), EXPIRY).await
    }
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
