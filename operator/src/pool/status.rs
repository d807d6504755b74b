//! A pool's status: what its pods do, in ordered checks.

use carryon_crds::condition::Verdict;
use carryon_crds::condition::types::NO_NODE_FITS;
use carryon_crds::pool::ModelStatus;
use carryon_crds::wire::ModelDescription;
use carryon_crds::{BaseModelPool, BaseModelPoolStatus, condition, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Applied, Observed, Validated, capacity};
use crate::shared::Refusal;
use crate::shared::kstatus::Standing;
use crate::shared::meta::Owner;
use crate::shared::trouble;

/// The status of `pool` after `outcome`.
pub fn status(
    pool: &BaseModelPool,
    outcome: Result<(&Validated, &Applied), &Refusal>,
    observed: &Observed,
    now: &Time,
) -> BaseModelPoolStatus {
    let owner = Owner::of(pool, "pool");
    let previous = pool.status.clone().unwrap_or_default();
    let model = observed.models.values().next().map(model_status).or(previous.model);
    let (standing, image) = match outcome {
        Err(refusal) => (Standing::from(refusal), previous.image),
        Ok((validated, applied)) => {
            let image = pool.spec.server.image.is_none().then(|| validated.image.clone()).or(previous.image);
            (standing(applied, observed, model.as_ref()), image)
        }
    };
    let mut verdicts = standing.verdicts();
    let shortage = observed.nodes.as_ref().and_then(|nodes| capacity::shortage(&pool.spec.server, nodes));
    verdicts.extend(shortage.map(|message| Verdict::yes(NO_NODE_FITS, "InsufficientCapacity", message)));
    // What was there before a refusal is there still.
    let (replicas, ready_replicas) = match outcome.map(|(_, applied)| applied.stateful_set.status.as_ref()) {
        Ok(status) => (status.map_or(0, |status| status.replicas), status.and_then(|status| status.ready_replicas).unwrap_or(0)),
        Err(_) => (previous.replicas, previous.ready_replicas),
    };
    BaseModelPoolStatus {
        conditions: condition::set(&previous.conditions, &verdicts, pool.metadata.generation, now),
        observed_generation: pool.metadata.generation,
        replicas,
        ready_replicas,
        selector: Some(owner.selector_text()),
        model,
        image,
        endpoint: Some(names::service_url(&names::pool(&owner.name), &owner.namespace, names::POOL_PORT)),
    }
}

fn standing(applied: &Applied, observed: &Observed, model: Option<&ModelStatus>) -> Standing {
    let set = &applied.stateful_set;
    let wanted = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let status = set.status.clone().unwrap_or_default();
    let ready = status.ready_replicas.unwrap_or(0);
    if wanted == 0 && status.replicas == 0 {
        return Standing::current("ScaledToZero", "spec.replicas is 0: no pod runs");
    }
    if let Some((one, other)) = disagreement(observed) {
        let message = format!("pods {one} and {other} loaded different models: make the volume's content the same and restart them");
        return Standing::stalled("ModelsDiffer", message);
    }
    if ready < wanted {
        return match trouble::find(&observed.pods) {
            Some(trouble) if trouble.permanent && ready == 0 => Standing::stalled(trouble.reason, trouble.message),
            Some(trouble) => Standing::in_progress(trouble.reason, format!("{ready} of {wanted} pods are ready; {}", trouble.message)),
            None => Standing::in_progress("PodsStarting", format!("{ready} of {wanted} pods are ready; the others load the model")),
        };
    }
    let settled = status.updated_replicas.unwrap_or(0) >= wanted && status.replicas == wanted;
    let observed_generation = status.observed_generation.unwrap_or(0) >= set.metadata.generation.unwrap_or(0);
    if !settled || !observed_generation {
        let updated = status.updated_replicas.unwrap_or(0);
        return Standing::in_progress("PodsRolling", format!("{updated} of {wanted} pods run the present configuration"));
    }
    match model {
        Some(model) => Standing::current("PodsReady", format!("{ready} of {wanted} pods serve {}", model.name)),
        None => Standing::in_progress("ModelUnknown", "the pods are ready; waiting for one to describe its model"),
    }
}

/// Two pods whose models are not the same.
fn disagreement(observed: &Observed) -> Option<(&str, &str)> {
    let (first, model) = observed.models.iter().next()?;
    let (other, _) = observed.models.iter().find(|(_, other)| other.identity != model.identity)?;
    Some((first, other))
}

fn model_status(model: &ModelDescription) -> ModelStatus {
    ModelStatus {
        name: model.name.clone(),
        digest: model.identity.weights.clone(),
        tokenizer_digest: model.identity.tokenizer.clone(),
        identity_digest: model.identity.digest(),
        hidden_size: model.hidden_size,
        layers: model.num_hidden_layers,
        vocab_size: model.vocab_size,
    }
}
