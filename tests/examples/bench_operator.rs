//! `bench_operator FILE`: the operator with 1,000 objects of the three kinds, on a real API server; what Kubernetes' controllers and kubelets do is played.
//!
//! They are created at 30 a second in three waves, each when what the next refers to is there: pools, jobs, deployments. Then nothing happens for a minute.
#![allow(clippy::unwrap_used)]

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use carryon_crds::condition::is_true;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use carryon_tests::cluster::{Object, TestCluster, played};
use carryon_tests::operator::{ACCOUNT, Operator};
use carryon_tests::{binary, example};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{ListParams, PostParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, ResourceExt as _};
use serde::{Deserialize as _, Serialize};
use serde_json::{Value, json};

const NAMESPACES: usize = 10;
/// Of each namespace; ten times as many of all.
const POOLS: usize = 10;
const JOBS: usize = 45;
const DEPLOYMENTS: usize = 45;
const OBJECTS: usize = NAMESPACES * (POOLS + JOBS + DEPLOYMENTS);
/// From one creation to the next: 30 a second.
const PERIOD: Duration = Duration::from_nanos(1_000_000_000 / 30);
const STEADY: Duration = Duration::from_secs(60);
const PATIENCE: Duration = Duration::from_secs(900);
/// Where the operator answers; the usual port is a played pod's.
const LISTEN: &str = "127.0.0.1:18080";

#[derive(Debug, Serialize)]
struct Report {
    objects: usize,
    /// In the slowest wave, up to the last answer: an API server that cannot follow answers late.
    created_per_s: f64,
    /// The most the operator ever held.
    rss_mb: f64,
    /// From sending an object to the event of its first child, at the 50th and the 99th of 100.
    p50_apply_to_children_s: f64,
    p99_apply_to_children_s: f64,
    /// All requests of the operator, reads too, until all objects were in order.
    api_calls_per_object: f64,
    /// Those of them that wrote.
    writes_per_object: f64,
    /// Requests that write, in a minute in which nothing happens.
    steady_state_writes: usize,
    /// Of the operator's, while all that happened.
    cpu_s: f64,
    cores: usize,
}

/// Killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Bench {
    cluster: TestCluster,
    /// Uid and kind of each object, and when it was sent.
    sent: Vec<(String, String, Instant)>,
    created_per_s: f64,
    /// When its first child was seen, by the owner's uid.
    seen: Arc<Mutex<HashMap<String, Instant>>>,
}

fn main() {
    let output = std::env::args().nth(1).expect("bench_operator FILE");
    let cluster = TestCluster::api_server().expect("this machine can have a cluster");
    Operator::install(&cluster);
    played::play(&cluster);
    let operator = start_operator(&cluster);
    let seen = Arc::<Mutex<HashMap<String, Instant>>>::default();
    watch(&cluster, &seen);
    for space in spaces() {
        cluster.kubectl(&["create", "namespace", &space]);
        cluster.apply(&space, &example("quickstart/volumes.yaml"));
    }
    let mut bench = Bench { cluster, sent: Vec::new(), created_per_s: f64::INFINITY, seen };
    bench.wave::<BaseModelPool>("quickstart/pool.yaml", POOLS, |number| json!({ "metadata": { "name": format!("pool-{number}") } }));
    bench.until::<BaseModelPool>("Ready", |pool| pool.status.as_ref().map(|status| status.conditions.as_slice()));
    let pools = |number: usize| json!([{ "name": format!("pool-{}", number % POOLS) }]);
    bench.wave::<CarryOnJob>(
        "quickstart/job.yaml",
        JOBS,
        |number| json!({ "metadata": { "name": format!("job-{number}") }, "spec": { "pools": pools(number) } }),
    );
    bench.until::<CarryOnJob>("Complete", |job| job.status.as_ref().map(|status| status.conditions.as_slice()));
    bench.wave::<CarryOnDeployment>("quickstart/deployment.yaml", DEPLOYMENTS, |number| {
        let head = json!({ "jobRef": { "name": format!("job-{number}") } });
        json!({ "metadata": { "name": format!("head-{number}") }, "spec": { "pools": pools(number), "head": head, "servedModelName": null } })
    });
    bench.until::<CarryOnDeployment>("Ready", |deployment| deployment.status.as_ref().map(|status| status.conditions.as_slice()));

    let (calls, writes) = bench.settled();
    eprintln!("a minute of rest");
    std::thread::sleep(STEADY);
    let steady = bench.requests().1 - writes;
    bench.explain();
    let (p50, p99) = bench.to_children(None);
    let per_object = |count: usize| count as f64 / OBJECTS as f64;
    let report = Report {
        objects: OBJECTS,
        created_per_s: bench.created_per_s,
        rss_mb: peak_rss_mb(operator.0.id()),
        p50_apply_to_children_s: p50,
        p99_apply_to_children_s: p99,
        api_calls_per_object: per_object(calls),
        writes_per_object: per_object(writes),
        steady_state_writes: steady,
        cpu_s: cpu_seconds(operator.0.id()),
        cores: std::thread::available_parallelism().unwrap().get(),
    };
    drop(operator); // before its API server
    let text = serde_json::to_string_pretty(&report).unwrap();
    println!("{text}");
    std::fs::write(format!("{output}.partial"), text).unwrap();
    std::fs::rename(format!("{output}.partial"), Path::new(&output)).unwrap();
}

