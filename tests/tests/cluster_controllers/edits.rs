//! Others who change our objects and our children: people with kubectl, autoscalers, queues.

use carryon_crds::condition::types::READY;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_operator::shared::revision::name_in;
use carryon_tests::cluster::Object;
use carryon_tests::cluster::hollow::Fate;
use k8s_openapi::api::apps::v1::{ControllerRevision, Deployment, StatefulSet};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use kube::ResourceExt as _;
use kube::api::DeleteParams;
use serde_json::json;

use super::world::World;

/// The pool's container as its StatefulSet has it.
fn pool(set: &StatefulSet) -> &k8s_openapi::api::core::v1::Container {
    &set.spec.as_ref().unwrap().template.spec.as_ref().unwrap().containers[0]
}

fn replicas(deployment: &Deployment) -> i32 {
    deployment.spec.as_ref().unwrap().replicas.unwrap()
}

fn comes_back<K: Object>(world: &World, space: &str, name: &str) {
    let first: K = world.get(space, name);
    world.cluster.block_on(world.api::<K>(space).delete(name, &DeleteParams::default())).unwrap();
    let api = world.api::<K>(space);
    let what = format!("{} {name} is back", K::kind(&()));
    world.cluster.eventually(&what, async || api.get(name).await.ok().filter(|now| now.uid() != first.uid()));
}

#[test]
fn a_field_that_is_set_and_removed_is_as_before_and_amounts_have_many_names() {
    let Some(world) = World::within(&["edits"]) else { return };
    world.quickstart("edits");
    let _operator = world.operate();
    world.until_served("edits");
    let before: StatefulSet = world.get("edits", "smollm2-pool");
    let set = |what: &str, holds: &dyn Fn(&StatefulSet) -> bool| {
        world.until_is::<StatefulSet>("edits", "smollm2-pool", what, holds);
    };

    let server = json!({ "resources": { "limits": { "cpu": "1000m" } }, "scheduling": { "nodeSelector": { "disk": "fast" } } });
    world.patch::<BaseModelPool>("edits", "smollm2", json!({ "spec": { "server": server } }));
    set("has a limit", &|set| {
        pool(set).resources.as_ref().is_some_and(|resources| resources.limits.as_ref().is_some_and(|limits| limits["cpu"].0 == "1"))
    });
    world.quiet();
    let server = json!({ "resources": null, "scheduling": null });
    world.patch::<BaseModelPool>("edits", "smollm2", json!({ "spec": { "server": server } }));
    set("is as before", &|set| set.spec == before.spec);
    world.quiet();

    // Ours comes back, theirs stays.
    let theirs = json!({ "metadata": { "annotations": { "team": "blue" } }, "spec": { "replicas": 3, "minReadySeconds": 1 } });
    world.patch::<StatefulSet>("edits", "smollm2-pool", theirs);
    set("has its replicas back", &|set| set.spec.as_ref().unwrap().replicas == Some(1));
    let set: StatefulSet = world.get("edits", "smollm2-pool");
    assert_eq!((set.annotations()["team"].as_str(), set.spec.as_ref().unwrap().min_ready_seconds), ("blue", Some(1)));
    comes_back::<StatefulSet>(&world, "edits", "smollm2-pool");
    comes_back::<PodDisruptionBudget>(&world, "edits", "smollm2-pool");
    comes_back::<NetworkPolicy>(&world, "edits", "smollm2-pool");
    let gateway: Deployment = world.get("edits", "quickstart-gateway");
    let config = name_in(&gateway.spec.as_ref().unwrap().template).unwrap().to_owned();
    comes_back::<ConfigMap>(&world, "edits", &config);
    comes_back::<ControllerRevision>(&world, "edits", &config);
    comes_back::<Service>(&world, "edits", "quickstart-gateway");
    comes_back::<Deployment>(&world, "edits", "quickstart-gateway");

    // What an autoscaler does.
    world.cluster.kubectl(&["-n", "edits", "scale", "carryondeployment/quickstart", "--replicas=3"]);
    world.until_is::<Deployment>("edits", "quickstart-gateway", "has three replicas", &|deployment| replicas(deployment) == 3);
    let scaled = world.until_served("edits").status.unwrap();
    assert_eq!(scaled.selector.unwrap().split(',').count(), 3);
    world.until_is::<CarryOnDeployment>("edits", "quickstart", "counts three", &|deployment| {
        deployment.status.as_ref().is_some_and(|status| status.ready_replicas == 3)
    });
    world.quiet();
    world.no_refused_writes();
}

