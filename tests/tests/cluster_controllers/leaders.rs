//! Several operators, and an API server that is not there: who works, and who says what of itself.

use carryon_crds::CarryOnDeployment;
use carryon_crds::condition::types::READY;
use carryon_tests::operator::{Operator, Options};
use k8s_openapi::api::coordination::v1::Lease;
use kube::ResourceExt as _;
use serde_json::json;

use super::world::World;

/// Of one installation that looks after all namespaces.
fn candidate(world: &World, name: &str) -> Operator {
    Operator::start_with(&world.cluster, Options { candidate: Some(name), ..Options::default() })
}

/// Who has written, in the order of the audit log, each once for as long as nobody else did.
pub fn writers(world: &World, namespace: Option<&str>) -> Vec<String> {
    let of_interest = world.written().into_iter().filter(|entry| namespace.is_none_or(|namespace| entry.namespace == namespace));
    let name = |agent: String| agent.split_once('/').map(|(name, _)| name.to_owned());
    let mut writers: Vec<String> = of_interest.filter_map(|entry| name(entry.user_agent)).collect();
    writers.dedup();
    writers
}

pub fn until_ready(world: &World, operator: &Operator, code: u16, words: &str) {
    let mut last = None;
    world.cluster.eventually(&format!("/readyz says {code} {words:?}"), async || {
        let now = operator.ready().await?;
        if last.as_ref() != Some(&now) {
            println!("/readyz: {now:?}");
            last = Some(now.clone());
        }
        (now.0 == code && now.1.contains(words)).then_some(())
    });
    assert!(!operator.has_ended());
}

fn lease(world: &World) -> Lease {
    world.get("kube-system", "carryon-operator")
}

#[test]
fn an_operator_that_hears_no_more_stops_before_the_next_one_starts_and_is_the_next_ones_follower() {
    let Some(world) = World::start() else { return };
    let first = candidate(&world, "first");
    world.quickstart("one");
    world.until_served("one");
    let second = candidate(&world, "second");
    until_ready(&world, &second, 200, "waiting while first");
    first.cut(true);
    world.quickstart("two");
    world.until_served("two");
    // What it would have done on "two" waits in it.
    first.cut(false);
    until_ready(&world, &first, 200, "waiting while second");
    world.quiet();
    assert_eq!(writers(&world, None), ["first", "second"]);
    // One that ends by itself gives the Lease back.
    second.stop(&world.cluster);
    world.quickstart("three");
    world.until_served("three");
    assert_eq!(writers(&world, None), ["first", "second", "first"]);
    assert_eq!(lease(&world).spec.unwrap().lease_transitions, Some(2));
    world.no_refused_writes();
}

#[test]
fn an_operator_that_was_frozen_sends_nothing_that_it_was_about_to_write_once_another_works() {
    let Some(world) = World::start() else { return };
    let first = candidate(&world, "first");
    world.quickstart("one");
    world.until_served("one");
    first.hold_writes(true);
    world.quickstart("two");
    world.cluster.eventually("it is about to write", async || (first.waiting_writes() > 0).then_some(()));
    let frozen = first.freeze();
    let _second = candidate(&world, "second");
    world.cluster.eventually("another works", async || (writers(&world, None) == ["first", "second"]).then_some(()));
    // What it was about to write comes before all else when it goes on.
    first.hold_writes(false);
    drop(frozen);
    until_ready(&world, &first, 200, "waiting while second");
    world.until_served("two");
    world.quiet();
    assert_eq!(writers(&world, None), ["first", "second"]);
}

#[test]
fn a_lease_is_kept_while_the_caches_are_slow_to_fill() {
    let Some(world) = World::start() else { return };
    world.quickstart("slow");
    let first = candidate(&world, "first");
    first.hold_lists(true);
    world.cluster.eventually("the first has the Lease", async || {
        let lease = world.api::<Lease>("kube-system").get("carryon-operator").await.ok()?;
        lease.spec?.holder_identity.filter(|holder| holder.starts_with("first"))
    });
    until_ready(&world, &first, 503, "pods: not listed yet");
    let second = candidate(&world, "second");
    until_ready(&world, &second, 200, "waiting while first");
    // For longer than the Lease would last.
    let mut renewed = std::collections::BTreeSet::new();
    world.cluster.eventually("twelve renewals", async || {
        renewed.insert(world.api::<Lease>("kube-system").get("carryon-operator").await.ok()?.resource_version());
        (renewed.len() > 12).then_some(())
    });
    assert_eq!(lease(&world).spec.unwrap().lease_transitions, Some(0));
    first.hold_lists(false);
    world.until_served("slow");
    until_ready(&world, &first, 200, "ok");
    assert_eq!(writers(&world, None), ["first"]);
}

