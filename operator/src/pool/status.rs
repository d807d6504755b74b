//! A pool's status: what its pods do, in ordered checks.

use carryon_crds::condition::Verdict;
use carryon_crds::condition::types::{NO_NODE_FITS, READY};
use carryon_crds::pool::{DownloadStatus, ModelStatus};
use carryon_crds::wire::ModelDescription;
use carryon_crds::{BaseModelPool, BaseModelPoolStatus, condition, names};
use k8s_openapi::api::apps::v1::StatefulSet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::{Applied, Observed, Validated, capacity, download};
use crate::shared::Outcome;
use crate::shared::kstatus::Standing;
use crate::shared::meta::Owner;
use crate::shared::pods::progress_deadline;
use crate::shared::rollout::{Counts, Obstacle, available, counted};
use crate::shared::text::bounded;
use crate::shared::trouble::{Trouble, is_ready, silent};

/// Reason of a pool whose pods loaded different models.
const MODELS_DIFFER: &str = "ModelsDiffer";
/// Characters of a model's name, which is the checkpoint's own.
const NAME: usize = 253;

/// The status of `pool` after `outcome`.
pub fn status(pool: &BaseModelPool, outcome: &Outcome<Validated, Applied>, observed: &Observed, now: &Time) -> BaseModelPoolStatus {
    let owner = Owner::of(pool, "pool");
    let previous = pool.status.clone().unwrap_or_default();
    // What was said of the pods' models stands until all of them are heard: an operator that has only started has heard none.
    let unheard = observed.pods.iter().any(|pod| is_ready(pod) && !observed.models.contains_key(&pod.name_any()));
    let heard = observed.models.values().next().map(model_status);
    let mut model = if unheard { previous.model.clone().or(heard) } else { heard.or(previous.model.clone()) };
    let download = download::download(pool, observed);
    model.iter_mut().for_each(|model| model.revision = download.as_ref().and_then(|download| download.revision.clone()));
    let differ = disagreement(observed).or_else(|| differed(&previous).filter(|_| unheard));
    let (standing, image, waiting_since, (replicas, ready_replicas, desired_replicas)) = match outcome {
        Err(refusal) => {
            let (replicas, ready) = counted(&observed.pods);
            (Standing::from(refusal), None, None, (replicas, ready, previous.desired_replicas))
        }
        Ok((validated, applied)) => {
            let image = pool.spec.server.image.is_none().then(|| validated.basis.image.clone());
            let counts = Counts::of_stateful_set(&applied.stateful_set);
            let bytes = |download: &Option<DownloadStatus>| download.as_ref().map_or(0, |download| download.bytes);
            let moves = bytes(&download) > bytes(&previous.download);
            let since = waiting_since(pool, &previous, &counts, moves, now);
            let patience = i64::from(progress_deadline(&pool.spec.server));
            let late = since.as_ref().filter(|since| now.0.as_second() - since.0.as_second() >= patience);
            let set = &applied.stateful_set;
            let known = download::trouble(pool, observed, set.spec.as_ref().map(|spec| &spec.template));
            let standing = standing(set, observed, model.as_ref(), differ, known, late);
            (standing, image, since, (counts.replicas, counts.ready, Some(counts.wanted)))
        }
    };
    let mut verdicts = standing.verdicts();
    verdicts.push(available("pods", ready_replicas));
    let shortage = observed.nodes.as_ref().and_then(|nodes| capacity::shortage(&pool.spec.server, nodes));
    verdicts.extend(shortage.map(|message| Verdict::yes(NO_NODE_FITS, "InsufficientCapacity", message)));
    BaseModelPoolStatus {
        conditions: condition::set(&previous.conditions, &verdicts, pool.metadata.generation, now),
        observed_generation: pool.metadata.generation,
        replicas,
        ready_replicas,
        desired_replicas,
        waiting_since,
        selector: Some(owner.selector_text()),
        model,
        download,
        worker_image: image.or(previous.worker_image),
        endpoint: Some(names::service_url(&names::pool(&owner.name), &owner.namespace, names::POOL_PORT)),
    }
}

/// The time from which the deadline counts: each pod that becomes ready, each byte that is fetched (`moves`), and each other spec, gives it anew.
fn waiting_since(pool: &BaseModelPool, previous: &BaseModelPoolStatus, counts: &Counts, moves: bool, now: &Time) -> Option<Time> {
    let same_spec = previous.observed_generation == pool.metadata.generation;
    let since = previous.waiting_since.clone().filter(|_| same_spec && !moves && counts.ready <= previous.ready_replicas);
    (!counts.is_settled() && !counts.is_zero()).then(|| since.unwrap_or_else(|| now.clone()))
}

fn standing(
    set: &StatefulSet,
    observed: &Observed,
    model: Option<&ModelStatus>,
    differ: Option<String>,
    known: Option<Trouble>,
    late: Option<&Time>,
) -> Standing {
    let counts = Counts::of_stateful_set(set);
    let Counts { wanted, ready, updated, .. } = counts;
    if counts.is_zero() {
        return Standing::current("ScaledToZero", "spec.replicas is 0: no pod runs");
    }
    if let Some(message) = differ {
        return Standing::stalled(MODELS_DIFFER, message);
    }
    if counts.is_settled() {
        return match model {
            Some(model) => Standing::current("PodsReady", format!("{ready} of {wanted} pods serve {}", model.name)),
            None => Standing::in_progress("ModelUnknown", "the pods are ready; waiting for one to describe its model"),
        };
    }
    let obstacle = Obstacle {
        what: "pods",
        counts,
        pods: &observed.pods,
        template: set.spec.as_ref().map(|spec| &spec.template),
        known,
        refused: observed.refused.as_deref().filter(|_| counts.lacks_pods()),
        overdue: late.map(|since| format!("none has become ready since {:.0}", since.0)),
    };
    obstacle.standing().unwrap_or_else(|| match (ready < wanted, silent(&observed.pods)) {
        (true, Some(silent)) => Standing::in_progress("PodsNotAnswering", format!("{ready} of {wanted} pods are ready; {silent}")),
        (true, None) => Standing::in_progress("PodsStarting", format!("{ready} of {wanted} pods are ready; the others load the model")),
        (false, _) => Standing::in_progress("PodsRolling", format!("{updated} of {wanted} pods run the present configuration")),
    })
}

/// Two pods whose models are not the same.
fn disagreement(observed: &Observed) -> Option<String> {
    let (one, model) = observed.models.iter().next()?;
    let (other, _) = observed.models.iter().find(|(_, other)| other.identity != model.identity)?;
    Some(format!("pods {one} and {other} loaded different models: make the volume's content the same and restart them"))
}

/// What the status says of such pods.
fn differed(previous: &BaseModelPoolStatus) -> Option<String> {
    condition::find(&previous.conditions, READY).filter(|ready| ready.reason == MODELS_DIFFER).map(|ready| ready.message.clone())
}

fn model_status(model: &ModelDescription) -> ModelStatus {
    ModelStatus {
        name: bounded(&model.name, NAME),
        digest: model.identity.weights.clone(),
        tokenizer_digest: model.identity.tokenizer.clone(),
        identity_digest: model.identity.digest(),
        hidden_size: model.hidden_size,
        layers: model.num_hidden_layers,
        vocab_size: model.vocab_size,
        revision: None,
    }
}
