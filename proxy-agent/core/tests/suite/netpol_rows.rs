//! The semantics of NetworkPolicy, row by row: each case is one row of the API's texts, with the flows that show it.
//!
//! A flow is `POD < PEER PORT/PROTO yes|no` for ingress, `>` for egress. A peer is a pod (then both families are asked),
//! an address, or `node` (the node itself, from an address of its own). Compiler and oracle must both say so.

use std::net::IpAddr;

use proxy_core::diagnostic::Diagnostic;
use proxy_core::name::ObjectName;
use proxy_core::netpol::spec::{
    BlockSpec, Change, Container, ContainerPort, ExpressionSpec, Labels, Namespace, PeerSpec, Pod, PolicySpec,
    PortNumber, PortSpec, RuleSpec, SelectorSpec,
};
use proxy_oracle::dice::{NODE, node_ips, pod_ip};
use proxy_oracle::verdict::Side;

use crate::netpol_maps::Node;

pub(crate) fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
}

pub(crate) fn container_port(name: &str, protocol: &str, port: u16, container: Container) -> ContainerPort {
    ContainerPort { name: name.into(), protocol: Some(protocol.into()), port, container }
}

pub(crate) fn object_name(text: &str) -> ObjectName {
    let (namespace, name) = text.split_once('/').expect("namespace/name");
    ObjectName::new(namespace, name)
}

pub(crate) fn pod(name: &str, number: u8, pairs: &[(&str, &str)], ports: Vec<ContainerPort>) -> Pod {
    Pod {
        name: object_name(name),
        uid: format!("uid of {name}").into(),
        labels: labels(pairs),
        node: Some(NODE.into()),
        host_network: false,
        finished: false,
        deleting: false,
        socket_lb: true,
        created: 1,
        ips: vec![pod_ip(number, false), pod_ip(number, true)],
        ports,
    }
}

pub(crate) fn namespace(name: &str, pairs: &[(&str, &str)]) -> Change {
    let mut labels = labels(pairs);
    labels.insert("kubernetes.io/metadata.name".into(), name.into());
    Change::Namespace(Namespace { name: name.into(), labels, terminating: false })
}

/// Three namespaces, seven pods: `x/db` is the one that most policies are for.
pub(crate) fn fixture() -> Vec<Change> {
    let http = |protocol, port| container_port("http", protocol, port, Container::Main);
    let db = vec![
        http("TCP", 8080),
        http("TCP", 8081),
        container_port("dns", "UDP", 53, Container::Main),
        container_port("admin", "TCP", 9000, Container::Sidecar),
        container_port("boot", "TCP", 7000, Container::Init),
    ];
    let host = Pod { host_network: true, ips: node_ips("node-2"), ..pod("x/host", 0, &[("app", "web")], vec![]) };
    let done = Pod { finished: true, created: 9, ..pod("x/done", 4, &[("app", "web")], vec![]) };
    let far = Pod { node: Some("node-2".into()), ..pod("y/far", 7, &[("app", "far")], vec![]) };
    vec![
        namespace("x", &[("team", "red")]),
        namespace("y", &[("team", "blue")]),
        namespace("z", &[]),
        Change::Pod(pod("x/web", 1, &[("app", "web")], vec![http("TCP", 80)])),
        Change::Pod(pod("x/db", 2, &[("app", "db"), ("tier", "back")], db)),
        Change::Pod(pod("y/web", 3, &[("app", "web")], vec![http("TCP", 81)])),
        Change::Pod(pod("y/bare", 4, &[], vec![http("UDP", 80)])),
        Change::Pod(pod("z/web", 5, &[("app", "web")], vec![])),
        Change::Pod(host),
        Change::Pod(done),
        Change::Pod(far),
    ]
}

pub(crate) fn all() -> SelectorSpec {
    SelectorSpec::default()
}

pub(crate) fn with(key: &str, value: &str) -> SelectorSpec {
    SelectorSpec { labels: labels(&[(key, value)]), expressions: vec![] }
}

pub(crate) fn expression(key: &str, operator: &str, values: &[&str]) -> SelectorSpec {
    let values = values.iter().map(|value| (*value).into()).collect();
    SelectorSpec {
        labels: Labels::new(),
        expressions: vec![ExpressionSpec { key: key.into(), operator: operator.into(), values }],
    }
}

