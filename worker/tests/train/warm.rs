//! Heads that start from another one.

use std::fs;
use std::path::{Path, PathBuf};

use carryon_crds::common::Taps;
use carryon_crds::job::{Task, WeightDtype};
use carryon_crds::wire::{ExitCode, TapChoice, digest};
use carryon_worker::head::artifact;
use carryon_worker::train::TrainArgs;
use carryon_worker::train::metrics::{self, EvaluationLine, Line};
use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainError, run_until};

use super::toy_pool::ToyPool;
use super::{Job, refusal};

/// A job that reads one tap more than that of [`old`], and starts from its head where there is one.
fn new(from: Option<&Path>) -> (Job, Option<PathBuf>) {
    let mut job = Job::chat();
    job.config.taps = Some(TapChoice::Layers(Taps { layers: vec![0, 1, 2], final_norm: true }));
    job.config.training.warmup_steps = 0;
    job.config.init_head = from.map(|folder| artifact::read(folder).unwrap().1.digest);
    (job, from.map(Path::to_owned))
}

/// A job whose head is there to start from.
fn old(pool: &ToyPool) -> Job {
    let mut job = Job::chat();
    job.config.training.num_train_epochs = 20;
    job.run(pool).unwrap();
    job
}

fn run((job, from): &(Job, Option<PathBuf>), pool: &ToyPool) -> Result<ExitCode, TrainError> {
    run_until(&TrainArgs { init_head: from.clone(), ..job.args(pool) }, &Stop::default())
}

fn evaluations(job: &Job) -> Vec<EvaluationLine> {
    let lines = metrics::read(&job.path("output/metrics.jsonl")).unwrap();
    lines.into_iter().filter_map(|line| if let Line::Evaluation(line) = line { Some(line) } else { None }).collect()
}

#[test]
fn a_head_that_starts_from_another_is_the_base_at_first_and_learns_faster() {
    let pool = ToyPool::start();
    let old = old(&pool);
    let (random, warm) = (new(None), new(Some(&old.head_folder())));
    for job in [&random, &warm] {
        run(job, &pool).unwrap();
    }
    let [random_losses, warm_losses] = [&random, &warm].map(|(job, _)| evaluations(job));
    assert_eq!(Some(warm_losses[0].eval_loss), warm_losses[0].base_eval_loss);
    assert_eq!(warm_losses[0].eval_loss, random_losses[0].eval_loss);
    // At equal steps, behind each epoch.
    let losses: Vec<_> = random_losses.iter().zip(&warm_losses).skip(1).map(|(random, warm)| (random.eval_loss, warm.eval_loss)).collect();
    assert!(losses.len() == 2 && losses.iter().all(|(random, warm)| *warm < random - 0.05), "{losses:?}");
    let (_, manifest) = artifact::read(&warm.0.head_folder()).unwrap();
    assert_eq!(manifest.lineage.init_head, warm.0.config.init_head);
    assert!(fs::read_to_string(warm.0.head_folder().join("report.html")).unwrap().contains("started from head"));
    assert!(!fs::read_to_string(random.0.head_folder().join("head.json")).unwrap().contains("init_head"));
}

#[test]
fn a_run_from_a_head_goes_on_with_the_bits_of_an_unbroken_one_and_needs_the_head_no_more() {
    let pool = ToyPool::start();
    let old = old(&pool);
    let mut job = new(Some(&old.head_folder()));
    job.0.config.training.weight_dtype = WeightDtype::Bfloat16;
    run(&job, &pool).unwrap();
    let head = job.0.head();
    job.0.kill_after(3);
    job.1 = Some(job.0.path("gone"));
    run(&job, &pool).unwrap();
    assert_eq!(job.0.head(), head);

    // From another head, or from none, it is another run.
    let other = Job::chat();
    other.run(&pool).unwrap();
    job.0.kill_after(3);
    let again = new(Some(&other.head_folder()));
    (job.0.config.init_head, job.1) = (again.0.config.init_head, again.1);
    run(&job, &pool).unwrap();
    assert_ne!(job.0.head(), head);
    assert_eq!(job.0.steps().len(), 8);
}

