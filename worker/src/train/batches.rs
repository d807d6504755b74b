//! The order of samples: a pure function of lengths, seed and epoch, so a cursor of two numbers resumes it.

use std::sync::Arc;

use rand::seq::SliceRandom as _;
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Optimizer batches whose samples are sorted by length together: similar lengths share a batch, the order stays random.
const BUCKET: usize = 8;

/// How training batches are drawn.
#[derive(Clone, Debug)]
pub struct Order {
    /// Tokens of each sample.
    pub lengths: Arc<[u32]>,
    /// Samples of a micro-batch.
    pub batch: usize,
    /// Micro-batches of an optimizer step.
    pub accumulation: usize,
    /// Samples to replay, and how many of them are beside each micro-batch; their indices begin behind the others'.
    pub replay: (usize, usize),
    /// Seed of the shuffles.
    pub seed: u64,
}

/// Where training stands: the next optimizer step is number `step` (from 0) of `epoch` (from 0).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cursor {
    /// Pass over the data.
    pub epoch: u64,
    /// Optimizer step inside the epoch.
    pub step: u64,
}

impl Order {
    /// Optimizer steps of one epoch; the last drawn from may be smaller.
    pub fn steps_per_epoch(&self) -> u64 {
        self.lengths.len().div_ceil(self.batch * self.accumulation) as u64
    }

    /// The optimizer batches of `epoch` as indices of samples: shuffled, sorted by length inside buckets of 8, batches shuffled.
    /// They depend on the product of batch size and accumulation alone, so 2 × 4 sees the samples of 8 × 1.
    pub fn epoch(&self, epoch: u64) -> Epoch {
        let optimizer_batch = self.batch * self.accumulation;
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(epoch + 1);
        let mut indices: Vec<u32> = (0..self.lengths.len() as u32).collect();
        indices.shuffle(&mut random);
        for bucket in indices.chunks_mut(optimizer_batch * BUCKET) {
            bucket.sort_by_key(|&index| self.lengths[index as usize]);
        }
        let mut order: Vec<u32> = (0..indices.len().div_ceil(optimizer_batch) as u32).collect();
        order.shuffle(&mut random);
        Epoch { indices, order, batch: optimizer_batch }
    }

    /// The optimizer steps from `cursor` on, without end: the cursor behind each and its micro-batches.
    pub fn steps(self, cursor: Cursor) -> impl Iterator<Item = Step> + Send {
        let per_epoch = self.steps_per_epoch();
        (cursor.epoch..).flat_map(move |epoch| {
            let skip = if epoch == cursor.epoch { usize::try_from(cursor.step).unwrap_or(usize::MAX) } else { 0 };
            let (order, drawn) = (self.clone(), self.epoch(epoch));
            (skip..drawn.batches()).map(move |index| {
                let (batch, done) = (drawn.batch(index), index as u64 + 1);
                let behind = if done == per_epoch { Cursor { epoch: epoch + 1, step: 0 } } else { Cursor { epoch, step: done } };
                let first = (epoch * per_epoch + index as u64) * order.accumulation as u64;
                let with_replay = |(own, number): (&[usize], u64)| own.iter().copied().chain(order.replayed(number)).collect();
                Step { behind, micro_batches: batch.chunks(order.batch).zip(first..).map(with_replay).collect() }
            })
        })
    }

    /// Indices of the samples that are replayed beside micro-batch number `number`, drawn anew each time.
    fn replayed(&self, number: u64) -> Vec<usize> {
        let (count, batch) = self.replay;
        let mut random = ChaCha8Rng::seed_from_u64(self.seed);
        random.set_stream(u64::MAX / 2 + number);
        (0..if count == 0 { 0 } else { batch }).map(|_| self.lengths.len() + random.random_range(0..count)).collect()
    }
}

/// One pass over the data: 4 bytes a sample and a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Epoch {
    indices: Vec<u32>,
    /// Which batch of `indices` is whose turn.
    order: Vec<u32>,
    /// Samples of an optimizer batch.
    batch: usize,
}

impl Epoch {
    /// How many optimizer batches there are.
    pub fn batches(&self) -> usize {
        self.order.len()
    }

    /// Indices of the samples of optimizer batch `index`.
    pub fn batch(&self, index: usize) -> Vec<usize> {
        let start = self.order[index] as usize * self.batch;
        let end = self.indices.len().min(start + self.batch);
        self.indices[start..end].iter().map(|&index| index as usize).collect()
    }
}

/// One optimizer step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Where training stands once it is done.
    pub behind: Cursor,
    /// Indices of the samples of each micro-batch.
    pub micro_batches: Vec<Vec<usize>>,
}

