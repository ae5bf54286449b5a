//! The choice of a backend and of a source port.

use proxy_abi::PortBe;

/// How many backends are tried when one is gone or another flow stands in the way.
pub const BACKEND_TRIES: u32 = 3;
/// How many source ports are tried after that.
pub const PORT_TRIES: u32 = 5;

/// A slot of a range of `count` slots, uniformly by a 32-bit random number; `None` for an empty range.
///
/// Multiply and shift (Lemire, "Fast Random Integer Generation in an Interval", 2019) instead of a division: for
/// ranges of up to 1,000 slots the bias is below one in four million.
#[inline(always)]
pub const fn pick(random: u32, count: u32) -> Option<u32> {
    if count == 0 {
        return None;
    }
    Some(((random as u64 * count as u64) >> 32) as u32)
}

/// A source port between 1,024 and 65,535 by a random number: for a flow that cannot keep its own.
#[inline(always)]
pub const fn source_port(random: u32) -> PortBe {
    PortBe::new(1024 + ((random as u64 * 64_512) >> 32) as u16)
}

#[cfg(test)]
mod tests {
    extern crate std;

    use super::*;

    #[test]
    fn every_slot_is_picked_about_equally() {
        for count in [1_u32, 2, 3, 7, 1000] {
            let mut hits = std::vec![0_u32; count as usize];
            let rounds = 65_536_u32;
            for i in 0..rounds {
                hits[pick(i << 16, count).unwrap() as usize] += 1;
            }
            let (least, most) = (hits.iter().min().unwrap(), hits.iter().max().unwrap());
            assert!(most - least <= 1, "{count}: {least}..{most}");
        }
        assert_eq!(pick(7, 0), None);
        assert_eq!(pick(u32::MAX, 3), Some(2));
    }

    #[test]
    fn source_ports_stay_in_their_range() {
        assert_eq!(source_port(0).get(), 1024);
        assert_eq!(source_port(u32::MAX).get(), 65_535);
    }
}
