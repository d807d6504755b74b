//! Connections to pods, and how long a pod may be silent on them.
//!
//! A pod may compute for as long as it likes, and nobody can say how long that is. So one that is silent is asked, on another connection, whether
//! it lives: of one that is stopped, or whose host swallows packets, nobody waits for ever.

use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::HeaderMap;
use reqwest::{Client, ClientBuilder, Response};

use super::Endpoint;
use super::call::Call;
use super::error::{ClientError, with_causes};

/// How long an unused connection is kept: shorter than pools keep theirs, lest one is used that has just been closed.
const IDLE: Duration = Duration::from_secs(30);
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Silence of a connection after which the system asks the other one's system, how often, and how many questions may be lost.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);
/// How often a silent pod is asked in vain whether it lives.
const QUESTIONS: usize = 2;
/// Where it is asked.
const LIVENESS: &str = "/healthz";

/// How long a pod may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    /// When it was asked for what it knows at once, or whether it lives.
    pub quick: Duration,
    /// Before it is asked whether it lives.
    pub computing: Duration,
}

impl Default for Silence {
    fn default() -> Self {
        Self { quick: Duration::from_secs(10), computing: Duration::from_secs(5) }
    }
}

/// The pod is there no more, or does not say a word.
#[derive(Debug, thiserror::Error)]
#[error("it is silent, and does not answer on {LIVENESS} whether it lives")]
struct Stopped;

/// Connections to the pods of a pool. Clones share them.
#[derive(Clone, Debug)]
pub(super) struct Connections {
    requests: Client,
    /// Of their own and never kept: a kept one may be dead itself.
    questions: Client,
    silence: Silence,
}

impl Connections {
    pub fn new(silence: Silence) -> reqwest::Result<Self> {
        let requests = builder().pool_idle_timeout(IDLE).build()?;
        Ok(Self { requests, questions: builder().pool_max_idle_per_host(0).timeout(silence.quick).build()?, silence })
    }

    /// Sends `call` with `identity`, if any, and waits until `endpoint` begins to answer.
    pub async fn ask(&self, endpoint: &Endpoint, call: &Call, identity: Option<(&str, &str)>) -> Result<Answer, ClientError> {
        let mut request = call.fill(self.requests.request(call.method.clone(), endpoint.url(&call.path)));
        if let Some((name, value)) = identity {
            request = request.header(name, value);
        }
        let unreachable = |reason: String| ClientError::Unreachable { address: endpoint.to_string(), reason };
        let sent = request.send();
        let answer = match call.is_quick() {
            true => tokio::time::timeout(self.silence.quick, sent)
                .await
                .map_err(|_| unreachable(format!("no answer within {:?}", self.silence.quick)))?,
            false => self.hear(endpoint, sent).await.map_err(|stopped| unreachable(stopped.to_string()))?,
        };
        let response = answer.map_err(|cause| unreachable(with_causes(&cause)))?;
        Ok(Answer { connections: self.clone(), endpoint: endpoint.clone(), what: call.what(), response })
    }

    /// What comes from `endpoint`, as long as it lives.
    async fn hear<T>(&self, endpoint: &Endpoint, next: impl Future<Output = T>) -> Result<T, Stopped> {
        let mut next = pin!(next);
        loop {
            let patience = async {
                tokio::time::sleep(self.silence.computing).await;
                self.lives(endpoint).await
            };
            tokio::select! {
                biased;
                heard = &mut next => return Ok(heard),
                lives = patience => if !lives { return Err(Stopped) },
            }
        }
    }

    /// Whatever it answers, it lives.
    async fn lives(&self, endpoint: &Endpoint) -> bool {
        for _ in 0..QUESTIONS {
            if self.questions.get(endpoint.url(LIVENESS)).send().await.is_ok() {
                return true;
            }
        }
        false
    }
}

fn builder() -> ClientBuilder {
    let (silence, interval, lost) = KEEPALIVE;
    Client::builder()
        .no_proxy()
        .connect_timeout(CONNECT)
        .tcp_keepalive(silence)
        .tcp_keepalive_interval(interval)
        .tcp_keepalive_retries(lost)
        .tcp_nodelay(true)
}

/// An answer that has begun.
pub(super) struct Answer {
    connections: Connections,
    pub endpoint: Endpoint,
    /// What was asked.
    pub what: String,
    response: Response,
}

impl Answer {
    pub fn status(&self) -> reqwest::StatusCode {
        self.response.status()
    }

    pub fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// The next piece of the body, as long as the pod lives.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, ClientError> {
        let heard = self.connections.hear(&self.endpoint, self.response.chunk()).await;
        let piece = heard.map_err(|stopped| stopped.to_string()).and_then(|piece| piece.map_err(|cause| with_causes(&cause)));
        piece.map_err(|reason| self.interrupted(reason))
    }

    /// The whole body.
    pub async fn whole(&mut self) -> Result<Bytes, ClientError> {
        let Some(first) = self.piece().await? else { return Ok(Bytes::new()) };
        let Some(second) = self.piece().await? else { return Ok(first) };
        let announced = self.response.content_length().unwrap_or(0).min(u32::MAX.into()) as usize;
        let mut whole = BytesMut::with_capacity(announced.max(first.len() + second.len()));
        whole.extend([first, second]);
        while let Some(piece) = self.piece().await? {
            whole.extend_from_slice(&piece);
        }
        Ok(whole.freeze())
    }

    pub fn interrupted(&self, reason: String) -> ClientError {
        ClientError::Interrupted { endpoint: self.endpoint.clone(), what: self.what.clone(), reason }
    }

    pub fn unreadable(&self, reason: String) -> ClientError {
        ClientError::Unreadable { endpoint: self.endpoint.clone(), what: self.what.clone(), reason }
    }
}
