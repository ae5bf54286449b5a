//! Ethernet, IPv4, IPv6 and the first bytes of TCP and UDP: what the programs need to know of a packet.
//!
//! ```text
//!   Ethernet II          IPv4 (RFC 791 §3.1)                 IPv6 (RFC 8200 §3)
//!   0  destination  6    0 ver|ihl 1   8 ttl      1          0 ver|class|flow 4
//!   6  source       6    1 tos     1   9 protocol 1          4 payload length 2
//!   12 type         2    2 length  2  10 checksum 2          6 next header    1
//!                        4 id      2  12 source   4          7 hop limit      1
//!                        6 frag    2  16 dest.    4          8 source        16
//!                                                           24 destination   16
//! ```

use proxy_abi::{FAMILY_IPV4, FAMILY_IPV6, IpBytes, PortBe, Proto, Reason, Tuple};

/// A packet from its Ethernet header on. Numbers come in memory order; `None` past its end, and for the very last byte
/// alone: the verifier cannot follow a comparison with the last byte, and no field of ours is there.
pub trait Packet {
    /// One byte.
    fn byte(&self, offset: usize) -> Option<u8>;
    /// Two bytes.
    fn half(&self, offset: usize) -> Option<u16>;
    /// Four bytes.
    fn word(&self, offset: usize) -> Option<u32>;

    /// The same number. In the kernel it passes through memory of which the verifier tracks no values, so that the paths
    /// that led to different numbers are walked as one from there on.
    fn forget(&self, number: u32) -> u32 {
        number
    }

    /// [`walk`], which in the kernel is a function that the verifier looks at once, for all its callers.
    fn extensions(&self, first: u8) -> Option<Extensions> {
        walk(self, first)
    }
}

impl Packet for [u8] {
    fn byte(&self, offset: usize) -> Option<u8> {
        self.get(offset + 1)?;
        self.get(offset).copied()
    }

    fn half(&self, offset: usize) -> Option<u16> {
        Some(u16::from_ne_bytes(self.get(offset..offset.checked_add(2)?)?.try_into().ok()?))
    }

    fn word(&self, offset: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(self.get(offset..offset.checked_add(4)?)?.try_into().ok()?))
    }
}

/// Length of an Ethernet header without VLAN tag: the kernel keeps tags outside of the packet.
pub const ETH_LEN: usize = 14;

/// TCP flags (RFC 9293 §3.1), as in byte 13 of the header.
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 1;
    /// Synchronise.
    pub const SYN: u8 = 2;
    /// Reset.
    pub const RST: u8 = 4;
    /// Acknowledgment is significant.
    pub const ACK: u8 = 16;
}

/// Part of a fragmented packet: a number, so that any bit pattern is one (see [`Packet::forget`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment(pub u8);

impl Fragment {
    /// Not fragmented.
    pub const WHOLE: Self = Self(0);
    /// The first fragment: has the ports.
    pub const FIRST: Self = Self(1);
    /// A later one: has no ports.
    pub const LATER: Self = Self(2);
}

/// What was found in a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parsed {
    /// Addresses and ports; ports are 0 in a later fragment.
    pub tuple: Tuple,
    /// Identification of a fragmented packet, in memory order.
    pub fragment_id: u32,
    /// Offset of the transport header.
    pub l4: u16,
    /// Transport protocol.
    pub proto: Proto,
    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    pub family: u8,
    /// TCP flags; the type of an ICMP error; 0 for other protocols and later fragments.
    pub tcp_flags: u8,
    /// Fragmentation.
    pub fragment: Fragment,
}

/// What the network header says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Source.
    pub src: IpBytes,
    /// Destination.
    pub dst: IpBytes,
    /// Protocol of what follows.
    pub proto: u8,
    /// Offset of what follows.
    pub l4: usize,
    /// Fragmentation.
    pub fragment: Fragment,
    /// Identification of a fragmented packet, in memory order.
    pub fragment_id: u32,
}

mod sealed {
    /// Closes [`super::Family`]: there are two and there will be no third.
    pub trait Sealed {}
}

