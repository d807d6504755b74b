//! Heads that read several bases.

use std::fs;

use carryon_crds::common::Taps;
use carryon_crds::job::{LossPlace, Task};
use carryon_crds::wire::{ExitCode, OtherBase, OtherPool, TapChoice, digest};
use carryon_worker::head::artifact;
use carryon_worker::train::error::TrainError;
use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainArgs, run_until};

use super::Job;
use super::toy_pool::ToyPool;

/// Two pools of one tokenizer, and a job that reads both.
struct Mixed {
    first: ToyPool,
    second: ToyPool,
    job: Job,
}

impl Mixed {
    fn new() -> Self {
        let (first, second, mut job) = (ToyPool::start(), ToyPool::start(), Job::chat());
        second.describe(|model| model.identity.weights = digest(b"another"));
        job.config.other_pools = vec![OtherPool { taps: Some(TapChoice::Layers(taps())), ..OtherPool::default() }];
        Self { first, second, job }
    }

    fn args(&self) -> TrainArgs {
        TrainArgs { other_pool: vec![self.second.url.clone()], ..self.job.args(&self.first) }
    }

    fn run(&self) -> Result<ExitCode, TrainError> {
        run_until(&self.args(), &Stop::default())
    }
}

fn taps() -> Taps {
    Taps { layers: vec![1], final_norm: true }
}

#[test]
fn a_head_of_two_bases_reads_both_and_is_measured_at_the_first() {
    let mixed = Mixed::new();
    mixed.run().unwrap();
    assert_eq!((mixed.first.asked(), mixed.second.asked()), (17, 17), "each base is asked for each sequence once");
    let (artifact, manifest) = artifact::read(&mixed.job.head_folder()).unwrap();
    assert_eq!((artifact.shape.format_version, &artifact.shape.others), (3, &vec![OtherBase { taps: taps(), hidden_size: 16 }]));
    assert_eq!((artifact.shape.tap_widths().len(), artifact.base.others[0].identity.weights.clone()), (5, digest(b"another")));
    assert_eq!(manifest.other_numerics, std::slice::from_ref(&manifest.numerics));
    let steps = mixed.job.steps();
    let alone = Job::chat();
    alone.run(&mixed.first).unwrap();
    assert_eq!(steps[0].loss, alone.steps()[0].loss, "an untrained head is the first base");
    assert_ne!(steps.last().unwrap().loss, alone.steps().last().unwrap().loss);
}

#[test]
fn states_of_further_bases_give_the_head_that_the_same_taps_of_one_base_give() {
    // Both toys compute the same numbers: `layers 0 and 2, final` and `layer 1` are those of one base that are read under other names of the bridge.
    let mut mixed = Mixed::new();
    let read = |layers: &[u32], final_norm| Taps { layers: layers.to_vec(), final_norm };
    mixed.job.config.taps = Some(TapChoice::Layers(read(&[0], false)));
    mixed.job.config.other_pools[0].taps = Some(TapChoice::Layers(read(&[1, 2], true)));
    mixed.run().unwrap();
    let mut one = Job::chat();
    one.config.taps = Some(TapChoice::Layers(read(&[0, 1, 2], true)));
    one.run(&mixed.first).unwrap();
    let weights = |job: &Job| artifact::read(&job.head_folder()).unwrap().0.weights;
    assert!(weights(&mixed.job) == weights(&one));
}

#[test]
fn a_mixed_run_goes_on_with_the_bits_of_an_unbroken_one_and_never_over_another_base() {
    let mixed = Mixed::new();
    mixed.run().unwrap();
    let head = mixed.job.head();
    mixed.job.kill_after(5);
    mixed.run().unwrap();
    assert!(mixed.job.head() == head);
    mixed.job.kill_after(5);
    let weights = |name: &'static [u8]| mixed.second.describe(|model| model.identity.weights = digest(name));
    weights(b"a third");
    mixed.run().unwrap();
    assert!(mixed.job.head() != head, "the head names its bases");
    let aside = fs::read_dir(mixed.job.path("output/checkpoints")).unwrap().flatten().filter(|entry| entry.path().is_dir()).count();
    assert_eq!(aside, 1, "the checkpoints of the other base wait for it");
}

#[test]
fn local_loss_and_tasks_that_pool_a_text_mix_too() {
    let mut mixed = Mixed::new();
    mixed.job.config.training.loss = LossPlace::Local;
    mixed.run().unwrap();
    let mut mixed = Mixed::new();
    let line = |index: usize| serde_json::json!({"text": "so ".repeat(1 + index % 3), "label": if index.is_multiple_of(3) { "few" } else { "many" }});
    let text: String = (0..12).map(|index| line(index).to_string() + "\n").collect();
    fs::write(mixed.job.path("data/train.jsonl"), &text).unwrap();
    fs::write(mixed.job.path("data/held-out.jsonl"), &text).unwrap();
    mixed.job.config.task = Task::Classification;
    mixed.job.config.head.labels = Some(vec!["few".to_owned(), "many".to_owned()]);
    mixed.job.config.training.dropout = 0.2;
    mixed.run().unwrap();
}

#[test]
fn bases_of_different_tokenizers_and_pools_that_nobody_names_are_refused() {
    let mixed = Mixed::new();
    let refused = |args: &TrainArgs| run_until(args, &Stop::default()).unwrap_err();
    let error = refused(&mixed.job.args(&mixed.first));
    assert_eq!(error.to_string(), "otherPools: the configuration names 1, --other-pool 0");
    assert_eq!(error.exit_code(), ExitCode::Configuration);
    let other = ToyPool::start_speaking("other");
    let error = refused(&TrainArgs { other_pool: vec![other.url.clone()], ..mixed.job.args(&mixed.first) });
    assert!(error.to_string().starts_with("the bases cannot be mixed: toy at http://127.0.0.1:"), "{error}");
    assert_eq!(error.exit_code(), ExitCode::Configuration);
}
