//! The head against PyTorch, and its invariants: bits do not depend on company.

#![allow(clippy::unwrap_used)]

mod artifact;
#[path = "../common/mod.rs"]
mod common;
mod fixtures;
mod logits;
mod loss;
mod training;

use std::collections::BTreeMap;
use std::sync::Arc;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::HeadShape;
use carryon_worker::head::loss::{Against, LossOutput, LossWeights, lm_loss};
use carryon_worker::head::pass::{Keep, PackedBatch, Pass};
use carryon_worker::head::{Runner, Weights, init};
use carryon_worker::kernel::{Backend, Backward, Cpu, PageTable};
use carryon_worker::numbers::RowFormat;
use carryon_worker::train::optim;
use common::engine::{Pages, candle, class_logits, cpu, head_outputs};
use fixtures::*;

fn runner<B: Backend>(case: &Case, backend: &B) -> Runner<B> {
    Runner::from_weights(&case.shape, &case.weights, backend.clone()).unwrap()
}

/// Outputs of all sequences together.
fn whole<B: Backend>(backend: &B, runner: &Runner<B>, case: &Case) -> Vec<f32> {
    let mut tables = vec![PageTable::default(); case.lengths.len()];
    let mut sequences: Vec<_> = case.lengths.iter().zip(&mut tables).map(|(rows, table)| (runner, *rows, table)).collect();
    head_outputs(&mut Pages::new(backend, runner.page_layout()), &case.tap_slices(), &mut sequences)
}

/// Gradients by name, on the host.
type Gradients = BTreeMap<String, Vec<f32>>;

fn loss_of<B: Backward>(case: &Case, weights: &Weights, backend: &B) -> (f64, Gradients) {
    let output = lm_loss_of(case, &trained(case, weights, backend), backend);
    let scale = case.shape.alpha as f32 / case.rows.len() as f32;
    let by_delta: Vec<f32> = output.gradient.iter().map(|gradient| gradient * scale).collect();
    let mean = output.loss.iter().map(|loss| f64::from(*loss)).sum::<f64>() / case.rows.len() as f64;
    (mean, gradients(case, weights, backend, &by_delta, Keep::All))
}

/// What training computes of the head's output.
fn trained<B: Backward>(case: &Case, weights: &Weights, backend: &B) -> Vec<f32> {
    let weights = backend.train(Arc::new(weights.clone())).unwrap();
    let pass = Pass::new(&case.shape, backend.clone()).unwrap();
    backend.hand_over(pass.forward(&weights, &case.batch(), Keep::Nothing).unwrap().output).unwrap()
}

fn gradients<B: Backward>(case: &Case, weights: &Weights, backend: &B, by_output: &[f32], keep: Keep) -> Gradients {
    let (pass, batch) = (Pass::new(&case.shape, backend.clone()).unwrap(), case.batch());
    let on_device = |weights: Weights| Arc::unwrap_or_clone(backend.train(Arc::new(weights)).unwrap());
    let (mut weights, broken) = (on_device(weights.clone()), on_device(broken(weights)));
    let forward = pass.forward(&weights, &batch, keep).unwrap();
    let width = by_output.len() / B::count(&forward.output);
    let mut gradients = Gradients::new();
    // Nothing reads a weight again whose gradient is known.
    let mut take = |name: &str, weight: &mut B::Trained, gradient: B::Rows| {
        *weight = broken[name].clone();
        assert!(gradients.insert(name.to_owned(), backend.hand_over(gradient)?).is_none(), "{name} twice");
        Ok(())
    };
    let by_output = backend.receive(by_output.to_vec(), width).unwrap();
    pass.backward(&mut weights, &batch, forward.saved.unwrap(), by_output, &mut take).unwrap();
    gradients
}

/// Gradients on a device.
fn received<B: Backward>(backend: &B, weights: &Weights, gradients: Gradients) -> carryon_worker::head::Gradients<B> {
    let receive = |(name, gradient): (String, Vec<f32>)| {
        let width = weights[&name].shape.last().copied().unwrap_or(1);
        (name, backend.receive(gradient, width).unwrap())
    };
    gradients.into_iter().map(receive).collect()
}

