//! What comes next for a job: its suspension, its deadline, its back-off, its pool, and the pods that have to go first.

use carryon_crds::condition::{holding, is_true, types};
use carryon_crds::job::{AttemptResult, AttemptStatus, PoolUnavailablePolicy};
use carryon_crds::wire::ExitCode;
use carryon_crds::{BaseModelPool, CarryOnJob, CarryOnJobSpec, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::SignedDuration;
use kube::ResourceExt as _;

use super::Observed;
use super::attempts::{Ledger, ended, seconds};
use super::record::Record;
use super::trainers::occupant;
use super::validate::loaded;
use crate::shared::Refusal;
use crate::shared::sharing::PoolPath;

/// Seconds before the attempt after the first failure; doubled by each further one.
const BACK_OFF_SECONDS: i64 = 10;
/// Longest back-off.
const BACK_OFF_LIMIT_SECONDS: i64 = 360;
/// Why jobs fail for good.
const REASONS: [&str; 5] = ["DataRefused", "ConfigurationRefused", "BackoffLimitExceeded", "DeadlineExceeded", "PoolUnavailable"];

/// What comes next.
#[derive(Clone, Debug, PartialEq)]
pub enum Plan {
    /// Keep this attempt running.
    Keep(u32),
    /// Start this attempt.
    Start(u32),
    /// Wait for a pod that has the output folder, or for a pool that may be used.
    Wait {
        /// CamelCase reason.
        reason: &'static str,
        /// What for.
        message: String,
        /// Attempt to stop.
        stop: Option<u32>,
    },
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

impl Plan {
    /// Whether nothing comes after this.
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Complete | Self::Failed { .. })
    }
}

/// The attempts of `job` up to now, and what comes next.
pub fn plan(job: &CarryOnJob, observed: &Observed, now: &Time) -> (Ledger, Plan) {
    let status = job.status.clone().unwrap_or_default();
    let mut ledger = Ledger::account(&status, observed, now);
    if let Some(plan) = finished(job, &ledger) {
        return (ledger, plan);
    }
    // It is taken over first, whatever comes then: only what is written down is waited for, counted and stopped.
    if let Some(number) = unwritten(job, &ledger, observed) {
        return (ledger, Plan::Keep(number));
    }
    let plan = given_up(job, &ledger).unwrap_or_else(|| next(job, &ledger, observed, now));
    let needs_pool = matches!(plan, Plan::Start(_) | Plan::Keep(_) | Plan::Wait { .. } | Plan::BackOff { .. });
    let plan = if needs_pool { unless_unavailable(plan, job, &mut ledger, observed, now) } else { plan };
    (ledger, plan)
}

/// Number of the attempt that is there and not in the ledger: left behind by a job of this name, or by an operator that ended before it could write
/// it down.
fn unwritten(job: &CarryOnJob, ledger: &Ledger, observed: &Observed) -> Option<u32> {
    let next = ledger.attempts.last().map_or(0, |last| last.number) + 1;
    let is_next = observed.attempt.as_ref().is_some_and(|attempt| attempt.name_any() == names::attempt(&job.name_any(), next));
    is_next.then_some(next)
}

/// The plan of a job that is finished.
fn finished(job: &CarryOnJob, ledger: &Ledger) -> Option<Plan> {
    let conditions = job.status.as_ref().map_or(&[][..], |status| &status.conditions);
    if is_true(conditions, types::COMPLETE) {
        return Some(Plan::Complete);
    }
    if let Some(failed) = holding(conditions, types::FAILED) {
        let reason = known_reason(&failed.reason).unwrap_or("Failed");
        return Some(Plan::Failed { reason, message: failed.message.clone(), stop: ledger.running() });
    }
    let Some(last) = ledger.attempts.last() else { return Record::read(job).map(|record| record.plan()) };
    match last.result {
        Some(AttemptResult::Complete) => Some(Plan::Complete),
        Some(AttemptResult::Refused) => Some(refused(last)),
        _ => None,
    }
}

/// The plan of a job that has come to one of its limits.
fn given_up(job: &CarryOnJob, ledger: &Ledger) -> Option<Plan> {
    let last = ledger.attempts.last()?;
    let CarryOnJobSpec { backoff_limit, active_deadline_seconds, .. } = job.spec;
    if i64::from(ledger.failures) > i64::from(backoff_limit) {
        let message = format!("{} attempts failed, spec.backoffLimit is {backoff_limit}; {}", ledger.failures, ended(last));
        return Some(Plan::Failed { reason: "BackoffLimitExceeded", message, stop: ledger.running() });
    }
    active_deadline_seconds.filter(|deadline| ledger.elapsed() >= *deadline).map(|deadline| {
        let message = format!("the attempts ran longer than spec.activeDeadlineSeconds ({deadline})");
        Plan::Failed { reason: "DeadlineExceeded", message, stop: ledger.running() }
    })
}

