//! Local mode's own parts: what is refused before anything starts, and the kubelet on real processes.
#![allow(clippy::unwrap_used)]

mod common;

use std::net::TcpListener;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use carryon_crds::{BaseModelPool, names};
use carryon_operator::local::args::{DownArgs, StateArgs};
use carryon_operator::local::store::{Key, Store};
use carryon_operator::local::supervisor::Supervisor;
use carryon_operator::local::until::{self, Verdict};
use carryon_operator::local::{down, folders::Folders, kubelet::Kubelet, polls::Polls, process::Record, table, workloads};
use common::{example, repository};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Secret, Service};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use serde_json::{Value, json};

/// A state directory with the controllers and the kubelet on it, without the three kinds.
struct Machine {
    state: tempfile::TempDir,
    store: Store,
    kubelet: Kubelet,
    polls: Polls,
}

impl Machine {
    fn new() -> Self {
        Self::on(tempfile::tempdir().unwrap())
    }

    fn on(state: tempfile::TempDir) -> Self {
        let folders = Folders::create(state.path()).unwrap();
        let mut store = Store::open(&folders.root).unwrap();
        let kubelet = Kubelet::new(folders, "/bin/false".into(), &mut store).unwrap();
        Self { state, store, kubelet, polls: Polls::new().unwrap() }
    }

    fn apply(&mut self, value: Value) {
        self.store.apply_value(value, &now()).unwrap();
    }

    async fn until(&mut self, what: &str, mut holds: impl FnMut(&Self) -> bool) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            self.polls.receive();
            workloads::tick(&mut self.store, &now()).unwrap();
            self.kubelet.tick(&mut self.store, &mut self.polls, &now()).unwrap();
            if holds(self) {
                return;
            }
            assert!(Instant::now() < deadline, "never: {what}; pods: {:#?}", self.store.list::<Pod>());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn log(&self, pod: &str) -> String {
        std::fs::read_to_string(self.state.path().join(format!("logs/{pod}.log"))).unwrap_or_default()
    }

    fn restarts(&self, pod: &str) -> i32 {
        let pod: Option<Pod> = self.store.get("default", pod);
        pod.and_then(|pod| pod.status?.container_statuses?.first().map(|status| status.restart_count)).unwrap_or(0)
    }
}

fn now() -> Time {
    Time(Timestamp::now())
}

fn container(script: &str, port: i32) -> Value {
    json!({"name": "main", "command": ["/bin/sh", "-c", script, "0.0.0.0:8080"], "args": [format!("0.0.0.0:{port}"), "http://web.default.svc:8080", "/data/file"],
        "ports": [{"name": "http", "containerPort": port}], "volumeMounts": [{"name": "data", "mountPath": "/data"}]})
}

fn set(name: &str, replicas: i32, container: Value) -> Value {
    let spec = json!({"containers": [container], "restartPolicy": "Always", "terminationGracePeriodSeconds": 1,
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]});
    json!({"apiVersion": "apps/v1", "kind": "StatefulSet", "metadata": {"name": name},
        "spec": {"serviceName": name, "replicas": replicas, "selector": {"matchLabels": {"app": name}}, "template": {"metadata": {"labels": {"app": name, "app.kubernetes.io/component": "main"}}, "spec": spec}}})
}

fn service(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": {"selector": {"app": name}, "ports": [{"port": 8080}]}})
}

#[tokio::test]
async fn addresses_and_paths_of_a_pod_become_those_of_this_machine() {
    let mut machine = Machine::new();
    machine.apply(service("web"));
    machine.apply(set("web", 2, container("echo $@; exec sleep 60", 8080)));
    machine.until("both have written", |machine| ["web-0", "web-1"].iter().all(|pod| machine.log(pod).ends_with("/file\n"))).await;
    let logs = [machine.log("web-0"), machine.log("web-1")];
    let ports: Vec<&str> = logs.iter().map(|log| log.split_whitespace().next().unwrap().strip_prefix("127.0.0.1:").unwrap()).collect();
    assert_ne!(ports[0], ports[1]);
    let urls = format!("http://127.0.0.1:{},http://127.0.0.1:{}", ports[0], ports[1]);
    let file = machine.state.path().canonicalize().unwrap().join("volumes/data/file");
    assert_eq!(logs[0], format!("127.0.0.1:{} {urls} {}\n", ports[0], file.display()));
    machine.kubelet.kill_all();
}

