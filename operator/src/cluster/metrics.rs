//! What the operator counts, for Prometheus.

use std::time::Duration;

use carryon_crds::condition::is_true;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt as _;
use prometheus::{Encoder as _, GaugeVec, HistogramOpts, HistogramVec, IntCounterVec, IntGaugeVec, Opts, Registry, TextEncoder};

use super::caches::Caches;
use super::wake::Wake;

/// How a look at an object ended.
#[derive(Clone, Copy)]
pub enum Outcome {
    /// As it should.
    Done,
    /// The object cannot be decoded.
    Undecodable,
}

impl Outcome {
    fn label(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Undecodable => "undecodable",
        }
    }
}

/// The counters.
pub struct Metrics {
    wake: Wake,
    registry: Registry,
    reconciles: IntCounterVec,
    seconds: HistogramVec,
    errors: IntCounterVec,
    queue: IntGaugeVec,
    objects: IntGaugeVec,
    progress: GaugeVec,
}

impl Metrics {
    /// All at zero; `wake` has the queues.
    ///
    /// # Errors
    /// When a name is no name of a metric, which would be a defect.
    pub fn new(wake: Wake) -> prometheus::Result<Self> {
        let registry = Registry::new();
        let metrics = Self {
            wake,
            reconciles: IntCounterVec::new(Opts::new("carryon_reconciles_total", "Looks at objects."), &["kind", "outcome"])?,
            seconds: HistogramVec::new(HistogramOpts::new("carryon_reconcile_seconds", "Seconds a look at an object took."), &["kind"])?,
            errors: IntCounterVec::new(
                Opts::new("carryon_reconcile_errors_total", "Failed looks, by the step that failed."),
                &["kind", "step"],
            )?,
            queue: IntGaugeVec::new(Opts::new("carryon_queue_length", "Objects that wait to be looked at."), &["kind"])?,
            objects: IntGaugeVec::new(Opts::new("carryon_objects", "Objects for which a condition holds."), &["kind", "condition"])?,
            progress: GaugeVec::new(
                Opts::new("carryon_job_progress_ratio", "Optimizer steps done over all steps, of unfinished jobs."),
                &["namespace", "name"],
            )?,
            registry,
        };
        metrics.registry.register(Box::new(metrics.reconciles.clone()))?;
        metrics.registry.register(Box::new(metrics.seconds.clone()))?;
        metrics.registry.register(Box::new(metrics.errors.clone()))?;
        metrics.registry.register(Box::new(metrics.queue.clone()))?;
        metrics.registry.register(Box::new(metrics.objects.clone()))?;
        metrics.registry.register(Box::new(metrics.progress.clone()))?;
        Ok(metrics)
    }

    /// A look at an object of `kind` ended.
    pub fn count(&self, kind: &str, outcome: Outcome, took: Duration) {
        self.reconciles.with_label_values(&[kind, outcome.label()]).inc();
        self.seconds.with_label_values(&[kind]).observe(took.as_secs_f64());
    }

    /// A look at an object of `kind` failed at `step`.
    pub fn count_error(&self, kind: &str, step: &str) {
        self.errors.with_label_values(&[kind, step]).inc();
    }

    /// Everything in Prometheus' text format; what can be read from the caches is read now.
    ///
    /// # Errors
    /// When a figure cannot be written as text.
    pub fn text(&self, caches: &Caches) -> prometheus::Result<Vec<u8>> {
        self.objects.reset();
        self.progress.reset();
        for (kind, length) in [
            ("BaseModelPool", self.wake.pools.length(&caches.pools.store())),
            ("CarryOnJob", self.wake.jobs.length(&caches.jobs.store())),
            ("CarryOnDeployment", self.wake.deployments.length(&caches.deployments.store())),
        ] {
            self.queue.with_label_values(&[kind]).set(i64::try_from(length).unwrap_or(i64::MAX));
        }
        for pool in caches.pools.list(|_| true) {
            self.count_object("BaseModelPool", pool.status.as_ref().map_or(&[], |status| &status.conditions));
        }
        for deployment in caches.deployments.list(|_| true) {
            self.count_object("CarryOnDeployment", deployment.status.as_ref().map_or(&[], |status| &status.conditions));
        }
        for job in caches.jobs.list(|_| true) {
            let Some(status) = &job.status else { continue };
            self.count_object("CarryOnJob", &status.conditions);
            let progress = status.progress.as_ref().filter(|progress| progress.total_steps > 0 && status.completion_time.is_none());
            if let Some(progress) = progress {
                let labels = [job.namespace().unwrap_or_default(), job.name_any()];
                self.progress.with_label_values(&labels).set(progress.step as f64 / progress.total_steps as f64);
            }
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }

    fn count_object(&self, kind: &str, conditions: &[Condition]) {
        let holding = conditions.iter().map(|condition| condition.type_.as_str()).filter(|type_| is_true(conditions, type_));
        holding.for_each(|type_| self.objects.with_label_values(&[kind, type_]).inc());
    }
}
