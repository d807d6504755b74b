//! Work for trainers: hidden states of whole sequences, and losses of rows.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::base::queue::training_batch;
use crate::exchange::states::{from_bytes, number_bytes};
use crate::exchange::{LossRequest, LossResponse, SequenceStates};
use crate::head::loss::{self, LossWeights};
use crate::kernel::{Arena, Backend, PageTable, Result, pages_for};
use crate::model::{Capture, LmHead, Model, Pause, Plan, Slot, Tap};

/// Rows of a layer between which served sequences get a step.
pub const PIECE_ROWS: usize = 192;
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

    /// Sends the states of one sequence, one entry per tap.
    pub fn send(&self, (place, tokens, room): Planned, taps: Vec<Bytes>, dtype: Dtype) {
        // A reader that went away is noticed before the next batch.
        let _ = self.out.send((SequenceStates { index: place, tokens: tokens.len(), dtype, taps }, room));
    }
}

/// Tap states of whole sequences, as numbers of the pool's type; none when `pause` ended the pass. Every layer runs over all of them before the
/// next, so that keys and values take a layer's memory.
pub fn capture<B: Backend>(
    model: &Model<B>,
    arena: &mut Arena<B>,
    batch: &[Planned],
    taps: &Taps,
    pause: Pause<'_>,
) -> Result<Option<Vec<Vec<Bytes>>>> {
    let mut pages = 0..;
    let mut tables: Vec<_> =
        batch.iter().map(|(_, tokens, _)| PageTable { pages: pages.by_ref().take(pages_for(tokens.len())).collect(), length: 0 }).collect();
    let taken = pages.start;
    for page in 0..taken {
        arena.take(&model.backend, page)?;
    }
    let mut slots: Vec<_> = batch.iter().zip(&mut tables).map(|((_, tokens, _), kv)| Slot { tokens, kv }).collect();
    let captures: Vec<_> = Tap::all(taps).map(|tap| Capture { tap, rows: None }).collect();
    let mut pieces: Vec<Vec<Bytes>> = vec![Vec::new(); captures.len()];
    let mut keep = |index: usize, _first: usize, rows: B::Rows| {
        pieces[index].push(model.backend.read_bytes(&rows, model.dtype)?);
        Ok(())
    };
    let flow = model.run(arena, &mut slots, Plan { piece_rows: PIECE_ROWS, captures: &captures }, &mut keep, pause)?;
    (0..taken).for_each(|page| arena.give(&model.backend, page));
    if flow.is_break() {
        return Ok(None);
    }
    let row = model.config.hidden_size * number_bytes(model.dtype);
    let mut taps: Vec<Pieces> = pieces.into_iter().map(|pieces| Pieces(pieces.into())).collect();
    Ok(Some(batch.iter().map(|(_, tokens, _)| taps.iter_mut().map(|pieces| pieces.take(tokens.len() * row)).collect()).collect()))
}

/// Bytes that came in pieces.
struct Pieces(VecDeque<Bytes>);

impl Pieces {
    /// The next `length` bytes: without a copy where they lie in one piece.
    fn take(&mut self, length: usize) -> Bytes {
        match self.0.front_mut() {
            Some(piece) if piece.len() > length => piece.split_to(length),
            Some(piece) if piece.len() == length => self.0.pop_front().unwrap_or_default(),
            _ => {
                let mut whole = BytesMut::with_capacity(length);
                while whole.len() < length {
                    let Some(piece) = self.0.front_mut() else { break };
                    whole.extend_from_slice(&piece.split_to(piece.len().min(length - whole.len())));
                    if piece.is_empty() {
                        self.0.pop_front();
                    }
                }
                whole.freeze()
            }
        }
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
    pub fn run<B: Backend>(self, backend: &B, lm_head: &LmHead<B>, mut pause: impl FnMut(bool) -> Result<bool>) -> Result<()> {
        let Self { request, reply, permit: _permit } = self;
        let (width, number) = (request.hidden_size, number_bytes(request.dtype));
        let mut answer = LossResponse { loss: Vec::new(), gradient: request.gradient.then(Vec::new) };
        let backward = request.gradient.then(|| lm_head.backward());
        let weights = LossWeights { forward: lm_head.forward(), backward, dtype: lm_head.dtype() };
        for (slice, targets) in request.targets.chunks(LOSS_ROWS).enumerate() {
            if slice > 0 && !pause(reply.is_closed())? {
                return Ok(());
            }
            let values = slice * LOSS_ROWS * width..(slice * LOSS_ROWS + targets.len()) * width;
            let mut x = vec![0.0; values.len()];
            from_bytes(&request.x[values.start * number..values.end * number], request.dtype, &mut x);
            let delta = request.delta.as_ref().map(|delta| (&delta[values], 1.0));
            let output = loss::lm_loss(backend, &weights, &x, delta, targets)?;
            answer.loss.extend(output.loss);
            if let Some(gradient) = &mut answer.gradient {
                gradient.extend(output.gradient);
            }
        }
        // A reader that went away needs no answer.
        let _ = reply.send(answer);
        Ok(())
    }
}
