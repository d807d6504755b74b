//! `carryon-worker serve`: the gateway pod, an OpenAI-compatible endpoint of heads and their base.
//!
//! It reads the artifacts, verifies their digests and that the pool runs their base, pushes each head to the pool's pods and
//! keeps it there (`keeper`); the pool does all arithmetic. A request names its model (`models`), is parsed (`parameters`, `chat`, `completions`), asked
//! for (`choice`, `gateway`: a head that the pool lost is pushed again before the first byte), and shown (`generation`, `answer`, `stop`,
//! `respond`). What fails with one head is nothing to the others. A client that goes away drops its answer, and with it the pool's work.

mod answer;
mod args;
mod artifact;
mod chat;
mod choice;
mod classify;
mod completions;
mod embeddings;
mod error;
mod gateway;
mod generation;
mod keeper;
mod key;
mod metrics;
mod mixed;
mod models;
mod origins;
mod parameters;
mod request;
mod respond;
mod routes;
mod sampling;
mod stop;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carryon_crds::wire::{ExitCode, ServeConfig};
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

pub use args::ServeArgs;
pub use artifact::HeadFileError;

use self::gateway::Gateway;
use self::key::Key;
use self::metrics::Metrics;
use self::models::Models;
use self::origins::Origins;
use self::routes::App;
use crate::exchange::ClientError;
use crate::http::{self, Silence};
use crate::text::TextError;

/// Largest configuration file.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// Why a gateway cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The configuration cannot be used.
    #[error("configuration {path:?}: {reason}")]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Heads and their folders are not one for one.
    #[error("the configuration names {heads} heads, --head was given {folders} times: it takes one or more heads, and a folder for each")]
    HeadCount {
        /// Entries of the configuration.
        heads: usize,
        /// Folders.
        folders: usize,
    },
    /// Requests could not tell two models apart.
    #[error("head {head:?}: the model name {name:?} is another head's, or the base's")]
    DuplicateName {
        /// The second of the two.
        head: String,
        /// Its model name.
        name: String,
    },
    /// A head cannot be used.
    #[error("head {head:?}: {cause}")]
    Artifact {
        /// The head.
        head: String,
        /// What is wrong with it.
        cause: HeadFileError,
    },
    /// The pool runs another base than a head was trained on.
    #[error("head {head:?} was trained on {trained_on:?}, the pool runs {pool:?}: their {member} differ")]
    Identity {
        /// The head.
        head: String,
        /// Which member of the identity differs first.
        member: &'static str,
        /// Base of the head.
        trained_on: String,
        /// Model of the pool.
        pool: String,
    },
    /// A head reads more or fewer bases than there are pools.
    #[error("head {head:?} reads {trained_on} bases beside the first, and --other-pool was given {found} times: give it once for each")]
    OtherPools {
        /// The head.
        head: String,
        /// Its further bases.
        trained_on: usize,
        /// Pools.
        found: usize,
    },
    /// The tokenizer is not the one the pool names.
    #[error("the pool's tokenizer has another digest than the pool says")]
    Tokenizer,
    /// The pool's tokenizer or template cannot be used.
    #[error(transparent)]
    Text(#[from] TextError),
    /// The pool refuses a head for good.
    #[error("head {head:?}: {cause}")]
    Push {
        /// The head.
        head: String,
        /// In the pool's words.
        cause: ClientError,
    },
    /// The pool refuses for good.
    #[error(transparent)]
    Pool(#[from] ClientError),
    /// The address cannot be listened on, or signals not be heard.
    #[error("failed to {what}: {cause}")]
    System {
        /// What was tried.
        what: String,
        /// Why it failed.
        cause: std::io::Error,
    },
    /// The counters cannot be set up.
    #[error(transparent)]
    Metrics(#[from] prometheus::Error),
}

impl ServeError {
    /// The exit code that says whether trying again may help.
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Config { .. } | Self::HeadCount { .. } | Self::DuplicateName { .. } => ExitCode::Configuration,
            Self::OtherPools { .. } | Self::Identity { .. } | Self::Text(_) | Self::Pool(ClientError::Address { .. }) => {
                ExitCode::Configuration
            }
            Self::Artifact { cause: HeadFileError::Read { .. }, .. } => ExitCode::Retryable,
            Self::Artifact { .. } => ExitCode::Data,
            Self::Push { .. } | Self::Pool(_) | Self::Tokenizer | Self::System { .. } | Self::Metrics(_) => ExitCode::Retryable,
        }
    }
}

