//! Addresses, ports and protocols in network byte order. Byte order is converted here and nowhere else.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::{FAMILY_IPV4, FAMILY_IPV6};

/// An address of either family, 16 bytes in network order; IPv4 as `::ffff:a.b.c.d` (RFC 4291 §2.5.5.2).
///
/// Kept as four 32-bit words because every packet field is at least 4-byte aligned there and the verifier then sees
/// aligned accesses on the stack.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IpBytes(pub [u32; 4]);

#[cfg(feature = "user")]
// SAFETY: four integers, no padding.
unsafe impl aya::Pod for IpBytes {}

impl IpBytes {
    /// `0.0.0.0` and `::` alike: stands for every address of the node in a NodePort's key.
    pub const UNSPECIFIED: Self = Self([0; 4]);
    /// Third word of an IPv4-mapped address.
    pub const V4_PREFIX: u32 = u32::from_be(0xffff);

    /// From the four bytes of an IPv4 header field, read as one word in memory order.
    #[inline(always)]
    pub const fn from_v4_word(word: u32) -> Self {
        Self([0, 0, Self::V4_PREFIX, word])
    }

    /// The IPv4 address as one word in memory order; meaningful only for an IPv4-mapped address.
    #[inline(always)]
    pub const fn v4_word(self) -> u32 {
        self.0[3]
    }

    /// Is this an IPv4-mapped address?
    #[inline(always)]
    pub const fn is_v4(self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == Self::V4_PREFIX
    }

    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    #[inline(always)]
    pub const fn family(self) -> u8 {
        if self.is_v4() { FAMILY_IPV4 } else { FAMILY_IPV6 }
    }

    /// Both halves as numbers, for comparisons: they have no meaning beyond being equal or not, or before or after.
    #[inline(always)]
    pub const fn halves(self) -> (u64, u64) {
        let [a, b, c, d] = self.0;
        ((a as u64) << 32 | b as u64, (c as u64) << 32 | d as u64)
    }
}

impl From<Ipv4Addr> for IpBytes {
    fn from(ip: Ipv4Addr) -> Self {
        Self::from_v4_word(u32::from_ne_bytes(ip.octets()))
    }
}

impl From<Ipv6Addr> for IpBytes {
    fn from(ip: Ipv6Addr) -> Self {
        let o = ip.octets();
        let word = |i: usize| u32::from_ne_bytes([o[i], o[i + 1], o[i + 2], o[i + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl From<IpAddr> for IpBytes {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(ip) => ip.into(),
            IpAddr::V6(ip) => ip.into(),
        }
    }
}

impl From<IpBytes> for IpAddr {
    fn from(ip: IpBytes) -> Self {
        if ip.is_v4() {
            return Self::V4(Ipv4Addr::from(ip.0[3].to_ne_bytes()));
        }
        let mut octets = [0; 16];
        for (chunk, word) in octets.chunks_exact_mut(4).zip(ip.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        Self::V6(Ipv6Addr::from(octets))
    }
}

impl core::fmt::Display for IpBytes {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        IpAddr::from(*self).fmt(f)
    }
}

/// A transport port (or an ICMP identifier) in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortBe(pub u16);

impl PortBe {
    /// From a number.
    #[inline(always)]
    pub const fn new(port: u16) -> Self {
        Self(port.to_be())
    }

    /// As a number.
    #[inline(always)]
    pub const fn get(self) -> u16 {
        u16::from_be(self.0)
    }
}

impl core::fmt::Display for PortBe {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.get().fmt(f)
    }
}

/// An IP protocol number (IANA), as in the IPv4 protocol and the IPv6 next header field.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Proto(pub u8);

impl Proto {
    /// ICMP for IPv4.
    pub const ICMP: Self = Self(1);
    /// Transmission Control Protocol.
    pub const TCP: Self = Self(6);
    /// User Datagram Protocol.
    pub const UDP: Self = Self(17);
    /// ICMP for IPv6.
    pub const ICMPV6: Self = Self(58);
    /// Stream Control Transmission Protocol.
    pub const SCTP: Self = Self(132);
}

impl core::fmt::Display for Proto {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match *self {
            Self::ICMP => f.write_str("ICMP"),
            Self::TCP => f.write_str("TCP"),
            Self::UDP => f.write_str("UDP"),
            Self::ICMPV6 => f.write_str("ICMPv6"),
            Self::SCTP => f.write_str("SCTP"),
            Self(n) => write!(f, "proto-{n}"),
        }
    }
}

/// An Ethernet address.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacBytes(pub [u8; 6]);

impl core::fmt::Display for MacBytes {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        for (i, byte) in self.0.iter().enumerate() {
            write!(f, "{}{byte:02x}", if i == 0 { "" } else { ":" })?;
        }
        Ok(())
    }
}
