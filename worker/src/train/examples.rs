//! The same held-out prompts with and without the head, for the report: answered by the pool that would serve them.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use carryon_crds::wire::ModelDescription;
use futures::StreamExt as _;

use crate::exchange::wire::{FinishReason, GenerateEvent, GenerateRequest};
use crate::exchange::{ClientError, Endpoint, Payload, PoolClient};
use crate::text::Tokenizer;
use crate::train::data::{Sample, Samples, Target};
use crate::train::error::TrainError;
use crate::train::pool::{Base, pool_error};
use crate::train::report::Example;

/// Prompts shown.
const EXAMPLES: usize = 3;
/// Longest answer, tokens.
const LONGEST: u32 = 160;
/// The pool may forget the head soon: gateways push their own.
const EXPIRY: Duration = Duration::from_secs(600);

/// Pushes the head, whose file is at `weights`, to a pod that answers, and asks it for greedy answers to some prompts of `samples`.
///
/// # Errors
/// The pool does not answer.
pub async fn compare(base: &Base, digest: &str, weights: &Path, samples: &Samples) -> Result<Vec<Example>, TrainError> {
    let client = &base.client;
    let pods = client.describe_each().await.map_err(pool_error)?;
    let alike = pods.iter().find(|(_, pod)| pod.numerics == base.description.numerics);
    let Some((endpoint, _)) = alike else { return Ok(Vec::new()) };
    let head = Payload::file(weights).map_err(TrainError::file("read", weights))?;
    client.put_head(endpoint, digest, head, EXPIRY).await.map_err(pool_error)?;
    let answer = async |prompt: &[u32], longest: u32, head: Option<String>| {
        let request = GenerateRequest {
            stop_token_ids: base.description.eos_token_ids.clone(),
            head,
            ..GenerateRequest::greedy(prompt.to_vec(), longest)
        };
        let (ids, cut) = generate(client, endpoint, &request).await?;
        let text = base.tokenizer.decode(&ids);
        Ok::<_, ClientError>(if cut { text + " …" } else { text })
    };
    let chosen = choose(samples.len()).map(|index| samples.read(index)).collect::<Result<Vec<_>, _>>()?;
    let examples = chosen.iter().map(async |sample| {
        let answered = answered(sample);
        let (prompt, expected) = (&sample.ids[..answered.start], &sample.ids[answered.clone()]);
        let longest = LONGEST.min(base.description.limits.max_model_len.saturating_sub(answered.start as u32));
        let (without, with) = futures::try_join!(answer(prompt, longest, None), answer(prompt, longest, Some(digest.to_owned())))?;
        Ok(Example {
            prompt: visible(&base.tokenizer, &base.description, prompt),
            expected: base.tokenizer.decode(expected),
            base: without,
            head: with,
        })
    });
    futures::future::try_join_all(examples).await.map_err(pool_error)
}

/// The answer, and whether it was cut at its longest.
async fn generate(client: &PoolClient, endpoint: &Endpoint, request: &GenerateRequest) -> Result<(Vec<u32>, bool), ClientError> {
    let mut events = std::pin::pin!(client.generate(Some(endpoint), request).await?);
    let (mut ids, mut cut) = (Vec::new(), true);
    while let Some(event) = events.next().await {
        match event? {
            GenerateEvent::Token(token) => ids.push(token.token),
            GenerateEvent::Finish { finish_reason, .. } => cut = finish_reason == FinishReason::Length,
            _ => {}
        }
    }
    Ok((ids, cut))
}

/// Some samples, evenly spread over the file.
fn choose(samples: usize) -> impl Iterator<Item = usize> {
    let count = samples.min(EXAMPLES);
    (0..count).map(move |index| index * samples / count)
}

/// Where the answer is: the last turn that is learned; plain text is continued from a quarter of its length.
fn answered(sample: &Sample) -> Range<usize> {
    match &sample.target {
        Target::Tokens(ranges) if ranges.last().is_some_and(|last| last.start > 1) => ranges[ranges.len() - 1].clone(),
        _ => (sample.ids.len() / 4).max(1)..sample.ids.len(),
    }
}

/// The prompt as a person reads it: without the template's words before the last turn of the user where they can be told apart.
fn visible(tokenizer: &Tokenizer, base: &ModelDescription, prompt: &[u32]) -> String {
    let turns: Vec<&[u32]> = prompt.split(|id| base.eos_token_ids.contains(id)).collect();
    let text = match turns.as_slice() {
        [.., user, _] => tokenizer.decode(user),
        _ => tokenizer.decode(prompt),
    };
    let text = text.trim();
    text.strip_prefix("user\n").unwrap_or(text).to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_are_spread_over_the_file() {
        assert_eq!(choose(50).collect::<Vec<_>>(), [0, 16, 33]);
        assert_eq!((choose(2).count(), choose(0).count()), (2, 0));
    }
}
