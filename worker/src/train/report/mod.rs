//! `report.html`: one file, no scripts, nothing fetched; all that a person wants to know of a finished run.

mod chart;

use carryon_crds::job::Task;
use carryon_crds::wire::HeadManifest;
use minijinja::{Environment, Value, context};

use crate::train::data::Counts;
use crate::train::error::TrainError;
use crate::train::metrics::{EvaluationLine, Line, StepLine};
use crate::train::progress::duration;
use chart::Series;

const TEMPLATE: &str = include_str!("report.html");

/// Figures in words.
const NAMES: &[(&str, &str)] = &[
    ("accuracy", "accuracy"),
    ("ece", "expected calibration error"),
    ("exact_match", "exact match of answers"),
    ("macro_f1", "macro F1"),
    ("mean_squared_error", "mean squared error"),
    ("recall_at_1", "recall at 1"),
    ("recall_at_10", "recall at 10"),
    ("recall_at_5", "recall at 5"),
    ("roc_auc", "area under the ROC curve"),
    ("spearman", "Spearman's rank correlation"),
];

/// What is reported.
#[derive(Clone, Debug)]
pub struct Report<'a> {
    /// The head.
    pub manifest: &'a HeadManifest,
    /// All of metrics.jsonl.
    pub lines: &'a [Line],
    /// Of the training file.
    pub train: &'a Counts,
    /// Of the evaluation file.
    pub evaluation: Option<&'a Counts>,
    /// The same prompts with and without the head.
    pub examples: &'a [Example],
    /// Classification: samples by label (row) and prediction (column), of the head written.
    pub confusion: &'a [Vec<u64>],
    /// Bytes of head.safetensors.
    pub head_bytes: u64,
    /// Bytes of the hidden-state cache.
    pub cache_bytes: u64,
    /// Name of what evaluations are compared by.
    pub metric: &'static str,
    /// Highest resident memory, file pages included, bytes.
    pub peak_resident_bytes: u64,
    /// Step of the weights written.
    pub written_step: u64,
    /// When it was written, e.g. `2026-01-31 12:00 UTC`.
    pub written_at: String,
}

/// One prompt and what came of it.
#[derive(Clone, Debug)]
pub struct Example {
    /// As the base reads it.
    pub prompt: String,
    /// From the data.
    pub expected: String,
    /// Without the head.
    pub base: String,
    /// With it.
    pub head: String,
}

/// Renders the page.
///
/// # Errors
/// The template fails: a defect of this program.
pub fn render(report: &Report<'_>) -> Result<String, TrainError> {
    let failed = |error: minijinja::Error| TrainError::Head(format!("failed to render the report: {error:#}"));
    let mut environment = Environment::new();
    environment.add_template("report.html", TEMPLATE).map_err(failed)?;
    environment.get_template("report.html").and_then(|template| template.render(page(report))).map_err(failed)
}

fn page(report: &Report<'_>) -> Value {
    let manifest = report.manifest;
    let (metrics, shape) = (&manifest.metrics, &manifest.shape);
    let steps: Vec<&StepLine> =
        report.lines.iter().filter_map(|line| if let Line::Step(line) = line { Some(line) } else { None }).collect();
    let evaluations: Vec<&EvaluationLine> =
        report.lines.iter().filter_map(|line| if let Line::Evaluation(line) = line { Some(line) } else { None }).collect();
    let tokens_per_second = steps.iter().map(|step| step.tokens_per_second).sum::<f64>() / steps.len().max(1) as f64;
    let mut taps: Vec<String> = shape.taps.layers.iter().map(ToString::to_string).collect();
    taps.extend(shape.taps.final_norm.then(|| "final".to_owned()));
    context! {
        job => manifest.lineage.job.as_str(),
        base => manifest.base.name.as_str(),
        digest => manifest.digest.as_str(),
        written_at => report.written_at.as_str(),
        losses => context! {
            base => metrics.base_eval_loss.map(loss),
            head => metrics.eval_loss.map(loss),
            train => metrics.train_loss.map(loss),
            general => metrics.general_loss.map(loss),
            base_general => metrics.base_general_loss.map(loss),
            base_probability => metrics.base_eval_loss.map(probability),
            head_probability => metrics.eval_loss.map(probability),
        },
        accuracy => metrics.eval_accuracy.map(|share| format!("{:.1} %", 100.0 * share)),
        written_step => report.written_step,
        charts => context! {
            loss => Value::from_safe_string(loss_chart(&steps, &evaluations)),
            rate => Value::from_safe_string(rate_chart(&steps)),
        },
        figures => context! {
            parameters => millions(manifest.parameters),
            head_bytes => bytes(report.head_bytes),
            seconds => duration(metrics.train_seconds.round() as u64),
            steps => manifest.lineage.steps,
            tokens_per_second => format!("{tokens_per_second:.0}"),
            anonymous => bytes(metrics.peak_anonymous_bytes),
            resident => bytes(report.peak_resident_bytes),
            cache => bytes(report.cache_bytes),
        },
        examples => report.examples.iter().map(|example| context! {
            prompt => example.prompt.as_str(), expected => example.expected.as_str(), base => example.base.as_str(), head => example.head.as_str(),
        }).collect::<Vec<_>>(),
        confusion => confusion(report),
        unit => (shape.task == Task::Regression).then_some("Squared error, in variances of the training labels,"),
        evaluation => metrics.evaluation.iter().map(|(name, figure)| context! {
            name => words(name),
            value => format!("{:.3}", figure.value), low => format!("{:.3}", figure.low), high => format!("{:.3}", figure.high),
        }).collect::<Vec<_>>(),
        unmet => metrics.unmet_thresholds.clone(),
        data => [("training", Some(report.train)), ("held out", report.evaluation)].into_iter().filter_map(|(name, counts)| Some(data_row(name, counts?))).collect::<Vec<_>>(),
        evaluations => evaluations.iter().map(|line| context! {
            step => line.step,
            epoch => format!("{:.2}", line.epoch),
            loss => loss(line.eval_loss),
            general => line.general_loss.map(loss),
            accuracy => line.eval_accuracy.map(|share| format!("{:.1} %", 100.0 * share)),
            seconds => format!("{:.1} s", line.eval_seconds),
            written => line.step == report.written_step,
        }).collect::<Vec<_>>(),
        seed => manifest.lineage.seed,
        averaged => manifest.lineage.averaged_seeds.clone(),
        metric => metrics.seeds.iter().any(|one| one.figure.is_some()).then_some(words(report.metric)),
        seeds => metrics.seeds.iter().map(|one| context! {
            seed => one.seed, steps => one.steps, loss => one.eval_loss.map(loss), general => one.general_loss.map(loss),
            figure => one.figure.map(|figure| format!("{figure:.3}")),
        }).collect::<Vec<_>>(),
        lineage => lineage(report, &taps.join(", ")),
    }
}

