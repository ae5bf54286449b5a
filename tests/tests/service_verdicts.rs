//! What becomes of a request for a Service: who answers, whom it sees; or a refusal at once; or silence. One row for each
//! line of kube-proxy's verdicts, asked from a pod, a process of the node and a host outside, over IPv4 and IPv6, TCP and
//! UDP, with `br_netfilter` off and on, routed and through VXLAN.
//!
//! ```text
//!   outside ─── node1: pods a (asks), b          node2: pod d
//!               asks   asks                       every pod and both nodes have servers
//! ```

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use proxy_tests::cluster::{ClusterSpec, Links, NodeSpec};
use proxy_tests::manifests::{Service, service_cidr_object};
use proxy_tests::scenario::views::Counters;
use proxy_tests::scenario::{OUTSIDE, SERVICE_PORT, Scenario, service, vip};
use proxy_tests::traffic::{Answer, Transport, probe};
use proxy_tests::{Family, Node};

/// Below the second after which a SYN is repeated: what is refused is refused at the first.
const AT_ONCE: Duration = Duration::from_millis(900);
const PATIENCE: Duration = Duration::from_secs(4);
/// How long silence is listened to.
const SILENCE: Duration = Duration::from_millis(300);

/// Flow tables that `status` has counted at once.
const SMALL: [&str; 4] = ["--flow-live-entries", "4096", "--flow-brief-entries", "4096"];

/// A Service with a cluster address, a NodePort, an external address and one of a load balancer.
#[derive(Clone, Copy)]
struct Spec {
    name: &'static str,
    behind: &'static [&'static str],
    internal_local: bool,
    external_local: bool,
    ranges: &'static [&'static str],
}

const fn spec(name: &'static str, behind: &'static [&'static str]) -> Spec {
    Spec { name, behind, internal_local: false, external_local: false, ranges: &[] }
}

impl Spec {
    const fn internal(self) -> Self {
        Self { internal_local: true, ..self }
    }

    const fn external(self) -> Self {
        Self { external_local: true, ..self }
    }

    const fn ranges(self, ranges: &'static [&'static str]) -> Self {
        Self { ranges, ..self }
    }
}

const SERVICES: [Spec; 22] = [
    spec("none", &[]),
    spec("here", &["b"]),
    spec("there", &["d"]),
    spec("itself", &["a"]),
    spec("host-here", &["node1"]),
    spec("host-there", &["node2"]),
    spec("in-none", &[]).internal(),
    spec("in-here", &["b"]).internal(),
    spec("in-there", &["d"]).internal(),
    spec("in-both", &["b", "d"]).internal(),
    spec("in-host-here", &["node1"]).internal(),
    spec("in-host-there", &["node2"]).internal(),
    spec("ex-none", &[]).external(),
    spec("ex-here", &["b"]).external(),
    spec("ex-there", &["d"]).external(),
    spec("ex-both", &["b", "d"]).external(),
    spec("ex-itself", &["a"]).external(),
    spec("ex-host-here", &["node1"]).external(),
    spec("ex-host-there", &["node2"]).external(),
    spec("from-outside", &["b"]).ranges(&["172.18.0.100/32"]),
    spec("from-pods", &["b"]).ranges(&[" 10.244.0.0/16 ", "fd00:10:244::/56"]),
    spec("from-nodes", &["b"]).ranges(&["172.18.0.10/32", "fc00:f853:ccd::a/128", "0.0.0.0/0"]),
];

/// The address that a row asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Cluster,
    /// A port that the Service has not, at its cluster address.
    OtherPort,
    /// An address of the service range that no Service has.
    Unallocated,
    External,
    LoadBalancer,
    /// At the first node.
    NodePort,
    /// At the second.
    OtherNode,
    /// 127.0.0.1 and ::1.
    Localhost,
    /// A port of the range of NodePorts that no Service has.
    Unclaimed,
}

