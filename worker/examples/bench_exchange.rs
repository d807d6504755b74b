//! Bytes per second of hidden states that are already computed, from the pool's stream through HTTP to decoded sequences
//! in the real client, against a raw copy of as many bytes over a loopback socket. Prints one JSON object a line.

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::post;
use carryon_crds::common::Taps;
use carryon_crds::job::HiddenStatesDtype;
use carryon_crds::pool::Dtype;
use carryon_worker::base::routes::states_body;
use carryon_worker::exchange::wire::{HiddenStatesRequest, row_formats};
use carryon_worker::exchange::{PoolClient, SequenceStates};
use carryon_worker::numbers::RowFormat;
use carryon_worker::train::memory;
use futures::StreamExt as _;
use tokio::sync::mpsc;

const SEQUENCES: usize = 64;
const TOKENS: usize = 256;
const HIDDEN_SIZE: usize = 576;
/// Requests of a measurement.
const REQUESTS: usize = 8;
/// Requests at once: a trainer has two micro-batches in flight.
const IN_FLIGHT: usize = 2;
/// Measurements of each side, one after the other.
const ROUNDS: usize = 5;

fn taps() -> Taps {
    Taps { layers: vec![10, 20, 25, 28], final_norm: true }
}

/// States of one request, as the device thread hands them over.
fn precomputed(dtype: HiddenStatesDtype) -> Vec<SequenceStates> {
    let formats = row_formats(&taps(), Dtype::Bfloat16, dtype);
    let tap = |(seed, format): (usize, &RowFormat)| {
        let bytes = TOKENS * format.row_bytes(HIDDEN_SIZE);
        (0..bytes).map(|place| (place.wrapping_mul(seed + 31) >> 3) as u8).collect::<Vec<u8>>().into()
    };
    let taps: Vec<bytes::Bytes> = formats.iter().enumerate().map(tap).collect();
    let states = |index| SequenceStates { index, tokens: TOKENS, formats: formats.clone(), taps: taps.clone() };
    (0..SEQUENCES).map(states).collect()
}

/// Serves the precomputed states under the route of hidden states; returns the URL.
async fn serve(states: Vec<SequenceStates>) -> anyhow::Result<String> {
    let handler = async move || {
        let (out, received) = mpsc::unbounded_channel();
        for piece in states.iter().flat_map(|sequence| sequence.clone().encode(&taps(), HIDDEN_SIZE)) {
            // The receiver lives below.
            let _ = out.send((piece, None));
        }
        states_body(received, || {})
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
    let url = format!("http://{}", listener.local_addr()?);
    tokio::spawn(axum::serve(listener, Router::new().route("/v1/hidden-states", post(handler))).into_future());
    Ok(url)
}

/// Bytes per second through the protocol with `in_flight` requests at once.
async fn exchange(client: &PoolClient, in_flight: usize) -> anyhow::Result<f64> {
    let start = Instant::now();
    let fetches: Vec<_> = (0..in_flight).map(|_| tokio::spawn(fetch(client.clone(), REQUESTS / in_flight))).collect();
    let mut bytes = 0;
    for fetched in fetches {
        bytes += fetched.await??;
    }
    Ok(bytes as f64 / start.elapsed().as_secs_f64())
}

/// Asks `requests` times, one after the other; returns the bytes of the states decoded.
async fn fetch(client: PoolClient, requests: usize) -> anyhow::Result<usize> {
    let request = HiddenStatesRequest::new(vec![vec![1; TOKENS]; SEQUENCES], taps());
    let mut bytes = 0;
    for _ in 0..requests {
        let mut states = std::pin::pin!(client.hidden_states(request.clone()));
        while let Some(states) = states.next().await {
            bytes += states?.bytes();
        }
    }
    Ok(bytes)
}

/// Bytes per second of a plain copy of the same buffers.
fn loopback(states: &[SequenceStates]) -> anyhow::Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut sender = TcpStream::connect(listener.local_addr()?)?;
    let (mut receiver, _) = listener.accept()?;
    let total = REQUESTS * states.iter().map(SequenceStates::bytes).sum::<usize>();
    let start = Instant::now();
    std::thread::scope(|scope| {
        let sending = scope.spawn(move || -> std::io::Result<()> {
            for _ in 0..REQUESTS {
                states.iter().flat_map(|states| &states.taps).try_for_each(|tap| sender.write_all(tap))?;
            }
            Ok(())
        });
        let (mut buffer, mut received) = (vec![0; 1 << 20], 0);
        while received < total {
            match receiver.read(&mut buffer)? {
                0 => anyhow::bail!("the sender stopped after {received} bytes"),
                count => received += count,
            }
        }
        sending.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        Ok(total as f64 / start.elapsed().as_secs_f64())
    })
}

fn print(name: &str, value: f64, unit: &str) {
    println!("{}", serde_json::json!({"name": name, "value": value, "unit": unit}));
}

fn main() -> anyhow::Result<()> {
    // Pool and trainer are two processes: each has its own runtime here.
    let runtime = |name| tokio::runtime::Builder::new_multi_thread().worker_threads(2).thread_name(name).enable_all().build();
    // As trainers do.
    memory::keep_freed_pages();
    let (pool, runtime) = (runtime("pool")?, runtime("trainer")?);
    for (name, dtype) in [("bf16", HiddenStatesDtype::Model), ("float8", HiddenStatesDtype::Float8E4M3)] {
        let states = precomputed(dtype);
        let client = PoolClient::connect(&[pool.block_on(serve(states.clone()))?], Duration::from_secs(5))?;
        for _ in 0..ROUNDS {
            print(&format!("exchange_{name}"), runtime.block_on(exchange(&client, IN_FLIGHT))?, "B/s");
            print(&format!("exchange_{name}_one_request"), runtime.block_on(exchange(&client, 1))?, "B/s");
            print(&format!("loopback_{name}"), loopback(&states)?, "B/s");
        }
    }
    Ok(())
}
