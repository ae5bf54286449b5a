//! The headers of a traced packet.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use proxy_abi::Proto;

/// What is said of a packet: addresses, ports and what no forwarding changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source.
    pub src: IpAddr,
    /// Destination.
    pub dst: IpAddr,
    /// Source port; 0 where there is none.
    pub src_port: u16,
    /// Destination port; 0 where there is none.
    pub dst_port: u16,
    /// Protocol.
    pub proto: Proto,
    /// TCP flags.
    pub flags: u8,
    /// TTL or hop limit.
    pub ttl: u8,
    /// IPv4 identification, or a fragment's of IPv6.
    pub ident: u32,
    /// ICMP type and code.
    pub icmp: Option<(u8, u8)>,
    /// Bytes by the IP header.
    pub len: u32,
    /// A fragment that is not the first: without ports.
    pub is_rest: bool,
}

/// Bits of the TCP header.
pub mod flag {
    /// No more data.
    pub const FIN: u8 = 1;
    /// Opens.
    pub const SYN: u8 = 2;
    /// Refuses.
    pub const RST: u8 = 4;
    /// Hands over at once.
    pub const PSH: u8 = 8;
    /// Acknowledges.
    pub const ACK: u8 = 16;
    /// Urgent.
    pub const URG: u8 = 32;
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

impl Packet {
    /// From the IP header on. What is cut off is 0.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let first = *bytes.first()?;
        let mut packet = Self {
            src: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            dst: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            src_port: 0,
            dst_port: 0,
            proto: Proto(0),
            flags: 0,
            ttl: 0,
            ident: 0,
            icmp: None,
            len: 0,
            is_rest: false,
        };
        let l4 = match first >> 4 {
            4 => {
                let ip = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?));
                (packet.src, packet.dst) = (ip(12)?, ip(16)?);
                packet.proto = Proto(*bytes.get(9)?);
                packet.ttl = *bytes.get(8)?;
                packet.ident = half(bytes, 4)?.into();
                packet.len = half(bytes, 2)?.into();
                packet.is_rest = half(bytes, 6)? & 0x1fff != 0;
                usize::from(first & 15) * 4
            }
            6 => {
                let ip = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(bytes.get(at..at + 16)?).ok()?));
                (packet.src, packet.dst) = (ip(8)?, ip(24)?);
                packet.proto = Proto(*bytes.get(6)?);
                packet.ttl = *bytes.get(7)?;
                packet.len = u32::from(half(bytes, 4)?) + 40;
                let mut at = 40;
                if packet.proto.0 == 44 {
                    packet.proto = Proto(*bytes.get(40)?);
                    packet.is_rest = half(bytes, 42)? & 0xfff8 != 0;
                    packet.ident = u32::from_be_bytes(bytes.get(44..48)?.try_into().ok()?);
                    at = 48;
                }
                at
            }
            _ => return None,
        };
        if packet.is_rest {
            return Some(packet);
        }
        match packet.proto {
            Proto::TCP | Proto::UDP | Proto::SCTP => {
                packet.src_port = half(bytes, l4).unwrap_or(0);
                packet.dst_port = half(bytes, l4 + 2).unwrap_or(0);
            }
            Proto::ICMP | Proto::ICMPV6 => packet.icmp = bytes.get(l4).zip(bytes.get(l4 + 1)).map(|(t, c)| (*t, *c)),
            _ => {}
        }
        if packet.proto == Proto::TCP {
            packet.flags = bytes.get(l4 + 13).copied().unwrap_or(0);
        }
        Some(packet)
    }

    /// Address and port that it comes from.
    pub fn source(&self) -> SocketAddr {
        SocketAddr::new(self.src, self.src_port)
    }

    /// Address and port that it goes to.
    pub fn destination(&self) -> SocketAddr {
        SocketAddr::new(self.dst, self.dst_port)
    }

    /// Have both ends of it ports?
    pub const fn has_ports(&self) -> bool {
        self.src_port != 0 || self.dst_port != 0
    }

    /// `SYN`, `SYN ACK`, …; of ICMP the type.
    pub fn kind(&self) -> String {
        if let Some((kind, code)) = self.icmp {
            return icmp_name(self.proto, kind, code);
        }
        if self.is_rest {
            return "fragment".to_owned();
        }
        let names = [
            (flag::SYN, "SYN"),
            (flag::FIN, "FIN"),
            (flag::RST, "RST"),
            (flag::PSH, "PSH"),
            (flag::ACK, "ACK"),
            (flag::URG, "URG"),
        ];
        let set: Vec<&str> = names.iter().filter(|(bit, _)| self.flags & bit != 0).map(|(_, name)| *name).collect();
        set.join(" ")
    }

    /// Short form of the flags: `S`, `S.`, `P.`, as tcpdump writes them.
    pub fn short_flags(&self) -> String {
        let letters = [(flag::SYN, 'S'), (flag::FIN, 'F'), (flag::RST, 'R'), (flag::PSH, 'P'), (flag::ACK, '.')];
        letters.iter().filter(|(bit, _)| self.flags & bit != 0).map(|(_, letter)| *letter).collect()
    }

    /// Opens a TCP connection?
    pub const fn opens(&self) -> bool {
        self.flags & (flag::SYN | flag::ACK) == flag::SYN
    }
}

