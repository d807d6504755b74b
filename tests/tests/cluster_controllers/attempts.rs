//! Attempts that are deleted, orphaned, swept away by a policy, taken over by a queue, or restored without a status.

use carryon_crds::condition::types::{COMPLETE, FAILED, READY, STALLED, SUSPENDED};
use carryon_crds::job::AttemptResult;
use carryon_crds::{CarryOnJob, CarryOnJobStatus, names};
use carryon_tests::cluster::Object;
use carryon_tests::cluster::hollow::{Fate, model};
use carryon_tests::example;
use carryon_tests::operator::Operator;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod};
use k8s_openapi::api::rbac::v1::ClusterRole;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, ListParams, ObjectMeta, Patch, PatchParams, PostParams, PropagationPolicy};
use serde_json::json;

use super::world::World;

fn delete<K: Object>(world: &World, space: &str, name: &str, propagation: PropagationPolicy) {
    let parameters = DeleteParams { propagation_policy: Some(propagation), ..DeleteParams::default() };
    world.cluster.block_on(world.api::<K>(space).delete(name, &parameters)).unwrap();
}

fn status(world: &World, space: &str) -> CarryOnJobStatus {
    world.get::<CarryOnJob>(space, "quickstart").status.unwrap()
}

fn complete() -> Fate {
    Fate::complete(&model().identity.digest())
}

/// Pool and job of the quick start, whose trainer runs on a node.
fn train(world: &World, space: &str) {
    world.hollow.fate(space, "quickstart", Fate::Lingers);
    world.volumes(space);
    world.cluster.apply(space, &example("quickstart/pool.yaml"));
    world.cluster.apply(space, &example("quickstart/job.yaml"));
    world.until::<CarryOnJob>(space, "quickstart", READY, "True", "Running");
}

#[test]
fn a_batch_job_that_is_deleted_is_followed_when_its_pod_has_ended() {
    let Some(world) = World::within(&["ending"]) else { return };
    let _operator = world.operate();
    train(&world, "ending");
    delete::<Job>(&world, "ending", "quickstart-1", PropagationPolicy::Background);
    let waits = world.until::<CarryOnJob>("ending", "quickstart", READY, "False", "OutputInUse");
    let message = super::world::Conditions::message(&waits, READY);
    assert!(message.contains(" of attempt 1 on node hollow "), "{message}");
    assert!(world.list::<Job>("ending").is_empty());
    world.hollow.fate("ending", "quickstart", Fate::Ends(75, "checkpointed".to_owned()));
    world.until_is::<Job>("ending", "quickstart-2", "is made", &|_| true);
    world.hollow.fate("ending", "quickstart", complete());
    world.until::<CarryOnJob>("ending", "quickstart", COMPLETE, "True", "Complete");
    let status = status(&world, "ending");
    let first = &status.attempts[0];
    assert_eq!((first.result, first.exit_code, status.failures), (Some(AttemptResult::Resumable), Some(75), 0));
    world.no_refused_writes();
}

#[test]
fn no_end_is_lost_to_a_policy_that_removes_finished_batch_jobs_at_once() {
    let Some(world) = World::within(&["swept", "refused"]) else { return };
    for (space, fate) in [("swept", complete()), ("refused", Fate::Ends(65, "train.jsonl, line 3: no text".to_owned()))] {
        let operator = Operator::start(&world.cluster, Some(space));
        train(&world, space);
        world.patch::<Job>(space, "quickstart-1", json!({ "spec": { "ttlSecondsAfterFinished": 0 } }));
        world.quiet();
        // Nobody looks while it ends and is removed.
        drop(operator);
        world.hollow.fate(space, "quickstart", fate);
        let (jobs, pods) = (world.api::<Job>(space), world.api::<Pod>(space));
        let trainers = ListParams::default().labels("app.kubernetes.io/component=trainer");
        world.cluster.eventually("the batch Job and its pod are on their way", async || {
            let job = jobs.get_opt("quickstart-1").await.unwrap();
            let pods = pods.list(&trainers).await.unwrap().items;
            let leaves = |metadata: &ObjectMeta| metadata.deletion_timestamp.is_some();
            (job.is_none_or(|job| leaves(&job.metadata)) && pods.iter().all(|pod| leaves(&pod.metadata))).then_some(())
        });
        let _operator = Operator::start(&world.cluster, Some(space));
        let type_ = if space == "swept" { COMPLETE } else { FAILED };
        let reason = if space == "swept" { "Complete" } else { "DataRefused" };
        world.until::<CarryOnJob>(space, "quickstart", type_, "True", reason);
        let status = status(&world, space);
        assert_eq!((status.attempt, status.artifact.is_some()), (1, space == "swept"));
        let gone = async || pods.list(&trainers).await.unwrap().items.is_empty().then_some(());
        world.cluster.eventually("nothing holds the pod any more", gone);
    }
    world.no_refused_writes();
}

