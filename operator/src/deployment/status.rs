//! A deployment's status: what its gateway does, in ordered checks.

use carryon_crds::condition::types;
use carryon_crds::{CarryOnDeployment, CarryOnDeploymentStatus, condition, names};
use k8s_openapi::api::apps::v1::DeploymentCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::{Applied, Observed, Validated};
use crate::shared::Outcome;
use crate::shared::kstatus::Standing;
use crate::shared::meta::Owner;
use crate::shared::rollout::{Counts, DEADLINE_EXCEEDED, Obstacle, counted};
use crate::shared::text::{WORDS, bounded};
use crate::shared::trouble::silent;

/// The status of `deployment` after `outcome`.
pub fn status(
    deployment: &CarryOnDeployment,
    outcome: &Outcome<Validated, Applied>,
    observed: &Observed,
    now: &Time,
) -> CarryOnDeploymentStatus {
    let owner = Owner::of(deployment, "gateway");
    let previous = deployment.status.clone().unwrap_or_default();
    let in_cluster = || names::service_url(&names::gateway(&owner.name), &owner.namespace, names::GATEWAY_PORT);
    let shared = CarryOnDeploymentStatus {
        observed_generation: deployment.metadata.generation,
        selector: Some(owner.selector_text()),
        ..previous.clone()
    };
    let conditions = |standing: &Standing| condition::set(&previous.conditions, &standing.verdicts(), deployment.metadata.generation, now);
    match outcome {
        // What was there before a refusal is there still: its address, its head, its pods.
        Err(refusal) => {
            let (replicas, ready_replicas) = counted(&observed.pods);
            CarryOnDeploymentStatus { conditions: conditions(&refusal.into()), replicas, ready_replicas, ..shared }
        }
        Ok((validated, applied)) => {
            let counts = Counts::of_deployment(&applied.deployment);
            // Proven: nobody but ready pods of this head answers.
            let proven = counts.is_settled() && counts.wanted > 0;
            CarryOnDeploymentStatus {
                conditions: conditions(&standing(validated, applied, observed)),
                replicas: counts.replicas,
                ready_replicas: counts.ready,
                url: Some(format!("{}/v1", observed.url.clone().unwrap_or_else(in_cluster))),
                image: deployment.spec.gateway.image.is_none().then(|| validated.basis.image.clone()).or(previous.image.clone()),
                resolved: Some(validated.head.clone()),
                stable: if proven { Some(validated.head.clone()) } else { previous.stable.clone() },
                ..shared
            }
        }
    }
}

fn standing(validated: &Validated, applied: &Applied, observed: &Observed) -> Standing {
    let deployment = &applied.deployment;
    let counts = Counts::of_deployment(deployment);
    let Counts { wanted, ready, updated, .. } = counts;
    if counts.is_zero() {
        return Standing::current("ScaledToZero", "spec.replicas is 0: no gateway runs");
    }
    if counts.is_settled() {
        let remark = validated.key_remark.as_ref().map(|remark| format!("; {remark}")).unwrap_or_default();
        return Standing::current("Serving", format!("{ready} of {wanted} gateways serve {}{remark}", validated.config.served_model_name));
    }
    let said = |type_: &str, status: &str| {
        let conditions = deployment.status.as_ref().and_then(|status| status.conditions.as_ref());
        conditions.and_then(|conditions| conditions.iter().find(|condition| condition.type_ == type_ && condition.status == status))
    };
    let words = |condition: &DeploymentCondition| condition.message.clone().unwrap_or_default();
    let overdue = said("Progressing", "False").filter(|condition| condition.reason.as_deref() == Some(DEADLINE_EXCEEDED));
    let obstacle = Obstacle {
        what: "gateways",
        counts,
        pods: &observed.pods,
        template: deployment.spec.as_ref().map(|spec| &spec.template),
        refused: said("ReplicaFailure", "True").and_then(|condition| condition.message.as_deref()),
        overdue: overdue.map(|condition| bounded(&words(condition), WORDS)),
    };
    obstacle.standing().unwrap_or_else(|| match ready < wanted {
        true => Standing::in_progress("GatewayStarting", starting(ready, wanted, validated, observed)),
        false => Standing::in_progress("GatewayRolling", format!("{updated} of {wanted} gateways run the present configuration")),
    })
}

/// A gateway is not ready before its pool is: then the pool's own message says more.
fn starting(ready: i32, wanted: i32, validated: &Validated, observed: &Observed) -> String {
    let status = observed.pool.as_ref().and_then(|pool| pool.status.as_ref());
    let conditions = status.map_or(&[][..], |status| &status.conditions);
    let why = match condition::find(conditions, types::READY).filter(|ready| ready.status != "True") {
        Some(condition) => {
            format!("BaseModelPool {}/{} is not ready: {}", validated.basis.owner.namespace, validated.pool, condition.message)
        }
        None => silent(&observed.pods).unwrap_or_else(|| "the others push the head".to_owned()),
    };
    format!("{ready} of {wanted} gateways are ready; {why}")
}
