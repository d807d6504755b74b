//! The head artifact: `head.safetensors` (weights, with [`HeadShape`] in its metadata) and `head.json` ([`HeadManifest`]).
//!
//! A head's digest is that of the bytes of `head.safetensors`. Tensors, with D the base's width, w the head's,
//! f = [`HeadShape::feed_forward`]:
//!
//! | name | shape | |
//! |---|---|---|
//! | `bridge.{i}.weight` | w × D | one per tap, layers ascending, `final` last; behind those of the first base the taps of the others, each with its base's D |
//! | `blocks.{j}.input_layernorm.weight`, `blocks.{j}.post_attention_layernorm.weight` | w | |
//! | `blocks.{j}.self_attn.{q,k,v,o}_proj.weight` | w × w | |
//! | `blocks.{j}.mlp.{gate,up}_proj.weight` | f × w | |
//! | `blocks.{j}.mlp.down_proj.weight` | w × f | |
//! | `output.weight` | D × w | CausalLM |
//! | `gate.weight`, `gate.bias` | D × w, D | CausalLM with a gate |
//! | `pooling.weight` | w | all other tasks: attention over positions, the last [`HeadShape::pooled_tokens`] of them |
//! | `classifier.weight`, `classifier.bias` | L × w, L | all other tasks; L labels, 1 of Regression and Reward, or the dimensions of an Embedding, which is then brought to length 1 |

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::model::{Identity, Numerics};
use crate::common::Taps;
use crate::job::Task;

/// Key of the safetensors metadata that holds [`HeadShape`] as JSON.
pub const SHAPE_KEY: &str = "carryon.head";
/// Key of the safetensors metadata that holds [`BaseReference`] as JSON.
pub const BASE_KEY: &str = "carryon.base";
/// The newest format version that this code reads. It writes the oldest that says all of a shape: `pooled_tokens` is known from 2 on, `others` from 3, all else
/// from 1.
pub const FORMAT_VERSION: u32 = 3;
/// Base of the rotary embedding of a head that is trained now.
pub const ROPE_THETA: f64 = 1e4;
/// ε of its norms.
pub const NORM_EPSILON: f64 = 1e-5;

/// All that is needed, beside the weights, to run a head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadShape {
    /// Version of the artifact format.
    pub format_version: u32,
    /// What the head was trained for.
    pub task: Task,
    /// Taps in the base.
    pub taps: Taps,
    /// Width D of the base's hidden states.
    pub hidden_size: u32,
    /// Further bases whose hidden states of the same tokens it reads.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<OtherBase>,
    /// Width w of the head.
    pub width: u32,
    /// Transformer blocks.
    pub blocks: u32,
    /// Attention heads of a block.
    pub heads: u32,
    /// Width of the SwiGLU layer: 8w/3 rounded up to a multiple of 16.
    pub feed_forward: u32,
    /// Whether the output is gated.
    pub gate: bool,
    /// Scale of the output the head was trained with.
    pub alpha: f64,
    /// Positions each position sees at most, itself included.
    pub window: u32,
    /// Base of the rotary embedding.
    pub rope_theta: f64,
    /// ε of every RMSNorm.
    pub norm_epsilon: f64,
    /// Label names of a classifier of either kind, else empty.
    #[serde(default)]
    pub labels: Vec<String>,
    /// Numbers of an embedding; of no other task.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dimensions: Option<u32>,
    /// Tokens a head that is no CausalLM's was shown of a longer text: it is cut there before it is classified, as it was in training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_length: Option<u32>,
    /// Last tokens of a text that are pooled by a head that is no CausalLM's; all of them when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pooled_tokens: Option<u32>,
    /// Whether control tokens in the contents of a chat are text like any other, as they were in training.
    #[serde(default = "crate::common::yes", skip_serializing_if = "super::is_yes")]
    pub split_special_tokens: bool,
}

/// A further base that a head reads: its tokenizer is the first one's, its final norm and LM head have no part in it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct OtherBase {
    /// Taps in it.
    pub taps: Taps,
    /// Width of its hidden states.
    pub hidden_size: u32,
}

impl HeadShape {
    /// This shape, of a head that reads `others` too.
    pub fn mixing(self, others: Vec<OtherBase>) -> Self {
        let format_version = if others.is_empty() { self.format_version } else { 3 };
        Self { format_version, others, ..self }
    }

    /// Width of the rows of each tap, in the order of the bridge's tensors.
    pub fn tap_widths(&self) -> Vec<usize> {
        let others = self.others.iter().map(|other| (&other.taps, other.hidden_size));
        let all = std::iter::once((&self.taps, self.hidden_size)).chain(others);
        all.flat_map(|(taps, width)| std::iter::repeat_n(width as usize, taps.count())).collect()
    }

    /// Numbers that it puts out for a text; none of CausalLM.
    pub fn outputs(&self) -> usize {
        match self.task {
            Task::CausalLM | Task::Dpo => 0,
            Task::Classification | Task::MultiLabelClassification => self.labels.len(),
            Task::Regression | Task::Reward => 1,
            Task::Embedding => self.dimensions.unwrap_or(0) as usize,
        }
    }

    /// Of a text of so many tokens, how many are pooled: the last ones.
    pub fn pooled(&self, tokens: usize) -> usize {
        self.pooled_tokens.map_or(tokens, |most| tokens.min(most as usize))
    }

