//! Heads that read several bases, before pools that run them: what is answered is what training computes of whole sequences.

use std::sync::Arc;
use std::time::Duration;

use carryon_crds::common::Taps;
use carryon_crds::job::{HeadSpec, Task};
use carryon_crds::pool::{Dtype, Engine};
use carryon_crds::wire::head::OtherBase;
use carryon_crds::wire::{BaseConfig, BaseReference, ModelDescription};
use carryon_worker::base::{self, Placement};
use carryon_worker::exchange::mixing::{ROWS_AHEAD, TapRows};
use carryon_worker::exchange::wire::{ClassifyRequest, ErrorCode, GenerateEvent, GenerateRequest};
use carryon_worker::exchange::{ClientError, PoolClient};
use carryon_worker::head::pass::{Keep, PackedBatch, Pass};
use carryon_worker::head::{Artifact, artifact, init};
use carryon_worker::kernel::{Backend as _, Backward as _, Cpu, PageTable};
use carryon_worker::numbers::{RowFormat, to_bytes};
use carryon_worker::serve::{ServeError, Settings, serve};
use carryon_worker::text::Tokenizer;
use carryon_worker::train::stop::Stop;
use carryon_worker::train::{TrainArgs, run_until};
use futures::StreamExt as _;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::runtime::Runtime;

use crate::common::engine::{Engine as Reference, cpu, load};
use crate::common::tiny::{Random, Tiny, vocabulary};
use crate::common::tokens;
use crate::scripted_pool;
use crate::{Gateway, settings_of, wait};

const ENGINE: Engine = Engine {
    device: carryon_crds::pool::Device::Cpu,
    kv_cache_memory: None,
    weight_dtype: None,
    max_model_len: 500,
    max_num_seqs: 4,
    max_num_batched_tokens: 32,
    tensor_parallel_size: None,
};
const FLOAT: RowFormat = RowFormat::Plain(Dtype::Float32);

/// A pool, and its model run here.
struct Pool {
    url: String,
    client: PoolClient,
    model: ModelDescription,
    reference: Reference<Cpu>,
    server: Server,
    _folder: tempfile::TempDir,
}

/// A runtime of its own, so that a pool can end as a process does: in the middle of everything.
struct Server(Option<Runtime>);

impl Server {
    fn kill(&mut self) {
        self.0.take().into_iter().for_each(Runtime::shutdown_background);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Pool {
    async fn start(tiny: Tiny) -> Self {
        let folder = tiny.folder();
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let config = BaseConfig { name: "test".to_owned(), dtype: Dtype::Float32, engine: ENGINE, text_only: false };
        let path = folder.path().to_owned();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            drop(base::serve(listener, config, path, Placement::cpu(1), Duration::ZERO, std::future::pending()).await);
        });
        let server = Server(Some(runtime));
        let client = PoolClient::connect(std::slice::from_ref(&url), Duration::from_secs(60)).unwrap();
        let model = client.describe().await.unwrap();
        let reference = load(folder.path(), Dtype::Float32, 1);
        Self { url, client, model, reference, server, _folder: folder }
    }

    fn states(&self, tokens: &[u32], taps: &Taps) -> Vec<Vec<f32>> {
        self.reference.states(&[tokens], &mut [PageTable::default()], taps)
    }

