//! Heads on their way into a pod: bounded in bytes while they come, in number while they wait, and packed one after the other.

use std::sync::Arc;

use axum::extract::Request;
use bytes::Bytes;
use carryon_crds::wire::limits::{head_memory, largest_head};
use tokio::sync::Semaphore;

use crate::http::{Bodies, BodyError};

/// Heads that wait to be packed: their bytes are bounded already, these are many small ones.
const WAITING: usize = 64;

/// The way in for heads.
pub struct Uploads {
    memory: u64,
    bodies: Bodies,
    waiting: Arc<Semaphore>,
    packing: Arc<Semaphore>,
}

impl Uploads {
    /// For a pod with `memory` bytes.
    pub fn new(memory: u64) -> Self {
        let bodies = Bodies::new(usize::try_from(head_memory(memory)).unwrap_or(usize::MAX));
        Self { memory, bodies, waiting: Arc::new(Semaphore::new(WAITING)), packing: Arc::new(Semaphore::new(1)) }
    }

    /// What the pod has.
    pub fn memory(&self) -> u64 {
        self.memory
    }

    /// The bytes of a head, no more than the pod's memory allows.
    pub async fn read(&self, request: Request) -> Result<Bytes, UploadError> {
        let most = largest_head(self.memory);
        self.bodies.read(request, usize::try_from(most).unwrap_or(usize::MAX)).await.map_err(|error| match error {
            BodyError::TooLarge(_) => UploadError::TooLarge { most, memory: self.memory },
            error => UploadError::Body(error),
        })
    }

    /// Runs `pack` on a thread of its own, when no other does. Each one needs as much memory again as its head has bytes.
    pub async fn pack<T: Send + 'static>(&self, pack: impl FnOnce() -> T + Send + 'static) -> Result<T, UploadError> {
        let waiting = self.waiting.clone().try_acquire_owned().map_err(|_| UploadError::Full)?;
        let packing = self.packing.clone().acquire_owned().await.map_err(|_| UploadError::Full)?;
        // Whoever asked may go away meanwhile: the work goes on, and so it keeps its place.
        let alone = move || {
            let _places = (waiting, packing);
            pack()
        };
        tokio::task::spawn_blocking(alone).await.map_err(|error| UploadError::Failed(error.to_string()))
    }
}

/// Why a head does not get in.
#[derive(Debug, thiserror::Error)]
pub enum UploadError {
    /// The pod has no memory for it.
    #[error("the head has more than {most} bytes: no larger one fits into the share for heads of this pod's {memory} bytes of memory")]
    TooLarge {
        /// The largest that fits.
        most: u64,
        /// What the pod has.
        memory: u64,
    },
    /// Its bytes did not come.
    #[error(transparent)]
    Body(BodyError),
    /// Too many wait to be packed.
    #[error("{WAITING} heads wait to be packed: ask again later")]
    Full,
    /// Packing it panicked.
    #[error("packing the head failed: {0}")]
    Failed(String),
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn heads_are_packed_one_after_the_other_and_only_so_many_wait() {
        let uploads = Arc::new(Uploads::new(0));
        let (go, gone) = channel::<()>();
        let gone = Arc::new(std::sync::Mutex::new(gone));
        let (packing, most) = <(Arc<AtomicUsize>, Arc<AtomicUsize>)>::default();
        let pack = || {
            let (uploads, gone, packing, most) = (uploads.clone(), gone.clone(), packing.clone(), most.clone());
            tokio::spawn(async move {
                let pack = move || {
                    most.fetch_max(packing.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                    gone.lock().unwrap().recv().unwrap();
                    packing.fetch_sub(1, Ordering::SeqCst);
                };
                uploads.pack(pack).await
            })
        };
        let waiting: Vec<_> = (0..WAITING).map(|_| pack()).collect();
        // Who goes away while its head is packed leaves the next one waiting.
        while packing.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
        let refused = pack().await.unwrap();
        assert!(matches!(refused, Err(UploadError::Full)), "{refused:?}");
        let mut waiting = waiting.into_iter();
        waiting.next().unwrap().abort();
        (0..WAITING).for_each(|_| go.send(()).unwrap());
        for packed in waiting {
            packed.await.unwrap().unwrap();
        }
        assert_eq!(most.load(Ordering::SeqCst), 1);
        go.send(()).unwrap();
        pack().await.unwrap().unwrap();
    }
}
