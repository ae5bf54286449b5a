//! One client address, through a NodePort that masquerades, to one backend: more connections than there are ports, one after
//! the other. Each port is taken over from a connection that has ended, whichever end holds that in TIME_WAIT.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::scenario::views::ServiceRow;
use proxy_tests::scenario::{Scenario, service};
use proxy_tests::traffic::{Closer, connect_rate};
use proxy_tests::{Deadline, Family, Netns};

const NODE_PORT: u16 = 30_080;
/// 31,744 ports are there.
const CONNECTIONS: u64 = 45_000;
const WORKERS: usize = 16;

/// Counters of TCP that the kernel keeps for a namespace, by file and the name of their lines.
struct Counted(&'static str, &'static str, &'static [&'static str]);

/// SYNs that a client sent again.
const REPEATED: Counted = Counted("netstat", "TcpExt:", &["TCPSynRetrans"]);
/// What a server counts for a SYN of a connection that it has begun already: another SYN ACK, none because there was one just
/// now, or a challenge where the connection is established.
const BEGUN_BEFORE: Counted =
    Counted("netstat", "TcpExt:", &["TCPSynRetrans", "TCPACKSkippedSynRecv", "TCPSYNChallenge"]);
/// What a client sends whose SYN is answered by an ACK of another connection.
const RESETS: Counted = Counted("snmp", "Tcp:", &["OutRsts"]);

impl Counted {
    /// All of them together.
    fn at(&self, netns: &Netns) -> u64 {
        let Self(file, kind, wanted) = self;
        let read = || std::fs::read_to_string(format!("/proc/thread-self/net/{file}"));
        let text = netns.run(read).expect("netns").expect("counters");
        // Two lines: of names, and of numbers.
        let mut lines = text.lines().filter_map(|line| line.strip_prefix(kind)).map(str::split_whitespace);
        let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
        let counters: BTreeMap<_, _> = names.zip(values).collect();
        wanted.iter().map(|name| counters[name].parse::<u64>().expect("a number")).sum()
    }
}

/// More connections than ports; every port that is used twice is taken over.
fn exceed_ports(closer: Closer, family: Family) {
    let mut scenario =
        Scenario::build(&ClusterSpec::default().node(NodeSpec::new("node1").pods(["b"]))).expect("scenario");
    scenario.serve_pod("b").expect("servers");
    scenario.start_agents(&[]).expect("agents");
    scenario.publish_service(&service("web", 1).node_port(NODE_PORT), &["b"]).expect("published");
    let outside = scenario.cluster().outside();
    let target = SocketAddr::new(scenario.node(0).ip(family), NODE_PORT);
    // It is listed under the address that stands for all.
    let is_mine = |row: &ServiceRow| row.address.port() == NODE_PORT && row.address.is_ipv4() == target.is_ipv4();
    let served = || {
        let rows = scenario.services(0).unwrap_or_default();
        rows.iter().any(|row| is_mine(row) && row.protocol.eq_ignore_ascii_case("tcp") && row.selected == 1)
    };
    Deadline::secs(60).until("the NodePort is served", served).expect("it is");
    let before = scenario.counters(0).expect("counters");
    let mut done = 0;
    Deadline::secs(300)
        .until("there were more connections than ports", || {
            let report = connect_rate(outside, target, WORKERS, Duration::from_secs(2), closer).expect("connections");
            assert_eq!((report.errors, report.first_error), (0, None));
            done += report.operations;
            done > CONNECTIONS
        })
        .expect("enough connections");
    let added = scenario.counters(0).expect("counters").since(&before);
    assert_eq!(added.get("from_netdev", "clash_unresolved"), 0, "{added}");
    assert_eq!(added.get("from_netdev", "masqueraded"), done, "{added}");
    // A backend that remembers the connection before answers the SYN with an ACK of that one, which the client resets. A SYN that
    // the backend did not take, or that was lost on its way, is sent again, and is then the first one that the backend begins
    // this connection for. What is sent again because the machine was held up for a second finds it begun.
    let [repeated, resets] = [REPEATED, RESETS].map(|counted| counted.at(outside));
    let begun = BEGUN_BEFORE.at(&scenario.netns("b").expect("namespace"));
    println!("{done} connections: {repeated} SYNs were sent again, {begun} found theirs begun");
    assert_eq!(resets, 0, "of {done}, {repeated} SYNs were sent again");
    assert!(repeated <= begun, "{repeated} SYNs of {done} were sent again, {begun} found theirs begun");
}

#[test]
fn a_port_is_taken_over_when_the_client_closed_first() {
    exceed_ports(Closer::Client, Family::V4);
}

#[test]
fn a_port_is_taken_over_when_the_backend_closed_first() {
    exceed_ports(Closer::Server, Family::V4);
}

#[test]
fn a_port_is_taken_over_when_the_backend_closed_first_over_ipv6() {
    exceed_ports(Closer::Server, Family::V6);
}
