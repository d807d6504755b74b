//! An operator of some namespaces, with the Roles that the chart gives it there and no other right.

use std::collections::BTreeSet;

use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_tests::cluster::TestCluster;
use carryon_tests::cluster::hollow::CONTROLLERS;
use carryon_tests::operator::{Operator, Options};
use serde_json::json;

use super::leaders::until_ready;
use super::world::World;

const WATCHED: [&str; 2] = ["team-a", "team-b"];

/// Three namespaces with the quick start's objects, two of which the chart is told to watch.
fn world() -> Option<World> {
    let cluster = TestCluster::api_server_with(&CONTROLLERS).and_then(TestCluster::ours_only)?;
    WATCHED.iter().for_each(|namespace| drop(cluster.kubectl(&["create", "namespace", namespace])));
    Operator::install_with(&cluster, &["--set", "watchNamespaces={team-a,team-b}"]);
    let world = World::of(cluster);
    world.cluster.kubectl(&["create", "namespace", "team-c"]);
    for namespace in ["team-a", "team-b", "team-c"] {
        world.cluster.apply(namespace, &carryon_tests::example("quickstart/volumes.yaml"));
        world.manifests(namespace);
    }
    Some(world)
}

fn candidate(world: &World, name: &str) -> Operator {
    Operator::start_with(&world.cluster, Options { candidate: Some(name), namespaces: &WATCHED, ..Options::default() })
}

/// Scales a deployment, and waits until the operator has seen it through.
fn scale(world: &World, namespace: &str, replicas: i32) {
    world.patch::<CarryOnDeployment>(namespace, "quickstart", json!({ "spec": { "replicas": replicas } }));
    world.until_is::<CarryOnDeployment>(namespace, "quickstart", "is scaled", &|deployment| {
        deployment.status.as_ref().is_some_and(|status| status.ready_replicas == replicas)
    });
}

#[test]
fn roles_alone_do_for_the_namespaces_that_are_watched_and_the_others_are_left_alone() {
    let Some(world) = world() else { return };
    let cluster_wide = world.cluster.kubectl(&["get", "clusterroles,clusterrolebindings", "--output=name"]);
    assert!(!cluster_wide.contains("carry-on"), "{cluster_wide}");
    let first = candidate(&world, "first");
    WATCHED.iter().for_each(|namespace| drop(world.until_served(namespace)));
    until_ready(&world, &first, 200, "ok");
    world.quiet();
    world.no_refused_writes();
    let written: BTreeSet<String> = world.written().into_iter().map(|entry| entry.namespace).collect();
    assert_eq!(written, WATCHED.map(str::to_owned).into());
    assert!(world.get::<BaseModelPool>("team-c", "smollm2").status.is_none());
    assert!(world.get::<CarryOnJob>("team-c", "quickstart").status.is_none());
    // Another of its installation stands in for it in both; another installation is refused the one that they share.
    let second = candidate(&world, "second");
    until_ready(&world, &second, 200, "waiting while first");
    let foreign = Options { candidate: Some("foreign"), namespaces: &WATCHED[1..], installation: "other/carry-on", ..Options::default() };
    let foreign = Operator::start_with(&world.cluster, foreign);
    until_ready(&world, &foreign, 503, "refused: first");
    drop(foreign);
    first.stop(&world.cluster);
    until_ready(&world, &second, 200, "ok");
    WATCHED.iter().for_each(|namespace| scale(&world, namespace, 2));
}

#[test]
fn a_namespace_that_is_closed_to_the_operator_stops_its_work_in_no_other() {
    let Some(world) = world() else { return };
    let binding = ["rolebinding", "carry-on-operator", "--namespace=team-b"];
    let kept = world.cluster.kubectl(&[&["get"][..], &binding, &["--output=json"]].concat());
    world.cluster.kubectl(&[&["delete"][..], &binding].concat());
    let operator = candidate(&world, "first");
    world.until_served("team-a");
    until_ready(&world, &operator, 503, "namespace team-b: ");
    let mut binding: serde_json::Value = serde_json::from_str(&kept).unwrap();
    binding["metadata"] = json!({ "name": "carry-on-operator" });
    world.cluster.apply("team-b", &binding.to_string());
    world.until_served("team-b");
    until_ready(&world, &operator, 200, "ok");
    scale(&world, "team-a", 2);
}
