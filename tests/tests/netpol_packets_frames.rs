//! What an enforced pod may say of itself on its link, frame by frame; and that nothing of it is asked of a pod without
//! policies.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::Result;
use proxy_abi::{Hook, Reason};
use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::spec::{Change, PolicySpec, RuleSpec, SelectorSpec};
use proxy_tests::Family;
use proxy_tests::bpf::policed::{NODE, Policed, namespace, pod};
use proxy_tests::bpf::{Bench, ROOMY, verdict};
use proxy_tests::packet::named::{GATEWAY, OUTSIDE, POD_ONE, POD_TWO};
use proxy_tests::packet::neighbour::{self, link_local, link_message};
use proxy_tests::packet::{Body, Extension, Fragment, Frame, Icmp, L4, Mac, Udp, Vlan, ether_type, proto, tcp_flag};

const SYN: u8 = tcp_flag::SYN;

fn arp(operation: u16, sender_mac: Mac, sender_ip: Ipv4Addr) -> Frame {
    neighbour::arp(POD_ONE.mac, operation, (sender_mac, sender_ip), GATEWAY.ip4)
}

fn other(ether_type: u16) -> Frame {
    let body = Body::Other { ether_type, bytes: vec![0x42; 60] };
    Frame { dst: POD_TWO.mac, src: POD_ONE.mac, vlans: Vec::new(), body }
}

/// An ICMPv6 message on the link, with a target and an option that names a MAC.
fn link(kind: u8, src: Ipv6Addr, target: Option<Ipv6Addr>, option: Option<(u8, Mac)>) -> Frame {
    link_message((POD_ONE.mac, src), kind, target, option)
}

fn hops(frame: &mut Frame, hops: u8) {
    if let Some(ip) = frame.as_ip_mut() {
        ip.ttl = hops;
    }
}

fn with(mut frame: Frame, change: impl FnOnce(&mut Frame)) -> Frame {
    change(&mut frame);
    frame
}

