//! Real nodes, the chart, and the quick start with few steps.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use carryon_crds::condition::is_true;
use carryon_crds::{CarryOnDeployment, CarryOnJob, names};
use carryon_tests::cluster::{Object, TestCluster};
use carryon_tests::{example, model, quickstart_data, repository};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::Value;
use tempfile::TempDir;

use super::load::ask;

pub const HOME: &str = "carry-on-system";
/// Longest wait: machines differ fivefold in how long training takes.
const PATIENCE: Duration = Duration::from_secs(480);
/// Samples a head is evaluated on: half the time of a short run would go into all fifty.
const EVALUATED: usize = 10;

pub struct World {
    pub cluster: TestCluster,
    data: TempDir,
}

impl World {
    /// Nodes of our own; none, after a word about it, when this machine cannot have them.
    pub fn start(nodes: usize) -> Option<Self> {
        Self::of(TestCluster::start(nodes).and_then(TestCluster::ours_only)?)
    }

    /// A node of our own, or the cluster that the caller of the test has named.
    pub fn anywhere() -> Option<Self> {
        Self::of(TestCluster::start(1)?)
    }

    fn of(cluster: TestCluster) -> Option<Self> {
        cluster.load_images();
        let data = TempDir::new().unwrap();
        std::fs::copy(quickstart_data("train.jsonl"), data.path().join("train.jsonl")).unwrap();
        let samples = std::fs::read_to_string(quickstart_data("eval.jsonl")).unwrap();
        std::fs::write(data.path().join("eval.jsonl"), samples.split_inclusive('\n').take(EVALUATED).collect::<String>()).unwrap();
        Some(Self { cluster, data })
    }

    /// Folder of the quick start's data, with fewer samples to evaluate on.
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    pub fn helm(&self, arguments: &[&str]) -> Output {
        self.cluster.command("helm").args(arguments).args(["--namespace", HOME]).current_dir(repository()).output().unwrap()
    }

