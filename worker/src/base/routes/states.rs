//! What trainers ask for: hidden states, losses, the LM head.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::{Arc, LazyLock};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::HeaderValue;
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::response::{IntoResponse as _, Response};
use bytes::Bytes;
use futures::{Stream, StreamExt as _, stream};
use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use tokio::sync::oneshot;

use super::{Pool, Refusal, body, check};
use crate::base::device::{Job, LossJob, StatesJob, StatesOut};
use crate::base::schedule::Trainer;
use crate::exchange::SequenceStates;
use crate::exchange::loss::LossRequest;
use crate::exchange::wire::{ErrorCode, HiddenStatesRequest, JOB_HEADER, SAFETENSORS, row_formats};
use crate::numbers::{number_bytes, wire_dtype};
use crate::tensor_file;

/// Rows of the LM head that are unpacked at a time.
const LM_HEAD_ROWS: usize = 512;

/// `POST /v1/hidden-states`. A full queue refuses before the body is read, but only a request that has come whole takes a place.
pub(super) async fn hidden_states(State(pool): State<Arc<Pool>>, request: Request) -> Result<Response, Refusal> {
    let ready = pool.ready()?;
    drop(ready.device.training_place()?);
    let trainer = trainer(&request);
    let HiddenStatesRequest { sequences, taps, dtype } = body::json(&pool, request, ready.description.limits.max_request_tokens).await?;
    check::taps(&taps, &ready.description)?;
    check::sequences(&sequences, &ready.description)?;
    let permit = ready.device.training_place()?;
    let (out, states) = unbounded_channel();
    let formats = row_formats(&taps, ready.description.numerics.dtype, dtype);
    let width = ready.description.hidden_size as usize;
    let row_bytes = formats.iter().map(|format| format.row_bytes(width)).sum();
    let room = ready.device.room(row_bytes);
    let frame = |(index, tokens): (usize, &Vec<u32>)| {
        SequenceStates::header(index, tokens.len(), &formats, &taps, width).len() + tokens.len() * row_bytes
    };
    let length = sequences.iter().enumerate().map(frame).sum();
    let sequences = sequences.into_iter().enumerate().collect();
    ready.device.submit(Job::States(trainer, StatesJob { sequences, taps, formats, out, room, permit }))?;
    let device = ready.device.clone();
    Ok(safetensors(length, states_body(states, move || drop(device.submit(Job::Wake)))))
}

/// Whose turn a request takes: its job's; a request that names none has turns of its own.
fn trainer(request: &Request) -> Trainer {
    static NAMES: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    request.headers().get(JOB_HEADER).map_or_else(rand::random, |job| NAMES.hash_one(job.as_bytes()))
}

/// The pieces of `states` as a body; `taken` is called after each piece that brought room was passed on and its room given back, and when the body
/// goes.
pub fn states_body(states: UnboundedReceiver<StatesOut>, taken: impl Fn() + Send + 'static) -> Body {
    Body::from_stream(pieces(states, taken).map(Ok::<_, std::convert::Infallible>))
}

fn pieces(states: UnboundedReceiver<StatesOut>, taken: impl Fn() + Send + 'static) -> impl Stream<Item = Bytes> + Send {
    stream::unfold((Reader { states, taken }, None), |(mut reader, room)| async move {
        // The room of the piece before: that piece was passed on.
        if room.is_some() {
            drop(room);
            (reader.taken)();
        }
        let (piece, room) = reader.states.recv().await?;
        Some((piece, (reader, room)))
    })
}

/// Who reads states. A job that waits for room does not see that its reader went away until somebody wakes the device.
struct Reader<F: Fn()> {
    states: UnboundedReceiver<StatesOut>,
    taken: F,
}

impl<F: Fn()> Drop for Reader<F> {
    fn drop(&mut self) {
        self.states.close();
        (self.taken)();
    }
}

/// `POST /v1/loss`.
pub(super) async fn loss(State(pool): State<Arc<Pool>>, request: Request) -> Result<Response, Refusal> {
    let ready = pool.ready()?;
    drop(ready.device.training_place()?);
    let trainer = trainer(&request);
    let bytes = pool.bodies.read(request, ready.description.limits.max_body_bytes as usize).await?;
    let hidden_size = ready.description.hidden_size as usize;
    let invalid = |error: crate::exchange::frames::FrameError| Refusal::new(ErrorCode::InvalidRequest, error.to_string());
    let request = LossRequest::decode(bytes, hidden_size).map_err(invalid)?;
    check::loss(&request, &ready.description)?;
    let permit = ready.device.training_place()?;
    let (reply, answer) = oneshot::channel();
    ready.device.submit(Job::Loss(trainer, LossJob { request, reply, permit }))?;
    let answer = answer.await.map_err(|_| Refusal::new(ErrorCode::Internal, "the device dropped the loss"))?;
    let pieces = answer.encode(hidden_size);
    let length = pieces.iter().map(Bytes::len).sum();
    Ok(safetensors(length, Body::from_stream(stream::iter(pieces.into_iter().map(Ok::<_, std::convert::Infallible>)))))
}

/// `GET /v1/lm-head`: unpacked as it is read.
pub(super) async fn lm_head(State(pool): State<Arc<Pool>>) -> Result<Response, Refusal> {
    let ready = pool.ready()?;
    let (rows, width) = (ready.description.vocab_size as usize, ready.description.hidden_size as usize);
    let dtype = wire_dtype(ready.description.numerics.dtype);
    if ready.lm_head.is_none() {
        let problem = "the logits of this model are bounded, which the LM head alone does not say: train with the loss Remote";
        return Err(Refusal::new(ErrorCode::InvalidRequest, problem));
    }
    let header = Bytes::from(tensor_file::header(&[], [("weight", dtype, &[rows, width][..])].into_iter()));
    let length = header.len() + rows * width * number_bytes(ready.description.numerics.dtype);
    let unpack = move |start: usize| match pool.ready().ok().and_then(|ready| ready.lm_head.as_ref()) {
        Some(read) => read(start..(start + LM_HEAD_ROWS).min(rows)).map_err(std::io::Error::other),
        None => Err(std::io::ErrorKind::NotConnected.into()),
    };
    let data = stream::iter((0..rows).step_by(LM_HEAD_ROWS)).map(unpack);
    Ok(safetensors(length, Body::from_stream(stream::iter([Ok(header)]).chain(data))))
}

/// `length` bytes: who reads them knows how many come, and that it is cut off when fewer do.
fn safetensors(length: usize, body: Body) -> Response {
    ([(CONTENT_TYPE, HeaderValue::from_static(SAFETENSORS)), (CONTENT_LENGTH, length.into())], body).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_goes_away_wakes_the_device_after_it_has_gone() {
        let (out, states) = unbounded_channel();
        let (tell, told) = std::sync::mpsc::channel();
        let body = states_body(states, move || tell.send(out.is_closed()).unwrap());
        assert!(told.try_recv().is_err());
        drop(body);
        assert_eq!(told.try_iter().collect::<Vec<_>>(), [true]);
    }
}
