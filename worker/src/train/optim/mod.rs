//! Optimizers with named states: what they remember is exported and imported as tensors, so a resumed run has the bits of an unbroken one. How a
//! weight moves is the device's: [`Backward::update`].

mod gradients;

use std::collections::BTreeMap;
use std::sync::Arc;

use carryon_crds::job::{Optimizer, StateDtype, Training};

pub use gradients::{accumulate, clip_norm, scale, shrink};

use crate::head::{Gradients, Weights};
use crate::kernel::{Backward, Change, DeviceError, Rule, Step, Trained};
pub use crate::kernel::{Map, Moment};

/// Muon for matrices and AdamW for the rest, or AdamW for everything.
pub struct Optimizers<B: Backward> {
    kind: Optimizer,
    seed: u64,
    steps: u64,
    learning_rate: f64,
    muon_learning_rate: f64,
    weight_decay: f64,
    dtype: StateDtype,
    /// By parameter, in the rule's order.
    states: BTreeMap<String, Vec<B::State>>,
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

/// Why a step was not made or a state not taken.
#[derive(Debug, thiserror::Error)]
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
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// What a rule remembers of a parameter, as checkpoints name it, and what its codes mean.
fn remembers(rule: Rule) -> &'static [(&'static str, Map)] {
    match rule {
        Rule::Muon => &[("momentum", Map::Signed)],
        Rule::AdamW => &[("first_moment", Map::Signed), ("second_moment", Map::Unsigned)],
    }
}

/// A checkpoint's name of what `rule` remembers of `parameter`.
fn tensor_name(rule: Rule, parameter: &str, which: &str) -> String {
    let rule = match rule {
        Rule::Muon => "muon",
        Rule::AdamW => "adamw",
    };
    format!("{rule}.{parameter}.{which}")
}

/// What the codes of the state `name` mean.
pub fn map_of(name: &str) -> Map {
    let known = remembers(Rule::AdamW).iter().find(|(which, _)| name.ends_with(which));
    known.map_or(Map::Signed, |(_, map)| *map)
}

impl<B: Backward> Optimizers<B> {
    /// Optimizers as a job asks for them, with empty states.
    pub fn new(training: &Training) -> Self {
        Self {
            kind: training.optim,
            seed: training.seed,
            steps: 0,
            learning_rate: training.learning_rate,
            muon_learning_rate: training.muon_learning_rate,
            weight_decay: training.weight_decay,
            dtype: training.optim_state_dtype,
            states: BTreeMap::new(),
        }
    }

    fn rule(&self, shape: &[usize]) -> Rule {
        if self.kind.moves_by_muon(shape) { Rule::Muon } else { Rule::AdamW }
    }

    fn step_of(&self, rule: Rule, factor: f64) -> Step {
        let rate = match rule {
            Rule::Muon => self.muon_learning_rate,
            Rule::AdamW => self.learning_rate,
        };
        Step { rule, rate: rate * factor, weight_decay: self.weight_decay, seed: self.seed, number: self.steps }
    }

    /// One step on every weight, learning rates multiplied by `factor`.
    ///
    /// # Errors
    /// A weight without a gradient, before any weight is changed; the device failed.
    pub fn step(&mut self, backend: &B, weights: &mut Trained<B>, mut gradients: Gradients<B>, factor: f64) -> Result<(), OptimError> {
        let count = |weight: &B::Trained| B::dimensions(weight).iter().product::<usize>();
        let complete =
            |(name, weight): (&String, &B::Trained)| gradients.get(name).is_some_and(|gradient| B::size(gradient) == count(weight));
        if let Some((name, _)) = weights.iter().find(|&entry| !complete(entry)) {
            return Err(OptimError::Gradient(name.clone()));
        }
        self.begin();
        let (mut matrices, mut vectors) = (Vec::new(), Vec::new());
        for (name, weight) in weights.iter_mut() {
            let Some(gradient) = gradients.remove(name) else { continue };
            let rule = self.rule(B::dimensions(weight));
            let change = Change { name, states: self.take(backend, rule, name, count(weight))?, weight, gradient };
            if rule == Rule::Muon { matrices.push(change) } else { vectors.push(change) }
        }
        for (rule, mut changes) in [(Rule::Muon, matrices), (Rule::AdamW, vectors)] {
            backend.update(&self.step_of(rule, factor), &mut changes)?;
            self.states.extend(changes.into_iter().map(|change| (change.name.to_owned(), change.states)));
        }
        Ok(())
    }

