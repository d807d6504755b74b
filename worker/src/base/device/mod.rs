//! The device thread: the one thread that runs the model.
//!
//! Routes hand it jobs and get their results through channels. Places are bounded by semaphores that a job holds until
//! it ends: a full door is refused at once. **Invariant** the thread never waits for a reader.

mod answers;
mod engine;
mod heads;
mod loss;
mod memory;
mod outside;
mod prompts;
mod sequence;
mod states;
mod step;
mod thread;

use std::sync::{Arc, mpsc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, oneshot};

use super::metrics::Metrics;
use super::registry::Registry;
use super::schedule::Trainer;
use crate::exchange::wire::{ErrorCode, WireError};
use crate::kernel::{Backend, Result, Threads};
use crate::model::Model;
use engine::Engine;

pub use loss::LossJob;
pub use outside::{Follow, FollowOut, OtherRows};
pub use sequence::{Answer, HeadUse, Purpose, Score, Sequence};
pub use states::{Room, StatesJob, StatesOut};

/// Requests of trainers that may wait.
pub const TRAINING_PLACES: usize = 64;
/// Sequences that may wait per sequence that is served at once.
const SERVING_PLACES_EACH: usize = 4;

/// Bounds of what runs at once.
#[derive(Clone, Copy, Debug)]
pub struct EngineLimits {
    /// Longest sequence, tokens.
    pub max_model_len: usize,
    /// Sequences that are served at once.
    pub max_num_seqs: usize,
    /// Tokens of one forward batch.
    pub max_num_batched_tokens: usize,
    /// Bytes of keys and values.
    pub kv_cache_bytes: u64,
    /// Bytes of hidden states that trainers have not taken yet.
    pub states_bytes: u64,
}

/// Resolves when the device thread has ended.
pub type Ended = oneshot::Receiver<Result<()>>;

/// What the device thread is told.
pub enum Job {
    /// Sequences of one request, to serve.
    Serve(Vec<Sequence>),
    /// Hidden states for a trainer.
    States(Trainer, StatesJob),
    /// Losses for a trainer.
    Loss(Trainer, LossJob),
    /// A reader has taken states, or something has come from outside: a job or a sequence may go on. Or whoever waited for one went away.
    Wake,
}

/// A handle to the device thread; the thread ends when all handles are gone.
#[derive(Clone)]
pub struct Device {
    jobs: mpsc::Sender<Job>,
    serving: Arc<Semaphore>,
    serving_places: usize,
    training: Arc<Semaphore>,
    states: Arc<Semaphore>,
    states_bytes: u64,
    /// Room for the rows that go between pools, beside those of trainers.
    rows: Arc<Semaphore>,
}

impl Device {
    /// Starts the thread. The receiver resolves when it has ended, to an error when the device failed; it fails when the thread panics.
    pub fn start<B: Backend>(
        model: Arc<Model<B>>,
        host: Arc<Threads>,
        limits: &EngineLimits,
        registry: Arc<Registry>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Ended)> {
        let (jobs, receiver) = mpsc::channel();
        let serving_places = limits.max_num_seqs * SERVING_PLACES_EACH;
        let places = |count| Arc::new(Semaphore::new(count));
        let device = Self {
            jobs,
            serving: places(serving_places),
            serving_places,
            training: places(TRAINING_PLACES),
            states: places(states::units(limits.states_bytes)),
            states_bytes: limits.states_bytes,
            rows: places(states::units(limits.states_bytes)),
        };
        let engine = Engine::new(model, host, limits, registry, metrics)?;
        let owner = thread::Owner::new(engine, limits, receiver);
        let (ending, ended) = oneshot::channel();
        let thread = move || {
            // Who listens for the end may be gone.
            let _ = ending.send(owner.run());
        };
        std::thread::Builder::new().name("device".to_owned()).spawn(thread).map_err(candle_core::Error::from)?;
        Ok((device, ended))
    }

    /// Places for the sequences of a request that is served: a request of more than there are takes them all.
    pub fn serving_places(&self, sequences: usize) -> std::result::Result<OwnedSemaphorePermit, WireError> {
        places(&self.serving, sequences.min(self.serving_places))
    }

    /// A place for a request of a trainer.
    pub fn training_place(&self) -> std::result::Result<OwnedSemaphorePermit, WireError> {
        places(&self.training, 1)
    }

    /// Room for the states of a reader, at `token_bytes` a token.
    pub fn room(&self, token_bytes: usize) -> Room {
        Room::new(self.states.clone(), self.states_bytes, token_bytes)
    }

    /// Room for `bytes` of rows that go between pools; who asks for more than there is has all of it.
    pub fn rows_room(&self, bytes: u64) -> std::result::Result<OwnedSemaphorePermit, WireError> {
        places(&self.rows, states::units(bytes).min(states::units(self.states_bytes)))
    }

    /// Hands a job over.
    pub fn submit(&self, job: Job) -> std::result::Result<(), WireError> {
        self.jobs.send(job).map_err(|_| WireError::new(ErrorCode::Internal, "the device thread has ended"))
    }
}

fn places(places: &Arc<Semaphore>, count: usize) -> std::result::Result<OwnedSemaphorePermit, WireError> {
    places.clone().try_acquire_many_owned(count as u32).map_err(|error| match error {
        TryAcquireError::NoPermits => WireError::new(ErrorCode::Busy, "the queue is full: ask again later"),
        TryAcquireError::Closed => WireError::new(ErrorCode::Unavailable, "the pool is shutting down"),
    })
}
