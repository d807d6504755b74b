//! The files of a manifest, some at once, each from where its part ends; what is verified is said in the manifest before a file has its name.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use futures::StreamExt as _;
use tokio::sync::Semaphore;
use tokio::task::{JoinSet, block_in_place};

use super::client::SILENCE;
use super::error::FetchError;
use super::folder;
use super::head::Head;
use super::manifest::{Entry, Manifest};
use super::part::{self, Part};
use super::plan::RemoteFile;
use super::progress::Meter;
use super::retry::{self, Attempts};
use super::source::Source;

/// How often a file may come damaged.
const DAMAGED: usize = 2;

/// What all files share.
pub struct Transfer {
    source: Arc<Source>,
    folder: PathBuf,
    manifest: Mutex<Manifest>,
    meter: Arc<Meter>,
}

/// Bytes of `entry` that `folder` holds: of the file, or of its part.
pub fn held(folder: &Path, entry: &Entry) -> u64 {
    let target = folder.join(&entry.remote.name);
    let size = if entry.verified.is_some() { folder::size(&target) } else { None };
    size.or_else(|| folder::size(&part::path(&target))).unwrap_or(0).min(entry.remote.size)
}

impl Transfer {
    /// Of the files that `manifest` names.
    pub fn new(source: Arc<Source>, folder: &Path, manifest: Manifest, meter: Arc<Meter>) -> Arc<Self> {
        Arc::new(Self { source, folder: folder.to_owned(), manifest: Mutex::new(manifest), meter })
    }

    /// Fetches what is missing, `parallel` files at once. Those that are under way when one fails keep their parts.
    ///
    /// # Errors
    /// The first failure that trying again did not mend.
    pub async fn all(self: &Arc<Self>, parallel: u16) -> Result<(), FetchError> {
        let (places, mut tasks) = (Arc::new(Semaphore::new(parallel.into())), JoinSet::new());
        let count = self.manifest.lock().unwrap_or_else(PoisonError::into_inner).entries.len();
        for at in 0..count {
            let (transfer, places) = (self.clone(), places.clone());
            tasks.spawn(async move {
                let _place = places.acquire().await;
                transfer.file(at).await.map_err(|error| transfer.with_figures(error))
            });
        }
        while let Some(ended) = tasks.join_next().await {
            match ended {
                Ok(Ok(())) => {}
                Ok(Err(error)) => {
                    // Whoever tries again opens the same parts.
                    tasks.shutdown().await;
                    return Err(error);
                }
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return Err(FetchError::Stopped),
            }
        }
        Ok(())
    }

    /// Fetches one file, if it is one of them.
    ///
    /// # Errors
    /// A failure that trying again did not mend.
    pub async fn one(&self, name: &str) -> Result<bool, FetchError> {
        let at = self.manifest.lock().unwrap_or_else(PoisonError::into_inner).entries.iter().position(|entry| entry.remote.name == name);
        let Some(at) = at else { return Ok(false) };
        self.file(at).await.map_err(|error| self.with_figures(error))?;
        Ok(true)
    }

    /// Says that all is there.
    ///
    /// # Errors
    /// The folder takes no file.
    pub fn complete(&self) -> Result<Manifest, FetchError> {
        let mut manifest = self.manifest.lock().unwrap_or_else(PoisonError::into_inner);
        manifest.complete = true;
        manifest.write(&self.folder).map_err(|error| self.with_figures(error))?;
        Ok(manifest.clone())
    }

    async fn file(&self, at: usize) -> Result<(), FetchError> {
        let (Entry { remote, verified }, commit) = {
            let manifest = self.manifest.lock().unwrap_or_else(PoisonError::into_inner);
            (manifest.entries[at].clone(), manifest.commit.clone())
        };
        let target = self.folder.join(&remote.name);
        if verified.is_some() {
            // Killed between its entry in the manifest and its name.
            if folder::size(&target) != Some(remote.size) && folder::size(&part::path(&target)) == Some(remote.size) {
                part::rename(&target)?;
            }
            if folder::size(&target) == Some(remote.size) {
                self.meter.found(remote.size);
                return Ok(());
            }
        }
        let mut part = block_in_place(|| Part::open(target, &remote))?;
        self.meter.found(part.length());
        for last in (0..DAMAGED).map(|time| time + 1 == DAMAGED) {
            self.fill(&mut part, &remote, commit.as_deref()).await?;
            let found = part.sha256();
            match &remote.sha256 {
                Some(expected) if *expected != found => {
                    let error = FetchError::Digest { name: remote.name.clone(), expected: expected.clone(), found };
                    self.meter.take_back(part.length());
                    block_in_place(|| part.clear())?;
                    if last {
                        return Err(error);
                    }
                    tracing::warn!("{error}; it is fetched anew");
                }
                _ => {
                    return block_in_place(|| {
                        part.sync()?;
                        self.verified(at, found)?;
                        part.finish()
                    });
                }
            }
        }
        Ok(())
    }

    /// Appends until the part is whole, asking again whenever the source breaks off.
    async fn fill(&self, part: &mut Part, file: &RemoteFile, commit: Option<&str>) -> Result<(), FetchError> {
        // Of a source without ranges the same bytes come again and again: these are no progress.
        let (mut attempts, mut furthest, mut head) = (Attempts::default(), part.length(), Head::of(file));
        while part.length() < file.size {
            let ended = self.append(part, file, commit, &mut head).await;
            if part.length() > furthest {
                furthest = part.length();
                attempts.progress();
            }
            if let Err(error) = ended {
                self.meter.trouble(format!("{error}; it is asked again"));
                retry::wait(&mut attempts, error).await?;
            }
        }
        Ok(())
    }

    async fn append(&self, part: &mut Part, file: &RemoteFile, commit: Option<&str>, head: &mut Head) -> Result<(), FetchError> {
        let mut rest = self.source.read(commit, file, part.length()).await?;
        if rest.start != part.length() {
            tracing::warn!("the source of {} knows no ranges: it is fetched from its beginning", file.name);
            self.meter.take_back(part.length());
            block_in_place(|| part.clear())?;
        }
        while part.length() < file.size {
            let broken =
                |cause: &str| FetchError::unreachable(file.name.clone(), format!("{cause} at byte {} of {}", part.length(), file.size));
            let piece = match tokio::time::timeout(SILENCE, rest.stream.next()).await {
                Ok(Some(piece)) => piece?,
                Ok(None) => return Err(broken("its source broke off")),
                Err(_) => return Err(broken(&format!("its source was silent for {} s", SILENCE.as_secs()))),
            };
            block_in_place(|| part.write(&piece))?;
            self.meter.add(piece.len() as u64);
            block_in_place(|| head.look(&part::path(&self.folder.join(&file.name)), file, part.length()))?;
        }
        Ok(())
    }

    fn verified(&self, at: usize, sha256: String) -> Result<(), FetchError> {
        let mut manifest = self.manifest.lock().unwrap_or_else(PoisonError::into_inner);
        manifest.entries[at].verified = Some(sha256);
        manifest.write(&self.folder)
    }

    /// A full volume says how much is needed.
    fn with_figures(&self, error: FetchError) -> FetchError {
        if !error.is_no_room() {
            return error;
        }
        let free = folder::free(&self.folder).unwrap_or(0);
        FetchError::NoRoom { folder: self.folder.clone(), needed: self.meter.remaining(), free }
    }
}
