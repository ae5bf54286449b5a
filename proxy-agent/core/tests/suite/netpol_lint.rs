//! What is told of policies that can be read and hardly do what was meant, in the clusters that [`fixture`] makes.

use proxy_core::netpol::engine::{Engine, Limits};
use proxy_core::netpol::lint::{Finding, findings, rule_name, without_cluster};
use proxy_core::netpol::spec::{Change, PeerSpec, Pod, PolicySpec, PortSpec};
use proxy_core::netpol::tables::PolicyTables;
use proxy_oracle::dice::NODE;

use crate::netpol_rows::{
    all, block, both, egress, fixture, ingress, labels, named, namespaces, object_name, pod, pods, policy, port, rule,
    with,
};

/// One row: policies, and all that is told of them.
struct Case {
    row: &'static str,
    policies: Vec<PolicySpec>,
    told: &'static [&'static str],
}

fn engine(policies: &[PolicySpec]) -> Engine {
    let mut engine = Engine::new(NODE, Limits::default(), PolicyTables::default());
    for change in fixture().into_iter().chain(policies.iter().cloned().map(Change::Policy)) {
        engine.apply(change);
    }
    engine.commit();
    engine
}

fn lines(found: &[Finding]) -> Vec<String> {
    let line = |Finding { policy, rule, flaw }: &Finding| {
        assert!(!flaw.fix().is_empty());
        let rule = rule.map_or_else(|| "whole".to_owned(), |(direction, index)| rule_name(direction, index));
        format!("{policy} {rule} {}: {flaw}", flaw.name())
    };
    found.iter().map(line).collect()
}

fn check(cases: Vec<Case>, lint: impl Fn(&[PolicySpec]) -> Vec<Finding>) {
    for Case { row, policies, told } in cases {
        assert_eq!(lines(&lint(&policies)), told, "{row}");
    }
}

fn with_cluster(policies: &[PolicySpec]) -> Vec<Finding> {
    let engine = engine(policies);
    let found = findings(&engine, None);
    let one_by_one: Vec<_> = policies.iter().flat_map(|policy| findings(&engine, Some(&policy.name))).collect();
    assert_eq!(one_by_one, found, "asked one by one, in their order");
    found
}

/// In namespace `y`, which has no hostNetwork pod.
fn of_y(name: &str, subject: (&str, &str), peers: Vec<PeerSpec>) -> PolicySpec {
    let pod_selector = Some(if subject.0.is_empty() { all() } else { with(subject.0, subject.1) });
    PolicySpec {
        name: object_name(name),
        audit: None,
        pod_selector,
        ingress: Some(vec![rule(peers, vec![port(None, 80)])]),
        ..policy("y/any")
    }
}

#[test]
fn clean_policies_have_no_findings() {
    let policies = vec![
        PolicySpec {
            policy_types: Some(vec!["Ingress".into(), "Egress".into()]),
            ingress: Some(vec![
                rule(vec![pods(with("app", "web"))], vec![named("TCP", "http"), named("TCP", "admin")]),
                rule(vec![block("192.0.2.0/24", &["192.0.2.128/25"])], vec![port(Some("UDP"), 53)]),
                rule(vec![block("10.244.0.0/24", &["10.244.0.0/25"])], vec![port(None, 80)]),
            ]),
            egress: Some(vec![
                rule(vec![namespaces(with("team", "blue"))], vec![named("TCP", "http"), named("UDP", "http")]),
                rule(vec![block("0.0.0.0/0", &[]), block("::/0", &[])], vec![port(None, 443)]),
                rule(vec![], vec![named("UDP", "dns")]),
            ]),
            ..policy("x/p")
        },
        PolicySpec { pod_selector: Some(all()), ingress: Some(vec![]), ..policy("y/deny") },
    ];
    check(vec![Case { row: "clean", policies, told: &[] }], with_cluster);
}

