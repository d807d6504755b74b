//! What workers say of themselves over HTTP: pools of their model, trainers of their progress.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use carryon_crds::wire::{ModelDescription, Progress};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use serde::de::DeserializeOwned;

use crate::shared::worker;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Asks pods.
pub struct Ask {
    http: reqwest::Client,
    /// A container's model never changes: asked once, by pod name, container and address.
    models: Mutex<BTreeMap<String, ModelDescription>>,
}

impl Ask {
    /// Nobody asked yet.
    ///
    /// # Errors
    /// When no HTTP client can be made.
    pub fn new() -> reqwest::Result<Self> {
        // Pods are not reached through a proxy.
        let http = reqwest::Client::builder().no_proxy().timeout(PATIENCE).build()?;
        Ok(Self { http, models: Mutex::default() })
    }

    /// The models of pods, by pod name; those that do not answer are left out.
    pub async fn models(&self, pods: impl Iterator<Item = &Pod>) -> BTreeMap<String, ModelDescription> {
        let answers = pods.map(|pod| async move { Some((pod.name_any(), self.model(pod).await?)) });
        futures::future::join_all(answers).await.into_iter().flatten().collect()
    }

    /// A trainer's progress.
    pub async fn progress(&self, pod: &Pod) -> Option<Progress> {
        self.get(pod, "/progress").await
    }

    async fn model(&self, pod: &Pod) -> Option<ModelDescription> {
        let container = worker::status(pod)?.container_id.clone().unwrap_or_default();
        let space = pod.namespace().unwrap_or_default();
        let prefix = format!("{space}/{}/", pod.name_any());
        let key = format!("{prefix}{}/{container}", pod.uid().unwrap_or_default());
        let models = || self.models.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = models().get(&key) {
            return Some(known.clone());
        }
        let model: ModelDescription = self.get(pod, "/v1/model").await?;
        let mut models = models();
        models.retain(|known, _| !known.starts_with(&prefix));
        models.insert(key, model.clone());
        Some(model)
    }

    async fn get<T: DeserializeOwned>(&self, pod: &Pod, path: &str) -> Option<T> {
        let ip = pod.status.as_ref()?.pod_ip.as_deref()?;
        let port = worker::port(pod)?;
        let host = if ip.contains(':') { format!("[{ip}]") } else { ip.to_owned() };
        let url = format!("http://{host}:{port}{path}");
        let answer = async { self.http.get(&url).send().await?.error_for_status()?.json().await };
        answer.await.inspect_err(|error: &reqwest::Error| tracing::debug!(%error, pod = pod.name_any(), "no answer")).ok()
    }
}
