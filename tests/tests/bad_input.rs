//! What is wrong is named, object and field, and everything else keeps working.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};

use proxy_tests::agent::{run_refused, run_until_said};
use proxy_tests::cluster::Links;
use proxy_tests::manifests::{Endpoint, EndpointSlice, Object as _, Service, ServicePort, yaml};
use proxy_tests::scenario::matrix::{self, Setting, vip_of};
use proxy_tests::scenario::views::ServiceRow;
use proxy_tests::scenario::{SERVICE_PORT, Scenario, TARGET_PORT, service, vip};
use proxy_tests::traffic::{UdpOptions, tcp_exchange, udp_exchange};
use proxy_tests::{AgentOptions, Deadline, Family, Node, command};

const SETTING: Setting = Setting { links: Links::Routed, hostile: true, rp_filter: true };

/// The healthy Services work, with connections of their own.
fn assert_healthy(scenario: &Scenario, after: &str) {
    for client in ["a", "node1"] {
        let netns = scenario.netns(client).expect("namespace");
        for (server, family) in [("b", Family::V4), ("b", Family::V6), ("d", Family::V4), ("d", Family::V6)] {
            let target = SocketAddr::new(vip_of(server, family).expect("a Service"), SERVICE_PORT);
            let report = tcp_exchange(&netns, target, 1000, 1000).unwrap_or_else(|error| panic!("{after}: {error}"));
            assert_eq!(report.server_name, server, "{after}");
            let report = udp_exchange(&netns, target, &UdpOptions::default());
            assert_eq!(report.unwrap_or_else(|error| panic!("{after}: {error}")).server_name, server, "{after}");
        }
    }
}

/// A manifest and the words that the agent's warning about it has.
struct Case {
    name: &'static str,
    text: String,
    words: Vec<String>,
}

fn case(name: &'static str, text: impl Into<String>, words: &[&str]) -> Case {
    Case { name, text: text.into(), words: words.iter().map(|&word| word.to_owned()).collect() }
}

fn slice_of(name: &str, endpoints: &[&str]) -> Value {
    let mut slice = service(name, 150).slice(Family::V4, &[]).to_json();
    slice["endpoints"] = endpoints.iter().map(|ip| json!({ "addresses": [ip] })).collect();
    slice
}

/// A Service with its slice, as one file.
fn with_slice(name: &str, endpoints: &[&str]) -> String {
    yaml(&service(name, 150).to_json()) + "---\n" + &yaml(&slice_of(name, endpoints))
}

fn service_with(name: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut json = service(name, 150).to_json();
    change(&mut json);
    yaml(&json)
}