    /// `helm COMMAND RELEASE charts/carry-on` with the images of the test, and waits for the operator.
    pub fn install(&self, command: &str, release: &str, arguments: &[&str]) {
        let images = "image.repository=localhost/carry-on/operator,workerImage.repository=localhost/carry-on/worker,image.tag=test,workerImage.tag=test";
        let all =
            [&[command, release, "charts/carry-on", "--create-namespace", "--wait", "--timeout=120s", "--set", images], arguments].concat();
        let output = self.helm(&all);
        assert!(output.status.success(), "helm {all:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// The quick start's claims, filled, in a namespace that holds its pods to the restricted standard.
    pub fn volumes(&self, namespace: &str) {
        self.cluster.kubectl(&["create", "namespace", namespace]);
        self.cluster.kubectl(&["label", "namespace", namespace, "pod-security.kubernetes.io/enforce=restricted"]);
        self.cluster.claim(namespace, "models", &[("SmolLM2-135M-Instruct.Q4_1.gguf", &model())]);
        let [train, eval] = ["train.jsonl", "eval.jsonl"].map(|file| self.data().join(file));
        self.cluster.claim(namespace, "quickstart-data", &[("train.jsonl", &train), ("eval.jsonl", &eval)]);
        self.cluster.apply(namespace, &example("quickstart/volumes.yaml"));
    }

    pub fn job(&self, namespace: &str) -> CarryOnJob {
        self.get(namespace, "quickstart")
    }

    pub fn get<K: Object>(&self, namespace: &str, name: &str) -> K {
        self.cluster.block_on(Api::<K>::namespaced(self.cluster.client(), namespace).get(name)).unwrap()
    }

    /// Changes an object as `kubectl patch --type merge` does.
    pub fn patch<K: Object>(&self, namespace: &str, name: &str, patch: Value) {
        let api = Api::<K>::namespaced(self.cluster.client(), namespace);
        self.cluster.block_on(api.patch(name, &PatchParams::default(), &Patch::Merge(patch))).unwrap();
    }

    /// Pods of a component, by name.
    pub fn pods(&self, namespace: &str, component: &str) -> Vec<Pod> {
        let selector = ListParams::default().labels(&format!("app.kubernetes.io/component={component}"));
        let pods: Api<Pod> = Api::namespaced(self.cluster.client(), namespace);
        self.cluster.block_on(pods.list(&selector)).unwrap().items
    }

    /// The one pod of a component.
    pub fn pod(&self, namespace: &str, component: &str) -> Pod {
        let mut pods = self.pods(namespace, component);
        assert_eq!(pods.len(), 1, "{pods:?}");
        pods.remove(0)
    }

    /// What the operator has made, as `kubectl` names it.
    pub fn children(&self, namespace: &str) -> BTreeSet<String> {
        let kinds = "statefulsets,deployments,jobs,services,configmaps,poddisruptionbudgets";
        let ours = format!("--selector=app.kubernetes.io/managed-by={}", names::MANAGER);
        let found = self.cluster.kubectl(&["--namespace", namespace, "get", kinds, &ours, "--output=name"]);
        found.lines().map(str::to_owned).collect()
    }

    pub fn delete_pod(&self, namespace: &str, component: &str) {
        for pod in self.pods(namespace, component) {
            self.cluster.kubectl(&["--namespace", namespace, "delete", "pod", &pod.name_any(), "--wait=false"]);
        }
    }

    /// Waits until another gateway than the one of this name is the only one.
    pub fn until_replaced(&self, namespace: &str, gateway: &str) {
        self.wait(&format!("{namespace}: a gateway in place of {gateway}"), || {
            let pods = self.pods(namespace, "gateway");
            pods.len() == 1 && pods[0].name_any() != gateway
        });
    }

    /// What the running trainer itself says of its step; 0 while there is none.
    pub fn step(&self, namespace: &str) -> u64 {
        let running = |pod: &Pod| {
            pod.metadata.deletion_timestamp.is_none()
                && pod.status.as_ref().is_some_and(|status| status.phase.as_deref() == Some("Running"))
        };
        let Some(pod) = self.pods(namespace, "trainer").into_iter().find(running) else { return 0 };
        let path = format!("/api/v1/namespaces/{namespace}/pods/{}:8081/proxy/progress", pod.name_any());
        let output = self.cluster.command("kubectl").args(["get", "--raw", &path]).output().unwrap();
        serde_json::from_slice::<Value>(&output.stdout).ok().and_then(|progress| progress["step"].as_u64()).unwrap_or(0)
    }

    pub fn until_step(&self, namespace: &str, step: u64) {
        let complete = || is_true(&self.job(namespace).status.unwrap_or_default().conditions, "Complete");
        self.wait(&format!("{namespace}: step {step}"), || {
            assert!(!complete(), "{namespace}: complete before step {step} was seen");
            self.step(namespace) >= step
        });
    }

    pub fn wait(&self, what: &str, reached: impl Fn() -> bool) {
        self.until(what, || reached().then_some(()).ok_or(""));
    }

    /// What `attempt` gives when it succeeds; its last error is told when it never does.
    pub fn until<T, E: Display>(&self, what: &str, attempt: impl Fn() -> Result<T, E>) -> T {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match attempt() {
                Ok(value) => return value,
                Err(error) => assert!(Instant::now() < deadline, "{what}: not after {PATIENCE:?}. {error}"),
            }
            std::thread::park_timeout(Duration::from_millis(200));
        }
    }

    /// The first answer from `url`. The nodes' proxies learn of a gateway's address a moment after its readiness is known.
    pub fn until_answered(&self, url: &str) -> String {
        self.until(&format!("an answer from {url}"), || self.cluster.block_on(ask(url, 8)))
    }

    /// Waits until the deployment serves, and gives the URL by which the first node reaches it.
    pub fn until_served(&self, namespace: &str) -> String {
        self.wait(&format!("{namespace} serves"), || {
            let deployment: CarryOnDeployment = self.get(namespace, "quickstart");
            is_true(&deployment.status.unwrap_or_default().conditions, "Ready")
        });
        let address = self.cluster.kubectl(&[
            "--namespace",
            namespace,
            "get",
            "service",
            "quickstart-gateway",
            "--output",
            "jsonpath={.spec.clusterIP}",
        ]);
        format!("http://{address}:8000/v1")
    }

    /// Condition of an object: its reason and message.
    pub fn condition(&self, namespace: &str, object: &str, type_: &str) -> (String, String) {
        let path = format!(
            "jsonpath={{.status.conditions[?(@.type==\"{type_}\")].reason}}|{{.status.conditions[?(@.type==\"{type_}\")].message}}"
        );
        let text = self.cluster.kubectl(&["--namespace", namespace, "get", object, "--output", &path]);
        let (reason, message) = text.split_once('|').unwrap_or_default();
        (reason.to_owned(), message.to_owned())
    }

    /// The bytes of the head that a job has written.
    pub fn head(&self, namespace: &str) -> Vec<u8> {
        std::fs::read(self.cluster.volume(namespace, "quickstart-output").join("quickstart/head/head.safetensors")).unwrap()
    }
}

/// The text with `to` in place of `from`, which it must have.
pub fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "there is no {from:?} any more in\n{text}");
    text.replace(from, to)
}

/// A job like the quick start's, soon done.
pub fn short_job(name: &str, steps: u32) -> String {
    let text = replaced(&job(steps), "perDeviceTrainBatchSize: 8", "perDeviceTrainBatchSize: 2");
    replaced(&text, "name: quickstart\n", &format!("name: {name}\n"))
}

/// The quick start's job with so many steps, checkpointed every fourth.
pub fn job(steps: u32) -> String {
    let text = replaced(&example("quickstart/job.yaml"), "numTrainEpochs: 2", &format!("maxSteps: {steps}\n    warmupSteps: 2"));
    replaced(&text, "  output:", "  checkpoint:\n    saveSteps: 4\n  output:")
}
