//! Services, ports and files that cannot be as they are written: named to whoever can mend it, and nobody else harmed.

use std::fs;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use serde_json::json;

use proxy_tests::agent::{http_get, run_refused};
use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::manifests::{Service, ServicePort, service_cidr_object};
use proxy_tests::scenario::{OUTSIDE, SERVICE_PORT, Scenario, TARGET_PORT, service, vip};
use proxy_tests::traffic::{Answer, Transport, probe};
use proxy_tests::{AgentOptions, Deadline, Family};

const PATIENCE: Duration = Duration::from_secs(4);
/// Flow tables that `status` has counted at once.
const SMALL: [&str; 4] = ["--flow-live-entries", "4096", "--flow-brief-entries", "4096"];

fn scenario(args: &[&str]) -> Scenario {
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b", "c"])).node(NodeSpec::new("node2"));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    for pod in ["b", "c"] {
        scenario.serve_pod(pod).expect("servers");
    }
    scenario.manifests().write(&service_cidr_object()).expect("written");
    scenario.publish("healthy", 1, &["b"]).expect("published");
    scenario.start_agents(&[&SMALL[..], args].concat()).expect("agents");
    scenario
}

fn answered(scenario: &Scenario, origin: &str, target: SocketAddr, transport: Transport) -> String {
    let netns = scenario.netns(origin).expect("an origin");
    match probe(&netns, target, transport, PATIENCE).expect("asked") {
        Answer::From { server, .. } => server,
        other => other.to_string(),
    }
}

fn assert_healthy(scenario: &Scenario, after: &str) {
    for family in Family::BOTH {
        for transport in Transport::BOTH {
            for origin in ["a", "node1"] {
                let got = answered(scenario, origin, SocketAddr::new(vip(family, 1), SERVICE_PORT), transport);
                assert_eq!(got, "b", "{family} {transport} from {origin} after {after}");
            }
        }
    }
}

fn logged(scenario: &Scenario, words: &[&str]) -> String {
    scenario.wait_logged(0, words).unwrap_or_else(|error| panic!("{error}"))
}

const EXTERNAL: [&str; 2] = ["203.0.113.9", "2001:db8:1::9"];

/// The first of two Services keeps an address or port, over a restart of the agent, too; the other one is told who has it,
/// and gets it when the first goes.
#[test]
fn the_first_keeps_a_frontend_and_the_other_waits() {
    let mut scenario = scenario(&[]);
    let external = EXTERNAL.map(|ip| ip.parse::<IpAddr>().expect("an address"));
    let same = |service: Service| service.external_ips(&external).node_port(30_090);
    // Named so that the order of names is not that of time.
    let (first, second) = (same(service("zebra", 11)), same(service("ant", 12)));
    scenario.publish_service(&first, &["b"]).expect("published");
    scenario.wait_endpoints(0, "zebra", Some(1)).expect("known");
    scenario.publish_service(&second, &["c"]).expect("published");
    scenario.wait_endpoints(0, "ant", Some(1)).expect("known");
    for ip in EXTERNAL {
        logged(
            &scenario,
            &["WARN", "Service default/ant", "spec.externalIPs", ip, "belongs to Service default/zebra:tcp"],
        );
    }
    logged(&scenario, &["WARN", "Service default/ant", "spec.ports[0].nodePort", "30090", "Service default/zebra:tcp"]);
    logged(&scenario, &["WARN", "Service default/ant", "spec.ports[1].nodePort", "30090", "Service default/zebra:udp"]);
    let check = |scenario: &Scenario, by: &str, own: &[(u16, &str)], when: &str| {
        for (family, external) in Family::BOTH.into_iter().zip(external) {
            let node = scenario.node(0).ip(family);
            for transport in Transport::BOTH {
                for (origin, ip, port) in
                    [("a", external, SERVICE_PORT), ("node1", external, SERVICE_PORT), (OUTSIDE, node, 30_090)]
                {
                    let got = answered(scenario, origin, SocketAddr::new(ip, port), transport);
                    assert_eq!(got, by, "{when}: {family} {transport} from {origin}");
                }
                for (host, server) in own {
                    let target = SocketAddr::new(vip(family, *host), SERVICE_PORT);
                    assert_eq!(answered(scenario, "a", target, transport), *server, "{when}: its own address");
                }
            }
        }
    };
    check(&scenario, "b", &[(11, "b"), (12, "c")], "both are there");
    scenario.agent_mut(0).restart().expect("healthy");
    check(&scenario, "b", &[(11, "b"), (12, "c")], "after a restart");
    scenario.manifests().remove(&first).expect("removed");
    scenario.wait_endpoints(0, "zebra", None).expect("gone");
    check(&scenario, "c", &[(12, "c")], "the first is gone");
    assert_healthy(&scenario, "a conflict");
}

