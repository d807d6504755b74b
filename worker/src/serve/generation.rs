//! One answer while it is generated.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::StreamExt as _;

use super::answer::{Answer, Piece};
use super::error::ApiError;
use super::gateway::Gateway;
use super::metrics::Metrics;
use super::models::Model;
use crate::exchange::ClientError;
use crate::exchange::client::Events;
use crate::exchange::wire::{ErrorCode, FinishReason, GenerateEvent, GenerateRequest, TokenLogprob, Usage, WireError};
use crate::text::Tokenizer;

/// What an answer consists of.
#[derive(Debug, PartialEq)]
pub(super) enum Step {
    /// Something to show.
    Piece(Piece),
    /// The answer is complete: OpenAI's `finish_reason`.
    End(&'static str),
}

/// Why an answer that had begun is not completed.
#[derive(Debug)]
pub(super) enum Broken {
    /// The connection, or what came over it.
    Pool(ClientError),
    /// The pool says why.
    Answer(WireError),
}

impl From<Broken> for ApiError {
    fn from(broken: Broken) -> Self {
        match broken {
            Broken::Pool(error) => error.into(),
            Broken::Answer(error) => error.into(),
        }
    }
}

/// An answer that has begun. Dropping it makes the pool stop.
pub(super) struct Generation {
    /// None once the answer is complete or was stopped.
    events: Option<Events>,
    answer: Answer<Arc<Tokenizer>>,
    ready: VecDeque<Step>,
    /// Log probabilities of the prompt, if asked for.
    pub(super) prompt: Vec<Option<TokenLogprob>>,
    /// Tokens so far.
    pub(super) usage: Usage,
    model: Arc<str>,
    metrics: Metrics,
}

impl Generation {
    /// Asks the pool and waits until it begins to answer. `prompt_tokens` is what the answer counts: a prompt with several counts once.
    pub(super) async fn start(
        gateway: &Gateway,
        model: &Model,
        request: &GenerateRequest,
        answer: Answer<Arc<Tokenizer>>,
        prompt_tokens: u32,
        admitted: &AtomicBool,
    ) -> Result<Self, ApiError> {
        let mut events = gateway.generate(model.head.as_deref(), request, admitted).await?;
        let usage = Usage { prompt_tokens, completion_tokens: 0 };
        let prompt = match request.prompt_logprobs {
            Some(_) => prompt_logprobs(&mut events).await?,
            None => Vec::new(),
        };
        let (model, metrics) = (model.name.clone(), gateway.metrics.clone());
        Ok(Self { events: Some(events), answer, ready: VecDeque::new(), prompt, usage, model, metrics })
    }

    /// The next step; none after the end.
    pub(super) async fn next(&mut self) -> Result<Option<Step>, Broken> {
        loop {
            if let Some(step) = self.ready.pop_front() {
                return Ok(Some(step));
            }
            let Some(events) = &mut self.events else { return Ok(None) };
            match events.next().await {
                Some(Ok(GenerateEvent::Token(token))) => {
                    self.usage.completion_tokens += 1;
                    let piece = self.answer.push(token);
                    self.show(piece);
                    if self.answer.stopped() {
                        self.end("stop");
                    }
                }
                Some(Ok(GenerateEvent::Finish { finish_reason, usage })) => {
                    self.usage.completion_tokens = usage.completion_tokens;
                    let piece = self.answer.finish();
                    self.show(piece);
                    self.end(if finish_reason == FinishReason::Length && !self.answer.stopped() { "length" } else { "stop" });
                }
                Some(Ok(GenerateEvent::Prompt { .. } | GenerateEvent::Scores { .. })) => return Err(Broken::Answer(unasked())),
                Some(Ok(GenerateEvent::Error { error })) => return Err(Broken::Answer(error)),
                Some(Err(error)) => return Err(Broken::Pool(error)),
                None => return Err(Broken::Answer(WireError::new(ErrorCode::Internal, "the answer has no end"))),
            }
        }
    }

    fn show(&mut self, piece: Piece) {
        if !piece.is_empty() {
            self.ready.push_back(Step::Piece(piece));
        }
    }

    fn end(&mut self, reason: &'static str) {
        self.events = None;
        self.ready.push_back(Step::End(reason));
    }
}

impl Drop for Generation {
    fn drop(&mut self) {
        self.metrics.count_tokens(&self.model, self.usage.prompt_tokens, self.usage.completion_tokens);
    }
}

async fn prompt_logprobs(events: &mut Events) -> Result<Vec<Option<TokenLogprob>>, ApiError> {
    match events.next().await {
        Some(Ok(GenerateEvent::Prompt { prompt_logprobs })) => Ok(prompt_logprobs),
        Some(Err(error)) => Err(error.into()),
        _ => Err(unasked().into()),
    }
}

fn unasked() -> WireError {
    WireError::new(ErrorCode::Internal, "log probabilities of the prompt come first if asked for, and only then")
}
