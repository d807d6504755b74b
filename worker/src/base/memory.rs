//! How much memory there is, and how much of it keys and values may take.

use std::fs;

/// Share of the memory limit that keys and values may take when the configuration does not say: a quarter.
const SHARE: u64 = 4;

/// Bytes for keys and values: what was asked for, or [`SHARE`] of what this process may use.
pub fn kv_cache_bytes(asked: Option<u64>) -> u64 {
    asked.unwrap_or_else(|| limit().unwrap_or(4 << 30) / SHARE)
}

/// Bytes this process may use: its control group's limit or the machine's memory, whichever is less.
fn limit() -> Option<u64> {
    let group = fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    group.into_iter().chain(machine).min()
}

fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().trim_end_matches("kB").trim().parse::<u64>().ok().map(|kib| kib << 10)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_asked_for_counts_else_a_share_of_the_memory() {
        assert_eq!(kv_cache_bytes(Some(7)), 7);
        assert_eq!(total("MemFree: 1 kB\nMemTotal:   24000 kB\n"), Some(24000 << 10));
        assert!(kv_cache_bytes(None) > 0);
    }
}
