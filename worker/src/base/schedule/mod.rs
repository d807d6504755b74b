//! What the device does next, and for how long: pure, without device and clock. Whoever runs it measures, and tells what it measured.
//!
//! Serving goes before training, a loss before a capture, and each in turn among its own. Everything is bounded in time by what steps and slices were
//! measured to cost, so that three promises hold together:
//!
//! - an answer's next token comes after at most one step ([`STEP_SECONDS`], or twice the time that the answers alone take) and half as long again of
//!   training;
//! - training work that waits gets a third of the time ([`TRAINING_SHARE`]), captures a quarter of that of losses ([`CAPTURE_SHARE`]);
//! - what comes in while the device is at something is seen after one slice ([`MOST_SLICE`]) or step ([`PROMPT_SECONDS`]).
//!
//! ```text
//! loop: refresh, then turn() → Serve: grants(), run a step, served()
//!                              Train: take() from its lane for a start, run so many rows, trained(); end() after a batch's last
//!                              Idle:  wait for what comes
//! ```
//!
//! A capture that has begun holds on between two of its slices while steps and losses run.

mod cost;
mod serving;
mod share;
#[cfg(test)]
mod simulation;
mod training;

use cost::{Cost, Pace};
use share::Share;

pub use cost::Tokens;
pub use serving::{Demand, PROMPT_SECONDS, STEP_SECONDS, Serving};
pub use training::{Kind, Lane, Trainer, Work, training_batch};

/// Least share of the time that training gets while it waits. What is promised is a quarter of its speed alone; slices work a little slower than whole
/// batches. An answer takes half as long again beside it.
pub const TRAINING_SHARE: f64 = 1.0 / 3.0;
/// Least share of the time of both that captures get beside losses: trainers who never stop asking for losses must not keep another from its states.
pub const CAPTURE_SHARE: f64 = 0.25;
/// Shortest slice beside answers: below it, starting and stopping costs more than the work. What is owed is saved up until then.
pub const LEAST_SLICE: f64 = 0.004;
/// Longest slice: how long a request that finds a device that only trains waits for it.
pub const MOST_SLICE: f64 = 0.05;
/// Seconds of a piece of a layer, between two of which a capture can hold on: a slice is longer than it should be by half of one. Products of fewer
/// rows are slower, so pieces are longer where nobody waits as the capture begins.
const PIECE: f64 = LEAST_SLICE;
const PIECE_ALONE: f64 = MOST_SLICE / 4.0;
/// Fewest rows of a piece, whatever they take.
const LEAST_PIECE: usize = 32;
/// Fewest rows of a loss in a slice.
const LEAST_LOSS: usize = 8;

/// What the device does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A step of the active sequences.
    Serve,
    /// So many rows of a job of a lane: of a loss, or of a layer.
    Train(Kind, Work, usize),
    /// Nothing can run.
    Idle,
}

/// Served sequences and training jobs, what they cost, and who is owed time.
#[derive(Debug)]
pub struct Schedule<S, L, C> {
    /// Sequences that are served.
    pub serving: Serving<S>,
    /// Losses that trainers wait for.
    pub losses: Lane<L>,
    /// Hidden states that trainers ask for ahead of their use.
    pub captures: Lane<C>,
    cost: Cost,
    loss_pace: Pace,
    capture_pace: Pace,
    max_tokens: usize,
    training_share: Share,
    capture_share: Share,
    /// Seconds that training may run until the next step.
    allowance: f64,
    /// What could run when the turn was chosen: it alone has a claim.
    waiting: Waiting,
}

#[derive(Clone, Copy, Debug, Default)]
struct Waiting {
    sequences: bool,
    loss: bool,
    capture: bool,
}