pub(crate) fn pods(selector: SelectorSpec) -> PeerSpec {
    PeerSpec { pods: Some(selector), ..PeerSpec::default() }
}

pub(crate) fn namespaces(selector: SelectorSpec) -> PeerSpec {
    PeerSpec { namespaces: Some(selector), ..PeerSpec::default() }
}

pub(crate) fn both(namespaces: SelectorSpec, pods: SelectorSpec) -> PeerSpec {
    PeerSpec { namespaces: Some(namespaces), pods: Some(pods), block: None }
}

pub(crate) fn block(cidr: &str, except: &[&str]) -> PeerSpec {
    let except = except.iter().map(|net| (*net).into()).collect();
    PeerSpec { block: Some(BlockSpec { cidr: cidr.into(), except }), ..PeerSpec::default() }
}

pub(crate) fn port(protocol: Option<&str>, number: i32) -> PortSpec {
    PortSpec { protocol: protocol.map(Into::into), port: Some(PortNumber::Number(number)), end_port: None }
}

pub(crate) fn named(protocol: &str, name: &str) -> PortSpec {
    PortSpec { protocol: Some(protocol.into()), port: Some(PortNumber::Name(name.into())), end_port: None }
}

pub(crate) fn rule(peers: Vec<PeerSpec>, ports: Vec<PortSpec>) -> RuleSpec {
    let some = |empty: bool| !empty;
    RuleSpec { ports: some(ports.is_empty()).then_some(ports), peers: some(peers.is_empty()).then_some(peers) }
}

/// A policy for `x/db`.
pub(crate) fn policy(name: &str) -> PolicySpec {
    PolicySpec {
        name: object_name(name),
        audit: None,
        pod_selector: Some(with("app", "db")),
        policy_types: None,
        ingress: None,
        egress: None,
    }
}

pub(crate) fn ingress(rules: Vec<RuleSpec>) -> Vec<PolicySpec> {
    vec![PolicySpec { ingress: Some(rules), ..policy("x/p") }]
}

pub(crate) fn egress(rules: Vec<RuleSpec>) -> Vec<PolicySpec> {
    vec![PolicySpec { policy_types: Some(vec!["Egress".into()]), egress: Some(rules), ..policy("x/p") }]
}

/// One row.
struct Case {
    row: &'static str,
    policies: Vec<PolicySpec>,
    flows: &'static [&'static str],
}

fn check(node: &Node, row: &str, flow: &str) {
    let [subject, arrow, peer, port, expected] = flow.split_whitespace().collect::<Vec<_>>()[..] else {
        panic!("{row}: {flow:?} is no flow");
    };
    let subject = &node.cluster.pods[&object_name(subject)];
    let (number, proto) = port.split_once('/').expect("port/protocol");
    let proto = match proto {
        "tcp" => 6,
        "udp" => 17,
        "sctp" => 132,
        "icmp" => 1,
        other => panic!("{other}"),
    };
    let peers: Vec<IpAddr> = match peer.parse() {
        Ok(ip) => vec![ip],
        Err(_) if peer == "node" => node_ips(NODE),
        Err(_) => node.cluster.pods[&object_name(peer)].ips.clone(),
    };
    for ip in peers {
        let side = Side {
            ingress: arrow == "<",
            peer: ip,
            proto,
            port: number.parse().ok(),
            source_port: 40_000,
            from_node: peer == "node",
            hairpin: subject.ips.contains(&ip),
        };
        let verdict = node.compare(None, subject, &side, true).unwrap_or_else(|p| panic!("{row}: {flow}: {p}"));
        assert_eq!(verdict.allowed, expected == "yes", "{row}: {flow} ({ip}): {verdict:?}");
    }
}

fn run(cases: Vec<Case>) {
    for Case { row, policies, flows } in cases {
        let node = Node::with(fixture().into_iter().chain(policies.into_iter().map(Change::Policy)));
        for flow in flows {
            check(&node, row, flow);
        }
    }
}

