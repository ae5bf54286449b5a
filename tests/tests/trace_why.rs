//! `trace why`: what it says of packets that arrive, of wrong words, and while the agent is away or wants something else than
//! the maps have. What it says of packets that do not arrive stands in `trace_drops.rs`, beside what a trace says of them.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use proxy_abi::{FrontendEntry, FrontendKey, PortBe, Proto};
use proxy_agent::dataplane::pins::Pins;
use proxy_tests::policy_manifest::{PodObject, namespace, network_policy};
use proxy_tests::scenario::{SERVICE_PORT, Scenario, TARGET_PORT, matrix};
use proxy_tests::tracer::{self, Traced, Tracer};
use proxy_tests::{ClusterSpec, Deadline, Family, NodeSpec};
use serde_json::{Value, json};

fn build() -> Scenario {
    let spec =
        ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b"])).node(NodeSpec::new("node2").pods(["d"]));
    let scenario = matrix::scenario_of(&spec, &[]).expect("scenario");
    for name in ["to-b", "to-d"] {
        scenario.wait_endpoints(0, name, Some(1)).expect("known");
    }
    scenario
}

fn why(scenario: &Scenario, line: &str) -> Traced {
    let words: Vec<&str> = ["why"].into_iter().chain(line.split(' ')).chain(["-o", "ndjson"]).collect();
    tracer::run(scenario.node(0), &words).expect("an answer")
}

/// Both answers, one for each family: whether it is delivered, the cause, and what is not known.
fn answers(traced: &Traced) -> Vec<String> {
    let lines = traced.lines().into_iter().filter(|line| line["t"] == "answer");
    lines.map(|line| format!("{} {} {}", line["delivered"], line["cause"], line["unknown"])).collect()
}

/// What its checks of this name found, in both families.
fn found(traced: &Traced, check: &str) -> Vec<String> {
    let lines = traced.lines().into_iter().filter(|line| line["check"] == check);
    lines.map(|line| line["found"].as_str().unwrap_or_default().to_owned()).collect()
}

