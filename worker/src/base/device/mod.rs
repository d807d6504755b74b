//! The device thread: the one thread that runs the model.
//!
//! Routes hand it jobs and get their results through channels. Places are bounded by semaphores that a job holds until
//! it ends: a full door is refused at once. **Invariant** the thread never waits for a reader.

mod engine;
mod heads;
mod memory;
mod prompts;
mod sequence;
mod step;
mod training;

use std::ops::ControlFlow;
use std::sync::{Arc, mpsc};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, oneshot};

use super::load::MAX_SEQUENCES;
use super::metrics::{Class, Metrics};
use super::queue::{Queue, Turn};
use super::registry::Registry;
use crate::exchange::wire::{ErrorCode, WireError};
use crate::kernel::{Arena, Backend, Result, Threads, pages_for};
use crate::model::Model;
use engine::Engine;
use memory::Memory;

pub use sequence::{Answer, HeadUse, Purpose, Score, Sequence};
pub use training::{LossJob, StatesJob, StatesOut, TrainingJob};

/// Requests of trainers that may wait.
pub const TRAINING_PLACES: usize = 64;
/// Requests that may wait per sequence that is served at once.
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
}

/// Resolves when the device thread has ended.
pub type Ended = oneshot::Receiver<Result<()>>;

/// What the device thread is told.
pub enum Job {
    /// Sequences to serve.
    Serve(Vec<Sequence>),
    /// Work for a trainer.
    Train(TrainingJob),
    /// A reader has taken states: a job may have become ready.
    Wake,
}

/// A handle to the device thread; the thread ends when all handles are gone.
#[derive(Clone)]
pub struct Device {
    jobs: mpsc::Sender<Job>,
    serving: Arc<Semaphore>,
    training: Arc<Semaphore>,
}

impl Device {
    /// Starts the thread. The receiver resolves when it has ended, to an error when the device failed; it fails when the thread panics.
    pub fn start<B: Backend>(
        model: Arc<Model<B>>,
        host: Arc<Threads>,
        engine: &EngineLimits,
        registry: Arc<Registry>,
        metrics: Arc<Metrics>,
    ) -> Result<(Self, Ended)> {
        let (jobs, receiver) = mpsc::channel();
        let (max_active, budget) = (engine.max_num_seqs, engine.max_num_batched_tokens);
        let places = |count| Arc::new(Semaphore::new(count));
        let device = Self { jobs, serving: places(max_active * SERVING_PLACES_EACH), training: places(TRAINING_PLACES) };
        let memory = Memory::new(&model, engine.kv_cache_bytes)?;
        // A page for each sequence may be partly empty.
        let pages = pages_for(budget.max(engine.max_model_len)) + MAX_SEQUENCES;
        let single_pass = Some(Arena::new(&model.backend, model.single_pass_layout(), pages)?);
        let engine = Engine { model, memory, single_pass, host, registry, metrics };
        let owner = Owner { engine, budget, queue: Queue::new(max_active), receiver };
        let (ending, ended) = oneshot::channel();
        let thread = move || {
            // Who listens for the end may be gone.
            let _ = ending.send(owner.run());
        };
        std::thread::Builder::new().name("device".to_owned()).spawn(thread).map_err(candle_core::Error::from)?;
        Ok((device, ended))
    }

    /// A place for a request to be served.
    pub fn serving_place(&self) -> std::result::Result<OwnedSemaphorePermit, WireError> {
        place(&self.serving)
    }

    /// A place for a request of a trainer.
    pub fn training_place(&self) -> std::result::Result<OwnedSemaphorePermit, WireError> {
        place(&self.training)
    }

    /// Hands a job over.
    pub fn submit(&self, job: Job) -> std::result::Result<(), WireError> {
        self.jobs.send(job).map_err(|_| WireError::new(ErrorCode::Internal, "the device thread has ended"))
    }
}

fn place(places: &Arc<Semaphore>) -> std::result::Result<OwnedSemaphorePermit, WireError> {
    places.clone().try_acquire_owned().map_err(|error| match error {
        TryAcquireError::NoPermits => WireError::new(ErrorCode::Busy, "the queue is full: ask again later"),
        TryAcquireError::Closed => WireError::new(ErrorCode::Unavailable, "the pool is shutting down"),
    })
}