/// Serves until SIGTERM or SIGINT, then lets answers end. Blocks.
///
/// # Errors
/// A configuration or head that cannot be used, a pool that refuses one for good, an address that cannot be listened on.
pub fn run(args: &ServeArgs) -> Result<ExitCode, ServeError> {
    let system = |what: &str| {
        let what = what.to_owned();
        |cause| ServeError::System { what, cause }
    };
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    if let Some(threads) = args.threads {
        runtime.worker_threads(threads.max(1));
    }
    let runtime = runtime.enable_all().build().map_err(system("start threads"))?;
    runtime.block_on(async {
        let settings = Settings {
            config: read_config(&args.config)?,
            pool: args.pool.clone(),
            other_pools: args.other_pool.clone(),
            heads: args.head.clone(),
            api_key_files: args.api_key_file.clone(),
            patience: Duration::from_secs(args.patience_seconds),
            renewal: keeper::RENEWAL,
            drain: Duration::from_secs(args.drain_seconds),
        };
        let mut terminate = signal(SignalKind::terminate()).map_err(system("hear signals"))?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(system("hear signals"))?;
        let listener = TcpListener::bind(args.listen).await.map_err(system(&format!("listen on {}", args.listen)))?;
        let told_to_stop = async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        };
        serve(listener, settings, told_to_stop).await
    })?;
    Ok(ExitCode::Complete)
}

/// What a gateway is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Names and digests of the heads.
    pub config: ServeConfig,
    /// Base URLs of the pool.
    pub pool: Vec<String>,
    /// URLs of the further pools, in the order in which heads that read several bases name them.
    pub other_pools: Vec<String>,
    /// Folder of each head's artifact.
    pub heads: Vec<PathBuf>,
    /// Files with the keys of which clients must send one; none is asked for when there are none.
    pub api_key_files: Vec<PathBuf>,
    /// How long a request waits for a pool that is away.
    pub patience: Duration,
    /// How often the pool is reminded of the heads.
    pub renewal: Duration,
    /// How long answers may go on after the gateway was told to stop.
    pub drain: Duration,
}

/// Serves on `listener` until `told_to_stop`, then drains.
///
/// # Errors
/// As for [`run`].
pub async fn serve(listener: TcpListener, settings: Settings, told_to_stop: impl Future<Output = ()>) -> Result<(), ServeError> {
    let Settings { config, pool, other_pools, heads, api_key_files, patience, renewal, drain } = settings;
    let keys = api_key_files.into_iter().map(Key::new).collect();
    let app = App::new(Models::read(&config, &heads)?, keys, Metrics::new()?);
    let (stop, mut stopped) = watch::channel(());
    let drained = async move {
        // The sender says nothing: it is dropped.
        let _ = stopped.changed().await;
    };
    let router = routes::router(app.clone(), Origins::new(config.allowed_origins));
    let mut server = std::pin::pin!(http::serve(listener, router, Silence::default(), drained));
    tokio::select! {
        // It ends when it is told to.
        () = &mut server => return Ok(()),
        error = keep(&app, (&pool, &other_pools), &config.namespace, patience, renewal) => return Err(error),
        () = told_to_stop => tracing::info!("stopping: answers that have begun may end"),
    }
    drop(stop);
    if tokio::time::timeout(drain, server).await.is_err() {
        tracing::warn!("answers were cut off after {drain:?}");
    }
    Ok(())
}

/// Makes the app ready and keeps the heads in the pool; returns only when that is impossible.
async fn keep(app: &App, pools: (&[String], &[String]), namespace: &str, patience: Duration, renewal: Duration) -> ServeError {
    app.keys_usable().await;
    let gateway = match Gateway::connect(app.models.clone(), pools, namespace, patience, app.metrics.clone()).await {
        Ok(gateway) => app.gateway.get_or_init(|| Arc::new(gateway)),
        Err(error) => return error,
    };
    app.metrics.ready.set(1);
    tracing::info!("ready: serving {:?} on {:?}", app.models.names().collect::<Vec<_>>(), gateway.model.name);
    gateway.keeper.keep(renewal).await
}

fn read_config(path: &Path) -> Result<ServeConfig, ServeError> {
    use std::io::Read as _;
    let unusable = |reason: String| ServeError::Config { path: path.to_owned(), reason };
    let file = std::fs::File::open(path).map_err(|cause| unusable(cause.to_string()))?;
    let mut text = String::new();
    file.take(MAX_CONFIG_BYTES).read_to_string(&mut text).map_err(|cause| unusable(cause.to_string()))?;
    serde_json::from_str(&text).map_err(|cause| unusable(cause.to_string()))
}
