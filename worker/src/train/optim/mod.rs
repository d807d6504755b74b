//! Optimizers with named states: what they remember is exported and imported as tensors, so a resumed run has the bits of an unbroken one.

mod adamw;
mod gradients;
mod muon;

use carryon_crds::job::{Optimizer, Training};

pub use gradients::{accumulate, clip_norm, scale};

use crate::head::{Gradients, Weight, Weights};
use crate::kernel::Threads;
use adamw::AdamW;
use muon::Muon;

/// Muon for matrices and AdamW for the rest, or AdamW for everything.
pub struct Optimizers {
    kind: Optimizer,
    steps: u64,
    muon: Muon,
    adamw: AdamW,
}

/// All that the optimizers remember.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Steps made.
    pub steps: u64,
    /// `muon.{parameter}.momentum`, `adamw.{parameter}.first_moment` and `adamw.{parameter}.second_moment`, shaped like the parameter.
    /// A parameter has state from its first step on.
    pub tensors: Weights,
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
        Self {
            kind: training.optim,
            steps: 0,
            muon: Muon::new(training.muon_learning_rate, training.weight_decay),
            adamw: AdamW::new(training.learning_rate, training.weight_decay),
        }
    }

    /// One step on every weight, learning rates multiplied by `factor`.
    ///
    /// # Errors
    /// A weight without a gradient, before any weight is changed.
    pub fn step(&mut self, threads: &Threads, weights: &mut Weights, gradients: &Gradients, factor: f64) -> Result<(), OptimError> {
        let complete =
            |(name, weight): (&String, &Weight)| gradients.get(name).is_some_and(|gradient| gradient.len() == weight.values.len());
        if let Some((name, _)) = weights.iter().find(|&entry| !complete(entry)) {
            return Err(OptimError::Gradient(name.clone()));
        }
        self.steps += 1;
        let (matrices, vectors): (Vec<_>, Vec<_>) = weights.iter_mut().partition(|(_, weight)| uses_muon(self.kind, &weight.shape));
        self.muon.step(threads, matrices, gradients, factor);
        for (name, weight) in vectors {
            self.adamw.step(self.steps, name, weight, &gradients[name], factor);
        }
        Ok(())
    }

    /// A copy of all states.
    pub fn state(&self) -> OptimizerState {
        let momenta = self.muon.momenta.iter().map(|(name, momentum)| (format!("muon.{name}.momentum"), momentum.clone()));
        let moments = self.adamw.moments.iter().flat_map(|(name, [first, second])| {
            [(format!("adamw.{name}.first_moment"), first.clone()), (format!("adamw.{name}.second_moment"), second.clone())]
        });
        OptimizerState { steps: self.steps, tensors: momenta.chain(moments).collect() }
    }

    /// Goes on from `state`, which must hold exactly what optimizers of this kind remember of `weights`.
    ///
    /// # Errors
    /// The first tensor that is missing, of another shape, or of no use.
    pub fn restore(&mut self, weights: &Weights, mut state: OptimizerState) -> Result<(), OptimError> {
        let mut take = |name: String, shape: &[usize]| match state.tensors.remove(&name) {
            Some(tensor) if tensor.shape == shape => Ok(tensor),
            Some(_) => Err(OptimError::State { name, reason: "has another shape than its parameter" }),
            None => Err(OptimError::State { name, reason: "is missing" }),
        };
        let (mut momenta, mut moments) = (Weights::new(), adamw::Moments::new());
        let moved = weights.iter().filter(|_| state.steps > 0);
        for (name, weight) in moved {
            if uses_muon(self.kind, &weight.shape) {
                momenta.insert(name.clone(), take(format!("muon.{name}.momentum"), &weight.shape)?);
            } else {
                let [first, second] = ["first", "second"].map(|which| take(format!("adamw.{name}.{which}_moment"), &weight.shape));
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

/// Values that are remembered of each value of a parameter.
pub fn state_values(kind: Optimizer, shape: &[usize]) -> u64 {
    if uses_muon(kind, shape) { 1 } else { 2 }
}

fn uses_muon(kind: Optimizer, shape: &[usize]) -> bool {
    kind == Optimizer::Muon && shape.len() == 2
}