/// IPv4 or IPv6: what differs between them, so that everything else is written once.
pub trait Family: sealed::Sealed {
    /// EtherType, in memory order.
    const ETHERTYPE: u16;
    /// [`FAMILY_IPV4`] or [`FAMILY_IPV6`].
    const FAMILY: u8;
    /// Offset of the source address from the Ethernet header.
    const SRC: usize;
    /// Offset of the destination address from the Ethernet header.
    const DST: usize;
    /// Offset of the header checksum, where there is one.
    const HEADER_CHECKSUM: Option<usize>;
    /// ICMP of this family.
    const ICMP: Proto;

    /// Type of an echo request; that of its answer is [`Family::ECHO_REPLY`].
    const ECHO: u8;
    /// Type of an echo reply.
    const ECHO_REPLY: u8;

    /// Does an ICMP message of this type quote the packet that it is about?
    fn quotes(icmp_type: u8) -> bool;

    /// Reads the network header of a quoted packet, which begins at `at`.
    fn parse_quoted<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Header>;

    /// Offset of the packet's end as its network header has it; what follows in the frame is no part of it.
    fn end<P: Packet + ?Sized>(packet: &P) -> Option<usize>;

    /// Reads the network header. The ports follow in [`parse`].
    fn parse_header<P: Packet + ?Sized>(packet: &P) -> Result<Header, Reason>;
}

/// IPv4.
#[derive(Debug)]
pub struct V4;
/// IPv6.
#[derive(Debug)]
pub struct V6;

impl sealed::Sealed for V4 {}
impl sealed::Sealed for V6 {}

impl Family for V4 {
    const ETHERTYPE: u16 = 0x0800_u16.to_be();
    const FAMILY: u8 = FAMILY_IPV4;
    const SRC: usize = ETH_LEN + 12;
    const DST: usize = ETH_LEN + 16;
    const HEADER_CHECKSUM: Option<usize> = Some(ETH_LEN + 10);
    const ICMP: Proto = Proto::ICMP;
    const ECHO: u8 = 8;
    const ECHO_REPLY: u8 = 0;

    /// Unreachable, source quench, redirect, time exceeded, parameter problem (RFC 792; as the kernel's conntrack does).
    #[inline(always)]
    fn quotes(icmp_type: u8) -> bool {
        matches!(icmp_type, 3 | 4 | 5 | 11 | 12)
    }

    #[inline(always)]
    fn parse_quoted<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Header> {
        let version_ihl = packet.byte(at)?;
        let ihl = usize::from(version_ihl & 0x0f) * 4;
        if version_ihl >> 4 != 4 || ihl < 20 || u16::from_be(packet.half(at + 6)?) & 0x1fff != 0 {
            return None;
        }
        Some(Header {
            src: IpBytes::from_v4_word(packet.word(at + 12)?),
            dst: IpBytes::from_v4_word(packet.word(at + 16)?),
            proto: packet.byte(at + 9)?,
            l4: at + ihl,
            fragment: Fragment::WHOLE,
            fragment_id: 0,
        })
    }

    #[inline(always)]
    fn end<P: Packet + ?Sized>(packet: &P) -> Option<usize> {
        Some(ETH_LEN + usize::from(u16::from_be(packet.half(ETH_LEN + 2)?)))
    }

    #[inline(always)]
    fn parse_header<P: Packet + ?Sized>(packet: &P) -> Result<Header, Reason> {
        let version_ihl = packet.byte(ETH_LEN).ok_or(Reason::Unparsed)?;
        let ihl = usize::from(version_ihl & 0x0f) * 4;
        if version_ihl >> 4 != 4 || ihl < 20 {
            return Err(Reason::Unparsed);
        }
        let src = IpBytes::from_v4_word(packet.word(Self::SRC).ok_or(Reason::Unparsed)?);
        let dst = IpBytes::from_v4_word(packet.word(Self::DST).ok_or(Reason::Unparsed)?);
        let proto = packet.byte(ETH_LEN + 9).ok_or(Reason::Unparsed)?;
        // Flags and offset: bit 13 = more fragments, bits 12..0 = offset in 8-byte units.
        let frag = u16::from_be(packet.half(ETH_LEN + 6).ok_or(Reason::Unparsed)?);
        let fragment = match frag & 0x3fff {
            0 => Fragment::WHOLE,
            0x2000 => Fragment::FIRST,
            _ => Fragment::LATER,
        };
        let fragment_id = u32::from(packet.half(ETH_LEN + 4).ok_or(Reason::Unparsed)?);
        Ok(Header { src, dst, proto, l4: ETH_LEN + ihl, fragment, fragment_id })
    }
}

