//! Frames built, parsed back and verified; known bytes where the outside world fixes them.

use super::named::{GATEWAY, POD_ONE, POD_TWO, VIP_ONE};
use super::*;
use crate::address::Family;

/// One frame of every kind.
fn kinds() -> Vec<Frame> {
    let mut frames = vec![
        Frame {
            dst: Mac::BROADCAST,
            src: POD_ONE.mac,
            vlans: Vec::new(),
            body: Body::Arp(Arp {
                operation: 1,
                sender_mac: POD_ONE.mac,
                sender_ip: POD_ONE.ip4,
                target_mac: Mac::default(),
                target_ip: GATEWAY.ip4,
            }),
        },
        Frame {
            dst: POD_TWO.mac,
            src: POD_ONE.mac,
            vlans: vec![Vlan { tpid: ether_type::QINQ, tci: 0x2005 }, Vlan { tpid: ether_type::VLAN, tci: 7 }],
            body: Body::Other { ether_type: 0x88b5, bytes: vec![1, 2, 3] },
        },
    ];
    for family in Family::BOTH {
        let mut tcp = POD_ONE.tcp(40_000, &VIP_ONE, 80, family, tcp_flag::SYN);
        let ip = tcp.as_ip_mut().expect("IP");
        ip.class = 0xb8;
        match family {
            Family::V4 => ip.options = vec![7, 7, 4, 0, 0, 0, 0, 0],
            Family::V6 => {
                ip.extensions = vec![
                    Extension { kind: proto::HOP_BY_HOP, content: vec![1, 4, 0, 0, 0, 0] },
                    Extension { kind: proto::DESTINATION, content: vec![1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] },
                ];
            }
        }
        let L4::Tcp(segment) = &mut ip.l4 else { unreachable!("built as TCP") };
        segment.options = vec![2, 4, 5, 0xb4];
        segment.payload = b"odd".to_vec();
        frames.push(tcp);
        frames.push(POD_ONE.udp(5000, &POD_TWO, 53, family, b"query"));
        let rest = [0, 1, 0, 2];
        let echo =
            Icmp { kind: if family == Family::V4 { 8 } else { 128 }, rest, payload: vec![9; 33], ..Icmp::default() };
        frames.push(POD_ONE.send(&POD_TWO, family, L4::Icmp(echo)));
        frames.push(POD_ONE.send(&POD_TWO, family, L4::Other { proto: proto::SCTP, bytes: vec![0; 12] }));
    }
    frames
}

#[test]
fn every_kind_comes_back() {
    for frame in kinds() {
        let bytes = frame.build();
        assert_eq!(Frame::parse(&bytes).as_ref(), Ok(&frame), "{bytes:02x?}");
        let mut padded = bytes.clone();
        padded.resize(bytes.len().max(60), 0);
        if frame.as_ip().is_some() {
            assert_eq!(Frame::parse(&padded).as_ref(), Ok(&frame), "Ethernet padding is not payload");
        }
    }
}

#[test]
fn every_kind_has_right_checksums() {
    let sums: Vec<_> = kinds().iter().map(|frame| verify_checksums(&frame.build())).collect();
    let sum = |ipv4_header, l4| Ok(Checksums { ipv4_header, l4 });
    let of = |v4| [sum(v4, L4Sum::Right), sum(v4, L4Sum::Right), sum(v4, L4Sum::Right), sum(v4, L4Sum::Unknown)];
    let mut expected = vec![sum(false, L4Sum::Unknown), sum(false, L4Sum::Unknown)];
    expected.extend(of(true));
    expected.extend(of(false));
    assert_eq!(sums, expected);
}

/// An IPv4 UDP packet captured from a Linux host, with its checksums.
#[test]
fn known_bytes() {
    let frame = Frame::ip(
        (Mac([2, 0, 0, 0, 0, 1]), [192, 168, 0, 1].into()),
        (Mac([2, 0, 0, 0, 0, 2]), [192, 168, 0, 199].into()),
        L4::Other { proto: proto::UDP, bytes: Vec::new() },
    );
    let mut frame = frame;
    let ip = frame.as_ip_mut().expect("IP");
    (ip.dont_fragment, ip.l4) = (true, L4::Other { proto: proto::UDP, bytes: vec![0; 95] });
    // The worked example of the IPv4 header checksum: 4500 0073 0000 4000 4011 b861 c0a8 0001 c0a8 00c7.
    let header = &frame.build()[14..34];
    assert_eq!(
        header,
        [0x45, 0, 0, 0x73, 0, 0, 0x40, 0, 0x40, 0x11, 0xb8, 0x61, 0xc0, 0xa8, 0, 1, 0xc0, 0xa8, 0, 0xc7]
    );
}