#[test]
fn a_pod_whose_job_went_while_nobody_looked_is_let_go() {
    let Some(world) = World::within(&["left"]) else { return };
    let operator = world.operate();
    train(&world, "left");
    drop(operator);
    delete::<CarryOnJob>(&world, "left", "quickstart", PropagationPolicy::Background);
    let (pods, trainers) = (world.api::<Pod>("left"), ListParams::default().labels("app.kubernetes.io/component=trainer"));
    let leaves = async || pods.list(&trainers).await.unwrap().items.first()?.metadata.deletion_timestamp.clone();
    world.cluster.eventually("its pod is on its way", leaves);
    world.hollow.fate("left", "quickstart", Fate::Ends(75, "checkpointed".to_owned()));
    let ended = async || {
        let pods = pods.list(&trainers).await.unwrap().items;
        (pods.first()?.status.as_ref()?.phase.as_deref() == Some("Failed")).then_some(())
    };
    world.cluster.eventually("it has ended, and is held", ended);
    let _operator = world.operate();
    world.cluster.eventually("it is gone", async || pods.list(&trainers).await.unwrap().items.is_empty().then_some(()));
}

#[test]
fn an_attempt_that_has_lost_its_owner_is_taken_over() {
    let Some(world) = World::within(&["unowned"]) else { return };
    let _operator = world.operate();
    train(&world, "unowned");
    let job: CarryOnJob = world.get("unowned", "quickstart");
    let owned_by =
        |owner: Option<String>| move |job: &Job| job.owner_references().iter().any(|reference| Some(&reference.uid) == owner.as_ref());
    world.patch::<Job>("unowned", "quickstart-1", json!({ "metadata": { "ownerReferences": null } }));
    let attempt = world.until_is::<Job>("unowned", "quickstart-1", "has its owner back", &owned_by(job.uid()));

    delete::<CarryOnJob>(&world, "unowned", "quickstart", PropagationPolicy::Orphan);
    world.until_is::<Job>("unowned", "quickstart-1", "is an orphan", &|job| job.owner_references().is_empty());
    // Something else is not its work.
    let other = example("quickstart/job.yaml").replace("training:\n", "training:\n    seed: 7\n");
    assert!(other.contains("seed: 7"));
    world.cluster.apply("unowned", &other);
    world.until::<CarryOnJob>("unowned", "quickstart", STALLED, "True", "ChildTaken");
    delete::<CarryOnJob>(&world, "unowned", "quickstart", PropagationPolicy::Orphan);
    world.cluster.apply("unowned", &example("quickstart/job.yaml"));
    let again = world.until::<CarryOnJob>("unowned", "quickstart", READY, "True", "Running");
    let adopted = world.until_is::<Job>("unowned", "quickstart-1", "has a new owner", &owned_by(again.uid()));
    assert_eq!(adopted.uid(), attempt.uid());
    world.hollow.fate("unowned", "quickstart", complete());
    world.until::<CarryOnJob>("unowned", "quickstart", COMPLETE, "True", "Complete");
    assert_eq!(world.list::<Job>("unowned").len(), 1);
    world.no_refused_writes();
}

#[test]
fn an_attempt_that_was_left_behind_is_stopped_with_the_suspended_job_that_takes_it_over() {
    let Some(world) = World::start() else { return };
    let _operator = Operator::start(&world.cluster, None);
    train(&world, "left");
    delete::<CarryOnJob>(&world, "left", "quickstart", PropagationPolicy::Orphan);
    world.until_is::<Job>("left", "quickstart-1", "is an orphan", &|job| job.owner_references().is_empty());
    world.cluster.apply("left", &example("quickstart/job.yaml").replace("spec:\n", "spec:\n  suspend: true\n"));
    world.until::<CarryOnJob>("left", "quickstart", READY, "False", "Suspending");
    world.hollow.fate("left", "quickstart", Fate::Ends(75, "checkpointed".to_owned()));
    let job = world.until::<CarryOnJob>("left", "quickstart", SUSPENDED, "True", "Suspended");
    let stopped = job.status.unwrap();
    assert_eq!((stopped.attempts.len(), stopped.failures, stopped.attempts[0].result.is_some()), (1, 0, true));
    world.patch::<CarryOnJob>("left", "quickstart", json!({ "spec": { "suspend": false } }));
    world.hollow.fate("left", "quickstart", complete());
    world.until::<CarryOnJob>("left", "quickstart", COMPLETE, "True", "Complete");
    assert_eq!(status(&world, "left").attempt, 2);
    world.no_refused_writes();
}

