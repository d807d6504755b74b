//! Text that has nothing to do with what is learned: measured, and left alone.

use std::fs;

use carryon_crds::job::LossPlace;
use carryon_worker::head::artifact;
use carryon_worker::train::metrics::{self, EvaluationLine, Line};

use super::Job;
use super::toy_pool::ToyPool;

/// Twelve texts, four of them to measure on. They have no letter of what `chat` learns: this base knows nothing, and a head that has learned to expect
/// small letters takes from all others.
fn job() -> Job {
    let mut job = Job::chat();
    let text = |range: std::ops::Range<usize>| {
        let line = |index: usize| serde_json::json!({"text": format!("{}{index}", "QZX#JVWK%".repeat(2 + index % 3))});
        range.map(|index| line(index).to_string() + "\n").collect::<String>()
    };
    fs::write(job.path("data/general.jsonl"), text(0..4)).unwrap();
    fs::write(job.path("data/replay.jsonl"), text(4..12)).unwrap();
    job.config.split.general = vec!["general.jsonl".to_owned()];
    job.config.training.num_train_epochs = 6;
    // It opens in more steps than these.
    job.config.head.gate = false;
    job
}

fn with_replay(kl_coef: f64) -> Job {
    let mut job = job();
    job.config.split.replay = vec!["replay.jsonl".to_owned()];
    job.config.training.kl_coef = Some(kl_coef);
    job
}

fn evaluations(job: &Job) -> Vec<EvaluationLine> {
    let lines = metrics::read(&job.path("output/metrics.jsonl")).unwrap();
    lines.into_iter().filter_map(|line| if let Line::Evaluation(line) = line { Some(line) } else { None }).collect()
}

#[test]
fn replay_holds_the_head_to_the_base_on_text_that_it_does_not_learn() {
    let (pool, alone, free, held) = (ToyPool::start(), job(), with_replay(0.0), with_replay(3.0));
    for job in [&alone, &free, &held] {
        job.run(&pool).unwrap();
    }
    let [without, with] = [&free, &held].map(|job| job.steps().iter().map(|step| step.replay_kl.unwrap()).collect::<Vec<_>>());
    assert_eq!((without[0], with[0]), (0.0, 0.0), "an untrained head is the base");
    assert!(with.iter().all(|nats| *nats >= 0.0) && with.last().unwrap() < &(0.2 * without.last().unwrap()), "{with:?}, {without:?}");
    assert!(alone.steps().iter().all(|step| step.replay_kl.is_none()));
    assert_eq!(alone.head(), free.head(), "what counts nothing changes nothing");
    let (all, last) = (evaluations(&held), evaluations(&held).pop().unwrap());
    assert_eq!(all[0].general_loss, all[0].base_general_loss);
    assert!(last.general_loss != last.base_general_loss && last.base_general_loss == all[0].base_general_loss);
    assert!(last.eval_loss < last.base_eval_loss.unwrap() - 0.2, "it learns all the same: {last:?}");
    let (_, manifest) = artifact::read(&held.head_folder()).unwrap();
    assert_eq!((manifest.metrics.general_loss, manifest.metrics.base_general_loss), (last.general_loss, last.base_general_loss));
    let report = fs::read_to_string(held.head_folder().join("report.html")).unwrap();
    assert!(report.contains("On text that has nothing to do with what it learned"), "{report}");
}

#[test]
fn a_run_with_replay_goes_on_with_the_bits_of_an_unbroken_one() {
    let (pool, job) = (ToyPool::start(), with_replay(1.0));
    job.run(&pool).unwrap();
    let (head, steps) = (job.head(), job.steps());
    job.kill_after(5);
    job.run(&pool).unwrap();
    let what =
        |steps: &[carryon_worker::train::metrics::StepLine]| steps.iter().map(|step| (step.loss, step.replay_kl)).collect::<Vec<_>>();
    assert_eq!((job.head(), what(&job.steps())), (head, what(&steps)));
}

#[test]
fn what_is_replayed_counts_alike_whatever_measures_it() {
    let (pool, remote, mut local, mut accumulated) = (ToyPool::start(), with_replay(2.0), with_replay(2.0), with_replay(2.0));
    local.config.training.loss = LossPlace::Local;
    accumulated.config.training.gradient_accumulation_steps = 2;
    accumulated.config.training.per_device_train_batch_size = 2;
    accumulated.config.training.replay_batch_size = Some(1);
    for job in [&remote, &local, &accumulated] {
        job.run(&pool).unwrap();
    }
    for (remote, local) in remote.steps().iter().zip(local.steps()) {
        assert!((remote.loss - local.loss).abs() < 1e-4 && (remote.replay_kl.unwrap() - local.replay_kl.unwrap()).abs() < 1e-4);
    }
    assert!(accumulated.steps().iter().all(|step| step.replay_kl.is_some()));
}

#[test]
fn alpha_is_the_best_one_that_general_text_allows() {
    let pool = ToyPool::start();
    let run = |alphas: &[f64], bound: Option<f64>| {
        let mut job = job();
        (job.config.evaluation.alphas, job.config.evaluation.max_general_loss_increase) = (alphas.to_vec(), bound);
        job.run(&pool).unwrap();
        artifact::read(&job.head_folder()).unwrap()
    };
    let (plain, _) = run(&[], None);
    let found = [0.25, 0.5, 1.0, 4.0, 16.0].map(|alpha| {
        let (head, manifest) = run(&[alpha], None);
        assert!(head.shape.alpha == alpha && head.weights == plain.weights, "the same weights count otherwise");
        let metrics = manifest.metrics;
        (alpha, metrics.eval_loss.unwrap(), metrics.general_loss.unwrap() - metrics.base_general_loss.unwrap())
    });
    let all = found.map(|(alpha, ..)| alpha);
    let best = |most: f64| {
        let allowed = found.iter().filter(|(_, _, costs)| *costs <= most);
        allowed.min_by(|(_, left, _), (_, right, _)| left.total_cmp(right)).map(|(alpha, loss, _)| (*alpha, *loss)).unwrap()
    };
    let told = |bound| {
        let (head, manifest) = run(&all, bound);
        (head.shape.alpha, manifest.metrics.eval_loss.unwrap())
    };
    let bound = 0.0;
    assert_eq!((told(None), told(Some(bound))), (best(f64::INFINITY), best(bound)));
    assert!(best(bound).0 < best(f64::INFINITY).0, "{found:?}");
    // Of a head that costs too much as it was trained, the untrained one is not taken for the best.
    let mut far = job();
    far.config.head.alpha = 4.0;
    (far.config.evaluation.alphas, far.config.evaluation.max_general_loss_increase) = (all.to_vec(), Some(bound));
    far.run(&pool).unwrap();
    let metrics = artifact::read(&far.head_folder()).unwrap().1.metrics;
    assert!(metrics.eval_loss.unwrap() < metrics.base_eval_loss.unwrap() - 1.0, "{metrics:?}");
    assert!(metrics.general_loss.unwrap() <= metrics.base_general_loss.unwrap() + bound, "{metrics:?}");
}
