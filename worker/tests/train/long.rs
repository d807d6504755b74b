//! Runs of many steps as a process: killed again and again at whatever they are doing, and left alone for long.

use std::fs;
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
fn interrupted() -> Job {
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
    let (pool, unbroken, killed) = (ToyPool::start(), interrupted(), interrupted());
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

/// Anonymous memory of a process, KiB.
fn anonymous(trainer: &Trainer) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", trainer.id())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
#[ignore = "takes minutes"]
fn a_hundred_thousand_steps_take_no_more_memory_or_time_a_step_and_lose_nothing_they_learned() {
    const STEPS: u64 = 100_000;
    let (pool, mut job) = (ToyPool::start(), interrupted());
    job.config.training.max_steps = Some(STEPS);
    job.config.evaluation.eval_steps = Some(STEPS / 10);
    job.config.checkpoint.save_steps = 1000;
    let mut trainer = Trainer::start(&job, &pool);
    let mut memory = Vec::new();
    for tenth in 1..10 {
        trainer.until(&format!("step {}/{STEPS}", tenth * STEPS / 10));
        memory.push(anonymous(&trainer));
    }
    assert_eq!(trainer.exit_code(), Some(0));
    let steps = job.steps();
    let seconds = |tenth: u64| steps[(tenth * STEPS / 10 - 1) as usize].seconds - steps[((tenth - 1) * STEPS / 10) as usize].seconds;
    let taken: Vec<f64> = (1..=10).map(seconds).collect();
    // Of the samples that are learned: a dozen of them are known by heart soon, and others only worse for it.
    let losses: Vec<f64> =
        steps.chunks((STEPS / 10) as usize).map(|tenth| tenth.iter().map(|step| step.loss).sum::<f64>() * 10.0 / STEPS as f64).collect();
    println!("anonymous memory {memory:?} KiB; a tenth of the steps takes {taken:.1?} s and has a loss of {losses:.4?}");
    assert!(memory[8] < memory[0] + 4096, "{memory:?}");
    // Others use the machine too.
    assert!(taken[8..].iter().copied().fold(f64::INFINITY, f64::min) < 1.5 * taken[1], "{taken:?}");
    // While the rate is high a tenth may be worse than the one before it; in the second half none is.
    assert!(losses[1..].iter().all(|loss| *loss < losses[0]), "{losses:?}");
    assert!(losses[4..].is_sorted_by(|before, after| before > after), "{losses:?}");
}
