//! What lies in the output folder when a trainer comes: another base's results, another job's, half a head; and how much room there is.

use std::fs;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use carryon_crds::common::Taps;
use carryon_crds::job::{Optimizer, StateDtype};
use carryon_crds::wire::{ExitCode, Identity, Progress, TapChoice};
use carryon_worker::head::artifact;
use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainArgs, room, run_until};

use super::Job;
use super::lock::{AMID, Trainer};
use super::toy_pool::ToyPool;

/// A member of what names a base.
fn member<'a>(identity: &'a mut Identity, name: &str) -> &'a mut String {
    match name {
        "weights" => &mut identity.weights,
        "chat_template" => &mut identity.chat_template,
        _ => &mut identity.norm_point,
    }
}

#[test]
fn a_plan_of_the_memory_leaves_the_output_folder_alone() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    let args = TrainArgs { plan: true, ..job.args(&pool) };
    assert_eq!(run_until(&args, &Stop::default()).unwrap(), ExitCode::Complete);
    assert!(!job.path("output").exists());
    let words = job.last_words();
    assert!(words.message.starts_with("memory: ") && words.digest.is_none(), "{}", words.message);
    assert_eq!(pool.asked(), 0, "no states were asked for");
}

#[test]
fn another_base_s_finished_head_is_not_believed() {
    for name in ["weights", "chat_template", "norm_point"] {
        let (pool, job) = (ToyPool::start(), Job::chat());
        job.run(&pool).unwrap();
        let first = job.head_folder();
        pool.describe(|description| *member(&mut description.identity, name) = "another".to_owned());
        assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete, "{name}");
        let (head, _) = artifact::read(&job.head_folder()).unwrap();
        assert_eq!(*member(&mut head.base.identity.clone(), name), "another");
        assert_eq!(job.last_words().base_model_digest, Some(head.base.identity.digest()));
        assert!(pool.asked() > 17, "{name}: no states of the other base were asked for");
        assert_ne!(artifact::read(&first).unwrap().0.base.identity, head.base.identity, "the first head stays as it is");
    }
}

#[test]
fn another_base_s_checkpoints_are_set_aside_by_name() {
    let (pool, unbroken, job) = (ToyPool::start(), Job::chat(), Job::chat());
    job.run(&pool).unwrap();
    let first = job.head();
    job.kill_after(3);
    let (mut base, mut before) = (None, String::new());
    pool.describe(|description| {
        base = Some(description.identity.digest());
        before.clone_from(&description.identity.weights);
        description.identity.weights = "another".to_owned();
    });
    unbroken.run(&pool).unwrap();
    let mut trainer = Trainer::start(&job, &pool);
    let aside = job.path("output/checkpoints").join(format!("base-{}", &base.unwrap()[7..19]));
    trainer.until(&format!(
        "is of another base (identity member `weights` differs): set aside as {:?}",
        aside.join("step-0000000003.safetensors")
    ));
    assert_eq!(trainer.exit_code(), Some(0));
    assert_eq!(job.head(), unbroken.head(), "nothing of the other base is in the head");
    assert_eq!(fs::read_dir(&aside).unwrap().count(), 3);

    // The first base comes back, and with it what was trained on it.
    pool.describe(|description| description.identity.weights = before.clone());
    let mut trainer = Trainer::start(&job, &pool);
    trainer.until("resuming behind step 3");
    assert_eq!(trainer.exit_code(), Some(0));
    assert_eq!((job.head(), aside.exists()), (first, false));
}

#[test]
fn a_start_that_is_refused_takes_nothing_away() {
    let (pool, mut job) = (ToyPool::start(), Job::chat());
    job.run(&pool).unwrap();
    let first = job.head();
    job.kill_after(3);
    let (length, text) = (job.config.max_length, fs::read(job.path("data/train.jsonl")).unwrap());
    job.config.max_length = 1000;
    assert_eq!(job.run(&pool).unwrap_err().exit_code(), ExitCode::Configuration);
    job.config.max_length = length;
    fs::write(job.path("data/train.jsonl"), "{}\n").unwrap();
    assert_eq!(job.run(&pool).unwrap_err().exit_code(), ExitCode::Data);
    fs::write(job.path("data/train.jsonl"), text).unwrap();
    let mut trainer = Trainer::start(&job, &pool);
    trainer.until("resuming behind step 3");
    assert_eq!((trainer.exit_code(), job.head()), (Some(0), first));
}

#[test]
fn two_jobs_of_one_name_and_folder_run_one_after_the_other_and_leave_both_heads() {
    let (pool, shared, mut other) = (ToyPool::start(), Job::chat(), Job::chat());
    other.config.taps = Some(TapChoice::Layers(Taps { layers: vec![1, 3], final_norm: false }));
    pool.hold_after(AMID);
    let mut first = Trainer::start(&shared, &pool);
    first.until("step 1/8");
    std::os::unix::fs::symlink(shared.path("output"), other.path("output")).unwrap();
    let mut second = Trainer::start(&other, &pool);
    second.until("holds it");
    pool.release();
    assert_eq!((first.exit_code(), second.exit_code()), (Some(0), Some(0)));
    assert_ne!(shared.last_words().digest, other.last_words().digest);
    for (job, layers) in [(&shared, vec![0, 2]), (&other, vec![1, 3])] {
        let (head, manifest) = artifact::read(&job.head_folder()).unwrap();
        assert_eq!((head.shape.taps.layers, manifest.lineage.steps), (layers, 8));
    }
}

