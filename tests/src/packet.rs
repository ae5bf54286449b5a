//! Frames as plain data: built with right checksums, parsed back to the same values.
//!
//! ```text
//!   Frame  dst · src · VLAN tags ─▶ Body::Ip    addresses · options or extension headers · fragment ─▶ L4
//!                                   Body::Arp
//!                                   Body::Other EtherType and bytes
//! ```
//!
//! A fragment's payload is always [`L4::Other`]: only the first has ports, and none can be checked alone.

pub mod checksum;
pub mod named;
pub mod neighbour;
pub mod parse;
pub mod sctp;

use std::net::{IpAddr, Ipv4Addr};

pub use crate::address::Mac;
pub use checksum::{ChecksumError, Checksums, L4Sum, verify_checksums};
use checksum::{Sum, fold, pseudo_header};
pub use named::Host;
pub use parse::ParseError;
pub use sctp::Sctp;

/// EtherTypes.
pub mod ether_type {
    /// IPv4.
    pub const IPV4: u16 = 0x0800;
    /// ARP.
    pub const ARP: u16 = 0x0806;
    /// VLAN tag (IEEE 802.1Q).
    pub const VLAN: u16 = 0x8100;
    /// Outer VLAN tag (IEEE 802.1ad).
    pub const QINQ: u16 = 0x88a8;
    /// IPv6.
    pub const IPV6: u16 = 0x86dd;
}

/// IP protocol numbers, and IPv6 extension headers.
pub mod proto {
    /// IPv6 hop-by-hop options.
    pub const HOP_BY_HOP: u8 = 0;
    /// ICMP for IPv4.
    pub const ICMP: u8 = 1;
    /// TCP.
    pub const TCP: u8 = 6;
    /// UDP.
    pub const UDP: u8 = 17;
    /// IPv6 routing header.
    pub const ROUTING: u8 = 43;
    /// IPv6 fragment header.
    pub const FRAGMENT: u8 = 44;
    /// ICMP for IPv6.
    pub const ICMPV6: u8 = 58;
    /// IPv6 destination options.
    pub const DESTINATION: u8 = 60;
    /// SCTP.
    pub const SCTP: u8 = 132;
}

/// TCP flags.
pub mod tcp_flag {
    /// FIN.
    pub const FIN: u8 = 1;
    /// SYN.
    pub const SYN: u8 = 2;
    /// RST.
    pub const RST: u8 = 4;
    /// PSH.
    pub const PSH: u8 = 8;
    /// ACK.
    pub const ACK: u8 = 16;
}

/// An Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Destination.
    pub dst: Mac,
    /// Source.
    pub src: Mac,
    /// VLAN tags, outermost first.
    pub vlans: Vec<Vlan>,
    /// The rest.
    pub body: Body,
}

/// A VLAN tag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Vlan {
    /// [`ether_type::VLAN`] or [`ether_type::QINQ`].
    pub tpid: u16,
    /// Priority and VLAN id.
    pub tci: u16,
}

/// What a frame carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Body {
    /// IPv4 or IPv6.
    Ip(Ip),
    /// ARP for IPv4.
    Arp(Arp),
    /// Anything else.
    Other {
        /// EtherType.
        ether_type: u16,
        /// All bytes behind it.
        bytes: Vec<u8>,
    },
}

/// An ARP packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// 1 request, 2 reply.
    pub operation: u16,
    /// Sender's MAC.
    pub sender_mac: Mac,
    /// Sender's address.
    pub sender_ip: Ipv4Addr,
    /// Target's MAC; zero in a request.
    pub target_mac: Mac,
    /// Target's address.
    pub target_ip: Ipv4Addr,
}

/// An IP packet; its family is that of `src`, which `dst` must share.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class.
    pub class: u8,
    /// Identification: 16 bits in IPv4; in IPv6 only a fragment has one.
    pub id: u32,
    /// IPv4 DF; `false` in IPv6.
    pub dont_fragment: bool,
    /// Set when this is a fragment.
    pub fragment: Option<Fragment>,
    /// IPv4 options, a multiple of 4 bytes, at most 40.
    pub options: Vec<u8>,
    /// IPv6 extension headers before the fragment header.
    pub extensions: Vec<Extension>,
    /// Payload.
    pub l4: L4,
}

/// Place of a fragment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fragment {
    /// Offset in bytes, a multiple of 8.
    pub offset: u16,
    /// More fragments follow.
    pub more: bool,
}

/// An IPv6 extension header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Extension {
    /// Its protocol number.
    pub kind: u8,
    /// Its content behind next-header and length: 6 bytes and multiples of 8 more.
    pub content: Vec<u8>,
}

/// What an IP packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP.
    Tcp(Tcp),
    /// UDP.
    Udp(Udp),
    /// ICMP or ICMPv6, by the family of the packet.
    Icmp(Icmp),
    /// Any other protocol, or the payload of a fragment.
    Other {
        /// Protocol number.
        proto: u8,
        /// All bytes of the payload.
        bytes: Vec<u8>,
    },
}

