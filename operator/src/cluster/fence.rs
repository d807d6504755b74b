//! No write leaves this process once its Lease may be another's. The work ends then, but of a process that was frozen what is about to write may go
//! on sooner than what notices. So each write asks the time itself, for as long as it is under way.

use std::future::poll_fn;
use std::pin::pin;
use std::task::Poll;

use axum::http::{Method, Request, Response};
use kube::Client;
use kube::client::Body;
use tokio::sync::watch;
use tower::service_fn;

use super::tenure::Tenures;

/// A write was not sent, or its answer not waited for.
#[derive(Debug, thiserror::Error)]
#[error("the Lease may be another operator's by now")]
struct Lapsed;

/// `client`, for what is done while this operator leads.
pub fn fenced(client: Client, tenures: watch::Receiver<Tenures>) -> Client {
    let namespace = client.default_namespace().to_owned();
    Client::new(service_fn(move |request| send(client.clone(), tenures.clone(), request)), namespace)
}

async fn send(client: Client, tenures: watch::Receiver<Tenures>, request: Request<Body>) -> kube::Result<Response<Body>> {
    let (reads, namespace) = (request.method() == Method::GET, namespace(request.uri().path()).to_owned());
    let mut answer = pin!(client.send(request));
    // What waits for a connection has not been sent, and is not sent when it gets one too late.
    let may_go_on = || reads || tenures.borrow().may_write(&namespace);
    poll_fn(|context| if may_go_on() { answer.as_mut().poll(context) } else { Poll::Ready(Err(kube::Error::Service(Lapsed.into()))) }).await
}

/// The namespace of an object by its path.
fn namespace(path: &str) -> &str {
    path.split('/').skip_while(|part| *part != "namespaces").nth(1).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::future::ready;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::super::clocks::End;
    use super::super::tenure::Tenure;
    use super::*;

    const PATH: &str = "/apis/batch/v1/namespaces/team/jobs/a";

    fn tenures(about: &str, tenure: Tenure) -> Tenures {
        Tenures([(about.to_owned(), tenure)].into())
    }

    /// Methods of the requests that `tenures` let through, of one that reads and one that writes.
    async fn sent(tenures: Tenures) -> Vec<Method> {
        let sent = Arc::<Mutex<Vec<Method>>>::default();
        let seen = sent.clone();
        let server = service_fn(move |request: Request<Body>| {
            seen.lock().unwrap().push(request.method().clone());
            ready(Ok::<_, Infallible>(Response::new(Body::empty())))
        });
        let (_sender, tenures) = watch::channel(tenures);
        let client = fenced(Client::new(server, "default"), tenures);
        for method in [Method::GET, Method::PATCH] {
            let request = Request::builder().method(&method).uri(PATH).body(Body::empty()).unwrap();
            let _ = client.send(request).await;
        }
        sent.lock().unwrap().clone()
    }

    #[tokio::test]
    async fn writes_end_with_the_term_before_anybody_has_noticed() {
        let leads = |until| Tenure { leads: true, until, ..Tenure::default() };
        let (all, reads) = (vec![Method::GET, Method::PATCH], vec![Method::GET]);
        let later = Some(End::after(Duration::from_secs(3600)));
        for about in ["", "team"] {
            assert_eq!(sent(tenures(about, leads(later))).await, all);
            assert_eq!(sent(tenures(about, leads(Some(End::after(Duration::ZERO))))).await, reads);
            assert_eq!(sent(tenures(about, Tenure { leads: false, ..leads(later) })).await, reads);
        }
        assert_eq!(sent(tenures("", leads(None))).await, all, "without a Lease");
        assert_eq!(sent(tenures("another", leads(later))).await, reads);
    }

    #[tokio::test]
    async fn a_write_that_waits_for_a_connection_when_the_term_ends_is_not_sent() {
        let (connected, connects) = oneshot::channel::<()>();
        let (mut connects, left) = (Some(connects), Arc::new(AtomicBool::new(false)));
        let leaves = left.clone();
        let server = service_fn(move |_: Request<Body>| {
            let (connection, leaves) = (connects.take(), leaves.clone());
            async move {
                connection.unwrap().await.unwrap();
                leaves.store(true, Ordering::SeqCst);
                Ok::<_, Infallible>(Response::new(Body::empty()))
            }
        });
        let (sender, tenures) = watch::channel(Tenures::unopposed());
        let client = fenced(Client::new(server, "default"), tenures);
        let write = tokio::spawn(async move { client.send(Request::patch(PATH).body(Body::empty()).unwrap()).await });
        tokio::task::yield_now().await;
        sender.send_replace(Tenures::default());
        connected.send(()).unwrap();
        assert!(write.await.unwrap().is_err() && !left.load(Ordering::SeqCst));
    }
}