#[test]
fn objects() {
    let types = |types: &[&str]| Some(types.iter().map(|t| (*t).into()).collect());
    let everything = || Some(vec![RuleSpec::default()]);
    let empty = |field: fn(&mut RuleSpec)| {
        let mut rule = RuleSpec::default();
        field(&mut rule);
        vec![rule]
    };
    let second = PolicySpec { ingress: Some(vec![rule(vec![pods(with("app", "web"))], vec![])]), ..policy("x/q") };
    let only_one =
        [rule(vec![pods(with("app", "web")), pods(with("app", "no"))], vec![port(None, 80), port(None, 81)])];
    run(vec![
        Case {
            row: "no policy",
            policies: vec![],
            flows: &["x/db < x/web 80/tcp yes", "x/db > 8.8.8.8 1/udp yes", "x/db < fe80::1 0/icmp yes"],
        },
        Case {
            row: "O1: an absent podSelector selects every pod of the namespace",
            policies: vec![PolicySpec { pod_selector: None, ..policy("x/p") }],
            flows: &["x/db < y/web 80/tcp no", "x/web < y/web 80/tcp no", "y/web < x/web 80/tcp yes"],
        },
        Case {
            row: "O1: so does an empty one",
            policies: vec![PolicySpec { pod_selector: Some(all()), ..policy("x/p") }],
            flows: &["x/db < y/web 80/tcp no", "x/web < y/web 80/tcp no", "y/web < x/web 80/tcp yes"],
        },
        Case {
            row: "O2: without policyTypes Ingress, and Egress only with an egress rule",
            policies: vec![PolicySpec { egress: Some(vec![]), ..policy("x/p") }],
            flows: &["x/db < y/web 80/tcp no", "x/db > y/web 80/tcp yes"],
        },
        Case {
            row: "O2: with an egress rule",
            policies: vec![PolicySpec {
                policy_types: Some(vec![]),
                egress: Some(vec![rule(vec![pods(with("app", "web"))], vec![])]),
                ..policy("x/p")
            }],
            flows: &["x/db < y/web 80/tcp no", "x/db > y/web 80/tcp no", "x/db > x/web 80/tcp yes"],
        },
        Case {
            row: "O3: ingress rules have no effect under policyTypes [Egress]",
            policies: vec![PolicySpec { policy_types: types(&["Egress"]), ingress: Some(vec![]), ..policy("x/p") }],
            flows: &["x/db < y/web 80/tcp yes", "x/db > y/web 80/tcp no"],
        },
        Case {
            row: "O4: no rules, absent or empty, isolate",
            policies: vec![PolicySpec {
                policy_types: types(&["Ingress", "Egress"]),
                ingress: Some(vec![]),
                ..policy("x/p")
            }],
            flows: &["x/db < x/web 80/tcp no", "x/db > x/web 80/tcp no", "x/db > 8.8.8.8 53/udp no"],
        },
        Case {
            row: "O5: the rule {} allows everything",
            policies: vec![PolicySpec { ingress: everything(), egress: everything(), ..policy("x/p") }],
            flows: &["x/db < 8.8.8.8 80/tcp yes", "x/db > 2001:db8::1 9/sctp yes", "x/db < x/web 0/icmp yes"],
        },
        Case {
            row: "O6: an empty list of peers is everybody, pods or not",
            policies: ingress(empty(|rule| rule.peers = Some(vec![]))),
            flows: &["x/db < 8.8.8.8 80/tcp yes", "x/db < y/web 80/udp yes"],
        },
        Case {
            row: "O7: an empty list of ports is every port of every protocol",
            policies: ingress(empty(|rule| rule.ports = Some(vec![]))),
            flows: &["x/db < 8.8.8.8 80/sctp yes", "x/db < y/web 0/icmp yes"],
        },
        Case {
            row: "O8: policies add up",
            policies: vec![policy("x/p"), second],
            flows: &["x/db < x/web 80/tcp yes", "x/db < y/web 80/tcp no"],
        },
        Case {
            row: "O9: one of the peers and one of the ports",
            policies: ingress(only_one.to_vec()),
            flows: &["x/db < x/web 81/tcp yes", "x/db < x/web 82/tcp no", "x/db < y/web 80/tcp no"],
        },
        Case {
            row: "O10: egress of the source and ingress of the destination are judged apart",
            policies: egress(vec![rule(vec![pods(with("app", "web"))], vec![])]),
            flows: &[
                "x/db > x/web 80/tcp yes",
                "x/web < x/db 80/tcp yes",
                "x/db > y/web 80/tcp no",
                "y/web < x/db 80/tcp yes",
            ],
        },
        Case {
            row: "O11: peers that are none, and ports that are none, match nothing; the others stay",
            policies: ingress(vec![
                rule(vec![PeerSpec::default()], vec![]),
                rule(vec![PeerSpec { pods: Some(all()), ..block("0.0.0.0/0", &[]) }], vec![]),
                rule(vec![], vec![port(Some("QUIC"), 80)]),
                rule(vec![pods(expression("app", "Near", &["web"]))], vec![]),
                rule(vec![pods(with("app", "web"))], vec![port(None, 99)]),
            ]),
            flows: &["x/db < x/web 80/tcp no", "x/db < 8.8.8.8 80/tcp no", "x/db < x/web 99/tcp yes"],
        },
        Case {
            row: "O11: an unknown type isolates in both directions",
            policies: vec![PolicySpec { policy_types: types(&["Sideways"]), ..policy("x/p") }],
            flows: &["x/db < x/web 80/tcp no", "x/db > x/web 80/tcp no"],
        },
        Case {
            row: "O11: a subject that cannot be read is every pod of the namespace",
            policies: vec![PolicySpec { pod_selector: Some(expression("app", "In", &[])), ..policy("x/p") }],
            flows: &["x/db < x/web 80/tcp no", "x/web < y/web 80/tcp no", "y/web < x/web 80/tcp yes"],
        },
        Case {
            row: "O12: host bits, leading zeros and impossible labels are tolerated",
            policies: ingress(vec![
                rule(vec![block("8.8.8.8/8", &[]), block("010.009.0.0/16", &[])], vec![]),
                rule(vec![pods(with("app", "no such value!"))], vec![]),
            ]),
            flows: &["x/db < 8.1.2.3 80/tcp yes", "x/db < 10.9.1.1 80/tcp yes", "x/db < x/web 80/tcp no"],
        },
    ]);
}

