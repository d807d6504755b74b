//! A finished job's result in its metadata: what a backup without status gives back.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::{CarryOnJob, names};
use carryon_operator::job::record::Record;
use common::scene::{Scene, done, named};
use serde_json::{Value, json};

/// The job as a backup restores it: another UID, no status, metadata and spec as they were.
fn restored(job: &CarryOnJob) -> Scene {
    let mut scene = Scene::new(json!({}));
    let record = Record::due(job, job.status.as_ref().unwrap()).unwrap();
    scene.job = CarryOnJob { status: None, ..job.clone() };
    scene.job.metadata.uid = Some("another".to_owned());
    let annotations = scene.job.metadata.annotations.get_or_insert_default();
    annotations.insert(names::RESULT_ANNOTATION.to_owned(), serde_json::to_string(&record).unwrap());
    scene.now = 100_000;
    scene
}

#[test]
fn a_complete_job_is_complete_again_and_trains_nothing() {
    let mut first = Scene::running(json!({}));
    first.ends(0, &done());
    let mut scene = restored(&first.job);
    scene.observed = Default::default();
    assert_eq!(scene.reconcile(), (None, None));
    let (before, after) = (first.job.status.unwrap(), scene.job.status.clone().unwrap());
    assert_eq!(scene.says(), "Ready+Complete Complete: the head is written; status.artifact names it");
    assert_eq!((after.artifact, after.completion_time, after.attempt), (before.artifact, before.completion_time, before.attempt));
    assert_eq!(Record::due(&scene.job, scene.job.status.as_ref().unwrap()), None, "it is written already");
    let before = scene.job.status.clone();
    scene.now += 1;
    assert_eq!((scene.reconcile(), &scene.job.status), ((None, None), &before));
}

#[test]
fn a_failed_job_is_failed_again() {
    let mut first = Scene::running(json!({}));
    first.ends(65, "train.jsonl, line 3: no text");
    let mut scene = restored(&first.job);
    assert_eq!(scene.reconcile(), (None, None));
    assert_eq!(scene.says(), first.says());
}

#[test]
fn what_is_not_of_this_very_job_or_cannot_be_is_not_believed() {
    let mut first = Scene::running(json!({}));
    first.ends(0, &done());
    let trains = |change: &dyn Fn(&mut CarryOnJob, &mut Value), what: &str| {
        let mut scene = restored(&first.job);
        let annotations = scene.job.metadata.annotations.clone().unwrap();
        let mut record: Value = serde_json::from_str(&annotations[names::RESULT_ANNOTATION]).unwrap();
        change(&mut scene.job, &mut record);
        let text = if record.is_null() { "{".to_owned() } else { record.to_string() };
        scene.job.metadata.annotations.get_or_insert_default().insert(names::RESULT_ANNOTATION.to_owned(), text);
        assert_eq!(scene.reconcile(), named("quickstart-1"), "{what}");
    };
    trains(&|_, record| *record = Value::Null, "no JSON");
    trains(&|job, _| job.spec.training.seed = 7, "another spec");
    trains(&|_, record| record["name"] = json!("another"), "a copy under another name");
    trains(&|_, record| record["artifact"]["uri"] = json!("pvc://another/head"), "another claim");
    trains(&|_, record| record["artifact"]["uri"] = json!("pvc://quickstart-output/../head"), "a way out of the claim");
    trains(&|_, record| record["artifact"]["digest"] = json!("h"), "no digest");
    trains(&|_, record| record["failure"] = json!({"reason": "Whim", "message": ""}), "a reason that does not exist");
    trains(&|_, record| record["failure"] = json!({"reason": "DataRefused", "message": "x".repeat(70_000)}), "too long");
    // What may be changed while a job runs may differ; a field that is new to this operator has its default.
    let mut scene = restored(&first.job);
    scene.job.spec.backoff_limit = 1;
    let annotations = scene.job.metadata.annotations.as_mut().unwrap();
    let mut record: Value = serde_json::from_str(&annotations[names::RESULT_ANNOTATION]).unwrap();
    record["spec"]["head"].as_object_mut().unwrap().remove("alpha");
    annotations.insert(names::RESULT_ANNOTATION.to_owned(), record.to_string());
    assert_eq!(scene.reconcile(), (None, None));
}

#[test]
fn what_a_trainer_says_in_control_characters_ends_its_job_all_the_same() {
    let mut first = Scene::running(json!({"spec": {"backoffLimit": 0}}));
    first.ends(1, "it begins\nerror:\tno \u{1b}[31mroom\u{1b}[0m");
    assert!(first.says().starts_with("Stalled+Failed BackoffLimitExceeded: 1 attempts failed"), "{}", first.says());
    assert!(!first.says().contains(char::is_control), "{:?}", first.says());
    let mut scene = restored(&first.job);
    assert_eq!((scene.reconcile(), scene.says()), ((None, None), first.says()));
}

#[test]
fn a_result_that_could_not_be_read_back_is_not_due() {
    let labels: Vec<String> = (0..1000).map(|number| format!("{number:0>100}")).collect();
    let mut scene = Scene::running(json!({"spec": {"task": "Classification", "head": {"labels": labels}}}));
    scene.ends(0, &done());
    assert_eq!(Record::due(&scene.job, scene.job.status.as_ref().unwrap()), None);
}
