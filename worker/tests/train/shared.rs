//! Jobs that share the hidden states of one pool and data.

use std::thread;

use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainArgs, run_until};

use super::Job;
use super::lock::{AMID, Trainer};
use super::toy_pool::ToyPool;

/// Sequences of [`Job::chat`], held out ones included.
const SEQUENCES: u64 = 17;

fn sharing(job: &Job, pool: &ToyPool, folder: &tempfile::TempDir) -> TrainArgs {
    TrainArgs { state_cache: Some(folder.path().join("states")), ..job.args(pool) }
}

fn seeded(seed: u64) -> Job {
    let mut job = Job::chat();
    job.config.training.seed = seed;
    job
}

/// The head of a job that asks for all its states itself.
fn alone(seed: u64) -> Vec<u8> {
    let job = seeded(seed);
    job.run(&ToyPool::start()).unwrap();
    job.head()
}

#[test]
fn jobs_at_once_and_later_ask_the_base_once_and_train_the_same_heads() {
    let (pool, folder) = (ToyPool::start(), tempfile::tempdir().unwrap());
    let jobs = [seeded(0), seeded(0), seeded(1)];
    thread::scope(|scope| {
        for job in &jobs {
            let args = sharing(job, &pool, &folder);
            scope.spawn(move || run_until(&args, &Stop::default()).unwrap());
        }
    });
    assert_eq!(pool.asked(), SEQUENCES);
    let later = seeded(2);
    run_until(&sharing(&later, &pool, &folder), &Stop::default()).unwrap();
    assert_eq!(pool.asked(), SEQUENCES);
    for (job, seed) in jobs.iter().zip([0, 0, 1]).chain([(&later, 2)]) {
        assert!(job.head() == alone(seed), "seed {seed}");
        assert!(!job.path("output/cache").exists());
    }
}

#[test]
fn what_a_killed_job_has_written_serves_the_next() {
    let (pool, folder) = (ToyPool::start(), tempfile::tempdir().unwrap());
    let (killed, next) = (seeded(0), seeded(1));
    pool.hold_after(AMID / 2);
    let mut trainer = Trainer::start_with(&sharing(&killed, &pool, &folder));
    trainer.until("hidden states");
    while !pool.holds() {
        thread::yield_now();
    }
    // kill -9.
    drop(trainer);
    let written = pool.asked();
    pool.release();
    assert!(0 < written && written < SEQUENCES, "{written}");
    run_until(&sharing(&next, &pool, &folder), &Stop::default()).unwrap();
    // Two micro-batches of four may have been on their way.
    assert!(pool.asked() <= SEQUENCES + 8, "{} after {written}", pool.asked());
    assert!(next.head() == alone(1));
}