#[tokio::test]
async fn a_process_is_told_the_limit_of_memory_that_its_container_has() {
    let mut machine = Machine::new();
    machine.apply(service("web"));
    for (name, resources) in [("web", json!({"limits": {"memory": "1.5Gi"}})), ("free", json!({"requests": {"memory": "1Gi"}}))] {
        let mut container = container("echo limit ${LIMIT-none}; exec sleep 60", 8080);
        container["env"] = json!([{"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory"}}}]);
        container["resources"] = resources;
        machine.apply(set(name, 1, container));
    }
    machine.until("both have written", |machine| ["web-0", "free-0"].iter().all(|pod| machine.log(pod).ends_with('\n'))).await;
    assert_eq!((machine.log("web-0").as_str(), machine.log("free-0").as_str()), ("limit 1610612736\n", "limit none\n"));
    machine.kubelet.kill_all();
}

#[tokio::test]
async fn a_crashing_container_restarts_in_place_with_its_last_words_in_the_status() {
    let mut machine = Machine::new();
    machine.apply(service("web"));
    machine.apply(set("web", 1, container("echo out of luck; exit 3", 8080)));
    let begin = Instant::now();
    machine.until("three restarts", |machine| machine.restarts("web-0") >= 3).await;
    assert!(begin.elapsed() >= Duration::from_secs(1), "the second restart waits a second");
    let pod: Pod = machine.store.get("default", "web-0").unwrap();
    let trouble = carryon_operator::shared::trouble::find(&[pod]).unwrap();
    assert_eq!(trouble.message, "pod web-0 ended with exit code 3 and was restarted 3 times; it said: out of luck");
}

#[tokio::test]
async fn a_deleted_pod_gets_its_grace_period_and_no_more() {
    let mut machine = Machine::new();
    machine.apply(service("web"));
    machine.apply(set("web", 1, container("trap 'echo asked' TERM; echo up; while :; do sleep 0.05; done", 8080)));
    machine.until("it is up", |machine| machine.log("web-0").starts_with("up")).await;
    let mut gone = serde_json::to_value(machine.store.get::<StatefulSet>("default", "web").unwrap()).unwrap();
    gone["spec"]["replicas"] = json!(0);
    machine.apply(gone);
    let begin = Instant::now();
    machine.until("the pod is gone", |machine| machine.store.list::<Pod>().is_empty()).await;
    assert!(begin.elapsed() >= Duration::from_millis(900));
    assert_eq!(machine.log("web-0"), "up\nasked\n");
}

#[tokio::test]
async fn a_job_ends_with_its_pod_and_keeps_its_exit_code() {
    for (code, type_) in [(0, "Complete"), (75, "Failed")] {
        let mut machine = Machine::new();
        let container =
            json!({"name": "main", "command": ["/bin/sh", "-c", format!("echo bye > $0; exit {code}"), "/dev/termination-log"]});
        machine.apply(json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "once"},
            "spec": {"template": {"metadata": {"labels": {"app.kubernetes.io/component": "main"}}, "spec": {"restartPolicy": "Never", "containers": [container]}}}}));
        let conditions =
            |machine: &Machine| machine.store.get::<Job>("default", "once").and_then(|job| job.status?.conditions).unwrap_or_default();
        machine.until("the job has ended", |machine| !conditions(machine).is_empty()).await;
        assert_eq!(conditions(&machine)[0].type_, type_);
        let pod: Pod = machine.store.get("default", "once-0").unwrap();
        let end = carryon_operator::shared::trouble::last_end(&pod).unwrap();
        assert_eq!((end.exit_code, end.message.as_deref()), (code, Some("bye\n")));
    }
}

