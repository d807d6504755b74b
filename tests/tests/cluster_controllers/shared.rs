//! A pool that other namespaces use: those that it is shared with, as long as it is.

use std::time::{Duration, Instant};

use carryon_crds::condition::types::READY;
use carryon_crds::job::AttemptResult;
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_tests::cluster::hollow::Fate;
use carryon_tests::example;
use carryon_tests::operator::Operator;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;

use super::world::{Conditions, World};

/// From a withdrawal to the word of it, at most.
const SOON: Duration = Duration::from_secs(15);

/// A job and its deployment on a pool of the platform's.
fn join(world: &World, team: &str, pool: &str) {
    world.volumes(team);
    for manifest in ["job", "deployment"] {
        let text = example(&format!("quickstart/{manifest}.yaml"));
        let elsewhere = text.replace("- name: smollm2\n", &format!("- name: {pool}\n    namespace: platform\n"));
        assert_ne!(text, elsewhere);
        world.cluster.apply(team, &elsewhere);
    }
}

/// What job and deployment say, in words that name no pool and no namespace.
fn says(world: &World, team: &str, pool: &str) -> [Vec<(String, String, String)>; 2] {
    world.until::<CarryOnJob>(team, "quickstart", READY, "False", "PoolNotFound");
    world.until::<CarryOnDeployment>(team, "quickstart", READY, "False", "PoolNotFound");
    let words = |object: &dyn Conditions| {
        let of = |message: &str| message.replace(&format!("platform/{pool} "), "POOL ").replace(team, "TEAM");
        let conditions = object.conditions().iter();
        conditions.map(|condition| (condition.type_.clone(), condition.reason.clone(), of(&condition.message))).collect()
    };
    [words(&world.get::<CarryOnJob>(team, "quickstart")), words(&world.get::<CarryOnDeployment>(team, "quickstart"))]
}

fn share(world: &World, namespaces: serde_json::Value) {
    world.patch::<BaseModelPool>("platform", "smollm2", json!({ "spec": { "sharing": { "namespaces": namespaces } } }));
}

/// Takes the pool away from team-a, whose deployment serves, while nothing else happens.
fn withdraw(world: &World, how: impl FnOnce()) {
    world.quiet();
    let withdrawn = Instant::now();
    how();
    world.until::<CarryOnDeployment>("team-a", "quickstart", READY, "False", "PoolNotFound");
    let told = withdrawn.elapsed();
    assert!(told < SOON, "{told:?}");
}

#[test]
fn a_pool_is_there_for_whom_it_is_shared_with_and_no_longer() {
    let Some(world) = World::start() else { return };
    let _operator = Operator::start(&world.cluster, None);
    world.volumes("platform");
    world.cluster.apply("platform", &example("quickstart/pool.yaml"));
    share(&world, json!({ "from": "Selector", "selector": { "matchLabels": { "base": "smollm2" } } }));
    world.hollow.fate("team-b", "quickstart", Fate::Lingers);
    for team in ["team-a", "team-b", "team-c"] {
        join(&world, team, "smollm2");
    }
    join(&world, "team-d", "none");
    // One that is not shared with its user reads as one that is not there, and has as few children.
    assert_eq!(says(&world, "team-c", "smollm2"), says(&world, "team-d", "none"));
    for team in ["team-a", "team-b"] {
        world.cluster.kubectl(&["label", "namespace", team, "base=smollm2"]);
    }
    world.until_served("team-a");
    world.until::<CarryOnJob>("team-b", "quickstart", READY, "True", "Running");
    let gateway = world.get::<Deployment>("team-a", "quickstart-gateway").spec.unwrap().template.spec.unwrap();
    assert!(gateway.containers[0].args.as_ref().unwrap().contains(&"http://smollm2-pool.platform.svc:8080".to_owned()));
    says(&world, "team-c", "smollm2");
    assert_eq!((world.list::<Deployment>("team-c").len(), world.list::<Job>("team-c").len()), (0, 0));

    withdraw(&world, || drop(world.cluster.kubectl(&["label", "namespace", "team-a", "base-"])));
    world.cluster.eventually("no gateway is left", async || {
        let pods = world.api::<Pod>("team-a").list(&kube::api::ListParams::default().labels("app.kubernetes.io/component=gateway")).await;
        pods.ok()?.items.is_empty().then_some(())
    });
    world.cluster.kubectl(&["label", "namespace", "team-a", "base=smollm2"]);
    world.until_served("team-a");

    withdraw(&world, || share(&world, json!({ "from": "Same", "selector": null })));
    let job = world.until::<CarryOnJob>("team-b", "quickstart", READY, "False", "PoolNotFound");
    assert_eq!(job.status.unwrap().attempts.len(), 1);
    world.hollow.fate("team-b", "quickstart", Fate::Ends(75, "checkpointed".to_owned()));
    let ended = |job: &CarryOnJob| job.status.as_ref().unwrap().attempts.last().unwrap().result.is_some();
    let status = world.until_is::<CarryOnJob>("team-b", "quickstart", "has ended its attempt", &ended).status.unwrap();
    assert_eq!((status.attempts[0].result, status.failures), (Some(AttemptResult::Resumable), 0));
    assert_eq!(says(&world, "team-b", "smollm2"), says(&world, "team-d", "none"));

    // It is back, and for all.
    world.hollow.fate("team-b", "quickstart", Fate::complete(&carryon_tests::cluster::hollow::model().identity.digest()));
    share(&world, json!({ "from": "All" }));
    for team in ["team-a", "team-b", "team-c"] {
        world.until_served(team);
    }
    assert_eq!(world.get::<CarryOnJob>("team-b", "quickstart").status.unwrap().attempt, 2);
    says(&world, "team-d", "none");
    world.no_refused_writes();
}