#[test]
fn who_is_meant() {
    let from = |peers| ingress(vec![rule(peers, vec![])]);
    let cases = vec![
        Case {
            row: "a subject that is nobody",
            policies: vec![PolicySpec { pod_selector: Some(with("app", "nobody")), ..policy("x/p") }],
            told: &["x/p whole selects-nobody: it is for pods with app=nobody, and the namespace has none"],
        },
        Case {
            row: "every pod of a namespace that has none",
            policies: vec![PolicySpec { pod_selector: Some(all()), ..policy("empty/p") }],
            told: &["empty/p whole selects-nobody: it is for all pods, and the namespace has none"],
        },
        Case {
            row: "hostNetwork",
            policies: vec![PolicySpec { pod_selector: Some(with("app", "web")), ..policy("x/p") }],
            told: &[
                "x/p whole host-network: it is for 1 hostNetwork pods too, such as x/host, and has no effect on them",
            ],
        },
        Case {
            row: "one peer of two",
            policies: from(vec![pods(with("app", "web")), both(with("team", "blue"), with("app", "db"))]),
            told: &[
                "x/p ingress[0] peer-matches-nobody: its peer \"pods with app=db of namespaces with team=blue\" is no \
                     pod of the cluster",
            ],
        },
        Case {
            row: "all peers",
            policies: from(vec![pods(with("app", "far")), namespaces(with("team", "green"))]),
            told: &["x/p ingress[0] no-peer: it allows nothing: pods with app=far of namespace x or all pods of \
                     namespaces with team=green are no pods of the cluster"],
        },
        Case {
            row: "a range of pods, but for one without them",
            policies: from(vec![block("10.244.0.0/29", &[]), block("10.244.0.0/29", &["10.244.0.0/29"])]),
            told: &[
                "x/p ingress[0] block-of-pods: its range 10.244.0.0/29 holds addresses of pods, such as 10.244.0.1 of \
                 x/web",
                "x/p ingress[0] empty-block: nothing is left of its range 10.244.0.0/29: `except` takes all of it",
            ],
        },
        Case {
            row: "a range excepted in parts",
            policies: from(vec![block("192.0.2.0/24", &["192.0.2.0/25", "192.0.2.128/25"])]),
            told: &["x/p ingress[0] empty-block: nothing is left of its range 192.0.2.0/24: `except` takes all of it"],
        },
    ];
    check(cases, with_cluster);
}

#[test]
fn which_port_is_meant() {
    let to = |peers, name| egress(vec![rule(peers, vec![name])]);
    let end = PortSpec { end_port: Some(90), ..named("TCP", "http") };
    let cases = vec![
        Case {
            row: "a name that the subject has not",
            policies: ingress(vec![
                rule(vec![], vec![port(None, 5432)]),
                rule(vec![pods(with("app", "web"))], vec![named("TCP", "boot")]),
            ]),
            told: &["x/p ingress[1] port-name: no pod that it leads to calls a TCP port \"boot\""],
        },
        Case {
            row: "a name of another protocol",
            policies: ingress(vec![rule(vec![], vec![named("UDP", "http")])]),
            told: &["x/p ingress[0] port-name: no pod that it leads to calls a UDP port \"http\"; there is one of TCP"],
        },
        Case {
            row: "a name that the peers have not",
            policies: to(vec![both(with("team", "blue"), with("app", "web"))], named("UDP", "http")),
            told: &["x/p egress[0] port-name: no pod that it leads to calls a UDP port \"http\"; there is one of TCP"],
        },
        Case {
            row: "a name that nobody has",
            policies: to(vec![], named("SCTP", "http")),
            told: &[
                "x/p egress[0] port-name: no pod that it leads to calls a SCTP port \"http\"; there is one of TCP \
                     and UDP",
            ],
        },
        Case {
            row: "endPort beside a name",
            policies: to(vec![], end),
            told: &["x/p egress[0] unreadable: spec.egress[0].ports[0].endPort: needs a port that is a number"],
        },
    ];
    check(cases, with_cluster);
}