/// As seen by the server.
#[derive(Clone, Copy, Debug)]
enum Seen {
    /// Who asked.
    Kept,
    /// The bridge of the node of that number.
    Bridge(usize),
    /// What that node has on its way to pods of other nodes.
    Way(usize),
    /// The uplink of that node.
    Node(usize),
}

#[derive(Clone, Copy, Debug)]
enum Expect {
    By(&'static str, Seen),
    Refused,
    Denied,
    Silent,
    /// Not asked.
    Skip,
}

use At::{Cluster, External, LoadBalancer, Localhost, NodePort, OtherNode, OtherPort, Unallocated, Unclaimed};
use Expect::{By, Denied, Refused, Silent, Skip};
use Seen::{Bridge, Kept, Way};

/// One line: a rule, and what it means for a Service asked at some kinds of address from a pod, a process of the first
/// node and outside.
#[derive(Clone, Copy)]
struct Row {
    rule: &'static str,
    families: &'static [Family],
    service: &'static str,
    at: &'static [At],
    from: [Expect; 3],
    /// Reasons that the nodes must count for dropped packets: these, and no others.
    drops: &'static [&'static str],
}

const fn row(
    rule: &'static str,
    service: &'static str,
    at: &'static [At],
    from: [Expect; 3],
    drops: &'static [&'static str],
) -> Row {
    Row { rule, families: &Family::BOTH, service, at, from, drops }
}

const fn only(family: &'static [Family], row: Row) -> Row {
    Row { families: family, ..row }
}

/// Who asks, in the order of [`Row::from`].
const ORIGINS: [&str; 3] = ["a", "node1", OUTSIDE];
/// The kinds of address for traffic from outside: the same rules for all.
const OPEN: &[At] = &[External, LoadBalancer, NodePort];
const NONE: &[&str] = &[];

/// ClusterIP. Official specs: `should preserve source pod IP for traffic thru service cluster IP`, `should allow pods to
/// hairpin back to themselves through services`, `should be rejected when no endpoints exist`, `should respect
/// internalTrafficPolicy=Local Pod to Pod`, `… Pod (hostNetwork: true) to Pod`, `… Pod and Node, to Pod (hostNetwork:
/// true)`, `service endpoints using hostNetwork`.
const CLUSTER_IP: &[Row] = &[
    row("no endpoints: rejected", "none", &[Cluster], [Refused; 3], &["no_backend"]),
    row("no endpoints, policy Local: rejected", "in-none", &[Cluster], [Refused; 3], &["no_backend"]),
    row("Local, none local: dropped", "in-there", &[Cluster], [Silent, Denied, Silent], &["no_local_backend"]),
    row("Local, hostNetwork, none local", "in-host-there", &[Cluster], [Silent, Denied, Silent], &["no_local_backend"]),
    row("Local, local ones", "in-here", &[Cluster], [By("b", Kept), By("b", Bridge(0)), By("b", Bridge(0))], NONE),
    row("Local, of both", "in-both", &[Cluster], [By("b", Kept), By("b", Bridge(0)), By("b", Bridge(0))], NONE),
    row(
        "Local, hostNetwork",
        "in-host-here",
        &[Cluster],
        [By("node1", Kept), By("node1", Kept), By("node1", Kept)],
        NONE,
    ),
    row("other port of it: rejected", "here", &[OtherPort], [Refused; 3], &["no_such_port"]),
    row("unallocated: dropped", "here", &[Unallocated], [Silent, Denied, Silent], &["unallocated"]),
    row("of this node; outside", "here", &[Cluster], [By("b", Kept), By("b", Bridge(0)), By("b", Bridge(0))], NONE),
    row("of another node; outside", "there", &[Cluster], [By("d", Kept), By("d", Way(0)), By("d", Way(0))], NONE),
    row("hairpin", "itself", &[Cluster], [By("a", Bridge(0)), By("a", Bridge(0)), By("a", Bridge(0))], NONE),
    row("hostNetwork here", "host-here", &[Cluster], [By("node1", Kept); 3], NONE),
    row(
        "hostNetwork there",
        "host-there",
        &[Cluster],
        [By("node2", Kept), By("node2", Kept), By("node2", Seen::Node(0))],
        NONE,
    ),
];

