//! What Kubernetes' own tests of NetworkPolicy expect (test/e2e/network/netpol): 42 over TCP, 3 over UDP. Only what is
//! expected is theirs: names, and who reaches whom.

use std::net::IpAddr;

use proxy_tests::Family;
use proxy_tests::traffic::Transport;
use serde_json::{Value, json};

use crate::stage::Expect;

/// A test of theirs.
pub(crate) struct Scenario {
    pub(crate) name: &'static str,
    pub(crate) steps: Vec<Step>,
}

/// What is done, and what is to be seen then.
pub(crate) struct Step {
    pub(crate) changes: Vec<Change>,
    pub(crate) expects: Vec<Expect>,
}

/// What is done.
pub(crate) enum Change {
    /// A policy is as given: namespace, name, `spec`.
    Apply(&'static str, &'static str, Value),
    /// A policy is deleted.
    Delete(&'static str, &'static str),
    /// A pod gets a label.
    LabelPod(&'static str, &'static str, &'static str),
    /// A namespace gets a label.
    LabelNamespace(&'static str, &'static str, &'static str),
}

type Rules = Vec<(&'static str, &'static str, bool)>;

const NO: bool = false;
const YES: bool = true;

fn tcp(port: u16, rules: Rules) -> Expect {
    Expect { transport: Transport::Tcp, port, rules }
}

fn udp(port: u16, rules: Rules) -> Expect {
    Expect { transport: Transport::Udp, port, rules }
}

fn apply(name: &'static str, spec: Value) -> Change {
    Change::Apply("x", name, spec)
}

fn step(changes: Vec<Change>, expects: Vec<Expect>) -> Step {
    Step { changes, expects }
}

/// One policy in namespace x, seen on TCP 80.
fn one(name: &'static str, spec: Value, rules: Rules) -> Scenario {
    Scenario { name, steps: vec![step(vec![apply("policy", spec)], vec![tcp(80, rules)])] }
}

fn labels(name: &str, value: &str) -> Value {
    json!({ "matchLabels": { name: value } })
}

fn expression(name: &str, operator: &str, values: &[&str]) -> Value {
    json!({ "matchExpressions": [{ "key": name, "operator": operator, "values": values }] })
}

fn pods(selector: &Value) -> Value {
    json!({ "podSelector": selector })
}

fn namespaces(selector: &Value) -> Value {
    json!({ "namespaceSelector": selector })
}

fn both(namespaces: &Value, pods: &Value) -> Value {
    json!({ "namespaceSelector": namespaces, "podSelector": pods })
}

/// A policy for pod a that lets in these peers.
fn from(peers: &[Value]) -> Value {
    json!({ "podSelector": labels("pod", "a"), "policyTypes": ["Ingress"], "ingress": [{ "from": peers }] })
}

/// The same on some ports.
fn from_on(peers: &[Value], ports: &[Value]) -> Value {
    let rule = if peers.is_empty() { json!({ "ports": ports }) } else { json!({ "from": peers, "ports": ports }) };
    json!({ "podSelector": labels("pod", "a"), "policyTypes": ["Ingress"], "ingress": [rule] })
}

/// A policy for pod a that lets it out to these peers.
fn to(peers: &[Value]) -> Value {
    json!({ "podSelector": labels("pod", "a"), "policyTypes": ["Egress"], "egress": [{ "to": peers }] })
}

/// A policy for all pods with these rules.
fn all(direction: &str, rules: &Value) -> Value {
    let field = direction.to_lowercase();
    json!({ "podSelector": {}, "policyTypes": [direction], field: rules })
}

/// All of them. `ip` gives a pod's address.
pub(crate) fn scenarios(ip: &dyn Fn(&str, Family) -> IpAddr) -> Vec<Scenario> {
    let mut scenarios = selectors();
    scenarios.extend(ports());
    scenarios.extend(changes());
    scenarios.extend(egress());
    scenarios.extend(blocks(ip));
    scenarios.extend(protocols());
    scenarios.extend(over_udp());
    scenarios
}

fn selectors() -> Vec<Scenario> {
    let deny_all = json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"] });
    let anyone_in =
        json!({ "podSelector": labels("pod", "a"), "ingress": [{ "from": [both(&json!({}), &json!({}))] }] });
    vec![
        one("should support a 'default-deny-ingress' policy", all("Ingress", &json!([])), vec![("*", "x/*", NO)]),
        one("should support a 'default-deny-all' policy", deny_all, vec![("*", "x/*", NO), ("x/*", "*", NO)]),
        one(
            "should enforce policy to allow traffic from pods within server namespace based on PodSelector",
            from(&[pods(&labels("pod", "b"))]),
            vec![("*", "x/a", NO), ("x/b", "x/a", YES)],
        ),
        Scenario {
            name: "should enforce policy to allow ingress traffic for a target",
            steps: vec![step(
                vec![apply("deny-all", all("Ingress", &json!([]))), apply("allow-all-to-a", anyone_in)],
                vec![tcp(80, vec![("*", "x/*", NO), ("*", "x/a", YES)])],
            )],
        },
        one(
            "should enforce policy to allow ingress traffic from pods in all namespaces",
            from(&[namespaces(&json!({}))]),
            vec![],
        ),
        one(
            "should enforce policy to allow traffic only from a different namespace, based on NamespaceSelector",
            from(&[namespaces(&labels("ns", "y"))]),
            vec![("x/*", "x/a", NO), ("z/*", "x/a", NO)],
        ),
        one(
            "should enforce policy based on PodSelector with MatchExpressions",
            from(&[pods(&expression("pod", "In", &["b"]))]),
            vec![("*", "x/a", NO), ("x/b", "x/a", YES)],
        ),
        one(
            "should enforce policy based on NamespaceSelector with MatchExpressions",
            from(&[namespaces(&expression("ns", "In", &["y"]))]),
            vec![("x/*", "x/a", NO), ("z/*", "x/a", NO)],
        ),
        one(
            "should enforce policy based on PodSelector or NamespaceSelector",
            from(&[namespaces(&expression("ns", "NotIn", &["x"])), pods(&labels("pod", "b"))]),
            vec![("x/*", "x/a", NO), ("x/b", "x/a", YES)],
        ),
        one(
            "should enforce policy based on PodSelector and NamespaceSelector",
            from(&[both(&expression("ns", "NotIn", &["x"]), &labels("pod", "b"))]),
            vec![("*", "x/a", NO), ("y/b", "x/a", YES), ("z/b", "x/a", YES)],
        ),
        one(
            "should enforce policy based on Multiple PodSelectors and NamespaceSelectors",
            from(&[both(&expression("ns", "NotIn", &["x"]), &expression("pod", "In", &["b", "c"]))]),
            vec![("x/*", "x/a", NO), ("y/a", "x/a", NO), ("z/a", "x/a", NO)],
        ),
        one(
            "should enforce policy based on any PodSelectors",
            from(&[pods(&labels("pod", "b")), pods(&labels("pod", "c"))]),
            vec![("*", "x/a", NO), ("x/b", "x/a", YES), ("x/c", "x/a", YES)],
        ),
        one(
            "should enforce policy to allow traffic only from a pod in a different namespace based on PodSelector and \
             NamespaceSelector",
            from(&[both(&labels("ns", "y"), &labels("pod", "a"))]),
            vec![("*", "x/a", NO), ("y/a", "x/a", YES)],
        ),
        one(
            "should enforce policy to allow traffic based on NamespaceSelector with MatchLabels using default ns label",
            from(&[namespaces(&labels("kubernetes.io/metadata.name", "y"))]),
            vec![("x/*", "x/a", NO), ("z/*", "x/a", NO)],
        ),
        one(
            "should enforce policy based on NamespaceSelector with MatchExpressions using default ns label",
            from(&[namespaces(&expression("kubernetes.io/metadata.name", "NotIn", &["y"]))]),
            vec![("y/*", "x/a", NO)],
        ),
        one(
            "should deny ingress from pods on other namespaces",
            all("Ingress", &json!([{ "from": [pods(&json!({}))] }])),
            vec![("y/*", "x/*", NO), ("z/*", "x/*", NO)],
        ),
    ]
}

fn ports() -> Vec<Scenario> {
    let y = || namespaces(&labels("ns", "y"));
    let on = |port: u16| json!({ "port": port });
    let only_y = || vec![("x/*", "x/a", NO), ("z/*", "x/a", NO)];
    let nobody = || vec![("*", "x/a", NO)];
    let on_81 = || apply("allow-81", from_on(&[y()], &[on(81)]));
    vec![
        Scenario {
            name: "should enforce policy based on Ports",
            steps: vec![step(vec![on_81()], vec![tcp(81, only_y()), tcp(80, nobody())])],
        },
        Scenario {
            name: "should enforce multiple, stacked policies with overlapping podSelectors",
            steps: vec![
                step(vec![on_81()], vec![tcp(81, only_y()), tcp(80, nobody())]),
                step(vec![apply("allow-80", from_on(&[y()], &[on(80)]))], vec![tcp(81, only_y()), tcp(80, only_y())]),
            ],
        },
        Scenario {
            name: "should support allow-all policy",
            steps: vec![step(
                vec![apply("allow-all", all("Ingress", &json!([{}])))],
                vec![tcp(80, vec![]), tcp(81, vec![])],
            )],
        },
        Scenario {
            name: "should allow ingress access on one named port",
            steps: vec![step(
                vec![apply("named", from_on(&[], &[json!({ "port": "serve-81-tcp" })]))],
                vec![tcp(81, vec![]), tcp(80, nobody())],
            )],
        },
        Scenario {
            name: "should allow ingress access from namespace on one named port",
            steps: vec![step(
                vec![apply("named", from_on(&[y()], &[json!({ "port": "serve-80-tcp" })]))],
                vec![tcp(80, only_y()), tcp(81, nobody())],
            )],
        },
        Scenario {
            name: "should enforce multiple ingress policies with ingress allow-all policy taking precedence",
            steps: vec![
                step(
                    vec![apply("allow-80", all("Ingress", &json!([{ "ports": [on(80)] }])))],
                    vec![tcp(80, vec![]), tcp(81, vec![("*", "x/*", NO)])],
                ),
                step(vec![apply("allow-all", all("Ingress", &json!([{}])))], vec![tcp(81, vec![])]),
            ],
        },
    ]
}

fn changes() -> Vec<Scenario> {
    let nobody = || vec![tcp(80, vec![("*", "x/a", NO)])];
    let target = json!({ "podSelector": labels("target", "isolated"), "policyTypes": ["Ingress"] });
    let deny_all = json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"] });
    vec![
        Scenario {
            name: "should enforce updated policy",
            steps: vec![
                step(vec![apply("mutable", all("Ingress", &json!([{}])))], vec![tcp(81, vec![])]),
                step(vec![apply("mutable", all("Ingress", &json!([])))], vec![tcp(81, vec![("*", "x/*", NO)])]),
            ],
        },
        Scenario {
            name: "should allow ingress access from updated namespace",
            steps: vec![
                step(vec![apply("updated", from(&[namespaces(&labels("ns2", "updated"))]))], nobody()),
                step(
                    vec![Change::LabelNamespace("y", "ns2", "updated")],
                    vec![tcp(80, vec![("*", "x/a", NO), ("y/*", "x/a", YES)])],
                ),
            ],
        },
        Scenario {
            name: "should allow ingress access from updated pod",
            steps: vec![
                step(vec![apply("updated", from(&[pods(&labels("pod2", "updated"))]))], nobody()),
                step(
                    vec![Change::LabelPod("x-b", "pod2", "updated")],
                    vec![tcp(80, vec![("*", "x/a", NO), ("x/b", "x/a", YES)])],
                ),
            ],
        },
        Scenario {
            name: "should deny ingress access to updated pod",
            steps: vec![
                step(vec![apply("isolated", target)], vec![tcp(80, vec![])]),
                step(vec![Change::LabelPod("x-a", "target", "isolated")], nobody()),
            ],
        },
        Scenario {
            name: "should stop enforcing policies after they are deleted",
            steps: vec![
                step(vec![apply("deny-all", deny_all)], vec![tcp(80, vec![("*", "x/*", NO), ("x/*", "*", NO)])]),
                step(vec![Change::Delete("x", "deny-all")], vec![tcp(80, vec![])]),
            ],
        },
    ]
}

fn egress() -> Vec<Scenario> {
    let on = |port: u16| json!({ "port": port });
    let a = || labels("pod", "a");
    let y_a = || both(&labels("ns", "y"), &labels("pod", "a"));
    let in_and_out = json!({
        "podSelector": a(), "policyTypes": ["Ingress", "Egress"],
        "ingress": [{ "from": [pods(&labels("pod", "b"))] }],
        "egress": [{ "ports": [on(80)] }],
    });
    let from_x_a = |pod: &str| {
        let from = both(&labels("ns", "x"), &labels("pod", "a"));
        json!({ "podSelector": labels("pod", pod), "policyTypes": ["Ingress"], "ingress": [{ "from": [from] }] })
    };
    let named =
        json!({ "podSelector": a(), "policyTypes": ["Egress"], "egress": [{ "ports": [{ "port": "serve-80-tcp" }] }] });
    vec![
        Scenario {
            name: "should allow egress access on one named port",
            steps: vec![step(vec![apply("named", named)], vec![tcp(80, vec![]), tcp(81, vec![("x/a", "*", NO)])])],
        },
        one(
            "should deny egress from pods based on PodSelector",
            json!({ "podSelector": a(), "policyTypes": ["Egress"] }),
            vec![("x/a", "*", NO)],
        ),
        one("should deny egress from all pods in a namespace", all("Egress", &json!([])), vec![("x/*", "*", NO)]),
        Scenario {
            name: "should work with Ingress, Egress specified together",
            steps: vec![step(
                vec![apply("together", in_and_out)],
                vec![
                    tcp(80, vec![("*", "x/a", NO), ("x/b", "x/a", YES)]),
                    tcp(81, vec![("*", "x/a", NO), ("x/b", "x/a", YES), ("x/a", "*", NO)]),
                ],
            )],
        },
        Scenario {
            name: "should support denying of egress traffic on the client side (even if the server explicitly allows this \
                   traffic)",
            steps: vec![step(
                vec![
                    apply("to-y-a", to(&[y_a()])),
                    Change::Apply("y", "from-x-a-to-a", from_x_a("a")),
                    Change::Apply("y", "from-x-a-to-b", from_x_a("b")),
                ],
                vec![tcp(80, vec![("x/a", "*", NO), ("*", "y/a", NO), ("*", "y/b", NO), ("x/a", "y/a", YES)])],
            )],
        },
        one(
            "should enforce egress policy allowing traffic to a server in a different namespace based on PodSelector and \
             NamespaceSelector",
            to(&[y_a()]),
            vec![("x/a", "*", NO), ("x/a", "y/a", YES)],
        ),
        Scenario {
            name: "should enforce multiple egress policies with egress allow-all policy taking precedence",
            steps: vec![
                step(
                    vec![apply("allow-80", all("Egress", &json!([{ "ports": [on(80)] }])))],
                    vec![tcp(80, vec![]), tcp(81, vec![("x/*", "*", NO)])],
                ),
                step(vec![apply("allow-all", all("Egress", &json!([{}])))], vec![tcp(81, vec![])]),
            ],
        },
        Scenario {
            name: "should enforce policies to check ingress and egress policies can be controlled independently based on \
                   PodSelector",
            steps: vec![step(
                vec![
                    apply("to-b", to(&[pods(&labels("pod", "b"))])),
                    apply("deny-in", json!({ "podSelector": a(), "policyTypes": ["Ingress"] })),
                ],
                vec![tcp(80, vec![("x/a", "*", NO), ("*", "x/a", NO), ("x/a", "x/b", YES)])],
            )],
        },
    ]
}

fn blocks(ip: &dyn Fn(&str, Family) -> IpAddr) -> Vec<Scenario> {
    let exact = |pod: &str, family| format!("{}/{}", ip(pod, family), if family == Family::V4 { 32 } else { 128 });
    // Not canonical, as the API lets it in: host bits are set.
    let wide = |pod: &str, family| format!("{}/4", ip(pod, family));
    let block = |pod: &str| Family::BOTH.map(|family| json!({ "ipBlock": { "cidr": exact(pod, family) } }));
    let but = |pod: &str| {
        let except = |family| json!({ "ipBlock": { "cidr": wide(pod, family), "except": [exact(pod, family)] } });
        Family::BOTH.map(except)
    };
    let not_b = || vec![tcp(80, vec![("x/a", "x/b", NO)])];
    vec![
        one(
            "should allow egress access to server in CIDR block",
            to(&block("y-b")),
            vec![("x/a", "*", NO), ("x/a", "y/b", YES)],
        ),
        Scenario {
            name: "should enforce except clause while egress access to server in CIDR block",
            steps: vec![step(vec![apply("except", to(&but("x-b")))], not_b())],
        },
        Scenario {
            name: "should ensure an IP overlapping both IPBlock.CIDR and IPBlock.Except is allowed",
            steps: vec![
                step(vec![apply("except", to(&but("x-b")))], not_b()),
                step(vec![apply("allow", to(&block("x-b")))], vec![tcp(80, vec![])]),
            ],
        },
    ]
}

fn protocols() -> Vec<Scenario> {
    let on = |port: u16, protocol: &str| json!({ "port": port, "protocol": protocol });
    let nobody = || vec![("*", "x/a", NO)];
    vec![
        Scenario {
            name: "should enforce ingress policy allowing any port traffic to a server on a specific protocol",
            steps: vec![step(
                vec![apply("tcp", from_on(&[], &[json!({ "protocol": "TCP" })]))],
                vec![tcp(80, vec![]), tcp(81, vec![]), udp(80, nobody())],
            )],
        },
        Scenario {
            name: "should not mistakenly treat 'protocol: SCTP' as 'protocol: TCP', even if the plugin doesn't support SCTP",
            steps: vec![
                step(vec![apply("sctp", from_on(&[], &[on(80, "SCTP")]))], vec![tcp(80, nobody()), tcp(81, nobody())]),
                step(vec![apply("tcp", from_on(&[], &[on(81, "TCP")]))], vec![tcp(80, nobody()), tcp(81, vec![])]),
            ],
        },
        Scenario {
            name: "should properly isolate pods that are selected by a policy allowing SCTP, even if the plugin doesn't \
                   support SCTP",
            steps: vec![step(
                vec![apply("sctp", from_on(&[namespaces(&labels("ns", "y"))], &[on(80, "SCTP")]))],
                vec![tcp(80, nobody()), udp(80, nobody())],
            )],
        },
        Scenario {
            name: "should not allow access by TCP when a policy specifies only UDP",
            steps: vec![step(
                vec![apply("udp", from_on(&[], &[on(81, "UDP")]))],
                vec![tcp(81, nobody()), udp(81, vec![]), udp(80, nobody())],
            )],
        },
    ]
}

fn over_udp() -> Vec<Scenario> {
    let on_81 = from_on(&[namespaces(&labels("ns", "y"))], &[json!({ "port": 81, "protocol": "UDP" })]);
    let y_a = both(&labels("ns", "y"), &labels("pod", "a"));
    vec![
        Scenario {
            name: "UDP: should support a 'default-deny-ingress' policy",
            steps: vec![step(vec![apply("deny", all("Ingress", &json!([])))], vec![udp(80, vec![("*", "x/*", NO)])])],
        },
        Scenario {
            name: "UDP: should enforce policy based on Ports",
            steps: vec![step(
                vec![apply("allow-81", on_81)],
                vec![udp(81, vec![("x/*", "x/a", NO), ("z/*", "x/a", NO)]), udp(80, vec![("*", "x/a", NO)])],
            )],
        },
        Scenario {
            name: "UDP: should enforce policy to allow traffic only from a pod in a different namespace based on \
                   PodSelector and NamespaceSelector",
            steps: vec![step(
                vec![apply("y-a", from(&[y_a]))],
                vec![udp(80, vec![("*", "x/a", NO), ("y/a", "x/a", YES)])],
            )],
        },
    ]
}
