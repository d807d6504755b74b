//! Optimizers and fifty steps against PyTorch; resuming.

use std::collections::BTreeMap;
use std::sync::Arc;

use carryon_crds::job::{Optimizer, StateDtype, Training, WeightDtype};
use carryon_crds::pool::Dtype;
use carryon_worker::head::{Weight, Weights, init};
use carryon_worker::kernel::{Backward, Cpu, Trained};
use carryon_worker::train::optim::{Moment, OptimError, OptimizerState, Optimizers, clip_norm};
use carryon_worker::train::schedule::Schedule;

use super::common::engine::{candle, cpu};
use super::fixtures::{Case, assert_close, fixture, tensors};
use super::{Gradients, loss_of, received};

fn training(optim: Optimizer) -> Training {
    Training { optim, ..Training::default() }
}

/// Steps the parameters `{kind}.{name}` of the fixture through both gradients and compares after each.
fn follow<B: Backward>(kind: &str, optim: Optimizer, backend: &B) {
    let fixture = tensors(&fixture("optimizers.safetensors")).0;
    let prefix = format!("{kind}.");
    let names: Vec<&str> = fixture.keys().filter_map(|key| key.strip_prefix(&prefix)?.strip_suffix(".0")).collect();
    assert!(names.len() > 1);
    let mut weights: Weights = names.iter().map(|name| (name.to_string(), fixture[&format!("{kind}.{name}.0")].clone())).collect();
    let (mut optimizers, mut trained) = (Optimizers::new(&training(optim)), backend.train(Arc::new(weights.clone())).unwrap());
    for step in [1, 2] {
        let gradients: Gradients = names
            .iter()
            .map(|name| (name.to_string(), fixture[&format!("{kind}.{name}.grad.{step}")].values.floats().into_owned()))
            .collect();
        let before = weights;
        optimizers.step(backend, Arc::make_mut(&mut trained), received(backend, &before, gradients), 1.0).unwrap();
        weights = backend.trained(&trained).unwrap().as_ref().clone();
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
    follow("muon", Optimizer::Muon, &cpu(2));
    follow("muon", Optimizer::Muon, &candle());
}

#[test]
fn adamw_steps_are_those_of_pytorch() {
    follow("adamw", Optimizer::AdamW, &cpu(2));
    follow("adamw", Optimizer::AdamW, &candle());
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

struct Run<B: Backward> {
    weights: Arc<Trained<B>>,
    optimizers: Optimizers<B>,
    schedule: Schedule,
    backend: B,
    losses: Vec<f64>,
}

impl<B: Backward> Run<B> {
    fn steps(&mut self, batches: &[Case], steps: std::ops::Range<u64>) {
        for step in steps {
            let (backend, weights) = (&self.backend, self.weights());
            let (loss, gradients) = loss_of(&batches[step as usize % batches.len()], &weights, backend);
            let mut gradients = received(backend, &weights, gradients);
            drop(weights);
            clip_norm(backend, &mut gradients, 1.0).unwrap();
            self.optimizers.step(backend, Arc::make_mut(&mut self.weights), gradients, self.schedule.factor(step)).unwrap();
            self.losses.push(loss);
        }
    }

    fn weights(&self) -> Arc<Weights> {
        self.backend.trained(&self.weights).unwrap()
    }

    fn state(&self) -> OptimizerState {
        self.optimizers.state(&self.backend, &self.weights).unwrap()
    }
}

fn run<B: Backward>(backend: B) -> (Run<B>, Vec<Case>) {
    let (weights, batches) = batches();
    let weights = backend.train(weights.into()).unwrap();
    let schedule = Schedule { warmup: 10, total: 50, min_ratio: 0.1 };
    let optimizers = Optimizers::new(&training(Optimizer::Muon));
    (Run { weights, optimizers, schedule, backend, losses: Vec::new() }, batches)
}

#[test]
fn fifty_losses_are_those_of_pytorch() {
    fifty_losses(cpu(2));
    fifty_losses(candle());
}

fn fifty_losses<B: Backward>(backend: B) {
    let settings: serde_json::Value = serde_json::from_slice(&fixture("training.json")).unwrap();
    let expected: Vec<f64> = serde_json::from_value(settings["losses"].clone()).unwrap();
    let (mut run, batches) = run(backend);
    run.steps(&batches, 0..expected.len() as u64);
    for (step, (loss, expected)) in run.losses.iter().zip(&expected).enumerate() {
        assert!((loss / expected - 1.0).abs() < 1e-4, "step {step}: {loss}, expected {expected}");
    }
}

/// Three steps on one device and three on another, or the same.
fn resumed<A: Backward, B: Backward>(first: A, second: B) -> Run<B> {
    let ((mut first, batches), (mut second, _)) = (run(first), run(second));
    first.steps(&batches, 0..3);
    second.weights = second.backend.train(first.weights()).unwrap();
    second.optimizers.restore(&second.backend, &first.weights(), first.state()).unwrap();
    second.steps(&batches, 3..6);
    second
}

fn unbroken<B: Backward>(backend: B) -> Run<B> {
    let (mut run, batches) = run(backend);
    run.steps(&batches, 0..6);
    run
}

#[test]
fn a_resumed_run_has_the_bits_of_an_unbroken_one_with_any_threads() {
    let (resumed, unbroken) = (resumed(cpu(1), cpu(2)), unbroken(cpu(2)));
    assert_eq!(resumed.weights(), unbroken.weights());
    assert_eq!(resumed.state(), unbroken.state());
}

#[test]
fn a_run_goes_on_where_another_device_stopped() {
    let unbroken = unbroken(cpu(2)).weights();
    for (case, weights) in [
        ("stopped on candle", resumed(candle(), cpu(2)).weights()),
        ("goes on on candle", resumed(cpu(2), candle()).weights()),
        ("candle alone", resumed(candle(), candle()).weights()),
    ] {
        for (name, weight) in &*unbroken {
            assert_close(&format!("{case}: {name}"), &weights[name].values.floats(), &weight.values.floats(), 1e-4);
        }
    }
}

/// What a step leaves of weights and states that are rounded by chance, or to codes of 8 bits.
fn rounded<B: Backward>(backend: &B, training: &Training) -> (Weights, OptimizerState) {
    let wave = |phase: f32| (0..64 * 97).map(|index| (index as f32 * 0.37 + phase).sin()).collect::<Vec<_>>();
    let weights = Weights::from([("w".to_owned(), Weight::new(vec![64, 97], wave(0.0)))]);
    let weights = Arc::new(init::in_dtype(weights, training.weight_dtype));
    let (mut optimizers, mut trained) = (Optimizers::new(training), backend.train(weights.clone()).unwrap());
    for step in 1..=3 {
        let gradients = received(backend, &weights, [("w".to_owned(), wave(step as f32))].into());
        optimizers.step(backend, Arc::make_mut(&mut trained), gradients, 1.0).unwrap();
    }
    (backend.trained(&trained).unwrap().as_ref().clone(), optimizers.state(backend, &trained).unwrap())
}

#[test]
fn chance_is_the_same_on_every_device() {
    for (optim, dtype) in
        [(Optimizer::AdamW, StateDtype::Bfloat16), (Optimizer::Muon, StateDtype::Bfloat16), (Optimizer::AdamW, StateDtype::Int8)]
    {
        let training = Training { optim_state_dtype: dtype, weight_dtype: WeightDtype::Bfloat16, ..training(optim) };
        let ((own, states), (other, other_states)) = (rounded(&cpu(2), &training), rounded(&candle(), &training));
        // Sums differ in their last bits, so a few numbers fall to the other side.
        let alike =
            |name: &str, same: usize, count: usize| assert!(same * 100 >= count * 98, "{optim:?} {dtype:?} {name}: {same} of {count}");
        assert_eq!(states.tensors.keys().collect::<Vec<_>>(), other_states.tensors.keys().collect::<Vec<_>>());
        for (name, (shape, moment)) in &states.tensors {
            let (other_shape, other) = &other_states.tensors[name];
            assert_eq!(shape, other_shape);
            match (&**moment, &**other) {
                (Moment::Plain(own), Moment::Plain(other)) => {
                    let (own, other) = (own.floats(), other.floats());
                    alike(name, own.iter().zip(&*other).filter(|(own, other)| own == other).count(), own.len());
                }
                (Moment::Int8 { codes, scales, .. }, Moment::Int8 { codes: other, scales: other_scales, .. }) => {
                    alike(name, codes.iter().zip(other).filter(|(own, other)| own == other).count(), codes.len());
                    assert_close(name, other_scales, scales, 1e-5);
                }
                (own, other) => panic!("{name}: {own:?} and {other:?}"),
            }
        }
        let (own, other) = (own["w"].values.floats(), other["w"].values.floats());
        alike("weights", own.iter().zip(&*other).filter(|(own, other)| own == other).count(), own.len());
    }
}

#[test]
fn a_weight_changed_on_the_way_back_gets_the_bits_of_a_whole_step() {
    let cpu = cpu(2);
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
            let (_, mut gradients) = loss_of(case, &whole, &cpu);
            gradients.insert("large".into(), more(&gradients["output.weight"]));
            let gradients = received(&cpu, &whole, gradients);
            together.step(&cpu, &mut whole, gradients.clone(), 0.5).unwrap();
            apart.begin();
            for (name, weight) in parts.iter_mut().rev() {
                apart.update(&cpu, name, weight, gradients[name].clone(), 0.5).unwrap();
            }
        }
        assert_eq!(parts, whole, "{optim:?} {dtype:?}");
        assert_eq!(apart.state(&cpu, &parts).unwrap(), together.state(&cpu, &whole).unwrap());
    }
}

