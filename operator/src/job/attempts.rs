//! The attempts of a job: how the last one ended, and what comes next.
//!
//! | exit code | result | counted | next |
//! |---|---|---|---|
//! | 0 with a digest | Complete | | none |
//! | 75 | Resumable | no | at once |
//! | 65, 78 | Refused | | none: Failed |
//! | batch Job deleted | Stopped | no | at once, or on resume |
//! | any other, or unknown | Failed | yes | after a back-off, up to `backoffLimit` |

use carryon_crds::condition::{is_true, types};
use carryon_crds::job::{AttemptResult, AttemptStatus};
use carryon_crds::wire::{ExitCode, TerminationMessage};
use carryon_crds::{CarryOnJob, CarryOnJobStatus};
use k8s_openapi::api::batch::v1::Job;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::Observed;
use crate::shared::trouble::{exit_text, last_end, last_line};

/// Seconds before the attempt after the first failure; doubled by each further one.
const BACK_OFF_SECONDS: i64 = 10;
/// Longest back-off.
const BACK_OFF_LIMIT_SECONDS: i64 = 360;
/// Reason of a job that was not to wait for its pool.
pub const POOL_UNAVAILABLE: &str = "PoolUnavailable";
/// Attempts kept in the status.
const KEPT: usize = 10;

/// What is known of all attempts up to now.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Ledger {
    /// The last attempts, oldest first.
    pub attempts: Vec<AttemptStatus>,
    /// Failures that counted.
    pub failures: u32,
    /// Seconds that ended attempts ran.
    pub active_seconds: i64,
    /// Last words of the attempt that ended just now.
    pub last_words: Option<TerminationMessage>,
}

/// What comes next.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Keep this attempt running.
    Keep(u32),
    /// Start this attempt.
    Start(u32),
    /// Wait before the next attempt.
    BackOff {
        /// Until when.
        until: Time,
    },
    /// Suspended; the running attempt, if any, is stopped.
    Suspended {
        /// Attempt to stop.
        stop: Option<u32>,
    },
    /// The head is written.
    Complete,
    /// Given up.
    Failed {
        /// CamelCase reason.
        reason: &'static str,
        /// Why.
        message: String,
        /// Attempt to stop.
        stop: Option<u32>,
    },
}

impl Ledger {
    /// The status' ledger, with the end of its running attempt entered when `observed` shows one.
    pub fn account(status: &CarryOnJobStatus, observed: &Observed, now: &Time) -> Self {
        let mut ledger =
            Self { attempts: status.attempts.clone(), failures: status.failures, active_seconds: status.active_seconds, last_words: None };
        let Some(running) = ledger.attempts.last_mut().filter(|attempt| attempt.result.is_none()) else {
            return ledger;
        };
        let Some(end) = end(observed) else { return ledger };
        let completed = end.at.unwrap_or_else(|| now.clone());
        ledger.active_seconds += seconds(&running.start_time, &completed);
        ledger.failures += u32::from(end.result == AttemptResult::Failed);
        running.completion_time = Some(completed);
        running.exit_code = end.exit_code;
        running.result = Some(end.result);
        running.message = end.message.map(|message| message.chars().take(1024).collect());
        ledger.last_words = end.words;
        ledger
    }

    /// Enters attempt `number`, unless it is there.
    pub fn enter(&mut self, number: u32, start_time: Time) {
        if self.attempts.last().is_some_and(|last| last.number >= number) {
            return;
        }
        self.attempts.push(AttemptStatus { number, start_time, completion_time: None, exit_code: None, result: None, message: None });
        let surplus = self.attempts.len().saturating_sub(KEPT);
        self.attempts.drain(..surplus);
    }

    /// Number of the attempt that runs.
    pub fn running(&self) -> Option<u32> {
        self.attempts.last().filter(|attempt| attempt.result.is_none()).map(|attempt| attempt.number)
    }

