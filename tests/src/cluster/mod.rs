//! A Kubernetes cluster for one test: real nodes, or an API server alone, from the scripts in `tests/cluster`; gone when it is dropped.
//! With `CARRYON_E2E=external` it is the cluster that `KUBECONFIG` names.

mod audit;
pub mod hollow;
mod network;
mod own;
pub mod played;

use std::fmt::Debug;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

pub use audit::AuditEntry;
use k8s_openapi::NamespaceResourceScope;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Patch, PatchParams};
use kube::{Api, Client, Resource};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use own::{Own, Turn};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::runtime::Runtime;
use tokio::task::JoinHandle;

/// Objects of a namespace, as the tests read and write them.
pub trait Object:
    Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static
{
}
impl<K: Resource<DynamicType = (), Scope = NamespaceResourceScope> + Clone + Debug + Serialize + DeserializeOwned + Send + Sync + 'static>
    Object for K
{
}

/// Longest wait of [`TestCluster::eventually`].
const PATIENCE: Duration = Duration::from_secs(120);

/// A cluster. The thread that starts it, and what that thread starts, live in the network of its first node until it is dropped:
/// pods, Services and the API server are reached by their addresses.
pub struct TestCluster {
    runtime: Runtime,
    client: Client,
    /// None when the cluster is not ours.
    own: Option<Own>,
}

impl TestCluster {
    /// A cluster of real nodes, `node1` to `nodeN`, with DNS and shared volumes. None, and a word about it, when this machine cannot have one.
    ///
    /// # Panics
    /// When it does not come up; in CI, or with `CARRYON_E2E=required`, when this machine cannot have one.
    pub fn start(nodes: usize) -> Option<Self> {
        Self::up(&["--nodes", &nodes.to_string()])
    }

    /// An API server alone, up in three seconds: nothing acts on what is written to it, and pods need no service account.
    ///
    /// # Panics
    /// As [`TestCluster::start`].
    pub fn api_server() -> Option<Self> {
        Self::up(&["--nodes", "0"])
    }

    /// An API server and these of Kubernetes' own controllers, such as `garbage-collector-controller`.
    ///
    /// # Panics
    /// As [`TestCluster::start`].
    pub fn api_server_with(controllers: &[&str]) -> Option<Self> {
        Self::up(&["--nodes", "0", "--controllers", &controllers.join(",")])
    }

    /// The same, shared by all tests that one runner starts, each in a namespace of its own: to start one takes longer than most tests do.
    /// The first `prepare`s it. What the audit log says begins with the caller.
    ///
    /// # Panics
    /// As [`TestCluster::start`].
    pub fn shared(controllers: &[&str], prepare: impl FnOnce(&Self)) -> Option<Self> {
        if !Self::is_wanted()? {
            return Some(Self::of(None));
        }
        let turn = Turn::take();
        let (own, new) = Own::share(&turn, &["--nodes", "0", "--controllers", &controllers.join(",")]);
        let cluster = Self::of(Some(own));
        if new {
            prepare(&cluster);
            turn.done();
        }
        Some(cluster)
    }

    fn up(arguments: &[&str]) -> Option<Self> {
        Self::is_wanted().map(|ours| Self::of(ours.then(|| Own::up(arguments))))
    }

    /// Whether the cluster is to be ours. None, and a word about it, when this machine cannot have one.
    fn is_wanted() -> Option<bool> {
        let wish = std::env::var("CARRYON_E2E").unwrap_or_default();
        if wish == "external" {
            return Some(false);
        }
        if let Err(missing) = own::possible() {
            assert!(wish != "required" && std::env::var_os("CI").is_none(), "no test cluster: {missing}");
            skipped(&format!("no test cluster here: {missing}"));
            return None;
        }
        Some(true)
    }

    fn of(own: Option<Own>) -> Self {
        // Its threads start where this one is: in the node's network.
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime starts");
        let client = runtime.block_on(async { Client::try_from(config(own.as_ref()).await).expect("the configuration makes a client") });
        Self { runtime, client, own }
    }

