//! `carryon-operator run`: the three kinds against an API server.
//!
//! [`watch`] fills the [`store`]s, [`wake`] says whom a change concerns, the [`queue`] in what order they are reconciled. [`controller`] is the
//! loop and [`reconcile`] the one way for all three [`kinds`] ([`pools`], [`jobs`], [`deployments`]); [`apply`] is the only writer of children.

mod apply;
pub mod args;
pub mod ask;
mod attempts;
pub mod clients;
mod clocks;
mod context;
mod controller;
mod covers;
mod deployments;
mod election;
mod endpoint;
mod events;
mod failure;
mod fence;
mod jobs;
mod key;
mod kinds;
mod leader;
mod lock;
mod metrics;
mod ownership;
pub mod pod_user;
mod pools;
mod queue;
mod readiness;
mod reconcile;
mod refused;
mod status_patch;
mod store;
pub mod stored;
mod synced;
mod tenure;
mod wake;
mod watch;
mod write_status;
mod written;

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use carryon_crds::names;
use kube::Client;
use kube::runtime::events::{Recorder, Reporter};
use tokio::net::TcpListener;

pub use self::args::RunArgs;

use self::apply::Applier;
use self::ask::Ask;
use self::clients::Clients;
use self::context::Context;
use self::controller::Controller;
use self::key::Key;
use self::kinds::RETRY;
use self::leader::Leader;
use self::queue::{Lane, Queue};
use self::readiness::{Readiness, Work};
use self::synced::Synced;
use self::written::Written;
use crate::shared::Settings;
use crate::shared::trouble::phase;
use crate::shared::worker::fetches;

/// It waits for the API server most of the time: a thread for each core of a large node would only hold memory.
const THREADS: usize = 2;
/// How long [`probe`] asks.
const PROBED: Duration = Duration::from_secs(30);

/// Runs until SIGTERM or SIGINT.
///
/// # Errors
/// A configuration that names no API server, an address that is taken, a watch that ended.
pub fn run(args: RunArgs) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(THREADS).enable_all().build();
    runtime.context("failed to start threads")?.block_on(async move {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let config = kube::Config::infer().await.context("failed to find the API server")?;
        let clients = Clients::new(&config, Client::try_from).context("failed to make a client of the API server")?;
        let asked = async move {
            tokio::select! {
                _ = terminate.recv() => Ok(()),
                interrupted = tokio::signal::ctrl_c() => interrupted.map_err(anyhow::Error::from),
            }
        };
        operate(args, clients, asked).await
    })
}

/// Works through `clients` until `asked` to end; only while it holds the Lease, as often as it gets it.
pub async fn operate(args: RunArgs, clients: Clients, asked: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    let listener = TcpListener::bind(args.listen).await.with_context(|| format!("failed to listen on {}", args.listen))?;
    let leader = Leader::start(&clients.requests, &args);
    let readiness = Arc::new(Readiness::new(args.installation.clone(), leader.tenures())?);
    let terms = async {
        loop {
            leader.until(true).await?;
            tokio::select! {
                ended = work(&args, &clients, &leader, &readiness) => return ended,
                ended = leader.until(false) => ended?,
            }
            readiness.set_work(None);
            tracing::warn!("no Lease could be renewed in time, or another operator has it: waiting for it again");
        }
    };
    let ended = tokio::select! {
        ended = terms => ended,
        ended = endpoint::serve(listener, readiness.clone()) => ended,
        asked = asked => asked,
    };
    leader.release().await;
    ended
}

/// Asks `url` until the answer is 2xx, for tests of an installation in which this binary is the only program. Nodes hear of a Service's pods a
/// moment after these are ready.
///
/// # Errors
/// When it never is for half a minute: the last answer, or why there is none.
pub fn probe(url: &str) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("failed to start a thread")?;
    let client = reqwest::Client::builder().no_proxy().timeout(Duration::from_secs(10)).build()?;
    runtime.block_on(async {
        let deadline = Instant::now() + PROBED;
        loop {
            let answer = async { client.get(url).send().await?.error_for_status() };
            match answer.await {
                Ok(answer) => {
                    println!("{url}: {}", answer.status());
                    return Ok(());
                }
                Err(error) if Instant::now() >= deadline => return Err(error).with_context(|| format!("failed to ask {url}")),
                Err(_) => tokio::time::sleep(Duration::from_secs(1)).await,
            }
        }
    })
}

/// Does the operator's work without end.
async fn work(args: &RunArgs, clients: &Clients, leader: &Leader, readiness: &Readiness) -> anyhow::Result<()> {
    let pod_user = pod_user(args, &clients.requests).await;
    let (queue, synced, written) = (Arc::<Queue>::default(), Arc::<Synced>::default(), Arc::<Written>::default());
    let woken = queue.clone();
    let listener: watch::Listener =
        Arc::new(move |change, stores| wake::keys(change, stores).into_iter().for_each(|(key, lane)| woken.push(key, lane)));
    let (stores, mut watches) = watch::start(&clients.watches, &args.namespaces, written.clone(), synced.clone(), listener);
    readiness.set_work(Some(Work { stores: stores.clone(), synced: synced.clone(), queue: queue.clone() }));
    let client = fence::fenced(clients.requests.clone(), leader.tenures());
    let reporter = Reporter { controller: names::MANAGER.to_owned(), instance: Some(args.identity.clone()) };
    let recorder = Recorder::new(client.clone(), reporter);
    let (events, pending) = events::channel();
    let applier = Applier::new(client.clone(), written.clone());
    let settings = Settings {
        worker_image: args.worker_image.clone(),
        worker_cuda_image: args.worker_cuda_image.clone(),
        pod_user,
        pod_defaults: args.pod_defaults.clone(),
        peers: args.network_policies.clone(),
    };
    let context = Context { client, stores, written, applier, ask: Ask::new()?, events, settings };
    let controller = Controller::new(&context, &queue, &readiness.counters, (leader.tenures(), synced.clone()));
    let reconciles = async {
        synced.all().await;
        tracing::info!("working as {}", args.identity);
        controller.run().await;
    };
    let lives = |namespace: &str, name: &str, uid: &str| {
        let pod = context.stores.pods.get(namespace, name).filter(|pod| phase(pod) == "Running");
        pod.is_some_and(|pod| pod.metadata.uid.as_deref() == Some(uid))
    };
    let fetching = |namespace: &str, name: &str, uid: &str| {
        let pod = context.stores.pods.get(namespace, name).filter(fetches);
        pod.is_some_and(|pod| pod.metadata.uid.as_deref() == Some(uid))
    };
    let push = |kind, namespace: &str, name: &str| {
        queue.push(Key { kind, namespace: namespace.to_owned(), name: name.to_owned() }, Lane::Around);
    };
    let asks = context.ask.run(lives, fetching, push);
    tokio::select! {
        () = asks => anyhow::bail!("pods are asked no more"),
        () = reconciles => anyhow::bail!("the queue has ended"),
        () = pending.write(recorder) => anyhow::bail!("the events have ended"),
        ended = watches.join_next() => anyhow::bail!("a watch has ended: {ended:?}"),
    }
}

/// Who the workers' pods run as; an API server that does not say is asked again.
async fn pod_user(args: &RunArgs, client: &Client) -> Option<i64> {
    loop {
        match args.pod_user.resolve(client).await {
            Ok(user) => return user,
            Err(error) => tracing::warn!("failed to list the API server's groups: {error}"),
        }
        tokio::time::sleep(RETRY).await;
    }
}
