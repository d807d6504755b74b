//! Pods that answer as they should not: each costs its own object an answer, and nobody else anything.
#![allow(clippy::unwrap_used)]

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use carryon_crds::wire::Progress;
use carryon_operator::cluster::ask::{Http, MOST_BYTES, Pace, Round, Unheard};
use k8s_openapi::api::core::v1::Pod;
use serde_json::json;
use tokio::sync::mpsc;

/// Serves every connection with `answer`, after its request was read.
fn serve(answer: impl Fn(TcpStream) + Clone + Send + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (mut stream, answer) = (stream.unwrap(), answer.clone());
            std::thread::spawn(move || {
                let mut request = [0; 1024];
                let _ = stream.read(&mut request);
                answer(stream);
            });
        }
    });
    address
}

fn says(text: String) -> impl Fn(TcpStream) + Clone + Send + 'static {
    move |mut stream| {
        let _ = write!(stream, "HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{text}", text.len());
    }
}

/// JSON that has no end.
fn endless(mut stream: TcpStream) {
    let _ = write!(stream, "HTTP/1.1 200 OK\r\n\r\n{{\"phase\": \"");
    while stream.write_all(&[b'a'; 4096]).is_ok() {}
}

/// Headers that have no end, a few bytes at a time.
fn dripping(mut stream: TcpStream) {
    let _ = write!(stream, "HTTP/1.1 200 OK\r\n");
    while write!(stream, "x: y\r\n").is_ok() {
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[tokio::test]
async fn an_answer_is_bounded_in_bytes_and_time_and_leads_nowhere() {
    let elsewhere = TcpListener::bind("127.0.0.1:0").unwrap();
    elsewhere.set_nonblocking(true).unwrap();
    let target = elsewhere.local_addr().unwrap();
    let redirecting = move |mut stream: TcpStream| {
        let _ = write!(stream, "HTTP/1.1 307 Temporary Redirect\r\nlocation: http://{target}/secret\r\ncontent-length: 0\r\n\r\n");
    };
    let ask = async |address: SocketAddr, patience: Duration| {
        Http::new(patience).unwrap().get::<Progress>(&format!("http://{address}/progress")).await
    };
    let (short, long) = (Duration::from_millis(200), Duration::from_secs(60));
    assert!(matches!(ask(serve(endless), long).await, Err(Unheard::TooLong)));
    assert!(matches!(ask(serve(dripping), short).await, Err(Unheard::Http(error)) if error.is_timeout()));
    assert!(matches!(ask(serve(redirecting), long).await, Err(Unheard::Status(status)) if status == 307));
    assert!(elsewhere.accept().is_err(), "a redirection was followed");
    let nested = format!("{}{}", "[".repeat(MOST_BYTES / 2), "]".repeat(MOST_BYTES / 2));
    assert!(matches!(ask(serve(says(nested)), long).await, Err(Unheard::Json(_))));
    let huge = json!({"phase": "a\u{1b}\nb", "step": u64::MAX, "total_steps": 1, "train_loss": f64::MAX});
    let heard = ask(serve(says(huge.to_string())), long).await.unwrap();
    assert_eq!((heard.phase.as_str(), heard.train_loss), ("a  b", None));
}

fn pod(name: &str, address: SocketAddr) -> Pod {
    let labels = json!({"app.kubernetes.io/component": "trainer", "app.kubernetes.io/instance": format!("job-of-{name}")});
    let status = json!({"name": "trainer", "image": "", "imageID": "", "ready": true, "restartCount": 0});
    serde_json::from_value(json!({
        "metadata": {"name": name, "namespace": "tenant", "uid": name, "labels": labels},
        "spec": {"containers": [{"name": "trainer", "ports": [{"containerPort": address.port()}]}]},
        "status": {"podIP": address.ip().to_string(), "containerStatuses": [status]},
    }))
    .unwrap()
}

#[tokio::test]
async fn pods_that_misbehave_hold_up_nobody() {
    let progress = Progress { phase: "training".to_owned(), step: 7, ..Progress::default() };
    let pace = Pace { between: Duration::from_millis(1), again: None };
    let round = Round::<Progress>::new(Http::new(Duration::from_secs(60)).unwrap(), "/progress", pace);
    let (dripping, endless) = (serve(dripping), serve(endless));
    let bad: Vec<Pod> =
        (0..50).flat_map(|index| [pod(&format!("slow-{index}"), dripping), pod(&format!("long-{index}"), endless)]).collect();
    assert!(bad.iter().all(|pod| round.hear(pod).is_none()));
    let good = pod("good", serve(says(serde_json::to_string(&progress).unwrap())));
    assert_eq!(round.hear(&good), None);
    let (tell, mut told) = mpsc::unbounded_channel();
    let news = |namespace: &str, name: &str| tell.send(format!("{namespace}/{name}")).unwrap();
    tokio::select! {
        () = round.run(|_, _, _| true, news) => unreachable!("a round has no end"),
        news = told.recv() => assert_eq!(news.as_deref(), Some("tenant/job-of-good")),
    }
    assert_eq!(round.hear(&good), Some(progress));
    assert!(bad.iter().all(|pod| round.hear(pod).is_none()));
}
