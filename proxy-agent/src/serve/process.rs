//! What the kernel tells of this process, as every Prometheus client exports it.

use std::fs;

/// Clock ticks in a second, in `/proc`: fixed for user space on every architecture that Linux's eBPF runs on.
const TICKS: f64 = 100.0;

/// One look.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Process {
    /// User and system time, in seconds.
    pub cpu: f64,
    /// Start, in seconds since 1970.
    pub start: f64,
    /// Resident memory, in bytes.
    pub resident: f64,
    /// Virtual memory, in bytes.
    pub virt: f64,
    /// Open file descriptors.
    pub open_fds: f64,
    /// How many it may have.
    pub max_fds: f64,
}

impl Process {
    /// Reads `/proc`; what cannot be read is 0.
    pub fn now() -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let fds = fs::read_dir("/proc/self/fd").map_or(0, |all| all.count().saturating_sub(1));
        let mut seen = parse(
            &read("/proc/self/stat"),
            &read("/proc/self/status"),
            &read("/proc/stat"),
            &read("/proc/self/limits"),
        );
        seen.open_fds = super::exposition::float(u64::try_from(fds).unwrap_or_default());
        seen
    }
}

fn parse(stat: &str, status: &str, system: &str, limits: &str) -> Process {
    // The second field is the name in parentheses, which may hold anything.
    let after: Vec<&str> = stat.rsplit_once(") ").map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let field = |number: usize| after.get(number - 3).and_then(|text| text.parse::<f64>().ok()).unwrap_or_default();
    let named = |text: &str, name: &str, at: usize| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default();
        line.split_ascii_whitespace().nth(at).and_then(|text| text.parse::<f64>().ok()).unwrap_or_default()
    };
    Process {
        cpu: (field(14) + field(15)) / TICKS,
        start: named(system, "btime", 0) + field(22) / TICKS,
        resident: named(status, "VmRSS:", 0) * 1024.0,
        virt: named(status, "VmSize:", 0) * 1024.0,
        open_fds: 0.0,
        max_fds: named(limits, "Max open files", 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_of_proc() {
        let stat = "7 (a ) b) S 1 7 7 0 -1 4194560 1 0 0 0 150 50 0 0 20 0 3 0 1000 9 9 9\n";
        let seen = parse(
            stat,
            "Name:\tx\nVmSize:\t   2048 kB\nVmRSS:\t   1024 kB\n",
            "cpu 1 2\nbtime 1700000000\n",
            "Limit                     Soft Limit\nMax open files            1024  4096  files\n",
        );
        let want = Process {
            cpu: 2.0,
            start: 1_700_000_010.0,
            resident: 1_048_576.0,
            virt: 2_097_152.0,
            open_fds: 0.0,
            max_fds: 1_024.0,
        };
        assert_eq!(seen, want);
    }
}
