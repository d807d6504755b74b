//! Rollouts that do not get on: what is said of them, who serves meanwhile, and that they go on by themselves.

use carryon_crds::condition::types::{COMPLETE, READY, STALLED};
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_tests::cluster::hollow::{Fate, model};
use carryon_tests::operator::Operator;
use kube::api::DeleteParams;
use serde_json::{Value, json};

use super::world::{Conditions as _, World};

/// Refuses the pods of a component.
fn refuse(world: &World, component: &str) {
    let policy = format!(
        "apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {{name: no-{component}}}
spec:
  matchConstraints:
    resourceRules:
    - {{apiGroups: [''], apiVersions: [v1], operations: [CREATE], resources: [pods]}}
  validations:
  - expression: object.metadata.labels['app.kubernetes.io/component'] != '{component}'
    message: no {component} may run here
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {{name: no-{component}}}
spec: {{policyName: no-{component}, validationActions: [Deny]}}
"
    );
    world.cluster.apply("default", &policy);
    let run = ["run", "try", "--image=none", "--dry-run=server", "--labels"];
    let labels = format!("app.kubernetes.io/component={component}");
    let refused = || !world.cluster.command("kubectl").args(run).arg(&labels).output().unwrap().status.success();
    world.cluster.eventually("the policy is known", async || refused().then_some(()));
}

fn allow(world: &World, component: &str) {
    world.cluster.kubectl(&["delete", "validatingadmissionpolicybinding", &format!("no-{component}")]);
}

#[test]
fn pods_that_the_api_server_refuses_are_told_of_in_its_words_until_it_takes_them() {
    let Some(world) = World::start() else { return };
    ["pool", "trainer", "gateway"].iter().for_each(|component| refuse(&world, component));
    let _operator = Operator::start(&world.cluster, None);
    world.quickstart("refused");
    let words = |message: String, component: &str| {
        let words =
            format!("ValidatingAdmissionPolicy 'no-{component}' with binding 'no-{component}' denied request: no {component} may run here");
        assert!(message.ends_with(&words), "{message}");
    };
    let pool = world.until::<BaseModelPool>("refused", "smollm2", STALLED, "True", "FailedCreate");
    words(pool.message(STALLED), "pool");
    allow(&world, "pool");
    let job = world.until::<CarryOnJob>("refused", "quickstart", STALLED, "True", "FailedCreate");
    words(job.message(STALLED), "trainer");
    allow(&world, "trainer");
    let deployment = world.until::<CarryOnDeployment>("refused", "quickstart", STALLED, "True", "FailedCreate");
    words(deployment.message(STALLED), "gateway");
    assert_eq!(deployment.status.unwrap().heads[0].stable, None, "nobody serves yet");
    allow(&world, "gateway");
    world.until_served("refused");
    world.no_refused_writes();
}

#[test]
fn a_new_head_that_crashes_leaves_the_old_one_serving_and_named() {
    let Some(world) = World::within(&["crashing"]) else { return };
    let _operator = world.operate();
    world.quickstart("crashing");
    let before = world.until_served("crashing").status.unwrap();
    assert_eq!(before.heads[0].stable, before.heads[0].resolved);

    world.hollow.fate("crashing", "quickstart", Fate::Crashes(1, "error: head.safetensors is cut off".to_owned()));
    let digest = format!("sha256:{}", "5f".repeat(32));
    let artifact =
        json!({ "source": { "persistentVolumeClaim": { "claimName": "quickstart-output", "path": "other" } }, "digest": digest });
    let heads = json!([{ "name": "quickstart", "source": { "artifact": artifact } }]);
    world.patch::<CarryOnDeployment>("crashing", "quickstart", json!({ "spec": { "heads": heads } }));
    let stalled = world.until::<CarryOnDeployment>("crashing", "quickstart", STALLED, "True", "PodCrashing");
    assert!(stalled.message(STALLED).ends_with("it said: error: head.safetensors is cut off"), "{}", stalled.message(STALLED));
    let status = stalled.status.unwrap();
    assert_eq!((&status.heads[0].stable, &status.url), (&before.heads[0].stable, &before.url), "the old head serves");
    assert_eq!(status.heads[0].resolved.as_ref().unwrap().digest, digest);

    // Refused, it serves still.
    world.cluster.block_on(world.api::<BaseModelPool>("crashing").delete("smollm2", &DeleteParams::default())).unwrap();
    let refused = world.until::<CarryOnDeployment>("crashing", "quickstart", READY, "False", "PoolNotFound").status.unwrap();
    assert_eq!((&refused.heads[0].stable, &refused.url, refused.ready_replicas), (&before.heads[0].stable, &before.url, 1));
    world.cluster.apply("crashing", &carryon_tests::example("quickstart/pool.yaml"));

    world.hollow.fate("crashing", "quickstart", Fate::Runs);
    let after = world.until_served("crashing").status.unwrap();
    assert_eq!(after.heads[0].stable.as_ref().unwrap().digest, digest);
    world.no_refused_writes();
}

