//! The operator inside the test, with the rights its chart gives it, so that it can be ended after any of its writes and cut off.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use carryon_operator::cluster::clients::Clients;
use carryon_operator::cluster::pod_user::PodUser;
use carryon_operator::cluster::{RunArgs, operate};
use carryon_operator::shared::Settings;
use carryon_operator::shared::defaults::PodDefaults;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use http::{HeaderValue, Method, Request};
use kube::client::{Body, ClientBuilder};
use tokio::sync::{Notify, watch};
use tower::layer::layer_fn;
use tower::{BoxError, Service};

use crate::cluster::TestCluster;

/// Namespace of the operator's installation.
const HOME: &str = "carry-on-system";
/// Who reaches pods that NetworkPolicies close, as the operator is told.
pub const PEERS: &str = r#"{"operator": {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "carry-on-system"}}}}"#;
/// Worker image of pools that ask for a GPU.
pub const CUDA_IMAGE: &str = "example.org/worker-cuda:1";
/// Who the operator is, to the API server.
pub const ACCOUNT: &str = "system:serviceaccount:carry-on-system:carry-on-operator";

/// What the audit log names an operator's program, with that name in this process: tests may share a cluster.
pub fn agent(name: &str) -> String {
    format!("{name}/{}", std::process::id())
}

/// How an operator is to be started.
pub struct Options<'a> {
    /// The namespaces it works on; all when none is named.
    pub namespaces: &'a [&'a str],
    /// After which write it hears no more.
    pub last: usize,
    /// Its name in the Lease, and as the program that the audit log names; without one it works without a Lease.
    pub candidate: Option<&'a str>,
    /// Who has installed it.
    pub installation: &'a str,
    /// The worker image of its release, when that is another.
    pub worker_image: Option<&'a str>,
    /// Whether it makes NetworkPolicies.
    pub closed: bool,
}

impl Default for Options<'_> {
    fn default() -> Self {
        Self { namespaces: &[], last: usize::MAX, candidate: None, installation: "test", worker_image: None, closed: true }
    }
}

/// A running operator; killed without a word when it is dropped.
pub struct Operator {
    runtime: Option<tokio::runtime::Runtime>,
    way: Arc<Way>,
    address: SocketAddr,
    ended: Option<tokio::task::JoinHandle<()>>,
    stop: Arc<Notify>,
}

/// The way to the API server, and what happens to it.
struct Way {
    /// Requests that write, and were answered.
    answered: AtomicUsize,
    last: usize,
    reached: Notify,
    /// While it is cut, nothing that is sent arrives.
    cut: watch::Sender<bool>,
    /// While they are held, no list of pods begins.
    lists_held: watch::Sender<bool>,
    /// While they are held, writes but those of its Lease wait, as for a connection.
    writes_held: watch::Sender<bool>,
    agent: HeaderValue,
}

impl Operator {
    /// Installs what the chart installs but for the operator's own pod: definitions, rights.
    pub fn install(cluster: &TestCluster) {
        Self::install_with(cluster, &[]);
    }

    /// The same with these of Helm's arguments.
    ///
    /// # Panics
    /// When the chart cannot be rendered, or the API server refuses what it renders.
    pub fn install_with(cluster: &TestCluster, arguments: &[&str]) {
        let chart = crate::repository().join("charts/carry-on");
        let rendered =
            cluster.command("helm").args(["template", "carry-on"]).arg(chart).args(["--namespace", HOME]).args(arguments).output();
        let rendered = rendered.expect("helm starts");
        assert!(rendered.status.success(), "helm template: {}", String::from_utf8_lossy(&rendered.stderr));
        let rendered = String::from_utf8_lossy(&rendered.stdout);
        let wanted = ["CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding"];
        let wanted = rendered
            .split("\n---\n")
            .filter(|document| !document.contains("helm.sh/hook:"))
            .filter(|document| wanted.iter().any(|kind| document.lines().any(|line| line == format!("kind: {kind}"))));
        let mut by_namespace = BTreeMap::<&str, Vec<&str>>::new();
        for document in wanted {
            let namespace = document.lines().find_map(|line| line.strip_prefix("  namespace: ")).unwrap_or(HOME);
            by_namespace.entry(namespace).or_default().push(document);
        }
        cluster.kubectl(&["create", "namespace", HOME]);
        by_namespace.iter().for_each(|(namespace, documents)| cluster.apply(namespace, &documents.join("\n---\n")));
        cluster.kubectl(&["wait", "--for=condition=Established", "crd", "--all", "--timeout=60s"]);
    }

    /// Works on all namespaces, or on one.
    pub fn start(cluster: &TestCluster, namespace: Option<&str>) -> Self {
        Self::start_with(cluster, Options { namespaces: namespace.as_slice(), ..Options::default() })
    }

    /// Hears nothing of what it wrote last: write number `last`, counted from 1, is carried out and not answered.
    pub fn start_mortal(cluster: &TestCluster, namespace: Option<&str>, last: usize) -> Self {
        Self::start_with(cluster, Options { namespaces: namespace.as_slice(), last, ..Options::default() })
    }

