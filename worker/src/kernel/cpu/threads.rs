//! A fixed set of threads that share out the blocks of one product at a time.
//!
//! A forward pass starts some two hundred short jobs a token, so a thread that ran out of work spins for some microseconds before it sleeps.

use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::JoinHandle;

/// Set in the gate while a job is open to helpers; the bits below count the helpers inside.
const OPEN: usize = 1 << 31;
/// Turns of the spin loop before a helper sleeps: some tens of microseconds.
const SPINS: usize = 4000;

/// Threads for parallel loops: the caller and `count() - 1` helpers. Dropping it ends the helpers.
pub struct Threads {
    shared: Arc<Shared>,
    helpers: Vec<JoinHandle<()>>,
    /// One job at a time: who finds it taken (nested or concurrent use) runs its blocks alone.
    dispatch: Mutex<()>,
}

type Job = *const (dyn Fn(usize) + Sync);

struct Shared {
    gate: AtomicUsize,
    next: AtomicUsize,
    blocks: AtomicUsize,
    job: UnsafeCell<Option<Job>>,
    panicked: AtomicBool,
    ended: AtomicBool,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
}

// SAFETY: `job` is written only by the one dispatcher while the gate is closed and empty, and read only by helpers inside the open gate.
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `job` is to a `Sync` closure, which may be called from any thread.
unsafe impl Send for Shared {}

impl Threads {
    /// `count` threads in all, the caller of each loop included (at least 1).
    pub fn new(count: usize) -> Arc<Self> {
        let shared = Arc::new(Shared {
            gate: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            blocks: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            panicked: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
        });
        // A helper the system does not grant is done without: the loops are complete with any number.
        let helpers = (1..count)
            .filter_map(|index| {
                let shared = shared.clone();
                std::thread::Builder::new().name(format!("kernel-{index}")).spawn(move || shared.help()).ok()
            })
            .collect();
        Arc::new(Self { shared, helpers, dispatch: Mutex::new(()) })
    }

    /// Number of threads, the caller included.
    pub fn count(&self) -> usize {
        self.helpers.len() + 1
    }

    /// Calls `run(0) … run(blocks - 1)`, each once, on all threads; returns when all are done. Panics of `run` come out here.
    pub fn run_blocks(&self, blocks: usize, run: impl Fn(usize) + Sync) {
        let guard = if blocks > 1 && !self.helpers.is_empty() { self.free() } else { None };
        match guard {
            Some(_guard) => self.shared.dispatch(blocks, &run),
            None => (0..blocks).for_each(run),
        }
    }

    /// The right to dispatch, unless another loop has it. One that panicked has closed the gate behind it: the threads are as free as before.
    fn free(&self) -> Option<MutexGuard<'_, ()>> {
        match self.dispatch.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// [`Threads::run_blocks`] over the items of a slice, each borrowed mutably by its block.
    pub fn for_each<T: Send>(&self, items: &mut [T], run: impl Fn(usize, &mut T) + Sync) {
        let count = items.len();
        let items = Disjoint::new(items);
        // SAFETY: each index is handed out once.
        self.run_blocks(count, |index| run(index, unsafe { &mut items.slice(index, 1)[0] }));
    }

    /// Splits `data` into blocks of `rows_per_block` rows of `width` values; `run` gets the index of the block's first row and the block.
    pub fn for_rows<T: Send>(&self, data: &mut [T], width: usize, rows_per_block: usize, run: impl Fn(usize, &mut [T]) + Sync) {
        let (length, block) = (data.len(), rows_per_block.max(1) * width.max(1));
        let data = Disjoint::new(data);
        self.run_blocks(length.div_ceil(block), |index| {
            let start = index * block;
            // SAFETY: blocks are disjoint and each index is handed out once.
            run(index * rows_per_block.max(1), unsafe { data.slice(start, block.min(length - start)) });
        });
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::SeqCst);
        drop(self.shared.sleep.lock().unwrap_or_else(PoisonError::into_inner));
        self.shared.wake.notify_all();
        for helper in self.helpers.drain(..) {
            // Helpers catch panics of jobs, and the loop that met one has reported it.
            let _ = helper.join();
        }
    }
}

impl Shared {
    fn dispatch(&self, blocks: usize, run: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime is erased; `Closing` below waits for all helpers before this borrow ends, unwinding included.
        let job = unsafe { std::mem::transmute::<&(dyn Fn(usize) + Sync), Job>(run) };
        // SAFETY: the gate is closed and empty: the job before this one was closed, and `dispatch` is behind a mutex.
        unsafe { *self.job.get() = Some(job) };
        self.panicked.store(false, Ordering::Relaxed);
        self.next.store(0, Ordering::Relaxed);
        self.blocks.store(blocks, Ordering::Relaxed);
        self.gate.store(OPEN, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(self.sleep.lock().unwrap_or_else(PoisonError::into_inner));
            self.wake.notify_all();
        }
        let closing = Closing(self);
        self.work(run);
        drop(closing);
        assert!(!self.panicked.load(Ordering::Relaxed), "a block of a parallel loop panicked");
    }

    fn work(&self, run: &(dyn Fn(usize) + Sync)) {
        let blocks = self.blocks.load(Ordering::Relaxed);
        loop {
            let block = self.next.fetch_add(1, Ordering::Relaxed);
            if block >= blocks {
                return;
            }
            run(block);
        }
    }

