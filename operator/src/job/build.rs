//! A validated job's children: configuration and the batch Job of one attempt. A trainer is asked by its pod's address and needs no Service.

use carryon_crds::names;
use carryon_crds::pool::Device;
use carryon_crds::wire::ExitCode;
use k8s_openapi::api::apps::v1::ControllerRevision;
use k8s_openapi::api::batch::v1::{
    Job, JobSpec, PodFailurePolicy, PodFailurePolicyOnExitCodesRequirement, PodFailurePolicyOnPodConditionsPattern, PodFailurePolicyRule,
};
use k8s_openapi::api::core::v1::{ConfigMap, PodTemplateSpec};
use k8s_openapi::api::networking::v1::NetworkPolicy;

use super::Validated;
use super::plan::Plan;
use crate::shared::network_policy::{self, Peers};
use crate::shared::pods::{self, Lifetime, Mount, MountSource, Role};

/// The trainer's container, which has the name of its component.
const TRAINER: &str = "trainer";

/// What a job is made of at one moment.
#[derive(Clone, Debug, PartialEq)]
pub struct Children {
    /// What the pods are rendered as, for as long as an attempt is to exist.
    pub revision: Option<ControllerRevision>,
    /// The worker's configuration, for as long as an attempt is to exist.
    pub config_map: Option<ConfigMap>,
    /// Who may reach the pods, where that is said, for as long as an attempt is to exist.
    pub network_policy: Option<NetworkPolicy>,
    /// The attempt that is to exist; created once and never written again.
    pub attempt: Option<Job>,
    /// Names of batch Jobs that are to go: one that runs, with its pod's grace period, and those that have had their time.
    pub stop: Vec<String>,
}

/// The children as the cluster holds them after they were applied.
#[derive(Clone, Debug, PartialEq)]
pub struct Applied {
    /// The attempt's batch Job, with its status.
    pub attempt: Option<Job>,
}

/// Renders the children.
pub fn build(job: &Validated) -> Children {
    let name = names::trainer(&job.basis.owner.name);
    let revision = job.basis.rendering.revision(&name, &job.config, || template(job));
    let (attempt, stop) = match &job.plan {
        Plan::Keep(number) | Plan::Start(number) => (Some(*number), None),
        Plan::Suspended { stop } | Plan::Failed { stop, .. } | Plan::Wait { stop, .. } => (None, *stop),
        Plan::BackOff { .. } | Plan::Complete => (None, None),
    };
    // Nobody has business with a trainer but those who ask how far it is.
    let policy = |peers: &Peers| network_policy::ingress(&job.basis.owner, &name, names::TRAINER_PORT, peers.watchers());
    Children {
        network_policy: attempt.and(job.basis.peers.as_ref()).map(policy),
        attempt: attempt.map(|number| batch_job(job, number, revision.template())),
        stop: stop.into_iter().chain(job.ledger.surplus()).map(|number| names::attempt(&job.basis.owner.name, number)).collect(),
        revision: attempt.map(|_| revision.kept(&job.basis.owner, &name)),
        config_map: attempt.map(|_| revision.config_map(&job.basis.owner)),
    }
}

