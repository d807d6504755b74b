//! The routes of a gateway: who may ask, what is asked, what is counted.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use axum::Router;
use axum::extract::{MatchedPath, Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Json, Response};
use axum::routing::{get, post};
use carryon_crds::wire::{GatewayStatus, KeyState};
use serde_json::{Value, json};

use super::error::ApiError;
use super::gateway::Gateway;
use super::key::{Key, PERIOD};
use super::metrics::Metrics;
use super::models::{Model, Models};
use super::origins::Origins;
use super::parameters::Parameters;
use super::request::Asked;
use super::respond::now;
use super::{chat, classify, completions, embeddings};
use crate::http::Bodies;

/// Bound of a request body in bytes.
const MAX_BODY_BYTES: usize = 4 << 20;
/// A byte order mark, as PowerShell writes it before JSON; Python's json drops it too.
const BOM: &[u8] = "\u{feff}".as_bytes();
/// Bytes of all request bodies at a time.
const BODY_BYTES: usize = 64 << 20;

/// What the routes share.
pub(super) struct App {
    /// What is served.
    pub(super) models: Arc<Models>,
    /// Set once the pool holds every head.
    pub(super) gateway: OnceLock<Arc<Gateway>>,
    /// Counters.
    pub(super) metrics: Metrics,
    /// Clients must send one of them; anyone may ask when there is none.
    keys: Vec<Key>,
    bodies: Bodies,
    started: u64,
}

impl App {
    /// An app that is not ready yet.
    pub(super) fn new(models: Models, keys: Vec<Key>, metrics: Metrics) -> Arc<Self> {
        let (models, gateway, bodies) = (Arc::new(models), OnceLock::new(), Bodies::new(BODY_BYTES));
        Arc::new(Self { models, gateway, metrics, keys, bodies, started: now() })
    }

    fn admits(&self, sent: Option<&[u8]>, now: Instant) -> bool {
        self.keys.is_empty() || self.keys.iter().any(|key| key.fits(sent, now))
    }

    /// How the keys are found, in their order.
    fn key_states(&self) -> Vec<KeyState> {
        self.keys.iter().map(|key| key.state(Instant::now())).collect()
    }

    /// Waits until clients can send every key: a gateway that nobody may use takes no other's place.
    pub(super) async fn keys_usable(&self) {
        while !self.key_states().into_iter().all(KeyState::is_usable) {
            tokio::time::sleep(PERIOD).await;
        }
    }

    fn ready(&self) -> Result<&Arc<Gateway>, ApiError> {
        self.gateway
            .get()
            .ok_or_else(|| ApiError::unavailable("The gateway still waits for its pool, or for its API keys; try again later."))
    }
}

/// All routes, for clients and for pages of `origins`.
pub(super) fn router(app: Arc<App>, origins: Origins) -> Router {
    let api = Router::new()
        .route("/v1/models", get(models))
        .route("/v1/models/{*model}", get(model))
        .route("/v1/chat/completions", post(chat_completions))
        .route("/v1/completions", post(text_completions))
        .route("/v1/classify", post(classifications))
        .route("/v1/embeddings", post(embeddings))
        .route_layer(middleware::from_fn_with_state(app.clone(), admit));
    let probes = Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/status", get(status));
    let unknown = async |request: Request| ApiError::route(StatusCode::NOT_FOUND, request.method().as_str(), request.uri().path());
    let wrong = async |request: Request| ApiError::route(StatusCode::METHOD_NOT_ALLOWED, request.method().as_str(), request.uri().path());
    let shared = middleware::from_fn(move |request: Request, next: Next| origins.clone().share(request, next));
    api.merge(probes).fallback(unknown).method_not_allowed_fallback(wrong).layer(shared).with_state(app)
}

/// Name of the model that a request turned out to ask, for its count.
#[derive(Clone, Default)]
struct Addressed(Arc<OnceLock<Arc<str>>>);

