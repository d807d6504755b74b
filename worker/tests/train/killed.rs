//! A run that is killed again and again, as a process, at whatever it is doing.

use std::thread;
use std::time::Duration;

use carryon_worker::train::metrics::{self, Line};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use super::Job;
use super::lock::Trainer;
use super::toy_pool::ToyPool;

const KILLS: usize = 50;
/// Longest life of a trainer, milliseconds: it has begun to train after some tens.
const LONGEST: u64 = 400;

/// Thousands of steps, with evaluations and checkpoints between them, most of which are soon forgotten.
fn long() -> Job {
    let mut job = Job::chat();
    job.config.training.max_steps = Some(6000);
    job.config.evaluation.eval_steps = Some(50);
    job.config.checkpoint.save_steps = 3;
    job.config.checkpoint.save_total_limit = 3;
    job
}

/// Losses of steps and evaluations, in the bits that were written.
fn losses(job: &Job) -> Vec<(u64, u64)> {
    let bits = |line| match line {
        Line::Step(line) => (line.step, line.loss.to_bits()),
        Line::Evaluation(line) => (line.step, line.eval_loss.to_bits()),
    };
    metrics::read(&job.path("output/metrics.jsonl")).unwrap().into_iter().map(bits).collect()
}

#[test]
fn a_run_killed_at_fifty_random_moments_has_the_bits_of_an_unbroken_one() {
    let (pool, unbroken, killed) = (ToyPool::start(), long(), long());
    unbroken.run(&pool).unwrap();
    let mut moments = ChaCha8Rng::seed_from_u64(50);
    for kill in 0..KILLS {
        let mut trainer = Trainer::start(&killed, &pool);
        thread::sleep(Duration::from_millis(moments.random_range(0..LONGEST)));
        assert!(trainer.runs(), "the run has ended before kill {kill}: it is too short to be killed so often");
        // kill -9.
        drop(trainer);
    }
    killed.run(&pool).unwrap();
    assert!(killed.head() == unbroken.head(), "other bits");
    assert_eq!(losses(&killed), losses(&unbroken));
}
