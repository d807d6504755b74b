//! HTTP: the routes of [`crate::exchange::wire`], probes and metrics.

mod body;
mod check;
mod generate;
mod heads;
mod mixing;
mod states;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Json, Router};
use bytes::Bytes;
use carryon_crds::wire::ModelDescription;

use super::device::Device;
use super::metrics::Metrics;
use super::registry::{Fit, Registry};
use super::uploads::Uploads;
use crate::exchange::wire::{self, ErrorBody, ErrorCode, WireError};
use crate::http::{Bodies, BodyError};
use crate::kernel::DeviceError;

pub use states::states_body;

/// What the routes need once the weights are loaded.
pub struct Ready {
    /// What the pool says of its model.
    pub description: ModelDescription,
    /// Digest of its identity.
    pub identity: String,
    /// tokenizer.json.
    pub tokenizer: Bytes,
    /// Reads rows of the LM head, in the pool's number type; none when logits are more than the product with it.
    pub lm_head: Option<ReadRows>,
    /// The device thread.
    pub device: Device,
    /// Heads held.
    pub registry: Arc<Registry>,
    /// What heads must fit.
    pub fit: Fit,
}

/// Reads rows of a matrix.
pub type ReadRows = Box<dyn Fn(Range<usize>) -> Result<Bytes, DeviceError> + Send + Sync>;

/// A pool pod, from its first moment on.
pub struct Pool {
    /// Changes when the pod restarts.
    pub instance: String,
    /// Metrics.
    pub metrics: Arc<Metrics>,
    /// Room for request bodies.
    pub bodies: Bodies,
    /// The way in for heads.
    pub uploads: Uploads,
    /// Set when the weights are loaded.
    pub ready: OnceLock<Ready>,
    /// Set when the pod shuts down.
    pub draining: AtomicBool,
}

impl Pool {
    fn ready(&self) -> Result<&Ready, Refusal> {
        self.ready.get().ok_or_else(|| Refusal::new(ErrorCode::Unavailable, "the weights are being loaded"))
    }
}

/// A refusal as an HTTP answer.
pub(super) struct Refusal(WireError);

impl Refusal {
    fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self(WireError::new(code, message))
    }
}

impl From<Refusal> for WireError {
    fn from(refusal: Refusal) -> Self {
        refusal.0
    }
}

impl From<WireError> for Refusal {
    fn from(error: WireError) -> Self {
        Self(error)
    }
}

impl From<BodyError> for Refusal {
    fn from(error: BodyError) -> Self {
        let code = match error {
            BodyError::TooLarge(_) => ErrorCode::TooLarge,
            BodyError::Busy => ErrorCode::Busy,
            BodyError::Late => ErrorCode::Late,
            BodyError::Broken(_) | BodyError::Encoded(_) => ErrorCode::InvalidRequest,
        };
        Self::new(code, error.to_string())
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let transient = self.0.code.is_transient();
        let status = StatusCode::from_u16(self.0.code.status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(ErrorBody { error: self.0 })).into_response();
        if transient {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
        }
        response
    }
}

/// All routes of a pool pod.
pub fn router(pool: Arc<Pool>) -> Router {
    Router::new()
        .route("/v1/model", get(model))
        .route("/v1/tokenizer", get(tokenizer))
        .route("/v1/lm-head", get(states::lm_head))
        .route("/v1/hidden-states", post(states::hidden_states))
        .route("/v1/loss", post(states::loss))
        .route("/v1/heads/{digest}", put(heads::put).get(heads::get).delete(heads::delete))
        .route("/v1/generate", post(generate::generate))
        .route("/v1/classify", post(generate::classify))
        .route("/v1/follow", post(mixing::follow))
        .route("/v1/generate-mixed", post(mixing::generate))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .fallback(async || Refusal::new(ErrorCode::NotFound, "no such route"))
        .method_not_allowed_fallback(async || (StatusCode::METHOD_NOT_ALLOWED, Refusal::new(ErrorCode::NotFound, "no such method")))
        .layer(middleware::from_fn_with_state(pool.clone(), around))
        .with_state(pool)
}

/// Checks the identity a client expects, names the pod in each answer, counts.
async fn around(State(pool): State<Arc<Pool>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>().map_or_else(|| "other".to_owned(), |path| path.as_str().to_owned());
    let expected = request.headers().get(wire::IDENTITY_HEADER).map(|value| value.to_str().unwrap_or("unreadable").to_owned());
    let mut response = match (expected, pool.ready.get()) {
        (Some(expected), Some(ready)) if expected != ready.identity => {
            let message = format!("this pool's base is {}, expected {expected}", ready.identity);
            Refusal::new(ErrorCode::IdentityMismatch, message).into_response()
        }
        _ => next.run(request).await,
    };
    pool.metrics.request(&route, response.status().as_u16());
    let mut name = |header: &'static str, value: &str| {
        if let Ok(value) = HeaderValue::from_str(value) {
            response.headers_mut().insert(header, value);
        }
    };
    name(wire::INSTANCE_HEADER, &pool.instance);
    if let Some(ready) = pool.ready.get() {
        name(wire::IDENTITY_HEADER, &ready.identity);
        name(wire::NUMERICS_HEADER, &ready.description.numerics.key());
    }
    response
}

async fn model(State(pool): State<Arc<Pool>>) -> Result<Json<ModelDescription>, Refusal> {
    Ok(Json(pool.ready()?.description.clone()))
}

async fn tokenizer(State(pool): State<Arc<Pool>>) -> Result<Response, Refusal> {
    Ok(([(header::CONTENT_TYPE, "application/json")], pool.ready()?.tokenizer.clone()).into_response())
}

async fn readyz(State(pool): State<Arc<Pool>>) -> Result<&'static str, Refusal> {
    pool.ready()?;
    match pool.draining.load(Ordering::Relaxed) {
        false => Ok("ok\n"),
        true => Err(Refusal::new(ErrorCode::Unavailable, "the pool is shutting down")),
    }
}

async fn metrics(State(pool): State<Arc<Pool>>) -> Result<Response, Refusal> {
    let heads = pool.ready.get().map_or((0, 0), |ready| ready.registry.usage(Instant::now()));
    let text = pool.metrics.text(heads).map_err(|error| Refusal::new(ErrorCode::Internal, error.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}
