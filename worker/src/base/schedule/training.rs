//! Work for trainers: whose turn it is.

use std::collections::VecDeque;

/// What a trainer asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Somebody waits for it: it goes before captures.
    Loss,
    /// Hidden states, which a trainer asks for ahead of their use.
    Capture,
}

/// What of a lane runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// The job at this place is taken.
    Start(usize),
    /// The job that was taken goes on.
    Continue,
}

/// Who asks: requests with equal numbers are one trainer's.
pub type Trainer = u64;

/// Jobs of one kind, in order of arrival; their trainers take turns.
#[derive(Debug)]
pub struct Lane<T> {
    waiting: VecDeque<(Trainer, T)>,
    /// Trainers in the order of their turns: whose last turn, or first job, is longest ago comes first.
    order: Vec<Trainer>,
    /// Whose job runs.
    running: Option<Trainer>,
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), order: Vec::new(), running: None }
    }
}

impl<T> Lane<T> {
    /// Adds a job behind all others.
    pub fn push(&mut self, trainer: Trainer, job: T) {
        if !self.order.contains(&trainer) {
            self.order.push(trainer);
        }
        self.waiting.push_back((trainer, job));
    }

    /// Drops jobs for which nobody waits any more.
    pub fn retain(&mut self, wanted: impl Fn(&T) -> bool) {
        self.waiting.retain(|(_, job)| wanted(job));
    }

    /// What of this lane can run.
    pub(super) fn work(&self, ready: impl Fn(&T) -> bool) -> Option<Work> {
        if self.is_running() { Some(Work::Continue) } else { self.next(ready).map(Work::Start) }
    }

    /// Whether a job was taken and has not ended.
    pub fn is_running(&self) -> bool {
        self.running.is_some()
    }

    /// Jobs that wait.
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// The job that runs next: the first that is ready of the trainer whose turn it is.
    pub fn next(&self, ready: impl Fn(&T) -> bool) -> Option<usize> {
        let turn = |place: &usize| self.order.iter().position(|trainer| *trainer == self.waiting[*place].0);
        (0..self.waiting.len()).filter(|place| ready(&self.waiting[*place].1)).min_by_key(turn)
    }

    /// Takes the job at `place` out, to run one turn of it.
    pub fn take(&mut self, place: usize) -> Option<T> {
        let (trainer, job) = self.waiting.remove(place)?;
        self.order.retain(|other| *other != trainer && self.waiting.iter().any(|(waiting, _)| waiting == other));
        self.order.push(trainer);
        self.running = Some(trainer);
        Some(job)
    }

    /// The turn of the job that ran is over, or nobody waits for it any more; what is left of it waits in front of its trainer's others.
    pub fn end(&mut self, rest: Option<T>) {
        if let (Some(trainer), Some(job)) = (self.running.take(), rest) {
            self.waiting.push_front((trainer, job));
        }
    }
}

/// How many whole sequences from the front fit into `budget` tokens; at least one, which may be longer than the budget.
pub fn training_batch(lengths: impl IntoIterator<Item = usize>, budget: usize) -> usize {
    let mut tokens = 0;
    let fits = |length| {
        tokens += length;
        tokens <= budget
    };
    lengths.into_iter().map(fits).take_while(|fits| *fits).count().max(1)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// The trainers of `turns` turns; every job goes on for ever.
    fn turns(lane: &mut Lane<char>, turns: usize, ready: impl Fn(&char) -> bool) -> String {
        let mut order = String::new();
        for _ in 0..turns {
            let Some(job) = lane.next(&ready).and_then(|place| lane.take(place)) else { break };
            order.push(job);
            lane.end(Some(job));
        }
        order
    }

    #[test]
    fn trainers_take_turns_however_many_requests_they_have_open() {
        for jobs in [
            &[(1, 'a'), (1, 'b'), (1, 'c'), (2, 'x')][..],
            &[(1, 'a'), (2, 'x'), (3, 'z')],
            &[(1, 'a'), (2, 'x'), (2, 'y'), (3, 'z')],
            &[(1, 'a')],
        ] {
            let mut lane = Lane::default();
            jobs.iter().for_each(|(trainer, job)| lane.push(*trainer, *job));
            let trainers =
                |order: &str| order.chars().map(|job| jobs.iter().find(|(_, other)| *other == job).unwrap().0).collect::<Vec<_>>();
            let rounds = trainers(&turns(&mut lane, 6, |_| true));
            let all: BTreeSet<_> = jobs.iter().map(|(trainer, _)| *trainer).collect();
            for round in rounds.chunks(all.len()) {
                assert_eq!(round.iter().copied().collect::<BTreeSet<_>>(), all, "{jobs:?}: {rounds:?}");
            }
        }
    }

    #[test]
    fn a_slow_reader_lets_others_pass_and_goes_next_when_it_is_ready() {
        let mut lane = Lane::default();
        [(1, 'a'), (2, 'x'), (3, 'z')].into_iter().for_each(|(trainer, job)| lane.push(trainer, job));
        assert_eq!(turns(&mut lane, 2, |job| *job != 'a'), "xz");
        assert_eq!(lane.next(|_| false), None);
        assert_eq!(turns(&mut lane, 1, |_| true), "a");
    }

    #[test]
    fn requests_that_keep_coming_do_not_keep_a_long_one_from_its_turn() {
        let mut lane = Lane::default();
        lane.push(0, 'l');
        let mut long = 0;
        for trainer in 1..21 {
            lane.push(trainer, 's');
            let job = lane.next(|_| true).and_then(|place| lane.take(place)).unwrap();
            long += usize::from(job == 'l');
            lane.end((job == 'l').then_some(job));
        }
        // Each time behind those that came while it ran.
        assert_eq!(long, 5);
    }

    #[test]
    fn training_batches_are_whole_sequences_within_the_budget() {
        for (lengths, expected) in [(&[5, 5, 5][..], 2), (&[11, 1], 1), (&[10], 1), (&[3, 3], 2), (&[], 1)] {
            assert_eq!(training_batch(lengths.iter().copied(), 10), expected, "{lengths:?}");
        }
    }
}
