//! AdamW with decoupled decay, as `torch.optim.AdamW`.

use std::collections::BTreeMap;

use crate::head::Weight;

const BETAS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

/// First and second moment by parameter name.
pub(super) type Moments = BTreeMap<String, [Weight; 2]>;

pub(super) struct AdamW {
    learning_rate: f64,
    weight_decay: f64,
    pub moments: Moments,
}

impl AdamW {
    pub fn new(learning_rate: f64, weight_decay: f64) -> Self {
        Self { learning_rate, weight_decay, moments: Moments::new() }
    }

    /// The `step`-th step (from 1) of one parameter:
    /// `m ← β₁m + (1-β₁)g`, `v ← β₂v + (1-β₂)g²`, `p ← (1-ηλ)p - η m̂ / (√v̂ + ε)`, where `m̂` and `v̂` undo the start from zero.
    pub fn step(&mut self, step: u64, name: &str, weight: &mut Weight, gradient: &[f32], factor: f64) {
        let [first, second] = self
            .moments
            .entry(name.to_owned())
            .or_insert_with(|| [Weight::filled(weight.shape.clone(), 0.0), Weight::filled(weight.shape.clone(), 0.0)]);
        let rate = self.learning_rate * factor;
        let [correction, correction_squared] = BETAS.map(|beta| 1.0 - beta.powf(step as f64));
        let [take, take_squared] = BETAS.map(|beta| (1.0 - beta) as f32);
        let keep_squared = BETAS[1] as f32;
        let keep = (1.0 - rate * self.weight_decay) as f32;
        let size = (rate / correction) as f32;
        let root = correction_squared.sqrt() as f32;
        let moments = first.values.iter_mut().zip(&mut second.values);
        for ((value, gradient), (m, v)) in weight.values.iter_mut().zip(gradient).zip(moments) {
            *m += take * (gradient - *m);
            *v = keep_squared * *v + take_squared * gradient * gradient;
            *value = keep * *value - size * *m / (v.sqrt() / root + EPSILON as f32);
        }
    }
}
