//! Prints one JSON line `{"name", "value", "unit"}` per figure: the matrix kernel, the choice of a token, and a model's forward pass when one is given.
//!
//! `bench_engine [--threads N] [--repeats N] [--model PATH] [--weights bfloat16|q8|q4] [--matrices yes|no]
//! [--forward yes|no]`: the best of `repeats` is printed; without matrices the model's figures alone, without forward what loading it takes.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use carryon_crds::common::{TapPreset, Taps};
use carryon_crds::pool::Dtype;
use carryon_worker::base::sampling::{Row, Sampler, Sight, logprob_blocks, logprobs};
use carryon_worker::exchange::wire::{GenerateRequest, Sampling, TokenLogprob};
use carryon_worker::kernel::cpu::{Left, Panels, Part, Sink, pack_row, product, words};
use carryon_worker::kernel::{Arena, Backend, Bits, Cpu, DeviceError, PageTable, Stored, Threads, pages_for};
use carryon_worker::model::{Capture, Model, Slot, Tap};

const SHAPES: [(usize, usize, usize); 7] =
    [(2048, 576, 576), (2048, 1536, 576), (2048, 576, 1536), (512, 1536, 576), (2048, 49152, 576), (1, 49152, 576), (8, 1536, 576)];

/// A layer of a large model, whose weights no cache holds.
const WIDE: (usize, usize, usize) = (256, 28672, 8192);

struct Options {
    threads: usize,
    repeats: usize,
    model: Option<String>,
    weights: Stored,
    matrices: bool,
    forward: bool,
}

fn options() -> Result<Options, String> {
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get());
    let mut options = Options { threads, repeats: 5, model: None, weights: Dtype::Bfloat16.into(), matrices: true, forward: true };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = || value.parse::<usize>().map_err(|error| format!("{name} {value}: {error}"));
        match name.as_str() {
            "--threads" => options.threads = number()?,
            "--repeats" => options.repeats = number()?,
            "--matrices" => options.matrices = value == "yes",
            "--forward" => options.forward = value == "yes",
            "--model" => options.model = Some(value),
            "--weights" => {
                options.weights = match value.as_str() {
                    "bfloat16" => Dtype::Bfloat16.into(),
                    "q8" => Stored::Blocks(Bits::Q8),
                    "q4" => Stored::Blocks(Bits::Q4),
                    other => return Err(format!("{other} is not bfloat16, q8 or q4")),
                }
            }
            _ => return Err(format!("unknown option {name}")),
        }
    }
    Ok(options)
}

/// Seconds of the fastest of `repeats` runs of `count` calls, per call, after one that only touches the memory.
fn best(repeats: usize, count: usize, mut run: impl FnMut()) -> f64 {
    run();
    (0..repeats)
        .map(|_| {
            let start = Instant::now();
            (0..count).for_each(|_| run());
            start.elapsed().as_secs_f64() / count as f64
        })
        .fold(f64::INFINITY, f64::min)
}

fn print(name: &str, value: f64, unit: &str) {
    println!("{}", serde_json::json!({"name": name, "value": value, "unit": unit}));
}

fn main() -> Result<(), String> {
    let options = options()?;
    let threads = Threads::new(options.threads);
    if options.matrices {
        for shape in SHAPES {
            bench_matrix(shape, Dtype::Bfloat16, "bf16", options.repeats, &threads);
            bench_matrix(shape, Dtype::Float32, "f32", options.repeats, &threads);
        }
        bench_matrix(WIDE, Dtype::Bfloat16, "bf16", options.repeats, &threads);
        for (name, vocab_size) in [("49k", 49_152), ("152k", 152_064)] {
            bench_sampling(name, vocab_size, options.repeats).map_err(|error| error.to_string())?;
        }
    }
    match &options.model {
        Some(path) => bench_model(path, &options, threads),
        None => Ok(()),
    }
}

