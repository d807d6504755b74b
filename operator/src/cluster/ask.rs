//! What workers say of themselves over HTTP: pools of their model, trainers of their progress, gateways of their API keys.
//!
//! They are asked beside the reconciles, which say whom they want to hear of and read the last answer. A [`Round`] asks those pods in turn, so many a
//! second over all objects, and wakes the object when the answer is news. So a pod that answers slowly, without end or not at all costs its own
//! object an answer and the others nothing, and figures lead to no more status writes a second than there are asks. What a pod has said is
//! forgotten with the pod.

mod get;
mod round;

use std::collections::BTreeMap;
use std::time::Duration;

use carryon_crds::wire::{FetchReport, GatewayStatus, ModelDescription, Progress};
use k8s_openapi::api::core::v1::Pod;

pub use self::get::{Http, MOST_BYTES, Unheard};
pub use self::round::{Pace, Round};
use super::key::Kind;

/// Longest wait for an answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Trainers, and pods that fetch their model: twenty a second, each of them every five seconds at most.
const TRAINERS: Pace = Pace { between: Duration::from_millis(50), again: Some(Duration::from_secs(5)) };
/// Pools: a container's model never changes, so there is one answer to wait for.
const POOLS: Pace = Pace { between: Duration::from_millis(10), again: None };
/// Gateways, whose keys change when a kubelet renews a Secret.
const GATEWAYS: Pace = Pace { between: Duration::from_millis(50), again: Some(Duration::from_secs(15)) };

/// Asks the pods that reconciles want to hear of.
pub struct Ask {
    models: Round<ModelDescription>,
    progress: Round<Progress>,
    gateways: Round<GatewayStatus>,
    fetches: Round<FetchReport>,
}

impl Ask {
    /// Nobody asked yet.
    pub fn new() -> reqwest::Result<Self> {
        let http = Http::new(PATIENCE)?;
        Ok(Self {
            models: Round::new(http.clone(), "/v1/model", POOLS),
            progress: Round::new(http.clone(), "/progress", TRAINERS),
            gateways: Round::new(http.clone(), "/status", GATEWAYS),
            fetches: Round::of_fetches(http, "/progress", TRAINERS),
        })
    }

    /// The models of pods, by pod name; those not known yet are left out, and their pool is woken when they are.
    pub fn models<'a>(&self, pods: impl Iterator<Item = &'a Pod>) -> BTreeMap<String, ModelDescription> {
        self.models.hear_all(pods)
    }

    /// What pods that fetch their model said last of that, by pod name; their pool is woken when one says something else.
    pub fn fetches<'a>(&self, pods: impl Iterator<Item = &'a Pod>) -> BTreeMap<String, FetchReport> {
        self.fetches.hear_all(pods)
    }

    /// What gateways said last, by pod name; their deployment is woken when one says something else.
    pub fn gateways<'a>(&self, pods: impl Iterator<Item = &'a Pod>) -> BTreeMap<String, GatewayStatus> {
        self.gateways.hear_all(pods)
    }

    /// What a trainer said last; its job is woken when it says something else.
    pub fn progress(&self, pod: &Pod) -> Option<Progress> {
        self.progress.hear(pod)
    }

    /// Asks without end. `lives(namespace, name, uid)` says whether a pod is still there, `fetching` whether it fetches its model;
    /// `news(kind, namespace, name)` wakes its object.
    pub async fn run(
        &self,
        lives: impl Fn(&str, &str, &str) -> bool,
        fetching: impl Fn(&str, &str, &str) -> bool,
        news: impl Fn(Kind, &str, &str),
    ) {
        let of = |kind: Kind| {
            let news = &news;
            move |namespace: &str, name: &str| news(kind, namespace, name)
        };
        let (pools, jobs) = (self.models.run(&lives, of(Kind::Pool)), self.progress.run(&lives, of(Kind::Job)));
        futures::join!(pools, jobs, self.fetches.run(&fetching, of(Kind::Pool)), self.gateways.run(&lives, of(Kind::Deployment)));
    }
}
