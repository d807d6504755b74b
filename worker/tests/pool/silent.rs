//! Pods that say nothing: one that is stopped is given up, one that computes is waited for; and pods that compute in another way.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use axum::extract::Json;
use axum::http::StatusCode;
use axum::response::IntoResponse as _;
use axum::routing::{get, post};
use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use carryon_crds::wire::{Identity, Numerics};
use carryon_worker::exchange::wire::{GenerateRequest, HiddenStatesRequest, NUMERICS_HEADER};
use carryon_worker::exchange::{ClientError, LossRequest, PoolClient, SequenceStates, Silence};
use carryon_worker::numbers::{RowFormat, to_bytes};
use futures::StreamExt as _;
use tokio::sync::Semaphore;

use crate::common::tokens;
use crate::process::Process;

/// Short, so that tests wait for it.
const SILENCE: Silence = Silence { quick: Duration::from_millis(500), computing: Duration::from_millis(100) };
/// Longest wait for what must not take for ever.
const DEADLINE: Duration = Duration::from_secs(60);

fn client(urls: &[String], patience: Duration) -> PoolClient {
    PoolClient::connect_with(urls, patience, SILENCE).unwrap()
}

fn loss() -> LossRequest {
    let x = to_bytes(&[0.0; 4], Dtype::Float32);
    LossRequest { hidden_size: 4, dtype: Dtype::Float32, x, delta: None, targets: Some(vec![1]), gradient: false }
}

fn states(sequences: Vec<Vec<u32>>) -> HiddenStatesRequest {
    HiddenStatesRequest::new(sequences, Taps { layers: vec![0, 1, 2, 3], final_norm: true })
}

async fn serve(router: Router) -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, router).into_future());
    url
}

