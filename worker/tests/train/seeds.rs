//! Several seeds.

use std::fs;

use carryon_crds::job::{KeptSeed, Optimizer, Seeds, Task};
use carryon_crds::wire::HeadManifest;
use carryon_worker::head::artifact;
use carryon_worker::train::metrics::{self, Line};

use super::Job;
use super::toy_pool::ToyPool;

const SEED: u64 = 5;

fn job(keep: KeptSeed) -> Job {
    let mut job = Job::chat();
    (job.config.training.seed, job.config.training.seeds) = (SEED, Some(Seeds { count: 3, keep }));
    job
}

fn manifest(job: &Job) -> HeadManifest {
    artifact::read(&job.head_folder()).unwrap().1
}

/// Removes what was written behind step `step` of seed `seed`.
fn kill(job: &Job, seed: u64, step: u64) {
    let output = job.path("output");
    fs::remove_file(output.join("finished.json")).unwrap();
    fs::remove_dir_all(output.join("heads")).unwrap();
    (seed + 1..SEED + 3).for_each(|later| fs::remove_dir_all(output.join(format!("seed-{later}"))).unwrap());
    for later in step + 1..=8 {
        fs::remove_file(output.join(format!("seed-{seed}/checkpoints/step-{later:010}.safetensors"))).unwrap();
    }
}

#[test]
fn the_head_of_the_best_seed_is_written_as_if_there_were_no_other() {
    let (pool, several) = (ToyPool::start(), job(KeptSeed::Best));
    several.run(&pool).unwrap();
    let (asked, found) = (pool.asked(), manifest(&several));
    let alone: Vec<(Job, HeadManifest)> = (SEED..SEED + 3)
        .map(|seed| {
            let mut job = Job::chat();
            job.config.training.seed = seed;
            job.run(&pool).unwrap();
            let manifest = manifest(&job);
            (job, manifest)
        })
        .collect();
    assert_eq!(pool.asked(), 4 * asked, "the pool was asked once for all seeds");
    let loss = |manifest: &HeadManifest| manifest.metrics.eval_loss.unwrap();
    let losses: Vec<f64> = alone.iter().map(|(_, manifest)| loss(manifest)).collect();
    assert_eq!(found.metrics.seeds.iter().map(|one| one.eval_loss.unwrap()).collect::<Vec<_>>(), losses);
    assert!(losses[0] != losses[1] && losses[1] != losses[2], "{losses:?}");
    let (best, same) = alone.iter().min_by(|(_, left), (_, right)| loss(left).total_cmp(&loss(right))).unwrap();
    assert_eq!(several.head(), best.head());
    assert_eq!((found.lineage.seed, loss(&found), found.lineage.steps), (same.lineage.seed, loss(same), 8));
    assert!(found.metrics.train_seconds > 0.0 && found.lineage.averaged_seeds.is_empty());
    let words = several.last_words();
    let range = losses.iter().fold((f64::MAX, f64::MIN), |(least, most), loss| (least.min(*loss), most.max(*loss)));
    let told = format!("; the best of 3 seeds, whose losses are {:.4} to {:.4}", range.0, range.1);
    assert!(words.message.ends_with(&told), "{}", words.message);
    let progress = words.progress.unwrap();
    assert_eq!((progress.step, progress.total_steps), (24, 24));
    let report = fs::read_to_string(several.head_folder().join("report.html")).unwrap();
    assert!(report.contains("<h2>Seeds</h2>") && losses.iter().all(|loss| report.contains(&format!("<td>{loss:.3}</td>"))));
    for seed in SEED..SEED + 3 {
        let lines = metrics::read(&several.path(&format!("output/seed-{seed}/metrics.jsonl"))).unwrap();
        assert_eq!(lines.iter().filter(|line| matches!(line, Line::Step(_))).count(), 8);
        assert!(several.path(&format!("output/seed-{seed}/tensorboard/events.out.tfevents.carryon")).exists());
    }
}

/// Labels of which three in ten are wrong, learned one at a time with a rate that does not fall: each seed ends somewhere around what is best.
fn noisy() -> Job {
    let mut job = job(KeptSeed::Average);
    let line = |index: usize| {
        let (text, labels) = if index.is_multiple_of(2) { ("AAAA", ["loud", "soft"]) } else { ("zzz", ["soft", "loud"]) };
        let label = labels[usize::from(index * 7 % 10 < 3)];
        serde_json::json!({"text": text.repeat(1 + index % 5), "label": label}).to_string() + "\n"
    };
    fs::write(job.path("data/train.jsonl"), (0..120).map(line).collect::<String>()).unwrap();
    fs::write(job.path("data/held-out.jsonl"), (120..180).map(line).collect::<String>()).unwrap();
    job.config.task = Task::Classification;
    (job.config.head.blocks, job.config.head.labels) = (0, Some(vec!["loud".to_owned(), "soft".to_owned()]));
    let training = &mut job.config.training;
    (training.optim, training.learning_rate, training.min_lr_ratio) = (Optimizer::AdamW, 0.03, 1.0);
    (training.per_device_train_batch_size, training.num_train_epochs) = (1, 1);
    job.config.evaluation.eval_steps = Some(120);
    job
}

