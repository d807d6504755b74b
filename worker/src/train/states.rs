//! Hidden states as the loop sees them: a source that can be asked ahead of time, and micro-batches ready for the head.

use std::collections::VecDeque;
use std::future::Future;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::memory::{AHEAD, Trainer};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use crate::exchange::SequenceStates;
use crate::head::pass::PackedBatch;
use crate::numbers::{RowFormat, number_bytes};
use crate::train::data::{Sample, Target};
use crate::train::error::TrainError;
use crate::train::stop::Stop;

/// Where hidden states come from.
pub trait HiddenStates: Send + Sync + 'static {
    /// The states of the samples (or groups of samples) with these indices, in their order, packed.
    fn fetch(&self, samples: Vec<usize>) -> impl Future<Output = Result<MicroBatch, TrainError>> + Send;

    /// Gives back the room on disk that states take, for what must be written; false when they take none.
    fn give_way(&self) -> bool {
        false
    }
}

/// Some samples, without padding: their rows one after the other.
#[derive(Clone, Debug)]
pub struct MicroBatch {
    /// What the head reads: taps, lengths, rows with a target.
    pub packed: PackedBatch,
    /// x̂ at the rows with a target, as they lie in `final`: some rows each, `[rows, D]` numbers of the pool's type, little-endian; none for classifiers.
    pub x: Vec<Bytes>,
    /// That type.
    pub dtype: Dtype,
    /// Width D.
    pub hidden_size: usize,
    /// What the head's output is measured by.
    pub targets: Wanted,
    /// So many of the last rows with an output are measured by what the base says there.
    pub replayed: usize,
    /// Tokens of all samples.
    pub tokens: usize,
}

/// What a pool has of some samples.
#[derive(Clone, Debug)]
pub struct PoolRows {
    /// Of each sample.
    pub states: Vec<SequenceStates>,
    /// How many of the taps the head reads; a further one is `final`, fetched for x̂ alone.
    pub head_taps: usize,
    /// Width of the rows.
    pub hidden_size: usize,
}

impl PoolRows {
    /// How the rows of the head's taps are written, for samples of these lengths.
    fn formats(&self, lengths: &[usize]) -> Result<Vec<RowFormat>, TrainError> {
        let formats = self.states.first().map_or_else(Vec::new, |states| states.formats.clone());
        let row_bytes: Vec<usize> = formats.iter().map(|format| format.row_bytes(self.hidden_size)).collect();
        for (states, &length) in self.states.iter().zip(lengths) {
            let whole = states.taps.iter().map(Bytes::len).eq(row_bytes.iter().map(|row| row * length));
            if states.formats != formats || formats.len() < self.head_taps || !whole {
                return Err(TrainError::Pool(format!("hidden states of {} tokens do not fit a sample of {length}", states.tokens)));
            }
        }
        Ok(formats.into_iter().take(self.head_taps).collect())
    }
}

/// What the outputs for some samples are measured by.
#[derive(Clone, Debug, PartialEq)]
pub enum Wanted {
    /// Token that each row predicts, or the label of each sample.
    Indices(Vec<u32>),
    /// Labels of each sample, ascending.
    Sets(Vec<Vec<u32>>),
    /// Number of each sample.
    Values(Vec<f64>),
    /// That texts of a group compare as they should, of so many groups.
    Groups(usize),
    /// The same of pairs of answers: the token that each row predicts, and the rows of each answer.
    Answers {
        /// Of all answers.
        tokens: Vec<u32>,
        /// How many belong to each answer.
        lengths: Vec<usize>,
    },
}

