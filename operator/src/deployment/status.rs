//! A deployment's status: what its gateway does, in ordered checks.

use carryon_crds::condition::types;
use carryon_crds::{CarryOnDeployment, CarryOnDeploymentStatus, condition, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Applied, Observed, Validated};
use crate::shared::Refusal;
use crate::shared::kstatus::Standing;
use crate::shared::meta::Owner;
use crate::shared::trouble;

/// The status of `deployment` after `outcome`.
pub fn status(
    deployment: &CarryOnDeployment,
    outcome: Result<(&Validated, &Applied), &Refusal>,
    observed: &Observed,
    now: &Time,
) -> CarryOnDeploymentStatus {
    let owner = Owner::of(deployment, "gateway");
    let previous = deployment.status.clone().unwrap_or_default();
    let (standing, image, stable) = match outcome {
        Err(refusal) => (Standing::from(refusal), previous.image, previous.stable),
        Ok((validated, applied)) => {
            let image = deployment.spec.gateway.image.is_none().then(|| validated.image.clone()).or(previous.image);
            (standing(validated, applied, observed), image, Some(validated.head.clone()))
        }
    };
    // What was there before a refusal is there still.
    let (replicas, ready_replicas) = match outcome.map(|(_, applied)| applied.deployment.status.as_ref()) {
        Ok(status) => {
            (status.and_then(|status| status.replicas).unwrap_or(0), status.and_then(|status| status.ready_replicas).unwrap_or(0))
        }
        Err(_) => (previous.replicas, previous.ready_replicas),
    };
    let in_cluster = || names::service_url(&names::gateway(&owner.name), &owner.namespace, names::GATEWAY_PORT);
    CarryOnDeploymentStatus {
        conditions: condition::set(&previous.conditions, &standing.verdicts(), deployment.metadata.generation, now),
        observed_generation: deployment.metadata.generation,
        replicas,
        ready_replicas,
        selector: Some(owner.selector_text()),
        url: outcome.is_ok().then(|| format!("{}/v1", observed.url.clone().unwrap_or_else(in_cluster))),
        image,
        stable,
    }
}

fn standing(validated: &Validated, applied: &Applied, observed: &Observed) -> Standing {
    let deployment = &applied.deployment;
    let wanted = deployment.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(1);
    let status = deployment.status.clone().unwrap_or_default();
    let ready = status.ready_replicas.unwrap_or(0);
    if wanted == 0 && status.replicas.unwrap_or(0) == 0 {
        return Standing::current("ScaledToZero", "spec.replicas is 0: no gateway runs");
    }
    if ready < wanted {
        return match trouble::find(&observed.pods) {
            Some(trouble) if trouble.permanent && ready == 0 => Standing::stalled(trouble.reason, trouble.message),
            Some(trouble) => Standing::in_progress(trouble.reason, format!("{ready} of {wanted} gateways are ready; {}", trouble.message)),
            None => Standing::in_progress("GatewayStarting", starting(ready, wanted, validated, observed)),
        };
    }
    let updated = status.updated_replicas.unwrap_or(0);
    let seen = status.observed_generation.unwrap_or(0) >= deployment.metadata.generation.unwrap_or(0);
    if updated < wanted || status.replicas.unwrap_or(0) != wanted || !seen {
        return Standing::in_progress("GatewayRolling", format!("{updated} of {wanted} gateways run the present configuration"));
    }
    Standing::current("Serving", format!("{ready} of {wanted} gateways serve {}", validated.config.served_model_name))
}

/// A gateway is not ready before its pool is: then the pool's own message says more.
fn starting(ready: i32, wanted: i32, validated: &Validated, observed: &Observed) -> String {
    let status = observed.pool.as_ref().and_then(|pool| pool.status.as_ref());
    let conditions = status.map_or(&[][..], |status| &status.conditions);
    let why = match conditions.iter().find(|condition| condition.type_ == types::READY && condition.status != "True") {
        Some(condition) => format!("BaseModelPool {}/{} is not ready: {}", validated.owner.namespace, validated.pool, condition.message),
        None => "the others push the head".to_owned(),
    };
    format!("{ready} of {wanted} gateways are ready; {why}")
}
