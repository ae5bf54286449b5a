//! Network policy on single packets: what passes, what does not, under which reason, and what a flow remembers of it.

use anyhow::{Context as _, Result};
use proxy_abi::policy::SlotWord;
use proxy_abi::{DeviceEntry, FrontendEntry, FrontendKey, Hook, PortBe, Proto, Reason};
use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::spec::{BlockSpec, Change, PeerSpec, PolicySpec, PortNumber, PortSpec, RuleSpec, SelectorSpec};
use proxy_tests::Family;
use proxy_tests::bpf::policed::{NODE, Policed, namespace, pod};
use proxy_tests::bpf::talk::{TALKS, Talk};
use proxy_tests::bpf::{Bench, ROOMY, Tables, redirected, verdict};
use proxy_tests::packet::named::{GATEWAY, Host, NODE_ONE, OUTSIDE, POD_ONE, POD_THREE, POD_TWO, VIP_ONE, VIP_TWO};
use proxy_tests::packet::{Frame, Icmp, L4, tcp_flag};

#[path = "netpol_packets/full.rs"]
mod full;
#[path = "netpol_packets/hits.rs"]
mod hits;

const SYN: u8 = tcp_flag::SYN;
const ACK: u8 = tcp_flag::ACK;
const SYN_ACK: u8 = SYN | ACK;
const CLIENT: u16 = 40_000;
const PORT: u16 = 80;
const TARGET: u16 = 8080;

/// Three pods of this node, without policies.
fn objects() -> Vec<Change> {
    let pods = [("one", &POD_ONE), ("two", &POD_TWO), ("three", &POD_THREE)];
    let pods = pods.map(|(name, host)| Change::Pod(pod(name, host, NODE)));
    [namespace("default")].into_iter().chain(pods).collect()
}

fn app(name: &str) -> SelectorSpec {
    SelectorSpec { labels: [("app".into(), name.into())].into(), ..SelectorSpec::default() }
}

/// Rules of one direction: each a peer (a pod's name, or a range) and a port; 0 = any protocol and port.
fn rules(all: &[(&str, u16)]) -> Vec<RuleSpec> {
    let port = |number: u16, protocol: &str| PortSpec {
        protocol: Some(protocol.into()),
        port: Some(PortNumber::Number(number.into())),
        end_port: None,
    };
    let rule = |(peer, number): &(&str, u16)| {
        let peer = if peer.contains('/') {
            PeerSpec { block: Some(BlockSpec { cidr: (*peer).into(), except: vec![] }), ..PeerSpec::default() }
        } else {
            PeerSpec { pods: Some(app(peer)), ..PeerSpec::default() }
        };
        let ports = (*number != 0).then(|| ["TCP", "UDP", "SCTP"].map(|name| port(*number, name)).to_vec());
        RuleSpec { peers: Some(vec![peer]), ports }
    };
    all.iter().map(rule).collect()
}

/// A policy for one pod; `None` does not isolate.
fn policy(on: &str, ingress: Option<&[(&str, u16)]>, egress: Option<&[(&str, u16)]>) -> Change {
    let types = [ingress.map(|_| "Ingress".into()), egress.map(|_| "Egress".into())];
    Change::Policy(PolicySpec {
        name: ObjectName::new("default", format!("for-{on}")),
        audit: None,
        pod_selector: Some(app(on)),
        policy_types: Some(types.into_iter().flatten().collect()),
        ingress: ingress.map(rules),
        egress: egress.map(rules),
    })
}

/// All pods behind their interfaces, with these policies.
fn policed(bench: &Bench, policies: impl IntoIterator<Item = Change>) -> Result<Policed<'_>> {
    let policed = Policed::start(bench, Limits::default(), objects().into_iter().chain(policies).collect())?;
    for (name, host) in [("one", &POD_ONE), ("two", &POD_TWO), ("three", &POD_THREE)] {
        policed.place_pod(host, name)?;
    }
    Ok(policed)
}

