//! Calls whose body goes on while they are answered: what a pool is told of an answer that several pools make together.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures::stream::{Stream, StreamExt as _, once, unfold};
use reqwest::Body;
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::endpoints::lock;
use super::{Answer, Call, ClientError, Endpoint, Patience, Payload, PoolClient, streams};
use crate::exchange::frames::FrameReader;
use crate::exchange::mixing::{FollowRequest, FollowTokens, ROWS_AHEAD, TICK, TapRows};
use crate::exchange::wire::{self, GenerateEvent, GenerateRequest};

/// What is sent and was not taken yet: a few tokens, or one frame of rows on its way and the next.
const WAITING: usize = 1;

/// What a pool is told from now on; dropped, it ends the body.
pub type Sending = mpsc::Sender<Bytes>;

/// A body that is sent once.
#[derive(Clone, Debug)]
pub struct OpenBody(Arc<Mutex<Option<Body>>>);

impl OpenBody {
    /// `first`, then what is sent; `tick` where there is nothing to send for a while.
    fn new(first: Bytes, tick: Bytes) -> (Sending, Self) {
        let (sending, sent) = mpsc::channel(WAITING);
        let rest = unfold((sent, tick), async |(mut sent, tick): (mpsc::Receiver<Bytes>, Bytes)| match timeout(TICK, sent.recv()).await {
            Ok(piece) => Some((piece?, (sent, tick))),
            Err(_) => Some((tick.clone(), (sent, tick))),
        });
        let body = Body::wrap_stream(once(async { first }).chain(rest).map(Ok::<_, std::io::Error>));
        (sending, Self(Arc::new(Mutex::new(Some(body)))))
    }

    /// The body; empty the second time.
    pub(super) fn take(&self) -> Body {
        lock(&self.0).take().unwrap_or_default()
    }
}

/// Rows of a sequence that a pool follows.
pub struct Following {
    answer: Answer,
    frames: FrameReader,
    rest: Bytes,
    widths: Vec<usize>,
}

impl Following {
    /// The next rows.
    ///
    /// # Errors
    /// The pool broke off, or sent what is no frame.
    pub async fn next(&mut self) -> Result<TapRows, ClientError> {
        loop {
            let damaged = |answer: &Answer, cause| ClientError::frame(&answer.endpoint, &answer.what, &cause);
            if let Some(frame) = self.frames.feed(&mut self.rest).map_err(|cause| damaged(&self.answer, cause))? {
                return TapRows::decode(&frame, &self.widths).map_err(|cause| damaged(&self.answer, cause));
            }
            let piece = self.answer.piece().await?;
            self.rest = piece.ok_or_else(|| self.answer.interrupted("it ended before the answer".to_owned()))?;
        }
    }
}

impl PoolClient {
    /// Has the next pod follow a sequence, whose taps have rows of `width` numbers: it is told of further tokens by lines of [`FollowTokens`].
    ///
    /// # Errors
    /// What can be known before it has begun.
    pub async fn follow(&self, request: &FollowRequest, width: usize) -> Result<(Sending, Following), ClientError> {
        let tick = FollowTokens::default().line();
        let (sending, answer) = self.ask_open(None, "/v1/follow", &line(request), &tick).await?;
        let widths = vec![width; request.taps.count()];
        let frames = FrameReader::new(ROWS_AHEAD * widths.iter().sum::<usize>() * size_of::<f32>());
        Ok((sending, Following { answer, frames, rest: Bytes::new(), widths }))
    }

    /// As [`Self::generate`], of a head that reads further bases too, whose taps have these widths: their rows are sent as frames of [`TapRows`].
    ///
    /// # Errors
    /// As there.
    pub async fn generate_mixed(
        &self,
        endpoint: Option<&Endpoint>,
        request: &GenerateRequest,
        widths: &[usize],
    ) -> Result<(Sending, impl Stream<Item = Result<GenerateEvent, ClientError>> + Send + 'static), ClientError> {
        let nothing = widths.iter().map(|_| (crate::numbers::RowFormat::Plain(carryon_crds::pool::Dtype::Float32), Bytes::new()));
        let tick = TapRows { first: 0, rows: 0, taps: nothing.collect() }.encode(widths);
        let (sending, answer) = self.ask_open(endpoint, "/v1/generate-mixed", &line(request), &tick).await?;
        Ok((sending, streams::events(answer)))
    }

    /// Asks `endpoint`, or the next pod, until one begins to answer. Nothing but `first` is sent before.
    async fn ask_open(
        &self,
        endpoint: Option<&Endpoint>,
        path: &str,
        first: &Bytes,
        tick: &Bytes,
    ) -> Result<(Sending, Answer), ClientError> {
        let mut patience = Patience::new(self);
        loop {
            let (sending, body) = OpenBody::new(first.clone(), tick.clone());
            let mut call = Call::post(path, "application/octet-stream", Payload::Open(body));
            call.headers.extend(self.namespace.clone().map(|namespace| (wire::NAMESPACE_HEADER, namespace)));
            let asked = match endpoint {
                Some(endpoint) => self.attempt(endpoint, &call).await,
                None => self.attempt_next(&call).await,
            };
            match asked {
                Ok(answer) => return Ok((sending, answer)),
                Err(error) => patience.wait(error).await?,
            }
        }
    }
}

fn line<T: serde::Serialize>(request: &T) -> Bytes {
    // Our requests are plain structs: writing them cannot fail, and an empty line would be refused by name.
    let mut line = serde_json::to_vec(request).unwrap_or_default();
    line.push(b'\n');
    line.into()
}
