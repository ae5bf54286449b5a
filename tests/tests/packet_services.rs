//! Single packets of Services that are reached from outside, refused, or spoken to in other ways than by a pod's plain
//! connection: whole packets, verdicts and counters, as in `packets.rs`.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, ensure};
use proxy_abi::flow::state;
use proxy_abi::{FlowEntry, FrontendEntry, FrontendKey, Hook, PortBe, PrefixKey, Proto, Reason, TcpMoment};
use proxy_agent::dataplane::adopt;
use proxy_agent::node::conntrack::Translated;
use proxy_tests::Family;
use proxy_tests::bpf::talk::{Step, TALKS, Talk, changed, converse, drops, passes, reset_of};
use proxy_tests::bpf::{Bench, ROOMY, frontend, redirected, verdict};
use proxy_tests::packet::named::{GATEWAY, Host, NODE_ONE, OUTSIDE, POD_ONE, POD_REMOTE, POD_TWO, VIP_ONE, VIP_TWO};
use proxy_tests::packet::{Frame, Icmp, L4, Sctp, tcp_flag, verify_checksums};

const SYN: u8 = tcp_flag::SYN;
const ACK: u8 = tcp_flag::ACK;
const SYN_ACK: u8 = SYN | ACK;
const CLIENT: u16 = 40_000;
const NODE_PORT: u16 = 30_080;
const PORT: u16 = 80;
const TARGET: u16 = 8080;
const MASQUERADED: std::ops::Range<u16> = 1024..32_768;

fn node_port(talk: Talk, scope: u8) -> FrontendKey {
    FrontendKey {
        ip: FrontendKey::wildcard(talk.family == Family::V4),
        port: PortBe::new(NODE_PORT),
        proto: talk.proto,
        scope,
    }
}

/// The one source port that a masqueraded flow of the table has.
fn masqueraded_port(bench: &Bench) -> Result<u16> {
    let entries = bench.entries()?;
    let port = entries.first().context("a flow")?.translated.0.1;
    ensure!(MASQUERADED.contains(&port), "{port}");
    ensure!(entries.iter().all(|entry| entry.translated.0.1 == port && entry.flags & FlowEntry::MASQUERADED != 0));
    Ok(port)
}

/// Lets the first packet make the flow, and forgets what became of it: its source port is by chance.
fn begin(bench: &Bench, hook: Hook, at: &Host, frame: &Frame) -> Result<u16> {
    let outcome = bench.feed(hook, at, &frame.build())?;
    assert_eq!(outcome.verdict, verdict::REDIRECT, "{frame:?}: {:?}", outcome.counts);
    let counts = [((hook, Reason::Masqueraded), 1), ((hook, Reason::ServiceNew), 1)].into();
    assert_eq!(outcome.counts, counts);
    masqueraded_port(bench)
}