fn spaces() -> impl Iterator<Item = String> {
    (0..NAMESPACES).map(|number| format!("space-{number}"))
}

/// The operator's own binary, as its chart's account.
fn start_operator(cluster: &TestCluster) -> Process {
    let (namespace, account) = ACCOUNT.trim_start_matches("system:serviceaccount:").split_once(':').unwrap();
    let token = cluster.kubectl(&["create", "token", account, "--namespace", namespace, "--duration=2h"]);
    let admin = cluster.kubectl(&["config", "view", "--raw", "--flatten", "--output", "json"]);
    let mut config: Value = serde_json::from_str(&admin).unwrap();
    config["users"][0]["user"] = json!({ "token": token.trim() });
    let file = std::env::temp_dir().join(format!("carryon-bench-{}.json", std::process::id()));
    std::fs::write(&file, config.to_string()).unwrap();
    let operator = Command::new(binary("carryon-operator"))
        .args(["run", "--without-lease", "--listen", LISTEN])
        .env("KUBECONFIG", &file)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let operator = Process(operator);
    let url = format!("http://{LISTEN}/readyz");
    let answers = || cluster.command("curl").args(["--silent", "--fail", "--noproxy", "*", &url]).output().unwrap();
    cluster.eventually("the operator answers", async || answers().status.success().then_some(()));
    std::fs::remove_file(&file).unwrap();
    operator
}

/// Notes when the first child of each object is seen: its ConfigMap, for all three kinds.
fn watch(cluster: &TestCluster, seen: &Arc<Mutex<HashMap<String, Instant>>>) {
    let ours = watcher::Config::default().labels(&format!("app.kubernetes.io/managed-by={}", names::MANAGER));
    let (children, seen) = (Api::<ConfigMap>::all(cluster.client()), seen.clone());
    cluster.spawn(watcher(children, ours).default_backoff().applied_objects().for_each(move |child| {
        let now = Instant::now();
        for owner in child.iter().flat_map(|child| child.owner_references()) {
            seen.lock().unwrap().entry(owner.uid.clone()).or_insert(now);
        }
        std::future::ready(())
    }));
}