#[tokio::test]
async fn a_pod_that_was_told_to_stop_is_followed_by_another_of_the_same_job_once_its_end_is_read() {
    let mut machine = Machine::new();
    std::fs::create_dir_all(machine.state.path().join("volumes/data")).unwrap();
    machine.apply(service("web"));
    let rule = |action: &str, operator: &str, code: i32| json!({"action": action, "onExitCodes": {"operator": operator, "values": [code]}});
    let metadata = json!({"labels": {"app": "web", "app.kubernetes.io/component": "main"}, "finalizers": [names::LAST_WORDS_FINALIZER]});
    let spec = json!({"restartPolicy": "Never", "containers": [container("echo begun; test -e $3 && exit 0; touch $3; exit 75", 8080)],
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}]});
    machine.apply(json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "told"},
        "spec": {"podFailurePolicy": {"rules": [rule("Ignore", "In", 75), rule("FailJob", "NotIn", 0)]}, "template": {"metadata": metadata, "spec": spec}}}));
    let pod = |machine: &Machine| machine.store.get::<Pod>("default", "told-0");
    let end = |machine: &Machine| Some(carryon_operator::shared::trouble::last_end(&pod(machine)?)?.exit_code);
    machine.until("the first has ended", |machine| end(machine) == Some(75)).await;
    workloads::tick(&mut machine.store, &now()).unwrap();
    let mut held = pod(&machine).unwrap();
    assert_eq!(held.metadata.deletion_timestamp, None);
    held.metadata.finalizers = None;
    machine.store.put(&held).unwrap();
    let conditions =
        |machine: &Machine| machine.store.get::<Job>("default", "told").and_then(|job| job.status?.conditions).unwrap_or_default();
    machine.until("the job has ended", |machine| !conditions(machine).is_empty()).await;
    assert_eq!((conditions(&machine)[0].type_.as_str(), machine.log("told-0").as_str()), ("Complete", "begun\nbegun\n"));
}

#[tokio::test]
async fn processes_of_a_dead_operator_are_ended_and_their_job_gets_another_pod() {
    let mut machine = Machine::new();
    let container = json!({"name": "main", "command": ["/bin/sh", "-c", "echo $$; exec sleep 60"]});
    machine.apply(json!({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "long"},
        "spec": {"template": {"metadata": {"labels": {"app.kubernetes.io/component": "main"}}, "spec": {"restartPolicy": "Never", "containers": [container]}}}}));
    machine.until("it runs", |machine| machine.log("long-0").ends_with('\n')).await;
    let first = Record::of(machine.log("long-0").trim().parse().unwrap()).unwrap();
    let Machine { state, .. } = machine;
    let mut next = Machine::on(state);
    next.until("a second process runs", |machine| machine.log("long-0").lines().count() == 2).await;
    assert!(!first.is_alive());
    assert_eq!(next.store.get::<Job>("default", "long").unwrap().status.unwrap().conditions, None);
    next.kubelet.kill_all();
}

#[tokio::test]
async fn a_port_that_somebody_has_taken_meanwhile_is_given_up() {
    let mut machine = Machine::new();
    machine.apply(service("web"));
    machine.apply(set("web", 1, container("echo $1; exec sleep 60", 8080)));
    machine.until("it runs", |machine| machine.log("web-0").ends_with('\n')).await;
    let ports = |machine: &Machine| {
        let log = machine.log("web-0");
        log.lines().map(|address| address.strip_prefix("127.0.0.1:").unwrap().parse().unwrap()).collect::<Vec<u16>>()
    };
    let taken = TcpListener::bind(("127.0.0.1", ports(&machine)[0])).unwrap();
    let Machine { state, .. } = machine;
    let mut next = Machine::on(state);
    next.until("it runs again", |machine| ports(machine).len() == 2).await;
    assert_ne!(ports(&next)[1], taken.local_addr().unwrap().port());
    next.kubelet.kill_all();
    // A free one is kept.
    let Machine { state, .. } = next;
    let mut again = Machine::on(state);
    again.until("it runs once more", |machine| ports(machine).len() == 3).await;
    assert_eq!(ports(&again)[2], ports(&again)[1]);
    again.kubelet.kill_all();
}