/// externalIPs, load balancer addresses and NodePorts of the node, which follow the same six rows. Official specs:
/// `should be possible to connect to a service via ExternalIP when the external IP is not assigned to a node`, `should be
/// able to create a functioning NodePort service`, `ExternalTrafficPolicy: Local should work for type=LoadBalancer`, `…
/// should work from pods`, `… should only target nodes with endpoints`, `Granular Checks: Services`.
const OPEN_TO_OUTSIDE: &[Row] = &[
    row("no endpoints: rejected", "none", OPEN, [Refused; 3], &["no_backend"]),
    row("no endpoints, policy Local: rejected", "ex-none", OPEN, [Refused; 3], &["no_backend"]),
    row("Cluster, here", "here", OPEN, [By("b", Bridge(0)); 3], NONE),
    row("Cluster, there", "there", OPEN, [By("d", Way(0)); 3], NONE),
    row("Local, here", "ex-here", OPEN, [By("b", Kept), By("b", Bridge(0)), By("b", Kept)], NONE),
    row("Local, of both", "ex-both", OPEN, [Skip, Skip, By("b", Kept)], NONE),
    row(
        "Local, there: pod and node all the same",
        "ex-there",
        OPEN,
        [By("d", Kept), By("d", Way(0)), Silent],
        &["no_local_backend"],
    ),
    row("hairpin", "itself", OPEN, [By("a", Bridge(0)); 3], NONE),
    row("hairpin, Local", "ex-itself", OPEN, [By("a", Bridge(0)), By("a", Bridge(0)), By("a", Kept)], NONE),
    row("Cluster, hostNetwork here", "host-here", OPEN, [By("node1", Kept); 3], NONE),
    row("Cluster, hostNetwork there", "host-there", OPEN, [By("node2", Seen::Node(0)); 3], NONE),
    row("Local, hostNetwork here", "ex-host-here", OPEN, [By("node1", Kept); 3], NONE),
    row(
        "Local, hostNetwork there",
        "ex-host-there",
        OPEN,
        [By("node2", Kept), By("node2", Kept), Silent],
        &["no_local_backend"],
    ),
];

/// The NodePort of another node, where a pod or a node comes from outside; localhost; ports that are nobody's.
const NODE_PORTS: &[Row] = &[
    row("other node, no endpoints", "none", &[OtherNode], [Refused; 3], &["no_backend"]),
    row("other node, Cluster, on it", "there", &[OtherNode], [By("d", Bridge(1)); 3], NONE),
    row("other node, Cluster, elsewhere", "here", &[OtherNode], [By("b", Way(1)); 3], NONE),
    row("other node, Cluster, itself", "itself", &[OtherNode], [By("a", Way(1)); 3], NONE),
    row("other node, Local, on it", "ex-there", &[OtherNode], [By("d", Kept); 3], NONE),
    row("other node, Local, of both", "ex-both", &[OtherNode], [By("d", Kept); 3], NONE),
    row("other node, Local, elsewhere", "ex-here", &[OtherNode], [Silent; 3], &["no_local_backend"]),
    row("other node, hostNetwork on it", "ex-host-there", &[OtherNode], [By("node2", Kept); 3], NONE),
    row("localhost, here", "here", &[Localhost], [Skip, By("b", Bridge(0)), Skip], NONE),
    row("localhost, there", "there", &[Localhost], [Skip, By("d", Way(0)), Skip], NONE),
    row("localhost, Local, there", "ex-there", &[Localhost], [Skip, By("d", Way(0)), Skip], NONE),
    row("localhost, hostNetwork", "host-here", &[Localhost], [Skip, By("node1", Kept), Skip], NONE),
    row("localhost, none", "none", &[Localhost], [Skip, Refused, Skip], &["no_backend"]),
    row("unclaimed: the host's own", "here", &[Unclaimed], [Refused; 3], NONE),
];

