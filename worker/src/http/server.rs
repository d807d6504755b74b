//! Accepts connections and ends those on which nothing comes.

use std::pin::pin;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::server::conn::http1::{Builder, Connection};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

/// Longest time until the next request's header has come, from the connection's beginning or the end of the answer before. As nginx keeps
/// idle connections: longer than the 60 seconds for which load balancers keep theirs, lest they use one that has just been closed.
pub const SILENCE: Duration = Duration::from_secs(75);

/// Serves `router` until `end` resolves, then lets the answers that have begun end. Who is silent for `silence` is disconnected.
pub async fn serve(mut listener: TcpListener, router: Router, silence: Duration, end: impl Future<Output = ()>) {
    let mut http = Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(silence);
    let (ending, ended) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut end = pin!(end);
    loop {
        tokio::select! {
            (stream, _) = Listener::accept(&mut listener) => {
                // Without it an answer only waits longer for its last packet.
                drop(stream.set_nodelay(true));
                let connection = http.serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
                connections.spawn(keep(connection, ended.clone()));
            }
            Some(_) = connections.join_next() => {}
            () = &mut end => break,
        }
    }
    drop(listener);
    ending.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// Drives a connection to its end: the answer at hand is its last once `ended` says so.
async fn keep(connection: Connection<TokioIo<TcpStream>, TowerToHyperService<Router>>, mut ended: watch::Receiver<bool>) {
    let mut connection = pin!(connection);
    let outcome = tokio::select! {
        outcome = connection.as_mut() => outcome,
        () = async { drop(ended.wait_for(|ended| *ended).await) } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = outcome {
        tracing::debug!("a connection ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::body::Body;
    use axum::routing::get;
    use bytes::Bytes;
    use futures::StreamExt as _;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::sync::{mpsc, oneshot};
    use tokio_stream::wrappers::UnboundedReceiverStream;

    use super::*;

    /// Short, so that tests wait for it.
    const SILENCE: Duration = Duration::from_millis(50);

    async fn start(router: Router) -> (std::net::SocketAddr, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, told) = oneshot::channel::<()>();
        (address, end, tokio::spawn(serve(listener, router, SILENCE, async { drop(told.await) })))
    }

    async fn connect(address: std::net::SocketAddr, sent: &str) -> TcpStream {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(sent.as_bytes()).await.unwrap();
        stream
    }

    async fn until_closed(mut stream: TcpStream) -> String {
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        text
    }

    #[tokio::test]
    async fn silent_connections_are_closed_wherever_they_stopped_and_answers_go_on() {
        let (pieces, received) = mpsc::unbounded_channel::<Bytes>();
        let stream = Arc::new(Mutex::new(Some(UnboundedReceiverStream::new(received).map(Ok::<_, std::convert::Infallible>))));
        let stream = move || std::future::ready(Body::from_stream(stream.lock().unwrap().take().unwrap()));
        let router = Router::new().route("/", get(async || "short")).route("/stream", get(stream));
        let (address, _end, _server) = start(router).await;
        let long = connect(address, "GET /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        pieces.send("first ".into()).unwrap();
        // Nothing at all, half a header, nothing after an answer: each of them waits for at least the silence that ends a connection.
        for (sent, received) in [("", ""), ("GET / HTTP/1.1\r\nhost: ", ""), ("GET / HTTP/1.1\r\nhost: x\r\n\r\n", "short")] {
            let text = until_closed(connect(address, sent).await).await;
            assert!(text.ends_with(received) && received.is_empty() == text.is_empty(), "{sent:?}: {text:?}");
        }
        pieces.send("last".into()).unwrap();
        drop(pieces);
        let text = until_closed(long).await;
        assert!(text.contains("first ") && text.contains("last") && text.ends_with("0\r\n\r\n"), "{text:?}");
    }

    #[tokio::test]
    async fn told_to_end_it_lets_answers_end_and_accepts_nobody() {
        let (begun, mut has_begun) = mpsc::unbounded_channel::<()>();
        let (go, gone) = oneshot::channel::<()>();
        let gone = Arc::new(Mutex::new(Some(gone)));
        let slow = move || {
            begun.send(()).unwrap();
            let gone = gone.lock().unwrap().take().unwrap();
            async {
                gone.await.unwrap();
                "slow"
            }
        };
        let (address, end, server) = start(Router::new().route("/", get(slow))).await;
        let asked = connect(address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        has_begun.recv().await.unwrap();
        end.send(()).unwrap();
        while TcpStream::connect(address).await.is_ok() {
            tokio::task::yield_now().await;
        }
        go.send(()).unwrap();
        assert!(until_closed(asked).await.ends_with("slow"));
        server.await.unwrap();
    }
}
