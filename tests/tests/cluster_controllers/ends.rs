//! How objects go: deletions of three sorts, the end of a finished job's life.

use carryon_crds::condition::types::READY;
use carryon_crds::deployment::ServedHead;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob, names};
use carryon_tests::cluster::Object;
use carryon_tests::cluster::hollow::{Fate, model};
use carryon_tests::example;
use carryon_tests::operator::ACCOUNT;
use k8s_openapi::api::apps::v1::{Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::ResourceExt as _;
use kube::api::{DeleteParams, PropagationPolicy};
use serde_json::json;

use super::world::World;

fn delete<K: Object>(world: &World, space: &str, name: &str, propagation: PropagationPolicy) {
    let parameters = DeleteParams { propagation_policy: Some(propagation), ..DeleteParams::default() };
    world.cluster.block_on(world.api::<K>(space).delete(name, &parameters)).unwrap();
}

fn delete_all(world: &World, space: &str, propagation: PropagationPolicy) {
    delete::<BaseModelPool>(world, space, "smollm2", propagation.clone());
    delete::<CarryOnJob>(world, space, "quickstart", propagation.clone());
    delete::<CarryOnDeployment>(world, space, "quickstart", propagation);
}

fn until_empty<K: Object>(world: &World, space: &str) {
    let api = world.api::<K>(space);
    let what = format!("no {} is left in {space}", K::kind(&()));
    world.cluster.eventually(&what, async || api.list(&Default::default()).await.unwrap().items.is_empty().then_some(()));
}

/// What the operator made in a namespace so far.
fn made(world: &World, space: &str) -> usize {
    let audit = world.cluster.audit();
    audit
        .iter()
        .filter(|entry| entry.user == ACCOUNT && entry.namespace == space && entry.code == 201 && entry.group != "events.k8s.io")
        .count()
}

#[test]
fn children_go_with_their_owner_or_stay_when_orphaned_and_nothing_is_made_meanwhile() {
    let Some(world) = World::within(&["foreground", "background", "orphan"]) else { return };
    let _operator = world.operate();
    let sorts = [("foreground", PropagationPolicy::Foreground), ("background", PropagationPolicy::Background)];
    for (space, propagation) in sorts {
        // The trainer still runs when all is deleted.
        world.hollow.fate(space, "quickstart", Fate::Runs);
        world.quickstart(space);
        world.until::<CarryOnJob>(space, "quickstart", READY, "True", "Running");
        let before = made(&world, space);
        delete_all(&world, space, propagation);
        until_empty::<BaseModelPool>(&world, space);
        until_empty::<CarryOnJob>(&world, space);
        until_empty::<CarryOnDeployment>(&world, space);
        until_empty::<StatefulSet>(&world, space);
        until_empty::<Job>(&world, space);
        until_empty::<Service>(&world, space);
        until_empty::<Pod>(&world, space);
        assert_eq!(made(&world, space), before, "{space}: something was made while its owner was being deleted");
    }

    world.quickstart("orphan");
    world.until_served("orphan");
    delete_all(&world, "orphan", PropagationPolicy::Orphan);
    until_empty::<BaseModelPool>(&world, "orphan");
    until_empty::<CarryOnDeployment>(&world, "orphan");
    let set: StatefulSet = world.get("orphan", "smollm2-pool");
    let gateway: Deployment = world.get("orphan", "quickstart-gateway");
    assert!(set.owner_references().is_empty() && gateway.owner_references().is_empty());
    // The same manifests again take over what was left: no pod is made anew.
    world.cluster.apply("orphan", &example("quickstart/pool.yaml"));
    let pool = world.until::<BaseModelPool>("orphan", "smollm2", READY, "True", "PodsReady");
    let adopted: StatefulSet = world.get("orphan", "smollm2-pool");
    assert_eq!((adopted.uid(), &adopted.owner_references()[0].uid), (set.uid(), &pool.uid().unwrap()));
    assert_eq!(adopted.metadata.generation, set.metadata.generation);
    world.no_refused_writes();
}

/// What served when all gateways were last ready.
fn stable(deployment: &CarryOnDeployment) -> Option<ServedHead> {
    deployment.status.as_ref()?.heads[0].stable.clone()
}

#[test]
fn a_head_outlives_its_job_and_a_job_that_is_served_outlives_its_time() {
    let Some(world) = World::within(&["heads", "time"]) else { return };
    let _operator = world.operate();
    world.quickstart("heads");
    let served = stable(&world.until_served("heads")).unwrap();
    let over = world.patch::<CarryOnJob>("heads", "quickstart", json!({ "spec": { "ttlSecondsAfterFinished": 0 } }));
    // A look that finds its time over either deletes the job or says which generation it saw: this one has looked, and kept it.
    let kept = world.until_is::<CarryOnJob>("heads", "quickstart", "is looked at when its time is over", &|job| {
        job.status.as_ref().is_some_and(|status| status.observed_generation == over.metadata.generation)
    });
    assert_eq!(kept.metadata.deletion_timestamp, None, "a job whose head is served is kept");

    delete::<CarryOnJob>(&world, "heads", "quickstart", PropagationPolicy::Background);
    until_empty::<CarryOnJob>(&world, "heads");
    until_empty::<Job>(&world, "heads");
    // A gateway that is made anew serves the same head, and nothing trains it again.
    delete::<Deployment>(&world, "heads", "quickstart-gateway", PropagationPolicy::Background);
    world.cluster.kubectl(&["-n", "heads", "scale", "carryondeployment/quickstart", "--replicas=2"]);
    let still = world.until_is::<CarryOnDeployment>("heads", "quickstart", "serves twice", &|deployment| {
        deployment.status.as_ref().is_some_and(|status| status.ready_replicas == 2)
    });
    assert_eq!(stable(&still).unwrap(), served);
    world.quiet();
    assert!(world.list::<Job>("heads").is_empty() && world.list::<CarryOnJob>("heads").is_empty());

    // Nobody serves this one: its time comes, with all that it had.
    world.volumes("time");
    world.cluster.apply("time", &example("quickstart/pool.yaml"));
    world.cluster.apply("time", &example("quickstart/job.yaml"));
    world.until::<CarryOnJob>("time", "quickstart", READY, "True", "Complete");
    world.patch::<CarryOnJob>("time", "quickstart", json!({ "spec": { "ttlSecondsAfterFinished": 1 } }));
    until_empty::<CarryOnJob>(&world, "time");
    until_empty::<Job>(&world, "time");
    world.no_refused_writes();
}

#[test]
fn a_head_serves_until_the_job_made_anew_under_its_name_has_written_another() {
    let Some(world) = World::within(&["lesson"]) else { return };
    let _operator = world.operate();
    let job = example("quickstart/job.yaml").replace("name: quickstart\n", "name: lesson\n");
    let deployment = example("quickstart/deployment.yaml").replace("jobRef:\n        name: quickstart", "jobRef:\n        name: lesson");
    world.volumes("lesson");
    for manifest in [&example("quickstart/pool.yaml"), &job, &deployment] {
        world.cluster.apply("lesson", manifest);
    }
    let first = stable(&world.until_served("lesson")).unwrap();
    assert_eq!(first.job_uid, world.get::<CarryOnJob>("lesson", "lesson").uid());

    world.hollow.fate("lesson", "lesson", Fate::Runs);
    delete::<CarryOnJob>(&world, "lesson", "lesson", PropagationPolicy::Background);
    until_empty::<CarryOnJob>(&world, "lesson");
    until_empty::<Job>(&world, "lesson");
    world.cluster.apply("lesson", &job);
    let second = world.until::<CarryOnJob>("lesson", "lesson", READY, "True", "Running");
    assert_eq!(stable(&world.until_served("lesson")).unwrap(), first, "the new job has written nothing yet");

    let digest = format!("sha256:{}", "5f".repeat(32));
    world.hollow.fate("lesson", "lesson", Fate::wrote(&digest, &model().identity.digest()));
    let served = world.until_is::<CarryOnDeployment>("lesson", "quickstart", "serves the second head", &|deployment| {
        stable(deployment).is_some_and(|stable| stable.digest == digest)
    });
    let stable = stable(&served).unwrap();
    assert_eq!(stable.job_uid, second.uid());
    let (_, folder) = names::parse_claim_uri(&stable.uri).unwrap();
    let gateway = serde_json::to_string(&world.get::<Deployment>("lesson", "quickstart-gateway").spec).unwrap();
    assert!(folder.ends_with(&names::artifact_folder(&digest)) && gateway.contains(folder), "{gateway}");
    world.no_refused_writes();
}
