//! What workers and operators of the first version say, word by word: a later pool understands a trainer of that version, and answers so that
//! the trainer does. Members that the first version does not have are ignored.

use std::collections::HashMap;

use carryon_crds::pool::Dtype;
use carryon_crds::wire::{BaseConfig, ServeConfig, TrainConfig};
use carryon_worker::exchange::wire::GenerateRequest;
use reqwest::Response;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype as WireDtype, TensorView};
use serde_json::{Value, json};

use crate::harness::{ENGINE, Pool};

async fn post(pool: &Pool, path: &str, body: impl Into<reqwest::Body>) -> Response {
    let expected = pool.description.identity.digest();
    reqwest::Client::new().post(format!("{}{path}", pool.url)).header("x-carryon-identity", expected).body(body).send().await.unwrap()
}

/// Names, number types and shapes of a safetensors file.
fn tensors(bytes: &[u8]) -> Vec<(String, WireDtype, Vec<usize>)> {
    let file = SafeTensors::deserialize(bytes).unwrap();
    let mut tensors: Vec<_> = file.tensors().into_iter().map(|(name, tensor)| (name, tensor.dtype(), tensor.shape().to_vec())).collect();
    tensors.sort_by(|left, right| left.0.cmp(&right.0));
    tensors
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trainer_of_the_first_version_is_understood() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;

    let model: Value = reqwest::get(format!("{}/v1/model", pool.url)).await.unwrap().json().await.unwrap();
    assert_eq!(model["format_version"], 1);
    let paths = ["/identity/weights", "/identity/tokenizer", "/identity/chat_template", "/identity/norm_point", "/numerics/device"];
    for path in [&paths[..], &["/name", "/model_type", "/instance", "/numerics/dtype", "/numerics/kernel"]].concat() {
        assert!(model.pointer(path).is_some_and(Value::is_string), "{path}: {model}");
    }
    let paths = ["/hidden_size", "/num_hidden_layers", "/vocab_size", "/limits/max_model_len", "/limits/max_sequences"];
    for path in [&paths[..], &["/limits/max_request_tokens", "/limits/max_body_bytes"]].concat() {
        assert!(model.pointer(path).is_some_and(Value::is_u64), "{path}: {model}");
    }

    let asked = r#"{"sequences": [[5, 6, 7]], "taps": {"layers": [1, 3], "final": true}, "later": {"member": 1}}"#;
    let states = post(&pool, "/v1/hidden-states", asked).await;
    assert_eq!(states.status(), 200);
    for header in ["x-carryon-identity", "x-carryon-numerics", "x-carryon-instance"] {
        assert!(states.headers().contains_key(header), "{header}");
    }
    let states = states.bytes().await.unwrap();
    let tap = |name: &str| (name.to_owned(), WireDtype::BF16, vec![3, 40]);
    assert_eq!(tensors(&states), [tap("final"), tap("layer.1"), tap("layer.3")]);
    let (_, header) = SafeTensors::read_metadata(&states).unwrap();
    assert_eq!(header.metadata().as_ref().unwrap()["index"], "0");

    let delta: Vec<u8> = [0.25f32; 80].iter().flat_map(|value| value.to_le_bytes()).collect();
    let (x, targets) = ([0u8; 160], [9u8, 0, 0, 0, 11, 0, 0, 0]);
    let request = [
        ("x", TensorView::new(WireDtype::BF16, vec![2, 40], &x).unwrap()),
        ("delta", TensorView::new(WireDtype::F32, vec![2, 40], &delta).unwrap()),
        ("targets", TensorView::new(WireDtype::U32, vec![2], &targets).unwrap()),
    ];
    let metadata = [("gradient", "true"), ("later", "member")].map(|(name, value)| (name.to_owned(), value.to_owned()));
    let request = safetensors::serialize(request, Some(HashMap::from(metadata))).unwrap();
    let losses = post(&pool, "/v1/loss", request).await;
    assert_eq!(losses.status(), 200);
    let wanted = [("gradient".to_owned(), WireDtype::F32, vec![2, 40]), ("loss".to_owned(), WireDtype::F32, vec![2])];
    assert_eq!(tensors(&losses.bytes().await.unwrap()), wanted);

    let refused = post(&pool, "/v1/hidden-states", r#"{"sequences": [[101]], "taps": {"layers": [1], "final": false}}"#).await;
    assert_eq!(refused.status(), 400);
    assert_eq!(refused.json::<Value>().await.unwrap()["error"]["code"], "invalid_request");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gateway_of_the_first_version_is_understood_and_understands() {
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let asked = r#"{"prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop_token_ids": [100], "logprobs": 1,
        "prompt_logprobs": 0, "alpha": 1.0, "later": {"member": 1}}"#;
    let answer = post(&pool, "/v1/generate", asked).await;
    assert_eq!((answer.status().as_u16(), answer.headers()["content-type"].to_str().unwrap()), (200, "application/x-ndjson"));
    let text = answer.text().await.unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(lines[0]["prompt_logprobs"].as_array().unwrap().len(), 3);
    assert!(lines[1]["token"].is_u64() && lines[1]["logprob"].is_f64() && lines[1]["top"][0][0].is_u64(), "{text}");
    let last = lines.last().unwrap();
    assert!(last["finish_reason"].is_string() && last["usage"]["completion_tokens"].is_u64(), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn how_tokens_are_drawn_is_never_ignored() {
    // A pool of the first version does not know `sampling`: it is sent only where it asks for something.
    let plain = serde_json::to_value(GenerateRequest::greedy(vec![1], 2)).unwrap();
    assert_eq!(plain, json!({"prompt": [1], "max_tokens": 2, "temperature": 0.0, "top_p": 1.0}));
    let pool = Pool::tiny(Dtype::Bfloat16, ENGINE).await;
    let known = post(&pool, "/v1/generate", r#"{"prompt": [5], "max_tokens": 1, "sampling": {"top_k": 3}}"#).await;
    assert_eq!((known.status().as_u16(), known.headers()["x-carryon-sampling"].to_str().unwrap()), (200, "1"));
    let later = post(&pool, "/v1/generate", r#"{"prompt": [5], "max_tokens": 1, "sampling": {"top_k": 3, "typical_p": 0.5}}"#).await;
    assert_eq!(later.status(), 400);
    assert!(later.text().await.unwrap().contains("unknown field `typical_p`"));
}

#[test]
fn a_worker_reads_the_configuration_of_a_later_operator() {
    let base = json!({ "name": "p", "dtype": "bfloat16", "later": 1,
        "engine": { "maxModelLen": 2048, "maxNumSeqs": 32, "maxNumBatchedTokens": 2048, "later": 1 } });
    assert_eq!(serde_json::from_value::<BaseConfig>(base).unwrap().engine.max_model_len, 2048);
    let train = json!({ "name": "j", "namespace": "n", "task": "CausalLM", "head": { "width": 64, "later": 1 }, "format": "Auto",
        "split": { "train": ["train.jsonl"] }, "maxLength": 320, "overlong": "Truncate", "training": { "maxSteps": 20, "later": 1 },
        "evaluation": {}, "checkpoint": {}, "later": 1 });
    assert_eq!(serde_json::from_value::<TrainConfig>(train).unwrap().training.max_steps, Some(20));
    let head = json!({ "name": "h", "servedModelName": "m", "digest": "sha256:h", "later": 1 });
    let serve = json!({ "baseModelName": "b", "heads": [head], "later": 1 });
    assert_eq!(serde_json::from_value::<ServeConfig>(serve).unwrap().heads[0].digest, "sha256:h");
}