/// Frames that a pod with a policy that allows everything may send, or not.
fn frames() -> Vec<(String, Vec<u8>, Option<Reason>)> {
    let (own, mac) = (POD_ONE.ip6, POD_ONE.mac);
    let local = link_local(mac);
    let none = Ipv6Addr::UNSPECIFIED;
    let (source, neighbour, router) = (Reason::FrameSource, Reason::FrameNeighbour, Reason::FrameRouter);
    let unsolicited = |from, target, option| link(136, from, Some(target), option);
    let mut all: Vec<(String, Frame, Option<Reason>)> = Vec::new();
    let mut add = |name: &str, frame: Frame, reason| all.push((name.to_owned(), frame, reason));
    add("ARP request", arp(1, mac, POD_ONE.ip4), None);
    add("ARP reply", arp(2, mac, POD_ONE.ip4), None);
    add("ARP probe", arp(1, mac, Ipv4Addr::UNSPECIFIED), None);
    add("ARP reply of nobody", arp(2, mac, Ipv4Addr::UNSPECIFIED), Some(neighbour));
    add("ARP for another address", arp(2, mac, POD_TWO.ip4), Some(neighbour));
    add("ARP for the gateway", arp(1, mac, GATEWAY.ip4), Some(neighbour));
    add("ARP with another MAC", arp(2, POD_TWO.mac, POD_ONE.ip4), Some(neighbour));
    add("ARP from another MAC", with(arp(1, mac, POD_ONE.ip4), |f| f.src = POD_TWO.mac), Some(source));
    add("reverse ARP", arp(3, mac, POD_ONE.ip4), Some(neighbour));
    for (name, kind) in [("MPLS", 0x8847), ("LLDP", 0x88cc), ("802.3 with LLC", 60), ("PAE", 0x888e)] {
        add(name, other(kind), Some(Reason::FrameType));
    }
    for (name, tags) in
        [("VLAN 0", vec![(ether_type::VLAN, 0)]), ("QinQ", vec![(ether_type::QINQ, 5), (ether_type::VLAN, 0)])]
    {
        let vlans = tags.into_iter().map(|(tpid, tci)| Vlan { tpid, tci }).collect();
        let frame = POD_ONE.tcp(1, &POD_TWO, 2, Family::V4, SYN);
        add(name, Frame { vlans, ..frame }, Some(Reason::FrameType));
    }
    add("router solicitation", link(133, local, None, Some((1, mac))), None);
    add("solicitation to probe", link(135, none, Some(own), None), None);
    add("solicitation", link(135, own, Some(GATEWAY.ip6), Some((1, mac))), None);
    add("solicitation with another's MAC", link(135, own, Some(GATEWAY.ip6), Some((1, POD_TWO.mac))), Some(neighbour));
    add("solicitation from another", link(135, POD_TWO.ip6, Some(GATEWAY.ip6), Some((1, mac))), Some(source));
    add(
        "solicitation as the gateway's link",
        link(135, link_local(GATEWAY.mac), Some(own), Some((1, mac))),
        Some(source),
    );
    add("advertisement", unsolicited(own, own, Some((2, mac))), None);
    add("advertisement of the link", unsolicited(local, local, Some((2, mac))), None);
    add("advertisement of another", unsolicited(own, POD_TWO.ip6, Some((2, mac))), Some(neighbour));
    add("advertisement with another's MAC", unsolicited(own, own, Some((2, GATEWAY.mac))), Some(neighbour));
    add("advertisement of nobody", unsolicited(none, own, Some((2, mac))), Some(neighbour));
    add("routed advertisement", with(unsolicited(own, own, Some((2, mac))), |f| hops(f, 254)), Some(neighbour));
    add("advertisement from another MAC", with(unsolicited(own, own, None), |f| f.src = POD_TWO.mac), Some(source));
    let behind = Extension { kind: proto::HOP_BY_HOP, content: vec![1, 4, 0, 0, 0, 0] };
    let hidden = |frame: Frame| with(frame, |f| f.as_ip_mut().expect("IP").extensions = vec![behind.clone()]);
    add("advertisement behind options", hidden(unsolicited(own, POD_TWO.ip6, None)), Some(neighbour));
    add("router advertisement", link(134, local, None, None), Some(router));
    add("router advertisement behind options", hidden(link(134, local, None, None)), Some(router));
    add("redirect", link(137, local, Some(own), None), Some(router));
    add("listener report", with(link(143, local, None, None), |f| hops(f, 1)), None);
    add("listener query", with(link(130, local, None, None), |f| hops(f, 1)), Some(router));
    let cut = with(unsolicited(own, own, None), |f| {
        f.as_ip_mut().expect("IP").fragment = Some(Fragment { offset: 0, more: true });
        f.as_ip_mut().expect("IP").l4 = L4::Other { proto: proto::ICMPV6, bytes: [vec![136], vec![0; 31]].concat() };
    });
    add("fragmented advertisement", cut, Some(neighbour));
    for family in Family::BOTH {
        let named = |name: &str| format!("{family} {name}");
        let frame = || POD_ONE.tcp(1, &POD_TWO, 2, family, SYN);
        let forge = |ip: IpAddr| with(frame(), |f| f.as_ip_mut().expect("IP").src = ip);
        add(&named("own"), frame(), None);
        add(&named("as another pod"), forge(POD_TWO.ip(family)), Some(source));
        add(&named("as the gateway"), forge(GATEWAY.ip(family)), Some(source));
        add(&named("as somebody outside"), forge(OUTSIDE.ip(family)), Some(source));
        let nobody = if family == Family::V4 { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::V6(none) };
        add(&named("as nobody"), forge(nobody), Some(source));
        add(&named("from another MAC"), with(frame(), |f| f.src = GATEWAY.mac), Some(source));
        let echo = if family == Family::V4 { 8 } else { 128 };
        let ping = |src| {
            let icmp = L4::Icmp(Icmp { kind: echo, ..Icmp::default() });
            Frame::ip((mac, src), (POD_TWO.mac, POD_TWO.ip(family)), icmp)
        };
        add(&named("echo"), ping(POD_ONE.ip(family)), None);
        add(&named("echo as another"), ping(POD_TWO.ip(family)), Some(source));
        let (server, client) = if family == Family::V4 { (67, 68) } else { (547, 546) };
        let dhcp =
            |src, dst| POD_ONE.send(&POD_TWO, family, L4::Udp(Udp { src, dst, checksum: true, payload: vec![2; 20] }));
        add(&named("DHCP server"), dhcp(server, client), Some(router));
        add(&named("DHCP client"), dhcp(client, server), None);
        add(
            &named("error"),
            {
                let payload = POD_TWO.tcp(2, &POD_ONE, 1, family, SYN).build().split_off(14);
                let kind = if family == Family::V4 { 3 } else { 1 };
                POD_ONE.send(&POD_TWO, family, L4::Icmp(Icmp { kind, payload, ..Icmp::default() }))
            },
            None,
        );
    }
    add(
        "link-local",
        with(POD_ONE.tcp(1, &POD_TWO, 2, Family::V6, SYN), |f| f.as_ip_mut().expect("IP").src = IpAddr::V6(local)),
        None,
    );
    add(
        "another's link-local",
        with(POD_ONE.tcp(1, &POD_TWO, 2, Family::V6, SYN), |f| {
            f.as_ip_mut().expect("IP").src = IpAddr::V6(link_local(POD_TWO.mac));
        }),
        Some(source),
    );
    for (name, kinds) in [("routing header", vec![proto::ROUTING]), ("seven headers", vec![proto::DESTINATION; 7])] {
        let extension = |kind| Extension { kind, content: vec![1, 4, 0, 0, 0, 0] };
        let frame = with(POD_ONE.tcp(1, &POD_TWO, 2, Family::V6, SYN), |f| {
            f.as_ip_mut().expect("IP").extensions = kinds.into_iter().map(extension).collect();
        });
        add(name, frame, Some(Reason::FrameUnparsed));
    }
    let mut bytes: Vec<_> = all.into_iter().map(|(name, frame, reason)| (name, frame.build(), reason)).collect();
    for (family, len) in [(Family::V4, 37), (Family::V4, 47), (Family::V6, 56), (Family::V6, 67)] {
        let mut frame = POD_ONE.tcp(1, &POD_TWO, 2, family, SYN).build();
        frame.truncate(len);
        bytes.push((format!("{family} cut to {len}"), frame, Some(Reason::FrameUnparsed)));
    }
    let mut short = arp(2, mac, POD_ONE.ip4).build();
    short.truncate(38);
    bytes.push(("cut ARP".to_owned(), short, Some(neighbour)));
    bytes
}

