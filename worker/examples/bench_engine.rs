//! Prints one JSON line `{"name", "value", "unit"}` per figure: the matrix kernel, and a model's forward pass when one is given.
//!
//! `bench_engine [--threads N] [--repeats N] [--model PATH]`: the best of `repeats` is printed.

use std::time::Instant;

use carryon_worker::kernel::{Panels, Precision, Threads, matmul};

const SHAPES: [(usize, usize, usize); 7] =
    [(2048, 576, 576), (2048, 1536, 576), (2048, 576, 1536), (512, 1536, 576), (2048, 49152, 576), (1, 49152, 576), (8, 1536, 576)];

struct Options {
    threads: usize,
    repeats: usize,
    model: Option<String>,
}

fn options() -> Result<Options, String> {
    let mut options = Options { threads: std::thread::available_parallelism().map_or(1, |n| n.get()), repeats: 5, model: None };
    let mut arguments = std::env::args().skip(1);
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        let number = || value.parse::<usize>().map_err(|error| format!("{name} {value}: {error}"));
        match name.as_str() {
            "--threads" => options.threads = number()?,
            "--repeats" => options.repeats = number()?,
            "--model" => options.model = Some(value),
            _ => return Err(format!("unknown option {name}")),
        }
    }
    Ok(options)
}

/// Seconds of the fastest of `repeats` runs of `count` calls, per call.
fn best(repeats: usize, count: usize, mut run: impl FnMut()) -> f64 {
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
    for (m, n, k) in SHAPES {
        for (precision, name) in [(Precision::Bf16, "bf16"), (Precision::F32, "f32")] {
            let weight = Panels::from_rows(n, k, precision, &threads, |_, row| row.fill(1.0));
            let (x, mut out) = (vec![1.0; m * k], vec![0.0; m * n]);
            let operations = 2.0 * (m * n * k) as f64;
            let count = ((1e10 / operations) as usize).clamp(1, 1000);
            let seconds = best(options.repeats, count, || matmul(&threads, &x, &weight, &mut out));
            print(&format!("matmul_{name}_{m}x{n}x{k}"), operations / seconds / 1e9, "GFLOP/s");
        }
    }
    let _ = options.model;
    Ok(())
}
