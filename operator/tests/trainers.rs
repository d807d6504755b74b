//! Never two trainers on one output folder, and no end that is lost: what a job makes of pods that outlive their batch Job.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::condition::types::{COMPLETE, GENERAL_TEXT_KEPT, MEMORY_PLANNED, PROMOTABLE};
use carryon_crds::condition::{find, is_true};
use carryon_crds::job::AttemptResult;
use carryon_operator::job::trainers::{outlived, recorded};
use carryon_operator::shared::{Refusal, Settings};
use common::at;
use common::scene::{Scene, done, named};
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

/// How many pods are let go.
fn let_go(scene: &Scene) -> usize {
    recorded(&scene.job, &scene.observed.pods, &at(scene.now)).count()
}

/// Status and message of the condition `MemoryPlanned`, after one look.
fn planned(mut scene: Scene) -> Option<(String, String)> {
    scene.reconcile();
    find(&scene.job.status?.conditions, MEMORY_PLANNED).map(|condition| (condition.status.clone(), condition.message.clone()))
}

#[test]
fn a_job_says_before_it_starts_what_its_trainer_takes_of_memory() {
    let limited = |memory: &str| Scene::new(json!({"spec": {"trainer": {"resources": {"limits": {"memory": memory}}}}}));
    let (status, message) = planned(limited("4Gi")).unwrap();
    assert!(
        message.starts_with("batches of 8 samples of 320 tokens take ") && message.contains("weights 19.7 MB, gradients "),
        "{message}"
    );
    assert_eq!(status, "True");
    let (status, message) = planned(limited("128Mi")).unwrap();
    assert!(message.ends_with(", and the trainer up to 128.0 MB: more than spec.trainer.resources.limits.memory: 128Mi"), "{message}");
    assert_eq!(status, "False");
    let mut poolless = limited("4Gi");
    poolless.observed.pool = None;
    assert_eq!(planned(poolless), None, "the base's width is not known");
}

#[test]
fn a_head_that_forgets_raises_an_alarm_on_its_job() {
    let split = json!({"general": ["general.jsonl"]});
    let bounded = json!({"spec": {"data": {"split": split}, "evaluation": {"maxGeneralLossIncrease": 0.1}}});
    let kept = |scene: &mut Scene, head: f64| {
        let progress = json!({"phase": "training", "step": 9, "total_steps": 90, "general_loss": head, "base_general_loss": 3.0});
        scene.observed.progress = Some(serde_json::from_value(progress).unwrap());
        scene.reconcile();
        let status = scene.job.status.clone().unwrap();
        find(&status.conditions, GENERAL_TEXT_KEPT).map(|condition| (condition.status.clone(), condition.message.clone()))
    };
    let mut scene = Scene::running(bounded);
    let message = |text: &str| format!("the loss of data.split.general is {text}");
    assert_eq!(kept(&mut scene, 3.05), Some(("True".to_owned(), message("0.0500 nats above the base's"))));
    let more = "0.2500 nats above the base's, more than evaluation.maxGeneralLossIncrease: 0.1";
    assert_eq!(kept(&mut scene, 3.25), Some(("False".to_owned(), message(more))));
    assert_eq!(scene.job.status.as_ref().unwrap().progress.as_ref().unwrap().general_loss.as_deref(), Some("3.2500"));
    assert_eq!(kept(&mut Scene::running(json!({})), 9.0), None, "nothing was asked for");
}

#[test]
fn a_head_is_promotable_when_its_figures_are_what_the_job_asks_for() {
    let bounded = json!({"spec": {"evaluation": {"thresholds": [{"metric": "Loss", "max": 0.4}]}}});
    let promotable = |patch: Value, unmet: &[&str]| {
        let mut scene = Scene::running(patch);
        let before = scene.job.status.clone().unwrap();
        assert_eq!(find(&before.conditions, PROMOTABLE), None, "there is no head yet");
        let words = json!({"message": "wrote the head", "digest": "sha256:h", "base_model_digest": "sha256:b",
            "evaluation": {"exact_match": 0.25}, "unmet_thresholds": unmet});
        scene.ends(0, &words.to_string());
        let status = scene.job.status.clone().unwrap();
        assert!(find(&status.conditions, COMPLETE).is_some());
        assert_eq!(status.artifact.unwrap().evaluation["exact_match"], "0.2500");
        find(&status.conditions, PROMOTABLE).map(|condition| (condition.status.clone(), condition.message.clone()))
    };
    let met = ("True".to_owned(), "the head is what evaluation.thresholds ask for".to_owned());
    assert_eq!(promotable(bounded.clone(), &[]), Some(met));
    let unmet = ("False".to_owned(), "by evaluation.thresholds: loss is 0.5, more than 0.4".to_owned());
    assert_eq!(promotable(bounded, &["loss is 0.5, more than 0.4"]), Some(unmet));
    assert_eq!(promotable(json!({}), &[]), None, "nothing was asked for");
}