/// Evaluation batches: all samples, sorted by length.
pub fn evaluation(lengths: &[u32], batch: usize) -> Vec<Vec<usize>> {
    let mut indices: Vec<usize> = (0..lengths.len()).collect();
    indices.sort_by_key(|&index| lengths[index]);
    indices.chunks(batch).map(<[usize]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn order(samples: usize, batch: usize, accumulation: usize) -> Order {
        Order { lengths: (0..samples as u32).map(|index| 10 + index * 7 % 31).collect(), batch, accumulation, replay: (0, 0), seed: 7 }
    }

    fn all(order: &Order, epoch: u64) -> Vec<Vec<usize>> {
        let drawn = order.epoch(epoch);
        (0..drawn.batches()).map(|index| drawn.batch(index)).collect()
    }

    /// As it was when checkpoints were written that are still gone on from.
    fn before(order: &Order, epoch: u64) -> Vec<Vec<usize>> {
        let optimizer_batch = order.batch * order.accumulation;
        let mut random = ChaCha8Rng::seed_from_u64(order.seed);
        random.set_stream(epoch + 1);
        let mut indices: Vec<usize> = (0..order.lengths.len()).collect();
        indices.shuffle(&mut random);
        let mut batches: Vec<Vec<usize>> = Vec::new();
        for bucket in indices.chunks_mut(optimizer_batch * BUCKET) {
            bucket.sort_by_key(|&index| order.lengths[index]);
            batches.extend(bucket.chunks(optimizer_batch).map(<[usize]>::to_vec));
        }
        batches.shuffle(&mut random);
        batches
    }

    #[test]
    fn samples_are_replayed_beside_each_micro_batch_and_as_they_were_after_a_restart() {
        let order = Order { replay: (5, 2), ..order(20, 4, 2) };
        let steps: Vec<Step> = order.clone().steps(Cursor::default()).take(7).collect();
        let mut drawn = std::collections::BTreeSet::new();
        for batch in steps.iter().flat_map(|step| &step.micro_batches) {
            let (own, others): (Vec<usize>, Vec<usize>) = batch.iter().partition(|index| **index < 20);
            assert!(own.len() <= 4 && others.len() == 2 && others.iter().all(|index| *index < 25), "{batch:?}");
            drawn.extend(others);
        }
        assert_eq!(drawn.len(), 5, "all come");
        let resumed: Vec<Step> = order.steps(steps[3].behind).take(3).collect();
        assert_eq!(resumed, steps[4..]);
    }

    #[test]
    fn the_order_is_that_of_checkpoints_from_before() {
        for (samples, batch, accumulation) in [(1, 8, 1), (101, 8, 1), (1000, 4, 3), (64, 8, 1)] {
            let order = order(samples, batch, accumulation);
            (0..3).for_each(|epoch| assert_eq!(all(&order, epoch), before(&order, epoch), "{samples}"));
        }
    }

    #[test]
    fn every_sample_comes_once_an_epoch() {
        let order = order(101, 8, 1);
        let mut seen: Vec<usize> = all(&order, 0).concat();
        seen.sort_unstable();
        assert_eq!(seen, (0..101).collect::<Vec<_>>());
        assert_eq!(order.steps_per_epoch(), 13);
    }

    #[test]
    fn epochs_differ_and_repeat_by_seed() {
        let order = order(64, 8, 1);
        assert_eq!(order.epoch(0), order.epoch(0));
        assert_ne!(order.epoch(0), order.epoch(1));
        assert_ne!(order.epoch(0), Order { seed: 8, ..order.clone() }.epoch(0));
    }

    #[test]
    fn batches_hold_similar_lengths() {
        let order = order(512, 8, 1);
        let spread = |batch: &Vec<usize>| {
            let lengths: Vec<u32> = batch.iter().map(|&index| order.lengths[index]).collect();
            lengths.iter().max().unwrap() - lengths.iter().min().unwrap()
        };
        let mean = all(&order, 0).iter().map(spread).sum::<u32>() / 64;
        assert!(mean <= 6, "mean spread {mean} of 31");
    }

    #[test]
    fn a_cursor_resumes_where_it_stopped() {
        let order = order(50, 4, 3);
        let all: Vec<_> = order.clone().steps(Cursor::default()).take(15).collect();
        for (done, step) in all.iter().enumerate().take(10) {
            let resumed: Vec<_> = order.clone().steps(step.behind).take(5).collect();
            assert_eq!(resumed, all[done + 1..done + 6]);
        }
    }

    #[test]
    fn accumulation_sees_the_samples_of_one_large_batch() {
        let large: Vec<_> = order(60, 8, 1).steps(Cursor::default()).take(9).collect();
        let small: Vec<_> = order(60, 2, 4).steps(Cursor::default()).take(9).collect();
        for (large, small) in large.iter().zip(&small) {
            assert_eq!(large.micro_batches.concat(), small.micro_batches.concat());
            assert!(small.micro_batches.iter().all(|batch| batch.len() <= 2));
        }
    }

    #[test]
    fn evaluation_is_sorted_and_whole() {
        assert_eq!(evaluation(&[5, 1, 3], 2), [vec![1, 2], vec![0]]);
    }
}