/// Where the headers of a plain TCP segment end: no IPv4 options, no extension headers. `None` for everything else, and
/// where the packet ends before it says so.
#[inline(always)]
pub fn segment_headers<F: Family, P: Packet + ?Sized>(packet: &P) -> Option<usize> {
    let (protocol, l4) = if F::HEADER_CHECKSUM.is_some() {
        // Version 4, five words.
        if packet.byte(ETH_LEN)? != 0x45 {
            return None;
        }
        (packet.byte(ETH_LEN + 9)?, ETH_LEN + 20)
    } else {
        (packet.byte(ETH_LEN + 6)?, V6_PAYLOAD)
    };
    if protocol != Proto::TCP.0 {
        return None;
    }
    // Data offset, in words: the upper half of byte 12 (RFC 9293 §3.1).
    Some(l4 + usize::from(packet.byte(l4 + 12)? >> 4) * 4)
}

/// Next header values of IPv6 that are headers themselves.
mod next_header {
    pub(super) const HOP_BY_HOP: u8 = 0;
    pub(super) const FRAGMENT: u8 = 44;
    pub(super) const AUTHENTICATION: u8 = 51;
    pub(super) const DESTINATION: u8 = 60;

    /// A routing header (43) is not walked: while segments are left, its destination is not the one in the header.
    #[inline(always)]
    pub(super) const fn is_extension(next: u8) -> bool {
        matches!(next, HOP_BY_HOP | FRAGMENT | AUTHENTICATION | DESTINATION)
    }
}

/// Does the network header lead to another header that is not followed, so that nobody knows what is behind it? Of IPv6:
/// extension headers beyond [`EXTENSION_HEADERS`], behind a fragment header, and those that are not walked (RFC 7045
/// §4: routing, mobility, HIP, shim6, experiments).
#[inline(always)]
pub const fn is_cut_short(family: u8, proto: u8) -> bool {
    family == FAMILY_IPV6 && (next_header::is_extension(proto) || matches!(proto, 43 | 135 | 139 | 140 | 253 | 254))
}

/// Offsets above this do not occur in a packet of at most 9,216 bytes of headers; the mask lets the verifier see it.
pub const OFFSET_MASK: usize = 0x3fff;

/// Extension headers that are walked before a packet counts as one that cannot be followed.
pub const EXTENSION_HEADERS: usize = 6;

impl Family for V6 {
    const ETHERTYPE: u16 = 0x86dd_u16.to_be();
    const FAMILY: u8 = FAMILY_IPV6;
    const SRC: usize = ETH_LEN + 8;
    const DST: usize = ETH_LEN + 24;
    const HEADER_CHECKSUM: Option<usize> = None;
    const ICMP: Proto = Proto::ICMPV6;
    const ECHO: u8 = 128;
    const ECHO_REPLY: u8 = 129;

    /// Error messages have the upper bit clear (RFC 4443 §2.1): unreachable, too big, time exceeded, parameter problem.
    #[inline(always)]
    fn quotes(icmp_type: u8) -> bool {
        matches!(icmp_type, 1..=4)
    }

    /// Of the extension headers only that of a first fragment is followed.
    #[inline(always)]
    fn parse_quoted<P: Packet + ?Sized>(packet: &P, at: usize) -> Option<Header> {
        if packet.byte(at)? >> 4 != 6 {
            return None;
        }
        let address =
            |at| Some(IpBytes([packet.word(at)?, packet.word(at + 4)?, packet.word(at + 8)?, packet.word(at + 12)?]));
        let (mut proto, mut l4) = (packet.byte(at + 6)?, at + 40);
        if proto == next_header::FRAGMENT {
            if u16::from_be(packet.half(l4 + 2)?) & 0xfff8 != 0 {
                return None;
            }
            proto = packet.byte(l4)?;
            l4 += 8;
        }
        let (src, dst) = (address(at + 8)?, address(at + 24)?);
        Some(Header { src, dst, proto, l4, fragment: Fragment::WHOLE, fragment_id: 0 })
    }

