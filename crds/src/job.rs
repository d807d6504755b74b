//! `CarryOnJob`: trains one head on a pool's hidden states.

mod status;

use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub use self::status::{ArtifactStatus, AttemptResult, AttemptStatus, CarryOnJobStatus, ProgressStatus};
use crate::common::{ClaimPath, DataSource, PodTemplate, Taps};

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
    printcolumn(name = "Step", type_ = "string", json_path = ".status.progress.step"),
    printcolumn(name = "Of", type_ = "string", json_path = ".status.progress.totalSteps"),
    printcolumn(name = "Loss", type_ = "string", json_path = ".status.progress.evalLoss"),
    printcolumn(name = "Base", type_ = "string", json_path = ".status.progress.baseEvalLoss"),
    printcolumn(name = "Status", type_ = "string", json_path = ".status.conditions[?(@.type==\"Ready\")].message"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = ("self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$') && size(self.metadata.name) <= 40", "name must be a DNS-1035 label of at most 40 characters")
)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.head.width % self.head.heads == 0 && (self.head.width / self.head.heads) % 2 == 0", "head.width must be an even multiple of head.heads"))]
#[x_kube(validation = ("has(self.head.labels) == (self.task == 'Classification')", "head.labels is needed by task Classification and by no other"))]
#[x_kube(validation = ("(self.data.format == 'Auto') || (self.data.format == 'TextLabel') == (self.task == 'Classification')", "data.format TextLabel goes with task Classification, and with no other"))]
#[x_kube(validation = ("!has(self.evaluation.earlyStoppingPatience) || has(self.data.split.evaluation)", "evaluation.earlyStoppingPatience needs held-out samples: set data.split.evaluation"))]
#[x_kube(validation = ("self.pools == oldSelf.pools && self.task == oldSelf.task && self.head == oldSelf.head && self.data == oldSelf.data && self.training == oldSelf.training && self.evaluation == oldSelf.evaluation && self.trainer == oldSelf.trainer && self.checkpoint == oldSelf.checkpoint && self.output == oldSelf.output", "only suspend, backoffLimit, activeDeadlineSeconds, ttlSecondsAfterFinished, poolUnavailablePolicy and poolUnavailableGraceSeconds of a job can be changed; create a new job"))]
pub struct CarryOnJobSpec {
    /// Pools whose hidden states the head reads.
    #[schemars(length(min = 1, max = 1))]
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
    /// What to do while the pool is missing or not ready.
    #[serde(default)]
    pub pool_unavailable_policy: PoolUnavailablePolicy,
    /// With `poolUnavailablePolicy: Fail`, seconds that the pool may be missing or not ready.
    #[serde(default = "five_minutes")]
    #[schemars(range(min = 0, max = 31_536_000))]
    pub pool_unavailable_grace_seconds: i64,
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
    /// Name of a BaseModelPool in the job's namespace.
    #[schemars(length(min = 1, max = 40))]
    pub name: String,
    /// Taps; when absent, four depths plus `final`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub taps: Option<Taps>,
}

/// What the head learns.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Task {
    /// The next token, through the base's own LM head.
    #[default]
    CausalLM,
    /// One label for a text.
    Classification,
}

/// Shape of the head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeadSpec {
    /// Width w of the bridge and the blocks.
    #[schemars(range(min = 8, max = 8192))]
    pub width: u32,
    /// Transformer blocks.
    #[schemars(range(min = 0, max = 32))]
    pub blocks: u32,
    /// Attention heads of each block.
    #[schemars(range(min = 1, max = 128))]
    pub heads: u32,
    /// Element-wise gate on the head's output.
    pub gate: bool,
    /// Scale of the head's output; 0 gives the base.
    #[schemars(range(min = 0.0, max = 16.0))]
    pub alpha: f64,
    /// Tokens each position may look back; the longest training sample when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1_048_576))]
    pub window: Option<u32>,
    /// Label names of task Classification.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = 1000), inner(length(min = 1, max = 128)), extend("x-kubernetes-list-type" = "set"))]
    pub labels: Option<Vec<String>>,
}

impl Default for HeadSpec {
    fn default() -> Self {
        Self { width: 256, blocks: 2, heads: 4, gate: false, alpha: 1.0, window: None, labels: None }
    }
}

/// Samples, as JSON Lines.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Data {
    /// Where the files are.
    pub source: DataSource,
    /// What a line holds.
    #[serde(default)]
    pub format: DataFormat,
    /// The files of each split.
    pub split: Split,
    /// Longest sample in tokens.
    #[serde(default = "max_length")]
    #[schemars(range(min = 8, max = 1_048_576))]
    pub max_length: u32,
    /// What happens to a longer one.
    #[serde(default)]
    pub overlong: Overlong,
}