/// A packet at a hook, from the uplink, and the one thing that is counted.
fn sees(policed: &Policed<'_>, hook: Hook, at: &Host, frame: &Frame, reason: Reason) -> Result<()> {
    let got = policed.feed(hook, at, &frame.build())?;
    let verdict = if reason.is_drop() { verdict::DROP } else { verdict::PASS };
    assert_eq!((got.verdict, got.counts), (verdict, [((hook, reason), 1)].into()), "{hook} of {:?}: {frame:?}", at.ip4);
    assert_eq!(got.packet, frame.build(), "{frame:?}");
    Ok(())
}

fn from(policed: &Policed<'_>, at: &Host, frame: &Frame, reason: Reason) -> Result<()> {
    sees(policed, Hook::FromPod, at, frame, reason)
}

fn to(policed: &Policed<'_>, at: &Host, frame: &Frame, reason: Reason) -> Result<()> {
    sees(policed, Hook::ToPod, at, frame, reason)
}

/// A connection, or two datagrams, between pods one and two, all of it passing.
fn connect(policed: &Policed<'_>, talk: Talk) -> Result<()> {
    let (client, server) = ((&POD_ONE, CLIENT), (&POD_TWO, TARGET));
    from(policed, &POD_ONE, &talk.frame(client, server, SYN), Reason::DirectNew)?;
    to(policed, &POD_TWO, &talk.frame(client, server, SYN), Reason::Direct)?;
    from(policed, &POD_TWO, &talk.frame(server, client, SYN_ACK), Reason::Direct)?;
    to(policed, &POD_ONE, &talk.frame(server, client, SYN_ACK), Reason::Direct)?;
    from(policed, &POD_ONE, &talk.frame(client, server, ACK), Reason::Direct)?;
    to(policed, &POD_TWO, &talk.frame(client, server, ACK), Reason::Direct)
}

#[test]
fn a_change_cuts_live_flows_and_only_those_that_it_is_about() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let allowing = || policy("two", Some(&[("one", TARGET)]), None);
            let mut policed = policed(bench, [allowing(), policy("one", Some(&[]), Some(&[("two", TARGET)]))])?;
            connect(&policed, talk)?;
            let stamps = |bench: &Bench| -> Result<Vec<_>> {
                let flows = bench.flows()?;
                Ok(flows.iter().map(|(key, _, flow)| (*key, flow.initiator_stamp, flow.responder_stamp)).collect())
            };
            let before = stamps(bench)?;
            assert!(before.iter().all(|(_, a, b)| a.revision != 0 && b.revision != 0), "{before:?}");
            // Somebody else's policy: nothing is judged again.
            policed.change([policy("three", Some(&[]), Some(&[]))])?;
            let (client, server) = ((&POD_ONE, CLIENT), (&POD_TWO, TARGET));
            let (there, back) = (talk.frame(client, server, ACK), talk.frame(server, client, ACK));
            to(&policed, &POD_TWO, &there, Reason::Direct)?;
            from(&policed, &POD_TWO, &back, Reason::Direct)?;
            assert_eq!(stamps(bench)?, before, "{talk:?}");
            // The server's: both directions end at the server's interface, and at no other.
            policed.change([policy("two", Some(&[("one", 9090)]), None)])?;
            from(&policed, &POD_ONE, &there, Reason::Direct)?;
            to(&policed, &POD_TWO, &there, Reason::PolicyCut)?;
            from(&policed, &POD_TWO, &back, Reason::PolicyCut)?;
            to(&policed, &POD_ONE, &back, Reason::Direct)?;
            // Allowed again, it goes on.
            policed.change([allowing()])?;
            to(&policed, &POD_TWO, &there, Reason::Direct)?;
            from(&policed, &POD_TWO, &back, Reason::Direct)?;
            // The client's.
            policed.change([policy("one", Some(&[]), Some(&[]))])?;
            from(&policed, &POD_ONE, &there, Reason::PolicyCut)?;
            to(&policed, &POD_ONE, &back, Reason::PolicyCut)?;
            to(&policed, &POD_TWO, &there, Reason::Direct)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn each_side_is_judged_at_its_own_interface() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let policed = policed(
                bench,
                [policy("one", None, Some(&[("two", TARGET)])), policy("two", Some(&[("three", 0)]), None)],
            )?;
            let frame = |to: &Host, port| talk.frame((&POD_ONE, CLIENT), (to, port), SYN);
            // What the client may not send leaves nothing behind.
            from(&policed, &POD_ONE, &frame(&POD_TWO, 8081), Reason::PolicyEgress)?;
            from(&policed, &POD_ONE, &frame(&OUTSIDE, TARGET), Reason::PolicyEgress)?;
            assert_eq!(bench.entries()?, []);
            // What the server may not receive ends there, and so does what looks like an answer to it.
            from(&policed, &POD_ONE, &frame(&POD_TWO, TARGET), Reason::DirectNew)?;
            to(&policed, &POD_TWO, &frame(&POD_TWO, TARGET), Reason::PolicyIngress)?;
            let answer = talk.frame((&POD_TWO, TARGET), (&POD_ONE, CLIENT), SYN_ACK);
            from(&policed, &POD_TWO, &answer, Reason::PolicyIngress)?;
            // The server's other flows are its own: it is not isolated that way.
            from(&policed, &POD_TWO, &talk.frame((&POD_TWO, 1), (&POD_THREE, 2), SYN), Reason::DirectNew)?;
            to(&policed, &POD_TWO, &talk.frame((&POD_THREE, 2), (&POD_TWO, 1), SYN_ACK), Reason::Direct)?;
            // A frame from somewhere else: ingress alone.
            let stranger = talk.frame((&OUTSIDE, 7), (&POD_TWO, TARGET), SYN);
            bench.forget_flows()?;
            to(&policed, &POD_TWO, &stranger, Reason::PolicyIngress)?;
            assert_eq!(bench.entries()?, [], "{talk:?}");
        }
        Ok(())
    })?
}