fn next(job: &CarryOnJob, ledger: &Ledger, observed: &Observed, now: &Time) -> Plan {
    if job.spec.suspend {
        return Plan::Suspended { stop: ledger.running() };
    }
    let withheld = observed.pools(job).into_iter().find_map(|(path, pool)| path.withheld(pool));
    if let (Some(number), Some(Refusal { reason, message, .. })) = (ledger.running(), withheld) {
        return Plan::Wait { reason, message, stop: Some(number) };
    }
    let Some(last) = ledger.attempts.last() else { return start(1, observed) };
    let (Some(result), Some(end)) = (last.result, &last.completion_time) else {
        let stays = observed.attempt.as_ref().is_some_and(|attempt| attempt.metadata.deletion_timestamp.is_none());
        return if stays { Plan::Keep(last.number) } else { wait(occupant(&observed.pods)).unwrap_or(Plan::Keep(last.number)) };
    };
    if result == AttemptResult::Failed {
        let doublings = ledger.failures.saturating_sub(1).min(16);
        let wait = (BACK_OFF_SECONDS << doublings).min(BACK_OFF_LIMIT_SECONDS);
        if seconds(end, now) < wait {
            let until = end.0.checked_add(SignedDuration::from_secs(wait)).unwrap_or(end.0);
            return Plan::BackOff { until: Time(until) };
        }
    }
    start(last.number + 1, observed)
}

/// Starts attempt `number`, unless a pod of another one is still there.
fn start(number: u32, observed: &Observed) -> Plan {
    wait(occupant(&observed.pods)).unwrap_or(Plan::Start(number))
}

fn wait(occupant: Option<(&'static str, String)>) -> Option<Plan> {
    occupant.map(|(reason, message)| Plan::Wait { reason, message, stop: None })
}

/// With `poolUnavailablePolicy: Fail`, a job that needs its pool gives up when it has been missing or not ready for long.
fn unless_unavailable(plan: Plan, job: &CarryOnJob, ledger: &mut Ledger, observed: &Observed, now: &Time) -> Plan {
    let waits = job.spec.pool_unavailable_policy == PoolUnavailablePolicy::Wait;
    let is_lost = |(_, pool): &(PoolPath, Option<&BaseModelPool>)| pool.and_then(loaded).is_none();
    let Some((lost, _)) = observed.pools(job).into_iter().find(is_lost).filter(|_| !waits) else { return plan };
    let since = job.status.as_ref().and_then(|status| status.pool_unavailable_since.clone()).unwrap_or_else(|| now.clone());
    let grace = job.spec.pool_unavailable_grace_seconds;
    let over = seconds(&since, now) >= grace;
    ledger.pool_unavailable_since = Some(since);
    if !over {
        return plan;
    }
    let message = format!("BaseModelPool {lost} has been missing or not ready for {grace} s, and spec.poolUnavailablePolicy is Fail");
    Plan::Failed { reason: "PoolUnavailable", message, stop: ledger.running() }
}

/// Seconds until time alone changes the plan: the end of a back-off, the deadline, the end of the patience with a pool.
pub fn until_next(job: &CarryOnJob, ledger: &Ledger, plan: &Plan, now: &Time) -> Option<i64> {
    if plan.is_final() {
        return None;
    }
    let back_off = match plan {
        Plan::BackOff { until } => Some(seconds(now, until)),
        _ => None,
    };
    let deadline = job.spec.active_deadline_seconds.filter(|_| ledger.runs).map(|deadline| deadline - ledger.elapsed());
    let pool = ledger.pool_unavailable_since.as_ref().map(|since| job.spec.pool_unavailable_grace_seconds - seconds(since, now));
    [back_off, deadline, pool].into_iter().flatten().min().map(|seconds| seconds.max(0) + 1)
}

fn refused(last: &AttemptStatus) -> Plan {
    let (reason, advice) = match last.exit_code {
        Some(code) if code == ExitCode::Data as i32 => ("DataRefused", "correct the data and create a new job"),
        _ => ("ConfigurationRefused", "correct the spec and create a new job"),
    };
    Plan::Failed { reason, message: format!("{}; {advice}", ended(last)), stop: None }
}

/// Reasons are static texts; one that was stored is read back here.
pub fn known_reason(reason: &str) -> Option<&'static str> {
    REASONS.into_iter().find(|known| *known == reason)
}