#[test]
fn node_port_from_outside_to_a_pod_of_this_node_masqueraded() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(POD_TWO.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let (client, node, backend) = ((&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), (&POD_TWO, TARGET));
            let port = begin(bench, Hook::FromNetdev, &NODE_ONE, &talk.frame(client, node, SYN))?;
            let seen = (&GATEWAY, port);
            let mut there = talk.frame(seen, backend, SYN);
            there.src = NODE_ONE.mac;
            let mut out = talk.frame(node, client, SYN_ACK);
            (out.src, out.dst) = (POD_TWO.mac, GATEWAY.mac);
            converse(
                bench,
                &format!("{talk:?}"),
                &[
                    changed(
                        Hook::FromNetdev,
                        NODE_ONE,
                        talk.frame(client, node, SYN),
                        verdict::REDIRECT,
                        there.clone(),
                        Reason::Service,
                    ),
                    passes(Hook::ToPod, POD_TWO, there, Reason::Seen),
                    changed(
                        Hook::FromPod,
                        POD_TWO,
                        talk.frame(backend, seen, SYN_ACK),
                        verdict::REDIRECT,
                        out.clone(),
                        Reason::Reply,
                    ),
                    passes(Hook::ToNetdev, NODE_ONE, out, Reason::Seen),
                ],
            )?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// Whether the backend closed first, and what is remembered of the client's last segment then.
#[test]
fn the_last_segment_to_a_backend_that_closed_first_is_remembered() -> Result<()> {
    const FIN_ACK: u8 = tcp_flag::FIN | ACK;
    Bench::run(ROOMY, |bench| {
        for talk in TALKS.into_iter().filter(|talk| talk.is_tcp()) {
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(POD_TWO.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let (client, node, backend) = ((&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), (&POD_TWO, TARGET));
            for backend_first in [false, true] {
                let there = |flags| (Hook::FromNetdev, NODE_ONE, talk.frame(client, node, flags));
                let port = begin(bench, Hook::FromNetdev, &NODE_ONE, &there(SYN).2)?;
                let back = |flags| (Hook::FromPod, POD_TWO, talk.frame(backend, (&GATEWAY, port), flags));
                let close =
                    if backend_first { [back(FIN_ACK), there(FIN_ACK)] } else { [there(FIN_ACK), back(FIN_ACK)] };
                for (hook, at, frame) in [back(SYN_ACK), there(ACK)].into_iter().chain(close) {
                    assert_eq!(bench.feed(hook, &at, &frame.build())?.verdict, verdict::REDIRECT, "{frame:?}");
                }
                let L4::Tcp(last) = there(FIN_ACK).2.as_ip().context("it is IP")?.l4.clone() else {
                    panic!("it is TCP")
                };
                let expected = TcpMoment { sequence: if backend_first { last.seq } else { 0 }, timestamp: 0 };
                let flows = bench.flows()?;
                let remembered: Vec<_> = flows.iter().map(|(_, _, entry)| (entry.state, entry.last_sent)).collect();
                assert_eq!(remembered, [(state::CLOSED, expected); 2], "{talk:?}, backend first: {backend_first}");
                bench.forget_flows()?;
            }
        }
        Ok(())
    })?
}

/// Connections of a proxy that is taken over from pass, and no port of theirs is given to another one.
#[test]
fn ports_of_another_proxy_are_not_taken() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS.into_iter().filter(|talk| talk.is_tcp()) {
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(POD_TWO.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let at = |host: &Host, port: u16| SocketAddr::from(talk.end(host, port));
            let theirs: Vec<_> = MASQUERADED
                .map(|port| Translated {
                    from: at(&OUTSIDE, port),
                    to: at(&NODE_ONE, NODE_PORT),
                    seen: at(&GATEWAY, port),
                    backend: at(&POD_TWO, TARGET),
                })
                .collect();
            assert_eq!(adopt(bench.maps(), &theirs, 1)?, theirs.len());
            assert_eq!(adopt(bench.maps(), &theirs, 2)?, 0, "again");
            converse(
                bench,
                &format!("{talk:?}"),
                &[
                    passes(
                        Hook::FromNetdev,
                        NODE_ONE,
                        talk.frame((&OUTSIDE, 2000), (&NODE_ONE, NODE_PORT), ACK),
                        Reason::Direct,
                    ),
                    passes(
                        Hook::FromPod,
                        POD_TWO,
                        talk.frame((&POD_TWO, TARGET), (&GATEWAY, 2000), ACK),
                        Reason::Direct,
                    ),
                    drops(
                        Hook::FromNetdev,
                        NODE_ONE,
                        talk.frame((&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), SYN),
                        Reason::ClashUnresolved,
                    ),
                ],
            )?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// From a port whose connection has ended, to a Service that another proxy has taken over: not refused.
#[test]
fn a_new_connection_to_a_service_that_has_gone_is_left_alone() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS.into_iter().filter(|talk| talk.is_tcp()) {
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(POD_TWO.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let there = |flags| talk.frame((&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), flags);
            begin(bench, Hook::FromNetdev, &NODE_ONE, &there(SYN))?;
            let reset = bench.feed(Hook::FromNetdev, &NODE_ONE, &there(tcp_flag::RST).build())?;
            assert_eq!(reset.verdict, verdict::REDIRECT);
            bench.maps().frontend.delete(&key)?;
            let step = passes(Hook::FromNetdev, NODE_ONE, there(SYN), Reason::NotService);
            converse(bench, &format!("{talk:?}"), &[step])?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn masqueraded_to_another_node_from_outside_and_from_a_pod() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(POD_REMOTE.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            for (hook, at, who) in [(Hook::FromNetdev, NODE_ONE, OUTSIDE), (Hook::FromPod, POD_ONE, POD_ONE)] {
                let (client, node, backend) = ((&who, CLIENT), (&NODE_ONE, NODE_PORT), (&POD_REMOTE, TARGET));
                let first = talk.frame(client, node, SYN);
                let port = begin(bench, hook, &at, &first)?;
                let seen = (&NODE_ONE, port);
                let mut there = talk.frame(seen, backend, SYN);
                (there.src, there.dst) = (first.src, first.dst);
                let mut reply = talk.frame(backend, seen, SYN_ACK);
                (reply.src, reply.dst) = (OUTSIDE.mac, NODE_ONE.mac);
                let mut back = talk.frame(node, client, SYN_ACK);
                (back.src, back.dst) =
                    if who == OUTSIDE { (reply.src, reply.dst) } else { (NODE_ONE.mac, POD_ONE.mac) };
                let mut steps = vec![
                    changed(hook, at, first, verdict::REDIRECT, there.clone(), Reason::Service),
                    passes(Hook::ToNetdev, NODE_ONE, there, Reason::Seen),
                    changed(Hook::FromNetdev, NODE_ONE, reply, verdict::REDIRECT, back.clone(), Reason::Reply),
                ];
                if who == POD_ONE {
                    steps.push(passes(Hook::ToPod, POD_ONE, back, Reason::Seen));
                }
                converse(bench, &format!("{talk:?}, {hook}"), &steps)?;
                if talk.is_tcp() {
                    // Another proxy of the node may use the port as soon as the connection has ended.
                    let reset = talk.frame(client, node, tcp_flag::RST);
                    bench.feed(hook, &at, &reset.build())?;
                    let mut stranger = talk.frame(backend, seen, SYN_ACK);
                    (stranger.src, stranger.dst) = (OUTSIDE.mac, NODE_ONE.mac);
                    let mut data = talk.frame(backend, seen, ACK);
                    (data.src, data.dst) = (OUTSIDE.mac, NODE_ONE.mac);
                    let untouched = [
                        passes(Hook::FromNetdev, NODE_ONE, stranger, Reason::Seen),
                        passes(Hook::FromNetdev, NODE_ONE, data, Reason::NotService),
                    ];
                    converse(bench, &format!("{talk:?}, {hook}: ended"), &untouched)?;
                }
                bench.forget_flows()?;
            }
        }
        Ok(())
    })?
}

#[test]
fn traffic_policy_local_keeps_the_client() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let (client, node, backend) = ((&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), (&POD_TWO, TARGET));
            let local = [(POD_TWO.ip(talk.family), TARGET)];
            let flags = FrontendEntry::EXTERNAL_SPLIT;
            bench.set_frontend(node_port(talk, FrontendKey::SCOPE_CLUSTER), &[], flags, 0)?;
            let external = node_port(talk, FrontendKey::SCOPE_EXTERNAL);
            bench.set_frontend(external, &local, FrontendEntry::LOCAL_SET, 0)?;
            let mut there = talk.frame(client, backend, SYN);
            there.src = NODE_ONE.mac;
            let mut out = talk.frame(node, client, SYN_ACK);
            (out.src, out.dst) = (POD_TWO.mac, OUTSIDE.mac);
            let steps = [
                changed(
                    Hook::FromNetdev,
                    NODE_ONE,
                    talk.frame(client, node, SYN),
                    verdict::REDIRECT,
                    there,
                    Reason::ServiceNew,
                ),
                changed(
                    Hook::FromPod,
                    POD_TWO,
                    talk.frame(backend, client, SYN_ACK),
                    verdict::REDIRECT,
                    out,
                    Reason::Reply,
                ),
            ];
            converse(bench, &format!("{talk:?}"), &steps)?;
            let empty = FrontendEntry::LOCAL_SET | FrontendEntry::DROP_EMPTY;
            bench.set_frontend(external, &[], empty, 0)?;
            let other = talk.frame((&OUTSIDE, CLIENT + 1), node, SYN);
            let none = [drops(Hook::FromNetdev, NODE_ONE, other, Reason::NoLocalBackend)];
            converse(bench, &format!("{talk:?}, none here"), &none)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// A backend in the node's own network: through the stack, which sees the client.
#[test]
fn a_process_of_the_node_as_backend() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(NODE_ONE.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let (client, node, backend) = ((&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), (&NODE_ONE, TARGET));
            let steps = [
                changed(
                    Hook::FromNetdev,
                    NODE_ONE,
                    talk.frame(client, node, SYN),
                    verdict::PASS,
                    talk.frame(client, backend, SYN),
                    Reason::ServiceNew,
                ),
                changed(
                    Hook::ToNetdev,
                    NODE_ONE,
                    talk.frame(backend, client, SYN_ACK),
                    verdict::PASS,
                    talk.frame(node, client, SYN_ACK),
                    Reason::Reply,
                ),
            ];
            converse(bench, &format!("{talk:?}"), &steps)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn what_the_node_itself_says_and_hears_passes_untouched_and_unknown() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(POD_TWO.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let (client, node) = ((&OUTSIDE, CLIENT), (&NODE_ONE, 22));
            let mut steps = vec![
                passes(Hook::FromNetdev, NODE_ONE, talk.frame(client, node, SYN), Reason::NotService),
                passes(Hook::ToNetdev, NODE_ONE, talk.frame(node, client, SYN_ACK), Reason::NotService),
                passes(Hook::FromNetdev, NODE_ONE, talk.frame(client, node, ACK), Reason::NotService),
                passes(Hook::ToNetdev, NODE_ONE, talk.frame(node, (&VIP_ONE, PORT), SYN), Reason::NotService),
            ];
            if talk.is_tcp() {
                // In the middle of a connection: one that conntrack may still translate.
                let segment = talk.frame(client, (&NODE_ONE, NODE_PORT), ACK);
                steps.push(passes(Hook::FromNetdev, NODE_ONE, segment, Reason::NotService));
            }
            converse(bench, &format!("{talk:?}"), &steps)?;
        }
        assert_eq!(bench.entries()?, []);
        Ok(())
    })?
}

/// The error that answers a packet: what it quotes is compared up to the transport checksum, which is nobody's there.
fn assert_error(sent: &Frame, got: &[u8], kind: u8, code: u8, rest: [u8; 4], quoted_l4: usize) {
    verify_checksums(got).expect("checksums");
    let frame = Frame::parse(got).expect("a frame");
    let (ip, about) = (frame.as_ip().expect("it is IP"), sent.as_ip().expect("it is IP"));
    assert_eq!((frame.src, frame.dst, ip.src, ip.dst), (sent.dst, sent.src, about.dst, about.src));
    let L4::Icmp(Icmp { kind: k, code: c, rest: r, payload }) = &ip.l4 else { panic!("{frame:?}") };
    assert_eq!((*k, *c, *r), (kind, code, rest));
    let packet = &sent.build()[14..];
    let header = if about.src.is_ipv4() { 20 } else { 40 };
    assert_eq!(payload.len(), header + quoted_l4);
    let checksum = header + if quoted_l4 == 20 { 16 } else { 6 };
    let differs: Vec<usize> = (0..payload.len()).filter(|at| payload[*at] != packet[*at]).collect();
    assert!(differs.iter().all(|at| (checksum..checksum + 2).contains(at)), "{differs:?}");
}

#[test]
fn refusals() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let family = talk.family;
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[])?;
            bench.mark(VIP_ONE.ip(family), FrontendEntry::ADDRESS_REJECT)?;
            bench.set_frontend(node_port(talk, FrontendKey::SCOPE_CLUSTER), &[], FrontendEntry::MASQUERADE, 0)?;
            let cases = [
                (Hook::FromPod, POD_ONE, (&POD_ONE, CLIENT), (&VIP_ONE, PORT), Reason::NoBackend),
                (Hook::FromPod, POD_ONE, (&POD_ONE, CLIENT), (&VIP_ONE, 81), Reason::NoSuchPort),
                (Hook::FromPod, POD_ONE, (&POD_ONE, CLIENT), (&NODE_ONE, NODE_PORT), Reason::NoBackend),
                (Hook::FromNetdev, NODE_ONE, (&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), Reason::NoBackend),
                (Hook::FromNetdev, NODE_ONE, (&OUTSIDE, CLIENT), (&VIP_ONE, PORT), Reason::NoBackend),
            ];
            for (hook, at, from, to, reason) in cases {
                let name = format!("{talk:?}, {hook}, {reason}");
                let mut sent = talk.frame(from, to, SYN);
                if let L4::Tcp(tcp) = &mut sent.as_ip_mut().expect("it is IP").l4 {
                    tcp.options = vec![2, 4, 5, 0xb4, 1, 1, 1, 1];
                    tcp.payload = b"fast open".to_vec();
                }
                let outcome = bench.feed(hook, &at, &sent.build())?;
                assert_eq!(outcome.counts, [((hook, reason), 1)].into(), "{name}");
                assert_eq!(outcome.verdict, verdict::REDIRECT, "{name}");
                if talk.is_tcp() {
                    assert_eq!(Frame::parse(&outcome.packet), Ok(reset_of(&sent)), "{name}");
                    assert_eq!(outcome.packet, reset_of(&sent).build(), "{name}");
                    let ack = talk.frame(from, (to.0, to.1), tcp_flag::RST);
                    let silent = bench.feed(hook, &at, &ack.build())?;
                    assert_ne!(silent.verdict, verdict::REDIRECT, "{name}: a reset is not answered");
                } else {
                    let (kind, code) = if family == Family::V4 { (3, 3) } else { (1, 4) };
                    assert_error(&sent, &outcome.packet, kind, code, [0; 4], 8);
                }
            }
            // A socket of a kernel that fragments gets no answer to a later fragment.
            assert_eq!(bench.entries()?, []);
        }
        Ok(())
    })?
}