/// `loadBalancerSourceRanges` hold for the load balancer's address alone, and for each family by itself. Official spec:
/// `should only allow access from service loadbalancer source ranges`.
const SOURCE_RANGES: &[Row] = &[
    only(
        &[Family::V4],
        row("outside", "from-outside", &[LoadBalancer], [Silent, Denied, By("b", Bridge(0))], &["source_not_allowed"]),
    ),
    only(
        &[Family::V6],
        row("no range of the family: open", "from-outside", &[LoadBalancer], [By("b", Bridge(0)); 3], NONE),
    ),
    row("pods", "from-pods", &[LoadBalancer], [By("b", Bridge(0)), Denied, Silent], &["source_not_allowed"]),
    row("other addresses", "from-pods", &[External, NodePort], [By("b", Bridge(0)); 3], NONE),
    only(&[Family::V4], row("/0 among them: open", "from-nodes", &[LoadBalancer], [By("b", Bridge(0)); 3], NONE)),
    only(
        &[Family::V6],
        row("the node", "from-nodes", &[LoadBalancer], [Silent, By("b", Bridge(0)), Silent], &["source_not_allowed"]),
    ),
];

fn number(service: &str) -> u16 {
    let at = SERVICES.iter().position(|spec| spec.name == service).expect("a row names a Service of the list");
    u16::try_from(at).expect("few") + 1
}

fn external_ip(family: Family, number: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(203, 0, 113, 0).to_bits() + u32::from(number)).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, number).into(),
    }
}

fn balancer_ip(family: Family, number: u16) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(Ipv4Addr::new(198, 51, 100, 0).to_bits() + u32::from(number)).into(),
        Family::V6 => Ipv6Addr::new(0x2001, 0xdb8, 2, 0, 0, 0, 0, number).into(),
    }
}

fn node_port(number: u16) -> u16 {
    30_000 + number
}

fn service_of(spec: &Spec) -> Service {
    let number = number(spec.name);
    let mut service = service(spec.name, number)
        .node_port(node_port(number))
        .load_balancer(&Family::BOTH.map(|family| balancer_ip(family, number)))
        .external_ips(&Family::BOTH.map(|family| external_ip(family, number)));
    if spec.internal_local {
        service = service.internal_local();
    }
    if spec.external_local {
        service = service.external_local();
    }
    if !spec.ranges.is_empty() {
        service = service.with("loadBalancerSourceRanges", json!(spec.ranges));
    }
    service
}

