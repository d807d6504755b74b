//! Answers that come piece by piece: hidden states and generated tokens.

use bytes::{Bytes, BytesMut};
use carryon_crds::wire::limits::MAX_HIDDEN_SIZE;
use futures::stream::{Stream, try_unfold};

use super::{Answer, Call, ClientError, Patience, PoolClient};
use crate::exchange::frames::{FrameError, FrameReader};
use crate::exchange::states::SequenceStates;
use crate::exchange::wire::{GenerateEvent, HiddenStatesRequest};

/// Bound of one line of events: log probabilities of a long prompt.
const MAX_LINE_BYTES: usize = 32 * 1024 * 1024;

/// Hidden states that are being read.
struct Reading {
    answer: Answer,
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
    reading: Option<Reading>,
}

/// Streams hidden states; what broke off is asked for again.
pub(super) fn hidden_states(
    client: PoolClient,
    request: HiddenStatesRequest,
) -> impl Stream<Item = Result<SequenceStates, ClientError>> + Send {
    let missing = (0..request.sequences.len()).collect();
    try_unfold(Fetch { client, request, missing, reading: None }, async |mut fetch| Ok(fetch.next().await?.map(|states| (states, fetch))))
}

impl Fetch {
    /// The next sequence, from the answer at hand or a new one.
    async fn next(&mut self) -> Result<Option<SequenceStates>, ClientError> {
        let client = self.client.clone();
        let mut patience = Patience::new(&client);
        while !self.missing.is_empty() {
            let reading = match self.reading.take() {
                Some(reading) => reading,
                None => open(&client, &self.request, &self.missing).await?,
            };
            match self.advance(reading).await {
                Ok(states) => return Ok(Some(states)),
                Err(error) => patience.wait(error).await?,
            }
        }
        Ok(None)
    }

    /// The next sequence of `reading`, which is kept if it came.
    async fn advance(&mut self, mut reading: Reading) -> Result<SequenceStates, ClientError> {
        let mut states = reading.next(&self.request).await?;
        states.index = reading.places[states.index];
        let missing = self.missing.len();
        self.missing.retain(|place| *place != states.index);
        if self.missing.len() == missing {
            return Err(reading.answer.unreadable(format!("sequence {} came twice", states.index)));
        }
        self.reading = Some(reading);
        Ok(states)
    }
}

/// Asks for the sequences at the places `missing`.
async fn open(client: &PoolClient, request: &HiddenStatesRequest, missing: &[usize]) -> Result<Reading, ClientError> {
    let sequences: Vec<_> = missing.iter().map(|place| request.sequences[*place].clone()).collect();
    let lengths: Vec<_> = sequences.iter().map(Vec::len).collect();
    let bound = lengths.iter().max().map_or(0, |longest| longest * request.taps.count() * 4 * MAX_HIDDEN_SIZE as usize);
    let mut call = Call::json("/v1/hidden-states", &HiddenStatesRequest { sequences, taps: request.taps.clone(), dtype: request.dtype });
    call.headers.extend(client.job_header());
    let answer = client.ask(None, &call).await?;
    Ok(Reading { answer, frames: FrameReader::new(bound), rest: Bytes::new(), places: missing.to_vec(), lengths })
}

impl Reading {
    /// The next sequence; `index` is its place in this answer.
    async fn next(&mut self, request: &HiddenStatesRequest) -> Result<SequenceStates, ClientError> {
        loop {
            let frame = self.frames.feed(&mut self.rest).map_err(|cause| self.damaged(&cause))?;
            if let Some(frame) = frame {
                return SequenceStates::decode(&frame, &request.taps, &self.lengths).map_err(|cause| self.damaged(&cause));
            }
            let piece = self.answer.piece().await?;
            self.rest = piece.ok_or_else(|| self.answer.interrupted("sequences are missing at its end".to_owned()))?;
        }
    }

    fn damaged(&self, cause: &FrameError) -> ClientError {
        ClientError::frame(&self.answer.endpoint, &self.answer.what, cause)
    }
}

/// Lines of an answer of `generate` that are still to come.
struct Lines {
    answer: Answer,
    buffer: BytesMut,
    /// Bytes of `buffer` known to hold no line end.
    searched: usize,
    finished: bool,
}

/// Streams generated tokens; ends after the last event, with an error if that never came.
pub(super) fn events(answer: Answer) -> impl Stream<Item = Result<GenerateEvent, ClientError>> + Send {
    let lines = Lines { answer, buffer: BytesMut::new(), searched: 0, finished: false };
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
                let event = serde_json::from_slice(&line).map_err(|cause| self.answer.unreadable(cause.to_string()))?;
                self.finished = matches!(event, GenerateEvent::Scores { .. } | GenerateEvent::Finish { .. } | GenerateEvent::Error { .. });
                return Ok(Some(event));
            }
            self.searched = self.buffer.len();
            let piece = self.answer.piece().await?;
            self.buffer.extend_from_slice(&piece.ok_or_else(|| self.answer.interrupted("the last event is missing".to_owned()))?);
            if self.buffer.len() > MAX_LINE_BYTES {
                return Err(self.answer.unreadable(format!("a line exceeds {MAX_LINE_BYTES} bytes")));
            }
        }
    }
}
