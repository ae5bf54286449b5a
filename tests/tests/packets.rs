//! Single packets through the real programs (`BPF_PROG_TEST_RUN`): whole packets, verdicts, flow tables and counters.
//!
//! What a packet must look like afterwards is built anew, with all checksums, and compared byte for byte.

use anyhow::{Result, ensure};
use proxy_abi::flow::state;
use proxy_abi::{DeviceEntry, FlowEntry, Hook, Proto, Reason};
use proxy_ebpf::packet::{Fragment as Part, V4, V6, parse};
use proxy_tests::Family;
use proxy_tests::bpf::talk::{Step, TALKS, Talk, changed, converse, drops, passes};
use proxy_tests::bpf::{Bench, Entry, ROOMY, redirected, verdict};
use proxy_tests::packet::named::{GATEWAY, Host, OUTSIDE, POD_ONE, POD_REMOTE, POD_THREE, POD_TWO, VIP_ONE, VIP_TWO};
use proxy_tests::packet::{Arp, Body, Extension, Fragment, Frame, Icmp, L4, Vlan, ether_type, proto, tcp_flag};

const SYN: u8 = tcp_flag::SYN;
const ACK: u8 = tcp_flag::ACK;
const FIN: u8 = tcp_flag::FIN | ACK;
const RST: u8 = tcp_flag::RST;
const SYN_ACK: u8 = SYN | ACK;
/// Ports: of the client, of the Service, of the backend.
const CLIENT: u16 = 1000;
const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// Both entries of a flow from pod one through the first Service.
fn pair(talk: Talk, live: bool, state: u8, to: (&Host, u16), from: (&Host, u16), flags: u16) -> Vec<Entry> {
    let original = (talk.end(&POD_ONE, CLIENT), talk.end(&VIP_ONE, PORT));
    let translated = (talk.end(from.0, from.1), talk.end(to.0, to.1));
    let entry = |role| Entry { live, original, translated, state, flags: role | flags };
    vec![entry(FlowEntry::KEY_ORIGINAL), entry(FlowEntry::KEY_TRANSLATED)]
}

/// The frame with the MAC of another sender: what a bridge or the stack has forwarded.
fn sent_by(mut frame: Frame, src: &Host) -> Frame {
    frame.src = src.mac;
    frame
}

#[test]
fn a_service_flow_at_every_hook() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let paths = [
                ("redirect", POD_TWO, DeviceEntry::REDIRECT | DeviceEntry::SWITCH, local(talk), FlowEntry::REDIRECT),
                ("switch", POD_TWO, DeviceEntry::SWITCH, stacked(talk, &POD_TWO), FlowEntry::SWITCH),
                ("stack", POD_TWO, 0, stacked(talk, &GATEWAY), 0),
                ("remote", POD_REMOTE, DeviceEntry::REDIRECT, remote(talk), 0),
            ];
            for (path, backend, devices, steps, flags) in paths {
                let name = format!("{path}, {talk:?}");
                bench.set_pods(devices)?;
                bench.set_service(&VIP_ONE, PORT, talk.proto, &[(backend, TARGET)])?;
                converse(bench, &name, &steps)?;
                let state = if talk.is_tcp() { state::ESTABLISHED } else { state::ASSURED };
                let expected = pair(talk, talk.is_tcp(), state, (&backend, TARGET), (&POD_ONE, CLIENT), flags);
                assert_eq!(bench.entries()?, expected, "{name}");
                bench.forget_flows()?;
            }
        }
        Ok(())
    })?
}

