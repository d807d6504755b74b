//! Answers of heads that read several bases, and the sequences that follow them here for other pools: [`crate::exchange::mixing`].

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::{StreamExt as _, stream};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{Semaphore, oneshot};
use tokio_stream::wrappers::UnboundedReceiverStream;

use super::{Pool, Ready, Refusal, body, check, generate as plain};
use crate::base::device::{Device, Follow, Job, OtherRows, Purpose, Sequence};
use crate::exchange::frames::{FrameError, FrameReader};
use crate::exchange::mixing::{FollowRequest, FollowTokens, ROWS_AHEAD, TapRows};
use crate::exchange::wire::{ErrorCode, GenerateEvent, GenerateRequest, NDJSON, SAFETENSORS, SAMPLING_HEADER, WireError};
use crate::http::Streamed;
use crate::model::Tap;
use crate::numbers::number_bytes;

/// Bytes of a number as it may come from another pool.
const NUMBER_BYTES: usize = 4;
/// Bytes of a line with tokens, beside those of the tokens.
const LINE_BYTES: usize = 1 << 10;
/// Bytes of one of them.
const TOKEN_BYTES: usize = 16;

/// What comes in for a sequence.
type Feed<T> = UnboundedSender<Result<T, WireError>>;

/// Wakes the device when it goes: a sequence that waits does not see that its client went away until somebody does.
struct Waker(Device);

impl Drop for Waker {
    fn drop(&mut self) {
        // The device ends when nobody needs it.
        let _ = self.0.submit(Job::Wake);
    }
}

/// `POST /v1/generate-mixed`, for answers and for scores. What fails before the pool has memory for the answer is a refusal; later, the last event.
pub(super) async fn generate(State(pool): State<Arc<Pool>>, request: Request) -> Result<Response, Refusal> {
    let ready = pool.ready()?;
    drop(ready.device.serving_places(1)?);
    let namespace = plain::namespace(&request);
    let mut body = pool.bodies.stream(request)?;
    let request: GenerateRequest = body::line(&mut body, ready.description.limits.max_model_len).await?;
    check::generate(&request, &ready.description)?;
    let permit = ready.device.serving_places(1)?;
    let Some(mut head) = plain::head(ready, &request)?.filter(|own| !own.head.shape.others.is_empty()) else {
        return Err(Refusal::new(ErrorCode::InvalidRequest, "no head that reads several bases is asked for: use /v1/generate"));
    };
    let widths = head.head.shape.tap_widths().split_off(head.head.shape.taps.count());
    let frame_bytes = ROWS_AHEAD * NUMBER_BYTES * widths.iter().sum::<usize>();
    // What is kept, and what is on its way.
    let room = ready.device.rows_room(2 * frame_bytes as u64)?;
    let (feed, fed) = unbounded_channel();
    let window = Arc::new(Semaphore::new(ROWS_AHEAD));
    head.others = Some(OtherRows::new(widths.clone(), fed, window.clone(), room));
    // Behind it what it is about: whoever waits here and goes away drops that first.
    let waker = Waker(ready.device.clone());
    let (sequence, mut events) = match head.head.shape.task.is_pooled() {
        false => {
            let (events, received) = unbounded_channel();
            (plain::sequence(ready, request, &namespace, Some(head), events, permit), UnboundedReceiverStream::new(received).boxed())
        }
        true => {
            let (scores, received) = unbounded_channel();
            let purpose = Purpose::Classify { features: Vec::new(), place: 0, scores };
            let sequence = plain::new_sequence(ready, request.prompt, &namespace, Some(head), purpose, Arc::new(permit));
            (sequence, UnboundedReceiverStream::new(received).map(|(_, score)| scored(score)).boxed())
        }
    };
    if !admitted(ready, sequence).await? {
        return Err(match events.next().await {
            Some(GenerateEvent::Error { error }) => error.into(),
            _ => Refusal::new(ErrorCode::Internal, "the device dropped the answer"),
        });
    }
    let device = ready.device.clone();
    tokio::spawn(until_closed(feed, device, async move |feed: &Feed<TapRows>, device: &Device| {
        rows(body, &widths, frame_bytes, &window, feed, device).await
    }));
    let events = events.map(move |event| {
        let _ = &waker;
        Ok::<_, std::convert::Infallible>(plain::line(&event))
    });
    Ok(([(CONTENT_TYPE.as_str(), NDJSON), (SAMPLING_HEADER, "1")], Body::from_stream(events)).into_response())
}

fn scored(score: Result<Vec<f32>, WireError>) -> GenerateEvent {
    match score {
        Ok(scores) => GenerateEvent::Scores { scores },
        Err(error) => GenerateEvent::Error { error },
    }
}

