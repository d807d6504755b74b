//! Request bodies: within their bound, their time, and one budget of bytes that all requests share.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::Request;
use axum::http::HeaderMap;
use axum::http::header::{CONTENT_ENCODING, CONTENT_LENGTH};
use bytes::{Bytes, BytesMut};
use carryon_crds::wire::limits::upload_time;
use futures::StreamExt as _;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

use super::streamed::Streamed;

/// Longest time between two pieces of a body.
const STALL: Duration = Duration::from_secs(30);
/// Bytes of a body that are free of the budget, so that small requests are answered while large ones fill it.
const FREE: usize = 64 << 10;
/// Bytes of a place in the budget: a semaphore gives out no more than 2^32 places at a time, and heads have more bytes.
const PLACE: usize = 1 << 10;

/// Why there is no body.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BodyError {
    /// It is longer than this route takes.
    #[error("the request body exceeds {0} bytes")]
    TooLarge(usize),
    /// Other requests fill the budget: ask again later.
    #[error("other requests fill the room for request bodies: ask again later")]
    Busy,
    /// It took too long.
    #[error("the request body came too slowly, or not a byte of it within {STALL:?}")]
    Late,
    /// It ended early, or is not framed as HTTP says.
    #[error("the request body broke off: {0}")]
    Broken(String),
    /// It is compressed.
    #[error("the request body has Content-Encoding {0:?}: send it as it is")]
    Encoded(String),
}

/// The room of a process for request bodies. Clones share it.
#[derive(Clone)]
pub struct Bodies {
    budget: Arc<Semaphore>,
    /// How long a body may be on its way of which so many bytes have come.
    time: fn(u64) -> Duration,
    stall: Duration,
}

impl Bodies {
    /// Room for `budget` bytes. What is read counts until its last copy is dropped.
    pub fn new(budget: usize) -> Self {
        Self { budget: Arc::new(Semaphore::new((budget / PLACE).min(Semaphore::MAX_PERMITS))), time: upload_time, stall: STALL }
    }

    /// Reads a whole body of at most `bound` bytes. One that says its length is refused before it is read.
    ///
    /// # Errors
    /// Too long, too slow, broken off, compressed, or no room for it now.
    pub async fn read(&self, request: Request, bound: usize) -> Result<Bytes, BodyError> {
        let (head, body) = request.into_parts();
        plain(&head.headers)?;
        let announced = length(&head.headers).unwrap_or(0);
        if announced > bound {
            return Err(BodyError::TooLarge(bound));
        }
        let room = self.room(places(announced))?;
        self.collect(body, announced, bound, room).await
    }

    /// A body to be read as it comes.
    ///
    /// # Errors
    /// It is compressed.
    pub fn stream(&self, request: Request) -> Result<Streamed, BodyError> {
        plain(request.headers())?;
        Ok(Streamed::new(self.clone(), request.into_body().into_data_stream()))
    }

    async fn collect(&self, body: Body, announced: usize, bound: usize, mut room: OwnedSemaphorePermit) -> Result<Bytes, BodyError> {
        let (begun, mut pieces) = (Instant::now(), body.into_data_stream());
        let mut bytes = BytesMut::with_capacity(announced);
        loop {
            let due = (begun + (self.time)(bytes.len() as u64)).min(Instant::now() + self.stall);
            let Some(piece) = tokio::time::timeout_at(due, pieces.next()).await.map_err(|_| BodyError::Late)? else { break };
            let piece = piece.map_err(|error| BodyError::Broken(error.to_string()))?;
            let length = bytes.len() + piece.len();
            if length > bound {
                return Err(BodyError::TooLarge(bound));
            }
            self.grow(&mut room, length)?;
            bytes.extend_from_slice(&piece);
        }
        Ok(Bytes::from_owner(Held { bytes, _room: room }))
    }

    /// Room for so many bytes.
    pub(super) fn hold(&self, bytes: usize) -> Result<OwnedSemaphorePermit, BodyError> {
        self.room(places(bytes))
    }

    /// More room, for `bytes` in all.
    pub(super) fn grow(&self, room: &mut OwnedSemaphorePermit, bytes: usize) -> Result<(), BodyError> {
        room.merge(self.room(places(bytes).saturating_sub(room.num_permits()))?);
        Ok(())
    }

    /// How long a body of so many bytes may be on its way.
    pub(super) fn time(&self, bytes: u64) -> Duration {
        (self.time)(bytes)
    }

    /// Longest time between two pieces.
    pub(super) fn stall(&self) -> Duration {
        self.stall
    }

    fn room(&self, places: usize) -> Result<OwnedSemaphorePermit, BodyError> {
        let places = u32::try_from(places).map_err(|_| BodyError::Busy)?;
        self.budget.clone().try_acquire_many_owned(places).map_err(|_| BodyError::Busy)
    }
}

/// Refuses what is compressed.
fn plain(headers: &HeaderMap) -> Result<(), BodyError> {
    let identity = |encoding: &&[u8]| encoding.is_empty() || encoding.eq_ignore_ascii_case(b"identity");
    match headers.get(CONTENT_ENCODING).map(|value| value.as_bytes()).filter(|encoding| !identity(encoding)) {
        Some(encoding) => Err(BodyError::Encoded(String::from_utf8_lossy(encoding).into_owned())),
        None => Ok(()),
    }
}

/// Places that so many bytes of a body take in the budget.
fn places(bytes: usize) -> usize {
    bytes.saturating_sub(FREE).div_ceil(PLACE)
}