/// Weights of which nothing can be computed.
fn broken(weights: &Weights) -> Weights {
    let mut broken = weights.clone();
    broken.values_mut().for_each(|weight| weight.values.floats_mut().fill(f32::NAN));
    broken
}

fn lm_loss_of<B: Backend>(case: &Case, delta: &[f32], backend: &B) -> LossOutput {
    let ((v, d), dtype) = (case.lm_head_shape(), Dtype::Float32);
    let forward = backend.matrix(v, d, dtype.into(), &|row, values| values.copy_from_slice(&case.lm_head[row * d..][..d])).unwrap();
    let backward = backend.transposed(&forward).unwrap();
    let weights = LossWeights { forward: &forward, backward: Some(&backward), dtype, softcap: None };
    lm_loss(backend, &weights, &case.target_states(), Some((delta, case.shape.alpha as f32)), Against::Tokens(&case.targets)).unwrap()
}

#[test]
fn loss_and_every_gradient_are_those_of_pytorch() {
    every_gradient(&cpu(2));
    every_gradient(&candle());
}

fn every_gradient<B: Backward>(backend: &B) {
    for name in ["gated", "plain"] {
        let case = Case::load(name);
        let (loss, gradients) = loss_of(&case, &case.weights, backend);
        assert!((loss / f64::from(case.expected["loss"].values.floats()[0]) - 1.0).abs() < 1e-5, "{name}: loss {loss}");
        assert_gradients(name, &gradients, &case.expected);
    }
}

#[test]
fn gradients_of_products_in_bf16_point_where_those_of_pytorch_do() {
    for name in ["gated", "plain"] {
        let case = Case::load(name);
        let gradients = [1, 2, 3].map(|threads| loss_of(&case, &case.weights, &cpu(threads).training_in(Dtype::Bfloat16)));
        assert!(gradients.iter().all(|other| *other == gradients[0]), "{name}: with any threads the same bits");
        let [(loss, found), ..] = &gradients;
        assert!((loss / f64::from(case.expected["loss"].values.floats()[0]) - 1.0).abs() < 1e-3, "{name}: loss {loss}");
        for (weight, found) in found {
            let cosine = loss::cosine(found, &case.expected[weight].values.floats());
            assert!(cosine >= 0.999, "{name}: cosine of {weight} {cosine}");
        }
    }
}

#[test]
fn classifier_gradients_are_those_of_pytorch() {
    let case = Case::load("classifier");
    follows_pytorch(&case);
    let shape = HeadShape { format_version: 2, pooled_tokens: Some(5), ..case.shape.clone() };
    let expected = tensors(&fixture("head_last_tokens_expected.safetensors")).0;
    assert_ne!(expected["output"], case.expected["output"]);
    follows_pytorch(&Case { shape, expected, ..case });
}

/// In training and in serving, a classifier's logits and gradients.
fn follows_pytorch(case: &Case) {
    let logits = classifier_gradients(case, &cpu(2));
    classifier_gradients(case, &candle());
    let served = class_logits(&cpu(1), &runner(case, &cpu(1)), &case.tap_slices(), &case.lengths);
    assert_eq!(bits(&served), bits(&logits));
    let other = class_logits(&candle(), &runner(case, &candle()), &case.tap_slices(), &case.lengths);
    assert_close("logits of candle", &other, &case.expected["output"].values.floats(), 1e-5);
}

fn classifier_gradients<B: Backward>(case: &Case, backend: &B) -> Vec<f32> {
    let labels = case.shape.labels.len();
    let logits = trained(case, &case.weights, backend);
    assert_close("logits", &logits, &case.expected["output"].values.floats(), 1e-5);
    let (mut loss, mut by_logits, share) = (0.0, logits.clone(), 1.0 / case.labels.len() as f32);
    for (row, &label) in by_logits.chunks_exact_mut(labels).zip(&case.labels) {
        let sum: f32 = row.iter().map(|logit| logit.exp()).sum();
        loss += share * (sum.ln() - row[label as usize]);
        row.iter_mut().for_each(|logit| *logit = share * logit.exp() / sum);
        row[label as usize] -= share;
    }
    assert!((loss / case.expected["loss"].values.floats()[0] - 1.0).abs() < 1e-5);
    assert_gradients("classifier", &gradients(case, &case.weights, backend, &by_logits, Keep::All), &case.expected);
    logits
}