impl<S, L, C> Schedule<S, L, C> {
    /// An empty schedule: at most `max_active` sequences run together, at most `max_tokens` tokens in a step.
    pub fn new(max_active: usize, max_tokens: usize) -> Self {
        Self {
            serving: Serving::new(max_active),
            losses: Lane::default(),
            captures: Lane::default(),
            cost: Cost::default(),
            loss_pace: Pace::default(),
            capture_pace: Pace::default(),
            max_tokens,
            training_share: Share::new(TRAINING_SHARE),
            capture_share: Share::new(CAPTURE_SHARE),
            allowance: 0.0,
            waiting: Waiting::default(),
        }
    }

    /// Tokens of a step at most.
    pub fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Rows of a piece of a layer, for the capture that begins now.
    pub fn piece_rows(&self) -> usize {
        self.capture_pace.rows(if self.waiting.sequences { PIECE } else { PIECE_ALONE }, LEAST_PIECE)
    }

    /// Chooses what runs next. `sequences` says whether an active one has something to run now: all may wait for what comes from outside. `ready` says
    /// whether a capture can begin now: its reader may be slow.
    pub fn turn(&mut self, sequences: bool, ready: impl Fn(&C) -> bool) -> Turn {
        let (loss, capture) = (self.losses.work(|_| true), self.captures.work(ready));
        self.waiting = Waiting { sequences, loss: loss.is_some(), capture: capture.is_some() };
        if capture.is_none() {
            self.capture_share.reset();
        }
        if loss.is_none() && capture.is_none() {
            self.training_share.reset();
            return if sequences { Turn::Serve } else { Turn::Idle };
        }
        let due = self.training_share.owed().min(self.allowance);
        if sequences && due < LEAST_SLICE {
            return Turn::Serve;
        }
        let seconds = if sequences { due.min(MOST_SLICE) } else { MOST_SLICE };
        // A loss that has begun is finished: it is short, and somebody waits.
        let capture_first = self.capture_share.owed() >= LEAST_SLICE && !self.losses.is_running();
        match (loss, capture) {
            (Some(_), Some(work)) if capture_first => self.slice(Kind::Capture, work, seconds.min(self.capture_share.owed())),
            (Some(work), _) => self.slice(Kind::Loss, work, seconds),
            (None, Some(work)) => self.slice(Kind::Capture, work, seconds),
            (None, None) => Turn::Idle,
        }
    }

    /// The rows that take `seconds`.
    fn slice(&self, kind: Kind, work: Work, seconds: f64) -> Turn {
        let rows = match kind {
            Kind::Loss => self.loss_pace.rows(seconds, LEAST_LOSS),
            Kind::Capture => self.capture_pace.rows(seconds, LEAST_PIECE),
        };
        Turn::Train(kind, work, rows)
    }

    /// Shares out the tokens of a step, one entry per active sequence.
    pub fn grants(&mut self, demands: &[Demand]) -> Vec<usize> {
        self.serving.grants(demands, &self.cost, self.max_tokens)
    }

    /// A step has run.
    pub fn served(&mut self, tokens: Tokens, seconds: f64) {
        // A step that took longer than it should is paid for in the turns after several steps.
        self.allowance = self.training_share.part_of(seconds.min(self.cost.step(tokens)).max(STEP_SECONDS));
        self.cost.learn(tokens, seconds);
        if self.waiting.loss || self.waiting.capture {
            self.training_share.wait(seconds);
        }
    }

    /// A slice of `rows` has run.
    pub fn trained(&mut self, kind: Kind, rows: usize, seconds: f64) {
        match kind {
            Kind::Loss => self.loss_pace.learn(rows, seconds),
            Kind::Capture => self.capture_pace.learn(rows, seconds),
        }
        self.allowance -= seconds;
        self.training_share.run(seconds, self.waiting.sequences);
        match kind {
            Kind::Loss if self.waiting.capture => self.capture_share.wait(seconds),
            Kind::Loss => {}
            Kind::Capture => self.capture_share.run(seconds, self.waiting.loss),
        }
    }
}
