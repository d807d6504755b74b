//! NetworkPolicies on an API server: there while they are wanted, and not a moment longer.

use carryon_crds::BaseModelPool;
use carryon_crds::condition::types::READY;
use carryon_tests::operator::{Operator, Options};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::ResourceExt as _;
use kube::api::{DeleteParams, PostParams};
use serde_json::json;

use super::world::World;

#[test]
fn policies_close_pods_until_an_operator_comes_that_makes_none() {
    let Some(world) = World::within(&["closed"]) else { return };
    let names = || world.list::<NetworkPolicy>("closed").iter().map(NetworkPolicy::name_any).collect::<Vec<_>>();
    world.quickstart("closed");
    let operator = world.operate();
    world.until_served("closed");
    assert_eq!(names(), ["quickstart-gateway", "quickstart-trainer", "smollm2-pool"]);
    let foreign = json!({ "metadata": { "name": "foreign" }, "spec": { "podSelector": {}, "policyTypes": ["Egress"] } });
    world
        .cluster
        .block_on(world.api("closed").create(&PostParams::default(), &serde_json::from_value::<NetworkPolicy>(foreign).unwrap()))
        .unwrap();
    let opened = json!({ "spec": { "ingress": [{}] } });
    world.patch::<NetworkPolicy>("closed", "smollm2-pool", opened);
    world.until_is::<NetworkPolicy>("closed", "smollm2-pool", "names its peers again", &|policy| {
        policy.spec.as_ref().unwrap().ingress.as_ref().unwrap()[0].from.is_some()
    });

    // Nothing is made of an object whose claim is gone, and yet its policy goes.
    world.patch::<PersistentVolumeClaim>("closed", "models", json!({ "metadata": { "finalizers": null } }));
    world.cluster.block_on(world.api::<PersistentVolumeClaim>("closed").delete("models", &DeleteParams::default())).unwrap();
    world.until::<BaseModelPool>("closed", "smollm2", READY, "False", "ClaimNotFound");
    drop(operator);
    let _open = Operator::start_with(&world.cluster, Options { namespaces: &["closed"], closed: false, ..Options::default() });
    world.cluster.eventually("the policies of an operator go, others stay", async || {
        let policies = world.api::<NetworkPolicy>("closed").list(&kube::api::ListParams::default()).await.ok()?;
        (policies.iter().map(NetworkPolicy::name_any).collect::<Vec<_>>() == ["foreign"]).then_some(())
    });
}