/// Veth to veth: translated back at the backend's veth.
fn local(talk: Talk) -> Vec<Step> {
    let (client, vip, backend) = ((&POD_ONE, CLIENT), (&VIP_ONE, PORT), (&POD_TWO, TARGET));
    let there = |flags| redirected(talk.frame(client, backend, flags), &POD_TWO);
    let back = |flags| redirected(talk.frame(vip, client, flags), &POD_ONE);
    vec![
        changed(
            Hook::FromPod,
            POD_ONE,
            talk.frame(client, vip, SYN),
            verdict::REDIRECT,
            there(SYN),
            Reason::ServiceNew,
        ),
        passes(Hook::ToPod, POD_TWO, there(SYN), Reason::Seen),
        changed(
            Hook::FromPod,
            POD_TWO,
            talk.frame(backend, client, SYN_ACK),
            verdict::REDIRECT,
            back(SYN_ACK),
            Reason::Reply,
        ),
        passes(Hook::ToPod, POD_ONE, back(SYN_ACK), Reason::Seen),
        changed(Hook::FromPod, POD_ONE, talk.frame(client, vip, ACK), verdict::REDIRECT, there(ACK), Reason::Service),
        passes(Hook::ToPod, POD_TWO, there(ACK), Reason::Seen),
        // The backend's programs are gone: the reply comes over the bridge as the backend sent it.
        changed(
            Hook::ToPod,
            POD_ONE,
            talk.frame(backend, client, ACK),
            verdict::PASS,
            sent_by(talk.frame(vip, client, ACK), &POD_TWO),
            Reason::Reply,
        ),
    ]
}

/// Through the bridge, or the stack, of a node whose interfaces must not be left out: translated back at the client's
/// veth. `next`: whose MAC the frame goes to.
fn stacked(talk: Talk, next: &Host) -> Vec<Step> {
    let (client, vip, backend) = ((&POD_ONE, CLIENT), (&VIP_ONE, PORT), (&POD_TWO, TARGET));
    let there = |flags| Frame { dst: next.mac, ..talk.frame(client, backend, flags) };
    let reply = talk.frame(backend, client, SYN_ACK);
    vec![
        changed(Hook::FromPod, POD_ONE, talk.frame(client, vip, SYN), verdict::PASS, there(SYN), Reason::ServiceNew),
        passes(Hook::ToPod, POD_TWO, there(SYN), Reason::Seen),
        passes(Hook::FromPod, POD_TWO, reply.clone(), Reason::Seen),
        changed(
            Hook::ToPod,
            POD_ONE,
            reply,
            verdict::PASS,
            sent_by(talk.frame(vip, client, SYN_ACK), &POD_TWO),
            Reason::Reply,
        ),
        changed(Hook::FromPod, POD_ONE, talk.frame(client, vip, ACK), verdict::PASS, there(ACK), Reason::Service),
    ]
}

/// To another node and back.
fn remote(talk: Talk) -> Vec<Step> {
    let (client, vip, backend) = ((&POD_ONE, CLIENT), (&VIP_ONE, PORT), (&POD_REMOTE, TARGET));
    let there = |flags| talk.frame(client, backend, flags);
    vec![
        changed(Hook::FromPod, POD_ONE, talk.frame(client, vip, SYN), verdict::PASS, there(SYN), Reason::ServiceNew),
        changed(
            Hook::ToPod,
            POD_ONE,
            talk.frame(backend, client, SYN_ACK),
            verdict::PASS,
            talk.frame(vip, client, SYN_ACK),
            Reason::Reply,
        ),
        changed(Hook::FromPod, POD_ONE, talk.frame(client, vip, ACK), verdict::PASS, there(ACK), Reason::Service),
    ]
}