    /// What comes next for `job`.
    pub fn plan(&self, job: &CarryOnJob, now: &Time) -> Plan {
        let conditions = job.status.as_ref().map_or(&[][..], |status| &status.conditions);
        if is_true(conditions, types::COMPLETE) {
            return Plan::Complete;
        }
        if let Some(failed) = conditions.iter().find(|condition| condition.type_ == types::FAILED && condition.status == "True") {
            return Plan::Failed { reason: known_reason(&failed.reason), message: failed.message.clone(), stop: self.running() };
        }
        let last = self.attempts.last();
        let result = last.and_then(|attempt| attempt.result);
        match (last, result) {
            (_, Some(AttemptResult::Complete)) => return Plan::Complete,
            (Some(last), Some(AttemptResult::Refused)) => return refused(last),
            (Some(last), _) if i64::from(self.failures) > i64::from(job.spec.backoff_limit) => {
                let message =
                    format!("{} attempts failed, spec.backoffLimit is {}; {}", self.failures, job.spec.backoff_limit, ended(last));
                return Plan::Failed { reason: "BackoffLimitExceeded", message, stop: self.running() };
            }
            _ => {}
        }
        if let Some(deadline) = job.spec.active_deadline_seconds.filter(|deadline| self.elapsed(now) >= *deadline) {
            let message = format!("the attempts ran longer than spec.activeDeadlineSeconds ({deadline})");
            return Plan::Failed { reason: "DeadlineExceeded", message, stop: self.running() };
        }
        if job.spec.suspend {
            return Plan::Suspended { stop: self.running() };
        }
        self.next(now)
    }

    fn next(&self, now: &Time) -> Plan {
        let Some(last) = self.attempts.last() else { return Plan::Start(1) };
        let (Some(result), Some(end)) = (last.result, &last.completion_time) else { return Plan::Keep(last.number) };
        if result == AttemptResult::Failed {
            let doublings = self.failures.saturating_sub(1).min(16);
            let wait = (BACK_OFF_SECONDS << doublings).min(BACK_OFF_LIMIT_SECONDS);
            if seconds(end, now) < wait {
                let until = end.0.checked_add(jiff_seconds(wait)).unwrap_or(end.0);
                return Plan::BackOff { until: Time(until) };
            }
        }
        Plan::Start(last.number + 1)
    }

    /// Seconds until time alone changes the plan: the end of a back-off, the deadline, the end of a finished job's life.
    pub fn until_next(&self, job: &CarryOnJob, plan: &Plan, now: &Time) -> Option<i64> {
        let back_off = match plan {
            Plan::BackOff { until } => Some(seconds(now, until)),
            _ => None,
        };
        let runs = matches!(plan, Plan::Keep(_) | Plan::Start(_));
        let deadline = job.spec.active_deadline_seconds.filter(|_| runs).map(|deadline| deadline - self.elapsed(now));
        [back_off, deadline].into_iter().flatten().min().map(|seconds| seconds.max(0) + 1)
    }

    /// Seconds that all attempts ran.
    fn elapsed(&self, now: &Time) -> i64 {
        let running = self.attempts.last().filter(|attempt| attempt.result.is_none());
        self.active_seconds + running.map_or(0, |attempt| seconds(&attempt.start_time, now))
    }
}

/// One sentence on how `attempt` ended.
pub fn ended(attempt: &AttemptStatus) -> String {
    let how = attempt.exit_code.map_or_else(|| "without an exit code".to_owned(), |code| format!("with {}", exit_text(code)));
    let said = attempt.message.as_deref().map(|message| format!(": {message}")).unwrap_or_default();
    format!("attempt {} ended {how}{said}", attempt.number)
}

/// Seconds until a finished job may be deleted (0: now); none while it runs, and for a job that is kept.
pub fn life_left(job: &CarryOnJob, now: &Time) -> Option<i64> {
    let status = job.status.as_ref()?;
    let finished = is_true(&status.conditions, types::COMPLETE) || is_true(&status.conditions, types::FAILED);
    let end = status.completion_time.as_ref().filter(|_| finished)?;
    let ttl = i64::from(job.spec.ttl_seconds_after_finished?);
    Some((ttl - seconds(end, now)).max(0))
}

