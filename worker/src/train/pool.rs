//! The pool as base of a run: its description, its words, and its hidden states through the cache.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use carryon_crds::common::Taps;
use carryon_crds::wire::{Limits, ModelDescription, Numerics};
use futures::StreamExt as _;

use crate::exchange::cache::SampleKey;
use crate::exchange::wire::{ErrorCode, HiddenStatesRequest};
use crate::exchange::{CacheError, ClientError, Endpoint, PoolClient, SequenceStates, StateCache};
use crate::text::{ChatTemplate, Tokenizer};
use crate::train::data::{Language, Sample, Samples};
use crate::train::error::TrainError;
use crate::train::states::{HiddenStates, MicroBatch};

/// How long a pool that does not answer is waited for: it restarts in place, loading included.
const PATIENCE: Duration = Duration::from_secs(600);

/// A pool's base model.
pub struct Base {
    /// Bound to the base's identity and numerics.
    pub client: PoolClient,
    /// What the pool says of it.
    pub description: ModelDescription,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its pods and what each says, those that answered at the start.
    pods: Vec<(Endpoint, ModelDescription)>,
    template: Option<ChatTemplate>,
}

impl Base {
    /// Waits for the pool and fetches description and tokenizer, for a job (`NAMESPACE/NAME`).
    ///
    /// # Errors
    /// The pool does not answer in time; tokenizer or template cannot be used.
    pub async fn connect(urls: &[String], job: &str) -> Result<Self, TrainError> {
        let client = PoolClient::connect(urls, PATIENCE).map_err(pool_error)?.asking_for(job);
        let first = client.describe().await.map_err(pool_error)?;
        let mut pods = client.describe_each().await.map_err(pool_error)?;
        pods.retain(|(_, pod)| pod.identity == first.identity);
        let description = most_alike(&pods).cloned().unwrap_or(first);
        let client = bound(client, &description, &pods);
        let tokenizer = client.tokenizer().await.map_err(pool_error)?;
        let found = carryon_crds::wire::digest(&tokenizer);
        if found != description.identity.tokenizer {
            return Err(TrainError::Pool(format!(
                "its tokenizer has digest {found}, its description says {}",
                description.identity.tokenizer
            )));
        }
        let tokenizer = Tokenizer::from_json(&tokenizer).map_err(|error| TrainError::Pool(error.to_string()))?;
        let (bos, eos) = (description.bos_token.as_deref(), description.eos_token.as_deref());
        let template = description
            .chat_template
            .as_ref()
            .map(|template| ChatTemplate::new(template, description.tool_use_template.as_deref(), bos, eos));
        // A pool of today has compiled it before it said that it is ready.
        let template = template.transpose().map_err(|error| TrainError::Configuration(format!("{}: {error}", description.name)))?;
        Ok(Self { client, description, tokenizer, pods, template })
    }

    /// Asks only pods that compute with `numerics` from now on; false where there is none.
    pub fn keep_to(&mut self, numerics: &Numerics) -> bool {
        let Some((_, pod)) = self.pods.iter().find(|(_, pod)| pod.numerics == *numerics) else { return false };
        self.client = bound(self.client.clone(), pod, &self.pods);
        self.description = pod.clone();
        true
    }

    /// Lets the chat template's clock stand at `time`, milliseconds of Unix time: samples are the same on any day.
    pub fn stand_still(&mut self, time: i64) {
        let now = jiff::Timestamp::from_millisecond(time).unwrap_or_default();
        self.template.iter_mut().for_each(|template| template.stand_still(now));
    }

    /// Its words.
    pub fn language(&self) -> Language<'_> {
        Language { tokenizer: &self.tokenizer, template: self.template.as_ref() }
    }

    /// The end-of-sequence token.
    pub fn eos_token_id(&self) -> Option<u32> {
        let named = self.description.eos_token.as_deref().and_then(|token| self.tokenizer.token_id(token));
        named.or(self.description.eos_token_ids.first().copied())
    }
}

/// Of the largest group of pods that compute alike, the first: a run is bound to how they compute, and has all of them.
fn most_alike(pods: &[(Endpoint, ModelDescription)]) -> Option<&ModelDescription> {
    let pods = || pods.iter().map(|(_, pod)| pod);
    pods().rev().max_by_key(|pod| pods().filter(|other| other.numerics == pod.numerics).count())
}

/// A client that asks only those of `pods` that compute as `description` says.
fn bound(client: PoolClient, description: &ModelDescription, pods: &[(Endpoint, ModelDescription)]) -> PoolClient {
    let client = client.bound_to(&description.identity, Some(&description.numerics));
    pods.iter().for_each(|(endpoint, pod)| client.note(endpoint, &pod.numerics));
    client
}

/// A client's failure, sorted by what can be done about it.
pub fn pool_error(error: ClientError) -> TrainError {
    match error {
        ClientError::Refused { error, .. } if error.code == ErrorCode::IdentityMismatch => {
            TrainError::IdentityChanged { member: error.message }
        }
        ClientError::Refused { ref error, .. } if matches!(error.code, ErrorCode::TooLarge | ErrorCode::InvalidRequest) => {
            TrainError::Configuration(format!("the pool refuses what this job asks for: {error}"))
        }
        ClientError::Address { .. } => TrainError::Configuration(error.to_string()),
        error => TrainError::Pool(error.to_string()),
    }
}