    /// Whether a job is open and has blocks left.
    fn has_work(&self) -> bool {
        self.gate.load(Ordering::SeqCst) & OPEN != 0 && self.next.load(Ordering::Relaxed) < self.blocks.load(Ordering::Relaxed)
    }

    fn enter(&self) -> bool {
        let inside = |gate: usize| (gate & OPEN != 0).then_some(gate + 1);
        self.gate.fetch_update(Ordering::AcqRel, Ordering::Acquire, inside).is_ok()
    }

    fn help(&self) {
        let mut idle = 0;
        while !self.ended.load(Ordering::SeqCst) {
            if self.has_work() && self.enter() {
                // SAFETY: inside the open gate the job is set and outlives our stay.
                if let Some(job) = unsafe { *self.job.get() } {
                    // SAFETY: as above.
                    if catch_unwind(AssertUnwindSafe(|| self.work(unsafe { &*job }))).is_err() {
                        self.panicked.store(true, Ordering::Relaxed);
                    }
                }
                self.gate.fetch_sub(1, Ordering::Release);
                idle = 0;
            } else if idle < SPINS {
                idle += 1;
                std::hint::spin_loop();
            } else {
                self.doze();
                idle = 0;
            }
        }
    }

    fn doze(&self) {
        let mut guard = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while !self.has_work() && !self.ended.load(Ordering::SeqCst) {
            guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Closes the gate and waits until it is empty, also when the caller's own block panics.
struct Closing<'a>(&'a Shared);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // A caller that panicked leaves blocks nobody needs.
        if std::thread::panicking() {
            self.0.next.store(usize::MAX / 2, Ordering::Relaxed);
        }
        self.0.gate.fetch_and(!OPEN, Ordering::AcqRel);
        let mut spins = 0;
        while self.0.gate.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS { std::hint::spin_loop() } else { std::thread::yield_now() }
        }
    }
}

/// A mutable slice of which the blocks of a loop write parts that do not overlap.
pub(super) struct Disjoint<'a, T> {
    start: *mut T,
    length: usize,
    lifetime: std::marker::PhantomData<&'a mut [T]>,
}

// SAFETY: it only hands out parts under the contract of `slice`; the elements themselves may cross threads.
unsafe impl<T: Send> Sync for Disjoint<'_, T> {}

impl<'a, T> Disjoint<'a, T> {
    pub fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), length: data.len(), lifetime: std::marker::PhantomData }
    }

    /// # Safety
    /// No other part that is alive overlaps `start..start + length`.
    #[allow(clippy::mut_from_ref)]
    pub unsafe fn slice(&self, start: usize, length: usize) -> &mut [T] {
        assert!(start <= self.length && length <= self.length - start, "part of a slice out of range");
        // SAFETY: in range; the caller promises that parts do not overlap.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(start), length) }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn every_block_runs_once_with_any_number_of_threads() {
        for count in [1, 2, 5] {
            let threads = Threads::new(count);
            for blocks in [0, 1, 2, 7, 1000] {
                let mut seen = vec![0u32; blocks];
                threads.for_each(&mut seen, |_, times| *times += 1);
                assert!(seen.iter().all(|times| *times == 1), "{count} threads, {blocks} blocks");
            }
        }
    }

    #[test]
    fn nested_and_concurrent_loops_finish() {
        let threads = Threads::new(3);
        let total = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..200 {
                        threads.run_blocks(3, |_| threads.run_blocks(4, |_| _ = total.fetch_add(1, Ordering::Relaxed)));
                    }
                });
            }
        });
        assert_eq!(total.into_inner(), 4 * 200 * 12);
    }

    /// Runs one block on each thread and, once all are at work, `then` on each, which is told whether it is the caller's.
    fn together(threads: &Threads, then: impl Fn(bool) + Sync) {
        let (caller, at_work, changed) = (std::thread::current().id(), Mutex::new(0), Condvar::new());
        threads.run_blocks(threads.count(), |_| {
            let mut at_work = at_work.lock().unwrap();
            *at_work += 1;
            changed.notify_all();
            let (at_work, late) =
                changed.wait_timeout_while(at_work, Duration::from_secs(30), |at_work| *at_work < threads.count()).unwrap();
            assert!(!late.timed_out(), "{} of {} threads at work", *at_work, threads.count());
            drop(at_work);
            then(std::thread::current().id() == caller);
        });
    }

    #[test]
    fn a_panic_comes_out_and_all_threads_work_on() {
        let threads = Threads::new(3);
        for callers in [true, false] {
            together(&threads, |_| ());
            assert!(catch_unwind(AssertUnwindSafe(|| together(&threads, |caller| assert_ne!(caller, callers)))).is_err());
            together(&threads, |_| ());
        }
    }

    #[test]
    fn rows_are_split_without_overlap() {
        let mut data = vec![0usize; 7 * 3];
        Threads::new(2).for_rows(&mut data, 3, 2, |first, block| {
            for (offset, row) in block.chunks_mut(3).enumerate() {
                row.fill(first + offset);
            }
        });
        assert_eq!(data, (0..7).flat_map(|row| [row; 3]).collect::<Vec<_>>());
    }
}
