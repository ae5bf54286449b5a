//! The life of flows in the tables of the real programs (`BPF_PROG_TEST_RUN`): clashes, eviction, renewal, limits.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result, ensure};
use proxy_abi::flow::state;
use proxy_abi::{DeviceEntry, FlowEntry, Hook, Proto, Reason, Tuple};
use proxy_agent::dataplane::sweep::{Timeouts, monotonic, sweep};
use proxy_ebpf::conntrack::UdpIdle;
use proxy_ebpf::packet::{V4, V6, parse};
use proxy_tests::bpf::talk::{TALKS, Talk, changed, converse, passes, reset_of};
use proxy_tests::bpf::{Bench, End, Entry, ROOMY, Tables, frontend, redirected, verdict};
use proxy_tests::packet::named::{Host, OUTSIDE, POD_ONE, POD_REMOTE, POD_THREE, POD_TWO, VIP_ONE, VIP_TWO};
use proxy_tests::packet::{Frame, L4, tcp_flag};

const SYN: u8 = tcp_flag::SYN;
const ACK: u8 = tcp_flag::ACK;
const FIN: u8 = tcp_flag::FIN | ACK;
const RST: u8 = tcp_flag::RST;
const SYN_ACK: u8 = SYN | ACK;
const CLIENT: u16 = 1000;
const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// Source and destination of a frame.
fn ends(bytes: &[u8]) -> Result<(End, End)> {
    let frame = Frame::parse(bytes)?;
    let ip = frame.as_ip().context("not IP")?;
    let (src, dst) = match &ip.l4 {
        L4::Tcp(tcp) => (tcp.src, tcp.dst),
        L4::Udp(udp) => (udp.src, udp.dst),
        other => anyhow::bail!("{other:?}"),
    };
    Ok(((ip.src, src), (ip.dst, dst)))
}

/// Lets a packet through and tells its ends afterwards.
fn sends(bench: &Bench, hook: Hook, at: &Host, frame: &Frame) -> Result<(End, End)> {
    let run = bench.run_once(hook, at, &frame.build())?;
    ensure!(run.verdict.cast_signed() != verdict::DROP, "dropped {frame:?}");
    ends(&run.packet)
}

/// Where the entries of a flow are: state, and whether it is in the table that evicts nothing.
fn states(bench: &Bench) -> Result<BTreeSet<(bool, u8)>> {
    Ok(bench.entries()?.iter().map(|entry| (entry.live, entry.state)).collect())
}

/// By the client? Its flags; is the flow in `flow_live` then; and in which state.
type Segment = (bool, u8, bool, u8);

