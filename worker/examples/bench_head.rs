//! Steps of a head in training on any device, with the loss on the same device, one JSON object a figure.
//!
//! `bench_head [--device cpu|candle|cuda] [--head WIDTH,BLOCKS,TAPS,HIDDEN] [--vocabulary N] [--tokens N] [--steps N]`. Numbers are by chance; all steps
//! learn the same tokens, so their losses fall.

use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use carryon_crds::common::Taps;
use carryon_crds::job::{HeadSpec, Task, Training};
use carryon_crds::pool::Dtype;
use carryon_crds::wire::HeadShape;
use carryon_worker::head::loss::{Against, LossWeights, lm_loss};
use carryon_worker::head::pass::{Forward, Keep, PackedBatch, Pass};
use carryon_worker::head::{Gradients, init, parameters};
use carryon_worker::kernel::candle::CandleDevice;
use carryon_worker::kernel::{Backward, Cpu, Threads, Trained};
use carryon_worker::numbers::{RowFormat, from_bytes, to_bytes};
use carryon_worker::train::optim::{Optimizers, clip_norm};

struct Options {
    device: String,
    /// Width, blocks, taps, width of the base.
    head: [u32; 4],
    vocabulary: usize,
    tokens: usize,
    steps: usize,
}

fn options() -> anyhow::Result<Options> {
    let mut options = Options { device: "cpu".to_owned(), head: [1184, 4, 5, 5120], vocabulary: 151_936, tokens: 1024, steps: 6 };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        let number = || value.parse::<usize>().with_context(|| format!("{name} {value}"));
        match name.as_str() {
            "--device" => options.device = value,
            "--head" => {
                let numbers = value.split(',').map(str::parse).collect::<Result<Vec<u32>, _>>().context("--head")?;
                options.head = numbers.try_into().ok().context("--head wants WIDTH,BLOCKS,TAPS,HIDDEN")?;
            }
            "--vocabulary" => options.vocabulary = number()?,
            "--tokens" => options.tokens = number()?,
            "--steps" => options.steps = number()?,
            _ => bail!("unknown option {name}"),
        }
    }
    Ok(options)
}

fn shape(options: &Options) -> HeadShape {
    let [width, blocks, taps, hidden_size] = options.head;
    let head = HeadSpec { width, blocks, attention_heads: 8, gate: true, ..HeadSpec::default() };
    head.shape(Task::CausalLM, Taps { layers: (1..taps).collect(), final_norm: true }, hidden_size, options.tokens as u32)
}

/// Number `index` of a stream that looks like chance, from -1 to 1.
fn chance(stream: usize, index: usize) -> f32 {
    let mixed = (index as u32 ^ (stream as u32) << 27).wrapping_mul(0x9E37_79B9);
    let mixed = (mixed ^ (mixed >> 15)).wrapping_mul(0x85EB_CA6B);
    (mixed ^ (mixed >> 13)) as i32 as f32 / i32::MAX as f32
}

fn rows(stream: usize, tokens: usize, width: usize) -> Bytes {
    to_bytes(&(0..tokens * width).map(|index| chance(stream, index)).collect::<Vec<_>>(), Dtype::Bfloat16)
}

fn print(name: &str, value: f64, unit: &str) {
    println!("{}", serde_json::json!({"name": name, "value": value, "unit": unit}));
}

/// A head, what it learns, and the loss that says how well.
struct Bench<B: Backward> {
    backend: B,
    shape: HeadShape,
    batch: PackedBatch,
    targets: Vec<u32>,
    lm_head: [B::Matrix; 2],
    weights: Arc<Trained<B>>,
    optimizers: Optimizers<B>,
}

