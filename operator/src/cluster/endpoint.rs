//! `/healthz`, `/readyz` and `/metrics`.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};

use anyhow::Context as _;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;

use super::kinds::Context;

/// The operator's own listener.
#[derive(Clone)]
pub struct Endpoint {
    listener: Arc<Mutex<Option<TcpListener>>>,
    /// Set when the caches are filled. A follower is not ready to work but is no less healthy.
    context: Arc<OnceLock<Arc<Context>>>,
}

impl Endpoint {
    /// Listens.
    ///
    /// # Errors
    /// When the address is taken.
    pub async fn bind(address: SocketAddr) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(address).await.with_context(|| format!("failed to listen on {address}"))?;
        Ok(Self { listener: Arc::new(Mutex::new(Some(listener))), context: Arc::default() })
    }

    /// From now on there is something to show.
    pub fn ready(&self, context: Arc<Context>) {
        let _ = self.context.set(context);
    }

    /// Answers until the process ends.
    ///
    /// # Errors
    /// When the listener fails.
    pub async fn serve(&self) -> anyhow::Result<()> {
        let listener = self.listener.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take();
        let Some(listener) = listener else { return std::future::pending().await };
        let router = Router::new()
            .route("/healthz", get(|| async { "ok" }))
            .route("/readyz", get(|| async { "ok" }))
            .route("/metrics", get(metrics))
            .with_state(self.clone());
        axum::serve(listener, router).await.context("the listener has failed")
    }
}

async fn metrics(State(endpoint): State<Endpoint>) -> Result<Vec<u8>, StatusCode> {
    let Some(context) = endpoint.context.get() else { return Ok(Vec::new()) };
    context.metrics.text(&context.caches).map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)
}
