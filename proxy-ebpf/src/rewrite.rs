//! What a translation changes in a packet, and by how much the checksums move.
//!
//! The header checksum of IPv4 is written by the program (RFC 1624). The transport checksum is left to the kernel's
//! helper, which knows whether the device computes it: it gets the difference as a 32-bit one's complement sum.

use proxy_abi::{IpBytes, PortBe, Tuple};

/// A 32-bit one's complement sum that turns the checksum over `old` into one over `new`.
#[inline(always)]
pub const fn address_difference(old: &IpBytes, new: &IpBytes) -> u32 {
    // Words that stay add ~w + w = 0xffff_ffff, which is zero in one's complement.
    let mut sum: u64 = 0;
    let mut i = 0;
    while i < 4 {
        sum += (!old.0[i]) as u64 + new.0[i] as u64;
        i += 1;
    }
    fold32(sum)
}

/// Difference of both addresses of a packet.
#[inline(always)]
pub const fn difference(old: &Tuple, new: &Tuple) -> u32 {
    let src = address_difference(&old.src, &new.src);
    let dst = address_difference(&old.dst, &new.dst);
    fold32(src as u64 + dst as u64)
}

/// The header checksum after a change by `difference`: RFC 1624 equation 3, `HC' = ~(~HC + ~m + m')`. Memory order in,
/// memory order out: the sum does not depend on byte order (RFC 1071 §2 B).
#[inline(always)]
pub const fn header_checksum(old: u16, difference: u32) -> u16 {
    let mut sum = (!old) as u32 + (difference & 0xffff) + (difference >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    !(sum as u16)
}

/// Both ports as they lie in TCP, UDP and SCTP headers: one word in memory order.
#[inline(always)]
pub const fn ports_word(src: PortBe, dst: PortBe) -> u32 {
    let (s, d) = (src.0.to_ne_bytes(), dst.0.to_ne_bytes());
    u32::from_ne_bytes([s[0], s[1], d[0], d[1]])
}

/// A sum of one's complement, brought to 32 bits.
#[inline(always)]
pub const fn fold32(mut sum: u64) -> u32 {
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum = (sum & 0xffff_ffff) + (sum >> 32);
    sum as u32
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// RFC 1071: the whole sum, the slow way.
    fn full(bytes: &[u8]) -> u16 {
        let mut sum: u32 = bytes.chunks(2).map(|c| u32::from(u16::from_ne_bytes([c[0], c[1]]))).sum();
        while sum > 0xffff {
            sum = (sum & 0xffff) + (sum >> 16);
        }
        !(sum as u16)
    }

    proptest! {
        /// An updated checksum is as good as a recomputed one. 0 and 0xffff are the same number (RFC 1624 §4).
        #[test]
        fn header_checksum_follows(
            mut header in proptest::collection::vec(any::<u8>(), 20),
            src in any::<[u8; 4]>(),
            dst in any::<[u8; 4]>(),
        ) {
            header[10..12].fill(0);
            let before = full(&header);
            let ip = |b: &[u8]| IpBytes::from_v4_word(u32::from_ne_bytes([b[0], b[1], b[2], b[3]]));
            let old = Tuple { src: ip(&header[12..16]), dst: ip(&header[16..20]), ..Tuple::ZERO };
            let new = Tuple { src: ip(&src), dst: ip(&dst), ..Tuple::ZERO };
            header[12..16].copy_from_slice(&src);
            header[16..20].copy_from_slice(&dst);
            let after = header_checksum(before, difference(&old, &new));
            prop_assert_eq!(after % 0xffff, full(&header) % 0xffff);
        }

        /// The same over the sixteen bytes of IPv6 addresses.
        #[test]
        fn difference_follows(old in any::<[[u32; 4]; 2]>(), new in any::<[[u32; 4]; 2]>()) {
            let tuple = |w: [[u32; 4]; 2]| Tuple { src: IpBytes(w[0]), dst: IpBytes(w[1]), ..Tuple::ZERO };
            let bytes = |w: [[u32; 4]; 2]| w.concat().iter().flat_map(|w| w.to_ne_bytes()).collect::<Vec<u8>>();
            let after = header_checksum(full(&bytes(old)), difference(&tuple(old), &tuple(new)));
            prop_assert_eq!(after % 0xffff, full(&bytes(new)) % 0xffff);
        }
    }

    #[test]
    fn ports_lie_in_memory_order() {
        assert_eq!(ports_word(PortBe::new(0x1234), PortBe::new(80)).to_ne_bytes(), [0x12, 0x34, 0, 80]);
    }
}
