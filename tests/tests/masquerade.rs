//! One client address, through a NodePort that masquerades, to one backend: more connections than there are ports, one after
//! the other. Each port is taken over from a connection that has ended, whichever end holds that in TIME_WAIT.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::scenario::{Scenario, service};
use proxy_tests::traffic::{Closer, connect_rate};
use proxy_tests::{Deadline, Family, Netns};

const NODE_PORT: u16 = 30_080;
/// 31,744 ports are there.
const CONNECTIONS: u64 = 45_000;
const WORKERS: usize = 16;

/// SYNs that were sent again, by the kernel's counters of a namespace.
fn repeated_syns(netns: &Netns) -> u64 {
    let text =
        netns.run(|| std::fs::read_to_string("/proc/thread-self/net/netstat")).expect("netns").expect("counters");
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("TcpExt:")).map(str::split_whitespace);
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let counters: BTreeMap<_, _> = names.zip(values).collect();
    counters["TCPSynRetrans"].parse().expect("a number")
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
    let before = scenario.counters(0).expect("counters");
    let mut done = 0;
    Deadline::secs(120)
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
    // A backend that did not take a SYN would have had the client send it again.
    assert_eq!(repeated_syns(outside), 0, "of {done}");
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