#[test]
fn an_api_server_that_is_away_for_a_minute_is_waited_for() {
    let Some(world) = World::start() else { return };
    let operators = [candidate(&world, "first"), candidate(&world, "second")];
    world.quickstart("before");
    world.until_served("before");
    world.quiet();
    let frozen = world.cluster.freeze_api_server();
    // The absence is the fault itself.
    world.cluster.block_on(async { tokio::time::sleep(std::time::Duration::from_secs(60)).await });
    assert!(operators.iter().all(|operator| !operator.has_ended()));
    drop(frozen);
    world.quickstart("after");
    world.until_served("after");
    let gateway = json!({ "spec": { "gateway": { "resources": { "limits": { "cpu": "2" } } } } });
    let changed = world.patch::<CarryOnDeployment>("before", "quickstart", gateway);
    world.until_is::<CarryOnDeployment>("before", "quickstart", "is seen", &|deployment| {
        deployment.status.as_ref().and_then(|status| status.observed_generation) == changed.metadata.generation
    });
    assert!(operators.iter().all(|operator| !operator.has_ended()));
    world.quiet();
    let writers = writers(&world, None);
    assert!(writers.len() <= 2, "they have written by turns: {writers:?}");
}

#[test]
fn readiness_names_the_definition_and_the_right_that_are_missing() {
    let Some(world) = World::start() else { return };
    let all = world.cluster.kubectl(&["get", "crd", "carryonjobs.carryon.dev", "--output", "json"]);
    world.cluster.kubectl(&["delete", "crd", "carryonjobs.carryon.dev"]);
    let rule = |verbs: &str| {
        let rules = world.cluster.kubectl(&["get", "clusterrole", "carry-on-operator", "--output", "json"]);
        let rules: serde_json::Value = serde_json::from_str(&rules).unwrap();
        let number =
            rules["rules"].as_array().unwrap().iter().position(|rule| rule["resources"] == json!(["poddisruptionbudgets"])).unwrap();
        let patch = json!([{ "op": "replace", "path": format!("/rules/{number}/verbs"), "value": verbs.split(' ').collect::<Vec<_>>() }]);
        world.cluster.kubectl(&["patch", "clusterrole", "carry-on-operator", "--type=json", "--patch", &patch.to_string()]);
    };
    rule("get create patch");
    let operator = candidate(&world, "first");
    until_ready(&world, &operator, 503, "carryonjobs: failed to perform initial object list");
    until_ready(&world, &operator, 503, "poddisruptionbudgets.policy is forbidden");
    rule("get list watch create patch");
    let mut definition: serde_json::Value = serde_json::from_str(&all).unwrap();
    definition.as_object_mut().unwrap().remove("status");
    definition["metadata"] = json!({ "name": "carryonjobs.carryon.dev" });
    world.cluster.apply("default", &definition.to_string());
    until_ready(&world, &operator, 200, "ok");
    world.quickstart("served");
    world.until_served("served");
}

#[test]
fn operators_whose_namespaces_overlap_do_not_work_on_the_same_objects() {
    let Some(world) = World::start() else { return };
    let first = candidate(&world, "first");
    world.quickstart("shared");
    world.until_served("shared");
    // Of all namespaces too, but somebody else's: it does not even stand in.
    let foreign = Options { candidate: Some("foreign"), installation: "other/carry-on", ..Options::default() };
    let foreign = Operator::start_with(&world.cluster, foreign);
    until_ready(&world, &foreign, 503, "refused: first");
    // Of two of them: it has these for itself.
    for namespace in ["own", "second"] {
        world.volumes(namespace);
        let lease = ["--verb=get,create,update", "--resource=leases.coordination.k8s.io", "--namespace", namespace];
        world.cluster.kubectl(&[&["create", "role", "lease"][..], &lease].concat());
        let account = "--serviceaccount=carry-on-system:carry-on-operator";
        world.cluster.kubectl(&["create", "rolebinding", "lease", "--role=lease", account, "--namespace", namespace]);
    }
    let some = Options { candidate: Some("some"), namespaces: &["own", "second"], installation: "own/carry-on", ..Options::default() };
    let some = Operator::start_with(&world.cluster, some);
    until_ready(&world, &first, 200, "namespace own is left to some");
    until_ready(&world, &first, 200, "namespace second is left to some");
    for manifest in ["pool", "job", "deployment"] {
        world.cluster.apply("own", &carryon_tests::example(&format!("quickstart/{manifest}.yaml")));
    }
    world.until::<CarryOnDeployment>("own", "quickstart", READY, "True", "Serving");
    world.quiet();
    assert_eq!(writers(&world, Some("own")), ["some"]);
    assert_eq!(writers(&world, Some("shared")), ["first"]);
    // When that one goes, the other is there for it again.
    some.stop(&world.cluster);
    world.cluster.kubectl(&["-n", "own", "scale", "carryondeployment/quickstart", "--replicas=2"]);
    world.until_is::<CarryOnDeployment>("own", "quickstart", "counts two", &|deployment| {
        deployment.status.as_ref().is_some_and(|status| status.ready_replicas == 2)
    });
    assert_eq!(writers(&world, Some("own")), ["some", "first"]);
}