#[test]
fn a_service_is_judged_by_its_backend() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_TWO, TARGET)])?;
            bench.set_service(&VIP_TWO, TARGET, talk.proto, &[(POD_TWO, 8081)])?;
            let mut policed = policed(bench, [policy("one", None, Some(&[("two", TARGET)]))])?;
            let frame = |vip: &Host, port, flags| talk.frame((&POD_ONE, CLIENT), (vip, port), flags);
            // The Service's port is the allowed one, its backend's is not.
            from(&policed, &POD_ONE, &frame(&VIP_TWO, TARGET, SYN), Reason::PolicyEgress)?;
            assert_eq!(bench.entries()?, []);
            let first = frame(&VIP_ONE, PORT, SYN).build();
            let got = policed.feed(Hook::FromPod, &POD_ONE, &first)?;
            let there = redirected(talk.frame((&POD_ONE, CLIENT), (&POD_TWO, TARGET), SYN), &POD_TWO);
            assert_eq!((got.verdict, &got.packet), (verdict::REDIRECT, &there.build()), "{:?}", got.counts);
            to(&policed, &POD_TWO, &there, Reason::Seen)?;
            let reply = talk.frame((&POD_TWO, TARGET), (&POD_ONE, CLIENT), SYN_ACK);
            let got = policed.feed(Hook::FromPod, &POD_TWO, &reply.build())?;
            assert_eq!((got.verdict, got.counts), (verdict::REDIRECT, [((Hook::FromPod, Reason::Reply), 1)].into()));
            let back = redirected(talk.frame((&VIP_ONE, PORT), (&POD_ONE, CLIENT), SYN_ACK), &POD_ONE);
            to(&policed, &POD_ONE, &back, Reason::Seen)?;
            // A range that has the Service's address and not the backend's.
            let ranges: &[(&str, u16)] = &[("10.96.0.0/16", 0), ("fd00:10:96::/64", 0)];
            policed.change([policy("one", None, Some(ranges))])?;
            from(&policed, &POD_ONE, &frame(&VIP_ONE, PORT, ACK), Reason::PolicyCut)?;
            to(&policed, &POD_ONE, &back, Reason::PolicyCut)?;
            bench.forget_flows()?;
            from(&policed, &POD_ONE, &frame(&VIP_ONE, PORT, SYN), Reason::PolicyEgress)?;
        }
        Ok(())
    })?
}

