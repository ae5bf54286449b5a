//! Real traffic through Services, with the real agent on simulated nodes.

use std::net::SocketAddr;
use std::time::Instant;

use proxy_tests::cluster::{Links, PodSpec};
use proxy_tests::netfilter::{INVALID_DROP, MASQUERADE4, MASQUERADE6};
use proxy_tests::scenario::matrix::{self, By, Matrix, ROUTED, Seen, Setting, VXLAN, Way, vip_of, way};
use proxy_tests::scenario::{SERVICE_PORT, Scenario, TARGET_PORT};
use proxy_tests::traffic::{TcpServer, UdpOptions, UdpServer, tcp_exchange, udp_exchange};
use proxy_tests::{Deadline, Family};

const PLAIN: Setting = Setting { links: Links::Routed, hostile: false, rp_filter: false };
const HOSTILE: Setting = Setting { links: Links::Routed, hostile: true, rp_filter: true };

/// All ways with every load in both families, with `br_netfilter` off and on as named.
fn run(scenario: &Scenario, setting: Setting, br_netfilter: &[bool], ways: &[Way]) {
    let start = Instant::now();
    let mut matrix = Matrix::new(scenario, setting).expect("counters");
    for &on in br_netfilter {
        for node in scenario.cluster().nodes() {
            node.set_br_netfilter(on).expect("switched");
        }
        matrix.label = format!("{setting}, br_netfilter {}", u8::from(on));
        matrix.run(ways);
    }
    let (cells, failed) = (matrix.cells, matrix.report());
    for node in scenario.cluster().nodes() {
        let rules = node.netfilter_rules().expect("listing");
        let ours = rules.iter().filter(|rule| ![INVALID_DROP, MASQUERADE4, MASQUERADE6].contains(&rule.text.as_str()));
        assert_eq!(ours.count(), 0, "a rule that the node did not start with: {rules:?}");
        let invalid = node.netfilter_packets(INVALID_DROP).expect("listing");
        assert_eq!(invalid, 0, "{setting}: packets that conntrack calls invalid on {}{failed}", node.name());
    }
    eprintln!("{setting}: {cells} cells in {:?}", start.elapsed());
    let expected = br_netfilter.len() * 2 * matrix::loads().len() * ways.len();
    assert_eq!(cells, expected, "every cell runs");
    assert!(failed.is_empty(), "failed cells:{failed}");
}

fn check_matrix(links: Links, hostile: bool, rp_filter: bool, ways: &[Way]) {
    let setting = Setting { links, hostile, rp_filter };
    let scenario = matrix::scenario(setting, &[]).unwrap_or_else(|error| panic!("{setting}: {error}"));
    run(&scenario, setting, &[false, true], ways);
}

#[test]
fn routed_without_netfilter() {
    check_matrix(Links::Routed, false, false, &ROUTED);
}

#[test]
fn routed_with_hostile_rules() {
    check_matrix(Links::Routed, true, false, &ROUTED);
}

#[test]
fn routed_with_hostile_rules_and_rp_filter() {
    check_matrix(Links::Routed, true, true, &ROUTED);
}

#[test]
fn vxlan_without_netfilter() {
    check_matrix(Links::Vxlan, false, false, &VXLAN);
}

#[test]
fn vxlan_with_hostile_rules() {
    check_matrix(Links::Vxlan, true, false, &VXLAN);
}

#[test]
fn vxlan_with_hostile_rules_and_rp_filter() {
    check_matrix(Links::Vxlan, true, true, &VXLAN);
}

#[test]
fn clsact_filters_carry_the_same_traffic() {
    let scenario = matrix::scenario(HOSTILE, &["--attach", "clsact"]).expect("scenario");
    let veth = scenario.cluster().pod("a").expect("pod").host_veth().name.clone();
    for direction in ["ingress", "egress"] {
        let filters = scenario.node(0).run("tc", &["filter", "show", "dev", &veth, direction]).expect("tc");
        assert!(filters.contains("bpf"), "{direction}: {filters}");
    }
    run(&scenario, HOSTILE, &[false], &ROUTED[..4]);
}

/// Waits until the agent has put a pod's interface on this path, and then finds flows of new connections on it.
fn wait_path(scenario: &Scenario, pod: &str, path: &str) {
    let veth = scenario.cluster().pod(pod).expect("pod").host_veth().name.clone();
    let on_path = || {
        let devices = scenario.devices(0).unwrap_or_default();
        devices.iter().any(|device| device.name.as_ref() == Some(&veth) && device.path == path)
    };
    Deadline::secs(10).until(&format!("{pod} takes the {path} path"), on_path).expect("path");
}

/// All flows from `client` to the Service of `server` take this path.
fn assert_flows(scenario: &Scenario, client: &str, server: &str, path: &str) {
    let pod = scenario.cluster().pod(client).expect("pod");
    let flows = scenario.flows(0).expect("flows");
    let mine = |family| {
        let (from, to) = (pod.ip(family), vip_of(server, family).expect("a Service"));
        flows.iter().filter(move |flow| flow.source.ip() == from && flow.destination.ip() == to)
    };
    for family in Family::BOTH {
        let paths: Vec<_> = mine(family).map(|flow| flow.path.as_str()).collect();
        assert!(!paths.is_empty() && paths.iter().all(|found| *found == path), "{family} {path}: {paths:?}");
    }
}

