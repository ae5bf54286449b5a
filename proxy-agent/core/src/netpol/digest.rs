//! Digests by which a restarted agent finds its own numbers in the maps again.

use std::fmt::{Debug, Write};

/// FNV-1a with 128 bits (offset basis and prime of draft-eastlake-fnv) over the debug form of a value: not secret, the
/// same in every process, and different for different values as far as 128 bits go.
pub fn of(value: &impl Debug) -> [u64; 2] {
    let mut hash = Fnv(0x6c62_272e_07bb_0142_62b8_2175_6295_c58d);
    // The writer below does not fail.
    let _infallible = write!(hash, "{value:?}");
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    [(hash.0 >> 64) as u64, hash.0 as u64]
}

struct Fnv(u128);

impl Write for Fnv {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        for byte in text.bytes() {
            self.0 = (self.0 ^ u128::from(byte)).wrapping_mul(0x0000_0000_0100_0000_0000_0000_0000_013b);
        }
        Ok(())
    }
}
