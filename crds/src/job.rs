//! `CarryOnJob`: trains one head on a pool's hidden states.

mod data;
mod evaluation;
mod head;
mod status;
mod training;

use kube::core::{Message, Rule};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::data::{Data, DataFormat, OnError, Overlong, Split, Targets, Thinking};
pub use self::evaluation::{Evaluation, Generation, Metric, Threshold};
pub use self::head::{HeadInit, HeadSpec, Random};
pub use self::status::{ArtifactStatus, AttemptResult, AttemptStatus, CarryOnJobStatus, ProgressStatus};
pub use self::training::{
    Balanced, Checkpoint, ClassWeights, INT8_BLOCK, KeptSeed, LossPlace, NormScope, Optimizer, SMALL_PARAMETER, Seeds, StateDtype,
    Training, WeightDtype,
};
use crate::common::{ClaimPath, PodTemplate, TapSelection};
use crate::wire::limits;

/// Desired state of a training job.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, CustomResource, KubeSchema)]
#[kube(
    group = "carryon.dev",
    version = "v1alpha1",
    kind = "CarryOnJob",
    plural = "carryonjobs",
    shortname = "coj",
    category = "carryon",
    namespaced,
    status = "CarryOnJobStatus",
    doc = "Trains one head on the hidden states of a frozen base model.",
    printcolumn(name = "Ready", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].reason"),
    printcolumn(name = "Step", type_ = "string", json_path = ".status.progress.step"),
    printcolumn(name = "Of", type_ = "string", json_path = ".status.progress.totalSteps"),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.progress.evalLoss"),
    printcolumn(name = "Base", type_ = "string", json_path = ".status.progress.baseEvalLoss", priority = 1),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    printcolumn(name = "Message", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message", priority = 1),
    validation = ("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40", "name must be a DNS-1035 label of at most 40 characters"),
    validation = bound("pools"),
    validation = bound("task"),
    validation = bound("head"),
    validation = bound("data"),
    validation = bound("training"),
    validation = bound("evaluation"),
    validation = bound("trainer"),
    validation = bound("checkpoint"),
    validation = bound("output"),
    validation = bound_if_set("stateCache")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.head.width % self.head.attentionHeads == 0 && (self.head.width / self.head.attentionHeads) % 2 == 0", "head.width must be an even multiple of head.attentionHeads"))]
#[x_kube(validation = ("has(self.head.labels) == (self.task in ['Classification', 'MultiLabelClassification'])", "head.labels is needed by tasks Classification and MultiLabelClassification, and by no other"))]
#[x_kube(validation = ("(self.data.format == 'Auto') || (self.data.format == 'TextLabel') == (self.task in ['Classification', 'MultiLabelClassification', 'Regression'])", "data.format TextLabel goes with tasks Classification, MultiLabelClassification and Regression, and with no other"))]
#[x_kube(validation = ("(self.data.format == 'Auto') || (self.data.format == 'Preference') == (self.task in ['Reward', 'DPO'])", "data.format Preference goes with tasks Reward and DPO, and with no other"))]
#[x_kube(validation = ("(self.data.format == 'Auto') || (self.data.format == 'Pair') == (self.task == 'Embedding')", "data.format Pair goes with task Embedding, and with no other"))]
#[x_kube(validation = ("has(self.head.dimensions) == (self.task == 'Embedding')", "head.dimensions is needed by task Embedding and by no other"))]
#[x_kube(validation = ("!has(self.head.pooledTokens) || !(self.task in ['CausalLM', 'DPO'])", "head.pooledTokens is for tasks that pool a text, not for CausalLM and DPO"))]
#[x_kube(validation = ("!has(self.training.temperature) || self.task == 'Embedding'", "training.temperature goes with task Embedding, and with no other"))]
#[x_kube(validation = ("!has(self.training.beta) || self.task == 'DPO'", "training.beta goes with task DPO, and with no other"))]
#[x_kube(validation = ("self.task in ['CausalLM', 'DPO'] || !(has(self.data.split.general) && size(self.data.split.general) > 0) && !(has(self.data.split.replay) && size(self.data.split.replay) > 0)", "data.split.general and replay go with tasks CausalLM and DPO, and with no other"))]
#[x_kube(validation = ("(!has(self.training.klCoef) && !has(self.training.replayBatchSize)) || (has(self.data.split.replay) && size(self.data.split.replay) > 0)", "training.klCoef and replayBatchSize need data.split.replay"))]
#[x_kube(validation = ("!(has(self.data.split.general) && size(self.data.split.general) > 0) || (has(self.data.split.evaluation) && size(self.data.split.evaluation) > 0)", "data.split.general is measured at evaluations: set data.split.evaluation"))]
#[x_kube(validation = ("!has(self.evaluation.maxGeneralLossIncrease) || (has(self.data.split.general) && size(self.data.split.general) > 0)", "evaluation.maxGeneralLossIncrease needs data.split.general"))]
#[x_kube(validation = ("self.task != 'Embedding' || self.training.perDeviceTrainBatchSize > 1", "task Embedding needs training.perDeviceTrainBatchSize of 2 or more: the others of its batch are what a text is told from"))]
#[x_kube(validation = ("!has(self.training.classWeights) || self.task in ['Classification', 'MultiLabelClassification']", "training.classWeights goes with tasks Classification and MultiLabelClassification, and with no other"))]
#[x_kube(validation = ("!has(self.training.labelSmoothingFactor) || self.training.labelSmoothingFactor == 0.0 || self.task == 'Classification'", "training.labelSmoothingFactor goes with task Classification, and with no other"))]
#[x_kube(validation = ("!has(self.evaluation.metric) || self.evaluation.metric == 'Loss' || (self.evaluation.metric == 'Accuracy' && self.task in ['Classification', 'MultiLabelClassification', 'Reward', 'DPO']) || (self.evaluation.metric in ['MacroF1', 'RocAuc'] && self.task in ['Classification', 'MultiLabelClassification']) || (self.evaluation.metric == 'Spearman' && self.task == 'Regression') || (self.evaluation.metric == 'RecallAt1' && self.task == 'Embedding')", "evaluation.metric is not a figure of the task"))]
#[x_kube(validation = ("!has(self.evaluation.metric) || self.evaluation.metric == 'Loss' || (has(self.data.split.evaluation) && size(self.data.split.evaluation) > 0)", "evaluation.metric needs held-out samples: set data.split.evaluation"))]
#[x_kube(validation = ("!has(self.evaluation.alphas) || size(self.evaluation.alphas) == 0 || (self.task in ['CausalLM', 'DPO'] && (has(self.data.split.evaluation) && size(self.data.split.evaluation) > 0))", "evaluation.alphas go with tasks CausalLM and DPO, and need data.split.evaluation"))]
#[x_kube(validation = ("!has(self.evaluation.generation) || (has(self.data.split.evaluation) && size(self.data.split.evaluation) > 0)", "evaluation.generation answers held-out samples: set data.split.evaluation"))]
#[x_kube(validation = ("!has(self.evaluation.generation) || self.task == 'CausalLM'", "evaluation.generation goes with task CausalLM"))]
#[x_kube(validation = ("!has(self.evaluation.thresholds) || size(self.evaluation.thresholds) == 0 || (has(self.data.split.evaluation) && size(self.data.split.evaluation) > 0)", "evaluation.thresholds need held-out samples: set data.split.evaluation"))]
#[x_kube(validation = ("!has(self.evaluation.thresholds) || self.evaluation.thresholds.all(it, it.metric == 'Loss' || (it.metric == 'Accuracy' && self.task in ['Classification', 'MultiLabelClassification', 'Reward', 'DPO']) || (it.metric in ['MacroF1', 'RocAuc'] && self.task in ['Classification', 'MultiLabelClassification']) || (it.metric == 'Spearman' && self.task == 'Regression') || (it.metric == 'RecallAt1' && self.task == 'Embedding') || (it.metric == 'ExactMatch' && has(self.evaluation.generation)))", "evaluation.thresholds: a metric is not a figure of the task, or ExactMatch is asked for without evaluation.generation"))]
#[x_kube(validation = ("!has(self.training.seeds) || (has(self.data.split.evaluation) && size(self.data.split.evaluation) > 0)", "training.seeds are compared on held-out samples: set data.split.evaluation"))]
#[x_kube(validation = ("!has(self.evaluation.earlyStoppingPatience) || (has(self.data.split.evaluation) && size(self.data.split.evaluation) > 0)", "evaluation.earlyStoppingPatience needs held-out samples: set data.split.evaluation"))]
#[x_kube(validation = ("has(self.managedBy) == has(oldSelf.managedBy) && (!has(self.managedBy) || self.managedBy == oldSelf.managedBy)", "managedBy is immutable; create a new job"))]
#[x_kube(validation = ("self.pools.all(one, self.pools.exists_one(other, other.name == one.name && has(other.__namespace__) == has(one.__namespace__) && (!has(one.__namespace__) || other.__namespace__ == one.__namespace__)))", "pools names a pool twice"))]
pub struct CarryOnJobSpec {
    /// Pools whose hidden states the head reads. Of several, whose tokenizers are the same, the loss is measured at the first, and it serves the head.
    #[schemars(length(min = 1, max = limits::MAX_POOLS))]
    pub pools: Vec<JobPool>,
    /// What the head learns.
    #[serde(default)]
    pub task: Task,
    /// Shape of the head.
    #[serde(default)]
    pub head: HeadSpec,
    /// Training and evaluation samples.
    pub data: Data,
    /// How to train, under the names of Hugging Face's TrainingArguments where one exists.
    #[serde(default)]
    pub training: Training,
    /// When to evaluate.
    #[serde(default)]
    pub evaluation: Evaluation,
    /// The trainer's pod.
    #[serde(default)]
    pub trainer: PodTemplate,
    /// Checkpoints, kept beside the output.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// Where checkpoints, hidden-state cache, head and report go.
    pub output: Output,
    /// Where hidden states are kept for all jobs that name the same place: of one base and the same texts they are asked for once. In the output,
    /// for this job alone, when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_cache: Option<StateCache>,
    /// Checkpoint, stop and give the resources back until set to false again.
    #[serde(default)]
    pub suspend: bool,
    /// Failed attempts before the job is given up.
    #[serde(default = "six")]
    #[schemars(range(min = 0, max = 1000))]
    pub backoff_limit: i32,
    /// Seconds that the trainers of all attempts together may run; time in a queue does not count.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 31_536_000))]
    pub active_deadline_seconds: Option<i64>,
    /// Seconds after which a finished job is deleted, once no CarryOnDeployment refers to it. The artifact stays.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0, max = 2_147_483_647))]
    pub ttl_seconds_after_finished: Option<i32>,
    /// Controller that looks after the job, as a batch Job's `managedBy`: this operator leaves it alone when that is another than
    /// `carryon.dev/operator`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9/._~%!$&'()*+,;=:-]+$"))]
    pub managed_by: Option<String>,
    /// What to do while the pool is missing or not ready.
    #[serde(default)]
    pub pool_unavailable_policy: PoolUnavailablePolicy,
    /// With `poolUnavailablePolicy: Fail`, seconds that the pool may be missing or not ready.
    #[serde(default = "five_minutes")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub pool_unavailable_grace_seconds: i64,
}

/// A member of the spec that is corrected until the first attempt has started, and stays from then on.
fn bound(member: &str) -> Rule {
    let started = "has(oldSelf.status) && has(oldSelf.status.attempt) && oldSelf.status.attempt > 0";
    Rule::new(format!("!({started}) || self.spec.{member} == oldSelf.spec.{member}"))
        .message(Message::Message(format!("{member} cannot be changed once an attempt has started; create a new job")))
        .field_path(format!(".spec.{member}"))
}

/// The same for a member that may be absent.
fn bound_if_set(member: &str) -> Rule {
    let started = "has(oldSelf.status) && has(oldSelf.status.attempt) && oldSelf.status.attempt > 0";
    let same = format!(
        "has(self.spec.{member}) == has(oldSelf.spec.{member}) && (!has(self.spec.{member}) || self.spec.{member} == oldSelf.spec.{member})"
    );
    Rule::new(format!("!({started}) || ({same})"))
        .message(Message::Message(format!("{member} cannot be changed once an attempt has started; create a new job")))
        .field_path(".spec".to_owned())
}

impl CarryOnJobSpec {
    /// The claims that it names.
    pub fn claims(&self) -> impl Iterator<Item = &ClaimPath> {
        let shared = self.state_cache.as_ref().and_then(StateCache::claim);
        [self.data.source.persistent_volume_claim.as_ref(), self.output.claim(), shared, self.head.init.claim()].into_iter().flatten()
    }

    /// The spec without what may be changed while a job runs, as the rules above have it.
    #[must_use]
    pub fn lasting(&self) -> Self {
        Self {
            suspend: false,
            backoff_limit: 0,
            active_deadline_seconds: None,
            ttl_seconds_after_finished: None,
            managed_by: None,
            pool_unavailable_policy: PoolUnavailablePolicy::default(),
            pool_unavailable_grace_seconds: 0,
            ..self.clone()
        }
    }
}

/// What a job does without its pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum PoolUnavailablePolicy {
    /// Wait for it, before an attempt starts and while it runs.
    #[default]
    Wait,
    /// Fail for good when it lasts longer than `poolUnavailableGraceSeconds`.
    Fail,
}

