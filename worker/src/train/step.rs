//! One optimizer step, and one evaluation. Read from top to bottom: this is all the arithmetic of training.

use std::sync::Arc;
use std::time::Instant;

use carryon_crds::job::{Task, Training};
use carryon_crds::wire::HeadShape;

use crate::head::pass::{Keep, Pass, PassError};
use crate::head::{Gradients, Weight, Weights};
use crate::kernel::Threads;
use crate::train::error::TrainError;
use crate::train::loss::{Loss, Measured};
use crate::train::optim::{Optimizers, accumulate, clip_norm, scale};
use crate::train::schedule::Schedule;
use crate::train::states::Feed;

/// A head in training: what a step changes, and what it needs for that.
pub struct Learner {
    /// Shape of the head.
    pub shape: HeadShape,
    /// Its tensors.
    pub weights: Weights,
    /// With their states.
    pub optimizers: Optimizers,
    /// Of the learning rates.
    pub schedule: Schedule,
    /// As the job asks for it.
    pub training: Training,
    /// Where predictions are measured.
    pub loss: Box<dyn Loss>,
    /// For the head's arithmetic.
    pub threads: Arc<Threads>,
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
    /// Tokens of all samples.
    pub tokens: usize,
    /// From the first wait to the last weight.
    pub seconds: f64,
}

/// What an evaluation found.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Evaluated {
    /// Mean over the targets, nats.
    pub loss: f64,
    /// Classification: samples by label (row) and prediction (column).
    pub confusion: Vec<Vec<u64>>,
}

impl Evaluated {
    /// Share of samples a classifier gets right.
    pub fn accuracy(&self) -> Option<f64> {
        let all: u64 = self.confusion.iter().flatten().sum();
        let right: u64 = self.confusion.iter().enumerate().map(|(label, row)| row[label]).sum();
        (all > 0).then(|| right as f64 / all as f64)
    }
}

impl Learner {
    /// Step number `step` (from 0) over the next `micro_batches` of `feed`. None when someone asked to stop: nothing has changed then.
    ///
    /// # Errors
    /// States or losses that do not come; a loss or gradient that is not finite; a tensor without a gradient.
    pub fn step(&mut self, step: u64, micro_batches: usize, feed: &mut Feed) -> Result<Option<StepFigures>, TrainError> {
        let started = Instant::now();
        let pass = Pass::new(&self.shape, self.threads.clone()).map_err(pass_error)?;
        let (mut gradients, mut sum, mut targets, mut tokens) = (Gradients::new(), 0.0, 0, 0);
        for _ in 0..micro_batches {
            let Some(batch) = feed.receive()? else { return Ok(None) };
            let forward = pass.forward(&self.weights, &batch.packed, Keep::All).map_err(pass_error)?;
            let Some(measured) = self.loss.measure(&batch, Some(&forward.output), true)? else { return Ok(None) };
            if let Some(saved) = forward.saved {
                let mut take = |name: &str, _: &mut Weight, gradient: &[f32]| accumulate(&mut gradients, name, gradient);
                pass.backward(&mut self.weights, &batch.packed, saved, &measured.gradient, &mut take);
            }
            sum += total(&measured);
            targets += batch.targets.len();
            tokens += batch.tokens;
        }
        let loss = finite("loss", step, sum / targets as f64)?;
        scale(&mut gradients, 1.0 / targets as f32);
        let grad_norm = finite("gradient norm", step, clip_norm(&mut gradients, self.training.max_grad_norm))?;
        let factor = self.schedule.factor(step);
        let moved = self.optimizers.step(&self.threads, &mut self.weights, &gradients, factor);
        moved.map_err(|error| TrainError::Head(error.to_string()))?;
        let learning_rate = self.training.learning_rate * factor;
        Ok(Some(StepFigures { loss, learning_rate, grad_norm, tokens, seconds: started.elapsed().as_secs_f64() }))
    }

    /// Measures `weights` on all of `feed`, or the base alone when there are none. `progress` is told after each of the micro-batches.
    /// None when someone asked to stop.
    ///
    /// # Errors
    /// States or losses that do not come.
    pub fn evaluate(
        &mut self,
        weights: Option<&Weights>,
        batches: usize,
        feed: &mut Feed,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Option<Evaluated>, TrainError> {
        let pass = Pass::new(&self.shape, self.threads.clone()).map_err(pass_error)?;
        let labels = self.shape.labels.len();
        let (mut sum, mut targets, mut confusion) = (0.0, 0, vec![vec![0; labels]; labels]);
        for done in 0..batches {
            let Some(batch) = feed.receive()? else { return Ok(None) };
            let output = weights.map(|weights| pass.forward(weights, &batch.packed, Keep::Nothing)).transpose().map_err(pass_error)?;
            let output = output.map(|forward| forward.output);
            let Some(measured) = self.loss.measure(&batch, output.as_deref(), false)? else { return Ok(None) };
            if let (Task::Classification, Some(logits)) = (self.shape.task, &output) {
                for (row, &label) in logits.chunks_exact(labels).zip(&batch.targets) {
                    confusion[label as usize][highest(row)] += 1;
                }
            }
            sum += total(&measured);
            targets += batch.targets.len();
            progress(done as u64 + 1);
        }
        Ok(Some(Evaluated { loss: sum / targets as f64, confusion }))
    }
}

/// Summed in f64, target by target, so that it does not depend on how requests were split.
fn total(measured: &Measured) -> f64 {
    measured.loss.iter().map(|&loss| f64::from(loss)).sum()
}

fn finite(what: &'static str, step: u64, value: f64) -> Result<f64, TrainError> {
    if value.is_finite() { Ok(value) } else { Err(TrainError::NotFinite { what, step: step + 1, value }) }
}

fn highest(row: &[f32]) -> usize {
    (0..row.len()).rev().max_by(|&left, &right| row[left].total_cmp(&row[right])).unwrap_or(0)
}

fn pass_error(error: PassError) -> TrainError {
    TrainError::Head(error.to_string())
}
