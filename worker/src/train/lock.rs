//! One trainer an output folder, whatever became of the one before it.
//!
//! Two locks, because neither is enough. The kernel's (`flock`) ends with its holder, but is not known on other nodes of many network volumes.
//! The lease, a file that its holder renews, is known wherever the volume is, but a dead holder leaves it behind. No two clocks are compared:
//! a newcomer takes a lease that it has seen unchanged for a whole term by its own clock, writes its own, and looks again after the time in
//! which a living holder, or another newcomer, would have answered. It takes a lease at once when the kernel's lock shows that its holder is dead:
//! when both were given by the same kernel for the same mount. A holder looks at its lease before it writes anything that lasts.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::files;
use crate::train::error::TrainError;
use crate::train::stop::Stop;

/// The file that is locked. It is never removed: who removed it would let two trainers lock two files of one name.
const LOCK_FILE: &str = "trainer.lock";
/// The file that is renewed.
pub const LEASE_FILE: &str = "trainer.lease";

/// How often a lease is renewed, and when it has lapsed.
#[derive(Clone, Copy, Debug)]
pub struct Timing {
    /// Between renewals.
    pub renewal: Duration,
    /// Without a renewal for so long, a lease has lapsed.
    pub term: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self { renewal: Duration::from_secs(3), term: Duration::from_secs(15) }
    }
}

/// Content of the lease's file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
struct Lease {
    /// Drawn at random.
    id: String,
    /// Who it is, for people.
    holder: String,
    /// Kernel and mount that the kernel's lock is good for; empty where they cannot be told.
    reach: String,
    /// Grows with each renewal.
    renewals: u64,
}

impl Lease {
    fn new(folder: &Path) -> std::io::Result<Self> {
        let kernel = |name: &str| fs::read_to_string(format!("/proc/sys/kernel/{name}")).map(|text| text.trim().to_owned());
        let host = kernel("hostname").unwrap_or_else(|_| "unknown".to_owned());
        let device = fs::metadata(folder)?.dev();
        Ok(Self {
            id: format!("{:032x}", rand::random::<u128>()),
            holder: format!("{host} (process {})", std::process::id()),
            reach: kernel("random/boot_id").map(|boot| format!("{boot}/{device:x}")).unwrap_or_default(),
            renewals: 0,
        })
    }

    fn parse(content: &[u8]) -> Option<Self> {
        serde_json::from_slice(content).ok()
    }

    fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a lease is plain data")
    }
}

/// What a newcomer has seen of another's lease.
#[derive(Debug, Default)]
struct Seen(Option<(Vec<u8>, Instant)>);

impl Seen {
    /// Whether `content`, seen `now`, has been the same for `term`.
    fn lapsed(&mut self, content: &[u8], now: Instant, term: Duration) -> bool {
        match &self.0 {
            Some((same, since)) if same == content => now.duration_since(*since) >= term,
            _ => {
                self.0 = Some((content.to_vec(), now));
                false
            }
        }
    }
}

/// The lock of an output folder, given back when it is dropped.
pub struct Lock {
    held: Arc<Held>,
    renewing: Option<JoinHandle<()>>,
    _file: File,
}

/// What the renewing thread shares with the trainer.
struct Held {
    path: PathBuf,
    timing: Timing,
    lease: Lease,
    renewals: AtomicU64,
    /// Of the last renewal; none when it was lost or given back.
    renewed: Mutex<Option<Instant>>,
}

impl Lock {
    /// Locks `folder`, waiting while another trainer holds it: `pause` is called between two looks and may end the wait, `told` hears who holds it.
    /// Nothing else in the folder is touched before. When the lock is lost, `stop` is set.
    ///
    /// # Errors
    /// The error of `pause`; a folder that cannot be read or written.
    pub fn take(
        folder: &Path,
        timing: Timing,
        stop: &Stop,
        mut pause: impl FnMut(Duration) -> Result<(), TrainError>,
        mut told: impl FnMut(&str),
    ) -> Result<Self, TrainError> {
        fs::create_dir_all(folder).map_err(TrainError::file("create", folder))?;
        let path = folder.join(LOCK_FILE);
        let opened = OpenOptions::new().create(true).truncate(false).write(true).open(&path);
        // One that an earlier attempt made with another UID can be locked all the same.
        let file = opened.or_else(|_| File::open(&path)).map_err(TrainError::file("open", path))?;
        let lease = Lease::new(folder).map_err(TrainError::file("inspect", folder))?;
        let held = Held { path: folder.join(LEASE_FILE), timing, lease, renewals: AtomicU64::new(0), renewed: Mutex::default() };
        let (mut seen, mut kernel, mut last) = (Seen::default(), Kernel::Busy, None);
        loop {
            if kernel == Kernel::Busy {
                kernel = lock(&file);
            }
            let found = held.read()?;
            let other = found.as_deref().and_then(Lease::parse);
            let dead =
                kernel == Kernel::Ours && other.as_ref().is_some_and(|other| !other.reach.is_empty() && other.reach == held.lease.reach);
            let taken = match &found {
                _ if kernel == Kernel::Busy => false,
                None => held.create()?,
                Some(_) if dead => held.write().map(|()| true)?,
                Some(found) if seen.lapsed(found, Instant::now(), timing.term) => {
                    held.write()?;
                    pause(2 * timing.renewal).inspect_err(|_| held.give_back())?;
                    held.is_ours()?
                }
                Some(_) => false,
            };
            if taken {
                return Ok(Self::hold(held, file, stop.clone()));
            }
            let holder = other.map_or_else(|| "another trainer".to_owned(), |other| other.holder);
            if last.as_ref() != Some(&holder) {
                told(&holder);
                last = Some(holder);
            }
            pause(timing.renewal / 6)?;
        }
    }

