//! 1,000 jobs whose trainers run on.

use std::collections::BTreeMap;
use std::time::Duration;

use carryon_crds::CarryOnJob;
use carryon_tests::operator::ACCOUNT;
use serde::Serialize;

use super::{Bench, NAMESPACES, cpu_seconds, peak_rss_mb};

/// Of each namespace.
const JOBS: usize = 100;
const RUNNING: Duration = Duration::from_secs(600);

#[derive(Debug, Serialize)]
pub struct Report {
    running_jobs: usize,
    seconds: u64,
    /// The most the operator ever held.
    rss_mb: f64,
    /// All writes of the operator while the jobs run.
    writes_per_s: f64,
    /// Those of them that are of a status.
    status_writes_per_s: f64,
    /// In the second that had most.
    most_status_writes_in_a_second: usize,
    /// Of the operator's, while the jobs run.
    cpu_s: f64,
    cores: usize,
}

pub fn run() -> Report {
    let mut bench = Bench::start(Duration::MAX);
    bench.pools();
    bench.jobs(JOBS);
    bench.until::<CarryOnJob>("Ready", |job| job.status.as_ref().map(|status| status.conditions.as_slice()));
    let (written, cpu) = (bench.cluster.audit().len(), cpu_seconds(bench.operator.0.id()));
    eprintln!("ten minutes in which all trainers run");
    std::thread::sleep(RUNNING);
    let mut writes = bench.cluster.audit().split_off(written);
    writes.retain(|entry| entry.user == ACCOUNT);
    let mut of_status = BTreeMap::<i64, usize>::new();
    for entry in writes.iter().filter(|entry| entry.subresource == "status") {
        *of_status.entry(entry.at.as_second()).or_default() += 1;
    }
    let per_s = |count: usize| count as f64 / RUNNING.as_secs_f64();
    Report {
        running_jobs: NAMESPACES * JOBS,
        seconds: RUNNING.as_secs(),
        rss_mb: peak_rss_mb(bench.operator.0.id()),
        writes_per_s: per_s(writes.len()),
        status_writes_per_s: per_s(of_status.values().sum()),
        most_status_writes_in_a_second: of_status.values().max().copied().unwrap_or(0),
        cpu_s: cpu_seconds(bench.operator.0.id()) - cpu,
        cores: std::thread::available_parallelism().unwrap().get(),
    }
}