#[test]
fn peers() {
    let from = |peers: Vec<PeerSpec>| ingress(vec![rule(peers, vec![])]);
    run(vec![
        Case {
            row: "P1: a podSelector alone looks into the policy's namespace",
            policies: from(vec![pods(with("app", "web"))]),
            flows: &["x/db < x/web 80/tcp yes", "x/db < y/web 80/tcp no"],
        },
        Case {
            row: "P2: a namespaceSelector alone means all pods there",
            policies: from(vec![namespaces(with("team", "blue"))]),
            flows: &["x/db < y/web 80/tcp yes", "x/db < y/bare 80/tcp yes", "x/db < x/web 80/tcp no"],
        },
        Case {
            row: "P3: both in one peer: and",
            policies: from(vec![both(with("team", "blue"), with("app", "web"))]),
            flows: &["x/db < y/web 80/tcp yes", "x/db < y/bare 80/tcp no", "x/db < x/web 80/tcp no"],
        },
        Case {
            row: "P3: in two peers: or",
            policies: from(vec![namespaces(with("team", "blue")), pods(with("app", "web"))]),
            flows: &["x/db < y/bare 80/tcp yes", "x/db < x/web 80/tcp yes", "x/db < z/web 80/tcp no"],
        },
        Case {
            row: "P4: the empty namespaceSelector is every pod of the cluster, and nobody else",
            policies: from(vec![namespaces(all())]),
            flows: &[
                "x/db < z/web 80/tcp yes",
                "x/db < y/far 80/tcp yes",
                "x/db < 8.8.8.8 80/tcp no",
                "x/db < 172.18.0.2 80/tcp no",
            ],
        },
        Case {
            row: "P4: the empty podSelector is every pod of the namespace",
            policies: from(vec![pods(all())]),
            flows: &["x/db < x/web 80/tcp yes", "x/db < y/web 80/tcp no"],
        },
        Case {
            row: "P5: In and Exists want the label",
            policies: from(vec![
                both(all(), expression("app", "In", &["web", "no"])),
                pods(expression("tier", "Exists", &[])),
            ]),
            flows: &["x/db < z/web 80/tcp yes", "x/db < y/bare 80/tcp no", "x/db < y/far 80/tcp no"],
        },
        Case {
            row: "P5: NotIn matches who lacks the label",
            policies: from(vec![both(all(), expression("app", "NotIn", &["web"]))]),
            flows: &["x/db < y/bare 80/tcp yes", "x/db < y/far 80/tcp yes", "x/db < y/web 80/tcp no"],
        },
        Case {
            row: "P5: so does DoesNotExist",
            policies: from(vec![namespaces(expression("team", "DoesNotExist", &[]))]),
            flows: &["x/db < z/web 80/tcp yes", "x/db < y/web 80/tcp no"],
        },
        Case {
            row: "P6: a namespace by its name",
            policies: from(vec![namespaces(with("kubernetes.io/metadata.name", "z"))]),
            flows: &["x/db < z/web 80/tcp yes", "x/db < y/web 80/tcp no"],
        },
        Case {
            row: "P7: except takes from its own peer alone",
            policies: from(vec![block("10.0.0.0/8", &["10.9.0.0/16", "10.8.0.0/16"]), block("10.9.1.0/24", &[])]),
            flows: &[
                "x/db < 10.1.1.1 80/tcp yes",
                "x/db < 10.9.2.1 80/tcp no",
                "x/db < 10.9.1.1 80/tcp yes",
                "x/db < 10.8.1.1 80/tcp no",
            ],
        },
        Case {
            row: "P7: an exception that cannot be read takes all",
            policies: from(vec![block("10.0.0.0/8", &["bogus"])]),
            flows: &["x/db < 10.1.1.1 80/tcp no"],
        },
        Case {
            row: "P8: an ipBlock matches pods",
            policies: from(vec![block("10.244.0.0/30", &["10.244.0.1/32"])]),
            flows: &["x/db < 10.244.0.3 80/tcp yes", "x/db < 10.244.0.1 80/tcp no", "x/db < 10.244.0.5 80/tcp no"],
        },
        Case {
            row: "P9: an ipBlock matches nodes",
            policies: from(vec![block("172.18.0.2/32", &[])]),
            flows: &["x/db < 172.18.0.2 80/tcp yes", "x/db < 172.18.0.3 80/tcp no"],
        },
        Case {
            row: "P10: a block has one family",
            policies: from(vec![block("0.0.0.0/0", &[])]),
            flows: &["x/db < 8.8.8.8 80/tcp yes", "x/db < 2001:db8::1 80/tcp no", "x/db < fd00::1 80/tcp no"],
        },
        Case {
            row: "P10: the other one",
            policies: from(vec![block("::/0", &["fd00::/64"])]),
            flows: &["x/db < 2001:db8::1 80/tcp yes", "x/db < fd00::1 80/tcp no", "x/db < 10.244.0.1 80/tcp no"],
        },
        Case {
            row: "P11: selectors do not find hostNetwork pods",
            policies: from(vec![pods(with("app", "web"))]),
            flows: &["x/db < x/host 80/tcp no", "x/db < x/web 80/tcp yes"],
        },
        Case {
            row: "finished pods have no address",
            policies: from(vec![pods(with("app", "web"))]),
            flows: &["x/db < y/bare 80/tcp no"],
        },
    ]);
}