/// The first step from nothing leaves a tenth of the gradient and a thousandth of its square.
#[test]
fn codes_of_8_bits_are_the_nearest_of_bitsandbytes_map() {
    codes_of_8_bits(&cpu(2));
    codes_of_8_bits(&candle());
}

fn codes_of_8_bits<B: Backward>(backend: &B) {
    let fixture = tensors(&fixture("optimizers.safetensors")).0;
    let gradient = &fixture["int8.gradient"];
    let weights = Arc::new(Weights::from([("w".to_owned(), Weight::filled(gradient.shape.clone(), 0.0))]));
    let training = Training { optim_state_dtype: StateDtype::Int8, ..training(Optimizer::AdamW) };
    let mut optimizers = Optimizers::new(&training);
    let gradients = received(backend, &weights, [("w".to_owned(), gradient.values.floats().into_owned())].into());
    let mut trained = backend.train(weights).unwrap();
    optimizers.step(backend, Arc::make_mut(&mut trained), gradients, 1.0).unwrap();
    let state = optimizers.state(backend, &trained).unwrap();
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
    let (mut run, batches) = run(cpu(1));
    run.steps(&batches, 0..1);
    let state = run.state();
    assert_eq!(state.steps, 1);
    let refusal = |change: &dyn Fn(&mut OptimizerState)| {
        let mut changed = state.clone();
        change(&mut changed);
        Optimizers::<Cpu>::new(&training(Optimizer::Muon)).restore(&cpu(1), &run.weights(), changed).unwrap_err().to_string()
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
    let (mut run, _) = run(cpu(1));
    let before = run.weights();
    let refusal = run.optimizers.step(&run.backend, Arc::make_mut(&mut run.weights), BTreeMap::new(), 1.0);
    assert!(matches!(refusal, Err(OptimError::Gradient(name)) if name == "blocks.0.input_layernorm.weight"));
    assert_eq!(run.weights(), before);
}

fn averages<B: Backward>(backend: &B) {
    let values = |offset: usize| (0..10_000).map(|index| ((index + offset) * 7919 % 1009) as f32 / 300.0 - 1.7).collect::<Vec<f32>>();
    let (before, now) = (Weight::new(vec![100, 100], values(0)), Weight::new(vec![100, 100], values(5)));
    for dtype in [WeightDtype::Float32, WeightDtype::Bfloat16] {
        let weights =
            [("average", before.clone()), ("weight", init::in_dtype([("weight".to_owned(), now.clone())], dtype)["weight"].clone())];
        let weights: Weights = weights.map(|(name, weight)| (name.to_owned(), weight)).into();
        let mut trained = backend.train(Arc::new(weights.clone())).unwrap();
        let weight = trained["weight"].clone();
        backend.average(Arc::make_mut(&mut trained).get_mut("average").unwrap(), &weight, 0.25).unwrap();
        let (found, weight) = (&backend.trained(&trained).unwrap()["average"], weights["weight"].values.floats());
        let expected =
            before.values.floats().iter().zip(&*weight).map(|(average, weight)| 0.75 * average + 0.25 * weight).collect::<Vec<_>>();
        assert_eq!((found.values.dtype(), &found.shape), (Dtype::Float32, &before.shape));
        assert_close(&format!("average of {dtype:?}"), &found.values.floats(), &expected, 1e-6);
    }
}

#[test]
fn averages_are_moved_by_a_share() {
    averages(&cpu(2));
    averages(&candle());
}
