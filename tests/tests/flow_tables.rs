//! The flow tables: they keep themselves without the agent, and no two flows are taken for each other.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::cluster::{ClusterSpec, Links, NodeSpec};
use proxy_tests::packet::{Frame, L4, Udp};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::scenario::matrix::{self, Setting};
use proxy_tests::scenario::views::Counters;
use proxy_tests::scenario::{SERVICE_PORT, Scenario, TARGET_PORT, vip};
use proxy_tests::traffic::flow::{Ping, ping_all};
use proxy_tests::traffic::socket::udp_client;
use proxy_tests::traffic::wire::UdpReply;
use proxy_tests::traffic::{ANSWERED_WITHIN, Flow, connect_steadily_while};
use proxy_tests::{Deadline, Family, Pod};

const SECOND: Duration = Duration::from_secs(1);
/// Set to do five times the work.
const LONG: &str = "PROXY_TESTS_LONG";
/// Connections of each family, and how many a second are begun where the machine can.
const CONNECTIONS: (u64, u32) = (30_000, 500);
/// Flows of UDP beside them, and how many a second.
const DATAGRAMS: (u32, u32) = (60_000, 2_000);

/// A node whose tables hold 4,096 entries, with a Service before `b`.
fn small_tables(pods: &[&str]) -> Scenario {
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").hostile(true).pods(pods.iter().copied()));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    scenario.serve_pod("b").expect("servers");
    scenario.publish("first", 11, &["b"]).expect("published");
    scenario.publish("second", 12, &["b"]).expect("published");
    let entries = ["--flow-live-entries", "4096", "--flow-brief-entries", "4096"];
    scenario.start_agents(&entries).expect("agents");
    scenario
}

/// One datagram of a new flow after the other, so many a second: so many at least, and until told to stop. Gives their
/// number.
fn flood(scenario: &Scenario, pod: &Pod, least: u32, per_second: u32, stop: &AtomicBool) -> u32 {
    let socket = RawSocket::open(pod.netns(), "eth0").expect("socket");
    let gateway = scenario.node(0).bridge_mac();
    let start = Instant::now();
    let mut sent = 0;
    while sent < least || !stop.load(Ordering::Relaxed) {
        let due = start + SECOND / per_second * sent;
        if let Some(early) = due.checked_duration_since(Instant::now()).filter(|early| !early.is_zero()) {
            thread::park_timeout(early);
            continue;
        }
        let family = Family::BOTH[sent as usize % 2];
        let src = 1024 + u16::try_from(sent / 2 % 64_000).expect("below 64,000");
        let udp = L4::Udp(Udp { src, dst: SERVICE_PORT, checksum: true, payload: vec![0x55; 32] });
        let frame = Frame::ip((pod.mac(), pod.ip(family)), (gateway, vip(family, 12)), udp);
        socket.send(&frame.build()).expect("sent");
        sent += 1;
    }
    sent
}

#[test]
fn tables_keep_themselves_without_the_agent() {
    let times = if std::env::var_os(LONG).is_some() { 5 } else { 1 };
    let (connections, per_second) = (u64::from(times) * CONNECTIONS.0, CONNECTIONS.1);
    let datagrams = times * DATAGRAMS.0;
    let mut scenario = small_tables(&["a", "b", "c"]);
    let [a, c] = ["a", "c"].map(|name| scenario.cluster().pod(name).expect("pod"));
    let target = |family| SocketAddr::new(vip(family, 11), SERVICE_PORT);
    let mut idle: Vec<_> = (0..16)
        .map(|n| Flow::open(a.netns(), target(Family::BOTH[n % 2]), 0, ANSWERED_WITHIN).expect("flow"))
        .collect();
    ping_all(&mut idle, ANSWERED_WITHIN).check("idle flows before").expect("whole");
    scenario.agent_mut(0).kill9().expect("killed");
    let before = scenario.counters(0).expect("counters");
    let stop = AtomicBool::new(false);
    let (start, limit) = (Instant::now(), Deadline::after(5 * times * 60 * SECOND));
    let go_on = move |made| made < connections && limit.left().is_some();
    let (reports, flooded) = thread::scope(|scope| {
        let flooding = scope.spawn(|| flood(&scenario, &c, datagrams, DATAGRAMS.1, &stop));
        let clients = Family::BOTH.map(|family| {
            let netns = a.netns().clone();
            scope.spawn(move || {
                connect_steadily_while(&netns, target(family), 32, per_second, go_on).expect("connections")
            })
        });
        let reports = clients.map(|client| client.join().expect("clients"));
        stop.store(true, Ordering::Relaxed);
        (reports, flooding.join().expect("flood"))
    });
    let added = scenario.counters(0).expect("counters").since(&before);
    let time = start.elapsed();
    eprintln!("{time:?}: {} and {}, {flooded} UDP flows beside them; {added}", reports[0], reports[1]);
    for report in &reports {
        assert_eq!((report.errors, report.first_error.as_deref()), (0, None), "{report}");
        assert!(report.operations >= connections, "{} of {connections} connections", report.operations);
    }
    assert!(flooded >= datagrams, "{flooded} of {datagrams}");
    assert_eq!((added.drops(), added.get("from_pod", "flow_live_full")), (0, 0), "{added}");
    let whole = ping_all(&mut idle, ANSWERED_WITHIN).check("idle flows after").expect("whole");
    assert_eq!(whole.flows, 16);
    let status = scenario.status(0).expect("status");
    assert_eq!(status.agent, "down");
    assert!(status.used("flow_live") < 1000, "closed connections leave the table: {status:?}");
}