#[test]
fn ports() {
    let to = |ports: Vec<PortSpec>| ingress(vec![rule(vec![], ports)]);
    let out = |peers: Vec<PeerSpec>, ports: Vec<PortSpec>| egress(vec![rule(peers, ports)]);
    let range = |first, last| PortSpec { end_port: Some(last), ..port(Some("UDP"), first) };
    run(vec![
        Case {
            row: "T1: without a protocol TCP",
            policies: to(vec![port(None, 80)]),
            flows: &["x/db < x/web 80/tcp yes", "x/db < x/web 80/udp no"],
        },
        Case {
            row: "T2: without a port every port of the protocol",
            policies: to(vec![PortSpec::default()]),
            flows: &[
                "x/db < x/web 1/tcp yes",
                "x/db < x/web 65535/tcp yes",
                "x/db < x/web 80/udp no",
                "x/db < x/web 0/icmp no",
            ],
        },
        Case {
            row: "T3: endPort is the last",
            policies: to(vec![range(79, 81)]),
            flows: &[
                "x/db < x/web 78/udp no",
                "x/db < x/web 79/udp yes",
                "x/db < x/web 81/udp yes",
                "x/db < x/web 82/udp no",
                "x/db < x/web 80/tcp no",
            ],
        },
        Case {
            row: "T3: endPort before port, or without a number, matches nothing",
            policies: to(vec![
                range(81, 79),
                PortSpec { end_port: Some(9000), ..named("TCP", "http") },
                PortSpec { end_port: Some(80), ..PortSpec::default() },
            ]),
            flows: &["x/db < x/web 80/udp no", "x/db < x/web 8080/tcp no", "x/db < x/web 80/tcp no"],
        },
        Case {
            row: "T4: ports are the destination's",
            policies: out(vec![], vec![port(None, 80)]),
            flows: &["x/db > x/web 80/tcp yes", "x/db > x/web 40000/tcp no"],
        },
        Case {
            row: "T5, T7: a name is the subject's, each of its numbers, under its protocol",
            policies: to(vec![named("TCP", "http"), named("TCP", "dns")]),
            flows: &[
                "x/db < x/web 8080/tcp yes",
                "x/db < x/web 8081/tcp yes",
                "x/db < x/web 80/tcp no",
                "x/db < x/web 53/tcp no",
                "x/db < x/web 53/udp no",
            ],
        },
        Case {
            row: "T6: each destination pod has its own number, and addresses of no pod have none",
            policies: out(vec![], vec![named("TCP", "http")]),
            flows: &[
                "x/db > x/web 80/tcp yes",
                "x/db > x/web 81/tcp no",
                "x/db > y/web 81/tcp yes",
                "x/db > y/web 80/tcp no",
                "x/db > 8.8.8.8 80/tcp no",
                "x/db > y/bare 80/tcp no",
            ],
        },
        Case {
            row: "T6: also within a block",
            policies: out(vec![block("10.244.0.0/31", &[])], vec![named("TCP", "http")]),
            flows: &["x/db > 10.244.0.1 80/tcp yes", "x/db > 10.244.0.0 80/tcp no", "x/db > 10.244.0.3 81/tcp no"],
        },
        Case {
            row: "T8: names of sidecars count, those of other init containers do not",
            policies: to(vec![named("TCP", "admin"), named("TCP", "boot")]),
            flows: &["x/db < x/web 9000/tcp yes", "x/db < x/web 7000/tcp no"],
        },
        Case {
            row: "T9: SCTP is not TCP, and isolates",
            policies: to(vec![port(Some("SCTP"), 80)]),
            flows: &["x/db < x/web 80/sctp yes", "x/db < x/web 80/tcp no"],
        },
        Case {
            row: "T10: 0 and 65536 are no ports",
            policies: to(vec![port(None, 0), port(None, 65_536)]),
            flows: &["x/db < x/web 0/tcp no", "x/db < x/web 80/tcp no"],
        },
        Case {
            row: "fragments without ports match rules without ports",
            policies: to(vec![PortSpec::default()]),
            flows: &["x/db < x/web ?/tcp no", "x/db < x/web 1/tcp yes"],
        },
    ]);
}