#[test]
fn another_task_starts_from_blocks_and_bridges() {
    let pool = ToyPool::start();
    let old = old(&pool);
    let mut job = new(Some(&old.head_folder()));
    job.0.config.task = Task::Reward;
    let pair = |index: usize| serde_json::json!({"prompt": "what comes next ", "chosen": format!("number {index}"), "rejected": format!("letter {index}")});
    let lines = |range: std::ops::Range<usize>| range.map(|index| pair(index).to_string() + "\n").collect::<String>();
    fs::write(job.0.path("data/train.jsonl"), lines(0..8)).unwrap();
    fs::write(job.0.path("data/held-out.jsonl"), lines(8..12)).unwrap();
    run(&job, &pool).unwrap();
    let (artifact, manifest) = artifact::read(&job.0.head_folder()).unwrap();
    assert_eq!((artifact.shape.task, manifest.lineage.init_head), (Task::Reward, job.0.config.init_head.clone()));
}

#[test]
fn a_head_that_cannot_be_started_from_is_refused_by_name_and_nothing_is_touched() {
    let pool = ToyPool::start();
    let old = old(&pool);
    let folder = old.head_folder();
    let (mut job, _) = new(None);
    job.run(&pool).unwrap();
    let checkpoints = |job: &Job| fs::read_dir(job.path("output/checkpoints")).unwrap().count();
    let before = checkpoints(&job);
    let mut refused = |change: &dyn Fn(&mut Job), from: Option<&Path>| {
        let (mut other, _) = new(Some(&folder));
        change(&mut other);
        job.config = other.config;
        let (message, code) = refusal(run_until(&TrainArgs { init_head: from.map(Path::to_owned), ..job.args(&pool) }, &Stop::default()));
        assert_eq!((code, checkpoints(&job)), (ExitCode::Configuration, before), "{message}");
        message
    };
    let file = folder.join("head.safetensors");
    let of = |reason: &str| format!("head.init.fromHead: the head in {}: {reason}", file.display());
    assert_eq!(refused(&|job| job.config.head.width = 16, Some(&folder)), of("width is 8, asked for is 16"));
    assert_eq!(refused(&|job| job.config.head.attention_heads = 1, Some(&folder)), of("attentionHeads is 2, asked for is 1"));
    assert!(refused(&|job| job.config.init_head = Some("sha256:0".to_owned()), Some(&folder)).ends_with("expected sha256:0"));
    let missing = refused(&|_| {}, Some(Path::new("/nowhere")));
    assert!(missing.starts_with("head.init.fromHead: failed to read \"/nowhere/head.safetensors\": "), "{missing}");
    assert!(refused(&|_| {}, None).ends_with("--init-head is missing"));
    assert!(refused(&|job| job.config.init_head = None, Some(&folder)).starts_with("initHead is missing from the configuration"));
    pool.describe(|model| model.identity.weights = digest(b"another"));
    let other = run_until(&TrainArgs { init_head: Some(folder.clone()), ..new(Some(&folder)).0.args(&pool) }, &Stop::default());
    assert!(refusal(other).0.starts_with(&of("the base is toy (sha256:")));

    let whole = fs::read(&file).unwrap();
    for (content, reason) in [
        (&whole[..whole.len() - 4], "bytes are not as many as it says"),
        (&whole[..40], "in a file of 40"),
        (&b"{}"[..], "in a file of 2"),
        (&[&[2, 0, 0, 0, 0, 0, 0, 0][..], b"{}"].concat(), "carryon.head is invalid: is missing from the metadata"),
    ] {
        let (job, from) = new(Some(&folder));
        fs::write(&file, content).unwrap();
        let message = refusal(run(&(job, from), &pool)).0;
        assert!(message.starts_with(&format!("head.init.fromHead: {}: ", file.display())) && message.ends_with(reason), "{message}");
        fs::write(&file, &whole).unwrap();
    }
}