#[test]
fn a_look_that_was_refused_keeps_the_head_whose_end_it_saw() {
    let mut scene = Scene::running(json!({}));
    scene.refusal = Some(Refusal::waiting("Forbidden", "may not apply ConfigMap default/quickstart-trainer"));
    scene.ends(0, &done());
    let status = scene.job.status.clone().unwrap();
    assert_eq!(status.artifact.map(|artifact| artifact.digest), Some("sha256:h".to_owned()));
    assert!(is_true(&status.conditions, COMPLETE), "{}", scene.says());
    // The pod has gone since: nothing can be read again.
    scene.observed.pods.clear();
    scene.observed.attempt = None;
    scene.reconcile();
    assert_eq!(scene.says(), "Ready+Complete Complete: the head is written; status.artifact names it");
}

#[test]
fn a_job_that_has_failed_stays_failed_when_its_attempt_may_not_be_stopped() {
    let mut scene = Scene::running(json!({"spec": {"activeDeadlineSeconds": 10}}));
    scene.now = 10;
    scene.reconcile();
    let failed = "Stalled+Failed DeadlineExceeded: the attempts ran longer than spec.activeDeadlineSeconds (10)";
    assert_eq!(scene.says(), failed);
    scene.refusal = Some(Refusal::waiting("Forbidden", "may not delete Job default/quickstart-1"));
    scene.reconcile();
    assert_eq!(scene.says(), failed);
}

#[test]
fn the_next_attempt_waits_for_the_pod_of_a_deleted_batch_job() {
    let mut scene = Scene::running(json!({}));
    scene.deleted(120);
    assert_eq!(scene.reconcile(), (None, None));
    let says = "pod quickstart-1-x of attempt 1 on node node1 has the output folder still; the next attempt starts when it has ended";
    assert_eq!(scene.says(), format!("Reconciling OutputInUse: {says}"));
    assert_eq!(let_go(&scene), 0);
    scene.now = 30;
    let writing = scene.observed.pods[0].metadata.clone();
    scene.observed.pods = vec![Pod { metadata: writing, ..scene.ended(75, "checkpointed", 30) }];
    let pods = scene.observed.pods.clone();
    assert_eq!(scene.reconcile(), named("quickstart-2"));
    scene.observed.pods = pods;
    assert_eq!(scene.job.status.as_ref().unwrap().attempts[0].result, Some(AttemptResult::Resumable));
    assert_eq!(let_go(&scene), 1, "its end is in the status");
}

#[test]
fn a_pod_on_a_lost_node_is_still_there_until_somebody_says_that_it_is_not() {
    let mut scene = Scene::running(json!({}));
    scene.deleted(120);
    let lost = json!([{"type": "Ready", "status": "False"}]);
    scene.observed.pods[0].status.as_mut().unwrap().conditions = Some(serde_json::from_value(lost).unwrap());
    scene.now = 9999;
    assert_eq!(scene.reconcile(), (None, None));
    let says = "pod quickstart-1-x is on node node1, which does not answer; if it will not come back, delete the Node or taint it \
                node.kubernetes.io/out-of-service, so that the pod can start elsewhere; the next attempt starts when it has gone";
    assert_eq!(scene.says(), format!("Reconciling NodeLost: {says}"));
    // `kubectl delete pod --force`
    scene.observed.pods[0].metadata.deletion_grace_period_seconds = Some(0);
    let pods = scene.observed.pods.clone();
    assert_eq!(scene.reconcile(), named("quickstart-2"));
    scene.observed.pods = pods;
    assert_eq!(let_go(&scene), 1, "it does not stand in anybody's way");
}

