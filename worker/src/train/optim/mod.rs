//! Optimizers with named states: what they remember is exported and imported as tensors, so a resumed run has the bits of an unbroken one.

mod adamw;
mod gradients;
mod moment;
mod muon;

use std::collections::BTreeMap;
use std::sync::Arc;

use carryon_crds::job::{Optimizer, Training};

pub use gradients::{accumulate, clip_norm, norm, scale, shrink};
pub use moment::{BLOCK, Map, Moment};

use crate::head::{Gradients, Weight, Weights};
use crate::kernel::Threads;
use adamw::AdamW;
use muon::Muon;

/// Muon for matrices and AdamW for the rest, or AdamW for everything.
pub struct Optimizers {
    kind: Optimizer,
    seed: u64,
    steps: u64,
    muon: Muon,
    adamw: AdamW,
}

/// All that the optimizers remember.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Steps made.
    pub steps: u64,
    /// `muon.{parameter}.momentum`, `adamw.{parameter}.first_moment` and `adamw.{parameter}.second_moment`: the parameter's shape, and a number for each
    /// of its values. A parameter has state from its first step on.
    pub tensors: BTreeMap<String, (Vec<usize>, Arc<Moment>)>,
}

/// A step.
struct At<'a> {
    threads: &'a Threads,
    seed: u64,
    /// From 1.
    step: u64,
    /// Of the learning rates.
    factor: f64,
}

/// What a step changes, and by what.
struct Parameter<'a> {
    name: &'a str,
    weight: &'a mut Weight,
    gradient: Vec<f32>,
}

/// Why a step was not made or a state not taken.
#[derive(Debug, thiserror::Error, PartialEq)]
pub enum OptimError {
    /// Nothing may stand still unseen.
    #[error("parameter {0:?} has no gradient of its length")]
    Gradient(String),
    /// The state belongs to another head or optimizer.
    #[error("optimizer state {name:?} {reason}")]
    State {
        /// Name of the state's tensor.
        name: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl Optimizers {
    /// Optimizers as a job asks for them, with empty states.
    pub fn new(training: &Training) -> Self {
        let (weight_decay, dtype) = (training.weight_decay, training.optim_state_dtype);
        Self {
            kind: training.optim,
            seed: training.seed,
            steps: 0,
            muon: Muon { learning_rate: training.muon_learning_rate, weight_decay, dtype, momenta: BTreeMap::new() },
            adamw: AdamW { learning_rate: training.learning_rate, weight_decay, dtype, moments: BTreeMap::new() },
        }
    }

    /// One step on every weight, learning rates multiplied by `factor`.
    ///
    /// # Errors
    /// A weight without a gradient, before any weight is changed.
    pub fn step(&mut self, threads: &Threads, weights: &mut Weights, mut gradients: Gradients, factor: f64) -> Result<(), OptimError> {
        let complete =
            |(name, weight): (&String, &Weight)| gradients.get(name).is_some_and(|gradient| gradient.len() == weight.values.len());
        if let Some((name, _)) = weights.iter().find(|&entry| !complete(entry)) {
            return Err(OptimError::Gradient(name.clone()));
        }
        self.begin();
        let parameters =
            weights.iter_mut().filter_map(|(name, weight)| Some(Parameter { name, weight, gradient: gradients.remove(name)? }));
        let (matrices, vectors): (Vec<_>, Vec<_>) = parameters.partition(|parameter| self.kind.moves_by_muon(&parameter.weight.shape));
        let at = At { threads, seed: self.seed, step: self.steps, factor };
        self.muon.step(&at, matrices);
        vectors.into_iter().for_each(|parameter| self.adamw.step(&at, parameter));
        Ok(())
    }

    /// Begins a step that is made by [`Self::update`], one weight after the other.
    pub fn begin(&mut self) {
        self.steps += 1;
    }

    /// What [`Self::step`] does to one weight; with the same bits.
    pub fn update(&mut self, threads: &Threads, name: &str, weight: &mut Weight, gradient: Vec<f32>, factor: f64) {
        let at = At { threads, seed: self.seed, step: self.steps, factor };
        let muon = self.kind.moves_by_muon(&weight.shape);
        let parameter = Parameter { name, weight, gradient };
        if muon { self.muon.step(&at, vec![parameter]) } else { self.adamw.step(&at, parameter) }
    }

    /// All states of `weights`.
    pub fn state(&self, weights: &Weights) -> OptimizerState {
        let shape = |name: &str| weights.get(name).map_or_else(Vec::new, |weight| weight.shape.clone());
        let momenta = self.muon.momenta.iter().map(|(name, momentum)| (format!("muon.{name}.momentum"), (shape(name), momentum.clone())));
        let moments = self.adamw.moments.iter().flat_map(|(name, moments)| {
            let named = MOMENTS.iter().zip(moments);
            named.map(|(which, moment)| (format!("adamw.{name}.{which}"), (shape(name), moment.clone()))).collect::<Vec<_>>()
        });
        OptimizerState { steps: self.steps, tensors: momenta.chain(moments).collect() }
    }

    /// Goes on from `state`, which must hold exactly what optimizers of this kind remember of `weights`.
    ///
    /// # Errors
    /// The first tensor that is missing, of another shape or number type, or of no use.
    pub fn restore(&mut self, weights: &Weights, mut state: OptimizerState) -> Result<(), OptimError> {
        let dtype = self.adamw.dtype;
        let mut take = |name: String, weight: &Weight, map: Map| match state.tensors.remove(&name) {
            Some((shape, _)) if shape != weight.shape => Err(OptimError::State { name, reason: "has another shape than its parameter" }),
            Some((_, moment)) if !moment.is_like(&Moment::zeros(weight.values.len(), dtype, map)) => {
                Err(OptimError::State { name, reason: "is of another number type" })
            }
            Some((_, moment)) => Ok(moment),
            None => Err(OptimError::State { name, reason: "is missing" }),
        };
        let (mut momenta, mut moments) = (BTreeMap::new(), adamw::Moments::new());
        let moved = weights.iter().filter(|_| state.steps > 0);
        for (name, weight) in moved {
            if self.kind.moves_by_muon(&weight.shape) {
                momenta.insert(name.clone(), take(format!("muon.{name}.momentum"), weight, Map::Signed)?);
            } else {
                let [first, second] = [0, 1].map(|which| take(format!("adamw.{name}.{}", MOMENTS[which]), weight, adamw::MAPS[which]));
                moments.insert(name.clone(), [first?, second?]);
            }
        }
        if let Some(name) = state.tensors.into_keys().next() {
            return Err(OptimError::State { name, reason: "belongs to no parameter" });
        }
        (self.steps, self.muon.momenta, self.adamw.moments) = (state.steps, momenta, moments);
        Ok(())
    }
}

/// Whose chance it is, where a weight is rounded: its moments are 0 and 1.
const WEIGHT: u64 = 2;

/// AdamW's, as they are named in a checkpoint.
const MOMENTS: [&str; 2] = ["first_moment", "second_moment"];

/// What the codes of the state `name` mean.
pub fn map_of(name: &str) -> Map {
    if name.ends_with(MOMENTS[1]) { adamw::MAPS[1] } else { Map::Signed }
}