#[test]
fn a_foreign_filter_sees_every_frame() {
    let mut scenario = matrix::scenario(HOSTILE, &[]).expect("scenario");
    let a = scenario.cluster().pod("a").expect("pod");
    wait_path(&scenario, "a", "redirect");
    let node = scenario.node(0);
    // Like a CNI's mirror: every frame in either direction is copied to another device.
    node.netns()
        .ip("link add mirror0 type veth peer name mirror1\nlink set mirror0 up\nlink set mirror1 up\n")
        .expect("ip");
    let veth = &a.host_veth().name;
    node.run("tc", &["qdisc", "add", "dev", veth, "clsact"]).expect("clsact");
    for direction in ["ingress", "egress"] {
        let words = ["filter", "add", "dev", veth, direction, "prio", "10", "protocol", "all", "u32", "match", "u32"];
        let action = ["0", "0", "action", "mirred", "egress", "mirror", "dev", "mirror0"];
        node.run("tc", &[&words[..], &action[..]].concat()).expect("filter");
    }
    wait_path(&scenario, "a", "switch");
    let mirrored = |scenario: &Scenario| {
        let shown = scenario.node(0).run("ip", &["-s", "-j", "link", "show", "dev", "mirror1"]).expect("ip");
        let shown: serde_json::Value = serde_json::from_str(&shown).expect("JSON");
        shown[0]["stats64"]["rx"]["packets"].as_u64().expect("a number")
    };
    let before = mirrored(&scenario);
    let ways = [
        way("from a pod with a foreign filter", "a", "b", By::ClientVeth, Seen::Pod),
        way("to a pod with a foreign filter", "b", "a", By::ClientVeth, Seen::Pod),
        way("from it to another node", "a", "d", By::ClientVeth, Seen::Pod),
    ];
    run(&scenario, HOSTILE, &[false, true], &ways);
    assert_flows(&scenario, "a", "b", "switch");
    assert_flows(&scenario, "b", "a", "switch");
    let seen = mirrored(&scenario) - before;
    assert!(seen > 1000, "the foreign filter saw {seen} frames");

    // The next agent finds it there; and when it goes, the short way is taken again.
    scenario.agent_mut(0).restart().expect("healthy");
    wait_path(&scenario, "a", "switch");
    scenario.node(0).run("tc", &["qdisc", "del", "dev", veth, "clsact"]).expect("removed");
    wait_path(&scenario, "a", "redirect");
}

#[test]
fn an_isolated_port_takes_the_stack() {
    for (setting, br_netfilter) in [(PLAIN, &[false, true][..]), (HOSTILE, &[true][..])] {
        let mut spec = matrix::cluster(setting);
        spec.nodes[0].pods = vec![PodSpec::new("a").isolated(true), PodSpec::new("b")];
        let scenario = matrix::scenario_of(&spec, &[]).expect("scenario");
        wait_path(&scenario, "a", "stack");
        let ways = [
            way("from an isolated port", "a", "b", By::ClientVeth, Seen::Pod),
            way("to an isolated port", "b", "a", By::ClientVeth, Seen::Pod),
            way("an isolated port to itself", "a", "a", By::BothVeths, Seen::Bridge),
        ];
        run(&scenario, setting, br_netfilter, &ways);
        assert_flows(&scenario, "a", "b", "stack");
        assert_flows(&scenario, "b", "a", "stack");
    }
}

#[test]
fn a_pod_that_adds_another_pods_address_gets_none_of_its_traffic() {
    let mut spec = matrix::cluster(PLAIN);
    spec.nodes[0].pods.push(PodSpec::new("thief"));
    let mut scenario = matrix::scenario_of(&spec, &[]).expect("scenario");
    let [a, b, thief] = ["a", "b", "thief"].map(|name| scenario.cluster().pod(name).expect("pod"));
    let tcp = TcpServer::start(thief.netns(), "thief", TARGET_PORT).expect("server");
    let udp = UdpServer::start(thief.netns(), "thief", TARGET_PORT).expect("server");
    for family in Family::BOTH {
        thief.add_address(b.ip(family)).expect("added");
        let words = ["WARN", &thief.host_veth().name, &b.ip(family).to_string()];
        scenario.wait_logged(0, &words).expect("the agent names both");
    }
    let ask = || {
        for family in Family::BOTH {
            let target = SocketAddr::new(vip_of("b", family).expect("a Service"), SERVICE_PORT);
            for _ in 0..20 {
                assert_eq!(tcp_exchange(a.netns(), target, 100, 100).expect("TCP").server_name, "b");
                let report = udp_exchange(a.netns(), target, &UdpOptions::default()).expect("UDP");
                assert_eq!(report.server_name, "b");
            }
        }
    };
    ask();
    scenario.agent_mut(0).restart().expect("healthy");
    ask();
    // The address stays bound to its owner.
    for family in Family::BOTH {
        let bound = scenario.devices(0).expect("devices");
        let owner = bound.iter().find(|device| [device.ipv4, device.ipv6].contains(&Some(b.ip(family))));
        assert_eq!(owner.and_then(|owner| owner.name.clone()).as_ref(), Some(&b.host_veth().name));
    }
    assert_eq!((tcp.accepted(), udp.answered()), (0, 0), "what the thief got");
}
