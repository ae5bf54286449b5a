//! What is dropped, why and where: told by the trace of the packet, by the table of drops, and beforehand by `trace why`, which then
//! sends one itself.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use proxy_tests::packet::{Frame, L4, Udp};
use proxy_tests::policy_manifest::{PodObject, namespace, network_policy};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::scenario::{self, SERVICE_PORT, Scenario, TARGET_PORT, matrix};
use proxy_tests::tracer::{self, Tracer};
use proxy_tests::{ClusterSpec, Deadline, Family, Netns, NodeSpec};
use serde_json::{Value, json};

/// The first cause that `trace why` names: its check, and words of what was found and of the fix.
struct Why {
    cause: &'static str,
    found: &'static str,
    fix: &'static str,
}

/// A NetworkPolicy in force.
struct Policy {
    name: &'static str,
    spec: fn() -> Value,
    /// As `endpoint list` shows it for pods `a` and `b`.
    in_force: [&'static str; 2],
}

/// A packet that does not arrive.
struct Drop {
    name: &'static str,
    /// Makes it so, in the node.
    prepare: &'static [&'static [&'static str]],
    /// Undoes that.
    restore: &'static [&'static [&'static str]],
    /// The pod that sends.
    client: &'static str,
    target: fn(&Scenario, Family) -> SocketAddr,
    /// Bytes of the datagram.
    bytes: usize,
    families: &'static [Family],
    reason: &'static str,
    class: &'static str,
    /// A word of the advice.
    advice: &'static str,
    is_ours: bool,
    why: Why,
    policy: Option<Policy>,
    /// The sender gives another pod's address for its own.
    is_spoofed: bool,
}

const EMPTY: u16 = 130;
const LOCAL: u16 = 131;

fn vip(host: u16, family: Family) -> SocketAddr {
    SocketAddr::new(scenario::vip(family, host), SERVICE_PORT)
}

fn outside(scenario: &Scenario, family: Family) -> SocketAddr {
    SocketAddr::new(scenario.cluster().outside_ip(family), 9)
}

fn pod(scenario: &Scenario, name: &str, family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(scenario.ip(name, family).expect("an address"), port)
}

/// An address of the pods' network that nobody has.
fn nobody(scenario: &Scenario, family: Family) -> IpAddr {
    scenario.node(0).pod_cidr(family).host(200)
}

fn drops() -> Vec<Drop> {
    let both: &'static [Family] = &Family::BOTH;
    let why = |cause, found, fix| Why { cause, found, fix };
    let base = |name, reason, class, advice, why| Drop {
        name,
        prepare: &[],
        restore: &[],
        client: "a",
        target: outside,
        bytes: 20,
        families: both,
        reason,
        class,
        advice,
        is_ours: false,
        why,
        policy: None,
        is_spoofed: false,
    };
    vec![
        Drop {
            target: |_, family| vip(EMPTY, family),
            is_ours: true,
            ..base(
                "no endpoints",
                "no_backend",
                "own-service",
                "no ready endpoint",
                why("endpoints", "Service default/empty:udp has no ready endpoint", "EndpointSlices"),
            )
        },
        Drop {
            target: |_, family| vip(LOCAL, family),
            is_ours: true,
            ..base(
                "policy Local without one here",
                "no_local_backend",
                "own-service",
                "Local",
                why("endpoints", "Service default/local:udp is Local", "set the traffic policy to Cluster"),
            )
        },
        Drop {
            target: |scenario, family| pod(scenario, "b", family, 9),
            ..base(
                "nobody listens",
                "NO_SOCKET",
                "l4",
                "listens",
                why("listener", "nobody listens on 9/udp in default/b", "start the process"),
            )
        },
        Drop {
            target: |scenario, family| pod(scenario, "b", family, TARGET_PORT),
            is_ours: true,
            policy: Some(Policy {
                name: "default-deny",
                spec: || json!({ "podSelector": {}, "policyTypes": ["Ingress"] }),
                in_force: ["ingress"; 2],
            }),
            ..base(
                "default deny",
                "policy_ingress",
                "own-policy",
                "no rule of default/default-deny",
                why("ingress", "default/default-deny", "add an ingress rule from default/a"),
            )
        },
        Drop {
            target: |scenario, family| pod(scenario, "b", family, TARGET_PORT),
            is_ours: true,
            policy: Some(Policy {
                name: "other-port",
                spec: || {
                    let ports = json!([{ "protocol": "UDP", "port": TARGET_PORT + 1 }]);
                    json!({ "podSelector": { "matchLabels": { "pod": "b" } },
                        "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "pod": "a" } } }], "ports": ports }] })
                },
                in_force: ["open", "ingress"],
            }),
            ..base(
                "a rule is near",
                "policy_ingress",
                "own-policy",
                "no rule of default/other-port",
                why("ingress", "ingress[0]", "add an ingress rule from default/a"),
            )
        },
        Drop {
            target: |scenario, family| pod(scenario, "b", family, TARGET_PORT),
            is_ours: true,
            is_spoofed: true,
            policy: Some(Policy {
                name: "open",
                spec: || json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Egress"], "egress": [{}] }),
                in_force: ["egress", "open"],
            }),
            ..base(
                "somebody else's address",
                "frame_source",
                "own-policy",
                "not its own",
                why("source", "is no address of default/a", "its own address"),
            )
        },
        Drop {
            prepare: &[
                &["nft", "add table inet trace_test"],
                &["nft", "add chain inet trace_test forwards { type filter hook forward priority 0; policy drop; }"],
            ],
            restore: &[&["nft", "delete table inet trace_test"]],
            ..base(
                "FORWARD policy DROP",
                "NETFILTER_DROP",
                "netfilter",
                "rule of netfilter",
                why("netfilter", "trace_test/forwards at FORWARD drops", "policy accept"),
            )
        },
        Drop {
            prepare: &[&["sysctl", "-qw", "net.ipv4.ip_forward=0"]],
            restore: &[&["sysctl", "-qw", "net.ipv4.ip_forward=1"]],
            families: &[Family::V4],
            ..base(
                "ip_forward is 0",
                "",
                "route",
                "ip_forward",
                why("forwarding", "net.ipv4.ip_forward is 0", "sysctl -w net.ipv4.ip_forward=1"),
            )
        },
        Drop {
            prepare: &[
                &["sysctl", "-qw", "net.ipv4.conf.cni0.rp_filter=1"],
                &["ip", "rule add from all lookup 99 priority 5"],
                &["ip", "route add 10.244.0.0/24 dev eth0 table 99"],
            ],
            restore: &[
                &["ip", "rule del priority 5"],
                &["ip", "route flush table 99"],
                &["sysctl", "-qw", "net.ipv4.conf.cni0.rp_filter=0"],
            ],
            families: &[Family::V4],
            ..base(
                "the way back leads elsewhere",
                "IP_RPFILTER",
                "route",
                "rp_filter",
                why("rp_filter", "strict at cni0", "net.ipv4.conf.cni0.rp_filter=2"),
            )
        },
        Drop {
            target: |scenario, family| SocketAddr::new(nobody(scenario, family), 9),
            ..base(
                "nobody answers for the address",
                "",
                "neigh",
                "ARP",
                why("neighbour", "no pod of this node has", "ip neigh show"),
            )
        },
        Drop {
            prepare: &[&["ip", "link set eth0 mtu 1280"]],
            restore: &[&["ip", "link set eth0 mtu 1500"]],
            bytes: 1400,
            ..base(
                "bigger than the next link carries",
                "PKT_TOO_BIG",
                "route",
                "MTU",
                why("mtu", "the next link (eth0) carries 1280", "make the MTUs equal"),
            )
        },
    ]
}

fn build() -> Scenario {
    let spec =
        ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b"])).node(NodeSpec::new("node2").pods(["d"]));
    let scenario = matrix::scenario_of(&spec, &[]).expect("scenario");
    let udp = |name: &str, host| scenario::service(name, host);
    scenario.publish_service(&udp("empty", EMPTY), &[]).expect("published");
    scenario.publish_service(&udp("local", LOCAL).internal_local(), &["d"]).expect("published");
    scenario.wait_endpoints(0, "empty", Some(0)).expect("known");
    scenario.wait_endpoints(0, "local", Some(0)).expect("known");
    scenario.manifests().write(&namespace("default", &[])).expect("written");
    for pod in scenario.cluster().pods() {
        scenario.manifests().write(&PodObject::of(&pod).label("pod", pod.name())).expect("written");
    }
    scenario
}

/// Waits until this is in force for pods `a` and `b`.
fn wait_policy(scenario: &Scenario, in_force: [&str; 2]) {
    let known = || {
        let list: Value =
            serde_json::from_str(&scenario.agent(0).cli(&["endpoint", "list", "-o", "json"]).ok()?).ok()?;
        let of = |name: &str| {
            let veth = scenario.cluster().pod(name).ok()?.host_veth().name.clone();
            let row = list["items"].as_array()?.iter().find(|row| row["interface"] == veth.as_str())?.clone();
            row["policy"].as_str().map(str::to_owned)
        };
        Some([of("a")?, of("b")?])
    };
    let reached = Deadline::secs(20).until("policy is in force", || known().is_some_and(|known| known == in_force));
    reached.unwrap_or_else(|error| panic!("{error}: {:?}, not {in_force:?}", known()));
}

/// What `trace why` has to say of it, and how it ended.
fn explained(scenario: &Scenario, drop: &Drop, family: Family) -> (Option<i32>, Value, String) {
    let target = (drop.target)(scenario, family);
    let (to, port) = (target.ip().to_string(), format!("{}/udp", target.port()));
    let header = if family == Family::V4 { 28 } else { 48 };
    let (size, source) = ((drop.bytes + header).to_string(), nobody(scenario, family).to_string());
    let mut args = vec!["why", "pod:default/a", "to", &to, &port, "-o", "ndjson"];
    if drop.bytes > 1000 {
        args.extend(["--size", &size]);
    }
    if drop.is_spoofed {
        args.extend(["--source", &source]);
    }
    let said = tracer::run(scenario.node(0), &args).expect("an answer");
    (said.code, said.one("answer"), format!("{}{}", said.out, said.err))
}

/// What becomes of a real packet that `trace why` sends, where it agrees with what it says.
fn injected(scenario: &Scenario, drop: &Drop, family: Family) -> (Option<i32>, Value, String) {
    let target = (drop.target)(scenario, family);
    let (to, port) = (target.ip().to_string(), format!("{}/udp", target.port()));
    let size = (drop.bytes + if family == Family::V4 { 28 } else { 48 }).to_string();
    let args = ["why", "pod:default/a", "to", &to, &port, "--size", &size, "--inject", "-o", "ndjson"];
    let said = tracer::run(scenario.node(0), &args).expect("an answer");
    let real = said.one("real");
    (said.code, json!([real["result"], real["agrees"]]), format!("{}{}", said.out, said.err))
}

/// Sends as somebody else.
fn lie(scenario: &Scenario, from: &str, target: SocketAddr, family: Family) {
    let (liar, other) = (scenario.cluster().pod(from).expect("a pod"), scenario.cluster().pod("b").expect("a pod"));
    let udp = L4::Udp(Udp { src: 5_000, dst: target.port(), checksum: true, payload: vec![7; 20] });
    let frame = Frame::ip((liar.mac(), nobody(scenario, family)), (other.mac(), target.ip()), udp);
    RawSocket::open(liar.netns(), "eth0").expect("a socket").send(&frame.build()).expect("sent");
}

/// Sends a datagram; what is answered, if anything, is not the question here.
fn send(netns: &Netns, target: SocketAddr, bytes: usize) {
    let sent = netns.run(|| {
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))
            .and_then(|socket| if target.is_ipv4() { UdpSocket::bind("0.0.0.0:0") } else { Ok(socket) })?;
        socket.send_to(&vec![7; bytes], target)
    });
    sent.expect("a namespace").expect("sent");
}

fn run_all(scenario: &Scenario, commands: &[&[&str]]) {
    for command in commands {
        let [program, line] = command else {
            scenario.node(0).run(command[0], &command[1..]).expect("a command");
            continue;
        };
        let words: Vec<&str> = line.split(' ').collect();
        scenario.node(0).run(program, &words).unwrap_or_else(|error| panic!("{program} {line}: {error}"));
    }
}

#[test]
fn every_drop_is_named_with_its_cause_and_what_to_do() {
    let scenario = build();
    let mut wrong = Vec::new();
    for drop in drops() {
        run_all(&scenario, drop.prepare);
        let object = drop.policy.as_ref().map(|policy| network_policy("default", policy.name, &(policy.spec)()));
        if let (Some(policy), Some(object)) = (&drop.policy, &object) {
            scenario.manifests().write(object).expect("written");
            wait_policy(&scenario, policy.in_force);
        }
        for family in drop.families {
            let target = (drop.target)(&scenario, *family);
            let expression = format!("dst host {} or src host {}", target.ip(), target.ip());
            // A pod is known by its addresses: who does not use them is found by its interface.
            let veth = format!("dev:{}", scenario.cluster().pod("a").expect("a pod").host_veth().name);
            let args = [
                if drop.is_spoofed { veth.as_str() } else { "pod:default/a" },
                "-f",
                &expression,
                "--drops",
                "-c",
                "1",
                "--for",
                "30s",
                "-o",
                "ndjson",
                "--no-replies",
            ];
            let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
            let table = Tracer::start(scenario.node(0), &["drops", "--for", "1s"]);
            assert!(table.is_err(), "one trace at a time");
            let netns = scenario.netns(drop.client).expect("a namespace");
            if drop.is_spoofed {
                lie(&scenario, drop.client, target, *family);
            } else {
                send(&netns, target, drop.bytes);
            }
            let traced = tracer.finish(Duration::from_mins(1)).expect("the end");
            let line = traced.one("drop");
            let text = |name: &str| line[name].as_str().unwrap_or_default().to_owned();
            let good = traced.code == Some(0)
                && (drop.reason.is_empty() || text("reason") == drop.reason)
                && text("class") == drop.class
                && text("advice").contains(drop.advice)
                && line["ours"] == drop.is_ours;
            if !good {
                wrong.push(format!("{}, {family}: {:?} {line} {}", drop.name, traced.code, traced.err));
            }
            let (code, answer, said) = explained(&scenario, &drop, *family);
            let text = |name: &str| answer[name].as_str().unwrap_or_default().to_owned();
            let near = answer["details"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let found = std::iter::once(text("found")).chain(near.map(str::to_owned)).collect::<Vec<_>>().join("\n");
            let Why { cause, found: words, fix } = drop.why;
            if code != Some(1) || text("cause") != cause || !found.contains(words) || !text("fix").contains(fix) {
                wrong.push(format!("why: {}, {family}: {code:?} {said}", drop.name));
            }
            // Nobody sends for the pod what it must not send.
            if !drop.is_spoofed {
                let (code, real, said) = injected(&scenario, &drop, *family);
                if (code, &real) != (Some(1), &json!(["dropped", true])) {
                    wrong.push(format!("inject: {}, {family}: {code:?} {said}", drop.name));
                }
            }
        }
        if let Some(object) = &object {
            scenario.manifests().remove(object).expect("removed");
            wait_policy(&scenario, ["none"; 2]);
        }
        run_all(&scenario, drop.restore);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_groups_them() {
    let scenario = build();
    let netns = scenario.netns("a").expect("a namespace");
    let table = Tracer::start(scenario.node(0), &["drops", "--once", "--for", "8s", "--json"]).expect("a table");
    for _ in 0..3 {
        send(&netns, vip(EMPTY, Family::V4), 20);
        let nobody = SocketAddr::new(scenario.ip("b", Family::V4).expect("an address"), 9);
        send(&netns, nobody, 20);
    }
    let traced = table.finish(Duration::from_mins(1)).expect("the end");
    let items = traced.lines().first().map(|line| line["items"].clone()).unwrap_or_default();
    let of = |reason: &str| {
        let found = items.as_array().into_iter().flatten().find(|item| item["reason"] == reason);
        found.unwrap_or_else(|| panic!("no {reason} in {items:#}")).clone()
    };
    let ours = of("no_backend");
    assert!(ours["packets"].as_u64() >= Some(3) && ours["place"] == "from_pod", "{ours}");
    let kernels = of("NO_SOCKET");
    assert!(kernels["packets"].as_u64() >= Some(3), "{kernels}");
    assert_eq!(kernels["device"], "default/b eth0");
    let a: IpAddr = scenario.ip("a", Family::V4).expect("an address");
    let last = kernels["last"].as_str().unwrap_or_default();
    assert!(last.starts_with(&format!("udp default/a ({a}:")) && last.contains("→ default/b ("), "{last}");
}

#[test]
fn hooks_are_listed_and_their_absence_is_told() {
    let scenario = build();
    let none = tracer::run(scenario.node(0), &["hooks"]).expect("a list");
    assert_eq!(none.code, Some(0), "{}", none.err);
    assert!(none.out.contains("no hook has an entry that looks at packets"), "{}", none.out);
    run_all(
        &scenario,
        &[
            &["nft", "add table inet trace_test"],
            &["nft", "add chain inet trace_test forwards { type filter hook forward priority -7; }"],
        ],
    );
    let some = tracer::run(scenario.node(0), &["hooks", "--json"]).expect("a list");
    let items = some.lines().first().map(|line| line["items"].clone()).unwrap_or_default();
    let hooks = items[0]["hooks"].as_array().cloned().unwrap_or_default();
    let chain: Vec<String> = hooks
        .iter()
        .filter(|hook| hook["passing"] == false)
        .map(|hook| format!("{} {} {} {}", hook["family"], hook["hook"], hook["priority"], hook["chain"]))
        .collect();
    let expected = ["ip", "ip6"].map(|family| format!("\"{family}\" \"FWD\" -7 \"trace_test/forwards\""));
    assert_eq!(chain, expected, "{items:#}");
}