/// Addresses that belong to the cluster or the node are no external ones, whoever writes them (CVE-2020-8554).
#[test]
fn external_addresses_of_the_cluster_are_refused() {
    let scenario = scenario(&[]);
    scenario.publish("victim", 13, &["c"]).expect("published");
    scenario.wait_endpoints(0, "victim", Some(1)).expect("known");
    let node = scenario.node(0);
    for family in Family::BOTH {
        let of_family = |v4: &str, v6: &str| -> IpAddr {
            let text = if family == Family::V4 { v4 } else { v6 };
            text.parse().expect("an address")
        };
        let cases = [
            ("victim", vip(family, 13), "cluster address of Service default/victim"),
            ("range", vip(family, 777), "the range of ServiceCIDR kubernetes"),
            ("node", node.ip(family), "an address of this node"),
            ("bridge", node.bridge_ip(family), "range of pod addresses"),
            ("pod", node.pod_cidr(family).host(200), "range of pod addresses"),
            ("link-local", of_family("169.254.169.254", "fe80::9"), "link-local address"),
            ("loopback", of_family("127.0.0.9", "::1"), "loopback address"),
            ("multicast", of_family("224.0.0.9", "ff02::9"), "multicast address"),
        ];
        for (name, ip, words) in cases {
            let name = format!("takes-{name}-{}", if family == Family::V4 { 4 } else { 6 });
            let thief = service(&name, 14).external_ips(&[ip]);
            scenario.publish_service(&thief, &["b"]).expect("published");
            logged(
                &scenario,
                &["WARN", &format!("Service default/{name}"), "spec.externalIPs", &ip.to_string(), words],
            );
            scenario.wait_endpoints(0, &name, Some(1)).expect("its own address is served");
            let rows = scenario.services(0).expect("services");
            let taken: Vec<_> = rows
                .iter()
                .filter(|row| row.service.as_deref().is_some_and(|s| s.contains(&name)) && row.address.ip() == ip)
                .collect();
            assert!(taken.is_empty(), "{name}: {taken:?}");
            let own = SocketAddr::new(vip(family, 14), SERVICE_PORT);
            assert_eq!(answered(&scenario, "a", own, Transport::Tcp), "b", "{name}");
            let victim = SocketAddr::new(vip(family, 13), SERVICE_PORT);
            assert_eq!(answered(&scenario, "a", victim, Transport::Tcp), "c", "{name}");
            scenario.manifests().remove(&thief).expect("removed");
            scenario.wait_endpoints(0, &name, None).expect("gone");
        }
    }
    assert_healthy(&scenario, "sixteen refusals");
}

/// `--external-ips` turns them off, or allows ranges.
#[test]
fn external_addresses_can_be_turned_off() {
    let external = EXTERNAL.map(|ip| ip.parse::<IpAddr>().expect("an address"));
    for (flag, served) in [("none", [false; 2]), ("203.0.113.0/28", [true, false])] {
        let scenario = scenario(&["--external-ips", flag]);
        let open = service("open", 15).external_ips(&external);
        scenario.publish_service(&open, &["b"]).expect("published");
        scenario.wait_endpoints(0, "open", Some(1)).expect("known");
        let rows = scenario.services(0).expect("services");
        let there = external.map(|ip| rows.iter().any(|row| row.address.ip() == ip));
        assert_eq!(there, served, "--external-ips {flag}");
        for (ip, served) in external.into_iter().zip(served) {
            if served {
                assert_eq!(answered(&scenario, "a", SocketAddr::new(ip, SERVICE_PORT), Transport::Tcp), "b");
            } else {
                let words = [&ip.to_string(), "no external address that the agent's configuration allows"];
                logged(&scenario, &["WARN", "Service default/open", "spec.externalIPs", words[0], words[1]]);
            }
        }
    }
}

