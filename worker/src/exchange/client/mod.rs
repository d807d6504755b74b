//! The client of a pool, for trainers and gateways.
//!
//! Pods restart in place and more than one may serve: every call goes to the next pod, and connection errors, 429 and
//! 503 are tried again with back-off until a deadline. Hidden states that broke off are asked for again, the missing
//! sequences only. An answer of `generate` that has begun is never begun again.

mod call;
mod connections;
mod endpoints;
mod error;
mod mixed;
mod numerics;
mod open;
mod patience;
mod streams;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use carryon_crds::wire::{Identity, ModelDescription, Numerics};
use futures::Stream;
use reqwest::Method;
use serde::de::DeserializeOwned;

pub use call::Payload;
pub use connections::Silence;
pub use endpoints::Endpoint;
pub use error::ClientError;
pub use mixed::Events;
pub use open::{Following, Sending};

use call::Call;
use connections::{Answer, Connections};
use numerics::Wanted;
use patience::Patience;

use super::frames::Frame;
use super::loss::{LossRequest, LossResponse};
use super::states::SequenceStates;
use super::wire::{
    self, ClassifyRequest, ClassifyResponse, ErrorBody, ErrorCode, GenerateEvent, GenerateRequest, HiddenStatesRequest, WireError,
};

/// A client of one pool. Clones share connections.
#[derive(Clone, Debug)]
pub struct PoolClient {
    connections: Connections,
    resolver: Arc<endpoints::Resolver>,
    next: Arc<AtomicUsize>,
    patience: Duration,
    identity: Option<String>,
    numerics: Option<Arc<Wanted>>,
    namespace: Option<String>,
    job: Option<String>,
}

impl PoolClient {
    /// A client of the pods behind `urls` (`http://HOST:PORT`; a host may resolve to several pods).
    /// Calls are tried again for up to `patience` after their first failure. Nothing is contacted yet.
    pub fn connect(urls: &[String], patience: Duration) -> Result<Self, ClientError> {
        Self::connect_with(urls, patience, Silence::default())
    }

    /// As [`Self::connect`]; pods may be as silent as `silence` says.
    pub fn connect_with(urls: &[String], patience: Duration, silence: Silence) -> Result<Self, ClientError> {
        let unusable = |cause: reqwest::Error| ClientError::Address { url: urls.join(","), reason: cause.to_string() };
        let connections = Connections::new(silence).map_err(unusable)?;
        let resolver = Arc::new(endpoints::Resolver::new(urls)?);
        Ok(Self { connections, resolver, next: Arc::default(), patience, identity: None, numerics: None, namespace: None, job: None })
    }

    /// This client, bound to a base: a pool with another identity refuses. With `numerics`, only pods that compute in this way are asked; where
    /// there is none left, it is [`ClientError::NumericsChanged`].
    pub fn bound_to(mut self, identity: &Identity, numerics: Option<&Numerics>) -> Self {
        self.identity = Some(identity.digest());
        self.numerics = numerics.map(|numerics| Arc::new(Wanted::new(numerics)));
        self
    }

    /// This client, speaking for a namespace: its requests share with each other what a pod has computed of their prompts.
    pub fn speaking_for(self, namespace: &str) -> Self {
        Self { namespace: Some(namespace.to_owned()), ..self }
    }

    /// This client, asking for a job (`NAMESPACE/NAME`): jobs take turns at a pod.
    pub fn asking_for(self, job: &str) -> Self {
        Self { job: Some(job.to_owned()), ..self }
    }

    /// Takes note of how a pod computes, before it is asked for anything.
    pub fn note(&self, endpoint: &Endpoint, numerics: &Numerics) {
        if let Some(wanted) = &self.numerics {
            wanted.note(endpoint, &numerics.key());
        }
    }

    /// Where it stands among pools that are asked one after the other.
    fn turn(&self) -> (Option<&str>, &[endpoints::Address]) {
        (self.identity.as_deref(), &self.resolver.addresses)
    }

    /// The pods as they resolve now.
    pub async fn endpoints(&self) -> Result<Vec<Endpoint>, ClientError> {
        self.resolver.endpoints().await
    }

    /// What the pool says of its model.
    pub async fn describe(&self) -> Result<ModelDescription, ClientError> {
        self.ask_json(&Call::get("/v1/model")).await
    }

    /// What each pod says of its model; those that do not answer at once are left out.
    pub async fn describe_each(&self) -> Result<Vec<(Endpoint, ModelDescription)>, ClientError> {
        let call = Call::get("/v1/model");
        let described = self.endpoints().await?.into_iter().map(async |endpoint| {
            let description = parse(&mut self.attempt(&endpoint, &call).await?).await?;
            Ok::<_, ClientError>((endpoint, description))
        });
        Ok(futures::future::join_all(described).await.into_iter().filter_map(Result::ok).collect())
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
        let dtype = crate::numbers::wire_dtype(description.numerics.dtype);
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
        let mut call = Call::post("/v1/loss", wire::SAFETENSORS, Payload::Pieces(request.encode()));
        call.headers.extend(self.job_header());
        let (endpoint, bytes) = self.ask_bytes(&call).await?;
        LossResponse::decode(bytes, request).map_err(|cause| ClientError::frame(&endpoint, &call.what(), &cause))
    }

    fn job_header(&self) -> Option<(&'static str, String)> {
        self.job.clone().map(|job| (wire::JOB_HEADER, job))
    }

