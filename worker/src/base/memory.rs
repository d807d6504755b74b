//! How much memory a pod has.

use std::fs;

/// Where the kernel says what a pod's processes may use: version 2 and version 1 of its control groups.
const LIMITS: [&str; 2] = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"];

/// Bytes that this process may use: the pod's limit, or what the machine has. Nothing is assumed where neither is known.
pub fn available() -> u64 {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    let limits = LIMITS.iter().filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok());
    // Without a limit, version 1 says a number beyond any machine's.
    limits.chain(machine).min().unwrap_or(0)
}

/// Bytes of hidden states that trainers have not taken yet, in a process that may use `memory`.
pub fn states(memory: u64) -> u64 {
    (memory / 16).max(64 << 20)
}

fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_s_memory_is_read_and_bounds_what_is_available() {
        assert_eq!(total("MemTotal:       24689668 kB\nMemFree: 1 kB\n"), Some(24_689_668 * 1024));
        assert_eq!(total("MemFree: 1 kB\n"), None);
        let machine = total(&fs::read_to_string("/proc/meminfo").unwrap()).unwrap();
        assert!((1..=machine).contains(&available()));
    }
}