impl Wanted {
    /// Of `samples`, which are all of one kind.
    fn of(samples: &[&Sample]) -> Self {
        let targets = || samples.iter().map(|sample| &sample.target);
        match targets().next() {
            Some(Target::Labels(_)) => Self::Sets(
                targets().filter_map(|target| if let Target::Labels(labels) = target { Some(labels.clone()) } else { None }).collect(),
            ),
            Some(Target::Value(_)) => {
                Self::Values(targets().filter_map(|target| if let Target::Value(value) = target { Some(*value) } else { None }).collect())
            }
            Some(Target::Answer(..)) => Self::Answers {
                tokens: samples.iter().flat_map(|sample| sample.wanted()).collect(),
                lengths: samples.iter().map(|sample| sample.targets()).collect(),
            },
            Some(Target::Part(_)) => Self::Groups(targets().filter(|target| **target == Target::Part(0)).count()),
            _ => Self::Indices(samples.iter().flat_map(|sample| sample.wanted()).collect()),
        }
    }

    /// How many losses there are.
    pub fn len(&self) -> usize {
        match self {
            Self::Indices(indices) => indices.len(),
            Self::Sets(sets) => sets.len(),
            Self::Values(values) => values.len(),
            Self::Groups(groups) => *groups,
            Self::Answers { lengths, .. } => lengths.len() / 2,
        }
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Tokens, or one label of each sample; none where something else is wanted.
    pub fn indices(&self) -> &[u32] {
        match self {
            Self::Indices(indices) | Self::Answers { tokens: indices, .. } => indices,
            _ => &[],
        }
    }

    /// Takes what is wanted of further samples, which are of the same kind.
    pub fn extend(&mut self, more: &Self) {
        match (self, more) {
            (Self::Indices(indices), Self::Indices(more)) => indices.extend(more),
            (Self::Sets(sets), Self::Sets(more)) => sets.extend(more.iter().cloned()),
            (Self::Values(values), Self::Values(more)) => values.extend(more),
            (Self::Groups(groups), Self::Groups(more)) => *groups += more,
            (Self::Answers { tokens, lengths }, Self::Answers { tokens: more_tokens, lengths: more_lengths }) => {
                tokens.extend(more_tokens);
                lengths.extend(more_lengths);
            }
            _ => {}
        }
    }
}

impl MicroBatch {
    /// Packs the states of `samples`, of which those from number `own` on are replayed; x̂ is the first pool's.
    ///
    /// # Errors
    /// States that do not fit the samples.
    pub fn pack(samples: &[&Sample], own: usize, pools: &[PoolRows]) -> Result<Self, TrainError> {
        let lengths: Vec<usize> = samples.iter().map(|sample| sample.ids.len()).collect();
        let rows: usize = lengths.iter().sum();
        let (mut taps, mut formats) = (Vec::new(), Vec::new());
        for pool in pools {
            formats.extend(pool.formats(&lengths)?);
            taps.extend((0..pool.head_taps).map(|tap| pool.states.iter().map(|states| states.taps[tap].clone()).collect()));
        }
        let (states, hidden_size) = pools.first().map_or((&[][..], 0), |first| (&first.states[..], first.hidden_size));
        let (mut learned, mut x, mut first) = (Vec::new(), Vec::new(), 0);
        let (dtype, row_bytes) = match states.first().and_then(|states| states.formats.last()) {
            Some(format @ RowFormat::Plain(dtype)) => (*dtype, format.row_bytes(hidden_size)),
            _ => (Dtype::Float32, 0),
        };
        for ((sample, states), length) in samples.iter().zip(states).zip(&lengths) {
            if let (true, Some(last)) = (sample.predicts_tokens(), states.taps.last()) {
                for range in sample.rows() {
                    x.push(last.slice(range.start * row_bytes..range.end * row_bytes));
                    learned.extend(range.map(|row| (first + row) as u32));
                }
            }
            first += length;
        }
        let packed = PackedBatch { taps, formats, lengths, rows: learned };
        let (own, others) = samples.split_at(own);
        let replayed = others.iter().map(|sample| sample.targets()).sum();
        Ok(Self { packed, x, dtype, hidden_size, targets: Wanted::of(own), replayed, tokens: rows })
    }

