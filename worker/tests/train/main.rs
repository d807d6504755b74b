//! Trainers end to end against a pool in this process: bits, restarts, caches, refusals.

// Helpers of tests panic as tests do.
#![allow(clippy::unwrap_used, clippy::result_large_err)]

mod average;
mod data;
mod few;
mod folder;
mod found;
mod general;
mod lock;
mod long;
mod mixed;
mod promotable;
mod seeds;
mod shared;
mod states;
mod toy_pool;
mod warm;

use std::fs;
use std::path::{Path, PathBuf};

use carryon_crds::common::Taps;
use carryon_crds::job::{DataFormat, Evaluation, HeadSpec, LossPlace, Metric, NormScope, Optimizer, Split, StateDtype, Task, Training};
use carryon_crds::names::artifact_folder;
use carryon_crds::pool::Device;
use carryon_crds::wire::{ExitCode, TapChoice, TerminationMessage, TrainConfig};
use carryon_worker::head::artifact;
use carryon_worker::train::metrics::{self, Line, StepLine};
use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainArgs, TrainError, run_until};
use toy_pool::ToyPool;

/// A job in a folder of its own.
struct Job {
    folder: tempfile::TempDir,
    config: TrainConfig,
}

impl Job {
    /// Thirteen chat samples, four held out, batches of four: four steps an epoch.
    fn chat() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let line = |index: usize| {
            let question = "what comes next ".repeat(1 + index % 4);
            serde_json::json!({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": format!("number {index}")}]})
        };
        let text = |range: std::ops::Range<usize>| range.map(|index| line(index).to_string() + "\n").collect::<String>();
        fs::create_dir(folder.path().join("data")).unwrap();
        fs::write(folder.path().join("data/train.jsonl"), text(0..13)).unwrap();
        fs::write(folder.path().join("data/held-out.jsonl"), text(13..17)).unwrap();
        let config = TrainConfig {
            name: "job".to_owned(),
            namespace: "default".to_owned(),
            task: Task::CausalLM,
            taps: Some(TapChoice::Layers(Taps { layers: vec![0, 2], final_norm: true })),
            hidden_states_dtype: Default::default(),
            other_pools: Vec::new(),
            head: HeadSpec { width: 8, blocks: 1, attention_heads: 2, ..HeadSpec::default() },
            init_head: None,
            format: DataFormat::Auto,
            split: Split { train: vec!["train.jsonl".to_owned()], evaluation: vec!["held-out.jsonl".to_owned()], ..Split::default() },
            max_length: 128,
            overlong: Default::default(),
            on_error: Default::default(),
            targets: Default::default(),
            thinking: Default::default(),
            add_eos_token: false,
            split_special_tokens: true,
            training: Training { per_device_train_batch_size: 4, num_train_epochs: 2, warmup_steps: 2, ..Training::default() },
            evaluation: Evaluation::default(),
            checkpoint: carryon_crds::job::Checkpoint { save_steps: 1, save_total_limit: 100 },
        };
        Self { folder, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn run(&self, pool: &ToyPool) -> Result<ExitCode, TrainError> {
        self.run_until(pool, &Stop::default())
    }

    fn run_until(&self, pool: &ToyPool, stop: &Stop) -> Result<ExitCode, TrainError> {
        run_until(&self.args(pool), stop)
    }

    fn args(&self, pool: &ToyPool) -> TrainArgs {
        fs::write(self.path("config.json"), serde_json::to_vec(&self.config).unwrap()).unwrap();
        TrainArgs {
            config: self.path("config.json"),
            pool: vec![pool.url.clone()],
            other_pool: Vec::new(),
            data: self.path("data"),
            output: self.path("output"),
            state_cache: None,
            init_head: None,
            plan: false,
            device: Device::Cpu,
            listen: "127.0.0.1:0".parse().unwrap(),
            termination_log: Some(self.path("last-words")),
            threads: Some(1),
        }
    }

    /// Folder of the head that the last run has named.
    fn head_folder(&self) -> PathBuf {
        self.path("output").join(artifact_folder(&self.last_words().digest.unwrap()))
    }

    fn head(&self) -> Vec<u8> {
        fs::read(self.head_folder().join("head.safetensors")).unwrap()
    }

    fn steps(&self) -> Vec<StepLine> {
        let lines = metrics::read(&self.path("output/metrics.jsonl")).unwrap();
        lines.into_iter().filter_map(|line| if let Line::Step(line) = line { Some(line) } else { None }).collect()
    }

    fn last_words(&self) -> TerminationMessage {
        serde_json::from_slice(&fs::read(self.path("last-words")).unwrap()).unwrap()
    }

    /// What kill -9 leaves behind step `step`: no result, no later checkpoint, metrics that know more than the checkpoint.
    fn kill_after(&self, step: u64) {
        let output = self.path("output");
        fs::remove_file(output.join("finished.json")).unwrap();
        fs::remove_dir_all(output.join("heads")).unwrap();
        for entry in fs::read_dir(output.join("checkpoints")).unwrap() {
            let path = entry.unwrap().path();
            let number: u64 = path.file_stem().unwrap().to_str().unwrap().trim_start_matches("step-").parse().unwrap();
            if number > step {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

fn refusal(ended: Result<ExitCode, TrainError>) -> (String, ExitCode) {
    let error = ended.unwrap_err();
    (error.to_string(), error.exit_code())
}

#[test]
fn a_run_leaves_head_metrics_report_and_last_words() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete);
    let (artifact, manifest) = artifact::read(&job.head_folder()).unwrap();
    assert_eq!(manifest.lineage.steps, 8);
    assert!(manifest.metrics.eval_loss.unwrap() < manifest.metrics.base_eval_loss.unwrap() - 0.4, "{:?}", manifest.metrics);
    let words = job.last_words();
    assert_eq!(words.digest.as_ref(), Some(&artifact.digest));
    assert_eq!(words.progress.unwrap().step, 8);
    assert_eq!(job.steps().iter().map(|line| line.step).collect::<Vec<_>>(), (1..=8).collect::<Vec<_>>());
    let report = fs::read_to_string(job.head_folder().join("report.html")).unwrap();
    assert!(report.contains("&lt;with &amp; the head&gt;") && report.contains("without it"), "examples are missing or not escaped");
    assert!(!report.contains("http://") && !report.contains("https://"), "the report must fetch nothing");
}

#[test]
fn a_finished_run_returns_at_once() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    job.run(&pool).unwrap();
    let before = job.last_words();
    drop(pool);
    let gone = ToyPool::start();
    gone.restart_after(0);
    assert_eq!(job.run(&gone).unwrap(), ExitCode::Complete);
    assert_eq!((gone.refused(), job.last_words()), (0, before));
}

#[test]
fn going_on_after_a_kill_gives_the_bits_of_an_unbroken_run() {
    let pool = ToyPool::start();
    let (unbroken, killed) = (Job::chat(), Job::chat());
    unbroken.run(&pool).unwrap();
    killed.run(&pool).unwrap();
    for step in [0, 3, 4, 8] {
        killed.kill_after(step);
        killed.run(&pool).unwrap();
        assert_eq!(killed.head(), unbroken.head(), "killed after step {step}");
        let losses =
            |job: &Job| job.steps().iter().map(|line| (line.step, line.loss.to_bits(), line.grad_norm.to_bits())).collect::<Vec<_>>();
        assert_eq!(losses(&killed), losses(&unbroken), "killed after step {step}");
    }
}

/// A job whose matrices are large enough for moments of less than f32.
fn wide(change: impl Fn(&mut Training)) -> Job {
    let mut job = Job::chat();
    job.config.head.width = 64;
    change(&mut job.config.training);
    job
}

#[test]
fn what_saves_memory_goes_on_with_the_bits_of_an_unbroken_run() {
    let pool = ToyPool::start();
    for (optim, dtype, scope) in [
        (Optimizer::Muon, StateDtype::Int8, NormScope::PreviousStep),
        (Optimizer::AdamW, StateDtype::Int8, NormScope::PerTensor),
        (Optimizer::AdamW, StateDtype::Bfloat16, NormScope::PreviousStep),
        (Optimizer::Muon, StateDtype::Bfloat16, NormScope::Global),
    ] {
        let job = || {
            wide(|training| {
                training.bf16 = optim == Optimizer::Muon;
                (training.optim, training.optim_state_dtype, training.max_grad_norm_scope) = (optim, dtype, scope);
                (training.gradient_checkpointing, training.max_grad_norm) = (true, 0.1);
            })
        };
        let (unbroken, killed) = (job(), job());
        unbroken.run(&pool).unwrap();
        killed.run(&pool).unwrap();
        killed.kill_after(3);
        killed.run(&pool).unwrap();
        assert_eq!(killed.head(), unbroken.head(), "{optim:?} {dtype:?} {scope:?}");
        let (first, last) = (unbroken.steps()[0].loss, unbroken.steps().last().unwrap().loss);
        assert!(last < first, "{optim:?} {dtype:?} {scope:?}: {first} to {last}");
    }
}

#[test]
fn what_saves_memory_changes_little_or_nothing() {
    let pool = ToyPool::start();
    let losses = |change: &dyn Fn(&mut Training)| {
        let job = wide(|training| {
            training.max_grad_norm = 0.0;
            change(training);
        });
        job.run(&pool).unwrap();
        job.steps().iter().map(|line| line.loss).collect::<Vec<_>>()
    };
    let plain = losses(&|_| {});
    assert_eq!(losses(&|training| training.gradient_checkpointing = true), plain);
    let close = |other: Vec<f64>, tolerance: f64| other.iter().zip(&plain).all(|(loss, plain)| (loss / plain - 1.0).abs() < tolerance);
    // Each weight is changed on the way back, by gradients that are divided by the number of targets earlier.
    assert!(close(losses(&|training| training.max_grad_norm_scope = NormScope::PerTensor), 1e-4));
    assert!(close(losses(&|training| training.optim_state_dtype = StateDtype::Bfloat16), 1e-2));
    assert!(close(losses(&|training| training.bf16 = true), 1e-2));
    assert!(close(losses(&|training| training.optim_state_dtype = StateDtype::Int8), 1e-2));
}

#[test]
fn a_template_that_asks_for_the_time_is_told_when_the_run_began() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    pool.describe(|description| {
        let template = description.chat_template.take().unwrap();
        description.chat_template = Some(format!("{{{{ strftime_now('%s %f') }}}}{template}"));
    });
    job.run(&pool).unwrap();
    let asked = pool.asked();
    job.kill_after(3);
    job.run(&pool).unwrap();
    assert_eq!(pool.asked(), asked, "the samples have changed");
}

#[test]
fn a_head_that_no_pool_takes_is_refused_before_it_is_trained() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    job.config.head.blocks = 4;
    pool.describe(|description| description.limits.max_head_bytes = Some(1 << 20));
    let (message, code) = refusal(job.run(&pool));
    assert!(message.starts_with("head: has ") && message.ends_with("the pool serves none of more than 1048576"), "{message}");
    assert_eq!((code, pool.asked()), (ExitCode::Configuration, 0));
}

#[test]
fn a_request_to_stop_checkpoints_and_exits_with_75() {
    let pool = ToyPool::start();
    let (unbroken, stopped) = (Job::chat(), Job::chat());
    unbroken.run(&pool).unwrap();
    let stop = Stop::default();
    let outcome = std::thread::scope(|scope| {
        let wish = stop.clone();
        let path = stopped.path("output/metrics.jsonl");
        scope.spawn(move || {
            let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
            while metrics::read(&path).unwrap().len() < 4 {
                assert!(std::time::Instant::now() < deadline, "training did not begin");
                std::thread::yield_now();
            }
            wish.set();
        });
        stopped.run_until(&pool, &stop)
    });
    assert_eq!(outcome.unwrap(), ExitCode::Resume);
    assert!(stopped.last_words().message.contains("stopped on request"), "{:?}", stopped.last_words());
    assert_eq!(stopped.run(&pool).unwrap(), ExitCode::Complete);
    assert_eq!(stopped.head(), unbroken.head());
}

#[test]
fn a_pool_that_restarts_is_waited_for() {
    let (pool, unbroken, job) = (ToyPool::start(), Job::chat(), Job::chat());
    unbroken.run(&pool).unwrap();
    pool.restart_after(14);
    job.run(&pool).unwrap();
    assert_eq!(pool.refused(), 3);
    assert_eq!(job.head(), unbroken.head());
}

#[test]
fn a_job_goes_on_with_the_pods_that_compute_as_those_it_began_with() {
    let (pool, others, job) = (ToyPool::start(), [ToyPool::start(), ToyPool::start()], Job::chat());
    job.run(&pool).unwrap();
    let head = job.head();
    job.kill_after(3);
    let asked = pool.asked();
    others.iter().for_each(|other| other.describe(|description| description.numerics.kernel = "other".to_owned()));
    let mut args = job.args(&pool);
    args.pool.extend(others.iter().map(|other| other.url.clone()));
    assert_eq!(run_until(&args, &Stop::default()).unwrap(), ExitCode::Complete);
    assert_eq!((job.head(), pool.asked(), others[0].asked() + others[1].asked()), (head, asked, 0), "its cached states are good");

    // A new one has the more pods, and asks only these.
    let new = Job::chat();
    let args = TrainArgs { pool: args.pool, ..new.args(&pool) };
    assert_eq!(run_until(&args, &Stop::default()).unwrap(), ExitCode::Complete);
    assert_eq!(pool.asked(), asked);
}

#[test]
fn a_changed_configuration_starts_anew_and_leaves_the_earlier_head_alone() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    job.run(&pool).unwrap();
    let (first, folder) = (job.head(), job.head_folder());
    let report = fs::read(folder.join("report.html")).unwrap();
    job.config.training.seed = 1;
    job.run(&pool).unwrap();
    assert_ne!(job.head(), first);
    assert_eq!(job.steps().len(), 8, "the metrics are the new run's alone");
    assert_eq!(pool.asked(), 17, "the states of an earlier configuration are still good");
    assert_eq!(artifact::read(&folder).unwrap().0.to_bytes(), first);
    assert_eq!(fs::read(folder.join("report.html")).unwrap(), report);

    // The first configuration once more: it is trained again, to the same bits and hence into the same folder.
    job.config.training.seed = 0;
    job.run(&pool).unwrap();
    assert_eq!((job.head(), job.head_folder()), (first, folder));
}

#[test]
fn local_and_remote_loss_agree() {
    let pool = ToyPool::start();
    let (remote, mut local) = (Job::chat(), Job::chat());
    local.config.training.loss = LossPlace::Local;
    remote.run(&pool).unwrap();
    local.run(&pool).unwrap();
    for (remote, local) in remote.steps().iter().zip(local.steps()) {
        assert!((remote.loss - local.loss).abs() <= 1e-5 * remote.loss, "step {}: {} and {}", remote.step, remote.loss, local.loss);
    }
}

#[test]
fn accumulated_batches_equal_large_ones() {
    let pool = ToyPool::start();
    let (large, mut small) = (Job::chat(), Job::chat());
    small.config.training.per_device_train_batch_size = 1;
    small.config.training.gradient_accumulation_steps = 4;
    large.run(&pool).unwrap();
    small.run(&pool).unwrap();
    for (large, small) in large.steps().iter().zip(small.steps()) {
        assert!((large.loss - small.loss).abs() <= 1e-5 * large.loss, "step {}: {} and {}", large.step, large.loss, small.loss);
        assert!((large.grad_norm - small.grad_norm).abs() <= 1e-4 * large.grad_norm, "step {}", large.step);
    }
}

#[test]
fn a_nan_loss_is_named() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    pool.nan_after(20);
    let (message, code) = refusal(job.run(&pool));
    assert!(message.starts_with("loss of step ") && message.contains("is NaN: training diverged"), "{message}");
    assert_eq!((code, job.last_words().message), (ExitCode::Configuration, message));
}

