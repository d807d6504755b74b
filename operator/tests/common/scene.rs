//! A job in a world that the test plays: an API server, a Job controller and a kubelet in a few lines.

use carryon_crds::job::AttemptStatus;
use carryon_crds::{BaseModelPool, CarryOnJob, names};
use carryon_operator::job;
use carryon_operator::shared::{Refusal, Settings};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::api::core::v1::Pod;
use serde_json::{Value, json};

use super::{at, example, patched, summary};

/// A job and what is around it.
pub struct Scene {
    pub job: CarryOnJob,
    pub observed: job::Observed,
    pub now: i64,
    /// What the API server says to every write of a child.
    pub refusal: Option<Refusal>,
}

impl Scene {
    pub fn new(patch: Value) -> Self {
        let job = patched(serde_json::to_value(example::<CarryOnJob>("quickstart/job.yaml")).unwrap(), &patch);
        let claims =
            ["quickstart-data", "quickstart-output"].map(|name| serde_json::from_value(json!({"metadata": {"name": name}})).unwrap());
        let observed = job::Observed { pool: Some(pool(30)), claims: claims.into(), ..job::Observed::default() };
        Self { job: serde_json::from_value(job).unwrap(), observed, now: 0, refusal: None }
    }

    /// A scene in which attempt 1 runs.
    pub fn running(patch: Value) -> Self {
        let mut scene = Self::new(patch);
        assert_eq!(scene.reconcile(), named("quickstart-1"));
        scene
    }

    /// One reconcile; the batch Job it wants to exist, and the one it stops.
    pub fn reconcile(&mut self) -> (Option<String>, Option<String>) {
        let now = at(self.now);
        let validated = job::validate(&self.job, &self.observed, &Settings::default(), &now);
        let children = validated.as_ref().ok().map(job::build);
        let wanted = children.as_ref().and_then(|children| children.attempt.clone()).map(created);
        let existing = self.observed.attempt.clone().filter(|job| wanted.as_ref().is_some_and(|wanted| name(job) == name(wanted)));
        let applied = job::Applied { attempt: existing.or(wanted.clone()) };
        let outcome = match self.refusal.clone() {
            Some(refusal) => Err(refusal),
            None => validated.map(|validated| (validated, applied)),
        };
        self.job.status = Some(job::status(&self.job, &outcome, &self.observed, &now));
        if wanted.as_ref().is_some_and(|wanted| self.observed.attempt.as_ref().is_none_or(|job| name(job) != name(wanted))) {
            self.observed.attempt = wanted.clone();
            self.observed.pods = vec![self.pod("Running", json!({"running": {"startedAt": now}}))];
        }
        (wanted.as_ref().map(name), children.and_then(|children| children.stop.into_iter().next()))
    }

    /// A pod of the present attempt.
    pub fn pod(&self, phase: &str, state: Value) -> Pod {
        let uid = self.observed.attempt.as_ref().map_or_else(|| self.last().uid.clone(), |attempt| attempt.metadata.uid.clone());
        let labels = json!({"batch.kubernetes.io/controller-uid": uid, names::ATTEMPT_LABEL: "1", names::COMPONENT_LABEL: "trainer"});
        let status = json!({"name": "trainer", "image": "", "imageID": "", "ready": phase == "Running", "restartCount": 0, "state": state});
        let metadata = json!({"name": "quickstart-1-x", "labels": labels, "finalizers": [names::LAST_WORDS_FINALIZER]});
        let status = json!({"phase": phase, "containerStatuses": [status]});
        serde_json::from_value(json!({"metadata": metadata, "spec": {"containers": [], "nodeName": "node1"}, "status": status})).unwrap()
    }

    /// A pod of the present attempt that has ended by now, `seconds` after its start.
    pub fn ended(&self, code: i32, message: &str, seconds: i64) -> Pod {
        let end = json!({"exitCode": code, "message": message, "startedAt": at(self.now - seconds), "finishedAt": at(self.now)});
        self.pod(if code == 0 { "Succeeded" } else { "Failed" }, json!({"terminated": end}))
    }

    /// The trainer ends, and its batch Job with it.
    pub fn end(&mut self, code: i32, message: &str) {
        let start = self.observed.pods[0].status.as_ref().unwrap().container_statuses.as_ref().unwrap()[0].state.clone().unwrap();
        let start = start.running.unwrap().started_at.unwrap().0.as_second() - at(0).0.as_second();
        let type_ = if code == 0 { "Complete" } else { "Failed" };
        self.observed.pods = vec![self.ended(code, message, self.now - start)];
        let attempt = self.observed.attempt.as_mut().unwrap();
        attempt.status = Some(serde_json::from_value(json!({"conditions": [{"type": type_, "status": "True"}]})).unwrap());
    }

    /// The same; a reconcile sees it.
    pub fn ends(&mut self, code: i32, message: &str) -> (Option<String>, Option<String>) {
        self.end(code, message);
        self.reconcile()
    }

    /// Somebody asks for the deletion of the attempt's pod, and of its batch Job without waiting for it.
    pub fn deleted(&mut self, grace: i64) {
        self.observed.attempt = None;
        for pod in &mut self.observed.pods {
            pod.metadata.deletion_timestamp = Some(at(self.now + grace));
            pod.metadata.deletion_grace_period_seconds = Some(grace);
        }
    }

    /// The last attempt by the status.
    pub fn last(&self) -> &AttemptStatus {
        self.job.status.as_ref().unwrap().attempts.last().unwrap()
    }

    pub fn says(&self) -> String {
        summary(&self.job.status.as_ref().unwrap().conditions)
    }
}

fn name(job: &Job) -> String {
    job.metadata.name.clone().unwrap()
}

/// As the API server stores it.
fn created(mut job: Job) -> Job {
    job.metadata.uid = Some(format!("uid of {}", name(&job)));
    job
}

pub fn pool(layers: u32) -> BaseModelPool {
    let pool = serde_json::to_value(example::<BaseModelPool>("quickstart/pool.yaml")).unwrap();
    let model = json!({"name": "SmolLM2", "digest": "", "tokenizerDigest": "", "identityDigest": "", "hiddenSize": 576, "layers": layers, "vocabSize": 9});
    serde_json::from_value(patched(pool, &json!({"status": {"readyReplicas": 1, "model": model}}))).unwrap()
}

/// Last words of a trainer that has written its head.
pub fn done() -> String {
    json!({"message": "wrote the head", "digest": "sha256:h", "base_model_digest": "sha256:b"}).to_string()
}

pub fn named(name: &str) -> (Option<String>, Option<String>) {
    (Some(name.to_owned()), None)
}
