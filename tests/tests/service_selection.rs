//! Which endpoints take the requests for a Service, while Services, endpoints and the node change under it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde_json::{Value, json};

use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::manifests::{Conditions, Endpoint, Object as _, Service, ServicePort};
use proxy_tests::scenario::{OUTSIDE, SERVICE_PORT, Scenario, TARGET_PORT, service, vip};
use proxy_tests::traffic::{Answer, TcpServer, Transport, UdpServer, connect_steadily, probe};
use proxy_tests::{Deadline, Family, Netns, Node};

const PATIENCE: Duration = Duration::from_secs(4);
const AT_ONCE: Duration = Duration::from_millis(900);
const SILENCE: Duration = Duration::from_millis(300);
const NODE_PORT: u16 = 30_080;
/// Number of the addresses of the Service that changes.
const HOST: u16 = 20;
/// Flow tables that `status` has counted at once.
const SMALL: [&str; 4] = ["--flow-live-entries", "4096", "--flow-brief-entries", "4096"];

/// Pods `a` (asks), `b` and `c` on the first node, `d` on the second; an agent on the first.
fn scenario(args: &[&str]) -> Scenario {
    let spec = ClusterSpec::default()
        .node(NodeSpec::new("node1").pods(["a", "b", "c"]))
        .node(NodeSpec::new("node2").pods(["d"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    for pod in ["a", "b", "c", "d"] {
        scenario.serve_pod(pod).expect("servers");
    }
    scenario.start_agents(&[&SMALL[..], args].concat()).expect("agents");
    scenario
}

fn cluster_ip(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, HOST), SERVICE_PORT)
}

fn node_port(scenario: &Scenario, family: Family) -> SocketAddr {
    SocketAddr::new(scenario.node(0).ip(family), NODE_PORT)
}

/// Writes slices with these endpoints, in both families, and waits until the first node's maps select `cluster` (names
/// of pods) for every cluster address of the Service.
fn set(scenario: &Scenario, service: &Service, endpoints: impl Fn(Family) -> Vec<Endpoint>, cluster: &[&str]) {
    for family in Family::BOTH {
        let mut slice = service.slice(family, &[]);
        slice.endpoints = endpoints(family);
        scenario.manifests().write(&slice).expect("written");
    }
    wait_selected(scenario, service, cluster);
}

/// Every frontend of its cluster addresses counts: while they change, a listing may miss one.
fn wait_selected(scenario: &Scenario, service: &Service, cluster: &[&str]) {
    let expected: BTreeSet<(SocketAddr, String, BTreeSet<IpAddr>)> = service
        .cluster_ips
        .iter()
        .flat_map(|ip| service.ports.iter().map(move |port| (*ip, port)))
        .map(|(ip, port)| {
            let pods = cluster.iter().map(|pod| scenario.ip(pod, Family::of(ip)).expect("a pod")).collect();
            (SocketAddr::new(ip, port.port), port.protocol.to_lowercase(), pods)
        })
        .collect();
    let selected = || {
        let rows = scenario.services(0).unwrap_or_default();
        let mine = rows.into_iter().filter(|row| service.cluster_ips.contains(&row.address.ip()));
        let ips = |backends: &[SocketAddr]| backends.iter().map(SocketAddr::ip).collect();
        mine.map(|row| (row.address, row.protocol.to_lowercase(), ips(&row.backends))).collect::<BTreeSet<_>>()
            == expected
    };
    Deadline::secs(15).until(&format!("{} leads to {cluster:?}", service.name), selected).expect("selected");
}

/// Who answers, asked until all of `wanted` have, and at least eight times. What refuses is asked twice: as the kernel's,
/// refusals by ICMP are limited.
fn answers(netns: &Netns, target: SocketAddr, transport: Transport, wanted: &[&str]) -> BTreeSet<String> {
    let mut seen = BTreeSet::new();
    for asked in 0..60 {
        let patience = if wanted == ["refused"] { AT_ONCE } else { PATIENCE };
        seen.insert(match probe(netns, target, transport, patience).expect("asked") {
            Answer::From { server, .. } => server,
            other => other.to_string(),
        });
        let enough = if wanted == ["refused"] { 2 } else { 8 };
        if asked + 1 >= enough && seen.len() >= wanted.len() {
            break;
        }
    }
    seen
}

fn assert_answers(scenario: &Scenario, what: &str, origin: &str, target: impl Fn(Family) -> SocketAddr, by: &[&str]) {
    let netns = scenario.netns(origin).expect("an origin");
    for family in Family::BOTH {
        for transport in Transport::BOTH {
            let expected: BTreeSet<String> = by.iter().map(|&name| name.to_owned()).collect();
            let got = answers(&netns, target(family), transport, by);
            let counters = || scenario.counters(0).expect("counters");
            assert_eq!(got, expected, "{what}: {family} {transport} from {origin}; {}", counters());
        }
    }
}

fn ask(scenario: &Scenario, origin: &str, target: SocketAddr, transport: Transport, patience: Duration) -> String {
    let netns = scenario.netns(origin).expect("an origin");
    match probe(&netns, target, transport, patience).expect("asked") {
        Answer::From { server, .. } => server,
        other => other.to_string(),
    }
}

const R: Conditions = Conditions::READY;
const T: Conditions = Conditions::TERMINATING;
const N: Conditions = Conditions::NOT_READY;
/// Ends and does not serve any more.
const X: Conditions = Conditions { ready: false, serving: false, terminating: true };

/// Conditions of b, c (of this node) and d, then who takes requests under policy Cluster and under Local.
type ByCondition = ([Conditions; 3], &'static [&'static str], &'static [&'static str]);