#[test]
fn coverage() {
    let closed = || vec![PolicySpec { policy_types: Some(vec!["Ingress".into(), "Egress".into()]), ..policy("x/p") }];
    run(vec![
        Case {
            row: "the pod's own node always reaches it, another does not, nor does the pod reach its node",
            policies: closed(),
            flows: &[
                "x/db < node 80/tcp yes",
                "x/db < 172.18.0.1 80/tcp no",
                "x/db < 172.18.0.2 80/tcp no",
                "x/db > 172.18.0.1 80/tcp no",
            ],
        },
        Case {
            row: "a pod reaches itself through a Service",
            policies: closed(),
            flows: &["x/db < x/db 80/tcp yes", "x/db > x/db 80/tcp yes", "x/db > x/web 80/tcp no"],
        },
        Case {
            row: "a rule without ports is for every protocol",
            policies: ingress(vec![rule(vec![pods(all())], vec![])]),
            flows: &["x/db < x/web 0/icmp yes", "x/db < y/web 0/icmp no"],
        },
    ]);
}

#[test]
fn policies_outlive_their_terminating_namespace_as_long_as_its_pods() {
    let mut node = Node::with(fixture().into_iter().chain([Change::Policy(policy("x/p"))]));
    let terminating = |terminating| Change::Namespace(Namespace { name: "x".into(), labels: labels(&[]), terminating });
    node.change([terminating(true), Change::PolicyGone(object_name("x/p"))]);
    check(&node, "deleted while terminating", "x/db < y/web 80/tcp no");
    node.change([terminating(false)]);
    check(&node, "no longer terminating", "x/db < y/web 80/tcp yes");
}

