//! Optimizers and fifty steps against PyTorch; resuming.

use std::sync::Arc;

use carryon_crds::job::{Optimizer, StateDtype, Training, WeightDtype};
use carryon_worker::head::{Gradients, Weight, Weights, init};
use carryon_worker::kernel::Threads;
use carryon_worker::train::optim::{Moment, OptimError, OptimizerState, Optimizers, clip_norm};
use carryon_worker::train::schedule::Schedule;

use super::fixtures::{Case, assert_close, fixture, tensors};
use super::loss_of;

fn training(optim: Optimizer) -> Training {
    Training { optim, ..Training::default() }
}

/// Steps the parameters `{kind}.{name}` of the fixture through both gradients and compares after each.
fn follow(kind: &str, optim: Optimizer) {
    let fixture = tensors(&fixture("optimizers.safetensors")).0;
    let prefix = format!("{kind}.");
    let names: Vec<&str> = fixture.keys().filter_map(|key| key.strip_prefix(&prefix)?.strip_suffix(".0")).collect();
    assert!(names.len() > 1);
    let mut weights: Weights = names.iter().map(|name| (name.to_string(), fixture[&format!("{kind}.{name}.0")].clone())).collect();
    let mut optimizers = Optimizers::new(&training(optim));
    for step in [1, 2] {
        let gradients = names
            .iter()
            .map(|name| (name.to_string(), fixture[&format!("{kind}.{name}.grad.{step}")].values.floats().into_owned()))
            .collect();
        let before = weights.clone();
        optimizers.step(&Threads::new(2), &mut weights, gradients, 1.0).unwrap();
        for name in &names {
            let old = before[*name].values.floats();
            let moved = |weight: &Weight| -> Vec<f32> { weight.values.floats().iter().zip(&*old).map(|(new, old)| new - old).collect() };
            let expected = &fixture[&format!("{kind}.{name}.{step}")];
            assert_close(name, &weights[*name].values.floats(), &expected.values.floats(), 1e-6);
            assert_close(&format!("update of {name}"), &moved(&weights[*name]), &moved(expected), 2e-4);
        }
    }
}

#[test]
fn muon_steps_are_those_of_pytorch() {
    follow("muon", Optimizer::Muon);
}

#[test]
fn adamw_steps_are_those_of_pytorch() {
    follow("adamw", Optimizer::AdamW);
}

/// The head of the fixture with its three batches, each with weights and LM head.
fn batches() -> (Weights, Vec<Case>) {
    let case = Case::load("gated");
    let (floats, integers) = tensors(&fixture("training_batches.safetensors"));
    let batch = |index: usize| Case {
        lm_head: case.lm_head.clone(),
        ..Case::batch_of(case.shape.clone(), &format!("{index}."), &floats, &integers)
    };
    (case.weights.clone(), (0..3).map(batch).collect())
}

struct Run {
    weights: Weights,
    optimizers: Optimizers,
    schedule: Schedule,
    threads: Arc<Threads>,
    losses: Vec<f64>,
}

impl Run {
    fn steps(&mut self, batches: &[Case], steps: std::ops::Range<u64>) {
        for step in steps {
            let (loss, mut gradients) = loss_of(&batches[step as usize % batches.len()], &self.weights, &self.threads);
            clip_norm(&mut gradients, 1.0);
            self.optimizers.step(&self.threads, &mut self.weights, gradients, self.schedule.factor(step)).unwrap();
            self.losses.push(loss);
        }
    }
}

fn run(threads: usize) -> (Run, Vec<Case>) {
    let (weights, batches) = batches();
    let schedule = Schedule { warmup: 10, total: 50, min_ratio: 0.1 };
    let optimizers = Optimizers::new(&training(Optimizer::Muon));
    (Run { weights, optimizers, schedule, threads: Threads::new(threads), losses: Vec::new() }, batches)
}

#[test]
fn fifty_losses_are_those_of_pytorch() {
    let settings: serde_json::Value = serde_json::from_slice(&fixture("training.json")).unwrap();
    let expected: Vec<f64> = serde_json::from_value(settings["losses"].clone()).unwrap();
    let (mut run, batches) = run(2);
    run.steps(&batches, 0..expected.len() as u64);
    for (step, (loss, expected)) in run.losses.iter().zip(&expected).enumerate() {
        assert!((loss / expected - 1.0).abs() < 1e-4, "step {step}: {loss}, expected {expected}");
    }
}

#[test]
fn a_resumed_run_has_the_bits_of_an_unbroken_one_with_any_threads() {
    let (mut unbroken, batches) = run(2);
    unbroken.steps(&batches, 0..6);
    let (mut first, _) = run(1);
    first.steps(&batches, 0..3);
    let (mut second, _) = run(2);
    second.weights = first.weights.clone();
    second.optimizers.restore(&second.weights, first.optimizers.state(&first.weights)).unwrap();
    second.steps(&batches, 3..6);
    assert_eq!(second.weights, unbroken.weights);
    assert_eq!(second.optimizers.state(&second.weights), unbroken.optimizers.state(&unbroken.weights));
}

