//! One optimizer step, and one evaluation. Read from top to bottom: this is all the arithmetic of training.

use std::sync::Arc;
use std::time::{Duration, Instant};

use carryon_crds::job::{Metric, NormScope, Task, Training};
use carryon_crds::wire::HeadShape;

use crate::head::pass::{Forward, Keep, Pass, PassError, Saved};
use crate::head::{Gradients, Weights};
use crate::kernel::{Backward, DeviceError, Trained};
use crate::train::average::Average;
use crate::train::checkpoint::{Best, General};
use crate::train::dropout::Dropout;
use crate::train::error::TrainError;
use crate::train::figures::Predictions;
use crate::train::loss::Loss;
use crate::train::optim::{OptimizerState, Optimizers, accumulate, clip_norm, scale, shrink};
use crate::train::schedule::Schedule;
use crate::train::states::{Feed, MicroBatch};

/// A head in training: what a step changes, and what it needs for that.
pub struct Learner<B: Backward> {
    /// Shape of the head.
    pub shape: HeadShape,
    /// Its tensors; copied when they change while somebody else has them still.
    pub weights: Arc<Trained<B>>,
    /// What is measured and written instead of them, where that is an average.
    pub average: Option<Average<B>>,
    /// With their states.
    pub optimizers: Optimizers<B>,
    /// Of the learning rates.
    pub schedule: Schedule,
    /// As the job asks for it.
    pub training: Training,
    /// Where predictions are measured.
    pub loss: Box<dyn Loss>,
    /// What all this is computed on.
    pub backend: B,
    /// Norm of the gradients of the step before.
    pub last_norm: Option<f64>,
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepFigures {
    /// Mean over the targets, nats.
    pub loss: f64,
    /// Learning rate of AdamW.
    pub learning_rate: f64,
    /// Before clipping.
    pub grad_norm: f64,
    /// Mean divergence from the base on what is replayed, nats.
    pub replay_kl: Option<f64>,
    /// Tokens of all samples.
    pub tokens: usize,
    /// From the first wait to the last weight.
    pub seconds: f64,
    /// Of them, waits for hidden states.
    pub wait_seconds: f64,
}

/// What an evaluation found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluated {
    /// Mean over the targets, nats.
    pub loss: f64,
    /// What the head put out, where that is measured by more than its loss.
    pub predictions: Predictions,
}

impl Evaluated {
    /// What is kept of it, with the loss of `general` text, of weights of this step; `metric` is what makes one better than another.
    pub fn kept(&self, step: u64, general: Option<General>, metric: Metric) -> Best {
        Best { step, loss: self.loss, accuracy: self.predictions.accuracy(), general, figure: self.predictions.value(metric) }
    }
}

impl<B: Backward> Learner<B> {
    /// Weights and states as they are now, on the host.
    ///
    /// # Errors
    /// The device failed.
    pub fn state(&self) -> Result<(Arc<Weights>, OptimizerState), TrainError> {
        let optimizer = self.optimizers.state(&self.backend, &self.weights).map_err(device_error)?;
        Ok((self.on_host(&self.weights)?, optimizer))
    }

    /// The average where there is one, on the host.
    ///
    /// # Errors
    /// The device failed.
    pub fn average(&self) -> Result<Option<Arc<Weights>>, TrainError> {
        self.average.as_ref().map(|average| self.on_host(&average.weights)).transpose()
    }

    /// What is measured and written: the average where there is one.
    pub fn outcome(&self) -> &Arc<Trained<B>> {
        self.average.as_ref().map_or(&self.weights, |average| &average.weights)
    }

    /// The same, on the host.
    ///
    /// # Errors
    /// The device failed.
    pub fn weights(&self) -> Result<Arc<Weights>, TrainError> {
        self.on_host(self.outcome())
    }

    /// Lets go of what only training needs, the weights among it.
    pub fn forget(&mut self) {
        (self.weights, self.average, self.optimizers) = (Arc::default(), None, Optimizers::new(&self.training));
    }

    fn on_host(&self, weights: &Arc<Trained<B>>) -> Result<Arc<Weights>, TrainError> {
        self.backend.trained(weights).map_err(device_error)
    }

