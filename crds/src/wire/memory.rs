//! What a trainer's memory holds at most, told from shapes before it starts: by the trainer itself, and by the operator, who knows its limit.
//!
//! Of a step's phases the highest counts, with all that lives in it: [`Trainer::phases`] goes by the worker's `head/pass`, `train/step.rs` and
//! `train/optim`, on a CPU. Code, threads, tokenizer and the lengths of the samples are not in it.

use std::fmt;

use super::HeadShape;
use crate::common::Taps;
use crate::job::{HiddenStatesDtype, LossPlace, NormScope, Optimizer, Task, Training, WeightDtype};
use crate::pool::Dtype;

/// Columns of the output, or of a matrix that Muon moves, that are computed at the same time.
pub const TILE: usize = 1024;
/// Rows whose logits a local loss has at the same time.
pub const LOGIT_ROWS: usize = 192;
/// Micro-batches that are asked for while one is in use, unless they are large.
pub const AHEAD: usize = 2;
/// A micro-batch of more bytes is large: one is asked for, when the way back has come to the bridge.
pub const LARGE_BATCH_BYTES: u64 = 32 << 20;

/// Bytes at the highest point of a step, by what they are for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// The head's tensors, their average, and those of the best evaluation.
    pub weights: u64,
    /// Of weights.
    pub gradients: u64,
    /// What the optimizers remember.
    pub moments: u64,
    /// What is kept of the way forward, and what the way back makes of it.
    pub activations: u64,
    /// Hidden states, what is said to the pool and answered, an LM head that was fetched, and what products and Muon need beside their results.
    pub buffers: u64,
}

impl Tally {
    /// All of them.
    pub fn total(&self) -> u64 {
        self.groups().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Their names and bytes.
    pub fn groups(&self) -> [(&'static str, u64); 5] {
        let Self { weights, gradients, moments, activations, buffers } = *self;
        [("weights", weights), ("gradients", gradients), ("moments", moments), ("activations", activations), ("buffers", buffers)]
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let groups = self.groups().map(|(name, bytes)| format!("{name} {}", megabytes(bytes)));
        write!(formatter, "{} ({})", megabytes(self.total()), groups.join(", "))
    }
}

/// Bytes as people read them: `604.5 MB`.
pub fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A trainer, as far as its memory depends on it.
#[derive(Clone, Copy, Debug)]
pub struct Trainer<'a> {
    /// Of its head.
    pub shape: &'a HeadShape,
    /// As the job asks for it.
    pub training: &'a Training,
    /// Number type of the pool.
    pub dtype: Dtype,
    /// How hidden states of layers travel.
    pub states: HiddenStatesDtype,
    /// Size V of the base's vocabulary.
    pub vocab_size: u32,
    /// Tokens of the largest micro-batch; where texts are compared with each other, those of all of them.
    pub rows: u64,
    /// Whether there are held-out samples: then the best weights are kept beside those that are trained.
    pub evaluated: bool,
}

/// Numbers in f32 that live at the same time in some part of a step, beside what lives in all of it.
#[derive(Clone, Copy, Debug, Default)]
struct Phase {
    gradients: u64,
    activations: u64,
    buffers: u64,
}

impl Phase {
    fn total(&self) -> u64 {
        self.gradients + self.activations + self.buffers
    }
}

impl Trainer<'_> {
    /// Bytes of the hidden states of the largest micro-batch. Those of further pools are counted as the first one's.
    pub fn batch_bytes(&self) -> u64 {
        let row = |taps: &Taps, width: u32, last: bool| {
            let (width, whole) = (u64::from(width), u64::from(width) * self.number_bytes());
            let layer = match self.states {
                HiddenStatesDtype::Model => whole,
                // And a scale.
                HiddenStatesDtype::Float8E4M3 => width + 4,
            };
            taps.layers.len() as u64 * layer + u64::from(taps.final_norm || last) * whole
        };
        let others = self.shape.others.iter().map(|other| row(&other.taps, other.hidden_size, false));
        self.rows * (row(&self.shape.taps, self.shape.hidden_size, self.causal()) + others.sum::<u64>())
    }

    /// Whether micro-batches are asked for late.
    pub fn has_large_batches(&self) -> bool {
        self.batch_bytes() > LARGE_BATCH_BYTES
    }

