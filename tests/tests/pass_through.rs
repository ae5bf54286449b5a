//! What is no Service's traffic passes the programs byte by byte.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use proxy_tests::packet::{Arp, Body, Frame, Icmp, L4, Mac, Udp, Vlan, ether_type, proto};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::scenario::matrix::{self, Setting};
use proxy_tests::{Family, Pod};

/// The MAC of an IP multicast group (RFC 1112, RFC 2464).
fn group_mac(group: IpAddr) -> Mac {
    match group {
        IpAddr::V4(ip) => {
            let [_, b, c, d] = ip.octets();
            Mac([0x01, 0, 0x5e, b & 0x7f, c, d])
        }
        IpAddr::V6(ip) => {
            let [.., a, b, c, d] = ip.octets();
            Mac([0x33, 0x33, a, b, c, d])
        }
    }
}

fn echo(family: Family, request: bool) -> L4 {
    let kind = match (family, request) {
        (Family::V4, true) => 8,
        (Family::V4, false) => 0,
        (Family::V6, true) => 128,
        (Family::V6, false) => 129,
    };
    L4::Icmp(Icmp { kind, code: 0, rest: [0x12, 0x34, 0, 1], payload: (0..48).collect() })
}

/// A neighbour solicitation for `target` (RFC 4861), with the sender's MAC.
fn solicitation(from: &Pod, target: IpAddr) -> Frame {
    let IpAddr::V6(ip) = target else { unreachable!("neighbour discovery is of IPv6") };
    let octets = ip.octets();
    let mut group = [0; 16];
    group[..2].copy_from_slice(&[0xff, 0x02]);
    group[11..13].copy_from_slice(&[1, 0xff]);
    group[13..].copy_from_slice(&octets[13..]);
    let group = IpAddr::from(group);
    let payload = [&octets[..], &[1, 1], &from.mac().0].concat();
    let icmp = L4::Icmp(Icmp { kind: 135, code: 0, rest: [0; 4], payload });
    let mut frame = Frame::ip((from.mac(), from.ip6()), (group_mac(group), group), icmp);
    if let Some(ip) = frame.as_ip_mut() {
        ip.ttl = 255;
    }
    frame
}

/// What pod `a` sends on its link, with a name for each.
fn frames(a: &Pod, b: &Pod) -> Vec<(String, Frame)> {
    let (IpAddr::V4(sender_ip), IpAddr::V4(target_ip)) = (a.ip4(), b.ip4()) else { unreachable!("IPv4") };
    let other = |ether_type, vlans| Frame {
        dst: b.mac(),
        src: a.mac(),
        vlans,
        body: Body::Other { ether_type, bytes: (0..100).collect() },
    };
    let arp = Arp { operation: 1, sender_mac: a.mac(), sender_ip, target_mac: Mac::default(), target_ip };
    let arp = Frame { dst: Mac::BROADCAST, src: a.mac(), vlans: Vec::new(), body: Body::Arp(arp) };
    let vlan = |tci| Vlan { tpid: ether_type::VLAN, tci };
    let mut all = vec![
        ("ARP".to_owned(), arp),
        ("neighbour solicitation".to_owned(), solicitation(a, b.ip6())),
        ("unknown EtherType".to_owned(), other(0x88b5, Vec::new())),
        ("VLAN".to_owned(), other(0x88b5, vec![vlan(0x6005)])),
        ("two VLANs".to_owned(), other(0x88b5, vec![vlan(5), vlan(6)])),
    ];
    for family in Family::BOTH {
        let to = |to: (Mac, IpAddr), l4| Frame::ip((a.mac(), a.ip(family)), to, l4);
        let peer = (b.mac(), b.ip(family));
        let group = match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::new(224, 0, 0, 251)),
            Family::V6 => IpAddr::from([0xff02, 0, 0, 0, 0, 0, 0, 0xfb]),
        };
        let udp = L4::Udp(Udp { src: 5353, dst: 5353, checksum: true, payload: vec![7; 33] });
        // An SCTP INIT as a whole, its checksum left to whoever reads it.
        let sctp = L4::Other { proto: proto::SCTP, bytes: [&[0x30, 0x39, 0x1f, 0x90][..], &[0xab; 40]].concat() };
        let mut tagged = to(peer, echo(family, false));
        tagged.vlans = vec![vlan(9)];
        all.extend([
            (format!("{family} echo reply"), to(peer, echo(family, false))),
            (format!("{family} echo request"), to(peer, echo(family, true))),
            (format!("{family} multicast"), to((group_mac(group), group), udp)),
            (format!("{family} SCTP"), to(peer, sctp)),
            (format!("{family} ESP"), to(peer, L4::Other { proto: 50, bytes: vec![0x5c; 64] })),
            (format!("{family} in a VLAN"), tagged),
        ]);
    }
    all
}

#[test]
fn other_traffic_is_untouched() {
    let setting = Setting { links: proxy_tests::Links::Routed, hostile: true, rp_filter: true };
    for args in [&[][..], &["--attach", "clsact"]] {
        let scenario = matrix::scenario(setting, args).expect("scenario");
        let [a, b] = ["a", "b"].map(|name| scenario.cluster().pod(name).expect("pod"));
        let [from, to] = [&a, &b].map(|pod| RawSocket::open(pod.netns(), "eth0").expect("socket"));
        let before = scenario.counters(0).expect("counters");
        for (name, frame) in frames(&a, &b) {
            from.send(&frame.build()).expect("sent");
            // The kernel takes the outermost tag off before a packet socket sees the frame.
            let untagged = Frame { vlans: frame.vlans.iter().skip(1).copied().collect(), ..frame.clone() };
            let expected = untagged.build();
            let got = to.receive(Duration::from_secs(3), |got| got == expected);
            got.unwrap_or_else(|error| panic!("{name} does not arrive as it was sent: {error}"));
        }
        let added = scenario.counters(0).expect("counters").since(&before);
        assert_eq!(added.rewrites().names(), Vec::<String>::new());
        for (hook, reason) in
            [("from_pod", "not_ip"), ("to_pod", "not_ip"), ("from_pod", "other_protocol"), ("to_pod", "other_protocol")]
        {
            assert!(added.get(hook, reason) >= 4, "{hook}.{reason} in {added}");
        }

        // Beyond the node: the echo of a host outside comes back to the pod as it was sent.
        for family in Family::BOTH {
            let outside = scenario.cluster().outside_ip(family);
            let gateway = scenario.node(0).bridge_mac();
            let request = Frame::ip((a.mac(), a.ip(family)), (gateway, outside), echo(family, true));
            from.send(&request.build()).expect("sent");
            let reply = from.receive(Duration::from_secs(3), |got| {
                let Ok(got) = Frame::parse(got) else { return false };
                got.as_ip()
                    .is_some_and(|ip| ip.src == outside && ip.dst == a.ip(family) && ip.l4 == echo(family, false))
            });
            reply.unwrap_or_else(|error| panic!("{family} echo from outside: {error}"));
        }
    }
}
