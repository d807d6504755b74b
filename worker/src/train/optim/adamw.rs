//! AdamW with decoupled decay, as `torch.optim.AdamW`.

use std::collections::BTreeMap;
use std::sync::Arc;

use carryon_crds::job::StateDtype;

use super::moment::{CHUNK, Dice, Map, Moment, chunks};
use super::{At, Parameter, WEIGHT};

const BETAS: [f64; 2] = [0.9, 0.999];
const EPSILON: f64 = 1e-8;

/// First and second moment by parameter name.
pub(super) type Moments = BTreeMap<String, [Arc<Moment>; 2]>;

/// What codes of the two moments mean.
pub(super) const MAPS: [Map; 2] = [Map::Signed, Map::Unsigned];

pub(super) struct AdamW {
    pub learning_rate: f64,
    pub weight_decay: f64,
    pub dtype: StateDtype,
    pub moments: Moments,
}

impl AdamW {
    /// The step `at` of one parameter:
    /// `m ← β₁m + (1-β₁)g`, `v ← β₂v + (1-β₂)g²`, `p ← (1-ηλ)p - η m̂ / (√v̂ + ε)`, where `m̂` and `v̂` undo the start from zero.
    pub fn step(&mut self, at: &At<'_>, Parameter { name, weight, gradient }: Parameter<'_>) {
        let zeros = || MAPS.map(|map| Moment::zeros(weight.values.len(), self.dtype, map).into());
        let [first, second] = self.moments.entry(name.to_owned()).or_insert_with(zeros);
        let rate = self.learning_rate * at.factor;
        let [correction, correction_squared] = BETAS.map(|beta| 1.0 - beta.powf(at.step as f64));
        let [take, take_squared] = BETAS.map(|beta| (1.0 - beta) as f32);
        let keep_squared = BETAS[1] as f32;
        let keep = (1.0 - rate * self.weight_decay) as f32;
        let size = (rate / correction) as f32;
        let root = correction_squared.sqrt() as f32;
        let update = |values: &mut [f32], gradient: &[f32], m: &mut [f32], v: &mut [f32]| {
            for ((value, gradient), (m, v)) in values.iter_mut().zip(gradient).zip(m.iter_mut().zip(v)) {
                *m += take * (gradient - *m);
                *v = keep_squared * *v + take_squared * gradient * gradient;
                *value = keep * *value - size * *m / (v.sqrt() / root + EPSILON as f32);
            }
        };
        let moments = Arc::make_mut(first).chunks().into_iter().zip(Arc::make_mut(second).chunks());
        let mut work: Vec<_> = chunks(&mut weight.values).into_iter().zip(gradient.chunks(CHUNK)).zip(moments).collect();
        let dice = [0, 1, WEIGHT].map(|which| Dice::new(at.seed, at.step, name, which));
        at.threads.for_each(&mut work, |chunk, ((values, gradient), (m, v))| {
            let place = chunk * CHUNK;
            values.with(dice[2], place, |values| m.with(dice[0], place, |m| v.with(dice[1], place, |v| update(values, gradient, m, v))));
        });
    }
}
