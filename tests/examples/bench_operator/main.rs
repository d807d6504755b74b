//! `bench_operator all FILE`: the operator with 1,000 objects of the three kinds, on a real API server; what Kubernetes' controllers and kubelets
//! do is played. They are created at 30 a second in three waves, each when what the next refers to is there: pools, jobs, deployments. Then
//! nothing happens for a minute.
//!
//! `bench_operator running FILE`: 1,000 jobs whose trainers run on for ten minutes, each a step further every second.
//!
//! `bench_operator foreign FILE`: a few jobs beside 20,000 Secrets and ConfigMaps of 50 KB that were there before.
#![allow(clippy::unwrap_used)]

mod all;
mod foreign;
mod running;

use std::collections::HashMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use carryon_crds::condition::is_true;
use carryon_crds::{BaseModelPool, CarryOnJob, names};
use carryon_tests::cluster::{Object, TestCluster, played};
use carryon_tests::operator::{ACCOUNT, Operator, PEERS};
use carryon_tests::{binary, example};
use futures::StreamExt as _;
use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::api::{ListParams, PostParams};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, watcher};
use kube::{Api, ResourceExt as _};
use serde::Deserialize as _;
use serde_json::{Value, json};

const NAMESPACES: usize = 10;
/// Pools of each namespace; ten times as many of all.
const POOLS: usize = 10;
/// From one creation to the next: 30 a second.
const PERIOD: Duration = Duration::from_nanos(1_000_000_000 / 30);
const PATIENCE: Duration = Duration::from_secs(900);
/// Where the operator answers; the usual port is a played pod's.
const LISTEN: &str = "127.0.0.1:18080";

/// Killed when dropped.
struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Bench {
    operator: Process,
    cluster: TestCluster,
    /// Uid and kind of each object, and when it was sent.
    sent: Vec<(String, String, Instant)>,
    created_per_s: f64,
    /// When its first child was seen, by the owner's uid.
    seen: Arc<Mutex<HashMap<String, Instant>>>,
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [what, output] = arguments.as_slice() else { panic!("bench_operator all|foreign|running FILE") };
    let text = match what.as_str() {
        "all" => serde_json::to_string_pretty(&all::run()),
        "foreign" => serde_json::to_string_pretty(&foreign::run()),
        "running" => serde_json::to_string_pretty(&running::run()),
        _ => panic!("bench_operator all|foreign|running FILE, not {what}"),
    };
    let text = text.unwrap();
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
        .args(["run", "--without-lease", "--listen", LISTEN, "--network-policies", PEERS])
        .env("KUBECONFIG", &file)
        // As in the chart.
        .env("MALLOC_ARENA_MAX", "1")
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
    /// An API server with the operator, the quick start's claims in each namespace, and played trainers that run so long.
    fn start(training: Duration) -> Self {
        Self::start_beside(training, |_| ())
    }

    /// As [`Bench::start`], beside what `fill` has put there before the operator.
    fn start_beside(training: Duration, fill: impl FnOnce(&TestCluster)) -> Self {
        let cluster = TestCluster::api_server().expect("this machine can have a cluster");
        fill(&cluster);
        Operator::install(&cluster);
        played::play(&cluster, training);
        let operator = start_operator(&cluster);
        let seen = Arc::<Mutex<HashMap<String, Instant>>>::default();
        watch(&cluster, &seen);
        for space in spaces() {
            cluster.kubectl(&["create", "namespace", &space]);
            cluster.apply(&space, &example("quickstart/volumes.yaml"));
        }
        Self { operator, cluster, sent: Vec::new(), created_per_s: f64::INFINITY, seen }
    }

    fn pools(&mut self) {
        self.wave::<BaseModelPool>("quickstart/pool.yaml", POOLS, |number| json!({ "metadata": { "name": format!("pool-{number}") } }));
        self.until::<BaseModelPool>("Ready", |pool| pool.status.as_ref().map(|status| status.conditions.as_slice()));
    }

    fn jobs(&mut self, count: usize) {
        let job = |number: usize| json!({ "metadata": { "name": format!("job-{number}") }, "spec": { "pools": of_pool(number) } });
        self.wave::<CarryOnJob>("quickstart/job.yaml", count, job);
    }

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
}

/// The reference to one of the pools.
fn of_pool(number: usize) -> Value {
    json!([{ "name": format!("pool-{}", number % POOLS) }])
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
