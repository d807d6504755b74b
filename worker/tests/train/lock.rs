//! Two trainers, one output folder.

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead as _, BufReader, Lines};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Stdio};
use std::thread;

use carryon_crds::wire::{ExitCode, Progress};
use carryon_worker::train::lock::{LEASE_FILE, Lock, Timing};
use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainArgs, TrainError};

use super::toy_pool::ToyPool;
use super::{Job, refusal};

/// Losses until a run of [`Job::chat`] is between its first step and its last.
pub const AMID: usize = 16;

/// `carryon-worker train` as a process; killed when it is dropped.
pub struct Trainer {
    child: Child,
    log: Lines<BufReader<ChildStderr>>,
    address: SocketAddr,
}

impl Trainer {
    pub fn start(job: &Job, pool: &ToyPool) -> Self {
        Self::start_with(&job.args(pool))
    }

    pub fn start_with(args: &TrainArgs) -> Self {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_carryon-worker"));
        command.args(["train", "--threads", "1", "--listen", &address.to_string(), "--pool", &args.pool[0]]);
        let files = [("--config", &args.config), ("--data", &args.data), ("--output", &args.output)];
        files.into_iter().chain([("--termination-log", args.termination_log.as_ref().unwrap())]).for_each(|(name, path)| {
            command.arg(name).arg(path);
        });
        args.state_cache.iter().for_each(|folder| {
            command.arg("--state-cache").arg(folder);
        });
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap()).lines();
        Self { child, log, address }
    }

    /// Reads the log until it says so.
    pub fn until(&mut self, words: &str) {
        let mut read = Vec::new();
        for line in self.log.by_ref() {
            read.push(line.unwrap());
            if read.last().unwrap().contains(words) {
                return;
            }
        }
        panic!("the trainer has ended without a word of {words:?}: {read:#?}");
    }

    /// Of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether it has not ended.
    pub fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    fn phase(&self) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let url = format!("http://{}/progress", self.address);
        runtime.block_on(async { reqwest::get(url).await.unwrap().json::<Progress>().await.unwrap() }).phase
    }

    fn signal(&self, name: &str) {
        assert!(Command::new("kill").args([name, &self.child.id().to_string()]).status().unwrap().success());
    }

    pub fn exit_code(mut self) -> Option<i32> {
        self.log.by_ref().for_each(drop);
        self.child.wait().unwrap().code()
    }
}

impl Drop for Trainer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_second_trainer_waits_for_the_first_and_goes_on_with_its_bits_when_it_is_killed() {
    let (pool, unbroken, shared) = (ToyPool::start(), Job::chat(), Job::chat());
    unbroken.run(&pool).unwrap();
    pool.hold_after(AMID);
    let mut first = Trainer::start(&shared, &pool);
    first.until("step 1/8");
    // Its checkpoint is written by then.
    while !pool.holds() {
        thread::yield_now();
    }

    let mut second = Trainer::start(&shared, &pool);
    second.until("holds it");
    assert_eq!(second.phase(), "waiting");
    second.signal("-TERM");
    assert_eq!(second.exit_code(), Some(ExitCode::Resume as i32));
    assert!(shared.last_words().message.contains("stopped on request"));

    let mut third = Trainer::start(&shared, &pool);
    third.until("holds it");
    first.signal("-KILL");
    third.until("resuming behind step");
    pool.release();
    assert_eq!(third.exit_code(), Some(0));
    assert_eq!(shared.head(), unbroken.head());
    let losses = |job: &Job| job.steps().iter().map(|line| (line.step, line.loss.to_bits())).collect::<Vec<_>>();
    assert_eq!(losses(&shared), losses(&unbroken));
}

#[test]
fn a_trainer_whose_lease_is_stolen_writes_no_more_and_may_be_tried_again() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    pool.hold_after(AMID);
    let output = job.path("output");
    let (stolen, ended) = thread::scope(|scope| {
        let trainer = scope.spawn(|| job.run(&pool));
        while !pool.holds() {
            assert!(!trainer.is_finished(), "the trainer has ended before it was held");
            thread::yield_now();
        }
        fs::write(output.join(LEASE_FILE), r#"{"id":"theirs","holder":"b","reach":"elsewhere","renewals":0}"#).unwrap();
        let stolen = contents(&output.join("checkpoints"));
        assert!(!stolen.is_empty(), "no checkpoint is there yet");
        pool.release();
        (stolen, trainer.join().unwrap())
    });
    let (message, code) = refusal(ended);
    assert!(message.starts_with("another trainer has taken over the output folder"), "{message}");
    assert_eq!(code, ExitCode::Retryable);
    assert_eq!(contents(&output.join("checkpoints")), stolen);
    assert!(fs::read_to_string(output.join(LEASE_FILE)).unwrap().contains("theirs"));
    assert!(!output.join("finished.json").exists() && !output.join("heads").exists());
}

#[test]
fn nothing_is_touched_before_the_folder_is_locked() {
    let (pool, job) = (ToyPool::start(), Job::chat());
    job.run(&pool).unwrap();
    let output = job.path("output");
    job.kill_after(3);
    fs::write(output.join("checkpoints/.tmp123"), "half a checkpoint").unwrap();
    fs::write(output.join("checkpoints/step-0000000004.safetensors"), "damaged").unwrap();
    let never = |_| -> Result<(), TrainError> { panic!("nobody holds the folder") };
    let lock = Lock::take(&output, Timing::default(), &Stop::default(), never, |_| ()).unwrap();
    let before = contents(&output);
    let stop = Stop::default();
    stop.set();
    assert_eq!(job.run_until(&pool, &stop).unwrap(), ExitCode::Resume);
    assert_eq!(contents(&output), before);

    drop(lock);
    assert_eq!(job.run(&pool).unwrap(), ExitCode::Complete);
    assert!(!output.join("checkpoints/.tmp123").exists(), "what a killed writer left goes once the folder is ours");
}

/// Every file below `folder` but the lease, which is renewed.
fn contents(folder: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(contents(&path));
        } else if !path.ends_with(LEASE_FILE) {
            found.insert(path.clone(), fs::read(path).unwrap());
        }
    }
    found
}
