//! Tables of what a pod may say on its link.

extern crate std;
use std::vec::Vec;

use proxy_abi::{DeviceEntry, IpBytes, MacBytes};

use super::*;

const OWN: [u8; 6] = [2, 0, 0, 0, 0, 0x11];
const OTHER: [u8; 6] = [2, 0, 0, 0, 0, 0x12];
const IP6: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2];
const IP6_OTHER: [u8; 16] = [0xfd, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 3];
const LOCAL: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xfe, 0, 0, 0x11];

fn ip6(octets: [u8; 16]) -> IpBytes {
    core::net::Ipv6Addr::from(octets).into()
}

fn device(ip4: IpBytes) -> DeviceEntry {
    DeviceEntry {
        ip4,
        ip6: ip6(IP6),
        gateway_ip4: IpBytes::UNSPECIFIED,
        gateway_ip6: IpBytes::UNSPECIFIED,
        pod_mac: MacBytes(OWN),
        gateway_mac: MacBytes(OTHER),
        bridge: 0,
        flags: 0,
        slot: 1,
        reserved: 0,
        since: 0,
        mtu: 0,
    }
}

fn own4() -> IpBytes {
    core::net::Ipv4Addr::new(10, 0, 0, 2).into()
}

fn arp_packet(operation: u8, mac: [u8; 6], ip: [u8; 4]) -> Vec<u8> {
    let mut p = Vec::from([0xff; 6]);
    p.extend(OWN);
    p.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    p.extend(mac);
    p.extend(ip);
    p.extend([0, 0, 0, 0, 0, 0, 10, 0, 0, 1]);
    // What Ethernet pads a frame with.
    p.extend([0; 18]);
    p
}

#[test]
fn arp_is_for_oneself() {
    let refused = Some(Reason::FrameNeighbour);
    let cases = [
        (arp_packet(1, OWN, [10, 0, 0, 2]), None),
        (arp_packet(2, OWN, [10, 0, 0, 2]), None),
        (arp_packet(1, OWN, [0; 4]), None),
        (arp_packet(2, OWN, [0; 4]), refused),
        (arp_packet(1, OWN, [10, 0, 0, 3]), refused),
        (arp_packet(1, OTHER, [10, 0, 0, 2]), refused),
        (arp_packet(8, OWN, [10, 0, 0, 2]), refused),
        (arp_packet(1, OWN, [10, 0, 0, 2])[..41].to_vec(), refused),
    ];
    for (packet, expected) in &cases {
        assert_eq!(arp(packet.as_slice(), &device(own4())), *expected, "{packet:02x?}");
    }
    for (at, byte) in [(15, 6), (16, 9), (18, 8), (19, 16)] {
        let mut other = arp_packet(1, OWN, [10, 0, 0, 2]);
        other[at] = byte;
        assert_eq!(arp(other.as_slice(), &device(own4())), refused, "{at}");
    }
    // A pod without an address of this family may probe, no more.
    let nobody = device(IpBytes::UNSPECIFIED);
    assert_eq!(arp(arp_packet(1, OWN, [0; 4]).as_slice(), &nobody), None);
    assert_eq!(arp(arp_packet(2, OWN, [0; 4]).as_slice(), &nobody), refused);
}

#[test]
fn a_pod_has_its_own_addresses_alone() {
    let cases = [
        (own4(), true),
        (ip6(IP6), true),
        (ip6(LOCAL), true),
        (core::net::Ipv4Addr::new(10, 0, 0, 3).into(), false),
        (core::net::Ipv4Addr::UNSPECIFIED.into(), false),
        (ip6(IP6_OTHER), false),
        (ip6([0; 16]), false),
        (IpBytes::UNSPECIFIED, false),
        (link_local(&MacBytes(OTHER)), false),
    ];
    for (ip, expected) in cases {
        assert_eq!(is_own(&device(own4()), &ip), expected, "{ip}");
        // An unbound address is nobody's.
        assert_eq!(is_own(&device(IpBytes::UNSPECIFIED), &ip), expected && ip != own4(), "{ip}");
    }
}

#[test]
fn servers_of_dhcp_are_known_by_their_ports() {
    let cases = [((67, 68), true), ((547, 546), true), ((68, 67), false), ((546, 547), false), ((67, 67), false)];
    assert_eq!(cases.map(|((from, to), _)| is_dhcp_server(from, to)), cases.map(|(_, expected)| expected));
}

/// A neighbour advertisement of `target` with options.
fn advertisement(hops: u8, target: [u8; 16], options: &[u8]) -> Vec<u8> {
    let mut p = Vec::from(OTHER);
    p.extend(OWN);
    p.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 24 + options.len() as u8, 58, hops]);
    p.extend(IP6);
    p.extend(IP6_OTHER);
    p.extend([136, 0, 0, 0, 0, 0, 0, 0]);
    p.extend(target);
    p.extend(options);
    p
}

/// A name, hop limit, target, options, and what is said to it.
type Case<'a> = (&'a str, u8, [u8; 16], Vec<u8>, Option<Reason>);

#[test]
fn options_name_the_pod_or_nobody() {
    let mac = |name: u8, mac: [u8; 6]| [&[name, 1][..], &mac].concat();
    let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
    let refused = Some(Reason::FrameNeighbour);
    let cases: &[Case<'_>] = &[
        ("own", 255, IP6, mac(2, OWN), None),
        ("none", 255, IP6, Vec::new(), None),
        ("link-local", 255, LOCAL, mac(2, OWN), None),
        ("another's MAC", 255, IP6, mac(2, OTHER), refused),
        ("another's MAC as source", 255, IP6, mac(1, OTHER), refused),
        ("another's MAC behind", 255, IP6, [&nonce[..], &mac(2, OTHER)].concat(), refused),
        ("a MAC of 16 bytes", 255, IP6, [&[2, 2][..], &OWN, &[0; 8]].concat(), refused),
        ("no length", 255, IP6, Vec::from([2, 0, 0, 0, 0, 0, 0, 0]), refused),
        ("four others", 255, IP6, nonce.repeat(4), None),
        ("five others", 255, IP6, nonce.repeat(5), refused),
        ("another's address", 255, IP6_OTHER, mac(2, OWN), refused),
        ("routed", 64, IP6, mac(2, OWN), refused),
    ];
    for (name, hops, target, options, expected) in cases {
        let packet = advertisement(*hops, *target, options);
        let message = Message { src: ip6(IP6), at: 54, kind: 136, fragmented: false };
        // A packet ends one byte after the last that is read.
        let padded = [&packet[..], &[0]].concat();
        assert_eq!(link_message(padded.as_slice(), &device(own4()), &message), *expected, "{name}");
        let cut = Message { fragmented: true, ..message };
        assert_eq!(link_message(padded.as_slice(), &device(own4()), &cut), refused, "{name}, in fragments");
    }
}
