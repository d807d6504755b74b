//! The client against a pool that breaks off: a scripted server in the pool's place.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::body::Body;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse as _, Response};
use axum::routing::post;
use axum::{Json, Router};
use bytes::Bytes;
use carryon_crds::common::Taps;
use carryon_crds::pool::Dtype;
use carryon_worker::exchange::wire::{GenerateRequest, HiddenStatesRequest, JOB_HEADER};
use carryon_worker::exchange::{ClientError, PoolClient, SequenceStates};
use carryon_worker::numbers::{RowFormat, to_bytes};
use futures::{StreamExt as _, stream};

const WIDTH: usize = 4;

fn taps() -> Taps {
    Taps { layers: vec![], final_norm: true }
}

/// States that can be told apart by the sequence they are of.
fn states(index: usize, tokens: &[u32]) -> SequenceStates {
    let rows: Vec<f32> = tokens.iter().flat_map(|token| [*token as f32; WIDTH]).collect();
    SequenceStates {
        index,
        tokens: tokens.len(),
        formats: vec![RowFormat::Plain(Dtype::Float32)],
        taps: vec![to_bytes(&rows, Dtype::Float32)],
    }
}

/// A body of these bytes that then breaks off.
fn broken(bytes: Vec<u8>) -> Response {
    let pieces = [Ok(Bytes::from(bytes)), Err(std::io::Error::other("killed"))];
    Body::from_stream(stream::iter(pieces).then(async |piece| {
        tokio::task::yield_now().await;
        piece
    }))
    .into_response()
}

async fn serve(router: Router) -> PoolClient {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(axum::serve(listener, router).into_future());
    PoolClient::connect(&[url], Duration::from_secs(30)).unwrap()
}

#[tokio::test]
async fn only_the_missing_sequences_are_asked_for_again() {
    let asked: Arc<Mutex<Vec<Vec<Vec<u32>>>>> = Arc::default();
    let log = asked.clone();
    let handler = async move |headers: HeaderMap, Json(request): Json<HiddenStatesRequest>| {
        assert_eq!(headers[JOB_HEADER], "team/one", "jobs take turns");
        let call = {
            let mut log = log.lock().unwrap();
            log.push(request.sequences.clone());
            log.len()
        };
        let frame = |index: usize| states(index, &request.sequences[index]).encode(&taps(), WIDTH).concat();
        match call {
            // One whole sequence, not the first, and a half one.
            1 => broken([frame(1), frame(0)[..90].to_vec()].concat()),
            2 => StatusCode::SERVICE_UNAVAILABLE.into_response(),
            // Ends early without a word.
            3 => frame(1).into_response(),
            _ => (0..request.sequences.len()).flat_map(frame).collect::<Vec<u8>>().into_response(),
        }
    };
    let client = serve(Router::new().route("/v1/hidden-states", post(handler))).await.asking_for("team/one");
    let sequences = vec![vec![1, 1, 1], vec![2, 2], vec![3], vec![4, 4]];
    let request = HiddenStatesRequest::new(sequences.clone(), taps());
    let mut found: Vec<_> = client.hidden_states(request).map(Result::unwrap).collect().await;
    found.sort_by_key(|states| states.index);
    let expected: Vec<_> = sequences.iter().enumerate().map(|(index, tokens)| states(index, tokens)).collect();
    assert_eq!(found, expected);
    let asked = asked.lock().unwrap().clone();
    let without =
        |places: &[usize]| (0..4).filter(|place| !places.contains(place)).map(|place| sequences[place].clone()).collect::<Vec<_>>();
    assert_eq!(asked, [without(&[]), without(&[1]), without(&[1]), without(&[1, 2])]);
}

#[tokio::test]
async fn an_answer_that_began_ends_with_an_error_and_is_not_begun_again() {
    let calls: Arc<Mutex<usize>> = Arc::default();
    let count = calls.clone();
    let handler = async move || {
        *count.lock().unwrap() += 1;
        broken(b"{\"token\":5}\n{\"tok".to_vec())
    };
    let client = serve(Router::new().route("/v1/generate", post(handler))).await;
    let events: Vec<_> = client.generate(None, &GenerateRequest::greedy(vec![1], 3)).await.unwrap().collect().await;
    assert!(matches!(events.as_slice(), [Ok(_), Err(ClientError::Interrupted { .. })]), "{events:?}");
    assert_eq!(*calls.lock().unwrap(), 1);
}