/// Where the first and the second flow from one port go.
#[derive(Clone, Copy, Debug)]
enum To {
    First,
    Second,
    Direct,
}

impl To {
    fn address(self, family: Family, backend: &Pod) -> SocketAddr {
        match self {
            Self::First => SocketAddr::new(vip(family, 11), SERVICE_PORT),
            Self::Second => SocketAddr::new(vip(family, 12), SERVICE_PORT),
            Self::Direct => SocketAddr::new(backend.ip(family), TARGET_PORT),
        }
    }
}

/// To the backend, both flows of each pair would look alike.
const CLASHES: [(To, To); 4] =
    [(To::First, To::Second), (To::Second, To::First), (To::First, To::Direct), (To::Direct, To::First)];

/// Each of 1,000 clashes was met by another port. A few more: a port taken at random may be one that comes later.
fn assert_remapped(scenario: &Scenario, before: &Counters) {
    let added = scenario.counters(0).expect("counters").since(before);
    let remapped = added.get("from_pod", "port_remapped");
    assert!((1000..1050).contains(&remapped) && added.drops() == 0, "{added}");
}

#[test]
fn tcp_flows_that_would_look_alike_stay_apart() {
    let setting = Setting { links: Links::Routed, hostile: true, rp_filter: true };
    let mut scenario = matrix::prepare(&matrix::cluster(setting)).expect("scenario");
    scenario.publish("first", 11, &["b"]).expect("published");
    scenario.publish("second", 12, &["b"]).expect("published");
    scenario.start_agents(&[]).expect("agents");
    let [a, b] = ["a", "b"].map(|name| scenario.cluster().pod(name).expect("pod"));
    let before = scenario.counters(0).expect("counters");
    let mut port = 10_000;
    for round in 0..125 {
        for family in Family::BOTH {
            for clash in CLASHES {
                port += 1;
                let what = format!("round {round}, {family}, port {port}, {clash:?}");
                let open = |to: To| {
                    Flow::open(a.netns(), to.address(family, &b), port, 3 * SECOND)
                        .unwrap_or_else(|error| panic!("{what}: {error}"))
                };
                let mut one = open(clash.0);
                let ping = |flow: &mut Flow| {
                    let ping = flow.ping(3 * SECOND);
                    assert!(matches!(ping, Ping::Echoed(_)), "{what}: {ping:?}");
                };
                // Its messages are ahead of the other's: whoever got the other's would know.
                ping(&mut one);
                ping(&mut one);
                let mut two = open(clash.1);
                assert_eq!((one.local().port(), two.local().port()), (port, port));
                assert_ne!(one.peer_seen_by_server(), two.peer_seen_by_server(), "{what}: the server cannot tell them");
                assert_eq!(two.peer_seen_by_server().ip(), a.ip(family), "{what}");
                for _ in 0..3 {
                    ping(&mut two);
                    ping(&mut one);
                }
            }
        }
    }
    assert_remapped(&scenario, &before);
}

#[test]
fn udp_flows_that_would_look_alike_stay_apart() {
    let scenario = small_tables(&["a", "b"]);
    let [a, b] = ["a", "b"].map(|name| scenario.cluster().pod(name).expect("pod"));
    let before = scenario.counters(0).expect("counters");
    let mut port = 10_000;
    for round in 0..125_u32 {
        for family in Family::BOTH {
            for (kind, clash) in (0_u32..).zip(CLASHES) {
                port += 1;
                let what = format!("round {round}, {family}, port {port}, {clash:?}");
                let targets = [clash.0, clash.1].map(|to| to.address(family, &b));
                let socket = a.netns().run(|| udp_client(targets[0], port, 3 * SECOND)).expect("entered");
                let socket = socket.expect("socket");
                let mut seen = BTreeMap::new();
                for turn in 0..3_u32 {
                    for target in targets {
                        // The tag says what was asked where; the reply repeats it.
                        let tag = format!("{round:04}{kind}{turn}{:>10}", target.ip().to_string().len());
                        let request = format!("{tag}{target}");
                        socket.send_to(request.as_bytes(), target).expect("sent");
                        let mut buffer = [0; 1500];
                        let (len, from) =
                            socket.recv_from(&mut buffer).unwrap_or_else(|error| panic!("{what}: {error}"));
                        let (reply, ..) = UdpReply::read(&buffer[..len]).expect("a reply");
                        assert_eq!((from, reply.tag), (target, UdpReply::tag(request.as_bytes())), "{what}");
                        let before = seen.insert(target, reply.peer);
                        assert!(before.is_none_or(|before| before == reply.peer), "{what}: its port changed");
                    }
                }
                let [one, two] = targets.map(|target| seen[&target]);
                assert_ne!(one, two, "{what}: the server cannot tell them apart");
            }
        }
    }
    assert_remapped(&scenario, &before);
}