/// Checks the key and counts the answer.
async fn admit(State(app): State<Arc<App>>, route: MatchedPath, mut request: Request, next: Next) -> Response {
    let addressed = Addressed::default();
    request.extensions_mut().insert(addressed.clone());
    let response = match app.admits(bearer(request.headers()), Instant::now()) {
        true => next.run(request).await,
        false => ApiError::unauthorized().into_response(),
    };
    let model = addressed.0.get().map_or("", |name| &**name);
    app.metrics.requests.with_label_values(&[model, route.as_str(), response.status().as_str()]).inc();
    response
}

/// The token of `Authorization: Bearer TOKEN`, whose scheme has no case (RFC 9110, 11.1).
fn bearer(headers: &HeaderMap) -> Option<&[u8]> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.as_bytes().split_at_checked("Bearer".len())?;
    (scheme.eq_ignore_ascii_case(b"Bearer") && token.starts_with(b" ")).then(|| token.trim_ascii())
}

async fn models(State(app): State<Arc<App>>) -> Json<Value> {
    let models: Vec<_> = app.models.names().map(|name| describe(&app, name)).collect();
    Json(json!({"object": "list", "data": models}))
}

async fn model(State(app): State<Arc<App>>, Path(name): Path<String>) -> Result<Json<Value>, ApiError> {
    Ok(Json(describe(&app, &app.models.find(&name)?.name)))
}

fn describe(app: &App, name: &str) -> Value {
    json!({"id": name, "object": "model", "created": app.started, "owned_by": "carry-on"})
}

async fn chat_completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (gateway, completion) = parse(&app, request, None, chat::parse).await?;
    completion.answer(&gateway).await
}

async fn text_completions(State(app): State<Arc<App>>, request: Request) -> Result<Response, ApiError> {
    let (gateway, completion) = parse(&app, request, None, completions::parse).await?;
    completion.answer(&gateway).await
}

async fn classifications(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, ApiError> {
    let (gateway, classification) = parse(&app, request, app.models.only_head().cloned(), classify::parse).await?;
    Ok(Json(classification.answer(&gateway).await?))
}

async fn embeddings(State(app): State<Arc<App>>, request: Request) -> Result<Json<Value>, ApiError> {
    let (gateway, embedding) = parse(&app, request, app.models.only_head().cloned(), embeddings::parse).await?;
    Ok(Json(embedding.answer(&gateway).await?))
}

/// Reads the body and parses it where it holds up no other request: a long prompt takes a while to encode. `unnamed` is asked by a request
/// that names no model.
async fn parse<T: Send + 'static>(
    app: &Arc<App>,
    request: Request,
    unnamed: Option<Model>,
    parser: impl FnOnce(Asked<'_>, &Gateway) -> Result<T, ApiError> + Send + 'static,
) -> Result<(Arc<Gateway>, T), ApiError> {
    let gateway = app.ready()?.clone();
    let addressed = request.extensions().get::<Addressed>().cloned().unwrap_or_default();
    let body = app.bodies.read(request, MAX_BODY_BYTES).await?;
    let (app, shared) = (app.clone(), gateway.clone());
    let parse = move || {
        let body = body.strip_prefix(BOM).unwrap_or(&body);
        let mut parameters = Parameters::parse(body)?;
        let model = match parameters.text("model")? {
            Some(name) => app.models.find(&name)?.clone(),
            None => unnamed.ok_or_else(|| ApiError::parameter("model", "model is required."))?,
        };
        let _ = addressed.0.set(model.name.clone());
        parser(Asked { body, parameters, model }, &shared)
    };
    let parsed = tokio::task::spawn_blocking(parse).await;
    Ok((gateway, parsed.map_err(|_| ApiError::internal("The request could not be read."))??))
}

async fn readyz(State(app): State<Arc<App>>) -> Result<&'static str, ApiError> {
    app.ready().map(|_| "ok")
}

async fn status(State(app): State<Arc<App>>) -> Json<GatewayStatus> {
    Json(GatewayStatus { api_keys: app.key_states() })
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    match app.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, prometheus::TEXT_FORMAT)], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
