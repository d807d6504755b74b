//! Real nodes, the chart, and the quick start with few steps.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use carryon_crds::condition::is_true;
use carryon_crds::job::ArtifactStatus;
use carryon_crds::{CarryOnDeployment, CarryOnJob, names};
use carryon_tests::cluster::{Object, TestCluster};
use carryon_tests::{example, model, quickstart_data, repository};
use http::Request;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use kube::{Api, ResourceExt as _};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::load::ask;
use super::proxy::Proxy;

pub const HOME: &str = "carry-on-system";
/// Longest wait: machines differ fivefold in how long training takes.
const PATIENCE: Duration = Duration::from_secs(480);
/// A claim that any cluster can bind, whatever its volumes are.
const OUTPUT: &str = "
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: quickstart-output}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
";
/// Samples a head is evaluated on: half the time of a short run would go into all fifty.
const EVALUATED: usize = 6;

pub struct World {
    pub cluster: TestCluster,
    data: TempDir,
    /// The way to Services where we are not in the nodes' network and cannot fill claims.
    proxy: Option<Proxy>,
}

impl World {
    /// So many nodes of our own, or the cluster that the caller of the test has named. None, after a word about it, when this machine
    /// cannot have them.
    pub fn start(nodes: usize) -> Option<Self> {
        let cluster = TestCluster::start(nodes)?;
        let proxy = (!cluster.is_ours()).then(|| Proxy::start(&cluster));
        Some(Self::of(cluster, proxy))
    }

    /// A node of our own as if it were not, or the cluster that the caller of the test has named.
    pub fn anywhere() -> Option<Self> {
        let cluster = TestCluster::start(1)?;
        let proxy = Proxy::start(&cluster);
        Some(Self::of(cluster, Some(proxy)))
    }

    fn of(cluster: TestCluster, proxy: Option<Proxy>) -> Self {
        let installed = cluster.kubectl(&["get", "deployments", "--all-namespaces", "--selector=app.kubernetes.io/name=carry-on"]);
        assert!(installed.is_empty(), "this cluster has Carry-On already, and the tests would take it over:\n{installed}");
        cluster.load_images();
        let data = TempDir::new().unwrap();
        std::fs::copy(quickstart_data("train.jsonl"), data.path().join("train.jsonl")).unwrap();
        let samples = std::fs::read_to_string(quickstart_data("eval.jsonl")).unwrap();
        std::fs::write(data.path().join("eval.jsonl"), samples.split_inclusive('\n').take(EVALUATED).collect::<String>()).unwrap();
        Self { cluster, data, proxy }
    }

    /// Folder of the quick start's data, with fewer samples to evaluate on.
    pub fn data(&self) -> &Path {
        self.data.path()
    }

    pub fn helm(&self, arguments: &[&str]) -> Output {
        self.cluster.command("helm").args(arguments).args(["--namespace", HOME]).current_dir(repository()).output().unwrap()
    }

    /// `helm COMMAND RELEASE charts/carry-on` with the images of the test, and waits for the operator. What we ask of pods comes from nodes, as
    /// the API server's proxy does, and is let through like questions for metrics.
    pub fn install(&self, command: &str, release: &str, arguments: &[&str]) {
        let addresses = "jsonpath={.items[*].status.addresses[?(@.type=='InternalIP')].address}";
        let nodes = self.cluster.kubectl(&["get", "nodes", "--output", addresses]);
        let block = |address: &str| json!({ "ipBlock": { "cidr": format!("{address}/{}", if address.contains(':') { 128 } else { 32 }) } });
        let scrapers = format!("networkPolicies.scrapers={}", json!(nodes.split_whitespace().map(block).collect::<Vec<_>>()));
        // Its nodes' GPUs are none: the one image has to do for both.
        let cuda = "workerImage.cuda.repository=localhost/carry-on/worker,workerImage.cuda.tag=test";
        let arguments = [&["--set-json", &scrapers, "--set", cuda][..], arguments].concat();
        self.install_chart(&repository().join("charts/carry-on"), command, release, &arguments);
    }

