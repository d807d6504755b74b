//! A state directory with a small quick start in it, and the operator that runs it.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use carryon_crds::names;
use carryon_tests::{binary, model, quickstart_data, repository};
use serde_json::Value;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(180);

/// What a process of the worker does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Base,
    Train,
    Serve,
}

impl Role {
    fn command(self) -> &'static str {
        match self {
            Role::Base => "base",
            Role::Train => "train",
            Role::Serve => "serve",
        }
    }
}

/// Local mode in a folder of its own; everything in it ends with it.
pub struct Local {
    root: PathBuf,
}

impl Local {
    /// Manifests and data: 24 samples, 10 steps of 4, a checkpoint every other step, a narrow head.
    pub fn new(name: &str) -> Self {
        let root = std::env::temp_dir().join(format!("carryon-{name}-{}", std::process::id()));
        let local = Self { root };
        fs::create_dir_all(local.manifests()).unwrap();
        fs::create_dir_all(local.data()).unwrap();
        for (file, lines) in [("train.jsonl", 24), ("eval.jsonl", 8)] {
            let text = fs::read_to_string(quickstart_data(file)).unwrap();
            let head: String = text.lines().take(lines).flat_map(|line| [line, "\n"]).collect();
            fs::write(local.data().join(file), head).unwrap();
        }
        for file in ["pool.yaml", "job.yaml", "deployment.yaml", "volumes.yaml"] {
            let mut text = fs::read_to_string(repository().join("examples/quickstart").join(file)).unwrap();
            if file == "job.yaml" {
                let steps = "maxSteps: 10\n    warmupSteps: 2";
                for (from, to) in [
                    ("width: 256", "width: 64"),
                    ("numTrainEpochs: 2", steps),
                    ("TrainBatchSize: 8", "TrainBatchSize: 4"),
                    ("  output:", "  checkpoint:\n    saveSteps: 2\n  output:"),
                ] {
                    assert!(text.contains(from), "job.yaml has no {from:?} any more");
                    text = text.replace(from, to);
                }
            }
            fs::write(local.manifests().join(file), text).unwrap();
        }
        local
    }

    pub fn manifests(&self) -> PathBuf {
        self.root.join("manifests")
    }

    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    pub fn state(&self) -> PathBuf {
        self.root.join("state")
    }

    /// Folder of the head that the job has written.
    pub fn head(&self) -> PathBuf {
        let artifact = &self.status("CarryOnJob")["artifact"];
        let (claim, path) = names::parse_claim_uri(artifact["uri"].as_str().unwrap()).unwrap();
        assert!(path.ends_with(&names::artifact_folder(artifact["digest"].as_str().unwrap())), "{artifact}");
        self.state().join("volumes").join(claim).join(path)
    }

    fn operator(&self, command: &str) -> Command {
        let mut operator = Command::new(binary("carryon-operator"));
        operator.args(["local", command, "--state-dir"]).arg(self.state());
        operator
    }

    /// `local up --detach`, whatever comes of it.
    pub fn try_up(&self, arguments: &[&str]) -> Output {
        let volume = |claim: &str, folder: &Path| format!("{claim}={}", folder.display());
        let mut command = self.operator("up");
        command.arg("-f").arg(self.manifests()).args(["--detach", "--worker"]).arg(binary("carryon-worker"));
        command.args(["--volume", &volume("models", model().parent().unwrap()), "--volume", &volume("quickstart-data", &self.data())]);
        command.args(arguments).output().unwrap()
    }

    /// `local up --detach`, which must succeed.
    pub fn up(&self, arguments: &[&str]) {
        let output = self.try_up(arguments);
        assert!(
            output.status.success(),
            "{}{}\n{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr),
            self.logs()
        );
    }

    pub fn down(&self) {
        assert!(self.operator("down").output().unwrap().status.success());
    }

    /// Status of the first object of a kind; null when there is none.
    pub fn status(&self, kind: &str) -> Value {
        let name = if kind == "BaseModelPool" { "smollm2" } else { "quickstart" };
        let text = fs::read(self.state().join(format!("objects/{kind}.default.{name}.json"))).unwrap_or_default();
        serde_json::from_slice::<Value>(&text).map_or(Value::Null, |object| object["status"].clone())
    }

    pub fn condition(&self, kind: &str, type_: &str) -> bool {
        let status = self.status(kind);
        let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
        conditions.iter().any(|condition| condition["type"] == type_ && condition["status"] == "True")
    }

    pub fn step(&self) -> u64 {
        self.status("CarryOnJob")["progress"]["step"].as_u64().unwrap_or(0)
    }

    /// `http://ADDRESS/v1`.
    pub fn url(&self) -> String {
        self.status("CarryOnDeployment")["url"].as_str().unwrap().to_owned()
    }

    pub fn head_manifest(&self) -> Value {
        serde_json::from_slice(&fs::read(self.head().join("head.json")).unwrap()).unwrap()
    }

    /// Whether the gateway completes a prompt.
    pub fn answers(&self) -> bool {
        self.answers_to("none")
    }

    /// Whether it does for a client with this API key.
    pub fn answers_to(&self, key: &str) -> bool {
        self.ask(key).is_ok_and(|answer| answer.starts_with("HTTP/1.1 200"))
    }

    /// Whether it refuses one with this API key.
    pub fn refuses(&self, key: &str) -> bool {
        self.ask(key).is_ok_and(|answer| answer.starts_with("HTTP/1.1 401"))
    }

    fn ask(&self, key: &str) -> std::io::Result<String> {
        let url = self.url();
        let address = url.trim_start_matches("http://").trim_end_matches("/v1");
        let body = r#"{"model": "quickstart", "prompt": "One and one", "max_tokens": 2}"#;
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        write!(
            stream,
            "POST /v1/completions HTTP/1.1\r\nhost: {address}\r\nauthorization: Bearer {key}\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map(|_| answer)
    }

    /// Waits until `reached`, and names what did not come.
    pub fn wait(&self, what: &str, reached: impl Fn() -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !reached() {
            assert!(Instant::now() < deadline, "{what} did not come\n{}", self.logs());
            std::thread::park_timeout(Duration::from_millis(50));
        }
    }

    /// SIGKILL to the process of a role.
    pub fn kill(&self, role: Role) {
        assert!(Command::new("kill").args(["-9", &self.pid(role).to_string()]).status().unwrap().success());
    }

    /// Number of the process of a role.
    pub fn pid(&self, role: Role) -> i64 {
        let records: Vec<Value> = serde_json::from_slice(&fs::read(self.state().join("processes.json")).unwrap()).unwrap();
        let is_role = |pid: &i64| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.split(|byte| *byte == 0).nth(1) == Some(role.command().as_bytes())
        };
        let pid = records.iter().filter_map(|record| record["pid"].as_i64()).find(is_role);
        pid.unwrap_or_else(|| panic!("no process of {role:?} runs\n{}", self.logs()))
    }

    /// The ends of all logs.
    pub fn logs(&self) -> String {
        let mut text = String::new();
        for entry in fs::read_dir(self.state().join("logs")).into_iter().flatten().flatten() {
            let log = String::from_utf8_lossy(&fs::read(entry.path()).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = log.lines().collect();
            text += &format!("==> {} <==\n{}\n", entry.path().display(), lines[lines.len().saturating_sub(12)..].join("\n"));
        }
        text
    }
}

impl Drop for Local {
    fn drop(&mut self) {
        let _ = self.operator("down").output();
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.root);
        }
    }
}