impl<B: Backward> Bench<B> {
    fn new(options: &Options, backend: B) -> anyhow::Result<Self> {
        let (shape, tokens) = (shape(options), options.tokens);
        let width = shape.hidden_size as usize;
        let taps: Vec<_> = (0..shape.taps.count()).map(|tap| vec![rows(tap, tokens, width)]).collect();
        let formats = vec![RowFormat::Plain(Dtype::Bfloat16); taps.len()];
        let fill = |row: usize, values: &mut [f32]| {
            values.iter_mut().enumerate().for_each(|(column, value)| *value = 0.03 * chance(31, row * width + column));
        };
        let lm_head = backend.matrix(options.vocabulary, width, Dtype::Bfloat16.into(), &fill)?;
        Ok(Self {
            batch: PackedBatch { taps, formats, lengths: vec![tokens], rows: (0..tokens as u32).collect() },
            targets: (0..tokens).map(|token| ((token * 7919 + 13) % options.vocabulary) as u32).collect(),
            lm_head: [backend.transposed(&lm_head)?, lm_head],
            weights: backend.train(Arc::new(init::weights(&shape, 1)))?,
            optimizers: Optimizers::new(&Training::default()),
            backend,
            shape,
        })
    }

    /// A step: seconds there with the loss, back, and of the optimizer; and the loss, nats a token.
    fn step(&mut self) -> anyhow::Result<([f64; 3], f64)> {
        let (backend, pass) = (&self.backend, Pass::new(&self.shape, self.backend.clone())?);
        let (width, share) = (self.shape.hidden_size as usize, 1.0 / self.targets.len() as f32);
        let mut times = [Instant::now(); 4];
        let Forward { output, saved } = pass.forward(&self.weights, &self.batch, Keep::All)?;
        let output = backend.hand_over(output)?;
        let mut x = vec![0.0; output.len()];
        self.batch.taps.last().into_iter().flatten().for_each(|rows| from_bytes(rows, Dtype::Bfloat16, &mut x));
        let [backward, forward] = &self.lm_head;
        let weights = LossWeights { forward, backward: Some(backward), dtype: Dtype::Bfloat16, softcap: None };
        let mut measured = lm_loss(backend, &weights, &x, Some((&output, 1.0)), Against::Tokens(&self.targets))?;
        measured.gradient.iter_mut().for_each(|value| *value *= share);
        times[1] = Instant::now();
        let mut gradients = Gradients::<B>::new();
        let mut take = |name: &str, _: &mut B::Trained, gradient: B::Rows| {
            gradients.insert(name.to_owned(), gradient);
            Ok(())
        };
        let by_output = backend.receive(measured.gradient, width)?;
        let saved = saved.context("the pass has kept nothing")?;
        pass.backward(Arc::make_mut(&mut self.weights), &self.batch, saved, by_output, &mut take)?;
        backend.finish()?;
        times[2] = Instant::now();
        clip_norm(backend, &mut gradients, 1.0)?;
        self.optimizers.step(backend, Arc::make_mut(&mut self.weights), gradients, 1.0)?;
        backend.finish()?;
        times[3] = Instant::now();
        let loss = measured.loss.iter().map(|loss| f64::from(*loss)).sum::<f64>() * f64::from(share);
        Ok(([0, 1, 2].map(|part| (times[part + 1] - times[part]).as_secs_f64()), loss))
    }

    /// Steps, the fastest of which counts.
    fn run(&mut self, steps: usize) -> anyhow::Result<()> {
        let (mut best, mut losses) = ([f64::INFINITY; 3], Vec::new());
        for _ in 0..steps {
            let (seconds, loss) = self.step()?;
            if seconds.iter().sum::<f64>() < best.iter().sum() {
                best = seconds;
            }
            losses.push(loss);
        }
        print("parameters", parameters::count(&self.shape) as f64, "");
        print("train", self.targets.len() as f64 / best.iter().sum::<f64>(), "tokens/s");
        for (name, seconds) in ["forward_and_loss", "backward", "update"].into_iter().zip(best) {
            print(name, seconds, "s");
        }
        print("first_loss", losses.first().copied().unwrap_or(f64::NAN), "nats");
        print("last_loss", losses.last().copied().unwrap_or(f64::NAN), "nats");
        Ok(())
    }
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    match options.device.as_str() {
        "cpu" => Bench::new(&options, Cpu::new(Threads::new(std::thread::available_parallelism()?.get())))?.run(options.steps),
        "candle" => Bench::new(&options, CandleDevice::new(candle_core::Device::Cpu))?.run(options.steps),
        "cuda" => Bench::new(&options, CandleDevice::cuda(0)?)?.run(options.steps),
        other => bail!("--device {other}: cpu, candle or cuda"),
    }
}
