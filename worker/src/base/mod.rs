//! `carryon-worker base`: the pool pod. Runs one frozen base model for trainers and gateways.
//!
//! Routes check requests and hand jobs to the one [`device`] thread; [`queue`] decides who runs next. The pod listens before
//! the weights are loaded, so that probes tell loading from hanging, and drains when it is told to end.

mod args;
pub mod device;
mod ends;
mod error;
mod load;
mod memory;
pub mod metrics;
pub mod pages;
mod placement;
pub mod registry;
pub mod routes;
pub mod sampling;
pub mod schedule;
pub mod uploads;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use carryon_crds::pool::Device;
use carryon_crds::wire::limits::{MAX_REQUEST_BYTES, head_memory};
use carryon_crds::wire::{BaseConfig, ExitCode};
use tokio::net::TcpListener;
use tokio::sync::watch;

pub use args::BaseArgs;
use device::{Ended, EngineLimits};
pub use error::BaseError;
use load::Loaded;
pub use load::tokenizer;
use metrics::Metrics;
pub use placement::Placement;
use registry::{Fit, LoadedHead, Registry};
use routes::{Pool, ReadRows, Ready};
use uploads::Uploads;

use crate::head::Runner;
use crate::http::{self, Bodies, Silence};
use crate::kernel::candle::CandleDevice;
use crate::kernel::{Backend, Cpu, Threads};

/// Serves until SIGTERM or SIGINT, then drains. Blocks; must not be called inside a Tokio runtime.
///
/// # Errors
/// A configuration or checkpoint that cannot be used, an address that cannot be listened on, or the end of the device thread.
pub fn run(args: &BaseArgs) -> Result<ExitCode, BaseError> {
    let config = configuration(&args.config)?;
    let placement = Placement::new(args, &config.engine, cfg!(feature = "cuda"))?;
    tracing::info!("computes on {}", placement.device);
    let runtime = tokio::runtime::Runtime::new().map_err(BaseError::Serve)?;
    let outcome = runtime.block_on(async {
        let listener = TcpListener::bind(args.listen).await.map_err(|source| BaseError::Listen { address: args.listen, source })?;
        let drain = Duration::from_secs(args.drain_seconds);
        serve(listener, config, args.model.clone(), placement, drain, told_to_end().map_err(BaseError::Serve)?).await
    });
    // A model that is still being loaded must not hold up the end.
    runtime.shutdown_background();
    outcome.map(|()| ExitCode::Complete)
}

/// Serves on `listener` until `end` resolves, then lets answers go on for at most `drain`.
///
/// # Errors
/// As for [`run`].
pub async fn serve(
    listener: TcpListener,
    config: BaseConfig,
    model: PathBuf,
    placement: Placement,
    drain: Duration,
    end: impl Future<Output = ()> + Send + 'static,
) -> Result<(), BaseError> {
    let metrics = Arc::new(Metrics::new().map_err(|error| BaseError::Serve(std::io::Error::other(error)))?);
    let instance = format!("{:032x}", rand::random::<u128>());
    // One of the largest requests at a time, or many small ones.
    let (bodies, uploads) =
        (Bodies::new(MAX_REQUEST_BYTES as usize), Uploads::new(memory::available().min(placement.memory_limit.unwrap_or(u64::MAX))));
    let pool = Arc::new(Pool { instance, metrics, bodies, uploads, ready: OnceLock::new(), draining: AtomicBool::new(false) });
    tracing::info!("pool {:?} listens on {}", config.name, listener.local_addr().map_err(BaseError::Serve)?);

    let (ending, mut ended) = watch::channel(false);
    let loading = {
        let pool = pool.clone();
        tokio::task::spawn_blocking(move || load(&pool, &config, &model, &placement))
    };
    let told = async move { drop(ended.wait_for(|ending| *ending).await) };
    let server = tokio::spawn(http::serve(listener, routes::router(pool.clone()), Silence::default(), told));

    let device = async {
        let ended = loading.await.map_err(|_| BaseError::Device)??;
        // The sender is dropped unsent when the thread panics.
        ended.await.map_err(|_| BaseError::Device)?.map_err(BaseError::from)
    };
    tokio::select! {
        outcome = device => outcome?,
        () = end => {}
    }
    tracing::info!("told to end: draining for at most {drain:?}");
    pool.draining.store(true, Ordering::Relaxed);
    // Fails only when the server has ended already.
    let _ = ending.send(true);
    match tokio::time::timeout(drain, server).await {
        Ok(outcome) => outcome.map_err(|error| BaseError::Serve(std::io::Error::other(error))),
        Err(_) => {
            tracing::warn!("answers were cut off after {drain:?}");
            Ok(())
        }
    }
}