/// What the thread owns.
struct Owner<B: Backend> {
    engine: Engine<B>,
    budget: usize,
    queue: Queue<Sequence, TrainingJob>,
    receiver: mpsc::Receiver<Job>,
}

impl<B: Backend> Owner<B> {
    fn run(mut self) -> Result<()> {
        loop {
            self.receive()?;
            match self.queue.turn(TrainingJob::is_ready) {
                Turn::Serve => self.serve()?,
                Turn::Train(place) => self.train(place)?,
                Turn::Idle => match self.receiver.recv() {
                    Ok(job) => self.accept(job)?,
                    Err(_) => return Ok(()),
                },
            }
        }
    }

    fn accept(&mut self, job: Job) -> Result<()> {
        match job {
            Job::Serve(sequences) => {
                for mut sequence in sequences {
                    match self.engine.memory.fits(&sequence)? {
                        Ok(()) => self.queue.push_sequence(sequence),
                        Err(need) => {
                            let budget = self.engine.memory.usage().0;
                            let message =
                                format!("keys and values of {} tokens take {need} bytes, the pool has {budget}", sequence.limit());
                            sequence.fail(ErrorCode::TooLarge, &message);
                        }
                    }
                }
            }
            Job::Train(job) => self.queue.push_training(job),
            Job::Wake => {}
        }
        Ok(())
    }

    /// Takes what has come, drops what nobody waits for, and admits what there is memory for.
    fn receive(&mut self) -> Result<()> {
        while let Ok(job) = self.receiver.try_recv() {
            self.accept(job)?;
        }
        let memory = &mut self.engine.memory;
        self.queue.active().iter_mut().filter(|sequence| !sequence.is_wanted()).for_each(|sequence| memory.release(sequence));
        self.queue.refresh(Sequence::is_wanted, TrainingJob::is_wanted);
        for sequence in self.queue.active().iter_mut().filter(|sequence| sequence.lease.is_none()) {
            // Who comes later does not overtake one that needs much.
            if !memory.admit(sequence)? {
                break;
            }
        }
        self.engine.metrics.queue(self.queue.lengths());
        self.engine.metrics.memory(self.engine.memory.usage());
        Ok(())
    }

    /// One step of the active sequences.
    fn serve(&mut self) -> Result<()> {
        step::step(&mut self.engine, self.queue.active(), self.budget)
    }

    /// Between two slices of a training batch: one step of what is served.
    fn interlude(&mut self) -> Result<()> {
        self.receive()?;
        if !self.queue.active().is_empty() {
            self.serve()?;
        }
        Ok(())
    }

    /// One batch of a training job.
    fn train(&mut self, place: usize) -> Result<()> {
        match self.queue.take_training(place) {
            Some(TrainingJob::States(job)) => self.states(job),
            Some(TrainingJob::Loss(job)) => {
                self.engine.metrics.batch(Class::Loss, job.request.targets.len());
                let model = self.engine.model.clone();
                job.run(&model.backend, model.lm_head(), |gone| {
                    self.interlude()?;
                    Ok(!gone)
                })
            }
            None => Ok(()),
        }
    }

    fn states(&mut self, mut job: StatesJob) -> Result<()> {
        let batch = job.next_batch(self.budget);
        let out = job.out.clone();
        let (model, Some(mut arena)) = (self.engine.model.clone(), self.engine.single_pass.take()) else { return Ok(()) };
        let captured = training::capture(&model, &mut arena, &batch, &job.taps, &mut || {
            self.interlude()?;
            Ok(if out.is_closed() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) })
        });
        self.engine.single_pass = Some(arena);
        let Some(captured) = captured? else { return Ok(()) };
        self.engine.metrics.batch(Class::Training, batch.iter().map(|(_, tokens, _)| tokens.len()).sum());
        for (planned, taps) in batch.into_iter().zip(captured) {
            job.send(planned, taps, model.dtype);
        }
        if !job.sequences.is_empty() {
            self.queue.return_training(TrainingJob::States(job));
        }
        Ok(())
    }
}