#[test]
fn a_trainers_end_counts_though_a_container_beside_it_never_ends() {
    let Some(world) = World::start() else { return };
    let _operator = Operator::start(&world.cluster, None);
    let Fate::Ends(code, words) = complete() else { unreachable!("a good end is an end") };
    world.hollow.fate("beside", "quickstart", Fate::Outlived(code, words));
    world.volumes("beside");
    world.cluster.apply("beside", &example("quickstart/pool.yaml"));
    world.cluster.apply("beside", &example("quickstart/job.yaml"));
    world.until::<CarryOnJob>("beside", "quickstart", COMPLETE, "True", "Complete");
    let (jobs, pods) = (world.api::<Job>("beside"), world.api::<Pod>("beside"));
    let trainers = ListParams::default().labels("app.kubernetes.io/component=trainer");
    world.cluster.eventually("batch Job and pod are gone", async || {
        let empty = jobs.list(&Default::default()).await.unwrap().items.is_empty();
        (empty && pods.list(&trainers).await.unwrap().items.is_empty()).then_some(())
    });
    let status = status(&world, "beside");
    assert_eq!((status.attempt, status.failures, status.artifact.is_some()), (1, 0, true));
    world.no_refused_writes();
}

#[test]
fn a_head_is_not_lost_to_a_look_that_was_refused() {
    let Some(world) = World::start() else { return };
    let _operator = Operator::start(&world.cluster, None);
    train(&world, "look");
    let roles: kube::Api<ClusterRole> = kube::Api::all(world.cluster.client());
    let mut less = world.cluster.block_on(roles.get("carry-on-operator")).unwrap();
    for rule in less.rules.iter_mut().flatten().filter(|rule| rule.resources.iter().flatten().any(|all| all == "configmaps")) {
        rule.verbs = ["get", "list", "watch"].map(str::to_owned).to_vec();
    }
    world.cluster.block_on(roles.replace("carry-on-operator", &PostParams::default(), &less)).unwrap();
    let trainers: Vec<ConfigMap> = world.list("look");
    let trainers = trainers.into_iter().filter(|map| map.labels().get("app.kubernetes.io/component").is_some_and(|of| of == "trainer"));
    trainers.for_each(|map| delete::<ConfigMap>(&world, "look", &map.name_any(), PropagationPolicy::Background));
    world.until::<CarryOnJob>("look", "quickstart", READY, "False", "Forbidden");
    world.hollow.fate("look", "quickstart", complete());
    world.until::<CarryOnJob>("look", "quickstart", COMPLETE, "True", "Complete");
    assert!(status(&world, "look").artifact.is_some());
}

#[test]
fn a_queue_takes_an_attempts_place_and_gives_it_back() {
    let Some(world) = World::within(&["preempted"]) else { return };
    let _operator = world.operate();
    train(&world, "preempted");
    world.patch::<Job>("preempted", "quickstart-1", json!({ "spec": { "suspend": true } }));
    world.until::<CarryOnJob>("preempted", "quickstart", READY, "False", "AttemptQueued");
    world.hollow.fate("preempted", "quickstart", Fate::Ends(75, "checkpointed".to_owned()));
    let pods = world.api::<Pod>("preempted");
    let trainers = ListParams::default().labels("app.kubernetes.io/component=trainer");
    let gone = async || pods.list(&trainers).await.unwrap().items.is_empty().then_some(());
    world.cluster.eventually("its pod has ended and is not held", &gone);
    world.hollow.fate("preempted", "quickstart", Fate::Lingers);
    world.patch::<Job>("preempted", "quickstart-1", json!({ "spec": { "suspend": false } }));
    world.until::<CarryOnJob>("preempted", "quickstart", READY, "True", "Running");
    // Who deletes the pod alone takes the place away too, and leaves the batch Job to give it back.
    let running = world.cluster.block_on(pods.list(&trainers)).unwrap().items.remove(0);
    delete::<Pod>(&world, "preempted", &running.name_any(), PropagationPolicy::Background);
    world.hollow.fate("preempted", "quickstart", Fate::Ends(75, "checkpointed".to_owned()));
    let another = async || pods.get_opt(&running.name_any()).await.unwrap().is_none().then_some(());
    world.cluster.eventually("it has ended and is not held", another);
    world.hollow.fate("preempted", "quickstart", complete());
    world.until::<CarryOnJob>("preempted", "quickstart", COMPLETE, "True", "Complete");
    let status = status(&world, "preempted");
    assert_eq!((status.attempt, status.failures, status.attempts.len()), (1, 0, 1));
    world.no_refused_writes();
}