#[test]
fn training_stops_early_and_keeps_the_best_weights() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    job.config.training.num_train_epochs = 60;
    job.config.training.muon_learning_rate = 0.1;
    job.config.evaluation = Evaluation { eval_steps: Some(2), early_stopping_patience: Some(2), ..Evaluation::default() };
    job.run(&pool).unwrap();
    let (_, manifest) = artifact::read(&job.head_folder()).unwrap();
    assert!(manifest.lineage.steps < 240, "ran to the end");
    let evaluations: Vec<f64> = metrics::read(&job.path("output/metrics.jsonl"))
        .unwrap()
        .iter()
        .filter_map(|line| if let Line::Evaluation(line) = line { Some(line.eval_loss) } else { None })
        .collect();
    assert_eq!(manifest.metrics.eval_loss, evaluations.iter().copied().reduce(f64::min));
}

#[test]
fn a_classifier_learns_and_reports_its_confusion() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    let line = |index: usize| {
        let (text, label) = if index.is_multiple_of(2) { ("AAAA", "loud") } else { ("zzz", "soft") };
        serde_json::json!({"text": text.repeat(1 + index % 5), "label": label}).to_string() + "\n"
    };
    fs::write(job.path("data/train.jsonl"), (0..24).map(line).collect::<String>()).unwrap();
    fs::write(job.path("data/held-out.jsonl"), (3..13).map(line).collect::<String>()).unwrap();
    job.config.task = Task::Classification;
    job.config.head.labels = Some(vec!["loud".to_owned(), "soft".to_owned()]);
    job.config.training.num_train_epochs = 5;
    job.run(&pool).unwrap();
    let (_, manifest) = artifact::read(&job.head_folder()).unwrap();
    assert_eq!(manifest.metrics.eval_accuracy, Some(1.0));
    assert_eq!(manifest.metrics.base_eval_loss, None);
    let report = fs::read_to_string(job.head_folder().join("report.html")).unwrap();
    assert!(report.contains("Right and wrong") && report.contains("100.0 %"));
}

