//! The gateway's side of the pool: finds it, checks that it runs the heads' base, asks it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use carryon_crds::wire::{ModelDescription, digest};
use futures::{StreamExt as _, TryStreamExt as _};

use super::ServeError;
use super::error::ApiError;
use super::keeper::Keeper;
use super::metrics::Metrics;
use super::mixed::OtherPools;
use super::models::{Head, Models};
use crate::exchange::client::Events;
use crate::exchange::wire::{ClassifyRequest, ClassifyResponse, ErrorCode, GenerateEvent, GenerateRequest};
use crate::exchange::{ClientError, Endpoint, PoolClient};
use crate::text::{ChatTemplate, Tokenizer};

/// How long a request waits for a place in a full pool before its client is told to come back.
const BUSY_PATIENCE: Duration = Duration::from_secs(2);
/// Pause before asking a pool again that broke off before its first word.
const PAUSE: Duration = Duration::from_millis(100);
/// How often an answer that broke off is begun again.
const RESTARTS: usize = 5;
/// How long one step of the start waits before it says so and begins again.
pub(super) const START_PATIENCE: Duration = Duration::from_secs(10);
/// Answers of one request that are drawn at once where the pool does not say how many it serves: every pool has places for these.
const TOGETHER: u32 = 4;
/// How often a pod may lack a head in one request: it may be dropped between push and use, but not for ever.
const PUSHES: usize = 3;

/// Heads in a pool.
pub(super) struct Gateway {
    /// What the pool said of its model.
    pub(super) model: ModelDescription,
    /// The pool's tokenizer.
    pub(super) tokenizer: Arc<Tokenizer>,
    /// The base's chat template, if it has one.
    pub(super) template: Option<ChatTemplate>,
    /// Shared with the routes.
    pub(super) metrics: Metrics,
    /// Keeps the heads there.
    pub(super) keeper: Keeper,
    client: PoolClient,
    others: OtherPools,
    /// How long a request waits for a pool that restarts or is away.
    patience: Duration,
}

impl Gateway {
    /// Waits for the pool, verifies that it runs the base of every head, and has its pods take them.
    /// It speaks for `namespace`. `patience`: how long a request waits for a pool that is away.
    pub(super) async fn connect(
        models: Arc<Models>,
        (pool, other_pools): (&[String], &[String]),
        namespace: &str,
        patience: Duration,
        metrics: Metrics,
    ) -> Result<Self, ServeError> {
        let client = PoolClient::connect(pool, START_PATIENCE)?;
        let mut model = patiently(|| client.describe()).await?;
        for Head { name, artifact } in models.heads() {
            if let Some(member) = artifact.base.identity.difference(&model.identity) {
                let (head, trained_on) = (name.clone(), artifact.base.name.clone());
                return Err(ServeError::Identity { head, member, trained_on, pool: model.name });
            }
        }
        let client = client.bound_to(&model.identity, None);
        let json = patiently(|| client.tokenizer()).await?;
        if digest(&json) != model.identity.tokenizer {
            return Err(ServeError::Tokenizer);
        }
        let template = match &model.chat_template {
            Some(template) => {
                let (bos, eos) = (model.bos_token.as_deref(), model.eos_token.as_deref());
                Some(ChatTemplate::new(template, model.tool_use_template.as_deref(), bos, eos)?)
            }
            None => None,
        };
        let others = OtherPools::connect(other_pools, &models, namespace, BUSY_PATIENCE).await?;
        // A sequence is one of each base.
        model.limits.max_model_len = others.max_model_len().unwrap_or(u32::MAX).min(model.limits.max_model_len);
        let client = PoolClient::connect(pool, BUSY_PATIENCE)?.bound_to(&model.identity, None).speaking_for(namespace);
        let keeper = Keeper::new(client.clone(), models, metrics.clone());
        keeper.start().await?;
        let tokenizer = Arc::new(Tokenizer::from_json(&json)?);
        Ok(Self { model, tokenizer, template, metrics, keeper, client, others, patience })
    }

    /// Starts an answer and waits for its first event, so that everything that can fail before it still can be told as a
    /// refusal: a missing head is pushed, a pool that restarts is waited for.
    pub(super) async fn generate(&self, head: Option<&Head>, request: &GenerateRequest, admitted: &AtomicBool) -> Result<Events, ApiError> {
        let started = Instant::now();
        let mut attempts = self.attempts(head, Some(admitted));
        loop {
            let asked = self.ask(head, attempts.endpoint.as_ref(), request).await;
            let error = match asked {
                Ok(mut events) => match events.next().await {
                    Some(Ok(GenerateEvent::Error { error })) => return Err(error.into()),
                    Some(Ok(first)) => {
                        admitted.store(true, Ordering::Relaxed);
                        self.metrics.first_token.observe(started.elapsed().as_secs_f64());
                        return Ok(futures::stream::once(async { Ok(first) }).chain(events).boxed());
                    }
                    Some(Err(error)) => error,
                    None => return Err(ApiError::unavailable("The pool gave no answer.")),
                },
                Err(error) => error,
            };
            self.recover(error, &mut attempts).await?;
        }
    }