    fn hold(held: Held, file: File, stop: Stop) -> Self {
        *held.renewed() = Some(Instant::now());
        let held = Arc::new(held);
        let shared = held.clone();
        let renewing = std::thread::spawn(move || shared.renew(&stop));
        Self { held, renewing: Some(renewing), _file: file }
    }

    /// Whether the folder is still this trainer's; to be asked before anything durable is written.
    ///
    /// # Errors
    /// [`TrainError::FolderTaken`] when it is not; a lease that cannot be read, or not be renewed although it is time.
    pub fn check(&self) -> Result<(), TrainError> {
        let renewed = (*self.held.renewed()).ok_or(TrainError::FolderTaken)?;
        if !self.held.is_ours()? {
            return Err(TrainError::FolderTaken);
        }
        // A process that was frozen finds its lease old, but nobody has taken it.
        if renewed.elapsed() < self.held.timing.term { Ok(()) } else { self.held.write() }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        let ours = self.held.renewed().take().is_some();
        if let Some(renewing) = self.renewing.take() {
            renewing.thread().unpark();
            let _ = renewing.join();
        }
        if ours {
            self.held.give_back();
        }
    }
}

impl Held {
    /// Renews until the lease is given back or lost.
    fn renew(&self, stop: &Stop) {
        loop {
            std::thread::park_timeout(self.timing.renewal);
            let Some(renewed) = *self.renewed() else { return };
            let written = self.is_ours().and_then(|ours| ours.then(|| self.write()).transpose());
            let lost = match written {
                Ok(Some(())) => false,
                Ok(None) => true,
                Err(error) => {
                    tracing::warn!("the lease of the output folder is not renewed: {error}");
                    renewed.elapsed() >= self.timing.term
                }
            };
            if lost {
                *self.renewed() = None;
                stop.set();
                return;
            }
        }
    }

    fn renewed(&self) -> MutexGuard<'_, Option<Instant>> {
        self.renewed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> Result<Option<Vec<u8>>, TrainError> {
        match fs::read(&self.path) {
            Ok(content) => Ok(Some(content)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(TrainError::file("read", &self.path)(error)),
        }
    }

    fn is_ours(&self) -> Result<bool, TrainError> {
        Ok(self.read()?.as_deref().and_then(Lease::parse).is_some_and(|found| found.id == self.lease.id))
    }

    /// Writes the lease where there is none; false when another was faster.
    fn create(&self) -> Result<bool, TrainError> {
        let created = OpenOptions::new().create_new(true).write(true).open(&self.path);
        match created.and_then(|mut file| file.write_all(&self.lease.to_bytes()).and_then(|()| file.sync_all())) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(false),
            Err(error) => Err(TrainError::file("write", &self.path)(error)),
        }
    }

    /// Writes the lease in place of what is there.
    fn write(&self) -> Result<(), TrainError> {
        let started = Instant::now();
        let lease = Lease { renewals: self.renewals.fetch_add(1, Ordering::Relaxed), ..self.lease.clone() };
        files::write_atomic(&self.path, &lease.to_bytes()).map_err(TrainError::file("write", &self.path))?;
        // Counted from before the write: another may have seen it as soon as that.
        if let Some(renewed) = &mut *self.renewed() {
            *renewed = started;
        }
        Ok(())
    }

    /// Removes the lease if it is this trainer's. Best effort: one that stays lapses.
    fn give_back(&self) {
        if self.is_ours().unwrap_or(false)
            && let Err(error) = fs::remove_file(&self.path)
        {
            tracing::warn!("failed to remove {:?}: {error}", self.path);
        }
    }
}

/// What the kernel says to a wish to lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kernel {
    Ours,
    Busy,
    /// The volume has no such locks: the lease alone counts.
    Unsupported,
}