    /// Bytes at the highest point of a step.
    pub fn tally(&self) -> Tally {
        // With dropout, what is left of a micro-batch is a copy.
        let batches = if self.has_large_batches() { 1 } else { 1 + AHEAD as u64 } + u64::from(self.training.dropout > 0.0);
        let highest = self.phases().into_iter().max_by_key(Phase::total).unwrap_or_default();
        let (mut weights, mut floats, mut moments) = (0, 0, 0);
        for dimensions in self.shape.tensors().values() {
            let values: u64 = dimensions.iter().map(|&length| length as u64).product();
            let half = dimensions.len() == 2 && self.training.weight_dtype == WeightDtype::Bfloat16;
            weights += if half { 2 } else { 4 } * values;
            floats += 4 * values;
            moments += self.training.state_bytes(dimensions).0;
        }
        // What is measured is what is kept of the best evaluation.
        let (average, measured) = if self.training.ema_decay.is_some() { (floats, floats) } else { (0, weights) };
        Tally {
            weights: weights + average + if self.evaluated { measured } else { 0 },
            gradients: 4 * highest.gradients,
            moments,
            activations: 4 * highest.activations,
            buffers: 4 * highest.buffers + batches * self.batch_bytes() + 2 * self.lm_head_bytes(),
        }
    }

    /// In the order of a step. Sizes: m rows, D, w, f as in a head's table of tensors; a product packs its right side, as long as it runs.
    fn phases(&self) -> Vec<Phase> {
        let Sizes { m, d, w, f, blocks, tile } = self.sizes();
        // The widest of the taps.
        let t = self.shape.tap_widths().into_iter().max().unwrap_or(0) as u64;
        let (causal, gated, keeps_all) = (self.causal(), self.shape.gate, !self.training.gradient_checkpointing);
        let at = |gradients, activations, buffers| Phase { gradients, activations, buffers };
        // Queries, keys, values, what attention makes of them, and its sum with the input; gate and up.
        let (attention, swiglu) = (5 * m * w, 2 * m * f);
        let inside = attention + swiglu;
        let block = m * w + if keeps_all { inside } else { 0 };
        let (kept, tiles) = (blocks * block, if gated && keeps_all { 2 * m * d } else { 0 });
        let (gathered, update) = (self.gathered(), |rows, columns| self.update_numbers(rows, columns));
        let before = if self.training.gradient_accumulation_steps > 1 { gathered } else { 0 };
        let next = if self.has_large_batches() { self.batch_bytes() / 4 } else { 0 };
        // An evaluation has no way back that could take more, so the next one is asked for at once.
        let beside = if self.evaluated { next } else { 0 };
        let block_forward = (m * w + 2 * f * w).max(m * f + f * w + m * w);
        let mut phases = vec![at(before, 2 * m * w, m * t + w * t + beside)];
        if blocks > 0 {
            let lower = kept - block;
            phases.push(at(before, lower + 2 * m * w + inside, block_forward + beside));
            // The last block is the first one back, with all the others' inputs.
            let alive = lower + 2 * m * w + inside;
            phases.push(at(gathered, alive, block_forward));
            phases.push(at(gathered + f * w, alive, 2 * m * f + (m * w).max(update(w, f))));
            phases.push(at(gathered, alive, m * f + m * w + 2 * f * w));
            phases.push(at(gathered + f * w, alive, 2 * m * w + (m * f).max(update(f, w))));
            phases.push(at(gathered + w * w, alive - swiglu, 8 * m * w));
        }
        if causal {
            let (out, all) = (if gated { 2 * d * w } else { d * w }, kept + tiles + m * w);
            let product = if gated { 3 * m * tile + tile * w } else { d * w };
            phases.push(at(before, all, 2 * m * w + m * d + product + beside));
            phases.push(at(before, all, self.loss_numbers() + beside));
            // The gradient by the output, which is cut up, or lies across as long as its product runs.
            phases.push(at(gathered, all + 3 * m * w, 2 * m * d));
            let last_tile = (5 * m * tile).max(2 * m * tile + tile * w + m * tile.max(w));
            phases.push(at(gathered + out, kept + 4 * m * w, if gated { last_tile } else { 2 * m * d }));
            phases.push(at(gathered + out, kept + 3 * m * w, update(d, w) + if gated { 0 } else { m * d + m * w }));
        }
        // The first of the bridge's gradients is handed out when there is no other.
        phases.push(at(gathered, 2 * m * w, 2 * m * t + next));
        phases.push(at(gathered + w * t, 2 * m * w, (m * t).max(update(w, t)) + next));
        phases
    }

    /// Gradients of all weights, where they are gathered before any of them is changed.
    fn gathered(&self) -> u64 {
        let training = self.training;
        match training.gradient_accumulation_steps == 1 && training.max_grad_norm_scope != NormScope::Global {
            true => 0,
            false => self.shape.tensors().values().map(|dimensions| dimensions.iter().product::<usize>() as u64).sum(),
        }
    }

    /// What changing a matrix on the way back takes beside its gradient: of Muon two squares, and some columns three times.
    fn update_numbers(&self, rows: u64, columns: u64) -> u64 {
        let (short, long) = (rows.min(columns), rows.max(columns));
        match self.training.optim {
            Optimizer::Muon if self.gathered() == 0 => (3 * short * short).max(2 * short * short + 3 * short * long.min(TILE as u64)),
            _ => 0,
        }
    }

