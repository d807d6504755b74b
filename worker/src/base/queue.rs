//! Who runs next, and with how many tokens: pure, without device and clock.
//!
//! Serving goes before training. **Invariant** neither starves: after one serving step a waiting training batch gets at
//! least a slice (one layer, between which serving steps run), after one slice waiting sequences get a step.

use std::collections::VecDeque;

pub use super::schedule::{Demand, training_batch};

/// Shares `budget` tokens out among sequences in order of arrival: each decoding sequence one first, so that no prompt
/// stops an answer, then prompts in chunks. The result has one entry per sequence.
pub fn serving_batch(demands: &[Demand], budget: usize) -> Vec<usize> {
    let mut rest = budget;
    let mut grants = vec![0; demands.len()];
    for (grant, demand) in grants.iter_mut().zip(demands) {
        if *demand == Demand::Decode && rest > 0 {
            *grant = 1;
            rest -= 1;
        }
    }
    for (grant, demand) in grants.iter_mut().zip(demands) {
        if let Demand::Prefill(tokens) = demand {
            *grant = rest.min(*tokens);
            rest -= *grant;
        }
    }
    grants
}

/// Served sequences, active and waiting, and training jobs, in order of arrival.
#[derive(Debug)]
pub struct Queue<S, T> {
    max_active: usize,
    active: Vec<S>,
    waiting: VecDeque<S>,
    training: VecDeque<T>,
    served_last: bool,
}

/// What the device does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Turn {
    /// A step of the active sequences.
    Serve,
    /// A batch of the training job at this place.
    Train(usize),
    /// Nothing can run.
    Idle,
}

impl<S, T> Queue<S, T> {
    /// An empty queue that runs at most `max_active` sequences together.
    pub fn new(max_active: usize) -> Self {
        Self { max_active, active: Vec::new(), waiting: VecDeque::new(), training: VecDeque::new(), served_last: false }
    }

    /// Adds a sequence to be served.
    pub fn push_sequence(&mut self, sequence: S) {
        self.waiting.push_back(sequence);
    }

    /// Adds a training job.
    pub fn push_training(&mut self, job: T) {
        self.training.push_back(job);
    }

    /// Drops what nobody waits for any more, and lets waiting sequences into the places that are free.
    pub fn refresh(&mut self, sequence_wanted: impl Fn(&S) -> bool, job_wanted: impl Fn(&T) -> bool) {
        self.active.retain(&sequence_wanted);
        self.waiting.retain(&sequence_wanted);
        self.training.retain(&job_wanted);
        let free = self.max_active.saturating_sub(self.active.len()).min(self.waiting.len());
        self.active.extend(self.waiting.drain(..free));
    }

    /// Decides between serving and training. `ready` says whether a job can run now: its reader may be slow.
    pub fn turn(&mut self, ready: impl Fn(&T) -> bool) -> Turn {
        let job = self.training.iter().position(ready);
        let turn = match (self.active.is_empty(), job) {
            (true, None) => Turn::Idle,
            (false, None) => Turn::Serve,
            (false, Some(_)) if !self.served_last => Turn::Serve,
            (_, Some(place)) => Turn::Train(place),
        };
        self.served_last = turn == Turn::Serve;
        turn
    }

    /// The active sequences, in order of arrival; those removed make room at the next [`Self::refresh`].
    pub fn active(&mut self) -> &mut Vec<S> {
        &mut self.active
    }

    /// Takes the training job at `place` out.
    pub fn take_training(&mut self, place: usize) -> Option<T> {
        self.training.remove(place)
    }

    /// Puts an unfinished training job back to its front.
    pub fn return_training(&mut self, job: T) {
        self.training.push_front(job);
    }

    /// Sequences active and waiting, and training jobs.
    pub fn lengths(&self) -> (usize, usize, usize) {
        (self.active.len(), self.waiting.len(), self.training.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Demand::{Decode, Prefill};

    #[test]
    fn decoding_comes_first_and_prompts_share_the_rest_in_order() {
        let cases: [(&[Demand], usize, &[usize]); 5] = [
            (&[Prefill(10), Decode, Prefill(10), Decode], 16, &[10, 1, 4, 1]),
            (&[Prefill(100), Decode], 16, &[15, 1]),
            (&[Decode, Decode, Decode], 2, &[1, 1, 0]),
            (&[Prefill(3)], 16, &[3]),
            (&[], 16, &[]),
        ];
        for (demands, budget, expected) in cases {
            assert_eq!(serving_batch(demands, budget), expected, "{demands:?}");
        }
    }

    #[test]
    fn serving_goes_first_and_training_gets_every_second_turn() {
        let mut queue = Queue::new(2);
        queue.push_training("job");
        for sequence in ["a", "b", "c"] {
            queue.push_sequence(sequence);
        }
        queue.refresh(|_| true, |_| true);
        assert_eq!(queue.lengths(), (2, 1, 1));
        let turns: Vec<_> = (0..4).map(|_| queue.turn(|_| true)).collect();
        assert_eq!(turns, [Turn::Serve, Turn::Train(0), Turn::Serve, Turn::Train(0)]);
    }

    #[test]
    fn a_job_with_a_slow_reader_lets_others_pass() {
        let mut queue: Queue<&str, _> = Queue::new(2);
        queue.push_training("slow");
        queue.push_training("fast");
        assert_eq!(queue.turn(|job| *job == "fast"), Turn::Train(1));
        assert_eq!(queue.turn(|_| false), Turn::Idle);
    }

    #[test]
    fn what_nobody_waits_for_frees_its_place() {
        let mut queue: Queue<_, &str> = Queue::new(1);
        queue.push_sequence("gone");
        queue.refresh(|_| true, |_| true);
        queue.push_sequence("next");
        queue.push_training("job");
        queue.refresh(|sequence| *sequence != "gone", |_| false);
        assert_eq!(queue.active(), &["next"]);
        assert_eq!(queue.lengths(), (1, 0, 0));
    }
}
