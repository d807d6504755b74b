//! Whom pods run as, where admission has its say: Pod Security, and users and groups by namespace as on OpenShift.

use carryon_crds::BaseModelPool;
use carryon_crds::condition::types::STALLED;
use carryon_tests::operator::Operator;
use k8s_openapi::api::core::v1::{Pod, PodSecurityContext};

use super::world::{Conditions as _, World};

/// Refuses pods that name a user or a group outside of a range, as OpenShift's `restricted-v2` does; here nobody puts one in.
const RANGE: &str = "apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: range}
spec:
  matchConstraints:
    namespaceSelector: {matchExpressions: [{key: range, operator: Exists}]}
    resourceRules:
    - {apiGroups: [''], apiVersions: [v1], operations: [CREATE], resources: [pods]}
  variables:
  - {name: pod, expression: object.spec.securityContext}
  validations:
  - expression: '!has(variables.pod.runAsUser) || (variables.pod.runAsUser >= 1000680000 && variables.pod.runAsUser < 1000690000)'
    message: must be in the ranges [1000680000, 1000689999]
  - expression: '!has(variables.pod.fsGroup) || (variables.pod.fsGroup >= 1000680000 && variables.pod.fsGroup < 1000690000)'
    message: must be in the ranges [1000680000, 1000689999]
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: range}
spec: {policyName: range, validationActions: [Deny]}
";

/// What makes an API server an OpenShift's, for those who ask.
const OPENSHIFT: &str = "apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: rangeallocations.security.openshift.io}
spec:
  group: security.openshift.io
  scope: Cluster
  names: {plural: rangeallocations, singular: rangeallocation, kind: RangeAllocation}
  versions:
  - {name: v1, served: true, storage: true, schema: {openAPIV3Schema: {type: object}}}
";

fn contexts(world: &World, space: &str) -> Vec<PodSecurityContext> {
    let pods = world.list::<Pod>(space);
    let components: std::collections::BTreeSet<_> =
        pods.iter().map(|pod| pod.metadata.labels.as_ref().unwrap()["app.kubernetes.io/component"].clone()).collect();
    assert_eq!(components.into_iter().collect::<Vec<_>>(), ["gateway", "pool", "trainer"]);
    pods.into_iter().map(|pod| pod.spec.unwrap().security_context.unwrap()).collect()
}

#[test]
fn pods_are_restricted_and_leave_users_and_groups_to_a_cluster_that_has_ranges() {
    let Some(world) = World::start() else { return };
    let operator = Operator::start(&world.cluster, None);
    world.volumes("restricted");
    world.cluster.kubectl(&["label", "namespace", "restricted", "pod-security.kubernetes.io/enforce=restricted"]);
    world.manifests("restricted");
    world.until_served("restricted");
    assert!(contexts(&world, "restricted").iter().all(|context| context.run_as_user == Some(65_532)));

    // With users of our own choice, the ranges' words are in the status.
    world.cluster.apply("default", RANGE);
    world.volumes("fixed");
    world.cluster.kubectl(&["label", "namespace", "fixed", "range=1000680000"]);
    let dry = [
        "-n",
        "fixed",
        "run",
        "try",
        "--image=none",
        "--dry-run=server",
        "--overrides",
        r#"{"spec": {"securityContext": {"fsGroup": 1}}}"#,
    ];
    let refused = || !world.cluster.command("kubectl").args(dry).output().unwrap().status.success();
    world.cluster.eventually("the policy is known", async || refused().then_some(()));
    world.manifests("fixed");
    let pool = world.until::<BaseModelPool>("fixed", "smollm2", STALLED, "True", "FailedCreate");
    assert!(pool.message(STALLED).ends_with("must be in the ranges [1000680000, 1000689999]"), "{}", pool.message(STALLED));
    drop(operator);

    world.cluster.apply("default", OPENSHIFT);
    world.cluster.kubectl(&["wait", "--for=condition=Established", "crd", "rangeallocations.security.openshift.io", "--timeout=60s"]);
    let _operator = Operator::start(&world.cluster, None);
    world.volumes("range");
    world.cluster.kubectl(&["label", "namespace", "range", "range=1000680000", "pod-security.kubernetes.io/enforce=restricted"]);
    world.manifests("range");
    world.until_served("range");
    assert!(contexts(&world, "range").iter().all(|context| (context.run_as_user, context.fs_group) == (None, None)));
    world.no_refused_writes();
}
