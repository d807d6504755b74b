//! A request body that is read as it comes: its client goes on with it while it is answered.

use axum::body::BodyDataStream;
use bytes::{Bytes, BytesMut};
use futures::StreamExt as _;
use tokio::time::Instant;

use super::body::{Bodies, BodyError};

/// The rest of a body. It may last as long as it likes, but never pause for longer than other bodies may.
pub struct Streamed {
    bodies: Bodies,
    pieces: BodyDataStream,
    /// Came, and not asked for yet.
    rest: BytesMut,
}

impl Streamed {
    pub(super) fn new(bodies: Bodies, pieces: BodyDataStream) -> Self {
        Self { bodies, pieces, rest: BytesMut::new() }
    }

    /// The next line, without its end, of at most `bound` bytes; none behind the last one. It takes room in the budget of bodies while it comes, and
    /// has the time that a body of its length has.
    ///
    /// # Errors
    /// Too long, too slow, broken off, or no room for it now.
    pub async fn line(&mut self, bound: usize) -> Result<Option<Bytes>, BodyError> {
        let (begun, mut searched) = (Instant::now(), 0);
        let mut room = self.bodies.hold(0)?;
        loop {
            if let Some(end) = self.rest[searched..].iter().position(|byte| *byte == b'\n') {
                if searched + end > bound {
                    return Err(BodyError::TooLarge(bound));
                }
                let mut line = self.rest.split_to(searched + end + 1);
                line.truncate(searched + end);
                return Ok(Some(line.freeze()));
            }
            searched = self.rest.len();
            if searched > bound {
                return Err(BodyError::TooLarge(bound));
            }
            let due = begun + self.bodies.time(searched as u64);
            let Some(piece) = self.next(due).await? else {
                return match self.rest.is_empty() {
                    true => Ok(None),
                    false => Err(BodyError::Broken("a line has no end".to_owned())),
                };
            };
            self.bodies.grow(&mut room, self.rest.len() + piece.len())?;
            self.rest.extend_from_slice(&piece);
        }
    }

    /// Whatever comes next; none at the end.
    ///
    /// # Errors
    /// Nothing came for too long, or it broke off.
    pub async fn piece(&mut self) -> Result<Option<Bytes>, BodyError> {
        match self.rest.is_empty() {
            true => self.next(Instant::now() + self.bodies.stall()).await,
            false => Ok(Some(self.rest.split().freeze())),
        }
    }

    async fn next(&mut self, due: Instant) -> Result<Option<Bytes>, BodyError> {
        let due = due.min(Instant::now() + self.bodies.stall());
        let piece = tokio::time::timeout_at(due, self.pieces.next()).await.map_err(|_| BodyError::Late)?;
        piece.transpose().map_err(|error| BodyError::Broken(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::extract::Request;
    use futures::stream;

    use super::*;

    fn request(pieces: &[&'static str]) -> Request {
        let pieces: Vec<_> = pieces.iter().map(|piece| Ok::<_, std::io::Error>(Bytes::from_static(piece.as_bytes()))).collect();
        Request::new(Body::from_stream(stream::iter(pieces)))
    }

    #[tokio::test]
    async fn lines_and_what_follows_them_come_however_they_were_cut() {
        let bodies = Bodies::new(1 << 20);
        for pieces in [&["ab\ncd\nefg"][..], &["a", "b\nc", "d", "\nefg"], &["ab\n", "cd\ne", "fg"]] {
            let mut body = bodies.stream(request(pieces)).unwrap();
            assert_eq!([body.line(9).await, body.line(9).await], [Ok(Some("ab".into())), Ok(Some("cd".into()))]);
            let mut rest = Vec::new();
            while let Some(piece) = body.piece().await.unwrap() {
                rest.extend(piece);
            }
            assert_eq!((rest.as_slice(), body.line(9).await), (&b"efg"[..], Ok(None)));
        }
    }

    #[tokio::test]
    async fn a_line_that_is_too_long_or_has_no_end_is_refused() {
        let bodies = Bodies::new(1 << 20);
        assert_eq!(bodies.stream(request(&["abc", "de\n"])).unwrap().line(4).await, Err(BodyError::TooLarge(4)));
        assert!(matches!(bodies.stream(request(&["abc"])).unwrap().line(4).await, Err(BodyError::Broken(_))));
    }
}
