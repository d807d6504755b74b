//! What Prometheus is told: counters, and gauges that are read from the stores for each scrape.

use std::time::Duration;

use carryon_crds::condition::{ObservedStatus, is_true};
use kube::core::object::HasStatus;
use kube::{Resource, ResourceExt as _};
use prometheus::{Encoder as _, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use super::key::Kind;
use super::queue::Queue;
use super::store::{Cache, Guarded, Stores};

/// What only grows.
pub struct Counters {
    registry: Registry,
    reconciles: IntCounterVec,
    seconds: HistogramVec,
    errors: IntCounterVec,
}

impl Counters {
    /// All at zero.
    pub fn new() -> prometheus::Result<Self> {
        let registry = Registry::new();
        let reconciles = IntCounterVec::new(Opts::new("carryon_reconciles_total", "Reconciled objects."), &["kind", "outcome"])?;
        let seconds = HistogramVec::new(HistogramOpts::new("carryon_reconcile_seconds", "Seconds a reconcile took."), &["kind"])?;
        let help = "Failed reconciles, by the step that failed.";
        let errors = IntCounterVec::new(Opts::new("carryon_reconcile_errors_total", help), &["kind", "step"])?;
        registry.register(Box::new(reconciles.clone()))?;
        registry.register(Box::new(seconds.clone()))?;
        registry.register(Box::new(errors.clone()))?;
        Ok(Self { registry, reconciles, seconds, errors })
    }

    /// An object was reconciled.
    pub fn done(&self, kind: Kind, took: Duration) {
        self.reconciles.with_label_values(&[kind.name(), "done"]).inc();
        self.seconds.with_label_values(&[kind.name()]).observe(took.as_secs_f64());
    }

    /// An object cannot be decoded.
    pub fn undecodable(&self, kind: Kind) {
        self.reconciles.with_label_values(&[kind.name(), "undecodable"]).inc();
    }

    /// A reconcile failed at `step`.
    pub fn failed(&self, kind: Kind, step: &str) {
        self.errors.with_label_values(&[kind.name(), step]).inc();
    }
}

/// Everything in Prometheus' text format. Gauges live as long as one answer: two scrapes at once do not meet, and what is gone is not shown.
pub fn text(counters: &Counters, work: Option<(&Stores, &Queue)>) -> prometheus::Result<Vec<u8>> {
    let mut families = counters.registry.gather();
    if let Some((stores, queue)) = work {
        families.extend(gauges(stores, queue)?.gather());
    }
    let mut text = Vec::new();
    TextEncoder::new().encode(&families, &mut text)?;
    Ok(text)
}

fn gauges(stores: &Stores, queue: &Queue) -> prometheus::Result<Registry> {
    let lengths = IntGaugeVec::new(Opts::new("carryon_queue_length", "Objects that wait to be reconciled."), &["kind"])?;
    let objects = IntGaugeVec::new(Opts::new("carryon_objects", "Objects for which a condition holds."), &["kind", "condition"])?;
    let help = "Optimizer steps done over all steps, of unfinished jobs.";
    let progress = GaugeVec::new(Opts::new("carryon_job_progress_ratio", help), &["namespace", "name"])?;
    for kind in Kind::ALL {
        lengths.with_label_values(&[kind.name()]).set(i64::try_from(queue.length(kind)).unwrap_or(i64::MAX));
    }
    count(&objects, Kind::Pool, &stores.pools);
    count(&objects, Kind::Job, &stores.jobs);
    count(&objects, Kind::Deployment, &stores.deployments);
    for job in stores.jobs.all().iter().filter_map(|job| job.0.as_ref().ok()) {
        let Some(status) = job.status.as_ref().filter(|status| status.completion_time.is_none()) else { continue };
        if let Some(figures) = status.progress.as_ref().filter(|figures| figures.total_steps > 0) {
            let labels = [job.namespace().unwrap_or_default(), job.name_any()];
            progress.with_label_values(&labels).set(figures.step as f64 / figures.total_steps as f64);
        }
    }
    let registry = Registry::new();
    registry.register(Box::new(lengths))?;
    registry.register(Box::new(objects))?;
    registry.register(Box::new(progress))?;
    Ok(registry)
}

/// Counts the conditions that hold.
fn count<K>(objects: &IntGaugeVec, kind: Kind, cache: &Cache<Guarded<K>>)
where
    K: Resource<DynamicType = ()> + HasStatus<Status: ObservedStatus> + Clone + 'static,
{
    for status in cache.all().iter().filter_map(|object| object.0.as_ref().ok()?.status()) {
        let conditions = status.conditions();
        for type_ in conditions.iter().map(|condition| condition.type_.as_str()).filter(|type_| is_true(conditions, type_)) {
            objects.with_label_values(&[kind.name(), type_]).inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, Ordering};

    use carryon_crds::BaseModelPool;
    use kube::runtime::watcher::Event;
    use serde_json::{Value, json};

    use super::*;

    const POOLS: usize = 100;

    /// A pool for which exactly one of two conditions holds.
    fn pool(example: &Value, number: usize, ready: bool) -> Event<Guarded<BaseModelPool>> {
        let condition = |type_: &str, holds: bool| {
            json!({ "type": type_, "status": if holds { "True" } else { "False" }, "reason": "Tested",
            "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z" })
        };
        let mut pool = example.clone();
        pool["metadata"] = json!({ "name": format!("pool-{number}"), "namespace": "team" });
        pool["status"] = json!({ "conditions": [condition("Ready", ready), condition("Stalled", !ready)] });
        Event::Apply(serde_json::from_value(pool).unwrap())
    }

    /// How many pools a scrape counts.
    fn counted(scrape: &str) -> usize {
        let lines = scrape.lines().filter(|line| line.starts_with("carryon_objects{") && line.contains("BaseModelPool"));
        lines.map(|line| line.rsplit_once(' ').unwrap().1.parse::<usize>().unwrap()).sum()
    }

    #[test]
    fn each_of_many_scrapes_at_once_counts_every_object_once_while_they_change() {
        let (stores, queue, counters) = (Stores::default(), Queue::default(), Counters::new().unwrap());
        let manifest = std::fs::read_to_string("../examples/quickstart/pool.yaml").unwrap();
        let example = crate::admission::Admission::new().unwrap().admit(&serde_yaml::from_str(&manifest).unwrap(), None).unwrap();
        let changes: Vec<_> = [true, false].iter().flat_map(|ready| (0..POOLS).map(|number| pool(&example, number, *ready))).collect();
        changes[..POOLS].iter().for_each(|change| stores.pools.apply(change));
        let scrape = || counted(&String::from_utf8(text(&counters, Some((&stores, &queue))).unwrap()).unwrap());
        let scraped = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !scraped.load(Ordering::Relaxed) {
                    changes.iter().for_each(|change| stores.pools.apply(change));
                }
            });
            let scrapes: Vec<_> = (0..8).map(|_| scope.spawn(|| (0..20).map(|_| scrape()).collect::<Vec<_>>())).collect();
            let seen: Vec<Vec<usize>> = scrapes.into_iter().map(|scrapes| scrapes.join().unwrap()).collect();
            scraped.store(true, Ordering::Relaxed);
            assert_eq!(seen, vec![vec![POOLS; 20]; 8]);
        });
    }
}