    /// Name and shape of every tensor, as the table above lists them.
    pub fn tensors(&self) -> BTreeMap<String, Vec<usize>> {
        let [d, w, f] = [self.hidden_size, self.width, self.feed_forward].map(|size| size as usize);
        let mut tensors = BTreeMap::new();
        for (tap, width) in self.tap_widths().into_iter().enumerate() {
            tensors.insert(format!("bridge.{tap}.weight"), vec![w, width]);
        }
        for block in 0..self.blocks {
            let mut add = |name: &str, dimensions: &[usize]| tensors.insert(format!("blocks.{block}.{name}.weight"), dimensions.to_vec());
            add("input_layernorm", &[w]);
            add("post_attention_layernorm", &[w]);
            for projection in ["q", "k", "v", "o"] {
                add(&format!("self_attn.{projection}_proj"), &[w, w]);
            }
            add("mlp.gate_proj", &[f, w]);
            add("mlp.up_proj", &[f, w]);
            add("mlp.down_proj", &[w, f]);
        }
        match self.task {
            Task::CausalLM | Task::Dpo => {
                tensors.insert("output.weight".into(), vec![d, w]);
                if self.gate {
                    tensors.insert("gate.weight".into(), vec![d, w]);
                    tensors.insert("gate.bias".into(), vec![d]);
                }
            }
            _ => {
                tensors.insert("pooling.weight".into(), vec![w]);
                tensors.insert("classifier.weight".into(), vec![self.outputs(), w]);
                tensors.insert("classifier.bias".into(), vec![self.outputs()]);
            }
        }
        tensors
    }
}

/// 8w/3 rounded up to a multiple of 16.
pub fn feed_forward(width: u32) -> u32 {
    (8 * width).div_ceil(3).div_ceil(16) * 16
}

/// The base a head was trained on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct BaseReference {
    /// Name from the checkpoint.
    pub name: String,
    /// A pool with another identity refuses the head.
    pub identity: Identity,
    /// The further bases, in the order of [`HeadShape::others`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<Self>,
}

/// `head.json`: what people and tools want to know of a head; the weights' file is complete without it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HeadManifest {
    /// Version of the artifact format.
    pub format_version: u32,
    /// Digest of `head.safetensors`.
    pub digest: String,
    /// Shape, as in the weights' metadata.
    pub shape: HeadShape,
    /// Base, as in the weights' metadata.
    pub base: BaseReference,
    /// How the base computed the hidden states.
    pub numerics: Numerics,
    /// How the further bases did.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub other_numerics: Vec<Numerics>,
    /// Chat template the training data were put into.
    pub chat_template: Option<String>,
    /// Tokens that end an answer.
    pub end_token_ids: Vec<u32>,
    /// Number of trained parameters.
    pub parameters: u64,
    /// Where the head comes from.
    pub lineage: Lineage,
    /// Figures of the run.
    pub metrics: Metrics,
}

/// Where a head comes from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Lineage {
    /// `NAMESPACE/NAME` of the job.
    pub job: String,
    /// Digest of the training file.
    pub train_data: String,
    /// Digest of the evaluation file.
    pub evaluation_data: Option<String>,
    /// Seed; of several that of the best one.
    pub seed: u64,
    /// The seeds whose weights it is the average of, if it is one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub averaged_seeds: Vec<u64>,
    /// Digest of the head whose blocks and bridges it started from; random ones when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub init_head: Option<String>,
    /// Optimizer steps.
    pub steps: u64,
    /// Version of the worker.
    pub worker_version: String,
}

/// A figure and its 95 % interval.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// On all samples.
    pub value: f64,
    /// Lower end of the interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

/// What one of several seeds has come to, at its best evaluation.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SeedMetrics {
    /// The seed.
    pub seed: u64,
    /// Optimizer steps to that evaluation.
    pub steps: u64,
    /// Loss, nats per target.
    pub eval_loss: Option<f64>,
    /// Loss on text that has nothing to do with what it learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general_loss: Option<f64>,
    /// What the job's `evaluation.metric` names, if that is another than the loss.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub figure: Option<f64>,
}

/// Figures of a run; losses in nats per target, absent when not finite or not measured.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Metrics {
    /// Last training loss.
    pub train_loss: Option<f64>,
    /// Evaluation loss of the head written.
    pub eval_loss: Option<f64>,
    /// The base's own loss on the evaluation samples.
    pub base_eval_loss: Option<f64>,
    /// Loss of the head written on text that has nothing to do with what it learned.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub general_loss: Option<f64>,
    /// The base's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base_general_loss: Option<f64>,
    /// Share of samples that a classifier gets right, all labels of them, of the evaluation samples.
    pub eval_accuracy: Option<f64>,
    /// Figures of the head written, on the evaluation samples: `accuracy`, `macro_f1`, `roc_auc` and `ece` of classifiers, `accuracy` of a reward,
    /// `recall_at_1`, `recall_at_5` and `recall_at_10` of an embedding, `spearman`
    /// and `mean_squared_error` of a regression, `exact_match` of answers.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub evaluation: BTreeMap<String, Figure>,
    /// What of the job's `evaluation.thresholds` they do not meet, one sentence each.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unmet_thresholds: Vec<String>,
    /// Each of several seeds.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub seeds: Vec<SeedMetrics>,
    /// Seconds of training, over all attempts and seeds.
    pub train_seconds: f64,
    /// Peak anonymous memory of the trainer, bytes.
    pub peak_anonymous_bytes: u64,
}