#[test]
fn refusals_are_limited() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        let sent = POD_ONE.udp(CLIENT, &VIP_ONE, PORT, Family::V4, b"datagram").build();
        bench.set_service(&VIP_ONE, PORT, Proto::UDP, &[])?;
        let mut refused = 0;
        let mut limited = 0;
        for _ in 0..20_000 {
            match bench.run_once(Hook::FromPod, &POD_ONE, &sent)?.verdict.cast_signed() {
                verdict::REDIRECT => refused += 1,
                verdict::DROP => limited += 1,
                other => anyhow::bail!("verdict {other}"),
            }
        }
        // At least the burst, and less than one for each: twenty thousand runs take less than twenty seconds.
        ensure!(refused >= 50 && limited > 0, "{refused} refused, {limited} not");
        Ok(())
    })?
}

#[test]
fn ranges_and_unallocated_addresses() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let family = talk.family;
            let key = frontend(VIP_ONE.ip(family), PORT, talk.proto);
            let backends = [(POD_TWO.ip(family), TARGET)];
            let ids = bench.set_frontend(key, &backends, FrontendEntry::SOURCE_RANGES, 0)?;
            let range = |scope, ip: IpAddr, bits| PrefixKey::range(scope, ip.into(), bits);
            let prefix = &bench.bpf().maps().prefix;
            let wide = if family == Family::V4 { 16 } else { 64 };
            prefix.set(&range(ids[0], OUTSIDE.ip(family), wide), &1)?;
            prefix.set(&range(PrefixKey::SERVICE_CIDR, VIP_TWO.ip(family), wide), &1)?;
            let vip = (&VIP_ONE, PORT);
            let there = talk.frame((&OUTSIDE, CLIENT), (&POD_TWO, TARGET), SYN);
            let steps = [
                drops(Hook::FromPod, POD_ONE, talk.frame((&POD_ONE, CLIENT), vip, SYN), Reason::SourceNotAllowed),
                changed(
                    Hook::FromNetdev,
                    NODE_ONE,
                    talk.frame((&OUTSIDE, CLIENT), vip, SYN),
                    verdict::REDIRECT,
                    Frame { src: NODE_ONE.mac, ..there },
                    Reason::ServiceNew,
                ),
                drops(
                    Hook::FromPod,
                    POD_ONE,
                    talk.frame((&POD_ONE, CLIENT), (&VIP_TWO, PORT), SYN),
                    Reason::Unallocated,
                ),
                drops(
                    Hook::FromNetdev,
                    NODE_ONE,
                    talk.frame((&OUTSIDE, CLIENT), (&VIP_TWO, PORT), SYN),
                    Reason::Unallocated,
                ),
            ];
            converse(bench, &format!("{talk:?}"), &steps)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn affinity_holds_until_the_backend_leaves_its_set() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let backends = [(POD_TWO.ip(talk.family), TARGET), (POD_REMOTE.ip(talk.family), TARGET)];
            let key = frontend(VIP_ONE.ip(talk.family), PORT, talk.proto);
            let ids = bench.set_frontend(key, &backends, 0, 10_800)?;
            let chosen = |client: u16| -> Result<u32> {
                let frame = talk.frame((&POD_ONE, client), (&VIP_ONE, PORT), SYN);
                bench.feed(Hook::FromPod, &POD_ONE, &frame.build())?;
                let flows = bench.flows()?;
                let found = flows.iter().find(|(_, entry, _)| entry.original.0.1 == client).context("a flow")?;
                Ok(found.2.backend)
            };
            let first = chosen(2000)?;
            for client in 2001..2020 {
                assert_eq!(chosen(client)?, first, "{talk:?}");
            }
            let maps = bench.bpf().maps();
            let entry = maps.backend.get(&first)?.context("a backend")?;
            let out = proxy_abi::BackendEntry { flags: 0, ..entry };
            maps.backend.set(&first, &out)?;
            let other = ids.iter().copied().find(|id| *id != first).context("two")?;
            let rest =
                proxy_abi::FrontendEntry { first: other, count: 1, ..maps.frontend.get(&key)?.context("there")? };
            maps.frontend.set(&key, &rest)?;
            for client in 2020..2030 {
                assert_eq!(chosen(client)?, other, "{talk:?}: the first takes no new connections");
            }
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// An error of a router or of an end about a packet, as it comes.
fn error_about(from: &Host, to: &Host, talk: Talk, about: &Frame) -> Frame {
    let quoted = &about.build()[14..];
    let (kind, code, rest) = match talk.family {
        Family::V4 => (3, 4, [0, 0, 5, 120]),
        Family::V6 => (2, 0, [0, 0, 5, 120]),
    };
    from.send(to, talk.family, L4::Icmp(Icmp { kind, code, rest, payload: quoted.to_vec() }))
}

