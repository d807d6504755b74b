//! A job over its attempts: the exit codes, the back-off, suspension, the deadline, as one table of steps each.
#![allow(clippy::unwrap_used)]

mod common;

use carryon_crds::wire::Progress;
use carryon_crds::{BaseModelPool, names};
use carryon_operator::job;
use carryon_operator::shared::Settings;
use common::scene::{Scene, done, named, pool};
use common::{at, with};
use serde_json::json;

#[test]
fn a_job_completes_and_stays_complete_when_its_child_is_gone() {
    let mut scene = Scene::new(json!({}));
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    assert_eq!(scene.says(), "Reconciling AttemptStarting: attempt 1: waiting for its pod to run");
    scene.reconcile();
    assert_eq!(scene.says(), "Ready Running: attempt 1 on BaseModelPool default/smollm2: its pod runs");
    assert_eq!(scene.ends(0, &done()), (None, None));
    assert_eq!(scene.says(), "Ready+Complete Complete: the head is written; status.artifact names it");
    let artifact = scene.job.status.as_ref().unwrap().artifact.clone().unwrap();
    assert_eq!((artifact.uri.as_str(), artifact.digest.as_str()), ("pvc://quickstart-output/quickstart/heads/sha256-h", "sha256:h"));
    let before = scene.job.status.clone();
    scene.observed = job::Observed::default();
    scene.now = 5;
    assert_eq!(scene.reconcile(), (None, None));
    assert_eq!(scene.job.status, before);
}

#[test]
fn a_deleted_pod_leaves_its_exit_code_in_the_batch_jobs_words() {
    let mut scene = Scene::new(json!({}));
    scene.reconcile();
    let message = "Container trainer for pod default/quickstart-1-x7v2p failed with exit code 65 matching FailJob rule at index 2";
    let failed = json!({"conditions": [{"type": "Failed", "status": "True", "reason": "PodFailurePolicy", "message": message}]});
    scene.observed.attempt.as_mut().unwrap().status = Some(serde_json::from_value(failed).unwrap());
    scene.observed.pods.clear();
    assert_eq!(scene.reconcile(), (None, None));
    assert_eq!(scene.says(), "Stalled+Failed DataRefused: attempt 1 ended with exit code 65; correct the data and create a new job");
}

#[test]
fn exit_codes_decide_what_comes_next() {
    let cases = [
        (75, "checkpointed", named("quickstart-2"), 0, "Reconciling AttemptStarting: attempt 2: waiting for its pod to run"),
        (
            1,
            "no memory",
            (None, None),
            1,
            "Reconciling BackOff: attempt 1 ended with exit code 1: no memory; attempt 2 starts at 2023-11-14T22:13:30Z",
        ),
        (137, "", (None, None), 1, "Reconciling BackOff: attempt 1 ended with signal 9; attempt 2 starts at 2023-11-14T22:13:30Z"),
        (
            65,
            "train.jsonl, line 3: no text",
            (None, None),
            0,
            "Stalled+Failed DataRefused: attempt 1 ended with exit code 65: train.jsonl, line 3: no text; correct the data and create a new job",
        ),
        (
            78,
            "bad config",
            (None, None),
            0,
            "Stalled+Failed ConfigurationRefused: attempt 1 ended with exit code 78: bad config; correct the spec and create a new job",
        ),
        (
            0,
            "{}",
            (None, None),
            1,
            "Reconciling BackOff: attempt 1 ended with exit code 0: the trainer ended without naming the head it wrote; attempt 2 starts at 2023-11-14T22:13:30Z",
        ),
    ];
    for (code, message, next, failures, says) in cases {
        let mut scene = Scene::new(json!({}));
        scene.reconcile();
        assert_eq!(scene.ends(code, message), next, "exit code {code}");
        assert_eq!(scene.job.status.as_ref().unwrap().failures, failures, "exit code {code}");
        assert_eq!(scene.says(), says);
        let before = scene.job.status.clone();
        if next.0.is_none() {
            scene.reconcile();
            assert_eq!(scene.job.status, before, "an end is entered once");
        }
    }
}

#[test]
fn back_off_doubles_until_the_limit_is_exceeded() {
    let mut scene = Scene::new(json!({"spec": {"backoffLimit": 2}}));
    scene.reconcile();
    for (attempt, wait) in [(1, 10), (2, 20)] {
        scene.ends(1, "flaky");
        scene.now += wait - 1;
        assert_eq!(scene.reconcile(), (None, None), "attempt {attempt}");
        scene.now += 1;
        assert_eq!(scene.reconcile(), named(&names::attempt("quickstart", attempt + 1)));
    }
    scene.ends(1, "flaky");
    assert_eq!(
        scene.says(),
        "Stalled+Failed BackoffLimitExceeded: 3 attempts failed, spec.backoffLimit is 2; attempt 3 ended with exit code 1: flaky"
    );
    let before = scene.job.status.clone();
    scene.now += 10_000;
    assert_eq!(scene.reconcile(), (None, None));
    assert_eq!(scene.job.status, before);
}