#[test]
fn a_services_port_that_somebody_has_edited_is_as_before() {
    let Some(world) = World::within(&["ports"]) else { return };
    world.quickstart("ports");
    let _operator = world.operate();
    world.until_served("ports");
    let ports = |service: &Service| service.spec.as_ref().unwrap().ports.clone().unwrap();
    for name in ["smollm2-pool", "quickstart-gateway"] {
        let before: Service = world.get("ports", name);
        let mut ours = json!(ports(&before)[0]);
        ours.as_object_mut().unwrap().remove("nodePort");
        let edited = |changes: serde_json::Value| {
            let mut port = ours.clone();
            json_patch::merge(&mut port, &changes);
            port
        };
        let edits = [
            json!([edited(json!({ "port": 9000 }))]),
            json!([edited(json!({ "protocol": "UDP" }))]),
            json!([edited(json!({ "name": null, "targetPort": 9000 }))]),
            json!([edited(json!({ "name": "other" })), edited(json!({ "port": 9000 }))]),
        ];
        for ports_now in edits {
            let patched: Service = world.patch("ports", name, json!({ "spec": { "ports": ports_now } }));
            assert_ne!(ports(&patched), ports(&before), "{ports_now}");
            world.until_is::<Service>("ports", name, "has its port back", &|service| ports(service) == ports(&before));
        }
        // One more beside ours is theirs.
        let more = json!([ours, edited(json!({ "name": "more", "port": 9000 }))]);
        world.patch::<Service>("ports", name, json!({ "spec": { "ports": more } }));
        world.quiet();
        assert_eq!(ports(&world.get("ports", name)).len(), 2);
    }
}

#[test]
fn a_job_is_suspended_and_resumed_ten_times_while_a_queue_places_its_attempts() {
    let Some(world) = World::within(&["queue"]) else { return };
    world.hollow.fate("queue", "quickstart", Fate::Runs);
    world.quickstart("queue");
    let _operator = world.operate();
    for number in 1..=11 {
        let name = format!("quickstart-{number}");
        world.until_is::<Job>("queue", &name, "is made", &|_| true);
        // What Kueue does: holds it back, chooses its place, lets it go.
        world.patch::<Job>("queue", &name, json!({ "spec": { "suspend": true } }));
        world.until_is::<Job>("queue", &name, "is held back", &|job| {
            job.status.as_ref().is_some_and(|status| status.start_time.is_none() && status.active.unwrap_or(0) == 0)
        });
        world.until::<CarryOnJob>("queue", "quickstart", READY, "False", "AttemptQueued");
        let toleration = json!({ "key": "gpu", "operator": "Exists" });
        let place = json!({ "nodeSelector": { "flavor": format!("spot-{number}") }, "tolerations": [toleration] });
        world.patch::<Job>("queue", &name, json!({ "spec": { "template": { "spec": place } } }));
        world.patch::<Job>("queue", &name, json!({ "spec": { "suspend": false } }));
        world.until::<CarryOnJob>("queue", "quickstart", READY, "True", "Running");
        let pods: Vec<Pod> = world.list("queue");
        let trainers: Vec<_> = pods.iter().filter(|pod| pod.labels().get("carryon.dev/attempt") == Some(&number.to_string())).collect();
        assert_eq!(trainers.len(), 1);
        let selector = trainers[0].spec.as_ref().unwrap().node_selector.as_ref().unwrap();
        assert_eq!(selector["flavor"], format!("spot-{number}"));
        if number == 11 {
            break;
        }
        world.patch::<CarryOnJob>("queue", "quickstart", json!({ "spec": { "suspend": true } }));
        world.until::<CarryOnJob>("queue", "quickstart", READY, "True", "Suspended");
        let jobs = world.api::<Job>("queue");
        let gone = async || jobs.list(&Default::default()).await.unwrap().items.is_empty().then_some(());
        world.cluster.eventually("a suspended job has no attempt", gone);
        world.patch::<CarryOnJob>("queue", "quickstart", json!({ "spec": { "suspend": false } }));
    }
    let job: CarryOnJob = world.get("queue", "quickstart");
    let status = job.status.unwrap();
    assert_eq!((status.attempt, status.failures), (11, 0));
    world.no_refused_writes();
    // A look that came before its own write was seen asks for the same attempt once more, and is told that it is there.
    let written = world.written();
    let of_jobs = written.iter().filter(|entry| entry.group == "batch" && entry.code < 400);
    let mut verbs: Vec<&str> = of_jobs.map(|entry| entry.verb.as_str()).collect();
    verbs.sort_unstable();
    assert_eq!(verbs, [vec!["create"; 11], vec!["delete"; 10]].concat());
}