const CONDITIONS: [ByCondition; 9] = [
    ([R, N, R], &["b", "d"], &["b"]),
    ([T, N, R], &["d"], &["b"]),
    ([T, N, T], &["b", "d"], &["b"]),
    ([T, R, T], &["c"], &["c"]),
    ([T, T, N], &["b", "c"], &["b", "c"]),
    ([N, X, T], &["d"], &["silence"]),
    ([X, N, R], &["d"], &["silence"]),
    ([N, X, N], &["refused"], &["refused"]),
    ([R, R, R], &["b", "c", "d"], &["b", "c"]),
];

/// Official specs: `should fallback to terminating endpoints when there are no ready endpoints with
/// internalTrafficPolicy=Cluster` and `… externallTrafficPolicy=Cluster`, `should fallback to local terminating endpoints
/// … internalTrafficPolicy=Local` and `… externalTrafficPolicy=Local`, `should not be able to connect to terminating and
/// unready endpoints if PublishNotReadyAddresses is false`.
#[test]
fn conditions_of_endpoints() {
    let scenario = scenario(&[]);
    let open = service("open", HOST).node_port(NODE_PORT).external_local();
    let closed = service("closed", HOST + 1).internal_local();
    for one in [&open, &closed] {
        scenario.publish_service(one, &[]).expect("published");
    }
    for (conditions, cluster, local) in CONDITIONS {
        let endpoints = |family| {
            let pods = ["b", "c", "d"].map(|name| scenario.cluster().pod(name).expect("pod"));
            pods.iter().zip(conditions).map(|(pod, is)| Endpoint::of(pod, family).conditions(is)).collect()
        };
        let pods = |names: &'static [&'static str]| if names[0].len() == 1 { names } else { &[] };
        set(&scenario, &open, endpoints, pods(cluster));
        set(&scenario, &closed, endpoints, pods(local));
        let what = format!("{conditions:?}");
        assert_answers(&scenario, &what, "a", cluster_ip, cluster);
        assert_answers(&scenario, &what, "a", |family| node_port(&scenario, family), cluster);
        let own = |family| SocketAddr::new(vip(family, HOST + 1), SERVICE_PORT);
        for (origin, target) in
            [("a", &own as &dyn Fn(Family) -> SocketAddr), (OUTSIDE, &|family| node_port(&scenario, family))]
        {
            if local == ["silence"] {
                for family in Family::BOTH {
                    let got = ask(&scenario, origin, target(family), Transport::Tcp, SILENCE);
                    assert_eq!(got, "silence", "{what}: policy Local, {family} from {origin}");
                }
            } else {
                assert_answers(&scenario, &format!("{what}, policy Local"), origin, target, local);
            }
        }
    }
}