/// One pool and where it is tapped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct JobPool {
    /// Name of a BaseModelPool.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
    /// Its namespace; the job's own when absent. In another one the pool's `sharing` has to allow it: else it is as if there were no pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 63), regex(pattern = r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub namespace: Option<String>,
    /// Taps; those of the preset Balanced when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taps: Option<TapSelection>,
    /// Number type in which hidden states of layers travel and are kept. What the loss is measured on is always the model's own.
    #[serde(default, skip_serializing_if = "crate::common::is_default")]
    pub hidden_states_dtype: HiddenStatesDtype,
}

/// Number type of hidden states on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HiddenStatesDtype {
    /// That of the pool: the head learns on what it is served on.
    #[default]
    Model,
    /// 8 bits a number with a scale a token: half the bytes of bfloat16; the head learns on rounded states and is served on unrounded ones.
    Float8E4M3,
}

/// What the head learns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Task {
    /// The next token, through the base's own LM head.
    #[default]
    CausalLM,
    /// The next token, so that of two answers to a prompt the one that people chose gains on the other, by direct preference optimization
    /// (arXiv 2305.18290); what they are compared with is the base.
    #[serde(rename = "DPO")]
    Dpo,
    /// One label for a text.
    Classification,
    /// One label, several or none of a whole text, each by itself, as Hugging Face's `multi_label_classification`.
    MultiLabelClassification,
    /// A number for a whole text.
    Regression,
    /// A number for a whole text, higher for the one of two that people chose.
    Reward,
    /// `head.dimensions` numbers for a whole text, whose direction is near to that of texts that mean the same.
    Embedding,
}

