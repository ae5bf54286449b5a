//! What Kubernetes' own tests of NetworkPolicy expect of SCTP. Sent is the first packet of an association, as a frame;
//! that it arrives is what counts: no SCTP in the kernel is needed.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use proxy_tests::packet::{Frame, Sctp, proto};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::traffic::{Answer, Transport, probe};
use proxy_tests::{Deadline, Family, Pod};
use serde_json::{Value, json};

use crate::stage::{Expect, PORTS, SCTP_PORTS, Stage};

/// How long a packet may be on its way, when the machine does something else too.
const LATE: Duration = Duration::from_millis(500);

/// Source ports of what is sent to a pod's address, and to its Service's: to the pod they would look alike.
const SOURCES: [u16; 2] = [40_000, 41_000];

/// An INIT (RFC 9260 §3.3.2) to a port; its own tag tells it from others.
fn init(src: u16, dst: u16, tag: u32) -> Sctp {
    let mut chunk = vec![1, 0, 0, 20]; // INIT, flags, length
    chunk.extend(tag.to_be_bytes());
    chunk.extend([0, 1, 0, 0]); // window
    chunk.extend([0, 10, 0, 10]); // streams out, in
    chunk.extend(tag.to_be_bytes()); // first TSN
    Sctp { src, dst, tag: 0, checksum: true, chunk }
}

/// The ports and the tag of an INIT whose CRC is right.
fn init_in(frame: &[u8]) -> Option<(u16, u16, u32)> {
    let at = if frame.get(12) == Some(&0x08) { 34 } else { 54 };
    if frame.get(if at == 34 { 23 } else { 20 }) != Some(&proto::SCTP) {
        return None;
    }
    // An Ethernet frame may be longer than its packet; an INIT is not.
    let packet = Sctp::read(frame.get(at..at + 32)?)?;
    let tag = packet.chunk.get(4..8).and_then(|tag| <[u8; 4]>::try_from(tag).ok())?;
    Some((packet.src, packet.dst, u32::from_be_bytes(tag)))
}

/// By which address a pod is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum By {
    Pod,
    Service,
}

/// One INIT that is sent: from, to, by which address, family, port.
type Asked = (String, String, By, Family, u16);

/// Sends an INIT from every pod to every other one and to its Service, in both families on both ports, and gives those that
/// arrived: at the right pod and port, with the right CRC.
fn arrived(stage: &Stage, wanted: &BTreeSet<Asked>) -> BTreeSet<Asked> {
    let cluster = stage.scenario.cluster();
    let pods: Vec<Pod> = cluster.pods();
    let sockets: Vec<_> = pods.iter().map(|pod| RawSocket::open(pod.netns(), "eth0").expect("socket")).collect();
    let mut asked: Vec<Asked> = Vec::new();
    let mut frames = Vec::new();
    for (from, socket) in pods.iter().zip(&sockets) {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            for (by, src) in [By::Pod, By::Service].into_iter().zip(SOURCES) {
                for family in Family::BOTH {
                    for port in PORTS {
                        let tag = u32::try_from(asked.len() + 1).expect("few");
                        let bridge = cluster.node(from.node()).expect("node").bridge_mac();
                        let (mac, ip, dst) = match by {
                            By::Pod if from.node() == to.node() => (to.mac(), to.ip(family), port),
                            By::Pod => (bridge, to.ip(family), port),
                            By::Service => (bridge, stage.vip(to.name(), family), SCTP_PORTS + port),
                        };
                        let packet = init(src, dst, tag).into();
                        let frame = Frame::ip((from.mac(), from.ip(family)), (mac, ip), packet);
                        frames.push((socket, frame.build()));
                        asked.push((from.name().to_owned(), to.name().to_owned(), by, family, port));
                    }
                }
            }
        }
    }
    let (heard, stop) = (Mutex::new(BTreeSet::new()), AtomicBool::new(false));
    thread::scope(|scope| {
        for (pod, socket) in pods.iter().zip(&sockets) {
            let (heard, asked, stop) = (&heard, &asked, &stop);
            scope.spawn(move || {
                let look = |frame: &[u8]| {
                    let Some((src, dst, tag)) = init_in(frame) else { return };
                    if let Some(one) = (tag as usize).checked_sub(1).and_then(|number| asked.get(number))
                        && one.1 == pod.name()
                        && (src, dst) == (SOURCES[one.2 as usize], one.4)
                    {
                        heard.lock().expect("whole").insert(one.clone());
                    }
                };
                socket.watch(stop, look).expect("heard");
            });
        }
        for (socket, frame) in &frames {
            socket.send(frame).expect("sent");
        }
        // Those that are to pass tell when the others would have.
        let _ = Deadline::after(LATE).until("arrived", || heard.lock().expect("whole").is_superset(wanted));
        stop.store(true, Ordering::Relaxed);
    });
    heard.into_inner().expect("whole")
}