#[test]
fn a_pod_reaches_itself() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let vip = (&VIP_ONE, PORT);
            bench.set_service(&VIP_ONE, PORT, talk.proto, &[(POD_ONE, TARGET)])?;
            let policed = policed(bench, [policy("one", Some(&[]), Some(&[]))])?;
            let own = |frame: &Frame, hook| bench.feed_from(hook, &POD_ONE, bench.ifindex(&POD_ONE), &frame.build());
            let first = talk.frame((&POD_ONE, CLIENT), vip, SYN);
            assert_eq!(own(&first, Hook::FromPod)?.verdict, verdict::REDIRECT, "{talk:?}");
            let port = bench.entries()?.first().context("a flow")?.translated.0.1;
            let there = redirected(talk.frame((&GATEWAY, port), (&POD_ONE, TARGET), SYN), &POD_ONE);
            assert_eq!(own(&there, Hook::ToPod)?.verdict, verdict::PASS);
            let answer = talk.frame((&POD_ONE, TARGET), (&GATEWAY, port), SYN_ACK);
            assert_eq!(own(&answer, Hook::FromPod)?.verdict, verdict::REDIRECT);
            let back = redirected(talk.frame(vip, (&POD_ONE, CLIENT), SYN_ACK), &POD_ONE);
            assert_eq!(own(&back, Hook::ToPod)?.verdict, verdict::PASS);
            // A Service without endpoints refuses, and the refusal arrives.
            bench.set_service(&VIP_TWO, PORT, talk.proto, &[])?;
            let refused = own(&talk.frame((&POD_ONE, 41_000), (&VIP_TWO, PORT), SYN), Hook::FromPod)?;
            assert_eq!(refused.verdict, verdict::REDIRECT);
            let arrives = bench.feed_from(Hook::ToPod, &POD_ONE, bench.ifindex(&POD_ONE), &refused.packet)?;
            assert_eq!(arrives.verdict, verdict::PASS, "{:?}", arrives.counts);
            // All else is refused.
            from(&policed, &POD_ONE, &talk.frame((&POD_ONE, 1), (&POD_TWO, 2), SYN), Reason::PolicyEgress)?;
            let forged = talk.frame((&GATEWAY, 7), (&POD_ONE, TARGET), SYN);
            to(&policed, &POD_ONE, &forged, Reason::PolicyIngress)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn a_masqueraded_client_is_judged_by_its_own_address() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let ip = FrontendKey::wildcard(talk.family == Family::V4);
            let key =
                FrontendKey { ip, port: PortBe::new(30_080), proto: talk.proto, scope: FrontendKey::SCOPE_CLUSTER };
            bench.set_frontend(key, &[(POD_TWO.ip(talk.family), TARGET)], FrontendEntry::MASQUERADE, 0)?;
            let outside: &[(&str, u16)] = &[("172.18.0.100/32", TARGET), ("fc00:f853:ccd::64/128", TARGET)];
            let gateway: &[(&str, u16)] = &[("10.244.0.1/32", 0), ("fd00:10:244::1/128", 0), ("172.18.0.10/32", 0)];
            let mut policed = policed(bench, [policy("two", Some(outside), None)])?;
            let first = talk.frame((&OUTSIDE, CLIENT), (&NODE_ONE, 30_080), SYN);
            let got = policed.feed(Hook::FromNetdev, &NODE_ONE, &first.build())?;
            assert_eq!(got.verdict, verdict::REDIRECT, "{:?}", got.counts);
            let there = Frame::parse(&got.packet).context("a frame")?;
            assert_eq!(there.as_ip().context("IP")?.src, GATEWAY.ip(talk.family));
            to(&policed, &POD_TWO, &there, Reason::Seen)?;
            // The address that the pod sees allows nothing.
            policed.change([policy("two", Some(gateway), None)])?;
            to(&policed, &POD_TWO, &there, Reason::PolicyCut)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn the_node_reaches_its_own_pods_by_where_it_sends_from() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let mut policed = policed(bench, [policy("two", Some(&[]), Some(&[]))])?;
            for slot in [policed.place_pod(&POD_TWO, "two")?, DeviceEntry::HELD] {
                policed.place(&POD_TWO, slot)?;
                let refused = if slot == DeviceEntry::HELD { Reason::PolicyHeld } else { Reason::PolicyIngress };
                let (node, server) = ((&GATEWAY, CLIENT), (&POD_TWO, TARGET));
                let there = talk.frame(node, server, SYN);
                // The node's address from somewhere else is not the node.
                to(&policed, &POD_TWO, &there, refused)?;
                assert_eq!(bench.entries()?, []);
                let sent = bench.feed_from(Hook::ToPod, &POD_TWO, 0, &there.build())?;
                assert_eq!(sent.counts, [((Hook::ToPod, Reason::DirectNew), 1)].into(), "{slot}");
                from(&policed, &POD_TWO, &talk.frame(server, node, SYN_ACK), Reason::Direct)?;
                // A change of policy does not forget who began.
                policed.change([policy("two", Some(&[("three", 1)]), Some(&[]))])?;
                from(&policed, &POD_TWO, &talk.frame(server, node, ACK), Reason::Direct)?;
                policed.change([policy("two", Some(&[]), Some(&[]))])?;
                // The pod does not reach the node by that.
                let refused = if slot == DeviceEntry::HELD { Reason::PolicyHeld } else { Reason::PolicyEgress };
                from(&policed, &POD_TWO, &talk.frame((&POD_TWO, 1), (&GATEWAY, 2), SYN), refused)?;
                bench.forget_flows()?;
            }
        }
        Ok(())
    })?
}

