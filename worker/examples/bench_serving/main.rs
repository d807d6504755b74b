//! Figures of a pool that runs, asked over HTTP as gateways and trainers ask: one JSON line `{"name", "value", "unit"}` per figure and round.
//!
//! `bench_serving URL ROW ROUNDS`, where ROW is `heads`, `prefix`, `capture` or `memory`.

mod answers;
mod capture;
mod decode;
mod memory;
mod prefix;
mod tenants;

use std::time::{Duration, Instant};

use anyhow::Context as _;
use carryon_crds::wire::ModelDescription;
use carryon_worker::exchange::PoolClient;

/// After that long no further round begins.
const PATIENCE: Duration = Duration::from_secs(60);

/// A pool and who asks it.
#[derive(Clone)]
pub struct Bench {
    url: String,
    client: PoolClient,
    model: ModelDescription,
}

impl Bench {
    async fn connect(url: String) -> anyhow::Result<Self> {
        let client = PoolClient::connect(std::slice::from_ref(&url), Duration::from_secs(10))?;
        let model = client.describe().await?;
        Ok(Self { url, client, model })
    }
}

/// Prints a figure.
pub fn print(name: &str, value: f64, unit: &str) {
    println!("{}", serde_json::json!({"name": name, "value": value, "unit": unit}));
}

/// The smallest value that `share` of all do not exceed.
pub fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (share * values.len() as f64).ceil() as usize;
    values.get(rank.max(1) - 1).copied().unwrap_or(f64::NAN)
}

// A thread for those who decode and one for the trainer: what one reads must not delay when the other sees its tokens.
#[tokio::main(worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [url, row, rounds] = arguments.as_slice() else { anyhow::bail!("usage: bench_serving URL ROW ROUNDS") };
    let (bench, started) = (Bench::connect(url.clone()).await?, Instant::now());
    for round in 0..rounds.parse::<u32>().with_context(|| format!("ROUNDS is {rounds:?}"))? {
        if round > 0 && started.elapsed() > PATIENCE {
            break;
        }
        match row.as_str() {
            "heads" => decode::heads(&bench, round).await?,
            "prefix" => prefix::prefix(&bench, round).await?,
            "capture" => capture::beside(&bench, round).await?,
            "memory" => memory::clients(&bench, round).await?,
            _ => anyhow::bail!("there is no row {row}"),
        }
    }
    Ok(())
}
