//! Pods without nodes: they run, answer and end as a test tells them to, under Kubernetes' own controllers.

use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

use axum::routing::get;
use axum::{Json, Router};
use carryon_crds::wire::{Identity, Limits, ModelDescription, Numerics, Progress, TerminationMessage};
use carryon_crds::{names, pool::Dtype};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::TestCluster;

/// Those of Kubernetes' controllers that turn our children into pods, and remove what has no owner.
pub const CONTROLLERS: [&str; 7] = [
    "statefulset-controller",
    "deployment-controller",
    "replicaset-controller",
    "job-controller",
    "ttl-after-finished-controller",
    "disruption-controller",
    "garbage-collector-controller",
];
/// Address of every pod that this process plays, in the network of the first node: tests that share a cluster do not answer for each other.
static ADDRESS: LazyLock<String> = LazyLock::new(|| {
    let [_, high, middle, low] = std::process::id().to_be_bytes();
    format!("127.{}.{middle}.{low}", 128 | high)
});

/// What becomes of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It waits for a node, with these words of the scheduler.
    Waits(String),
    /// It crashes again and again, with this code and these last words.
    Crashes(i32, String),
    /// It runs, is ready, and stays.
    Runs,
    /// The same on a node: who deletes it waits until it has ended.
    Lingers,
    /// It runs, then ends with this code and these last words.
    Ends(i32, String),
    /// The worker ends so, and the container beside it never.
    Outlived(i32, String),
}

impl Fate {
    /// A trainer's good end: a head for the base with this identity.
    pub fn complete(base_model_digest: &str) -> Self {
        Self::wrote(&format!("sha256:{}", "4e".repeat(32)), base_model_digest)
    }

    /// A trainer's good end: the head with this digest.
    pub fn wrote(digest: &str, base_model_digest: &str) -> Self {
        let words = TerminationMessage {
            message: "the head is written".to_owned(),
            digest: Some(digest.to_owned()),
            base_model_digest: Some(base_model_digest.to_owned()),
            progress: Some(progress(20)),
            ..TerminationMessage::default()
        };
        Self::Ends(0, serde_json::to_string(&words).expect("last words are JSON"))
    }
}

type Fates = BTreeMap<(String, String), Fate>;

/// The kubelets of a cluster without nodes. Pools and gateways run, trainers end well, unless told otherwise.
#[derive(Clone)]
pub struct Hollow {
    client: Client,
    /// None: all.
    namespaces: Option<Vec<String>>,
    fates: Arc<watch::Sender<Fates>>,
}

impl Hollow {
    /// Plays in all namespaces, or in some, until the cluster is dropped.
    pub fn start(cluster: &TestCluster, namespaces: Option<&[&str]>) -> Self {
        let namespaces = namespaces.map(|some| some.iter().map(|&name| name.to_owned()).collect());
        let hollow = Self { client: cluster.client(), namespaces, fates: Arc::new(watch::Sender::default()) };
        let player = hollow.clone();
        cluster.block_on(async {
            answer(|| progress(7)).await;
            tokio::spawn(player.play());
        });
        hollow
    }

    /// From now on the pods of object `name` fare like this; those that have ended stay as they are.
    pub fn fate(&self, namespace: &str, name: &str, fate: Fate) {
        self.fates.send_modify(|fates| drop(fates.insert((namespace.to_owned(), name.to_owned()), fate)));
    }

    async fn play(self) {
        let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={}", names::MANAGER));
        let mut known = std::collections::BTreeSet::new();
        let pods = watcher(Api::<Pod>::all(self.client.clone()), ours).default_backoff().applied_objects();
        pods.for_each(|pod| {
            if let Ok(pod) = pod
                && self.namespaces.as_ref().is_none_or(|some| pod.namespace().is_some_and(|name| some.contains(&name)))
                && known.insert(pod.uid())
            {
                tokio::spawn(self.clone().follow(pod));
            }
            std::future::ready(())
        })
        .await;
    }

