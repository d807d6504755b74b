//! Brings a model into a folder: all of it, verified, or a clear error. A start that was killed is gone on with; a folder that is whole is left
//! alone without a word to the network; of several that fetch into one folder, one does.
//!
//! A source lists its files, the plan chooses among them, the manifest keeps the choice and a hub's commit, parts grow until they are verified.

pub mod args;
mod cache;
mod client;
mod dial;
mod error;
pub mod folder;
mod head;
mod hub;
pub mod manifest;
pub mod part;
mod plan;
pub mod progress;
mod range;
mod retry;
mod source;
mod store;
mod tell;
mod transfer;
mod web;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use carryon_crds::wire::{ExitCode, FetchReport};
use indicatif::DecimalBytes;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::block_in_place;

pub use args::FetchArgs;
use cache::Place;
pub use error::FetchError;
use folder::Lock;
use manifest::{Entry, Manifest, Origin};
use progress::Meter;
use source::{Listing, Source};
use tell::Told;
use transfer::Transfer;

use crate::files;
use crate::model::{self, Files};

/// What a model says of itself: it is fetched first, for there is no use for weights that nobody can read.
const CONFIG: &str = "config.json";
/// What is told while another process may fetch the same.
const WAITING: &str = "another process fetches it into the same folder";

/// How often a source may change while it is fetched.
const CHANGES: usize = 3;
/// Threads at most: each may wait for the volume.
const MAX_THREADS: usize = 8;
/// How long threads may take to end.
const PATIENCE: Duration = Duration::from_secs(5);

/// Fetches what the arguments name.
///
/// # Errors
/// The folder is not whole; what is there is gone on with by the next start.
pub fn run(args: &FetchArgs) -> Result<ExitCode, FetchError> {
    let threads = usize::from(args.parallel).clamp(2, MAX_THREADS);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(threads).enable_all().build();
    let runtime = runtime.map_err(FetchError::file("start threads for", args.output.clone().unwrap_or_default()))?;
    let (mut lock, told) = (None, Arc::new(Told::default()));
    let result = runtime.block_on(fetch(args, &mut lock, &told));
    // What is being written ends before somebody else may write; a name that is being looked up is not waited for.
    runtime.shutdown_timeout(PATIENCE);
    drop(lock);
    if let Err(error) = &result
        && told.report().message != error.to_string()
    {
        // It failed before there was a folder.
        let (state, message) = (progress::ended(error).to_owned(), error.to_string());
        told.say(FetchReport { state, message, failure: error.failure(), ..told.report() });
    }
    args.termination_log.iter().for_each(|path| told.last_words(path));
    result.map(|()| ExitCode::Complete)
}

async fn fetch(args: &FetchArgs, lock: &mut Option<Lock>, told: &Arc<Told>) -> Result<(), FetchError> {
    if let Some(address) = args.listen {
        let cannot = |error| FetchError::Configuration(format!("--listen {address}: {error}"));
        told.listen(address).await.map_err(cannot)?;
    }
    told.say(FetchReport { state: "listing".to_owned(), ..FetchReport::default() });
    let place = unless_stopped(Place::find(args)).await?;
    let source = Arc::new(Source::new(&place.args)?);
    let (origin, folder) = (source.origin(), place.folder.as_path());
    let commit = place.commit();
    if let Some(manifest) = whole_already(folder, &origin)? {
        told.say(complete_report(&manifest));
        return place.finish(&manifest);
    }
    told.say(FetchReport { state: "waiting".to_owned(), message: WAITING.to_owned(), commit: commit.clone(), ..FetchReport::default() });
    *lock = Some(unless_stopped(folder::lock(folder)).await?);
    // Somebody else may have fetched it meanwhile.
    if let Some(manifest) = whole_already(folder, &origin)? {
        told.say(complete_report(&manifest));
        return place.finish(&manifest);
    }
    let meter = Arc::new(Meter::new(folder, commit, told.clone()));
    match unless_stopped(whole(&source, &origin, &place, &meter)).await {
        Ok(manifest) => {
            let message = complete(&manifest);
            meter.say("complete", message.clone());
            tracing::info!("{folder:?} is complete: {message}");
            place.finish(&manifest)
        }
        Err(error) => {
            meter.failed(&error);
            Err(error)
        }
    }
}

/// The manifest, if the folder holds all of what is asked for.
fn whole_already(folder: &Path, origin: &Origin) -> Result<Option<Manifest>, FetchError> {
    let Some(manifest) = Manifest::read(folder)? else { return Ok(None) };
    manifest.expect(origin, folder)?;
    let whole = manifest.is_whole(folder);
    if whole {
        tracing::info!("{folder:?} is complete already: {}", complete(&manifest));
    }
    Ok(whole.then_some(manifest))
}

