//! An allocator that ends the process when more is asked of it than any small file may cost.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes at a time, those of the fuzzer's own corpus included.
const MOST: usize = 1 << 30;
/// Bytes of one allocation.
const MOST_AT_ONCE: usize = 192 << 20;

/// The system's allocator, within bounds.
pub struct Bounded(AtomicUsize);

impl Bounded {
    /// Nothing is allocated yet.
    #[allow(clippy::new_without_default)] // a static needs a constant
    pub const fn new() -> Self {
        Self(AtomicUsize::new(0))
    }

    fn claim(&self, bytes: usize) {
        if bytes > MOST_AT_ONCE || self.0.fetch_add(bytes, Ordering::Relaxed) + bytes > MOST {
            // No message: that would allocate. A debugger, or the fuzzer, shows who asked.
            std::process::abort();
        }
    }
}

// SAFETY: every call goes on to the system's allocator as it is.
unsafe impl GlobalAlloc for Bounded {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        self.claim(layout.size());
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        self.claim(layout.size());
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        self.0.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises are the system allocator's.
        unsafe { System.dealloc(pointer, layout) }
    }
}
