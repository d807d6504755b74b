//! `local up`: admit everything, then run it here or leave a supervisor that does.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use carryon_crds::names;
use nix::sys::signal::Signal as UnixSignal;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::args::{SuperviseArgs, UpArgs};
use super::folders::Folders;
use super::manifest::{self, Refused};
use super::process::Record;
use super::store::{Key, Store, write_json};
use super::supervisor::{self, PERIOD, Supervisor};
use super::table::{self, Display};
use super::until::{self, Verdict};
use super::{Error, step};
use crate::admission::Admission;

/// How often the objects of a supervisor in the background are read.
const FOLLOW_PERIOD: Duration = Duration::from_millis(500);
/// How long a supervisor may take to its first round.
const START_LIMIT: Duration = Duration::from_secs(60);

/// Runs `local up`.
///
/// # Errors
/// [`Error::Refused`] before anything is started; [`Error::NotReached`] when `--until` cannot be.
pub async fn up(args: UpArgs) -> Result<(), Error> {
    let folders = Folders::create(&args.state.state_dir).map_err(step("making the state directory"))?;
    let documents = manifest::read(&args.files)?;
    let store = Store::open(&folders.root).map_err(step("reading the stored objects"))?;
    let linked = |claim: &str| args.volumes.iter().any(|(own, _)| own == claim);
    let has_claim = |namespace: &str, claim: &str| folders.claim(namespace, claim).exists() || namespace == "default" && linked(claim);
    let admission = Admission::new().map_err(|error| Refused(vec![error]))?;
    let objects = manifest::admit(&documents, &admission, &store, &has_claim)?;
    let worker = worker(args.worker.clone())?;
    for (claim, folder) in &args.volumes {
        folders.link(claim, folder).map_err(step("linking a volume"))?;
    }
    let keys: Vec<Key> = objects.iter().map(Key::of_value).collect();
    for (index, object) in objects.iter().enumerate() {
        let file = folders.root.join("incoming").join(format!("{index:04}-{}.json", keys[index].kind));
        write_json(&file, object).map_err(step("handing over the objects"))?;
    }
    let goal = Goal { keys: args.until.map(|_| keys), deadline: args.timeout.map(|timeout| Instant::now() + timeout) };
    if let Some(record) = supervisor::running(&folders.root) {
        println!("handed to the supervisor that runs already (process {})", record.pid);
        return follow(&folders, &record, &goal).await;
    }
    if !args.detach {
        return foreground(&folders, worker, &goal).await;
    }
    let record = detach(&folders, &worker).await?;
    match follow(&folders, &record, &goal).await {
        Ok(()) => Ok(()),
        Err(error) => {
            super::down::stop(&folders.root)?;
            Err(error)
        }
    }
}

/// Runs the supervisor that `up --detach` starts: no table, until SIGTERM.
pub async fn supervise(args: SuperviseArgs) -> Result<(), Error> {
    let folders = Folders::create(&args.state.state_dir).map_err(step("making the state directory"))?;
    foreground(&folders, args.worker, &Goal { keys: None, deadline: None }).await
}

/// What is waited for.
struct Goal {
    /// Objects that have to be complete; none waits for nothing.
    keys: Option<Vec<Key>>,
    deadline: Option<Instant>,
}

impl Goal {
    /// Whether it is reached, or why it cannot be.
    fn reached(&self, store: &Store) -> Result<bool, Error> {
        let Some(keys) = &self.keys else { return Ok(false) };
        match until::complete(store, keys) {
            Verdict::Reached => Ok(true),
            Verdict::Failed(reason) => Err(Error::NotReached(reason)),
            Verdict::Pending(message) if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                Err(Error::NotReached(format!("--timeout has passed; waiting for {message}")))
            }
            Verdict::Pending(_) => Ok(false),
        }
    }
}

/// SIGINT and SIGTERM.
struct Interrupts {
    interrupt: Signal,
    terminate: Signal,
}

impl Interrupts {
    fn new() -> Result<Self, Error> {
        let listen = |kind| signal(kind).map_err(step("listening for signals"));
        Ok(Self { interrupt: listen(SignalKind::interrupt())?, terminate: listen(SignalKind::terminate())? })
    }

    async fn next(&mut self) {
        tokio::select! {
            _ = self.interrupt.recv() => {}
            _ = self.terminate.recv() => {}
        }
    }
}