/// Whether the batch Job of an attempt has ended.
pub fn has_ended(job: &Job) -> bool {
    has_condition(job, "Complete") || has_condition(job, "Failed")
}

struct End {
    result: AttemptResult,
    exit_code: Option<i32>,
    at: Option<Time>,
    message: Option<String>,
    words: Option<TerminationMessage>,
}

/// How the observed attempt ended; none while it runs.
fn end(observed: &Observed) -> Option<End> {
    let stopped = End { result: AttemptResult::Stopped, exit_code: None, at: None, message: None, words: None };
    let Some(job) = &observed.attempt else { return Some(stopped) };
    if !has_ended(job) {
        return None;
    }
    let terminated = observed.pods.iter().filter_map(last_end).max_by_key(|end| end.finished_at.as_ref().map(|time| time.0));
    let said = terminated.and_then(|end| end.message.as_deref());
    let words = said.and_then(|text| serde_json::from_str::<TerminationMessage>(text).ok());
    let exit_code = terminated.map(|end| end.exit_code).or_else(|| told_exit_code(job)).or(has_condition(job, "Complete").then_some(0));
    let mut message = words.as_ref().map(|words| words.message.clone()).or_else(|| said.map(|text| last_line(text).to_owned()));
    let result = match exit_code {
        Some(code) if code == ExitCode::Complete as i32 && words.as_ref().is_some_and(|words| words.digest.is_some()) => {
            AttemptResult::Complete
        }
        Some(code) if code == ExitCode::Complete as i32 => {
            message = Some("the trainer ended without naming the head it wrote".to_owned());
            AttemptResult::Failed
        }
        Some(code) if code == ExitCode::Resume as i32 => AttemptResult::Resumable,
        Some(code) if code == ExitCode::Data as i32 || code == ExitCode::Configuration as i32 => AttemptResult::Refused,
        _ => AttemptResult::Failed,
    };
    let at = terminated.and_then(|end| end.finished_at.clone());
    Some(End { result, exit_code, at, message: message.filter(|message| !message.is_empty()), words })
}

fn refused(last: &AttemptStatus) -> Plan {
    let (reason, advice) = match last.exit_code {
        Some(code) if code == ExitCode::Data as i32 => ("DataRefused", "correct the data and create a new job"),
        _ => ("ConfigurationRefused", "correct the spec and create a new job"),
    };
    Plan::Failed { reason, message: format!("{}; {advice}", ended(last)), stop: None }
}

/// Reasons are static texts; those of a stored Failed condition are read back here.
fn known_reason(reason: &str) -> &'static str {
    ["DataRefused", "ConfigurationRefused", "BackoffLimitExceeded", "DeadlineExceeded", POOL_UNAVAILABLE]
        .into_iter()
        .find(|known| *known == reason)
        .unwrap_or("Failed")
}

/// The exit code in the words of the Failed condition that the attempt's pod failure policy leads to:
/// "Container trainer for pod ns/name failed with exit code 75 matching FailJob rule at index 1".
fn told_exit_code(job: &Job) -> Option<i32> {
    let conditions = job.status.as_ref()?.conditions.as_ref()?;
    let failed = conditions.iter().find(|condition| condition.type_ == "Failed" && condition.status == "True")?;
    let (_, after) = failed.message.as_ref()?.split_once(" failed with exit code ")?;
    after.split(' ').next()?.parse().ok()
}

fn has_condition(job: &Job, type_: &str) -> bool {
    let conditions = job.status.as_ref().and_then(|status| status.conditions.as_ref());
    conditions.is_some_and(|conditions| conditions.iter().any(|condition| condition.type_ == type_ && condition.status == "True"))
}

fn seconds(from: &Time, to: &Time) -> i64 {
    (to.0.as_second() - from.0.as_second()).max(0)
}

fn jiff_seconds(seconds: i64) -> k8s_openapi::jiff::SignedDuration {
    k8s_openapi::jiff::SignedDuration::from_secs(seconds)
}
