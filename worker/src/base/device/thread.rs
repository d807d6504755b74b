//! What the device thread does, as the schedule says.

use std::ops::ControlFlow;
use std::sync::mpsc;
use std::time::Instant;

use super::engine::Engine;
use super::loss::{LossJob, LossRun};
use super::sequence::Sequence;
use super::states::{self, StatesJob};
use super::{EngineLimits, Job, SERVING_PLACES_EACH, heads, step};
use crate::base::metrics::Class;
use crate::base::schedule::{Demand, Kind, Schedule, Tokens, Turn, Work};
use crate::exchange::wire::ErrorCode;
use crate::kernel::{Backend, Result};

/// What the thread owns.
pub struct Owner<B: Backend> {
    engine: Engine<B>,
    schedule: Schedule<Sequence, LossJob, StatesJob>,
    /// The loss that has begun.
    loss: Option<LossRun>,
    receiver: mpsc::Receiver<Job>,
}

/// Rows that a capture may run before it looks whose turn it is.
struct Slice {
    start: Instant,
    rows: usize,
    done: usize,
}

impl Slice {
    fn new(rows: usize) -> Self {
        Self { start: Instant::now(), rows, done: 0 }
    }
}

impl<B: Backend> Owner<B> {
    pub fn new(engine: Engine<B>, limits: &EngineLimits, receiver: mpsc::Receiver<Job>) -> Self {
        Self { engine, schedule: Schedule::new(limits.max_num_seqs, limits.max_num_batched_tokens), loss: None, receiver }
    }

    /// Runs until all handles are gone.
    pub fn run(mut self) -> Result<()> {
        while let Some((work, rows)) = self.until_capture()? {
            if let Work::Start(place) = work {
                self.capture(place, rows)?;
            }
        }
        Ok(())
    }

    /// Runs whatever goes before a capture until one has its turn; none when all handles are gone.
    fn until_capture(&mut self) -> Result<Option<(Work, usize)>> {
        loop {
            self.receive()?;
            let can_serve = step::demands(self.schedule.serving.active()).iter().any(|demand| *demand != Demand::Prefill(0));
            match self.schedule.turn(can_serve, StatesJob::is_ready) {
                Turn::Serve => self.serve()?,
                Turn::Train(Kind::Loss, work, rows) => self.losses(work, rows)?,
                Turn::Train(Kind::Capture, work, rows) => return Ok(Some((work, rows))),
                Turn::Idle => match self.receiver.recv() {
                    Ok(job) => self.accept(job)?,
                    Err(_) => return Ok(None),
                },
            }
        }
    }

    fn accept(&mut self, job: Job) -> Result<()> {
        match job {
            Job::Serve(sequences) => self.accept_sequences(sequences)?,
            Job::States(trainer, job) => self.schedule.captures.push(trainer, job),
            Job::Loss(trainer, job) => self.schedule.losses.push(trainer, job),
            Job::Wake => {}
        }
        Ok(())
    }

    /// Lets the sequences of a request wait, if there is memory that they can wait for.
    fn accept_sequences(&mut self, sequences: Vec<Sequence>) -> Result<()> {
        let budget = self.engine.memory.usage().0;
        let waiting: u64 = self.schedule.serving.waiting().map(|sequence| sequence.need).sum();
        for mut sequence in sequences {
            sequence.need = self.engine.memory.need(&sequence)?;
            if sequence.need > budget {
                let (tokens, need) = (sequence.limit(), sequence.need);
                let message = format!("keys and values of {tokens} tokens take {need} bytes, the pool has {budget}");
                sequence.fail(ErrorCode::TooLarge, &message);
            } else if waiting >= SERVING_PLACES_EACH as u64 * budget {
                sequence.fail(ErrorCode::Busy, "others wait for more memory than the pool has: ask again later");
            } else {
                self.schedule.serving.push(sequence);
            }
        }
        Ok(())
    }

