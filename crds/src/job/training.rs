//! How a job trains: when it steps and saves.

use std::collections::BTreeMap;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::common::is_default;

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
    /// Number type of what the optimizer remembers; the less, the less memory.
    #[serde(skip_serializing_if = "is_default")]
    pub optim_state_dtype: StateDtype,
    /// Number type of the head's matrices in training: in `Bfloat16` they take half the memory, and what a step changes is rounded by chance.
    #[serde(skip_serializing_if = "is_default")]
    pub weight_dtype: WeightDtype,
    /// Whether a trainer on a CPU multiplies the head's matrices, and what Muon makes of their gradients, in bf16 instead of f32: sums, attention and
    /// weights stay f32. A step is faster, most of all where the CPU has instructions for it. Bits then are those of a kind of CPU: an attempt that goes on
    /// on another kind goes on within bf16's rounding. GPUs multiply as they do without it.
    #[serde(skip_serializing_if = "is_default")]
    pub bf16: bool,
    /// Whether what happens inside of a block is computed again on the way back, instead of being remembered: less memory, more work.
    #[serde(skip_serializing_if = "is_default")]
    pub gradient_checkpointing: bool,
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
    /// Gradient norm above which gradients are scaled down.
    #[schemars(range(min = 0.0, max = 1_000_000.0))]
    pub max_grad_norm: f64,
    /// Whose norm that is. With another than `Global`, and without accumulation, a weight is changed as soon as its gradient is known, so that there are
    /// never gradients of all weights at once.
    #[serde(skip_serializing_if = "is_default")]
    pub max_grad_norm_scope: NormScope,
    /// Decay d of an exponential moving average of the weights: e ← d·e + (1 - d)·w behind each step, with no more than (1 + n) / (10 + n) for d behind
    /// step n. The average is what is evaluated, compared and written; there is none when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.001, max = 0.999_999))]
    pub ema_decay: Option<f64>,
    /// How much the samples of each label count in the loss; all alike when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub class_weights: Option<ClassWeights>,
    /// Share of its weight that a training sample's label gives to all labels alike, in task Classification; Hugging Face's `label_smoothing_factor`.
    /// Few samples are then learned less by heart. What is measured on held-out samples is not smoothed.
    #[serde(skip_serializing_if = "is_default")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub label_smoothing_factor: f64,
    /// Share of the features of each tap that a training sample does without, in each step others. The head then relies on no few of them. What is
    /// measured on held-out samples, and served, has them all.
    #[serde(skip_serializing_if = "is_default")]
    #[schemars(range(min = 0.0, max = 0.9))]
    pub dropout: f64,
    /// What cosines are divided by in task Embedding; 0.05 when absent. The lower, the more do the nearest texts count.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.001, max = 10.0))]
    pub temperature: Option<f64>,
    /// How closely the head is held to the base in task DPO; 0.1 when absent. The lower, the further may it go.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.001, max = 10.0))]
    pub beta: Option<f64>,
    /// How much it counts that the head leaves `data.split.replay` as the base has it: the mean divergence of its predictions from the base's, times this,
    /// is added to the loss; 1 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1000.0))]
    pub kl_coef: Option<f64>,
    /// Samples of `data.split.replay` beside each micro-batch; 2 when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 4096))]
    pub replay_batch_size: Option<u32>,
    /// Seed of initial weights and of the order of samples.
    #[schemars(range(min = 0, max = 9_007_199_254_740_991u64))]
    pub seed: u64,
    /// Trains once with each of several seeds, one behind the other; with `seed` alone when absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub seeds: Option<Seeds>,
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
            optim_state_dtype: StateDtype::Float32,
            weight_dtype: WeightDtype::Float32,
            bf16: false,
            gradient_checkpointing: false,
            learning_rate: 3e-3,
            muon_learning_rate: 0.02,
            weight_decay: 0.01,
            warmup_steps: 10,
            min_lr_ratio: 0.1,
            max_grad_norm: 1.0,
            max_grad_norm_scope: NormScope::Global,
            ema_decay: None,
            class_weights: None,
            label_smoothing_factor: 0.0,
            dropout: 0.0,
            temperature: None,
            beta: None,
            kl_coef: None,
            replay_batch_size: None,
            seed: 0,
            seeds: None,
            loss: LossPlace::Remote,
        }
    }
}