#[test]
fn tcp_lives_in_two_tables() -> Result<()> {
    use state::{CLOSED, ESTABLISHED, FIN_INITIATOR, FIN_RESPONDER, MIDSTREAM, RESET, SYN_RECEIVED, SYN_SENT};
    // Who sends what, and where all entries of the flow are then.
    let (client, server) = (true, false);
    let open =
        [(client, SYN, false, SYN_SENT), (server, SYN_ACK, false, SYN_RECEIVED), (client, ACK, true, ESTABLISHED)];
    let conversations: &[(&str, bool, &[Segment])] = &[
        (
            "closed by the client, and used again",
            true,
            &[
                (client, FIN, true, FIN_INITIATOR),
                (server, ACK, true, FIN_INITIATOR),
                (server, FIN, false, CLOSED),
                (client, ACK, false, CLOSED),
                (client, SYN, false, SYN_SENT),
                (server, SYN_ACK, false, SYN_RECEIVED),
                (client, ACK, true, ESTABLISHED),
            ],
        ),
        ("closed by the server", true, &[(server, FIN, true, FIN_RESPONDER), (client, FIN, false, CLOSED)]),
        ("reset by the server", true, &[(server, RST | ACK, false, RESET), (client, SYN, false, SYN_SENT)]),
        ("reset by the client", true, &[(client, RST, false, RESET)]),
        (
            "refused",
            false,
            &[(client, SYN, false, SYN_SENT), (server, RST | ACK, false, RESET), (client, SYN, false, SYN_SENT)],
        ),
        ("a SYN again", false, &[(client, SYN, false, SYN_SENT), (client, SYN, false, SYN_SENT)]),
    ];
    Bench::run(ROOMY, |bench| {
        for talk in TALKS.into_iter().filter(|talk| talk.is_tcp()) {
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            for (service, to, from) in [(true, (&VIP_ONE, PORT), &POD_TWO), (false, (&POD_TWO, TARGET), &POD_TWO)] {
                for (name, opened, rest) in conversations {
                    let open: &[_] = if *opened { &open } else { &[] };
                    for (number, (by_client, flags, live, state)) in open.iter().chain(*rest).enumerate() {
                        let (at, frame) = if *by_client {
                            (&POD_ONE, talk.frame((&POD_ONE, CLIENT), to, *flags))
                        } else {
                            (from, talk.frame((from, TARGET), (&POD_ONE, CLIENT), *flags))
                        };
                        sends(bench, Hook::FromPod, at, &frame)?;
                        let expected = [(*live, *state)].into();
                        assert_eq!(states(bench)?, expected, "{name}, step {number}, Service: {service}, {talk:?}");
                        assert_eq!(bench.entries()?.len(), if service { 2 } else { 1 }, "{name}");
                    }
                    bench.forget_flows()?;
                }
            }
            // A connection that is older than the programs.
            sends(bench, Hook::FromPod, &POD_ONE, &talk.frame((&POD_ONE, 1), (&OUTSIDE, 2), ACK))?;
            assert_eq!(states(bench)?, [(false, MIDSTREAM)].into());
            sends(bench, Hook::ToPod, &POD_ONE, &talk.frame((&OUTSIDE, 2), (&POD_ONE, 1), ACK))?;
            assert_eq!(states(bench)?, [(true, ESTABLISHED)].into());
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// Opens a flow and returns the port from which the backend sees it.
fn opens(bench: &Bench, talk: Talk, client: u16, to: (&Host, u16)) -> Result<u16> {
    let (src, dst) = sends(bench, Hook::FromPod, &POD_ONE, &talk.frame((&POD_ONE, client), to, SYN))?;
    ensure!(src.0 == POD_ONE.ip(talk.family) && dst == talk.end(&POD_TWO, TARGET), "{src:?} to {dst:?}");
    Ok(src.1)
}

/// A reply of the backend as the client gets it, by way of both hooks.
fn answers(bench: &Bench, talk: Talk, port: u16, flags: u8) -> Result<(End, End)> {
    let reply = talk.frame((&POD_TWO, TARGET), (&POD_ONE, port), flags).build();
    let sent = bench.run_once(Hook::FromPod, &POD_TWO, &reply)?;
    let got = bench.run_once(Hook::ToPod, &POD_ONE, &sent.packet)?;
    ends(&got.packet)
}

#[test]
fn flows_that_look_alike_to_a_backend_are_told_apart() -> Result<()> {
    // Two Services with the same only backend, and the backend itself, from one client port: in every order.
    let (one, two, direct) = ((&VIP_ONE, PORT), (&VIP_TWO, PORT), (&POD_TWO, TARGET));
    let orders = [[one, two, direct], [direct, one, two], [two, direct, one], [one, direct, two]];
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            for vip in [VIP_ONE, VIP_TWO] {
                bench.set_service(&vip, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            }
            let mut clashes = 0;
            let mut all = Vec::new();
            for client in 2000..2000 + 125 {
                let order = orders[usize::from(client) % orders.len()];
                let mut ports = Vec::new();
                for to in order {
                    ports.push(opens(bench, talk, client, to)?);
                }
                assert_eq!(ports.iter().collect::<BTreeSet<_>>().len(), 3, "{client}: {ports:?}");
                clashes += ports.iter().filter(|port| **port != client).count();
                for (to, port) in order.into_iter().zip(&ports).rev() {
                    let expected = (talk.end(to.0, to.1), talk.end(&POD_ONE, client));
                    assert_eq!(answers(bench, talk, *port, SYN_ACK)?, expected, "{talk:?}, {order:?}, {ports:?}");
                }
                for (to, port) in order.into_iter().zip(&ports) {
                    let data = talk.frame((&POD_ONE, client), to, ACK);
                    let (src, _) = sends(bench, Hook::FromPod, &POD_ONE, &data)?;
                    assert_eq!(src, talk.end(&POD_ONE, *port), "stays on its port");
                    let expected = (talk.end(to.0, to.1), talk.end(&POD_ONE, client));
                    all.push((*port, expected));
                    assert_eq!(answers(bench, talk, *port, ACK)?, expected, "{talk:?}, {order:?}, {ports:?}");
                }
            }
            // Nor do those of one round stand in the way of another's.
            for (port, expected) in all {
                assert_eq!(answers(bench, talk, port, ACK)?, expected, "{talk:?}, {port}");
            }
            // Two of three in each round; one more where a port that was taken by chance is a later client's own.
            ensure!(clashes >= 250, "{clashes}; four times 250 are 1,000");
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn a_clash_takes_another_backend_before_another_port() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        let talk = TALKS[0];
        bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
        let both: Vec<_> = (0..16).map(|n| if n == 0 { (POD_TWO, TARGET) } else { (POD_THREE, TARGET) }).collect();
        bench.set_service(&VIP_TWO, PORT, talk.proto, &both)?;
        for client in 2000..2100 {
            opens(bench, talk, client, (&VIP_ONE, PORT))?;
            let frame = talk.frame((&POD_ONE, client), (&VIP_TWO, PORT), SYN);
            let (src, dst) = sends(bench, Hook::FromPod, &POD_ONE, &frame)?;
            // One slot of sixteen clashes; three tries in a row happen once in 4,096, and then the port changes.
            ensure!(dst == talk.end(&POD_THREE, TARGET) || src.1 != client, "{src:?} {dst:?}");
        }
        Ok(())
    })?
}

#[test]
fn a_flow_that_leads_nowhere_begins_anew() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let open = |backend: &'static Host, flags, reason| {
                let sent = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), flags);
                let after = redirected(talk.frame((&POD_ONE, CLIENT), (backend, TARGET), flags), backend);
                changed(Hook::FromPod, POD_ONE, sent, verdict::REDIRECT, after, reason)
            };
            let old = bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            converse(
                bench,
                "before",
                &[open(&POD_TWO, SYN, Reason::ServiceNew), open(&POD_TWO, SYN, Reason::Service)],
            )?;
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_THREE, TARGET)])?;
            // It still serves: who is on it stays.
            converse(bench, "draining", &[open(&POD_TWO, SYN, Reason::Service)])?;
            for id in old {
                bench.end_backend(id)?;
            }
            converse(
                bench,
                "ended",
                &[open(&POD_THREE, SYN, Reason::ServiceNew), open(&POD_THREE, SYN, Reason::Service)],
            )?;
            // The Service has gone altogether.
            bench.bpf().maps().frontend.delete(&frontend(VIP_ONE.ip(talk.family), PORT, talk.proto))?;
            for id in bench.flows()?.iter().map(|(_, _, entry)| entry.backend).collect::<BTreeSet<_>>() {
                bench.end_backend(id)?;
            }
            let sent = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), SYN);
            let refused = bench.feed(Hook::FromPod, &POD_ONE, &sent.build())?;
            let counts = [((Hook::FromPod, Reason::NoBackend), 1)].into();
            assert_eq!((refused.verdict, refused.counts), (verdict::REDIRECT, counts), "{talk:?}: gone");
            if talk.is_tcp() {
                assert_eq!(refused.packet, reset_of(&sent).build());
            }
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// An established connection of pod one to the first Service.
fn establish(bench: &Bench, talk: Talk, client: u16) -> Result<()> {
    let send = |flags| sends(bench, Hook::FromPod, &POD_ONE, &talk.frame((&POD_ONE, client), (&VIP_ONE, PORT), flags));
    send(SYN)?;
    answers(bench, talk, client, SYN_ACK)?;
    send(ACK)?;
    Ok(())
}

