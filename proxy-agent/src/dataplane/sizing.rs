//! How large the flow tables are, and what that costs.
//!
//! ```text
//!   memory       256 MiB     1 GiB     8 GiB    16 GiB    64 GiB     256 GiB
//!   flow_live      8,192    32,768   262,144   262,144   1,048,576   4,194,304     one entry for each 64 KiB; below 16 GiB
//!   flow_brief     2,048     8,192    65,536    65,536     262,144   1,048,576     one for each 32 KiB; brief: a quarter
//! ```
//!
//! Never less than 256, never more than 16,777,216, and a power of two, because the buckets are: the next below memory and
//! an eighth, for a machine of 8 GiB says that it has less. Full, both together take less than 1.2 % of the memory: 272
//! bytes for each entry of the first, 240 for each of the second. The second, which is evictable, is allocated at once;
//! the first as flows come, but for its buckets (16 bytes each).
//!
//! Memory is that of the node, or twice the limit of the agent's own cgroup where that is less: the kernel charges maps
//! to whoever made them.

use std::fs;

use aya::maps::MapType;
use proxy_abi::capacity;

use super::map::Layout;

/// Entries of both flow tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entries {
    /// Of `flow_live`.
    pub live: u32,
    /// Of `flow_brief`.
    pub brief: u32,
}

/// The fewest and the most that are made.
pub const FEWEST: u32 = 256;
/// See [`FEWEST`].
pub const MOST: u32 = 16_777_216;

impl Entries {
    /// For a node with so many bytes of memory.
    pub fn for_memory(bytes: u64) -> Self {
        let bytes = bytes.saturating_add(bytes / 8);
        let of = |unit: u64| {
            let most = (bytes / unit).clamp(FEWEST.into(), MOST.into());
            1_u32 << most.ilog2()
        };
        let live = of(64 << 10).max(of(32 << 10).min(capacity::FLOW_LIVE));
        Self { live, brief: (live / 4).max(FEWEST) }
    }
}

/// Bytes of memory that count here: see above. `None` where the system does not tell.
pub fn memory() -> Option<u64> {
    let node = total(&fs::read_to_string("/proc/meminfo").ok()?)?;
    let limit = limit().map_or(u64::MAX, |limit| limit.saturating_mul(2));
    Some(node.min(limit))
}

fn total(meminfo: &str) -> Option<u64> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

/// Limit of the agent's own cgroup: as a container sees it, and by its path from the root of the hierarchy.
fn limit() -> Option<u64> {
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let paths = own.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let (controllers, path) = (parts.next()?, parts.next()?);
        match controllers {
            "" => Some(format!("/sys/fs/cgroup{path}/memory.max")),
            _ if controllers.split(',').any(|name| name == "memory") => {
                Some(format!("/sys/fs/cgroup/memory{path}/memory.limit_in_bytes"))
            }
            _ => None,
        }
    });
    let seen = ["/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"].map(str::to_owned);
    // "max" is no number, and the older hierarchy says "none" with a very large one.
    paths.chain(seen).filter_map(|path| fs::read_to_string(path).ok()?.trim().parse().ok()).min()
}

/// Bytes that a map takes when it is full. `None` for types that are not sized here.
pub fn bytes_when_full(layout: &Layout, capacity: u32) -> Option<u64> {
    let round = |bytes: u32| u64::from(bytes).next_multiple_of(8);
    let capacity = u64::from(capacity);
    // `struct htab_elem` and `struct bucket` of the kernel's hash tables.
    let (element, bucket) = (48 + round(layout.key) + round(layout.value), 16);
    match layout.kind {
        // Entries of their own, of the sizes that the allocator has, with its own 8 bytes before them.
        MapType::Hash => Some(capacity * slab(element + 8) + capacity.next_power_of_two() * bucket),
        MapType::LruHash => Some(capacity * element + capacity.next_power_of_two() * bucket),
        MapType::Array => Some(capacity * round(layout.value)),
        _ => None,
    }
}

fn slab(bytes: u64) -> u64 {
    match bytes {
        65..=96 => 96,
        129..=192 => 192,
        other => other.next_power_of_two(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::pins::LAYOUTS;
    use super::*;

    #[test]
    fn entries_follow_from_memory() {
        let (mib, gib) = (1_u64 << 20, 1_u64 << 30);
        let table = [
            (0, (256, 256)),
            (mib, (256, 256)),
            (256 * mib, (8_192, 2_048)),
            (gib, (32_768, 8_192)),
            (8 * gib - gib / 8, (capacity::FLOW_LIVE, capacity::FLOW_BRIEF)),
            (16 * gib, (capacity::FLOW_LIVE, capacity::FLOW_BRIEF)),
            (32 * gib - gib, (524_288, 131_072)),
            (256 * gib, (4_194_304, 1_048_576)),
            (u64::MAX, (MOST, MOST / 4)),
        ];
        let found = table.map(|(bytes, _)| (bytes, Entries::for_memory(bytes)));
        assert_eq!(found, table.map(|(bytes, (live, brief))| (bytes, Entries { live, brief })));
    }

    #[test]
    fn full_tables_take_less_than_they_may() {
        let flows = |name: &str| LAYOUTS.into_iter().find(|layout| layout.name == name).expect("a flow table");
        for memory in (28..46).flat_map(|power| [1_u64 << power, 3_u64 << (power - 1)]) {
            let entries = Entries::for_memory(memory);
            let live = bytes_when_full(&flows(proxy_abi::map::FLOW_LIVE), entries.live).expect("a hash table");
            let brief = bytes_when_full(&flows(proxy_abi::map::FLOW_BRIEF), entries.brief).expect("a hash table");
            assert!((live + brief) * 1000 < memory * 12, "{live} + {brief} of {memory}");
        }
    }

    #[test]
    fn memory_is_read_from_the_kernels_words() {
        assert_eq!(total("MemTotal:       16384 kB\nMemFree:  1 kB\n"), Some(16 << 20));
        assert_eq!(total("MemFree: 1 kB\n"), None);
        assert!(memory().is_some_and(|bytes| bytes > 1 << 20));
    }
}
