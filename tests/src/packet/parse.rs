//! From bytes back to [`Frame`]s.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::{Arp, Body, Extension, Fragment, Frame, Icmp, Ip, L4, Mac, Tcp, Udp, Vlan, ether_type, proto};

/// Why bytes are no frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseError {
    /// They end before a header does, or before its length says.
    #[error("the frame ends too early")]
    Short,
    /// A header contradicts itself: a length below its own size, a version that is not the EtherType's.
    #[error("the frame has a malformed header")]
    Malformed,
}

/// A frame cut at its Ethernet header.
pub(crate) struct Raw<'a> {
    dst: Mac,
    src: Mac,
    vlans: Vec<Vlan>,
    ether_type: u16,
    payload: &'a [u8],
}

/// An IP packet cut into headers and payload.
pub(crate) struct RawIp<'a> {
    pub(crate) src: IpAddr,
    pub(crate) dst: IpAddr,
    /// The fixed header, with IPv4 options.
    pub(crate) header: &'a [u8],
    extensions: Vec<Extension>,
    pub(crate) fragment: Option<Fragment>,
    id: u32,
    pub(crate) proto: u8,
    pub(crate) payload: &'a [u8],
}

/// Whether the payload must be as long as the header says: not when an ICMP error quotes its beginning.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Whole {
    Yes,
    No,
}

impl Frame {
    /// Reads a frame; bytes behind the length that IP gives (Ethernet padding) are left out. Checksums are not
    /// checked.
    ///
    /// # Errors
    /// [`ParseError`].
    pub fn parse(bytes: &[u8]) -> Result<Self, ParseError> {
        let raw = Raw::read(bytes)?;
        let body = match raw.ip()? {
            Some(ip) => Body::Ip(ip.to_ip()?),
            None if raw.ether_type == ether_type::ARP => Body::Arp(arp(raw.payload)?),
            None => Body::Other { ether_type: raw.ether_type, bytes: raw.payload.to_vec() },
        };
        Ok(Self { dst: raw.dst, src: raw.src, vlans: raw.vlans, body })
    }
}

impl<'a> Raw<'a> {
    pub(crate) fn read(bytes: &'a [u8]) -> Result<Self, ParseError> {
        let (dst, rest) = bytes.split_first_chunk::<6>().ok_or(ParseError::Short)?;
        let (src, mut rest) = rest.split_first_chunk::<6>().ok_or(ParseError::Short)?;
        let mut vlans = Vec::new();
        loop {
            let (found, behind) = take16(rest)?;
            if !matches!(found, ether_type::VLAN | ether_type::QINQ) {
                return Ok(Self { dst: Mac(*dst), src: Mac(*src), vlans, ether_type: found, payload: behind });
            }
            let (tci, behind) = take16(behind)?;
            vlans.push(Vlan { tpid: found, tci });
            rest = behind;
        }
    }

    pub(crate) fn ip(&self) -> Result<Option<RawIp<'a>>, ParseError> {
        let version = match self.ether_type {
            ether_type::IPV4 => 4,
            ether_type::IPV6 => 6,
            _ => return Ok(None),
        };
        if self.payload.first().ok_or(ParseError::Short)? >> 4 != version {
            return Err(ParseError::Malformed);
        }
        RawIp::read(self.payload, Whole::Yes).map(Some)
    }
}

impl<'a> RawIp<'a> {
    /// Reads the beginning of a packet, of which the payload may be cut off.
    pub(crate) fn read_quoted(bytes: &'a [u8]) -> Result<Self, ParseError> {
        Self::read(bytes, Whole::No)
    }

    fn read(bytes: &'a [u8], whole: Whole) -> Result<Self, ParseError> {
        match bytes.first().ok_or(ParseError::Short)? >> 4 {
            4 => Self::read_v4(bytes, whole),
            6 => Self::read_v6(bytes, whole),
            _ => Err(ParseError::Malformed),
        }
    }

    fn read_v4(bytes: &'a [u8], whole: Whole) -> Result<Self, ParseError> {
        let fixed = bytes.first_chunk::<20>().ok_or(ParseError::Short)?;
        let header_len = usize::from(fixed[0] & 0xf) * 4;
        let total_len = usize::from(number16(&fixed[2..]));
        if header_len < 20 || total_len < header_len {
            return Err(ParseError::Malformed);
        }
        let bytes = cut(bytes, total_len, whole)?;
        let (header, payload) = bytes.split_at_checked(header_len).ok_or(ParseError::Short)?;
        let place = number16(&fixed[6..]);
        let fragment = Fragment { offset: (place & 0x1fff) * 8, more: place & 0x2000 != 0 };
        let address = |at: usize| Ipv4Addr::new(fixed[at], fixed[at + 1], fixed[at + 2], fixed[at + 3]);
        Ok(Self {
            src: address(12).into(),
            dst: address(16).into(),
            header,
            extensions: Vec::new(),
            fragment: (fragment.offset != 0 || fragment.more).then_some(fragment),
            id: u32::from(number16(&fixed[4..])),
            proto: fixed[9],
            payload,
        })
    }