/// A pod that reaches itself sees the bridge's address and a port that is chosen by chance.
#[test]
fn hairpin() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_pods(0)?;
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_ONE, TARGET)])?;
            let first = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), SYN);
            let outcome = bench.feed(Hook::FromPod, &POD_ONE, &first.build())?;
            let counts = [Reason::ServiceNew, Reason::Masqueraded].map(|reason| ((Hook::FromPod, reason), 1));
            assert_eq!(outcome.counts, counts.into(), "{talk:?}");
            let port = bench.entries()?[0].translated.0.1;
            ensure!((1024..32_768).contains(&port), "{port}");
            converse(bench, &format!("{talk:?}"), &to_itself(talk, port))?;
            let state = if talk.is_tcp() { state::ESTABLISHED } else { state::ASSURED };
            let flags = FlowEntry::REDIRECT | FlowEntry::HAIRPIN | FlowEntry::MASQUERADED;
            let expected = pair(talk, talk.is_tcp(), state, (&POD_ONE, TARGET), (&GATEWAY, port), flags);
            assert_eq!(bench.entries()?, expected, "{talk:?}");
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

fn to_itself(talk: Talk, port: u16) -> Vec<Step> {
    let (client, vip, seen, backend) = ((&POD_ONE, CLIENT), (&VIP_ONE, PORT), (&GATEWAY, port), (&POD_ONE, TARGET));
    let there = |flags| redirected(talk.frame(seen, backend, flags), &POD_ONE);
    let back = |flags| redirected(talk.frame(vip, client, flags), &POD_ONE);
    vec![
        changed(Hook::FromPod, POD_ONE, talk.frame(client, vip, SYN), verdict::REDIRECT, there(SYN), Reason::Service),
        passes(Hook::ToPod, POD_ONE, there(SYN), Reason::Seen),
        changed(
            Hook::FromPod,
            POD_ONE,
            talk.frame(backend, seen, SYN_ACK),
            verdict::REDIRECT,
            back(SYN_ACK),
            Reason::Reply,
        ),
        passes(Hook::ToPod, POD_ONE, back(SYN_ACK), Reason::Seen),
        changed(Hook::FromPod, POD_ONE, talk.frame(client, vip, ACK), verdict::REDIRECT, there(ACK), Reason::Service),
        passes(Hook::ToPod, POD_ONE, there(ACK), Reason::Seen),
    ]
}

#[test]
fn direct_and_midstream() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_service(&VIP_TWO, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            let client = (&POD_ONE, CLIENT);
            let mut steps = vec![
                passes(Hook::FromPod, POD_ONE, talk.frame(client, (&VIP_ONE, 81), SYN), Reason::DirectNew),
                passes(Hook::FromPod, POD_ONE, talk.frame(client, (&OUTSIDE, PORT), SYN), Reason::DirectNew),
                passes(Hook::ToPod, POD_ONE, talk.frame((&OUTSIDE, PORT), client, SYN_ACK), Reason::Direct),
                passes(Hook::FromPod, POD_ONE, talk.frame(client, (&OUTSIDE, PORT), ACK), Reason::Direct),
                // `to_pod` translates nothing forward, and needs no `from_pod` before it.
                passes(Hook::ToPod, POD_TWO, talk.frame((&OUTSIDE, 5000), (&POD_TWO, TARGET), SYN), Reason::DirectNew),
                passes(
                    Hook::FromPod,
                    POD_TWO,
                    talk.frame((&POD_TWO, TARGET), (&OUTSIDE, 5000), SYN_ACK),
                    Reason::Direct,
                ),
                passes(Hook::ToPod, POD_TWO, talk.frame((&POD_THREE, 1), (&VIP_TWO, PORT), SYN), Reason::DirectNew),
            ];
            if talk.is_tcp() {
                for flags in [ACK, SYN_ACK, FIN, RST, 0] {
                    steps.push(drops(
                        Hook::FromPod,
                        POD_ONE,
                        talk.frame(client, (&VIP_TWO, PORT), flags),
                        Reason::NoFlow,
                    ));
                }
            }
            converse(bench, &format!("{talk:?}"), &steps)?;
            bench.forget_flows()?;
        }
        // An interface that no row of `device` names.
        bench.bpf().maps().device.delete(&bench.ifindex(&POD_THREE))?;
        let frame = POD_THREE.tcp(CLIENT, &VIP_TWO, PORT, Family::V4, SYN);
        converse(bench, "no device", &[passes(Hook::FromPod, POD_THREE, frame, Reason::NoDevice)])
    })?
}

