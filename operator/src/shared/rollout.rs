//! How far a workload is, by what its status counts and its pods say.

use carryon_crds::condition::Verdict;
use carryon_crds::condition::types::AVAILABLE;
use carryon_crds::names::CONFIG_DIGEST_ANNOTATION;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use kube::ResourceExt as _;

use super::kstatus::Standing;
use super::text::{WORDS, bounded};
use super::trouble::{self, Trouble, is_ready};

/// Reason of a workload whose pods the API server refuses.
pub const FAILED_CREATE: &str = "FailedCreate";
/// Reason of a workload that has made no progress for too long.
pub const DEADLINE_EXCEEDED: &str = "ProgressDeadlineExceeded";

/// Pods of a workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Wanted by its spec.
    pub wanted: i32,
    /// There, those of an earlier configuration included.
    pub replicas: i32,
    /// Ready.
    pub ready: i32,
    /// Of the present configuration.
    pub updated: i32,
    /// Whether its controller has seen the present spec.
    seen: bool,
}

impl Counts {
    /// Of a gateway.
    pub fn of_deployment(deployment: &Deployment) -> Self {
        let status = deployment.status.clone().unwrap_or_default();
        Self {
            wanted: deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1),
            replicas: status.replicas.unwrap_or(0),
            ready: status.ready_replicas.unwrap_or(0),
            updated: status.updated_replicas.unwrap_or(0),
            seen: status.observed_generation.unwrap_or(0) >= deployment.metadata.generation.unwrap_or(0),
        }
    }

    /// Of a pool.
    pub fn of_stateful_set(set: &StatefulSet) -> Self {
        let status = set.status.clone().unwrap_or_default();
        Self {
            wanted: set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1),
            replicas: status.replicas,
            ready: status.ready_replicas.unwrap_or(0),
            updated: status.updated_replicas.unwrap_or(0),
            seen: status.observed_generation.unwrap_or(0) >= set.metadata.generation.unwrap_or(0),
        }
    }

    /// Whether none is wanted and none is left.
    pub fn is_zero(&self) -> bool {
        self.wanted == 0 && self.replicas == 0
    }

    /// Whether all wanted pods are of the present configuration, and the only ones.
    pub fn is_rolled_out(&self) -> bool {
        self.seen && self.updated == self.wanted && self.replicas == self.wanted
    }

    /// Whether they are ready, too.
    pub fn is_settled(&self) -> bool {
        self.is_rolled_out() && self.ready == self.wanted
    }

    /// Whether its controller has seen how many are wanted and has not made so many.
    pub fn lacks_pods(&self) -> bool {
        self.seen && self.replicas < self.wanted
    }
}

/// Pods, and those that are ready: where no workload is known, as after a refusal.
pub fn counted(pods: &[Pod]) -> (i32, i32) {
    let count = |pods: usize| i32::try_from(pods).unwrap_or(i32::MAX);
    (count(pods.len()), count(pods.iter().filter(|pod| is_ready(pod)).count()))
}

/// Whether somebody answers, of whatever revision: `Available`.
pub fn available(what: &str, ready: i32) -> Verdict {
    let verdict = if ready > 0 { Verdict::yes } else { Verdict::no };
    verdict(AVAILABLE, if ready > 0 { "SomeReady" } else { "NoneReady" }, format!("{ready} {what} are ready"))
}

/// What keeps an unsettled workload of `what` from its goal, in the API's own words.
pub struct Obstacle<'a> {
    /// `pods` or `gateways`.
    pub what: &'static str,
    /// How far it is.
    pub counts: Counts,
    /// Its pods.
    pub pods: &'a [Pod],
    /// What they are made by. Those of an earlier configuration leave: their trouble is over.
    pub template: Option<&'a PodTemplateSpec>,
    /// What its own kind knows of them, which says more than their containers' states.
    pub known: Option<Trouble>,
    /// Why the API server refuses more of them.
    pub refused: Option<&'a str>,
    /// What there is to say when it has made no progress for too long.
    pub overdue: Option<String>,
}

impl Obstacle<'_> {
    /// Where the object stands for it; none when there is none.
    pub fn standing(&self) -> Option<Standing> {
        let Counts { wanted, ready, .. } = self.counts;
        let what = self.what;
        let tell = |words: &str| {
            if ready < wanted {
                format!("{ready} of {wanted} {what} are ready; {words}")
            } else {
                format!("the {what} of before still serve; {words}")
            }
        };
        if let Some(words) = self.refused {
            return Some(Standing::stalled(FAILED_CREATE, tell(&format!("no pod can be created: {}", refusal(words)))));
        }
        let found = || trouble::find(self.pods.iter().filter(|pod| !is_earlier(pod, self.template)));
        let trouble = self.known.clone().or_else(found);
        if let Some(trouble) = trouble.as_ref().filter(|trouble| trouble.permanent) {
            return Some(Standing::stalled(trouble.reason, tell(&trouble.message)));
        }
        if let Some(overdue) = &self.overdue {
            let words = trouble.map_or_else(|| overdue.clone(), |trouble| format!("{overdue}; {}", trouble.message));
            return Some(Standing::stalled(DEADLINE_EXCEEDED, tell(&words)));
        }
        trouble.map(|trouble| Standing::in_progress(trouble.reason, tell(&trouble.message)))
    }
}

/// Whether a pod is of a configuration before that of `template`.
pub fn is_earlier(pod: &Pod, template: Option<&PodTemplateSpec>) -> bool {
    let metadata = template.and_then(|template| template.metadata.as_ref());
    let present = metadata.and_then(|metadata| metadata.annotations.as_ref()?.get(CONFIG_DIGEST_ANNOTATION));
    pod.annotations().get(CONFIG_DIGEST_ANNOTATION).is_some_and(|digest| Some(digest) != present)
}

/// The reason in the API server's refusal of a pod: what comes before it names the pod, each time another one.
pub fn refusal(words: &str) -> String {
    let reason = [" is forbidden: ", " is invalid: "].iter().find_map(|said| words.split_once(said)).map_or(words, |(_, reason)| reason);
    bounded(reason.trim_start_matches(": "), WORDS)
}