#[test]
fn suspending_stops_the_attempt_and_resuming_starts_the_next() {
    let mut scene = Scene::new(json!({}));
    scene.reconcile();
    scene.job.spec.suspend = true;
    assert_eq!(scene.reconcile(), (None, Some("quickstart-1".to_owned())));
    assert_eq!(scene.says(), "Reconciling Suspending: suspended by spec.suspend; attempt 1 writes a checkpoint and ends");
    scene.observed.attempt = None;
    scene.observed.pods.clear();
    assert_eq!(scene.reconcile(), (None, None));
    assert_eq!(scene.says(), "Ready+Suspended Suspended: suspended by spec.suspend; set it to false to go on from the last checkpoint");
    scene.job.spec.suspend = false;
    assert_eq!(scene.reconcile(), named("quickstart-2"));
    assert_eq!(scene.job.status.as_ref().unwrap().failures, 0);
}

#[test]
fn a_deleted_child_is_followed_by_the_next_attempt() {
    let mut scene = Scene::new(json!({}));
    scene.reconcile();
    scene.observed.attempt = None;
    scene.observed.pods.clear();
    assert_eq!(scene.reconcile(), named("quickstart-2"));
    assert_eq!(scene.job.status.as_ref().unwrap().failures, 0);
}

#[test]
fn the_deadline_counts_over_attempts_and_not_while_suspended() {
    let mut scene = Scene::new(json!({"spec": {"activeDeadlineSeconds": 100}}));
    scene.reconcile();
    scene.now = 60;
    scene.ends(75, "checkpointed");
    scene.now = 99;
    assert_eq!(scene.reconcile(), named("quickstart-2"));
    scene.now = 100;
    assert_eq!(scene.reconcile(), (None, Some("quickstart-2".to_owned())));
    assert_eq!(scene.says(), "Stalled+Failed DeadlineExceeded: the attempts ran longer than spec.activeDeadlineSeconds (100)");
}

#[test]
fn a_job_waits_for_what_it_names_and_says_what_is_missing() {
    let missing = |change: fn(&mut job::Observed), says: &str| {
        let mut scene = Scene::new(json!({}));
        change(&mut scene.observed);
        assert_eq!(scene.reconcile(), (None, None));
        assert_eq!(scene.says(), says);
    };
    missing(|world| world.pool = None, "Reconciling PoolNotFound: BaseModelPool default/smollm2 (spec.pools[0]) not found: create it");
    missing(
        |world| world.pool.as_mut().unwrap().status = None,
        "Reconciling PoolNotReady: waiting for BaseModelPool default/smollm2 to be ready",
    );
    missing(
        |world| drop(world.claims.remove(0)),
        "Reconciling ClaimNotFound: PersistentVolumeClaim default/quickstart-data (spec.data.source) not found: create it",
    );
    missing(
        |world| drop(world.claims.pop()),
        "Reconciling ClaimNotFound: PersistentVolumeClaim default/quickstart-output (spec.output.destination) not found: create it",
    );
    missing(
        |world| world.pool = Some(pool(24)),
        "Stalled TapBeyondLastLayer: spec.pools[0].taps.layers: 28 is beyond the last layer, 24, of SmolLM2 in BaseModelPool default/smollm2: correct the spec",
    );
}

#[test]
fn a_running_attempt_outlives_its_pool() {
    let mut scene = Scene::new(json!({}));
    scene.reconcile();
    scene.observed.pool = None;
    assert_eq!(scene.reconcile(), named("quickstart-1"));
}

#[test]
fn a_figure_that_is_not_finite_is_left_out() {
    let mut scene = Scene::new(json!({}));
    scene.reconcile();
    scene.observed.progress = Some(carryon_crds::wire::Progress {
        phase: "training".to_owned(),
        step: 3,
        total_steps: 9,
        train_loss: Some(f64::NAN),
        eval_loss: Some(0.25),
        ..Default::default()
    });
    scene.reconcile();
    let progress = scene.job.status.as_ref().unwrap().progress.clone().unwrap();
    assert_eq!((progress.step, progress.train_loss, progress.eval_loss.as_deref()), (3, None, Some("0.2500")));
}

