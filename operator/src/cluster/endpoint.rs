//! `/healthz`, `/readyz` and `/metrics`.

use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

use super::metrics;
use super::readiness::Readiness;

/// Answers until the process ends.
pub async fn serve(listener: TcpListener, readiness: Arc<Readiness>) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(figures))
        .with_state(readiness);
    axum::serve(listener, router).await.context("the listener has failed")
}

async fn ready(State(readiness): State<Arc<Readiness>>) -> (StatusCode, String) {
    match readiness.ready() {
        Ok(words) => (StatusCode::OK, words),
        Err(words) => (StatusCode::SERVICE_UNAVAILABLE, words),
    }
}

async fn figures(State(readiness): State<Arc<Readiness>>) -> Result<Vec<u8>, StatusCode> {
    let work = readiness.work();
    let work = work.as_ref().map(|work| (&*work.stores, &*work.queue));
    metrics::text(&readiness.counters, work).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