#[test]
fn a_damaged_object_is_named_with_its_file_and_hides_no_other() {
    let machine = Machine::new();
    let state = machine.state.path();
    let mut store = Store::open(state).unwrap();
    let pool = serde_json::to_value(example::<BaseModelPool>("quickstart/pool.yaml")).unwrap();
    store.apply_value(pool.clone(), &now()).unwrap();
    store.apply_value(service("web"), &now()).unwrap();
    let mut other = pool.clone();
    other["metadata"]["name"] = json!("other");
    store.apply_value(other, &now()).unwrap();
    let file = state.join("objects/BaseModelPool.default.smollm2.json");
    let whole = std::fs::read_to_string(&file).unwrap();
    for (damage, says) in [
        (whole[..whole.len() / 2].to_owned(), "EOF while parsing"),
        (String::new(), "EOF while parsing"),
        ("[]".to_owned(), "it holds /"),
        (whole.replace("\"replicas\": 1", "\"replicas\": \"one\""), "expected"),
    ] {
        std::fs::write(&file, damage).unwrap();
        let mut store = Store::open(state).unwrap();
        let rows = table::rows(&store);
        assert_eq!(
            rows.iter().map(|row| (row.key.name.as_str(), row.state.as_str())).collect::<Vec<_>>(),
            [("other", "Not ready"), ("smollm2", "Damaged")]
        );
        let message = &rows[1].message;
        assert!(message.starts_with(&format!("{} is damaged: ", file.display())) && message.contains(says), "{message}");
        assert_eq!(store.list::<Service>().len(), 1);
        let key = Key::of_value(&pool);
        assert_eq!(until::complete(&store, &[key]), Verdict::Failed(message.clone()));
        store.apply_value(pool.clone(), &now()).unwrap();
        assert!(Store::open(state).unwrap().damaged().is_empty(), "it was applied again");
    }
}

#[test]
fn a_config_map_that_cannot_be_written_hides_no_other() {
    let state = tempfile::tempdir().unwrap();
    let folders = Folders::create(state.path()).unwrap();
    let map = |name: &str, key: &str| json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {key: "a"}});
    let mut store = Store::open(&folders.root).unwrap();
    for map in [map("a", "sub/t.jsonl"), map("b", "t.jsonl")] {
        store.apply_value(map, &now()).unwrap();
    }
    // Nor does one that no file can have the name of.
    let incoming = folders.root.join("incoming");
    std::fs::write(incoming.join("0000-ConfigMap.json"), map(&"c".repeat(253), "t.jsonl").to_string()).unwrap();
    std::fs::write(incoming.join("0001-ConfigMap.json"), map("d", "t.jsonl").to_string()).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let mut supervisor = Supervisor::open(&folders, "/bin/false".into()).unwrap();
    supervisor.tick().unwrap();
    supervisor.tick().unwrap();
    for name in ["b", "d"] {
        assert_eq!(std::fs::read_to_string(folders.config_map("default", name).join("t.jsonl")).unwrap(), "a");
    }
}

#[test]
fn services_are_kept_apart_by_namespace() {
    let mut machine = Machine::new();
    let mut other = service("web");
    other["metadata"]["namespace"] = json!("team");
    machine.apply(service("web"));
    machine.apply(other);
    assert_eq!(
        machine.store.list::<Service>().iter().map(|service| service.metadata.namespace.clone()).collect::<Vec<_>>(),
        [Some("default".into()), Some("team".into())]
    );
}