#[test]
fn a_pod_that_an_earlier_job_of_this_name_has_left_is_waited_for() {
    let earlier = Scene::running(json!({}));
    let mut scene = Scene::new(json!({}));
    scene.observed.pods = earlier.observed.pods;
    for pod in &mut scene.observed.pods {
        pod.metadata.labels.as_mut().unwrap().insert("batch.kubernetes.io/controller-uid".to_owned(), "another".to_owned());
    }
    assert_eq!(scene.reconcile(), (None, None));
    assert!(scene.says().starts_with("Reconciling OutputInUse: pod quickstart-1-x of attempt 1 on node node1 has"), "{}", scene.says());
    scene.deleted(0);
    scene.observed.pods[0].status.as_mut().unwrap().phase = Some("Failed".to_owned());
    assert_eq!(let_go(&scene), 1);
    assert_eq!(scene.reconcile(), named("quickstart-1"));
}

#[test]
fn an_end_is_read_from_the_pod_when_a_policy_removes_batch_jobs_at_once() {
    // Exit code, last words, whether the pod was deleted before it ended.
    let cases = [
        (0, done(), false, Some(AttemptResult::Complete), 0),
        (0, done(), true, Some(AttemptResult::Complete), 0),
        (1, String::new(), false, Some(AttemptResult::Failed), 1),
        (137, String::new(), true, Some(AttemptResult::Stopped), 0),
        (65, String::new(), false, Some(AttemptResult::Refused), 0),
        (75, String::new(), true, Some(AttemptResult::Resumable), 0),
    ];
    for (code, words, stopped, result, failures) in cases {
        let mut scene = Scene::running(json!({}));
        scene.now = 50;
        let pod = scene.ended(code, &words, 50);
        scene.now = if stopped { 40 } else { 52 };
        scene.observed.pods = vec![pod];
        scene.deleted(if stopped { 120 } else { 0 });
        scene.now = 60;
        scene.reconcile();
        let status = scene.job.status.as_ref().unwrap();
        let first = &status.attempts[0];
        assert_eq!((first.result, first.exit_code, status.failures), (result, Some(code), failures), "exit code {code}");
        assert_eq!((status.active_seconds, status.artifact.is_some()), (50, code == 0), "exit code {code}");
    }
}

#[test]
fn a_queue_takes_an_attempts_place_away_and_gives_it_back() {
    let mut scene = Scene::running(json!({"spec": {"activeDeadlineSeconds": 60}}));
    let suspend = |scene: &mut Scene, held: bool| scene.observed.attempt.as_mut().unwrap().spec.as_mut().unwrap().suspend = Some(held);
    // The time in the queue does not count.
    suspend(&mut scene, true);
    scene.observed.pods.clear();
    scene.now = 1000;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    assert!(scene.says().starts_with("Reconciling AttemptQueued"), "{}", scene.says());
    suspend(&mut scene, false);
    scene.observed.pods = vec![scene.pod("Running", json!({"running": {"startedAt": at(1000)}}))];
    scene.now = 1040;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    // Preempted: the Job controller deletes the pod, which writes a checkpoint.
    suspend(&mut scene, true);
    scene.observed.pods = vec![scene.ended(75, "checkpointed", 40)];
    assert_eq!(let_go(&scene), 0, "its time is not written down yet");
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    assert_eq!(let_go(&scene), 1);
    let status = scene.job.status.as_ref().unwrap();
    assert_eq!((scene.last().result, status.failures, status.active_seconds), (None, 0, 40));
    scene.now = 5000;
    suspend(&mut scene, false);
    let again = scene.pod("Running", json!({"running": {"startedAt": at(5000)}}));
    scene.observed.pods.push(again);
    scene.now = 5019;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    scene.now = 5020;
    assert_eq!(scene.reconcile(), (None, Some("quickstart-1".to_owned())));
    assert!(scene.says().starts_with("Stalled+Failed DeadlineExceeded"), "{}", scene.says());
}

#[test]
fn a_trainers_end_counts_though_a_container_beside_it_keeps_its_pod() {
    let cases = [
        (0, done(), AttemptResult::Complete, 0, None),
        (1, String::new(), AttemptResult::Failed, 1, None),
        (75, "checkpointed".to_owned(), AttemptResult::Resumable, 0, Some("quickstart-2".to_owned())),
        (65, "no text".to_owned(), AttemptResult::Refused, 0, None),
    ];
    for (code, words, result, failures, next) in cases {
        let mut scene = Scene::running(json!({}));
        scene.now = 50;
        let mut pod = scene.ended(code, &words, 50);
        pod.status.as_mut().unwrap().phase = Some("Running".to_owned());
        scene.observed.pods = vec![pod.clone()];
        assert_eq!(scene.reconcile(), (next, None), "exit code {code}");
        let status = scene.job.status.as_ref().unwrap();
        let first = &status.attempts[0];
        assert_eq!((first.result, first.exit_code, status.failures), (Some(result), Some(code), failures));
        assert_eq!((status.active_seconds, status.artifact.is_some()), (50, code == 0));
        // The pod has a moment to end by itself; then its batch Job goes.
        scene.observed.pods = vec![pod];
        assert_eq!(let_go(&scene), 1);
        for (now, left) in [(50, 30), (70, 10), (80, 0), (1000, 0)] {
            let pods = &scene.observed.pods;
            let outlived = outlived(&scene.job, pods, &at(now)).map(|(attempt, left)| (attempt.number, left)).collect::<Vec<_>>();
            assert_eq!(outlived, [(1, left)], "exit code {code}");
        }
    }
}