fn icmp_name(proto: Proto, kind: u8, code: u8) -> String {
    let known = match (proto, kind, code) {
        (Proto::ICMP, 8, _) | (Proto::ICMPV6, 128, _) => "echo request",
        (Proto::ICMP, 0, _) | (Proto::ICMPV6, 129, _) => "echo reply",
        (Proto::ICMP, 3, 3) | (Proto::ICMPV6, 1, 4) => "port unreachable",
        (Proto::ICMP, 3, 4) | (Proto::ICMPV6, 2, _) => "packet too big",
        (Proto::ICMP, 3, _) | (Proto::ICMPV6, 1, _) => "unreachable",
        (Proto::ICMP, 5, _) | (Proto::ICMPV6, 137, _) => "redirect",
        (Proto::ICMP, 11, _) | (Proto::ICMPV6, 3, _) => "time exceeded",
        (Proto::ICMPV6, 135, _) => "neighbour solicitation",
        (Proto::ICMPV6, 136, _) => "neighbour advertisement",
        _ => return format!("type {kind} code {code}"),
    };
    known.to_owned()
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.has_ports() {
            write!(f, "{} > {}", self.source(), self.destination())
        } else {
            write!(f, "{} > {}", self.src, self.dst)
        }
    }
}

/// An IPv4 or IPv6 network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Net {
    /// Any address of it.
    pub ip: IpAddr,
    /// Bits that count.
    pub len: u8,
}

impl Net {
    /// One address.
    pub const fn host(ip: IpAddr) -> Self {
        Self { ip, len: if ip.is_ipv4() { 32 } else { 128 } }
    }

    /// All bits that count, as [`proxy_abi::IpBytes`] has them.
    pub fn mask(&self) -> Ipv6Addr {
        let bits = u32::from(self.len) + if self.ip.is_ipv4() { 96 } else { 0 };
        Ipv6Addr::from(u128::MAX.checked_shl(128 - bits.min(128)).unwrap_or(0))
    }

    /// Is it one address?
    pub const fn is_host(&self) -> bool {
        self.len == if self.ip.is_ipv4() { 32 } else { 128 }
    }

    /// Does it contain the address?
    pub fn contains(&self, ip: IpAddr) -> bool {
        let number = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => u128::from(ip.to_ipv6_mapped()),
            IpAddr::V6(ip) => u128::from(ip),
        };
        self.ip.is_ipv4() == ip.is_ipv4() && (number(self.ip) ^ number(ip)) & u128::from(self.mask()) == 0
    }
}

impl std::str::FromStr for Net {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (ip, len) = text.split_once('/').map_or((text, None), |(ip, len)| (ip, Some(len)));
        let ip: IpAddr = ip.parse().map_err(|_| format!("`{text}` is no address"))?;
        let all = Self::host(ip);
        let Some(len) = len else { return Ok(all) };
        let len = len.parse().ok().filter(|len| *len <= all.len);
        len.map(|len| Self { ip, len }).ok_or_else(|| format!("`{text}` is no range of addresses"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp4(flags: u8) -> Vec<u8> {
        let mut bytes = vec![0x45, 0, 0, 40, 0x12, 0x67, 0x40, 0, 63, 6, 0, 0, 10, 1, 0, 2, 10, 96, 0, 1];
        bytes.extend([0xc9, 0x3a, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0, 0, 0, 0, 0, 0]);
        bytes
    }

    #[test]
    fn packets_are_read() {
        let packet = Packet::parse(&tcp4(flag::SYN)).expect("a packet");
        assert_eq!(packet.to_string(), "10.1.0.2:51514 > 10.96.0.1:80");
        assert_eq!((packet.ttl, packet.ident, packet.len, packet.kind().as_str()), (63, 0x1267, 40, "SYN"));
        assert!(packet.opens());
        let answer = Packet::parse(&tcp4(flag::SYN | flag::ACK)).expect("a packet");
        assert_eq!((answer.kind(), answer.short_flags(), answer.opens()), ("SYN ACK".into(), "S.".into(), false));

        let mut rest = tcp4(0);
        rest[6..8].copy_from_slice(&[0, 185]);
        let rest = Packet::parse(&rest).expect("a packet");
        assert_eq!((rest.to_string(), rest.kind()), ("10.1.0.2 > 10.96.0.1".into(), "fragment".into()));

        let mut six = vec![0x60, 0, 0, 0, 0, 16, 44, 64];
        six.extend(Ipv6Addr::LOCALHOST.octets());
        six.extend(Ipv6Addr::UNSPECIFIED.octets());
        six.extend([58, 0, 0, 1, 0, 0, 0, 9, 128, 0, 1, 2, 0, 7, 0, 1]);
        let six = Packet::parse(&six).expect("a packet");
        assert_eq!((six.proto, six.ident, six.kind().as_str(), six.len), (Proto::ICMPV6, 9, "echo request", 56));

        for bytes in [&[][..], &[0x45], &[0x60; 20], &[0x11; 60]] {
            assert_eq!(Packet::parse(bytes), None, "{bytes:?}");
        }
    }

    #[test]
    fn networks_contain_their_addresses() {
        let cases = [
            ("10.1.0.0/16", "10.1.255.3", true),
            ("10.1.0.0/16", "10.2.0.1", false),
            ("0.0.0.0/0", "1.2.3.4", true),
            ("0.0.0.0/0", "::1", false),
            ("fd00::/8", "fdff::1", true),
            ("::/0", "1.2.3.4", false),
            ("::1", "::1", true),
            ("::1", "::2", false),
        ];
        for (net, ip, expected) in cases {
            let found: Net = net.parse().expect("a network");
            assert_eq!(found.contains(ip.parse().expect("an address")), expected, "{net} {ip}");
        }
        for text in ["", "10.0.0.0/33", "10.0.0/8", "fd00::/129", "x"] {
            assert!(text.parse::<Net>().is_err(), "{text}");
        }
    }
}
