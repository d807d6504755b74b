//! What a gateway counts, for Prometheus.

use prometheus::{Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder};

/// Counters of one gateway.
#[derive(Clone)]
pub(super) struct Metrics {
    registry: Registry,
    /// Answers by model, route and HTTP status; without a model where the request names none that is served.
    pub(super) requests: IntCounterVec,
    /// Tokens by model and kind: `prompt` or `completion`.
    pub(super) tokens: IntCounterVec,
    /// Seconds until the first token of an answer.
    pub(super) first_token: Histogram,
    /// Times a head was pushed to a pod.
    pub(super) head_pushes: IntCounter,
    /// Whether the gateway is ready.
    pub(super) ready: IntGauge,
}

impl Metrics {
    /// All at zero.
    pub(super) fn new() -> Result<Self, prometheus::Error> {
        let metrics = Self {
            registry: Registry::new(),
            requests: IntCounterVec::new(
                Opts::new("carryon_gateway_requests_total", "Answers by model, route and HTTP status."),
                &["model", "route", "status"],
            )?,
            tokens: IntCounterVec::new(Opts::new("carryon_gateway_tokens_total", "Tokens by model and kind."), &["model", "kind"])?,
            first_token: Histogram::with_opts(
                HistogramOpts::new("carryon_gateway_first_token_seconds", "Seconds until the first token of an answer.")
                    .buckets(prometheus::exponential_buckets(0.01, 2.0, 13)?),
            )?,
            head_pushes: IntCounter::new("carryon_gateway_head_pushes_total", "Times a head was pushed to a pod.")?,
            ready: IntGauge::new("carryon_gateway_ready", "1 when the pool holds every head.")?,
        };
        metrics.registry.register(Box::new(metrics.requests.clone()))?;
        metrics.registry.register(Box::new(metrics.tokens.clone()))?;
        metrics.registry.register(Box::new(metrics.first_token.clone()))?;
        metrics.registry.register(Box::new(metrics.head_pushes.clone()))?;
        metrics.registry.register(Box::new(metrics.ready.clone()))?;
        Ok(metrics)
    }

    /// Counts tokens of a model's answer.
    pub(super) fn count_tokens(&self, model: &str, prompt: u32, completion: u32) {
        self.tokens.with_label_values(&[model, "prompt"]).inc_by(prompt.into());
        self.tokens.with_label_values(&[model, "completion"]).inc_by(completion.into());
    }

    /// Prometheus' text format.
    pub(super) fn text(&self) -> Result<String, prometheus::Error> {
        TextEncoder::new().encode_to_string(&self.registry.gather())
    }
}