#[test]
fn a_trainer_whose_pod_is_being_deleted_goes_on_with_the_next_pod_though_a_container_beside_it_takes_longer() {
    let mut scene = Scene::running(json!({}));
    scene.now = 40;
    let mut pod = scene.ended(75, "checkpointed", 40);
    pod.status.as_mut().unwrap().phase = Some("Running".to_owned());
    pod.metadata.deletion_timestamp = Some(at(160));
    scene.observed.pods = vec![pod];
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    assert_eq!((scene.last().result, scene.job.status.as_ref().unwrap().active_seconds), (None, 40));
    assert_eq!(outlived(&scene.job, &scene.observed.pods, &at(1000)).count(), 0);
}

#[test]
fn an_attempt_that_is_not_written_down_is_taken_over_before_it_is_stopped() {
    let suspended = json!({"spec": {"suspend": true}});
    let unavailable = json!({"spec": {"poolUnavailablePolicy": "Fail", "poolUnavailableGraceSeconds": 0}});
    for (patch, says) in [(suspended, "Reconciling Suspending"), (unavailable, "Stalled+Failed PoolUnavailable")] {
        let mut scene = Scene::running(json!({}));
        scene.job = Scene::new(patch).job;
        scene.observed.pool = None;
        assert_eq!(scene.reconcile(), named("quickstart-1"));
        assert_eq!((scene.last().number, scene.last().uid.as_deref()), (1, Some("uid of quickstart-1")));
        assert_eq!(scene.reconcile(), (None, Some("quickstart-1".to_owned())));
        assert!(scene.says().starts_with(says), "{}", scene.says());
    }
}

#[test]
fn a_pod_that_is_gone_without_a_word_does_not_run() {
    let mut scene = Scene::running(json!({}));
    let attempt = scene.observed.attempt.clone();
    scene.deleted(0);
    scene.observed.attempt = attempt;
    scene.observed.pods[0].spec.as_mut().unwrap().node_name = None;
    scene.reconcile();
    assert_eq!(scene.says(), "Reconciling AttemptStarting: attempt 1: waiting for its pod to run");
    assert_eq!(let_go(&scene), 1);
}

#[test]
fn an_attempt_that_runs_in_another_cluster_is_judged_by_its_batch_job() {
    let mut scene = Scene::running(json!({"spec": {"activeDeadlineSeconds": 100}}));
    scene.observed.pods.clear();
    let attempt = scene.observed.attempt.as_mut().unwrap();
    attempt.spec.as_mut().unwrap().managed_by = Some("kueue.x-k8s.io/multikueue".to_owned());
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    assert_eq!(scene.says(), "Reconciling AttemptStarting: attempt 1: batch Job quickstart-1 is managed by kueue.x-k8s.io/multikueue");
    let running = json!({"active": 1, "startTime": at(0)});
    scene.observed.attempt.as_mut().unwrap().status = Some(serde_json::from_value(running).unwrap());
    scene.now = 99;
    scene.reconcile();
    assert!(scene.says().starts_with("Ready Running: attempt 1: batch Job quickstart-1 is managed by"), "{}", scene.says());
    let complete = json!({"startTime": at(0), "conditions": [{"type": "Complete", "status": "True", "lastTransitionTime": at(90)}]});
    scene.observed.attempt.as_mut().unwrap().status = Some(serde_json::from_value(complete).unwrap());
    scene.now = 200;
    assert_eq!(scene.reconcile(), (None, None));
    assert_eq!(scene.last().result, Some(AttemptResult::Complete));
    assert!(scene.says().starts_with("Ready+Complete Complete: the head is written in another cluster"), "{}", scene.says());
}

