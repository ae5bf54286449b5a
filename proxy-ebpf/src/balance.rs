//! The choice of a backend and of a source port.

use proxy_abi::PortBe;

/// How many backends are tried when one is gone or another flow stands in the way.
pub const BACKEND_TRIES: u32 = 3;
/// How many source ports are tried after that: where half of the ports cannot be taken over, one in 16 million
/// connections finds none.
pub const PORT_TRIES: u32 = 24;

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

/// First port of masqueraded flows.
pub const MASQUERADE_FIRST: u16 = 1024;
/// One past the last.
pub const MASQUERADE_END: u16 = 32_768;

/// A source port for a flow whose source becomes an address of the node, by a random number: 1,024 to 32,767. Below the
/// kernel's ephemeral ports (`net.ipv4.ip_local_port_range`, 32,768 to 60,999), so that no socket of the node chooses
/// the same one for the same peer. Ports that node processes listen on do no harm: the peer of a masqueraded flow answers
/// from the backend's port, from which nobody connects.
#[inline(always)]
pub const fn masquerade_port(random: u32) -> PortBe {
    let range = (MASQUERADE_END - MASQUERADE_FIRST) as u64;
    PortBe::new(MASQUERADE_FIRST + ((random as u64 * range) >> 32) as u16)
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
        assert_eq!(masquerade_port(0).get(), MASQUERADE_FIRST);
        assert_eq!(masquerade_port(u32::MAX).get(), MASQUERADE_END - 1);
    }
}
