//! Answers in OpenAI's shapes, whole or as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use serde_json::{Value, json};

use super::answer::Piece;
use super::error::ApiError;
use super::gateway::Gateway;
use super::generation::{Broken, Generation, Step};
use super::request::Common;
use crate::exchange::wire::{GenerateRequest, TokenLogprob, Usage};

/// How chat and plain completions differ.
pub(super) trait Shape: Send + 'static {
    /// Beginning of the answer's id.
    const ID: &'static str;
    /// `object` of a whole answer.
    const WHOLE: &'static str;
    /// `object` of a piece of a stream.
    const CHUNK: &'static str;
    /// What comes before the first generated piece of a stream, if anything.
    fn opening(&mut self, prompt: &[Option<TokenLogprob>]) -> Option<Value>;
    /// The choice of a piece of a stream.
    fn piece(&self, piece: &Piece) -> Value;
    /// The choice that ends a stream.
    fn ending(&self, finish_reason: &str) -> Value;
    /// The choice of a whole answer.
    fn whole(&self, prompt: &[Option<TokenLogprob>], piece: Piece, finish_reason: &str) -> Value;
}

/// A completion that is ready to be asked for.
pub(super) struct Completion<S> {
    /// What the client said of model, stops and streaming.
    pub(super) common: Common,
    /// What the pool is asked.
    pub(super) request: GenerateRequest,
    /// How the answer looks.
    pub(super) shape: S,
}

impl<S: Shape> Completion<S> {
    /// Asks the pool and answers.
    pub(super) async fn answer(self, gateway: &Gateway) -> Result<Response, ApiError> {
        let envelope = Envelope::new::<S>(gateway, &self.common);
        match self.common.stream {
            true => self.stream(gateway, envelope).await,
            false => self.whole(gateway, &envelope).await,
        }
    }

    /// Nothing was said to the client before the end, so an answer that breaks off is begun again.
    async fn whole(self, gateway: &Gateway, envelope: &Envelope) -> Result<Response, ApiError> {
        let mut attempts = gateway.attempts();
        loop {
            let mut generation = Generation::start(gateway, &self.request, self.common.stops.clone()).await?;
            match collect(&mut generation).await {
                Ok((piece, reason)) => {
                    let choice = self.shape.whole(&generation.prompt, piece, reason);
                    let mut body = envelope.around(S::WHOLE, json!([choice]));
                    body["usage"] = usage(generation.usage);
                    return Ok(Json(body).into_response());
                }
                Err(Broken::Pool(error)) => gateway.recover(error, &mut attempts).await?,
                Err(Broken::Answer(error)) => return Err(error.into()),
            }
        }
    }

    async fn stream(mut self, gateway: &Gateway, envelope: Envelope) -> Result<Response, ApiError> {
        let generation = Generation::start(gateway, &self.request, self.common.stops.clone()).await?;
        let opening = self.shape.opening(&generation.prompt);
        let include_usage = self.common.include_usage;
        let mut chunks = Chunks { generation, shape: self.shape, envelope, include_usage, ready: VecDeque::new(), ended: false };
        chunks.ready.extend(opening.map(|choice| chunks.chunk(choice)));
        let events = futures::stream::unfold(chunks, async |mut chunks| Some((Ok::<_, Infallible>(chunks.next().await?), chunks)));
        Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
    }
}

async fn collect(generation: &mut Generation) -> Result<(Piece, &'static str), Broken> {
    let (mut whole, mut reason) = (Piece::default(), "stop");
    while let Some(step) = generation.next().await? {
        match step {
            Step::Piece(piece) => whole.append(piece),
            Step::End(end) => reason = end,
        }
    }
    Ok((whole, reason))
}

/// A stream that is being sent. Dropped when the client goes away, and with it the pool's work.
struct Chunks<S> {
    generation: Generation,
    shape: S,
    envelope: Envelope,
    include_usage: bool,
    ready: VecDeque<Event>,
    ended: bool,
}

impl<S: Shape> Chunks<S> {
    async fn next(&mut self) -> Option<Event> {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return Some(event);
            }
            if self.ended {
                return None;
            }
            match self.generation.next().await {
                Ok(Some(Step::Piece(piece))) => return Some(self.chunk(self.shape.piece(&piece))),
                Ok(Some(Step::End(reason))) => self.end(reason),
                Ok(None) => self.ended = true,
                Err(broken) => {
                    self.ended = true;
                    return Some(event(&ApiError::from(broken).body()));
                }
            }
        }
    }

    fn end(&mut self, reason: &str) {
        self.ended = true;
        self.ready.push_back(self.chunk(self.shape.ending(reason)));
        if self.include_usage {
            let mut last = self.envelope.around(S::CHUNK, json!([]));
            last["usage"] = usage(self.generation.usage);
            self.ready.push_back(event(&last));
        }
        self.ready.push_back(Event::default().data("[DONE]"));
    }

    fn chunk(&self, choice: Value) -> Event {
        let mut body = self.envelope.around(S::CHUNK, json!([choice]));
        if self.include_usage {
            body["usage"] = Value::Null;
        }
        event(&body)
    }
}

fn event(body: &Value) -> Event {
    Event::default().data(body.to_string())
}

fn usage(usage: Usage) -> Value {
    let Usage { prompt_tokens, completion_tokens } = usage;
    json!({"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": prompt_tokens + completion_tokens})
}

/// What all pieces of an answer say of it.
struct Envelope {
    id: String,
    created: u64,
    model: Arc<str>,
    fingerprint: String,
}

impl Envelope {
    fn new<S: Shape>(gateway: &Gateway, common: &Common) -> Self {
        // Whose weights answer: the head's digest, or the base's.
        let digest = common.head.as_deref().unwrap_or(&gateway.model.identity.weights);
        let hex = digest.rsplit(':').next().unwrap_or_default();
        Self {
            id: format!("{}-{:032x}", S::ID, rand::random::<u128>()),
            created: now(),
            model: common.model.as_str().into(),
            fingerprint: format!("fp_{}", hex.get(..12).unwrap_or(hex)),
        }
    }

    fn around(&self, object: &str, choices: Value) -> Value {
        json!({
            "id": self.id, "object": object, "created": self.created, "model": &*self.model,
            "system_fingerprint": self.fingerprint, "choices": choices,
        })
    }
}

/// Seconds since 1970.
pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs())
}

/// A single-precision number with as many digits as it has.
pub(super) fn short(number: f32) -> Value {
    number.to_string().parse::<f64>().map_or(Value::Null, Value::from)
}