/// Hidden states of a pool's base, each sequence asked for once as far as the cache's quota allows.
pub struct CachedPool {
    /// Bound to the base.
    pub client: PoolClient,
    /// Holds what was fetched.
    pub cache: StateCache,
    /// What is fetched: the head's taps, and `final` behind them where the loss needs it.
    pub taps: Taps,
    /// How many of them the head reads.
    pub head_taps: usize,
    /// Width D.
    pub hidden_size: usize,
    /// Bounds of one request.
    pub limits: Limits,
    /// Whether it was said that the cache takes no more.
    pub told_full: AtomicBool,
}

/// The states of one data set.
pub struct PoolStates {
    /// Where they come from.
    pub pool: Arc<CachedPool>,
    /// The data set.
    pub samples: Arc<Samples>,
}

impl HiddenStates for PoolStates {
    async fn fetch(&self, indices: Vec<usize>) -> Result<MicroBatch, TrainError> {
        let (pool, samples) = (self.pool.clone(), self.samples.clone());
        let (mut states, samples) = blocking(move || {
            let samples = indices.iter().map(|&index| samples.read(index)).collect::<Result<Vec<_>, _>>()?;
            let states: Vec<_> = samples.iter().map(|sample| pool.cached(sample)).collect();
            Ok::<_, TrainError>((states, samples))
        })
        .await??;
        let missing: Vec<usize> = (0..samples.len()).filter(|&place| states[place].is_none()).collect();
        if !missing.is_empty() {
            let sequences = missing.iter().map(|&place| samples[place].ids.clone()).collect();
            for (place, fetched) in missing.into_iter().zip(self.pool.clone().ask(sequences).await?) {
                states[place] = Some(fetched);
            }
        }
        let pool = self.pool.clone();
        blocking(move || {
            let samples: Vec<&Sample> = samples.iter().collect();
            let states: Vec<SequenceStates> = states.into_iter().flatten().collect();
            MicroBatch::pack(&samples, &states, pool.head_taps, pool.hidden_size)
        })
        .await?
    }

    fn give_way(&self) -> bool {
        self.pool.cache.give_way()
    }
}

impl CachedPool {
    /// States held in the cache; a damaged record is named and fetched again.
    fn cached(&self, sample: &Sample) -> Option<SequenceStates> {
        self.cache.get(&SampleKey::of(&sample.ids)).unwrap_or_else(|error| {
            tracing::warn!("{error}; asking the pool again");
            None
        })
    }

    /// Asks the pool, in requests within its limits, and keeps the answers: durable before they are used.
    async fn ask(self: Arc<Self>, sequences: Vec<Vec<u32>>) -> Result<Vec<SequenceStates>, TrainError> {
        let mut all = Vec::with_capacity(sequences.len());
        for sequences in split(sequences, &self.limits) {
            let keys: Vec<SampleKey> = sequences.iter().map(|ids| SampleKey::of(ids)).collect();
            let count = sequences.len();
            let mut stream = std::pin::pin!(self.client.hidden_states(HiddenStatesRequest { sequences, taps: self.taps.clone() }));
            let mut answers: Vec<Option<SequenceStates>> = vec![None; count];
            while let Some(answer) = stream.next().await {
                let answer = answer.map_err(pool_error)?;
                let place = answer.index;
                answers[place] = Some(answer);
            }
            let answers: Vec<SequenceStates> = answers.into_iter().flatten().collect();
            if answers.len() != count {
                return Err(TrainError::Pool(format!("{} of {count} sequences have no hidden states", count - answers.len())));
            }
            let pool = self.clone();
            all.extend(blocking(move || pool.keep(&keys, answers)).await?);
        }
        Ok(all)
    }

    fn keep(&self, keys: &[SampleKey], answers: Vec<SequenceStates>) -> Vec<SequenceStates> {
        let records: Vec<_> = keys.iter().copied().zip(&answers).collect();
        if let Err(error) = self.cache.put_all(&records)
            && !self.told_full.swap(true, Ordering::Relaxed)
        {
            let outlook =
                if matches!(error, CacheError::Full { .. }) { "the rest is asked for in every epoch" } else { "going on without it" };
            tracing::warn!("{error}; {outlook}");
        }
        answers
    }
}

/// Sequences in requests that a pool accepts; one that is too long alone is left to the pool to refuse.
fn split(sequences: Vec<Vec<u32>>, limits: &Limits) -> Vec<Vec<Vec<u32>>> {
    let mut requests: Vec<Vec<Vec<u32>>> = Vec::new();
    let mut tokens = 0;
    for sequence in sequences {
        let full = tokens + sequence.len() > limits.max_request_tokens as usize;
        match requests.last_mut() {
            Some(request) if !full && request.len() < limits.max_sequences as usize => {
                tokens += sequence.len();
                request.push(sequence);
            }
            _ => {
                tokens = sequence.len();
                requests.push(vec![sequence]);
            }
        }
    }
    requests
}

/// Runs file and number work beside the tasks that wait for the network.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, TrainError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| TrainError::Pool(format!("reading states panicked: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_stay_within_the_pool_s_limits() {
        let limits = Limits {
            max_model_len: 100,
            max_sequences: 3,
            max_request_tokens: 10,
            max_body_bytes: 1,
            max_num_seqs: None,
            max_head_bytes: None,
        };
        let lengths = |lengths: &[usize]| -> Vec<Vec<usize>> {
            let sequences = lengths.iter().map(|&length| vec![0; length]).collect();
            split(sequences, &limits).iter().map(|request| request.iter().map(Vec::len).collect()).collect()
        };
        assert_eq!(lengths(&[4, 6, 1, 1, 1, 1, 12, 2]), [vec![4, 6], vec![1, 1, 1], vec![1], vec![12], vec![2]]);
    }
}