#[test]
fn what_a_trainer_said_stands_until_it_says_something_else() {
    let mut scene = Scene::new(json!({}));
    scene.reconcile();
    scene.reconcile();
    scene.observed.progress = Some(Progress { phase: "training".to_owned(), step: 3, total_steps: 9, ..Progress::default() });
    scene.reconcile();
    assert_eq!(scene.says(), "Ready Running: attempt 1 on BaseModelPool default/smollm2: training");
    // A pool that hangs: its last pod is not ready any more.
    let answers = scene.observed.pool.clone();
    let message = "0 of 1 pods are ready; pod smollm2-pool-0 was ready and no longer answers";
    let condition =
        json!({"type": "Ready", "status": "False", "reason": "PodsNotAnswering", "message": message, "lastTransitionTime": at(0)});
    scene.observed.pool = answers.as_ref().map(|pool| with(pool, json!({"status": {"readyReplicas": 0, "conditions": [condition]}})));
    scene.reconcile();
    assert_eq!(scene.says(), format!("Reconciling PoolNotReady: attempt 1 waits for BaseModelPool default/smollm2: {message}"));
    scene.observed.pool = answers;
    scene.reconcile();
    assert_eq!(scene.says(), "Ready Running: attempt 1 on BaseModelPool default/smollm2: training");
    // An operator that has only started has not asked it yet.
    let before = scene.job.status.clone();
    scene.observed.progress = None;
    scene.reconcile();
    assert_eq!(scene.job.status, before);
    // The trainer after it does not know yet how far it was.
    scene.observed.progress = Some(Progress { phase: "connecting".to_owned(), ..Progress::default() });
    scene.reconcile();
    assert_eq!(scene.says(), "Ready Running: attempt 1 on BaseModelPool default/smollm2: connecting");
    assert_eq!(scene.job.status.unwrap().progress, before.unwrap().progress);
}

#[test]
fn of_two_pods_that_ended_in_one_second_the_one_that_ends_the_attempt_counts() {
    let mut scene = Scene::running(json!({}));
    scene.now = 10;
    scene.end(0, &done());
    let preempted = scene.ended(75, "checkpointed", 5);
    scene.observed.pods.push(preempted);
    assert_eq!(scene.reconcile(), (None, None));
    assert_eq!(scene.last().exit_code, Some(0));
}

/// The pool beside `smollm2`, of a tokenizer.
fn other_pool(tokenizer: &str) -> BaseModelPool {
    with(&pool(30), json!({"metadata": {"name": "domain"}, "status": {"model": {"tokenizerDigest": tokenizer}}}))
}

#[test]
fn a_head_of_two_pools_needs_both_of_one_tokenizer() {
    let two =
        json!({"spec": {"pools": [{"name": "smollm2"}, {"name": "domain", "taps": {"layers": [3]}, "hiddenStatesDtype": "Float8E4M3"}]}});
    let mut scene = Scene::new(two);
    let own = scene.observed.pool.as_ref().and_then(|pool| pool.status.clone()).and_then(|status| status.model).unwrap().tokenizer_digest;
    let mut says = |other: Option<BaseModelPool>| {
        scene.observed.other_pools = vec![other];
        assert_eq!(scene.reconcile(), (None, None));
        scene.says()
    };
    assert_eq!(says(None), "Reconciling PoolNotFound: BaseModelPool default/domain (spec.pools[1]) not found: create it");
    let loading = with(&other_pool(&own), json!({"status": {"readyReplicas": 0}}));
    assert_eq!(says(Some(loading)), "Reconciling PoolNotReady: waiting for BaseModelPool default/domain to be ready");
    assert_eq!(
        says(Some(other_pool("sha256:other"))),
        format!(
            "Stalled TokenizersDiffer: BaseModelPool default/domain has another tokenizer (sha256:other) than default/smollm2 ({own}): only bases with the same one can be mixed; correct spec.pools"
        )
    );
    scene.observed.other_pools = vec![Some(other_pool(&own))];
    assert_eq!(scene.reconcile(), named("quickstart-1"));
    let validated = job::validate(&scene.job, &scene.observed, &Settings::default(), &at(0)).unwrap();
    assert_eq!(
        serde_json::to_value(&validated.config.other_pools).unwrap(),
        json!([{"taps": {"layers": [3], "final": true}, "hiddenStatesDtype": "Float8E4M3"}])
    );
    let attempt = serde_json::to_value(job::build(&validated).attempt).unwrap();
    let args = attempt["spec"]["template"]["spec"]["containers"][0]["args"].as_array().unwrap().clone();
    let told: Vec<_> = args.iter().filter_map(serde_json::Value::as_str).skip_while(|word| *word != "--pool").take(4).collect();
    assert_eq!(told, ["--pool", "http://smollm2-pool.default.svc:8080", "--other-pool", "http://domain-pool.default.svc:8080"]);
    scene.observed.other_pools = vec![None];
    scene.reconcile();
    assert_eq!(scene.says(), "Reconciling PoolNotReady: attempt 1 waits for BaseModelPool default/domain: it is not there");
}
