//! The trainer's small HTTP server: `/progress` for the operator, `/healthz`, `/metrics`.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use axum::{Json, Router};
use carryon_crds::wire::Progress;
use prometheus::{Encoder as _, Gauge, Registry, TextEncoder};
use tokio::net::TcpListener;

use crate::http::{self, Silence};
use crate::train::memory;
use crate::train::progress::Snapshot;

/// How long an address in use is waited for.
const RELEASE: Duration = Duration::from_secs(5);

/// Listens on `address` until the runtime ends; returns the address really bound.
///
/// # Errors
/// The address is taken or not ours.
pub async fn listen(address: SocketAddr, snapshot: Snapshot) -> std::io::Result<SocketAddr> {
    let listener = bind(address).await?;
    let bound = listener.local_addr()?;
    let router = Router::new()
        .route("/healthz", get(|| async { "ok\n" }))
        .route("/progress", get(|State(snapshot): State<Snapshot>| async move { Json(copy(&snapshot)) }))
        .route("/metrics", get(|State(snapshot): State<Snapshot>| async move { metrics(&copy(&snapshot)) }))
        .with_state(snapshot);
    tokio::spawn(http::serve(listener, router, Silence::default(), std::future::pending()));
    Ok(bound)
}

/// A trainer killed a moment ago may still hold the address.
async fn bind(address: SocketAddr) -> std::io::Result<TcpListener> {
    let deadline = Instant::now() + RELEASE;
    loop {
        match TcpListener::bind(address).await {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => tokio::time::sleep(RELEASE / 50).await,
            bound => return bound,
        }
    }
}

fn copy(snapshot: &Snapshot) -> Progress {
    snapshot.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// The progress in Prometheus' text format; figures not known yet are left out.
fn metrics(progress: &Progress) -> impl IntoResponse + use<> {
    let memory = memory::now();
    let figures = [
        ("carryon_train_step", "Optimizer steps done", Some(progress.step as f64)),
        ("carryon_train_total_steps", "Optimizer steps in all", Some(progress.total_steps as f64)),
        ("carryon_train_loss", "Loss of the last step, nats per target", progress.train_loss),
        ("carryon_train_eval_loss", "Last evaluation, nats per target", progress.eval_loss),
        ("carryon_train_base_eval_loss", "The base's own loss on the same samples", progress.base_eval_loss),
        ("carryon_train_general_loss", "Loss of text that has nothing to do with what is learned, nats per token", progress.general_loss),
        ("carryon_train_base_general_loss", "The base's own loss of it", progress.base_general_loss),
        ("carryon_train_tokens_per_second", "Training tokens per second", progress.tokens_per_second),
        ("carryon_train_eta_seconds", "Estimated seconds to the end", progress.eta_seconds.map(|seconds| seconds as f64)),
        ("carryon_train_anonymous_bytes", "Anonymous resident memory", Some(memory.anonymous as f64)),
        ("carryon_train_peak_resident_bytes", "Highest resident memory", Some(memory.peak_resident as f64)),
    ];
    let registry = Registry::new();
    for (name, help, value) in figures {
        let Some(value) = value else { continue };
        let gauge = Gauge::new(name, help).expect("the names above are valid");
        gauge.set(value);
        registry.register(Box::new(gauge)).expect("the names above are distinct");
    }
    let mut text = Vec::new();
    TextEncoder::new().encode(&registry.gather(), &mut text).expect("gauges always encode");
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn serves_progress_and_metrics() {
        let snapshot = Snapshot::default();
        snapshot.lock().unwrap().step = 7;
        let address = listen("127.0.0.1:0".parse().unwrap(), snapshot).await.unwrap();
        let body = |path: &str| {
            let url = format!("http://{address}{path}");
            async move { reqwest::get(url).await.unwrap().text().await.unwrap() }
        };
        let progress: Progress = serde_json::from_str(&body("/progress").await).unwrap();
        assert_eq!(progress.step, 7);
        let metrics = body("/metrics").await;
        assert!(metrics.contains("carryon_train_step 7") && !metrics.contains("carryon_train_loss"), "{metrics}");
        assert_eq!(body("/healthz").await, "ok\n");
    }
}
