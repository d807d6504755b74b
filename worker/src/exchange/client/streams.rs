//! Answers that come piece by piece: hidden states and generated tokens.

use bytes::{Bytes, BytesMut};
use futures::stream::{BoxStream, Stream, StreamExt as _, try_unfold};
use reqwest::Response;

use super::{Call, ClientError, Endpoint, Patience, PoolClient, interrupted};
use crate::exchange::frames::FrameReader;
use crate::exchange::states::SequenceStates;
use crate::exchange::wire::{GenerateEvent, HiddenStatesRequest};

/// Bound of the hidden size of any model, to bound a frame before its header is read.
const MAX_HIDDEN_SIZE: usize = 32 * 1024;
/// Bound of one line of events: log probabilities of a long prompt.
const MAX_LINE_BYTES: usize = 32 * 1024 * 1024;

type Pieces = BoxStream<'static, reqwest::Result<Bytes>>;

/// An answer of the pool that is being read.
struct Answer {
    endpoint: Endpoint,
    pieces: Pieces,
    frames: FrameReader,
    /// Received and not decoded yet.
    rest: Bytes,
    /// Place in the whole request of each sequence asked for here.
    places: Vec<usize>,
    /// Tokens of each sequence asked for here.
    lengths: Vec<usize>,
}

/// Sequences still to come.
struct Fetch {
    client: PoolClient,
    request: HiddenStatesRequest,
    missing: Vec<usize>,
    answer: Option<Answer>,
}

/// Streams hidden states; what broke off is asked for again.
pub(super) fn hidden_states(
    client: PoolClient,
    request: HiddenStatesRequest,
) -> impl Stream<Item = Result<SequenceStates, ClientError>> + Send {
    let missing = (0..request.sequences.len()).collect();
    try_unfold(Fetch { client, request, missing, answer: None }, async |mut fetch| Ok(fetch.next().await?.map(|states| (states, fetch))))
}

impl Fetch {
    /// The next sequence, from the answer at hand or a new one.
    async fn next(&mut self) -> Result<Option<SequenceStates>, ClientError> {
        let client = self.client.clone();
        let mut patience = Patience::new(&client);
        while !self.missing.is_empty() {
            match self.advance().await {
                Ok(states) => {
                    self.missing.retain(|place| *place != states.index);
                    return Ok(Some(states));
                }
                Err(error) => patience.wait(error).await?,
            }
            self.answer = None;
        }
        Ok(None)
    }

    async fn advance(&mut self) -> Result<SequenceStates, ClientError> {
        let answer = match &mut self.answer {
            Some(answer) => answer,
            None => {
                let answer = open(&self.client, &self.request, &self.missing).await?;
                self.answer.insert(answer)
            }
        };
        let mut states = answer.next(&self.request).await?;
        states.index = answer.places[states.index];
        match self.missing.contains(&states.index) {
            true => Ok(states),
            false => Err(answer.unreadable(format!("sequence {} came twice", states.index))),
        }
    }
}

/// Asks for the sequences at the places `missing`.
async fn open(client: &PoolClient, request: &HiddenStatesRequest, missing: &[usize]) -> Result<Answer, ClientError> {
    let sequences: Vec<_> = missing.iter().map(|place| request.sequences[*place].clone()).collect();
    let lengths: Vec<_> = sequences.iter().map(Vec::len).collect();
    let bound = lengths.iter().max().map_or(0, |longest| longest * request.taps.count() * 4 * MAX_HIDDEN_SIZE);
    let call = Call::json("/v1/hidden-states", &HiddenStatesRequest { sequences, taps: request.taps.clone() });
    let (endpoint, response) = client.ask(None, &call).await?;
    let (pieces, frames) = (response.bytes_stream().boxed(), FrameReader::new(bound));
    Ok(Answer { endpoint, pieces, frames, rest: Bytes::new(), places: missing.to_vec(), lengths })
}

impl Answer {
    const WHAT: &'static str = "POST /v1/hidden-states";

    /// The next sequence; `index` is its place in this answer.
    async fn next(&mut self, request: &HiddenStatesRequest) -> Result<SequenceStates, ClientError> {
        loop {
            let frame = self.frames.feed(&mut self.rest).map_err(|cause| ClientError::frame(&self.endpoint, Self::WHAT, &cause))?;
            if let Some(frame) = frame {
                let states = SequenceStates::decode(&frame, &request.taps, &self.lengths);
                return states.map_err(|cause| ClientError::frame(&self.endpoint, Self::WHAT, &cause));
            }
            self.rest = match self.pieces.next().await {
                Some(piece) => piece.map_err(|cause| interrupted(&self.endpoint, Self::WHAT, &cause))?,
                None => {
                    let (endpoint, what) = (self.endpoint.clone(), Self::WHAT.to_owned());
                    return Err(ClientError::Interrupted { endpoint, what, reason: "sequences are missing at its end".to_owned() });
                }
            };
        }
    }

    fn unreadable(&self, reason: String) -> ClientError {
        ClientError::Unreadable { endpoint: self.endpoint.clone(), what: Self::WHAT.to_owned(), reason }
    }
}

/// Lines of an answer of `generate` that are still to come.
struct Lines {
    endpoint: Endpoint,
    what: String,
    pieces: Pieces,
    buffer: BytesMut,
    /// Bytes of `buffer` known to hold no line end.
    searched: usize,
    finished: bool,
}

/// Streams generated tokens; ends after the last event, with an error if that never came.
pub(super) fn events(
    endpoint: Endpoint,
    what: String,
    response: Response,
) -> impl Stream<Item = Result<GenerateEvent, ClientError>> + Send {
    let pieces = response.bytes_stream().boxed();
    let lines = Lines { endpoint, what, pieces, buffer: BytesMut::new(), searched: 0, finished: false };
    try_unfold(lines, async |mut lines| Ok(lines.next().await?.map(|event| (event, lines))))
}

impl Lines {
    async fn next(&mut self) -> Result<Option<GenerateEvent>, ClientError> {
        if self.finished {
            return Ok(None);
        }
        loop {
            if let Some(end) = self.buffer[self.searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.buffer.split_to(self.searched + end + 1);
                self.searched = 0;
                let event = serde_json::from_slice(&line).map_err(|cause| self.unreadable(cause.to_string()))?;
                self.finished = matches!(event, GenerateEvent::Finish { .. } | GenerateEvent::Error { .. });
                return Ok(Some(event));
            }
            self.searched = self.buffer.len();
            match self.pieces.next().await {
                Some(piece) => self.buffer.extend_from_slice(&piece.map_err(|cause| interrupted(&self.endpoint, &self.what, &cause))?),
                None => {
                    let (endpoint, what) = (self.endpoint.clone(), self.what.clone());
                    return Err(ClientError::Interrupted { endpoint, what, reason: "the last event is missing".to_owned() });
                }
            }
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(self.unreadable(format!("a line exceeds {MAX_LINE_BYTES} bytes")));
            }
        }
    }

    fn unreadable(&self, reason: String) -> ClientError {
        ClientError::Unreadable { endpoint: self.endpoint.clone(), what: self.what.clone(), reason }
    }
}
