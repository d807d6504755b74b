//! `local down` and `local status`.

use std::fs;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use super::args::{DownArgs, StateArgs};
use super::process::Register;
use super::store::Store;
use super::{Error, step, supervisor, table};

/// Longest time a supervisor gets to stop everything in order; grace periods end before.
const LIMIT: Duration = Duration::from_secs(300);

/// Stops the supervisor and whatever it has left behind.
pub fn down(args: &DownArgs) -> Result<(), Error> {
    let root = &args.state.state_dir;
    if !root.is_dir() {
        println!("nothing runs: there is no {}", root.display());
        return Ok(());
    }
    stop(root)?;
    if args.delete {
        for folder in ["objects", "incoming", "configmaps", "secrets", "pods"] {
            let removed = fs::remove_dir_all(root.join(folder));
            removed
                .or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
                .map_err(step("forgetting objects"))?;
        }
        println!("objects forgotten; volumes and logs stay in {}", root.display());
    }
    Ok(())
}

/// Stops the supervisor of `root`, if one runs, and ends processes that a dead one has left.
pub fn stop(root: &Path) -> Result<(), Error> {
    if let Some(record) = supervisor::running(root) {
        println!("stopping process {}: gateways, then trainers, then pools", record.pid);
        record.signal(Signal::SIGTERM);
        let deadline = Instant::now() + LIMIT;
        while record.is_alive() {
            if Instant::now() > deadline {
                record.kill_group();
                return Err(Error::NotReached(format!("process {} did not end in {} s and was killed", record.pid, LIMIT.as_secs())));
            }
            std::thread::sleep(supervisor::PERIOD / 2);
        }
    }
    Register::clean(&root.join("processes.json")).map(|_| ()).map_err(step("ending processes left behind"))
}

/// Prints the objects.
pub fn status(args: &StateArgs) -> Result<(), Error> {
    let root = &args.state_dir;
    if !root.join("objects").is_dir() {
        println!("no objects: there is no {}", root.join("objects").display());
        return Ok(());
    }
    let store = Store::open(root).map_err(step("reading the stored objects"))?;
    match supervisor::running(root) {
        Some(record) => println!("supervisor: process {}", record.pid),
        None => println!("no supervisor runs; the objects as they were last seen:"),
    }
    println!("{}", table::render(&table::rows(&store)));
    Ok(())
}
