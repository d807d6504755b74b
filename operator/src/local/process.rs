//! Child processes: each in a group of its own, told to end when the operator dies, known on disk so that the next operator
//! can end those that an operator killed with SIGKILL has left behind.

use std::fs::{self, OpenOptions};
use std::io;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use nix::sys::prctl;
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getppid};
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::rewrite::Process;
use super::store::write_json;

/// Variables of the operator that a process gets; all others stay out, as in a container.
const INHERITED: [&str; 6] = ["PATH", "LANG", "TZ", "RUST_LOG", "RUST_BACKTRACE", "LD_LIBRARY_PATH"];

/// A process that runs.
pub struct Running {
    child: Child,
    /// Its place on disk.
    record: Record,
}

/// A process by pid and start time: a pid alone may have been given to another one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Process id, also that of its group.
    pub pid: i32,
    /// Clock ticks since boot, from `/proc/PID/stat`.
    pub start_time: u64,
}

impl Record {
    /// The record of process `pid`, be it alive or waiting to be reaped.
    pub fn of(pid: i32) -> Option<Self> {
        stat(pid).map(|(_, start_time)| Self { pid, start_time })
    }

    /// Whether the very process is alive.
    pub fn is_alive(&self) -> bool {
        stat(self.pid).is_some_and(|(state, start_time)| state != 'Z' && start_time == self.start_time)
    }

    /// Sends a signal, if the very process is alive.
    pub fn signal(&self, signal: Signal) {
        if self.is_alive() {
            // It may end between the look and the signal; then there is nothing to do.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// Kills the process and its group.
    pub fn kill_group(&self) {
        if self.is_alive() {
            let _ = killpg(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }
}

impl Running {
    /// Starts `process`.
    ///
    /// # Errors
    /// When its folders cannot be made or the program cannot be started; the error names the program.
    pub fn start(process: &Process) -> io::Result<Self> {
        let temporary = process.folder.join("tmp");
        fs::create_dir_all(&temporary)?;
        fs::write(&process.termination_log, b"")?;
        let log = OpenOptions::new().create(true).append(true).open(&process.log)?;
        let mut command = Command::new(&process.program);
        command.args(&process.args).current_dir(&process.folder).stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        command.env_clear().envs(INHERITED.iter().chain(process.inherited).filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.envs(process.env.iter().cloned()).env("HOME", &process.folder).env("TMPDIR", &temporary).process_group(0);
        let operator = nix::unistd::getpid();
        // SAFETY: between fork and exec only two system calls are made, both async-signal-safe; nothing is allocated.
        unsafe {
            command.pre_exec(move || {
                prctl::set_pdeathsig(Signal::SIGTERM)?;
                // The operator may have died before the call above.
                if getppid() == operator { Ok(()) } else { Err(io::Error::from_raw_os_error(nix::libc::ESRCH)) }
            });
        }
        let child = command.spawn().map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", process.program.display())))?;
        let pid = i32::try_from(child.id()).map_err(io::Error::other)?;
        let record = Record::of(pid).ok_or_else(|| io::Error::other(format!("process {pid} is not in /proc")))?;
        Ok(Self { child, record })
    }

    /// How it ended; none while it runs.
    pub fn ended(&mut self) -> io::Result<Option<i32>> {
        let status = self.child.try_wait()?;
        if status.is_some() {
            // What it started itself does not outlive it, as in a container.
            let _ = killpg(Pid::from_raw(self.record.pid), Signal::SIGKILL);
        }
        Ok(status.map(exit_code))
    }

    /// Asks it to end.
    pub fn terminate(&self) {
        self.record.signal(Signal::SIGTERM);
    }

    /// Ends it and its group.
    pub fn kill(&self) {
        self.record.kill_group();
    }

    /// Its record.
    pub fn record(&self) -> &Record {
        &self.record
    }
}

/// The code, or 128 + signal, as container runtimes report it.
fn exit_code(status: ExitStatus) -> i32 {
    status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1)
}

/// State and start time of a process: fields 3 and 22 of `/proc/PID/stat`.
fn stat(pid: i32) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in brackets may hold spaces: count from its end.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?.chars().next()?;
    Some((state, fields.nth(18)?.parse().ok()?))
}

/// The records of all processes that run, on disk.
pub struct Register {
    file: PathBuf,
    records: Vec<Record>,
}

impl Register {
    /// Kills what an earlier operator has left behind, and starts anew.
    pub fn clean(file: &Path) -> io::Result<Self> {
        let stale: Vec<Record> = fs::read(file).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        for record in stale.iter().filter(|record| record.is_alive()) {
            tracing::warn!(pid = record.pid, "ending a process of an earlier run");
            record.kill_group();
        }
        let register = Self { file: file.to_owned(), records: Vec::new() };
        register.write()?;
        Ok(register)
    }

    /// Enters and strikes out, so that the file holds exactly `records`.
    pub fn set(&mut self, records: Vec<Record>) -> io::Result<()> {
        if records != self.records {
            self.records = records;
            self.write()?;
        }
        Ok(())
    }

    fn write(&self) -> io::Result<()> {
        write_json(&self.file, &json!(self.records))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_has_ended_before_anybody_looked_has_a_record_and_is_not_alive() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id().cast_signed();
        while stat(pid).unwrap().0 != 'Z' {
            std::thread::yield_now();
        }
        assert!(!Record::of(pid).unwrap().is_alive());
        child.wait().unwrap();
    }

    #[test]
    fn a_record_of_another_start_time_is_another_process() {
        let own = Record::of(i32::try_from(std::process::id()).unwrap()).unwrap();
        assert!(own.is_alive());
        assert!(!Record { start_time: own.start_time + 1, ..own }.is_alive());
    }
}
