//! Answers in OpenAI's shapes, whole or as server-sent events.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures::stream::{self, BoxStream, StreamExt as _, TryStreamExt as _};
use serde_json::{Value, json};

use super::answer::Piece;
use super::choice::{Choice, Part};
use super::error::ApiError;
use super::gateway::Gateway;
use super::request::{Common, MAX_CHOICES};
use crate::exchange::wire::{GenerateRequest, TokenLogprob, Usage};

/// Most log probabilities that several answers may report together; a single answer is bounded by the model's context.
const MAX_SCORED: usize = 1 << 20;

/// Most log probabilities of a prompt: they come from the pool in one line, with at most 56 bytes for each, and a line has at most 32 MiB.
const MAX_PROMPT_SCORED: usize = 1 << 19;

/// How chat and plain completions differ. A choice gets its index later.
pub(super) trait Shape: Clone + Send + Sync + 'static {
    /// Beginning of the answer's id.
    const ID: &'static str;
    /// `object` of a whole answer.
    const WHOLE: &'static str;
    /// `object` of a piece of a stream.
    const CHUNK: &'static str;
    /// Tokens that end the answer and are told of: the pool does not stop before them.
    fn ends(&self) -> &[u32] {
        &[]
    }
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
    common: Common,
    /// What the pool is asked of each prompt, and how its answers look.
    prompts: Vec<(GenerateRequest, S)>,
}

impl<S: Shape> Completion<S> {
    /// `n` answers to each prompt, within bounds.
    pub(super) fn new(common: Common, prompts: Vec<(GenerateRequest, S)>) -> Result<Self, ApiError> {
        let requests: Vec<&GenerateRequest> = prompts.iter().map(|(request, _)| request).collect();
        bounded(&requests, common.n)?;
        Ok(Self { common, prompts })
    }

    /// Asks the pool and answers.
    pub(super) async fn answer(self, gateway: &Arc<Gateway>) -> Result<Response, ApiError> {
        let envelope = Envelope::new::<S>(gateway, &self.common);
        match self.common.stream {
            true => self.stream(gateway, envelope).await,
            false => self.whole(gateway, &envelope).await,
        }
    }

    async fn whole(self, gateway: &Gateway, envelope: &Envelope) -> Result<Response, ApiError> {
        let asked: Vec<_> = self.choices().map(|choice| choice.whole(gateway)).collect();
        let mut answers: Vec<_> = stream::iter(asked).buffer_unordered(gateway.together()).try_collect().await?;
        answers.sort_unstable_by_key(|(index, _, _)| *index);
        let mut total = Usage::default();
        answers.iter().for_each(|(_, _, usage)| add(&mut total, *usage));
        let choices = answers.into_iter().map(|(_, choice, _)| choice).collect();
        let mut body = envelope.around(S::WHOLE, choices);
        body["usage"] = usage(total);
        Ok(Json(body).into_response())
    }

    async fn stream(self, gateway: &Arc<Gateway>, envelope: Envelope) -> Result<Response, ApiError> {
        let include_usage = self.common.include_usage;
        let mut choices = self.choices();
        // What fails before the first answer begins is a refusal.
        let first = match choices.next() {
            Some(first) => first.begin(gateway).await?,
            None => stream::empty().boxed(),
        };
        let (together, gateway) = (gateway.together(), gateway.clone());
        let others = choices.map(move |choice| {
            let gateway = gateway.clone();
            stream::once(async move { choice.begin(&gateway).await }).try_flatten().boxed()
        });
        let parts = stream::iter(std::iter::once(first).chain(others)).flatten_unordered(together).boxed();
        let chunks = Chunks { parts, object: S::CHUNK, envelope, include_usage, usage: Usage::default(), last: None };
        let events = stream::unfold(chunks, async |mut chunks| Some((Ok::<_, Infallible>(chunks.next().await?), chunks)));
        Ok(Sse::new(events).keep_alive(KeepAlive::default()).into_response())
    }

    /// Every answer to every prompt. As in vLLM, those of one prompt have its seed and the ones after it, so that they differ, and a prompt
    /// is answered as if it had come alone.
    fn choices(self) -> impl Iterator<Item = Choice<S>> + Send {
        let Self { common: Common { model, n, stops, .. }, prompts } = self;
        let admitted = Arc::<AtomicBool>::default();
        prompts.into_iter().enumerate().flat_map(move |(prompt, (request, shape))| {
            let (model, stops, admitted) = (model.clone(), stops.clone(), admitted.clone());
            (0..n).map(move |choice| {
                let mut request = request.clone();
                request.seed = request.seed.map(|seed| seed.wrapping_add(choice as u64));
                let prompt_tokens = if choice == 0 { request.prompt.len() as u32 } else { 0 };
                let (model, shape, stops, admitted) = (model.clone(), shape.clone(), stops.clone(), admitted.clone());
                Choice { index: prompt * n + choice, model, request, shape, stops, prompt_tokens, admitted }
            })
        })
    }
}