#[test]
fn runner_gives_the_output_of_pytorch_and_the_bits_of_training() {
    for name in ["gated", "plain"] {
        let case = Case::load(name);
        let served = whole(&cpu(1), &runner(&case, &cpu(1)), &case);
        assert_close(name, &served, &case.expected["output"].values.floats(), 1e-5);
        let other = whole(&candle(), &runner(&case, &candle()), &case);
        assert_close(name, &other, &case.expected["output"].values.floats(), 1e-5);
        let trained = trained(&case, &case.weights, &cpu(2));
        let d = case.hidden_size();
        let rows: Vec<f32> = case.rows.iter().flat_map(|row| served[*row as usize * d..][..d].to_vec()).collect();
        assert_eq!(bits(&rows), bits(&trained), "{name}");
    }
}

#[test]
fn a_sequence_has_the_same_bits_alone_ragged_chunked_and_token_by_token() {
    let case = Case::load("gated");
    let d = case.hidden_size();
    let ragged = whole(&cpu(2), &runner(&case, &cpu(2)), &case);
    let (cpu, runner) = (cpu(1), runner(&case, &cpu(1)));
    for (first, length) in case.sequences() {
        for chunk in [length, 5, 1] {
            let (mut pages, mut table) = (Pages::new(&cpu, runner.page_layout()), PageTable::default());
            let mut alone = Vec::new();
            for start in (0..length).step_by(chunk) {
                let rows = chunk.min(length - start);
                let taps: Vec<&[f32]> = case.taps.iter().map(|tap| &tap[(first + start) * d..][..rows * d]).collect();
                alone.extend(head_outputs(&mut pages, &taps, &mut [(&runner, rows, &mut table)]));
            }
            assert_eq!(bits(&alone), bits(&ragged[first * d..][..length * d]), "rows {first}.., chunks of {chunk}");
        }
    }
}

#[test]
fn bits_stay_in_a_sliding_window() {
    let mut case = Case::load("gated");
    case.shape.window = 7;
    let d = case.hidden_size();
    let (cpu, runner_of) = (cpu(2), runner::<Cpu>);
    let runner = runner_of(&case, &cpu);
    let all = whole(&cpu, &runner, &case);
    let (first, length) = case.sequences().into_iter().max_by_key(|(_, length)| *length).unwrap();
    let (mut pages, mut table) = (Pages::new(&cpu, runner.page_layout()), PageTable::default());
    for position in 0..length {
        let taps: Vec<&[f32]> = case.taps.iter().map(|tap| &tap[(first + position) * d..][..d]).collect();
        let row = head_outputs(&mut pages, &taps, &mut [(&runner, 1, &mut table)]);
        assert_eq!(bits(&row), bits(&all[(first + position) * d..][..d]), "position {position}");
    }
    let other = whole(&candle(), &Runner::from_weights(&case.shape, &case.weights, candle()).unwrap(), &case);
    assert_close("candle, in a window", &other, &all, 1e-5);
    // The window is felt, and training slides as serving does.
    let full = whole(&cpu, &runner_of(&Case::load("gated"), &cpu), &case);
    assert_ne!(bits(&full), bits(&all));
    let trained = trained(&case, &case.weights, &cpu);
    let rows: Vec<f32> = case.rows.iter().flat_map(|row| all[*row as usize * d..][..d].to_vec()).collect();
    assert_eq!(bits(&rows), bits(&trained));
}

