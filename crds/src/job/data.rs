//! What a job trains on.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::DataSource;
use crate::wire::limits;

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
    #[schemars(range(min = 8, max = limits::MAX_TOKENS))]
    pub max_length: u32,
    /// What happens to a longer one.
    #[serde(default)]
    pub overlong: Overlong,
    /// What happens to a line that cannot be read. A file that is no such file at all ends the job in any case.
    #[serde(default, skip_serializing_if = "crate::common::is_default")]
    pub on_error: OnError,
    /// Which turns of a chat are learned; a turn with `weight` 0 never is.
    #[serde(default)]
    pub targets: Targets,
    /// Whether what the assistant thought before it spoke is part of a chat.
    #[serde(default, skip_serializing_if = "crate::common::is_default")]
    pub thinking: Thinking,
    /// Put the model's end-of-sequence token behind each `text`, where there is none.
    #[serde(default)]
    pub add_eos_token: bool,
    /// Read special tokens in the contents of a chat (`<|im_end|>`) as text, in training as in serving. Where false, a content can end its turn and begin others.
    #[serde(default = "crate::common::yes")]
    pub split_special_tokens: bool,
}

/// Which turns of a chat are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Targets {
    /// Every turn of the assistant, each with its end token.
    #[default]
    AllAssistant,
    /// The last turn alone.
    LastAssistant,
}

/// Whether what the assistant thought is part of a chat: its members `reasoning_content`, `thinking` and `reasoning`, and `<think>…</think>` where a content
/// begins with it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Thinking {
    /// Where the model's chat template has a place for it: it is learned with the turn.
    #[default]
    Keep,
    /// It is taken out: what is learned is what was said.
    Drop,
}

/// What a line holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum DataFormat {
    /// Recognised by the fields of the first line.
    #[default]
    Auto,
    /// `messages`: OpenAI chat messages, with `tools` and `weight`; loss on the assistant's.
    Chat,
    /// `prompt` and `completion`, put into the model's chat template.
    PromptCompletion,
    /// `text`: loss on all of it. It has no end token unless `addEosToken` is set.
    Text,
    /// `text`, or `messages` of a chat, and `label`: a name for task Classification, a list of names for MultiLabelClassification, a number for Regression.
    TextLabel,
    /// `chosen` and `rejected`, and `prompt` where they share one, for tasks Reward and DPO: texts or chat messages, as TRL has them.
    Preference,
    /// `anchor` and `positive`, a text and one that it is near to, for task Embedding, as sentence-transformers has them.
    Pair,
    /// `input_ids` and `prompt_length`: already tokenised.
    Tokenized,
}

/// The files of each split: names relative to the source, or patterns such as `part-*.jsonl`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("self.train.all(f, !(f.startsWith('/') || f.split('/').exists(p, p == '..')))", "train must be relative and must not contain '..'"))]
#[x_kube(validation = ("!has(self.general) || self.general.all(f, !(f.startsWith('/') || f.split('/').exists(p, p == '..')))", "general must be relative and must not contain '..'"))]
#[x_kube(validation = ("!has(self.replay) || self.replay.all(f, !(f.startsWith('/') || f.split('/').exists(p, p == '..')))", "replay must be relative and must not contain '..'"))]
#[x_kube(validation = ("!has(self.evaluation) || self.evaluation.all(f, !(f.startsWith('/') || f.split('/').exists(p, p == '..')))", "evaluation must be relative and must not contain '..'"))]
pub struct Split {
    /// Training samples, file after file.
    #[schemars(length(min = 1, max = 64), inner(length(min = 1, max = 512)))]
    pub train: Vec<String>,
    /// Held-out samples; no evaluation when absent.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 512)))]
    pub evaluation: Vec<String>,
    /// Samples that have nothing to do with what is learned, in any format of task CausalLM: every evaluation measures head and base on them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 512)))]
    pub general: Vec<String>,
    /// Such samples for training: beside each micro-batch the head is held to what the base says of some of them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 64), inner(length(min = 1, max = 512)))]
    pub replay: Vec<String>,
}

impl Split {
    /// All names.
    pub fn names(&self) -> impl Iterator<Item = &String> {
        [&self.train, &self.evaluation, &self.general, &self.replay].into_iter().flatten()
    }

    /// Whether a name may mean several files.
    pub fn is_pattern(name: &str) -> bool {
        name.contains(['*', '?', '['])
    }
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

/// What happens to a line that cannot be read, or says nothing that could be learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum OnError {
    /// The job fails and names file and line.
    #[default]
    Fail,
    /// It is left out, counted, and, of the first ones, named in the report.
    Skip,
}

fn max_length() -> u32 {
    1024
}
