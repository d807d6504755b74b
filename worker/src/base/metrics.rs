//! What a pool pod tells Prometheus.

use prometheus::{Encoder as _, Histogram, HistogramOpts, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry, TextEncoder};

/// Classes of work on the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// Answers and classifications.
    Serving,
    /// Hidden states for trainers.
    Training,
    /// Rows of losses for trainers.
    Loss,
}

impl Class {
    fn label(self) -> &'static str {
        match self {
            Self::Serving => "serving",
            Self::Training => "training",
            Self::Loss => "loss",
        }
    }
}

/// The pod's metrics.
pub struct Metrics {
    registry: Registry,
    requests: IntCounterVec,
    queue: IntGaugeVec,
    tokens: IntCounterVec,
    batches: Histogram,
    heads: IntGauge,
    head_bytes: IntGauge,
    cache: IntGaugeVec,
    resident: IntGauge,
}

impl Metrics {
    /// Metrics in a registry of their own.
    ///
    /// # Errors
    /// Never with the names below: they are valid and differ.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let buckets = vec![1.0, 4.0, 16.0, 64.0, 256.0, 512.0, 1024.0, 2048.0, 4096.0, 16384.0];
        let metrics = Self {
            requests: IntCounterVec::new(Opts::new("carryon_requests_total", "Requests answered."), &["route", "code"])?,
            queue: IntGaugeVec::new(Opts::new("carryon_queue_length", "Sequences and training requests on the device."), &["state"])?,
            tokens: IntCounterVec::new(Opts::new("carryon_tokens_total", "Tokens that ran through the base; rows for loss."), &["class"])?,
            batches: Histogram::with_opts(HistogramOpts::new("carryon_batch_tokens", "Tokens of a forward batch.").buckets(buckets))?,
            heads: IntGauge::new("carryon_heads", "Heads held.")?,
            head_bytes: IntGauge::new("carryon_head_bytes", "Bytes of the heads held.")?,
            cache: IntGaugeVec::new(
                Opts::new("carryon_kv_cache_bytes", "Keys and values: the budget, and what is taken of it."),
                &["state"],
            )?,
            resident: IntGauge::new("process_resident_memory_bytes", "Resident memory of this process.")?,
            registry,
        };
        for collector in [
            Box::new(metrics.requests.clone()) as Box<dyn prometheus::core::Collector>,
            Box::new(metrics.queue.clone()),
            Box::new(metrics.tokens.clone()),
            Box::new(metrics.batches.clone()),
            Box::new(metrics.heads.clone()),
            Box::new(metrics.head_bytes.clone()),
            Box::new(metrics.cache.clone()),
            Box::new(metrics.resident.clone()),
        ] {
            metrics.registry.register(collector)?;
        }
        Ok(metrics)
    }

    /// Counts an answer.
    pub fn request(&self, route: &str, code: u16) {
        self.requests.with_label_values(&[route, &code.to_string()]).inc();
    }

    /// Sequences active, sequences waiting, training requests.
    pub fn queue(&self, (active, waiting, training): (usize, usize, usize)) {
        for (state, length) in [("active", active), ("waiting", waiting), ("training", training)] {
            self.queue.with_label_values(&[state]).set(length as i64);
        }
    }

    /// Bytes of keys and values: the budget, and what is taken of it.
    pub fn memory(&self, (budget, taken): (u64, u64)) {
        for (state, bytes) in [("budget", budget), ("taken", taken)] {
            self.cache.with_label_values(&[state]).set(bytes as i64);
        }
    }

    /// Counts a batch.
    pub fn batch(&self, class: Class, tokens: usize) {
        self.tokens.with_label_values(&[class.label()]).inc_by(tokens as u64);
        if class != Class::Loss {
            self.batches.observe(tokens as f64);
        }
    }

    /// The text Prometheus reads; `heads` are their number and bytes.
    pub fn text(&self, heads: (usize, u64)) -> Result<Vec<u8>, prometheus::Error> {
        self.heads.set(heads.0 as i64);
        self.head_bytes.set(heads.1 as i64);
        self.resident.set(resident_bytes().unwrap_or(0));
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(text)
    }
}

/// Resident memory as the kernel reports it; none on other systems.
fn resident_bytes() -> Option<i64> {
    let pages: i64 = std::fs::read_to_string("/proc/self/statm").ok()?.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * rustix::param::page_size() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_text_holds_every_metric() {
        let metrics = Metrics::new().unwrap();
        metrics.request("/v1/model", 200);
        metrics.queue((1, 2, 3));
        metrics.batch(Class::Serving, 5);
        metrics.memory((1000, 70));
        let text = String::from_utf8(metrics.text((2, 1000)).unwrap()).unwrap();
        for line in [
            "carryon_requests_total{code=\"200\",route=\"/v1/model\"} 1",
            "carryon_queue_length{state=\"waiting\"} 2",
            "carryon_tokens_total{class=\"serving\"} 5",
            "carryon_batch_tokens_count 1",
            "carryon_kv_cache_bytes{state=\"taken\"} 70",
            "carryon_heads 2",
        ] {
            assert!(text.contains(line), "{line} in {text}");
        }
    }
}
