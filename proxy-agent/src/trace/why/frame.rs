//! The packet that is asked about, as bytes: what opens a flow, or another part of its life.

use std::net::{IpAddr, SocketAddr};

use proxy_abi::{MacBytes, Proto};

use super::super::packet::flag;

/// What a packet is in the life of its flow. What is neither TCP nor an echo looks the same in all of it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Part {
    /// It opens it: a SYN, an echo request.
    #[default]
    Opens,
    /// It answers that: SYN and ACK, an echo reply.
    Answers,
    /// It is of a connection that both ends know: an ACK.
    GoesOn,
    /// The same, from the responder.
    GoesBack,
    /// It ends what the SYN of the same number opened: a reset.
    Resets,
}

/// A frame's ends and what is in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// From which MAC to which.
    pub macs: (MacBytes, MacBytes),
    /// From where to where; ports are 0 where there are none. Of an echo the sender of the request has its identifier.
    pub ends: (SocketAddr, SocketAddr),
    /// Protocol.
    pub proto: Proto,
    /// Bytes from the IP header on, at least.
    pub size: u16,
    /// What it is in its flow.
    pub part: Part,
    /// Sequence number of what opens the flow; its lower half is the identification of IPv4 and the number of an echo.
    pub number: u32,
}

impl Part {
    /// Flags of a TCP segment.
    pub const fn flags(self) -> u8 {
        match self {
            Self::Opens => flag::SYN,
            Self::Answers => flag::SYN | flag::ACK,
            Self::GoesOn | Self::GoesBack => flag::ACK,
            Self::Resets => flag::RST,
        }
    }

    const fn is_back(self) -> bool {
        matches!(self, Self::Answers | Self::GoesBack)
    }
}

const TTL: u8 = 64;
/// Type of an echo request and of its reply.
const ECHO_V4: [u8; 2] = [8, 0];
const ECHO_V6: [u8; 2] = [128, 129];
/// Identifier of an echo whose sender has none.
const ECHO: u16 = 0x7768;

/// Of the pseudo header and the rest, as RFC 1071 adds up.
fn sum(bytes: &[u8]) -> u32 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    words.sum()
}

