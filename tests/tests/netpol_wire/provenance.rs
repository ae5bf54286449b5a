//! The node reaches its own pods, isolated ones too, and nobody else does: by where packets come from, not by their
//! addresses.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use proxy_tests::rawsock::RawSocket;
use proxy_tests::scenario::OUTSIDE;
use proxy_tests::traffic::echo::echo;
use proxy_tests::traffic::{Answer, Transport, UdpOptions, probe_all, udp_exchange};
use proxy_tests::{Deadline, Family, Netns, Pod};
use serde_json::json;

use crate::stage::Stage;

/// A datagram of this size is six fragments.
const LARGE: usize = 8_000;
/// Bytes of echoes: strangers send them in fragments too. A pod's own answer in fragments is no part of a flow, and needs
/// a rule of its own.
const ECHOES: [usize; 2] = [32, LARGE];
/// Served, and not served.
const PORTS: [u16; 2] = [80, 83];
const PATIENCE: Duration = Duration::from_millis(400);
/// Netfilter that puts fragments together for conntrack, and lets everything pass.
const CONNTRACK: &str =
    "table inet tracking { chain forward { type filter hook forward priority 0; ct state new counter; }; }";

/// What came back.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Reached {
    /// By TCP and UDP: served, not served.
    ports: Vec<&'static str>,
    /// Echoes, each of so many bytes.
    echoes: Vec<(usize, bool)>,
    /// A datagram in fragments, which are sent back too.
    large: bool,
}

impl Reached {
    fn all(echoes: &[usize]) -> Self {
        let ports = vec!["answered", "answered", "refused", "refused"];
        Self { ports, echoes: echoes.iter().map(|&size| (size, true)).collect(), large: true }
    }

    fn nothing(echoes: &[usize]) -> Self {
        Self { ports: vec!["silent"; 4], echoes: echoes.iter().map(|&size| (size, false)).collect(), large: false }
    }
}

/// Everything that can be asked of a pod.
fn ask(from: &Netns, ip: IpAddr, echoes: &[usize], patience: Duration) -> Reached {
    let targets: Vec<_> = PORTS
        .iter()
        .flat_map(|&port| Transport::BOTH.map(|transport| (SocketAddr::new(ip, port), transport)))
        .collect();
    let word = |answer: Answer| match answer {
        Answer::From { .. } => "answered",
        Answer::Refused => "refused",
        Answer::Silent => "silent",
        Answer::Denied | Answer::Failed(_) => "failed",
    };
    let ports = probe_all(from, &targets, patience).expect("namespace").into_iter().map(word).collect();
    let echoes = echoes.iter().map(|&size| (size, echo(from, ip, size, patience).expect("socket"))).collect();
    let options = UdpOptions { size: LARGE, timeout: patience, ..UdpOptions::default() };
    let large = udp_exchange(from, SocketAddr::new(ip, PORTS[0]), &options).is_ok();
    Reached { ports, echoes, large }
}

/// Source of an IP packet that is no neighbour discovery, which is never policed.
fn source(frame: &[u8]) -> Option<IpAddr> {
    let octets = |at: usize, len: usize| frame.get(at..at + len);
    match octets(12, 2)? {
        [0x08, 0x00] => Some(IpAddr::from(<[u8; 4]>::try_from(octets(26, 4)?).ok()?)),
        [0x86, 0xdd] => {
            let discovery = frame.get(20) == Some(&58) && frame.get(54).is_some_and(|kind| (133..=137).contains(kind));
            let ip = IpAddr::from(<[u8; 16]>::try_from(octets(22, 16)?).ok()?);
            (!discovery).then_some(ip)
        }
        _ => None,
    }
}

/// Asks from everywhere but its own node, and gives what was reached and what the pod saw of it.
fn strangers(stage: &Stage, pod: &Pod, names: &[&str]) -> (Vec<(String, Reached)>, Vec<IpAddr>) {
    let ear = RawSocket::open(pod.netns(), "eth0").expect("socket");
    let node = stage.scenario.node(0);
    let own = Family::BOTH.map(|family| node.bridge_ip(family));
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let listening = scope.spawn(|| {
            let mut seen = Vec::new();
            let look = |frame: &[u8]| seen.extend(source(frame).filter(|ip| !own.contains(ip)));
            ear.watch(&stop, look).map(|()| seen).expect("heard")
        });
        let asking: Vec<_> = names
            .iter()
            .flat_map(|name| Family::BOTH.map(|family| (*name, family)))
            .map(|(name, family)| {
                let from = stage.scenario.netns(name).expect("namespace");
                let ip = pod.ip(family);
                scope.spawn(move || (format!("{name} {family}"), ask(&from, ip, &ECHOES, PATIENCE)))
            })
            .collect();
        let reached = asking.into_iter().map(|one| one.join().expect("asked")).collect();
        stop.store(true, Ordering::Relaxed);
        (reached, listening.join().expect("listened"))
    })
}

#[test]
fn an_isolated_pod_is_reached_from_its_node_alone() {
    let mut stage = Stage::build();
    let others = ["y-a", "z-a", "node2", OUTSIDE];
    let pod = stage.scenario.cluster().pod("x-a").expect("pod");
    for name in others.iter().chain(&["node1"]) {
        let netns = stage.scenario.netns(name).expect("namespace");
        netns.sysctl(&[("net/ipv4/ping_group_range", "0 0")]).expect("set");
    }
    // Refusals are not rationed.
    pod.netns().sysctl(&[("net/ipv4/icmp_ratelimit", "0"), ("net/ipv6/icmp/ratelimit", "0")]).expect("set");
    let node = stage.scenario.netns("node1").expect("namespace");
    // The way is there for all of them: it is the policy that takes it away.
    let open = || strangers(&stage, &pod, &others).0.iter().all(|(_, reached)| *reached == Reached::all(&ECHOES));
    Deadline::secs(60)
        .until("everybody reaches it without a policy", open)
        .unwrap_or_else(|error| panic!("{error}: {:?}", strangers(&stage, &pod, &others).0));

    let isolated = json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Ingress", "Egress"] });
    stage.apply("x", "isolated", &isolated);
    stage.settle();
    stage.wait_endpoint(0, &pod, "ingress, egress");
    for conntrack in [false, true] {
        if conntrack {
            node.feed("nft", &["-f", "-"], CONNTRACK).expect("nft");
        }
        for br_netfilter in [false, true] {
            stage.scenario.node(0).set_br_netfilter(br_netfilter).expect("set");
            let what = format!("conntrack {conntrack}, br_netfilter {br_netfilter}");
            let (reached, seen) = strangers(&stage, &pod, &others);
            for (name, reached) in reached {
                assert_eq!(reached, Reached::nothing(&ECHOES), "{name}, {what}");
            }
            assert_eq!(seen, Vec::<IpAddr>::new(), "{what}");
            for family in Family::BOTH {
                let mut got = Reached::nothing(&[]);
                let whole = || {
                    got = ask(&node, pod.ip(family), &ECHOES[..1], Duration::from_secs(2));
                    got == Reached::all(&ECHOES[..1])
                };
                let reached = Deadline::secs(20).until("reached", whole);
                assert!(
                    reached.is_ok(),
                    "node1 {family}, {what}: {got:?}; {}",
                    stage.scenario.counters(0).expect("counters")
                );
            }
        }
    }
}