/// Two nodes with every Service, and an outside that has the first node for its way to Service addresses.
fn scenario(links: Links) -> Scenario {
    // Strict reverse path filters where pods and the NodePorts of other nodes have the same way there and back.
    let strict = links == Links::Routed;
    let node = |name: &str, pods: &[&str]| NodeSpec::new(name).rp_filter(strict).pods(pods.iter().copied());
    let spec = ClusterSpec::default().links(links).node(node("node1", &["a", "b"])).node(node("node2", &["d"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    for pod in ["a", "b", "d"] {
        scenario.serve_pod(pod).expect("servers");
    }
    for node in ["node1", "node2"] {
        scenario.serve_node(node).expect("servers");
    }
    scenario.manifests().write(&service_cidr_object()).expect("written");
    for spec in &SERVICES {
        scenario.publish_service(&service_of(spec), spec.behind).expect("published");
    }
    let [v4, v6] = Family::BOTH.map(|family| scenario.node(0).ip(family));
    let mut routes = String::new();
    for range in ["203.0.113.0/24", "198.51.100.0/24", "10.96.0.0/16"] {
        let _ = writeln!(routes, "route add {range} via {v4}");
    }
    for range in ["2001:db8:1::/64", "2001:db8:2::/64", "fd00:10:96::/112"] {
        let _ = writeln!(routes, "route add {range} via {v6}");
    }
    scenario.cluster().outside().ip(&routes).expect("routes");
    scenario.start_agents(&SMALL).expect("agents");
    scenario
}

fn target(scenario: &Scenario, service: &str, at: At, family: Family) -> SocketAddr {
    let number = number(service);
    let [first, second] = [0, 1].map(|node| scenario.node(node).ip(family));
    let (ip, port) = match at {
        Cluster => (vip(family, number), SERVICE_PORT),
        OtherPort => (vip(family, number), SERVICE_PORT + 1),
        Unallocated => (vip(family, 999), SERVICE_PORT),
        External => (external_ip(family, number), SERVICE_PORT),
        LoadBalancer => (balancer_ip(family, number), SERVICE_PORT),
        NodePort => (first, node_port(number)),
        OtherNode => (second, node_port(number)),
        Localhost if family == Family::V4 => (Ipv4Addr::LOCALHOST.into(), node_port(number)),
        Localhost => (Ipv6Addr::LOCALHOST.into(), node_port(number)),
        Unclaimed => (first, 32_000),
    };
    SocketAddr::new(ip, port)
}

fn expected(scenario: &Scenario, links: Links, origin: &str, expect: Expect, family: Family) -> Option<Answer> {
    let way = |node: &Node| match links {
        Links::Routed => node.ip(family),
        Links::Vxlan => node.pod_cidr(family).host(0),
    };
    Some(match expect {
        By(server, seen) => {
            let seen = match seen {
                Kept => scenario.ip(origin, family).expect("an origin"),
                Bridge(node) => scenario.node(node).bridge_ip(family),
                Way(node) => way(scenario.node(node)),
                Seen::Node(node) => scenario.node(node).ip(family),
            };
            Answer::From { server: server.to_owned(), seen }
        }
        Refused => Answer::Refused,
        Denied => Answer::Denied,
        Silent => Answer::Silent,
        Skip => return None,
    })
}

fn counters(scenario: &Scenario) -> [Counters; 2] {
    [0, 1].map(|node| scenario.counters(node).expect("counters"))
}

/// Asks all that a row names at the same time. What went otherwise than expected, as lines.
fn check(scenario: &Scenario, links: Links, row: &Row, last: &mut [Counters; 2]) -> Vec<String> {
    let mut lines: Vec<String> = thread::scope(|scope| {
        let mut asked = Vec::new();
        for (origin, expect) in ORIGINS.into_iter().zip(row.from) {
            let netns = scenario.netns(origin).expect("an origin");
            for &family in row.families {
                for &at in row.at {
                    let Some(expected) = expected(scenario, links, origin, expect, family) else { continue };
                    let target = target(scenario, row.service, at, family);
                    for transport in Transport::BOTH {
                        let (netns, expected) = (netns.clone(), expected.clone());
                        asked.push(scope.spawn(move || {
                            let patience = match expected {
                                Answer::Silent => SILENCE,
                                Answer::From { .. } => PATIENCE,
                                _ => AT_ONCE,
                            };
                            let got = probe(&netns, target, transport, patience).expect("asked");
                            let line = format!("{}: {origin} {at:?} {target} {transport}: {got}", row.rule);
                            (got != expected).then(|| format!("{line}, not {expected}"))
                        }));
                    }
                }
            }
        }
        asked.into_iter().filter_map(|asked| asked.join().expect("it does not panic")).collect()
    });
    let before = std::mem::replace(last, counters(scenario));
    let reasons: BTreeSet<String> =
        last.iter().zip(&before).flat_map(|(now, before)| now.since(before).drop_reasons()).collect();
    if reasons != row.drops.iter().map(|&reason| reason.to_owned()).collect() {
        lines.push(format!("{}: dropped for {reasons:?}, not {:?}", row.rule, row.drops));
    }
    lines
}

fn run(links: Links, br_netfilter: &[bool], tables: &[&[Row]]) {
    let scenario = scenario(links);
    let start = Instant::now();
    let mut failed = Vec::new();
    let mut last = counters(&scenario);
    for &on in br_netfilter {
        for node in scenario.cluster().nodes() {
            node.set_br_netfilter(on).expect("switched");
        }
        for row in tables.iter().copied().flatten() {
            let lines = check(&scenario, links, row, &mut last);
            failed.extend(lines.into_iter().map(|line| format!("br_netfilter {}, {line}", u8::from(on))));
        }
    }
    let rows: usize = tables.iter().map(|rows| rows.len()).sum();
    eprintln!("{links:?}: {rows} rows, br_netfilter {br_netfilter:?}, in {:?}", start.elapsed());
    assert!(failed.is_empty(), "{links:?}:\n  {}", failed.join("\n  "));
}

#[test]
fn every_verdict_routed() {
    run(Links::Routed, &[false, true], &[CLUSTER_IP, OPEN_TO_OUTSIDE, NODE_PORTS, SOURCE_RANGES]);
}

#[test]
fn every_verdict_through_vxlan() {
    run(Links::Vxlan, &[true], &[CLUSTER_IP, OPEN_TO_OUTSIDE, NODE_PORTS, SOURCE_RANGES]);
}

/// A load balancer's address that is the node's own (as k3s hands out) shadows the node's port; one of `ipMode: Proxy`,
/// or a name in place of an address, is left to the load balancer.
#[test]
fn load_balancer_addresses_of_other_kinds() {
    let mut scenario = Scenario::build(
        &ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b"])).node(NodeSpec::new("node2")),
    )
    .expect("scenario");
    scenario.serve_pod("b").expect("servers");
    scenario.serve_node("node1").expect("servers");
    let own = Family::BOTH.map(|family| scenario.node(0).ip(family));
    scenario.publish_service(&service("own", 1).load_balancer(&own), &["b"]).expect("published");
    let mut proxy = service("proxy", 2).load_balancer(&[]);
    proxy.ingress = vec![
        json!({ "ip": "198.51.100.2", "ipMode": "Proxy" }),
        json!({ "ip": "2001:db8:2::2", "ipMode": "Proxy" }),
        json!({ "hostname": "balancer.example" }),
    ];
    scenario.publish_service(&proxy, &["b"]).expect("published");
    scenario.start_agents(&[]).expect("agents");
    let from_b = |seen: IpAddr| Answer::From { server: "b".to_owned(), seen };
    for family in Family::BOTH {
        let bridge = scenario.node(0).bridge_ip(family);
        for origin in ORIGINS {
            for transport in Transport::BOTH {
                let netns = scenario.netns(origin).expect("an origin");
                let ask = |ip: IpAddr, port, patience| {
                    probe(&netns, SocketAddr::new(ip, port), transport, patience).expect("asked")
                };
                let what = format!("{family} {transport} from {origin}");
                let node = scenario.node(0).ip(family);
                assert_eq!(ask(node, SERVICE_PORT, PATIENCE), from_b(bridge), "{what}: the Service's port");
                let kept =
                    Answer::From { server: "node1".to_owned(), seen: scenario.ip(origin, family).expect("known") };
                assert_eq!(ask(node, 8080, PATIENCE), kept, "{what}: the node's own port");
                if origin != OUTSIDE {
                    let left = ask(balancer_ip(family, 2), SERVICE_PORT, SILENCE);
                    assert_eq!(left, Answer::Silent, "{what}: ipMode Proxy");
                }
            }
        }
    }
    let frontends: Vec<Value> = scenario
        .services(0)
        .expect("services")
        .iter()
        .filter(|row| row.service.as_deref().is_some_and(|name| name.starts_with("default/proxy")))
        .map(|row| json!(row.address.ip()))
        .collect();
    let vips = Family::BOTH.map(|family| json!(vip(family, 2)));
    assert!(frontends.iter().all(|ip| vips.contains(ip)) && !frontends.is_empty(), "{frontends:?}");
}