    /// From a pod's first moment to its end.
    async fn follow(self, pod: Pod) {
        let key = (pod.namespace().unwrap_or_default(), pod.labels()["app.kubernetes.io/instance"].clone());
        let trainer = pod.labels()["app.kubernetes.io/component"] == "trainer";
        let usual = if trainer { Fate::complete(&model().identity.digest()) } else { Fate::Runs };
        let of = |fates: &Fates| fates.get(&key).cloned().unwrap_or_else(|| usual.clone());
        let mut fates = self.fates.subscribe();
        let first = of(&fates.borrow_and_update());
        match &first {
            Fate::Waits(words) => drop(patch(&self.client, &pod, &waiting(words)).await),
            Fate::Crashes(code, words) => drop(patch(&self.client, &pod, &crashing(&pod, *code, words)).await),
            Fate::Runs | Fate::Lingers | Fate::Ends(..) | Fate::Outlived(..) => {}
        }
        if fates.wait_for(|fates| !matches!(of(fates), Fate::Waits(_) | Fate::Crashes(..))).await.is_err()
            || (first == Fate::Lingers && bind(&self.client, &pod).await.is_err())
            || patch(&self.client, &pod, &running(&pod)).await.is_err()
        {
            return;
        }
        let ends = |fates: &Fates| matches!(of(fates), Fate::Ends(..) | Fate::Outlived(..));
        let end = match fates.wait_for(ends).await.map(|fates| of(&fates)) {
            Ok(Fate::Ends(code, words)) => ended(&pod, code, &words),
            Ok(Fate::Outlived(code, words)) => outlived(&pod, code, &words),
            _ => return,
        };
        let ended = patch(&self.client, &pod, &end).await;
        if ended.is_ok_and(|pod| pod.metadata.deletion_timestamp.is_some()) {
            let pods: Api<Pod> = Api::namespaced(self.client, &pod.namespace().unwrap_or_default());
            let _gone = pods.delete(&pod.name_any(), &DeleteParams::default().grace_period(0)).await;
        }
    }
}

/// Gives a pod a node, which does not exist.
async fn bind(client: &Client, pod: &Pod) -> kube::Result<Value> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let binding = json!({ "apiVersion": "v1", "kind": "Binding", "metadata": { "name": pod.name_any() },
        "target": { "apiVersion": "v1", "kind": "Node", "name": "hollow" } });
    pods.create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding).await
}

/// Writes a pod's status; refused when the pod is not there any more.
pub(super) async fn patch(client: &Client, pod: &Pod, status: &Value) -> kube::Result<Pod> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
    let uid = json!({ "metadata": { "uid": pod.uid() }, "status": status });
    pods.patch_status(&pod.name_any(), &PatchParams::default(), &Patch::Merge(uid)).await
}

/// What every pool says of its model.
pub fn model() -> ModelDescription {
    let digest = |letter: &str| format!("sha256:{}", letter.repeat(64));
    ModelDescription {
        format_version: 1,
        name: "Hollow 135M".to_owned(),
        model_type: "llama".to_owned(),
        instance: "hollow".to_owned(),
        identity: Identity {
            weights: digest("a"),
            tokenizer: digest("b"),
            chat_template: String::new(),
            norm_point: "final_norm".to_owned(),
        },
        numerics: Numerics { dtype: Dtype::Bfloat16, device: "cpu".to_owned(), kernel: "none".to_owned() },
        hidden_size: 576,
        num_hidden_layers: 30,
        vocab_size: 49152,
        eos_token_ids: vec![2],
        bos_token: None,
        eos_token: None,
        chat_template: None,
        tool_use_template: None,
        limits: Limits {
            max_model_len: 2048,
            max_sequences: 16,
            max_request_tokens: 8192,
            max_body_bytes: 1 << 20,
            max_num_seqs: None,
            max_head_bytes: None,
        },
    }
}

pub(super) fn progress(step: u64) -> Progress {
    Progress { phase: "training".to_owned(), step, total_steps: 20, train_loss: Some(0.5), ..Progress::default() }
}

/// What all pools and trainers say.
pub(super) async fn answer(progress: impl Fn() -> Progress + Clone + Send + Sync + 'static) {
    serve(names::POOL_PORT, "/v1/model", model).await;
    serve(names::TRAINER_PORT, "/progress", progress).await;
}