/// The pods of all attempts, rendered today.
fn template(job: &Validated) -> PodTemplateSpec {
    let (source, path) = match (&job.data.persistent_volume_claim, &job.data.config_map) {
        (Some(claim), _) => (MountSource::Claim(claim.claim_name.clone()), claim.path.as_deref()),
        (None, map) => (MountSource::ConfigMap(map.iter().map(|map| map.name.clone()).collect()), None),
    };
    let output = MountSource::Claim(job.output.claim_name.clone());
    let pools = job.pools.iter().enumerate().map(|(place, pool)| (if place == 0 { "--pool" } else { "--other-pool" }, pool.url()));
    let mut args: Vec<_> = pools.collect();
    args.extend([
        ("--data", pods::inside(names::DATA_DIR, path)),
        ("--output", pods::inside(names::OUTPUT_DIR, job.output.path.as_deref())),
        ("--termination-log", names::TERMINATION_LOG.to_owned()),
    ]);
    let mut mounts = vec![
        Mount { name: "output".into(), path: names::OUTPUT_DIR.into(), source: output, read_only: false },
        Mount { name: "data".into(), path: names::DATA_DIR.into(), source, read_only: true },
    ];
    if job.on_gpu {
        // As a pool's pods do by default: a node may have what it says is a GPU, and be none that the image can use.
        args.push(("--device", Device::Auto.to_string()));
    }
    if let Some(claim) = &job.state_cache {
        args.push(("--state-cache", pods::inside(names::STATE_CACHE_DIR, claim.path.as_deref())));
        let source = MountSource::Claim(claim.claim_name.clone());
        mounts.push(Mount { name: "state-cache".into(), path: names::STATE_CACHE_DIR.into(), source, read_only: false });
    }
    if let Some(claim) = &job.init_head {
        args.push(("--init-head", pods::inside(names::INIT_HEAD_DIR, claim.path.as_deref())));
        let source = MountSource::Claim(claim.claim_name.clone());
        mounts.push(Mount { name: "init-head".into(), path: names::INIT_HEAD_DIR.into(), source, read_only: true });
    }
    pods::template(&Role {
        basis: &job.basis,
        subcommand: "train",
        args,
        env: Vec::new(),
        port: names::TRAINER_PORT,
        mounts,
        before: None,
        lifetime: Lifetime::Task,
    })
}

fn batch_job(job: &Validated, number: u32, mut template: PodTemplateSpec) -> Job {
    let label = (names::ATTEMPT_LABEL.to_owned(), number.to_string());
    let mut metadata = job.basis.owner.meta(names::attempt(&job.basis.owner.name, number));
    metadata.labels.get_or_insert_default().extend([label.clone()].into_iter().chain(job.queue_labels.clone()));
    let pod = template.metadata.get_or_insert_default();
    pod.labels.get_or_insert_default().extend([label]);
    // How it ended is read before it goes, whoever deletes it and however fast.
    pod.finalizers = Some(vec![names::LAST_WORDS_FINALIZER.to_owned()]);
    Job {
        metadata,
        spec: Some(JobSpec {
            backoff_limit: Some(0),
            completions: Some(1),
            parallelism: Some(1),
            pod_failure_policy: Some(failure_policy()),
            // Never two trainers on one output folder.
            pod_replacement_policy: Some("Failed".to_owned()),
            template,
            ..JobSpec::default()
        }),
        status: None,
    }
}

/// What the batch Job makes of its pod's end, by the first rule that applies. How a container beside the trainer ends is no matter.
fn failure_policy() -> PodFailurePolicy {
    let disruption = PodFailurePolicyOnPodConditionsPattern { type_: "DisruptionTarget".to_owned(), status: "True".to_owned() };
    let by_exit_code = |action: &str, operator: &str, code: ExitCode| PodFailurePolicyRule {
        action: action.to_owned(),
        on_exit_codes: Some(PodFailurePolicyOnExitCodesRequirement {
            operator: operator.to_owned(),
            values: vec![code as i32],
            container_name: Some(TRAINER.to_owned()),
        }),
        on_pod_conditions: None,
    };
    let rules = vec![
        // A pod lost to its node or to preemption is replaced within the attempt and counts for nothing.
        PodFailurePolicyRule { action: "Ignore".to_owned(), on_pod_conditions: Some(vec![disruption]), on_exit_codes: None },
        // A trainer that was told to end and wrote a checkpoint, as when a queue takes its place away, goes on with the attempt's next pod.
        by_exit_code("Ignore", "In", ExitCode::Resume),
        // Any other failure of the trainer ends the attempt. The exit code is then in the words of the batch Job's condition, even when the pod
        // was deleted and is gone.
        by_exit_code("FailJob", "NotIn", ExitCode::Complete),
    ];
    PodFailurePolicy { rules }
}
