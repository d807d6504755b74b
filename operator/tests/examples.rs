//! Examples for clusters that no test has: each is what an API server takes, and what the operator builds pods from.
#![allow(clippy::unwrap_used)]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use carryon_crds::{BaseModelPool, CarryOnJob};
use carryon_operator::admission::Admission;
use carryon_operator::pool::source::Model;
use carryon_operator::shared::Settings;
use carryon_operator::{job, pool};
use common::{at, patched, repository};
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use serde::Deserialize as _;
use serde_json::{Value, json};

/// Widths of hidden states of the models, which what is loaded says of them.
const MODEL: &str = r#"{"name": "m", "digest": "sha256:w", "tokenizerDigest": "sha256:t", "identityDigest": "sha256:i", "hiddenSize": 2048, "layers": 48, "vocabSize": 151936}"#;

fn files(folder: &str) -> Vec<PathBuf> {
    let mut files: Vec<PathBuf> =
        fs::read_dir(repository().join("examples").join(folder)).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Our objects in a file, with defaults, as an API server stores them.
fn admitted(file: &Path, admission: &Admission) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    let documents = serde_yaml::Deserializer::from_str(&text).map(|document| Value::deserialize(document).unwrap());
    let ours = documents.filter(|document| document["apiVersion"] == "carryon.dev/v1alpha1");
    let meta = json!({"metadata": {"namespace": "default", "uid": "u-1", "generation": 1}});
    ours.map(|document| patched(admission.admit(&document, None).unwrap_or_else(|error| panic!("{}: {error:?}", file.display())), &meta))
        .collect()
}

fn settings() -> Settings {
    Settings { worker_cuda_image: Some("example.org/worker-cuda:1".to_owned()), ..Settings::default() }
}

fn claim(name: &str) -> PersistentVolumeClaim {
    serde_json::from_value(json!({"metadata": {"name": name, "namespace": "default"}})).unwrap()
}

fn built(value: &Value) -> (pool::Validated, pool::Children) {
    let pool: BaseModelPool = serde_json::from_value(value.clone()).unwrap();
    let observed = pool::Observed { claim: Some(claim("any")), ..pool::Observed::default() };
    let validated = pool::validate(&pool, &observed, &settings()).unwrap();
    let children = pool::build(&validated);
    (validated, children)
}

#[test]
fn each_model_has_a_pool_on_a_gpu_a_job_with_a_preset_and_a_deployment() {
    let (admission, files) = (Admission::new().unwrap(), files("models"));
    assert_eq!(files.len(), 5);
    for file in files {
        let objects = admitted(&file, &admission);
        let kinds: Vec<&str> = objects.iter().map(|object| object["kind"].as_str().unwrap()).collect();
        assert_eq!(kinds, ["BaseModelPool", "CarryOnJob", "CarryOnDeployment"], "{}", file.display());
        let (validated, _) = built(&objects[0]);
        assert_eq!(validated.basis.image, "example.org/worker-cuda:1", "{}", file.display());
        assert!(matches!(validated.model, Model::Fetched(_)));
        let job: CarryOnJob = serde_json::from_value(objects[1].clone()).unwrap();
        assert!(job.spec.pools[0].taps.as_ref().is_some_and(|taps| taps.preset.is_some()), "{}", file.display());
        let model: Value = serde_json::from_str(MODEL).unwrap();
        let loaded = patched(objects[0].clone(), &json!({"status": {"readyReplicas": 1, "model": model}}));
        let observed = job::Observed {
            pool: Some(serde_json::from_value(loaded).unwrap()),
            claims: vec![claim(objects[0]["metadata"]["name"].as_str().unwrap())],
            ..job::Observed::default()
        };
        let validated =
            job::validate(&job, &observed, &settings(), &at(0)).unwrap_or_else(|refusal| panic!("{}: {refusal}", file.display()));
        assert!(job::build(&validated).attempt.is_some(), "{}", file.display());
    }
}

#[test]
fn each_source_has_an_example() {
    let admission = Admission::new().unwrap();
    let sources = files("sources").into_iter().map(|file| {
        let objects = admitted(&file, &admission);
        let (_, children) = built(&objects[0]);
        let pod = children.stateful_set.spec.unwrap().template.spec.unwrap();
        let before = pod.init_containers.into_iter().flatten().map(|container| container.name).collect::<Vec<_>>().join(" ");
        let source = objects[0]["spec"]["model"]["source"].as_object().unwrap().keys().next().unwrap().clone();
        (source, before)
    });
    let expected = [("huggingFace", "fetch"), ("image", "model"), ("objectStore", "fetch"), ("persistentVolumeClaim", "")];
    assert_eq!(sources.collect::<Vec<_>>(), expected.map(|(source, before)| (source.to_owned(), before.to_owned())));
}