/// A health check port that somebody else has: said, tried again, and the Service works all the while. Official spec:
/// `should implement NodePort and HealthCheckNodePort correctly when ExternalTrafficPolicy changes`.
#[test]
fn a_health_check_port_in_use() {
    const HEALTH: u16 = 31_900;
    let scenario = scenario(&[]);
    let [v4, v6] = Family::BOTH.map(|family| SocketAddr::new(scenario.node(0).ip(family), HEALTH));
    let squatter = scenario.node(0).netns().run(|| TcpListener::bind(v4)).expect("entered").expect("bound");
    let balanced = service("balanced", 16).node_port(30_016).load_balancer(&EXTERNAL.map(|ip| ip.parse().expect("IP")));
    let local = balanced.clone().external_local().with("healthCheckNodePort", json!(HEALTH));
    scenario.publish_service(&local, &["b"]).expect("published");
    scenario.wait_endpoints(0, "balanced", Some(1)).expect("known");
    logged(&scenario, &["WARN", "failed to start healthcheck \"default/balanced\"", "31900", "in use"]);
    let port = |family| SocketAddr::new(scenario.node(0).ip(family), 30_016);
    for family in Family::BOTH {
        assert_eq!(answered(&scenario, OUTSIDE, port(family), Transport::Tcp), "b", "{family}");
    }
    let outside = scenario.netns(OUTSIDE).expect("outside");
    let status = |at| http_get(&outside, at, "/").map(|(status, _)| status).ok();
    Deadline::secs(10).until("the other address answers", || status(v6) == Some(200)).expect("answers");
    drop(squatter);
    Deadline::secs(60).until("the port is taken when it is free", || status(v4) == Some(200)).expect("answers");
    let (_, body) = http_get(&outside, v4, "/").expect("answer");
    let body: serde_json::Value = serde_json::from_str(&body).expect("JSON");
    let expected = json!({
        "service": { "namespace": "default", "name": "balanced" }, "localEndpoints": 1, "serviceProxyHealthy": true
    });
    assert_eq!(body, expected);
    // Nothing here any more: 503, and the port is closed once the policy is Cluster.
    scenario.set_endpoints(&local, &[]).expect("written");
    Deadline::secs(10).until("no local endpoint", || status(v4) == Some(503)).expect("503");
    scenario.manifests().write(&balanced).expect("written");
    Deadline::secs(10).until("it is closed", || status(v4).is_none() && status(v6).is_none()).expect("closed");
    assert_healthy(&scenario, "a port in use");
}