/// A frame with an EtherType and bytes.
fn other(ether_type: u16, bytes: &[u8]) -> Frame {
    Frame { body: Body::Other { ether_type, bytes: bytes.to_vec() }, ..POD_ONE.udp(1, &VIP_ONE, PORT, Family::V4, b"") }
}

fn other_l4(family: Family, proto: u8) -> Vec<u8> {
    POD_ONE.send(&VIP_ONE, family, L4::Other { proto, bytes: vec![0x12; 40] }).build()
}

#[test]
fn what_is_not_ours_passes_untouched() -> Result<()> {
    let arp = Arp {
        operation: 1,
        sender_mac: POD_ONE.mac,
        sender_ip: POD_ONE.ip4,
        target_mac: proxy_tests::packet::Mac([0; 6]),
        target_ip: GATEWAY.ip4,
    };
    let icmp = |kind| L4::Icmp(Icmp { kind, payload: vec![7; 24], ..Icmp::default() });
    let tagged = |family| {
        let vlans = vec![Vlan { tpid: ether_type::VLAN, tci: 5 }];
        Frame { vlans, ..POD_ONE.tcp(CLIENT, &VIP_ONE, PORT, family, SYN) }.build()
    };
    let cut = |family, len| {
        let mut frame = POD_ONE.tcp(CLIENT, &VIP_ONE, PORT, family, SYN).build();
        frame.truncate(len);
        frame
    };
    let extended = |kinds: &[u8], proto, bytes: &[u8]| {
        let mut frame = POD_ONE.send(&VIP_ONE, Family::V6, L4::Other { proto, bytes: bytes.to_vec() });
        let extensions = kinds.iter().map(|&kind| Extension { kind, content: vec![1, 4, 0, 0, 0, 0] }).collect();
        frame.as_ip_mut().expect("it is IP").extensions = extensions;
        frame.build()
    };
    // Behind the header of a fragment: an extension header that a later fragment would not show.
    let mut behind = POD_ONE.send(&VIP_ONE, Family::V6, L4::Other { proto: proto::DESTINATION, bytes: vec![17; 64] });
    behind.as_ip_mut().expect("it is IP").fragment = Some(Fragment { offset: 0, more: true });
    // A frame that ends in its network header is none that the kernel would run a program on here; the library's own
    // tests have those.
    let frames = [
        ("ARP", Frame { body: Body::Arp(arp), ..other(0, &[]) }.build(), Reason::NotIp),
        ("unknown EtherType", other(0x88b5, &[1; 60]).build(), Reason::NotIp),
        ("LLDP", other(0x88cc, &[2; 60]).build(), Reason::NotIp),
        ("802.3 with a length", other(60, &[0x42; 60]).build(), Reason::NotIp),
        ("VLAN, IPv4", tagged(Family::V4), Reason::NotIp),
        ("VLAN, IPv6", tagged(Family::V6), Reason::NotIp),
        ("echo request", POD_ONE.send(&VIP_ONE, Family::V4, icmp(8)).build(), Reason::OtherProtocol),
        ("echo request, IPv6", POD_ONE.send(&VIP_ONE, Family::V6, icmp(128)).build(), Reason::OtherProtocol),
        ("neighbour solicitation", POD_ONE.send(&GATEWAY, Family::V6, icmp(135)).build(), Reason::OtherProtocol),
        ("ESP", other_l4(Family::V4, 50), Reason::OtherProtocol),
        ("IGMP", other_l4(Family::V4, 2), Reason::OtherProtocol),
        ("IP in IP", other_l4(Family::V6, 41), Reason::OtherProtocol),
        ("routing header", extended(&[proto::ROUTING], proto::UDP, &[9; 16]), Reason::OtherProtocol),
        ("no next header", extended(&[proto::HOP_BY_HOP], 59, &[]), Reason::OtherProtocol),
        ("seven extension headers", extended(&[proto::DESTINATION; 7], proto::UDP, &[9; 16]), Reason::OtherProtocol),
        ("extension header in a fragment", behind.build(), Reason::OtherProtocol),
        ("cut extension header", extended(&[proto::DESTINATION], proto::DESTINATION, &[9]), Reason::Unparsed),
        ("cut in the ports", cut(Family::V4, 37), Reason::Unparsed),
        ("cut before the TCP flags", cut(Family::V4, 47), Reason::Unparsed),
        ("cut in the IPv6 ports", cut(Family::V6, 56), Reason::Unparsed),
        ("cut before the TCP flags, IPv6", cut(Family::V6, 67), Reason::Unparsed),
        (
            "IPv4 header of 16 bytes",
            {
                let mut b = cut(Family::V4, 54);
                b[14] = 0x44;
                b
            },
            Reason::Unparsed,
        ),
        (
            "version 5",
            {
                let mut b = cut(Family::V4, 54);
                b[14] = 0x55;
                b
            },
            Reason::Unparsed,
        ),
        (
            "IPv6 with version 4",
            {
                let mut b = cut(Family::V6, 74);
                b[14] = 0x40;
                b
            },
            Reason::Unparsed,
        ),
    ];
    Bench::run(ROOMY, |bench| {
        for proto in [Proto::TCP, Proto::UDP] {
            bench.set_service(&VIP_ONE, PORT, proto, &[(POD_TWO, TARGET)])?;
        }
        for (name, bytes, reason) in &frames {
            for hook in [Hook::FromPod, Hook::ToPod] {
                let got = bench.feed(hook, &POD_ONE, bytes)?;
                assert_eq!(got.packet, *bytes, "{name}");
                assert_eq!((got.verdict, got.counts), (verdict::PASS, [((hook, *reason), 1)].into()), "{name}");
            }
        }
        assert_eq!(bench.entries()?, []);
        // Multicast is UDP like any other: followed, not touched.
        let group =
            Host { mac: proxy_tests::packet::Mac([1, 0, 0x5e, 0, 0, 251]), ip4: [224, 0, 0, 251].into(), ..POD_ONE };
        let mdns = POD_ONE.udp(5353, &group, 5353, Family::V4, b"query");
        converse(bench, "multicast", &[passes(Hook::FromPod, POD_ONE, mdns, Reason::DirectNew)])
    })?
}

