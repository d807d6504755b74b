//! A pool whose model comes from a hub: refused without its token, fetched with it, and afterwards without the hub.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use carryon_tests::{binary, repository};
use serde_json::Value;

const PATIENCE: Duration = Duration::from_secs(120);
const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub and a state directory; both end with it.
struct World {
    root: PathBuf,
    hub: Child,
    url: String,
}

impl World {
    fn new() -> Self {
        let root = std::env::temp_dir().join(format!("carryon-fetched-{}", std::process::id()));
        let (hub, manifests) = (root.join("hub"), root.join("manifests"));
        fs::create_dir_all(&hub).unwrap();
        fs::create_dir_all(&manifests).unwrap();
        for file in ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"] {
            fs::copy(repository().join("tests/oracles/fixtures/tiny_llama").join(file), hub.join(file)).unwrap();
        }
        fs::write(hub.join("COMMIT"), COMMIT).unwrap();
        let mut python = Command::new("python3");
        python.arg(repository().join("tests/hub.py")).arg(&hub).args(["o/tiny", "--token", "hf_right", "--rate", "100000"]);
        let mut hub = python.stdout(Stdio::piped()).spawn().unwrap();
        let mut url = String::new();
        BufReader::new(hub.stdout.take().unwrap()).read_line(&mut url).unwrap();
        Self { root, hub, url: url.trim().to_owned() }
    }

    fn write_pool(&self, name: &str, replicas: u32) {
        let source = format!("{{repository: o/tiny, endpoint: {:?}, tokenSecretRef: {{name: hf, key: token}}}}", self.url);
        let spec = format!(
            "{{replicas: {replicas}, model: {{source: {{huggingFace: {source}}}}}, server: {{resources: {{limits: {{memory: 1Gi}}}}}}}}"
        );
        let pool = format!("apiVersion: carryon.dev/v1alpha1\nkind: BaseModelPool\nmetadata: {{name: {name}}}\nspec: {spec}\n");
        fs::write(self.root.join("manifests").join(format!("{name}.yaml")), pool).unwrap();
    }

    fn write_token(&self, token: &str) {
        let secret = format!("apiVersion: v1\nkind: Secret\nmetadata: {{name: hf}}\nstringData: {{token: {token}}}\n");
        fs::write(self.root.join("manifests/secret.yaml"), secret).unwrap();
    }

    fn operator(&self, command: &str) -> Command {
        let mut operator = Command::new(binary("carryon-operator"));
        operator.args(["local", command, "--state-dir"]).arg(self.root.join("state")).env_remove("HF_TOKEN");
        operator
    }

    fn up(&self) {
        let mut command = self.operator("up");
        command.arg("-f").arg(self.root.join("manifests")).args(["--detach", "--worker"]).arg(binary("carryon-worker"));
        let output = command.output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    fn down(&self) {
        assert!(self.operator("down").output().unwrap().status.success());
    }

    fn status(&self, pool: &str) -> Value {
        let text = fs::read(self.root.join(format!("state/objects/BaseModelPool.default.{pool}.json"))).unwrap_or_default();
        serde_json::from_slice::<Value>(&text).map_or(Value::Null, |object| object["status"].clone())
    }

    /// Waits until the pool's Ready condition has this reason; its message.
    fn wait(&self, pool: &str, reason: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let status = self.status(pool);
            let ready = status["conditions"].as_array().into_iter().flatten().find(|condition| condition["type"] == "Ready").cloned();
            let ready = ready.unwrap_or_default();
            if ready["reason"] == reason {
                return ready["message"].as_str().unwrap().to_owned();
            }
            assert!(Instant::now() < deadline, "{reason} did not come: {status:#}");
            std::thread::park_timeout(Duration::from_millis(20));
        }
    }

    /// Folders of the cache.
    fn folders(&self) -> usize {
        fs::read_dir(self.root.join("state/models")).map_or(0, Iterator::count)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.operator("down").output();
        let _ = self.hub.kill();
        let _ = self.hub.wait();
        if !std::thread::panicking() {
            let _ = fs::remove_dir_all(&self.root);
        }
    }
}

#[test]
fn a_model_is_fetched_once_with_the_right_token_and_kept_when_its_branch_moves_on() {
    let mut world = World::new();
    world.write_pool("tiny", 2);
    world.up();
    let message = world.wait("tiny", "SecretKeyNotFound");
    assert!(message.contains("Secret default/hf (spec.model.source.huggingFace.tokenSecretRef)"), "{message}");
    world.write_token("hf_wrong");
    world.up();
    let message = world.wait("tiny", "ModelAccessDenied");
    assert!(message.contains("401") && message.contains("GatedRepo") && !message.contains("hf_wrong"), "{message}");
    world.write_token("hf_right");
    world.up();
    world.wait("tiny", "ModelFetching");
    world.wait("tiny", "PodsReady");
    let status = world.status("tiny");
    assert_eq!(status["download"]["revision"], COMMIT);
    assert_eq!(status["model"]["revision"], COMMIT);
    assert_eq!(status["download"]["bytes"], status["download"]["totalBytes"]);
    assert_eq!((status["readyReplicas"].as_u64(), world.folders()), (Some(2), 1));
    // The branch moves on: a new pool has the new commit, this one what it began with, though the hub is gone.
    fs::write(world.root.join("hub/COMMIT"), "f".repeat(40)).unwrap();
    world.write_pool("later", 1);
    world.up();
    world.wait("later", "PodsReady");
    assert_eq!((&world.status("later")["download"]["revision"], world.folders()), (&Value::from("f".repeat(40)), 2));
    world.down();
    world.hub.kill().unwrap();
    world.up();
    world.wait("tiny", "PodsStarting");
    world.wait("tiny", "PodsReady");
    assert_eq!(world.status("tiny")["download"]["revision"], COMMIT);
}