    /// The same with another chart than today's.
    pub fn install_chart(&self, chart: &Path, command: &str, release: &str, arguments: &[&str]) {
        let images = "image.repository=localhost/carry-on/operator,workerImage.repository=localhost/carry-on/worker,image.tag=test,workerImage.tag=test";
        // Definitions that are there already, of whoever's making, become the chart's.
        let adopt = if self.proxy.is_none() { &[][..] } else { &["--take-ownership", "--force-conflicts"] };
        let chart = chart.to_string_lossy();
        let all =
            [&[command, release, &chart, "--create-namespace", "--wait", "--timeout=120s", "--set", images], arguments, adopt].concat();
        let output = self.helm(&all);
        assert!(output.status.success(), "helm {all:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// `helm test RELEASE`: its pod asks the operator whether it is ready.
    pub fn test(&self, release: &str) {
        let output = self.helm(&["test", release, "--timeout=120s"]);
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.contains("Succeeded"), "helm test {release}: {said}");
    }

    /// A namespace that holds its pods to the restricted standard, with what the quick start's manifests name: claims, filled; where nobody
    /// can fill them, data in a ConfigMap and a claim for the output.
    pub fn volumes(&self, name: &str) -> String {
        let namespace = format!("carry-on-test-{}-{name}", std::process::id());
        self.cluster.kubectl(&["create", "namespace", &namespace]);
        self.cluster.kubectl(&["label", "namespace", &namespace, "pod-security.kubernetes.io/enforce=restricted", &mark()]);
        let [train, eval] = ["train.jsonl", "eval.jsonl"].map(|file| self.data().join(file));
        if self.proxy.is_none() {
            self.cluster.claim(&namespace, "models", &[("SmolLM2-135M-Instruct.Q4_1.gguf", &model())]);
            self.cluster.claim(&namespace, "quickstart-data", &[("train.jsonl", &train), ("eval.jsonl", &eval)]);
            self.cluster.apply(&namespace, &example("quickstart/volumes.yaml"));
        } else {
            let [train, eval] = [train, eval].map(|file| format!("--from-file={}", file.display()));
            self.cluster.kubectl(&["--namespace", &namespace, "create", "configmap", "quickstart-data", &train, &eval]);
            self.cluster.apply(&namespace, OUTPUT);
        }
        namespace
    }

    /// Applies manifests like the quick start's; where nobody can fill claims, with the model from an image and the data from a ConfigMap.
    pub fn apply(&self, namespace: &str, manifests: &str) {
        let manifests = if self.proxy.is_none() { manifests.to_owned() } else { without_claims(manifests) };
        self.cluster.apply(namespace, &manifests);
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

    pub fn delete<K: Object>(&self, namespace: &str, name: &str) {
        let api = Api::<K>::namespaced(self.cluster.client(), namespace);
        self.cluster.block_on(api.delete(name, &DeleteParams::default())).unwrap();
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

    /// What the operator has made, as `kubectl` names it; configurations without the digest of what they say, which names the namespace.
    pub fn children(&self, namespace: &str) -> BTreeSet<String> {
        let kinds = "statefulsets,deployments,jobs,services,configmaps,poddisruptionbudgets,networkpolicies";
        let ours = format!("--selector=app.kubernetes.io/managed-by={}", names::MANAGER);
        let found = self.cluster.kubectl(&["--namespace", namespace, "get", kinds, &ours, "--output=name"]);
        let named = |line: &str| match line.rsplit_once('-') {
            Some((name, _digest)) if line.starts_with("configmap/") => name.to_owned(),
            _ => line.to_owned(),
        };
        found.lines().map(named).collect()
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
        let progress = self.raw(&format!("/api/v1/namespaces/{namespace}/pods/{}:8081/proxy/progress", pod.name_any()));
        progress.and_then(|progress| progress["step"].as_u64()).unwrap_or(0)
    }

    /// What the API server answers, as `kubectl get --raw` shows it. No kubectl is started where one would be five times a second.
    fn raw(&self, path: &str) -> Option<Value> {
        let request = Request::get(path).body(Vec::new()).unwrap();
        let client = self.cluster.client();
        // A pod of a node that has just died never answers.
        self.cluster.block_on(async { tokio::time::timeout(Duration::from_secs(5), client.request(request)).await }).ok()?.ok()
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
        self.until(&format!("an answer from {url}"), || self.cluster.block_on(ask(url, "quickstart", 8)))
    }

    /// Waits until the quick start's deployment serves, and gives its URL.
    pub fn until_served(&self, namespace: &str) -> String {
        self.until_serves(namespace, "quickstart")
    }

    /// Waits until a deployment serves, and gives its URL: where the network is ours, the Service's own.
    pub fn until_serves(&self, namespace: &str, name: &str) -> String {
        self.wait(&format!("{namespace}/{name} serves"), || {
            let deployment: CarryOnDeployment = self.get(namespace, name);
            is_true(&deployment.status.unwrap_or_default().conditions, "Ready")
        });
        let service = names::gateway(name);
        if let Some(proxy) = &self.proxy {
            return format!("{}/api/v1/namespaces/{namespace}/services/{service}:http/proxy/v1", proxy.url);
        }
        let address =
            self.cluster.kubectl(&["--namespace", namespace, "get", "service", &service, "--output", "jsonpath={.spec.clusterIP}"]);
        format!("http://{address}:8000/v1")
    }

    /// Condition of an object: its reason and message.
    pub fn condition(&self, namespace: &str, object: &str, type_: &str) -> (String, String) {
        let (kind, name) = object.split_once('/').unwrap();
        let plural = match kind {
            "bmp" => "basemodelpools",
            "coj" => "carryonjobs",
            "cod" => "carryondeployments",
            _ => panic!("no kind {kind}"),
        };
        let object = self.raw(&format!("/apis/carryon.dev/v1alpha1/namespaces/{namespace}/{plural}/{name}")).unwrap_or_default();
        let conditions = object["status"]["conditions"].as_array().into_iter().flatten();
        let condition = conditions.into_iter().find(|condition| condition["type"] == type_).cloned().unwrap_or_default();
        let text = |member: &str| condition[member].as_str().unwrap_or_default().to_owned();
        (text("reason"), text("message"))
    }

    /// Digest of the bytes of the head that the job has written.
    pub fn head(&self, namespace: &str) -> String {
        let ArtifactStatus { digest: told, uri, .. } = self.job(namespace).status.unwrap().artifact.unwrap();
        if self.proxy.is_none() {
            let (claim, folder) = names::parse_claim_uri(&uri).unwrap();
            let head = self.cluster.volume(namespace, claim).join(folder).join("head.safetensors");
            assert_eq!(carryon_crds::wire::digest(&std::fs::read(head).unwrap()), told);
        }
        told
    }
}

/// A cluster that is not ours is left as it was, but for the definitions.
impl Drop for World {
    fn drop(&mut self) {
        if self.cluster.is_ours() {
            return;
        }
        let kubectl = |arguments: &[&str]| self.cluster.command("kubectl").args(arguments).output();
        let _namespaces = kubectl(&["delete", "namespace", "--selector", &mark()]);
        for release in String::from_utf8_lossy(&self.helm(&["list", "--short"]).stdout).lines() {
            self.helm(&["uninstall", release, "--wait", "--timeout=120s"]);
        }
        let _home = kubectl(&["delete", "namespace", HOME]);
    }
}

/// Label of the namespaces that this test has made.
fn mark() -> String {
    format!("carry-on-test={}", std::process::id())
}

/// The manifests with the model from the test's image and the data from a ConfigMap.
pub fn without_claims(manifests: &str) -> String {
    let file = model().file_name().unwrap().to_string_lossy().into_owned();
    let claimed = format!("persistentVolumeClaim:\n        claimName: models\n        path: {file}");
    let image = format!("image:\n        reference: localhost/carry-on/model:test\n        path: models/{file}");
    let data = ["persistentVolumeClaim:\n        claimName: quickstart-data", "configMap:\n        name: quickstart-data"];
    manifests.replace(&claimed, &image).replace(data[0], data[1])
}

/// The text with `to` in place of `from`, which it must have.
pub fn replaced(text: &str, from: &str, to: &str) -> String {
    assert!(text.contains(from), "there is no {from:?} any more in\n{text}");
    text.replace(from, to)
}

/// A job like the quick start's, soon done.
pub fn short_job(name: &str, steps: u32) -> String {
    let text = replaced(&job(steps), "perDeviceTrainBatchSize: 4", "perDeviceTrainBatchSize: 2");
    replaced(&text, "name: quickstart\n", &format!("name: {name}\n"))
}

/// The quick start's job with so many steps of half as many samples, checkpointed every fourth.
pub fn job(steps: u32) -> String {
    let text = replaced(&example("quickstart/job.yaml"), "perDeviceTrainBatchSize: 8", "perDeviceTrainBatchSize: 4");
    let text = replaced(&text, "numTrainEpochs: 2", &format!("maxSteps: {steps}\n    warmupSteps: 2"));
    replaced(&text, "  output:", "  checkpoint:\n    saveSteps: 4\n  output:")
}
