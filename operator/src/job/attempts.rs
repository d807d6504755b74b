//! The ledger of a job's attempts.
//!
//! | exit code | result | counted | next |
//! |---|---|---|---|
//! | 0 with a digest | Complete | | none |
//! | 75 | Resumable | no | the next pod of the attempt; the next attempt when its batch Job is gone |
//! | 65, 78 | Refused | | none: Failed |
//! | batch Job deleted | Stopped | no | once its pod has ended: at once, or on resume |
//! | any other, or unknown | Failed | yes | after a back-off, up to `backoffLimit` |

use carryon_crds::CarryOnJobStatus;
use carryon_crds::condition::{is_true, types};
use carryon_crds::job::{AttemptResult, AttemptStatus};
use carryon_crds::wire::TerminationMessage;
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Observed;
use super::end::end;
use super::trainers::runs;
use crate::shared::trouble::exit_text;

/// Attempts kept in the status.
const KEPT: usize = 10;
/// Ended attempts whose batch Jobs are kept beside the one that completed.
const KEPT_JOBS: usize = 3;

/// What is known of all attempts up to now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    /// The last attempts, oldest first.
    pub attempts: Vec<AttemptStatus>,
    /// Failures that counted.
    pub failures: u32,
    /// Seconds that pods ran which have ended.
    pub active_seconds: i64,
    /// The end of the last of them.
    pub active_until: Option<Time>,
    /// Seconds that the present pod has run.
    pub running_seconds: i64,
    /// Whether a pod runs: only then time goes by.
    pub runs: bool,
    /// Last words of the attempt that ended just now.
    pub last_words: Option<TerminationMessage>,
    /// Since when the pool has been missing or not ready, of a job that is not to wait for it.
    pub pool_unavailable_since: Option<Time>,
}

impl Ledger {
    /// The status' ledger, with the time and the end of its running attempt entered as `observed` shows them.
    pub fn account(status: &CarryOnJobStatus, observed: &Observed, now: &Time) -> Self {
        let mut ledger = Self {
            attempts: status.attempts.clone(),
            failures: status.failures,
            active_seconds: status.active_seconds,
            active_until: status.active_until.clone(),
            ..Self::default()
        };
        let Some(running) = status.attempts.last().filter(|attempt| attempt.result.is_none()) else { return ledger };
        for (start, end) in runs(observed, running, now) {
            ledger.count(&start, end, now);
        }
        if let Some(end) = end(running, observed) {
            ledger.failures += u32::from(end.result == AttemptResult::Failed);
            ledger.last_words = end.words;
            if let Some(attempt) = ledger.attempts.last_mut() {
                attempt.completion_time = Some(end.at.unwrap_or_else(|| now.clone()));
                attempt.exit_code = end.exit_code;
                attempt.result = Some(end.result);
                attempt.message = end.message.map(|message| message.chars().take(1024).collect());
            }
        }
        ledger
    }

    /// Counts a pod's time. Pods run one after the other, so what ended before `active_until` is counted already.
    fn count(&mut self, start: &Time, end: Option<Time>, now: &Time) {
        let from = self.active_until.clone().into_iter().fold(start.clone(), Time::max);
        match end {
            Some(end) => {
                self.active_seconds += seconds(&from, &end);
                self.active_until = Some(end.max(from));
            }
            None => {
                self.running_seconds += seconds(&from, now);
                self.runs = true;
            }
        }
    }

    /// Enters attempt `number` with its batch Job, unless it is there.
    pub fn enter(&mut self, number: u32, job: &Job, now: &Time) {
        if self.attempts.last().is_some_and(|last| last.number >= number) {
            return;
        }
        // Made by an operator that ended before it could write this down: then it is older than now.
        let start_time = job.metadata.creation_timestamp.clone().unwrap_or_else(|| now.clone());
        let uid = job.metadata.uid.clone();
        self.attempts.push(AttemptStatus { number, uid, start_time, completion_time: None, exit_code: None, result: None, message: None });
        let surplus = self.attempts.len().saturating_sub(KEPT);
        self.attempts.drain(..surplus);
    }

    /// Number of the attempt that runs.
    pub fn running(&self) -> Option<u32> {
        self.attempts.last().filter(|attempt| attempt.result.is_none()).map(|attempt| attempt.number)
    }

    /// Attempts whose batch Jobs have had their time: all that ended but the one that completed and the last few others.
    pub fn surplus(&self) -> impl Iterator<Item = u32> {
        let others = self.attempts.iter().rev().filter(|attempt| attempt.result.is_some_and(|result| result != AttemptResult::Complete));
        others.skip(KEPT_JOBS).map(|attempt| attempt.number)
    }

    /// Seconds that all pods of all attempts ran.
    pub fn elapsed(&self) -> i64 {
        self.active_seconds + self.running_seconds
    }
}

/// One sentence on how `attempt` ended.
pub fn ended(attempt: &AttemptStatus) -> String {
    let how = attempt.exit_code.map_or_else(|| "without an exit code".to_owned(), |code| format!("with {}", exit_text(code)));
    let said = attempt.message.as_deref().map(|message| format!(": {message}")).unwrap_or_default();
    format!("attempt {} ended {how}{said}", attempt.number)
}

/// Seconds until a finished job may be deleted (0: now); none while it runs, and for a job that is kept.
pub fn life_left(job: &carryon_crds::CarryOnJob, now: &Time) -> Option<i64> {
    let status = job.status.as_ref()?;
    let finished = is_true(&status.conditions, types::COMPLETE) || is_true(&status.conditions, types::FAILED);
    let end = status.completion_time.as_ref().filter(|_| finished)?;
    let ttl = i64::from(job.spec.ttl_seconds_after_finished?);
    Some((ttl - seconds(end, now)).max(0))
}

/// Whole seconds from one moment to another; 0 when it lies before.
pub fn seconds(from: &Time, to: &Time) -> i64 {
    (to.0.as_second() - from.0.as_second()).max(0)
}