#[test]
fn established_outlives_its_backend_until_it_is_opened_again() -> Result<()> {
    const HOUR: u64 = 3_600_000_000_000;
    Bench::run(ROOMY, |bench| {
        for talk in TALKS.into_iter().filter(|talk| talk.is_tcp()) {
            let old = bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            establish(bench, talk, CLIENT)?;
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_THREE, TARGET)])?;
            for id in old {
                bench.end_backend(id)?;
            }
            let send = |flags| {
                let frame = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), flags);
                Ok::<_, anyhow::Error>(sends(bench, Hook::FromPod, &POD_ONE, &frame)?.1)
            };
            assert_eq!(send(ACK)?, talk.end(&POD_TWO, TARGET), "lives on");
            assert_eq!(send(SYN)?, talk.end(&POD_TWO, TARGET), "a stray SYN ends nothing");
            for (key, _, entry) in bench.flows()? {
                let long_ago = FlowEntry { last_seen: entry.last_seen.saturating_sub(HOUR), ..entry };
                bench.bpf().maps().flow_live.set(&key, &long_ago)?;
            }
            assert_eq!(send(SYN)?, talk.end(&POD_THREE, TARGET), "a new connection");
            assert_eq!(states(bench)?, [(false, state::SYN_SENT)].into());
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn a_pod_that_gets_the_address_of_another_gets_its_own_flows() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_pods(DeviceEntry::REDIRECT)?;
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            establish(bench, talk, CLIENT)?;
            let open = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), SYN);
            let initiators = || {
                Ok::<BTreeSet<u32>, anyhow::Error>(bench.flows()?.iter().map(|(_, _, e)| e.initiator_ifindex).collect())
            };
            let expected = |pod| BTreeSet::from([bench.ifindex(pod)]);
            // Pod three claims the address, but the agent has not bound it there.
            sends(bench, Hook::FromPod, &POD_THREE, &open)?;
            assert_eq!(initiators()?, expected(&POD_ONE), "{talk:?}");
            bench.set_pod(&POD_ONE, bench.ifindex(&POD_THREE), DeviceEntry::REDIRECT)?;
            sends(bench, Hook::FromPod, &POD_THREE, &open)?;
            assert_eq!(initiators()?, expected(&POD_THREE), "{talk:?}");
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn an_evicted_entry_comes_back_over_a_stray() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            let open = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), SYN);
            sends(bench, Hook::FromPod, &POD_ONE, &open)?;
            let maps = bench.bpf().maps();
            for (key, entry, raw) in bench.flows()? {
                if entry.flags & FlowEntry::KEY_TRANSLATED != 0 {
                    ensure!(maps.flow_brief.delete(&key)?, "it is there");
                } else {
                    // The other end of the flow was last used two seconds ago.
                    let aged = FlowEntry { last_seen: raw.last_seen.saturating_sub(2_000_000_000), ..raw };
                    maps.flow_brief.set(&key, &aged)?;
                }
            }
            let untranslated = (talk.end(&POD_TWO, TARGET), talk.end(&POD_ONE, CLIENT));
            assert_eq!(answers(bench, talk, CLIENT, SYN_ACK)?, untranslated, "nobody knows the reply: {talk:?}");
            sends(bench, Hook::FromPod, &POD_ONE, &open)?;
            let expected = (talk.end(&VIP_ONE, PORT), talk.end(&POD_ONE, CLIENT));
            assert_eq!(answers(bench, talk, CLIENT, SYN_ACK)?, expected, "{talk:?}");
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// The entry for replies was evicted, and another flow has taken its key: the request that comes once more takes another
/// port, and the other flow keeps its own.
#[test]
fn a_flow_whose_port_another_one_has_takes_another_port() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            let open = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), SYN);
            sends(bench, Hook::FromPod, &POD_ONE, &open)?;
            let maps = bench.bpf().maps();
            let mut others = None;
            for (key, entry, raw) in bench.flows()? {
                let aged = FlowEntry { last_seen: raw.last_seen.saturating_sub(2_000_000_000), ..raw };
                if entry.flags & FlowEntry::KEY_TRANSLATED == 0 {
                    maps.flow_brief.set(&key, &aged)?;
                } else {
                    let original = Tuple { dst: VIP_TWO.ip(talk.family).into(), ..raw.original };
                    let other = FlowEntry { original, ..raw };
                    maps.flow_brief.set(&key, &other)?;
                    others = Some((key, other));
                }
            }
            let (key, other) = others.context("the entry for replies")?;
            let (from, to) = sends(bench, Hook::FromPod, &POD_ONE, &open)?;
            assert_eq!((from.0, to), (talk.end(&POD_ONE, 0).0, talk.end(&POD_TWO, TARGET)), "{talk:?}");
            assert_ne!(from.1, CLIENT, "{talk:?}");
            let expected = (talk.end(&VIP_ONE, PORT), talk.end(&POD_ONE, CLIENT));
            assert_eq!(answers(bench, talk, from.1, SYN_ACK)?, expected, "{talk:?}");
            assert_eq!(maps.flow_brief.get(&key)?, Some(other), "{talk:?}");
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