/// Sends until what arrives is what is expected.
fn check(stage: &Stage, what: &str, expects: &[Expect]) {
    let pods = stage.scenario.cluster().pods();
    let mut wanted = BTreeSet::new();
    for from in &pods {
        for to in pods.iter().filter(|to| to.name() != from.name()) {
            for expect in expects.iter().filter(|expect| expect.of(from.name(), to.name())) {
                for (by, family) in [By::Pod, By::Service].into_iter().flat_map(|by| Family::BOTH.map(|f| (by, f))) {
                    wanted.insert((from.name().to_owned(), to.name().to_owned(), by, family, expect.port));
                }
            }
        }
    }
    let mut got = BTreeSet::new();
    let whole = || {
        got = arrived(stage, &wanted);
        got == wanted
    };
    let reached = Deadline::secs(30).until(what, whole);
    if reached.is_err() {
        let (lost, leaked) = (wanted.difference(&got), got.difference(&wanted));
        panic!("{what}: lost {:?}, leaked {:?}", lost.collect::<Vec<_>>(), leaked.collect::<Vec<_>>());
    }
}

fn sctp(rules: &[(&'static str, &'static str, bool)]) -> Vec<Expect> {
    PORTS.map(|port| on(port, rules)).to_vec()
}

fn on(port: u16, rules: &[(&'static str, &'static str, bool)]) -> Expect {
    // Which transport it is about is said by who asks.
    Expect { transport: Transport::Udp, port, rules: rules.to_vec() }
}

/// A policy for x-a that lets in what is in `rule`.
fn rule(rule: &Value) -> Value {
    json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Ingress"], "ingress": [rule] })
}

/// Does x-a answer by TCP, over IPv4 and over IPv6?
fn tcp(stage: &Stage, from: &str, port: u16) -> [bool; 2] {
    let from = stage.scenario.netns(from).expect("namespace");
    Family::BOTH.map(|family| {
        let target = SocketAddr::new(stage.ip("x-a", family), port);
        matches!(probe(&from, target, Transport::Tcp, LATE), Ok(Answer::From { .. }))
    })
}

#[test]
fn the_scenarios_of_kubernetes_by_sctp() {
    const NO: bool = false;
    const YES: bool = true;
    let mut stage = Stage::build();
    check(&stage, "without a policy", &sctp(&[]));
    for br_netfilter in [false, true] {
        for node in stage.scenario.cluster().nodes() {
            node.set_br_netfilter(br_netfilter).expect("set");
        }
        stage.apply("x", "policy", &json!({ "podSelector": {}, "policyTypes": ["Ingress"] }));
        stage.settle();
        check(&stage, "should support a 'default-deny-ingress' policy", &sctp(&[("*", "x/*", NO)]));
        stage.reset();

        let y = json!([{ "namespaceSelector": { "matchLabels": { "ns": "y" } } }]);
        let on_81 = |protocol| rule(&json!({ "from": y, "ports": [{ "port": 81, "protocol": protocol }] }));
        let only_y = [("x/*", "x/a", NO), ("z/*", "x/a", NO)];
        stage.apply("x", "policy", &on_81("SCTP"));
        stage.settle();
        let expected = [on(80, &[("*", "x/a", NO)]), on(81, &only_y)];
        check(&stage, "should enforce policy based on Ports", &expected);
        assert_eq!(tcp(&stage, "y-a", 81), [false; 2], "a rule for SCTP is none for TCP");
        stage.apply("x", "policy", &on_81("TCP"));
        stage.settle();
        let arrives = || tcp(&stage, "y-a", 81) == [true; 2];
        Deadline::secs(60).until("TCP", arrives).expect("a rule for TCP");
        check(&stage, "a rule for TCP is none for SCTP", &sctp(&[("*", "x/a", NO)]));
        stage.reset();

        let y_a = json!([{
            "namespaceSelector": { "matchLabels": { "ns": "y" } }, "podSelector": { "matchLabels": { "pod": "a" } },
        }]);
        stage.apply("x", "policy", &rule(&json!({ "from": y_a })));
        stage.settle();
        let what = "should enforce policy to allow traffic only from a pod in a different namespace based on \
                    PodSelector and NamespaceSelector";
        check(&stage, what, &sctp(&[("*", "x/a", NO), ("y/a", "x/a", YES)]));
        stage.reset();
    }
}