    /// Asks the first pool, and those beside it where the head reads their bases.
    async fn ask(&self, head: Option<&Head>, endpoint: Option<&Endpoint>, request: &GenerateRequest) -> Result<Events, ClientError> {
        match head {
            Some(head) => self.client.generate_with(&self.others.clients(), &head.artifact.shape, endpoint, request).await,
            None => Ok(self.client.generate(endpoint, request).await?.boxed()),
        }
    }

    /// Answers of one request that are drawn at once; the others wait here, where they take no place of somebody else's.
    pub(super) fn together(&self) -> usize {
        self.model.limits.max_num_seqs.unwrap_or(TOGETHER).max(1) as usize
    }

    /// What a head that pools a text puts out for each of `sequences`.
    pub(super) async fn classify(&self, head: &Head, sequences: Vec<Vec<u32>>) -> Result<ClassifyResponse, ApiError> {
        if !head.artifact.shape.others.is_empty() {
            let admitted = AtomicBool::new(false);
            let asked = sequences.into_iter().map(|sequence| self.score(head, sequence, &admitted));
            let scores = futures::stream::iter(asked).buffered(self.together()).try_collect().await?;
            return Ok(ClassifyResponse { scores });
        }
        let request = ClassifyRequest { sequences, head: head.artifact.digest.clone() };
        let mut attempts = self.attempts(Some(head), None);
        loop {
            match self.client.classify(attempts.endpoint.as_ref(), &request).await {
                Ok(answer) => return Ok(answer),
                Err(error) => self.recover(error, &mut attempts).await?,
            }
        }
    }

    /// The same of a head that reads several bases: each text is followed by all pools.
    async fn score(&self, head: &Head, text: Vec<u32>, admitted: &AtomicBool) -> Result<Vec<f32>, ApiError> {
        let request = GenerateRequest { head: Some(head.artifact.digest.clone()), alpha: Some(1.0), ..GenerateRequest::greedy(text, 0) };
        match self.generate(Some(head), &request, admitted).await?.next().await {
            Some(Ok(GenerateEvent::Scores { scores })) => Ok(scores),
            _ => Err(ApiError::unavailable("The pool gave no scores.")),
        }
    }

    /// Attempts of an answer that begins now, of a head or of the base alone; whether the pool has begun with another one of the same request.
    pub(super) fn attempts<'a>(&self, head: Option<&'a Head>, admitted: Option<&'a AtomicBool>) -> Attempts<'a> {
        Attempts { head, admitted, deadline: None, pushes: 0, restarts: 0, endpoint: None }
    }

    /// Does something about a failed attempt, if another may succeed: a pod that lacks the head gets it and is the one to ask
    /// again, a pool that is away is waited for.
    pub(super) async fn recover(&self, error: ClientError, attempts: &mut Attempts<'_>) -> Result<(), ClientError> {
        let error = match (error, attempts.head) {
            (ClientError::HeadMissing { endpoint, .. }, Some(head)) if attempts.pushes < PUSHES => {
                attempts.pushes += 1;
                match self.keeper.ensure(&endpoint, head).await {
                    Ok(()) => {
                        attempts.endpoint = Some(endpoint);
                        return Ok(());
                    }
                    Err(error) => error,
                }
            }
            (error, _) => error,
        };
        if is_busy(&error) && attempts.admitted.is_some_and(|admitted| admitted.load(Ordering::Relaxed)) {
            // A request is refused as a whole, or not at all.
            return Ok(());
        }
        let deadline = *attempts.deadline.get_or_insert_with(|| Instant::now() + self.patience);
        if !error.is_transient() || is_busy(&error) || Instant::now() >= deadline {
            return Err(error);
        }
        tracing::warn!("{error}; asking again");
        attempts.endpoint = None;
        tokio::time::sleep(PAUSE).await;
        Ok(())
    }
}

/// What a request has tried so far.
pub(super) struct Attempts<'a> {
    head: Option<&'a Head>,
    /// Set when the pool has begun with an answer of the same request.
    admitted: Option<&'a AtomicBool>,
    /// Until when a pool that is away is waited for; it counts from its first failure.
    deadline: Option<Instant>,
    pushes: usize,
    /// How often an answer that had begun broke off.
    restarts: usize,
    /// The pod to ask; the next in turn when absent.
    endpoint: Option<Endpoint>,
}

impl Attempts<'_> {
    /// The pool had begun with an answer: it was not away until now. False when that was often enough.
    pub(super) fn broke_off(&mut self) -> bool {
        self.deadline = None;
        self.restarts += 1;
        self.restarts <= RESTARTS
    }
}

fn is_busy(error: &ClientError) -> bool {
    matches!(error, ClientError::Refused { error, .. } if error.code == ErrorCode::Busy)
}

/// Waits for the pool without end: pods come when they come.
pub(super) async fn patiently<T, F: Future<Output = Result<T, ClientError>>>(ask: impl Fn() -> F) -> Result<T, ClientError> {
    loop {
        match ask().await {
            Err(error) if error.is_transient() => tracing::warn!("waiting for the pool: {error}"),
            answer => return answer,
        }
    }
}