#[test]
fn interleaved_heads_do_not_influence_each_other_and_nan_stays_in_its_own() {
    let (gated, plain) = (Case::load("gated"), Case::load("plain"));
    let broken = broken(&gated.weights);
    let cpu = cpu(2);
    let runners = [(&gated, &gated.weights), (&plain, &plain.weights), (&gated, &broken)]
        .map(|(case, weights)| Runner::from_weights(&case.shape, weights, cpu.clone()).unwrap());
    let alone = runners.each_ref().map(|runner| whole(&cpu, runner, &gated));
    let d = gated.hidden_size();
    let (first, length) = gated.sequences()[2];
    let mut pages = runners.each_ref().map(|runner| Pages::new(&cpu, runner.page_layout()));
    let mut tables = [(); 3].map(|()| PageTable::default());
    for position in 0..length {
        let taps: Vec<&[f32]> = gated.taps.iter().map(|tap| &tap[(first + position) * d..][..d]).collect();
        for (((runner, pages), table), alone) in runners.iter().zip(&mut pages).zip(&mut tables).zip(&alone) {
            let row = head_outputs(pages, &taps, &mut [(runner, 1, table)]);
            assert_eq!(bits(&row), bits(&alone[(first + position) * d..][..d]));
        }
    }
    // Heads of one shape in one call, on pages of one arena.
    assert!(runners[0].runs_with(&runners[2]) && !runners[0].runs_with(&runners[1]));
    let mut tables = [(); 3].map(|()| PageTable::default());
    let [one, two, three] = &mut tables;
    let twice = |rows: std::ops::Range<usize>| -> Vec<Vec<f32>> {
        gated.taps.iter().map(|tap| [&tap[rows.start * d..rows.end * d]; 3].concat()).collect()
    };
    let taps = twice(first..first + length);
    let taps: Vec<&[f32]> = taps.iter().map(Vec::as_slice).collect();
    let mut sequences = [(&runners[0], length, one), (&runners[2], length, two), (&runners[0], length, three)];
    let together = head_outputs(&mut pages[0], &taps, &mut sequences);
    for (place, own) in [0, 2, 0].into_iter().enumerate() {
        assert_eq!(bits(&together[place * length * d..][..length * d]), bits(&alone[own][first * d..][..length * d]));
    }
    assert!(alone[2].iter().all(|value| value.is_nan()) && alone[0].iter().all(|value| value.is_finite()));
}

#[test]
fn a_sequence_of_nan_leaves_its_neighbours_alone() {
    let mut case = Case::load("gated");
    let (cpu, runner) = (cpu(2), runner(&case, &cpu(2)));
    let clean = whole(&cpu, &runner, &case);
    let d = case.hidden_size();
    let (first, length) = case.sequences()[0];
    case.taps.iter_mut().for_each(|tap| tap[first * d..(first + length) * d].fill(f32::NAN));
    let dirty = whole(&cpu, &runner, &case);
    assert_eq!(bits(&dirty[length * d..]), bits(&clean[length * d..]));
}

#[test]
fn accumulated_micro_batches_equal_one_batch() {
    let case = Case::load("gated");
    let cpu = cpu(2);
    let (_, together) = loss_of(&case, &case.weights, &cpu);
    let mut total = carryon_worker::head::Gradients::<Cpu>::new();
    for half in [0..2, 2..4] {
        let part = case.part(half);
        let mut gradients = received(&cpu, &case.weights, loss_of(&part, &case.weights, &cpu).1);
        let share = part.rows.len() as f32 / case.rows.len() as f32;
        optim::scale(&cpu, &mut gradients, share).unwrap();
        gradients.into_iter().for_each(|(name, gradient)| optim::accumulate(&cpu, &mut total, &name, gradient).unwrap());
    }
    for (name, gradient) in &together {
        assert_close(name, &cpu.read(&total[name]).unwrap(), gradient, 1e-5);
    }
}

#[test]
fn gradients_are_the_slopes_of_the_loss() {
    let case = Case::load("gated");
    let cpu = cpu(2);
    let (_, gradients) = loss_of(&case, &case.weights, &cpu);
    for (name, gradient) in &gradients {
        // Along the gradient itself the slope is its squared norm.
        let norm = gradient.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>();
        let step = 1e-2 / norm.sqrt();
        let shifted = |direction: f64| {
            let mut weights = case.weights.clone();
            let values = weights.get_mut(name).unwrap().values.floats_mut();
            values.iter_mut().zip(gradient).for_each(|(value, slope)| *value += (direction * step * f64::from(*slope)) as f32);
            loss_of(&case, &weights, &cpu).0
        };
        let slope = (shifted(1.0) - shifted(-1.0)) / (2.0 * step);
        assert!((slope / norm - 1.0).abs() < 2e-2, "{name}: slope {slope}, squared norm {norm}");
    }
}