    /// Rows with an output, at most `most` at a time: which, and the tokens that they predict; none of those that are replayed.
    pub fn parts(&self, most: usize) -> impl Iterator<Item = (Range<usize>, Option<&[u32]>)> {
        let tokens = self.targets.indices();
        let own = tokens.chunks(most).enumerate().map(move |(index, tokens)| (index * most..index * most + tokens.len(), Some(tokens)));
        let (first, end) = (tokens.len(), tokens.len() + self.replayed);
        own.chain((first..end).step_by(most).map(move |start| (start..end.min(start.saturating_add(most)), None)))
    }

    /// x̂ of some targets, `[rows, D]`; copied only where they do not lie together.
    pub fn x(&self, targets: Range<usize>) -> Bytes {
        let row_bytes = self.hidden_size * number_bytes(self.dtype);
        let wanted = targets.start * row_bytes..targets.end * row_bytes;
        let mut first = 0;
        let mut parts = self.x.iter().filter_map(|part| {
            let own = first..first + part.len();
            first = own.end;
            let (start, end) = (wanted.start.max(own.start), wanted.end.min(own.end));
            (start < end).then(|| part.slice(start - own.start..end - own.start))
        });
        match (parts.next(), parts.next()) {
            (Some(one), None) => one,
            (one, another) => one.into_iter().chain(another).chain(parts).collect::<Vec<_>>().concat().into(),
        }
    }
}

/// When micro-batches are asked for that are not needed yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ahead {
    /// Two, while one is in use.
    Always,
    /// One, when whoever uses one has little left to do with it: [`Feed::ask`].
    Late,
}

impl Ahead {
    /// How `trainer` asks for them.
    pub fn of(trainer: &Trainer<'_>) -> Self {
        if trainer.has_large_batches() { Self::Late } else { Self::Always }
    }
}

type Fetched = JoinHandle<Result<MicroBatch, TrainError>>;

/// Micro-batches in a given order, some of them asked for before they are needed.
pub struct Feed {
    next: Box<dyn FnMut() -> Option<Fetched>>,
    asked: VecDeque<Fetched>,
    ahead: Ahead,
    runtime: Handle,
    stop: Stop,
}

impl Feed {
    /// Starts nothing until the first [`Feed::receive`].
    pub fn new<S: HiddenStates>(
        runtime: &Handle,
        stop: &Stop,
        source: Arc<S>,
        ahead: Ahead,
        mut batches: impl Iterator<Item = Vec<usize>> + 'static,
    ) -> Self {
        let spawn = runtime.clone();
        let next = move || {
            let (source, batch) = (source.clone(), batches.next()?);
            // A task of its own, so that it goes on while the loop computes.
            Some(spawn.spawn(async move { source.fetch(batch).await }))
        };
        Self { next: Box::new(next), asked: VecDeque::new(), ahead, runtime: runtime.clone(), stop: stop.clone() }
    }

    /// The next micro-batch; None when someone asked to stop, or behind the last.
    ///
    /// # Errors
    /// What the source says.
    pub fn receive(&mut self) -> Result<Option<MicroBatch>, TrainError> {
        self.fill(if self.ahead == Ahead::Always { 1 + AHEAD } else { 1 });
        let Some(first) = self.asked.front_mut() else { return Ok(None) };
        let Some(joined) = self.runtime.block_on(self.stop.race(first)) else { return Ok(None) };
        self.asked.pop_front();
        joined.unwrap_or_else(|error| Err(TrainError::Pool(format!("fetching states panicked: {error}")))).map(Some)
    }

    /// Tells that little is left to do with the last one: there is room for the next.
    pub fn ask(&mut self) {
        self.fill(1);
    }

