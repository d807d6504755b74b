//! The operator inside the test, with the rights its chart gives it, so that it can be ended after any of its writes.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use carryon_operator::cluster::pod_user::PodUser;
use carryon_operator::cluster::{RunArgs, operate};
use carryon_operator::shared::Settings;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::{Method, Request};
use kube::client::{Body, ClientBuilder};
use tokio::sync::Notify;
use tower::layer::layer_fn;
use tower::{BoxError, Service};

use crate::cluster::TestCluster;

/// Namespace of the operator's installation.
const HOME: &str = "carry-on-system";
/// Who the operator is, to the API server.
pub const ACCOUNT: &str = "system:serviceaccount:carry-on-system:carry-on-operator";

/// A running operator; killed without a word when it is dropped.
pub struct Operator {
    runtime: Option<tokio::runtime::Runtime>,
    writes: Arc<Writes>,
}

/// How many requests that write were answered, and after which one the operator hears no more.
struct Writes {
    answered: AtomicUsize,
    last: usize,
    reached: Notify,
}

impl Operator {
    /// Installs what the chart installs but for the operator's own pod: definitions, rights.
    pub fn install(cluster: &TestCluster) {
        let chart = crate::repository().join("charts/carry-on");
        let rendered = cluster.command("helm").args(["template", "carry-on"]).arg(chart).args(["--namespace", HOME]).output();
        let rendered = rendered.expect("helm starts");
        assert!(rendered.status.success(), "helm template: {}", String::from_utf8_lossy(&rendered.stderr));
        let rendered = String::from_utf8_lossy(&rendered.stdout);
        let wanted = ["CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
        let wanted: Vec<&str> = rendered
            .split("\n---\n")
            .filter(|document| wanted.iter().any(|kind| document.lines().any(|line| line == format!("kind: {kind}"))))
            .collect();
        cluster.kubectl(&["create", "namespace", HOME]);
        cluster.apply(HOME, &wanted.join("\n---\n"));
        cluster.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]);
    }

    /// Works on all namespaces, or on one.
    pub fn start(cluster: &TestCluster, namespace: Option<&str>) -> Self {
        Self::start_mortal(cluster, namespace, usize::MAX)
    }

    /// Hears nothing of what it wrote last: write number `last`, counted from 1, is carried out and not answered.
    pub fn start_mortal(cluster: &TestCluster, namespace: Option<&str>, last: usize) -> Self {
        let writes = Arc::new(Writes { answered: AtomicUsize::new(0), last, reached: Notify::new() });
        let args = RunArgs {
            worker_image: Settings::default().worker_image,
            pod_user: PodUser::Auto,
            namespace: namespace.map(str::to_owned),
            listen: ([127, 0, 0, 1], 0).into(),
            lease_namespace: None,
            lease_name: String::new(),
            identity: "test".to_owned(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime starts");
        let _ = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN).with_test_writer().try_init();
        let (config, counted) = (cluster.config_as(ACCOUNT), writes.clone());
        runtime.spawn(async move {
            let layer = layer_fn(move |inner| Mortal { inner, writes: counted.clone() });
            let client = ClientBuilder::try_from(config).expect("the configuration makes a client").with_layer(&layer).build();
            let ended = operate(args, client, std::future::pending()).await;
            eprintln!("the operator has ended: {ended:?}");
        });
        Self { runtime: Some(runtime), writes }
    }

    /// Requests that wrote something, or tried to, and were answered.
    pub fn writes(&self) -> usize {
        self.writes.answered.load(Ordering::SeqCst)
    }

    /// Returns when the last write is done.
    pub async fn reached(&self) {
        self.writes.reached.notified().await;
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A way to the API server that goes dead after the last write.
struct Mortal<S> {
    inner: S,
    writes: Arc<Writes>,
}

impl<S> Service<Request<Body>> for Mortal<S>
where
    S: Service<Request<Body>, Error = BoxError>,
    S::Response: Send + 'static,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<S::Response, BoxError>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let writes = self.writes.clone();
        if request.method() == Method::GET {
            return self.inner.call(request).boxed();
        }
        // Numbered when it is sent: what comes after the last is not sent.
        let number = writes.answered.fetch_add(1, Ordering::SeqCst) + 1;
        if number > writes.last {
            return std::future::pending().boxed();
        }
        let answer = self.inner.call(request);
        async move {
            let answer = answer.await;
            if number == writes.last {
                writes.reached.notify_one();
                return std::future::pending().await;
            }
            answer
        }
        .boxed()
    }
}
