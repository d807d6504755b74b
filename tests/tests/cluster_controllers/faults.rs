//! What goes wrong around the objects, and what their statuses say of it.

use carryon_crds::condition::types::{FAILED, NO_NODE_FITS, READY, STALLED};
use carryon_crds::{BaseModelPool, CarryOnDeployment, CarryOnJob};
use carryon_tests::cluster::hollow::Fate;
use carryon_tests::example;
use carryon_tests::operator::{CUDA_IMAGE, Operator};
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{DeleteParams, ObjectMeta, PostParams};
use serde_json::json;

use super::world::{Conditions as _, World};

#[test]
fn an_object_that_cannot_be_decoded_does_not_stop_its_neighbours() {
    let Some(world) = World::start() else { return };
    world.volumes("guard");
    // As if another version of the definition had let it in.
    let loose = r#"[{"op": "remove", "path": "/spec/versions/0/schema/openAPIV3Schema/properties/spec/properties/dtype/enum"}]"#;
    world.cluster.kubectl(&["patch", "crd", "basemodelpools.carryon.dev", "--type=json", "-p", loose]);
    let strange = example("quickstart/pool.yaml").replace("name: smollm2", "name: strange").replace("dtype: bfloat16", "dtype: int3");
    world.apply_once_allowed("guard", &strange);
    let _operator = Operator::start(&world.cluster, None);
    world.cluster.apply("guard", &example("quickstart/pool.yaml"));
    world.cluster.apply("guard", &example("quickstart/job.yaml"));
    world.until::<CarryOnJob>("guard", "quickstart", READY, "True", "Complete");
    let sets = world.cluster.kubectl(&["-n", "guard", "get", "statefulset", "-o", "name"]);
    assert_eq!(sets, "statefulset.apps/smollm2-pool\n");
}

