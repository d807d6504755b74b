//! A pool's hidden states through the cache.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use carryon_crds::wire::Limits;
use futures::StreamExt as _;
use futures::future::try_join_all;

use crate::exchange::cache::SampleKey;
use crate::exchange::cache::shared::{Claim, Turn};
use crate::exchange::requests::within;
use crate::exchange::wire::HiddenStatesRequest;
use crate::exchange::{CacheError, PoolClient, SequenceStates, StateCache};
use crate::train::data::{Sample, Samples};
use crate::train::error::TrainError;
use crate::train::pool::pool_error;
use crate::train::states::{HiddenStates, MicroBatch, PoolRows};

/// First and longest pause between two looks for states that another job has asked for.
const PAUSES: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));

/// Hidden states of a pool's base, each sequence asked for once as far as the cache's quota allows.
pub struct CachedPool {
    /// Bound to the base.
    pub client: PoolClient,
    /// Holds what was fetched; its key says what that is.
    pub cache: StateCache,
    /// How many of the taps that are fetched the head reads: behind them comes `final`, where the loss needs it.
    pub head_taps: usize,
    /// Bounds of one request.
    pub limits: Limits,
    /// Whether it was said that the cache takes no more.
    pub told_full: AtomicBool,
}

/// The states of one data set.
pub struct PoolStates {
    /// Where they come from: the first pool, whose `final` the loss is measured on, and those beside it.
    pub pools: Vec<Arc<CachedPool>>,
    /// The data set.
    pub samples: Arc<Samples>,
    /// Samples that are replayed; their indices are behind those of the groups.
    pub replay: Option<Arc<Samples>>,
}

impl HiddenStates for PoolStates {
    async fn fetch(&self, groups: Vec<usize>) -> Result<MicroBatch, TrainError> {
        let (samples, replay) = (self.samples.clone(), self.replay.clone());
        let count = samples.group_lengths().len();
        let own = groups.iter().filter(|group| **group < count).map(|group| samples.group(*group).len()).sum();
        let read = move || {
            let own =
                groups.iter().filter(|group| **group < count).flat_map(|group| samples.group(*group)).map(|index| samples.read(index));
            let others = groups.iter().filter_map(|group| group.checked_sub(count)).zip(replay.iter().cycle());
            own.chain(others.map(|(index, replay)| replay.read(index))).collect::<Result<Vec<Sample>, TrainError>>()
        };
        let samples = blocking(read).await??;
        let keys: Vec<SampleKey> = samples.iter().map(|sample| SampleKey::of(&sample.ids)).collect();
        let wanted = keys.iter().copied().zip(&samples).collect();
        let found = try_join_all(self.pools.iter().map(|pool| pool.states(&keys, &wanted))).await?;
        let pools = self.pools.clone();
        blocking(move || {
            let read = |(pool, found): (&Arc<CachedPool>, HashMap<SampleKey, SequenceStates>)| PoolRows {
                states: keys.iter().filter_map(|key| found.get(key).cloned()).collect(),
                head_taps: pool.head_taps,
                hidden_size: pool.cache.key().hidden_size,
            };
            let rows: Vec<PoolRows> = pools.iter().zip(found).map(read).collect();
            let samples: Vec<&Sample> = samples.iter().collect();
            MicroBatch::pack(&samples, own, &rows)
        })
        .await?
    }

    fn give_way(&self) -> bool {
        self.pools.iter().any(|pool| pool.cache.give_way())
    }
}

impl CachedPool {
    /// The states of `keys`, each once; `wanted` has a sample of each. What nobody else asks the pool for is asked for; then the others are waited for, while
    /// nothing is held that they could wait for.
    async fn states(
        self: &Arc<Self>,
        keys: &[SampleKey],
        wanted: &HashMap<SampleKey, &Sample>,
    ) -> Result<HashMap<SampleKey, SequenceStates>, TrainError> {
        let (mut found, mut once) = (HashMap::new(), HashSet::new());
        let mut missing: Vec<SampleKey> = keys.iter().copied().filter(|key| once.insert(*key)).collect();
        let (mut since, mut pause) = (Instant::now(), PAUSES.0);
        loop {
            let (pool, keys, waited) = (self.clone(), std::mem::take(&mut missing), since.elapsed());
            let looked = move || keys.into_iter().map(|key| (key, pool.cache.get_or_claim(&key, waited))).collect::<Vec<_>>();
            let mut ours = Vec::new();
            for (key, outcome) in blocking(looked).await? {
                match outcome {
                    Ok(states) => drop(found.insert(key, states)),
                    Err(Turn::Ours(claim)) => ours.push((key, claim)),
                    Err(Turn::Theirs) => missing.push(key),
                }
            }
            if !ours.is_empty() {
                let sequences = ours.iter().map(|(key, _)| wanted[key].ids.clone()).collect();
                found.extend(self.clone().ask(ours, sequences).await?);
                (since, pause) = (Instant::now(), PAUSES.0);
            } else if missing.is_empty() {
                return Ok(found);
            } else {
                tokio::time::sleep(pause).await;
                pause = (2 * pause).min(PAUSES.1);
            }
        }
    }

    /// Asks the pool, in requests within its limits, and keeps the answers: durable before they are used, and before their claims are given back.
    async fn ask(
        self: Arc<Self>,
        mut claims: Vec<(SampleKey, Claim)>,
        sequences: Vec<Vec<u32>>,
    ) -> Result<Vec<(SampleKey, SequenceStates)>, TrainError> {
        let (key, formats) = (self.cache.key(), self.cache.key().formats());
        let mut all = Vec::with_capacity(sequences.len());
        for sequences in within(sequences, &self.limits) {
            let count = sequences.len();
            let claims: Vec<(SampleKey, Claim)> = claims.drain(..count).collect();
            let request = HiddenStatesRequest { sequences, taps: key.taps.clone(), dtype: key.dtype };
            let mut stream = std::pin::pin!(self.client.hidden_states(request));
            let mut answers: Vec<Option<SequenceStates>> = vec![None; count];
            while let Some(answer) = stream.next().await {
                let answer = answer.map_err(pool_error)?;
                if answer.formats != formats {
                    return Err(TrainError::Configuration(
                        "the pool's version does not know hiddenStatesDtype: upgrade it, or leave that out".to_owned(),
                    ));
                }
                let place = answer.index;
                answers[place] = Some(answer);
            }
            let answers: Vec<SequenceStates> = answers.into_iter().flatten().collect();
            if answers.len() != count {
                return Err(TrainError::Pool(format!("{} of {count} sequences have no hidden states", count - answers.len())));
            }
            let pool = self.clone();
            all.extend(blocking(move || pool.keep(claims, answers)).await?);
        }
        Ok(all)
    }

    fn keep(&self, claims: Vec<(SampleKey, Claim)>, answers: Vec<SequenceStates>) -> Vec<(SampleKey, SequenceStates)> {
        let records: Vec<_> = claims.iter().map(|(key, _)| *key).zip(&answers).collect();
        if let Err(error) = self.cache.put_all(&records)
            && !self.told_full.swap(true, Ordering::Relaxed)
        {
            let outlook =
                if matches!(error, CacheError::Full { .. }) { "the rest is asked for in every epoch" } else { "going on without it" };
            tracing::warn!("{error}; {outlook}");
        }
        claims.into_iter().map(|(key, _)| key).zip(answers).collect()
    }
}

/// Runs file and number work beside the tasks that wait for the network.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, TrainError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| TrainError::Pool(format!("reading states panicked: {error}")))
}
