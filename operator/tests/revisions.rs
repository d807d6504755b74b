//! What pods were rendered as stands through upgrades of the operator, until the spec or its owner says otherwise.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::{BaseModelPool, CarryOnDeployment, names};
use carryon_operator::shared::revision::name_in;
use carryon_operator::shared::{Settings, revision};
use carryon_operator::{deployment, job, pool};
use common::scene::Scene;
use common::{at, example, patched};
use k8s_openapi::api::apps::v1::{ControllerRevision, StatefulSetStatus};
use k8s_openapi::api::core::v1::PodTemplateSpec;
use serde_json::{Value, json};

fn settings(image: &str) -> Settings {
    Settings { worker_image: image.to_owned(), ..Settings::default() }
}

fn children(pool: &BaseModelPool, revisions: &[ControllerRevision], settings: &Settings) -> pool::Children {
    let claim = Some(serde_json::from_value(json!({"metadata": {"name": "models"}})).unwrap());
    let observed = pool::Observed { claim, revisions: revisions.to_vec(), ..pool::Observed::default() };
    pool::build(&pool::validate(pool, &observed, settings).unwrap())
}

fn template(children: &pool::Children) -> PodTemplateSpec {
    children.stateful_set.spec.clone().unwrap().template
}

fn image(template: &PodTemplateSpec) -> String {
    template.spec.as_ref().unwrap().containers[0].image.clone().unwrap()
}

fn args(template: &PodTemplateSpec) -> Vec<String> {
    template.spec.as_ref().unwrap().containers[0].args.clone().unwrap()
}

fn edited(pool: &BaseModelPool, patch: Value) -> BaseModelPool {
    serde_json::from_value(patched(serde_json::to_value(pool).unwrap(), &patch)).unwrap()
}

/// What another build of the operator has kept: it knew an argument that this one does not, had another probe and another default
/// configuration, and knew nothing of a field that has a default now.
fn of_another_build(kept: &ControllerRevision, unknown_yet: &str) -> ControllerRevision {
    let mut other = kept.clone();
    let mut pods: Value = serde_json::from_str(kept.data.as_ref().unwrap().0["pods"].as_str().unwrap()).unwrap();
    let container = &mut pods["template"]["spec"]["containers"][0];
    container["args"].as_array_mut().unwrap().push(json!("--retired"));
    container["readinessProbe"]["periodSeconds"] = json!(99);
    pods["config"] = json!("{\"of\": \"another build\"}");
    other.data.as_mut().unwrap().0 = json!({"pods": pods.to_string()});
    other.metadata.name = Some("smollm2-pool-1234567890".to_owned());
    let annotations = other.metadata.annotations.as_mut().unwrap();
    let mut source: Value = serde_json::from_str(&annotations[names::RENDERED_FROM_ANNOTATION]).unwrap();
    let removed = source["spec"].as_object_mut().unwrap().remove(unknown_yet);
    assert!(removed.is_some(), "{source} has no {unknown_yet}");
    annotations.insert(names::RENDERED_FROM_ANNOTATION.to_owned(), source.to_string());
    other
}

#[test]
fn what_another_build_rendered_stands_until_it_is_edited_or_released() {
    let pool: BaseModelPool = example("quickstart/pool.yaml");
    let old = of_another_build(&children(&pool, &[], &settings("worker:1")).revision, "dtype");
    let kept = [old.clone()];
    let today = |pool: &BaseModelPool| children(pool, &kept, &settings("worker:2"));

    let stands = today(&pool);
    let standing = template(&stands);
    assert_eq!(name_in(&standing), Some("smollm2-pool-1234567890"));
    assert_eq!((image(&standing).as_str(), args(&standing).last().unwrap().as_str()), ("worker:1", "--retired"));
    assert_eq!(standing.spec.as_ref().unwrap().containers[0].readiness_probe.as_ref().unwrap().period_seconds, Some(99));
    assert_eq!(stands.config_map.data.as_ref().unwrap()[names::CONFIG_FILE], "{\"of\": \"another build\"}");
    assert_eq!((&stands.revision.data, &stands.revision.metadata.annotations), (&old.data, &old.metadata.annotations), "nothing to write");

    // By a person or an autoscaler; a generation is no edit.
    let scaled = today(&edited(&pool, json!({"metadata": {"generation": 7}, "spec": {"replicas": 5}})));
    assert_eq!((template(&scaled), scaled.stateful_set.spec.as_ref().unwrap().replicas), (standing.clone(), Some(5)));

    // An old image never meets new arguments, nor a new one the old.
    let edit = json!({"spec": {"engine": {"maxNumSeqs": 3}}});
    let release = json!({"metadata": {"annotations": {names::UPGRADE_ANNOTATION: "2026-11"}}});
    for change in [edit, release.clone()] {
        let renewed = template(&today(&edited(&pool, change.clone())));
        assert_eq!(image(&renewed), "worker:2", "{change}");
        assert!(!args(&renewed).contains(&"--retired".to_owned()), "{change}");
        assert_ne!(name_in(&renewed), name_in(&standing), "{change}");
    }

    // Released once, it stands again.
    let released = edited(&pool, release);
    let kept = [old, today(&released).revision];
    assert_eq!(template(&children(&released, &kept, &settings("worker:3"))), template(&today(&released)));
}

