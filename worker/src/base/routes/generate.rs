//! What gateways ask for: answers and classifications.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Instant;

use axum::Json;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{Pool, Ready, Refusal, body, check};
use crate::base::device::{Answer, HeadUse, Job, Purpose, Sequence};
use crate::base::registry::{LoadedHead, expect_task};
use crate::base::sampling::Sampler;
use crate::exchange::wire::{
    ClassifyRequest, ClassifyResponse, ErrorCode, GenerateEvent, GenerateRequest, NAMESPACE_HEADER, NDJSON, SAMPLING_HEADER,
};

/// `POST /v1/generate`. What fails before the first event is a refusal; later, the last event.
pub(super) async fn generate(State(pool): State<Arc<Pool>>, request: Request) -> Result<Response, Refusal> {
    let ready = pool.ready()?;
    drop(ready.device.serving_places(1)?);
    let namespace = namespace(&request);
    let request: GenerateRequest = body::json(&pool, request, ready.description.limits.max_model_len).await?;
    check::generate(&request, &ready.description)?;
    let permit = ready.device.serving_places(1)?;
    let (events, mut received) = unbounded_channel();
    let head = head(ready, &request)?;
    if let Some(own) = &head {
        reads_no_others(&own.head)?;
    }
    ready.device.submit(Job::Serve(vec![sequence(ready, request, &namespace, head, events, permit)]))?;
    let first = match received.recv().await {
        Some(GenerateEvent::Error { error }) => return Err(error.into()),
        Some(event) => event,
        None => return Err(Refusal::new(ErrorCode::Internal, "the device dropped the answer")),
    };
    let events = stream::iter([first]).chain(UnboundedReceiverStream::new(received)).map(|event| Ok::<_, Infallible>(line(&event)));
    Ok(([(CONTENT_TYPE.as_str(), NDJSON), (SAMPLING_HEADER, "1")], Body::from_stream(events)).into_response())
}

pub(super) fn line(event: &GenerateEvent) -> Bytes {
    // Events are plain structs without maps: writing them cannot fail.
    let mut line = serde_json::to_vec(event).unwrap_or_default();
    line.push(b'\n');
    line.into()
}

/// Refuses a head whose other bases a request says nothing of.
fn reads_no_others(head: &LoadedHead) -> Result<(), Refusal> {
    let (digest, others) = (&head.digest, head.shape.others.len());
    if others == 0 {
        return Ok(());
    }
    let message = format!("head {digest} reads {others} further bases: their states come with the request (POST /v1/generate-mixed)");
    Err(Refusal::new(ErrorCode::InvalidRequest, message))
}

/// The head that an answer is made with, if any.
pub(super) fn head(ready: &Ready, request: &GenerateRequest) -> Result<Option<HeadUse>, Refusal> {
    // Even where α = 0 bypasses it: a missing head is said so whatever α is.
    let Some(digest) = &request.head else { return Ok(None) };
    let head = ready.registry.get(digest, Instant::now())?;
    // Of several bases it is asked for by a route of its own, whatever its task.
    if head.shape.others.is_empty() {
        expect_task(&head, false)?;
    }
    let alpha = request.alpha.unwrap_or(head.shape.alpha);
    Ok((alpha != 0.0).then(|| HeadUse::new(head, alpha)))
}

/// An answer in the making.
pub(super) fn sequence(
    ready: &Ready,
    request: GenerateRequest,
    namespace: &str,
    head: Option<HeadUse>,
    events: UnboundedSender<GenerateEvent>,
    permit: OwnedSemaphorePermit,
) -> Sequence {
    let answer = Answer {
        events,
        sampler: Sampler::new(&request),
        stop_token_ids: request.stop_token_ids,
        logprobs: request.logprobs,
        prompt_logprobs: request.prompt_logprobs,
        max_tokens: request.max_tokens as usize,
        scored: if request.prompt_logprobs.is_some() { vec![None] } else { Vec::new() },
    };
    new_sequence(ready, request.prompt, namespace, head, Purpose::Answer(Box::new(answer)), Arc::new(permit))
}

pub(super) fn new_sequence(
    ready: &Ready,
    tokens: Vec<u32>,
    namespace: &str,
    head: Option<HeadUse>,
    purpose: Purpose,
    permit: Arc<OwnedSemaphorePermit>,
) -> Sequence {
    Sequence::new(tokens, namespace, ready.description.limits.max_model_len as usize, head, purpose, permit)
}

/// The namespace that the client says it speaks for.
pub(super) fn namespace(request: &Request) -> String {
    let named = request.headers().get(NAMESPACE_HEADER).and_then(|value| value.to_str().ok());
    named.unwrap_or_default().to_owned()
}

/// `POST /v1/classify`.
pub(super) async fn classify(State(pool): State<Arc<Pool>>, request: Request) -> Result<Json<ClassifyResponse>, Refusal> {
    let ready = pool.ready()?;
    drop(ready.device.serving_places(1)?);
    let request: ClassifyRequest = body::json(&pool, request, ready.description.limits.max_request_tokens).await?;
    check::sequences(&request.sequences, &ready.description)?;
    let permit = Arc::new(ready.device.serving_places(request.sequences.len())?);
    let head = ready.registry.get(&request.head, Instant::now())?;
    expect_task(&head, true)?;
    reads_no_others(&head)?;
    let (scores, mut received) = unbounded_channel();
    let mut collected: Vec<Vec<f32>> = vec![Vec::new(); request.sequences.len()];
    let sequences = request.sequences.into_iter().enumerate().map(|(place, tokens)| {
        let purpose = Purpose::Classify { features: Vec::new(), place, scores: scores.clone() };
        new_sequence(ready, tokens, "", Some(HeadUse::new(head.clone(), 1.0)), purpose, permit.clone())
    });
    ready.device.submit(Job::Serve(sequences.collect()))?;
    drop(scores);
    let mut missing = collected.len();
    while let Some((place, score)) = received.recv().await {
        collected[place] = score?;
        missing -= 1;
    }
    match missing {
        0 => Ok(Json(ClassifyResponse { scores: collected })),
        _ => Err(Refusal::new(ErrorCode::Internal, "the device dropped a sequence")),
    }
}