/// Several trainings of one head that differ in their seed. They are compared on held-out samples, as evaluations are; of each its best one counts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Seeds {
    /// How many: `training.seed` and those that follow it.
    #[schemars(range(min = 2, max = 16))]
    pub count: u32,
    /// What is written.
    #[serde(default)]
    pub keep: KeptSeed,
}

/// What is written of several seeds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum KeptSeed {
    /// The head of the best one.
    #[default]
    Best,
    /// The average of their weights, unless the best one alone is better. All start from the initial weights of `training.seed`, since only weights that
    /// have a start in common have a meaningful average; the order of samples, dropout and rounding differ.
    Average,
}

/// How much the samples of each label count; exactly one member is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = ("has(self.balanced) != has(self.values)", "exactly one of balanced, values must be set"))]
#[x_kube(validation = ("!has(self.values) || self.values.all(label, self.values[label] >= 0.0 && self.values[label] <= 1000000.0)", "values must be from 0 to 1000000"))]
pub struct ClassWeights {
    /// From the training samples, so that all labels count alike: n / (L · n_l) of task Classification, with n samples of which n_l have label l, and
    /// (n - n_l) / n_l of MultiLabelClassification.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balanced: Option<Balanced>,
    /// By label, 1 for those that are not named. In MultiLabelClassification the weight is that of samples that have the label.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("maxProperties" = crate::wire::limits::MAX_LABELS))]
    pub values: Option<BTreeMap<String, f64>>,
}

/// Weights that balance the labels have no settings.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Balanced {}

impl Training {
    /// See `kl_coef`.
    pub const KL_COEF: f64 = 1.0;
    /// See `replay_batch_size`.
    pub const REPLAY_BATCH_SIZE: u32 = 2;

    /// With what to train, one after the other: as this says, with one seed each.
    pub fn each_seed(&self) -> impl Iterator<Item = Self> {
        let count = self.seeds.as_ref().map_or(1, |seeds| seeds.count);
        (0..u64::from(count)).map(|number| Self { seed: self.seed + number, ..self.clone() })
    }

    /// Bytes that the optimizer remembers of a parameter of this shape, and in how many tensors.
    pub fn state_bytes(&self, shape: &[usize]) -> (u64, u64) {
        let moments = if self.optim.moves_by_muon(shape) { 1 } else { 2 };
        let count: usize = shape.iter().product();
        let (bytes, tensors) = match self.optim_state_dtype.of(count) {
            StateDtype::Float32 => (4 * count, 1),
            StateDtype::Bfloat16 => (2 * count, 1),
            StateDtype::Int8 => (count + 4 * count.div_ceil(INT8_BLOCK), 2),
        };
        (moments * bytes as u64, moments * tensors)
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

impl Optimizer {
    /// Whether a parameter of this shape is moved by Muon: a matrix.
    pub fn moves_by_muon(self, shape: &[usize]) -> bool {
        self == Self::Muon && shape.len() == 2
    }
}

/// Values of an `Int8` that share a scale.
pub const INT8_BLOCK: usize = 256;
/// Parameters of fewer values are remembered in f32, as in bitsandbytes.
pub const SMALL_PARAMETER: usize = 4096;

/// Number type of what an optimizer remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StateDtype {
    /// 4 bytes a number.
    #[default]
    Float32,
    /// 2 bytes, rounded by chance.
    Bfloat16,
    /// 1 byte, by blocks of 256 with a scale each.
    Int8,
}

impl StateDtype {
    /// As what a parameter of `count` values is remembered.
    pub fn of(self, count: usize) -> Self {
        if count < SMALL_PARAMETER { Self::Float32 } else { self }
    }
}

/// Number type of a head's matrices in training; norms and biases are `Float32` always, and so is the head that is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum WeightDtype {
    /// 4 bytes a number.
    #[default]
    Float32,
    /// 2 bytes, rounded by chance.
    Bfloat16,
}

/// Whose norm is bounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum NormScope {
    /// That of all gradients together.
    #[default]
    Global,
    /// That of each tensor's gradient.
    PerTensor,
    /// That of all gradients together in the step before; the first step is not bounded.
    PreviousStep,
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