#[test]
fn odd_headers_are_translated() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            let kinds: &[&[u8]] =
                &[&[], &[proto::HOP_BY_HOP], &[proto::HOP_BY_HOP, proto::DESTINATION], &[proto::DESTINATION; 6]];
            for (client, kinds) in (2000..).zip(kinds) {
                let odd = |mut frame: Frame| {
                    let ip = frame.as_ip_mut().expect("it is IP");
                    ip.options = if talk.family == Family::V4 { vec![1; kinds.len() * 4] } else { Vec::new() };
                    let extension = |&kind| Extension { kind, content: vec![1, 4, 0, 0, 0, 0] };
                    ip.extensions =
                        if talk.family == Family::V6 { kinds.iter().map(extension).collect() } else { Vec::new() };
                    if let L4::Udp(udp) = &mut ip.l4 {
                        udp.checksum = talk.family == Family::V6 || kinds.is_empty();
                    }
                    frame
                };
                let sent = odd(talk.frame((&POD_ONE, client), (&VIP_ONE, PORT), SYN));
                let after = odd(redirected(talk.frame((&POD_ONE, client), (&POD_TWO, TARGET), SYN), &POD_TWO));
                let reply = odd(talk.frame((&POD_TWO, TARGET), (&POD_ONE, client), SYN_ACK));
                let back = odd(redirected(talk.frame((&VIP_ONE, PORT), (&POD_ONE, client), SYN_ACK), &POD_ONE));
                converse(
                    bench,
                    &format!("{talk:?}, {kinds:?}"),
                    &[
                        changed(Hook::FromPod, POD_ONE, sent, verdict::REDIRECT, after, Reason::ServiceNew),
                        changed(Hook::FromPod, POD_TWO, reply, verdict::REDIRECT, back, Reason::Reply),
                    ],
                )?;
            }
        }
        Ok(())
    })?
}

