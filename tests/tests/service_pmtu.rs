//! Links of MTU 9000 with one hop of 1400 behind a Service: whoever sends too much is told so by the router in words that
//! it understands, and large transfers arrive without a setting anywhere.
//!
//! ```text
//!   outside ─┐        hop: a router whose ways out take 1,400 bytes, and which says so with ICMP
//!            ├─ switch ─┤
//!   node1 ───┘        node2 ── pod d
//!   pods a, b
//! ```

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::scenario::{OUTSIDE, SERVICE_PORT, Scenario, service, vip};
use proxy_tests::traffic::{TcpOptions, UdpOptions, tcp_exchange_with, udp_exchange};
use proxy_tests::{Deadline, Family, Netns, Result, address};

const JUMBO: u16 = 9000;
const NARROW: u16 = 1400;
const BYTES: u64 = 8 << 20;
const DATAGRAM: usize = 5000;
/// Host number of the hop in the underlay.
const HOP: u16 = 99;

/// Between whom the narrow hop lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    /// The first node and the pods of the second.
    Nodes,
    /// The outside and the first node.
    Client,
}

/// A way through a Service.
struct Way {
    name: &'static str,
    client: &'static str,
    server: &'static str,
    /// Of the Service: `spec.externalTrafficPolicy`.
    local: bool,
    node_port: bool,
    between: Between,
}

const fn way(
    name: &'static str,
    client: &'static str,
    server: &'static str,
    local: bool,
    node_port: bool,
    between: Between,
) -> Way {
    Way { name, client, server, local, node_port, between }
}

const WAYS: [Way; 7] = [
    way("pod to ClusterIP, narrow to the backend", "a", "d", false, false, Between::Nodes),
    way("pod to NodePort, narrow to the backend", "a", "d", false, true, Between::Nodes),
    way("node to ClusterIP, narrow to the backend", "node1", "d", false, false, Between::Nodes),
    way("outside to NodePort Cluster, narrow to the backend", OUTSIDE, "d", false, true, Between::Nodes),
    way("outside to NodePort Cluster, narrow to the client", OUTSIDE, "b", false, true, Between::Client),
    way("outside to NodePort Local, narrow to the client", OUTSIDE, "b", true, true, Between::Client),
    way("outside to NodePort Cluster there, narrow to the client", OUTSIDE, "d", false, true, Between::Client),
];

fn ip(host: u16) -> [IpAddr; 2] {
    Family::BOTH.map(|family| address::underlay(family).host(host))
}

/// Every link gets MTU 9000.
fn widen(scenario: &Scenario) -> Result<()> {
    let cluster = scenario.cluster();
    let mut switch = format!("link set br0 mtu {JUMBO}\nlink set {OUTSIDE} mtu {JUMBO}\n");
    for node in cluster.nodes() {
        let _ = writeln!(switch, "link set {} mtu {JUMBO}", node.name());
        let mut lines = format!("link set eth0 mtu {JUMBO}\n");
        for pod in node.pods() {
            let _ = writeln!(lines, "link set {} mtu {JUMBO}", pod.host_veth().name);
            pod.netns().ip(&format!("link set eth0 mtu {JUMBO}\n"))?;
        }
        node.netns().ip(&(lines + &format!("link set cni0 mtu {JUMBO}\n")))?;
    }
    cluster.underlay().switch().ip(&switch)?;
    cluster.outside().ip(&format!("link set eth0 mtu {JUMBO}\n"))?;
    cluster.outside().sysctl(&[("net/ipv6/conf/eth0/mtu", &JUMBO.to_string())])
}

/// A router beside the switch, which the packets of `between` pass in both directions.
fn hop(scenario: &Scenario, between: Between) -> Result<Netns> {
    let cluster = scenario.cluster();
    let hop = Netns::create(&format!("{}-hop", cluster.prefix()))?;
    hop.sysctl(&[
        ("net/ipv6/conf/all/accept_dad", "0"),
        ("net/ipv6/conf/default/accept_dad", "0"),
        ("net/ipv4/ip_forward", "1"),
        ("net/ipv6/conf/all/forwarding", "1"),
        ("net/ipv4/conf/all/send_redirects", "0"),
        ("net/ipv4/conf/default/send_redirects", "0"),
    ])?;
    cluster.underlay().switch().ip(&format!(
        "link add hop mtu {JUMBO} type veth peer name eth0 mtu {JUMBO} netns {}\nlink set hop master br0 up\n",
        hop.name()
    ))?;
    let [v4, v6] = ip(HOP);
    hop.ip(&format!("link set lo up\naddr add {v4}/24 dev eth0\naddr add {v6}/64 dev eth0 nodad\nlink set eth0 up\n"))?;
    let (mut in_hop, mut in_outside, mut in_nodes) = (String::new(), String::new(), [String::new(), String::new()]);
    for (family, via) in Family::BOTH.into_iter().zip([v4, v6]) {
        let nodes = [0, 1].map(|node| scenario.node(node));
        match between {
            Between::Nodes => {
                for (node, other) in [(0, 1), (1, 0)] {
                    let pods = nodes[other].pod_cidr(family);
                    let _ = writeln!(in_nodes[node], "route replace {pods} via {via}");
                    let _ = writeln!(in_hop, "route add {pods} via {} mtu lock {NARROW}", nodes[other].ip(family));
                }
                // What is masqueraded is answered to the node itself.
                let first = nodes[0].ip(family);
                let _ = writeln!(in_nodes[1], "route add {first} via {via}");
                let _ = writeln!(in_hop, "route add {first} dev eth0 mtu lock {NARROW}");
            }
            Between::Client => {
                let (first, client) = (nodes[0].ip(family), cluster.outside_ip(family));
                let _ = writeln!(in_outside, "route add {first} via {via}");
                let _ = writeln!(in_nodes[0], "route add {client} via {via}");
                let _ = writeln!(in_hop, "route add {first} dev eth0 mtu lock {NARROW}");
                let _ = writeln!(in_hop, "route add {client} dev eth0 mtu lock {NARROW}");
            }
        }
    }
    hop.ip(&in_hop)?;
    cluster.outside().ip(&in_outside)?;
    for (node, lines) in in_nodes.iter().enumerate() {
        scenario.node(node).netns().ip(lines)?;
    }
    Ok(hop)
}

