//! CPU time of the whole machine while something runs: what a packet costs in softirq is seen nowhere else.

use std::fs;
use std::time::{Duration, Instant};

use crate::error::{Context as _, Error, Result};

/// Milliseconds per tick of `/proc/stat`: USER_HZ is 100 on every architecture that Kubernetes runs on.
const TICK_MS: u64 = 10;

/// CPU time, all CPUs together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// In user space, niced too.
    pub user: Duration,
    /// In the kernel, for processes.
    pub system: Duration,
    /// In hardware interrupts.
    pub irq: Duration,
    /// In software interrupts: most of the network.
    pub softirq: Duration,
    /// Taken away by the hypervisor.
    pub steal: Duration,
    /// Nothing to do, or waiting for a disk.
    pub idle: Duration,
    /// Real time passed.
    pub wall: Duration,
}

impl CpuTime {
    /// Time that this machine worked.
    pub fn busy(&self) -> Duration {
        self.user + self.system + self.irq + self.softirq
    }

    fn since(self, earlier: Self, wall: Duration) -> Self {
        Self {
            user: self.user.saturating_sub(earlier.user),
            system: self.system.saturating_sub(earlier.system),
            irq: self.irq.saturating_sub(earlier.irq),
            softirq: self.softirq.saturating_sub(earlier.softirq),
            steal: self.steal.saturating_sub(earlier.steal),
            idle: self.idle.saturating_sub(earlier.idle),
            wall,
        }
    }
}

/// Runs `work` and gives the CPU time that the machine spent meanwhile.
///
/// # Errors
/// When `/proc/stat` cannot be read.
pub fn busy_during<T>(work: impl FnOnce() -> T) -> Result<(T, CpuTime)> {
    let before = read()?;
    let start = Instant::now();
    let result = work();
    let wall = start.elapsed();
    Ok((result, read()?.since(before, wall)))
}

fn read() -> Result<CpuTime> {
    let text = fs::read_to_string("/proc/stat").context(|| "read /proc/stat".to_owned())?;
    parse(&text).ok_or_else(|| Error::mismatch("/proc/stat", "a line `cpu` with eight numbers", text))
}

fn parse(text: &str) -> Option<CpuTime> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let mut fields = line.split_whitespace().map(|field| field.parse().ok());
    let mut next = || fields.next().flatten().map(|ticks: u64| Duration::from_millis(ticks * TICK_MS));
    let (user, nice, system, idle) = (next()?, next()?, next()?, next()?);
    let (iowait, irq, softirq, steal) = (next()?, next()?, next()?, next()?);
    Some(CpuTime { user: user + nice, system, irq, softirq, steal, idle: idle + iowait, wall: Duration::ZERO })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_the_total_line() {
        let ms = Duration::from_millis;
        let expected = CpuTime {
            user: ms(30),
            system: ms(30),
            irq: ms(60),
            softirq: ms(70),
            steal: ms(80),
            idle: ms(90),
            wall: ms(0),
        };
        assert_eq!(parse("cpu  1 2 3 4 5 6 7 8 0 0\ncpu0 1 1 1 1 1 1 1 1 0 0\n"), Some(expected));
        assert_eq!(expected.busy(), ms(190));
        assert_eq!(parse("cpu  1 2\n"), None);
    }
}
