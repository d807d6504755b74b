//! An allocator that has no more to give than what is read may cost.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

static LIVE: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(usize::MAX);

/// The system's allocator, within a bound. What is refused ends the process, with its size.
pub struct Bounded;

impl Bounded {
    /// Runs `work`, which may have `bytes` more at any time than there are now.
    pub fn within(bytes: usize, work: impl FnOnce()) {
        MOST.store(LIVE.load(Relaxed) + bytes, Relaxed);
        work();
        MOST.store(usize::MAX, Relaxed);
    }
}

// SAFETY: every call goes on to the system's allocator as it is, or is refused by null.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A panic may have what it needs to tell of itself.
        if LIVE.fetch_add(layout.size(), Relaxed) + layout.size() > MOST.load(Relaxed) && !std::thread::panicking() {
            return std::ptr::null_mut();
        }
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}