/// The times that a UDP flow may be idle are those of the configuration.
#[test]
fn a_flow_that_was_idle_for_too_long_begins_anew() -> Result<()> {
    const SECOND: u64 = 1_000_000_000;
    let configured = UdpIdle { unreplied: 10 * SECOND, assured: 60 * SECOND };
    // Settings, answered before, idle for so many seconds, begins anew.
    let rows = [
        (UdpIdle::DEFAULT, false, 29, false),
        (UdpIdle::DEFAULT, false, 31, true),
        (UdpIdle::DEFAULT, true, 119, false),
        (UdpIdle::DEFAULT, true, 121, true),
        (configured, false, 9, false),
        (configured, false, 11, true),
        (configured, true, 59, false),
        (configured, true, 61, true),
    ];
    for (udp_idle, answered, seconds, anew) in rows {
        Bench::run(Tables { udp_idle, ..ROOMY }, |bench| {
            for talk in TALKS.into_iter().filter(|talk| !talk.is_tcp()) {
                bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
                let first = talk.frame((&POD_ONE, CLIENT), (&VIP_ONE, PORT), 0).build();
                bench.feed(Hook::FromPod, &POD_ONE, &first)?;
                if answered {
                    answers(bench, talk, CLIENT, 0)?;
                }
                for (key, _, raw) in bench.flows()? {
                    let aged = FlowEntry { last_seen: raw.last_seen.saturating_sub(seconds * SECOND), ..raw };
                    bench.maps().flow_brief.set(&key, &aged)?;
                }
                let outcome = bench.feed(Hook::FromPod, &POD_ONE, &first)?;
                let reason = if anew { Reason::ServiceNew } else { Reason::Service };
                let expected = [((Hook::FromPod, reason), 1)].into();
                assert_eq!(outcome.counts, expected, "{talk:?} {udp_idle:?}, answered {answered}, {seconds} s");
                bench.forget_flows()?;
            }
            Ok::<_, anyhow::Error>(())
        })??;
    }
    Ok(())
}