#[test]
fn a_pool_with_a_gpu_keeps_the_image_of_before_there_was_one_for_cuda() {
    let gpu = json!({"spec": {"server": {"resources": {"limits": {"nvidia.com/gpu": 1}}}}});
    let pool = edited(&example("quickstart/pool.yaml"), gpu);
    let images = |image: &str, cuda: Option<&str>| Settings { worker_cuda_image: cuda.map(str::to_owned), ..settings(image) };
    let mut kept = children(&pool, &[], &images("worker:1", Some("worker:1"))).revision;
    let annotations = kept.metadata.annotations.as_mut().unwrap();
    let mut source: Value = serde_json::from_str(&annotations[names::RENDERED_FROM_ANNOTATION]).unwrap();
    assert_eq!(source["spec"]["engine"].as_object_mut().unwrap().remove("device"), Some(json!("auto")));
    annotations.insert(names::RENDERED_FROM_ANNOTATION.to_owned(), source.to_string());
    let kept = [kept];
    for cuda in [None, Some("worker-cuda:2")] {
        assert_eq!(image(&template(&children(&pool, &kept, &images("worker:2", cuda)))), "worker:1");
    }
    let released = edited(&pool, json!({"metadata": {"annotations": {names::UPGRADE_ANNOTATION: "2"}}}));
    assert_eq!(image(&template(&children(&released, &kept, &images("worker:2", Some("worker-cuda:2"))))), "worker-cuda:2");
}

#[test]
fn other_defaults_for_pods_roll_none_and_are_in_what_is_rendered_next() {
    let pool: BaseModelPool = example("quickstart/pool.yaml");
    let kept = [children(&pool, &[], &settings("worker:1")).revision];
    let pod_defaults =
        r#"{"imagePullSecrets": [{"name": "mirror"}], "env": [{"name": "HTTPS_PROXY", "value": "http://proxy"}]}"#.parse().unwrap();
    let today = Settings { pod_defaults, ..settings("worker:1") };
    let standing = children(&pool, &kept, &today);
    assert_eq!(standing, children(&pool, &kept, &settings("worker:1")));
    let upgraded = edited(&pool, json!({"metadata": {"annotations": {names::UPGRADE_ANNOTATION: "again"}}}));
    let pod = template(&children(&upgraded, &kept, &today)).spec.unwrap();
    assert_eq!(pod.image_pull_secrets.unwrap()[0].name, "mirror");
    let env = pod.containers[0].env.as_ref().unwrap();
    let proxy = env.iter().find(|variable| variable.name == "HTTPS_PROXY").unwrap();
    assert_eq!(proxy.value.as_deref(), Some("http://proxy"));
}

#[test]
fn an_edit_that_shapes_no_pod_renders_the_same_pods() {
    let pool: BaseModelPool = example("quickstart/pool.yaml");
    let first = children(&pool, &[], &settings("worker:1"));
    let same = edited(&pool, json!({"metadata": {"annotations": {names::UPGRADE_ANNOTATION: "again"}}}));
    let second = children(&same, std::slice::from_ref(&first.revision), &settings("worker:1"));
    assert_eq!((template(&second), &second.config_map, &second.revision.data), (template(&first), &first.config_map, &first.revision.data));
    assert_ne!(second.revision.metadata.annotations, first.revision.metadata.annotations, "it says what it is of now");
}

#[test]
fn a_ruined_revision_does_not_stand() {
    let pool: BaseModelPool = example("quickstart/pool.yaml");
    let mut kept = children(&pool, &[], &settings("worker:1")).revision;
    kept.data.as_mut().unwrap().0 = json!({"pods": "{}"});
    assert_eq!(image(&template(&children(&pool, &[kept], &settings("worker:2")))), "worker:2");
}

