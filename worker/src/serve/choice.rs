//! One of the answers that a request asks for.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use futures::stream::{self, BoxStream, StreamExt as _, try_unfold};
use serde_json::Value;

use super::answer::{Answer, Piece};
use super::error::ApiError;
use super::gateway::Gateway;
use super::generation::{Broken, Generation, Step};
use super::models::Model;
use super::respond::Shape;
use crate::exchange::wire::{GenerateRequest, Usage};

/// An answer that nobody has asked the pool for yet.
pub(super) struct Choice<S> {
    /// Its place among the request's answers.
    pub(super) index: usize,
    /// Whose it is.
    pub(super) model: Model,
    /// What the pool is asked.
    pub(super) request: GenerateRequest,
    /// How it looks.
    pub(super) shape: S,
    /// Strings that end it.
    pub(super) stops: Vec<String>,
    /// Tokens of the prompt, counted by the prompt's first answer.
    pub(super) prompt_tokens: u32,
    /// Whether the pool has begun with an answer of the same request: the others wait for their turn.
    pub(super) admitted: Arc<AtomicBool>,
}

/// A part of a streamed answer: the choice to show, and with the last one what the answer took.
pub(super) type Part = (Value, Option<Usage>);

impl<S: Shape> Choice<S> {
    /// The whole answer. Nothing was said to the client before its end, so one that breaks off is begun again.
    pub(super) async fn whole(self, gateway: &Gateway) -> Result<(usize, Value, Usage), ApiError> {
        let mut attempts = gateway.attempts(self.model.head.as_deref(), Some(&self.admitted));
        loop {
            let mut generation = self.generate(gateway).await?;
            match collect(&mut generation).await {
                Ok((piece, reason)) => {
                    let choice = self.shape.whole(&generation.prompt, piece, reason);
                    return Ok((self.index, self.numbered(choice), generation.usage));
                }
                Err(Broken::Pool(error)) if attempts.broke_off() => gateway.recover(error, &mut attempts).await?,
                Err(Broken::Pool(error)) => return Err(error.into()),
                Err(Broken::Answer(error)) => return Err(error.into()),
            }
        }
    }

    /// The answer in parts, once the pool has begun with it.
    pub(super) async fn begin(mut self, gateway: &Gateway) -> Result<BoxStream<'static, Result<Part, ApiError>>, ApiError> {
        let generation = self.generate(gateway).await?;
        let opening = self.shape.opening(&generation.prompt).map(|choice| Ok((self.numbered(choice), None)));
        let parts = try_unfold((self, generation), async |(choice, mut generation)| {
            let part = match generation.next().await? {
                Some(Step::Piece(piece)) => (choice.numbered(choice.shape.piece(&piece)), None),
                Some(Step::End(reason)) => (choice.numbered(choice.shape.ending(reason)), Some(generation.usage)),
                None => return Ok(None),
            };
            Ok(Some((part, (choice, generation))))
        });
        Ok(stream::iter(opening).chain(parts).boxed())
    }

    async fn generate(&self, gateway: &Gateway) -> Result<Generation, ApiError> {
        let answer = Answer::new(gateway.tokenizer.clone(), self.stops.clone(), self.shape.ends().to_vec());
        Generation::start(gateway, &self.model, &self.request, answer, self.prompt_tokens, &self.admitted).await
    }

    fn numbered(&self, mut choice: Value) -> Value {
        choice["index"] = self.index.into();
        choice
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
