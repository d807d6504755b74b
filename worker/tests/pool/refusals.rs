use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use carryon_crds::common::Taps;
use carryon_crds::job::Task;
use carryon_crds::pool::{Dtype, Engine};
use carryon_worker::base::Placement;
use carryon_worker::exchange::wire::{
    ClassifyRequest, ErrorBody, ErrorCode, GenerateRequest, HiddenStatesRequest, IDENTITY_HEADER, INSTANCE_HEADER, NUMERICS_HEADER,
};
use carryon_worker::exchange::{ClientError, PoolClient};
use carryon_worker::head::Artifact;
use carryon_worker::kernel::PageLayout;
use futures::StreamExt as _;
use serde_json::json;

use crate::common::tokens;
use crate::harness::{ENGINE, Pool, bytes_of, checkpoint, with_head};

async fn refused(pool: &Pool, path: &str, body: serde_json::Value) -> (u16, ErrorCode, String) {
    let response = reqwest::Client::new().post(format!("{}{path}", pool.url)).body(body.to_string()).send().await.unwrap();
    let status = response.status().as_u16();
    let body: ErrorBody = response.json().await.unwrap();
    (status, body.error.code, body.error.message)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_bound_is_refused_by_name() {
    let pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let taps = json!({"layers": [1], "final": true});
    let states = |sequences, taps| ("/v1/hidden-states", json!({"sequences": sequences, "taps": taps}));
    let generate = |change: serde_json::Value| {
        let mut request = json!({"prompt": [1, 2], "max_tokens": 4});
        request.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
        ("/v1/generate", request)
    };
    use ErrorCode::{HeadMissing, InvalidRequest, NotFound, TooLarge};
    let cases = [
        (states(json!([[1, 101]]), taps.clone()), 400, InvalidRequest, "sequences[0] holds token 101, the vocabulary has 101"),
        (states(json!([[1], []]), taps.clone()), 400, InvalidRequest, "sequences[1] is empty"),
        (states(json!([vec![1; 257]]), taps.clone()), 413, TooLarge, "sequences[0] has 257 tokens, more than 256"),
        (states(json!(vec![vec![1; 200]; 3]), taps.clone()), 413, TooLarge, "600 tokens exceed 512 of one request"),
        (states(json!(vec![[1]; 1025]), taps.clone()), 413, TooLarge, "1025 sequences exceed 1024"),
        (states(json!([[1]]), json!({"layers": [4]})), 400, InvalidRequest, "taps.layers holds 4, the base has 3 layers"),
        (states(json!([[1]]), json!({"layers": [2, 2]})), 400, InvalidRequest, "taps.layers holds 2 twice"),
        (states(json!([[1]]), json!({"layers": [], "final": false})), 400, InvalidRequest, "taps: name layers, or set final"),
        (generate(json!({"prompt": []})), 400, InvalidRequest, "prompt is empty"),
        (generate(json!({"prompt": vec![1; 256]})), 413, TooLarge, "prompt has 256 tokens: with the answer it exceeds 256"),
        (generate(json!({"temperature": -1})), 400, InvalidRequest, "temperature is -1, must be 0 or more"),
        (generate(json!({"top_p": 0})), 400, InvalidRequest, "top_p is 0, must be above 0 and at most 1"),
        (generate(json!({"logprobs": 21})), 400, InvalidRequest, "logprobs is 21, must be at most 20"),
        (generate(json!({"sampling": {"logit_bias": [[101, 1.0]]}})), 400, InvalidRequest, "sampling.logit_bias holds token 101"),
        (generate(json!({"sampling": {"logit_bias": vec![(1, 1.0); 1025]}})), 400, InvalidRequest, "has 1025 entries, more than 1024"),
        (generate(json!({"sampling": {"logit_bias": [[1, 1001]]}})), 400, InvalidRequest, "beyond 1000"),
        (generate(json!({"sampling": {"repetition_penalty": 0}})), 400, InvalidRequest, "repetition_penalty not between"),
        (generate(json!({"sampling": {"frequency_penalty": -1e30}})), 400, InvalidRequest, "beyond 1000"),
        (generate(json!({"sampling": {"min_p": 1.5}})), 400, InvalidRequest, "sampling.min_p is 1.5, must be between 0 and 1"),
        (generate(json!({"sampling": {"top_k": -1}})), 400, InvalidRequest, "invalid value: integer `-1`"),
        (generate(json!({"head": "sha256:00"})), 404, HeadMissing, "this pool does not hold head sha256:00"),
        (generate(json!({"prompt": "text"})), 400, InvalidRequest, "invalid type: string"),
        (generate(json!({"prompt": vec![1; 40_000]})), 413, TooLarge, "the request body exceeds 69632 bytes"),
        (("/v1/classify", json!({"sequences": [[1]], "head": "x"})), 404, HeadMissing, "does not hold head x"),
        (("/v1/nothing", json!({})), 404, NotFound, "no such route"),
    ];
    for ((path, body), status, code, message) in cases {
        let found = refused(&pool, path, body).await;
        assert_eq!((found.0, found.1), (status, code), "{path}: {}", found.2);
        assert!(found.2.contains(message), "{path}: {} does not contain {message:?}", found.2);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_base_is_refused_and_each_answer_names_the_pod() {
    let pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let other = crate::harness::checkpoint(8);
    let other = Pool::start(other.path(), Dtype::Float32, ENGINE).await;
    let taps = Taps { layers: vec![], final_norm: true };
    let request = HiddenStatesRequest::new(vec![vec![1, 2]], taps);
    let bound = pool.client.clone().bound_to(&other.description.identity, None);
    match Box::pin(bound.hidden_states(request.clone())).next().await.unwrap() {
        Err(ClientError::Refused { status: 409, error, .. }) => assert_eq!(error.code, ErrorCode::IdentityMismatch),
        outcome => panic!("{outcome:?}"),
    }
    let mut numerics = pool.description.numerics.clone();
    numerics.kernel = "abacus".to_owned();
    let bound = pool.client.clone().bound_to(&pool.description.identity, Some(&numerics));
    let outcome = Box::pin(bound.hidden_states(request)).next().await.unwrap();
    assert!(matches!(outcome, Err(ClientError::NumericsChanged { .. })), "{outcome:?}");

    let response = reqwest::get(format!("{}/v1/nothing", pool.url)).await.unwrap();
    let header = |name: &str| response.headers()[name].to_str().unwrap().to_owned();
    assert_eq!(header(INSTANCE_HEADER), pool.description.instance);
    assert_eq!(header(IDENTITY_HEADER), pool.description.identity.digest());
    assert_eq!(header(NUMERICS_HEADER), pool.description.numerics.key());
    assert_ne!(pool.description.instance, other.description.instance);
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_that_do_not_fit_are_refused() {
    let pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let (endpoint, good) = (pool.endpoint().await, pool.head(1, Task::CausalLM));
    let put = async |digest: &str, bytes: Vec<u8>| match pool.client.put_head(&endpoint, digest, bytes, Duration::from_secs(9)).await {
        Err(ClientError::Refused { status, error, .. }) => (status, error.code, error.message),
        other => panic!("{other:?}"),
    };
    let mut damaged = good.to_bytes();
    *damaged.last_mut().unwrap() ^= 1;
    let found = put(&good.digest, damaged).await;
    assert_eq!((found.0, found.1), (422, ErrorCode::HeadInvalid), "{}", found.2);
    assert!(found.2.contains("digest"), "{}", found.2);
    let found = put("sha256:00", b"nonsense".to_vec()).await;
    assert_eq!((found.0, found.1), (422, ErrorCode::HeadInvalid), "{}", found.2);

    let mut base = good.base.clone();
    base.identity.tokenizer = "sha256:other".to_owned();
    let other = Artifact::new(good.shape.clone(), base, good.weights.clone()).unwrap();
    let found = put(&other.digest, other.to_bytes()).await;
    assert_eq!((found.0, found.1), (409, ErrorCode::IdentityMismatch));
    assert!(found.2.contains("its tokenizer is not this pool's"), "{}", found.2);

    let mut shape = good.shape.clone();
    shape.taps.layers = vec![1, 9];
    let deep = Artifact::new(shape, good.base.clone(), good.weights.clone()).unwrap();
    let found = put(&deep.digest, deep.to_bytes()).await;
    assert_eq!((found.0, found.1), (422, ErrorCode::HeadInvalid));
    assert!(found.2.contains("taps.layers holds 9, the base has 3 layers"), "{}", found.2);

    let classifier = pool.head(1, Task::Classification);
    pool.client.put_head(&endpoint, &classifier.digest, bytes_of(&classifier), Duration::from_secs(9)).await.unwrap();
    let found = refused(&pool, "/v1/generate", json!({"prompt": [1], "max_tokens": 1, "head": classifier.digest})).await;
    assert_eq!(found.1, ErrorCode::InvalidRequest);
    assert!(found.2.contains("was trained for Classification"), "{}", found.2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_queue_is_busy_until_a_place_is_free() {
    let pool = Pool::tiny(Dtype::Float32, Engine { max_num_seqs: 1, ..ENGINE }).await;
    let http = reqwest::Client::new();
    // Far more than there are places, each longer than it takes all of them to come.
    let long = json!({"prompt": [1, 2], "max_tokens": 250}).to_string();
    let asked = (0..64).map(|_| http.post(format!("{}/v1/generate", pool.url)).body(long.clone()).send());
    let answers = futures::future::join_all(asked).await;
    let (served, busy): (Vec<_>, Vec<_>) = answers.into_iter().map(Result::unwrap).partition(|answer| answer.status() == 200);
    assert!(served.len() >= 4 && !busy.is_empty(), "{} served, {} refused", served.len(), busy.len());
    for refused in busy {
        assert_eq!((refused.status().as_u16(), refused.headers()["retry-after"].to_str().unwrap()), (429, "1"));
        assert_eq!(refused.json::<ErrorBody>().await.unwrap().error.code, ErrorCode::Busy);
    }
    // A patient client asks again until a place is free.
    assert_eq!(pool.answer(&GenerateRequest::greedy(tokens(4, 101, 1), 2)).await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_waits_than_memory_that_it_can_wait_for() {
    let folder = checkpoint(7);
    let page = PageLayout { layers: 3, heads: 2, head_dim: 10, latent: None, dtype: Dtype::Float32 }.bytes() as u64;
    let (engine, placement) = (Engine { max_num_seqs: 16, ..ENGINE }, Placement { kv_cache_bytes: Some(8 * page), ..Placement::cpu(2) });
    let pool = Pool::placed(folder.path(), Dtype::Float32, engine, placement).await;
    // Each takes all the memory there is; there are 64 places.
    let http = reqwest::Client::new();
    let long = json!({"prompt": [1, 2], "max_tokens": 250}).to_string();
    let asked = (0..30).map(|_| http.post(format!("{}/v1/generate", pool.url)).body(long.clone()).send());
    let (mut served, mut busy) = (0, 0);
    for answer in futures::future::join_all(asked).await.into_iter().map(Result::unwrap) {
        if answer.status() == 429 {
            assert_eq!(answer.headers()["retry-after"], "1");
            assert!(answer.json::<ErrorBody>().await.unwrap().error.message.contains("more memory"));
            busy += 1;
        } else {
            // Who was admitted comes to its end.
            assert_eq!(answer.text().await.unwrap().lines().count(), 251);
            served += 1;
        }
    }
    assert!(served >= 5 && busy > 0, "{served} served, {busy} refused");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_classification_takes_a_place_for_each_sequence() {
    let pool = Pool::tiny(Dtype::Float32, Engine { max_num_batched_tokens: 2048, ..ENGINE }).await;
    let head = pool.head(6, Task::Classification);
    pool.push(&head).await;
    // More than there are places: it takes them all, and is served.
    let request = ClassifyRequest { sequences: vec![tokens(100, 101, 3); 300], head: head.digest.clone() };
    let client = pool.client.clone();
    let classified = tokio::spawn(async move { client.classify(None, &request).await.unwrap().scores.len() });
    let http = reqwest::Client::new();
    let one = json!({"prompt": [1, 2], "max_tokens": 1}).to_string();
    let mut refused = 0;
    while !classified.is_finished() {
        let answer = http.post(format!("{}/v1/generate", pool.url)).body(one.clone()).send().await.unwrap();
        refused += usize::from(answer.status() == 429);
    }
    assert_eq!(classified.await.unwrap(), 300);
    assert!(refused > 0);
    assert_eq!(pool.answer(&GenerateRequest::greedy(tokens(4, 101, 1), 2)).await.len(), 2);
}

/// Sends the head of a request and waits until its body is asked for; or what came instead.
fn half_sent(pool: &Pool, route: &str, length: usize) -> Result<TcpStream, String> {
    let mut stream = TcpStream::connect(pool.url.strip_prefix("http://").unwrap()).unwrap();
    let head = format!("{route} HTTP/1.1\r\nhost: pool\r\ncontent-length: {length}\r\nexpect: 100-continue\r\nconnection: close\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let mut first = [0; "HTTP/1.1 100 Continue\r\n\r\n".len()];
    stream.read_exact(&mut first).unwrap();
    let mut rest = String::new();
    match first.starts_with(b"HTTP/1.1 100") {
        true => Ok(stream),
        false => Err(stream.read_to_string(&mut rest).map(|_| String::from_utf8_lossy(&first).into_owned() + &rest).unwrap()),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_do_not_come_whole_hold_no_place() {
    let pool = Pool::tiny(Dtype::Float32, Engine { max_num_seqs: 1, ..ENGINE }).await;
    let routes = ["POST /v1/generate", "POST /v1/classify", "POST /v1/loss", "POST /v1/hidden-states"];
    let held: Vec<_> = routes.iter().flat_map(|route| (0..16).map(|_| half_sent(&pool, route, 30).unwrap())).collect();
    let impatient = PoolClient::connect(std::slice::from_ref(&pool.url), Duration::ZERO).unwrap();
    let request = GenerateRequest::greedy(tokens(4, 101, 1), 2);
    let answer: Vec<_> = impatient.generate(None, &request).await.unwrap().collect().await;
    assert_eq!(answer.len(), 3, "two tokens and the end");
    let taps = Taps { layers: vec![], final_norm: true };
    let states = HiddenStatesRequest::new(vec![vec![1, 2]], taps);
    assert!(Box::pin(impatient.hidden_states(states)).next().await.unwrap().is_ok());
    drop(held);
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_share_one_budget_of_bytes() {
    let pool = Pool::tiny(Dtype::Float32, ENGINE).await;
    let largest = pool.description.limits.max_head_bytes.unwrap() as usize;
    let sent = |length: usize| half_sent(&pool, "PUT /v1/heads/sha256:00", length);
    let upload = || sent(largest / 5 * 3);
    let (held, refused): (Vec<_>, Vec<_>) = (0..10).map(|_| upload()).partition(Result::is_ok);
    assert_eq!(held.len(), 1, "eight sevenths of the largest fit");
    for refused in refused {
        let refused = refused.unwrap_err();
        assert!(refused.starts_with("HTTP/1.1 429") && refused.contains("retry-after: 1\r\n") && refused.contains("busy"), "{refused}");
    }
    // Our own clients wait for room; small requests find it.
    let head = pool.head(1, Task::CausalLM);
    pool.push(&head).await;
    assert_eq!(pool.answer(&with_head(tokens(4, 101, 1), 2, &head)).await.len(), 2);
    drop(held);
    let refused = sent(largest + 1).unwrap_err();
    let words = format!("the head has more than {largest} bytes");
    assert!(refused.starts_with("HTTP/1.1 413") && refused.contains(&words) && refused.contains("bytes of memory"), "{refused}");
    let deadline = Instant::now() + Duration::from_secs(60);
    while sent(largest).is_err() {
        assert!(Instant::now() < deadline, "no room came back");
        tokio::task::yield_now().await;
    }
}
