//! The rest of a body that nobody wants: read and thrown away for a while, so that who still sends it sees the answer.
//!
//! Were the connection closed at once, clients that send before they read (Node.js, Python) would be told of a broken pipe instead of why they
//! were refused. nginx does the same (`lingering_close`, with these limits).

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum::body::{Body, BodyDataStream};
use axum::extract::Request;
use axum::http::header::EXPECT;
use axum::middleware::Next;
use axum::response::Response;
use bytes::Bytes;
use futures::StreamExt as _;
use hyper::body::{Frame, SizeHint};

/// Longest time for it.
const WHOLE: Duration = Duration::from_secs(30);
/// Longest time between two pieces.
const STALL: Duration = Duration::from_secs(5);

/// Middleware: gives the handler a body whose rest is thrown away when it is dropped.
pub(super) async fn linger(request: Request, next: Next) -> Response {
    // Who waits to be told to go on sends nothing to one who refuses.
    if request.headers().contains_key(EXPECT) {
        return next.run(request).await;
    }
    next.run(request.map(|body| Body::new(Lingering(body)))).await
}

struct Lingering(Body);

impl hyper::body::Body for Lingering {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.0).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.0.size_hint()
    }
}

impl Drop for Lingering {
    fn drop(&mut self) {
        use hyper::body::Body as _;
        if !self.0.is_end_stream() {
            tokio::spawn(tokio::time::timeout(WHOLE, discard(std::mem::take(&mut self.0).into_data_stream())));
        }
    }
}

async fn discard(mut rest: BodyDataStream) {
    while let Ok(Some(Ok(_))) = tokio::time::timeout(STALL, rest.next()).await {}
}

#[cfg(test)]
mod tests {
    use axum::Router;
    use axum::http::StatusCode;
    use axum::routing::{get, put};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpListener, TcpStream};

    use super::super::{Silence, serve};

    /// More than sockets hold.
    const LENGTH: usize = 64 << 20;

    #[tokio::test]
    async fn who_sends_before_it_reads_sees_why_it_is_refused() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router =
            Router::new().route("/", put(async || (StatusCode::PAYLOAD_TOO_LARGE, "too much"))).route("/next", get(async || "next"));
        tokio::spawn(serve(listener, router, Silence::default(), std::future::pending()));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("PUT / HTTP/1.1\r\nhost: x\r\ncontent-length: {LENGTH}\r\n\r\n").as_bytes()).await.unwrap();
        stream.write_all(&vec![7; LENGTH]).await.unwrap();
        stream.write_all(b"GET /next HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert!(text.starts_with("HTTP/1.1 413") && text.contains("too much") && text.ends_with("next"), "{text}");
    }
}