#[test]
fn what_arrives_is_said_to_arrive() {
    let scenario = build();
    let elsewhere = r#"true null ["ingress","listener"]"#;
    let whole = "true null []";
    let by_veth = "from veth to veth";
    let remote = "10.244.1.2 to pod:default/b 8080/tcp";
    let chosen = |family: Family| SocketAddr::new(scenario.ip("b", family).expect("an address"), TARGET_PORT);
    let redirected = Family::BOTH.map(|family| format!("service_new, redirect, to {}", chosen(family)));
    // The line, the exit code, each answer, the way, and what the first dry run of each says.
    let rows = [
        ("pod:default/a to svc:default/to-b:80/tcp", 0, whole, by_veth, redirected.each_ref().map(String::as_str)),
        ("pod:default/a to svc:default/to-b udp/80", 0, whole, by_veth, redirected.each_ref().map(String::as_str)),
        ("pod:default/a to pod:default/b 8080/udp", 0, whole, "by the bridge", ["from_pod"; 2]),
        ("pod:default/a to pod:default/b", 0, whole, "by the bridge", ["other_protocol, pass"; 2]),
        ("node to svc:default/to-b 80/tcp", 0, whole, "sent by the node", ["to_pod"; 2]),
        ("node to pod:default/b 8080/tcp", 0, whole, "sent by the node", ["direct_new, pass"; 2]),
        (remote, 4, r#"true null ["egress"]"#, "through the node's IP stack", ["to_pod"; 2]),
        ("pod:default/a to svc:default/to-d 80/udp", 4, elsewhere, "through the node's IP stack", ["service_new"; 2]),
    ];
    // So that the next node's MAC is known.
    for family in Family::BOTH {
        let target = SocketAddr::new(scenario.ip("node2", family).expect("an address"), 9);
        let known = || {
            send(&scenario, "node1", target);
            let shown = scenario.node(0).run("ip", &["neigh", "show", &target.ip().to_string()]).unwrap_or_default();
            shown.contains("lladdr")
        };
        Deadline::secs(10).until("node2 is known", known).expect("known");
    }
    for (line, code, answer, way, dry) in rows {
        let traced = why(&scenario, line);
        let families = if line == remote { 1 } else { 2 };
        let said = format!("{line}: {}{}", traced.out, traced.err);
        assert_eq!((traced.code, answers(&traced)), (Some(code), vec![answer.to_owned(); families]), "{said}");
        let ways = found(&traced, "way");
        assert!(ways.len() == families && ways.iter().all(|found| found.contains(way)), "{said}");
        let runs = found(&traced, "dry run");
        for (family, words) in dry.iter().enumerate().take(families) {
            assert!(runs.get(family * runs.len() / families).is_some_and(|run| run.contains(words)), "{words}: {said}");
        }
        let agent = found(&traced, "agent");
        assert!(agent.iter().all(|found| found.starts_with("it wants what the maps have")), "{said}");
    }
}

#[test]
fn wrong_words_are_answered_with_what_would_be_right() {
    let scenario = build();
    for (line, words) in [
        ("pod:default/bb to node", vec!["no pod default/bb", "pod:default/b"]),
        ("node to svc:default/to-x", vec!["no Service default/to-x", "svc:default/to-b"]),
        ("node to svc:default/to-b:81", vec!["port 81 of Service default/to-b", "svc:default/to-b:80/tcp"]),
        ("pod:default/a or node", vec!["`or`: write FROM to TO", "\n  pod:default/a or node\n                ^"]),
        ("node to node 80/quic", vec!["`80/quic`", "80/tcp, 53/udp"]),
        ("node to 10.0.0.0/8", vec!["no single sender or receiver"]),
        ("node to pod:default/b --source 10.0.0.1", vec!["the sender is to be a pod of this node"]),
    ] {
        let traced = why(&scenario, line);
        assert_eq!((traced.code, traced.out.as_str()), (Some(2), ""), "{line}: {}", traced.err);
        assert!(words.iter().all(|word| traced.err.contains(word)), "{line}: {}", traced.err);
    }
}

/// Sends a datagram.
fn send(scenario: &Scenario, from: &str, target: SocketAddr) {
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let sent = scenario.netns(from).expect("a namespace").run(|| UdpSocket::bind(any)?.send_to(b"a", target));
    sent.expect("a namespace").expect("sent");
}

/// Decisions of the policy at pod `b`, as a trace of one packet tells them: number and name of the rule.
fn traced_rules(scenario: &Scenario) -> Vec<(bool, Value)> {
    let target = SocketAddr::new(scenario.ip("b", Family::V4).expect("an address"), TARGET_PORT);
    // Not the errors that the sender, which does not wait for the answer, sends later.
    let args = ["pod:default/a to pod:default/b:8080/udp", "-c", "1", "--for", "8s", "-o", "ndjson", "--no-replies"];
    let args: Vec<&str> = args[0].split(' ').chain(args[1..].iter().copied()).collect();
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    send(scenario, "a", target);
    let traced = tracer.finish(Duration::from_secs(20)).expect("the end");
    let decisions = traced.lines().into_iter().filter(|line| line["t"] == "decision" && line["hook"] == "to_pod");
    decisions.map(|line| (line["rule"].is_u64(), line["policy"].clone())).collect()
}

#[test]
fn without_the_agent_the_maps_say_what_they_know() {
    let mut scenario = build();
    scenario.manifests().write(&namespace("default", &[])).expect("written");
    for pod in scenario.cluster().pods() {
        scenario.manifests().write(&PodObject::of(&pod).label("pod", pod.name())).expect("written");
    }
    let ports = json!([{ "protocol": "UDP", "port": TARGET_PORT }]);
    let from = json!([{ "podSelector": { "matchLabels": { "pod": "a" } } }]);
    let spec =
        json!({ "podSelector": { "matchLabels": { "pod": "b" } }, "ingress": [{ "from": from, "ports": ports }] });
    scenario.manifests().write(&network_policy("default", "web", &spec)).expect("written");
    let (allowed, denied) = ("pod:default/a to pod:default/b 8080/udp", "pod:default/a to svc:default/to-b 80/tcp");
    let in_force = || {
        let checks = found(&why(&scenario, allowed), "ingress");
        checks.iter().all(|found| found.contains("by a rule"))
    };
    Deadline::secs(20).until("in force", in_force).expect("in force");

    let traced = why(&scenario, denied);
    assert_eq!(
        (traced.code, answers(&traced)),
        (Some(1), vec![r#"false "ingress" []"#.to_owned(); 2]),
        "{}",
        traced.out
    );
    let near = traced.one("answer");
    let runs = found(&traced, "dry run");
    assert!(near["fix"].as_str().is_some_and(|fix| fix.contains("default/web")), "{near}");
    assert!(runs.iter().any(|run| run.ends_with("by no rule of default/web, as the maps say")), "{runs:?}");
    assert_eq!(traced_rules(&scenario), [(true, json!("default/web ingress[0]"))]);

    // A pod of another node: the agent has its name.
    let afar =
        ["pod:default/a", "to", "pod:default/d:8080/udp", "-c", "1", "--for", "8s", "-o", "ndjson", "--no-replies"];
    let tracer = Tracer::start(scenario.node(0), &afar).expect("a trace");
    send(&scenario, "a", SocketAddr::new(scenario.ip("d", Family::V4).expect("an address"), TARGET_PORT));
    let traced = tracer.finish(Duration::from_secs(20)).expect("the end");
    assert_eq!((traced.code, traced.packets().len()), (Some(0), 1), "{}{}", traced.out, traced.err);

    scenario.agent_mut(0).kill9().expect("killed");
    let traced = tracer::run(scenario.node(0), &afar).expect("an answer");
    assert_eq!(traced.code, Some(2), "{}{}", traced.out, traced.err);
    let traced = why(&scenario, denied);
    assert_eq!(answers(&traced), vec![r#"false "ingress" ["agent"]"#.to_owned(); 2], "{}", traced.out);
    let runs = found(&traced, "dry run");
    assert!(runs.iter().any(|run| run.contains("by no rule of set")), "{runs:?}");
    assert!(traced.one("answer")["fix"].as_str().is_some_and(|fix| fix.contains("start the agent")), "{}", traced.out);
    let traced = why(&scenario, allowed);
    assert_eq!(
        (traced.code, answers(&traced)),
        (Some(4), vec![r#"true null ["agent"]"#.to_owned(); 2]),
        "{}",
        traced.out
    );
    assert_eq!(traced_rules(&scenario), [(true, Value::Null)]);

    scenario.agent(0).cli(&["cleanup"]).expect("clean");
    let traced = why(&scenario, allowed);
    assert_eq!(traced.code, Some(5), "{}{}", traced.out, traced.err);
    assert_eq!(answers(&traced), vec![r#"false "maps" []"#.to_owned(); 2], "{}", traced.out);
}

#[test]
fn maps_that_are_not_what_the_agent_wants_are_the_cause() {
    let scenario = build();
    let maps = Pins::new(&scenario.node(0).pin_root()).open().expect("maps");
    let vip = Family::BOTH.iter().find_map(|family| {
        let key = FrontendKey {
            ip: matrix::vip_of("b", *family).expect("a Service").into(),
            port: PortBe::new(SERVICE_PORT),
            proto: Proto::TCP,
            scope: FrontendKey::SCOPE_CLUSTER,
        };
        maps.frontend.get(&key).expect("a map").map(|entry| (key, entry))
    });
    let (key, entry) = vip.expect("a frontend");
    let line = format!("pod:default/a to {} 80/tcp", std::net::IpAddr::from(key.ip));
    maps.frontend.set(&key, &FrontendEntry { count: 0, ..entry }).expect("written");
    let traced = why(&scenario, &line);
    assert_eq!((traced.code, answers(&traced)), (Some(1), vec![r#"false "agent" []"#.to_owned()]), "{}", traced.out);
    let wanted = format!("with 0 endpoints, the agent wants generation {} with 1 endpoint", entry.generation);
    assert!(found(&traced, "agent")[0].ends_with(&wanted), "{}", traced.out);
    assert!(found(&traced, "dry run")[0].contains("no_backend"), "{}", traced.out);
    maps.frontend.delete(&key).expect("deleted");
    let traced = why(&scenario, &line);
    assert_eq!((traced.code, answers(&traced)), (Some(1), vec![r#"false "agent" []"#.to_owned()]), "{}", traced.out);
    maps.frontend.set(&key, &entry).expect("written");
    assert_eq!(why(&scenario, &line).code, Some(0));
}