/// `local up` on manifests, which must refuse; what it says on stderr.
fn refused(manifests: &str) -> String {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("bad.yaml"), manifests).unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_carryon-operator"));
    command.args(["local", "up", "--worker", "/bin/false", "-f", "bad.yaml"]).current_dir(folder.path());
    let output = command.output().unwrap();
    assert!(!output.status.success());
    assert!(std::fs::read_dir(folder.path().join(".carryon/incoming")).unwrap().next().is_none(), "something was handed over");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn errors_name_file_document_line_and_field() {
    let pool = std::fs::read_to_string(repository().join("examples/quickstart/pool.yaml")).unwrap();
    let claim = "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata:\n  name: models\n---\n";
    let cases = [
        (
            format!("{claim}{}", pool.replace("replicas: 1", "replicas: -1")),
            "bad.yaml, document 2 (BaseModelPool/smollm2), line 18: spec.replicas: -1 is less than the minimum of 0.0",
        ),
        (
            pool.clone(),
            "bad.yaml, document 1 (BaseModelPool/smollm2), line 10: spec.model.source.persistentVolumeClaim.claimName: no folder for claim \"models\"",
        ),
        (format!("{claim}a: b: c\n"), "bad.yaml, document 2, line 6: "),
        (
            format!("{claim}{claim}").replace("name: models\n---\na", "name: models\nspec: {}\n---\na"),
            "bad.yaml, document 2 (PersistentVolumeClaim/models), line 10: metadata.name: is defined twice, and differently",
        ),
        (
            "apiVersion: apps/v1\nkind: Deployment\nmetadata:\n  name: x\n".to_owned(),
            "bad.yaml, document 1 (Deployment/x), line 2: kind: local mode has no kind \"Deployment\" of apps/v1",
        ),
        (pool.replace("v1alpha1", "v1"), "apiVersion: \"carryon.dev/v1\" is not served for kind BaseModelPool: use carryon.dev/v1alpha1"),
        (pool.replace("  replicas: 1\n", "  replicas: 1\n  replicas: 2\n"), "duplicate entry with key \"replicas\""),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: x\ndate: {}\ndata: {a: b}\nbinary: 1\n".to_owned(),
            "line 7: binary: unknown field",
        ),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: x\ndata:\n  ok: a\n  sub/t.jsonl: b\n".to_owned(),
            "line 7: data[sub/t.jsonl]: \"sub/t.jsonl\" is no valid key",
        ),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: x\ndata: {a: b}\nbinaryData: {a: Yg==}\n".to_owned(),
            "line 6: binaryData[a]: is a key of data too",
        ),
        (
            "apiVersion: v1\nkind: ConfigMap\nmetadata:\n  name: x\n  namespace: ../y\n".to_owned(),
            "line 5: metadata.namespace: \"../y\" is no DNS label",
        ),
        (pool.replace("replicas: 1", "replicas: .nan"), "bad.yaml, document 1, line 13: .nan is no number that JSON has"),
        (String::new(), "no manifest found"),
    ];
    for (manifests, expected) in cases {
        let said = refused(&manifests);
        assert!(said.contains(expected), "expected {expected}\ngot {said}");
    }
}

#[test]
fn what_one_machine_cannot_do_is_refused_by_name() {
    let pool = std::fs::read_to_string(repository().join("examples/quickstart/pool.yaml")).unwrap();
    let said = refused(&format!("{pool}  server:\n    image: example.org/x\n    resources:\n      limits:\n        nvidia.com/gpu: 1\n"));
    assert!(said.contains("spec.server.image: local mode runs the worker binary of this machine and no image: leave it out"), "{said}");
    assert!(said.contains("spec.server.resources.limits[nvidia.com/gpu]: local mode has no nvidia.com/gpu"), "{said}");
}

#[test]
fn every_example_is_admitted() {
    for example in std::fs::read_dir(repository().join("examples")).unwrap() {
        let folder = example.unwrap().path();
        // Those of models want GPUs, and one of those of sources an image.
        if folder.is_dir() && !["models", "sources"].iter().any(|name| folder.ends_with(name)) {
            assert_admitted(&folder);
        }
    }
}

fn assert_admitted(folder: &Path) {
    let documents = carryon_operator::local::manifest::read(&[folder.to_owned()]).unwrap();
    let state = tempfile::tempdir().unwrap();
    let store = Store::open(state.path()).unwrap();
    let admission = carryon_operator::admission::Admission::new().unwrap();
    let admitted = carryon_operator::local::manifest::admit(&documents, &admission, &store, &|_, _| false).unwrap();
    assert!(admitted.len() >= 3, "{}", folder.display());
}

#[test]
fn what_a_secret_no_longer_holds_is_not_kept_on_disk() {
    let state = tempfile::tempdir().unwrap();
    let folders = Folders::create(state.path()).unwrap();
    let write =
        |data: Value| folders.write_secret(&serde_json::from_value::<Secret>(json!({"metadata": {"name": "key"}, "data": data})).unwrap());
    write(json!({"old": "b2xk", "kept": "b2xk"})).unwrap();
    write(json!({"kept": "bmV3"})).unwrap();
    let folder = folders.secret("default", "key");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), 1);
    assert_eq!(std::fs::read(folder.join("kept")).unwrap(), b"new");
    down::down(&DownArgs { state: StateArgs { state_dir: state.path().to_owned() }, delete: true }).unwrap();
    assert!(!folder.exists(), "objects forgotten, a Secret's content kept");
}