#[test]
fn a_trainer_killed_while_it_writes_the_head_ends_with_the_progress_of_an_unbroken_run() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    job.run(&pool).unwrap();
    let unbroken = job.last_words();
    job.kill_after(8);
    let half = job.path("output/heads/sha256-0/.tmphalf");
    fs::create_dir_all(half.parent().unwrap()).unwrap();
    fs::write(&half, "half a head").unwrap();
    job.run(&pool).unwrap();
    let resumed = job.last_words();
    let known = |progress: Option<Progress>| Progress { tokens_per_second: None, ..progress.unwrap() };
    let expected = known(unbroken.progress);
    assert!(expected.step == 8 && expected.total_steps == 8 && expected.train_loss.is_some() && expected.eval_loss.is_some());
    assert_eq!((known(resumed.progress), resumed.digest), (expected, unbroken.digest));
    assert!(!half.exists(), "what was half written goes");
}

/// Bytes of a small volume.
const VOLUME: u64 = 448 << 10;

/// A file system of its own for a job's output; unmounted when it is dropped.
struct Volume(PathBuf);

impl Volume {
    /// None, said aloud, where nobody may mount one.
    fn mount(job: &Job, bytes: u64) -> Option<Self> {
        let path = job.path("output");
        fs::create_dir(&path).unwrap();
        let options = format!("size={bytes}");
        let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&path).status();
        if mounted.is_ok_and(|status| status.success()) {
            return Some(Self(path));
        }
        eprintln!("SKIPPED: a small volume is a tmpfs, and this user may not mount one");
        None
    }

    /// Takes all the room that is left.
    fn fill(&self) {
        let mut file = fs::File::create(self.0.join("of-somebody-else")).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    }
}

impl Drop for Volume {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

/// A job that keeps two small checkpoints and could cache twenty times as much.
fn small() -> Job {
    let mut job = Job::chat();
    job.config.taps = Some(TapChoice::Layers(Taps { layers: vec![0, 1, 2, 3], final_norm: true }));
    job.config.checkpoint.save_total_limit = 2;
    job
}

fn size_of_a_checkpoint(job: &Job) -> u64 {
    fs::metadata(job.path("output/checkpoints/step-0000000008.safetensors")).unwrap().len()
}

#[test]
fn what_is_reserved_for_a_checkpoint_is_what_it_takes() {
    let pool = ToyPool::start();
    for (optimizer, dtype) in [
        (Optimizer::Muon, StateDtype::Float32),
        (Optimizer::AdamW, StateDtype::Float32),
        (Optimizer::AdamW, StateDtype::Bfloat16),
        (Optimizer::Muon, StateDtype::Int8),
    ] {
        let mut job = small();
        job.config.head.width = 64;
        (job.config.training.optim, job.config.training.optim_state_dtype) = (optimizer, dtype);
        job.run(&pool).unwrap();
        let (head, _) = artifact::read(&job.head_folder()).unwrap();
        let (found, reserved) = (size_of_a_checkpoint(&job), room::checkpoint_bytes(&head.shape, &job.config.training));
        assert!(found <= reserved && reserved < found + found / 5, "{optimizer:?} {dtype:?}: {found} bytes, {reserved} reserved");
    }
}

#[test]
fn the_cache_leaves_the_room_that_checkpoints_and_head_need() {
    let (pool, unbroken, job) = (ToyPool::start(), small(), small());
    unbroken.run(&pool).unwrap();
    // Three checkpoints at a time, the head, metrics and a report: with the cache beside them, too much.
    let Some(volume) = Volume::mount(&job, VOLUME) else { return };
    let needed = cached_bytes(&unbroken.path("output/cache")) + 3 * size_of_a_checkpoint(&unbroken);
    assert!(needed > VOLUME, "{needed} bytes fit");
    for killed_after in [0, 3, 7, 8] {
        assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete);
        assert_eq!(job.head(), unbroken.head());
        job.kill_after(killed_after);
    }
    drop(volume);
}

#[test]
fn the_cache_gives_way_when_somebody_else_has_filled_the_volume() {
    let (pool, unbroken, job) = (ToyPool::start(), small(), small());
    unbroken.run(&pool).unwrap();
    let Some(volume) = Volume::mount(&job, 16 << 20) else { return };
    pool.hold_after(AMID);
    let mut trainer = Trainer::start(&job, &pool);
    trainer.until("step 1/8");
    volume.fill();
    pool.release();
    trainer.until("what must be written found no room");
    assert_eq!(trainer.exit_code(), Some(0));
    assert_eq!(job.head(), unbroken.head());
    assert_eq!(cached_bytes(&job.path("output/cache")), 0);
}

fn cached_bytes(folder: &Path) -> u64 {
    fs::metadata(super::find(folder, "states.bin")).unwrap().len()
}
