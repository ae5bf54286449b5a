//! The Internet checksum (RFC 1071), made and verified over whole packets.

use std::fmt;
use std::net::IpAddr;

use super::parse::{ParseError, Raw, RawIp};
use super::proto;

/// A sum of 16-bit words in network order, not yet folded.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Sum(u64);

impl Sum {
    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self::default().add(bytes)
    }

    /// Adds bytes that begin at an even offset; an odd last byte is padded.
    pub(crate) fn add(self, bytes: &[u8]) -> Self {
        let words = bytes.chunks(2).map(|word| u64::from(word[0]) << 8 | word.get(1).map_or(0, |&low| u64::from(low)));
        Self(self.0 + words.sum::<u64>())
    }
}

/// The checksum: the complement of the folded sum.
pub(crate) fn fold(sum: Sum) -> u16 {
    let mut sum = sum.0;
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(!sum & 0xffff).unwrap_or_default()
}

/// Sum of the pseudo header of TCP, UDP and ICMPv6 (RFC 9293 §3.1, RFC 8200 §8.1).
pub(crate) fn pseudo_header(src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> Sum {
    let len = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
    let sum = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => Sum::of(&src.octets()).add(&dst.octets()),
        (src, dst) => [src, dst].iter().fold(Sum::default(), |sum, ip| match ip {
            IpAddr::V4(ip) => sum.add(&ip.to_ipv6_mapped().octets()),
            IpAddr::V6(ip) => sum.add(&ip.octets()),
        }),
    };
    sum.add(&len).add(&[0, proto])
}

/// What a frame's right checksums are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Checksums {
    /// It has an IPv4 header, whose checksum is right.
    pub ipv4_header: bool,
    /// The checksum of the payload.
    pub l4: L4Sum,
}

/// Checksum of a payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum L4Sum {
    /// It is right.
    Right,
    /// UDP over IPv4 without one.
    Absent,
    /// It cannot be told: a fragment, a protocol without one, or not IP.
    Unknown,
}

/// A wrong checksum, or a frame that cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ChecksumError {
    /// Not whole.
    #[error(transparent)]
    Parse(#[from] ParseError),
    /// A checksum does not fit what it covers.
    #[error("{part} checksum is {got:#06x}, must be {expected:#06x}")]
    Wrong {
        /// Whose.
        part: Part,
        /// As it is.
        got: u16,
        /// As it must be.
        expected: u16,
    },
}

/// Whose checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// IPv4 header.
    Ipv4,
    /// TCP segment.
    Tcp,
    /// UDP datagram.
    Udp,
    /// ICMP or ICMPv6 message.
    Icmp,
    /// IPv4 header inside an ICMP error.
    InnerIpv4,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4 header",
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Icmp => "ICMP",
            Self::InnerIpv4 => "inner IPv4 header",
        })
    }
}

/// Verifies every checksum of a frame: IPv4 header, TCP, UDP, ICMP, and the IPv4 header that an ICMP error quotes.
/// The payload that it quotes is not checked: the kernel quotes packets whose checksum was still to be made.
///
/// # Errors
/// The first wrong checksum, or what is missing of the frame.
pub fn verify_checksums(frame: &[u8]) -> Result<Checksums, ChecksumError> {
    let Some(ip) = Raw::read(frame)?.ip()? else { return Ok(Checksums { ipv4_header: false, l4: L4Sum::Unknown }) };
    let ipv4_header = verify_header(&ip, Part::Ipv4)?;
    let l4 = if ip.fragment.is_some() { L4Sum::Unknown } else { verify_l4(&ip)? };
    Ok(Checksums { ipv4_header, l4 })
}

/// `false` when the packet has no header checksum, being IPv6.
fn verify_header(ip: &RawIp<'_>, part: Part) -> Result<bool, ChecksumError> {
    if ip.src.is_ipv4() {
        compare(part, Sum::default(), ip.header, 10)?;
    }
    Ok(ip.src.is_ipv4())
}

fn verify_l4(ip: &RawIp<'_>) -> Result<L4Sum, ChecksumError> {
    let pseudo = pseudo_header(ip.src, ip.dst, ip.proto, ip.payload.len());
    match ip.proto {
        proto::TCP => compare(Part::Tcp, pseudo, ip.payload, 16)?,
        proto::UDP => {
            if ip.src.is_ipv4() && ip.payload.get(6..8) == Some(&[0, 0]) {
                return Ok(L4Sum::Absent);
            }
            compare(Part::Udp, pseudo, ip.payload, 6)?;
        }
        proto::ICMP if ip.src.is_ipv4() => {
            compare(Part::Icmp, Sum::default(), ip.payload, 2)?;
            verify_quoted(ip.payload, &[3, 4, 5, 11, 12])?;
        }
        proto::ICMPV6 if ip.src.is_ipv6() => {
            compare(Part::Icmp, pseudo, ip.payload, 2)?;
            verify_quoted(ip.payload, &[1, 2, 3, 4])?;
        }
        _ => return Ok(L4Sum::Unknown),
    }
    Ok(L4Sum::Right)
}

fn verify_quoted(icmp: &[u8], errors: &[u8]) -> Result<(), ChecksumError> {
    if icmp.first().is_some_and(|kind| errors.contains(kind)) {
        let inner = RawIp::read_quoted(icmp.get(8..).unwrap_or_default())?;
        verify_header(&inner, Part::InnerIpv4)?;
    }
    Ok(())
}

/// Compares the checksum at `at` of `bytes` with the one they should have.
fn compare(part: Part, sum: Sum, bytes: &[u8], at: usize) -> Result<(), ChecksumError> {
    let field = bytes.get(at..at + 2).ok_or(ParseError::Short)?;
    let got = u16::from_be_bytes([field[0], field[1]]);
    let expected = match fold(sum.add(&bytes[..at]).add(&bytes[at + 2..])) {
        0 if part == Part::Udp => 0xffff,
        expected => expected,
    };
    if got == expected { Ok(()) } else { Err(ChecksumError::Wrong { part, got, expected }) }
}