#[test]
fn fragments() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        bench.set_service(&VIP_ONE, PORT, Proto::UDP, &[(POD_TWO, TARGET)])?;
        for family in [Family::V4, Family::V6] {
            let parts = |from: (&Host, u16), to: (&Host, u16), id: u32| {
                let mut frame = from.0.udp(from.1, to.0, to.1, family, &[0x5a; 3500]);
                frame.as_ip_mut().expect("it is IP").id = id;
                frame.fragments(1280)
            };
            let there = |id| {
                let sent = parts((&POD_ONE, CLIENT), (&VIP_ONE, PORT), id);
                let after = parts((&POD_ONE, CLIENT), (&POD_TWO, TARGET), id);
                sent.into_iter().zip(after.into_iter().map(|frame| redirected(frame, &POD_TWO)))
            };
            let reply = parts((&POD_TWO, TARGET), (&POD_ONE, CLIENT), 9);
            let back = parts((&VIP_ONE, PORT), (&POD_ONE, CLIENT), 9);
            let first = [Reason::ServiceNew].into_iter().chain([Reason::Service; 8]);
            let in_order = there(7)
                .zip(first)
                .map(|((sent, after), reason)| changed(Hook::FromPod, POD_ONE, sent, verdict::REDIRECT, after, reason));
            let seen = there(7).map(|(_, frame)| passes(Hook::ToPod, POD_TWO, frame, Reason::Seen));
            let replies = reply.into_iter().zip(back).map(|(sent, after)| {
                changed(Hook::FromPod, POD_TWO, sent, verdict::REDIRECT, redirected(after, &POD_ONE), Reason::Reply)
            });
            // Behind the first, any order will do; before it, none.
            let mut overtaking: Vec<_> = there(8).collect();
            ensure!(overtaking.len() == 3, "three fragments");
            overtaking.swap(0, 2);
            let (early, rest) = overtaking.split_at(2);
            let early =
                early.iter().map(|(sent, _)| drops(Hook::FromPod, POD_ONE, sent.clone(), Reason::FragmentBeforeFirst));
            let rest = rest.iter().chain(&overtaking[..2]).map(|(sent, after)| {
                changed(Hook::FromPod, POD_ONE, sent.clone(), verdict::REDIRECT, after.clone(), Reason::Service)
            });
            let direct = parts((&OUTSIDE, 1), (&POD_ONE, 2), 3);
            let direct =
                [passes(Hook::ToPod, POD_ONE, direct[1].clone(), Reason::FragmentUnknown)].into_iter().chain([
                    passes(Hook::ToPod, POD_ONE, direct[0].clone(), Reason::DirectNew),
                    passes(Hook::ToPod, POD_ONE, direct[2].clone(), Reason::Direct),
                ]);
            let steps: Vec<_> = in_order.chain(seen).chain(replies).chain(early).chain(rest).chain(direct).collect();
            converse(bench, &format!("{family:?}"), &steps)?;
            // What the library says of them is what the table above relies on.
            let later = parts((&POD_ONE, CLIENT), (&VIP_ONE, PORT), 7)[1].build();
            let parsed = if family == Family::V4 { parse::<V4, [u8]>(&later) } else { parse::<V6, [u8]>(&later) };
            assert_eq!(parsed.map(|p| p.fragment), Ok(Part::LATER));
        }
        Ok(())
    })?
}
