//! Work for trainers: hidden states of whole sequences, and losses of rows.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::base::queue::training_batch;
use crate::exchange::states::{from_bytes, number_bytes, to_bytes};
use crate::exchange::{LossRequest, LossResponse, SequenceStates};
use crate::head::{combine, loss};
use crate::kernel::Threads;
use crate::model::LmHead;

/// Rows of a loss between which served sequences get a step.
pub const LOSS_ROWS: usize = 192;

/// Work for a trainer.
pub enum TrainingJob {
    /// Hidden states.
    States(StatesJob),
    /// Losses.
    Loss(LossJob),
}

impl TrainingJob {
    /// Whether somebody still waits for it.
    pub fn is_wanted(&self) -> bool {
        match self {
            Self::States(job) => !job.out.is_closed(),
            Self::Loss(job) => !job.reply.is_closed(),
        }
    }

    /// Whether it can run now: its reader has room for what comes.
    pub fn is_ready(&self) -> bool {
        match self {
            Self::States(job) => job.room_for_first(),
            Self::Loss(_) => true,
        }
    }
}

/// States on their way to a reader; dropping the permit makes room for others.
pub type StatesOut = (SequenceStates, OwnedSemaphorePermit);

/// A sequence of a batch: place in the request, tokens, room at the reader.
pub type Planned = (usize, Vec<u32>, OwnedSemaphorePermit);

/// Hidden states of whole sequences, sent one by one.
pub struct StatesJob {
    /// Sequences not run yet, with their place in the request.
    pub sequences: VecDeque<(usize, Vec<u32>)>,
    /// Where to read.
    pub taps: Taps,
    /// Who reads.
    pub out: UnboundedSender<StatesOut>,
    /// Tokens the reader may still be sent before it takes some.
    pub room: Arc<Semaphore>,
    /// Tokens of an empty reader.
    pub capacity: usize,
    /// Its place in the bounded queue.
    pub permit: OwnedSemaphorePermit,
}

impl StatesJob {
    /// Tokens of the reader's room that a sequence takes.
    fn share(&self, tokens: usize) -> usize {
        tokens.min(self.capacity)
    }

    fn room_for_first(&self) -> bool {
        self.sequences.front().is_none_or(|(_, tokens)| self.share(tokens.len()) <= self.room.available_permits())
    }

    /// Takes the sequences of the next batch, with the room they need.
    pub fn next_batch(&mut self, budget: usize) -> Vec<Planned> {
        let count = training_batch(self.sequences.iter().map(|(_, tokens)| tokens.len()), budget).min(self.sequences.len());
        let mut batch = Vec::with_capacity(count);
        for _ in 0..count {
            let share = self.sequences.front().map_or(0, |(_, tokens)| self.share(tokens.len()));
            let Ok(permit) = self.room.clone().try_acquire_many_owned(share as u32) else { break };
            if let Some((place, tokens)) = self.sequences.pop_front() {
                batch.push((place, tokens, permit));
            }
        }
        batch
    }

    /// Sends the states of one sequence: its rows of each tap, `values` in all.
    pub fn send(&self, (place, tokens, room): Planned, taps: &[Vec<f32>], values: Range<usize>, dtype: Dtype) {
        let taps = taps.iter().map(|tap| to_bytes(&tap[values.clone()], dtype)).collect();
        // A reader that went away is noticed before the next batch.
        let _ = self.out.send((SequenceStates { index: place, tokens: tokens.len(), dtype, taps }, room));
    }
}

/// Losses and gradients of rows.
pub struct LossJob {
    /// Rows, outputs of the head, targets.
    pub request: LossRequest,
    /// Who waits.
    pub reply: oneshot::Sender<LossResponse>,
    /// Its place in the bounded queue.
    pub permit: OwnedSemaphorePermit,
}

impl LossJob {
    /// Runs the rows in slices; `pause` is called between them, and the job ends unanswered when it says false.
    pub fn run(self, threads: &Threads, lm_head: &LmHead, dtype: Dtype, mut pause: impl FnMut(bool) -> bool) {
        let Self { request, reply, permit: _permit } = self;
        let width = request.hidden_size;
        let mut answer = LossResponse { loss: Vec::new(), gradient: request.gradient.then(Vec::new) };
        let backward = request.gradient.then(|| lm_head.backward());
        for (slice, targets) in request.targets.chunks(LOSS_ROWS).enumerate() {
            if slice > 0 && !pause(reply.is_closed()) {
                return;
            }
            let values = slice * LOSS_ROWS * width..(slice * LOSS_ROWS + targets.len()) * width;
            let number = number_bytes(request.dtype);
            let mut x = vec![0.0; values.len()];
            from_bytes(&request.x[values.start * number..values.end * number], request.dtype, &mut x);
            if let Some(delta) = &request.delta {
                x = combine(&x, 1.0, &delta[values], dtype);
            }
            let output = loss::lm_loss(threads, lm_head.forward(), backward, &x, targets);
            answer.loss.extend(output.loss);
            if let Some(gradient) = &mut answer.gradient {
                gradient.extend(output.gradient);
            }
        }
        // A reader that went away needs no answer.
        let _ = reply.send(answer);
    }
}