fn cases(pod_a: IpAddr) -> Vec<Case> {
    let broken =
        "apiVersion: v1\nkind: Service\nmetadata:\n  name: broken-text\n  namespace: default\nspec:\n  ports: [\n";
    let backend = |name: &'static str, ip: &str| {
        let words = [&format!("EndpointSlice default/{name}-ipv4"), "endpoints[0].addresses[0]", ip];
        case(name, with_slice(name, &[ip]), &words.map(|word| word as &str))
    };
    vec![
        case("broken-text", broken, &["broken-text.yaml", "Service default/broken-text", "broken near line"]),
        case("not-yaml", "\u{7f}ELF\0\0\0", &["not-yaml.yaml"]),
        case("no-kind", "apiVersion: v1\nmetadata:\n  name: x\n", &["no-kind.yaml", "kind"]),
        case(
            "wrong-type",
            service_with("wrong-type", |json| json["spec"]["ports"][0]["port"] = json!("eighty")),
            &["wrong-type.yaml", "Service default/wrong-type", "spec.ports[0].port"],
        ),
        case(
            "wrong-shape",
            service_with("wrong-shape", |json| json["spec"]["ports"] = json!(80)),
            &["wrong-shape.yaml", "Service default/wrong-shape", "spec.ports"],
        ),
        case(
            "no-ports",
            service_with("no-ports", |json| json["spec"]["ports"] = json!([])),
            &["no-ports.yaml", "Service default/no-ports", "spec.ports", "at least one port"],
        ),
        case(
            "port-zero",
            service_with("port-zero", |json| json["spec"]["ports"][1]["port"] = json!(0)),
            &["Service default/port-zero", "spec.ports[1].port"],
        ),
        case(
            "unknown-protocol",
            service_with("unknown-protocol", |json| json["spec"]["ports"][1]["protocol"] = json!("QUIC")),
            &["Service default/unknown-protocol", "spec.ports[1].protocol"],
        ),
        case(
            "fqdn",
            {
                let mut slice = slice_of("fqdn", &["backend.example"]);
                slice["addressType"] = json!("FQDN");
                yaml(&slice)
            },
            &["EndpointSlice default/fqdn-ipv4", "addressType", "FQDN"],
        ),
        backend("not-an-address", "10.244.0"),
        backend("loopback-backend", "127.0.0.1"),
        backend("link-local-backend", "169.254.1.1"),
        backend("multicast-backend", "224.0.0.1"),
        backend("unspecified-backend", "0.0.0.0"),
        backend("other-family-backend", "fd00::1"),
        case(
            "vip-of-a-pod",
            yaml(
                &Service::new("vip-of-a-pod", &[pod_a], vec![ServicePort::tcp("", TARGET_PORT, TARGET_PORT)]).to_json(),
            ),
            &["Service default/vip-of-a-pod", "spec.clusterIPs[0]", &pod_a.to_string()],
        ),
        case(
            "same-vip",
            // The Service of `b` has it.
            yaml(&service("same-vip", 102).to_json()),
            &["Service default/same-vip", "spec.ports[0]", "10.96.0.102"],
        ),
    ]
}