    #[inline(always)]
    fn end<P: Packet + ?Sized>(packet: &P) -> Option<usize> {
        Some(V6_PAYLOAD + usize::from(u16::from_be(packet.half(ETH_LEN + 4)?)))
    }

    #[inline(always)]
    fn parse_header<P: Packet + ?Sized>(packet: &P) -> Result<Header, Reason> {
        if packet.byte(ETH_LEN).ok_or(Reason::Unparsed)? >> 4 != 6 {
            return Err(Reason::Unparsed);
        }
        let word = |offset| packet.word(offset).ok_or(Reason::Unparsed);
        let src = IpBytes([word(Self::SRC)?, word(Self::SRC + 4)?, word(Self::SRC + 8)?, word(Self::SRC + 12)?]);
        let dst = IpBytes([word(Self::DST)?, word(Self::DST + 4)?, word(Self::DST + 8)?, word(Self::DST + 12)?]);
        let proto = packet.byte(ETH_LEN + 6).ok_or(Reason::Unparsed)?;
        let mut header = Header { src, dst, proto, l4: V6_PAYLOAD, fragment: Fragment::WHOLE, fragment_id: 0 };
        if next_header::is_extension(proto) {
            let end = packet.extensions(proto).ok_or(Reason::Unparsed)?;
            header.proto = end.proto;
            header.l4 = usize::from(end.l4) & OFFSET_MASK;
            header.fragment = end.fragment;
            header.fragment_id = end.fragment_id;
        }
        Ok(header)
    }
}

/// Offset of what follows an IPv6 header.
const V6_PAYLOAD: usize = ETH_LEN + 40;

/// What the extension headers of an IPv6 packet lead to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extensions {
    /// Identification of a fragmented packet, in memory order.
    pub fragment_id: u32,
    /// Offset of what follows them.
    pub l4: u16,
    /// What that is.
    pub proto: u8,
    /// Fragmentation.
    pub fragment: Fragment,
}

impl Extensions {
    /// As one number: all that a function in the kernel can return.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        (self.fragment_id as u64) << 32 | (self.l4 as u64) << 16 | (self.proto as u64) << 8 | self.fragment.0 as u64
    }

    /// From that number.
    #[inline(always)]
    pub const fn unpack(packed: u64) -> Self {
        Self {
            fragment_id: (packed >> 32) as u32,
            l4: (packed >> 16) as u16,
            proto: (packed >> 8) as u8,
            fragment: Fragment(packed as u8),
        }
    }
}

/// Follows the extension headers of an IPv6 packet, of which the first is of the kind `first`; `None` when one of them
/// is not whole.
///
/// Behind the header of a fragment nothing is followed: the later fragments do not show what the first one has there,
/// and either all of them are translated or none.
#[inline(always)]
pub fn walk<P: Packet + ?Sized>(packet: &P, first: u8) -> Option<Extensions> {
    let (mut proto, mut l4, mut fragment, mut fragment_id) = (first, V6_PAYLOAD as u32, 0, 0);
    for _ in 0..EXTENSION_HEADERS {
        let at = l4 as usize & OFFSET_MASK;
        let after = packet.byte(at)?;
        if proto == next_header::FRAGMENT {
            // RFC 8200 §4.5: next header, reserved, offset|res|M, identification. With neither offset nor M it is an
            // atomic fragment (RFC 6946), which is whole.
            fragment = packet.forget(u32::from(u16::from_be(packet.half(at + 2)?) & 0xfff9));
            fragment_id = packet.word(at + 4)?;
            l4 = packet.forget(l4 + 8);
        } else {
            let len = u32::from(packet.byte(at + 1)?);
            // RFC 4302 §2.2 counts an authentication header in 4-byte units less 2, the others in 8-byte units less 1.
            let bytes = if proto == next_header::AUTHENTICATION { (len + 2) * 4 } else { (len + 1) * 8 };
            l4 = packet.forget(l4 + bytes);
        }
        proto = packet.forget(u32::from(after)) as u8;
        if fragment != 0 || !next_header::is_extension(proto) {
            break;
        }
    }
    let fragment = match fragment {
        0 => Fragment::WHOLE,
        1 => Fragment::FIRST,
        _ => Fragment::LATER,
    };
    Some(Extensions { fragment_id, l4: (l4 as usize & OFFSET_MASK) as u16, proto, fragment })
}

