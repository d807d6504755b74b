//! A deployment's status: what its gateway does, in ordered checks.

use carryon_crds::condition::{Verdict, types};
use carryon_crds::deployment::HeadStatus;
use carryon_crds::{CarryOnDeployment, CarryOnDeploymentStatus, condition, names};
use k8s_openapi::api::apps::v1::DeploymentCondition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::heads::status_of;
use super::{Applied, Observed, Validated, keys};
use crate::shared::Outcome;
use crate::shared::kstatus::Standing;
use crate::shared::meta::Owner;
use crate::shared::rollout::{Counts, DEADLINE_EXCEEDED, Obstacle, available, counted};
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
    let generation = deployment.metadata.generation;
    let conditions = |standing: &Standing, ready: i32| {
        let verdicts: Vec<Verdict> = standing.verdicts().into_iter().chain([available("gateways", ready)]).collect();
        condition::set(&previous.conditions, &verdicts, generation, now)
    };
    let head = |name: &str, standing: &Standing| {
        let before = status_of(deployment, name).cloned().unwrap_or_default();
        let conditions = condition::set(&before.conditions, &standing.verdicts(), generation, now);
        HeadStatus { name: name.to_owned(), conditions, ..before }
    };
    match outcome {
        // What was there before a refusal is there still: its address, its heads, its pods.
        Err(refusal) => {
            let (replicas, ready_replicas) = counted(&observed.pods);
            let heads = deployment.spec.heads.iter().map(|entry| head(&entry.name, &refusal.into())).collect();
            CarryOnDeploymentStatus { conditions: conditions(&refusal.into(), ready_replicas), replicas, ready_replicas, heads, ..shared }
        }
        Ok((validated, applied)) => {
            let counts = Counts::of_deployment(&applied.deployment);
            // Proven: nobody but ready pods of these heads answers.
            let proven = counts.is_settled() && counts.wanted > 0;
            let image = deployment.spec.gateway.image.is_none().then(|| validated.basis.image.clone());
            let gateways = standing(validated, applied, observed);
            let heads = validated.heads.iter().map(|entry| {
                let before = head(&entry.name, &entry.resolved.as_ref().err().map_or_else(|| gateways.clone(), Standing::from));
                let served = entry.served.as_ref().map(|served| served.head.clone());
                HeadStatus { resolved: entry.resolved.clone().ok(), stable: if proven { served } else { before.stable.clone() }, ..before }
            });
            CarryOnDeploymentStatus {
                conditions: conditions(&whole(validated, gateways.clone()), counts.ready),
                replicas: counts.replicas,
                ready_replicas: counts.ready,
                desired_replicas: Some(counts.wanted),
                url: Some(format!("{}/v1", observed.url.clone().unwrap_or_else(in_cluster))),
                worker_image: image.or_else(|| previous.worker_image.clone()),
                heads: heads.collect(),
                ..shared
            }
        }
    }
}

/// Where the deployment stands: with its gateways, or with the first of its heads that they cannot serve as the spec has it.
fn whole(validated: &Validated, gateways: Standing) -> Standing {
    let refused = validated.heads.iter().find_map(|entry| entry.resolved.as_ref().err());
    match refused {
        Some(refusal) if gateways.is_current() => Standing::from(refusal),
        _ => gateways,
    }
}

fn standing(validated: &Validated, applied: &Applied, observed: &Observed) -> Standing {
    let deployment = &applied.deployment;
    let counts = Counts::of_deployment(deployment);
    let Counts { wanted, ready, updated, .. } = counts;
    if counts.is_zero() {
        return Standing::current("ScaledToZero", "spec.replicas is 0: no gateway runs");
    }
    let remarks = match keys::said(validated, deployment, observed) {
        Ok(remarks) => remarks,
        Err(refusal) => return Standing::from(&refusal),
    };
    if counts.is_settled() {
        let models: Vec<&str> = validated.config.heads.iter().map(|head| head.served_model_name.as_str()).collect();
        let said = [format!("{ready} of {wanted} gateways serve {}", models.join(", "))].into_iter().chain(remarks);
        return Standing::current("Serving", said.collect::<Vec<_>>().join("; "));
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
        known: None,
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
    let found = std::iter::once(observed.pool.as_ref()).chain(observed.other_pools.iter().map(Option::as_ref));
    let unready = validated.pools.iter().zip(found).find_map(|(path, pool)| {
        let conditions = &pool?.status.as_ref()?.conditions;
        Some((path, condition::find(conditions, types::READY).filter(|ready| ready.status != "True")?))
    });
    let why = match unready {
        Some((path, condition)) => format!("BaseModelPool {path} is not ready: {}", condition.message),
        None => silent(&observed.pods).unwrap_or_else(|| "the others push the head".to_owned()),
    };
    format!("{ready} of {wanted} gateways are ready; {why}")
}
