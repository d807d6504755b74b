//! Accepts connections and ends those on which nothing comes.

use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::middleware::from_fn;
use axum::serve::Listener;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1::Builder;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustix::net::sockopt::set_tcp_user_timeout;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::linger::linger;

/// How long a client may be silent.
#[derive(Clone, Copy, Debug)]
pub struct Silence {
    /// From the beginning of a connection until its first header has come. Short: nothing was asked yet, and descriptors are few.
    pub first: Duration,
    /// From the end of an answer until the next header has come.
    pub next: Duration,
    /// For which a client takes nothing of an answer that is there: what it does not take is kept for it, and there is a bound to that.
    pub taking: Duration,
}

impl Default for Silence {
    /// As Go's servers are told to wait for a header, and as nginx keeps idle connections: longer than the 60 seconds for which load balancers
    /// keep theirs, lest they use one that has just been closed. A trainer may evaluate or save for a while before it reads on.
    fn default() -> Self {
        Self { first: Duration::from_secs(10), next: Duration::from_secs(75), taking: Duration::from_secs(600) }
    }
}

/// Serves `router` until `end` resolves, then lets the answers that have begun end. Who is silent for too long is disconnected.
pub async fn serve(mut listener: TcpListener, router: Router, silence: Silence, end: impl Future<Output = ()>) {
    let service = TowerToHyperService::new(router.layer(from_fn(linger)));
    let (ending, ended) = watch::channel(false);
    let mut connections = JoinSet::new();
    let mut end = pin!(end);
    loop {
        tokio::select! {
            (stream, _) = Listener::accept(&mut listener) => {
                connections.spawn(keep(stream, service.clone(), silence, ended.clone()));
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
async fn keep(stream: TcpStream, service: TowerToHyperService<Router>, silence: Silence, mut ended: watch::Receiver<bool>) {
    // Without it an answer only waits longer for its last packet.
    drop(stream.set_nodelay(true));
    // The kernel alone knows what was taken; where it cannot tell, nothing is bounded.
    let _ = set_tcp_user_timeout(&stream, silence.taking.as_millis() as u32);
    let asked = AtomicBool::new(false);
    let service = service_fn(|request: Request<Incoming>| {
        asked.store(true, Ordering::Relaxed);
        service.call(request)
    });
    let mut http = Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(silence.next);
    let mut connection = pin!(http.serve_connection(TokioIo::new(stream), service));
    let never_asked = async {
        tokio::time::sleep(silence.first).await;
        if asked.load(Ordering::Relaxed) {
            std::future::pending().await
        }
    };
    let outcome = tokio::select! {
        biased;
        outcome = connection.as_mut() => outcome,
        () = never_asked => return,
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
    const SOON: Duration = Duration::from_millis(300);
    const NEVER: Duration = Duration::from_secs(3600);

    async fn start(router: Router, silence: Silence) -> (std::net::SocketAddr, oneshot::Sender<()>, tokio::task::JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (end, told) = oneshot::channel::<()>();
        (address, end, tokio::spawn(serve(listener, router, silence, async { drop(told.await) })))
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
        // An answer that lasts longer than all who are silent, on either server.
        let (address, _end, _server) = start(router.clone(), Silence { first: SOON, next: NEVER, taking: NEVER }).await;
        let long = connect(address, "GET /stream HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").await;
        pieces.send("first ".into()).unwrap();
        for sent in ["", "G", "GET / HTTP/1.1\r\nhost: "] {
            assert_eq!(until_closed(connect(address, sent).await).await, "", "{sent:?}");
        }
        let (address, _end, _server) = start(router, Silence { first: NEVER, next: SOON, taking: NEVER }).await;
        for sent in ["", "GET / HTTP/1.1\r\n"] {
            let text = until_closed(connect(address, &format!("GET / HTTP/1.1\r\nhost: x\r\n\r\n{sent}")).await).await;
            assert!(text.ends_with("short"), "{sent:?}: {text:?}");
        }
        pieces.send("last".into()).unwrap();
        drop(pieces);
        let text = until_closed(long).await;
        assert!(text.contains("first ") && text.contains("last") && text.ends_with("0\r\n\r\n"), "{text:?}");
    }

    #[tokio::test]
    async fn who_takes_nothing_of_an_answer_is_disconnected() {
        let (gone, told) = oneshot::channel::<()>();
        let gone = Arc::new(Mutex::new(Some(gone)));
        // More than any socket's buffers hold; the sender goes with the body.
        let endless = move || {
            let gone = gone.lock().unwrap().take();
            let pieces = futures::stream::repeat_with(move || {
                let _ = &gone;
                Ok::<_, std::convert::Infallible>(Bytes::from_static(&[0; 65536]))
            });
            std::future::ready(Body::from_stream(pieces))
        };
        let silence = Silence { taking: SOON, ..Silence::default() };
        let (address, _end, _server) = start(Router::new().route("/", get(endless)), silence).await;
        let _reader = connect(address, "GET / HTTP/1.1\r\nhost: x\r\n\r\n").await;
        assert!(tokio::time::timeout(Duration::from_secs(60), told).await.is_ok());
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
        let (address, end, server) = start(Router::new().route("/", get(slow)), Silence::default()).await;
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