#[test]
fn all_attempts_of_a_job_are_rendered_as_the_first_was() {
    let scene = Scene::running(json!({}));
    let build = |patch: Value, revisions: Vec<ControllerRevision>, settings: &Settings| {
        let job = serde_json::from_value(patched(serde_json::to_value(&scene.job).unwrap(), &patch)).unwrap();
        let observed = job::Observed { revisions, ..scene.observed.clone() };
        job::build(&job::validate(&job, &observed, settings, &at(1)).unwrap())
    };
    let image = |children: &job::Children| image(&children.attempt.clone().unwrap().spec.unwrap().template);
    let first = build(json!({}), Vec::new(), &settings("worker:1"));
    let kept = || vec![first.revision.clone().unwrap()];
    // What may change while it runs shapes no pod.
    let changed = json!({"spec": {"backoffLimit": 9, "activeDeadlineSeconds": 3600, "ttlSecondsAfterFinished": 60}});
    assert_eq!(build(changed, kept(), &settings("worker:2")).attempt, first.attempt);
    let released = json!({"metadata": {"annotations": {names::UPGRADE_ANNOTATION: "1"}}});
    assert_eq!(image(&build(released, kept(), &settings("worker:2"))), "worker:2");
}

#[test]
fn another_head_is_rendered_anew_and_where_it_was_found_is_no_matter() {
    let claims = vec![serde_json::from_value(json!({"metadata": {"name": "out"}})).unwrap()];
    let observed = deployment::Observed { claims, pool: Some(example("quickstart/pool.yaml")), ..deployment::Observed::default() };
    let gateway = |digest: &str, revisions: Vec<ControllerRevision>, image: &str| {
        let artifact = json!({"source": {"persistentVolumeClaim": {"claimName": "out", "path": "head"}}, "digest": digest});
        let patch = json!({"spec": {"heads": [{"name": "quickstart", "source": {"artifact": artifact}}]}});
        let deployment = serde_json::to_value(example::<CarryOnDeployment>("quickstart/deployment.yaml")).unwrap();
        let deployment: CarryOnDeployment = serde_json::from_value(patched(deployment, &patch)).unwrap();
        let observed = deployment::Observed { revisions, ..observed.clone() };
        deployment::build(&deployment::validate(&deployment, &observed, &settings(image)).unwrap())
    };
    let digest = |letter: &str| format!("sha256:{}", letter.repeat(64));
    let first = gateway(&digest("a"), Vec::new(), "worker:1");
    let template = |children: &deployment::Children| children.deployment.spec.clone().unwrap().template;
    assert_eq!(template(&gateway(&digest("a"), vec![first.revision.clone()], "worker:2")), template(&first));
    let second = gateway(&digest("b"), vec![first.revision.clone()], "worker:2");
    assert_eq!(image(&template(&second)), "worker:2");
    // Each ReplicaSet reads its own configuration.
    assert_ne!(second.config_map.metadata.name, first.config_map.metadata.name);
    assert_eq!((second.config_map.immutable, name_in(&template(&second))), (Some(true), second.config_map.metadata.name.as_deref()));
}

#[test]
fn nothing_is_collected_before_no_pod_of_before_can_come_again() {
    let pool: BaseModelPool = example("quickstart/pool.yaml");
    let set = children(&pool, &[], &settings("worker:1")).stateful_set;
    let settled = |status: Value| {
        let mut set = set.clone();
        set.metadata.generation = Some(2);
        set.status = Some(serde_json::from_value::<StatefulSetStatus>(status).unwrap());
        pool::Applied { stateful_set: set }.is_rolled_out()
    };
    let done = json!({"observedGeneration": 2, "replicas": 1, "updatedReplicas": 1, "currentRevision": "b", "updateRevision": "b"});
    assert!(settled(done.clone()));
    for not in [
        json!({"observedGeneration": 1}),
        json!({"replicas": 2}),
        json!({"replicas": 0, "updatedReplicas": 0}),
        json!({"updatedReplicas": 0}),
        json!({"currentRevision": "a"}),
    ] {
        assert!(!settled(patched(done.clone(), &not)), "{not}");
    }
}

#[test]
fn a_stateful_set_finds_no_revision_of_ours() {
    let children = children(&example("quickstart/pool.yaml"), &[], &settings("worker:1"));
    let selector = children.stateful_set.spec.unwrap().selector.match_labels.unwrap();
    let labels = children.revision.metadata.labels.unwrap();
    assert!(selector.iter().any(|(key, value)| labels.get(key) != Some(value)), "{labels:?}");
    assert!(revision::name_in(&PodTemplateSpec::default()).is_none());
}
