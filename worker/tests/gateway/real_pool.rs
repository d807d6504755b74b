//! The gateway before a pool that runs the real model.

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use carryon_crds::common::Taps;
use carryon_crds::job::{HeadSpec, Task};
use carryon_crds::pool::Engine;
use carryon_crds::wire::{BaseReference, ModelDescription};
use carryon_worker::exchange::PoolClient;
use carryon_worker::head::{Artifact, init};
use serde_json::{Value, json};

use crate::common::real_pool;
use crate::scripted_pool::Pool;
use crate::{Gateway, settings_of, texts};

/// An untrained head with an output, so that its answers are not the base's.
fn head(model: &ModelDescription, task: Task, seed: u64) -> Artifact {
    let labels = (task == Task::Classification).then(|| ["ham", "spam"].map(String::from).to_vec());
    let head = HeadSpec { width: 32, blocks: 1, attention_heads: 2, labels, ..HeadSpec::default() };
    let shape = head.shape(task, Taps { layers: vec![10, 20], final_norm: true }, model.hidden_size, 128);
    let mut weights = init::weights(&shape, seed);
    if let Some(output) = weights.get_mut("output.weight") {
        output.values.floats_mut().iter_mut().enumerate().for_each(|(index, value)| *value = (index * 7919 % 1000) as f32 / 1000.0 - 0.5);
    }
    Artifact::new(shape, BaseReference { name: model.name.clone(), identity: model.identity.clone(), others: Vec::new() }, weights).unwrap()
}

/// A gateway of one head and its pool.
async fn start(task: Task) -> (Gateway, PoolClient) {
    let (url, client) = pool().await;
    let head = head(&client.describe().await.unwrap(), task, 1);
    (open(&url, &[("maths", &head)]).await, client)
}

async fn pool() -> (String, PoolClient) {
    let url = real_pool(Engine { max_model_len: 512, max_num_seqs: 4, max_num_batched_tokens: 128, ..Engine::default() }).await;
    let client = PoolClient::connect(std::slice::from_ref(&url), Duration::from_secs(120)).unwrap();
    (url, client)
}

/// A gateway of heads, by the names they are served under.
async fn open(url: &str, heads: &[(&str, &Artifact)]) -> Gateway {
    let bytes: Vec<_> = heads.iter().map(|(_, head)| head.to_bytes()).collect();
    let heads: Vec<_> = heads.iter().zip(&bytes).map(|((name, _), bytes)| (*name, bytes.as_slice())).collect();
    Gateway::open(Arc::new(Pool::default()), |folder| {
        let mut settings = settings_of(folder, &heads, url.to_owned());
        settings.patience = Duration::from_secs(30);
        settings
    })
    .await
}

fn chat(model: &str) -> Value {
    let messages = json!([{"role": "user", "content": "Write a line of emoji, then a sentence about Paris."}]);
    json!({"model": model, "messages": messages, "max_tokens": 24, "temperature": 0})
}

