//! The loop: steps, evaluations and checkpoints in the order that makes a resumed run equal to an unbroken one.

use std::sync::Arc;
use std::time::Instant;

use tokio::runtime::Handle;

use crate::head::Weights;
use crate::kernel::{Backward, Trained};
use crate::train::batches::{self, Order};
use crate::train::checkpoint::{Best, Checkpoint, Folder, General, State};
use crate::train::data::Samples;
use crate::train::error::TrainError;
use crate::train::lock::Lock;
use crate::train::memory::Watch;
use crate::train::metrics::{EvaluationLine, Line, Metrics, StepLine};
use crate::train::progress::{Console, Phase};
use crate::train::states::{Ahead, Feed, HiddenStates};
use crate::train::step::{Evaluated, Learner, StepFigures};
use crate::train::stop::Stop;

/// How far the untrained head's loss may be from the base's, relative: they are computed from equal numbers.
const STEP_ZERO_TOLERANCE: f64 = 1e-6;

/// A run from its first step, or its checkpoint, to its last.
pub struct Run<S, B: Backward> {
    /// What learns.
    pub learner: Learner<B>,
    /// Where the run stands.
    pub state: State,
    /// Weights of the best evaluation.
    pub best: Option<Arc<Weights>>,
    /// Order of the training samples.
    pub order: Order,
    /// Hidden states of the training samples.
    pub train: Arc<S>,
    /// When micro-batches are asked for that are not needed yet.
    pub ahead: Ahead,
    /// The held-out samples and their hidden states.
    pub evaluation: Option<(Arc<Samples>, Arc<S>)>,
    /// Samples that have nothing to do with what is learned, and their hidden states.
    pub general: Option<(Arc<Samples>, Arc<S>)>,
    /// When to evaluate and to stop early.
    pub when: carryon_crds::job::Evaluation,
    /// Optimizer steps between checkpoints.
    pub save_steps: u64,
    /// Where checkpoints go.
    pub checkpoints: Folder,
    /// Keeps other trainers out of the output folder.
    pub lock: Arc<Lock>,
    /// `metrics.jsonl`.
    pub metrics: Metrics,
    /// Tells how it goes.
    pub console: Console,
    /// Ends the run.
    pub stop: Stop,
    /// Highest memory.
    pub memory: Watch,
    /// What of it was told beforehand, bytes.
    pub planned: u64,
    /// Where hidden states are fetched.
    pub runtime: Handle,
}

impl<S: HiddenStates, B: Backward> Run<S, B> {
    /// Trains to the end.
    ///
    /// # Errors
    /// [`TrainError::Stopped`] when asked to, with a checkpoint written; whatever else ends a run. A pool that went away costs no step either.
    pub fn fit(&mut self) -> Result<(), TrainError> {
        match self.steps() {
            Err(error @ TrainError::Pool(_)) => self.save().and(Err(error)),
            ended => ended,
        }
    }

    fn steps(&mut self) -> Result<(), TrainError> {
        let steps = || self.order.clone().steps(self.state.cursor);
        let remaining = self.state.total_steps.saturating_sub(self.state.step);
        let ahead = steps().take(usize::try_from(remaining).unwrap_or(usize::MAX)).flat_map(|step| step.micro_batches);
        let mut feed = Feed::new(&self.runtime, &self.stop, self.train.clone(), self.ahead, ahead);
        let mut steps = steps();
        loop {
            if self.evaluation_is_due() && self.evaluate()?.is_none() {
                return self.stopped();
            }
            if self.state.step >= self.state.total_steps || self.patience_is_over() {
                return self.save();
            }
            self.console.training(self.state.step, self.state.total_steps);
            let Some(next) = steps.next() else { return self.save() };
            let Some(figures) = self.learner.step(self.state.step, next.micro_batches.len(), &mut feed)? else { return self.stopped() };
            self.state.step += 1;
            self.state.cursor = next.behind;
            self.record(figures)?;
            if self.state.step.is_multiple_of(self.save_steps) {
                self.save()?;
            }
        }
    }