    /// Works as it is told.
    ///
    /// # Panics
    /// When no port is free, or no runtime starts.
    pub fn start_with(cluster: &TestCluster, options: Options<'_>) -> Self {
        let address = std::net::TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port is free");
        let agent = agent(options.candidate.unwrap_or("carryon-operator"));
        let agent = HeaderValue::from_str(&agent).expect("a name is a header");
        let [cut, lists_held, writes_held] = [(); 3].map(|()| watch::Sender::new(false));
        let (answered, reached) = (AtomicUsize::new(0), Notify::new());
        let way = Arc::new(Way { answered, last: options.last, reached, cut, lists_held, writes_held, agent });
        let args = RunArgs {
            worker_image: options.worker_image.map_or_else(|| Settings::default().worker_image, str::to_owned),
            worker_cuda_image: Some(CUDA_IMAGE.to_owned()),
            pod_user: PodUser::Auto,
            pod_defaults: PodDefaults::default(),
            network_policies: options.closed.then(|| PEERS.parse().expect("they are peers")),
            namespaces: options.namespaces.iter().map(|&namespace| namespace.to_owned()).collect(),
            listen: address,
            lease_namespace: None,
            without_lease: options.candidate.is_none(),
            installation: options.installation.to_owned(),
            identity: options.candidate.unwrap_or("test").to_owned(),
        };
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime starts");
        let _ = tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::WARN).with_test_writer().try_init();
        let (config, taken, stop) = (cluster.config_as(ACCOUNT), way.clone(), Arc::new(Notify::new()));
        let stopped = stop.clone();
        let ended = runtime.spawn(async move {
            let layer = layer_fn(move |inner| Mortal { inner, way: taken.clone() });
            let clients = Clients::new(&config, |config| Ok(ClientBuilder::try_from(config)?.with_layer(&layer).build()));
            let asked = async move {
                stopped.notified().await;
                Ok(())
            };
            let ended = operate(args, clients.expect("the configuration makes a client"), asked).await;
            eprintln!("the operator has ended: {ended:?}");
        });
        Self { runtime: Some(runtime), way, address, ended: Some(ended), stop }
    }

    /// Requests that wrote something, or tried to, and were answered.
    pub fn writes(&self) -> usize {
        self.way.answered.load(Ordering::SeqCst)
    }

    /// Returns when the last write is done.
    pub async fn reached(&self) {
        self.way.reached.notified().await;
    }

    /// From now on nothing that it sends arrives, or everything does again.
    pub fn cut(&self, cut: bool) {
        self.way.cut.send_replace(cut);
    }

    /// Stops it in its tracks, as SIGSTOP does, until the answer is dropped: its one thread does nothing else.
    ///
    /// # Panics
    /// When it is being dropped.
    pub fn freeze(&self) -> std::sync::mpsc::Sender<()> {
        let (release, released) = std::sync::mpsc::channel();
        self.runtime.as_ref().expect("it is there").spawn(async move {
            let _ = released.recv();
        });
        release
    }

    /// From now on it cannot list pods, or can again.
    pub fn hold_lists(&self, held: bool) {
        self.way.lists_held.send_replace(held);
    }

    /// From now on nothing that it writes is sent but its Lease, or what has waited is sent.
    pub fn hold_writes(&self, held: bool) {
        self.way.writes_held.send_replace(held);
    }

    /// Writes that wait.
    pub fn waiting_writes(&self) -> usize {
        self.way.writes_held.receiver_count()
    }

    /// Status and words of `/readyz`; none when it does not answer.
    pub async fn ready(&self) -> Option<(u16, String)> {
        let client = reqwest::Client::builder().no_proxy().build().ok()?;
        let answer = client.get(format!("http://{}/readyz", self.address)).send().await.ok()?;
        Some((answer.status().as_u16(), answer.text().await.ok()?))
    }

    /// Whether it has ended by itself.
    pub fn has_ended(&self) -> bool {
        self.ended.as_ref().is_some_and(tokio::task::JoinHandle::is_finished)
    }

    /// Ends it as SIGTERM does.
    ///
    /// # Panics
    /// When it panicked.
    pub fn stop(mut self, cluster: &TestCluster) {
        self.stop.notify_one();
        if let Some(ended) = self.ended.take() {
            cluster.block_on(ended).expect("it does not panic");
        }
    }
}

impl Drop for Operator {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A way to the API server that goes dead after the last write, or when it is cut.
struct Mortal<S> {
    inner: S,
    way: Arc<Way>,
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

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let way = self.way.clone();
        request.headers_mut().insert(http::header::USER_AGENT, way.agent.clone());
        if *way.cut.borrow() {
            return std::future::pending().boxed();
        }
        if request.method() == Method::GET {
            let lists_pods = request.uri().path().ends_with("/pods") && !request.uri().query().unwrap_or_default().contains("watch=");
            let (mut held, answer) = (way.lists_held.subscribe(), self.inner.call(request));
            return async move {
                if lists_pods {
                    let _ = held.wait_for(|held| !held).await;
                }
                answer.await
            }
            .boxed();
        }
        // Numbered when it is sent: what comes after the last is not sent.
        let number = way.answered.fetch_add(1, Ordering::SeqCst) + 1;
        if number > way.last {
            return std::future::pending().boxed();
        }
        let mut held = (!request.uri().path().contains("/leases")).then(|| way.writes_held.subscribe());
        let answer = self.inner.call(request);
        async move {
            if let Some(mut held) = held.take() {
                let _ = held.wait_for(|held| !held).await;
            }
            let answer = answer.await;
            if number == way.last {
                way.reached.notify_one();
                return std::future::pending().await;
            }
            answer
        }
        .boxed()
    }
}
