//! Attempts in the hands of the real Kueue.

use carryon_crds::condition::types::{COMPLETE, READY};
use carryon_crds::{CarryOnJob, CarryOnJobStatus};
use carryon_tests::cluster::hollow::{Fate, model};
use carryon_tests::example;
use carryon_tests::operator::Operator;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};

use super::world::{Conditions as _, World};

/// Room for one trainer, on nodes of one kind; and a queue whose jobs run in other clusters, of which there are none.
const QUEUES: &str = r#"
apiVersion: kueue.x-k8s.io/v1beta2
kind: ResourceFlavor
metadata: {name: spot}
spec: {nodeLabels: {tier: spot}}
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: ClusterQueue
metadata: {name: one-trainer}
spec:
  namespaceSelector: {}
  preemption: {withinClusterQueue: LowerPriority}
  resourceGroups:
  - coveredResources: [pods]
    flavors: [{name: spot, resources: [{name: pods, nominalQuota: 1}]}]
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: AdmissionCheck
metadata: {name: elsewhere}
spec: {controllerName: kueue.x-k8s.io/multikueue}
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: ClusterQueue
metadata: {name: other-clusters}
spec:
  namespaceSelector: {}
  admissionChecksStrategy: {admissionChecks: [{name: elsewhere}]}
  resourceGroups:
  - coveredResources: [pods]
    flavors: [{name: spot, resources: [{name: pods, nominalQuota: 1}]}]
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: LocalQueue
metadata: {name: here}
spec: {clusterQueue: one-trainer}
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: LocalQueue
metadata: {name: elsewhere}
spec: {clusterQueue: other-clusters}
---
apiVersion: kueue.x-k8s.io/v1beta2
kind: WorkloadPriorityClass
metadata: {name: urgent}
value: 1000
"#;

/// Who looks after batch Jobs that are to run in another cluster.
const MULTIKUEUE: &str = "kueue.x-k8s.io/multikueue";
/// Gives every new batch Job to it, as Kueue does to those of a queue for other clusters.
const ELSEWHERE: &str = r#"
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: elsewhere}
spec:
  matchConstraints:
    resourceRules: [{apiGroups: [batch], apiVersions: [v1], operations: [CREATE], resources: [jobs]}]
  reinvocationPolicy: Never
  mutations:
  - patchType: ApplyConfiguration
    applyConfiguration: {expression: 'Object{spec: Object.spec{managedBy: "kueue.x-k8s.io/multikueue"}}'}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: elsewhere}
spec: {policyName: elsewhere}
"#;

/// A cluster with Kueue, its queues in namespace `space`, and a pool there.
fn queued(space: &str) -> Option<World> {
    let world = World::start()?;
    world.cluster.start_kueue();
    world.volumes(space);
    world.cluster.apply(space, QUEUES);
    world.cluster.apply(space, &example("quickstart/pool.yaml"));
    Some(world)
}

/// The quick start's job under another name, with these labels.
fn job(name: &str, labels: &str) -> String {
    example("quickstart/job.yaml").replace("name: quickstart\n", &format!("name: {name}\n  labels: {{{labels}}}\n"))
}

fn status(world: &World, space: &str, name: &str) -> CarryOnJobStatus {
    world.get::<CarryOnJob>(space, name).status.unwrap()
}

async fn trainers(world: &World, space: &str, name: &str) -> Vec<Pod> {
    let trainers = format!("app.kubernetes.io/component=trainer,app.kubernetes.io/instance={name}");
    world.api::<Pod>(space).list(&ListParams::default().labels(&trainers)).await.unwrap().items
}

#[test]
#[ignore = "needs Kueue: make test-all"]
fn kueue_admits_an_attempt_takes_its_place_for_a_more_urgent_one_and_gives_it_back() {
    let Some(world) = queued("queue") else { return };
    let _operator = Operator::start(&world.cluster, None);
    let fate = |name: &str, fate: Fate| world.hollow.fate("queue", name, fate);
    let until = |name: &str, status: &str, reason: &str| world.until::<CarryOnJob>("queue", name, READY, status, reason);
    let complete = || Fate::complete(&model().identity.digest());

    fate("patient", Fate::Lingers);
    world.cluster.apply("queue", &job("patient", "kueue.x-k8s.io/queue-name: here"));
    until("patient", "True", "Running");
    let attempt: Job = world.get("queue", "patient-1");
    let pods = world.cluster.block_on(trainers(&world, "queue", "patient"));
    assert_eq!(pods[0].spec.as_ref().unwrap().node_selector.as_ref().unwrap()["tier"], "spot", "Kueue has not placed it");

    // Its place is taken while it trains: it has 120 s to write a checkpoint.
    fate("hasty", Fate::Lingers);
    world.cluster.apply("queue", &job("hasty", "kueue.x-k8s.io/queue-name: here, kueue.x-k8s.io/priority-class: urgent"));
    until("patient", "False", "AttemptQueued");
    fate("patient", Fate::Ends(75, "checkpointed".to_owned()));
    until("hasty", "True", "Running");
    let gone = async || trainers(&world, "queue", "patient").await.is_empty().then_some(());
    world.cluster.eventually("its pod has ended and is not held", gone);
    let waiting = status(&world, "queue", "patient");
    assert_eq!((waiting.attempt, waiting.failures, waiting.attempts[0].result), (1, 0, None));
    assert!(until("patient", "False", "AttemptQueued").message(READY).starts_with("attempt 1: batch Job patient-1 is held back"));

    fate("patient", Fate::Lingers);
    fate("hasty", complete());
    world.until::<CarryOnJob>("queue", "hasty", COMPLETE, "True", "Complete");
    until("patient", "True", "Running");
    fate("patient", complete());
    world.until::<CarryOnJob>("queue", "patient", COMPLETE, "True", "Complete");
    let ended = status(&world, "queue", "patient");
    assert_eq!((ended.attempt, ended.failures, ended.attempts.len()), (1, 0, 1));
    assert_eq!(world.get::<Job>("queue", "patient-1").uid(), attempt.uid());
    world.no_refused_writes();
}

