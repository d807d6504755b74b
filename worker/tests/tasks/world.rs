//! A pool that runs the real model, a head trained on it, and a gateway that serves the head.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use carryon_crds::common::Taps;
use carryon_crds::job::{DataFormat, HeadSpec, Optimizer, Split, Task, Training};
use carryon_crds::names::artifact_folder;
use carryon_crds::pool::{Device, Engine};
use carryon_crds::wire::head::Metrics;
use carryon_crds::wire::{ExitCode, Figure, HeadManifest, ServeConfig, ServeHead, TapChoice, TerminationMessage, TrainConfig};
use carryon_worker::head::artifact;
use carryon_worker::serve::{Settings, serve};
use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainArgs, run_until};
use serde_json::{Value, json};
use tokio::net::TcpListener;

use crate::common::real_pool;

/// Folder of the data, from the environment variable `CARRYON_DATA` or the cache that `make test` fills.
fn data() -> PathBuf {
    let cached = || PathBuf::from(std::env::var("HOME").unwrap()).join(".cache/carry-on/data");
    let path = std::env::var("CARRYON_DATA").map_or_else(|_| cached(), PathBuf::from).join("tasks");
    assert!(path.is_dir(), "{} is missing: `make test` makes it, or set CARRYON_DATA", path.display());
    path
}