#[test]
fn pods_may_reach_their_node_where_that_is_asked_for() -> Result<()> {
    Bench::run(Tables { node_open: true, ..ROOMY }, |bench| {
        for talk in TALKS {
            let policed = policed(bench, [policy("one", Some(&[]), Some(&[]))])?;
            let frame = |to: &Host| talk.frame((&POD_ONE, CLIENT), (to, 10_250), SYN);
            from(&policed, &POD_ONE, &frame(&NODE_ONE), Reason::DirectNew)?;
            from(&policed, &POD_ONE, &frame(&OUTSIDE), Reason::PolicyEgress)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn fragments_are_judged_by_the_ports_of_the_first() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for family in Family::BOTH {
            let mut policed = policed(bench, [policy("two", Some(&[("one", TARGET)]), None)])?;
            let parts = |port, id: u32| {
                let mut frame = POD_ONE.udp(CLIENT, &POD_TWO, port, family, &[0x5a; 3500]);
                frame.as_ip_mut().expect("it is IP").id = id;
                frame.fragments(1280)
            };
            let (allowed, denied) = (parts(TARGET, 1), parts(9090, 2));
            for (part, reason) in allowed.iter().zip([Reason::DirectNew, Reason::Direct, Reason::Direct]) {
                to(&policed, &POD_TWO, part, reason)?;
            }
            for part in &denied {
                to(&policed, &POD_TWO, part, Reason::PolicyIngress)?;
            }
            // Whose first part never came: no rule with ports lets it pass, one without does.
            let orphan = parts(TARGET, 3).remove(1);
            to(&policed, &POD_TWO, &orphan, Reason::PolicyIngress)?;
            policed.change([policy("two", Some(&[("one", 0)]), None)])?;
            to(&policed, &POD_TWO, &orphan, Reason::FragmentUnknown)?;
            // A first part that hides the ports.
            let mut tiny = parts(TARGET, 4).remove(0);
            if let Some(ip) = tiny.as_ip_mut() {
                ip.l4 = L4::Other { proto: 6, bytes: vec![0x1f; 8] };
            }
            to(&policed, &POD_TWO, &tiny, Reason::FrameUnparsed)?;
            from(&policed, &POD_ONE, &tiny, Reason::FrameUnparsed)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

fn echo(from: &Host, to: &Host, family: Family, request: bool, id: u8) -> Frame {
    let kind = match (family, request) {
        (Family::V4, true) => 8,
        (Family::V4, false) => 0,
        (Family::V6, true) => 128,
        (Family::V6, false) => 129,
    };
    from.send(to, family, L4::Icmp(Icmp { kind, rest: [0, id, 0, 1], ..Icmp::default() }))
}

#[test]
fn icmp_answers_and_errors_pass_with_what_they_are_about() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let mut policed = policed(bench, [policy("one", Some(&[]), None)])?;
            let family = talk.family;
            let ping = |id| echo(&POD_ONE, &OUTSIDE, family, true, id);
            let pong = |id| echo(&OUTSIDE, &POD_ONE, family, false, id);
            to(&policed, &POD_ONE, &pong(8), Reason::PolicyIngress)?;
            from(&policed, &POD_ONE, &ping(8), Reason::OtherProtocol)?;
            to(&policed, &POD_ONE, &pong(8), Reason::OtherProtocol)?;
            to(&policed, &POD_ONE, &pong(9), Reason::PolicyIngress)?;
            // A request is no answer, whatever its identifier.
            for id in [8, 128] {
                from(&policed, &POD_ONE, &ping(id), Reason::OtherProtocol)?;
                to(&policed, &POD_ONE, &echo(&OUTSIDE, &POD_ONE, family, true, id), Reason::PolicyIngress)?;
            }
            let error = |from: &Host, to: &Host, about: &Frame| {
                let kind = if family == Family::V4 { 3 } else { 1 };
                let payload = about.build().split_off(14);
                from.send(to, family, L4::Icmp(Icmp { kind, code: 1, payload, ..Icmp::default() }))
            };
            let sent = talk.frame((&POD_ONE, CLIENT), (&OUTSIDE, PORT), SYN);
            to(&policed, &POD_ONE, &error(&NODE_ONE, &POD_ONE, &sent), Reason::PolicyIngress)?;
            from(&policed, &POD_ONE, &sent, Reason::DirectNew)?;
            to(&policed, &POD_ONE, &error(&NODE_ONE, &POD_ONE, &sent), Reason::Direct)?;
            // About somebody else's flow.
            let theirs = talk.frame((&POD_THREE, CLIENT), (&OUTSIDE, PORT), SYN);
            from(&policed, &POD_THREE, &theirs, Reason::DirectNew)?;
            to(&policed, &POD_ONE, &error(&NODE_ONE, &POD_ONE, &theirs), Reason::PolicyIngress)?;
            // About a flow that may be no more.
            policed.change([policy("one", Some(&[]), Some(&[]))])?;
            to(&policed, &POD_ONE, &error(&NODE_ONE, &POD_ONE, &sent), Reason::PolicyCut)?;
            to(&policed, &POD_ONE, &pong(8), Reason::PolicyCut)?;
            from(&policed, &POD_ONE, &ping(77), Reason::PolicyEgress)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn an_address_that_changes_hands_takes_no_flow_along() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            let isolated = policy("four", Some(&[]), None);
            let mut policed = policed(bench, [policy("two", Some(&[("one", 0)]), None), isolated])?;
            connect(&policed, talk)?;
            let there = talk.frame((&POD_ONE, CLIENT), (&POD_TWO, TARGET), ACK);
            let gone = Change::PodGone(ObjectName::new("default", "two"));
            policed.change([gone, Change::Pod(pod("four", &POD_TWO, NODE))])?;
            // Until the interface is told, its slot is nobody's.
            to(&policed, &POD_TWO, &there, Reason::PolicyCut)?;
            policed.place_pod(&POD_TWO, "four")?;
            to(&policed, &POD_TWO, &there, Reason::PolicyCut)?;
            // The same revision under another slot is another pod's.
            let maps = &bench.bpf().maps().policy;
            let flows = bench.flows()?;
            let stamp = flows.first().context("a flow")?.2.responder_stamp;
            let epoch = maps.epoch.get(&0)?.unwrap_or(0);
            let slot = policed.place_pod(&POD_TWO, "four")?;
            let index = SlotWord::index(slot, epoch);
            let word = maps.slot.get(&index)?.context("a word")?;
            maps.slot.set(&index, &SlotWord { revision: stamp.revision, ..word })?;
            to(&policed, &POD_TWO, &there, Reason::PolicyCut)?;
            maps.slot.set(&index, &word)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn what_does_not_fit_or_is_not_there_does_not_pass() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        for talk in TALKS {
            // Room for the rules of one pod, not of two.
            let changes =
                objects().into_iter().chain([policy("one", None, Some(&[("two", TARGET), ("10.0.0.0/8", 1)]))]);
            let mut policed = Policed::start(bench, Limits { bits: 20, ..Limits::default() }, changes.collect())?;
            let (one, two) = (policed.place_pod(&POD_ONE, "one")?, policed.place_pod(&POD_TWO, "two")?);
            let there = talk.frame((&POD_ONE, CLIENT), (&POD_TWO, TARGET), SYN);
            from(&policed, &POD_ONE, &there, Reason::DirectNew)?;
            to(&policed, &POD_TWO, &there, Reason::Direct)?;
            let many: Vec<(String, u16)> = (0..9).map(|n| (format!("10.244.{n}.0/24"), 1000 + n)).collect();
            let many: Vec<(&str, u16)> = many.iter().map(|(range, port)| (range.as_str(), *port)).collect();
            policed.change([policy("two", Some(&many), None)])?;
            assert_eq!(policed.reconciler().engine().diagnostics().len(), 1);
            to(&policed, &POD_TWO, &there, Reason::PolicyCut)?;
            to(&policed, &POD_TWO, &talk.frame((&OUTSIDE, 1), (&POD_TWO, 2), SYN), Reason::PolicyUnready)?;
            from(&policed, &POD_TWO, &talk.frame((&POD_TWO, 1), (&OUTSIDE, 2), SYN), Reason::PolicyUnready)?;
            from(&policed, &POD_ONE, &there, Reason::Direct)?;
            policed.change([policy("two", Some(&[("one", TARGET)]), None)])?;
            assert_eq!(policed.reconciler().engine().diagnostics(), []);
            to(&policed, &POD_TWO, &there, Reason::Direct)?;
            // A slot that nobody has written.
            policed.place(&POD_ONE, one.max(two) + 100)?;
            from(&policed, &POD_ONE, &talk.frame((&POD_ONE, 1), (&POD_TWO, 2), SYN), Reason::PolicyUnready)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}

#[test]
fn sctp_is_no_tcp() -> Result<()> {
    Bench::run(ROOMY, |bench| {
        let only = |protocol: &str| {
            let Change::Policy(mut spec) = policy("two", Some(&[("one", TARGET)]), None) else {
                unreachable!("a policy")
            };
            for port in spec.ingress.iter_mut().flatten().flat_map(|rule| rule.ports.iter_mut().flatten()) {
                port.protocol = Some(protocol.into());
            }
            Change::Policy(spec)
        };
        for family in Family::BOTH {
            let chunk = [&CLIENT.to_be_bytes()[..], &TARGET.to_be_bytes(), &[0; 36]].concat();
            let sctp = POD_ONE.send(&POD_TWO, family, L4::Other { proto: Proto::SCTP.0, bytes: chunk });
            let tcp = POD_ONE.tcp(CLIENT, &POD_TWO, TARGET, family, SYN);
            let mut policed = policed(bench, [only("SCTP")])?;
            to(&policed, &POD_TWO, &tcp, Reason::PolicyIngress)?;
            to(&policed, &POD_TWO, &sctp, Reason::DirectNew)?;
            policed.change([only("TCP")])?;
            to(&policed, &POD_TWO, &tcp, Reason::DirectNew)?;
            to(&policed, &POD_TWO, &sctp, Reason::PolicyCut)?;
            bench.forget_flows()?;
        }
        Ok(())
    })?
}
