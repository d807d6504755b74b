//! When a job evaluates its head, what counts, and what makes a head fit to be served.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Task;
use crate::common::is_default;
use crate::wire::limits;

/// When to evaluate, and what counts.
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
    /// Nats per token that the loss of `data.split.general` may be above the base's. A head beyond it is not the best one, and where none is within, the
    /// job says so.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 100.0))]
    pub max_general_loss_increase: Option<f64>,
    /// Figure of the held-out samples by which an evaluation is the best one: its head is the one that is written, and early stopping waits for a better
    /// one. Of equal ones the lower loss counts.
    #[serde(skip_serializing_if = "is_default")]
    pub metric: Metric,
    /// Values of `head.alpha` that are tried on the held-out samples once the head is trained: the one whose evaluation is the best is the head's, so that
    /// it adds no more than helps. `maxGeneralLossIncrease` then bounds them, and no evaluation before. `head.alpha` when absent.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 16), inner(range(min = 0.01, max = 100.0)))]
    pub alphas: Vec<f64>,
    /// Held-out samples that are answered too, once the head is written: by the pool, with the head, greedily. Their `ExactMatch` is the share of answers
    /// that are right. For task CausalLM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub generation: Option<Generation>,
    /// What the head's figures must be for it to be promotable. Of a job with such bounds the condition `Promotable` says whether they are, and a
    /// CarryOnDeployment serves no head by `jobRef` of which they are not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = limits::MAX_FIGURES), extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["metric"]))]
    pub thresholds: Vec<Threshold>,
}

/// Answers to held-out prompts, and what makes one right: the whole answer is the sample's own, blank space around it apart, unless a member says what of
/// it is compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("!(has(self.regex) && has(self.jsonField))", "at most one of regex, jsonField may be set"))]
pub struct Generation {
    /// Regular expression whose last match is compared: its first group, or all of it where it has none. Every sample's own answer must have one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 1024))]
    pub regex: Option<String>,
    /// JSON Pointer (RFC 6901), such as `/answer`, to the value that is compared of answers that are JSON; numbers are equal as numbers. Every sample's own
    /// answer must have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(max = 256), regex(pattern = r"^(/.*)?$"))]
    pub json_field: Option<String>,
    /// Longest answer in tokens; a longer one is cut there.
    #[serde(default = "longest_answer")]
    #[schemars(range(min = 1, max = 131_072))]
    pub max_new_tokens: u32,
    /// Samples answered at most, evenly spread over the held-out ones.
    #[serde(default = "most_answers")]
    #[schemars(range(min = 1, max = 100_000))]
    pub max_samples: u32,
}

fn longest_answer() -> u32 {
    256
}

fn most_answers() -> u32 {
    200
}

/// What a figure of the head that is written must be.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[x_kube(validation = ("has(self.min) || has(self.max)", "min or max must be set"))]
pub struct Threshold {
    /// The figure, on the held-out samples.
    pub metric: Metric,
    /// At least this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1_000_000.0, max = 1_000_000.0))]
    pub min: Option<f64>,
    /// At most this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1_000_000.0, max = 1_000_000.0))]
    pub max: Option<f64>,
}

impl Threshold {
    /// Why a head with this figure is not promotable; none where it is.
    pub fn unmet(&self, found: Option<f64>) -> Option<String> {
        let name = self.metric.name();
        let Some(found) = found else { return Some(format!("{name} could not be measured")) };
        match (self.min, self.max) {
            (Some(min), _) if found < min => Some(format!("{name} is {found:.4}, less than {min}")),
            (_, Some(max)) if found > max => Some(format!("{name} is {found:.4}, more than {max}")),
            _ => None,
        }
    }
}

/// Figure of held-out samples, each of some tasks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Metric {
    /// The loss, the lower the better; of all tasks.
    #[default]
    Loss,
    /// Share of samples whose labels are all right, or of pairs in the right order: Classification, MultiLabelClassification, Reward, DPO.
    Accuracy,
    /// Mean over the labels of their F1: Classification, MultiLabelClassification.
    MacroF1,
    /// Mean over the labels of the area under their ROC curve: Classification, MultiLabelClassification.
    RocAuc,
    /// Rank correlation: Regression.
    Spearman,
    /// Share of anchors whose positive is the nearest: Embedding.
    RecallAt1,
    /// Share of answers that are right, see `evaluation.generation`: CausalLM, of the head that is written.
    ExactMatch,
}

impl Metric {
    /// Its name among a head's figures; the loss is none of them.
    pub fn name(self) -> &'static str {
        match self {
            Self::Loss => "loss",
            Self::Accuracy => "accuracy",
            Self::MacroF1 => "macro_f1",
            Self::RocAuc => "roc_auc",
            Self::Spearman => "spearman",
            Self::RecallAt1 => "recall_at_1",
            Self::ExactMatch => "exact_match",
        }
    }

    /// Whether heads of this task have it.
    pub fn fits(self, task: Task) -> bool {
        match self {
            Self::Loss => true,
            Self::Accuracy => task.has_labels() || matches!(task, Task::Reward | Task::Dpo),
            Self::MacroF1 | Self::RocAuc => task.has_labels(),
            Self::Spearman => task == Task::Regression,
            Self::RecallAt1 => task == Task::Embedding,
            Self::ExactMatch => task == Task::CausalLM,
        }
    }
}
