//! What helps where labels are few: smoothing, dropout, and a metric that chooses the evaluation that counts.

use super::*;

/// A classifier of labels of which a quarter is wrong: it goes on learning its samples by heart when there is nothing more to learn.
fn noisy() -> Job {
    let mut job = Job::chat();
    let line = |index: usize| {
        let loud = index.is_multiple_of(2) != (index % 8 < 2);
        let text = format!("{} {index}", if index.is_multiple_of(2) { "AAAA" } else { "zzz" });
        serde_json::json!({"text": text.repeat(1 + index % 5), "label": if loud { "loud" } else { "soft" }}).to_string() + "\n"
    };
    fs::write(job.path("data/train.jsonl"), (0..24).map(line).collect::<String>()).unwrap();
    fs::write(job.path("data/held-out.jsonl"), (24..64).map(line).collect::<String>()).unwrap();
    job.config.task = Task::Classification;
    job.config.head.labels = Some(vec!["loud".to_owned(), "soft".to_owned()]);
    job.config.training.num_train_epochs = 6;
    job
}

fn evaluations(job: &Job) -> Vec<(f64, f64)> {
    let lines = metrics::read(&job.path("output/metrics.jsonl")).unwrap();
    let evaluation = |line| if let Line::Evaluation(line) = line { Some((line.eval_accuracy?, line.eval_loss)) } else { None };
    lines.into_iter().filter_map(evaluation).collect()
}

#[test]
fn the_metric_chooses_the_head_that_is_written() {
    let pool = ToyPool::start();
    for metric in [Metric::Loss, Metric::Accuracy] {
        let mut job = noisy();
        job.config.evaluation = Evaluation { eval_steps: Some(1), early_stopping_patience: None, metric, ..Default::default() };
        job.run(&pool).unwrap();
        let all = evaluations(&job);
        assert!(all.iter().any(|evaluation| evaluation.0 != all[0].0), "accuracy never changes");
        let best = all.into_iter().reduce(|best, now| match metric {
            Metric::Accuracy if now.0 != best.0 => {
                if now.0 > best.0 {
                    now
                } else {
                    best
                }
            }
            _ => {
                if now.1 < best.1 {
                    now
                } else {
                    best
                }
            }
        });
        let (_, manifest) = artifact::read(&job.head_folder()).unwrap();
        assert_eq!(manifest.metrics.eval_accuracy.zip(manifest.metrics.eval_loss), best, "{metric:?}");
    }
}

#[test]
fn early_stopping_waits_for_the_metric() {
    let (pool, mut job) = (ToyPool::start(), noisy());
    job.config.training.num_train_epochs = 60;
    job.config.evaluation =
        Evaluation { eval_steps: Some(1), early_stopping_patience: Some(12), metric: Metric::Accuracy, ..Default::default() };
    job.run(&pool).unwrap();
    let all = evaluations(&job);
    let better = |left: (f64, f64), right: (f64, f64)| left.0 > right.0 || left.0 == right.0 && left.1 < right.1;
    let best = (1..all.len()).fold(0, |best, now| if better(all[now], all[best]) { now } else { best });
    assert_eq!(all.len() - 1 - best, 12, "{all:?}");
}

#[test]
fn dropout_and_smoothing_go_on_with_the_bits_of_an_unbroken_run() {
    let pool = ToyPool::start();
    let job = || {
        let mut job = noisy();
        (job.config.training.dropout, job.config.training.label_smoothing_factor) = (0.3, 0.1);
        job.config.evaluation.metric = Metric::RocAuc;
        job
    };
    let (unbroken, killed) = (job(), job());
    unbroken.run(&pool).unwrap();
    killed.run(&pool).unwrap();
    for step in [0, 5] {
        killed.kill_after(step);
        killed.run(&pool).unwrap();
        assert_eq!(killed.head(), unbroken.head(), "killed after step {step}");
    }
    let plain = noisy();
    plain.run(&pool).unwrap();
    assert_ne!(plain.head(), unbroken.head());
}

#[test]
fn dropout_is_the_same_for_accumulated_batches() {
    let pool = ToyPool::start();
    let losses = |batch, accumulated| {
        let mut job = noisy();
        let training = &mut job.config.training;
        (training.dropout, training.per_device_train_batch_size, training.gradient_accumulation_steps) = (0.3, batch, accumulated);
        job.run(&pool).unwrap();
        job.steps().iter().map(|line| line.loss).collect::<Vec<_>>()
    };
    let (whole, parts) = (losses(8, 1), losses(2, 4));
    assert!(whole.iter().zip(&parts).all(|(whole, parts)| (whole / parts - 1.0).abs() < 1e-3), "{whole:?} {parts:?}");
}

#[test]
fn what_does_not_fit_the_task_is_refused_by_name() {
    let pool = ToyPool::start();
    let refused = |change: &dyn Fn(&mut TrainConfig)| {
        let mut job = Job::chat();
        change(&mut job.config);
        refusal(job.run(&pool)).0
    };
    assert_eq!(
        refused(&|config| config.training.label_smoothing_factor = 0.1),
        "training.labelSmoothingFactor is for task Classification, from 0 to 0.9"
    );
    assert_eq!(refused(&|config| config.training.dropout = 1.0), "training.dropout: 1 is not from 0 to 0.9");
    assert_eq!(
        refused(&|config| config.evaluation.metric = Metric::Accuracy),
        "evaluation.metric Accuracy: task CausalLM has no such figure"
    );
}