fn bench_matrix((m, n, k): (usize, usize, usize), dtype: Dtype, name: &str, repeats: usize, threads: &Arc<Threads>) {
    let weight = Panels::from_rows(n, k, dtype, threads, |_, row| row.fill(1.0));
    // Rows in the kernel's number type on both sides, as PyTorch's bf16 tensors are.
    let (mut x, mut out) = (vec![0; m * words(dtype, k)], vec![0; m * words(dtype, n)]);
    pack_row(dtype, &vec![1.0; m * k], &mut x);
    let operations = 2.0 * (m * n * k) as f64;
    let count = ((1e9 / operations) as usize).clamp(1, 1000);
    let part = Part { rows: m, panels: &weight, norm: &[] };
    let seconds = best(repeats, count, || product(threads, Left::Packed(&x, words(dtype, k)), &[part], Sink::Pack(&mut out)));
    print(&format!("matmul_{name}_{m}x{n}x{k}"), operations / seconds / 1e9, "GFLOP/s");
}

/// Microseconds that one row of logits takes on one thread. They are normally distributed with deviation 3, so that some ten thousand tokens
/// carry the probability; `flat` draws at a temperature at which all do.
fn bench_sampling(size: &str, vocab_size: usize, repeats: usize) -> Result<(), DeviceError> {
    let uniform =
        |index: u32| f64::from((index.wrapping_mul(2_654_435_761) ^ 0x5bd1_e995).wrapping_mul(0x85eb_ca6b) >> 8) / f64::from(1 << 24);
    let normal = |index: u32| (-2.0 * (uniform(2 * index) + 1e-9).ln()).sqrt() * (std::f64::consts::TAU * uniform(2 * index + 1)).cos();
    let logits: Vec<f32> = (0..vocab_size as u32).map(|index| 3.0 * normal(index) as f32).collect();
    let cpu = Cpu::new(Threads::new(1));
    let rows = cpu.write(&logits, vocab_size)?;
    let print_row = |name: &str, run: &mut dyn FnMut()| print(&format!("{name}_{size}"), best(repeats, 20, run) * 1e6, "µs");
    let sampling = |top_k, min_p| Sampling { top_k, min_p, ..Sampling::default() };
    for (name, temperature, top_p, sampling) in [
        ("sample_greedy", 0.0, 1.0, sampling(0, 0.0)),
        ("sample_all", 1.0, 1.0, sampling(0, 0.0)),
        ("sample_top_p", 1.0, 0.9, sampling(0, 0.0)),
        ("sample_top_p_flat", 100.0, 0.9, sampling(0, 0.0)),
        ("sample_top_k", 1.0, 1.0, sampling(50, 0.0)),
        ("sample_min_p", 1.0, 1.0, sampling(0, 0.05)),
    ] {
        let request = GenerateRequest { temperature, top_p, seed: Some(1), sampling, ..GenerateRequest::greedy(vec![0], 1) };
        let mut sampler = Sampler::new(&request);
        print_row(name, &mut || _ = std::hint::black_box(choose(&cpu, &rows, &mut sampler)));
    }
    print_row("logprobs", &mut || _ = std::hint::black_box(alternatives(&cpu, &rows)));
    Ok(())
}

fn alternatives(cpu: &Cpu, rows: &<Cpu as Backend>::Rows) -> Result<TokenLogprob, DeviceError> {
    let outline = cpu.outline(rows, &[(0, 1.0)])?;
    let sight = Sight::new(&outline, 0, 1, 1.0);
    let mut blocks = logprob_blocks(&sight, Some(0), 20);
    blocks.sort_unstable();
    blocks.dedup();
    look(cpu, rows, sight, &blocks, |row| logprobs(row, 0, 20))
}

