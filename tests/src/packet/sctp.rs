//! SCTP packets (RFC 9260), without a kernel that speaks it.

use super::{L4, proto};

/// Bytes of the common header.
const HEADER: usize = 12;

/// An SCTP packet with one chunk.
///
/// ```text
///   0        16       32       64        96
///   src port dst port | tag    | CRC32c  | chunk …
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Sctp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Verification tag; 0 in an INIT.
    pub tag: u32,
    /// With its CRC, or with 0, as it is when a device is to add it.
    pub checksum: bool,
    /// A chunk, padded to four bytes.
    pub chunk: Vec<u8>,
}

impl From<Sctp> for L4 {
    fn from(packet: Sctp) -> Self {
        let mut bytes = [packet.src.to_be_bytes(), packet.dst.to_be_bytes()].concat();
        bytes.extend(packet.tag.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(packet.chunk);
        if packet.checksum {
            // The one little-endian number of the Internet: RFC 9260 appendix A.
            let sum = crc32c(&bytes).to_le_bytes();
            bytes[8..HEADER].copy_from_slice(&sum);
        }
        Self::Other { proto: proto::SCTP, bytes }
    }
}

impl Sctp {
    /// Reads the bytes of a packet from its common header on; `None` where its CRC is wrong.
    pub fn read(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let (ports, tag) = (word(0)?.to_be_bytes(), word(4)?);
        let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
        let packet = Self { src: port(0), dst: port(2), tag, checksum: true, chunk: bytes.get(HEADER..)?.to_vec() };
        let sent = bytes.get(8..HEADER)?;
        let zeroed = [&bytes[..8], &[0; 4], &bytes[HEADER..]].concat();
        (crc32c(&zeroed).to_le_bytes() == sent).then_some(packet)
    }
}

/// CRC32c, RFC 9260 appendix A.
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0x82f6_3b78 & 0_u32.wrapping_sub(crc & 1)))
    };
    !bytes.iter().fold(u32::MAX, step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crc_of_the_standard_and_of_a_changed_byte() {
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
        let packet = Sctp { src: 1, dst: 2, tag: 3, checksum: true, chunk: vec![10, 0, 0, 4] };
        let L4::Other { mut bytes, .. } = L4::from(packet.clone()) else { panic!("another protocol") };
        assert_eq!(Sctp::read(&bytes), Some(packet));
        bytes[3] ^= 1;
        assert_eq!(Sctp::read(&bytes), None);
    }
}