    /// Begins a step that is made by [`Self::update`], one weight after the other.
    pub fn begin(&mut self) {
        self.steps += 1;
    }

    /// What [`Self::step`] does to one weight; with the same bits.
    ///
    /// # Errors
    /// The device failed.
    pub fn update(&mut self, backend: &B, name: &str, weight: &mut B::Trained, gradient: B::Rows, factor: f64) -> Result<(), DeviceError> {
        let rule = self.rule(B::dimensions(weight));
        let states = self.take(backend, rule, name, B::size(&gradient))?;
        let mut changes = [Change { name, weight, gradient, states }];
        backend.update(&self.step_of(rule, factor), &mut changes)?;
        let [change] = changes;
        self.states.insert(name.to_owned(), change.states);
        Ok(())
    }

    /// Takes out what is remembered of a parameter of `count` values: at first zeros.
    fn take(&mut self, backend: &B, rule: Rule, name: &str, count: usize) -> Result<Vec<B::State>, DeviceError> {
        if let Some(states) = self.states.remove(name) {
            return Ok(states);
        }
        remembers(rule).iter().map(|(_, map)| backend.remember(Moment::zeros(count, self.dtype, *map).into())).collect()
    }

    /// All states of `weights`.
    ///
    /// # Errors
    /// The device failed.
    pub fn state(&self, backend: &B, weights: &Trained<B>) -> Result<OptimizerState, DeviceError> {
        let mut tensors = BTreeMap::new();
        for (name, states) in &self.states {
            let shape = weights.get(name).map_or_else(Vec::new, |weight| B::dimensions(weight).to_vec());
            let rule = self.rule(&shape);
            for ((which, _), state) in remembers(rule).iter().zip(states) {
                tensors.insert(tensor_name(rule, name, which), (shape.clone(), backend.remembered(state)?));
            }
        }
        Ok(OptimizerState { steps: self.steps, tensors })
    }

    /// Goes on from `state`, which must hold exactly what optimizers of this kind remember of `weights`.
    ///
    /// # Errors
    /// The first tensor that is missing, of another shape or number type, or of no use; the device failed.
    pub fn restore(&mut self, backend: &B, weights: &Weights, mut state: OptimizerState) -> Result<(), OptimError> {
        let mut states = BTreeMap::new();
        for (name, weight) in weights.iter().filter(|_| state.steps > 0) {
            let rule = self.rule(&weight.shape);
            let mut own = Vec::new();
            for (which, map) in remembers(rule) {
                let name = tensor_name(rule, name, which);
                let refuse = |reason| OptimError::State { name: name.clone(), reason };
                let (shape, moment) = state.tensors.remove(&name).ok_or_else(|| refuse("is missing"))?;
                if shape != weight.shape {
                    return Err(refuse("has another shape than its parameter"));
                }
                if !moment.is_like(&Moment::zeros(weight.values.len(), self.dtype, *map)) {
                    return Err(refuse("is of another number type"));
                }
                own.push(backend.remember(moment)?);
            }
            states.insert(name.clone(), own);
        }
        if let Some(name) = state.tensors.into_keys().next() {
            return Err(OptimError::State { name, reason: "belongs to no parameter" });
        }
        (self.steps, self.states) = (state.steps, states);
        Ok(())
    }
}
