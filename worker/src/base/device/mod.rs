//! The device thread: the one thread that runs the model.
//!
//! Routes hand it jobs and get their results through channels. Places are bounded by semaphores that a job holds until
//! it ends: a full door is refused at once. **Invariant** the thread never waits for a reader.

mod prompts;
mod sequence;
mod step;
mod training;

use std::ops::ControlFlow;
use std::sync::{Arc, mpsc};

use carryon_crds::common::Taps;
use carryon_crds::pool::{Dtype, Engine};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, TryAcquireError, oneshot};

use super::metrics::{Class, Metrics};
use super::queue::{Queue, Turn};
use crate::exchange::wire::{ErrorCode, WireError};
use crate::kernel::Threads;
use crate::model::{Model, Slot};

pub use sequence::{Answer, HeadUse, Purpose, Score, Sequence};
pub use training::{LossJob, StatesJob, StatesOut, TrainingJob};

/// Requests of trainers that may wait.
pub const TRAINING_PLACES: usize = 64;
/// Requests that may wait per sequence that is served at once.
const SERVING_PLACES_EACH: usize = 4;

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
    /// Starts the thread. The receiver resolves, to an error, when the thread panics.
    pub fn start(
        model: Arc<Model>,
        threads: Arc<Threads>,
        dtype: Dtype,
        engine: &Engine,
        metrics: Arc<Metrics>,
    ) -> std::io::Result<(Self, oneshot::Receiver<()>)> {
        let (jobs, receiver) = mpsc::channel();
        let (max_active, budget) = (engine.max_num_seqs as usize, engine.max_num_batched_tokens as usize);
        let places = |count| Arc::new(Semaphore::new(count));
        let device = Self { jobs, serving: places(max_active * SERVING_PLACES_EACH), training: places(TRAINING_PLACES) };
        let (alive, ended) = oneshot::channel();
        let owner = Owner { model, threads, dtype, budget, queue: Queue::new(max_active), receiver, metrics };
        std::thread::Builder::new().name("device".to_owned()).spawn(move || {
            owner.run();
            // Unwinding drops the sender unsent.
            let _ = alive.send(());
        })?;
        Ok((device, ended))
    }

    /// A place for a request to be served.
    pub fn serving_place(&self) -> Result<OwnedSemaphorePermit, WireError> {
        place(&self.serving)
    }

    /// A place for a request of a trainer.
    pub fn training_place(&self) -> Result<OwnedSemaphorePermit, WireError> {
        place(&self.training)
    }

    /// Hands a job over.
    pub fn submit(&self, job: Job) -> Result<(), WireError> {
        self.jobs.send(job).map_err(|_| WireError::new(ErrorCode::Internal, "the device thread has ended"))
    }
}

fn place(places: &Arc<Semaphore>) -> Result<OwnedSemaphorePermit, WireError> {
    places.clone().try_acquire_owned().map_err(|error| match error {
        TryAcquireError::NoPermits => WireError::new(ErrorCode::Busy, "the queue is full: ask again later"),
        TryAcquireError::Closed => WireError::new(ErrorCode::Unavailable, "the pool is shutting down"),
    })
}

/// What the thread owns.
struct Owner {
    model: Arc<Model>,
    threads: Arc<Threads>,
    dtype: Dtype,
    budget: usize,
    queue: Queue<Sequence, TrainingJob>,
    receiver: mpsc::Receiver<Job>,
    metrics: Arc<Metrics>,
}

impl Owner {
    fn run(mut self) {
        loop {
            self.receive();
            match self.queue.turn(TrainingJob::is_ready) {
                Turn::Serve => self.serve(),
                Turn::Train(place) => self.train(place),
                Turn::Idle => match self.receiver.recv() {
                    Ok(job) => self.accept(job),
                    Err(_) => return,
                },
            }
        }
    }

    fn accept(&mut self, job: Job) {
        match job {
            Job::Serve(sequences) => sequences.into_iter().for_each(|sequence| self.queue.push_sequence(sequence)),
            Job::Train(job) => self.queue.push_training(job),
            Job::Wake => {}
        }
    }

    /// Takes what has come, and drops what nobody waits for.
    fn receive(&mut self) {
        while let Ok(job) = self.receiver.try_recv() {
            self.accept(job);
        }
        self.queue.refresh(Sequence::is_wanted, TrainingJob::is_wanted);
        self.metrics.queue(self.queue.lengths());
    }

    /// One step of the active sequences.
    fn serve(&mut self) {
        let active = self.queue.active();
        step::step(&self.model, self.dtype, active, self.budget, &self.metrics);
        active.retain(|sequence| !sequence.finished);
    }

    /// Between two slices of a training batch: one step of what is served.
    fn interlude(&mut self) {
        self.receive();
        if !self.queue.active().is_empty() {
            self.serve();
        }
    }

    /// One batch of a training job.
    fn train(&mut self, place: usize) {
        match self.queue.take_training(place) {
            Some(TrainingJob::States(job)) => self.states(job),
            Some(TrainingJob::Loss(job)) => {
                self.metrics.batch(Class::Loss, job.request.targets.len());
                let (model, threads, dtype) = (self.model.clone(), self.threads.clone(), self.dtype);
                job.run(&threads, model.lm_head(), dtype, |gone| {
                    self.interlude();
                    !gone
                });
            }
            None => {}
        }
    }

    fn states(&mut self, mut job: StatesJob) {
        let batch = job.next_batch(self.budget);
        let tokens: Vec<&[u32]> = batch.iter().map(|(_, tokens, _)| tokens.as_slice()).collect();
        let out = job.out.clone();
        let Some(taps) = self.whole(&tokens, &job.taps, &|| out.is_closed()) else { return };
        self.metrics.batch(Class::Training, batch.iter().map(|(_, tokens, _)| tokens.len()).sum());
        let (mut start, width) = (0, self.model.config.hidden_size);
        for planned in batch {
            let end = start + planned.1.len();
            job.send(planned, &taps, start * width..end * width, self.dtype);
            start = end;
        }
        if !job.sequences.is_empty() {
            self.queue.return_training(TrainingJob::States(job));
        }
    }

    /// Tap states of whole sequences, one after the other; one longer than the budget runs in pieces. None when nobody waits any more.
    fn whole(&mut self, sequences: &[&[u32]], taps: &Taps, gone: &dyn Fn() -> bool) -> Option<Vec<Vec<f32>>> {
        let (model, budget) = (self.model.clone(), self.budget);
        let mut pause = || {
            self.interlude();
            if gone() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
        };
        if let [long] = sequences
            && long.len() > budget
        {
            let mut kv = model.new_kv();
            let mut collected = vec![Vec::new(); taps.count()];
            for tokens in long.chunks(budget) {
                let states = model.forward(&mut [Slot { tokens, kv: &mut kv }], taps, &mut pause)?;
                collected.iter_mut().zip(states.taps).for_each(|(all, rows)| all.extend(rows));
            }
            return Some(collected);
        }
        let mut caches: Vec<_> = sequences.iter().map(|_| model.single_pass_kv()).collect();
        let mut slots: Vec<_> = sequences.iter().zip(&mut caches).map(|(tokens, kv)| Slot { tokens, kv }).collect();
        model.forward(&mut slots, taps, &mut pause).map(|states| states.taps)
    }
}
