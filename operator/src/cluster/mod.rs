//! `carryon-operator run`: the three kinds against an API server.
//!
//! [`caches`] hold what watches show, [`wake`] says who has to look again, [`kinds`] is the one loop of all three kinds
//! ([`pools`], [`jobs`], [`deployments`]), [`apply`] the only writer of children.

pub mod apply;
pub mod ask;
pub mod attempts;
pub mod caches;
pub mod covers;
pub mod deployments;
mod endpoint;
pub mod events;
pub mod failure;
pub mod jobs;
pub mod kinds;
mod leader;
pub mod metrics;
pub mod pod_user;
pub mod pools;
pub mod queue;
mod refused;
mod status_patch;
pub mod wake;
pub mod written;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use carryon_crds::names;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};

use self::apply::Applier;
use self::ask::Ask;
use self::endpoint::Endpoint;
use self::kinds::Context;
use self::metrics::Metrics;
use self::pod_user::PodUser;
use self::queue::Queue;
use self::wake::Wake;
use self::written::Written;
use crate::shared::Settings;
use crate::shared::trouble::phase;

/// Arguments of `carryon-operator run`.
#[derive(Clone, Debug, clap::Args)]
pub struct RunArgs {
    /// Worker image of objects that name none.
    #[arg(long, value_name = "IMAGE", default_value_t = Settings::default().worker_image)]
    pub worker_image: String,
    /// User of the workers' pods, and group of the volumes they write: a number, `cluster` where each namespace has its own, or `auto`: 65532,
    /// but `cluster` on OpenShift.
    #[arg(long, value_name = "USER", default_value_t = PodUser::Auto)]
    pub pod_user: PodUser,
    /// Look after this namespace only.
    #[arg(long)]
    pub namespace: Option<String>,
    /// Address of /healthz, /readyz and /metrics.
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:8080")]
    pub listen: SocketAddr,
    /// Namespace of the Lease by which one of several operators is elected; without it, this one works alone.
    #[arg(long, value_name = "NAMESPACE")]
    pub lease_namespace: Option<String>,
    /// Name of the Lease.
    #[arg(long, value_name = "NAME", default_value = "carry-on-operator")]
    pub lease_name: String,
    /// Name of this operator in the Lease; its pod's name.
    #[arg(long, env = "POD_NAME", value_name = "NAME", default_value = "carryon-operator")]
    pub identity: String,
}

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// An API server that cannot be reached, a Lease that was lost, a watch that ended.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("failed to start threads")?;
    runtime.block_on(async move {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let client = Client::try_default().await.context("failed to find the API server")?;
        let asked = async move {
            tokio::select! {
                _ = terminate.recv() => Ok(()),
                interrupted = tokio::signal::ctrl_c() => interrupted.map_err(anyhow::Error::from),
            }
        };
        operate(args, client, asked).await
    })
}

/// Works through `client` until `asked` to end.
///
/// # Errors
/// As [`run`].
pub async fn operate(args: RunArgs, client: Client, asked: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let endpoint = Endpoint::bind(args.listen).await?;
    let leader = leader::Leader::new(client.clone(), &args).await?;
    let held = leader.clone();
    let ended = tokio::select! {
        ended = work(args, client, endpoint, held) => ended,
        asked = asked => asked,
    };
    leader.release().await;
    ended
}

/// Asks `url` once, for tests of an installation in which this binary is the only program.
///
/// # Errors
/// When there is no answer within ten seconds, or it is not 2xx.
pub fn probe(url: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start a thread")?;
    let answer = async {
        let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build()?;
        client.get(url).send().await?.error_for_status()
    };
    runtime.block_on(answer).map(|answer| println!("{url}: {}", answer.status())).with_context(|| format!("failed to ask {url}"))
}

async fn work(args: RunArgs, client: Client, endpoint: Endpoint, leader: leader::Leader) -> anyhow::Result<()> {
    let serving = endpoint.clone();
    let work = async move {
        leader.elected().await?;
        let wake = Wake { pools: Queue::default(), jobs: Queue::default(), deployments: Queue::default() };
        let written = Arc::<Written>::default();
        let (caches, mut watches) = caches::start(&client, args.namespace.as_deref(), wake.clone(), written.clone()).await?;
        let reporter = Reporter { controller: names::MANAGER.to_owned(), instance: Some(args.identity.clone()) };
        let recorder = Recorder::new(client.clone(), reporter);
        let pod_user = args.pod_user.resolve(&client).await.context("failed to list the API server's groups")?;
        let settings = Settings { worker_image: args.worker_image, pod_user };
        let applier = Applier::new(client.clone(), written);
        let (events, pending) = events::channel();
        let context = Context::new(applier, client, caches.clone(), Ask::new()?, events, Metrics::new(wake.clone())?, settings);
        let context = Arc::new(context);
        endpoint.ready(context.clone());
        tracing::info!("working as {}", args.identity);
        let lives = |namespace: &str, name: &str, uid: &str| {
            let pod = caches.pods.get(namespace, name).filter(|pod| phase(pod) == "Running");
            pod.is_some_and(|pod| pod.metadata.uid.as_deref() == Some(uid))
        };
        let (pools, jobs) = (wake.pools.clone(), wake.jobs.clone());
        let asks = context.ask.run(lives, |namespace, pool| pools.push(namespace, pool), |namespace, job| jobs.push(namespace, job));
        tokio::select! {
            () = asks => anyhow::bail!("pods are asked no more"),
            () = pending.write(recorder) => anyhow::bail!("the events have ended"),
            () = kinds::run(context.clone(), wake.pools, caches.pools.store()) => anyhow::bail!("the queue of pools has ended"),
            () = kinds::run(context.clone(), wake.jobs, caches.jobs.store()) => anyhow::bail!("the queue of jobs has ended"),
            () = kinds::run(context.clone(), wake.deployments, caches.deployments.store()) => anyhow::bail!("the queue of deployments has ended"),
            ended = watches.join_next() => anyhow::bail!("a watch has ended: {ended:?}"),
            lost = leader.lost() => Err(lost),
        }
    };
    tokio::select! {
        ended = work => ended,
        ended = serving.serve() => ended,
    }
}