/// What a line holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DataFormat {
    /// Recognised by the fields of the first line.
    #[default]
    Auto,
    /// `messages`: OpenAI chat messages; loss on the last assistant message.
    Chat,
    /// `prompt` and `completion`, put into the model's chat template.
    PromptCompletion,
    /// `text`: loss on all of it.
    Text,
    /// `text` and `label`, for task Classification.
    TextLabel,
    /// `input_ids` and `prompt_length`: already tokenised.
    Tokenized,
}

/// The files of each split, relative to the source.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!(self.train.startsWith('/') || self.train.split('/').exists(p, p == '..'))", "train must be relative and must not contain '..'"))]
#[x_kube(validation = ("!has(self.evaluation) || !(self.evaluation.startsWith('/') || self.evaluation.split('/').exists(p, p == '..'))", "evaluation must be relative and must not contain '..'"))]
pub struct Split {
    /// Training samples.
    #[schemars(length(min = 1, max = 512))]
    pub train: String,
    /// Held-out samples; no evaluation when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 512))]
    pub evaluation: Option<String>,
}

/// What happens to a sample longer than `maxLength`; counted in the log and the report.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Overlong {
    /// Cut at the end.
    #[default]
    Truncate,
    /// Left out.
    Skip,
    /// The job fails and names file and line.
    Fail,
}

/// How to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Training {
    /// Passes over the data.
    #[schemars(range(min = 1, max = 1000))]
    pub num_train_epochs: u32,
    /// Optimizer steps at most; overrides the epochs when set.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub max_steps: Option<u64>,
    /// Samples of one micro-batch.
    #[schemars(range(min = 1, max = 4096))]
    pub per_device_train_batch_size: u32,
    /// Micro-batches of one optimizer step.
    #[schemars(range(min = 1, max = 4096))]
    pub gradient_accumulation_steps: u32,
    /// Optimizer.
    pub optim: Optimizer,
    /// Learning rate of AdamW.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub learning_rate: f64,
    /// Learning rate of Muon.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub muon_learning_rate: f64,
    /// Decoupled weight decay.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
    /// Steps of linear warm-up.
    #[schemars(range(min = 0, max = 10_000_000))]
    pub warmup_steps: u64,
    /// Where the cosine ends, as a share of the peak.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_lr_ratio: f64,
    /// Global gradient norm above which gradients are scaled down.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub max_grad_norm: f64,
    /// Seed of initial weights and of the order of samples.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991u64))]
    pub seed: u64,
    /// Where the vocabulary-sized product runs.
    pub loss: LossPlace,
}

impl Default for Training {
    fn default() -> Self {
        Self {
            num_train_epochs: 3,
            max_steps: None,
            per_device_train_batch_size: 8,
            gradient_accumulation_steps: 1,
            optim: Optimizer::Muon,
            learning_rate: 3e-3,
            muon_learning_rate: 0.02,
            weight_decay: 0.01,
            warmup_steps: 10,
            min_lr_ratio: 0.1,
            max_grad_norm: 1.0,
            seed: 0,
            loss: LossPlace::Remote,
        }
    }
}

/// Optimizer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Optimizer {
    /// Muon for matrices, AdamW for vectors.
    #[default]
    Muon,
    /// AdamW for everything.
    AdamW,
}

/// Where the vocabulary-sized product runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LossPlace {
    /// In the pool: the LM head never reaches the trainer.
    #[default]
    Remote,
    /// In the trainer, on an LM head fetched once.
    Local,
}

/// When to evaluate.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Evaluation {
    /// Steps between evaluations; the end of each epoch when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 10_000_000))]
    pub eval_steps: Option<u64>,
    /// Evaluations without improvement after which training stops; never when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 1000))]
    pub early_stopping_patience: Option<u32>,
}

/// Checkpoints.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct Checkpoint {
    /// Optimizer steps between checkpoints.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub save_steps: u64,
    /// Checkpoints kept.
    #[schemars(range(min = 1, max = 100))]
    pub save_total_limit: u32,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { save_steps: 50, save_total_limit: 2 }
    }
}

/// Where results go: `<path>/<job>/` of a claim.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Output {
    /// The claim. Its files outlive the job.
    pub persistent_volume_claim: ClaimPath,
}

fn six() -> i32 {
    6
}

fn five_minutes() -> i64 {
    300
}

fn max_length() -> u32 {
    1024
}
