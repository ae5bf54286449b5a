//! The six kinds of ways through a node, traced: every step in its order, with br_netfilter and without, in both families.

use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::scenario::{self, SERVICE_PORT, Scenario, matrix};
use proxy_tests::tracer::{TracedPacket, Tracer};
use proxy_tests::traffic::tcp_exchange;
use proxy_tests::{ClusterSpec, Family, Netns, NodeSpec};

/// A way: who asks, how the first packet and its answer go through `node1`, and which hooks of IP they pass.
struct Flow {
    name: &'static str,
    /// Selection for the trace.
    select: fn(&Scenario, Family) -> Vec<String>,
    from: fn(&Scenario) -> Netns,
    to: fn(&Scenario, Family) -> SocketAddr,
    request: Path,
    reply: Path,
}

/// What is seen of a packet.
struct Path {
    steps: &'static [&'static str],
    ending: &'static str,
    /// Hooks of IP without br_netfilter, and with it.
    hooks: [&'static [&'static str]; 2],
    /// br_netfilter takes part, where it is on.
    bridged: bool,
}

const NODE_PORT: u16 = 30_081;

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

fn netns(scenario: &Scenario, name: &str) -> Netns {
    scenario.netns(name).expect("a namespace")
}

fn flows() -> [Flow; 6] {
    [
        Flow {
            name: "F1 pod to pod",
            select: |_, _| words(&["pod:default/a", "to", "pod:default/b:8080/tcp"]),
            from: |scenario| netns(scenario, "a"),
            to: |scenario, family| SocketAddr::new(scenario.ip("b", family).expect("an address"), 8080),
            request: Path {
                steps: &[
                    "queue a:eth0 begin",
                    "transmit a:eth0 queue",
                    "receive veth-a wire",
                    "from_pod veth-a direct_new pass",
                    "to_pod veth-b direct pass",
                    "queue veth-b switch",
                    "transmit veth-b queue",
                    "receive b:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&[], &["PRE by br_netfilter", "FWD by br_netfilter", "POST by br_netfilter"]],
                bridged: true,
            },
            reply: Path {
                steps: &[
                    "queue b:eth0 begin",
                    "transmit b:eth0 queue",
                    "receive veth-b wire",
                    "from_pod veth-b direct pass",
                    "to_pod veth-a direct pass",
                    "queue veth-a switch",
                    "transmit veth-a queue",
                    "receive a:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&[], &["PRE by br_netfilter", "FWD by br_netfilter", "POST by br_netfilter"]],
                bridged: true,
            },
        },
        Flow {
            name: "F2 pod to a Service with a backend on the same node",
            select: |_, _| words(&["pod:default/a", "to", "svc:default/to-b"]),
            from: |scenario| netns(scenario, "a"),
            to: |_, family| SocketAddr::new(matrix::vip_of("b", family).expect("a Service"), SERVICE_PORT),
            request: Path {
                steps: &[
                    "queue a:eth0 begin",
                    "transmit a:eth0 queue",
                    "receive veth-a wire",
                    "from_pod veth-a service_new redirect",
                    "to_pod veth-b seen pass",
                    "queue veth-b redirect",
                    "transmit veth-b queue",
                    "receive b:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&[], &[]],
                bridged: false,
            },
            reply: Path {
                steps: &[
                    "queue b:eth0 begin",
                    "transmit b:eth0 queue",
                    "receive veth-b wire",
                    "from_pod veth-b reply redirect",
                    "to_pod veth-a seen pass",
                    "queue veth-a redirect",
                    "transmit veth-a queue",
                    "receive a:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&[], &[]],
                bridged: false,
            },
        },
        Flow {
            name: "F3 pod to a Service with a backend on another node",
            select: |_, _| words(&["pod:default/a", "to", "svc:default/to-d"]),
            from: |scenario| netns(scenario, "a"),
            to: |_, family| SocketAddr::new(matrix::vip_of("d", family).expect("a Service"), SERVICE_PORT),
            request: Path {
                steps: &[
                    "queue a:eth0 begin",
                    "transmit a:eth0 queue",
                    "receive veth-a wire",
                    "from_pod veth-a service_new pass",
                    "receive cni0 up-call",
                    "to_netdev eth0 seen pass",
                    "queue eth0 forward",
                    "transmit eth0 queue",
                ],
                ending: "left-node",
                hooks: [&["PRE", "FWD", "POST"], &["PRE by br_netfilter", "FWD", "POST"]],
                bridged: true,
            },
            reply: Path {
                steps: &[
                    "receive eth0 begin",
                    "from_netdev eth0 seen pass",
                    "queue cni0 forward",
                    "transmit cni0 queue",
                    "to_pod veth-a reply pass",
                    "queue veth-a bridge-out",
                    "transmit veth-a queue",
                    "receive a:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&["PRE", "FWD", "POST"], &["PRE", "FWD", "POST"]],
                bridged: false,
            },
        },
        Flow {
            name: "F4 from outside to a NodePort",
            select: |_, _| words(&["ext", "to", "svc:default/port"]),
            from: |scenario| scenario.cluster().outside().clone(),
            to: |scenario, family| SocketAddr::new(scenario.node(0).ip(family), NODE_PORT),
            request: Path {
                steps: &[
                    "receive eth0 begin",
                    "from_netdev eth0 service_new redirect",
                    "to_pod veth-b seen pass",
                    "queue veth-b redirect",
                    "transmit veth-b queue",
                    "receive b:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&[], &[]],
                bridged: false,
            },
            reply: Path {
                steps: &[
                    "queue b:eth0 begin",
                    "transmit b:eth0 queue",
                    "receive veth-b wire",
                    "from_pod veth-b reply redirect",
                    "to_netdev eth0 seen pass",
                    "queue eth0 redirect",
                    "transmit eth0 queue",
                ],
                ending: "left-node",
                hooks: [&[], &[]],
                bridged: false,
            },
        },
        Flow {
            name: "F5 the node to a pod",
            select: |_, _| words(&["node", "to", "pod:default/b:8080/tcp"]),
            from: |scenario| scenario.node(0).netns().clone(),
            to: |scenario, family| SocketAddr::new(scenario.ip("b", family).expect("an address"), 8080),
            request: Path {
                steps: &[
                    "queue cni0 local-out",
                    "transmit cni0 queue",
                    "to_pod veth-b direct_new pass",
                    "queue veth-b bridge-out",
                    "transmit veth-b queue",
                    "receive b:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&["OUT", "POST"], &["OUT", "POST"]],
                bridged: false,
            },
            reply: Path {
                steps: &[
                    "queue b:eth0 begin",
                    "transmit b:eth0 queue",
                    "receive veth-b wire",
                    "from_pod veth-b direct pass",
                    "receive cni0 up-call",
                ],
                ending: "delivered",
                hooks: [&["PRE", "IN"], &["PRE by br_netfilter", "IN"]],
                bridged: true,
            },
        },
        Flow {
            name: "F6 the node to a Service, translated at its socket",
            select: |_, _| words(&["node", "to", "svc:default/to-b"]),
            from: |scenario| scenario.node(0).netns().clone(),
            to: |_, family| SocketAddr::new(matrix::vip_of("b", family).expect("a Service"), SERVICE_PORT),
            request: Path {
                steps: &[
                    "connect node socket pass",
                    "queue cni0 local-out",
                    "transmit cni0 queue",
                    "to_pod veth-b direct_new pass",
                    "queue veth-b bridge-out",
                    "transmit veth-b queue",
                    "receive b:eth0 wire",
                ],
                ending: "delivered",
                hooks: [&["OUT", "POST"], &["OUT", "POST"]],
                bridged: false,
            },
            reply: Path {
                steps: &[
                    "queue b:eth0 begin",
                    "transmit b:eth0 queue",
                    "receive veth-b wire",
                    "from_pod veth-b direct pass",
                    "receive cni0 up-call",
                ],
                ending: "delivered",
                hooks: [&["PRE", "IN"], &["PRE by br_netfilter", "IN"]],
                bridged: true,
            },
        },
    ]
}

/// Two nodes with a pod or two, and a Service for each; a NodePort in front of `b`.
fn build() -> Scenario {
    let spec =
        ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b"])).node(NodeSpec::new("node2").pods(["d"]));
    let scenario = matrix::scenario_of(&spec, &[]).expect("scenario");
    let service = scenario::service("port", 120).node_port(NODE_PORT);
    scenario.publish_service(&service, &["b"]).expect("published");
    scenario.wait_endpoints(0, "port", Some(1)).expect("known");
    scenario
}

/// What a trace tells of a packet.
#[derive(Debug, PartialEq, Eq)]
struct Found {
    is_reply: bool,
    steps: Vec<String>,
    ending: String,
    hooks: Vec<String>,
    bridged: bool,
    touched: bool,
}

impl Path {
    fn expected(&self, br_netfilter: bool, is_reply: bool) -> Found {
        let bridged = self.bridged && br_netfilter;
        Found {
            is_reply,
            steps: words(self.steps),
            ending: self.ending.to_owned(),
            hooks: words(self.hooks[usize::from(br_netfilter)]),
            bridged,
            // Nothing is registered on these nodes: only br_netfilter itself touches packets.
            touched: bridged,
        }
    }
}

fn found(packet: &TracedPacket, rename: impl Fn(&str) -> String) -> Found {
    let end = packet.end();
    Found {
        is_reply: packet.is_reply(),
        steps: packet.steps(rename),
        ending: end["result"].as_str().unwrap_or_default().to_owned(),
        hooks: hooks(packet),
        bridged: end["bridge_nf"] == true,
        touched: end["netfilter"] == true,
    }
}

/// Hooks of IP that a packet passed.
fn hooks(packet: &TracedPacket) -> Vec<String> {
    let all = packet.all("hook").into_iter().filter(|line| line["pf"] != "bridge");
    all.map(|line| {
        let by = if line["via"] == "br_netfilter" { " by br_netfilter" } else { "" };
        format!("{}{by}", line["hook"].as_str().unwrap_or_default())
    })
    .collect()
}

#[test]
fn ways_are_seen_step_by_step() {
    let scenario = build();
    let veth = |pod: &str| scenario.cluster().pod(pod).expect("a pod").host_veth().name.clone();
    let (a, b) = (veth("a"), veth("b"));
    let rename = |device: &str| {
        if device == a {
            "veth-a"
        } else if device == b {
            "veth-b"
        } else {
            device
        }
        .to_owned()
    };
    let mut wrong = Vec::new();
    for on in [false, true] {
        scenario.node(0).set_br_netfilter(on).expect("set");
        for flow in flows() {
            for family in Family::BOTH {
                let mut args: Vec<String> = (flow.select)(&scenario, family);
                args.extend(words(&["-c", "2", "--for", "10s", "--first-of-flow", "-o", "ndjson"]));
                let args: Vec<&str> = args.iter().map(String::as_str).collect();
                let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
                tcp_exchange(&(flow.from)(&scenario), (flow.to)(&scenario, family), 100, 100).expect("an exchange");
                let traced = tracer.finish(Duration::from_secs(20)).expect("the end");
                let case = format!("{}, {family}, br_netfilter {on}", flow.name);
                let mut packets = traced.packets();
                packets.sort_by_key(TracedPacket::is_reply);
                let found: Vec<Found> = packets.iter().map(|packet| found(packet, rename)).collect();
                let expected = vec![flow.request.expected(on, false), flow.reply.expected(on, true)];
                if found != expected || traced.code != Some(0) {
                    let said = format!("{:?} {}", traced.code, traced.err);
                    wrong.push(format!("{case}: {said}\n{found:#?}\nexpected\n{expected:#?}"));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