/// Zone and node that each of b and d is hinted for, and the node's zone; then who takes requests.
struct Hints {
    zone: Option<&'static str>,
    b: (&'static [&'static str], &'static [&'static str]),
    d: (&'static [&'static str], &'static [&'static str]),
    /// d is not ready.
    alone: bool,
    by: &'static [&'static str],
}

const fn hints(
    zone: Option<&'static str>,
    b: (&'static [&'static str], &'static [&'static str]),
    d: (&'static [&'static str], &'static [&'static str]),
    by: &'static [&'static str],
) -> Hints {
    Hints { zone, b, d, alone: false, by }
}

const HINTS: [Hints; 10] = [
    hints(Some("z1"), (&["z1"], &[]), (&["z2"], &[]), &["b"]),
    // The Node gets another zone.
    hints(Some("z2"), (&["z1"], &[]), (&["z2"], &[]), &["d"]),
    hints(Some("z3"), (&["z1"], &[]), (&["z2"], &[]), &["b", "d"]),
    hints(None, (&["z1"], &[]), (&["z2"], &[]), &["b", "d"]),
    // One ready endpoint without a hint disables them.
    hints(Some("z1"), (&["z1"], &[]), (&[], &[]), &["b", "d"]),
    // One that is not ready does not.
    Hints { alone: true, ..hints(Some("z1"), (&["z1"], &[]), (&[], &[]), &["b"]) },
    hints(Some("z1"), (&["z2", "z1"], &[]), (&["z1"], &[]), &["b", "d"]),
    // The node counts before the zone, and the zone where no endpoint is for the node.
    hints(Some("z1"), (&["z2"], &["node1"]), (&["z1"], &["node2"]), &["b"]),
    hints(Some("z1"), (&["z2"], &["node3"]), (&["z1"], &["node2"]), &["d"]),
    hints(Some("z1"), (&["z2"], &["node1"]), (&["z1"], &[]), &["d"]),
];

fn node_in_zone(node: &Node, zone: Option<&str>) -> Value {
    let mut json = node.to_json();
    if let Some(zone) = zone {
        json["metadata"]["labels"]["topology.kubernetes.io/zone"] = json!(zone);
    }
    json
}

/// Official specs: `Traffic Distribution should route to an endpoint in the same zone when using PreferClose` and
/// `PreferSameZone`, `… on the same node or fall back to same zone when using PreferSameNode`, `Topology Hints`.
#[test]
fn hints_by_zone_and_node() {
    let scenario = scenario(&[]);
    let service = service("hinted", HOST).node_port(NODE_PORT);
    scenario.publish_service(&service, &[]).expect("published");
    for (number, Hints { zone, b, d, alone, by }) in HINTS.into_iter().enumerate() {
        scenario.manifests().write(&node_in_zone(scenario.node(0), zone)).expect("written");
        let endpoints = |family| {
            let endpoint = |pod: &str, (zones, nodes): (&[&str], &[&str]), is| Endpoint {
                zones: zones.iter().map(|&zone| zone.to_owned()).collect(),
                nodes: nodes.iter().map(|&node| node.to_owned()).collect(),
                ..Endpoint::of(&scenario.cluster().pod(pod).expect("pod"), family).conditions(is)
            };
            vec![endpoint("b", b, R), endpoint("d", d, if alone { N } else { R })]
        };
        set(&scenario, &service, endpoints, by);
        assert_answers(&scenario, &format!("row {number}"), "a", cluster_ip, by);
        // They hold for the outside, too: its set under policy Cluster is the same.
        assert_answers(&scenario, &format!("row {number}"), OUTSIDE, |family| node_port(&scenario, family), by);
    }
}

