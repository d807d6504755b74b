//! A job's status: its attempts, its progress and its end, in ordered checks.

use carryon_crds::condition::types::{COMPLETE, FAILED, PROMOTABLE, READY, SUSPENDED};
use carryon_crds::condition::{self, Verdict};
use carryon_crds::job::{ArtifactStatus, ProgressStatus};
use carryon_crds::wire::{Progress, TerminationMessage};
use carryon_crds::{CarryOnJob, CarryOnJobStatus, names};
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;

use super::attempts::{Ledger, ended};
use super::end::manager;
use super::plan::{Plan, plan};
use super::record::Record;
use super::trainers::lives;
use super::validate::{loaded, output};
use super::{Applied, Observed, Validated, general, memory};
use crate::shared::Outcome;
use crate::shared::kstatus::Standing;
use crate::shared::rollout::{FAILED_CREATE, refusal};
use crate::shared::sharing::{PoolPath, PoolUser as _};
use crate::shared::trouble::{self, phase};

/// The status of `job` after `outcome`. A reconcile that was refused accounts for an end as any other does: what is written down here is let go.
pub fn status(job: &CarryOnJob, outcome: &Outcome<Validated, Applied>, observed: &Observed, now: &Time) -> CarryOnJobStatus {
    let previous = job.status.clone().unwrap_or_default();
    let (mut ledger, plan) = plan(job, observed, now);
    if let (Plan::Keep(number) | Plan::Start(number), Ok((_, Applied { attempt: Some(attempt) }))) = (&plan, outcome) {
        ledger.enter(*number, attempt, now);
    }
    let restored = Record::read(job).filter(|_| plan.is_final() && ledger.attempts.is_empty());
    let artifact = previous.artifact.or_else(|| artifact(job, ledger.last_words.as_ref()?));
    let artifact = artifact.or_else(|| restored.as_ref()?.artifact.clone());
    let (standing, further) = match outcome {
        Err(refusal) if !plan.is_final() => (Standing::from(refusal), Vec::new()),
        _ => standing(job, &plan, &ledger, artifact.is_some(), observed),
    };
    let planned = memory::verdict(job, observed).filter(|_| !plan.is_final());
    let progress = progress(&ledger, observed).or(previous.progress);
    let general = general::verdict(job, progress.as_ref());
    let promotable = promotable(job, artifact.as_ref());
    let information = planned.into_iter().chain(general).chain(promotable);
    let verdicts: Vec<Verdict> = standing.verdicts().into_iter().chain(further).chain(information).collect();
    let image = outcome.as_ref().ok().filter(|_| job.spec.trainer.image.is_none()).map(|(validated, _)| validated.basis.image.clone());
    let finished = plan.is_final().then(|| restored.as_ref().map_or_else(|| now.clone(), |record| record.completion_time.clone()));
    let last = restored.map_or(previous.attempt, |record| record.attempt);
    CarryOnJobStatus {
        conditions: condition::set(&previous.conditions, &verdicts, job.metadata.generation, now),
        observed_generation: job.metadata.generation,
        attempt: ledger.attempts.last().map_or(last, |attempt| attempt.number),
        failures: ledger.failures,
        start_time: previous.start_time.or_else(|| ledger.attempts.first().map(|attempt| attempt.start_time.clone())),
        completion_time: previous.completion_time.or(finished),
        active_seconds: ledger.active_seconds,
        active_until: ledger.active_until.clone(),
        pool_unavailable_since: ledger.pool_unavailable_since.clone(),
        progress,
        artifact,
        worker_image: image.or(previous.worker_image),
        attempts: ledger.attempts,
    }
}

fn standing(job: &CarryOnJob, plan: &Plan, ledger: &Ledger, known: bool, observed: &Observed) -> (Standing, Vec<Verdict>) {
    match plan {
        Plan::Complete => {
            let message = if known {
                "the head is written; status.artifact names it"
            } else {
                "the head is written in another cluster, where the attempt ran; it is not known here"
            };
            (Standing::current("Complete", message), vec![Verdict::yes(COMPLETE, "Complete", message)])
        }
        Plan::Failed { reason, message, .. } => (Standing::stalled(reason, message), vec![Verdict::yes(FAILED, reason, message)]),
        Plan::Suspended { stop: Some(number) } => {
            let message = format!("suspended by spec.suspend; attempt {number} writes a checkpoint and ends");
            (Standing::in_progress("Suspending", message), Vec::new())
        }
        Plan::Suspended { stop: None } => {
            let message = "suspended by spec.suspend; set it to false to go on from the last checkpoint";
            (Standing::current("Suspended", message), vec![Verdict::yes(SUSPENDED, "Suspended", message)])
        }
        Plan::BackOff { until } => {
            let last = ledger.attempts.last().map(ended).unwrap_or_default();
            let next = ledger.attempts.last().map_or(1, |attempt| attempt.number + 1);
            (Standing::in_progress("BackOff", format!("{last}; attempt {next} starts at {:.0}", until.0)), Vec::new())
        }
        Plan::Wait { reason, message, .. } => (Standing::in_progress(reason, message), Vec::new()),
        Plan::Start(number) => (starting(*number), Vec::new()),
        Plan::Keep(number) => (attempt(job, *number, observed), Vec::new()),
    }
}

fn starting(number: u32) -> Standing {
    Standing::in_progress("AttemptStarting", format!("attempt {number}: waiting for its pod to run"))
}