/// A TCP segment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Tcp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// Sequence number.
    pub seq: u32,
    /// Acknowledgement number.
    pub ack: u32,
    /// [`tcp_flag`]s.
    pub flags: u8,
    /// Window.
    pub window: u16,
    /// Options, a multiple of 4 bytes, at most 40.
    pub options: Vec<u8>,
    /// Payload.
    pub payload: Vec<u8>,
}

/// A UDP datagram.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Udp {
    /// Source port.
    pub src: u16,
    /// Destination port.
    pub dst: u16,
    /// `false` sends a zero checksum, which IPv4 allows.
    pub checksum: bool,
    /// Payload.
    pub payload: Vec<u8>,
}

/// An ICMP message.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Icmp {
    /// Type.
    pub kind: u8,
    /// Code.
    pub code: u8,
    /// Bytes 4 to 7: id and sequence number of an echo, MTU of an error.
    pub rest: [u8; 4],
    /// The rest: echo data, or the packet that an error is about.
    pub payload: Vec<u8>,
}

impl Frame {
    /// An IP packet from one host to another; addresses of the family of `from`.
    pub fn ip(from: (Mac, IpAddr), to: (Mac, IpAddr), l4: L4) -> Self {
        let body = Body::Ip(Ip {
            src: from.1,
            dst: to.1,
            ttl: 64,
            class: 0,
            id: 0,
            dont_fragment: from.1.is_ipv4(),
            fragment: None,
            options: Vec::new(),
            extensions: Vec::new(),
            l4,
        });
        Self { dst: to.0, src: from.0, vlans: Vec::new(), body }
    }

    /// The IP packet, when it is one.
    pub fn as_ip(&self) -> Option<&Ip> {
        if let Body::Ip(ip) = &self.body { Some(ip) } else { None }
    }

    /// The IP packet, to change it.
    pub fn as_ip_mut(&mut self) -> Option<&mut Ip> {
        if let Body::Ip(ip) = &mut self.body { Some(ip) } else { None }
    }

    /// The frame's bytes, without padding and FCS. All lengths and checksums are made here.
    pub fn build(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(128);
        bytes.extend(self.dst.0);
        bytes.extend(self.src.0);
        for vlan in &self.vlans {
            bytes.extend(vlan.tpid.to_be_bytes());
            bytes.extend(vlan.tci.to_be_bytes());
        }
        let ether_type = match &self.body {
            Body::Ip(ip) if ip.src.is_ipv4() => ether_type::IPV4,
            Body::Ip(_) => ether_type::IPV6,
            Body::Arp(_) => ether_type::ARP,
            Body::Other { ether_type, .. } => *ether_type,
        };
        bytes.extend(ether_type.to_be_bytes());
        match &self.body {
            Body::Ip(ip) => bytes.extend(ip.build()),
            Body::Arp(arp) => bytes.extend(arp.build()),
            Body::Other { bytes: other, .. } => bytes.extend(other),
        }
        bytes
    }

    /// The frame in fragments whose IP packets fit into `mtu`; itself alone when it fits or is no IP packet.
    pub fn fragments(&self, mtu: usize) -> Vec<Self> {
        let Body::Ip(ip) = &self.body else { return vec![self.clone()] };
        if ip.build().len() <= mtu {
            return vec![self.clone()];
        }
        let payload = ip.l4.build(ip.src, ip.dst);
        let proto = ip.l4.proto(ip.src);
        let room = (mtu - ip.header_len(true)) & !7;
        let pieces = payload.chunks(room);
        let last = pieces.len() - 1;
        let fragment = |(index, piece): (usize, &[u8])| {
            let offset = u16::try_from(index * room).unwrap_or(u16::MAX);
            let part = Ip {
                dont_fragment: false,
                fragment: Some(Fragment { offset, more: index < last }),
                l4: L4::Other { proto, bytes: piece.to_vec() },
                ..ip.clone()
            };
            Self { body: Body::Ip(part), ..self.clone() }
        };
        pieces.enumerate().map(fragment).collect()
    }
}

impl Arp {
    fn build(self) -> Vec<u8> {
        let mut bytes = vec![0, 1, 8, 0, 6, 4]; // Ethernet, IPv4, lengths of their addresses
        bytes.extend(self.operation.to_be_bytes());
        bytes.extend(self.sender_mac.0);
        bytes.extend(self.sender_ip.octets());
        bytes.extend(self.target_mac.0);
        bytes.extend(self.target_ip.octets());
        bytes
    }
}

impl Ip {
    /// Bytes of the headers before the payload, with a fragment header (IPv6) if `fragmented`.
    fn header_len(&self, fragmented: bool) -> usize {
        if self.src.is_ipv4() {
            return 20 + self.options.len();
        }
        let extensions: usize = self.extensions.iter().map(|extension| 2 + extension.content.len()).sum();
        40 + extensions + if fragmented { 8 } else { 0 }
    }