#[test]
fn batch_jobs_of_old_attempts_go() {
    let Some(world) = World::within(&["history"]) else { return };
    world.hollow.fate("history", "quickstart", Fate::Lingers);
    world.volumes("history");
    world.cluster.apply("history", &example("quickstart/job.yaml"));
    let job: CarryOnJob = world.get("history", "quickstart");
    let long_ago = "2026-01-01T00:00:00Z";
    let attempts = (1..=5)
        .map(|number| json!({ "number": number, "startTime": long_ago, "completionTime": long_ago, "result": "Failed", "exitCode": 1 }));
    let status = json!({ "status": { "attempt": 5, "failures": 5, "attempts": attempts.collect::<Vec<_>>() } });
    let jobs = world.api::<CarryOnJob>("history");
    world.cluster.block_on(jobs.patch_status("quickstart", &PatchParams::default(), &Patch::Merge(status))).unwrap();
    let owner =
        json!({ "apiVersion": "carryon.dev/v1alpha1", "kind": "CarryOnJob", "name": "quickstart", "uid": job.uid(), "controller": true });
    for number in 1..=5 {
        let name = names::attempt("quickstart", number);
        let template = json!({ "spec": { "restartPolicy": "Never", "containers": [{ "name": "trainer", "image": "none" }] } });
        let metadata = json!({ "name": name, "labels": names::labels("trainer", "quickstart"), "ownerReferences": [owner] });
        // No controller of this cluster looks after it.
        let old = json!({ "metadata": metadata, "spec": { "managedBy": "example.org/nobody", "template": template } });
        let old: Job = serde_json::from_value(old).unwrap();
        world.cluster.block_on(world.api::<Job>("history").create(&PostParams::default(), &old)).unwrap();
        let ended = ["FailureTarget", "Failed"].map(|type_| json!({ "type": type_, "status": "True", "lastTransitionTime": long_ago }));
        let ended = json!({ "status": { "startTime": long_ago, "failed": 1, "conditions": ended } });
        world.cluster.block_on(world.api::<Job>("history").patch_status(&name, &PatchParams::default(), &Patch::Merge(ended))).unwrap();
    }
    let _operator = world.operate();
    world.cluster.apply("history", &example("quickstart/pool.yaml"));
    world.until::<CarryOnJob>("history", "quickstart", READY, "True", "Running");
    let jobs = world.api::<Job>("history");
    world.cluster.eventually("the old ones are gone", async || {
        let names: Vec<String> = jobs.list(&Default::default()).await.unwrap().items.iter().map(Job::name_any).collect();
        (names == ["quickstart-3", "quickstart-4", "quickstart-5", "quickstart-6"]).then_some(())
    });
    world.no_refused_writes();
}

#[test]
fn a_finished_job_that_is_restored_without_its_status_is_not_trained_again() {
    let Some(world) = World::within(&["backup"]) else { return };
    let _operator = world.operate();
    world.hollow.fate("backup", "quickstart", complete());
    world.volumes("backup");
    world.cluster.apply("backup", &example("quickstart/pool.yaml"));
    world.cluster.apply("backup", &example("quickstart/job.yaml"));
    let first = world.until::<CarryOnJob>("backup", "quickstart", COMPLETE, "True", "Complete");
    delete::<CarryOnJob>(&world, "backup", "quickstart", PropagationPolicy::Background);
    let jobs = world.api::<Job>("backup");
    world.cluster.eventually("its attempt is gone", async || jobs.list(&Default::default()).await.unwrap().items.is_empty().then_some(()));
    // What Velero makes of it: metadata and spec, another UID.
    let ObjectMeta { name, labels, annotations, .. } = first.metadata.clone();
    let restored =
        CarryOnJob { metadata: ObjectMeta { name, labels, annotations, ..ObjectMeta::default() }, status: None, ..first.clone() };
    world.cluster.block_on(world.api::<CarryOnJob>("backup").create(&PostParams::default(), &restored)).unwrap();
    let again = world.until::<CarryOnJob>("backup", "quickstart", COMPLETE, "True", "Complete");
    assert_ne!(again.uid(), first.uid());
    let artifact = |job: &CarryOnJob| job.status.as_ref().unwrap().artifact.clone();
    assert_eq!((artifact(&again), artifact(&again).is_some()), (artifact(&first), true));
    world.quiet();
    assert!(world.list::<Job>("backup").is_empty(), "it was trained again");

    // Applied again from its manifest, it has no result, and trains.
    delete::<CarryOnJob>(&world, "backup", "quickstart", PropagationPolicy::Background);
    world.cluster.apply("backup", &example("quickstart/job.yaml"));
    world.until_is::<Job>("backup", "quickstart-1", "is made", &|_| true);
    world.no_refused_writes();
}
