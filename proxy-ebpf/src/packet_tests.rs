//! Tables of packets: what is read from each, or why it is let alone.

extern crate std;
use std::vec::Vec;

use core::net::IpAddr;

use super::*;

fn ethernet(ethertype: u16) -> Vec<u8> {
    let mut p = std::vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    p.extend(ethertype.to_be_bytes());
    p
}

fn v4(options: usize, frag: u16, proto: u8, payload: &[u8]) -> Vec<u8> {
    let mut p = ethernet(0x0800);
    p.extend([0x45 + options as u8, 0, 0, 60, 0xab, 0xcd]);
    p.extend(frag.to_be_bytes());
    p.extend([64, proto, 0, 0, 10, 0, 0, 1, 10, 96, 0, 1]);
    p.extend(std::vec![1; options * 4]);
    p.extend(payload);
    p
}

fn v6(next: u8, rest: &[u8]) -> Vec<u8> {
    let mut p = ethernet(0x86dd);
    p.extend([0x60, 0, 0, 0, 0, 40, next, 64]);
    p.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
    p.extend([0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    p.extend(rest);
    p
}

/// The packet with another length in its header, which is at `at`: what is behind it stays in the frame.
fn ending(mut packet: Vec<u8>, at: usize, length: u16) -> Vec<u8> {
    packet[at..at + 2].copy_from_slice(&length.to_be_bytes());
    packet
}

const TCP_SYN: [u8; 20] = [0x12, 0x34, 0, 80, 0, 0, 0, 1, 0, 0, 0, 0, 0x50, tcp_flag::SYN, 0, 0, 0, 0, 0, 0];
const UDP: [u8; 8] = [0x12, 0x34, 0, 53, 0, 8, 0, 0];

/// What the table compares: addresses and ports as people write them, and the rest.
#[derive(Debug, PartialEq)]
struct Seen {
    src: (IpAddr, u16),
    dst: (IpAddr, u16),
    proto: u8,
    l4: u16,
    tcp_flags: u8,
    fragment: Fragment,
    id: u32,
}

fn run<F: Family>(bytes: &[u8]) -> Result<Seen, Reason> {
    let p = parse::<F, [u8]>(bytes)?;
    Ok(Seen {
        src: (p.tuple.src.into(), p.tuple.src_port.get()),
        dst: (p.tuple.dst.into(), p.tuple.dst_port.get()),
        proto: p.proto.0,
        l4: p.l4,
        tcp_flags: p.tcp_flags,
        fragment: p.fragment,
        id: if p.fragment == Fragment::WHOLE { 0 } else { p.fragment_id },
    })
}

fn seen4(dst_port: u16, proto: u8, l4: u16, tcp_flags: u8) -> Seen {
    Seen {
        src: ([10, 0, 0, 1].into(), 0x1234),
        dst: ([10, 96, 0, 1].into(), dst_port),
        proto,
        l4,
        tcp_flags,
        fragment: Fragment::WHOLE,
        id: 0,
    }
}

fn seen6(dst_port: u16, proto: u8, l4: u16, tcp_flags: u8) -> Seen {
    Seen {
        src: ([0xfd00, 0, 0, 0, 0, 0, 0, 1].into(), 0x1234),
        dst: ([0xfd00, 0, 0, 0, 0, 0, 0, 2].into(), dst_port),
        ..seen4(dst_port, proto, l4, tcp_flags)
    }
}

#[test]
fn ipv4() {
    let id = u32::from(u16::from_ne_bytes([0xab, 0xcd]));
    let none = |s: Seen| Seen { src: (s.src.0, 0), dst: (s.dst.0, 0), ..s };
    let table = [
        ("tcp", v4(0, 0x4000, 6, &TCP_SYN), Ok(seen4(80, 6, 34, 2))),
        ("udp", v4(0, 0, 17, &UDP), Ok(seen4(53, 17, 34, 0))),
        ("options", v4(3, 0, 17, &UDP), Ok(seen4(53, 17, 46, 0))),
        ("most options", v4(10, 0, 6, &TCP_SYN), Ok(seen4(80, 6, 74, 2))),
        ("first fragment", v4(0, 0x2000, 17, &UDP), Ok(Seen { fragment: Fragment::FIRST, id, ..seen4(53, 17, 34, 0) })),
        (
            "later fragment",
            v4(0, 0x2001, 17, &UDP),
            Ok(Seen { fragment: Fragment::LATER, id, ..none(seen4(0, 17, 34, 0)) }),
        ),
        (
            "last fragment",
            v4(0, 0x0001, 17, &UDP),
            Ok(Seen { fragment: Fragment::LATER, id, ..none(seen4(0, 17, 34, 0)) }),
        ),
        ("ports behind the end of a first fragment", ending(v4(0, 0x2000, 17, &UDP), 16, 23), Err(Reason::Unparsed)),
        ("flags behind the end of a first fragment", ending(v4(0, 0x2000, 6, &TCP_SYN), 16, 28), Err(Reason::Unparsed)),
        ("icmp", v4(0, 0, 1, &[8, 0]), Err(Reason::OtherProtocol)),
        ("sctp", v4(0, 0, 132, &UDP), Ok(seen4(53, 132, 34, 0))),
        ("icmp error", v4(0, 0, 1, &[3, 4]), Ok(Seen { tcp_flags: 3, ..none(seen4(0, 1, 34, 0)) })),
        ("icmp error in fragments", v4(0, 0x2000, 1, &[3, 4]), Err(Reason::OtherProtocol)),
        ("tcp cut before its flags", v4(0, 0, 6, &TCP_SYN[..13]), Err(Reason::Unparsed)),
        ("udp cut in its ports", v4(0, 0, 17, &UDP[..3]), Err(Reason::Unparsed)),
        ("cut in the header", v4(0, 0, 17, &[])[..30].to_vec(), Err(Reason::Unparsed)),
        (
            "header length 16",
            {
                let mut p = v4(0, 0, 17, &UDP);
                p[14] = 0x44;
                p
            },
            Err(Reason::Unparsed),
        ),
        (
            "version 6",
            {
                let mut p = v4(0, 0, 17, &UDP);
                p[14] = 0x65;
                p
            },
            Err(Reason::Unparsed),
        ),
    ];
    for (name, bytes, expected) in table {
        assert_eq!(run::<V4>(&bytes), expected, "{name}");
    }
}

#[test]
fn ipv6() {
    let cat = |parts: &[&[u8]]| parts.concat();
    let hop = |next| [next, 0, 1, 4, 0, 0, 0, 0];
    let frag = |next, off: u16| [next, 0, (off >> 8) as u8, off as u8, 9, 8, 7, 6];
    let id = u32::from_ne_bytes([9, 8, 7, 6]);
    let table = [
        ("tcp", v6(6, &TCP_SYN), Ok(seen6(80, 6, 54, 2))),
        ("udp", v6(17, &UDP), Ok(seen6(53, 17, 54, 0))),
        ("hop by hop", v6(0, &cat(&[&hop(17), &UDP])), Ok(seen6(53, 17, 62, 0))),
        ("two destination options", v6(60, &cat(&[&hop(60), &hop(6), &TCP_SYN])), Ok(seen6(80, 6, 70, 2))),
        ("authentication", v6(51, &cat(&[&[17, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], &UDP])), Ok(seen6(53, 17, 66, 0))),
        (
            "first fragment",
            v6(44, &cat(&[&frag(17, 1), &UDP])),
            Ok(Seen { fragment: Fragment::FIRST, id, ..seen6(53, 17, 62, 0) }),
        ),
        (
            "later fragment",
            v6(44, &cat(&[&frag(17, 8), &UDP])),
            Ok(Seen {
                src: (seen6(0, 0, 0, 0).src.0, 0),
                dst: (seen6(0, 0, 0, 0).dst.0, 0),
                fragment: Fragment::LATER,
                id,
                ..seen6(0, 17, 62, 0)
            }),
        ),
        (
            "ports behind the end of a first fragment",
            ending(v6(44, &cat(&[&frag(17, 1), &UDP])), 18, 11),
            Err(Reason::Unparsed),
        ),
        ("atomic fragment (RFC 6946)", v6(44, &cat(&[&frag(17, 0), &UDP])), Ok(seen6(53, 17, 62, 0))),
        ("routing header", v6(43, &cat(&[&hop(17), &UDP])), Err(Reason::OtherProtocol)),
        ("icmpv6", v6(58, &[128, 0, 0, 0]), Err(Reason::OtherProtocol)),
        ("icmp in ipv6", v6(1, &[3, 4, 0, 0]), Err(Reason::OtherProtocol)),
        ("no next header", v6(59, &[]), Err(Reason::OtherProtocol)),
        ("seven extension headers", v6(60, &cat(&[&hop(60).repeat(6), &hop(17), &UDP])), Err(Reason::OtherProtocol)),
        ("extension header past the end", v6(60, &[17, 200, 0, 0, 0, 0, 0, 0]), Err(Reason::Unparsed)),
        ("cut extension header", v6(60, &[17]), Err(Reason::Unparsed)),
    ];
    for (name, bytes, expected) in table {
        assert_eq!(run::<V6>(&bytes), expected, "{name}");
    }
}

proptest::proptest! {
    /// Any bytes parse or are refused; nothing panics, and what parses lies inside the packet.
    #[test]
    fn any_bytes(bytes in proptest::collection::vec(0u8.., 0..200), v6 in proptest::bool::ANY) {
        let parsed = if v6 { parse::<V6, [u8]>(&bytes) } else { parse::<V4, [u8]>(&bytes) };
        if let Ok(p) = parsed && p.fragment != Fragment::LATER {
            proptest::prop_assert!(usize::from(p.l4) + 4 <= bytes.len());
        }
    }
}

#[test]
fn headers_of_a_segment_end_where_its_data_begins() {
    let with_options: [u8; 32] = core::array::from_fn(|i| if i == 12 { 0x80 } else { 0 });
    let table = [
        ("IPv4", segment_headers::<V4, [u8]>(&v4(0, 0, 6, &TCP_SYN)), Some(54)),
        ("IPv4, timestamps", segment_headers::<V4, [u8]>(&v4(0, 0, 6, &with_options)), Some(66)),
        (
            "IPv4, options that are not there yet",
            segment_headers::<V4, [u8]>(&v4(0, 0, 6, &with_options[..20])),
            Some(66),
        ),
        ("IPv4, cut before it says", segment_headers::<V4, [u8]>(&v4(0, 0, 6, &TCP_SYN[..12])), None),
        ("IPv4, IP options", segment_headers::<V4, [u8]>(&v4(2, 0, 6, &TCP_SYN)), None),
        ("IPv4, UDP", segment_headers::<V4, [u8]>(&v4(0, 0, 17, &UDP)), None),
        ("IPv6", segment_headers::<V6, [u8]>(&v6(6, &TCP_SYN)), Some(74)),
        ("IPv6, timestamps", segment_headers::<V6, [u8]>(&v6(6, &with_options)), Some(86)),
        ("IPv6, behind an extension header", segment_headers::<V6, [u8]>(&v6(60, &[6, 0, 1, 4, 0, 0, 0, 0])), None),
        ("nothing", segment_headers::<V6, [u8]>(&[]), None),
    ];
    for (name, got, expected) in table {
        assert_eq!(got, expected, "{name}");
    }
}