#[test]
#[ignore = "needs Kueue: make test-all"]
fn an_attempt_in_a_queue_for_other_clusters_is_left_to_multikueue() {
    let Some(world) = queued("far") else { return };
    let inactive = "jsonpath={.status.conditions[?(@.type=='Active')].message}";
    world.cluster.eventually("Kueue knows what the queue is for", async || {
        let said = world.cluster.kubectl(&["get", "clusterqueue", "other-clusters", "--output", inactive]);
        said.contains("elsewhere").then_some(())
    });
    let _operator = Operator::start(&world.cluster, None);
    world.cluster.apply("far", &job("far", "kueue.x-k8s.io/queue-name: elsewhere"));
    world.until::<CarryOnJob>("far", "far", READY, "False", "AttemptQueued");
    let managed = |job: &Job| job.spec.as_ref().unwrap().managed_by.as_deref() == Some(MULTIKUEUE);
    world.until_is::<Job>("far", "far-1", "is MultiKueue's", &managed);
    world.patch::<CarryOnJob>("far", "far", json!({ "spec": { "suspend": true } }));
    world.until::<CarryOnJob>("far", "far", READY, "True", "Suspended");
    world.patch::<CarryOnJob>("far", "far", json!({ "spec": { "suspend": false } }));
    world.until_is::<Job>("far", "far-2", "is MultiKueue's too", &managed);
    world.no_refused_writes();
}

#[test]
fn an_attempt_that_another_controller_looks_after_is_followed_by_its_status() {
    let Some(world) = World::start() else { return };
    world.volumes("managed");
    world.cluster.apply("managed", ELSEWHERE);
    let any = json!({ "metadata": { "name": "any" }, "spec": { "template": { "spec": { "restartPolicy": "Never",
        "containers": [{ "name": "any", "image": "none" }] } } } });
    let (any, dry) = (serde_json::from_value::<Job>(any).unwrap(), PostParams { dry_run: true, ..PostParams::default() });
    world.cluster.eventually("batch Jobs are given to another controller", async || {
        world.api::<Job>("managed").create(&dry, &any).await.unwrap().spec?.managed_by.map(drop)
    });
    let _operator = Operator::start(&world.cluster, None);
    world.cluster.apply("managed", &example("quickstart/pool.yaml"));
    world.cluster.apply("managed", &example("quickstart/job.yaml"));
    let says = |job: &CarryOnJob| job.message(READY) == format!("attempt 1: batch Job quickstart-1 is managed by {MULTIKUEUE}");
    world.until_is::<CarryOnJob>("managed", "quickstart", "names who looks after it", &says);
    let set = |status: Value| {
        let patch = Patch::Merge(json!({ "status": status }));
        world.cluster.block_on(world.api::<Job>("managed").patch_status("quickstart-1", &PatchParams::default(), &patch)).unwrap();
    };
    let [start, end] = ["2026-01-01T00:00:00Z", "2026-01-01T01:00:00Z"];
    set(json!({ "startTime": start, "active": 1, "ready": 1 }));
    assert!(says(&world.until("managed", "quickstart", READY, "True", "Running")));
    let conditions = ["SuccessCriteriaMet", "Complete"].map(|type_| json!({ "type": type_, "status": "True", "lastTransitionTime": end }));
    set(json!({ "active": 0, "ready": 0, "succeeded": 1, "completionTime": end, "conditions": conditions }));
    let job = world.until::<CarryOnJob>("managed", "quickstart", COMPLETE, "True", "Complete");
    assert_eq!(job.message(READY), "the head is written in another cluster, where the attempt ran; it is not known here");
    assert_eq!((job.status.unwrap().active_seconds, world.list::<Job>("managed").len()), (3600, 1));
    assert!(world.cluster.block_on(trainers(&world, "managed", "quickstart")).is_empty());
    world.no_refused_writes();
}
