//! Requests for answers, and when their tokens came.

use std::pin::pin;
use std::time::Instant;

use carryon_worker::exchange::PoolClient;
use carryon_worker::exchange::wire::{GenerateEvent, GenerateRequest};
use futures::StreamExt as _;

use crate::Bench;

impl Bench {
    /// `length` tokens, others for every `seed`, nearly evenly spread over the vocabulary.
    pub fn tokens(&self, seed: u32, length: usize) -> Vec<u32> {
        let scatter = |place: u32| seed.wrapping_mul(0x9e37_79b9).wrapping_add(place).wrapping_mul(2_654_435_761) >> 8;
        (0..length as u32).map(|place| scatter(place) % self.model.vocab_size).collect()
    }
}

/// Greedy, with `head` or the base alone. No token ends it before `max_tokens`: answers that are compared are equally long.
pub fn request(prompt: Vec<u32>, max_tokens: u32, head: Option<&String>) -> GenerateRequest {
    GenerateRequest { head: head.cloned(), ..GenerateRequest::greedy(prompt, max_tokens) }
}

/// Reads a whole answer, and says when its tokens come.
pub async fn read(client: &PoolClient, request: &GenerateRequest, mut came: impl FnMut(Instant)) -> anyhow::Result<()> {
    let mut events = pin!(client.generate(None, request).await?);
    while let Some(event) = events.next().await {
        match event? {
            GenerateEvent::Token(_) => came(Instant::now()),
            GenerateEvent::Error { error } => return Err(error.into()),
            GenerateEvent::Prompt { .. } | GenerateEvent::Scores { .. } | GenerateEvent::Finish { .. } => {}
        }
    }
    Ok(())
}

/// When the tokens of an answer came.
pub async fn times(client: &PoolClient, request: &GenerateRequest) -> anyhow::Result<Vec<Instant>> {
    let mut times = Vec::new();
    read(client, request, |time| times.push(time)).await?;
    Ok(times)
}