async fn serve<T: serde::Serialize + Send + 'static>(port: i32, path: &str, answer: impl Fn() -> T + Clone + Send + Sync + 'static) {
    let listener = tokio::net::TcpListener::bind(format!("{}:{port}", *ADDRESS)).await.expect("the port is free");
    let router = Router::new().route(path, get(move || std::future::ready(Json(answer()))));
    tokio::spawn(async { axum::serve(listener, router).await });
}

fn condition(type_: &str, status: &str, reason: &str, message: &str) -> Value {
    json!({ "type": type_, "status": status, "reason": reason, "message": message, "lastTransitionTime": "2026-01-01T00:00:00Z" })
}

fn waiting(words: &str) -> Value {
    json!({ "phase": "Pending", "conditions": [condition("PodScheduled", "False", "Unschedulable", words)] })
}

pub(super) fn running(pod: &Pod) -> Value {
    let conditions = ["PodScheduled", "Initialized", "ContainersReady", "Ready"].map(|type_| condition(type_, "True", "", ""));
    let state = json!({ "running": { "startedAt": "2026-01-01T00:00:00Z" } });
    json!({ "phase": "Running", "podIP": *ADDRESS, "podIPs": [{ "ip": *ADDRESS }], "conditions": conditions,
        "containerStatuses": containers(pod, true, 0, &state) })
}

fn crashing(pod: &Pod, code: i32, words: &str) -> Value {
    let conditions = [("PodScheduled", "True"), ("Initialized", "True"), ("ContainersReady", "False"), ("Ready", "False")];
    let last = json!({ "terminated": { "exitCode": code, "message": words, "finishedAt": "2026-01-01T00:00:10Z" } });
    let mut containers = containers(pod, false, 5, &json!({ "waiting": { "reason": "CrashLoopBackOff", "message": "back-off 5m0s" } }));
    containers[1]["lastState"] = last;
    json!({ "phase": "Running", "podIP": *ADDRESS, "podIPs": [{ "ip": *ADDRESS }], "containerStatuses": containers,
        "conditions": conditions.map(|(type_, status)| condition(type_, status, "", "")) })
}

pub(super) fn ended(pod: &Pod, code: i32, words: &str) -> Value {
    let conditions = ["ContainersReady", "Ready"].map(|type_| condition(type_, "False", "PodCompleted", ""));
    let state = json!({ "terminated": { "exitCode": code, "message": words, "finishedAt": "2026-01-01T00:00:10Z" } });
    json!({ "phase": if code == 0 { "Succeeded" } else { "Failed" }, "conditions": conditions,
        "containerStatuses": containers(pod, false, 0, &state) })
}

fn outlived(pod: &Pod, code: i32, words: &str) -> Value {
    let mut status = ended(pod, code, words);
    let runs = json!({ "ready": true, "state": { "terminated": null, "running": { "startedAt": "2026-01-01T00:00:00Z" } } });
    json_patch::merge(&mut status["containerStatuses"][0], &runs);
    status["phase"] = json!("Running");
    status
}

/// The worker's container, after that of a mesh, which lives as long as the worker does.
fn containers(pod: &Pod, ready: bool, restarts: i32, state: &Value) -> [Value; 2] {
    let container = &pod.spec.as_ref().expect("a pod has a spec").containers[0];
    let status = |name: &str, ready: bool, restarts: i32, state: &Value| {
        json!({ "name": name, "image": container.image, "imageID": "", "containerID": format!("hollow://{name}-{}", pod.uid().unwrap_or_default()),
            "ready": ready, "started": true, "restartCount": restarts, "state": state })
    };
    let ended = json!({ "terminated": { "exitCode": 0, "finishedAt": "2026-01-01T00:00:10Z" } });
    let beside = if state.get("terminated").is_some() { ended } else { json!({ "running": { "startedAt": "2026-01-01T00:00:00Z" } }) };
    [status("istio-proxy", beside.get("running").is_some(), 0, &beside), status(&container.name, ready, restarts, state)]
}