/// Does this protocol have ports where TCP and UDP have them?
#[inline(always)]
const fn has_ports(proto: Proto) -> bool {
    matches!(proto, Proto::TCP | Proto::UDP | Proto::SCTP)
}

/// Reads a packet of family `F`. Only TCP, UDP, SCTP and ICMP errors are followed further; for the rest the reason to
/// let the packet pass comes back.
#[inline(always)]
pub fn parse<F: Family, P: Packet + ?Sized>(packet: &P) -> Result<Parsed, Reason> {
    let header = F::parse_header(packet)?;
    let proto = Proto(header.proto);
    let (mut src_port, mut dst_port, mut tcp_flags) = (0, 0, 0);
    if !has_ports(proto) {
        if proto == F::ICMP && header.fragment == Fragment::WHOLE {
            tcp_flags = packet.byte(header.l4).ok_or(Reason::Unparsed)?;
        }
        if !F::quotes(tcp_flags) {
            return Err(Reason::OtherProtocol);
        }
    } else if header.fragment != Fragment::LATER {
        src_port = packet.half(header.l4).ok_or(Reason::Unparsed)?;
        dst_port = packet.half(header.l4 + 2).ok_or(Reason::Unparsed)?;
        let mut needed = 4;
        if proto == Proto::TCP {
            tcp_flags = packet.byte(header.l4 + 13).ok_or(Reason::Unparsed)?;
            needed = 14;
        }
        // Ports behind the end of a first fragment would be a story for us alone: the receiver takes those that come
        // with the next one.
        if header.fragment == Fragment::FIRST && F::end(packet).is_none_or(|end| end < header.l4 + needed) {
            return Err(Reason::Unparsed);
        }
    }
    Ok(Parsed {
        tuple: Tuple { src: header.src, dst: header.dst, src_port: PortBe(src_port), dst_port: PortBe(dst_port) },
        fragment_id: header.fragment_id,
        l4: packet.forget(header.l4 as u32) as u16,
        proto: Proto(packet.forget(u32::from(proto.0)) as u8),
        family: F::FAMILY,
        tcp_flags: packet.forget(u32::from(tcp_flags)) as u8,
        fragment: Fragment(packet.forget(u32::from(header.fragment.0)) as u8),
    })
}

/// The packet that an ICMP error quotes, as far as it is quoted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Quoted {
    /// Its addresses and ports, as its sender wrote them.
    pub tuple: Tuple,
    /// Offset of its transport header.
    pub l4: u16,
    /// Its transport protocol.
    pub proto: Proto,
}

/// Bytes of an ICMP header before the quoted packet (RFC 792, RFC 4443).
pub const ICMP_LEN: usize = 8;

/// Reads the packet that an ICMP error with its header at `icmp` quotes; `None` when its ports are not to be seen.
#[inline(always)]
pub fn quoted<F: Family, P: Packet + ?Sized>(packet: &P, icmp: usize) -> Option<Quoted> {
    let header = F::parse_quoted(packet, (icmp & OFFSET_MASK) + ICMP_LEN)?;
    let proto = Proto(header.proto);
    if !has_ports(proto) {
        return None;
    }
    let l4 = packet.forget(header.l4 as u32) as usize & OFFSET_MASK;
    let (src_port, dst_port) = (PortBe(packet.half(l4)?), PortBe(packet.half(l4 + 2)?));
    Some(Quoted { tuple: Tuple { src: header.src, dst: header.dst, src_port, dst_port }, l4: l4 as u16, proto })
}

#[cfg(test)]
#[path = "packet_tests.rs"]
mod tests;