#[test]
fn an_address_goes_to_the_pod_that_uses_it_now() {
    let mut node = Node::with(
        fixture()
            .into_iter()
            .chain(ingress(vec![rule(vec![pods(with("app", "web"))], vec![])]).into_iter().map(Change::Policy)),
    );
    check(&node, "y/bare has the address of x/done", "x/db < 10.244.0.4 80/tcp no");
    node.change([Change::PodGone(object_name("y/bare"))]);
    check(&node, "nobody has it", "x/db < 10.244.0.4 80/tcp no");
    let new = Pod { created: 2, ..pod("x/new", 1, &[("app", "other")], vec![]) };
    node.change([Change::Pod(new.clone())]);
    check(&node, "the newer pod has it", "x/db < 10.244.0.1 80/tcp no");
    node.change([Change::Pod(Pod { deleting: true, ..new })]);
    check(&node, "the newer pod is going", "x/db < 10.244.0.1 80/tcp yes");
}

#[test]
fn what_cannot_be_read_is_told_with_its_place() {
    let rules = vec![
        rule(
            vec![PeerSpec::default(), block("bogus", &[]), block("10.0.0.0/8", &["10.0.0.0/99"])],
            vec![port(Some("QUIC"), 1)],
        ),
        rule(
            vec![pods(expression("a", "Near", &[]))],
            vec![port(None, 0), PortSpec { end_port: Some(1), ..port(None, 2) }],
        ),
    ];
    let node = Node::with([Change::Policy(PolicySpec {
        policy_types: Some(vec!["Sideways".into()]),
        ..ingress(rules).remove(0)
    })]);
    let lines: Vec<_> = node.engine.diagnostics().iter().map(Diagnostic::to_string).collect();
    let places: Vec<_> = lines.iter().map(|line| line.split(": ").next().unwrap_or_default()).collect();
    let policy = "NetworkPolicy x/p spec.";
    let fields = [
        "policyTypes[0]",
        "ingress[0].from[0]",
        "ingress[0].from[1].ipBlock.cidr",
        "ingress[0].from[2].ipBlock.except[0]",
        "ingress[0].ports[0].protocol",
        "ingress[1].from[0].podSelector",
        "ingress[1].ports[0].port",
        "ingress[1].ports[1].endPort",
    ];
    assert_eq!(places, fields.map(|field| format!("{policy}{field}")));
}

#[test]
fn what_no_rule_tells_apart_costs_no_bits_and_no_revision() {
    let mut node = Node::with(
        fixture()
            .into_iter()
            .chain(ingress(vec![rule(vec![pods(with("app", "web"))], vec![])]).into_iter().map(Change::Policy)),
    );
    let (bits, slots) = (node.maps.bits.clone(), node.maps.slots.clone());
    let transition = node.change([Change::Pod(Pod { node: None, ..pod("y/more", 8, &[("app", "more")], vec![]) })]);
    assert_eq!((transition.prepare.len(), transition.settle.len()), (2, 2), "{transition:?}");
    assert_eq!((&node.maps.bits, &node.maps.slots), (&bits, &slots));
    let transition = node.change([Change::Pod(Pod { node: None, ..pod("x/more", 9, &[("app", "web")], vec![]) })]);
    assert_eq!(node.maps.bits, bits, "a pod of a known kind needs no bits");
    let revisions = node.maps.slots.values().filter(|word| word.revision == node.maps.epoch).count();
    assert_eq!(revisions, 2, "one pod, on both sides: {transition:?}");
    assert!(node.change(fixture()).is_empty(), "unchanged input is no work");
}
