//! The verdict table: what becomes of a packet, by frontend, policy, endpoints and origin, in both families.

use proxy_abi::Proto;
use proxy_core::event::{Event, Node};
use proxy_core::policy::{DetectLocal, Policy};
use proxy_core::reconcile::Settings;
use proxy_core::service::{Endpoint, Protocol, Service, ServicePort};

use crate::cluster::{self, ip, link, number, port, ready, service, slice, terminating};
use crate::node::TestNode;
use crate::tracer::{Origin, Packet, Verdict, trace};

/// Addresses of one family by what they are.
struct World {
    cluster: &'static str,
    unallocated: &'static str,
    external: &'static str,
    balancer: &'static str,
    node: &'static str,
    other_node: &'static str,
    /// Pod on this node, and one elsewhere.
    here: &'static str,
    there: &'static str,
    pod: &'static str,
    client: &'static str,
}

const V4: World = World {
    cluster: "10.96.0.1",
    unallocated: "10.96.0.77",
    external: "203.0.113.1",
    balancer: "198.51.100.1",
    node: "192.168.0.1",
    other_node: "192.168.0.2",
    here: "10.244.0.5",
    there: "10.244.1.5",
    pod: "10.244.0.9",
    client: "192.0.2.9",
};

const V6: World = World {
    cluster: "fd00:96::1",
    unallocated: "fd00:96::77",
    external: "2001:db8:1::1",
    balancer: "2001:db8:2::1",
    node: "fd00:99::1",
    other_node: "fd00:99::2",
    here: "fd00:244::5",
    there: "fd00:244:1::5",
    pod: "fd00:244::9",
    client: "2001:db8:9::9",
};

impl World {
    fn ip(&self, what: &str) -> std::net::IpAddr {
        ip(match what {
            "cluster" => self.cluster,
            "unallocated" => self.unallocated,
            "external" => self.external,
            "balancer" => self.balancer,
            "node" => self.node,
            "other node" => self.other_node,
            "here" => self.here,
            "there" => self.there,
            other => panic!("{other}"),
        })
    }

    /// `here`, `there`; `-here` is draining.
    fn endpoint(&self, what: &str) -> Endpoint {
        let (name, make): (&str, fn(&str) -> Endpoint) =
            what.strip_prefix('-').map_or((what, ready), |name| (name, terminating));
        let node = if name == "here" { "node-a" } else { "node-b" };
        Endpoint { node: Some(node.into()), ..make(&self.ip(name).to_string()) }
    }

    fn source(&self, origin: Origin) -> std::net::IpAddr {
        ip(match origin {
            Origin::Pod => self.pod,
            Origin::Node => self.node,
            Origin::Outside => self.client,
        })
    }

    fn text(&self, verdict: &Verdict) -> String {
        match verdict {
            Verdict::Pass => "pass".to_owned(),
            Verdict::Reject => "reject".to_owned(),
            Verdict::Drop => "drop".to_owned(),
            Verdict::To { backends, masqueraded } => {
                let name = |at: &std::net::IpAddr| if *at == ip(self.here) { "here" } else { "there" };
                let names: Vec<&str> = backends.iter().map(name).collect();
                format!("{}{}", names.join(" "), if *masqueraded { " masqueraded" } else { "" })
            }
        }
    }
}

/// A Service with a frontend of each kind in both families.
fn everything() -> Service {
    let port = ServicePort { node_port: Some(number(30_080)), ..port("", Protocol::Tcp, 80) };
    Service {
        external_ips: vec![ip(V4.external), ip(V6.external)],
        load_balancer_ips: vec![ip(V4.balancer), ip(V6.balancer)],
        ..service("web", &[V4.cluster, V6.cluster], &[port])
    }
}

fn slices(endpoints: &str) -> Vec<Event> {
    let of = |name: &str, world: &World| {
        let endpoints = endpoints.split_whitespace().map(|what| world.endpoint(what)).collect();
        Event::Slice(slice(name, "web", &[("", Protocol::Tcp, 8080)], endpoints))
    };
    vec![of("v4", &V4), of("v6", &V6)]
}

fn node_with(policy: Policy, service: Service, endpoints: &str) -> TestNode {
    let mut node = TestNode::new(Settings { policy, ..Settings::default() });
    let ranges = ["10.96.0.0/16", "fd00:96::/112"].map(|range| range.parse().expect("a range"));
    node.start(slices(endpoints).into_iter().chain([
        Event::Service(service),
        Event::ServiceCidr("kubernetes".into(), ranges.into()),
        Event::Link(link(9, &[V4.pod, V6.pod])),
    ]));
    assert_eq!(node.diagnostics(), [""; 0]);
    node
}