impl Bench {
    /// Creates so many objects of a kind in each namespace, 30 a second.
    fn wave<K: Object>(&mut self, manifest: &str, count: usize, differs: impl Fn(usize) -> Value) {
        let document = serde_yaml::Deserializer::from_str(&example(manifest)).next().map(Value::deserialize).unwrap().unwrap();
        eprintln!("{} of {}", count * NAMESPACES, K::plural(&()));
        let client = self.cluster.client();
        let started = Instant::now();
        let sent: Vec<_> = self.cluster.block_on(async {
            let mut ticks = tokio::time::interval(PERIOD);
            let mut sent = Vec::new();
            for (number, space) in (0..count).flat_map(|number| spaces().map(move |space| (number, space))) {
                let mut object = document.clone();
                json_patch::merge(&mut object, &differs(number));
                ticks.tick().await;
                let at = Instant::now();
                let api: Api<K> = Api::namespaced(client.clone(), &space);
                sent.push(tokio::spawn(async move {
                    let object: K = serde_json::from_value(object).unwrap();
                    let created = api.create(&PostParams::default(), &object).await.unwrap();
                    (created.uid().unwrap(), K::kind(&()).into_owned(), at)
                }));
            }
            futures::future::try_join_all(sent).await.unwrap()
        });
        let waits = sent.len() - 1; // the first goes at once
        self.created_per_s = self.created_per_s.min(waits as f64 / started.elapsed().as_secs_f64());
        self.sent.extend(sent);
    }

    /// Waits until a condition of all objects of a kind holds.
    fn until<K: Object>(&self, type_: &str, conditions: impl Fn(&K) -> Option<&[Condition]>) {
        let (started, api) = (Instant::now(), Api::<K>::all(self.cluster.client()));
        loop {
            let objects = self.cluster.block_on(api.list(&ListParams::default())).unwrap().items;
            let there = objects.iter().filter(|object| conditions(object).is_some_and(|conditions| is_true(conditions, type_))).count();
            let after = started.elapsed().as_secs();
            eprintln!("{there} of {} {} are {type_}, {after} s after the last was created", objects.len(), K::plural(&()));
            if there == objects.len() {
                return;
            }
            assert!(started.elapsed() < PATIENCE, "not all {} are {type_} after {PATIENCE:?}", K::plural(&()));
            std::thread::sleep(Duration::from_secs(3));
        }
    }

    /// Requests of the operator so far, once it makes none for five seconds: all, and those that write.
    fn settled(&self) -> (usize, usize) {
        let started = Instant::now();
        let mut before = self.requests();
        loop {
            std::thread::sleep(Duration::from_secs(5));
            let now = self.requests();
            if now == before {
                return now;
            }
            assert!(started.elapsed() < PATIENCE, "the operator does not come to rest");
            before = now;
        }
    }

    fn requests(&self) -> (usize, usize) {
        let all = self.cluster.requests();
        let ours = all.iter().filter(|entry| entry.user == ACCOUNT);
        ours.fold((0, 0), |(calls, writes), entry| (calls + 1, writes + usize::from(entry.writes())))
    }

    /// What the operator's requests were, the most frequent first, and how long each kind waited.
    fn explain(&self) {
        let mut counts = BTreeMap::<String, usize>::new();
        for entry in self.cluster.requests().iter().filter(|entry| entry.user == ACCOUNT) {
            let resource = [entry.resource.as_str(), &entry.subresource].join("/");
            *counts.entry(format!("{} {} {}", entry.verb, resource.trim_end_matches('/'), entry.code)).or_default() += 1;
        }
        let mut counts: Vec<_> = counts.into_iter().collect();
        counts.sort_by_key(|(_, count)| Reverse(*count));
        counts.iter().for_each(|(request, count)| eprintln!("{count:6} {request}"));
        for kind in ["BaseModelPool", "CarryOnJob", "CarryOnDeployment"] {
            let (p50, p99) = self.to_children(Some(kind));
            eprintln!("{kind}: first child after {p50:.2} s (p50), {p99:.2} s (p99)");
        }
    }

    /// Seconds from sending an object to its first child, at the 50th and the 99th of 100.
    fn to_children(&self, kind: Option<&str>) -> (f64, f64) {
        let seen = self.seen.lock().unwrap();
        let sent = self.sent.iter().filter(|(_, of, _)| kind.is_none_or(|kind| of == kind));
        let mut waits: Vec<f64> = sent.map(|(uid, _, at)| seen[uid].duration_since(*at).as_secs_f64()).collect();
        waits.sort_by(f64::total_cmp);
        let at = |percent: usize| waits[(waits.len() * percent).div_ceil(100) - 1];
        (at(50), at(99))
    }
}

fn peak_rss_mb(pid: u32) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<f64>().unwrap() * 1024.0 / 1e6
}

fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit_once(')').unwrap().1.split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}