#[test]
fn initial_weights_change_nothing_and_still_learn() {
    let case = Case::load("gated");
    let cpu = cpu(2);
    let weights = init::weights(&case.shape, 7);
    assert_eq!(weights, init::weights(&case.shape, 7));
    assert_ne!(weights, init::weights(&case.shape, 8));
    let runner = Runner::from_weights(&case.shape, &weights, cpu.clone()).unwrap();
    assert!(whole(&cpu, &runner, &case).iter().all(|value| *value == 0.0));
    let (_, gradients) = loss_of(&case, &weights, &cpu);
    assert!(gradients["output.weight"].iter().any(|value| *value != 0.0));
}

#[test]
fn what_is_computed_again_has_the_same_bits() {
    computed_again(&cpu(2));
    computed_again(&candle());
}

fn waves(count: usize) -> Vec<f32> {
    (0..count).map(|index| (index as f32).sin()).collect()
}

fn computed_again<B: Backward>(backend: &B) {
    for name in ["gated", "plain", "classifier"] {
        let case = Case::load(name);
        let by_output = waves(trained(&case, &case.weights, backend).len());
        let [all, inputs] = [Keep::All, Keep::Inputs].map(|keep| gradients(&case, &case.weights, backend, &by_output, keep));
        assert_eq!(all.keys().collect::<Vec<_>>(), case.weights.keys().collect::<Vec<_>>());
        all.iter().for_each(|(weight, gradient)| assert_eq!(bits(gradient), bits(&inputs[weight]), "{name}: {weight}"));
    }
}

/// Sequences longer than a tile of queries, in a window, whose rows travel in every format.
#[test]
fn another_device_goes_the_same_way_back_through_long_sequences_of_every_format() {
    let mut case = Case::load("gated");
    let d = case.hidden_size();
    case.shape.window = 200;
    case.lengths = vec![300, 3, 521];
    case.rows = (0..824).step_by(5).collect();
    case.taps = (0..case.taps.len()).map(|tap| (0..824 * d).map(|index| ((index * (tap + 2)) as f32 * 0.7).sin()).collect()).collect();
    let by_output = waves(case.rows.len() * d);
    for format in [RowFormat::Plain(Dtype::Float32), RowFormat::Plain(Dtype::Bfloat16), RowFormat::Float8] {
        case.format = format;
        let (own, other) = (cpu(2), candle());
        assert_close("output", &trained(&case, &case.weights, &other), &trained(&case, &case.weights, &own), 1e-4);
        let expected = gradients(&case, &case.weights, &own, &by_output, Keep::All);
        for (name, gradient) in gradients(&case, &case.weights, &other, &by_output, Keep::All) {
            assert_close(&format!("{format:?} {name}"), &gradient, &expected[&name], 1e-3);
        }
    }
}

#[test]
fn misfits_are_refused() {
    let case = Case::load("plain");
    let pass = Pass::new(&case.shape, cpu(1)).unwrap();
    let refusal = |change: &dyn Fn(&mut PackedBatch)| {
        let mut batch = case.batch();
        change(&mut batch);
        pass.forward(&case.weights, &batch, Keep::Nothing).err().unwrap().to_string()
    };
    assert!(refusal(&|batch| batch.rows.push(42)).contains("row 42 of 42"));
    assert!(refusal(&|batch| drop(batch.taps.pop())).contains("has 2 taps, the head 3"));
    assert!(refusal(&|batch| batch.lengths[0] += 1).contains("tap 0 does not have"));
    assert!(refusal(&|batch| batch.formats[0] = RowFormat::Plain(Dtype::Bfloat16)).contains("tap 0 does not have"));
}