/// What becomes of packets from a pod, the node and outside.
fn verdicts(node: &TestNode, world: &World, to: &str, port: u16) -> [String; 3] {
    Origin::ALL.map(|origin| {
        let packet = Packet { origin, src: world.source(origin), dst: world.ip(to), port, proto: Proto::TCP };
        world.text(&trace(node.tables(), packet))
    })
}

/// Policies of a row.
#[derive(Clone, Copy)]
enum Local {
    Neither,
    Internal,
    External,
}

/// What, policy, endpoints, the frontends that it is true of, then pod, node, outside.
type Row = (&'static str, Local, &'static str, &'static [(&'static str, u16)], [&'static str; 3]);

#[test]
fn the_verdict_table() {
    use Local::{External, Internal, Neither};
    let both = "here there";
    let cluster: &[(&str, u16)] = &[("cluster", 80)];
    let outer: &[(&str, u16)] = &[("external", 80), ("balancer", 80), ("node", 30_080)];
    let rows: [Row; 22] = [
        ("ClusterIP, no endpoints", Neither, "", cluster, ["reject"; 3]),
        ("ClusterIP, no endpoints, iTP Local", Internal, "", cluster, ["reject"; 3]),
        ("ClusterIP, iTP Local, none local", Internal, "there", cluster, ["drop"; 3]),
        ("ClusterIP, iTP Local, none local that serves", Internal, "there -there", cluster, ["drop"; 3]),
        ("ClusterIP, iTP Local, a local one", Internal, both, cluster, ["here", "here", "here masqueraded"]),
        (
            "ClusterIP, iTP Local, a local one that drains",
            Internal,
            "-here there",
            cluster,
            ["here", "here", "here masqueraded"],
        ),
        ("ClusterIP", Neither, both, cluster, [both, both, "here there masqueraded"]),
        ("ClusterIP, all drain", Neither, "-here -there", cluster, [both, both, "here there masqueraded"]),
        ("ClusterIP, one drains", Neither, "-here there", cluster, ["there", "there", "there masqueraded"]),
        ("ClusterIP, eTP Local is not its business", External, both, cluster, [both, both, "here there masqueraded"]),
        ("ClusterIP, another port", Neither, both, &[("cluster", 81)], ["reject"; 3]),
        ("unallocated address of the service range", Neither, both, &[("unallocated", 80)], ["drop"; 3]),
        ("outside address, no endpoints", Neither, "", outer, ["reject"; 3]),
        ("outside address, no endpoints, eTP Local", External, "", outer, ["reject"; 3]),
        (
            "outside address, eTP Cluster",
            Neither,
            both,
            outer,
            ["here there masqueraded", both, "here there masqueraded"],
        ),
        (
            "outside address, iTP Local is not its business",
            Internal,
            "there",
            outer,
            ["there masqueraded", "there", "there masqueraded"],
        ),
        ("outside address, eTP Local", External, both, outer, [both, both, "here"]),
        ("outside address, eTP Local, none local", External, "there", outer, ["there", "there", "drop"]),
        ("outside address, eTP Local, a local one drains", External, "-here there", outer, ["there", "there", "here"]),
        ("outside address, eTP Local, all drain", External, "-here -there", outer, [both, both, "here"]),
        (
            "another port of an outside address",
            Neither,
            both,
            &[("external", 81), ("balancer", 81), ("node", 30_081), ("node", 80), ("external", 30_080)],
            ["pass"; 3],
        ),
        ("NodePort of another node", Neither, both, &[("other node", 30_080)], ["pass"; 3]),
    ];
    for (row, local, endpoints, frontends, expected) in rows {
        let service = Service {
            internal_local: matches!(local, Internal),
            external_local: matches!(local, External),
            ..everything()
        };
        let mut node = node_with(Policy::default(), service, endpoints);
        for (world, (to, port)) in frontends.iter().flat_map(|f| [(&V4, f), (&V6, f)]) {
            assert_eq!(verdicts(&node, world, to, *port), expected, "{row}: {} port {port}", world.ip(to));
        }
        node.restart();
        assert_eq!(node.settle(), 0, "{row}: a restart changes nothing");
    }
}

#[test]
fn masquerade_is_for_strangers_or_all() {
    let range = |text: &str| text.parse().expect("a range");
    let pods = vec![range("192.0.2.0/24"), range("2001:db8:9::/48")];
    let both = "here there";
    let masked = "here there masqueraded";
    let by = |detect_local| Policy { detect_local, cluster_cidrs: pods.clone(), ..Policy::default() };
    let rows = [
        ("by interface", by(DetectLocal::Interface), [both, both, masked]),
        ("by clusterCIDR", by(DetectLocal::ClusterCidr), [both; 3]),
        ("by the node's pod ranges", by(DetectLocal::NodeCidr), [both; 3]),
        ("masqueradeAll", Policy { masquerade_all: true, ..Policy::default() }, [masked, both, masked]),
    ];
    for (row, policy, expected) in rows {
        let mut node = node_with(policy, everything(), both);
        node.change([Event::Node(Node { pod_cidrs: pods.clone(), ..cluster::node() })]);
        for world in [&V4, &V6] {
            assert_eq!(verdicts(&node, world, "cluster", 80), expected, "{row}");
        }
        node.restart();
        assert_eq!(node.settle(), 0, "{row}");
    }
    // A pod of another node is one of the cluster where its range says so: eTP Local does not hold it to local ones.
    let service = Service { external_local: true, ..everything() };
    let node = node_with(by(DetectLocal::ClusterCidr), service, "there");
    assert_eq!(verdicts(&node, &V4, "node", 30_080), ["there"; 3]);
}

/// What, ranges; then pod, node, outside for IPv4 and for IPv6.
type Filtered = (&'static str, Vec<&'static str>, [&'static str; 3], [&'static str; 3]);

#[test]
fn load_balancer_source_ranges() {
    let all = "here there masqueraded";
    let (v4, v6) = ("192.0.2.0/24", "2001:db8:9::/48");
    let open = [all, "here there", all];
    let client = ["drop", "drop", all];
    let rows: [Filtered; 9] = [
        ("none: no filter", vec![], open, open),
        ("the client's, of one family: the other stays open", vec![v4], client, open),
        ("of the other family", vec![v6], open, client),
        ("of both", vec![v4, v6], client, client),
        ("all of a family among others", vec![v4, "0.0.0.0/0", v6], open, client),
        ("all of both", vec!["0.0.0.0/0", "::/0"], open, open),
        ("a stranger's", vec!["10.9.0.0/16", "2001:db8:7::/48"], ["drop"; 3], ["drop"; 3]),
        ("the node's", vec!["192.168.0.0/24", v6], ["drop", "here there", "drop"], client),
        ("a short one of IPv6 lets no IPv4 in", vec!["10.9.0.0/16", "::/2"], ["drop"; 3], client),
    ];
    for (row, ranges, expected_v4, expected_v6) in rows {
        let ranges: Vec<_> = ranges.into_iter().map(|range| range.parse().expect("a range")).collect();
        let service = Service { source_ranges: ranges, ..everything() };
        let mut node = node_with(Policy::default(), service.clone(), "here there");
        for (world, expected) in [(&V4, expected_v4), (&V6, expected_v6)] {
            assert_eq!(verdicts(&node, world, "balancer", 80), expected, "{row}: {}", world.balancer);
            for (to, port) in [("external", 80), ("node", 30_080)] {
                assert_eq!(verdicts(&node, world, to, port), open, "{row}: {to} is not filtered");
            }
            assert_eq!(verdicts(&node, world, "cluster", 80), ["here there", "here there", all], "{row}");
        }
        node.restart();
        assert_eq!(node.settle(), 0, "{row}");
        // Under eTP Local the same sources are let in, to local endpoints.
        node.change([Event::Service(Service { external_local: true, ..service })]);
        let expected = expected_v4.map(|verdict| if verdict == all { "here there" } else { verdict });
        let outside = if expected[2] == "drop" { "drop" } else { "here" };
        assert_eq!(verdicts(&node, &V4, "balancer", 80), [expected[0], expected[1], outside], "{row}: eTP Local");
        node.change([Event::ServiceGone(cluster::name("web"))]);
        assert!(node.tables().prefixes.keys().all(|key| key.scope == proxy_abi::PrefixKey::SERVICE_CIDR), "{row}");
    }
}

#[test]
fn a_load_balancer_open_to_the_node_is_open_to_itself() {
    let service = Service { source_ranges: vec!["192.168.0.0/24".parse().expect("a range")], ..everything() };
    let mut node = node_with(Policy::default(), service, "here there");
    let own =
        Packet { origin: Origin::Outside, src: ip(V4.balancer), dst: ip(V4.balancer), port: 80, proto: Proto::TCP };
    let text = |node: &TestNode| V4.text(&trace(node.tables(), own));
    assert_eq!(text(&node), "here there masqueraded");
    // The node's address moves out of the range, and back.
    node.change([Event::Node(Node { addresses: vec![ip("192.168.9.1"), ip(V6.node)], ..cluster::node() })]);
    assert_eq!(text(&node), "drop");
    assert_eq!(verdicts(&node, &V4, "balancer", 80), ["drop"; 3]);
    node.change([Event::Node(cluster::node())]);
    assert_eq!(text(&node), "here there masqueraded");
}
