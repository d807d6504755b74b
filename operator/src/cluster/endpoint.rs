//! `/healthz`, `/readyz` and `/metrics`.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

use super::metrics;
use super::standing::Standing;

/// Listens.
///
/// # Errors
/// When the address is taken.
pub async fn bind(address: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("failed to listen on {address}"))
}

/// Answers until the process ends.
///
/// # Errors
/// When the listener fails.
pub async fn serve(listener: TcpListener, standing: Arc<Standing>) -> anyhow::Result<()> {
    let router = Router::new()
        .route("/healthz", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(figures))
        .with_state(standing);
    axum::serve(listener, router).await.context("the listener has failed")
}

async fn ready(State(standing): State<Arc<Standing>>) -> (StatusCode, String) {
    match standing.ready() {
        Ok(words) => (StatusCode::OK, words),
        Err(words) => (StatusCode::SERVICE_UNAVAILABLE, words),
    }
}

async fn figures(State(standing): State<Arc<Standing>>) -> Result<Vec<u8>, StatusCode> {
    let work = standing.work();
    let work = work.as_ref().map(|work| (&*work.stores, &*work.queue));
    metrics::text(&standing.counters, work).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
