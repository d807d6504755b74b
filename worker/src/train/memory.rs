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
pub struct Watch {
    highest: Arc<AtomicU64>,
    start: u64,
}

impl Watch {
    /// Gives back what is free, and looks every 100 ms from now on until the runtime ends.
    pub fn start(runtime: &tokio::runtime::Handle) -> Self {
        give_back();
        let start = now().anonymous;
        let watch = Self { highest: Arc::new(AtomicU64::new(start)), start };
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

    /// The anonymous memory that there was at the start, bytes.
    pub fn start_anonymous(&self) -> u64 {
        self.start
    }

    /// The highest so far, bytes.
    pub fn peak_anonymous(&self) -> u64 {
        self.look();
        self.highest.load(Ordering::Relaxed)
    }

    fn look(&self) {
        self.highest.fetch_max(now().anonymous, Ordering::Relaxed);
    }
}

/// Lets the process keep the pages it frees. A training step frees some hundred MiB and asks for as many in the next: with glibc's defaults
/// they go back to the kernel each time, and clearing them again takes a third of a small head's step.
pub fn keep_freed_pages() {
    glibc::set(&[(glibc::ARENA_MAX, 1), (glibc::MMAP_MAX, 0), (glibc::TRIM_THRESHOLD, i32::MAX)]);
}

/// Lets what large buffers take go back to the kernel, where the head is as wide as `width`. In a heap they leave holes that others do not fit
/// into; and of a wide head so much is computed with each number that clearing its page again is nothing beside it.
pub fn return_large_buffers(width: u32) {
    const WIDE: u32 = 1024;
    const LARGE_BYTES: i32 = 4 << 20;
    if width >= WIDE {
        glibc::set(&[(glibc::MMAP_MAX, 1 << 16), (glibc::MMAP_THRESHOLD, LARGE_BYTES)]);
    }
}

/// Gives back what [`keep_freed_pages`] has kept so far.
fn give_back() {
    glibc::trim();
}

/// The allocator's own switches; other C libraries have none.
mod glibc {
    pub const TRIM_THRESHOLD: i32 = -1;
    pub const MMAP_THRESHOLD: i32 = -3;
    pub const MMAP_MAX: i32 = -4;
    pub const ARENA_MAX: i32 = -8;

    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    unsafe extern "C" {
        fn mallopt(parameter: i32, value: i32) -> i32;
        fn malloc_trim(pad: usize) -> i32;
    }

    pub fn set(parameters: &[(i32, i32)]) {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        for (parameter, value) in parameters {
            // SAFETY: it takes new parameters at any time.
            unsafe { mallopt(*parameter, *value) };
        }
        #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
        let _ = parameters;
    }

    pub fn trim() {
        #[cfg(all(target_os = "linux", target_env = "gnu"))]
        // SAFETY: it gives back free pages at any time.
        unsafe {
            malloc_trim(0)
        };
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