/// Official spec: `should support named targetPorts that resolve to different ports on different endpoints`.
#[test]
fn a_named_port_is_another_number_on_each_endpoint() {
    let scenario = scenario(&[]);
    let d = scenario.cluster().pod("d").expect("pod");
    let _other = (TcpServer::start(d.netns(), "d-9090", 9090), UdpServer::start(d.netns(), "d-9090", 9090));
    let service = service("named", HOST).node_port(NODE_PORT);
    for family in Family::BOTH {
        let mut second = scenario.slice(&service, family, &["d"]).expect("slice");
        second.name += "-second";
        for (_, _, port) in &mut second.ports {
            *port = 9090;
        }
        scenario.manifests().write(&second).expect("written");
    }
    scenario.publish_service(&service, &["b"]).expect("published");
    wait_selected(&scenario, &service, &["b", "d"]);
    for (origin, target) in [
        ("a", &cluster_ip as &dyn Fn(Family) -> SocketAddr),
        ("node1", &cluster_ip),
        (OUTSIDE, &|family| node_port(&scenario, family)),
    ] {
        assert_answers(&scenario, "named", origin, target, &["b", "d-9090"]);
    }
}

/// What a Service's cluster address and its NodePort answer to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Served {
    cluster: bool,
    node_port: bool,
}

/// One change after the other, and what is served after each: official specs `should implement
/// service.kubernetes.io/service-proxy-name`, `should implement service.kubernetes.io/headless`, `should be able to change
/// the type from ExternalName to ClusterIP`, `… ExternalName to NodePort`, `… ClusterIP to ExternalName`, `… NodePort to
/// ExternalName`.
#[test]
fn labels_and_types_change() {
    let scenario = scenario(&[]);
    let cluster = service("web", HOST);
    let open = cluster.clone().node_port(NODE_PORT);
    let mut name = cluster.clone().with("type", json!("ExternalName")).with("externalName", json!("web.example"));
    name.cluster_ips.clear();
    let both = Served { cluster: true, node_port: true };
    let inside = Served { cluster: true, node_port: false };
    let nothing = Served { cluster: false, node_port: false };
    let steps = [
        ("ClusterIP", cluster.clone(), inside),
        ("NodePort", open.clone(), both),
        ("another proxy's", open.clone().label("service.kubernetes.io/service-proxy-name", "other"), nothing),
        ("ours again", open.clone(), both),
        ("headless by label", open.clone().label("service.kubernetes.io/headless", ""), nothing),
        ("ours again", open.clone(), both),
        ("NodePort to ExternalName", name.clone(), nothing),
        ("ExternalName to ClusterIP", cluster.clone(), inside),
        ("ClusterIP to ExternalName", name, nothing),
        ("ExternalName to NodePort", open, both),
        ("NodePort to ClusterIP", cluster, inside),
    ];
    scenario.publish_service(&steps[0].1, &["b"]).expect("published");
    for (what, service, served) in steps {
        scenario.manifests().write(&service).expect("written");
        let rows = 4 * (usize::from(served.cluster) + usize::from(served.node_port));
        let known = || {
            let all = scenario.services(0).unwrap_or_default();
            all.iter().filter(|row| row.service.as_deref().is_some_and(|s| s.starts_with("default/web"))).count()
                == rows
        };
        Deadline::secs(15).until(&format!("{what}: {rows} frontends"), known).expect("known");
        for family in Family::BOTH {
            for transport in Transport::BOTH {
                let got = |target, is| ask(&scenario, "a", target, transport, if is { PATIENCE } else { SILENCE });
                let answers =
                    [got(cluster_ip(family), served.cluster), got(node_port(&scenario, family), served.node_port)];
                let expected =
                    [if served.cluster { "b" } else { "silence" }, if served.node_port { "b" } else { "refused" }];
                assert_eq!(answers, expected, "{what}: {family} {transport}");
            }
        }
    }
}