/// `POST /v1/follow`. What goes wrong when the answer has begun cuts it off.
pub(super) async fn follow(State(pool): State<Arc<Pool>>, request: Request) -> Result<Response, Refusal> {
    let ready = pool.ready()?;
    drop(ready.device.serving_places(1)?);
    let mut body = pool.bodies.stream(request)?;
    let request: FollowRequest = body::line(&mut body, ready.description.limits.max_model_len).await?;
    check::follow(&request, &ready.description)?;
    let permit = ready.device.serving_places(1)?;
    let FollowRequest { prompt, max_tokens, taps } = request;
    let row_bytes = taps.count() * ready.description.hidden_size as usize * number_bytes(ready.description.numerics.dtype);
    let room = ready.device.rows_room((ROWS_AHEAD * row_bytes) as u64)?;
    let waker = Waker(ready.device.clone());
    let ((feed, tokens), (out, mut frames)) = (unbounded_channel(), unbounded_channel());
    let untaken = Arc::new(AtomicUsize::new(0));
    let taps = Tap::all(&taps).collect();
    let follow = Follow { tokens, max_tokens: max_tokens as usize, taps, out, untaken: untaken.clone(), room };
    if !admitted(ready, plain::new_sequence(ready, prompt, "", None, Purpose::Follow(follow), Arc::new(permit))).await? {
        return Err(match frames.recv().await {
            Some(Err(error)) => error.into(),
            _ => Refusal::new(ErrorCode::Internal, "the device dropped the sequence"),
        });
    }
    let (owner, device) = (pool.clone(), ready.device.clone());
    tokio::spawn(until_closed(feed, device, async move |feed: &Feed<Vec<u32>>, device: &Device| {
        told(&owner, body, max_tokens as usize, feed, device).await
    }));
    let frames = stream::unfold((frames, 0, waker), move |(mut frames, taken, waker)| {
        // Those of the piece before: it was passed on.
        if taken > 0 {
            untaken.fetch_sub(taken, Ordering::Relaxed);
            let _ = waker.0.submit(Job::Wake);
        }
        async move {
            let (frame, rows) = match frames.recv().await? {
                Ok((frame, rows)) => (Ok(frame), rows),
                Err(error) => (Err(error), 0),
            };
            Some((frame, (frames, rows, waker)))
        }
    });
    Ok(([(CONTENT_TYPE, SAFETENSORS)], Body::from_stream(frames)).into_response())
}

/// Hands a sequence over and waits until it is admitted; false when it was dropped before.
async fn admitted(ready: &Ready, mut sequence: Sequence) -> Result<bool, Refusal> {
    let (tell, told) = oneshot::channel();
    sequence.admitted = Some(tell);
    ready.device.submit(Job::Serve(vec![sequence]))?;
    Ok(told.await.is_ok())
}

/// Lets `read` feed a sequence until the body ends, something is wrong with it, or the sequence has ended.
async fn until_closed<T>(feed: Feed<T>, device: Device, read: impl AsyncFnOnce(&Feed<T>, &Device) -> Result<(), Refusal>) {
    let outcome = tokio::select! {
        outcome = read(&feed, &device) => outcome,
        () = feed.closed() => Ok(()),
    };
    if let Err(refusal) = outcome {
        // A sequence that has ended needs no reason.
        let _ = feed.send(Err(refusal.into()));
    }
    drop(feed);
    drop(Waker(device));
}

/// Reads frames of rows, no more than the window has room for.
async fn rows(
    mut body: Streamed,
    widths: &[usize],
    frame_bytes: usize,
    window: &Semaphore,
    feed: &Feed<TapRows>,
    device: &Device,
) -> Result<(), Refusal> {
    let unreadable = |error: FrameError| Refusal::new(ErrorCode::InvalidRequest, error.to_string());
    let (mut frames, mut next) = (FrameReader::new(frame_bytes), 0);
    while let Some(mut piece) = body.piece().await? {
        while let Some(frame) = frames.feed(&mut piece).map_err(unreadable)? {
            let rows = TapRows::decode(&frame, widths).map_err(unreadable)?;
            if rows.rows == 0 {
                continue;
            }
            if rows.first != next || rows.rows > ROWS_AHEAD {
                let message = format!("{} rows from position {}: up to {ROWS_AHEAD} are expected from {next} on", rows.rows, rows.first);
                return Err(Refusal::new(ErrorCode::InvalidRequest, message));
            }
            next += rows.rows;
            if let Ok(room) = window.acquire_many(rows.rows as u32).await {
                room.forget();
            }
            if feed.send(Ok(rows)).is_err() {
                return Ok(());
            }
            device.submit(Job::Wake)?;
        }
    }
    frames.finish().map_err(unreadable)
}

/// Reads lines of tokens, no more than `most` in all.
async fn told(pool: &Pool, mut body: Streamed, most: usize, feed: &Feed<Vec<u32>>, device: &Device) -> Result<(), Refusal> {
    let mut count = 0;
    while let Some(line) = body.line(LINE_BYTES + TOKEN_BYTES * (most - count)).await? {
        let FollowTokens { tokens } = read(&line)?;
        if tokens.is_empty() {
            continue;
        }
        count += tokens.len();
        if count > most {
            return Err(Refusal::new(ErrorCode::TooLarge, format!("more tokens came than max_tokens, {most}")));
        }
        check::tokens("tokens", &tokens, &pool.ready()?.description)?;
        if feed.send(Ok(tokens)).is_err() {
            return Ok(());
        }
        device.submit(Job::Wake)?;
    }
    Ok(())
}

fn read(line: &Bytes) -> Result<FollowTokens, Refusal> {
    serde_json::from_slice(line).map_err(|error| Refusal::new(ErrorCode::InvalidRequest, error.to_string()))
}