    /// Takes what has come, drops what nobody waits for, and admits what there is memory for.
    fn receive(&mut self) -> Result<()> {
        while let Ok(job) = self.receiver.try_recv() {
            self.accept(job)?;
        }
        let (memory, schedule) = (&mut self.engine.memory, &mut self.schedule);
        schedule.serving.active().iter_mut().for_each(Sequence::hear);
        schedule.serving.active().iter_mut().filter(|sequence| !sequence.is_wanted()).for_each(|sequence| memory.release(sequence));
        let admit = |sequence: &mut Sequence| -> Result<bool> {
            let admitted = memory.admit(sequence)?;
            // Who waited for it may be gone.
            let _ = sequence.admitted.take_if(|_| admitted).map(|told| told.send(()));
            Ok(admitted)
        };
        schedule.serving.refresh(Sequence::is_wanted, admit)?;
        schedule.losses.retain(LossJob::is_wanted);
        schedule.captures.retain(StatesJob::is_wanted);
        let (active, waiting) = schedule.serving.lengths();
        self.engine.metrics.queue((active, waiting, schedule.losses.waiting() + schedule.captures.waiting()));
        self.engine.metrics.memory(memory.usage());
        Ok(())
    }

    /// One step of the active sequences.
    fn serve(&mut self) -> Result<()> {
        let start = Instant::now();
        heads::catch_up(&self.engine.model, &mut self.engine.memory, self.schedule.serving.active())?;
        let demands = step::demands(self.schedule.serving.active());
        let grants = self.schedule.grants(&demands);
        step::step(&mut self.engine, self.schedule.serving.active(), &grants)?;
        self.engine.model.backend.finish()?;
        self.schedule.served(Tokens::of(&demands, &grants), start.elapsed().as_secs_f64());
        Ok(())
    }

    /// A slice of losses. **Invariant** what ran is counted before anybody hears of it.
    fn losses(&mut self, work: Work, rows: usize) -> Result<()> {
        if let Work::Start(place) = work {
            self.loss = self.schedule.losses.take(place).map(LossRun::new);
        }
        let Some(run) = &mut self.loss else { return Ok(()) };
        let start = Instant::now();
        let rows = if run.is_over() { 0 } else { run.slice(&self.engine.model.backend, self.engine.model.lm_head(), rows)? };
        self.engine.metrics.batch(Class::Loss, rows);
        self.schedule.trained(Kind::Loss, rows, start.elapsed().as_secs_f64());
        if let Some(run) = self.loss.take_if(|run| run.is_over()) {
            run.reply();
            self.schedule.losses.end(None);
        }
        Ok(())
    }

    /// One batch of hidden states, the first `rows` of a layer at once.
    fn capture(&mut self, place: usize, rows: usize) -> Result<()> {
        let (model, arena) = (self.engine.model.clone(), self.engine.single_pass.take());
        let (Some(mut job), Some(mut arena)) = (self.schedule.captures.take(place), arena) else { return Ok(()) };
        let (sequences, mut frames) = job.next_batch(self.schedule.max_tokens(), model.config.hidden_size);
        self.engine.metrics.batch(Class::Training, sequences.iter().map(Vec::len).sum());
        let how = (&job.taps, self.schedule.piece_rows());
        let mut slice = Slice::new(rows);
        let mut pause = |rows: usize| {
            slice.done += rows;
            if slice.done >= slice.rows {
                self.sliced(&slice)?;
                let Some((_, rows)) = self.until_capture()? else { return Ok(ControlFlow::Break(())) };
                slice = Slice::new(rows);
            }
            Ok(if job.is_wanted() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        };
        states::capture(&model, &mut arena, (&sequences, &mut frames), how, &mut pause)?;
        self.sliced(&slice)?;
        self.engine.single_pass = Some(arena);
        self.schedule.captures.end((!job.sequences.is_empty()).then_some(job));
        Ok(())
    }

    fn sliced(&mut self, slice: &Slice) -> Result<()> {
        self.engine.model.backend.finish()?;
        if slice.done > 0 {
            self.schedule.trained(Kind::Capture, slice.done, slice.start.elapsed().as_secs_f64());
        }
        Ok(())
    }
}