async fn text(gateway: &Gateway, body: Value) -> String {
    let (status, answer) = gateway.post("/v1/chat/completions", body).await;
    assert_eq!(status, 200, "{answer}");
    answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_served_beside_its_base_and_pushed_again_when_lost() {
    let (gateway, pool) = start(Task::CausalLM).await;
    let (base, head) = (text(&gateway, chat("maths-base")).await, text(&gateway, chat("maths")).await);
    assert_ne!(base, head);
    let mut bypassed = chat("maths");
    bypassed["alpha"] = 0.into();
    assert_eq!(text(&gateway, bypassed).await, base, "α = 0 is the base");

    let endpoint = pool.endpoints().await.unwrap().remove(0);
    for answer in ["whole", "streamed"] {
        pool.delete_head(&endpoint, &gateway.digests[0]).await.unwrap();
        let found = match answer {
            "whole" => text(&gateway, chat("maths")).await,
            _ => texts(&gateway.stream("/v1/chat/completions", chat("maths")).await),
        };
        assert_eq!(found, head, "{answer}");
        assert!(pool.has_head(&endpoint, &gateway.digests[0]).await.unwrap());
    }

    let stop: String = base.chars().skip(5).take(4).collect();
    let mut stopped = chat("maths-base");
    stopped["stop"] = stop.as_str().into();
    assert_eq!(text(&gateway, stopped.clone()).await, base.split(&stop).next().unwrap());
    assert_eq!(texts(&gateway.stream("/v1/chat/completions", stopped).await), base.split(&stop).next().unwrap());

    // A prompt alone is scored, emoji included.
    let scored = json!({"model": "maths-base", "prompt": "Paris is 🙂", "max_tokens": 0, "echo": true, "logprobs": 1});
    let (_, scored) = gateway.post("/v1/completions", scored).await;
    let logprobs = &scored["choices"][0]["logprobs"];
    assert_eq!(scored["choices"][0]["text"], "Paris is 🙂");
    assert_eq!(logprobs["token_logprobs"][0], Value::Null);
    assert!(logprobs["token_logprobs"].as_array().unwrap()[1..].iter().all(|logprob| logprob.as_f64().unwrap() < 0.0));
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_a_batch_are_those_of_requests_alone() {
    let (gateway, _pool) = start(Task::CausalLM).await;
    let ask = async |body: Value| {
        let (status, answer) = gateway.post("/v1/completions", body).await;
        assert_eq!(status, 200, "{answer}");
        answer["choices"].as_array().unwrap().clone()
    };
    let prompts = ["Once upon a time", "1, 2, 3,"];
    let body = |prompt: Value, n: usize, seed: u64| json!({"model": "maths-base", "prompt": prompt, "n": n, "seed": seed, "max_tokens": 6, "logprobs": 2, "echo": true});
    let batch = ask(body(json!(prompts), 2, 11)).await;
    for (index, choice) in batch.iter().enumerate() {
        let mut alone = ask(body(json!(prompts[index / 2]), 1, 11 + index as u64 % 2)).await.remove(0);
        alone["index"] = index.into();
        assert_eq!(*choice, alone, "log probabilities to the bit");
    }
    let texts: std::collections::BTreeSet<_> = batch.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts.len(), 4, "answers to one prompt differ: {texts:?}");

    // Bias, penalties and filters reach the pool.
    let drawn = async |change: Value| {
        let mut body = json!({"model": "maths-base", "prompt": "Once", "max_tokens": 2, "temperature": 0, "logprobs": 0});
        body.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        ask(body).await[0]["logprobs"]["tokens"].clone()
    };
    let forced = drawn(json!({"logit_bias": {"4242": 100}})).await;
    assert_eq!(forced[0], forced[1], "nothing else has a chance");
    let turns = drawn(json!({"logit_bias": {"4242": 100, "4343": 100}, "repetition_penalty": 2})).await;
    assert_ne!(turns[0], turns[1], "what was drawn has half its logit");
    let greedy = drawn(json!({})).await;
    for change in [json!({"top_k": 1, "temperature": 2}), json!({"min_p": 1, "temperature": 2})] {
        assert_eq!(drawn(change).await, greedy, "one token is left");
    }
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "lm-eval takes a gigabyte: `make test-all` installs it"]
async fn lm_eval_scores_and_continues_batches_of_prompts() {
    let (gateway, pool) = start(Task::CausalLM).await;
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), pool.tokenizer().await.unwrap()).unwrap();
    let class = r#"{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), class).unwrap();
    let mut client = Command::new(lm_eval_python());
    client.arg("../tests/client_lm_eval.py").args([&format!("{}/v1", gateway.url), "maths"]).arg(folder.path());
    let output = tokio::task::spawn_blocking(move || client.output().unwrap()).await.unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).concat();
    assert!(output.status.success(), "{said}");
}

