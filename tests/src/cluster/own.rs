//! A cluster of our own: the scripts that make it, its folder, its end.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{ChildStdin, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::network::Visit;
use crate::{binary, model, place, repository};

/// Whether this machine can have a cluster; what it lacks when not.
pub fn possible() -> Result<(), String> {
    if !nix::unistd::geteuid().is_root() {
        return Err("its nodes are namespaces, which only root can make".to_owned());
    }
    match tools().join("kubelet") {
        kubelet if kubelet.exists() => Ok(()),
        kubelet => Err(format!("{} is missing: run `make cluster-tools`", kubelet.display())),
    }
}

fn tools() -> PathBuf {
    place("CARRYON_KUBERNETES", "kubernetes")
}

fn images() -> PathBuf {
    place("CARRYON_IMAGES", "images")
}

/// A running cluster.
#[derive(Debug)]
pub struct Own {
    folder: PathBuf,
    /// The nodes live while this is open, which is no longer than our process. None for a shared one, which lives as long as its tests' runner.
    life: Option<ChildStdin>,
    visit: Option<Visit>,
    shared: bool,
    /// Length of the audit log when we came.
    pub heard: u64,
}

/// Of a cluster that tests share: the others wait meanwhile.
pub struct Turn {
    folder: PathBuf,
    _lock: File,
}

/// One of the scripts in `tests/cluster`.
pub struct Script(Command);

impl Script {
    fn new(name: &str, folder: &Path) -> Self {
        let mut command = Command::new(repository().join("tests/cluster").join(name));
        command.env("CARRYON_RUN", folder).env("CARRYON_KUBERNETES", tools()).env("CARRYON_IMAGES", images());
        Self(command)
    }

    pub fn args<A: AsRef<std::ffi::OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.0.args(arguments);
        self
    }

    pub fn run(mut self) {
        let output = self.0.output().unwrap_or_else(|error| panic!("{:?}: {error}", self.0.get_program()));
        let words = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{:?} {:?}: {words}", self.0.get_program(), self.0.get_args());
    }
}

impl Own {
    pub fn up(arguments: &[&str]) -> Self {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let folder = runs().join(format!("test-{}-{}", std::process::id(), STARTED.fetch_add(1, Ordering::Relaxed)));
        sweep();
        // Made before anything runs: when a step below panics, dropping it ends what has started.
        let mut own = Self { folder, life: None, visit: None, shared: false, heard: 0 };
        let mut up = own.script("up.sh").args(arguments).args(["--owned"]).0;
        let mut child = up.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("up.sh starts");
        own.life = child.stdin.take();
        assert!(child.wait().expect("up.sh ends").success(), "the cluster did not come up, up.sh said why");
        own.enter();
        own
    }

    /// The shared cluster, and whether it has just been started: then [`Turn::done`] is to be called when it is as the others want it.
    pub fn share(turn: &Turn, arguments: &[&str]) -> (Self, bool) {
        let mut own = Self { folder: turn.folder.clone(), life: None, visit: None, shared: true, heard: 0 };
        let new = !turn.mark().exists();
        if new {
            // Neither the cluster nor what ends it holds anything of ours open: it outlives us.
            let runner = std::os::unix::process::parent_id().to_string();
            let mut life = Command::new("tail");
            life.args(["--pid", &runner, "-f", "/dev/null"]).process_group(0).stdin(Stdio::null()).stderr(Stdio::null());
            let life = life.stdout(Stdio::piped()).spawn().expect("tail starts").stdout.take().expect("it has an output");
            let log = turn.folder.with_extension("log");
            let words = File::create(&log).unwrap_or_else(|error| panic!("{}: {error}", log.display()));
            let mut up = own.script("up.sh").args(arguments).args(["--owned"]).0;
            let up = up.stdin(life).stdout(Stdio::null()).stderr(words).status().expect("up.sh starts");
            assert!(up.success(), "the cluster did not come up: {}", fs::read_to_string(&log).unwrap_or_default());
        }
        own.enter();
        own.heard = fs::metadata(own.folder.join("audit.log")).map_or(0, |log| log.len());
        (own, new)
    }

    fn enter(&mut self) {
        let pid = fs::read_to_string(self.folder.join("node1/init.pid")).expect("the first node runs");
        self.visit = Some(Visit::enter(pid.trim()));
    }

    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn script(&self, name: &str) -> Script {
        Script::new(name, &self.folder)
    }

    pub fn command(&self, program: &str) -> Command {
        self.script("exec.sh").args([program]).0
    }

    pub fn load_images(&self, names: &[&str]) {
        let binaries = binary("carryon-worker").with_file_name("");
        let mut make = self.script("images.sh").args(names);
        make.0.env("CARRYON_BIN", binaries).env("CARRYON_MODEL", model());
        make.run();
        self.script("load.sh").args(names.iter().map(|name| images().join(format!("{name}.tar")))).run();
    }

    /// What a person would ask for first when a test has failed.
    fn last_words(&self) {
        for arguments in [&["get", "pods", "-A", "-o", "wide"][..], &["get", "events", "-A", "--sort-by=.lastTimestamp"]] {
            let output = self.command("kubectl").args(arguments).arg("--request-timeout=5s").output();
            eprintln!("kubectl {}:\n{}", arguments.join(" "), output.map(|output| text(&output.stdout)).unwrap_or_default());
        }
        eprintln!("logs and audit.log stay in {} until the next test", self.folder.display());
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

impl Drop for Own {
    fn drop(&mut self) {
        let failed = std::thread::panicking();
        if failed && self.visit.is_some() {
            self.last_words();
        }
        self.visit = None;
        if self.shared {
            return;
        }
        let wipe = if failed { &[][..] } else { &["--wipe"] };
        let down = self.script("down.sh").args(wipe).0.output();
        let complaint = down.map_or_else(|error| error.to_string(), |down| text(&down.stderr));
        if failed {
            eprint!("{complaint}"); // a second panic would hide the first
        } else {
            assert!(complaint.is_empty(), "down.sh: {complaint}");
        }
    }
}

impl Turn {
    /// At the cluster that all tests of our runner share.
    pub fn take() -> Self {
        fs::create_dir_all(runs()).expect("there can be a folder for clusters");
        let folder = runs().join(format!("test-{}-shared", std::os::unix::process::parent_id()));
        let lock = File::create(folder.with_extension("lock")).expect("it can be written to");
        lock.lock().expect("it can be locked");
        if !folder.exists() {
            sweep();
        }
        Self { folder, _lock: lock }
    }

    fn mark(&self) -> PathBuf {
        self.folder.join("prepared")
    }

    /// The cluster is as the others want it.
    pub fn done(self) {
        fs::write(self.mark(), "").expect("the cluster has a folder");
    }
}

fn runs() -> PathBuf {
    place("CARRYON_RUN", "run/cluster").parent().expect("the folder of runs has a parent").to_owned()
}

/// Removes what killed tests and ended runners have left; their nodes have ended with them.
fn sweep() {
    for entry in fs::read_dir(runs()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix("test-").and_then(|rest| rest.split('-').next()) else { continue };
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        if entry.path().is_file() {
            let _gone_already = fs::remove_file(entry.path());
        } else {
            Script::new("down.sh", &entry.path()).args(["--wipe"]).run();
        }
    }
}