    fn fill(&mut self, count: usize) {
        while self.asked.len() < count
            && let Some(fetched) = (self.next)()
        {
            self.asked.push_back(fetched);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::numbers::{from_bytes, to_bytes};

    fn states(tokens: usize, start: f32, taps: usize) -> SequenceStates {
        let rows = |tap: usize| {
            to_bytes(&(0..tokens * 2).map(|index| start + 100.0 * tap as f32 + index as f32).collect::<Vec<_>>(), Dtype::Float32)
        };
        SequenceStates { index: 0, tokens, formats: vec![RowFormat::Plain(Dtype::Float32); taps], taps: (0..taps).map(rows).collect() }
    }

    fn pool(states: Vec<SequenceStates>, head_taps: usize) -> PoolRows {
        PoolRows { states, head_taps, hidden_size: 2 }
    }

    #[test]
    fn rows_are_packed_without_padding() {
        let first = Sample { ids: vec![1, 2, 3], target: Target::Tokens(vec![1..2, 2..3]) };
        let second = Sample { ids: vec![4, 5], target: (1..2).into() };
        let batch = MicroBatch::pack(&[&first, &second], 2, &[pool(vec![states(3, 0.0, 2), states(2, 50.0, 2)], 2)]).unwrap();
        let numbers = |values: &[f32]| to_bytes(values, Dtype::Float32);
        assert_eq!(batch.packed.taps[0], [numbers(&[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]), numbers(&[50.0, 51.0, 52.0, 53.0])]);
        assert_eq!((batch.packed.rows.as_slice(), batch.targets.indices()), (&[0, 1, 3][..], &[2, 3, 5][..]));
        let mut x = [0.0; 6];
        from_bytes(&batch.x(0..3), Dtype::Float32, &mut x);
        assert_eq!(x, [100.0, 101.0, 102.0, 103.0, 150.0, 151.0]);
        assert_eq!(batch.x(1..3), numbers(&[102.0, 103.0, 150.0, 151.0]));
        assert_eq!(batch.x(1..2).as_ptr(), batch.x[0][8..].as_ptr(), "rows that lie together are not copied");
    }

    #[test]
    fn states_of_another_length_are_refused() {
        let sample = Sample { ids: vec![1, 2, 3], target: Target::Label(1) };
        let error = MicroBatch::pack(&[&sample], 1, &[pool(vec![states(2, 0.0, 1)], 1)]).unwrap_err().to_string();
        assert_eq!(error, "pool: hidden states of 2 tokens do not fit a sample of 3");
    }

    /// Counts how many fetches have begun; the fetches themselves wait for a permit.
    struct Counting(AtomicUsize, tokio::sync::Semaphore);

    impl HiddenStates for Counting {
        async fn fetch(&self, samples: Vec<usize>) -> Result<MicroBatch, TrainError> {
            self.0.fetch_add(1, Ordering::SeqCst);
            self.1.acquire().await.unwrap().forget();
            let sample = Sample { ids: vec![0; samples[0] + 1], target: Target::Label(0) };
            MicroBatch::pack(&[&sample], 1, &[pool(vec![states(samples[0] + 1, 0.0, 1)], 1)])
        }
    }

    #[test]
    fn small_micro_batches_are_asked_for_while_one_is_in_use_and_large_ones_late() {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        for (ahead, before, after) in [(Ahead::Always, 4, 4), (Ahead::Late, 2, 3)] {
            let source = Arc::new(Counting(AtomicUsize::new(0), tokio::sync::Semaphore::new(0)));
            let begun = |count| {
                let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
                while source.0.load(Ordering::SeqCst) < count {
                    assert!(std::time::Instant::now() < deadline, "nothing was asked for ahead of time");
                    std::thread::yield_now();
                }
            };
            let mut feed = Feed::new(runtime.handle(), &Stop::default(), source.clone(), ahead, (0..9).map(|index| vec![index]));
            source.1.add_permits(2);
            assert_eq!(feed.receive().unwrap().unwrap().tokens, 1);
            assert_eq!(feed.receive().unwrap().unwrap().tokens, 2);
            begun(before);
            assert_eq!(feed.asked.len(), before - 2);
            feed.ask();
            begun(after);
            assert_eq!(feed.asked.len(), after - 2);
        }
    }
}