/// ICMP errors that the first node's programs translated.
fn translated(scenario: &Scenario) -> u64 {
    let counters = scenario.counters(0).expect("counters");
    ["from_pod", "to_pod", "from_netdev", "to_netdev"].iter().map(|hook| counters.get(hook, "icmp_error")).sum()
}

/// Paths that the namespace has learned to be narrow.
fn forget_paths(netns: &Netns) {
    for family in ["-4", "-6"] {
        netns.output("ip", &[family, "route", "flush", "cache"]).expect("flushed");
    }
}

fn run(between: Between) {
    let spec =
        ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b"])).node(NodeSpec::new("node2").pods(["d"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    widen(&scenario).expect("wide links");
    let _hop = hop(&scenario, between).expect("a narrow hop");
    for pod in ["a", "b", "d"] {
        scenario.serve_pod(pod).expect("servers");
    }
    let ways: Vec<_> = (1..).zip(WAYS.iter().filter(|way| way.between == between)).collect();
    for (number, way) in &ways {
        let service = service(&format!("way-{number}"), *number).node_port(30_000 + number);
        let service = if way.local { service.external_local() } else { service };
        scenario.publish_service(&service, &[way.server]).expect("published");
    }
    scenario.start_agents(&["--flow-live-entries", "4096", "--flow-brief-entries", "4096"]).expect("agents");
    for (number, way) in ways {
        let client = scenario.netns(way.client).expect("a client");
        for family in Family::BOTH {
            let what = format!("{family}, {}", way.name);
            let target = if way.node_port {
                SocketAddr::new(scenario.node(0).ip(family), 30_000 + number)
            } else {
                SocketAddr::new(vip(family, number), SERVICE_PORT)
            };
            // Each way finds out by itself.
            for name in ["a", "b", "d", "node1", "node2", OUTSIDE] {
                forget_paths(&scenario.netns(name).expect("a name"));
            }
            let before = translated(&scenario);
            let options =
                TcpOptions { up: BYTES, down: BYTES, timeout: Duration::from_secs(20), ..TcpOptions::default() };
            let report = tcp_exchange_with(&client, target, &options).unwrap_or_else(|error| panic!("{what}: {error}"));
            assert_eq!(report.server_name, way.server, "{what}");
            let after_tcp = translated(&scenario);

            for name in ["a", "b", "d", "node1", "node2", OUTSIDE] {
                forget_paths(&scenario.netns(name).expect("a name"));
            }
            // The first request is answered by the hop, and so may the first reply be.
            let options = UdpOptions { size: DATAGRAM, timeout: Duration::from_millis(400), ..UdpOptions::default() };
            let mut tries = 0;
            let arrived = || {
                tries += 1;
                udp_exchange(&client, target, &options).is_ok_and(|report| report.server_name == way.server)
            };
            let udp = Deadline::secs(8).until(&format!("{what}: {DATAGRAM} bytes and their echo"), arrived);
            let after = translated(&scenario);
            eprintln!(
                "{what}: TCP in {:?} ({} ICMP errors translated), UDP at try {tries} ({})",
                report.duration,
                after_tcp - before,
                after - after_tcp
            );
            udp.expect("it arrives");
            // A process of the node sends from its own address: what the hop tells it needs no translation.
            if way.client != "node1" {
                assert!(after_tcp > before, "{what}: TCP without an ICMP error does not pass the hop");
                assert!(after > after_tcp, "{what}: nor does UDP");
            }
        }
    }
}

#[test]
fn a_narrow_hop_before_the_backend() {
    run(Between::Nodes);
}

#[test]
fn a_narrow_hop_before_the_client() {
    run(Between::Client);
}