    /// Writes a checkpoint of the last finished step. What led to it is durable first.
    fn save(&mut self) -> Result<(), TrainError> {
        self.lock.check()?;
        self.metrics.sync()?;
        let (weights, optimizer) = self.learner.state()?;
        let average = self.learner.average()?;
        self.state.optimizer_steps = optimizer.steps;
        self.look_at_memory();
        let checkpoint = Checkpoint { state: self.state.clone(), weights, average, best: self.best.clone(), optimizer };
        self.written(|run| run.checkpoints.save(&checkpoint))
    }

    /// What `write` writes: when there is no room for it, once more without the cache of hidden states.
    ///
    /// # Errors
    /// Those of `write`.
    pub fn written<T>(&mut self, mut write: impl FnMut(&mut Self) -> Result<T, TrainError>) -> Result<T, TrainError> {
        match write(self) {
            Err(error) if error.is_no_room() && self.train.give_way() => write(self),
            ended => ended,
        }
    }

    /// Keeps the highest memory of all attempts.
    pub fn look_at_memory(&mut self) {
        self.state.peak_anonymous_bytes = self.state.peak_anonymous_bytes.max(self.memory.peak_anonymous());
    }

    fn stopped(&mut self) -> Result<(), TrainError> {
        self.save()?;
        Err(TrainError::Stopped { step: self.state.step })
    }

    fn record(&mut self, figures: StepFigures) -> Result<(), TrainError> {
        (self.state.train_loss, self.state.grad_norm) = (Some(figures.loss), Some(figures.grad_norm));
        self.state.train_seconds += figures.seconds;
        let line = StepLine {
            step: self.state.step,
            epoch: self.epoch(),
            loss: figures.loss,
            lr: figures.learning_rate,
            replay_kl: figures.replay_kl,
            grad_norm: figures.grad_norm,
            tokens_per_second: figures.tokens as f64 / figures.seconds,
            seconds: self.state.train_seconds,
            wait_seconds: figures.wait_seconds,
        };
        self.console.step(&line, self.state.total_steps, figures.seconds);
        let line = Line::Step(line);
        self.written(|run| run.metrics.append(&line))
    }

    /// Passes over the data, with fraction.
    fn epoch(&self) -> f64 {
        self.state.cursor.epoch as f64 + self.state.cursor.step as f64 / self.order.steps_per_epoch() as f64
    }

    /// Before the first step, every `evalSteps` or at the end of each epoch, and behind the last step; each once.
    fn evaluation_is_due(&self) -> bool {
        let step = self.state.step;
        let regular = match self.when.eval_steps {
            Some(steps) => step.is_multiple_of(steps),
            None => self.state.cursor.step == 0,
        };
        self.evaluation.is_some() && self.state.evaluated != Some(step) && (regular || step == 0 || step >= self.state.total_steps)
    }

    fn patience_is_over(&self) -> bool {
        self.when.early_stopping_patience.is_some_and(|patience| self.state.without_improvement >= patience)
    }

    /// Measures the head as it is; before the first step the base, whose loss an untrained head leaves alone. None when asked to stop.
    fn evaluate(&mut self) -> Result<Option<()>, TrainError> {
        let started = Instant::now();
        let first = self.state.step == 0;
        let causal = self.learner.shape.task == carryon_crds::job::Task::CausalLM;
        let weights = (!(first && causal)).then(|| self.learner.outcome().clone());
        let Some(found) = self.measure(weights.as_deref(), if first { Phase::Caching } else { Phase::Evaluating })? else {
            return Ok(None);
        };
        if first && causal {
            self.state.base_eval_loss = Some(found.loss);
            if self.compare_with_base()?.is_none() {
                return Ok(None);
            }
        }
        self.state.evaluated = Some(self.state.step);
        self.state.eval_loss = Some(found.loss);
        let Some(general) = self.measure_general(weights.as_deref())? else { return Ok(None) };
        self.state.general = general;
        let now = found.kept(self.state.step, general, self.when.metric);
        let bound = self.bound();
        if !now.keeps_general(bound) {
            self.console
                .warn("general text costs more than evaluation.maxGeneralLossIncrease: this head is not written, unless no other is");
        }
        if self.state.best.is_none_or(|best| now.is_better(&best, bound)) {
            self.state.best = Some(now);
            self.best = Some(self.learner.weights()?);
            self.state.without_improvement = 0;
        } else {
            self.state.without_improvement += 1;
        }
        let line = EvaluationLine {
            step: self.state.step,
            epoch: self.epoch(),
            eval_loss: found.loss,
            base_eval_loss: self.state.base_eval_loss,
            general_loss: general.map(|general| general.head),
            base_general_loss: general.map(|general| general.base),
            eval_accuracy: now.accuracy,
            eval_seconds: started.elapsed().as_secs_f64(),
        };
        self.console.evaluation(&line);
        let line = Line::Evaluation(line);
        self.written(|run| run.metrics.append(&line)).map(Some)
    }

