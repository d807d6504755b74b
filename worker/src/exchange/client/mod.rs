//! The client of a pool, for trainers and gateways.
//!
//! Pods restart in place and more than one may serve: every call goes to the next pod, and connection errors, 429 and
//! 503 are tried again with back-off until a deadline. Hidden states that broke off are asked for again, the missing
//! sequences only. An answer of `generate` that has begun is never begun again.

mod endpoints;
mod error;
mod streams;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use carryon_crds::wire::{Identity, ModelDescription, Numerics};
use futures::Stream;
use reqwest::header::CONTENT_LENGTH;
use reqwest::{Method, Response};
use serde::de::DeserializeOwned;

pub use endpoints::Endpoint;
pub use error::ClientError;

use super::frames::Frame;
use super::loss::{LossRequest, LossResponse};
use super::states::SequenceStates;
use super::wire::{
    self, ClassifyRequest, ClassifyResponse, ErrorBody, ErrorCode, GenerateEvent, GenerateRequest, HiddenStatesRequest, WireError,
};

/// First pause of the back-off; it doubles up to [`LONGEST_PAUSE`].
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long an unused connection is kept: shorter than pools keep theirs, lest one is used that has just been closed.
const IDLE: Duration = Duration::from_secs(30);

/// A client of one pool. Clones share connections.
#[derive(Clone, Debug)]
pub struct PoolClient {
    http: reqwest::Client,
    resolver: Arc<endpoints::Resolver>,
    next: Arc<AtomicUsize>,
    patience: Duration,
    identity: Option<String>,
    numerics: Option<String>,
}

/// One request, in a form that can be sent more than once.
#[derive(Clone, Debug)]
struct Call {
    method: Method,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<Bytes>,
}

impl Call {
    fn get(path: &str) -> Self {
        Self { method: Method::GET, path: path.to_owned(), headers: Vec::new(), body: Vec::new() }
    }

    fn post(path: &str, media_type: &str, body: Vec<Bytes>) -> Self {
        Self { method: Method::POST, path: path.to_owned(), headers: vec![("content-type", media_type.to_owned())], body }
    }

    fn json<T: serde::Serialize>(path: &str, request: &T) -> Self {
        // Our requests are plain structs: writing them cannot fail, and an empty body would be refused by name.
        Self::post(path, "application/json", vec![serde_json::to_vec(request).unwrap_or_default().into()])
    }

    fn what(&self) -> String {
        format!("{} {}", self.method, self.path)
    }
}

impl PoolClient {
    /// A client of the pods behind `urls` (`http://HOST:PORT`; a host may resolve to several pods).
    /// Calls are tried again for up to `patience` after the last progress. Nothing is contacted yet.
    pub fn connect(urls: &[String], patience: Duration) -> Result<Self, ClientError> {
        let unusable = |cause: reqwest::Error| ClientError::Address { url: urls.join(","), reason: cause.to_string() };
        let http = reqwest::Client::builder()
            .no_proxy()
            .connect_timeout(Duration::from_secs(5))
            .tcp_keepalive(Duration::from_secs(30))
            .pool_idle_timeout(IDLE)
            .tcp_nodelay(true)
            .build()
            .map_err(unusable)?;
        let resolver = Arc::new(endpoints::Resolver::new(urls)?);
        Ok(Self { http, resolver, next: Arc::default(), patience, identity: None, numerics: None })
    }

    /// This client, bound to a base: a pool with another identity refuses; with `numerics`, an answer computed in
    /// another way is [`ClientError::NumericsChanged`].
    pub fn bound_to(mut self, identity: &Identity, numerics: Option<&Numerics>) -> Self {
        self.identity = Some(identity.digest());
        self.numerics = numerics.map(Numerics::key);
        self
    }

    /// The pods as they resolve now.
    pub async fn endpoints(&self) -> Result<Vec<Endpoint>, ClientError> {
        self.resolver.endpoints().await
    }

    /// What the pool says of its model.
    pub async fn describe(&self) -> Result<ModelDescription, ClientError> {
        self.ask_json(&Call::get("/v1/model")).await
    }

    /// tokenizer.json.
    pub async fn tokenizer(&self) -> Result<Bytes, ClientError> {
        self.ask_bytes(&Call::get("/v1/tokenizer")).await.map(|(_, bytes)| bytes)
    }

    /// The LM head, V × D numbers in the dtype of `description`, little-endian.
    pub async fn lm_head(&self, description: &ModelDescription) -> Result<Bytes, ClientError> {
        let call = Call::get("/v1/lm-head");
        let (endpoint, bytes) = self.ask_bytes(&call).await?;
        let shape = [description.vocab_size as usize, description.hidden_size as usize];
        let dtype = super::states::wire_dtype(description.numerics.dtype);
        let weight = Frame::parse(bytes).and_then(|frame| frame.tensor("weight", dtype, &shape));
        weight.map_err(|cause| ClientError::frame(&endpoint, &call.what(), &cause))
    }