/// Official spec: `should be able to update service type to NodePort listening on same port number but different
/// protocols`.
#[test]
fn one_number_for_two_protocols_and_two_services() {
    let scenario = scenario(&[]);
    let one = |name: &str, host, port: ServicePort| {
        Service::new(name, &Family::BOTH.map(|family| vip(family, host)), vec![port]).node_port(NODE_PORT)
    };
    let tcp = one("tcp", HOST, ServicePort::tcp("", SERVICE_PORT, TARGET_PORT));
    let udp = one("udp", HOST + 1, ServicePort::udp("", SERVICE_PORT, TARGET_PORT));
    scenario.publish_service(&tcp, &["b"]).expect("published");
    scenario.publish_service(&udp, &["d"]).expect("published");
    wait_selected(&scenario, &tcp, &["b"]);
    wait_selected(&scenario, &udp, &["d"]);
    let asked = |origin: &'static str| {
        Family::BOTH.map(|family| {
            Transport::BOTH.map(|transport| ask(&scenario, origin, node_port(&scenario, family), transport, PATIENCE))
        })
    };
    for origin in ["a", "node1", OUTSIDE] {
        assert_eq!(asked(origin), [["b", "d"]; 2], "{origin}");
    }
    scenario.manifests().remove(&udp).expect("removed");
    scenario.wait_endpoints(0, "udp", None).expect("gone");
    for origin in ["a", "node1", OUTSIDE] {
        assert_eq!(asked(origin), [["b", "refused"]; 2], "{origin}");
    }
}

/// Official specs: `should have session affinity work for service with type clusterIP` and `NodePort service`, `should be
/// able to switch session affinity for …`.
#[test]
fn affinity_holds_for_all_addresses_and_moves_with_its_endpoint() {
    let scenario = scenario(&[]);
    let plain = service("sticky", HOST).node_port(NODE_PORT);
    let sticky = plain.clone().affinity(10_800);
    scenario.publish_service(&sticky, &["b", "c", "d"]).expect("published");
    wait_selected(&scenario, &sticky, &["b", "c", "d"]);
    let fifteen = |origin: &str, family| {
        let netns = scenario.netns(origin).expect("an origin");
        let targets = if origin == OUTSIDE {
            [node_port(&scenario, family); 2]
        } else {
            [cluster_ip(family), node_port(&scenario, family)]
        };
        let ask = |number: usize| {
            let answer = probe(&netns, targets[number % 2], Transport::Tcp, PATIENCE).expect("asked");
            let Answer::From { server, .. } = answer else { panic!("{origin} {family}: {answer}") };
            server
        };
        (0..15).map(ask).collect::<BTreeSet<String>>()
    };
    for family in Family::BOTH {
        for origin in ["a", "node1", OUTSIDE] {
            let first = fifteen(origin, family);
            assert_eq!(first.len(), 1, "{family} {origin}: one server for ClusterIP and NodePort alike: {first:?}");
            let gone = first.first().expect("one").as_str();
            let left: Vec<&str> = ["b", "c", "d"].into_iter().filter(|pod| *pod != gone).collect();
            scenario.set_endpoints(&sticky, &left).expect("written");
            wait_selected(&scenario, &sticky, &left);
            let second = fifteen(origin, family);
            assert_eq!(second.len(), 1, "{family} {origin}: {second:?}");
            scenario.set_endpoints(&sticky, &["b", "c", "d"]).expect("written");
            wait_selected(&scenario, &sticky, &["b", "c", "d"]);
            assert_eq!(fifteen(origin, family), second, "{family} {origin}: it stays with the second");
        }
    }
    // Switched off and on, for new connections.
    scenario.manifests().write(&plain).expect("written");
    let netns = scenario.netns("a").expect("pod");
    let spread = || (0..15).map(|_| ask(&scenario, "a", cluster_ip(Family::V4), Transport::Tcp, PATIENCE)).collect();
    let all = || BTreeSet::len(&spread()) == 3;
    Deadline::secs(15).until("every endpoint answers", all).expect("affinity is off");
    scenario.manifests().write(&sticky).expect("written");
    let one = || BTreeSet::len(&spread()) == 1;
    Deadline::secs(15).until("one endpoint answers", one).expect("affinity is on");
    drop(netns);
}