#[test]
fn a_service_at_the_address_of_its_backend() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_service(&POD_TWO, TARGET, talk.proto, &[(POD_TWO, TARGET)])?;
            let (client, server) = ((&POD_ONE, CLIENT), (&POD_TWO, TARGET));
            let sent = |flags| talk.frame(client, server, flags);
            converse(
                bench,
                &format!("{talk:?}"),
                &[
                    passes(Hook::FromPod, POD_ONE, sent(SYN), Reason::ServiceNew),
                    passes(Hook::ToPod, POD_TWO, sent(SYN), Reason::Direct),
                    passes(Hook::FromPod, POD_TWO, talk.frame(server, client, SYN_ACK), Reason::Direct),
                    passes(Hook::FromPod, POD_ONE, sent(ACK), Reason::Direct),
                ],
            )?;
            let state = if talk.is_tcp() { state::ESTABLISHED } else { state::ASSURED };
            let original = (talk.end(&POD_ONE, CLIENT), talk.end(&POD_TWO, TARGET));
            let flags = FlowEntry::KEY_ORIGINAL | FlowEntry::KEY_TRANSLATED;
            let expected = Entry { live: talk.is_tcp(), original, translated: original, state, flags };
            assert_eq!(bench.entries()?, [expected]);
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn a_flood_evicts_nothing_that_is_established() -> Result<()> {
    let small = Tables { live: 4096, brief: 4096, ..ROOMY };
    Bench::run(small, |bench| {
        for talk in TALKS {
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET), (POD_REMOTE, TARGET)])?;
        }
        bench.set_service(&VIP_TWO, PORT, Proto::TCP, &[(POD_TWO, TARGET)])?;
        let tcp = TALKS[0];
        let idle: Vec<u16> = (1000..1016).collect();
        let send = |client, flags| {
            sends(bench, Hook::FromPod, &POD_ONE, &tcp.frame((&POD_ONE, client), (&VIP_TWO, PORT), flags))
        };
        for client in &idle {
            send(*client, SYN)?;
            answers(bench, tcp, *client, SYN_ACK)?;
            send(*client, ACK)?;
        }
        let established = bench.entries()?;
        assert_eq!((established.len(), states(bench)?), (32, [(true, state::ESTABLISHED)].into()));
        for client in 2000..22_000 {
            let talk = TALKS[usize::from(client) % TALKS.len()];
            // None is refused, however many there were before.
            sends(bench, Hook::FromPod, &POD_ONE, &talk.frame((&POD_ONE, client), (&VIP_ONE, PORT), SYN))?;
        }
        let still: Vec<_> = bench.entries()?.into_iter().filter(|entry| entry.live).collect();
        assert_eq!(still, established);
        for client in idle {
            assert_eq!(send(client, ACK)?, (tcp.end(&POD_ONE, client), tcp.end(&POD_TWO, TARGET)));
            assert_eq!(answers(bench, tcp, client, ACK)?, (tcp.end(&VIP_TWO, PORT), tcp.end(&POD_ONE, client)));
        }
        // And new ones live through their handshake.
        send(999, SYN)?;
        answers(bench, tcp, 999, SYN_ACK)?;
        send(999, ACK)?;
        assert_eq!(bench.entries()?.iter().filter(|entry| entry.live).count(), 34);
        Ok(())
    })?
}