fn folded(mut sum: u32) -> u16 {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or(0)
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

impl Frame {
    /// The header of the transport, with `rest` bytes behind it; and where its checksum stands.
    fn transport(&self, rest: usize) -> (Vec<u8>, Option<usize>) {
        let ports = [self.ends.0.port().to_be_bytes(), self.ends.1.port().to_be_bytes()].concat();
        let (mut bytes, at) = match self.proto {
            // Sequence and acknowledgement, five words, flags, a window, no checksum yet, nothing urgent.
            Proto::TCP => {
                let next = self.number.wrapping_add(1);
                let (sequence, acknowledged) = match self.part {
                    Part::Opens => (self.number, 0),
                    Part::Resets => (next, 0),
                    Part::Answers | Part::GoesOn | Part::GoesBack => (next, next),
                };
                let rest = [5 << 4, self.part.flags(), 0xff, 0xff, 0, 0, 0, 0];
                ([&ports[..], &sequence.to_be_bytes(), &acknowledged.to_be_bytes(), &rest].concat(), Some(16))
            }
            Proto::UDP => ([&ports[..], &[0, 0, 0, 0]].concat(), Some(6)),
            Proto::ICMP | Proto::ICMPV6 => {
                let kinds = if self.proto == Proto::ICMP { ECHO_V4 } else { ECHO_V6 };
                let kind = kinds[usize::from(self.part.is_back())];
                ([&[kind, 0, 0, 0][..], &self.echo().to_be_bytes(), &self.low_half()].concat(), Some(2))
            }
            // An INIT of no association: tag 0, no checksum yet, chunk.
            Proto::SCTP => (
                [
                    &ports[..],
                    &[0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 20],
                    &[0, 0, 0, 1, 0, 0, 0xff, 0xff, 0, 1, 0, 1, 0, 0, 0, 1],
                ]
                .concat(),
                None,
            ),
            _ => (vec![0; 8], None),
        };
        bytes.resize(bytes.len().max(rest), 0);
        if self.proto == Proto::UDP {
            let length = u16::try_from(bytes.len()).unwrap_or(u16::MAX);
            bytes[4..6].copy_from_slice(&length.to_be_bytes());
        }
        (bytes, at)
    }

    /// Identifier of an echo.
    pub fn echo(&self) -> u16 {
        let found = if self.part.is_back() { self.ends.1.port() } else { self.ends.0.port() };
        if found == 0 { ECHO } else { found }
    }

    fn low_half(&self) -> [u8; 2] {
        let [_, _, high, low] = self.number.to_be_bytes();
        [high, low]
    }

    /// What stands behind the IP header.
    pub fn payload(&self) -> Vec<u8> {
        let header = if self.ends.0.is_ipv4() { 20 } else { 40 };
        let from_ip = self.bytes();
        from_ip.get(14 + header..).unwrap_or_default().to_vec()
    }

    /// The frame as it is on the wire.
    pub fn bytes(&self) -> Vec<u8> {
        let (from, to) = (octets(self.ends.0.ip()), octets(self.ends.1.ip()));
        let v4 = from.len() == 4;
        let header = if v4 { 20 } else { 40 };
        let (mut transport, at) = self.transport(usize::from(self.size).saturating_sub(header));
        if let Some(at) = at {
            // ICMP of IPv4 has no pseudo header.
            let length = u32::try_from(transport.len()).unwrap_or(0);
            let pseudo =
                if self.proto == Proto::ICMP { 0 } else { sum(&from) + sum(&to) + length + u32::from(self.proto.0) };
            let checksum = match (folded(pseudo + sum(&transport)), self.proto) {
                // 0 says that there is none.
                (0, Proto::UDP) => u16::MAX,
                (checksum, _) => checksum,
            };
            transport[at..at + 2].copy_from_slice(&checksum.to_be_bytes());
        }
        let length = u16::try_from(transport.len() + if v4 { header } else { 0 }).unwrap_or(u16::MAX).to_be_bytes();
        let mut ip = if v4 {
            let ident = self.low_half();
            vec![0x45, 0, length[0], length[1], ident[0], ident[1], 0x40, 0, TTL, self.proto.0, 0, 0]
        } else {
            vec![0x60, 0, 0, 0, length[0], length[1], self.proto.0, TTL]
        };
        ip.extend(from);
        ip.extend(to);
        if v4 {
            let checksum = folded(sum(&ip)).to_be_bytes();
            ip[10..12].copy_from_slice(&checksum);
        }
        let kind: [u8; 2] = if v4 { [0x08, 0x00] } else { [0x86, 0xdd] };
        [&self.macs.1.0[..], &self.macs.0.0, &kind, &ip, &transport].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::packet::Packet;
    use super::*;

    #[test]
    fn frames_are_what_they_say() {
        let macs = (MacBytes([2, 0, 0, 0, 0, 1]), MacBytes([2, 0, 0, 0, 0, 2]));
        let ends = |a: &str, b: &str| (a.parse().expect("an address"), b.parse().expect("an address"));
        for (ends, proto, kind) in [
            (ends("10.1.0.2:4000", "10.1.0.3:80"), Proto::TCP, 0x0800_u16),
            (ends("10.1.0.2:4000", "10.1.0.3:53"), Proto::UDP, 0x0800),
            (ends("10.1.0.2:0", "10.1.0.3:0"), Proto::ICMP, 0x0800),
            (ends("[fd01::2]:4000", "[fd01::3]:80"), Proto::TCP, 0x86dd),
            (ends("[fd01::2]:4000", "[fd01::3]:53"), Proto::UDP, 0x86dd),
            (ends("[fd01::2]:0", "[fd01::3]:0"), Proto::ICMPV6, 0x86dd),
            (ends("[fd01::2]:4000", "[fd01::3]:9"), Proto::SCTP, 0x86dd),
        ] {
            let bytes = Frame { macs, ends, proto, size: 0, part: Part::Opens, number: 7 }.bytes();
            assert_eq!(
                (&bytes[..6], &bytes[6..12], &bytes[12..14]),
                (&macs.1.0[..], &macs.0.0[..], &kind.to_be_bytes()[..])
            );
            let packet = Packet::parse(&bytes[14..]).expect("headers");
            assert_eq!((packet.source(), packet.destination(), packet.proto), (ends.0, ends.1, proto), "{proto}");
            // What is right adds up to all ones.
            if ends.0.is_ipv4() {
                assert_eq!(folded(sum(&bytes[14..34])), 0);
            }
            let (from, header) = if ends.0.is_ipv4() { (26..34, 34) } else { (22..54, 54) };
            let rest = &bytes[header..];
            let pseudo = if proto == Proto::ICMP {
                0
            } else {
                sum(&bytes[from]) + u32::from(proto.0) + u32::try_from(rest.len()).expect("short")
            };
            if proto != Proto::SCTP {
                assert_eq!(folded(pseudo + sum(rest)), 0, "{proto}");
            }
        }
        let ends = ends("10.1.0.2:4000", "10.1.0.3:53");
        let large = Frame { macs, ends, proto: Proto::UDP, size: 1428, part: Part::Opens, number: 7 };
        assert_eq!(large.bytes().len(), 14 + 1428);
    }

    #[test]
    fn a_packet_shows_its_part() {
        let macs = Default::default();
        let end = |text: &str| text.parse::<SocketAddr>().expect("an address");
        let kind = |proto, part, ends| {
            let bytes = Frame { macs, ends, proto, size: 0, part, number: 0x1_0007 }.bytes();
            let packet = Packet::parse(&bytes[14..]).expect("headers");
            let rest = bytes.get(34..42).expect("a header of its own").to_vec();
            (packet.kind(), packet.ident, rest)
        };
        let ends = (end("10.1.0.2:4000"), end("10.1.0.3:80"));
        let back = (ends.1, ends.0);
        let ports = [0x0f, 0xa0, 0, 80];
        for (part, ends, name, head) in [
            (Part::Opens, ends, "SYN", [ports, [0, 1, 0, 7]].concat()),
            (Part::Answers, back, "SYN ACK", vec![0, 80, 0x0f, 0xa0, 0, 1, 0, 8]),
            (Part::GoesOn, ends, "ACK", [ports, [0, 1, 0, 8]].concat()),
            (Part::Resets, ends, "RST", [ports, [0, 1, 0, 8]].concat()),
        ] {
            assert_eq!(kind(Proto::TCP, part, ends), (name.to_owned(), 7, head), "{part:?}");
        }
        let echo = (end("10.1.0.2:9"), end("10.1.0.3:0"));
        for (part, ends, name) in [
            (Part::Opens, echo, "echo request"),
            (Part::GoesOn, echo, "echo request"),
            (Part::GoesBack, (echo.1, echo.0), "echo reply"),
        ] {
            let (found, _, rest) = kind(Proto::ICMP, part, ends);
            assert_eq!((found.as_str(), &rest[4..]), (name, &[0, 9, 0, 7][..]), "{part:?}");
        }
    }
}
