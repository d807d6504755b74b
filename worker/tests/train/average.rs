//! Averages of weights.

use std::fs;
use std::path::Path;

use carryon_crds::job::{NormScope, Optimizer, Training, WeightDtype};
use carryon_worker::head::{Weights, artifact, init};
use carryon_worker::train::metrics::{self, Line};
use safetensors::SafeTensors;

use super::Job;
use super::toy_pool::ToyPool;

const DECAY: f64 = 0.4;

fn job(change: impl Fn(&mut Training)) -> Job {
    let mut job = Job::chat();
    job.config.training.ema_decay = Some(DECAY);
    change(&mut job.config.training);
    job
}

/// The numbers of tensor `name` of a file, from f32 or bf16.
fn numbers(file: &Path, name: &str) -> Vec<f64> {
    let bytes = fs::read(file).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let tensor = tensors.tensor(name).unwrap();
    match tensor.dtype() {
        safetensors::Dtype::F32 => tensor.data().chunks(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap()).into()).collect(),
        safetensors::Dtype::BF16 => {
            tensor.data().chunks(2).map(|bytes| half::bf16::from_le_bytes(bytes.try_into().unwrap()).to_f64()).collect()
        }
        other => panic!("{name} has type {other:?}"),
    }
}

#[test]
fn what_is_written_is_the_average_of_what_the_steps_left() {
    let pool = ToyPool::start();
    for (dtype, scope, accumulation) in [
        (WeightDtype::Float32, NormScope::Global, 1),
        (WeightDtype::Bfloat16, NormScope::Global, 2),
        (WeightDtype::Bfloat16, NormScope::PerTensor, 1),
    ] {
        let mut job = job(|training| {
            (training.weight_dtype, training.max_grad_norm_scope) = (dtype, scope);
            training.gradient_accumulation_steps = accumulation;
        });
        job.config.split.evaluation.clear();
        job.run(&pool).unwrap();
        let head = job.head_folder().join("head.safetensors");
        let shape = artifact::read(&job.head_folder()).unwrap().0.shape;
        let start: Weights = init::in_dtype(init::tensors(&shape, job.config.training.seed), dtype);
        let steps = job.steps().len();
        let checkpoint = |step: usize| job.path(&format!("output/checkpoints/step-{step:010}.safetensors"));
        for (name, weight) in &start {
            let mut expected: Vec<f64> = weight.values.floats().iter().map(|value| f64::from(*value)).collect();
            for step in 1..=steps {
                let decay = DECAY.min((1 + step) as f64 / (10 + step) as f64);
                let now = numbers(&checkpoint(step), &format!("weights.{name}"));
                expected.iter_mut().zip(now).for_each(|(average, now)| *average = decay * *average + (1.0 - decay) * now);
            }
            let found = numbers(&head, name);
            let worst = found.iter().zip(&expected).map(|(found, expected)| (found - expected).abs()).fold(0.0, f64::max);
            assert!(worst < 1e-6, "{name} of {dtype:?} {scope:?} is off by {worst}");
            let last = numbers(&checkpoint(steps), &format!("weights.{name}"));
            assert_ne!(found, last, "{name} of {dtype:?} {scope:?} is no average");
        }
    }
}

#[test]
fn a_run_with_an_average_goes_on_with_the_bits_of_an_unbroken_one() {
    let pool = ToyPool::start();
    for (optim, dtype, scope) in
        [(Optimizer::Muon, WeightDtype::Float32, NormScope::Global), (Optimizer::AdamW, WeightDtype::Bfloat16, NormScope::PreviousStep)]
    {
        let job = job(|training| (training.optim, training.weight_dtype, training.max_grad_norm_scope) = (optim, dtype, scope));
        job.run(&pool).unwrap();
        let head = job.head();
        for step in [0, 3, 8] {
            job.kill_after(step);
            job.run(&pool).unwrap();
            assert_eq!(job.head(), head, "{optim:?} killed after step {step}");
        }
    }
}

#[test]
fn an_average_is_measured_and_changes_no_step() {
    let pool = ToyPool::start();
    let (plain, averaged) = (Job::chat(), job(|_| {}));
    for job in [&plain, &averaged] {
        job.run(&pool).unwrap();
    }
    let losses = |job: &Job| job.steps().iter().map(|line| (line.loss.to_bits(), line.grad_norm.to_bits())).collect::<Vec<_>>();
    assert_eq!(losses(&plain), losses(&averaged));
    let evaluations = |job: &Job| {
        let lines = metrics::read(&job.path("output/metrics.jsonl")).unwrap();
        lines.into_iter().filter_map(|line| if let Line::Evaluation(line) = line { Some(line.eval_loss) } else { None }).collect::<Vec<_>>()
    };
    let (plain_losses, losses) = (evaluations(&plain), evaluations(&averaged));
    assert_eq!(plain_losses[0], losses[0], "the untrained head is the base");
    assert!(losses.iter().zip(&plain_losses).skip(1).all(|(loss, plain)| loss != plain && *loss < losses[0] - 0.1), "{losses:?}");
    let manifest = artifact::read(&averaged.head_folder()).unwrap().1;
    assert_eq!(manifest.metrics.eval_loss, losses.into_iter().reduce(f64::min));
    let mut wrong = averaged;
    for decay in [0.0, 1.0] {
        wrong.config.training.ema_decay = Some(decay);
        assert_eq!(wrong.run(&pool).unwrap_err().to_string(), "training.emaDecay is above 0 and below 1");
    }
}