/// Refuses more answers, or more log probabilities, than a gateway keeps at once.
fn bounded(prompts: &[&GenerateRequest], n: usize) -> Result<(), ApiError> {
    let choices = prompts.len() * n;
    if choices > MAX_CHOICES {
        let message = format!("{} prompts with n = {n} are {choices} answers, more than {MAX_CHOICES}.", prompts.len());
        return Err(ApiError::parameter("n", message));
    }
    let refused = |scored, most| {
        let message = format!("{scored} log probabilities exceed {most}: ask for fewer answers, tokens or alternatives.");
        Err(ApiError::parameter("logprobs", message))
    };
    let longest = prompts.iter().map(|request| scored_prompt(request)).max().unwrap_or(0);
    let scored = prompts.iter().map(|request| scored(request)).sum::<usize>() * n;
    match () {
        () if longest > MAX_PROMPT_SCORED => refused(longest, MAX_PROMPT_SCORED),
        () if choices > 1 && scored > MAX_SCORED => refused(scored, MAX_SCORED),
        () => Ok(()),
    }
}

/// Log probabilities that an answer may have to report.
fn scored(request: &GenerateRequest) -> usize {
    each(request.logprobs, request.max_tokens as usize) + scored_prompt(request)
}

fn scored_prompt(request: &GenerateRequest) -> usize {
    each(request.prompt_logprobs, request.prompt.len())
}

fn each(logprobs: Option<u32>, tokens: usize) -> usize {
    logprobs.map_or(0, |top| tokens * (1 + top as usize))
}

/// A stream that is being sent. Dropped when the client goes away, and with it the pool's work.
struct Chunks {
    parts: BoxStream<'static, Result<Part, ApiError>>,
    object: &'static str,
    envelope: Envelope,
    include_usage: bool,
    usage: Usage,
    /// What comes after the answers' parts, once they have ended.
    last: Option<VecDeque<Event>>,
}

impl Chunks {
    async fn next(&mut self) -> Option<Event> {
        if let Some(last) = &mut self.last {
            return last.pop_front();
        }
        match self.parts.next().await {
            Some(Ok((choice, usage))) => {
                add(&mut self.usage, usage.unwrap_or_default());
                Some(self.chunk(choice))
            }
            Some(Err(error)) => {
                self.last = Some(VecDeque::new());
                Some(event(&error.body()))
            }
            None => {
                let usage = self.include_usage.then(|| {
                    let mut last = self.envelope.around(self.object, Vec::new());
                    last["usage"] = usage(self.usage);
                    event(&last)
                });
                self.last.insert(usage.into_iter().chain([Event::default().data("[DONE]")]).collect()).pop_front()
            }
        }
    }

    fn chunk(&self, choice: Value) -> Event {
        let mut body = self.envelope.around(self.object, vec![choice]);
        if self.include_usage {
            body["usage"] = Value::Null;
        }
        event(&body)
    }
}

fn event(body: &Value) -> Event {
    Event::default().data(body.to_string())
}

fn add(total: &mut Usage, usage: Usage) {
    total.prompt_tokens += usage.prompt_tokens;
    total.completion_tokens += usage.completion_tokens;
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
        let digest = common.model.digest().unwrap_or(&gateway.model.identity.weights);
        let hex = digest.rsplit(':').next().unwrap_or_default();
        Self {
            id: format!("{}-{:032x}", S::ID, rand::random::<u128>()),
            created: now(),
            model: common.model.name.clone(),
            fingerprint: format!("fp_{}", hex.get(..12).unwrap_or(hex)),
        }
    }

    fn around(&self, object: &str, choices: Vec<Value>) -> Value {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_and_their_log_probabilities_are_bounded_together() {
        let asked = |tokens, logprobs| GenerateRequest { logprobs, ..GenerateRequest::greedy(vec![1; 10], tokens) };
        let prompt = |tokens, top| GenerateRequest { prompt_logprobs: Some(top), ..GenerateRequest::greedy(vec![1; tokens], 0) };
        let echoed = GenerateRequest { prompt_logprobs: Some(20), ..asked(0, None) };
        for (request, prompts, n, refused) in [
            (asked(4096, None), 1, 128, None),
            (asked(4096, None), 2, 64, None),
            (asked(1, None), 2, 65, Some("n")),
            (asked(4096, Some(20)), 1, 12, None),
            (asked(4096, Some(20)), 1, 13, Some("logprobs")),
            (asked(4096, Some(20)), 13, 1, Some("logprobs")),
            // One answer is as long as the model's context lets it be.
            (asked(1 << 20, Some(20)), 1, 1, None),
            (echoed, 128, 1, None),
            // A prompt's come in one line.
            (prompt(1 << 19, 0), 1, 1, None),
            (prompt((1 << 19) + 1, 0), 1, 1, Some("logprobs")),
            (prompt(1 << 15, 20), 1, 1, Some("logprobs")),
        ] {
            let error = bounded(&vec![&request; prompts], n).err().map(|error| error.body()["error"]["param"].clone());
            assert_eq!(error, refused.map(Value::from), "{prompts} {n} {:?}", request.logprobs);
        }
    }
}