#[test]
fn one_pod_takes_no_more_than_its_share() -> Result<()> {
    Bench::run(Tables { live: 64, brief: 4096, quota: 10, ..ROOMY }, |bench| {
        let tcp = TALKS[0];
        bench.set_service(&VIP_ONE, PORT, tcp.proto, &[(POD_TWO, TARGET)])?;
        for client in 1000..1010 {
            establish(bench, tcp, client)?;
        }
        let counted = |pod: &Host| bench.bpf().maps().pod_flows.get(&bench.ifindex(pod));
        assert_eq!(counted(&POD_ONE)?, Some(10));
        let open = |pod: &Host, client| {
            let frame = tcp.frame((pod, client), (&VIP_ONE, PORT), SYN);
            bench.feed(Hook::FromPod, pod, &frame.build()).map(|got| got.counts.into_keys().collect::<Vec<_>>())
        };
        assert_eq!(open(&POD_ONE, 1010)?, [(Hook::FromPod, Reason::PodQuota)]);
        assert_eq!(open(&POD_THREE, 1010)?, [(Hook::FromPod, Reason::ServiceNew)], "others are not concerned");
        // What is established goes on, and what ends makes room.
        let segment = |client, flags| tcp.frame((&POD_ONE, client), (&VIP_ONE, PORT), flags).build();
        let got = bench.feed(Hook::FromPod, &POD_ONE, &segment(1000, ACK))?;
        assert_eq!(got.counts, [((Hook::FromPod, Reason::Service), 1)].into());
        bench.feed(Hook::FromPod, &POD_ONE, &segment(1000, tcp_flag::RST))?;
        assert_eq!(counted(&POD_ONE)?, Some(9));
        assert_eq!(open(&POD_ONE, 1010)?, [(Hook::FromPod, Reason::ServiceNew)]);

        // Connections to the backend itself are counted apart: those beyond the share can be evicted, and none is refused.
        for client in 2000..2015 {
            let (there, back) = ((&POD_THREE, client), (&POD_TWO, TARGET));
            for (pod, from, to, flags) in
                [(POD_THREE, there, back, SYN), (POD_TWO, back, there, SYN_ACK), (POD_THREE, there, back, ACK)]
            {
                let got = bench.feed(Hook::FromPod, &pod, &tcp.frame(from, to, flags).build())?;
                assert!(
                    got.counts.keys().all(|(_, reason)| matches!(reason, Reason::DirectNew | Reason::Direct)),
                    "{got:?}"
                );
            }
        }
        let direct = bench.ifindex(&POD_THREE) | FlowEntry::DIRECT_OF;
        let pod_flows = &bench.bpf().maps().pod_flows;
        assert_eq!((counted(&POD_THREE)?, pod_flows.get(&direct)?), (None, Some(10)));
        let live = |bench: &Bench| {
            let all = bench.flows()?.into_iter().filter(|(_, entry, _)| entry.live);
            Ok::<_, anyhow::Error>(all.filter(|(_, _, flow)| !flow.is_translated()).count())
        };
        assert_eq!(live(bench)?, 10);
        assert_eq!(open(&POD_THREE, 1011)?, [(Hook::FromPod, Reason::ServiceNew)]);
        // The agent's count is the same.
        sweep(bench.bpf().maps(), &Timeouts::default(), monotonic())?;
        assert_eq!((counted(&POD_ONE)?, counted(&POD_THREE)?, pod_flows.get(&direct)?), (Some(9), None, Some(10)));
        Ok(())
    })?
}

