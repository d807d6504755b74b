//! The worker in processes of their own: they can be stopped in their tracks, and their memory is counted.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use carryon_crds::pool::{Dtype, Engine};
use carryon_crds::wire::{BaseConfig, ServeConfig, ServeHead};

use crate::harness::{ENGINE, checkpoint};

pub struct Process {
    child: Child,
    pub url: String,
    _folder: tempfile::TempDir,
}

impl Process {
    /// A pool of the tiny model.
    pub fn pool() -> Self {
        let folder = checkpoint(7);
        let engine = Engine { max_num_batched_tokens: 1024, ..ENGINE };
        let config = BaseConfig { name: "process".to_owned(), dtype: Dtype::Float32, engine, text_only: false };
        Self::start(folder, "base", &serde_json::to_vec(&config).unwrap(), |command, folder| {
            command.arg("--model").arg(folder);
        })
    }

    /// A gateway of the head in `folder`, as `large`.
    pub fn gateway(pool: &Self, head: &Path, digest: &str) -> Self {
        let served = ServeHead { name: "large".to_owned(), served_model_name: "large".to_owned(), digest: digest.to_owned() };
        let config =
            ServeConfig { base_model_name: "base".to_owned(), heads: vec![served], allowed_origins: vec![], namespace: "team".to_owned() };
        Self::start(tempfile::tempdir().unwrap(), "serve", &serde_json::to_vec(&config).unwrap(), |command, _| {
            command.args(["--pool", &pool.url, "--head"]).arg(head);
        })
    }

    fn start(folder: tempfile::TempDir, kind: &str, config: &[u8], add: impl FnOnce(&mut Command, &Path)) -> Self {
        let path = folder.path().join("worker.json");
        std::fs::write(&path, config).unwrap();
        let address: SocketAddr = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_carryon-worker"));
        command.args([kind, "--threads", "2", "--listen", &address.to_string(), "--config"]).arg(path);
        add(&mut command, folder.path());
        let child = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
        Self { child, url: format!("http://{address}"), _folder: folder }
    }

    /// Stops it in its tracks.
    pub fn stop(&self) {
        assert!(Command::new("kill").args(["-STOP", &self.child.id().to_string()]).status().unwrap().success());
    }

    /// The most memory that it has used, bytes.
    pub fn peak(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
        line.trim().strip_suffix(" kB").unwrap().parse::<u64>().unwrap() * 1024
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