fn start(bench: &Bench) -> Result<Policed<'_>> {
    let allowing = Change::Policy(PolicySpec {
        name: ObjectName::new("default", "everything"),
        audit: None,
        pod_selector: Some(SelectorSpec::default()),
        policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
        ingress: Some(vec![RuleSpec::default()]),
        egress: Some(vec![RuleSpec::default()]),
    });
    let one = Change::Pod(pod("one", &POD_ONE, NODE));
    Policed::start(bench, Limits::default(), vec![namespace("default"), one, allowing])
}

#[test]
fn a_pod_speaks_for_itself_alone() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        let policed = start(bench)?;
        for (slot, audited) in [(true, false), (false, false), (true, true)] {
            let enforced = slot && !audited;
            if slot {
                policed.place_pod(&POD_ONE, "one")?;
            } else {
                policed.place(&POD_ONE, 0)?;
            }
            policed.audit(&POD_ONE, audited)?;
            for (name, frame, reason) in frames() {
                bench.forget_flows()?;
                let got = policed.feed(Hook::FromPod, &POD_ONE, &frame)?;
                let reasons: Vec<Reason> = got.counts.keys().map(|(_, reason)| *reason).collect();
                match reason.filter(|_| enforced) {
                    Some(reason) => assert_eq!((got.verdict, reasons), (verdict::DROP, vec![reason]), "{name}"),
                    None => assert_eq!(got.verdict, verdict::PASS, "{name}: {reasons:?}"),
                }
                assert_eq!(got.packet, frame, "{name}");
            }
        }
        Ok(())
    })?
}

#[test]
fn what_comes_to_a_pod_is_of_a_known_kind() -> Result<()> {
    let reply = |frame: Frame| Frame { src: GATEWAY.mac, dst: POD_ONE.mac, ..frame };
    let tagged =
        Frame { vlans: vec![Vlan { tpid: ether_type::VLAN, tci: 0 }], ..POD_TWO.tcp(1, &POD_ONE, 2, Family::V4, SYN) };
    let frames = [
        ("ARP", reply(arp(2, GATEWAY.mac, GATEWAY.ip4)), None),
        ("solicitation", reply(link(135, GATEWAY.ip6, Some(POD_ONE.ip6), Some((1, GATEWAY.mac)))), None),
        ("router advertisement", reply(link(134, link_local(GATEWAY.mac), None, None)), None),
        (
            "routed advertisement",
            with(link(136, GATEWAY.ip6, Some(GATEWAY.ip6), None), |f| hops(f, 64)),
            Some(Reason::FrameNeighbour),
        ),
        ("VLAN 0", tagged, Some(Reason::FrameType)),
        ("unknown EtherType", other(0x88b5), Some(Reason::FrameType)),
    ];
    Bench::run(ROOMY, |bench| {
        let policed = start(bench)?;
        policed.place_pod(&POD_ONE, "one")?;
        for (name, frame, reason) in &frames {
            let got = policed.feed(Hook::ToPod, &POD_ONE, &frame.build())?;
            let wanted = if reason.is_some() { verdict::DROP } else { verdict::PASS };
            assert_eq!(got.verdict, wanted, "{name}: {:?}", got.counts);
            if let Some(reason) = reason {
                assert_eq!(got.counts, [((Hook::ToPod, *reason), 1)].into(), "{name}");
            }
        }
        Ok(())
    })?
}