    /// Starts a continuation at `endpoint`, or at the next pod. What can be known before the first token is an error
    /// here ([`ClientError::HeadMissing`] names the pod to push the head to); an answer that breaks off ends with an error.
    pub async fn generate(
        &self,
        endpoint: Option<&Endpoint>,
        request: &GenerateRequest,
    ) -> Result<impl Stream<Item = Result<GenerateEvent, ClientError>> + Send + 'static, ClientError> {
        let mut call = Call::json("/v1/generate", request);
        call.headers.extend(self.namespace.clone().map(|namespace| (wire::NAMESPACE_HEADER, namespace)));
        let answer = self.ask(endpoint, &call).await?;
        match request.sampling.asked() {
            Some(member) if !answer.headers().contains_key(wire::SAMPLING_HEADER) => {
                Err(ClientError::Outdated { endpoint: answer.endpoint, member })
            }
            _ => Ok(streams::events(answer)),
        }
    }

    /// Logits of a classification head at `endpoint`, or at the next pod.
    pub async fn classify(&self, endpoint: Option<&Endpoint>, request: &ClassifyRequest) -> Result<ClassifyResponse, ClientError> {
        let call = Call::json("/v1/classify", request);
        parse(&mut self.ask(endpoint, &call).await?).await
    }

    /// Pushes a head to one pod. `expiry` counts from the head's last use.
    pub async fn put_head(&self, endpoint: &Endpoint, digest: &str, head: impl Into<Payload>, expiry: Duration) -> Result<(), ClientError> {
        let mut call = Call::post(&format!("/v1/heads/{digest}"), wire::SAFETENSORS, head.into());
        call.method = Method::PUT;
        call.headers.push((wire::EXPIRY_HEADER, expiry.as_secs().to_string()));
        self.ask(Some(endpoint), &call).await.map(drop)
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

    async fn ask_json<T: DeserializeOwned>(&self, call: &Call) -> Result<T, ClientError> {
        let (endpoint, bytes) = self.ask_bytes(call).await?;
        read_json(&bytes).map_err(|reason| ClientError::Unreadable { endpoint, what: call.what(), reason })
    }

    /// Asks the next pod and reads the whole answer, again if it breaks off: for calls that change nothing.
    async fn ask_bytes(&self, call: &Call) -> Result<(Endpoint, Bytes), ClientError> {
        let mut patience = Patience::new(self);
        loop {
            let mut answer = self.ask(None, call).await?;
            match answer.whole().await {
                Ok(bytes) => return Ok((answer.endpoint, bytes)),
                Err(error) => patience.wait(error).await?,
            }
        }
    }

    /// Asks `endpoint`, or the next pod, until one begins to answer.
    async fn ask(&self, endpoint: Option<&Endpoint>, call: &Call) -> Result<Answer, ClientError> {
        let mut patience = Patience::new(self);
        loop {
            let outcome = match endpoint {
                Some(endpoint) => self.attempt(endpoint, call).await,
                None => self.attempt_next(call).await,
            };
            match outcome {
                Err(ClientError::NumericsChanged { .. }) if endpoint.is_none() && self.another_may_agree().await => {}
                Err(error) => patience.wait(error).await?,
                answer => return answer,
            }
        }
    }

    async fn attempt_next(&self, call: &Call) -> Result<Answer, ClientError> {
        let may_agree = |endpoint: &Endpoint| self.numerics.as_ref().is_none_or(|wanted| wanted.may_agree(endpoint));
        let endpoint = self.resolver.next(self.next.fetch_add(1, Ordering::Relaxed), may_agree).await?;
        self.attempt(&endpoint, call).await
    }

    /// Whether there is a pod that is not known to compute in another way.
    async fn another_may_agree(&self) -> bool {
        let Some(wanted) = &self.numerics else { return false };
        self.endpoints().await.is_ok_and(|endpoints| endpoints.iter().any(|endpoint| wanted.may_agree(endpoint)))
    }

    /// Sends a call once and checks status and numerics of the answer.
    async fn attempt(&self, endpoint: &Endpoint, call: &Call) -> Result<Answer, ClientError> {
        let identity = self.identity.as_deref().map(|identity| (wire::IDENTITY_HEADER, identity));
        let asked = self.connections.ask(endpoint, call, identity).await;
        let answer = asked.inspect_err(|_| self.resolver.avoid(endpoint))?;
        if !answer.status().is_success() {
            return Err(refusal(answer).await);
        }
        let numerics = answer.headers().get(wire::NUMERICS_HEADER).and_then(|value| value.to_str().ok());
        match (&self.numerics, numerics) {
            (Some(wanted), Some(found)) if !wanted.note(endpoint, found) => Err(wanted.changed(endpoint, found)),
            _ => Ok(answer),
        }
    }
}

/// Reads a refusal; a body that is not ours (a proxy's) keeps its status.
async fn refusal(mut answer: Answer) -> ClientError {
    let status = answer.status().as_u16();
    let body = match answer.whole().await {
        Ok(body) => body,
        Err(error) => return error,
    };
    let foreign = || WireError::new(ErrorCode::Unknown, String::from_utf8_lossy(&body[..body.len().min(200)]));
    let error = serde_json::from_slice(&body).map_or_else(|_| foreign(), |body: ErrorBody| body.error);
    let Answer { endpoint, what, .. } = answer;
    match error.code {
        ErrorCode::HeadMissing => ClientError::HeadMissing { endpoint, message: error.message },
        _ => ClientError::Refused { endpoint, what, status, error },
    }
}

async fn parse<T: DeserializeOwned>(answer: &mut Answer) -> Result<T, ClientError> {
    let bytes = answer.whole().await?;
    read_json(&bytes).map_err(|reason| answer.unreadable(reason))
}

fn read_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|cause| cause.to_string())
}
