//! Figures of a model on any device of candle, one JSON object a line, and the states that it computes, for others to compare.
//!
//! `bench_device --device cpu|cuda --model PATH --output FILE [--captures 8x512,2x2048] [--decode 1,8,64] [--repeats N]`. The prompt of `--output` is
//! the one that `tests/gpu/check.py` gives its own model.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, bail};
use carryon_crds::common::{TapPreset, Taps};
use carryon_crds::pool::Dtype;
use carryon_worker::kernel::candle::CandleDevice;
use carryon_worker::kernel::{Arena, Backend as _, PageTable, pages_for};
use carryon_worker::model::{Capture, Model, Slot, Tap};
use carryon_worker::tensor_file;

/// Tokens that sequences hold before they are decoded.
const PROMPT: usize = 128;
/// Tokens of the sequence whose states are written.
const COMPARED: usize = 64;

struct Options {
    device: CandleDevice,
    model: PathBuf,
    output: PathBuf,
    /// Sequences and tokens of each.
    captures: Vec<(usize, usize)>,
    decode: Vec<usize>,
    repeats: usize,
}

fn options() -> anyhow::Result<Options> {
    let (mut device, mut model, mut output) = ("cpu".to_owned(), None, None);
    let (mut captures, mut decode, mut repeats) = (vec![(8, 512), (2, 2048)], vec![1, 8, 64], 5);
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--device" => device = value,
            "--model" => model = Some(PathBuf::from(value)),
            "--output" => output = Some(PathBuf::from(value)),
            "--captures" => captures = value.split(',').map(shape).collect::<anyhow::Result<_>>()?,
            "--decode" => decode = value.split(',').map(str::parse).collect::<Result<_, _>>().context("--decode")?,
            "--repeats" => repeats = value.parse().context("--repeats")?,
            _ => bail!("unknown option {name}"),
        }
    }
    let device = match device.as_str() {
        "cpu" => CandleDevice::new(candle_core::Device::Cpu),
        "cuda" => CandleDevice::cuda(0).context("no CUDA device")?,
        other => bail!("--device {other}: cpu or cuda"),
    };
    Ok(Options {
        device,
        model: model.context("--model is missing")?,
        output: output.context("--output is missing")?,
        captures,
        decode,
        repeats,
    })
}

fn shape(text: &str) -> anyhow::Result<(usize, usize)> {
    let (sequences, tokens) = text.split_once('x').with_context(|| format!("{text:?} is not SEQUENCESxTOKENS"))?;
    Ok((sequences.parse()?, tokens.parse()?))
}

fn print(name: &str, value: f64, unit: &str) {
    println!("{}", serde_json::json!({"name": name, "value": value, "unit": unit}));
}

/// Token `index` of a sequence, the same in `check.py`.
fn token(index: usize, vocabulary: usize) -> u32 {
    ((index * 7919 + 13) % vocabulary) as u32
}

/// A model, and pages for as many sequences as are asked for.
struct Bench {
    model: Model<CandleDevice>,
    repeats: usize,
}

impl Bench {
    fn tokens(&self, count: usize) -> Vec<u32> {
        (0..count).map(|index| token(index, self.model.config.vocab_size)).collect()
    }

    /// Tables of sequences with room for `tokens` positions, in an arena of their own.
    fn sequences(&self, count: usize, tokens: usize, single_pass: bool) -> anyhow::Result<(Arena<CandleDevice>, Vec<PageTable>)> {
        let (backend, pages) = (&self.model.backend, pages_for(tokens));
        let layout = if single_pass { self.model.single_pass_layout() } else { self.model.page_layout() };
        let mut arena = Arena::new(backend, layout, count * pages)?;
        // The last first: the arena grows once.
        (0..(count * pages) as u32).rev().try_for_each(|page| arena.take(backend, page))?;
        let table = |index: usize| PageTable { pages: (index * pages..(index + 1) * pages).map(|page| page as u32).collect(), length: 0 };
        Ok((arena, (0..count).map(table).collect()))
    }

    /// Seconds of the best of some runs, after one that does not count.
    fn best(&self, mut run: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<f64> {
        let mut best = f64::INFINITY;
        for repeat in 0..=self.repeats {
            let start = Instant::now();
            run()?;
            self.model.backend.finish()?;
            best = if repeat == 0 { best } else { best.min(start.elapsed().as_secs_f64()) };
        }
        Ok(best)
    }

    /// Hidden states of whole sequences at the taps of a head, on the host.
    fn capture(&self, count: usize, length: usize) -> anyhow::Result<()> {
        let (mut arena, tables) = self.sequences(count, length, true)?;
        let tokens = self.tokens(length);
        let taps: Vec<_> = Tap::all(&Taps::of(TapPreset::Balanced, self.model.config.layers.len() as u32))
            .map(|tap| Capture { tap, rows: None })
            .collect();
        let seconds = self.best(|| {
            let mut tables = tables.clone();
            let mut slots: Vec<_> = tables.iter_mut().map(|kv| Slot { tokens: &tokens, kv }).collect();
            for rows in self.model.forward(&mut arena, &mut slots, &taps)? {
                std::hint::black_box(self.model.backend.read_bytes(&rows, self.model.dtype)?);
            }
            Ok(())
        })?;
        print(&format!("hidden_states_{count}x{length}"), (count * length) as f64 / seconds, "tokens/s");
        Ok(())
    }

    /// Steps of sequences that decode together: base, LM head, the likeliest token.
    fn decode(&self, count: usize) -> anyhow::Result<()> {
        let (mut arena, mut tables) = self.sequences(count, PROMPT + self.repeats + 1, false)?;
        let (prompt, last) = (self.tokens(PROMPT), [Capture { tap: Tap::Final, rows: None }]);
        for kv in &mut tables {
            self.model.forward(&mut arena, &mut [Slot { tokens: &prompt, kv }], &[])?;
        }
        let seconds = self.best(|| {
            let mut slots: Vec<_> = tables.iter_mut().map(|kv| Slot { tokens: &prompt[..1], kv }).collect();
            let states = self.model.forward(&mut arena, &mut slots, &last)?;
            let logits = self.model.lm_head().logits(&self.model.backend, &states[0])?;
            std::hint::black_box(self.model.backend.greedy(&logits)?);
            Ok(())
        })?;
        print(&format!("decode_{count}"), count as f64 / seconds, "tokens/s");
        Ok(())
    }

    /// Final states of one sequence, as f32.
    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let (mut arena, mut tables) = self.sequences(1, COMPARED, true)?;
        let (tokens, last) = (self.tokens(COMPARED), [Capture { tap: Tap::Final, rows: None }]);
        let states = self.model.forward(&mut arena, &mut [Slot { tokens: &tokens, kv: &mut tables[0] }], &last)?;
        let shape = [COMPARED, self.model.config.hidden_size];
        let mut file = tensor_file::header(&[], [("final", safetensors::Dtype::F32, &shape[..])].into_iter());
        file.extend_from_slice(&self.model.backend.read_bytes(&states[0], Dtype::Float32)?);
        Ok(std::fs::write(path, file)?)
    }
}

fn main() -> anyhow::Result<()> {
    let options = options()?;
    let start = Instant::now();
    let model = Model::load(&options.model, Dtype::Bfloat16, options.device)?;
    model.backend.finish()?;
    print("load", start.elapsed().as_secs_f64(), "s");
    let bench = Bench { model, repeats: options.repeats };
    bench.write(&options.output)?;
    for (count, length) in &options.captures {
        bench.capture(*count, *length)?;
    }
    for count in &options.decode {
        bench.decode(*count)?;
    }
    Ok(())
}