#[test]
fn a_weight_changed_on_the_way_back_gets_the_bits_of_a_whole_step() {
    let threads = Threads::new(2);
    for (optim, dtype, weight_dtype) in [
        (Optimizer::Muon, StateDtype::Int8, WeightDtype::Bfloat16),
        (Optimizer::AdamW, StateDtype::Bfloat16, WeightDtype::Float32),
        (Optimizer::AdamW, StateDtype::Float32, WeightDtype::Bfloat16),
    ] {
        let (mut whole, batches) = batches();
        // Large enough for other types than f32.
        let more = |values: &[f32]| -> Vec<f32> { values.iter().copied().cycle().take(64 * 96).collect() };
        whole.insert("large".into(), Weight::new(vec![64, 96], more(&whole["output.weight"].values.floats())));
        whole = init::in_dtype(whole, weight_dtype);
        let mut parts = whole.clone();
        let training = Training { optim_state_dtype: dtype, weight_dtype, ..training(optim) };
        let (mut together, mut apart) = (Optimizers::new(&training), Optimizers::new(&training));
        for case in &batches {
            let (_, mut gradients) = loss_of(case, &whole, &threads);
            gradients.insert("large".into(), more(&gradients["output.weight"]));
            together.step(&threads, &mut whole, gradients.clone(), 0.5).unwrap();
            apart.begin();
            for (name, weight) in parts.iter_mut().rev() {
                apart.update(&threads, name, weight, gradients[name].clone(), 0.5);
            }
        }
        assert_eq!(parts, whole, "{optim:?} {dtype:?}");
        assert_eq!(apart.state(&parts), together.state(&whole));
    }
}

/// The first step from nothing leaves a tenth of the gradient and a thousandth of its square.
#[test]
fn codes_of_8_bits_are_the_nearest_of_bitsandbytes_map() {
    let fixture = tensors(&fixture("optimizers.safetensors")).0;
    let gradient = &fixture["int8.gradient"];
    let mut weights = Weights::from([("w".to_owned(), Weight::filled(gradient.shape.clone(), 0.0))]);
    let training = Training { optim_state_dtype: StateDtype::Int8, ..training(Optimizer::AdamW) };
    let mut optimizers = Optimizers::new(&training);
    optimizers.step(&Threads::new(2), &mut weights, [("w".to_owned(), gradient.values.floats().into_owned())].into(), 1.0).unwrap();
    let state = optimizers.state(&weights);
    for moment in ["first_moment", "second_moment"] {
        let Moment::Int8 { codes, scales, .. } = &*state.tensors[&format!("adamw.w.{moment}")].1 else { panic!("{moment}") };
        assert_close(moment, scales, &fixture[&format!("int8.{moment}.scales")].values.floats(), 1e-6);
        // A value that lies half way may go either way.
        let expected = fixture[&format!("int8.{moment}.codes")].values.floats();
        let other = codes.iter().zip(&*expected).filter(|(code, expected)| f32::from(**code) != **expected).count();
        assert!(other * 1000 <= codes.len(), "{moment}: {other} of {} codes", codes.len());
        assert!(codes.iter().zip(&*expected).all(|(code, expected)| (f32::from(*code) - expected).abs() <= 1.0));
    }
}

#[test]
fn states_of_another_head_are_refused_by_name() {
    let (mut run, batches) = run(1);
    run.steps(&batches, 0..1);
    let state = run.optimizers.state(&run.weights);
    assert_eq!(state.steps, 1);
    let refusal = |change: &dyn Fn(&mut OptimizerState)| {
        let mut changed = state.clone();
        change(&mut changed);
        Optimizers::new(&training(Optimizer::Muon)).restore(&run.weights, changed).unwrap_err().to_string()
    };
    let name = "muon.output.weight.momentum";
    assert!(refusal(&|state| drop(state.tensors.remove(name))).contains("\"muon.output.weight.momentum\" is missing"));
    assert!(refusal(&|state| state.tensors.get_mut(name).unwrap().0.reverse()).contains("another shape"));
    assert!(
        refusal(&|state| drop(state.tensors.insert("muon.x.momentum".into(), (vec![1], Moment::Plain(vec![0.0].into()).into()))))
            .contains("belongs to no parameter")
    );
}

#[test]
fn a_step_without_a_gradient_changes_nothing() {
    let (mut run, _) = run(1);
    let before = run.weights.clone();
    let refusal = run.optimizers.step(&run.threads, &mut run.weights, Gradients::new(), 1.0);
    assert_eq!(refusal, Err(OptimError::Gradient("blocks.0.input_layernorm.weight".into())));
    assert_eq!(run.weights, before);
}