/// A figure's name, for people.
fn words(name: &str) -> &str {
    NAMES.iter().find(|(known, _)| *known == name).map_or(name, |(_, words)| words)
}

fn loss_chart(steps: &[&StepLine], evaluations: &[&EvaluationLine]) -> String {
    let last = steps.last().map_or(0.0, |step| step.step as f64);
    let train: Vec<_> = steps.iter().map(|step| (step.step as f64, step.loss)).collect();
    let smoothed = chart::smooth(&train, steps.len() / 50);
    let held_out: Vec<_> = evaluations.iter().map(|line| (line.step as f64, line.eval_loss)).collect();
    let base = evaluations.iter().find_map(|line| line.base_eval_loss);
    let mut series = vec![
        Series { class: "raw", points: train, ..Series::default() },
        Series { class: "train", label: "training".to_owned(), points: smoothed, dots: false },
    ];
    if let Some(base) = base {
        series.push(Series { class: "base", label: format!("base {base:.3}"), points: vec![(0.0, base), (last, base)], dots: false });
    }
    if let Some((_, now)) = held_out.last() {
        series.push(Series { class: "held-out", label: format!("head {now:.3}"), points: held_out, dots: true });
    }
    chart::lines(&series, last, 340.0, "loss over optimizer steps", |value| format!("{value:.2}"))
}

fn rate_chart(steps: &[&StepLine]) -> String {
    let last = steps.last().map_or(0.0, |step| step.step as f64);
    let rates = Series {
        class: "rate",
        label: "rate".to_owned(),
        points: steps.iter().map(|step| (step.step as f64, step.lr)).collect(),
        dots: false,
    };
    chart::lines(&[rates], last, 120.0, "learning rate over optimizer steps", |value| format!("{value:.4}"))
}

fn confusion(report: &Report<'_>) -> Value {
    let labels = &report.manifest.shape.labels;
    let rows = labels.iter().zip(report.confusion).map(|(label, row)| {
        let all = row.iter().sum::<u64>().max(1);
        let cells: Vec<Value> = row.iter().map(|&count| context! { count => count, share => count * 100 / all }).collect();
        context! { label => label, cells => cells }
    });
    context! { labels => labels, rows => rows.collect::<Vec<_>>() }
}

fn data_row(name: &str, counts: &Counts) -> Value {
    context! {
        name => name, samples => counts.samples, tokens => counts.tokens, targets => counts.targets, longest => counts.longest,
        truncated => counts.truncated, left_out => counts.skipped + counts.emptied, refused => counts.refused, refusals => counts.refusals.clone(),
    }
}

/// (name, value) pairs: everything needed to tell this head from another.
fn lineage(report: &Report<'_>, taps: &str) -> Vec<(&'static str, String)> {
    let (manifest, shape, lineage) = (report.manifest, &report.manifest.shape, &report.manifest.lineage);
    let mut pairs = vec![
        ("head", manifest.digest.clone()),
        ("base weights", manifest.base.identity.weights.clone()),
        ("tokenizer", manifest.base.identity.tokenizer.clone()),
        ("computed with", manifest.numerics.key()),
        ("taps", taps.to_owned()),
        ("shape", format!("width {}, {} blocks, {} attention heads, window {}", shape.width, shape.blocks, shape.heads, shape.window)),
        ("gate, alpha", format!("{}, {}", if shape.gate { "on" } else { "off" }, shape.alpha)),
        ("training data", lineage.train_data.clone()),
    ];
    pairs.extend(lineage.evaluation_data.clone().map(|digest| ("evaluation data", digest)));
    pairs.push(("seed", lineage.seed.to_string()));
    pairs.extend(lineage.init_head.clone().map(|digest| ("started from head", digest)));
    pairs.push(("worker", lineage.worker_version.clone()));
    pairs
}

fn loss(value: f64) -> String {
    format!("{value:.3}")
}

/// What a loss means: the geometric mean of the probability given to the right answer.
fn probability(loss: f64) -> String {
    format!("{:.0} %", 100.0 * (-loss).exp())
}

fn millions(count: u64) -> String {
    match count {
        0..10_000 => count.to_string(),
        10_000..1_000_000 => format!("{:.0} k", count as f64 / 1e3),
        _ => format!("{:.2} M", count as f64 / 1e6),
    }
}

/// `12 MiB`.
pub fn bytes(count: u64) -> String {
    match count {
        0..1_048_576 => format!("{:.0} KiB", count as f64 / 1024.0),
        1_048_576..1_073_741_824 => format!("{:.0} MiB", count as f64 / 1_048_576.0),
        _ => format!("{:.2} GiB", count as f64 / 1_073_741_824.0),
    }
}