/// Official specs: `should have session affinity timeout work for service with type clusterIP` and `NodePort service`. The
/// time-out slides: it begins anew with each connection.
#[test]
fn affinity_runs_out() {
    const SECOND: Duration = Duration::from_secs(1);
    let scenario = scenario(&[]);
    // Clients that are none of the endpoints' pods, in a number that does not choose the same again by chance.
    let clients: Vec<Netns> = (0..7)
        .map(|n| scenario.cluster().add_pod("node1", format!("client{n}").as_str()).expect("pod").netns().clone())
        .collect();
    scenario.wait_pods(0).expect("known");
    let sticky = service("sticky", HOST).affinity(6);
    scenario.publish_service(&sticky, &["b", "c", "d"]).expect("published");
    wait_selected(&scenario, &sticky, &["b", "c", "d"]);
    let target = cluster_ip(Family::V4);
    // Another client goes on meanwhile: it refreshes its own affinity only.
    let busy = |time: Duration| {
        let other = scenario.netns("c").expect("pod");
        let report = connect_steadily(&other, target, 1, 20, time).expect("connections");
        assert_eq!(report.errors, 0, "{report}");
    };
    let next = || -> Vec<Answer> {
        let ask = |client| probe(client, target, Transport::Tcp, PATIENCE).expect("asked");
        clients.iter().map(ask).collect()
    };
    let first = next();
    assert!(first.iter().all(|answer| matches!(answer, Answer::From { .. })), "{first:?}");
    for _ in 0..4 {
        busy(2 * SECOND);
        assert_eq!(next(), first, "two seconds later");
    }
    // By chance one client chooses the same again once in three times, all of them once in two thousand.
    let moved = (0..3).any(|_| {
        busy(7 * SECOND);
        next() != first
    });
    assert!(moved, "always {first:?}");
}

/// Addresses of the node come and go, and NodePorts with them; by default only its first ones serve them.
#[test]
fn node_ports_follow_the_addresses_of_the_node() {
    let address = |family| -> IpAddr {
        match family {
            Family::V4 => "172.18.0.77".parse().expect("IPv4"),
            Family::V6 => "fc00:f853:ccd::77".parse().expect("IPv6"),
        }
    };
    for (args, all) in [(&["--nodeport-addresses", "all"][..], true), (&[], false)] {
        let scenario = scenario(args);
        let service = service("web", HOST).node_port(NODE_PORT);
        scenario.publish_service(&service, &["b"]).expect("published");
        wait_selected(&scenario, &service, &["b"]);
        let change = |verb: &str| {
            let lines = [("24", ""), ("64", " nodad")];
            for (family, (length, nodad)) in Family::BOTH.into_iter().zip(lines) {
                let nodad = if verb == "add" { nodad } else { "" };
                let line = format!("addr {verb} {}/{length} dev eth0{nodad}\n", address(family));
                scenario.node(0).netns().ip(&line).expect("changed");
            }
        };
        change("add");
        for family in Family::BOTH {
            for transport in Transport::BOTH {
                let served = if all { "b" } else { "refused" };
                let at = |ip| SocketAddr::new(ip, NODE_PORT);
                for origin in ["a", "node1", OUTSIDE] {
                    let first = || ask(&scenario, origin, at(scenario.node(0).ip(family)), transport, PATIENCE) == "b";
                    assert!(first(), "{family} {transport} from {origin}: the first address");
                    let new = || ask(&scenario, origin, at(address(family)), transport, AT_ONCE) == served;
                    let what = format!("{family} {transport} from {origin}: {served} at the new address");
                    Deadline::secs(10).until(&what, new).unwrap_or_else(|error| {
                        let got = ask(&scenario, origin, at(address(family)), transport, AT_ONCE);

                        panic!("{error}: {got}; {}", scenario.counters(0).expect("counters"))
                    });
                }
                let bridge = ask(&scenario, "a", at(scenario.node(0).bridge_ip(family)), transport, AT_ONCE);
                assert_eq!(bridge, served, "{family} {transport}: at the bridge");
            }
        }
        change("del");
        for family in Family::BOTH {
            for transport in Transport::BOTH {
                for origin in ["a", "node1"] {
                    let at = SocketAddr::new(address(family), NODE_PORT);
                    let gone = || ask(&scenario, origin, at, transport, SILENCE) != "b";
                    Deadline::secs(10).until("it is gone", gone).expect("gone");
                }
            }
        }
    }
}
