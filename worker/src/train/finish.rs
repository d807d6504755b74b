//! The last stage of a run: head, report and marker.

use std::sync::Arc;

use carryon_crds::job::{Metric, Task};
use carryon_crds::wire::{Figure, HeadManifest, TerminationMessage};

use crate::kernel::Backward;
use crate::train::answers::Answers;
use crate::train::cached::PoolStates;
use crate::train::error::TrainError;
use crate::train::exact_match::ExactMatch;
use crate::train::figures::Predictions;
use crate::train::fit::Run;
use crate::train::loss::unscale;
use crate::train::output::{self, Places};
use crate::train::plan::Inputs;
use crate::train::pool::Base;
use crate::train::progress::Phase;
use crate::train::report::{self, Example, Report};
use crate::train::seeds::Outcome;
use crate::train::sets::Data;
use crate::train::step::device_error;
use crate::train::{alpha, examples, memory, metrics, tally};

/// Writes head, report and, last, the marker.
pub(super) fn finish<B: Backward>(
    places: &Places,
    inputs: &Inputs,
    base: &Base,
    data: &Data,
    outcome: &Outcome,
    run: &mut Run<PoolStates, B>,
) -> Result<TerminationMessage, TrainError> {
    let weights = run.best.take().map_or_else(|| run.learner.weights(), Ok)?;
    run.learner.forget();
    let (mut shape, mut predictions) = (data.shape.clone(), Predictions::default());
    let (alphas, has_figures) = (&inputs.config.evaluation.alphas, inputs.config.task != Task::CausalLM);
    if has_figures || !alphas.is_empty() {
        let weights = run.learner.backend.train(weights.clone()).map_err(device_error)?;
        shape.alpha = alpha::choose(run, &weights, alphas)?.unwrap_or(shape.alpha);
        if has_figures && run.evaluation.is_some() {
            let found = run.measure(Some(&weights), Phase::Evaluating)?;
            predictions = found.ok_or(TrainError::Stopped { step: run.state.step })?.predictions;
        }
    }
    let scale = data.train.counts.balance.scale();
    let mut figures = predictions.figures(scale);
    run.console.phase(Phase::Writing, 0, "");
    let mut weights = Arc::unwrap_or_clone(weights);
    if inputs.config.task == Task::Regression {
        unscale(&mut weights, scale);
    }
    let artifact = output::artifact(shape, base, weights)?;
    run.look_at_memory();
    run.lock.check()?;
    run.written(|_| output::write_weights(places, &artifact))?;
    figures
        .extend(exact_match(base, &artifact.digest, places, inputs, data, run)?.map(|share| (Metric::ExactMatch.name().to_owned(), share)));
    run.lock.check()?;
    let manifest = run.written(|run| output::write_manifest(places, &artifact, base, inputs, (&run.state, &figures, outcome)))?;
    let examples = match data.shape.task {
        Task::CausalLM => example_answers(base, &artifact.digest, places, data, run)?,
        _ => Vec::new(),
    };
    run.written(|run| write_report(places, &manifest, data, run, &examples, &predictions.confusion))?;
    run.console.note(&tally::outcome(run.planned, &run.memory));
    run.console.phase(Phase::Done, 0, "");
    let mut progress = run.console.progress();
    progress.eta_seconds = Some(0);
    let message = TerminationMessage {
        message: summary(&manifest) + &of_seeds(&manifest) + &unmet(&manifest) + &left_out(data),
        digest: Some(artifact.digest.clone()),
        base_model_digest: Some(base.description.identity.digest()),
        other_base_model_digests: base.others.iter().map(|other| other.description.identity.digest()).collect(),
        evaluation: manifest.metrics.evaluation.iter().map(|(name, figure)| (name.clone(), figure.value)).collect(),
        unmet_thresholds: manifest.metrics.unmet_thresholds.clone(),
        progress: Some(progress),
    };
    run.lock.check()?;
    run.written(|_| output::mark_finished(places, &inputs.run, &message))?;
    let (weights, report) = (output::weights_path(places, &artifact.digest), places.report(&artifact.digest));
    run.console.note(&format!("{} · {} · {}", message.message, weights.display(), report.display()));
    Ok(message)
}