#[test]
fn rules_that_add_nothing() {
    let web = || pods(with("app", "web"));
    let by_first = &["x/p ingress[1] shadowed: it allows nothing that x/p ingress[0] does not allow"];
    let by_second = &["x/p ingress[0] shadowed: it allows nothing that x/p ingress[1] does not allow"];
    let range = PortSpec { end_port: Some(100), ..port(None, 1) };
    let q = |peers, ports| PolicySpec { ingress: Some(vec![rule(peers, ports)]), ..policy("x/q") };
    let halves = || vec![block("192.0.0.0/17", &[]), block("192.0.128.0/17", &[])];
    let cases = vec![
        Case {
            row: "equal rules: the first one stays",
            policies: ingress(vec![rule(vec![web()], vec![port(None, 80)]), rule(vec![web()], vec![port(None, 80)])]),
            told: by_first,
        },
        Case {
            row: "pods of a namespace hold those with a label, a range of ports holds one",
            policies: ingress(vec![
                rule(vec![web()], vec![port(None, 80)]),
                rule(vec![pods(all())], vec![range.clone()]),
            ]),
            told: by_second,
        },
        Case {
            row: "anyone",
            policies: ingress(vec![rule(vec![], vec![port(None, 80)]), rule(vec![web()], vec![port(None, 80)])]),
            told: by_first,
        },
        Case {
            row: "any port",
            policies: ingress(vec![rule(vec![web()], vec![]), rule(vec![web()], vec![named("UDP", "dns")])]),
            told: by_first,
        },
        Case {
            row: "a range of addresses holds its halves",
            policies: ingress(vec![rule(vec![block("192.0.0.0/16", &[])], vec![]), rule(halves(), vec![])]),
            told: by_first,
        },
        Case {
            row: "but not when something is excepted",
            policies: ingress(vec![
                rule(vec![block("192.0.0.0/16", &["192.0.9.0/24"])], vec![]),
                rule(halves(), vec![port(None, 80)]),
            ]),
            told: &[],
        },
        Case {
            row: "peers of one, ports of the other",
            policies: ingress(vec![rule(vec![web()], vec![range]), rule(vec![pods(all())], vec![port(None, 80)])]),
            told: &[],
        },
        Case {
            row: "a name stands for the numbers that pods give it",
            policies: ingress(vec![rule(vec![web()], vec![named("TCP", "http")])])
                .into_iter()
                .chain([q(vec![web()], vec![port(None, 8080), port(None, 8081)])])
                .collect(),
            told: &["x/q ingress[0] shadowed: it allows nothing that x/p ingress[0] does not allow"],
        },
        Case {
            row: "a name of the destination",
            policies: egress(vec![
                rule(vec![both(with("team", "blue"), with("app", "web"))], vec![named("TCP", "http")]),
                rule(vec![namespaces(all())], vec![port(None, 81)]),
            ]),
            told: &["x/p egress[0] shadowed: it allows nothing that x/p egress[1] does not allow"],
        },
        Case {
            row: "another policy",
            policies: vec![of_y("y/p", ("app", "web"), vec![web()]), of_y("y/q", ("", ""), vec![pods(all())])],
            told: &["y/p ingress[0] shadowed: it allows nothing that y/q ingress[0] does not allow"],
        },
        Case {
            row: "another policy, but not for all pods",
            policies: vec![of_y("y/p", ("", ""), vec![web()]), of_y("y/q", ("app", "web"), vec![pods(all())])],
            told: &[],
        },
    ];
    check(cases, with_cluster);
}

#[test]
fn what_is_told_without_a_cluster() {
    let cases = vec![
        Case {
            row: "pods and names that may come",
            policies: ingress(vec![
                rule(vec![pods(with("app", "nobody"))], vec![named("TCP", "nothing")]),
                rule(vec![pods(with("app", "other"))], vec![port(None, 80)]),
                rule(vec![block("10.0.0.0/8", &[])], vec![port(None, 80)]),
            ]),
            told: &[],
        },
        Case {
            row: "what no pod can mend",
            policies: ingress(vec![
                rule(vec![pods(with("app", "web"))], vec![port(None, 80)]),
                rule(vec![], vec![port(None, 80)]),
                rule(vec![block("10.0.0.0/8", &["10.0.0.0/8"])], vec![port(None, 81)]),
                rule(vec![block("10.1.0.0/16", &[])], vec![PortSpec { end_port: Some(90), ..named("TCP", "http") }]),
                rule(vec![block("10.1.0.0/16", &[])], vec![port(None, 82)]),
                rule(vec![block("10.0.0.0/8", &["10.2.0.0/16"])], vec![port(None, 82)]),
            ]),
            told: &[
                "x/p ingress[0] shadowed: it allows nothing that x/p ingress[1] does not allow",
                "x/p ingress[2] empty-block: nothing is left of its range 10.0.0.0/8: `except` takes all of it",
                "x/p ingress[3] unreadable: spec.ingress[3].ports[0].endPort: needs a port that is a number",
                "x/p ingress[4] shadowed: it allows nothing that x/p ingress[5] does not allow",
            ],
        },
    ];
    check(cases, without_cluster);
}

#[test]
fn host_pods_come_and_go() {
    let policies = [PolicySpec { pod_selector: Some(with("app", "web")), ..policy("x/p") }];
    let host = Pod { host_network: true, ..pod("x/host", 0, &[("app", "web")], vec![]) };
    let told = |changes: &[Change]| {
        let mut engine = engine(&policies);
        for change in changes {
            engine.apply(change.clone());
        }
        engine.commit();
        findings(&engine, None).len()
    };
    let cases = [
        ("still there", vec![Change::Pod(host.clone())], 1),
        ("gone", vec![Change::PodGone(host.name.clone())], 0),
        ("ended", vec![Change::Pod(Pod { finished: true, ..host.clone() })], 0),
        ("another pod of this name", vec![Change::Pod(pod("x/host", 9, &[("app", "web")], vec![]))], 0),
        ("relabelled", vec![Change::Pod(Pod { labels: labels(&[("app", "db")]), ..host.clone() })], 0),
        ("gone and back", vec![Change::PodGone(host.name.clone()), Change::Pod(host)], 1),
    ];
    for (row, changes, count) in cases {
        assert_eq!(told(&changes), count, "{row}");
    }
}