    fn read_v6(bytes: &'a [u8], whole: Whole) -> Result<Self, ParseError> {
        let (header, rest) = bytes.split_at_checked(40).ok_or(ParseError::Short)?;
        let mut rest = cut(rest, usize::from(number16(&header[4..])), whole)?;
        let address = |at: usize| -> Result<IpAddr, ParseError> {
            let octets: [u8; 16] = header[at..at + 16].try_into().map_err(|_| ParseError::Short)?;
            Ok(Ipv6Addr::from(octets).into())
        };
        let (mut extensions, mut fragment, mut id) = (Vec::new(), None, 0);
        let mut next = header[6];
        // Behind a fragment header everything is payload, whatever it is called.
        while fragment.is_none() {
            match next {
                proto::HOP_BY_HOP | proto::ROUTING | proto::DESTINATION => {
                    let len = 8 + usize::from(*rest.get(1).ok_or(ParseError::Short)?) * 8;
                    let (extension, behind) = rest.split_at_checked(len).ok_or(ParseError::Short)?;
                    extensions.push(Extension { kind: next, content: extension[2..].to_vec() });
                    next = extension[0];
                    rest = behind;
                }
                proto::FRAGMENT => {
                    let (extension, behind) = rest.split_first_chunk::<8>().ok_or(ParseError::Short)?;
                    let place = number16(&extension[2..]);
                    fragment = Some(Fragment { offset: place & !7, more: place & 1 != 0 });
                    id = extension[4..].iter().fold(0, |n, &byte| n << 8 | u32::from(byte));
                    next = extension[0];
                    rest = behind;
                }
                _ => break,
            }
        }
        Ok(Self { src: address(8)?, dst: address(24)?, header, extensions, fragment, id, proto: next, payload: rest })
    }

    fn to_ip(&self) -> Result<Ip, ParseError> {
        let v4 = self.src.is_ipv4();
        let header = self.header;
        let l4 = if self.fragment.is_some() { self.other() } else { self.l4()? };
        Ok(Ip {
            src: self.src,
            dst: self.dst,
            ttl: header[if v4 { 8 } else { 7 }],
            class: if v4 { header[1] } else { header[0] << 4 | header[1] >> 4 },
            id: self.id,
            dont_fragment: v4 && header[6] & 0x40 != 0,
            fragment: self.fragment,
            options: if v4 { header[20..].to_vec() } else { Vec::new() },
            extensions: self.extensions.clone(),
            l4,
        })
    }

    fn other(&self) -> L4 {
        L4::Other { proto: self.proto, bytes: self.payload.to_vec() }
    }

    fn l4(&self) -> Result<L4, ParseError> {
        let bytes = self.payload;
        let number32 = |at: usize| bytes[at..at + 4].iter().fold(0, |n, &byte| n << 8 | u32::from(byte));
        let enough = |len: usize| if bytes.len() < len { Err(ParseError::Short) } else { Ok(()) };
        match self.proto {
            proto::TCP => {
                enough(20)?;
                let header_len = usize::from(bytes[12] >> 4) * 4;
                if header_len < 20 {
                    return Err(ParseError::Malformed);
                }
                enough(header_len)?;
                Ok(L4::Tcp(Tcp {
                    src: number16(bytes),
                    dst: number16(&bytes[2..]),
                    seq: number32(4),
                    ack: number32(8),
                    flags: bytes[13],
                    window: number16(&bytes[14..]),
                    options: bytes[20..header_len].to_vec(),
                    payload: bytes[header_len..].to_vec(),
                }))
            }
            proto::UDP => {
                enough(8)?;
                let len = usize::from(number16(&bytes[4..]));
                let payload = bytes.get(8..len).ok_or(ParseError::Malformed)?.to_vec();
                let checksum = number16(&bytes[6..]) != 0;
                Ok(L4::Udp(Udp { src: number16(bytes), dst: number16(&bytes[2..]), checksum, payload }))
            }
            proto::ICMP | proto::ICMPV6 if (self.proto == proto::ICMP) == self.src.is_ipv4() => {
                enough(8)?;
                let rest = [bytes[4], bytes[5], bytes[6], bytes[7]];
                Ok(L4::Icmp(Icmp { kind: bytes[0], code: bytes[1], rest, payload: bytes[8..].to_vec() }))
            }
            _ => Ok(self.other()),
        }
    }
}

fn arp(bytes: &[u8]) -> Result<Arp, ParseError> {
    let bytes = bytes.first_chunk::<28>().ok_or(ParseError::Short)?;
    if bytes[..6] != [0, 1, 8, 0, 6, 4] {
        return Err(ParseError::Malformed);
    }
    let mac = |at: usize| Mac([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3], bytes[at + 4], bytes[at + 5]]);
    let ip = |at: usize| Ipv4Addr::new(bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]);
    Ok(Arp {
        operation: number16(&bytes[6..]),
        sender_mac: mac(8),
        sender_ip: ip(14),
        target_mac: mac(18),
        target_ip: ip(24),
    })
}

fn cut(bytes: &[u8], len: usize, whole: Whole) -> Result<&[u8], ParseError> {
    match bytes.get(..len) {
        None if whole == Whole::No => Ok(bytes),
        cut => cut.ok_or(ParseError::Short),
    }
}

/// The first two bytes of at least two.
fn number16(bytes: &[u8]) -> u16 {
    u16::from_be_bytes([bytes[0], bytes[1]])
}

fn take16(bytes: &[u8]) -> Result<(u16, &[u8]), ParseError> {
    let (number, rest) = bytes.split_first_chunk::<2>().ok_or(ParseError::Short)?;
    Ok((u16::from_be_bytes(*number), rest))
}