    /// Hidden states of every sequence of `request`, in any order, each once. The stream holds the pool back when it is
    /// not read.
    pub fn hidden_states(&self, request: HiddenStatesRequest) -> impl Stream<Item = Result<SequenceStates, ClientError>> + Send + 'static {
        streams::hidden_states(self.clone(), request)
    }

    /// Losses, and gradients if asked for.
    pub async fn loss(&self, request: &LossRequest) -> Result<LossResponse, ClientError> {
        let call = Call::post("/v1/loss", wire::SAFETENSORS, request.encode());
        let (endpoint, bytes) = self.ask_bytes(&call).await?;
        LossResponse::decode(bytes, request).map_err(|cause| ClientError::frame(&endpoint, &call.what(), &cause))
    }

    /// Starts a continuation at `endpoint`, or at the next pod. What can be known before the first token is an error
    /// here ([`ClientError::HeadMissing`] names the pod to push the head to); an answer that breaks off ends with an error.
    pub async fn generate(
        &self,
        endpoint: Option<&Endpoint>,
        request: &GenerateRequest,
    ) -> Result<impl Stream<Item = Result<GenerateEvent, ClientError>> + Send + 'static, ClientError> {
        let call = Call::json("/v1/generate", request);
        let (endpoint, response) = self.ask(endpoint, &call).await?;
        match request.sampling.asked() {
            Some(member) if !response.headers().contains_key(wire::SAMPLING_HEADER) => Err(ClientError::Outdated { endpoint, member }),
            _ => Ok(streams::events(endpoint, call.what(), response)),
        }
    }

    /// Logits of a classification head at `endpoint`, or at the next pod.
    pub async fn classify(&self, endpoint: Option<&Endpoint>, request: &ClassifyRequest) -> Result<ClassifyResponse, ClientError> {
        let call = Call::json("/v1/classify", request);
        let (endpoint, response) = self.ask(endpoint, &call).await?;
        let bytes = response.bytes().await.map_err(|cause| interrupted(&endpoint, &call.what(), &cause))?;
        parse(&endpoint, &call, &bytes)
    }

    /// Pushes a head to one pod. `expiry` counts from the head's last use.
    pub async fn put_head(&self, endpoint: &Endpoint, digest: &str, bytes: Bytes, expiry: Duration) -> Result<(), ClientError> {
        self.ask(Some(endpoint), &Self::put_call(digest, bytes, expiry)).await.map(drop)
    }

    /// Pushes a head to every pod; pods that do not answer yet are tried until the deadline.
    pub async fn put_head_everywhere(&self, digest: &str, bytes: Bytes, expiry: Duration) -> Result<(), ClientError> {
        let call = Self::put_call(digest, bytes, expiry);
        let mut patience = Patience::new(self);
        loop {
            match self.attempt_everywhere(&call).await {
                Ok(()) => return Ok(()),
                Err(error) => patience.wait(error).await?,
            }
        }
    }

    /// Whether a pod holds a head; asking counts as use.
    pub async fn has_head(&self, endpoint: &Endpoint, digest: &str) -> Result<bool, ClientError> {
        match self.ask(Some(endpoint), &Call::get(&format!("/v1/heads/{digest}"))).await {
            Ok(_) => Ok(true),
            Err(ClientError::HeadMissing { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Drops a head from a pod; one that is not there is no error.
    pub async fn delete_head(&self, endpoint: &Endpoint, digest: &str) -> Result<(), ClientError> {
        let call = Call { method: Method::DELETE, ..Call::get(&format!("/v1/heads/{digest}")) };
        match self.ask(Some(endpoint), &call).await {
            Ok(_) | Err(ClientError::HeadMissing { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn put_call(digest: &str, bytes: Bytes, expiry: Duration) -> Call {
        let mut call = Call::post(&format!("/v1/heads/{digest}"), wire::SAFETENSORS, vec![bytes]);
        call.method = Method::PUT;
        call.headers.push((wire::EXPIRY_HEADER, expiry.as_secs().to_string()));
        call
    }

    async fn ask_json<T: DeserializeOwned>(&self, call: &Call) -> Result<T, ClientError> {
        let (endpoint, bytes) = self.ask_bytes(call).await?;
        parse(&endpoint, call, &bytes)
    }

    /// Asks the next pod and reads the whole answer, again if it breaks off: for calls that change nothing.
    async fn ask_bytes(&self, call: &Call) -> Result<(Endpoint, Bytes), ClientError> {
        let mut patience = Patience::new(self);
        loop {
            let (endpoint, response) = self.ask(None, call).await?;
            match response.bytes().await {
                Ok(bytes) => return Ok((endpoint, bytes)),
                Err(cause) => patience.wait(interrupted(&endpoint, &call.what(), &cause)).await?,
            }
        }
    }

    /// Asks `endpoint`, or the next pod, until one begins to answer.
    async fn ask(&self, endpoint: Option<&Endpoint>, call: &Call) -> Result<(Endpoint, Response), ClientError> {
        let mut patience = Patience::new(self);
        loop {
            let outcome = match endpoint {
                Some(endpoint) => self.attempt(endpoint, call).await.map(|response| (endpoint.clone(), response)),
                None => self.attempt_next(call).await,
            };
            match outcome {
                Ok(answer) => return Ok(answer),
                Err(error) => patience.wait(error).await?,
            }
        }
    }

    async fn attempt_next(&self, call: &Call) -> Result<(Endpoint, Response), ClientError> {
        let endpoint = self.resolver.next(self.next.fetch_add(1, Ordering::Relaxed)).await?;
        let response = self.attempt(&endpoint, call).await?;
        Ok((endpoint, response))
    }

    async fn attempt_everywhere(&self, call: &Call) -> Result<(), ClientError> {
        let endpoints = self.endpoints().await?;
        futures::future::try_join_all(endpoints.iter().map(|endpoint| self.attempt(endpoint, call))).await.map(drop)
    }

    /// Sends a call once and checks status and fingerprint of the answer.
    async fn attempt(&self, endpoint: &Endpoint, call: &Call) -> Result<Response, ClientError> {
        let mut request = self.http.request(call.method.clone(), endpoint.url(&call.path));
        for (name, value) in &call.headers {
            request = request.header(*name, value);
        }
        if let Some(identity) = &self.identity {
            request = request.header(wire::IDENTITY_HEADER, identity);
        }
        request = match call.body.as_slice() {
            [] => request,
            [one] => request.body(one.clone()),
            pieces => {
                // A pool that has no room for it says so before it is sent.
                request = request.header(CONTENT_LENGTH, pieces.iter().map(Bytes::len).sum::<usize>());
                let pieces: Vec<_> = pieces.iter().cloned().map(Ok::<_, std::io::Error>).collect();
                request.body(reqwest::Body::wrap_stream(futures::stream::iter(pieces)))
            }
        };
        let unreachable =
            |cause: reqwest::Error| ClientError::Unreachable { address: endpoint.to_string(), reason: error::with_causes(&cause) };
        let response = request.send().await.map_err(unreachable).inspect_err(|_| self.resolver.avoid(endpoint))?;
        if !response.status().is_success() {
            return Err(refusal(endpoint, call, response).await);
        }
        let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
        match (&self.numerics, header(wire::NUMERICS_HEADER)) {
            (Some(expected), Some(found)) if *expected != found => {
                Err(ClientError::NumericsChanged { endpoint: endpoint.clone(), expected: expected.clone(), found })
            }
            _ => Ok(response),
        }
    }
}

/// Back-off until a deadline.
struct Patience<'a> {
    client: &'a PoolClient,
    deadline: Instant,
    pause: Duration,
}

impl<'a> Patience<'a> {
    fn new(client: &'a PoolClient) -> Self {
        Self { client, deadline: Instant::now() + client.patience, pause: FIRST_PAUSE }
    }

    /// Waits a while after a failure that may pass; any other, or one at the deadline, is returned.
    async fn wait(&mut self, error: ClientError) -> Result<(), ClientError> {
        if !error.is_transient() || Instant::now() + self.pause >= self.deadline {
            return Err(error);
        }
        if self.pause >= LONGEST_PAUSE {
            tracing::warn!("{error}; trying again");
        }
        self.client.resolver.forget();
        tokio::time::sleep(self.pause).await;
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        Ok(())
    }
}

/// Reads a refusal; a body that is not ours (a proxy's) keeps its status.
async fn refusal(endpoint: &Endpoint, call: &Call, response: Response) -> ClientError {
    let (endpoint, what, status) = (endpoint.clone(), call.what(), response.status().as_u16());
    let body = match response.bytes().await {
        Ok(body) => body,
        Err(cause) => return interrupted(&endpoint, &what, &cause),
    };
    let foreign = || WireError::new(ErrorCode::Unknown, String::from_utf8_lossy(&body[..body.len().min(200)]));
    let error = serde_json::from_slice(&body).map_or_else(|_| foreign(), |body: ErrorBody| body.error);
    match error.code {
        ErrorCode::HeadMissing => ClientError::HeadMissing { endpoint, message: error.message },
        _ => ClientError::Refused { endpoint, what, status, error },
    }
}

fn interrupted(endpoint: &Endpoint, what: &str, cause: &reqwest::Error) -> ClientError {
    ClientError::Interrupted { endpoint: endpoint.clone(), what: what.to_owned(), reason: error::with_causes(cause) }
}

fn parse<T: DeserializeOwned>(endpoint: &Endpoint, call: &Call, bytes: &[u8]) -> Result<T, ClientError> {
    let unreadable = |cause: serde_json::Error| {
        let (endpoint, what) = (endpoint.clone(), call.what());
        ClientError::Unreadable { endpoint, what, reason: cause.to_string() }
    };
    serde_json::from_slice(bytes).map_err(unreadable)
}