/// Held-out lines of a data set.
pub fn eval(name: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(data().join(format!("{name}-eval.jsonl"))).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The turn that SmolLM2's template begins with.
const SYSTEM: &str = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n";

/// A head that is served.
pub struct World {
    manifest: HeadManifest,
    url: String,
    http: reqwest::Client,
    _folder: tempfile::TempDir,
}

impl World {
    /// Trains a head of `task` on the data set `name`, with what `change` asks for beside, and serves it as `head`.
    pub async fn train(name: &str, task: Task, change: impl FnOnce(&mut TrainConfig)) -> Self {
        let engine = Engine { max_model_len: 512, max_num_seqs: 8, max_num_batched_tokens: 256, ..Engine::default() };
        let (pool, folder) = (real_pool(engine).await, tempfile::tempdir().unwrap());
        let mut config = config(name, task);
        change(&mut config);
        let path = |name: &str| folder.path().join(name);
        std::fs::write(path("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        let args = TrainArgs {
            config: path("config.json"),
            pool: vec![pool.clone()],
            other_pool: Vec::new(),
            data: data(),
            output: path("output"),
            state_cache: None,
            init_head: None,
            plan: false,
            device: Device::Cpu,
            listen: "127.0.0.1:0".parse().unwrap(),
            termination_log: Some(path("last-words")),
            threads: Some(2),
        };
        let ended = tokio::task::spawn_blocking(move || run_until(&args, &Stop::default())).await.unwrap();
        assert_eq!(ended.unwrap(), ExitCode::Complete);
        let words: TerminationMessage = serde_json::from_slice(&std::fs::read(path("last-words")).unwrap()).unwrap();
        let head = path("output").join(artifact_folder(&words.digest.unwrap()));
        let (_, manifest) = artifact::read(&head).unwrap();
        assert!(std::fs::read_to_string(head.join("report.html")).unwrap().contains("On held-out samples"));
        println!("{name}: {} {:?}", words.message, manifest.metrics.evaluation);
        let url = gateway(pool, head, manifest.digest.clone()).await;
        Self { manifest, url, http: reqwest::Client::new(), _folder: folder }
    }

    /// Of head.json.
    pub fn metrics(&self) -> &Metrics {
        &self.manifest.metrics
    }

    /// Those on held-out samples.
    pub fn figures(&self) -> &BTreeMap<String, Figure> {
        &self.metrics().evaluation
    }

    /// What the gateway says of the texts of some lines.
    pub async fn classify(&self, rows: &[Value]) -> Vec<Value> {
        let texts: Vec<&Value> = rows.iter().map(|row| &row["text"]).collect();
        let (status, answer) = self.post("/v1/classify", json!({"input": texts})).await;
        assert_eq!(status, 200, "{answer}");
        let data = answer["data"].as_array().unwrap().clone();
        assert!(data.iter().enumerate().all(|(index, found)| found["index"] == index));
        data
    }

    /// Log probability of what the `field` of each line says, as an answer to its prompt.
    pub async fn likelihoods(&self, model: &str, rows: &[Value], field: &str) -> Vec<f64> {
        let prompt =
            |row: &Value| format!("{SYSTEM}<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", row["prompt"].as_str().unwrap());
        let mut found = Vec::new();
        for rows in rows.chunks(8) {
            let texts: Vec<String> = rows.iter().map(|row| format!("{}{}<|im_end|>", prompt(row), row[field].as_str().unwrap())).collect();
            let body = json!({"model": model, "prompt": texts, "max_tokens": 0, "echo": true, "logprobs": 0});
            let (status, answer) = self.post("/v1/completions", body).await;
            assert_eq!(status, 200, "{answer}");
            for (row, choice) in rows.iter().zip(answer["choices"].as_array().unwrap()) {
                let numbers = |name: &str| choice["logprobs"][name].as_array().unwrap().iter().map(Value::as_f64).collect::<Vec<_>>();
                let tokens = numbers("text_offset").into_iter().zip(numbers("token_logprobs"));
                let own = tokens.filter(|(offset, _)| offset.unwrap() as usize >= prompt(row).chars().count());
                found.push(own.map(|(_, logprob)| logprob.unwrap()).sum());
            }
        }
        found
    }

    /// Status and answer.
    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        let response = self.http.post(format!("{}{path}", self.url)).json(&body).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }
}

/// One block of width 64 over two depths, a few hundred steps at most.
fn config(name: &str, task: Task) -> TrainConfig {
    TrainConfig {
        name: name.to_owned(),
        namespace: "default".to_owned(),
        task,
        taps: Some(TapChoice::Layers(Taps { layers: vec![20], final_norm: true })),
        hidden_states_dtype: Default::default(),
        other_pools: Vec::new(),
        head: HeadSpec { width: 64, blocks: 1, ..HeadSpec::default() },
        init_head: None,
        format: DataFormat::Auto,
        split: Split { train: vec![format!("{name}-train.jsonl")], evaluation: vec![format!("{name}-eval.jsonl")], ..Split::default() },
        max_length: 48,
        overlong: Default::default(),
        on_error: Default::default(),
        targets: Default::default(),
        thinking: Default::default(),
        add_eos_token: false,
        split_special_tokens: true,
        training: Training { num_train_epochs: 6, optim: Optimizer::AdamW, learning_rate: 1e-3, weight_decay: 0.05, ..Training::default() },
        evaluation: Default::default(),
        checkpoint: Default::default(),
    }
}

async fn gateway(pool: String, head: PathBuf, digest: String) -> String {
    let heads = vec![ServeHead { name: "head".to_owned(), served_model_name: "head".to_owned(), digest }];
    let settings = Settings {
        config: ServeConfig { base_model_name: "base".to_owned(), heads, allowed_origins: vec![], namespace: "default".to_owned() },
        pool: vec![pool],
        other_pools: vec![],
        heads: vec![head],
        api_key_files: vec![],
        patience: Duration::from_secs(30),
        renewal: Duration::from_secs(120),
        drain: Duration::from_secs(5),
    };
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { serve(listener, settings, std::future::pending()).await.unwrap() });
    let ready = async || reqwest::get(format!("{url}/readyz")).await.is_ok_and(|response| response.status() == 200);
    let deadline = tokio::time::Instant::now() + Duration::from_secs(60);
    while !ready().await {
        assert!(tokio::time::Instant::now() < deadline, "the gateway does not get ready");
        tokio::task::yield_now().await;
    }
    url
}
