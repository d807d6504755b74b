//! The network namespace of a thread.

use std::fs::File;

use nix::sched::{CloneFlags, setns};

/// A thread's way back to the network it came from.
#[derive(Debug)]
pub struct Visit {
    home: File,
}

impl Visit {
    /// Takes this thread, and the threads and processes it will start, into the network of a process.
    pub fn enter(pid: &str) -> Self {
        let open = |path: String| File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        let (home, away) = (open("/proc/thread-self/ns/net".to_owned()), open(format!("/proc/{pid}/ns/net")));
        setns(&away, CloneFlags::CLONE_NEWNET).expect("root may enter the network of its own process");
        Self { home }
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let _ = setns(&self.home, CloneFlags::CLONE_NEWNET);
    }
}
