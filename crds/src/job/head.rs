//! The head that a job asks for.

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Task;
use crate::common::{ClaimPath, Taps, is_default};
use crate::deployment::Artifact;
use crate::wire::{HeadShape, head, limits};

/// Shape of the head.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase", default)]
pub struct HeadSpec {
    /// Width w of the bridge and the blocks.
    #[schemars(range(min = 8, max = limits::MAX_WIDTH))]
    pub width: u32,
    /// Transformer blocks.
    #[schemars(range(min = 0, max = limits::MAX_BLOCKS))]
    pub blocks: u32,
    /// Attention heads of each block.
    #[schemars(range(min = 1, max = limits::MAX_ATTENTION_HEADS))]
    pub attention_heads: u32,
    /// Element-wise gate on the output of a head of tokens. With it held-out loss is lower after some hundred steps; a run of fifty learns more without.
    pub gate: bool,
    /// Scale of the head's output; 0 gives the base.
    #[schemars(range(min = 0.0, max = limits::MAX_ALPHA))]
    pub alpha: f64,
    /// Tokens each position may look back; the longest training sample when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::MAX_TOKENS))]
    pub window: Option<u32>,
    /// Last tokens of a text that are pooled, in tasks other than CausalLM; all of them when absent. With 1, the last token stands for the text that it has
    /// read: best for a few sentences of which it is asked what they mean as a whole, and few labels.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::MAX_TOKENS))]
    pub pooled_tokens: Option<u32>,
    /// Label names of tasks Classification and MultiLabelClassification.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 2, max = limits::MAX_LABELS), inner(length(min = 1, max = 128)), extend("x-kubernetes-list-type" = "set"))]
    pub labels: Option<Vec<String>>,
    /// Numbers of an embedding of task Embedding.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = limits::MAX_DIMENSIONS))]
    pub dimensions: Option<u32>,
    /// What its blocks and bridges are before the first step. The output projection is zero in any case, so that training starts from the base's own loss;
    /// gate, pooling and classifier start at random.
    #[serde(skip_serializing_if = "is_default")]
    pub init: HeadInit,
}

/// What blocks and bridges of a head are before the first step; exactly one member is set.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.random) != has(self.fromHead)", "exactly one of random, fromHead must be set"))]
pub struct HeadInit {
    /// Random numbers, which `training.seed` stands for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub random: Option<Random>,
    /// Those of a head of the same base, width, blocks and attention heads, whatever its task. It may have other taps: bridges are those of the same tap,
    /// and random where it has none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from_head: Option<Artifact>,
}

impl Default for HeadInit {
    fn default() -> Self {
        Self { random: Some(Random {}), from_head: None }
    }
}

/// Random numbers have no settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Random {}

impl HeadInit {
    /// The claim that holds the head to start from.
    pub fn claim(&self) -> Option<&ClaimPath> {
        self.from_head.as_ref()?.source.persistent_volume_claim.as_ref()
    }
}

impl HeadSpec {
    /// The shape it asks for on a base of width `hidden_size`; its window is `longest` tokens unless one is asked for. What a shape says of texts is as
    /// by default.
    pub fn shape(&self, task: Task, taps: Taps, hidden_size: u32, longest: u32) -> HeadShape {
        HeadShape {
            format_version: if self.pooled_tokens.is_some() { 2 } else { 1 },
            task: task.of_head(),
            taps,
            hidden_size,
            others: Vec::new(),
            width: self.width,
            blocks: self.blocks,
            heads: self.attention_heads,
            feed_forward: head::feed_forward(self.width),
            gate: self.gate && !task.is_pooled(),
            alpha: self.alpha,
            window: self.window.unwrap_or(longest),
            rope_theta: head::ROPE_THETA,
            norm_epsilon: head::NORM_EPSILON,
            labels: self.labels.clone().unwrap_or_default(),
            dimensions: self.dimensions,
            max_length: None,
            pooled_tokens: self.pooled_tokens,
            split_special_tokens: true,
        }
    }
}

impl Default for HeadSpec {
    fn default() -> Self {
        Self {
            width: 256,
            blocks: 2,
            attention_heads: 4,
            gate: true,
            alpha: 1.0,
            window: None,
            pooled_tokens: None,
            labels: None,
            dimensions: None,
            init: HeadInit::default(),
        }
    }
}
