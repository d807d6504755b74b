//! A job's status: its attempts, its progress and its end, in ordered checks.

use carryon_crds::condition::types::{COMPLETE, FAILED, SUSPENDED};
use carryon_crds::condition::{self, Verdict};
use carryon_crds::job::{ArtifactStatus, ProgressStatus};
use carryon_crds::wire::{Progress, TerminationMessage};
use carryon_crds::{CarryOnJob, CarryOnJobStatus, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::attempts::{Ledger, Plan, ended};
use super::{Applied, Observed, Validated};
use crate::shared::Refusal;
use crate::shared::kstatus::Standing;
use crate::shared::trouble::{self, phase};

/// The status of `job` after `outcome`.
pub fn status(job: &CarryOnJob, outcome: Result<(&Validated, &Applied), &Refusal>, observed: &Observed, now: &Time) -> CarryOnJobStatus {
    let previous = job.status.clone().unwrap_or_default();
    let mut ledger = match outcome {
        Ok((validated, _)) => validated.ledger.clone(),
        Err(_) => Ledger::account(&previous, observed, now),
    };
    if let Ok((Validated { plan: Plan::Keep(number) | Plan::Start(number), .. }, Applied { attempt: Some(attempt) })) = outcome {
        // Made by an operator that ended before it could write this down: then it is older than now.
        ledger.enter(*number, attempt.metadata.creation_timestamp.clone().unwrap_or_else(|| now.clone()));
    }
    let (standing, further) = match outcome {
        Err(refusal) => (Standing::from(refusal), Vec::new()),
        Ok((validated, _)) => standing(validated, &ledger, observed),
    };
    let verdicts: Vec<Verdict> = standing.verdicts().into_iter().chain(further).collect();
    let finished = verdicts.iter().any(|verdict| [COMPLETE, FAILED].contains(&verdict.type_));
    let image = outcome.ok().filter(|_| job.spec.trainer.image.is_none()).map(|(validated, _)| validated.image.clone());
    CarryOnJobStatus {
        conditions: condition::set(&previous.conditions, &verdicts, job.metadata.generation, now),
        observed_generation: job.metadata.generation,
        attempt: ledger.attempts.last().map_or(previous.attempt, |attempt| attempt.number),
        failures: ledger.failures,
        start_time: previous.start_time.or_else(|| ledger.attempts.first().map(|attempt| attempt.start_time.clone())),
        completion_time: previous.completion_time.or_else(|| finished.then(|| now.clone())),
        active_seconds: ledger.active_seconds,
        progress: progress(&ledger, observed).or(previous.progress),
        artifact: previous.artifact.or_else(|| artifact(outcome.ok()?.0, ledger.last_words.as_ref()?)),
        image: image.or(previous.image),
        attempts: ledger.attempts,
    }
}

fn standing(job: &Validated, ledger: &Ledger, observed: &Observed) -> (Standing, Vec<Verdict>) {
    match &job.plan {
        Plan::Complete => {
            let message = "the head is written; status.artifact names it";
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
        Plan::Start(number) => (starting(*number), Vec::new()),
        Plan::Keep(number) => (attempt(job, *number, observed), Vec::new()),
    }
}

fn starting(number: u32) -> Standing {
    Standing::in_progress("AttemptStarting", format!("attempt {number}: waiting for its pod to run"))
}

fn attempt(job: &Validated, number: u32, observed: &Observed) -> Standing {
    let held = observed.attempt.as_ref().and_then(|attempt| attempt.spec.as_ref()?.suspend);
    if held == Some(true) {
        let name = names::attempt(&job.owner.name, number);
        let message = format!("attempt {number}: batch Job {name} is held back (spec.suspend) by another controller, such as a queue");
        return Standing::in_progress("AttemptQueued", message);
    }
    if let Some(trouble) = trouble::find(&observed.pods) {
        return Standing::in_progress(trouble.reason, format!("attempt {number}: {}", trouble.message));
    }
    if observed.pods.iter().any(|pod| ["Succeeded", "Failed"].contains(&phase(pod))) {
        return Standing::current("AttemptEnding", format!("attempt {number}: its pod has ended"));
    }
    if !observed.pods.iter().any(|pod| phase(pod) == "Running") {
        return starting(number);
    }
    // A trainer that only starts, or has no more to say, does not answer.
    let phase = observed.progress.as_ref().map_or("its pod runs", |progress| progress.phase.as_str());
    let pool = format!("{}/{}", job.owner.namespace, job.pool);
    Standing::current("Running", format!("attempt {number} on BaseModelPool {pool}: {phase}"))
}

fn artifact(job: &Validated, words: &TerminationMessage) -> Option<ArtifactStatus> {
    let folder = format!("{}/{}", job.output.path.as_deref().unwrap_or_default(), names::ARTIFACT_FOLDER);
    Some(ArtifactStatus {
        uri: names::claim_uri(&job.output.claim_name, &folder),
        digest: words.digest.clone()?,
        base_model_digest: words.base_model_digest.clone().unwrap_or_default(),
    })
}

fn progress(ledger: &Ledger, observed: &Observed) -> Option<ProgressStatus> {
    let last = ledger.last_words.as_ref().and_then(|words| words.progress.as_ref());
    last.or(observed.progress.as_ref()).map(progress_status)
}

fn progress_status(progress: &Progress) -> ProgressStatus {
    let figure = |value: Option<f64>, digits: usize| value.filter(|value| value.is_finite()).map(|value| format!("{value:.digits$}"));
    ProgressStatus {
        step: progress.step,
        total_steps: progress.total_steps,
        train_loss: figure(progress.train_loss, 4),
        eval_loss: figure(progress.eval_loss, 4),
        base_eval_loss: figure(progress.base_eval_loss, 4),
        tokens_per_second: figure(progress.tokens_per_second, 0),
        eta_seconds: progress.eta_seconds,
    }
}
