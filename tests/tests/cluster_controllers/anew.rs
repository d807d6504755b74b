//! Objects made anew under the name of one that goes.

use carryon_crds::BaseModelPool;
use carryon_crds::condition::types::READY;
use carryon_tests::example;
use k8s_openapi::api::apps::v1::StatefulSet;
use kube::api::DeleteParams;
use serde_json::json;

use super::world::World;

#[test]
fn what_is_left_of_an_earlier_pool_is_not_taken_for_that_of_the_new_one() {
    let Some(world) = World::within(&["anew"]) else { return };
    let _operator = world.operate();
    world.volumes("anew");
    world.cluster.apply("anew", &example("quickstart/pool.yaml"));
    world.until::<BaseModelPool>("anew", "smollm2", READY, "True", "PodsReady");
    // Somebody holds the StatefulSet when its pool goes.
    let hold = |finalizers| world.patch::<StatefulSet>("anew", "smollm2-pool", json!({ "metadata": { "finalizers": finalizers } }));
    hold(Some(["example.com/hold"]));
    let pools = world.api::<BaseModelPool>("anew");
    world.cluster.block_on(pools.delete("smollm2", &DeleteParams::background())).unwrap();
    let leaves = |set: &StatefulSet| set.metadata.deletion_timestamp.is_some();
    world.until_is("anew", "smollm2-pool", "is being deleted", &leaves);
    world.cluster.apply("anew", &example("quickstart/pool.yaml"));
    world.until::<BaseModelPool>("anew", "smollm2", READY, "False", "ChildBeingDeleted");
    hold(None);
    world.until::<BaseModelPool>("anew", "smollm2", READY, "True", "PodsReady");
}