#[test]
fn errors_are_translated_both_ways() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let name = |what: &str| format!("{talk:?}, {what}");
            let (client, vip) = ((&POD_ONE, CLIENT), (&VIP_ONE, PORT));
            // To another node: a router far away answers, at the client's veth.
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_REMOTE, TARGET)])?;
            bench.feed(Hook::FromPod, &POD_ONE, &talk.frame(client, vip, SYN).build())?;
            let there = talk.frame(client, (&POD_REMOTE, TARGET), SYN);
            let router = Host { mac: GATEWAY.mac, ..OUTSIDE };
            let steps = [
                passes(Hook::FromNetdev, NODE_ONE, error_about(&OUTSIDE, &POD_ONE, talk, &there), Reason::Seen),
                changed(
                    Hook::ToPod,
                    POD_ONE,
                    error_about(&router, &POD_ONE, talk, &there),
                    verdict::PASS,
                    error_about(&router, &POD_ONE, talk, &talk.frame(client, vip, SYN)),
                    Reason::IcmpError,
                ),
                // The backend itself says so: for the client it is the Service.
                changed(
                    Hook::ToPod,
                    POD_ONE,
                    error_about(&POD_REMOTE, &POD_ONE, talk, &there),
                    verdict::PASS,
                    error_about(&VIP_ONE, &POD_ONE, talk, &talk.frame(client, vip, SYN)),
                    Reason::IcmpError,
                ),
            ];
            converse(bench, &name("remote"), &steps)?;
            // The client cannot take an answer: the backend must understand.
            let answer = talk.frame(vip, client, SYN_ACK);
            let translated = talk.frame((&POD_REMOTE, TARGET), client, SYN_ACK);
            let to_backend = [changed(
                Hook::FromPod,
                POD_ONE,
                error_about(&POD_ONE, &VIP_ONE, talk, &answer),
                verdict::PASS,
                error_about(&POD_ONE, &POD_REMOTE, talk, &translated),
                Reason::IcmpError,
            )];
            converse(bench, &name("to the backend"), &to_backend)?;
            bench.forget_flows()?;

            // Veth to veth: at the backend's veth, and on to the client.
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            bench.feed(Hook::FromPod, &POD_ONE, &talk.frame(client, vip, SYN).build())?;
            let there = talk.frame(client, (&POD_TWO, TARGET), SYN);
            let steps = [changed(
                Hook::FromPod,
                POD_TWO,
                error_about(&POD_TWO, &POD_ONE, talk, &there),
                verdict::REDIRECT,
                redirected(error_about(&VIP_ONE, &POD_ONE, talk, &talk.frame(client, vip, SYN)), &POD_ONE),
                Reason::IcmpError,
            )];
            converse(bench, &name("local"), &steps)?;
            bench.forget_flows()?;

            // Masqueraded from outside to another node: back to the client by the route.
            let key = node_port(talk, FrontendKey::SCOPE_CLUSTER);
            bench.set_frontend(key, &[(POD_REMOTE.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let first = talk.frame((&OUTSIDE, CLIENT), (&NODE_ONE, NODE_PORT), SYN);
            let port = begin(bench, Hook::FromNetdev, &NODE_ONE, &first)?;
            let there = talk.frame((&NODE_ONE, port), (&POD_REMOTE, TARGET), SYN);
            let from = Host { mac: OUTSIDE.mac, ..POD_REMOTE };
            let mut after = error_about(&NODE_ONE, &OUTSIDE, talk, &first);
            (after.src, after.dst) = (OUTSIDE.mac, NODE_ONE.mac);
            let steps = [changed(
                Hook::FromNetdev,
                NODE_ONE,
                error_about(&from, &NODE_ONE, talk, &there),
                verdict::REDIRECT,
                after,
                Reason::IcmpError,
            )];
            converse(bench, &name("masqueraded"), &steps)?;
            // What is about no flow of ours passes.
            let own = talk.frame((&NODE_ONE, 4), (&OUTSIDE, 5), SYN);
            let stranger = error_about(&OUTSIDE, &NODE_ONE, talk, &own);
            let untouched = [passes(Hook::FromNetdev, NODE_ONE, stranger, Reason::OtherProtocol)];
            converse(bench, &name("not ours"), &untouched)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// An SCTP packet with one chunk; `sum`: with its checksum, or with none, as a device would add it.
fn sctp(from: (&Host, u16), to: (&Host, u16), family: Family, chunk: &[u8], sum: bool) -> Frame {
    let packet = Sctp { src: from.1, dst: to.1, tag: 7, checksum: sum, chunk: chunk.to_vec() };
    from.0.send(to.0, family, packet.into())
}

#[test]
fn sctp_with_ports_translated() -> Result<()> {
    let init = [1, 0, 0, 20, 0, 0, 0, 1, 0, 1, 0, 0, 0, 10, 0, 10, 0, 0, 0, 5];
    let data = [&[0, 3, 0, 27, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0][..], b"hello sctp!", &[0]].concat();
    let sack = [3, 0, 0, 16, 0, 0, 0, 1, 0, 0, 255, 255, 0, 0, 0, 0];
    let cookie_ack = [11, 0, 0, 4];
    Bench::run(ROOMY, |bench| {
        for family in [Family::V4, Family::V6] {
            bench.set_service(&VIP_ONE, PORT, Proto::SCTP, &[(POD_TWO, TARGET)])?;
            let (client, vip, backend) = ((&POD_ONE, CLIENT), (&VIP_ONE, PORT), (&POD_TWO, TARGET));
            for sum in [true, false] {
                let mut steps: Vec<Step> = Vec::new();
                let mut first = Reason::ServiceNew;
                for chunk in [&init[..], &data, &sack, &cookie_ack] {
                    let sent = sctp(client, vip, family, chunk, sum);
                    let after = redirected(sctp(client, backend, family, chunk, sum), &POD_TWO);
                    steps.push(changed(Hook::FromPod, POD_ONE, sent, verdict::REDIRECT, after, first));
                    first = Reason::Service;
                    let reply = sctp(backend, client, family, chunk, sum);
                    let back = redirected(sctp(vip, client, family, chunk, sum), &POD_ONE);
                    steps.push(changed(Hook::FromPod, POD_TWO, reply, verdict::REDIRECT, back, Reason::Reply));
                }
                converse(bench, &format!("{family:?}, checksum {sum}"), &steps)?;
                bench.forget_flows()?;
            }
        }
        Ok(())
    })?
}
