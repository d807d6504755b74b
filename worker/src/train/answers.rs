//! Answers to held-out prompts by a pod of the pool, with the head and without it.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use carryon_crds::wire::HeadShape;
use futures::StreamExt as _;

use crate::exchange::wire::{FinishReason, GenerateEvent, GenerateRequest};
use crate::exchange::{ClientError, Endpoint, Payload};
use crate::train::data::{Sample, Target};
use crate::train::error::TrainError;
use crate::train::pool::{Base, pool_error};

/// The pool may forget the head so soon after it was asked last: gateways push their own.
const EXPIRY: Duration = Duration::from_secs(600);

/// A pod that has the head.
pub struct Answers<'a> {
    /// Its base.
    pub base: &'a Base,
    endpoint: Endpoint,
    digest: &'a str,
    shape: &'a HeadShape,
}

/// What a pod answered.
pub struct Answer {
    /// Without what ends it.
    pub text: String,
    /// Whether it was cut at its longest.
    pub cut: bool,
}

impl<'a> Answers<'a> {
    /// Pushes a head of `shape`, whose file is at `weights`, to a pod that computes as the states of its training were computed, unless it holds it.
    ///
    /// # Errors
    /// None answers, or takes it.
    pub async fn by(base: &'a Base, shape: &'a HeadShape, digest: &'a str, weights: &Path) -> Result<Self, TrainError> {
        let pods = base.client.describe_each().await.map_err(pool_error)?;
        let alike = pods.into_iter().find(|(_, pod)| pod.numerics == base.description.numerics);
        let (endpoint, _) = alike.ok_or_else(|| TrainError::Pool("no pod computes as those that gave the hidden states".to_owned()))?;
        if !base.client.has_head(&endpoint, digest).await.map_err(pool_error)? {
            let head = Payload::file(weights).map_err(TrainError::file("read", weights))?;
            base.client.put_head(&endpoint, digest, head, EXPIRY).await.map_err(pool_error)?;
        }
        Ok(Self { base, endpoint, digest, shape })
    }

    /// The greedy answer to `prompt`, of `longest` tokens at most and of as many as the pool's longest sequence leaves room for.
    ///
    /// # Errors
    /// The pod does not answer.
    pub async fn answer(&self, prompt: &[u32], longest: u32, with_head: bool) -> Result<Answer, TrainError> {
        let Base { client, description, tokenizer, others, .. } = self.base;
        let longest = longest.min(description.limits.max_model_len.saturating_sub(prompt.len() as u32));
        let request = GenerateRequest {
            stop_token_ids: description.eos_token_ids.clone(),
            head: with_head.then(|| self.digest.to_owned()),
            ..GenerateRequest::greedy(prompt.to_vec(), longest)
        };
        let answered = async {
            let others: Vec<_> = others.iter().map(|other| &other.client).collect();
            let mut events = match with_head {
                true => client.generate_with(&others, self.shape, Some(&self.endpoint), &request).await?,
                false => client.generate(Some(&self.endpoint), &request).await?.boxed(),
            };
            let (mut ids, mut cut) = (Vec::new(), true);
            while let Some(event) = events.next().await {
                match event? {
                    GenerateEvent::Token(token) => ids.push(token.token),
                    GenerateEvent::Finish { finish_reason, .. } => cut = finish_reason == FinishReason::Length,
                    _ => {}
                }
            }
            Ok::<_, ClientError>(Answer { text: tokenizer.decode(&ids), cut })
        };
        answered.await.map_err(pool_error)
    }
}

/// Indices of `most` samples of so many at most, evenly spread.
pub fn spread(samples: usize, most: usize) -> impl Iterator<Item = usize> {
    let count = samples.min(most);
    (0..count).map(move |index| index * samples / count)
}

/// Prompt and answer of a sample: the answer is the last turn that is learned; plain text is continued from a quarter of its length.
pub fn asked(sample: &Sample) -> (&[u32], &[u32]) {
    let Range { start, end } = match &sample.target {
        Target::Tokens(ranges) if ranges.last().is_some_and(|last| last.start > 1) => ranges[ranges.len() - 1].clone(),
        _ => (sample.ids.len() / 4).max(1)..sample.ids.len(),
    };
    (&sample.ids[..start], &sample.ids[start..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_spread_over_the_file() {
        assert_eq!(spread(50, 3).collect::<Vec<_>>(), [0, 16, 33]);
        assert_eq!((spread(2, 3).count(), spread(0, 3).count()), (2, 0));
    }
}