#[test]
fn an_average_of_seeds_is_written_where_it_is_better_than_the_best() {
    let pool = ToyPool::start();
    let mut far = job(KeptSeed::Average);
    far.config.training.muon_learning_rate = 2.0;
    for (job, averaged) in [(noisy(), true), (far, false)] {
        job.run(&pool).unwrap();
        let manifest = manifest(&job);
        let losses: Vec<f64> = manifest.metrics.seeds.iter().map(|one| one.eval_loss.unwrap()).collect();
        let (least, loss) = (losses.iter().copied().fold(f64::MAX, f64::min), manifest.metrics.eval_loss.unwrap());
        assert!(if averaged { loss < least } else { loss == least }, "{averaged}: {loss} of {losses:?}");
        assert_eq!(!manifest.lineage.averaged_seeds.is_empty(), averaged);
        let best = |seed: u64| {
            let checkpoint = fs::read_dir(job.path(&format!("output/seed-{seed}/checkpoints"))).unwrap();
            let last = checkpoint.map(|entry| entry.unwrap().path()).max().unwrap();
            numbers(&fs::read(last).unwrap(), "best.")
        };
        let (written, each) = (numbers(&job.head(), ""), (SEED..SEED + 3).map(best).collect::<Vec<_>>());
        assert_eq!(written.len(), each[0].len());
        for (name, values) in &written {
            let expected = |at: usize| match averaged {
                true => each.iter().map(|seed| seed[name][at]).sum::<f64>() / 3.0,
                false => each[(manifest.lineage.seed - SEED) as usize][name][at],
            };
            let worst = (0..values.len()).map(|at| (values[at] - expected(at)).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-6, "{name} is off by {worst}");
        }
    }
}

/// Tensors of f32 whose name begins with `group`, without it.
fn numbers(file: &[u8], group: &str) -> std::collections::BTreeMap<String, Vec<f64>> {
    let tensors = safetensors::SafeTensors::deserialize(file).unwrap();
    let floats = |data: &[u8]| data.chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into()).collect();
    let found = tensors.iter().filter_map(|(name, tensor)| Some((name.strip_prefix(group)?.to_owned(), floats(tensor.data()))));
    found.collect()
}

#[test]
fn a_kill_in_any_seed_changes_no_bit() {
    let pool = ToyPool::start();
    for keep in [KeptSeed::Best, KeptSeed::Average] {
        let job = job(keep);
        job.run(&pool).unwrap();
        let (head, seeds, asked) = (job.head(), manifest(&job).metrics.seeds, pool.asked());
        for (seed, step) in [(SEED + 2, 8), (SEED + 2, 0), (SEED + 1, 3), (SEED, 8)] {
            kill(&job, seed, step);
            job.run(&pool).unwrap();
            assert_eq!(job.head(), head, "{keep:?} killed after step {step} of seed {seed}");
            assert_eq!(manifest(&job).metrics.seeds, seeds);
        }
        assert_eq!(pool.asked(), asked, "states are asked for again");
    }
}

#[test]
fn seeds_that_are_not_asked_for_any_more_leave_nothing_but_heads() {
    let (pool, mut job) = (ToyPool::start(), job(KeptSeed::Best));
    job.run(&pool).unwrap();
    let first = job.head_folder();
    job.config.training.seeds = None;
    job.run(&pool).unwrap();
    assert!(first.join("head.safetensors").exists() && job.path("output/metrics.jsonl").exists());
    let output = job.path("output");
    let files = |name: &str| {
        fs::read_dir(output.join(name)).map_or(0, |entries| entries.filter(|entry| entry.as_ref().unwrap().path().is_file()).count())
    };
    for seed in SEED..SEED + 3 {
        assert_eq!(["", "/checkpoints", "/tensorboard"].map(|folder| files(&format!("seed-{seed}{folder}"))), [0, 0, 0]);
    }
    job.config.training.seeds = Some(Seeds { count: 2, keep: KeptSeed::Best });
    job.run(&pool).unwrap();
    assert_eq!((files("checkpoints"), job.path("output/metrics.jsonl").exists()), (0, false));
}

#[test]
fn seeds_are_compared_on_held_out_samples() {
    let (pool, mut job) = (ToyPool::start(), job(KeptSeed::Best));
    let refused = |job: &Job| job.run(&pool).unwrap_err().to_string();
    job.config.training.seeds = Some(Seeds { count: 1, keep: KeptSeed::Best });
    assert_eq!(refused(&job), "training.seeds.count is from 2 to 16");
    job.config.split.evaluation.clear();
    assert_eq!(refused(&job), "training.seeds are compared on held-out samples: name data.split.evaluation");
}