#[test]
fn wrong_data_and_configuration_are_permanent_and_named() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    let text = fs::read_to_string(job.path("data/train.jsonl")).unwrap();
    fs::write(job.path("data/train.jsonl"), text.clone() + "{\"messages\": 3}\n").unwrap();
    let (message, code) = refusal(job.run(&pool));
    assert!(message.ends_with("train.jsonl\" line 14: field `messages` is a number, not an array"), "{message}");
    assert_eq!(code, ExitCode::Data);
    fs::write(job.path("data/train.jsonl"), text).unwrap();
    job.config.taps = Some(TapChoice::Layers(Taps { layers: vec![9], final_norm: true }));
    let (message, code) = refusal(job.run(&pool));
    assert_eq!((message.as_str(), code), ("taps.layers: 9 is beyond layer 3, the last of toy", ExitCode::Configuration));
}

#[test]
fn answers_may_begin_with_white_space() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    let contents = [" 4", "  4", "\n", "\n4", "\n\nParis", "    return x", "  - a"];
    let line = |content: &&str| serde_json::json!({"prompt": "2+2=", "completion": content}).to_string() + "\n";
    fs::write(job.path("data/train.jsonl"), contents.iter().map(line).collect::<String>()).unwrap();
    let turns = |content: &&str| {
        let (user, assistant) =
            (serde_json::json!({"role": "user", "content": "a"}), serde_json::json!({"role": "assistant", "content": content}));
        serde_json::json!({"messages": [user, assistant, user, assistant]}).to_string() + "\n"
    };
    fs::write(job.path("data/held-out.jsonl"), contents.iter().map(turns).collect::<String>()).unwrap();
    job.config.training.num_train_epochs = 1;
    // Two files, two formats: each is recognised by its first line.
    assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete);
}

fn find(folder: &Path, name: &str) -> PathBuf {
    let entries: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path().join(name)).collect();
    entries.into_iter().find(|path| path.exists()).unwrap()
}
