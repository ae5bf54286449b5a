//! The checksum of SCTP when ports change: CRC32c (RFC 9260 §6.8, appendix A), by the difference alone.
//!
//! A CRC is linear: the checksum of a changed packet is the old one, exclusive-or the CRC (without its initial and final
//! inversion) of the difference. That is 32 bits of ports followed by zeros up to the end, so it is the difference times
//! `x^(8 * length)` in `GF(2)[x]` modulo the polynomial: sixteen multiplications at most, and no walk over the payload.
//! Addresses are not covered.

use core::hint::black_box;

/// `x^(8 * 2^i)` modulo the polynomial, bits reflected, for `i` from 0 to 15.
const POWERS: [u32; 16] = powers();

/// CRC32c polynomial, bits reflected.
const POLYNOMIAL: u32 = 0x82f6_3b78;

/// Product of two polynomials modulo the polynomial, all bits reflected: the top bit is `x^0`.
#[inline(always)]
const fn multiply(a: u32, b: u32) -> u32 {
    let (mut a, mut product, mut bit) = (a, 0, 0);
    while bit < 32 {
        // Masks in place of branches, and hidden from the compiler, which would make branches of them: the verifier is
        // to walk one path.
        product ^= a & 0_u32.wrapping_sub(black_box((b >> (31 - bit)) & 1));
        a = (a >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(black_box(a & 1)));
        bit += 1;
    }
    product
}

const fn powers() -> [u32; 16] {
    // x^8: the top bit is x^0, so x^8 is eight places below it.
    let mut power = 1 << 23;
    let mut all = [0; 16];
    let mut i = 0;
    while i < 16 {
        all[i] = power;
        power = multiply(power, power);
        i += 1;
    }
    all
}

/// The checksum field, in memory order, of a packet of `length` bytes (from the SCTP header to its end) whose first four
/// bytes changed by `difference` (old exclusive-or new, in memory order).
///
/// A field of 0 is left: the device computes it (`CHECKSUM_PARTIAL`). A finished checksum of 0 is one in four thousand
/// millions and is then wrong once.
#[inline(always)]
pub fn checksum(field: u32, difference: u32, length: u16) -> u32 {
    if field == 0 {
        return 0;
    }
    let mut shifted = u32::from_le(difference);
    let mut i = 0;
    while i < 16 {
        let mask = 0_u32.wrapping_sub(black_box(u32::from(length >> i) & 1));
        let times = (POWERS[i] & mask) | (0x8000_0000 & !mask);
        shifted = multiply(shifted, times);
        i += 1;
    }
    // The checksum lies in the packet least significant byte first.
    field ^ shifted.to_le()
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::vec::Vec;

    use proptest::prelude::*;

    use super::*;

    /// RFC 9260 appendix A, bit by bit.
    fn crc32c(bytes: &[u8]) -> u32 {
        let mut crc = u32::MAX;
        for byte in bytes {
            crc ^= u32::from(*byte);
            for _ in 0..8 {
                crc = (crc >> 1) ^ (POLYNOMIAL & 0_u32.wrapping_sub(crc & 1));
            }
        }
        !crc
    }

    #[test]
    fn the_check_value_of_the_polynomial() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }

    proptest! {
        /// The updated field is the recomputed one, whatever the packet and its length.
        #[test]
        fn follows_the_ports(mut packet in proptest::collection::vec(any::<u8>(), 12..1500), ports in any::<[u8; 4]>()) {
            let sum = |packet: &[u8]| {
                let mut zeroed: Vec<u8> = packet.to_vec();
                zeroed[8..12].fill(0);
                crc32c(&zeroed).to_le_bytes()
            };
            let word = |bytes: &[u8]| u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let before = sum(&packet);
            let difference = word(&packet[..4]) ^ word(&ports);
            packet[..4].copy_from_slice(&ports);
            let length = u16::try_from(packet.len()).unwrap();
            prop_assert_eq!(checksum(word(&before), difference, length).to_ne_bytes(), sum(&packet));
        }
    }

    #[test]
    fn an_offloaded_checksum_stays_zero() {
        assert_eq!(checksum(0, 0x1234_5678, 64), 0);
    }
}