#[test]
fn every_flipped_byte_behind_ethernet_is_seen() {
    for family in Family::BOTH {
        let frame = POD_ONE.udp(5000, &POD_TWO, 53, family, b"query!");
        let bytes = frame.build();
        // TTL and class are outside every checksum in IPv6, and so is the flow label.
        let covered: Vec<usize> = match family {
            Family::V4 => (14..bytes.len()).collect(),
            Family::V6 => (22..bytes.len()).collect(),
        };
        for at in covered {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x11;
            assert!(verify_checksums(&damaged).is_err(), "{family} byte {at}");
        }
    }
}

#[test]
fn udp_without_checksum_is_for_ipv4_only() {
    let datagram = |family| {
        let l4 = L4::Udp(Udp { src: 1, dst: 2, checksum: false, payload: vec![1] });
        verify_checksums(&POD_ONE.send(&POD_TWO, family, l4).build())
    };
    assert_eq!(datagram(Family::V4), Ok(Checksums { ipv4_header: true, l4: L4Sum::Absent }));
    assert!(matches!(datagram(Family::V6), Err(ChecksumError::Wrong { part: checksum::Part::Udp, got: 0, .. })));
}

#[test]
fn quoted_header_of_an_icmp_error_is_checked() {
    let quoted = POD_ONE.udp(5000, &POD_TWO, 53, Family::V4, &[0; 64]).build();
    let error = |quoted: &[u8]| {
        let icmp = Icmp { kind: 3, code: 3, rest: [0; 4], payload: quoted[14..14 + 28].to_vec() };
        verify_checksums(&POD_TWO.send(&POD_ONE, Family::V4, L4::Icmp(icmp)).build())
    };
    assert_eq!(error(&quoted), Ok(Checksums { ipv4_header: true, l4: L4Sum::Right }));
    let mut wrong = quoted.clone();
    wrong[14 + 15] ^= 1; // the quoted source address, without its checksum
    assert!(matches!(error(&wrong), Err(ChecksumError::Wrong { part: checksum::Part::InnerIpv4, .. })));
}

#[test]
fn fragments_carry_the_whole_payload_in_order() {
    for family in Family::BOTH {
        let payload: Vec<u8> = (0..=255).cycle().take(3000).collect();
        let mut frame = POD_ONE.udp(5000, &POD_TWO, 53, family, &payload);
        frame.as_ip_mut().expect("IP").id = 77;
        let fragments = frame.fragments(1280);
        let whole = &frame.build()[if family == Family::V4 { 34 } else { 54 }..];
        let mut at = 0;
        for (index, fragment) in fragments.iter().enumerate() {
            assert_eq!(Frame::parse(&fragment.build()).as_ref(), Ok(fragment));
            let ip = fragment.as_ip().expect("IP");
            let L4::Other { proto: proto::UDP, bytes } = &ip.l4 else { panic!("{ip:?}") };
            assert_eq!(bytes[..], whole[at..at + bytes.len()]);
            assert_eq!(ip.fragment.map(|place| usize::from(place.offset)), Some(at));
            assert_eq!(ip.fragment.map(|place| place.more), Some(index + 1 < fragments.len()));
            assert!(ip.build().len() <= 1280);
            assert_eq!(ip.id, 77);
            at += bytes.len();
        }
        assert_eq!((fragments.len(), at), (3, whole.len()));
        assert_eq!(frame.fragments(9000), [frame.clone()]);
    }
}

#[test]
fn every_truncation_is_refused() {
    for frame in kinds().iter().filter(|frame| frame.as_ip().is_some()) {
        let bytes = frame.build();
        for len in 0..bytes.len() {
            assert_eq!(Frame::parse(&bytes[..len]), Err(ParseError::Short), "{len} of {}", bytes.len());
        }
    }
}