#[test]
fn established_flows_beyond_the_table_go_on_and_are_counted() -> Result<()> {
    Bench::run(Tables { live: 8, brief: 4096, ..ROOMY }, |bench| {
        let tcp = TALKS[0];
        bench.set_service(&VIP_ONE, PORT, tcp.proto, &[(POD_TWO, TARGET)])?;
        for client in 1000..1016 {
            establish(bench, tcp, client)?;
        }
        assert_eq!(bench.entries()?.iter().filter(|entry| entry.live).count(), 8);
        for client in 1000..1016 {
            let (src, dst) =
                sends(bench, Hook::FromPod, &POD_ONE, &tcp.frame((&POD_ONE, client), (&VIP_ONE, PORT), ACK))?;
            assert_eq!((src, dst), (tcp.end(&POD_ONE, client), tcp.end(&POD_TWO, TARGET)));
            assert_eq!(answers(bench, tcp, client, ACK)?, (tcp.end(&VIP_ONE, PORT), tcp.end(&POD_ONE, client)));
        }
        let frame = |flags| tcp.frame((&POD_ONE, 1016), (&VIP_ONE, PORT), flags).build();
        bench.feed(Hook::FromPod, &POD_ONE, &frame(SYN))?;
        answers(bench, tcp, 1016, SYN_ACK)?;
        let got = bench.feed(Hook::FromPod, &POD_ONE, &frame(ACK))?;
        let expected = [((Hook::FromPod, Reason::Service), 1), ((Hook::FromPod, Reason::FlowLiveFull), 2)];
        assert_eq!(got.counts, expected.into());
        Ok(())
    })?
}