#[test]
fn trainers_that_fail_are_told_of_in_numbers_that_json_has() {
    let Some(world) = World::within(&["nan", "words"]) else { return };
    let _operator = world.operate();
    let words = r#"{"message": "step 12: the loss is not a number", "progress": {"phase": "training", "step": 12, "total_steps": 20, "train_loss": null}}"#;
    world.hollow.fate("nan", "quickstart", Fate::Ends(65, words.to_owned()));
    world.quickstart("nan");
    let job = world.until::<CarryOnJob>("nan", "quickstart", FAILED, "True", "DataRefused");
    assert!(job.message(READY).contains("the loss is not a number"), "{}", job.message(READY));
    let progress = job.status.unwrap().progress.unwrap();
    assert_eq!((progress.step, progress.train_loss), (12, None));
    let deployment = world.until::<CarryOnDeployment>("nan", "quickstart", STALLED, "True", "JobFailed");
    assert!(deployment.message(READY).contains("CarryOnJob nan/quickstart"));

    // Words that are no JSON at all are last words still.
    world.hollow.fate("words", "quickstart", Fate::Ends(1, r#"{"message": "x", "progress": {"train_loss": NaN}}"#.to_owned()));
    world.volumes("words");
    world.cluster.apply("words", &example("quickstart/pool.yaml"));
    world.cluster.apply("words", &example("quickstart/job.yaml").replace("spec:\n", "spec:\n  backoffLimit: 0\n"));
    let job = world.until::<CarryOnJob>("words", "quickstart", FAILED, "True", "BackoffLimitExceeded");
    assert!(job.message(READY).contains("NaN"), "{}", job.message(READY));
    world.no_refused_writes();
}

#[test]
fn a_pool_that_no_node_could_hold_says_so_with_the_figures_until_one_comes() {
    let Some(world) = World::start() else { return };
    let node = json!({ "metadata": { "name": "gpu-1" } });
    let nodes: Api<Node> = Api::all(world.cluster.client());
    world.cluster.block_on(nodes.create(&PostParams::default(), &serde_json::from_value(node).unwrap())).unwrap();
    world.cluster.add_extended_resource("gpu-1", "nvidia.com/gpu", 2);
    world.hollow.fate("large", "smollm2", Fate::Waits("0/1 nodes are available: 1 Insufficient nvidia.com/gpu.".to_owned()));
    let _operator = Operator::start(&world.cluster, None);
    world.volumes("large");
    let large = "  server:\n    resources:\n      limits: {nvidia.com/gpu: 4}\n";
    world.cluster.apply("large", &(example("quickstart/pool.yaml") + large));
    let pool = world.until::<BaseModelPool>("large", "smollm2", NO_NODE_FITS, "True", "InsufficientCapacity");
    assert_eq!(pool.message(NO_NODE_FITS), "no node is large enough for a pod: gpu-1 has 2 of 4 nvidia.com/gpu");
    world.until::<BaseModelPool>("large", "smollm2", STALLED, "False", "Unschedulable");
    assert_eq!(world.get::<BaseModelPool>("large", "smollm2").status.unwrap().worker_image.as_deref(), Some(CUDA_IMAGE));
    world.cluster.add_extended_resource("gpu-1", "nvidia.com/gpu", 8);
    world.until_is::<BaseModelPool>("large", "smollm2", "may fit", &|pool| pool.message(NO_NODE_FITS).is_empty());
    world.no_refused_writes();
}

#[test]
fn a_pool_that_goes_is_missed_by_name_and_welcomed_back() {
    let Some(world) = World::within(&["gone", "hasty"]) else { return };
    let _operator = world.operate();
    world.hollow.fate("gone", "smollm2", Fate::Waits("0/2 nodes are available: 2 Insufficient nvidia.com/gpu.".to_owned()));
    world.hollow.fate("gone", "quickstart", Fate::Runs);
    world.quickstart("gone");
    let pool = world.until::<BaseModelPool>("gone", "smollm2", READY, "False", "Unschedulable");
    assert!(pool.message(READY).ends_with("0/2 nodes are available: 2 Insufficient nvidia.com/gpu."), "{}", pool.message(READY));
    world.until::<CarryOnJob>("gone", "quickstart", READY, "False", "PoolNotReady");
    world.hollow.fate("gone", "smollm2", Fate::Runs);
    world.until::<CarryOnJob>("gone", "quickstart", READY, "True", "Running");

    world.cluster.block_on(world.api::<BaseModelPool>("gone").delete("smollm2", &DeleteParams::default())).unwrap();
    let api = world.api::<BaseModelPool>("gone");
    world.cluster.eventually("the pool is gone", async || api.get_opt("smollm2").await.unwrap().is_none().then_some(()));
    // The trainer waits for its pool by itself; an attempt more would not help it.
    let job: CarryOnJob = world.get("gone", "quickstart");
    assert_eq!(job.status.unwrap().attempt, 1);
    world.hollow.fate("gone", "quickstart", Fate::complete("sha256:anotherbase"));
    world.until::<CarryOnJob>("gone", "quickstart", READY, "True", "Complete");
    let deployment = world.until::<CarryOnDeployment>("gone", "quickstart", READY, "False", "PoolNotFound");
    assert!(deployment.message(READY).contains("BaseModelPool gone/smollm2"), "{}", deployment.message(READY));
    // Back, but it is not the base that the head was trained on.
    world.cluster.apply("gone", &example("quickstart/pool.yaml"));
    let deployment = world.until::<CarryOnDeployment>("gone", "quickstart", STALLED, "True", "BaseModelDiffers");
    assert!(deployment.message(READY).contains("sha256:anotherbase"), "{}", deployment.message(READY));

    // A job that is not to wait gives up.
    world.volumes("hasty");
    world.cluster.apply(
        "hasty",
        &example("quickstart/job.yaml").replace("spec:\n", "spec:\n  poolUnavailablePolicy: Fail\n  poolUnavailableGraceSeconds: 1\n"),
    );
    world.until::<CarryOnJob>("hasty", "quickstart", FAILED, "True", "PoolUnavailable");
    world.no_refused_writes();
}

#[test]
fn a_missing_permission_is_named_and_its_return_is_noticed() {
    let Some(world) = World::start() else { return };
    let roles: kube::Api<k8s_openapi::api::rbac::v1::ClusterRole> = kube::Api::all(world.cluster.client());
    let whole = world.cluster.block_on(roles.get("carry-on-operator")).unwrap();
    let mut less = whole.clone();
    let may_not =
        |rule: &k8s_openapi::api::rbac::v1::PolicyRule| rule.resources.as_ref().is_some_and(|all| all.contains(&"services".to_owned()));
    for rule in less.rules.iter_mut().flatten().filter(|rule| may_not(rule)) {
        rule.verbs = ["get", "list", "watch"].map(str::to_owned).to_vec();
    }
    world.cluster.block_on(roles.replace("carry-on-operator", &Default::default(), &less)).unwrap();
    world.quickstart("rights");
    let _operator = Operator::start(&world.cluster, None);
    let pool = world.until::<BaseModelPool>("rights", "smollm2", READY, "False", "Forbidden");
    let message = pool.message(READY);
    assert!(["Service rights/smollm2-pool", "services", "permission"].iter().all(|part| message.contains(part)), "{message}");
    let less = world.cluster.block_on(roles.get("carry-on-operator")).unwrap();
    let metadata = ObjectMeta { resource_version: less.metadata.resource_version, ..whole.metadata.clone() };
    let whole = k8s_openapi::api::rbac::v1::ClusterRole { metadata, ..whole };
    world.cluster.block_on(roles.replace("carry-on-operator", &Default::default(), &whole)).unwrap();
    world.until_served("rights");
}

#[test]
fn a_webhook_that_does_not_answer_is_named_and_its_return_is_noticed() {
    let Some(world) = World::start() else { return };
    let jobs = json!({ "apiGroups": ["batch"], "apiVersions": ["v1"], "operations": ["CREATE"], "resources": ["jobs"] });
    let away = json!({ "name": "jobs.example.org", "clientConfig": { "url": "https://127.0.0.1:1/" }, "rules": [jobs],
        "sideEffects": "None", "admissionReviewVersions": ["v1"] });
    let away = json!({ "apiVersion": "admissionregistration.k8s.io/v1", "kind": "MutatingWebhookConfiguration",
        "metadata": { "name": "away" }, "webhooks": [away] });
    world.cluster.apply("default", &away.to_string());
    let _operator = Operator::start(&world.cluster, None);
    world.volumes("webhook");
    world.cluster.apply("webhook", &example("quickstart/pool.yaml"));
    world.cluster.apply("webhook", &example("quickstart/job.yaml"));
    let job = world.until::<CarryOnJob>("webhook", "quickstart", READY, "False", "WebhookUnavailable");
    assert_eq!(job.message(READY), "cannot create Job webhook/quickstart-1: the admission webhook jobs.example.org does not answer");
    world.cluster.kubectl(&["delete", "mutatingwebhookconfiguration", "away"]);
    world.until::<CarryOnJob>("webhook", "quickstart", READY, "True", "Complete");
}