    /// A client with every right.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Runs a future to its end; what it spawns runs on until the cluster is dropped.
    pub fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }

    /// Runs a future beside the test, until its end or the cluster's.
    pub fn spawn<T: Send + 'static>(&self, future: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime.spawn(future)
    }

    /// Looks until there is something to see.
    ///
    /// # Panics
    /// When there is nothing after two minutes.
    pub fn eventually<T>(&self, what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
        self.block_on(async {
            let patience = tokio::time::timeout(PATIENCE, async {
                loop {
                    if let Some(seen) = look().await {
                        return seen;
                    }
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            });
            patience.await.unwrap_or_else(|_| panic!("{what}: not after {PATIENCE:?}"))
        })
    }

    /// A program, run on the first node with `KUBECONFIG` set and kubectl, helm and kstatus on `PATH`.
    pub fn command(&self, program: &str) -> Command {
        match &self.own {
            Some(own) => own.command(program),
            None => Command::new(program),
        }
    }

    /// Runs kubectl and gives its standard output.
    ///
    /// # Panics
    /// When it fails.
    pub fn kubectl(&self, arguments: &[&str]) -> String {
        let output = self.command("kubectl").args(arguments).output().expect("kubectl starts");
        assert!(output.status.success(), "kubectl {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Applies manifests that name no namespace to one, or those of objects outside of all.
    ///
    /// # Panics
    /// When one is refused.
    pub fn apply(&self, namespace: &str, manifests: &str) {
        let mut kubectl = self.command("kubectl");
        kubectl
            .args(["apply", "--server-side", "--namespace", namespace, "--filename", "-"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped());
        let mut child = kubectl.spawn().expect("kubectl starts");
        child.stdin.take().expect("it has an input").write_all(manifests.as_bytes()).expect("it reads");
        let output = child.wait_with_output().expect("kubectl ends");
        assert!(output.status.success(), "kubectl apply: {}", String::from_utf8_lossy(&output.stderr));
    }

    /// How to reach the API server in the name of `user`, with that user's rights.
    pub fn config_as(&self, user: &str) -> kube::Config {
        let mut config = self.block_on(config(self.own.as_ref()));
        config.auth_info.impersonate = Some(user.to_owned());
        config
    }

    /// Every request so far that wrote something, or tried.
    ///
    /// # Panics
    /// When the cluster is not ours.
    pub fn audit(&self) -> Vec<AuditEntry> {
        self.requests().into_iter().filter(AuditEntry::writes).collect()
    }

    /// The same, and what an operator read that came with a token of its own account.
    ///
    /// # Panics
    /// When the cluster is not ours.
    pub fn requests(&self) -> Vec<AuditEntry> {
        audit::read(&self.ours().folder().join("audit.log"), self.ours().heard)
    }

    /// Starts the real Kueue beside the API server, with all that its chart installs but its pod.
    ///
    /// # Panics
    /// When it is not made, or the cluster is not ours.
    pub fn start_kueue(&self) {
        self.ours().script("kueue/up.sh").run();
    }

    /// Imports `localhost/carry-on/worker:test`, `operator:test` and `model:test`, which holds the quick start's model in `/models`, into
    /// every node. A cluster that is not ours must have them.
    ///
    /// # Panics
    /// When the binaries are not built.
    pub fn load_images(&self) {
        if let Some(own) = &self.own {
            own.load_images(&["worker", "operator", "model"]);
        }
    }

    /// What a claim will hold: (file name, file to take) each. Call it before the claim is made.
    ///
    /// # Panics
    /// When the cluster is not ours.
    pub fn claim(&self, namespace: &str, name: &str, files: &[(&str, &Path)]) {
        let files = files.iter().map(|(file, path)| format!("{file}={}", path.display()));
        self.ours().script("claim.sh").args([namespace, name]).args(files).run();
    }

    /// Folder of the volume that a claim is bound to.
    ///
    /// # Panics
    /// When it is bound to none, or the cluster is not ours.
    pub fn volume(&self, namespace: &str, claim: &str) -> PathBuf {
        let volume = self.kubectl(&["--namespace", namespace, "get", "pvc", claim, "--output", "jsonpath={.spec.volumeName}"]);
        assert!(!volume.is_empty(), "PersistentVolumeClaim {namespace}/{claim} is bound to no volume");
        self.ours().folder().join("volumes").join(volume)
    }

    /// Imports `worker:previous` and `operator:previous`, those of the release before this one, into every node.
    ///
    /// # Panics
    /// When its binaries are not built, or the cluster is not ours.
    pub fn load_previous_images(&self) {
        self.ours().load_images(&["previous-worker", "previous-operator"]);
    }

    /// Kills the one container of a pod in its node, as the kernel does when memory runs out.
    ///
    /// # Panics
    /// When it does not run, or the cluster is not ours.
    pub fn kill_container(&self, pod: &Pod) {
        let status = pod.status.as_ref().and_then(|status| status.container_statuses.as_ref()).expect("the pod has a status");
        let id = status[0].container_id.as_ref().expect("its container runs").trim_start_matches("containerd://");
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_ref()).expect("it has a node");
        self.containerd(node, &["tasks", "kill", "--signal", "SIGKILL", id]);
    }

    /// Asks a node's containerd.
    fn containerd(&self, node: &str, arguments: &[&str]) {
        let socket = self.ours().folder().join(node).join("containerd.sock");
        let ctr = ["--node", node.trim_start_matches("node"), "ctr", "--address", &socket.to_string_lossy(), "--namespace", "k8s.io"]
            .map(str::to_owned);
        self.ours().script("exec.sh").args(ctr).args(arguments).run();
    }

    /// Gives a node so many of a resource that no device backs, such as `nvidia.com/gpu`.
    ///
    /// # Panics
    /// When there is no such node.
    pub fn add_extended_resource(&self, node: &str, resource: &str, count: u32) {
        let amount = serde_json::json!({ resource: count.to_string() });
        let status = Patch::Merge(serde_json::json!({ "status": { "capacity": amount, "allocatable": amount } }));
        let nodes: Api<Node> = Api::all(self.client());
        let patched = self.block_on(nodes.patch_status(node, &PatchParams::default(), &status));
        patched.map(drop).unwrap_or_else(|error| panic!("{node} gets no {resource}: {error}"));
    }

    /// Ends a node as a power cut does. It is `NotReady` some 20 s later.
    ///
    /// # Panics
    /// When it is the first, which holds the control plane, or the cluster is not ours.
    pub fn kill_node(&self, number: usize) {
        assert!(number > 1, "node1 holds the control plane");
        self.ours().script("down.sh").args(["--node", &number.to_string()]).run();
    }

    /// Stops the API server in its tracks, as a machine does that swaps, until the answer is dropped.
    ///
    /// # Panics
    /// When the cluster is not ours.
    pub fn freeze_api_server(&self) -> Frozen {
        let pid = std::fs::read_to_string(self.ours().folder().join("node1/kube-apiserver.pid")).expect("the API server has a number");
        let group = Pid::from_raw(pid.trim().parse().expect("it is a number"));
        killpg(group, Signal::SIGSTOP).expect("the API server runs");
        Frozen(group)
    }

    /// This cluster if the test made it; else none, and a word about it.
    pub fn ours_only(self) -> Option<Self> {
        self.may("this needs a cluster of its own").then_some(self)
    }

    /// Whether the test made this cluster and may do `what`; a word about it when not.
    pub fn may(&self, what: &str) -> bool {
        if !self.is_ours() {
            skipped(what);
        }
        self.is_ours()
    }

    /// Whether the test made this cluster, and may read its audit log, look into its volumes and kill its nodes.
    pub fn is_ours(&self) -> bool {
        self.own.is_some()
    }

    fn ours(&self) -> &Own {
        self.own.as_ref().expect("only a cluster of our own can do that: unset CARRYON_E2E")
    }
}

/// A program that was stopped, and goes on when this is dropped: a stopped one would outlive its node.
pub struct Frozen(Pid);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = killpg(self.0, Signal::SIGCONT);
    }
}

fn skipped(why: &str) {
    println!("SKIPPED, NOT TESTED: {why}");
    eprintln!("SKIPPED, NOT TESTED: {why}");
}

async fn config(own: Option<&Own>) -> kube::Config {
    let Some(own) = own else { return kube::Config::infer().await.expect("KUBECONFIG names a cluster") };
    let kubeconfig = kube::config::Kubeconfig::read_from(own.folder().join("kubeconfig")).expect("the cluster wrote its kubeconfig");
    let options = kube::config::KubeConfigOptions::default();
    kube::Config::from_custom_kubeconfig(kubeconfig, &options).await.expect("its kubeconfig is whole")
}