    /// Step number `step` (from 0) over the next `micro_batches` of `feed`. None when someone asked to stop: nothing has changed then.
    ///
    /// # Errors
    /// States or losses that do not come; a loss or gradient that is not finite; a tensor without a gradient.
    pub fn step(&mut self, step: u64, micro_batches: usize, feed: &mut Feed) -> Result<Option<StepFigures>, TrainError> {
        let started = Instant::now();
        let pass = Pass::new(&self.shape, self.backend.clone()).map_err(pass_error)?;
        let fused = micro_batches == 1 && self.training.max_grad_norm_scope != NormScope::Global;
        let factor = self.schedule.factor(step);
        let dropout = Dropout { share: self.training.dropout, seed: self.training.seed, step, widths: self.shape.tap_widths() };
        let (mut gradients, mut sum, mut targets, mut tokens, mut fused_norm) = (Gradients::<B>::new(), 0.0, 0, 0, 0.0);
        let mut samples = 0;
        let (mut waited, mut divergence) = (Duration::ZERO, Vec::new());
        for _ in 0..micro_batches {
            let asked = Instant::now();
            let Some(mut batch) = feed.receive()? else { return Ok(None) };
            waited += asked.elapsed();
            dropout.apply(&mut batch.packed, samples);
            samples += batch.packed.lengths.len();
            let keep = if self.training.gradient_checkpointing { Keep::Inputs } else { Keep::All };
            let Forward { output, saved } = pass.forward(&self.weights, &batch.packed, keep).map_err(pass_error)?;
            let output = self.backend.hand_over(output).map_err(device_error)?;
            let Some(measured) = self.loss.measure(&batch, Some(output), true)? else { return Ok(None) };
            sum += total(&measured.loss);
            divergence.extend(&measured.divergence);
            targets += batch.targets.len();
            tokens += batch.tokens;
            let Some(saved) = saved else { continue };
            if fused {
                finite("loss", step, sum / targets as f64)?;
                fused_norm = self.fused(&pass, &batch, saved, measured.gradient, factor, feed)?;
            } else {
                let width = self.output_width();
                let Self { weights, backend, .. } = &mut *self;
                let mut take = |name: &str, _: &mut B::Trained, gradient: B::Rows| {
                    ask_late(feed, name);
                    accumulate(backend, &mut gradients, name, gradient)
                };
                let by_output = backend.receive(measured.gradient, width).map_err(device_error)?;
                pass.backward(Arc::make_mut(weights), &batch.packed, saved, by_output, &mut take).map_err(device_error)?;
            }
        }
        let loss = finite("loss", step, sum / targets as f64)?;
        let grad_norm = if fused { fused_norm } else { self.update(gradients, targets, factor)? };
        let grad_norm = finite("gradient norm", step, grad_norm)?;
        if let Some(average) = &mut self.average {
            average.take(&self.backend, &self.weights, step + 1).map_err(device_error)?;
        }
        self.last_norm = Some(grad_norm);
        let learning_rate = self.training.learning_rate * factor;
        let replay_kl = (!divergence.is_empty()).then(|| total(&divergence) / divergence.len() as f64);
        let (seconds, wait_seconds) = (started.elapsed().as_secs_f64(), waited.as_secs_f64());
        Ok(Some(StepFigures { loss, learning_rate, grad_norm, replay_kl, tokens, seconds, wait_seconds }))
    }

    /// Goes back and changes each weight as soon as its gradient is known. `by_output` is not yet divided by the number of targets. Gives the
    /// norm of all gradients.
    fn fused(
        &mut self,
        pass: &Pass<B>,
        batch: &MicroBatch,
        saved: Saved<B>,
        mut by_output: Vec<f32>,
        factor: f64,
        feed: &mut Feed,
    ) -> Result<f64, TrainError> {
        let share = 1.0 / batch.targets.len() as f32;
        by_output.iter_mut().for_each(|gradient| *gradient *= share);
        let (bound, width) = (self.bound(), self.output_width());
        let Self { weights, optimizers, backend, .. } = self;
        let mut squares = 0.0;
        optimizers.begin();
        let mut take = |name: &str, weight: &mut B::Trained, mut gradient: B::Rows| {
            ask_late(feed, name);
            let norm = backend.length([&gradient])?;
            squares += norm * norm;
            backend.scale(&mut gradient, bound(norm))?;
            optimizers.update(backend, name, weight, gradient, factor)
        };
        let by_output = backend.receive(by_output, width).map_err(device_error)?;
        pass.backward(Arc::make_mut(weights), &batch.packed, saved, by_output, &mut take).map_err(device_error)?;
        Ok(squares.sqrt())
    }