#[test]
fn the_verifier_walks_little() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        let walked = bench.bpf().verified_instructions();
        let programs: BTreeSet<_> = walked.iter().map(|(name, _)| name.as_str()).collect();
        let packets = ["from_pod", "to_pod", "from_netdev", "to_netdev"];
        ensure!(programs.is_superset(&packets.into()), "{programs:?}");
        for (name, count) in walked.iter().filter(|(name, _)| packets.contains(&name.as_str())) {
            println!("{name}: {count} instructions");
            ensure!((1..=100_000).contains(count), "{name}: {count} instructions");
        }
        Ok(())
    })?
}

/// Ethernet and IPv6: the kernel runs no program here on less.
const SHORTEST: usize = 54;

/// Any bytes at all, half of them made from frames that mean something.
fn any_frame(random: &mut fastrand::Rng) -> Vec<u8> {
    let talk = TALKS[random.usize(..TALKS.len())];
    let mut bytes = talk.frame((&POD_ONE, random.u16(..)), (&OUTSIDE, random.u16(..)), random.u8(..)).build();
    match random.u8(..4) {
        0 => bytes = (0..random.usize(SHORTEST..200)).map(|_| random.u8(..)).collect(),
        1 => bytes.truncate(random.usize(SHORTEST..=bytes.len().max(SHORTEST))),
        _ => {}
    }
    for _ in 0..random.usize(..6) {
        // Mostly in the headers, where a wrong byte changes what follows.
        let at = random.usize(12..bytes.len().min(64));
        let any = random.u8(..);
        bytes[at] = *random.choice(&[0, 1, 4, 6, 17, 44, 51, 60, 0x45, 0x60, 0x86, 0xdd, any]).unwrap_or(&any);
    }
    bytes
}

#[test]
fn the_programs_read_packets_as_the_library_does() -> Result<()> {
    let seed = fastrand::u64(..);
    let mut random = fastrand::Rng::with_seed(seed);
    Bench::run(ROOMY, move |bench| {
        let mut followed = 0;
        for round in 0..4000 {
            let bytes = any_frame(&mut random);
            let hook = if random.bool() { Hook::FromPod } else { Hook::ToPod };
            let got = bench.feed(hook, &POD_ONE, &bytes)?;
            let parsed = match bytes[12..14] {
                [0x08, 0x00] => parse::<V4, [u8]>(&bytes),
                [0x86, 0xdd] => parse::<V6, [u8]>(&bytes),
                _ => Err(Reason::NotIp),
            };
            let context = format!("seed {seed}, round {round}, {hook}: {bytes:02x?}");
            let reasons: Vec<_> = got.counts.keys().map(|(_, reason)| *reason).collect();
            assert_eq!(got.packet, bytes, "{context}");
            match parsed {
                Ok(icmp) if matches!(icmp.proto, Proto::ICMP | Proto::ICMPV6) => {
                    // About packets of flows that are not there, if about any.
                    assert_eq!((reasons, got.verdict), (vec![Reason::OtherProtocol], verdict::PASS), "{context}");
                }
                Err(reason) => assert_eq!((reasons, got.verdict), (vec![reason], verdict::PASS), "{context}"),
                Ok(_) if got.verdict == verdict::DROP => {
                    assert_eq!(reasons, [Reason::FragmentBeforeFirst], "{context}");
                }
                Ok(_) if reasons == [Reason::FragmentUnknown] => assert_eq!(got.verdict, verdict::PASS, "{context}"),
                Ok(_) => {
                    followed += 1;
                    assert_eq!(got.verdict, verdict::PASS, "{context}");
                    ensure!(matches!(reasons[..], [Reason::DirectNew | Reason::Direct]), "{reasons:?}, {context}");
                }
            }
        }
        ensure!(followed > 400, "too few were TCP or UDP: {followed}");
        Ok(())
    })?
}