/// Share of answers to held-out prompts that are right, where the job asks for it.
fn exact_match<B: Backward>(
    base: &Base,
    digest: &str,
    places: &Places,
    inputs: &Inputs,
    data: &Data,
    run: &mut Run<PoolStates, B>,
) -> Result<Option<Figure>, TrainError> {
    let (Some(judge), Some(held_out)) = (ExactMatch::of(&inputs.config)?, &data.evaluation) else { return Ok(None) };
    run.console.phase(Phase::Evaluating, 0, "answers");
    let weights = output::weights_path(places, digest);
    let Run { console, runtime, stop, state, .. } = run;
    let told = |done, all| console.advance(done, all);
    let measured = async { judge.measure(&Answers::by(base, &data.shape, digest, &weights).await?, &held_out.samples, told).await };
    runtime.block_on(stop.race(measured)).unwrap_or(Err(TrainError::Stopped { step: state.step }))
}

/// Answers for the report. A pool that fails here costs the report its examples, not the job its head.
fn example_answers<B: Backward>(
    base: &Base,
    digest: &str,
    places: &Places,
    data: &Data,
    run: &Run<PoolStates, B>,
) -> Result<Vec<Example>, TrainError> {
    let samples = data.evaluation.as_ref().map_or(&data.train.samples, |data| &data.samples);
    let weights = output::weights_path(places, digest);
    let examples = async { examples::compare(&Answers::by(base, &data.shape, digest, &weights).await?, samples).await };
    match run.runtime.block_on(run.stop.race(examples)) {
        None => Err(TrainError::Stopped { step: run.state.step }),
        Some(Ok(examples)) => Ok(examples),
        Some(Err(error)) => {
            run.console.warn(&format!("the report has no examples: {error}"));
            Ok(Vec::new())
        }
    }
}

fn write_report<B: Backward>(
    places: &Places,
    manifest: &HeadManifest,
    data: &Data,
    run: &Run<PoolStates, B>,
    examples: &[Example],
    confusion: &[Vec<u64>],
) -> Result<(), TrainError> {
    let weights = output::weights_path(places, &manifest.digest);
    let page = report::render(&Report {
        manifest,
        lines: &metrics::read(&places.metrics().lines)?,
        train: &data.train.counts,
        evaluation: data.evaluation.as_ref().map(|data| &data.counts),
        examples,
        confusion,
        head_bytes: std::fs::metadata(&weights).map_err(TrainError::file("inspect", &weights))?.len(),
        cache_bytes: places.cache_bytes(),
        metric: run.when.metric.name(),
        peak_resident_bytes: memory::now().peak_resident,
        written_step: run.state.best.map_or(run.state.step, |best| best.step),
        written_at: jiff::Timestamp::now().strftime("%Y-%m-%d %H:%M UTC").to_string(),
    })?;
    let path = places.report(&manifest.digest);
    crate::files::write_atomic(&path, page.as_bytes()).map_err(TrainError::file("write", path))
}

/// How far apart the seeds are, where there are several.
fn of_seeds(manifest: &HeadManifest) -> String {
    let losses = || manifest.metrics.seeds.iter().filter_map(|one| one.eval_loss);
    let (Some(least), Some(most)) = (losses().reduce(f64::min), losses().reduce(f64::max)) else { return String::new() };
    let what = if manifest.lineage.averaged_seeds.is_empty() { "the best" } else { "the average" };
    format!("; {what} of {} seeds, whose losses are {least:.4} to {most:.4}", manifest.metrics.seeds.len())
}

/// Why the head is not promotable, if it is not.
fn unmet(manifest: &HeadManifest) -> String {
    match manifest.metrics.unmet_thresholds.as_slice() {
        [] => String::new(),
        unmet => format!("; not promotable: {}", unmet.join(", ")),
    }
}

/// What nobody should have to look for in a report.
fn left_out(data: &Data) -> String {
    match data.train.counts.refused + data.evaluation.as_ref().map_or(0, |data| data.counts.refused) {
        0 => String::new(),
        1 => "; 1 line of the data was left out, see the report".to_owned(),
        lines => format!("; {lines} lines of the data were left out, see the report"),
    }
}

fn summary(manifest: &HeadManifest) -> String {
    let metrics = &manifest.metrics;
    let steps = manifest.lineage.steps;
    let first = ["accuracy", "spearman", "recall_at_1"].into_iter().find_map(|name| Some((name, metrics.evaluation.get(name)?)));
    match (metrics.eval_loss, metrics.base_eval_loss, first) {
        (Some(loss), _, Some((name, Figure { value, low, high }))) => {
            format!("head written after {steps} steps: {name} {value:.3} ({low:.3} to {high:.3}), evaluation loss {loss:.4}")
        }
        (Some(loss), Some(base), _) => format!("head written after {steps} steps: evaluation loss {loss:.4}, the base's own {base:.4}"),
        _ => format!("head written after {steps} steps"),
    }
}