    /// The packet's bytes.
    pub fn build(&self) -> Vec<u8> {
        let payload = self.l4.build(self.src, self.dst);
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => self.build_v4(src, dst, &payload),
            _ => self.build_v6(&payload),
        }
    }

    fn build_v4(&self, src: Ipv4Addr, dst: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
        let header_len = self.header_len(false);
        let mut bytes = vec![0x40 | low8(header_len / 4), self.class];
        bytes.extend(low16(header_len + payload.len()).to_be_bytes());
        bytes.extend(&self.id.to_be_bytes()[2..]);
        let place = self.fragment.unwrap_or(Fragment { offset: 0, more: false });
        let flags = u16::from(self.dont_fragment) << 14 | u16::from(place.more) << 13;
        bytes.extend((flags | (place.offset / 8)).to_be_bytes());
        bytes.extend([self.ttl, self.l4.proto(self.src), 0, 0]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(&self.options);
        let sum = fold(Sum::of(&bytes));
        bytes[10..12].copy_from_slice(&sum.to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    fn build_v6(&self, payload: &[u8]) -> Vec<u8> {
        let octets = |ip| match ip {
            IpAddr::V4(ip) => Ipv4Addr::to_ipv6_mapped(&ip).octets(),
            IpAddr::V6(ip) => ip.octets(),
        };
        // Each header names the next one, so the chain is known before the first is written.
        let mut kinds: Vec<u8> = self.extensions.iter().map(|extension| extension.kind).collect();
        kinds.extend(self.fragment.map(|_| proto::FRAGMENT));
        kinds.push(self.l4.proto(self.src));
        let len = self.header_len(self.fragment.is_some()) - 40 + payload.len();
        let mut bytes = vec![0x60 | self.class >> 4, self.class << 4, 0, 0];
        bytes.extend(low16(len).to_be_bytes());
        bytes.extend([kinds[0], self.ttl]);
        bytes.extend(octets(self.src));
        bytes.extend(octets(self.dst));
        for (extension, next) in self.extensions.iter().zip(&kinds[1..]) {
            bytes.extend([*next, low8(extension.content.len() / 8)]);
            bytes.extend(&extension.content);
        }
        if let Some(place) = self.fragment {
            bytes.extend([self.l4.proto(self.src), 0]);
            bytes.extend((place.offset | u16::from(place.more)).to_be_bytes());
            bytes.extend(self.id.to_be_bytes());
        }
        bytes.extend(payload);
        bytes
    }
}

impl L4 {
    /// Protocol number in a packet from `src`.
    pub fn proto(&self, src: IpAddr) -> u8 {
        match self {
            Self::Tcp(_) => proto::TCP,
            Self::Udp(_) => proto::UDP,
            Self::Icmp(_) if src.is_ipv4() => proto::ICMP,
            Self::Icmp(_) => proto::ICMPV6,
            Self::Other { proto, .. } => *proto,
        }
    }

    /// The payload's bytes with its checksum.
    fn build(&self, src: IpAddr, dst: IpAddr) -> Vec<u8> {
        let mut bytes = Vec::new();
        let sum_at = match self {
            Self::Tcp(tcp) => {
                bytes.extend(tcp.src.to_be_bytes());
                bytes.extend(tcp.dst.to_be_bytes());
                bytes.extend(tcp.seq.to_be_bytes());
                bytes.extend(tcp.ack.to_be_bytes());
                bytes.extend([low8(5 + tcp.options.len() / 4) << 4, tcp.flags]);
                bytes.extend(tcp.window.to_be_bytes());
                bytes.extend([0; 4]); // checksum, urgent pointer
                bytes.extend(&tcp.options);
                bytes.extend(&tcp.payload);
                16
            }
            Self::Udp(udp) => {
                bytes.extend(udp.src.to_be_bytes());
                bytes.extend(udp.dst.to_be_bytes());
                bytes.extend(low16(8 + udp.payload.len()).to_be_bytes());
                bytes.extend([0; 2]);
                bytes.extend(&udp.payload);
                if !udp.checksum {
                    return bytes;
                }
                6
            }
            Self::Icmp(icmp) => {
                bytes.extend([icmp.kind, icmp.code, 0, 0]);
                bytes.extend(icmp.rest);
                bytes.extend(&icmp.payload);
                2
            }
            Self::Other { bytes, .. } => return bytes.clone(),
        };
        let proto = self.proto(src);
        let pseudo = if proto == proto::ICMP { Sum::default() } else { pseudo_header(src, dst, proto, bytes.len()) };
        let sum = match (fold(pseudo.add(&bytes)), self) {
            (0, Self::Udp(_)) => 0xffff, // zero would mean: none (RFC 768)
            (sum, _) => sum,
        };
        bytes[sum_at..sum_at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }
}

/// Length fields of packets that are too long for them say the most they can.
fn low16(len: usize) -> u16 {
    u16::try_from(len).unwrap_or(u16::MAX)
}

fn low8(len: usize) -> u8 {
    u8::try_from(len).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests;
