//! What the process holds in memory, as the kernel counts it.

use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How often [`Watch`] looks.
const INTERVAL: Duration = Duration::from_millis(100);

/// Memory of this process, bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Anonymous pages that are resident now: what the program itself asked for.
    pub anonymous: u64,
    /// Most resident at any time, file pages included.
    pub peak_resident: u64,
}

/// Reads `/proc/self/status`; zeros where there is none.
pub fn now() -> Memory {
    fs::read_to_string("/proc/self/status").map_or_else(|_| Memory::default(), |text| parse(&text))
}

fn parse(status: &str) -> Memory {
    let bytes = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        line.and_then(|value| value.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
    };
    Memory { anonymous: bytes("RssAnon"), peak_resident: bytes("VmHWM") }
}

/// Keeps the highest anonymous memory seen: the kernel keeps no such mark itself.
#[derive(Clone, Debug, Default)]
pub struct Watch(Arc<AtomicU64>);

impl Watch {
    /// Looks every 100 ms until the runtime ends. `before`: the mark of earlier attempts, bytes.
    pub fn start(runtime: &tokio::runtime::Handle, before: u64) -> Self {
        let watch = Self(Arc::new(AtomicU64::new(before)));
        let mark = watch.clone();
        runtime.spawn(async move {
            let mut interval = tokio::time::interval(INTERVAL);
            loop {
                interval.tick().await;
                mark.look();
            }
        });
        watch
    }

    /// Raises the mark to at least `bytes`.
    pub fn raise(&self, bytes: u64) {
        self.0.fetch_max(bytes, Ordering::Relaxed);
    }

    /// The highest so far, bytes.
    pub fn peak_anonymous(&self) -> u64 {
        self.look();
        self.0.load(Ordering::Relaxed)
    }

    fn look(&self) {
        self.raise(now().anonymous);
    }
}

/// Buffers of so many bytes are no part of the heap.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
const LARGE: i32 = 16 << 20;

/// Lets the process keep the pages it frees. A training step frees some hundred MiB and asks for as many in the next: with glibc's defaults
/// they go back to the kernel each time, and clearing them again takes a third of the step. Large buffers go back: there is much to compute on
/// each, and the holes that they leave in a heap are memory that nothing else fits into.
pub fn keep_freed_pages() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const TRIM_THRESHOLD: i32 = -1;
        const MMAP_THRESHOLD: i32 = -3;
        const ARENA_MAX: i32 = -8;
        unsafe extern "C" {
            fn mallopt(parameter: i32, value: i32) -> i32;
        }
        for (parameter, value) in [(ARENA_MAX, 1), (MMAP_THRESHOLD, LARGE), (TRIM_THRESHOLD, i32::MAX)] {
            // SAFETY: glibc's allocator takes new parameters at any time.
            unsafe { mallopt(parameter, value) };
        }
    }
}

/// Gives back what [`keep_freed_pages`] has kept so far.
pub fn give_back() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        unsafe extern "C" {
            fn malloc_trim(pad: usize) -> i32;
        }
        // SAFETY: glibc's allocator gives back free pages at any time.
        unsafe { malloc_trim(0) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_kernel_s_table() {
        let memory = parse("Name:\tx\nVmHWM:\t  123 kB\nRssAnon:\t   45 kB\n");
        assert_eq!(memory, Memory { anonymous: 45 * 1024, peak_resident: 123 * 1024 });
        assert_eq!(parse(""), Memory::default());
    }
}