fn look<T>(
    cpu: &Cpu,
    rows: &<Cpu as Backend>::Rows,
    sight: Sight<'_>,
    blocks: &[u32],
    then: impl FnOnce(&Row<'_>) -> T,
) -> Result<T, DeviceError> {
    let which: Vec<_> = blocks.iter().map(|block| (0, *block)).collect();
    let total = sight.total();
    Ok(then(&Row::new(sight, total, blocks, &cpu.blocks(rows, &which)?)))
}

/// A token from the few blocks that tell, and from all when they do not.
fn choose(cpu: &Cpu, rows: &<Cpu as Backend>::Rows, sampler: &mut Sampler) -> Result<Option<u32>, DeviceError> {
    if sampler.is_greedy() {
        return Ok(cpu.greedy(rows)?[0]);
    }
    let outline = cpu.outline(rows, &[(0, sampler.temperature())])?;
    let sight = Sight::new(&outline, 0, 1, sampler.temperature());
    let few = sampler.blocks(&sight);
    let mut sample = |blocks: &[u32]| look(cpu, rows, sight.clone(), blocks, |row| sampler.sample(row));
    Ok(match sample(&few)? {
        None => sample(&sight.all())?,
        found => found,
    })
}

/// Most bytes of memory that the process has had.
fn peak_rss() -> std::io::Result<f64> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let kilobytes = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB")?.parse::<f64>().ok());
    Ok(kilobytes.unwrap_or(f64::NAN) * 1024.0)
}

fn bench_model(path: &str, options: &Options, threads: Arc<Threads>) -> Result<(), String> {
    let start = Instant::now();
    let model = Model::load(Path::new(path), options.weights, Cpu::new(threads)).map_err(|error| error.to_string())?;
    print("load", start.elapsed().as_secs_f64(), "s");
    print("weights", model.weight_bytes() as f64 / 1e6, "MB");
    print("peak_rss", peak_rss().map_err(|error| format!("/proc/self/status: {error}"))? / 1e6, "MB");
    if !options.forward {
        return Ok(());
    }
    let tokens: Vec<u32> =
        (0..2048u32).map(|index| index.wrapping_mul(2_654_435_761) >> 8).map(|value| value % model.config.vocab_size as u32).collect();
    let captures = |taps: Vec<Tap>| taps.into_iter().map(|tap| Capture { tap, rows: None }).collect::<Vec<_>>();
    let taps = captures(Tap::all(&Taps::of(TapPreset::Balanced, model.config.layers.len() as u32)).collect());
    let final_only = captures(vec![Tap::Final]);
    let failed = |error: carryon_worker::kernel::DeviceError| error.to_string();
    for (name, sequences, length, taps) in [("hidden_states_8x256", 8, 256, &taps), ("prefill_512", 1, 512, &final_only)] {
        let layout = if sequences > 1 { model.single_pass_layout() } else { model.page_layout() };
        let mut arena = Arena::new(&model.backend, layout, 128).map_err(failed)?;
        let pages = pages_for(length) as u32;
        let seconds = best(options.repeats, 1, || {
            let table = |index: u32| PageTable { pages: (index * pages..(index + 1) * pages).collect(), length: 0 };
            let mut tables: Vec<_> = (0..sequences).map(table).collect();
            tables.iter().flat_map(|table| &table.pages).for_each(|page| drop(arena.take(&model.backend, *page)));
            let mut slots: Vec<_> = tables.iter_mut().zip(tokens.chunks(length)).map(|(kv, tokens)| Slot { tokens, kv }).collect();
            drop(model.forward(&mut arena, &mut slots, taps));
        });
        print(name, (sequences as usize * length) as f64 / seconds, "tokens/s");
    }
    for sequences in [1u32, 8] {
        let mut arena = Arena::new(&model.backend, model.page_layout(), 64).map_err(failed)?;
        let mut tables: Vec<_> = (0..sequences).map(|index| PageTable { pages: (index * 8..index * 8 + 8).collect(), length: 0 }).collect();
        tables.iter().flat_map(|table| &table.pages).for_each(|page| drop(arena.take(&model.backend, *page)));
        let seconds = best(options.repeats, 20, || {
            let mut slots: Vec<_> = tables.iter_mut().map(|kv| Slot { tokens: &tokens[..1], kv }).collect();
            if let Ok(states) = model.forward(&mut arena, &mut slots, &final_only) {
                drop(model.lm_head().logits(&model.backend, &states[0]));
            }
        });
        print(
            &if sequences == 1 { "decode".to_owned() } else { format!("decode_{sequences}") },
            f64::from(sequences) / seconds,
            "tokens/s",
        );
    }
    Ok(())
}