fn attempt(job: &CarryOnJob, number: u32, observed: &Observed) -> Standing {
    let name = names::attempt(&job.name_any(), number);
    let present = observed.attempt.as_ref();
    if present.and_then(|attempt| attempt.spec.as_ref()?.suspend) == Some(true) {
        let message = format!("attempt {number}: batch Job {name} is held back (spec.suspend) by another controller, such as a queue");
        return Standing::in_progress("AttemptQueued", message);
    }
    if let Some(manager) = present.and_then(manager) {
        let runs = present.and_then(|attempt| attempt.status.as_ref()?.active).unwrap_or(0) > 0;
        let message = format!("attempt {number}: batch Job {name} is managed by {manager}");
        return if runs { Standing::current("Running", message) } else { Standing::in_progress("AttemptStarting", message) };
    }
    if let Some(words) = &observed.refused {
        let message = format!("attempt {number}: its pod cannot be created: {}", refusal(words));
        return Standing::stalled(FAILED_CREATE, message);
    }
    let pods = observed.pods_of_present();
    let living: Vec<Pod> = pods.iter().filter(|pod| lives(pod)).cloned().collect();
    if let Some(trouble) = trouble::find(&living) {
        return Standing::in_progress(trouble.reason, format!("attempt {number}: {}", trouble.message));
    }
    if living.is_empty() && pods.iter().any(|pod| ["Succeeded", "Failed"].contains(&phase(pod))) {
        return Standing::current("AttemptEnding", format!("attempt {number}: its pod has ended"));
    }
    if !living.iter().any(|pod| phase(pod) == "Running") {
        return starting(number);
    }
    let pool = job.pool();
    if let Some((lost, why)) = unavailable(job, observed) {
        let message = format!("attempt {number} waits for BaseModelPool {lost}: {why}");
        return Standing::in_progress("PoolNotReady", message);
    }
    let runs = format!("attempt {number} on BaseModelPool {pool}: ");
    // A trainer that only starts, or was not asked yet by an operator that only starts, has said nothing new.
    let said = observed.progress.as_ref().map(|progress| progress.phase.as_str());
    let before = job.status.iter().flat_map(|status| &status.conditions).find_map(|condition| condition.message.strip_prefix(&runs));
    Standing::current("Running", format!("{runs}{}", said.or(before).unwrap_or("its pod runs")))
}

/// The pool that answers nobody, and why, when the trainer needs it.
fn unavailable(job: &CarryOnJob, observed: &Observed) -> Option<(PoolPath, String)> {
    let phase = observed.progress.as_ref().map(|progress| progress.phase.as_str());
    // In these it asks the pool for nothing.
    if phase.is_some_and(|phase| ["waiting", "encoding", "writing", "done"].contains(&phase)) {
        return None;
    }
    observed.pools(job).into_iter().find_map(|(path, pool)| {
        let Some(pool) = pool else { return Some((path, "it is not there".to_owned())) };
        let conditions = pool.status.as_ref().map_or(&[][..], |status| &status.conditions);
        let says = || condition::find(conditions, READY).map(|ready| ready.message.clone());
        loaded(pool).is_none().then(|| (path, says().unwrap_or_else(|| "it is not ready".to_owned())))
    })
}

/// Whether the head meets its thresholds, where it has any.
fn promotable(job: &CarryOnJob, artifact: Option<&ArtifactStatus>) -> Option<Verdict> {
    let unmet = &artifact.filter(|_| !job.spec.evaluation.thresholds.is_empty())?.unmet_thresholds;
    Some(match unmet.as_slice() {
        [] => Verdict::yes(PROMOTABLE, "ThresholdsMet", "the head is what evaluation.thresholds ask for"),
        unmet => Verdict::no(PROMOTABLE, "ThresholdsUnmet", format!("by evaluation.thresholds: {}", unmet.join("; "))),
    })
}

fn artifact(job: &CarryOnJob, words: &TerminationMessage) -> Option<ArtifactStatus> {
    let (output, digest) = (output(job)?, words.digest.clone()?);
    let folder = format!("{}/{}", output.path.as_deref().unwrap_or_default(), names::artifact_folder(&digest));
    Some(ArtifactStatus {
        uri: names::claim_uri(&output.claim_name, &folder),
        digest,
        base_model_digest: words.base_model_digest.clone().unwrap_or_default(),
        other_base_model_digests: words.other_base_model_digests.clone(),
        evaluation: words.evaluation.iter().map(|(name, value)| (name.clone(), format!("{value:.4}"))).collect(),
        unmet_thresholds: words.unmet_thresholds.clone(),
    })
}

fn progress(ledger: &Ledger, observed: &Observed) -> Option<ProgressStatus> {
    let last = ledger.last_words.as_ref().and_then(|words| words.progress.as_ref());
    // One that has not found its checkpoint yet counts no steps: what the one before said stands.
    last.or(observed.progress.as_ref()).filter(|progress| progress.total_steps > 0).map(progress_status)
}

fn progress_status(progress: &Progress) -> ProgressStatus {
    let figure = |value: Option<f64>, digits: usize| value.filter(|value| value.is_finite()).map(|value| format!("{value:.digits$}"));
    ProgressStatus {
        step: progress.step,
        total_steps: progress.total_steps,
        train_loss: figure(progress.train_loss, 4),
        eval_loss: figure(progress.eval_loss, 4),
        base_eval_loss: figure(progress.base_eval_loss, 4),
        general_loss: figure(progress.general_loss, 4),
        base_general_loss: figure(progress.base_general_loss, 4),
        tokens_per_second: figure(progress.tokens_per_second, 0),
        eta_seconds: progress.eta_seconds,
    }
}