#[test]
fn each_bad_manifest_is_named_and_harms_nobody() {
    let scenario = matrix::scenario(SETTING, &[]).expect("scenario");
    let [a, b] = ["a", "b"].map(|name| scenario.cluster().pod(name).expect("pod"));
    let before = scenario.services(0).expect("services");
    for Case { name, text, words } in cases(a.ip4()) {
        let file = format!("{name}.yaml");
        scenario.manifests().write_text(&file, &text).expect("written");
        let words: Vec<&str> = ["WARN"].into_iter().chain(words.iter().map(String::as_str)).collect();
        scenario.wait_logged(0, &words).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_healthy(&scenario, name);
        if name == "vip-of-a-pod" {
            let direct = SocketAddr::new(a.ip4(), TARGET_PORT);
            assert_eq!(tcp_exchange(b.netns(), direct, 10, 10).expect("TCP").server_name, "a");
        }
        scenario.manifests().remove_file(&file).expect("removed");
        let back = || scenario.services(0).is_ok_and(|rows| rows == before);
        Deadline::secs(10).until("it is gone again", back).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    // All at once, and to an agent that starts with them.
    let mut scenario = scenario;
    for Case { name, text, .. } in cases(a.ip4()) {
        scenario.manifests().write_text(&format!("{name}.yaml"), &text).expect("written");
    }
    scenario.agent_mut(0).restart().expect("healthy all the same");
    assert_healthy(&scenario, "all at once");
}

#[test]
fn unusual_objects_work() {
    let scenario = matrix::scenario(SETTING, &[]).expect("scenario");
    let [a, b] = ["a", "b"].map(|name| scenario.cluster().pod(name).expect("pod"));
    let rows = |name: &str| {
        let prefix = format!("default/{name}");
        let all = scenario.services(0).unwrap_or_default();
        all.into_iter().filter(|row| row.service.as_ref().is_some_and(|s| s.starts_with(&prefix))).collect::<Vec<_>>()
    };

    // One endpoint in two slices is one backend.
    let twice = service("twice", 160);
    let slice = scenario.slice(&twice, Family::V4, &["b"]).expect("slice");
    scenario.manifests().write(&twice).expect("written");
    scenario.manifests().write(&slice).expect("written");
    scenario.manifests().write(&EndpointSlice { name: "twice-again".to_owned(), ..slice }).expect("written");
    let once = || {
        let rows = rows("twice");
        let v4 = rows.iter().filter(|row| row.address.is_ipv4());
        v4.map(|row| row.backends.clone()).collect::<Vec<_>>() == vec![vec![SocketAddr::new(b.ip4(), TARGET_PORT)]; 2]
    };
    Deadline::secs(10).until("each backend once", once).expect("once");

    // Numbers with leading zeros, which old objects have, are decimal.
    let mut zeros = service("zeros", 163).to_json();
    zeros["spec"]["clusterIP"] = json!("010.096.000.163");
    zeros["spec"]["clusterIPs"] = json!(["010.096.000.163"]);
    zeros["spec"]["ipFamilies"] = json!(["IPv4"]);
    let IpAddr::V4(ip) = b.ip4() else { unreachable!("IPv4") };
    let padded = ip.octets().map(|number| format!("{number:03}")).join(".");
    let slice = slice_of("zeros", &[&padded]);
    scenario.manifests().write_all("zeros.yaml", &[zeros, slice]).expect("written");
    let decimal = |row: &ServiceRow| (row.address.ip(), row.backends[..].first().map(SocketAddr::ip));
    let read = || rows("zeros").iter().map(decimal).collect::<Vec<_>>() == [(vip(Family::V4, 163), Some(b.ip4())); 2];
    Deadline::secs(10).until("both addresses are read", read).expect("read");
    let target = SocketAddr::new(vip(Family::V4, 163), SERVICE_PORT);
    assert_eq!(tcp_exchange(a.netns(), target, 10, 10).expect("TCP").server_name, "b");

    // A slice of 1,000 endpoints.
    let many = service("many", 161);
    let mut slice = scenario.slice(&many, Family::V4, &[]).expect("slice");
    let others = proxy_tests::Network { ip: IpAddr::from([10, 245, 0, 0]), len: 16 };
    slice.endpoints = (0..1000).map(|n| Endpoint::at(others.host(n))).collect();
    scenario.manifests().write(&many).expect("written");
    scenario.manifests().write(&slice).expect("written");
    let thousand = || rows("many").iter().filter(|row| row.selected == 1000 && row.address.is_ipv4()).count() == 2;
    Deadline::secs(60).until("1,000 endpoints on two ports", thousand).expect("known");

    // 100 ports, each of which answers.
    let ports: Vec<_> = (0..100).map(|n| ServicePort::tcp(&format!("p{n}"), 1000 + n, TARGET_PORT)).collect();
    let wide = Service::new("wide", &Family::BOTH.map(|family| vip(family, 162)), ports);
    scenario.manifests().write(&wide).expect("written");
    for family in Family::BOTH {
        scenario.manifests().write(&scenario.slice(&wide, family, &["b"]).expect("slice")).expect("written");
    }
    let hundred = || rows("wide").iter().filter(|row| row.selected == 1).count() == 200;
    Deadline::secs(60).until("100 ports in two families", hundred).expect("known");
    for family in Family::BOTH {
        for n in [0, 1, 50, 99] {
            let target = SocketAddr::new(vip(family, 162), 1000 + n);
            assert_eq!(tcp_exchange(a.netns(), target, 10, 10).expect("TCP").server_name, "b");
        }
    }
    assert_healthy(&scenario, "large objects");
}

#[test]
fn a_foreign_program_on_the_veth_is_told_and_works() {
    let scenario = matrix::scenario(SETTING, &[]).expect("scenario");
    let veth = scenario.cluster().pod("a").expect("pod").host_veth().name.clone();
    let node = scenario.node(0);
    node.run("tc", &["qdisc", "add", "dev", &veth, "clsact"]).expect("clsact");
    let filter = ["filter", "add", "dev", &veth, "ingress", "prio", "10", "protocol", "all", "u32"];
    node.run("tc", &[&filter[..], &["match", "u32", "0", "0", "flowid", "1:1"]].concat()).expect("filter");
    let switched = || {
        let devices = scenario.devices(0).unwrap_or_default();
        devices.iter().any(|device| device.name.as_ref() == Some(&veth) && device.path == "switch")
    };
    Deadline::secs(10).until("the device list tells", switched).expect("told");
    assert_healthy(&scenario, "foreign filter");
}

#[test]
fn an_agent_that_cannot_work_says_why() {
    let mut scenario = matrix::scenario(SETTING, &[]).expect("scenario");
    let node = scenario.node(0);
    let options: AgentOptions = scenario.options().args(["--healthz-bind-address", "none"]);
    let fails = |node: &Node, root: &Path, words: &[&str]| {
        let refused = run_refused(node, &[], root, &options).expect("it ends");
        assert_eq!(refused.status.and_then(|status| status.code()), Some(1), "{refused:?}");
        let missing: Vec<_> = words.iter().filter(|word| !refused.said.contains(*word)).collect();
        assert!(missing.is_empty(), "{missing:?} not in {}", refused.said);
    };

    // No bpffs.
    let tmpfs = node.state_dir().join("no-bpffs");
    fails(node, &tmpfs, &["is not on a bpf file system", "mount -t bpf"]);
    assert!(!tmpfs.exists(), "nothing is made there");

    // Not root: neither where it may not pin, nor where it may.
    let beside = |what: &str| PathBuf::from(format!("{}-{what}", node.pin_root().display()));
    let own = beside("nobody");
    std::fs::create_dir(&own).expect("directory");
    let nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--inh-caps=-all"];
    let forbidden = run_refused(node, &nobody, &own, &options);
    let given = std::os::unix::fs::chown(&own, Some(65_534), Some(65_534));
    let powerless = run_refused(node, &nobody, &own, &options);
    let removed = std::fs::remove_dir_all(&own);
    given.expect("given away");
    removed.expect("removed");
    for refused in [forbidden, powerless].map(|refused| refused.expect("it ends")) {
        assert_eq!(refused.status.and_then(|status| status.code()), Some(1), "{refused:?}");
        let named = ["not permitted", "run as root", "CAP_BPF", "CAP_NET_ADMIN"];
        assert!(named.iter().all(|word| refused.said.contains(word)), "{}", refused.said);
    }

    // No source: it may come, so the agent waits for it and says so.
    let none = AgentOptions { source: "dir:/run/proxy-tests/absent".to_owned(), ..options.clone() };
    let empty = beside("empty");
    let refused = run_until_said(node, &empty, &none, "/run/proxy-tests/absent").expect("it ends or is ended");
    let cleaned = command::output(
        Command::new(proxy_tests::agent::find_binary().expect("binary")).arg("cleanup").arg("--pin-root").arg(&empty),
    );
    assert!(refused.said.contains("/run/proxy-tests/absent"), "{}", refused.said);
    cleaned.expect("cleanup");

    // A pinned map of another layout, under one of our names.
    scenario.agent_mut(0).kill9().expect("killed");
    let root = scenario.agent(0).pin_root().to_owned();
    let maps = std::fs::read_dir(&root).expect("pins").next().expect("a version").expect("entry").path().join("maps");
    let (ours, aside) = (maps.join("frontend"), maps.join("frontend-aside"));
    std::fs::rename(&ours, &aside).expect("moved");
    let words = ["map", "create", &ours.to_string_lossy(), "type", "hash", "key", "4", "value", "4"];
    let created = ["entries", "8", "name", "foreign"];
    command::output(Command::new("bpftool").args([&words[..], &created[..]].concat())).expect("bpftool");
    let path = ours.display().to_string();
    fails(scenario.node(0), &root, &["pinned map", &path, "somebody else made it", "proxy-agent cleanup"]);
    assert_healthy(&scenario, "a foreign map beside the programs");
    std::fs::remove_file(&ours).expect("removed");
    std::fs::rename(&aside, &ours).expect("moved");
    scenario.agent_mut(0).restart().expect("healthy");
    assert_healthy(&scenario, "its own map again");
}