    /// Sequences that it serves.
    async fn active(&self) -> f64 {
        let text = reqwest::get(format!("{}/metrics", self.url)).await.unwrap().text().await.unwrap();
        let line = text.lines().find(|line| line.starts_with("carryon_queue_length{state=\"active\"}")).unwrap_or_else(|| panic!("{text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// Three bases of one tokenizer, of different weights, widths and depths.
async fn pools() -> [Pool; 3] {
    let second = Tiny { seed: 11, hidden: 24, layers: 2, heads: 4, head_dim: 6, ..Tiny::default() };
    let third = Tiny { seed: 13, hidden: 56, layers: 4, heads: 2, head_dim: 16, ..Tiny::default() };
    [Pool::start(Tiny::default()).await, Pool::start(second).await, Pool::start(third).await]
}

fn taps(pool: usize) -> Taps {
    [
        Taps { layers: vec![1, 2], final_norm: true },
        Taps { layers: vec![0, 2], final_norm: true },
        Taps { layers: vec![3], final_norm: false },
    ][pool]
        .clone()
}

fn reference(pool: &Pool) -> BaseReference {
    BaseReference { name: pool.model.name.clone(), identity: pool.model.identity.clone(), others: Vec::new() }
}

/// A head of the bases of all `pools`, whose output is not zero.
fn head(pools: &[&Pool], task: Task) -> Artifact {
    let labels = (task == Task::Classification).then(|| ["ham", "spam"].map(String::from).to_vec());
    let head =
        HeadSpec { width: 16, blocks: 2, attention_heads: 2, gate: task == Task::CausalLM, alpha: 0.75, labels, ..HeadSpec::default() };
    let other = |(place, pool): (usize, &&Pool)| OtherBase { taps: taps(place), hidden_size: pool.model.hidden_size };
    let others = pools.iter().enumerate().skip(1).map(other).collect();
    let shape = head.shape(task, taps(0), pools[0].model.hidden_size, 24).mixing(others);
    let mut weights = init::weights(&shape, 5);
    let mut random = Random(5);
    for value in weights.get_mut("output.weight").into_iter().flat_map(|weight| weight.values.floats_mut()) {
        *value = random.unit();
    }
    let others = pools.iter().skip(1).map(|pool| reference(pool)).collect();
    Artifact::new(shape, BaseReference { others, ..reference(pools[0]) }, weights).unwrap()
}

/// What training computes of a sequence with the head: of these rows, or of the whole.
fn output(pools: &[&Pool], head: &Artifact, tokens: &[u32], rows: Vec<u32>) -> Vec<f32> {
    let backend = cpu(1);
    let weights = backend.train(Arc::new(head.weights.clone())).unwrap();
    let states: Vec<_> = pools.iter().enumerate().flat_map(|(place, pool)| pool.states(tokens, &taps(place))).collect();
    let batch = PackedBatch {
        formats: vec![FLOAT; states.len()],
        taps: states.iter().map(|rows| vec![to_bytes(rows, Dtype::Float32)]).collect(),
        lengths: vec![tokens.len()],
        rows,
    };
    let output = Pass::new(&head.shape, backend.clone()).unwrap().forward(&weights, &batch, Keep::Nothing).unwrap().output;
    backend.read(&output).unwrap().into_owned()
}

/// The greedy continuation, every token from what training computes of the whole sequence before it.
fn greedy(pools: &[&Pool], head: &Artifact, prompt: &[u32], count: usize) -> Vec<u32> {
    let backend = cpu(1);
    let mut tokens = prompt.to_vec();
    for _ in 0..count {
        let last = pools[0].states(&tokens, &Taps { layers: vec![], final_norm: true }).remove(0);
        let width = pools[0].model.hidden_size as usize;
        let delta = backend.write(&output(pools, head, &tokens, vec![tokens.len() as u32 - 1]), width).unwrap();
        let mut y = backend.write(&last[last.len() - width..], width).unwrap();
        backend.combine(&mut y, &[0], &[head.shape.alpha as f32], &delta, Dtype::Float32).unwrap();
        let logits = pools[0].reference.logits(&backend.read(&y).unwrap());
        tokens.push((0..logits.len()).rev().max_by(|one, other| logits[*one].total_cmp(&logits[*other])).unwrap() as u32);
    }
    tokens.split_off(prompt.len())
}

/// What log probabilities call these tokens.
fn names(tokens: &[u32]) -> Vec<String> {
    let vocabulary = vocabulary();
    tokens.iter().map(|token| vocabulary[*token as usize].replace('Ġ', " ").replace('Ċ', "\n")).collect()
}

fn body(model: &str, prompt: &[u32], max_tokens: usize) -> Value {
    json!({"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": 0})
}

async fn open(pools: &[&Pool], head: &Artifact) -> Gateway {
    let bytes = head.to_bytes();
    Gateway::open(Arc::new(scripted_pool::Pool::default()), |folder| settings(folder, pools, &bytes)).await
}

fn settings(folder: &std::path::Path, pools: &[&Pool], head: &[u8]) -> Settings {
    let other_pools = pools.iter().skip(1).map(|pool| pool.url.clone()).collect();
    Settings { other_pools, patience: Duration::from_secs(30), ..settings_of(folder, &[("maths", head)], pools[0].url.clone()) }
}

async fn answered(gateway: &Gateway, body: Value) -> Vec<String> {
    let (status, answer) = gateway.post("/v1/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    listed(&answer["choices"][0])
}

fn listed(choice: &Value) -> Vec<String> {
    choice["logprobs"]["tokens"].as_array().into_iter().flatten().map(|token| token.as_str().unwrap().to_owned()).collect()
}

async fn streamed(gateway: &Gateway, body: Value) -> Vec<String> {
    let events = gateway.stream("/v1/completions", body).await;
    let (done, chunks) = events.split_last().unwrap();
    assert_eq!(done, "[DONE]");
    chunks.iter().flat_map(|chunk| listed(&serde_json::from_str::<Value>(chunk).unwrap()["choices"][0])).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_of_several_bases_is_what_training_computes_of_them() {
    let [one, two, three] = pools().await;
    for pools in [&[&one, &two][..], &[&one, &two, &three]] {
        let head = head(pools, Task::CausalLM);
        let gateway = open(pools, &head).await;
        // The longer prompt is more than what is kept of rows that nobody takes.
        let prompts = [tokens(7, 101, 1), tokens(ROWS_AHEAD + 40, 101, 2), tokens(40, 101, 3)];
        let expected: Vec<_> = prompts.iter().map(|prompt| names(&greedy(pools, &head, prompt, 12))).collect();
        assert_eq!(answered(&gateway, body("maths", &prompts[0], 12)).await, expected[0]);
        let together = prompts.iter().map(|prompt| streamed(&gateway, body("maths", prompt, 12)));
        assert_eq!(futures::future::join_all(together).await, expected, "streamed, and together");
        let mut batch = body("maths", &[], 12);
        batch["prompt"] = json!(prompts[..2].to_vec());
        batch["n"] = 2.into();
        let (status, batch) = gateway.post("/v1/completions", batch).await;
        let found: Vec<_> = batch["choices"].as_array().unwrap().iter().map(listed).collect();
        assert_eq!((status, found), (200, [0, 0, 1, 1].map(|place| expected[place].clone()).to_vec()));

        let base = answered(&gateway, body("maths-base", &prompts[0], 12)).await;
        assert_ne!(base, expected[0]);
        let bypassed = json!({"model": "maths", "prompt": prompts[0], "max_tokens": 12, "temperature": 0, "logprobs": 0, "alpha": 0});
        assert_eq!(answered(&gateway, bypassed).await, base, "α = 0 is the base");
        let mut scored = body("maths", &prompts[2], 1);
        scored["echo"] = true.into();
        let (_, scored) = gateway.post("/v1/completions", scored).await;
        let logprobs = scored["choices"][0]["logprobs"]["token_logprobs"].as_array().unwrap();
        assert!(logprobs.len() == 41 && logprobs[1..].iter().all(|logprob| logprob.as_f64().unwrap() < 0.0), "{logprobs:?}");
        for pool in pools {
            wait("the end of all sequences", async || pool.active().await == 0.0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_text_is_judged_by_several_bases_as_in_training() {
    let [one, two, three] = pools().await;
    let tokenizer = Tokenizer::from_json(&one.client.tokenizer().await.unwrap()).unwrap();
    // One is longer than what is kept of rows that nobody takes; all together are more than a pool serves at once.
    let texts: Vec<String> = (0..9).map(|place| "a base that two can read ".repeat(1 + 2 * place)).collect();
    for pools in [&[&one, &two][..], &[&one, &two, &three]] {
        let head = head(pools, Task::Classification);
        let gateway = open(pools, &head).await;
        let (status, answer) = gateway.post("/v1/classify", json!({"model": "maths", "input": texts})).await;
        assert_eq!(status, 200, "{answer}");
        let mut longest = 0;
        for (text, judged) in texts.iter().zip(answer["data"].as_array().unwrap()) {
            let ids = tokenizer.encode(text, true).unwrap();
            longest = longest.max(ids.len());
            let logits = output(pools, &head, &ids, Vec::new());
            let expected = 1.0 / (1.0 + f64::from(logits[1] - logits[0]).exp());
            let found = judged["scores"]["ham"].as_f64().unwrap();
            assert!((found - expected).abs() < 1e-4, "{text:?}: {found}, {expected}");
        }
        assert!(longest > ROWS_AHEAD && longest < ENGINE.max_model_len as usize, "{longest}");
        assert_eq!(answer["data"].as_array().unwrap().len(), texts.len());
        for pool in pools {
            wait("the end of all sequences", async || pool.active().await == 0.0).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_that_decide_about_a_head_are_those_of_all_its_bases() {
    let [one, two, _] = pools().await;
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    let (learned, other) = ([5, 6], [8, 9]);
    let line = |seed: usize, answer: [u32; 2]| {
        let prompt = tokens(3 + seed % 5, 101, seed as u64);
        let ids = [&prompt[..], &answer].concat();
        json!({"input_ids": ids, "prompt_length": prompt.len()}).to_string() + "\n"
    };
    std::fs::create_dir(path("data")).unwrap();
    std::fs::write(path("data/train.jsonl"), (0..16).map(|seed| line(seed, learned)).collect::<String>()).unwrap();
    std::fs::write(path("data/eval.jsonl"), (16..20).map(|seed| line(seed, if seed < 19 { learned } else { other })).collect::<String>())
        .unwrap();
    let config = json!({
        "name": "maths", "namespace": "default", "task": "CausalLM", "format": "Tokenized", "maxLength": 64, "overlong": "Truncate",
        "taps": taps(0), "otherPools": [{"taps": taps(1)}], "head": {"width": 16, "blocks": 1, "attentionHeads": 2},
        "split": {"train": ["train.jsonl"], "evaluation": ["eval.jsonl"]},
        "training": {"numTrainEpochs": 60, "perDeviceTrainBatchSize": 4}, "checkpoint": {},
        "evaluation": {"generation": {"maxNewTokens": 2}},
    });
    std::fs::write(path("train.json"), config.to_string()).unwrap();
    let args = TrainArgs {
        config: path("train.json"),
        pool: vec![one.url.clone()],
        other_pool: vec![two.url.clone()],
        data: path("data"),
        output: path("output"),
        state_cache: None,
        init_head: None,
        plan: false,
        device: carryon_crds::pool::Device::Cpu,
        listen: "127.0.0.1:0".parse().unwrap(),
        termination_log: None,
        threads: Some(1),
    };
    tokio::task::spawn_blocking(move || run_until(&args, &Stop::default())).await.unwrap().unwrap();
    let head = std::fs::read_dir(path("output/heads")).unwrap().next().unwrap().unwrap().path();
    let (_, manifest) = artifact::read(&head).unwrap();
    assert_eq!(manifest.metrics.evaluation["exact_match"].value, 0.75, "{:?}", manifest.metrics);
    let report = std::fs::read_to_string(head.join("report.html")).unwrap();
    assert!(report.contains("With the head"), "it has no examples");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_ends_its_sequences_in_all_pools() {
    let [one, two, _] = pools().await;
    let gateway = open(&[&one, &two], &head(&[&one, &two], Task::CausalLM)).await;
    let mut body = body("maths", &tokens(20, 101, 1), 400);
    body["stream"] = true.into();
    let mut response = gateway.http.post(format!("{}/v1/completions", gateway.url)).body(body.to_string()).send().await.unwrap();
    assert!(response.chunk().await.unwrap().is_some());
    drop(response);
    for pool in [&one, &two] {
        wait("the end of the sequence", async || pool.active().await == 0.0).await;
    }
    // A stop string ends it as well.
    let said = answered(&gateway, json!({"model": "maths", "prompt": [3, 4], "max_tokens": 9, "temperature": 0, "logprobs": 0})).await;
    let stopped = json!({"model": "maths", "prompt": [3, 4], "max_tokens": 400, "temperature": 0, "stop": said[1]});
    assert_eq!(gateway.post("/v1/completions", stopped).await.1["choices"][0]["finish_reason"], "stop");
    for pool in [&one, &two] {
        wait("the end of the sequence", async || pool.active().await == 0.0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_that_dies_ends_the_answer_with_an_error_event() {
    let [one, mut two, _] = pools().await;
    let gateway = open(&[&one, &two], &head(&[&one, &two], Task::CausalLM)).await;
    let mut long = body("maths", &tokens(20, 101, 1), 400);
    long["stream"] = true.into();
    let mut response = gateway.http.post(format!("{}/v1/completions", gateway.url)).body(long.to_string()).send().await.unwrap();
    let mut text = response.chunk().await.unwrap().unwrap().to_vec();
    two.server.kill();
    while let Some(piece) = response.chunk().await.unwrap() {
        text.extend(piece);
    }
    let text = String::from_utf8(text).unwrap();
    let last = text.trim_end().rsplit("data: ").next().unwrap();
    assert_eq!(serde_json::from_str::<Value>(last).unwrap()["error"]["code"], "pool_unavailable", "{last}");
    wait("the end of the sequence", async || one.active().await == 0.0).await;
    assert_eq!(answered(&gateway, body("maths-base", &[3, 4], 3)).await.len(), 3, "the base alone needs no other pool");
}

async fn failure(pools: &[&Pool], head: &Artifact) -> ServeError {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    serve(listener, settings(folder.path(), pools, &head.to_bytes()), std::future::pending()).await.unwrap_err()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_without_its_other_bases_is_refused_by_name() {
    let [one, two, three] = pools().await;
    let mixed = head(&[&one, &two], Task::CausalLM);
    assert!(matches!(failure(&[&one], &mixed).await, ServeError::OtherPools { trained_on: 1, found: 0, .. }));
    assert!(matches!(failure(&[&one, &two, &three], &mixed).await, ServeError::OtherPools { trained_on: 1, found: 2, .. }));
    assert!(matches!(failure(&[&one, &three], &mixed).await, ServeError::Identity { member: "weights", .. }));

    push(&one, &mixed).await;
    let refused = one.client.generate(None, &asked(&mixed, &[1, 2])).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("reads 1 further bases: their states come with the request"), "{refused}");
    let classifier = head(&[&one, &two], Task::Classification);
    push(&one, &classifier).await;
    let request = ClassifyRequest { sequences: vec![vec![1, 2]], head: classifier.digest.clone() };
    let refused = one.client.classify(None, &request).await.unwrap_err().to_string();
    assert!(refused.contains("reads 1 further bases: their states come with the request"), "{refused}");
    let alone = GenerateRequest::greedy(vec![1], 1);
    let refused = one.client.generate_mixed(None, &alone, &[24; 3]).await.map(drop).unwrap_err().to_string();
    assert!(refused.contains("no head that reads several bases is asked for"), "{refused}");
}

async fn push(pool: &Pool, head: &Artifact) {
    let endpoint = pool.client.endpoints().await.unwrap().remove(0);
    pool.client.put_head(&endpoint, &head.digest, head.to_bytes(), Duration::from_secs(60)).await.unwrap();
}

fn asked(head: &Artifact, prompt: &[u32]) -> GenerateRequest {
    GenerateRequest { head: Some(head.digest.clone()), ..GenerateRequest::greedy(prompt.to_vec(), 4) }
}

/// Rows of the second base, all with this number.
fn frame(first: usize, rows: usize, value: f32) -> bytes::Bytes {
    let tap = (FLOAT, to_bytes(&vec![value; rows * 24], Dtype::Float32));
    TapRows { first, rows, taps: vec![tap; 3] }.encode(&[24; 3])
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_cannot_be_used_end_their_own_answer_alone() {
    let [one, two, _] = pools().await;
    let mixed = head(&[&one, &two], Task::CausalLM);
    push(&one, &mixed).await;
    let last = async |pieces: &[bytes::Bytes], ends: bool| {
        let (rows, events) = one.client.generate_mixed(None, &asked(&mixed, &[1, 2, 3]), &[24; 3]).await.unwrap();
        let mut events = events.boxed();
        for piece in pieces {
            rows.send(piece.clone()).await.unwrap();
        }
        let _rows = (!ends).then_some(rows);
        let mut last: Option<Result<GenerateEvent, ClientError>> = None;
        while let Some(event) = events.next().await {
            last = Some(event);
        }
        match last.unwrap().unwrap() {
            GenerateEvent::Error { error } => error,
            other => panic!("{other:?}"),
        }
    };
    let (waiting, _events) = one.client.generate_mixed(None, &asked(&mixed, &[1, 2]), &[24; 3]).await.unwrap();
    for (pieces, ends, code, text) in [
        (vec![frame(0, 3, f32::NAN)], false, ErrorCode::HeadNotFinite, "not finite"),
        (vec![frame(0, 1, 1.0), frame(2, 1, 1.0)], false, ErrorCode::InvalidRequest, "are expected from 1 on"),
        (vec![frame(0, ROWS_AHEAD + 1, 1.0)], false, ErrorCode::InvalidRequest, "exceed the bound"),
        (vec![bytes::Bytes::from_static(&[0xff; 64])], false, ErrorCode::InvalidRequest, "exceeds the bound"),
        (vec![frame(0, 2, 1.0)], true, ErrorCode::Unavailable, "ended before the answer"),
        (vec![frame(0, 3, 1.0).slice(..90)], true, ErrorCode::InvalidRequest, "stream ended inside a frame"),
    ] {
        let error = last(&pieces, ends).await;
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(text), "{error}");
    }
    // One that waits for its rows holds up nobody.
    wait("the end of the others", async || one.active().await == 1.0).await;
    drop(waiting);
    wait("the end of the one that waits", async || one.active().await == 0.0).await;
}