    /// The output, the answer and the gradient in it; where the LM head is here, x̂ and some rows' logits too.
    fn loss_numbers(&self) -> u64 {
        let Sizes { m, d, .. } = self.sizes();
        let logits = if self.lm_head_bytes() > 0 { m * d + m.min(LOGIT_ROWS as u64) * u64::from(self.vocab_size) } else { 0 };
        3 * m * d + logits
    }

    /// An LM head that is fetched, packed in one direction.
    fn lm_head_bytes(&self) -> u64 {
        match (self.training.loss, self.causal()) {
            (LossPlace::Local, true) => u64::from(self.vocab_size) * u64::from(self.shape.hidden_size) * self.number_bytes(),
            _ => 0,
        }
    }

    fn causal(&self) -> bool {
        self.shape.task == Task::CausalLM
    }

    fn number_bytes(&self) -> u64 {
        match self.dtype {
            Dtype::Bfloat16 => 2,
            Dtype::Float32 => 4,
        }
    }

    fn sizes(&self) -> Sizes {
        let HeadShape { hidden_size, width, feed_forward, blocks, .. } = self.shape;
        let [d, w, f, blocks] = [hidden_size, width, feed_forward, blocks].map(|size| u64::from(*size));
        Sizes { m: self.rows, d, w, f, blocks, tile: d.min(TILE as u64) }
    }
}

struct Sizes {
    m: u64,
    d: u64,
    w: u64,
    f: u64,
    blocks: u64,
    tile: u64,
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::HeadSpec;

    /// 110M parameters on a base of width 5120.
    fn shape() -> HeadShape {
        let head = HeadSpec { width: 1184, blocks: 4, attention_heads: 8, gate: true, ..HeadSpec::default() };
        head.shape(Task::CausalLM, Taps { layers: vec![1, 2, 3, 4], final_norm: true }, 5120, 1024)
    }

    fn tally(training: &serde_json::Value, evaluated: bool) -> Tally {
        let (shape, training) = (shape(), serde_json::from_value(training.clone()).unwrap());
        Trainer {
            shape: &shape,
            training: &training,
            dtype: Dtype::Bfloat16,
            states: HiddenStatesDtype::Model,
            vocab_size: 151_936,
            rows: 1024,
            evaluated,
        }
        .tally()
    }

    #[test]
    fn sizes_that_are_known_are_told() {
        let parameters: u64 = shape().tensors().values().map(|dimensions| dimensions.iter().product::<usize>() as u64).sum();
        let plain = tally(&serde_json::json!({"optim": "AdamW"}), false);
        assert_eq!((plain.weights, plain.moments), (4 * parameters, 8 * parameters));
        assert!((4 * parameters..5 * parameters).contains(&plain.gradients), "{plain:?}");
        let vectors = 4 * 2 * 1184 + 5120;
        let small = tally(&serde_json::json!({"weightDtype": "Bfloat16", "optimStateDtype": "Bfloat16"}), true);
        assert_eq!(small.weights, 2 * (2 * (parameters - vectors) + 4 * vectors));
        // Muon's one moment, AdamW's two of vectors; norms are small, the gate's bias is not.
        assert_eq!(small.moments, 2 * (parameters - vectors) + 8 * (vectors - 5120) + 4 * 5120);
        let average = serde_json::json!({"weightDtype": "Bfloat16", "emaDecay": 0.99});
        let trained = 2 * (parameters - vectors) + 4 * vectors;
        assert_eq!([false, true].map(|evaluated| tally(&average, evaluated).weights), [trained + 4 * parameters, trained + 8 * parameters]);
        let round = Tally { weights: 1_000_000, gradients: 2_000_000, moments: 3_000_000, activations: 4_000_000, buffers: 50_000 };
        let text = "10.1 MB (weights 1.0 MB, gradients 2.0 MB, moments 3.0 MB, activations 4.0 MB, buffers 0.1 MB)";
        assert_eq!((round.total(), round.to_string()), (10_050_000, text.to_owned()));
    }

    #[test]
    fn what_takes_less_is_told_to_take_less() {
        let mut settings = serde_json::json!({"optimStateDtype": "Int8"});
        let mut last = tally(&settings, false).total();
        for (name, value) in
            [("weightDtype", "Bfloat16".into()), ("maxGradNormScope", "PerTensor".into()), ("gradientCheckpointing", true.into())]
        {
            settings[name] = value;
            let less = tally(&settings, false).total();
            assert!(less < last, "{name}: {less}, {last} without");
            last = less;
        }
        assert!(last < 550_000_000, "{last}");
        settings["loss"] = "Local".into();
        assert!(tally(&settings, false).buffers > 4 * 5120 * 151_936);
    }
}
