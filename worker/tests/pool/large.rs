//! The largest heads, from the file to an answer.

use std::fs::File;
use std::io::Write as _;
use std::time::{Duration, Instant};

use carryon_crds::common::Taps;
use carryon_crds::job::{HeadSpec, Task};
use carryon_crds::wire::{BaseReference, limits};
use carryon_worker::exchange::PoolClient;
use carryon_worker::head::{Artifact, Weight, Weights, parameters};

use crate::process::Process;

/// Longest wait for a gateway to be ready.
const DEADLINE: Duration = Duration::from_secs(600);

#[tokio::test(flavor = "multi_thread")]
#[ignore = "a minute, and 36 GiB of memory"]
async fn a_head_of_a_billion_parameters_is_pushed_and_served_without_needless_copies() {
    let pool = Process::pool();
    let client = PoolClient::connect(std::slice::from_ref(&pool.url), DEADLINE).unwrap();
    let base = client.describe().await.unwrap();
    let head = HeadSpec { width: 6464, blocks: 2, attention_heads: 32, gate: false, ..HeadSpec::default() };
    let shape = head.shape(Task::CausalLM, Taps { layers: vec![1], final_norm: true }, base.hidden_size, 24);
    let count = parameters::count(&shape);
    assert!(count >= 1_000_000_000);
    let largest = base.limits.max_head_bytes.unwrap();
    if limits::head_bytes(count) > largest {
        eprintln!("SKIPPED, NOT TESTED: this machine's pools take heads of {largest} bytes at most");
        return;
    }
    let value = |index: usize| ((index * 7919 % 1000) as f32 / 1000.0 - 0.5) / 100.0;
    let weights: Weights = parameters::of(&shape)
        .into_iter()
        .map(|(name, shape)| {
            let values: Vec<f32> = (0..shape.iter().product()).map(value).collect();
            (name, Weight::new(shape, values))
        })
        .collect();
    let head = Artifact::new(shape, BaseReference { name: base.name, identity: base.identity, others: Vec::new() }, weights).unwrap();
    let (folder, digest) = (tempfile::tempdir().unwrap(), head.digest.clone());
    File::create(folder.path().join("head.safetensors")).unwrap().write_all(&head.to_bytes()).unwrap();
    drop(head);

    let begun = Instant::now();
    let gateway = Process::gateway(&pool, folder.path(), &digest);
    let ready = async || reqwest::get(format!("{}/readyz", gateway.url)).await.is_ok_and(|answer| answer.status() == 200);
    while !ready().await {
        assert!(begun.elapsed() < DEADLINE, "the gateway is not ready");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let pushed = begun.elapsed();
    let body = serde_json::json!({"model": "large", "prompt": [1, 2], "max_tokens": 3}).to_string();
    let answer = reqwest::Client::new().post(format!("{}/v1/completions", gateway.url)).body(body).send().await.unwrap();
    assert_eq!(answer.status(), 200, "{}", answer.text().await.unwrap());
    let (served, pooled, file) = (gateway.peak(), pool.peak(), limits::head_bytes(count));
    eprintln!("{count} parameters: ready in {pushed:?}; gateway {served}, pool {pooled} bytes at most");
    assert!(served < 256 << 20, "the gateway held {served} bytes");
    assert!(pooled < file / 4 * 9, "the pool held {pooled} bytes for a file of {file}");
}