#[test]
fn what_a_newer_operator_wrote_into_a_status_stays() {
    let Some(world) = World::start() else { return };
    let _operator = Operator::start(&world.cluster, None);
    for (kind, of) in
        [("basemodelpools", ""), ("carryonjobs", ""), ("carryonjobs", "/attempts/items/properties"), ("carryondeployments", "")]
    {
        let path = format!("/spec/versions/0/schema/openAPIV3Schema/properties/status/properties{of}/newer");
        let newer = json!([{ "op": "add", "path": path, "value": { "type": "string" } }]);
        world.cluster.kubectl(&["patch", "crd", &format!("{kind}.carryon.dev"), "--type=json", "-p", &newer.to_string()]);
    }
    world.hollow.fate("newer", "quickstart", Fate::Runs);
    world.quickstart("newer");
    world.until::<CarryOnJob>("newer", "quickstart", READY, "True", "Running");
    let objects = ["bmp/smollm2", "coj/quickstart", "cod/quickstart"];
    let newer = |object: &str| world.cluster.kubectl(&["-n", "newer", "get", object, "-o", "jsonpath={.status.newer}"]);
    for object in objects {
        let patch: Value = json!({ "status": { "newer": "kept" } });
        world.cluster.eventually("the definition has the field", async || {
            world.cluster.kubectl(&["-n", "newer", "patch", object, "--subresource=status", "--type=merge", "-p", &patch.to_string()]);
            (newer(object) == "kept").then_some(())
        });
    }
    let of_attempt = || world.cluster.kubectl(&["-n", "newer", "get", "coj/quickstart", "-o", "jsonpath={.status.attempts[0].newer}"]);
    let patch = json!([{ "op": "add", "path": "/status/attempts/0/newer", "value": "kept" }]).to_string();
    world.cluster.eventually("the definition has the field of attempts", async || {
        world.cluster.kubectl(&["-n", "newer", "patch", "coj/quickstart", "--subresource=status", "--type=json", "-p", &patch]);
        (of_attempt() == "kept").then_some(())
    });
    // The attempt's end is written beside it.
    world.hollow.fate("newer", "quickstart", Fate::complete(&model().identity.digest()));
    world.until::<CarryOnJob>("newer", "quickstart", COMPLETE, "True", "Complete");
    world.hollow.fate("newer", "quickstart", Fate::Runs);
    world.until_served("newer");
    world.cluster.kubectl(&["-n", "newer", "scale", "cod/quickstart", "--replicas=2"]);
    world.until_is::<CarryOnDeployment>("newer", "quickstart", "serves twice", &|deployment| {
        deployment.status.as_ref().is_some_and(|status| status.ready_replicas == 2)
    });
    world.quiet();
    for object in objects {
        assert_eq!(newer(object), "kept", "{object}");
    }
    assert_eq!(of_attempt(), "kept");
    world.no_refused_writes();
}