    /// Values of a row that the head puts out.
    fn output_width(&self) -> usize {
        if self.shape.task == Task::CausalLM { self.shape.hidden_size as usize } else { self.shape.outputs() }
    }

    /// What a tensor's gradient of some norm is scaled by, where the scope is another than `Global`.
    fn bound(&self) -> impl Fn(f64) -> f32 + use<B> {
        let (most, per_tensor) = (self.training.max_grad_norm, self.training.max_grad_norm_scope == NormScope::PerTensor);
        let before = self.last_norm.map_or(1.0, |norm| shrink(norm, most));
        move |norm| if per_tensor { shrink(norm, most) } else { before }
    }

    /// Changes all weights by gradients that are not yet divided by the number of targets. Gives their norm.
    fn update(&mut self, mut gradients: Gradients<B>, targets: usize, factor: f64) -> Result<f64, TrainError> {
        let found = self.clip(&mut gradients, targets).map_err(device_error)?;
        let moved = self.optimizers.step(&self.backend, Arc::make_mut(&mut self.weights), gradients, factor);
        moved.map_err(|error| TrainError::Head(error.to_string())).map(|()| found)
    }

    /// Divides gradients by the number of targets and bounds them. Gives their norm before that.
    fn clip(&self, gradients: &mut Gradients<B>, targets: usize) -> Result<f64, DeviceError> {
        let backend = &self.backend;
        scale(backend, gradients, 1.0 / targets as f32)?;
        if self.training.max_grad_norm_scope == NormScope::Global {
            return clip_norm(backend, gradients, self.training.max_grad_norm);
        }
        let (found, bound) = (backend.length(gradients.values())?, self.bound());
        for gradient in gradients.values_mut() {
            let less = bound(backend.length([&*gradient])?);
            backend.scale(gradient, less)?;
        }
        Ok(found)
    }

    /// Measures `weights` on all of `feed`, or the base alone when there are none. `progress` is told after each of the micro-batches.
    /// None when someone asked to stop.
    ///
    /// # Errors
    /// States or losses that do not come.
    pub fn evaluate(
        &mut self,
        weights: Option<&Trained<B>>,
        batches: usize,
        feed: &mut Feed,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Evaluated>, TrainError> {
        let pass = Pass::new(&self.shape, self.backend.clone()).map_err(pass_error)?;
        let (mut sum, mut targets, mut predictions) = (0.0, 0, Predictions::new(&self.shape));
        for done in 0..batches {
            let Some(batch) = feed.receive()? else { return Ok(None) };
            feed.ask();
            let output = weights.map(|weights| pass.forward(weights, &batch.packed, Keep::Nothing)).transpose().map_err(pass_error)?;
            let output = output.map(|forward| self.backend.hand_over(forward.output)).transpose().map_err(device_error)?;
            if let Some(output) = &output {
                predictions.add(output, &batch.targets);
            }
            let Some(measured) = self.loss.measure(&batch, output, false)? else { return Ok(None) };
            predictions.add_pairs(&measured.rewards);
            sum += total(&measured.loss);
            targets += batch.targets.len();
            progress(done as u64 + 1);
        }
        Ok(Some(Evaluated { loss: sum / targets as f64, predictions }))
    }
}

/// Asks for the next micro-batch when the way back has come to the bridge: what lay before it is gone, and much is left to compute.
fn ask_late(feed: &mut Feed, name: &str) {
    if name.starts_with("bridge.") {
        feed.ask();
    }
}

/// Summed in f64, target by target, so that it does not depend on how requests were split.
fn total(loss: &[f32]) -> f64 {
    loss.iter().map(|&loss| f64::from(loss)).sum()
}

fn finite(what: &'static str, step: u64, value: f64) -> Result<f64, TrainError> {
    if value.is_finite() { Ok(value) } else { Err(TrainError::NotFinite { what, step: step + 1, value }) }
}

fn pass_error(error: PassError) -> TrainError {
    TrainError::Head(error.to_string())
}

pub(super) fn device_error(error: DeviceError) -> TrainError {
    TrainError::Head(error.to_string())
}