fn length(headers: &HeaderMap) -> Option<usize> {
    headers.get(CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// Bytes and their share of the budget.
struct Held {
    bytes: BytesMut,
    _room: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

#[cfg(test)]
mod tests {
    use futures::stream;

    use super::*;

    const LARGE: usize = FREE + 100 * PLACE;

    fn request(announced: Option<usize>, body: Body) -> Request {
        let mut request = Request::new(body);
        request.headers_mut().extend(announced.map(|length| (CONTENT_LENGTH, length.into())));
        request
    }

    fn whole(length: usize) -> Request {
        request(Some(length), vec![7; length].into())
    }

    /// A body in two pieces that does not say how long it is.
    fn pieces(length: usize) -> Request {
        let pieces = [vec![7; length / 2], vec![7; length - length / 2]].map(Ok::<_, std::io::Error>);
        request(None, Body::from_stream(stream::iter(pieces)))
    }

    #[tokio::test]
    async fn bodies_share_one_budget_until_they_are_dropped() {
        let bodies = Bodies::new(250 * PLACE);
        for request in [whole, pieces] {
            let held = [bodies.read(request(LARGE), LARGE).await.unwrap(), bodies.read(request(LARGE), LARGE).await.unwrap()];
            assert_eq!(held[0], vec![7; LARGE]);
            assert_eq!(bodies.read(request(LARGE), LARGE).await, Err(BodyError::Busy));
            assert_eq!(bodies.read(request(FREE), LARGE).await.unwrap().len(), FREE, "a small one finds room");
            let part = held[0].slice(..1);
            drop(held);
            assert!(bodies.read(request(LARGE), LARGE).await.is_ok());
            assert_eq!(bodies.read(request(LARGE + 100 * PLACE), 2 * LARGE).await, Err(BodyError::Busy), "a part keeps the whole");
            drop(part);
            assert!(bodies.read(request(LARGE + 150 * PLACE), 2 * LARGE).await.is_ok());
        }
    }

    #[tokio::test]
    async fn a_body_beyond_its_bound_is_refused_and_gives_its_room_back() {
        let bodies = Bodies::new(LARGE);
        for request in [whole, pieces] {
            assert_eq!(bodies.read(request(LARGE + 1), LARGE).await, Err(BodyError::TooLarge(LARGE)));
        }
        // Refused by what it says, before a byte of it has come.
        assert_eq!(
            bodies.read(request(Some(LARGE + 1), Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>())), LARGE).await,
            Err(BodyError::TooLarge(LARGE))
        );
        assert_eq!(bodies.budget.available_permits(), LARGE / PLACE);
    }

    #[tokio::test]
    async fn a_slow_body_is_refused_and_gives_its_room_back() {
        const SOON: Duration = Duration::from_millis(5);
        let half = || stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"half"))]).chain(stream::pending());
        for bodies in [Bodies { time: |_| SOON, ..Bodies::new(LARGE) }, Bodies { stall: SOON, ..Bodies::new(LARGE) }] {
            assert_eq!(bodies.read(request(Some(LARGE), Body::from_stream(half())), LARGE).await, Err(BodyError::Late));
            assert_eq!(bodies.budget.available_permits(), LARGE / PLACE);
        }
    }

    #[tokio::test]
    async fn a_body_may_take_as_long_as_its_bytes_need_and_one_that_trickles_may_not() {
        const GRACE: Duration = Duration::from_millis(200);
        const LENGTH: usize = 20 * 10 * PLACE;
        let drops = |bytes: usize| {
            stream::unfold(0, move |sent| async move {
                tokio::time::sleep(GRACE / 10).await;
                (sent < LENGTH).then(|| (Ok::<_, std::io::Error>(Bytes::from(vec![7; bytes])), sent + bytes))
            })
        };
        let bodies = Bodies { time: |bytes| GRACE + Duration::from_millis(bytes / 100), ..Bodies::new(LENGTH) };
        let begun = Instant::now();
        assert_eq!(bodies.read(request(Some(LENGTH), Body::from_stream(drops(LENGTH / 20))), LENGTH).await.unwrap().len(), LENGTH);
        assert!(begun.elapsed() > GRACE);
        assert_eq!(bodies.read(request(Some(LENGTH), Body::from_stream(drops(1))), LENGTH).await, Err(BodyError::Late));
        assert_eq!(bodies.budget.available_permits(), LENGTH / PLACE);
    }

    #[tokio::test]
    async fn a_body_that_is_read_as_it_comes_may_not_pause_either() {
        let bodies = Bodies { stall: Duration::from_millis(5), ..Bodies::new(LARGE) };
        let never = || request(None, Body::from_stream(stream::pending::<Result<Bytes, std::io::Error>>()));
        assert_eq!(bodies.stream(never()).unwrap().line(9).await, Err(BodyError::Late));
        assert_eq!(bodies.stream(never()).unwrap().piece().await, Err(BodyError::Late));
    }

    #[tokio::test]
    async fn a_compressed_body_and_a_broken_one_are_named() {
        let bodies = Bodies::new(0);
        for (encoding, refused) in [("gzip", true), ("br", true), ("gzip, identity", true), ("Identity", false), ("", false)] {
            let mut request = whole(1);
            request.headers_mut().insert(CONTENT_ENCODING, encoding.parse().unwrap());
            assert_eq!(bodies.read(request, 1).await.err(), refused.then(|| BodyError::Encoded(encoding.to_owned())));
        }
        let broken = stream::iter([Ok(Bytes::from_static(b"{")), Err(std::io::Error::other("gone"))]);
        assert_eq!(bodies.read(request(None, Body::from_stream(broken)), 9).await, Err(BodyError::Broken("gone".into())));
    }
}