#[test]
fn batch_jobs_of_old_attempts_go() {
    let mut scene = Scene::running(json!({"spec": {"backoffLimit": 100}}));
    let mut stopped = Vec::new();
    for _ in 1..=6 {
        scene.now += 1000;
        let (_, stop) = scene.ends(1, "flaky");
        stopped.extend(stop);
        scene.now += 1000;
        scene.reconcile();
    }
    assert_eq!(stopped, ["quickstart-1", "quickstart-2", "quickstart-3"]);
}

#[test]
fn a_job_that_is_not_to_wait_for_its_pool_waits_for_its_patience_to_end() {
    let mut scene = Scene::running(json!({"spec": {"poolUnavailablePolicy": "Fail", "poolUnavailableGraceSeconds": 60}}));
    let pool = scene.observed.pool.take();
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    scene.now = 59;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    scene.observed.pool = pool;
    scene.reconcile();
    assert_eq!(scene.job.status.as_ref().unwrap().pool_unavailable_since, None);
    scene.observed.pool = None;
    scene.now = 70;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    scene.now = 130;
    assert_eq!(scene.reconcile(), (None, Some("quickstart-1".to_owned())));
    let says = "BaseModelPool default/smollm2 has been missing or not ready for 60 s, and spec.poolUnavailablePolicy is Fail";
    assert_eq!(scene.says(), format!("Stalled+Failed PoolUnavailable: {says}"));
}

#[test]
fn a_job_that_shares_its_states_waits_for_their_claim_and_mounts_it() {
    let claim = json!({"claimName": "states", "path": "smollm2"});
    let mut scene = Scene::new(json!({"spec": {"stateCache": {"persistentVolumeClaim": claim}}}));
    assert_eq!(scene.reconcile(), (None, None));
    let says = "ClaimNotFound: PersistentVolumeClaim default/states (spec.stateCache) not found: create it";
    assert_eq!(scene.says(), format!("Reconciling {says}"));
    scene.observed.claims.push(serde_json::from_value(json!({"metadata": {"name": "states"}})).unwrap());
    scene.now = 60;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    let attempt = serde_json::to_value(scene.observed.attempt.as_ref().unwrap()).unwrap();
    let pod = &attempt["spec"]["template"]["spec"];
    let volumes = pod["volumes"].as_array().unwrap();
    let volume = volumes.iter().find(|volume| volume["name"] == "state-cache").unwrap();
    assert_eq!(volume["persistentVolumeClaim"]["claimName"], "states");
    let text = pod["containers"][0].to_string();
    assert!(text.contains(r#""--state-cache","/state-cache/smollm2""#) || text.contains("--state-cache=/state-cache/smollm2"), "{text}");
}

#[test]
fn a_job_that_starts_from_a_head_waits_for_its_claim_and_has_its_digest_in_the_configuration_alone() {
    let digest = format!("sha256:{}", "1".repeat(64));
    let source = json!({"persistentVolumeClaim": {"claimName": "old", "path": "math/heads/sha256-1"}});
    let mut scene = Scene::new(json!({"spec": {"head": {"init": {"fromHead": {"source": source, "digest": digest}}}}}));
    assert_eq!(scene.reconcile(), (None, None));
    let says = "ClaimNotFound: PersistentVolumeClaim default/old (spec.head.init.fromHead.source) not found: create it";
    assert_eq!(scene.says(), format!("Reconciling {says}"));
    scene.observed.claims.push(serde_json::from_value(json!({"metadata": {"name": "old"}})).unwrap());
    scene.now = 60;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    let attempt = serde_json::to_value(scene.observed.attempt.as_ref().unwrap()).unwrap();
    let pod = &attempt["spec"]["template"]["spec"];
    let find = |list: &serde_json::Value, name: &str| list.as_array().unwrap().iter().find(|one| one["name"] == name).cloned().unwrap();
    assert_eq!(find(&pod["volumes"], "init-head")["persistentVolumeClaim"]["claimName"], "old");
    let mount = find(&pod["containers"][0]["volumeMounts"], "init-head");
    assert_eq!((&mount["mountPath"], &mount["readOnly"]), (&json!("/init-head"), &json!(true)));
    let text = pod["containers"][0].to_string();
    assert!(text.contains(r#""--init-head","/init-head/math/heads/sha256-1""#), "{text}");
    let config = carryon_operator::job::validate(&scene.job, &scene.observed, &Settings::default(), &at(60)).unwrap().config;
    assert_eq!((config.init_head, config.head.init), (Some(digest), carryon_crds::job::HeadInit::default()));
}