impl Task {
    /// Whether the head puts out numbers for a whole text, instead of a correction of each token's prediction.
    pub fn is_pooled(self) -> bool {
        self.of_head() != Self::CausalLM
    }

    /// What a head does that has learned this: several ways of learning end in the same use.
    pub fn of_head(self) -> Self {
        if self == Self::Dpo { Self::CausalLM } else { self }
    }

    /// Texts that are learned together, because they are compared with each other.
    pub fn group(self) -> u32 {
        if matches!(self, Self::Dpo | Self::Reward | Self::Embedding) { 2 } else { 1 }
    }

    /// Whether what it puts out has names, those of `head.labels`.
    pub fn has_labels(self) -> bool {
        matches!(self, Self::Classification | Self::MultiLabelClassification)
    }
}

/// Where results go.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// The place. What is there outlives the job.
    pub destination: Destination,
}

impl Output {
    /// The claim.
    pub fn claim(&self) -> Option<&ClaimPath> {
        self.destination.persistent_volume_claim.as_ref()
    }
}

/// A place for results; exactly one member is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.persistentVolumeClaim)", "persistentVolumeClaim must be set"))]
pub struct Destination {
    /// Folder `<path>/<job>/` of a claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
}

/// A place that jobs share; exactly one member is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.persistentVolumeClaim)", "persistentVolumeClaim must be set"))]
pub struct StateCache {
    /// Folder of a claim. One that pods on several nodes may write (ReadWriteMany) serves jobs that run at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent_volume_claim: Option<ClaimPath>,
}

impl StateCache {
    /// The claim.
    pub fn claim(&self) -> Option<&ClaimPath> {
        self.persistent_volume_claim.as_ref()
    }
}

fn six() -> i32 {
    6
}

fn five_minutes() -> i64 {
    300
}
