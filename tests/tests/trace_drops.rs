//! What is dropped, why and where: told by the trace of the packet and by the table of drops.

use std::net::{IpAddr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use proxy_tests::scenario::{self, SERVICE_PORT, Scenario, matrix};
use proxy_tests::tracer::{self, Tracer};
use proxy_tests::{ClusterSpec, Family, Netns, NodeSpec};

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
}

const EMPTY: u16 = 130;
const LOCAL: u16 = 131;

fn vip(host: u16, family: Family) -> SocketAddr {
    SocketAddr::new(scenario::vip(family, host), SERVICE_PORT)
}

fn outside(scenario: &Scenario, family: Family) -> SocketAddr {
    SocketAddr::new(scenario.cluster().outside_ip(family), 9)
}

fn drops() -> Vec<Drop> {
    let both: &'static [Family] = &Family::BOTH;
    let base = |name, reason, class, advice| Drop {
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
    };
    vec![
        Drop {
            target: |_, family| vip(EMPTY, family),
            is_ours: true,
            ..base("no endpoints", "no_backend", "own-service", "no ready endpoint")
        },
        Drop {
            target: |_, family| vip(LOCAL, family),
            is_ours: true,
            ..base("policy Local without one here", "no_local_backend", "own-service", "Local")
        },
        Drop {
            target: |scenario, family| SocketAddr::new(scenario.ip("b", family).expect("an address"), 9),
            ..base("nobody listens", "NO_SOCKET", "l4", "listens")
        },
        Drop {
            prepare: &[
                &["nft", "add table inet trace_test"],
                &["nft", "add chain inet trace_test forwards { type filter hook forward priority 0; policy drop; }"],
            ],
            restore: &[&["nft", "delete table inet trace_test"]],
            ..base("FORWARD policy DROP", "NETFILTER_DROP", "netfilter", "rule of netfilter")
        },
        Drop {
            prepare: &[&["sysctl", "-qw", "net.ipv4.ip_forward=0"]],
            restore: &[&["sysctl", "-qw", "net.ipv4.ip_forward=1"]],
            families: &[Family::V4],
            ..base("ip_forward is 0", "", "route", "ip_forward")
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
            ..base("the way back leads elsewhere", "IP_RPFILTER", "route", "rp_filter")
        },
        Drop {
            target: |scenario, family| {
                let network = scenario.node(0).pod_cidr(family);
                SocketAddr::new(network.host(200), 9)
            },
            ..base("nobody answers for the address", "", "neigh", "ARP")
        },
        Drop {
            prepare: &[&["ip", "link set eth0 mtu 1280"]],
            restore: &[&["ip", "link set eth0 mtu 1500"]],
            bytes: 1400,
            ..base("bigger than the next link carries", "PKT_TOO_BIG", "route", "MTU")
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
    scenario
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
        for family in drop.families {
            let target = (drop.target)(&scenario, *family);
            let expression = format!("dst host {} or src host {}", target.ip(), target.ip());
            let args = [
                "pod:default/a",
                "-f",
                &expression,
                "--drops",
                "-c",
                "1",
                "--for",
                "8s",
                "-o",
                "ndjson",
                "--no-replies",
            ];
            let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
            let table = Tracer::start(scenario.node(0), &["drops", "--for", "1s"]);
            assert!(table.is_err(), "one trace at a time");
            let netns = scenario.netns(drop.client).expect("a namespace");
            send(&netns, target, drop.bytes);
            let traced = tracer.finish(Duration::from_secs(20)).expect("the end");
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
        }
        run_all(&scenario, drop.restore);
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_table_groups_them() {
    let scenario = build();
    let netns = scenario.netns("a").expect("a namespace");
    let table = Tracer::start(scenario.node(0), &["drops", "--once", "--for", "2s", "--json"]).expect("a table");
    for _ in 0..3 {
        send(&netns, vip(EMPTY, Family::V4), 20);
        let nobody = SocketAddr::new(scenario.ip("b", Family::V4).expect("an address"), 9);
        send(&netns, nobody, 20);
    }
    let traced = table.finish(Duration::from_secs(20)).expect("the end");
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