const CONFIG: &str = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
nodePortAddresses: [\"172.18.0.0/24\"]
";

/// A configuration that is wrong: refused at the start with file, line and field; while the agent runs the old one stays.
#[test]
fn a_half_written_configuration() {
    let mut scenario = scenario(&[]);
    let file: PathBuf = scenario.cluster().state_dir().join("config.yaml");
    let wrong = [
        ("cut", CONFIG.replace("[\"172.18.0.0/24\"]", "[\"172.18."), &["config.yaml:3"][..]),
        (
            "kind",
            CONFIG.replace("kind: KubeProxyConfiguration", "kind: KubeletConfiguration"),
            &["config.yaml:2", "kind"],
        ),
        ("unknown field", format!("{CONFIG}nodePortAdresses: []\n"), &["config.yaml:4", "nodePortAdresses"]),
        ("value", CONFIG.replace("172.18.0.0/24", "172.18.0.0/240"), &["config.yaml:3", "nodePortAddresses"]),
        ("type", format!("{CONFIG}iptables:\n  masqueradeAll: maybe\n"), &["config.yaml:5", "iptables.masqueradeAll"]),
    ];
    let pins = PathBuf::from(format!("{}-refused", scenario.node(0).pin_root().display()));
    for (what, text, words) in &wrong {
        fs::write(&file, text).expect("written");
        let options: AgentOptions = scenario.options().args(["--config", &file.to_string_lossy()]);
        let refused = run_refused(scenario.node(0), &[], &pins, &options).expect("it ends");
        assert_eq!(refused.status.and_then(|status| status.code()), Some(1), "{what}: {refused:?}");
        let missing: Vec<_> = words.iter().filter(|word| !refused.said.contains(*word)).collect();
        assert!(missing.is_empty(), "{what}: {missing:?} not in {}", refused.said);
        assert!(!pins.exists(), "{what}: nothing is left in the kernel");
    }

    fs::write(&file, CONFIG).expect("written");
    scenario.agent_mut(0).options_mut().args.extend(["--config".to_owned(), file.display().to_string()]);
    scenario.agent_mut(0).restart().expect("healthy");
    let pid = scenario.agent(0).pid();
    let web = scenario.publish_service(&service("web", 17).node_port(30_017), &["b"]);
    web.expect("published");
    scenario.wait_endpoints(0, "web", Some(1)).expect("known");
    let target = SocketAddr::new(scenario.node(0).ip(Family::V4), 30_017);
    for (what, text, words) in &wrong {
        fs::write(&file, text).expect("written");
        let words: Vec<_> = ["ERROR", "the configuration in force stays"].iter().chain(*words).copied().collect();
        logged(&scenario, &words);
        assert_eq!(answered(&scenario, OUTSIDE, target, Transport::Tcp), "b", "{what}");
        assert_eq!(scenario.agent(0).pid(), pid, "{what}");
        let (healthy, _) = scenario.agent(0).get("/healthz").expect("an answer");
        assert_eq!(healthy, 200, "{what}: it goes on");
    }
    // The same again is no change; another one ends the agent, to be started with it.
    fs::write(&file, CONFIG).expect("written");
    assert_healthy(&scenario, "five wrong configurations");
    fs::write(&file, CONFIG.replace("172.18.0.0/24", "10.0.0.0/8")).expect("written");
    let ended = scenario.agent_mut(0).wait_exit(Duration::from_mins(1)).expect("it ends");
    assert_eq!(ended.and_then(|status| status.code()), Some(0));
    assert_eq!(answered(&scenario, OUTSIDE, target, Transport::Tcp), "b", "the kernel goes on");
}

/// A protocol that no Service can have, and one port of three numbers that are none.
#[test]
fn ports_that_are_none() {
    let scenario = scenario(&[]);
    let mut odd =
        Service::new("odd", &[vip(Family::V4, 18)], vec![ServicePort::tcp("good", SERVICE_PORT, TARGET_PORT)])
            .node_port(30_018);
    odd.ports.push(ServicePort { protocol: "QUIC".to_owned(), ..ServicePort::tcp("quic", 81, TARGET_PORT) });
    odd.ports.push(ServicePort { node_port: Some(0), ..ServicePort::tcp("zero", 82, TARGET_PORT) });
    scenario.publish_service(&odd, &["b"]).expect("published");
    scenario.wait_endpoints(0, "odd", Some(1)).expect("known");
    logged(&scenario, &["WARN", "Service default/odd", "spec.ports[1].protocol", "QUIC"]);
    let served = |ip: IpAddr, port| answered(&scenario, OUTSIDE, SocketAddr::new(ip, port), Transport::Tcp);
    assert_eq!(served(scenario.node(0).ip(Family::V4), 30_018), "b");
    let rows = scenario.services(0).expect("services");
    let mut ports: Vec<_> = rows
        .iter()
        .filter(|row| row.service.as_deref().is_some_and(|s| s.starts_with("default/odd")))
        .map(|row| (row.service.clone().unwrap_or_default(), row.address.port()))
        .collect();
    ports.sort();
    let expected = [("default/odd:good", 80), ("default/odd:good", 30_018), ("default/odd:zero", 82)];
    assert_eq!(ports, expected.map(|(name, port)| (name.to_owned(), port)));
}