    /// How much general text may cost. Where a scale of the head is looked for that keeps to it, the best head is whichever learns best.
    pub fn bound(&self) -> Option<f64> {
        self.when.max_general_loss_increase.filter(|_| self.when.alphas.is_empty())
    }

    /// What `weights` of step `step` come to on the held-out samples, which there must be, and on general text where there is such.
    ///
    /// # Errors
    /// States or losses that do not come; the wish to stop.
    pub fn judge(&mut self, weights: &Trained<B>, step: u64) -> Result<Best, TrainError> {
        let stopped = TrainError::Stopped { step: self.state.step };
        let Some(found) = self.measure(Some(weights), Phase::Evaluating)? else { return Err(stopped) };
        let Some(general) = self.measure_general(Some(weights))? else { return Err(stopped) };
        Ok(found.kept(step, general, self.when.metric))
    }

    /// Loss of `weights` (of the base when there are none) on all held-out samples. None when asked to stop, or without such samples.
    ///
    /// # Errors
    /// States or losses that do not come.
    pub fn measure(&mut self, weights: Option<&Trained<B>>, phase: Phase) -> Result<Option<Evaluated>, TrainError> {
        let Some((samples, states)) = self.evaluation.clone() else { return Ok(None) };
        self.measure_batches(weights, &states, batches::evaluation(samples.group_lengths(), self.order.batch), phase)
    }

    /// Losses of general text with these weights (of the base alone when there are none), where there is such text. The base's own is measured once.
    /// None when asked to stop.
    ///
    /// # Errors
    /// States or losses that do not come.
    pub fn measure_general(&mut self, weights: Option<&Trained<B>>) -> Result<Option<Option<General>>, TrainError> {
        let Some((samples, states)) = self.general.clone() else { return Ok(Some(None)) };
        let loss = |run: &mut Self, weights: Option<&Trained<B>>| {
            let batches = batches::evaluation(samples.group_lengths(), run.order.batch);
            run.measure_batches(weights, &states, batches, Phase::Evaluating).map(|found| found.map(|found| found.loss))
        };
        let base = match self.state.general {
            Some(general) => general.base,
            None => match loss(self, None)? {
                Some(base) => base,
                None => return Ok(None),
            },
        };
        let head = if weights.is_some() { loss(self, weights)? } else { Some(base) };
        Ok(head.map(|head| Some(General { head, base })))
    }

    fn measure_batches(
        &mut self,
        weights: Option<&Trained<B>>,
        states: &Arc<S>,
        batches: Vec<Vec<usize>>,
        phase: Phase,
    ) -> Result<Option<Evaluated>, TrainError> {
        let count = batches.len();
        let mut feed = Feed::new(&self.runtime, &self.stop, states.clone(), self.ahead, batches.into_iter());
        self.console.phase(phase, count as u64, "batches of held-out samples");
        let console = &mut self.console;
        self.learner.evaluate(weights, count, &mut feed, &mut |done| console.advance(done, count as u64))
    }

    /// The untrained head must leave the loss of the shortest held-out samples as it is.
    fn compare_with_base(&mut self) -> Result<Option<()>, TrainError> {
        let Some((samples, states)) = self.evaluation.clone() else { return Ok(Some(())) };
        let batch: Vec<_> = batches::evaluation(samples.group_lengths(), self.order.batch).into_iter().take(1).collect();
        let weights = self.learner.outcome().clone();
        let Some(base) = self.measure_batches(None, &states, batch.clone(), Phase::Evaluating)? else { return Ok(None) };
        let Some(head) = self.measure_batches(Some(&weights), &states, batch, Phase::Evaluating)? else { return Ok(None) };
        match (head.loss - base.loss).abs() <= STEP_ZERO_TOLERANCE * base.loss.abs() {
            true => Ok(Some(())),
            false => Err(TrainError::StepZero { head: head.loss, base: base.loss }),
        }
    }
}
