//! `carryon-operator local`: the three kinds as processes on this machine.
//!
//! The same schema, defaults, rules, validation, children and statuses as in a cluster. What a cluster's own parts do is done
//! here, small: admission, storage ([`store`]), the workload controllers ([`workloads`]), the kubelet ([`kubelet`]), the
//! addresses of Services ([`rewrite`]). What cannot be emulated is refused ([`refuse`]).

pub mod args;
pub mod down;
pub mod folders;
pub mod kubelet;
pub mod last_words;
pub mod logs;
pub mod manifest;
pub mod pod_status;
pub mod polls;
pub mod ports;
pub mod probes;
pub mod process;
pub mod reconcile;
pub mod refuse;
pub mod rewrite;
pub mod scalar;
pub mod store;
pub mod supervisor;
pub mod table;
pub mod until;
pub mod up;
pub mod workloads;
pub mod yaml;

use std::io;

use args::LocalCommand;

/// Why a command of local mode did not do what it should.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Manifests were refused; nothing was started.
    #[error(transparent)]
    Refused(#[from] manifest::Refused),
    /// A file, a process or the network.
    #[error("{0}")]
    Io(&'static str, #[source] io::Error),
    /// `--until` was not reached.
    #[error("{0}")]
    NotReached(String),
}

/// Names the step that an I/O error belongs to.
fn step(name: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |error| Error::Io(name, error)
}

/// Runs a command.
pub fn run(command: LocalCommand) -> Result<(), Error> {
    // One thread: a child dies with the thread that started it, so that has to be one that lives as long as the operator.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(step("starting"))?;
    match command {
        LocalCommand::Up(args) => runtime.block_on(up::up(args)),
        LocalCommand::Supervise(args) => runtime.block_on(up::supervise(args)),
        LocalCommand::Down(args) => down::down(&args),
        LocalCommand::Status(args) => down::status(&args),
        LocalCommand::Logs(args) => logs::logs(&args),
    }
}
