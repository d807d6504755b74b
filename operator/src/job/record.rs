//! What a job came to, in an annotation of its own. A backup keeps metadata and spec and drops the status: a finished job that is restored has
//! its result from here and is not trained again. One that is deleted and applied again from its manifest has no annotation, and trains.

use carryon_crds::condition::{holding, is_true, types};
use carryon_crds::job::ArtifactStatus;
use carryon_crds::wire::limits::MAX_POOLS;
use carryon_crds::{CarryOnJob, CarryOnJobSpec, CarryOnJobStatus, names};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use serde::{Deserialize, Serialize};

use super::plan::{Plan, known_reason};

/// Longest annotation that is read.
const LONGEST: usize = 65_536;

/// A job's result, with what it is the result of.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Record {
    /// Name of the job.
    pub name: String,
    /// Its spec: another one has another result.
    pub spec: CarryOnJobSpec,
    /// Number of the last attempt.
    pub attempt: u32,
    /// When it was finished.
    pub completion_time: Time,
    /// The head.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact: Option<ArtifactStatus>,
    /// Why there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failure: Option<Reason>,
}

/// Why a job has failed.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reason {
    /// Of the Failed condition.
    pub reason: String,
    /// Of the Failed condition.
    pub message: String,
}

impl Record {
    /// What `job` has to be told of, once it is finished with `status`; none when its annotation says so already.
    pub fn due(job: &CarryOnJob, status: &CarryOnJobStatus) -> Option<Self> {
        let failed = holding(&status.conditions, types::FAILED);
        let failure = failed.map(|failed| Reason { reason: failed.reason.clone(), message: failed.message.clone() });
        if failure.is_none() && !is_true(&status.conditions, types::COMPLETE) {
            return None;
        }
        let record = Self {
            name: job.name_any(),
            spec: job.spec.clone(),
            attempt: status.attempt,
            completion_time: status.completion_time.clone()?,
            artifact: status.artifact.clone(),
            failure,
        };
        let known = Self::read(job).is_some_and(|known| (&known.artifact, &known.failure) == (&record.artifact, &record.failure));
        // One that could not be read back would be due for ever, and hold up the status: that has to do.
        let lasts = || serde_json::to_string(&record).is_ok_and(|text| Self::parse(&text, job).is_some());
        (!known && lasts()).then_some(record)
    }

    /// What the annotation of `job` says.
    pub fn read(job: &CarryOnJob) -> Option<Self> {
        Self::parse(job.annotations().get(names::RESULT_ANNOTATION)?, job)
    }

    /// Anybody may have written it: what is not of this very job, or could not be, is not there.
    fn parse(text: &str, job: &CarryOnJob) -> Option<Self> {
        if text.len() > LONGEST {
            return None;
        }
        let record: Self = serde_json::from_str(text).ok()?;
        let own = record.name == job.name_any() && record.spec.lasting() == job.spec.lasting();
        let whole = match &record.failure {
            Some(failure) => known_reason(&failure.reason).is_some() && printable(&failure.message, 4096),
            None => true,
        };
        (own && whole && record.artifact.iter().all(|artifact| possible(artifact, job))).then_some(record)
    }

    /// The plan of a job that has this result.
    pub fn plan(&self) -> Plan {
        let reason = self.failure.as_ref().and_then(|failure| Some((known_reason(&failure.reason)?, failure.message.clone())));
        reason.map_or(Plan::Complete, |(reason, message)| Plan::Failed { reason, message, stop: None })
    }
}

/// Whether the job can have written this artifact: in its own claim, with a digest.
fn possible(artifact: &ArtifactStatus, job: &CarryOnJob) -> bool {
    let claim = names::parse_claim_uri(&artifact.uri).map(|(claim, _)| claim);
    let digest = |text: &str| text.starts_with("sha256:") && printable(text, 128);
    claim.is_some_and(|claim| job.spec.output.claim().is_some_and(|own| own.claim_name == claim))
        && !artifact.uri.split('/').any(|part| part == "..")
        && printable(&artifact.uri, 1024)
        && digest(&artifact.digest)
        && (artifact.base_model_digest.is_empty() || digest(&artifact.base_model_digest))
        && artifact.other_base_model_digests.len() < MAX_POOLS
        && artifact.other_base_model_digests.iter().all(|other| digest(other))
}

fn printable(text: &str, longest: usize) -> bool {
    text.len() <= longest && !text.chars().any(char::is_control)
}
