//! Several trainings of one head that differ in their seed alone, and what is made of them: `training.seeds`.

use std::sync::Arc;

use carryon_crds::job::KeptSeed;
use carryon_crds::wire::head::SeedMetrics;

use crate::head::{Weight, Weights};
use crate::kernel::Backward;
use crate::train::checkpoint::{Best, Folder, State};
use crate::train::error::TrainError;
use crate::train::fit::Run;
use crate::train::metrics::finite;
use crate::train::states::HiddenStates;
use crate::train::step::device_error;

/// One that has ended. Its best weights are in its last checkpoint.
pub(super) struct Ended {
    pub seed: u64,
    pub state: State,
    pub checkpoints: Folder,
}

/// What has come of all.
#[derive(Default)]
pub(super) struct Outcome {
    /// Each of several.
    pub seeds: Vec<SeedMetrics>,
    /// Those of which the average is written, if it is.
    pub averaged: Vec<u64>,
}

/// Gives `run`, the last of those that have `ended`, the weights to write and the state they come from; tells which of them is the best.
///
/// # Errors
/// A checkpoint that cannot be read; states or losses that do not come; the wish to stop.
pub(super) fn choose<S: HiddenStates, B: Backward>(
    run: &mut Run<S, B>,
    ended: &[Ended],
    keep: KeptSeed,
) -> Result<(usize, Outcome), TrainError> {
    let bound = run.bound();
    let bests: Vec<Best> = ended.iter().map(|one| one.state.best.expect("held-out samples are measured before the first step")).collect();
    let first = |best: usize, other: usize| if bests[other].is_better(&bests[best], bound) { other } else { best };
    let best = (1..ended.len()).fold(0, first);
    let mut outcome =
        Outcome { seeds: ended.iter().zip(&bests).map(|(one, best)| metrics(one.seed, best)).collect(), averaged: Vec::new() };
    let states = || ended.iter().map(|one| &one.state);
    run.state = State {
        train_seconds: states().map(|state| state.train_seconds).sum(),
        peak_anonymous_bytes: states().map(|state| state.peak_anonymous_bytes).max().unwrap_or_default(),
        ..ended[best].state.clone()
    };
    // What they have learned is read back one after the other, into the room that training had.
    run.learner.forget();
    run.best = None;
    if keep == KeptSeed::Average {
        let average = Arc::new(average(ended)?);
        let trained = run.learner.backend.train(average.clone()).map_err(device_error)?;
        let now = run.judge(&trained, run.state.step)?;
        let (loss, alone) = (now.loss, bests[best].loss);
        run.console.note(&format!("average of {} seeds: loss {loss:.4}; the best alone, {}: {alone:.4}", ended.len(), ended[best].seed));
        if now.is_better(&bests[best], bound) {
            (run.best, run.state.best) = (Some(average), Some(now));
            outcome.averaged = ended.iter().map(|one| one.seed).collect();
            return Ok((best, outcome));
        }
    }
    run.best = Some(weights(&ended[best])?);
    Ok((best, outcome))
}

fn metrics(seed: u64, best: &Best) -> SeedMetrics {
    let general_loss = best.general.and_then(|general| finite(general.head));
    SeedMetrics { seed, steps: best.step, eval_loss: finite(best.loss), general_loss, figure: best.figure }
}

/// The mean of the weights of all, in f32.
fn average(ended: &[Ended]) -> Result<Weights, TrainError> {
    let share = 1.0 / ended.len() as f32;
    let mut mean = Weights::new();
    for one in ended {
        for (name, Weight { shape, values }) in Arc::unwrap_or_clone(weights(one)?) {
            let zero = || Weight { shape, values: vec![0.0; values.len()].into() };
            let sum = mean.entry(name).or_insert_with(zero).values.floats_mut();
            sum.iter_mut().zip(&*values.floats()).for_each(|(sum, value)| *sum += share * value);
        }
    }
    Ok(mean)
}

/// Its best weights.
fn weights(one: &Ended) -> Result<Arc<Weights>, TrainError> {
    let found = one.checkpoints.latest(&one.state.run, &one.state.identity)?;
    let damaged = || TrainError::Head(format!("the last checkpoint of seed {} is gone: {}", one.seed, found.warnings.join("; ")));
    found.checkpoint.and_then(|checkpoint| checkpoint.best).ok_or_else(damaged)
}