fn lock(file: &File) -> Kernel {
    match file.try_lock() {
        Ok(()) => Kernel::Ours,
        Err(TryLockError::WouldBlock) => Kernel::Busy,
        Err(TryLockError::Error(error)) => {
            tracing::info!("the output folder's volume has no file locks ({error}): its lease alone keeps other trainers out");
            Kernel::Unsupported
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Timing = Timing { renewal: Duration::from_millis(6), term: Duration::from_millis(30) };

    fn asleep(time: Duration) -> Result<(), TrainError> {
        std::thread::sleep(time);
        Ok(())
    }

    fn never(_: Duration) -> Result<(), TrainError> {
        panic!("there was nobody to wait for")
    }

    /// Writes the lease of a trainer on another node.
    fn foreign(folder: &Path, renewals: u64) {
        let lease = Lease { id: "theirs".to_owned(), holder: "trainer-b".to_owned(), reach: "elsewhere".to_owned(), renewals };
        fs::write(folder.join(LEASE_FILE), lease.to_bytes()).unwrap();
    }

    fn owner(folder: &Path) -> String {
        Lease::parse(&fs::read(folder.join(LEASE_FILE)).unwrap()).unwrap().id
    }

    #[test]
    fn a_lease_has_lapsed_when_it_was_seen_unchanged_for_a_term() {
        let (start, term) = (Instant::now(), Duration::from_secs(15));
        let after = |seconds: u64| start + Duration::from_secs(seconds);
        let mut seen = Seen::default();
        for (content, second, lapsed) in [
            (b"a1", 0, false),
            (b"a1", 14, false),
            // Renewed in the last moment, then taken by another.
            (b"a2", 15, false),
            (b"b0", 29, false),
            (b"b0", 43, false),
            (b"b0", 44, true),
        ] {
            assert_eq!(seen.lapsed(content, after(second), term), lapsed, "second {second}");
        }
    }

    #[test]
    fn the_lease_of_a_dead_node_is_waited_for_and_taken() {
        let folder = tempfile::tempdir().unwrap();
        foreign(folder.path(), 3);
        let mut told = Vec::new();
        let lock = Lock::take(folder.path(), QUICK, &Stop::default(), asleep, |holder| told.push(holder.to_owned())).unwrap();
        assert_eq!(told, ["trainer-b"]);
        lock.check().unwrap();
        drop(lock);
        // Given back, it is free at once.
        Lock::take(folder.path(), QUICK, &Stop::default(), never, |_| ()).unwrap().check().unwrap();
    }

    #[test]
    fn a_lease_that_lives_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        foreign(folder.path(), 0);
        let mut renewals = 0;
        let pause = |time| {
            renewals += 1;
            foreign(folder.path(), renewals);
            if renewals < 60 { asleep(time) } else { Err(TrainError::Stopped { step: 0 }) }
        };
        let ended = Lock::take(folder.path(), QUICK, &Stop::default(), pause, |_| ());
        assert!(matches!(ended, Err(TrainError::Stopped { .. })));
        assert_eq!(owner(folder.path()), "theirs");
    }

    #[test]
    fn of_two_newcomers_the_one_that_wrote_last_holds() {
        let folder = tempfile::tempdir().unwrap();
        foreign(folder.path(), 0);
        let mut met = false;
        let pause = |time| {
            if met {
                return Err(TrainError::Stopped { step: 0 });
            }
            if owner(folder.path()) != "theirs" {
                foreign(folder.path(), 0);
                met = true;
            }
            asleep(time)
        };
        assert!(matches!(Lock::take(folder.path(), QUICK, &Stop::default(), pause, |_| ()), Err(TrainError::Stopped { .. })));
        assert_eq!(owner(folder.path()), "theirs");
    }

    #[test]
    fn a_killed_holder_under_the_same_kernel_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(LEASE_FILE), Lease::new(folder.path()).unwrap().to_bytes()).unwrap();
        Lock::take(folder.path(), QUICK, &Stop::default(), never, |_| ()).unwrap().check().unwrap();
    }

    #[test]
    fn a_stolen_lease_ends_its_holder_and_is_left_to_the_thief() {
        let (folder, stop) = (tempfile::tempdir().unwrap(), Stop::default());
        let lock = Lock::take(folder.path(), QUICK, &stop, never, |_| ()).unwrap();
        // A renewal that has just looked may still overwrite the thief's first write, which then waits anew.
        while !stop.is_set() {
            foreign(folder.path(), 0);
            assert!(matches!(lock.check(), Err(TrainError::FolderTaken) | Ok(())));
            std::thread::yield_now();
        }
        assert!(matches!(lock.check(), Err(TrainError::FolderTaken)));
        drop(lock);
        assert_eq!(owner(folder.path()), "theirs");
    }
}
