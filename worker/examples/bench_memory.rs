//! Memory and time of optimizer steps of a large head, on states and output gradients by chance: one JSON object.
//!
//! `bench_memory [--optim Muon|AdamW] [--weights Float32|Bfloat16] [--state Float32|Bfloat16|Int8] [--scope Global|PerTensor] [--checkpointing true|false] [--steps N]`. The head is one
//! of about 100M parameters on a base of 30B: width 1184, 4 blocks, 5 taps, D 5120; a micro-batch is one sequence of 1024 tokens.

use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use carryon_crds::common::Taps;
use carryon_crds::job::{NormScope, Task, Training};
use carryon_crds::pool::Dtype;
use carryon_crds::wire::HeadShape;
use carryon_crds::wire::head::{FORMAT_VERSION, feed_forward};
use carryon_worker::head::pass::{Forward, Keep, PackedBatch, Pass};
use carryon_worker::head::{Gradients, Weight, init, parameters};
use carryon_worker::kernel::Threads;
use carryon_worker::numbers::{RowFormat, to_bytes};
use carryon_worker::train::memory::{self, Watch};
use carryon_worker::train::optim::{Optimizers, accumulate};

const TOKENS: usize = 1024;
const WIDTH: u32 = 1184;

fn shape() -> HeadShape {
    HeadShape {
        format_version: FORMAT_VERSION,
        task: Task::CausalLM,
        taps: Taps { layers: vec![21, 42, 53, 60], final_norm: true },
        hidden_size: 5120,
        width: WIDTH,
        blocks: 4,
        heads: 8,
        feed_forward: feed_forward(WIDTH),
        gate: true,
        alpha: 1.0,
        window: TOKENS as u32,
        rope_theta: 1e4,
        norm_epsilon: 1e-5,
        labels: Vec::new(),
        dimensions: None,
        max_length: None,
        split_special_tokens: true,
    }
}

/// Numbers between -1 and 1 that look like chance.
fn noise(count: usize, seed: f32) -> Vec<f32> {
    (0..count).map(|index| (index as f32 * 12.9898 + seed).sin()).collect()
}

fn main() -> anyhow::Result<()> {
    let (mut training, mut steps) = (serde_json::json!({}), 2);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--optim" => training["optim"] = value.into(),
            "--weights" => training["weightDtype"] = value.into(),
            "--state" => training["optimStateDtype"] = value.into(),
            "--scope" => training["maxGradNormScope"] = value.into(),
            "--checkpointing" => training["gradientCheckpointing"] = (value == "true").into(),
            "--steps" => steps = value.parse().context("--steps")?,
            _ => bail!("unknown option {name}"),
        }
    }
    let training: Training = serde_json::from_value(training)?;
    memory::keep_freed_pages();
    memory::return_large_buffers(WIDTH);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_time().build()?;
    let (threads, shape) = (Threads::new(std::thread::available_parallelism()?.get()), shape());
    let (pass, mut optimizers) = (Pass::new(&shape, threads.clone())?, Optimizers::new(&training));
    let watch = Watch::start(runtime.handle());
    let mut weights = init::in_dtype(init::tensors(&shape, 0), training.weight_dtype);
    let tap = |tap: usize| vec![to_bytes(&noise(TOKENS * shape.hidden_size as usize, tap as f32), Dtype::Bfloat16)];
    let taps: Vec<_> = (0..shape.taps.count()).map(tap).collect();
    let batch = PackedBatch {
        formats: vec![RowFormat::Plain(Dtype::Bfloat16); taps.len()],
        taps,
        lengths: vec![TOKENS],
        rows: (0..TOKENS as u32).collect(),
    };
    let mut seconds = Duration::MAX;
    for _ in 0..steps {
        let started = Instant::now();
        let keep = if training.gradient_checkpointing { Keep::Inputs } else { Keep::All };
        let Forward { output, saved } = pass.forward(&weights, &batch, keep)?;
        let saved = saved.context("nothing was kept")?;
        let by_output: Vec<f32> = output.iter().zip(noise(output.len(), 0.5)).map(|(value, noise)| 1e-3 * (value + noise)).collect();
        drop(output);
        if training.max_grad_norm_scope == NormScope::Global {
            let mut gradients = Gradients::new();
            let mut take = |name: &str, _: &mut Weight, gradient: Vec<f32>| accumulate(&mut gradients, name, gradient);
            pass.backward(&mut weights, &batch, saved, by_output, &mut take);
            optimizers.step(&threads, &mut weights, gradients, 1.0)?;
        } else {
            optimizers.begin();
            let mut take = |name: &str, weight: &mut Weight, gradient: Vec<f32>| optimizers.update(&threads, name, weight, gradient, 1.0);
            pass.backward(&mut weights, &batch, saved, by_output, &mut take);
        }
        seconds = seconds.min(started.elapsed());
    }
    let mb = |bytes: u64| bytes as f64 / 1e6;
    let figures = serde_json::json!({
        "parameters": parameters::count(&shape),
        "tensor_mb": mb(watch.peak_anonymous() - watch.start_anonymous()),
        "peak_rss_mb": mb(memory::now().peak_resident),
        "step_seconds": seconds.as_secs_f64(),
    });
    println!("{figures}");
    Ok(())
}
