//! One question to one pod, which may answer anything.

use std::time::Duration;

use reqwest::redirect::Policy;

use crate::shared::said::Said;

/// Longest answer that is read, bytes.
pub const MOST_BYTES: usize = 64 << 10;

/// Why a pod was not understood.
#[derive(Debug, thiserror::Error)]
pub enum Unheard {
    /// No answer, or not in time.
    #[error(transparent)]
    Http(#[from] reqwest::Error),
    /// An answer that is none, such as a redirection: it might lead anywhere.
    #[error("it answered {0}")]
    Status(reqwest::StatusCode),
    /// Longer than anything a worker says.
    #[error("it answered more than {MOST_BYTES} bytes")]
    TooLong,
    /// Not what was asked for.
    #[error("it is not understood: {0}")]
    Json(#[from] serde_json::Error),
}

/// A client for pods that are not trusted.
#[derive(Clone)]
pub struct Http(reqwest::Client);

impl Http {
    /// A client that waits `patience` for a whole answer.
    pub fn new(patience: Duration) -> reqwest::Result<Self> {
        // Pods are not reached through a proxy. They are asked too seldom for a connection to be kept, and there are many of them.
        let client = reqwest::Client::builder().no_proxy().redirect(Policy::none()).pool_max_idle_per_host(0).timeout(patience).build()?;
        Ok(Self(client))
    }

    /// What is said at `url`.
    pub async fn get<T: Said>(&self, url: &str) -> Result<T, Unheard> {
        let mut answer = self.0.get(url).send().await?;
        if !answer.status().is_success() {
            return Err(Unheard::Status(answer.status()));
        }
        let mut body = Vec::new();
        while let Some(chunk) = answer.chunk().await? {
            if body.len() + chunk.len() > MOST_BYTES {
                return Err(Unheard::TooLong);
            }
            body.extend(chunk);
        }
        Ok(serde_json::from_slice::<T>(&body)?.fit())
    }
}