/// A pool in a process of its own, ready.
async fn process() -> Process {
    let pool = Process::pool();
    PoolClient::connect(std::slice::from_ref(&pool.url), DEADLINE).unwrap().describe().await.unwrap();
    pool
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_waits_for_ever_for_a_pool_that_is_stopped() {
    let pool = process().await;
    let client = client(std::slice::from_ref(&pool.url), Duration::ZERO);
    let (description, endpoint) = (client.describe().await.unwrap(), client.endpoints().await.unwrap().remove(0));
    pool.stop();
    let greedy = GenerateRequest::greedy(vec![1], 2);
    let classify = carryon_worker::exchange::wire::ClassifyRequest { sequences: vec![vec![1]], head: "x".to_owned() };
    let requests = async {
        // More than sockets hold.
        let head = vec![7; 64 << 20];
        [
            client.describe().await.err(),
            client.tokenizer().await.err(),
            client.lm_head(&description).await.err(),
            client.loss(&loss()).await.err(),
            Box::pin(client.hidden_states(states(vec![vec![1]]))).next().await.and_then(Result::err),
            client.generate(None, &greedy).await.err(),
            client.classify(Some(&endpoint), &classify).await.err(),
            client.has_head(&endpoint, "x").await.err(),
            client.put_head(&endpoint, "x", head, Duration::from_secs(1)).await.err(),
            client.delete_head(&endpoint, "x").await.err(),
        ]
    };
    for error in tokio::time::timeout(DEADLINE, requests).await.unwrap() {
        assert!(matches!(error, Some(ClientError::Unreachable { .. })), "{error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pool_that_is_stopped_has_not_sent_is_asked_of_another() {
    let pools = [process().await, process().await];
    let client = client(&pools.each_ref().map(|pool| pool.url.clone()), DEADLINE);
    // States of thirteen megabytes: more than sockets hold.
    let sequences: Vec<_> = (0..400).map(|seed| tokens(40, 101, seed)).collect();
    let mut answers = Box::pin(client.hidden_states(states(sequences)));
    let mut found = vec![answers.next().await.unwrap().unwrap().index];
    // The first pod in turn is the one that answers.
    pools.iter().min_by_key(|pool| pool.url.rsplit(':').next().unwrap().parse::<u16>().unwrap()).unwrap().stop();
    let rest = async { answers.map(|states| states.unwrap().index).collect::<Vec<_>>().await };
    found.extend(tokio::time::timeout(DEADLINE, rest).await.unwrap());
    found.sort_unstable();
    assert_eq!(found, (0..400).collect::<Vec<_>>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_tokens_of_a_pool_that_is_stopped_ends_with_an_error() {
    let pool = process().await;
    let client = client(std::slice::from_ref(&pool.url), Duration::ZERO);
    let mut events = Box::pin(client.generate(None, &GenerateRequest::greedy(vec![1, 2], 250)).await.unwrap());
    events.next().await.unwrap().unwrap();
    pool.stop();
    let rest = async { events.collect::<Vec<_>>().await };
    let rest = tokio::time::timeout(DEADLINE, rest).await.unwrap();
    // It may have been done already.
    if rest.len() < 250 {
        assert!(matches!(rest.last(), Some(Err(ClientError::Interrupted { .. }))), "{:?}", rest.last());
    }
}

#[tokio::test]
async fn a_pod_that_computes_for_long_is_asked_whether_it_lives_and_waited_for() {
    let (asked, done) = (Arc::new(AtomicUsize::new(0)), Arc::new(Semaphore::new(0)));
    let lives = {
        let (asked, done) = (asked.clone(), done.clone());
        async move || {
            // The answer comes when it was asked three times.
            if asked.fetch_add(1, Ordering::SeqCst) == 2 {
                done.add_permits(1);
            }
            StatusCode::NOT_FOUND
        }
    };
    let generate = async move || {
        done.acquire().await.unwrap().forget();
        "{\"token\":5}\n{\"finish_reason\":\"stop\",\"usage\":{\"prompt_tokens\":1,\"completion_tokens\":1}}\n"
    };
    let url = serve(Router::new().route("/healthz", get(lives)).route("/v1/generate", post(generate))).await;
    let client = client(&[url], Duration::ZERO);
    let events: Vec<_> = client.generate(None, &GenerateRequest::greedy(vec![1], 1)).await.unwrap().collect().await;
    assert!(events.iter().all(Result::is_ok) && events.len() == 2, "{events:?}");
    assert_eq!(asked.load(Ordering::SeqCst), 3);
}

fn numerics(kernel: &str) -> Numerics {
    Numerics { dtype: Dtype::Float32, device: "cpu".to_owned(), kernel: kernel.to_owned() }
}

fn identity() -> Identity {
    let text = || "x".to_owned();
    Identity { weights: text(), tokenizer: text(), chat_template: text(), norm_point: text() }
}

/// A pod that computes with `kernel`, and counts what it is asked.
async fn pod(kernel: &str) -> (String, Arc<AtomicUsize>) {
    let (asked, key) = (Arc::new(AtomicUsize::new(0)), numerics(kernel).key());
    let count = asked.clone();
    let handler = async move |Json(request): Json<HiddenStatesRequest>| {
        count.fetch_add(1, Ordering::SeqCst);
        let taps = request.taps.clone();
        let frame = |(index, tokens): (usize, &Vec<u32>)| {
            let rows = to_bytes(&vec![0.0; 4 * tokens.len()], Dtype::Float32);
            let states = SequenceStates {
                index,
                tokens: tokens.len(),
                formats: vec![RowFormat::Plain(Dtype::Float32); taps.count()],
                taps: vec![rows; taps.count()],
            };
            states.encode(&taps, 4).concat()
        };
        ([(NUMERICS_HEADER, key.clone())], request.sequences.iter().enumerate().flat_map(frame).collect::<Vec<u8>>()).into_response()
    };
    (serve(Router::new().route("/v1/hidden-states", post(handler))).await, asked)
}

#[tokio::test]
async fn only_pods_that_compute_alike_are_asked_and_a_pool_without_one_is_named() {
    let [(one, asked), (other, in_vain), (third, too)] = [pod("fma_f32").await, pod("abacus").await, pod("fma_f32").await];
    let all = client(&[one.clone(), other.clone(), third.clone()], DEADLINE);
    let bound = all.bound_to(&identity(), Some(&numerics("fma_f32")));
    for _ in 0..12 {
        let answers: Vec<_> = bound.hidden_states(states(vec![vec![1, 2]])).collect().await;
        assert!(matches!(answers.as_slice(), [Ok(_)]), "{answers:?}");
    }
    assert_eq!(asked.load(Ordering::SeqCst) + too.load(Ordering::SeqCst), 12);
    assert_eq!(in_vain.load(Ordering::SeqCst), 1, "once it is known, it is not asked again");
    let strangers = client(&[one, third], DEADLINE).bound_to(&identity(), Some(&numerics("abacus")));
    let answer = Box::pin(strangers.hidden_states(states(vec![vec![1, 2]]))).next().await.unwrap();
    assert!(matches!(&answer, Err(ClientError::NumericsChanged { found, .. }) if found.ends_with("fma_f32")), "{answer:?}");
}