/// Loads the model, starts the device thread, declares the pod ready. What it returns fails when the thread panics.
fn load(pool: &Pool, config: &BaseConfig, path: &Path, placement: &Placement) -> Result<Ended, BaseError> {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    let threads = Threads::new(placement.threads.unwrap_or_else(cores));
    let cuda = match placement.device {
        Device::Cpu => None,
        Device::Cuda(ordinal) => Some(CandleDevice::cuda(ordinal.into())?),
        // A node without a GPU is no error here.
        Device::Auto => CandleDevice::cuda(0).inspect_err(|error| tracing::info!("no CUDA device: {error}")).ok(),
    };
    match cuda {
        Some(device) => start(pool, config, path, placement, device, threads),
        None => start(pool, config, path, placement, Cpu::new(threads.clone()), threads),
    }
}

/// The same on the device `backend`; `host` works for it on the CPU.
fn start<B: Backend>(
    pool: &Pool,
    config: &BaseConfig,
    path: &Path,
    placement: &Placement,
    backend: B,
    host: Arc<Threads>,
) -> Result<Ended, BaseError> {
    let start = Instant::now();
    let Loaded { description, model, tokenizer } = load::load(path, config, &pool.instance, backend, pool.uploads.memory())?;
    let registry = Arc::new(Registry::new(head_memory(pool.uploads.memory())));
    let limits = EngineLimits {
        max_model_len: description.limits.max_model_len as usize,
        max_num_seqs: config.engine.max_num_seqs as usize,
        max_num_batched_tokens: config.engine.max_num_batched_tokens as usize,
        kv_cache_bytes: placement.kv_cache(pool.uploads.memory(), model.backend.free_memory()),
        states_bytes: memory::states(pool.uploads.memory()),
    };
    let (device, ended) = device::Device::start(model.clone(), host, &limits, registry.clone(), pool.metrics.clone())?;
    tracing::info!(
        "loaded {:?} ({}) in {:.1} s: {} layers, width {}; {} MiB for keys and values",
        description.name,
        description.numerics.key(),
        start.elapsed().as_secs_f64(),
        description.num_hidden_layers,
        description.hidden_size,
        limits.kv_cache_bytes >> 20
    );
    let beside = model.backend.beside();
    let fit = Fit {
        identity: description.identity.clone(),
        hidden_size: description.hidden_size,
        layers: description.num_hidden_layers,
        pack: Box::new(move |artifact| Ok(LoadedHead::new(&artifact.digest, Runner::new(artifact, beside.clone())?))),
    };
    let lm_head: Option<ReadRows> = match model.lm_head().softcap() {
        Some(_) => None,
        None => Some(Box::new(move |rows| model.backend.read_matrix(model.lm_head().forward(), rows))),
    };
    let ready = Ready { identity: description.identity.digest(), tokenizer: tokenizer.into(), lm_head, device, registry, fit, description };
    // Set once, here.
    let _ = pool.ready.set(ready);
    Ok(ended)
}

fn configuration(path: &Path) -> Result<BaseConfig, BaseError> {
    let error = |reason: String| BaseError::Configuration { path: path.to_owned(), reason };
    let bytes = load::read(path).map_err(|cause| error(cause.to_string()))?.ok_or_else(|| error("there is no such file".to_owned()))?;
    serde_json::from_slice(&bytes).map_err(|cause| error(cause.to_string()))
}

/// Resolves at SIGTERM or SIGINT.
fn told_to_end() -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