fn complete(manifest: &Manifest) -> String {
    let commit = manifest.commit.as_ref().map_or_else(String::new, |commit| format!(" of commit {commit}"));
    format!("{} files, {}, of {}{commit}", manifest.entries.len(), DecimalBytes(manifest.bytes()), manifest.origin.source)
}

fn complete_report(manifest: &Manifest) -> FetchReport {
    let (bytes, commit, message) = (manifest.bytes(), manifest.commit.clone(), complete(manifest));
    FetchReport { state: "complete".to_owned(), bytes, total: bytes, commit, message, ..FetchReport::default() }
}

async fn whole(source: &Arc<Source>, origin: &Origin, place: &Place, meter: &Arc<Meter>) -> Result<Manifest, FetchError> {
    let folder = place.folder.as_path();
    for change in 0.. {
        let before = Manifest::read(folder)?;
        clean(folder, before.as_ref())?;
        meter.say("listing", format!("asking for the files of {}", origin.source));
        let listing = source.list(before.as_ref().and_then(|before| before.commit.as_deref())).await?;
        let manifest = block_in_place(|| plan(listing, origin, before, folder))?;
        manifest.write(folder)?;
        let (total, held) = (manifest.bytes(), manifest.entries.iter().map(|entry| transfer::held(folder, entry)).sum::<u64>());
        folder::check_room(folder, total.saturating_sub(held))?;
        let commit = manifest.commit.as_ref().map_or_else(String::new, |commit| format!(" of commit {commit}"));
        let (count, amount, there) = (manifest.entries.len(), DecimalBytes(total), DecimalBytes(held));
        tracing::info!("fetching {count} files{commit} of {}: {amount}, of which {there} are there", origin.source);
        meter.begin(total);
        let (runs, transfer) = (manifest.has_weights(), Transfer::new(source.clone(), folder, manifest, meter.clone()));
        let all = async {
            if runs && transfer.one(CONFIG).await? {
                block_in_place(|| model::check_config(Files { path: folder, text_only: place.args.text_only }))
                    .map_err(|error| FetchError::Unsupported(error.to_string()))?;
                meter.begin(total);
            }
            transfer.all(place.args.parallel).await
        };
        let ended = tokio::select! {
            ended = all => ended,
            never = meter.tell() => match never {},
        };
        match ended {
            Ok(()) => return transfer.complete(),
            Err(error @ FetchError::Changed { .. }) if change + 1 < CHANGES => tracing::warn!("{error}; its files are listed anew"),
            Err(error) => return Err(error),
        }
    }
    unreachable!("the loop above ends by returning")
}

/// Removes what writers that were killed have left.
fn clean(folder: &Path, manifest: Option<&Manifest>) -> Result<(), FetchError> {
    let names = manifest.into_iter().flat_map(|manifest| &manifest.entries).map(|entry| folder.join(&entry.remote.name));
    let folders: BTreeSet<PathBuf> = names.filter_map(|path| Some(path.parent()?.to_owned())).chain([folder.to_owned()]).collect();
    folders.iter().try_for_each(|folder| files::remove_temporaries(folder).map_err(FetchError::file("clean", folder)))
}

/// The manifest of a listing, with what an earlier start has verified of it.
fn plan(listing: Listing, origin: &Origin, before: Option<Manifest>, folder: &Path) -> Result<Manifest, FetchError> {
    let mut entries = Vec::new();
    for remote in listing.files {
        let verified = match &before {
            Some(before) => before.entries.iter().find(|entry| entry.remote == remote).and_then(|entry| entry.verified.clone()),
            None => found(&remote, folder)?,
        };
        entries.push(Entry { remote, verified });
    }
    Ok(Manifest { origin: origin.clone(), commit: listing.commit, complete: false, entries })
}

/// A file that lies in the folder though nobody has fetched into it: the same one is taken, another is not overwritten.
fn found(remote: &plan::RemoteFile, folder: &Path) -> Result<Option<String>, FetchError> {
    let path = folder.join(&remote.name);
    let Some(size) = folder::size(&path) else { return Ok(None) };
    let digest = if size == remote.size && remote.sha256.is_some() { Some(part::sha256(&path)?) } else { None };
    if digest.is_some() && digest == remote.sha256 {
        return Ok(digest);
    }
    Err(FetchError::Configuration(format!("{path:?} is there already, and is not known to be of this model: choose an empty folder")))
}

/// The future's output, or [`FetchError::Stopped`] after SIGTERM or SIGINT.
async fn unless_stopped<T>(work: impl Future<Output = Result<T, FetchError>>) -> Result<T, FetchError> {
    let signals = signal(SignalKind::terminate()).and_then(|terminate| Ok((terminate, signal(SignalKind::interrupt())?)));
    let (mut terminate, mut interrupt) = signals.map_err(FetchError::file("hear signals for", "the process"))?;
    tokio::select! {
        biased;
        _ = terminate.recv() => Err(FetchError::Stopped),
        _ = interrupt.recv() => Err(FetchError::Stopped),
        output = work => output,
    }
}