/// A Python with lm-eval, from the environment variable `CARRYON_LM_EVAL_PYTHON` or the cache that `make test-all` fills.
fn lm_eval_python() -> PathBuf {
    let cached = || PathBuf::from(std::env::var("HOME").unwrap()).join(".cache/carry-on/venvs/lm-eval/bin/python");
    std::env::var("CARRYON_LM_EVAL_PYTHON").map_or_else(|_| cached(), PathBuf::from)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_classifier_is_served_by_its_labels() {
    let (gateway, _pool) = start(Task::Classification).await;
    let (status, answer) = gateway.post("/v1/classify", json!({"input": ["win money now", "see you at lunch 🙂"]})).await;
    assert_eq!(status, 200, "{answer}");
    let one = gateway.post("/v1/classify", json!({"input": "see you at lunch 🙂"})).await.1;
    assert_eq!(answer["data"][1]["scores"], one["data"][0]["scores"], "company changes no bit");
    let sum: f64 = answer["data"][0]["scores"].as_object().unwrap().values().map(|score| score.as_f64().unwrap()).sum();
    assert!((sum - 1.0).abs() < 1e-6);
}

/// Log probabilities of a greedy answer, and what it took.
async fn scored(gateway: &Gateway, model: &str) -> (u16, Value) {
    let body = json!({"model": model, "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0, "logprobs": 2});
    let (status, mut answer) = gateway.post("/v1/completions", body).await;
    ["id", "created"].iter().for_each(|name| answer[name] = Value::Null);
    (status, answer)
}

/// Labels of a text, to the digits of a single-precision number.
async fn labels(gateway: &Gateway) -> (u16, Value) {
    gateway.post("/v1/classify", json!({"model": "spam", "input": "win money now"})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_behind_one_gateway_answer_with_the_bits_of_each_alone() {
    let (url, pool) = pool().await;
    let model = pool.describe().await.unwrap();
    let [maths, prose, mut broken] = [1, 2, 3].map(|seed| head(&model, Task::CausalLM, seed));
    let spam = head(&model, Task::Classification, 4);
    broken.weights.get_mut("output.weight").unwrap().values.floats_mut().fill(f32::NAN);
    let broken = Artifact::new(broken.shape, broken.base, broken.weights).unwrap();
    let mut alone = Vec::new();
    for (name, head) in [("maths", &maths), ("prose", &prose)] {
        let gateway = open(&url, &[(name, head)]).await;
        alone.push(scored(&gateway, name).await);
        if name == "prose" {
            alone.push(scored(&gateway, "maths-base").await);
        }
    }
    let labels_alone = labels(&open(&url, &[("spam", &spam)]).await).await;
    let different = |left: usize, right: usize| alone[left].1["choices"][0]["logprobs"] != alone[right].1["choices"][0]["logprobs"];
    assert!(different(0, 1) && different(1, 2) && different(0, 2), "{alone:?}");

    let gateway = open(&url, &[("maths", &maths), ("broken", &broken), ("prose", &prose), ("spam", &spam)]).await;
    let together = ["maths", "prose", "maths-base"].map(|name| scored(&gateway, name));
    let (together, failed, labelled) =
        futures::future::join3(futures::future::join_all(together), scored(&gateway, "broken"), labels(&gateway)).await;
    assert_eq!((together, labelled), (alone.clone(), labels_alone));
    assert_eq!((failed.0, &failed.1["error"]["code"]), (500, &json!("head_not_finite")));

    let endpoint = pool.endpoints().await.unwrap().remove(0);
    pool.delete_head(&endpoint, &prose.digest).await.unwrap();
    assert_eq!(scored(&gateway, "maths").await, alone[0]);
    assert!(!pool.has_head(&endpoint, &prose.digest).await.unwrap(), "nobody has asked for it");
    assert_eq!(scored(&gateway, "prose").await, alone[1]);
    let metrics = gateway.http.get(format!("{}/metrics", gateway.url)).send().await.unwrap().text().await.unwrap();
    assert!(
        metrics.contains("carryon_gateway_head_pushes_total 2\n"),
        "the one that the pool lacked, and one of the others again: {metrics}"
    );
}