async fn foreground(folders: &Folders, worker: PathBuf, goal: &Goal) -> Result<(), Error> {
    let mut interrupts = Interrupts::new()?;
    let mut supervisor = Supervisor::open(folders, worker).map_err(step("taking over the state directory"))?;
    let mut display = Display::new();
    let mut announced = false;
    let end = loop {
        if let Err(error) = supervisor.tick() {
            break Err(Error::Io("running the objects", error));
        }
        if !announced {
            supervisor.announce().map_err(step("announcing the supervisor"))?;
            announced = true;
        }
        display.show(table::rows(supervisor.store())).map_err(step("writing to stdout"))?;
        match goal.reached(supervisor.store()) {
            Ok(true) => break Ok(()),
            Ok(false) => {}
            Err(error) => break Err(error),
        }
        tokio::select! {
            () = tokio::time::sleep(PERIOD) => {}
            () = interrupts.next() => break if goal.keys.is_some() { Err(Error::NotReached("interrupted".to_owned())) } else { Ok(()) },
        }
    };
    println!("stopping: gateways, then trainers, then pools (once more to end them at once)");
    supervisor.stop(async || interrupts.next().await).await.map_err(step("stopping"))?;
    end
}

/// Watches a supervisor in the background until the goal is reached; without a goal, returns at once.
async fn follow(folders: &Folders, supervisor: &Record, goal: &Goal) -> Result<(), Error> {
    let mut interrupts = Interrupts::new()?;
    let mut display = Display::new();
    while goal.keys.is_some() {
        // A file that goes while the folder is read is no error: the next look sees the new state.
        if let Ok(store) = Store::open(&folders.root) {
            display.show(table::rows(&store)).map_err(step("writing to stdout"))?;
            let taken_in = super::store::read_folder(&folders.root.join("incoming")).is_ok_and(|left| left.is_empty());
            if taken_in && goal.reached(&store)? {
                return Ok(());
            }
        }
        if !supervisor.is_alive() {
            let log = folders.root.join("logs/supervisor.log");
            return Err(Error::NotReached(format!("the supervisor has ended; see {}", log.display())));
        }
        tokio::select! {
            () = tokio::time::sleep(FOLLOW_PERIOD) => {}
            () = interrupts.next() => return Err(Error::NotReached("interrupted".to_owned())),
        }
    }
    Ok(())
}

/// Starts a supervisor in a session of its own and waits for its first round.
async fn detach(folders: &Folders, worker: &std::path::Path) -> Result<Record, Error> {
    let log = folders.root.join("logs/supervisor.log");
    let mut child = spawn(folders, worker, &log).map_err(step("starting the supervisor"))?;
    let deadline = Instant::now() + START_LIMIT;
    loop {
        if let Some(record) = supervisor::running(&folders.root).filter(|record| record.pid.unsigned_abs() == child.id()) {
            return Ok(record);
        }
        if let Some(status) = child.try_wait().map_err(step("starting the supervisor"))? {
            return Err(Error::NotReached(format!("the supervisor ended at once ({status}); see {}", log.display())));
        }
        if Instant::now() > deadline {
            Record::of(child.id().cast_signed()).inspect(|record| record.signal(UnixSignal::SIGTERM));
            return Err(Error::NotReached(format!("the supervisor does not start; see {}", log.display())));
        }
        tokio::time::sleep(PERIOD / 2).await;
    }
}

fn spawn(folders: &Folders, worker: &std::path::Path, log: &std::path::Path) -> io::Result<Child> {
    let out = OpenOptions::new().create(true).append(true).open(log)?;
    let mut command = Command::new(std::env::current_exe()?);
    command.args(["local", "supervise", "--state-dir"]).arg(&folders.root).arg("--worker").arg(worker);
    command.stdin(Stdio::null()).stdout(out.try_clone()?).stderr(out);
    // SAFETY: setsid is async-signal-safe and the closure does nothing else.
    unsafe {
        command.pre_exec(|| nix::unistd::setsid().map(|_| ()).map_err(io::Error::from));
    }
    command.spawn()
}

/// The worker binary, which must exist.
fn worker(given: Option<PathBuf>) -> Result<PathBuf, Error> {
    let beside = || Ok::<_, io::Error>(std::env::current_exe()?.with_file_name(names::WORKER));
    let path = given.map_or_else(beside, Ok).map_err(step("finding the worker binary"))?;
    let found = path.canonicalize().ok().filter(|path| path.is_file());
    found.ok_or_else(|| Refused(vec![format!("worker binary {} not found: build it, or name it with --worker", path.display())]).into())
}
