//! 1,000 objects of the three kinds, created and left alone.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use carryon_crds::{CarryOnDeployment, CarryOnJob};
use carryon_tests::operator::ACCOUNT;
use serde::Serialize;
use serde_json::json;

use super::{Bench, NAMESPACES, PATIENCE, POOLS, cpu_seconds, of_pool, peak_rss_mb};

/// Of each namespace.
const JOBS: usize = 45;
const DEPLOYMENTS: usize = 45;
const OBJECTS: usize = NAMESPACES * (POOLS + JOBS + DEPLOYMENTS);
const TRAINING: Duration = Duration::from_secs(1);
const STEADY: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize)]
pub struct Report {
    objects: usize,
    /// In the slowest wave, up to the last answer: an API server that cannot follow answers late.
    created_per_s: f64,
    /// The most the operator ever held.
    rss_mb: f64,
    /// From sending an object to the event of its first child, at the 50th and the 99th of 100.
    p50_apply_to_children_s: f64,
    p99_apply_to_children_s: f64,
    /// From the arrival of a request that writes, whoever's, to the API server's answer, at the 50th and the 99th of 100; the yardstick of the two above.
    p50_api_write_s: f64,
    p99_api_write_s: f64,
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

pub fn run() -> Report {
    let mut bench = Bench::start(TRAINING);
    bench.pools();
    bench.jobs(JOBS);
    bench.until::<CarryOnJob>("Complete", |job| job.status.as_ref().map(|status| status.conditions.as_slice()));
    bench.wave::<CarryOnDeployment>("quickstart/deployment.yaml", DEPLOYMENTS, |number| {
        let heads = json!([{ "name": "one", "source": { "jobRef": { "name": format!("job-{number}") } } }]);
        json!({ "metadata": { "name": format!("head-{number}") }, "spec": { "pools": of_pool(number), "heads": heads } })
    });
    bench.until::<CarryOnDeployment>("Ready", |deployment| deployment.status.as_ref().map(|status| status.conditions.as_slice()));

    let (calls, writes) = settled(&bench);
    let (p50_write, p99_write) = write_seconds(&bench);
    eprintln!("a minute of rest");
    std::thread::sleep(STEADY);
    let steady = requests(&bench).1 - writes;
    explain(&bench);
    let (p50, p99) = to_children(&bench, None);
    let per_object = |count: usize| count as f64 / OBJECTS as f64;
    Report {
        objects: OBJECTS,
        created_per_s: bench.created_per_s,
        rss_mb: peak_rss_mb(bench.operator.0.id()),
        p50_apply_to_children_s: p50,
        p99_apply_to_children_s: p99,
        p50_api_write_s: p50_write,
        p99_api_write_s: p99_write,
        api_calls_per_object: per_object(calls),
        writes_per_object: per_object(writes),
        steady_state_writes: steady,
        cpu_s: cpu_seconds(bench.operator.0.id()),
        cores: std::thread::available_parallelism().unwrap().get(),
    }
}

/// Requests of the operator so far, once it makes none for five seconds: all, and those that write.
fn settled(bench: &Bench) -> (usize, usize) {
    let started = Instant::now();
    let mut before = requests(bench);
    loop {
        std::thread::sleep(Duration::from_secs(5));
        let now = requests(bench);
        if now == before {
            return now;
        }
        assert!(started.elapsed() < PATIENCE, "the operator does not come to rest");
        before = now;
    }
}

fn requests(bench: &Bench) -> (usize, usize) {
    let all = bench.cluster.requests();
    let ours = all.iter().filter(|entry| entry.user == ACCOUNT);
    ours.fold((0, 0), |(calls, writes), entry| (calls + 1, writes + usize::from(entry.writes())))
}

/// What the operator's requests were, the most frequent first, and how long each kind waited.
fn explain(bench: &Bench) {
    let mut counts = BTreeMap::<String, usize>::new();
    for entry in bench.cluster.requests().iter().filter(|entry| entry.user == ACCOUNT) {
        let resource = [entry.resource.as_str(), &entry.subresource].join("/");
        *counts.entry(format!("{} {} {}", entry.verb, resource.trim_end_matches('/'), entry.code)).or_default() += 1;
    }
    let mut counts: Vec<_> = counts.into_iter().collect();
    counts.sort_by_key(|(_, count)| Reverse(*count));
    counts.iter().for_each(|(request, count)| eprintln!("{count:6} {request}"));
    for kind in ["BaseModelPool", "CarryOnJob", "CarryOnDeployment"] {
        let (p50, p99) = to_children(bench, Some(kind));
        eprintln!("{kind}: first child after {p50:.2} s (p50), {p99:.2} s (p99)");
    }
}

/// Seconds from sending an object to its first child, at the 50th and the 99th of 100.
fn to_children(bench: &Bench, kind: Option<&str>) -> (f64, f64) {
    let seen = bench.seen.lock().unwrap();
    let sent = bench.sent.iter().filter(|(_, of, _)| kind.is_none_or(|kind| of == kind));
    at_50_and_99(sent.map(|(uid, _, at)| seen[uid].duration_since(*at)).collect())
}

/// Seconds that the API server took to answer a request that writes.
fn write_seconds(bench: &Bench) -> (f64, f64) {
    at_50_and_99(bench.cluster.audit().iter().map(|entry| entry.took).collect())
}

/// In seconds.
fn at_50_and_99(mut waits: Vec<Duration>) -> (f64, f64) {
    waits.sort();
    let at = |percent: usize| waits[(waits.len() * percent).div_ceil(100) - 1].as_secs_f64();
    (at(50), at(99))
}
