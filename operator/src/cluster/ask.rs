//! What workers say of themselves over HTTP: pools of their model, trainers of their progress.
//!
//! They are asked beside the reconciles, which say whom they want to hear of and read the last answer. A [`Round`] asks those pods in turn, so many a
//! second over all objects, and wakes the object when the answer is news. So a pod that answers slowly, without end or not at all costs its own
//! object an answer and the others nothing, and figures lead to no more status writes a second than there are asks. What a pod has said is
//! forgotten with the pod.

mod get;
mod round;

use std::collections::BTreeMap;
use std::time::Duration;

use carryon_crds::wire::{ModelDescription, Progress};
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

pub use self::get::{Http, MOST_BYTES, Unheard};
pub use self::round::{Pace, Round};

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Trainers: twenty a second, each of them every five seconds at most.
const TRAINERS: Pace = Pace { between: Duration::from_millis(50), again: Some(Duration::from_secs(5)) };
/// Pools: a container's model never changes, so there is one answer to wait for.
const POOLS: Pace = Pace { between: Duration::from_millis(10), again: None };

/// Asks the pods that reconciles want to hear of.
pub struct Ask {
    models: Round<ModelDescription>,
    progress: Round<Progress>,
}

impl Ask {
    /// Nobody asked yet.
    pub fn new() -> reqwest::Result<Self> {
        let http = Http::new(PATIENCE)?;
        Ok(Self { models: Round::new(http.clone(), "/v1/model", POOLS), progress: Round::new(http, "/progress", TRAINERS) })
    }

    /// The models of pods, by pod name; those not known yet are left out, and their pool is woken when they are.
    pub fn models<'a>(&self, pods: impl Iterator<Item = &'a Pod>) -> BTreeMap<String, ModelDescription> {
        pods.filter_map(|pod| Some((pod.name_any(), self.models.hear(pod)?))).collect()
    }

    /// What a trainer said last; its job is woken when it says something else.
    pub fn progress(&self, pod: &Pod) -> Option<Progress> {
        self.progress.hear(pod)
    }

    /// Asks without end. `lives(namespace, name, uid)` says whether a pod is still there; `pool` and `job` are woken by namespace and name.
    pub async fn run(&self, lives: impl Fn(&str, &str, &str) -> bool, pool: impl Fn(&str, &str), job: impl Fn(&str, &str)) {
        futures::future::join(self.models.run(&lives, pool), self.progress.run(&lives, job)).await;
    }
}
