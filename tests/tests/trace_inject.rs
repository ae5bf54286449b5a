//! `trace why` with a real packet, one that it sends or the next that comes by, and in the middle of flows.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use proxy_tests::agent::find_binary;
use proxy_tests::packet::{Frame, L4, Tcp, tcp_flag};
use proxy_tests::policy_manifest::{PodObject, namespace, network_policy};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::scenario::{self, OUTSIDE, SERVICE_PORT, Scenario, TARGET_PORT, matrix};
use proxy_tests::tracer::{self, Traced, Tracer};
use proxy_tests::traffic::{ANSWERED_WITHIN, Flow, tcp_exchange};
use proxy_tests::{ClusterSpec, Deadline, Family, Netns, NodeSpec};
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

fn words(line: &str) -> Vec<&str> {
    ["why"].into_iter().chain(line.split(' ')).chain(["-o", "ndjson"]).collect()
}

fn why(scenario: &Scenario, line: &str) -> Traced {
    tracer::run(scenario.node(0), &words(line)).expect("an answer")
}

/// The real packets: one for each family that was asked for.
fn reals(traced: &Traced) -> Vec<Value> {
    traced.lines().into_iter().filter(|line| line["t"] == "real").collect()
}

/// What the checks of this name found, in both families.
fn found(traced: &Traced, check: &str) -> Vec<String> {
    let lines = traced.lines().into_iter().filter(|line| line["check"] == check);
    lines.map(|line| line["found"].as_str().unwrap_or_default().to_owned()).collect()
}

/// Connections in SYN_RECV, of both families.
fn half_open(netns: &Netns) -> usize {
    let count = |file: &str| {
        let text = fs::read_to_string(format!("/proc/thread-self/net/{file}")).expect("a table of sockets");
        text.lines().filter(|line| line.split_whitespace().nth(3) == Some("03")).count()
    };
    netns.run(|| count("tcp") + count("tcp6")).expect("a namespace")
}

fn vip(server: &str, family: Family) -> SocketAddr {
    SocketAddr::new(matrix::vip_of(server, family).expect("a Service"), SERVICE_PORT)
}

fn pod(scenario: &Scenario, name: &str, family: Family) -> SocketAddr {
    SocketAddr::new(scenario.ip(name, family).expect("an address"), TARGET_PORT)
}

/// Sends a datagram.
fn send(scenario: &Scenario, from: &str, target: SocketAddr) {
    let any: IpAddr = if target.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let sent = scenario.netns(from).expect("a namespace").run(|| UdpSocket::bind((any, 0))?.send_to(b"a", target));
    sent.expect("a namespace").expect("sent");
}

/// Nodes know each other's MAC.
fn acquaint(scenario: &Scenario) {
    for family in Family::BOTH {
        let target = SocketAddr::new(scenario.ip("node2", family).expect("an address"), 9);
        let known = || {
            send(scenario, "node1", target);
            let shown = scenario.node(0).run("ip", &["neigh", "show", &target.ip().to_string()]).unwrap_or_default();
            shown.contains("lladdr")
        };
        Deadline::secs(10).until("node2 is known", known).expect("known");
    }
}

#[test]
fn a_packet_that_is_sent_is_delivered_as_was_said() {
    let scenario = build();
    acquaint(&scenario);
    let own = json!("the pod's own kernel has ended it with a reset");
    let none = Value::Null;
    let (syn, refusal) = (json!("SYN ACK"), json!("RST ACK"));
    let (good, bad) = (Some(0), Some(1));
    let closed = json!("the node's socket was closed with a reset");
    let data = json!("a datagram");
    let outside = format!("pod:default/a to {} 9/udp", scenario.ip(OUTSIDE, Family::V4).expect("an address"));
    // The line, the exit code, what became of it, what answered, how the connection was ended.
    let rows = [
        ("pod:default/a to svc:default/to-b 80/tcp", good, "delivered", &syn, &own),
        ("pod:default/a to svc:default/to-b 80/udp", good, "delivered", &data, &none),
        ("pod:default/a to pod:default/b 8080/tcp", good, "delivered", &syn, &own),
        ("pod:default/a to pod:default/b 8080/udp --size 1000", good, "delivered", &data, &none),
        ("pod:default/a to pod:default/b", good, "delivered", &json!("echo reply"), &none),
        ("pod:default/a to svc:default/to-d 80/tcp", good, "left-node", &syn, &own),
        ("pod:default/a to svc:default/to-d 80/udp", good, "left-node", &data, &none),
        ("pod:default/a to node", good, "delivered", &json!("echo reply"), &none),
        ("pod:default/a to pod:default/b 9/tcp", bad, "dropped", &refusal, &none),
        ("pod:default/a to pod:default/b 9/udp", bad, "dropped", &json!("port unreachable"), &none),
        (outside.as_str(), bad, "refused", &json!("port unreachable"), &none),
        ("node to svc:default/to-b 80/tcp", good, "delivered", &syn, &closed),
        ("node to svc:default/to-b 80/udp", good, "delivered", &data, &none),
        ("node to pod:default/b", good, "delivered", &json!("echo reply"), &none),
    ];
    let mut wrong = Vec::new();
    for (line, code, result, answer, reset) in rows {
        let traced = why(&scenario, &format!("{line} --inject"));
        let found: Vec<Value> = reals(&traced)
            .iter()
            .map(|real| json!([real["result"], real["answer"], real["reset"], real["agrees"], real["differs"]]))
            .collect();
        let families = if line == outside { 1 } else { 2 };
        let expected = vec![json!([result, answer, reset, true, []]); families];
        if traced.code != code || found != expected {
            wrong.push(format!("{line}: {:?} {found:?}\n{}\n{}", traced.code, traced.out, traced.err));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    for name in ["b", "d"] {
        let netns = scenario.netns(name).expect("a namespace");
        assert_eq!((half_open(&netns), scenario.open_connections(name)), (0, 0), "{name}");
    }
    // For people: the agreement first, then the model's answer, then the story.
    let shown = tracer::run(scenario.node(0), &["why", "pod:default/a", "to", "svc:default/to-b:80/tcp", "--inject"]);
    let shown = shown.expect("an answer").out;
    let mut lines = shown.lines();
    let headline =
        "AGREED: the packet that was sent was delivered, and was answered (SYN ACK), as model and dry run said";
    assert_eq!(lines.next(), Some(headline), "{shown}");
    assert!(lines.next().is_some_and(|line| line.ends_with("tcp: would be delivered")), "{shown}");
    assert!(!shown.contains("fix: "), "{shown}");
    let ended = "\n→ the pod's own kernel has ended it with a reset\n#1  tcp SYN  default/a (";
    for words in [
        ended,
        "\n   as meant: no process of the sender",
        "#1r  tcp SYN ACK  ",
        "#2  tcp RST  ",
        "from_pod: service_new redirect",
    ] {
        assert!(shown.contains(words), "{words}: {shown}");
    }
}

#[test]
fn the_rights_of_the_agent_are_enough() {
    let scenario = build();
    let (pins, cni) = (scenario.node(0).pin_root(), scenario.node(0).cni_results_dir());
    let agent = find_binary().expect("an agent");
    let rights = ["--bounding-set=-all,+bpf,+net_admin,+perfmon", "--inh-caps=-all", "--no-new-privs"];
    let paths = [&agent, &pins, &cni].map(|path| path.to_str().expect("a path"));
    let asked = ["trace", "why", "pod:default/a", "to", "svc:default/to-b:80/tcp", "--inject"];
    let more = ["--pin-root", paths[1], "--cni-results", paths[2]];
    let args: Vec<&str> = rights.into_iter().chain([paths[0]]).chain(asked).chain(more).collect();
    // It fails where the exit code is not 0.
    let said = scenario.node(0).run("setpriv", &args).expect("sent and delivered");
    assert_eq!(
        said.matches("AGREED: the packet that was sent was delivered, and was answered (SYN ACK)").count(),
        2,
        "{said}"
    );
}

#[test]
fn no_connection_is_left_half_open() {
    let scenario = build();
    let (client, server) = (scenario.cluster().pod("a").expect("a pod"), scenario.cluster().pod("b").expect("a pod"));
    // What its kernel would end, the pod itself forbids.
    let silence = "add table inet silence\n\
                   add chain inet silence out { type filter hook output priority 0; }\n\
                   add rule inet silence out tcp flags rst drop\n";
    client.netns().feed("nft", &["-f", "-"], silence).expect("a rule");
    let segment = L4::Tcp(Tcp { src: 59_999, dst: TARGET_PORT, flags: tcp_flag::SYN, seq: 7, ..Tcp::default() });
    let frame = Frame::ip((client.mac(), client.ip4()), (server.mac(), server.ip4()), segment);
    RawSocket::open(client.netns(), "eth0").expect("a socket").send(&frame.build()).expect("sent");
    Deadline::secs(5).until("one is half open", || half_open(server.netns()) == 1).expect("half open");
    for line in ["pod:default/a to svc:default/to-b 80/tcp", "pod:default/a to pod:default/b 8080/tcp"] {
        let traced = why(&scenario, &format!("{line} --inject"));
        let resets: Vec<Value> = reals(&traced).iter().map(|real| real["reset"].clone()).collect();
        let sent = json!("ended with a reset that was sent after it");
        assert_eq!((traced.code, resets), (Some(0), vec![sent; 2]), "{line}: {}{}", traced.out, traced.err);
        assert_eq!(half_open(server.netns()), 1, "{line}: not more than that one");
    }
}

/// Objects that NetworkPolicies are about, and one that lets `a` reach `b` at this port alone.
fn isolate(scenario: &Scenario, port: u16) {
    scenario.manifests().write(&namespace("default", &[])).expect("written");
    for pod in scenario.cluster().pods() {
        scenario.manifests().write(&PodObject::of(&pod).label("pod", pod.name())).expect("written");
    }
    let ports = json!([{ "protocol": "TCP", "port": port }]);
    let from = json!([{ "podSelector": { "matchLabels": { "pod": "a" } } }]);
    let spec =
        json!({ "podSelector": { "matchLabels": { "pod": "b" } }, "ingress": [{ "from": from, "ports": ports }] });
    scenario.manifests().write(&network_policy("default", "web", &spec)).expect("written");
    let in_force = || {
        let asked = why(scenario, "pod:default/a to pod:default/b 8080/tcp");
        let causes = asked.lines().into_iter().filter(|line| line["t"] == "answer" && line["cause"] == "ingress");
        causes.count() == 2
    };
    Deadline::secs(20).until("in force", in_force).expect("in force");
}

#[test]
fn a_denied_packet_is_dropped_where_the_model_says() {
    let scenario = build();
    isolate(&scenario, TARGET_PORT + 1);
    for line in [
        "pod:default/a to svc:default/to-b 80/tcp",
        "pod:default/a to pod:default/b 8080/udp",
        "pod:default/a to pod:default/b",
    ] {
        let traced = why(&scenario, &format!("{line} --inject"));
        let said = format!("{line}: {}{}", traced.out, traced.err);
        assert_eq!(traced.code, Some(1), "{said}");
        let all = reals(&traced);
        assert_eq!(all.len(), 2, "{said}");
        for real in &all {
            assert_eq!((&real["result"], &real["agrees"]), (&json!("dropped"), &json!(true)), "{said}");
            assert!(
                real["detail"].as_str().is_some_and(|detail| detail.starts_with("policy_ingress at to_pod")),
                "{said}"
            );
        }
        let causes = traced.lines().into_iter().filter(|line| line["t"] == "answer" && line["cause"] == "ingress");
        assert_eq!(causes.count(), 2, "{said}");
        let drops: Vec<Value> = traced.lines().into_iter().filter(|line| line["t"] == "drop").collect();
        assert!(drops.len() == 2 && drops.iter().all(|drop| drop["class"] == "own-policy"), "{said}");
    }
}

#[test]
fn the_next_real_packet_is_told_beside_the_answer() {
    let scenario = build();
    let watch = |line: &str, client: &str, target: SocketAddr| {
        let tracer = Tracer::start(scenario.node(0), &words(&format!("{line} --watch 20s"))).expect("a watch");
        // Somebody else's packets first.
        send(&scenario, "a", SocketAddr::new(scenario.ip("b", Family::V4).expect("an address"), TARGET_PORT + 1));
        let netns = scenario.netns(client).expect("a namespace");
        // Whether anybody answers is not the question.
        let _ = tcp_exchange(&netns, target, 100, 100);
        tracer.finish(Duration::from_secs(30)).expect("the end")
    };
    for family in Family::BOTH {
        for (line, client, target) in [
            ("pod:default/a to svc:default/to-b 80/tcp", "a", vip("b", family)),
            ("pod:default/a to pod:default/b 8080/tcp", "a", pod(&scenario, "b", family)),
            ("node to svc:default/to-b 80/tcp", "node1", vip("b", family)),
        ] {
            let traced = watch(line, client, target);
            let said = format!("{line}, {family}: {}{}", traced.out, traced.err);
            let all: Vec<Value> = reals(&traced)
                .iter()
                .map(|real| json!([real["how"], real["result"], real["answer"], real["agrees"]]))
                .collect();
            assert_eq!((traced.code, all), (Some(0), vec![json!(["seen", "delivered", "SYN ACK", true])]), "{said}");
            let first = traced.packets().first().cloned().expect("a packet");
            assert_eq!((first.flow.as_str(), first.all("pkt")[0]["kind"].as_str()), ("1", Some("SYN")), "{said}");
        }
    }
    let none = why(&scenario, "pod:default/a to svc:default/to-b 80/tcp --watch 300ms");
    let all: Vec<Value> = reals(&none).iter().map(|real| json!([real["result"], real["agrees"]])).collect();
    assert_eq!((none.code, all), (Some(3), vec![json!(["unseen", null]); 2]), "{}{}", none.out, none.err);
    let text = tracer::run(scenario.node(0), &["why", "pod:default/a", "to", "pod:default/b", "--watch", "300ms"]);
    assert!(text.expect("an answer").out.starts_with("NO PACKET: none of it came within 300ms\n"));
    let tracer =
        Tracer::start(scenario.node(0), &words("pod:default/a to pod:default/b --watch 20s")).expect("a watch");
    let ended = tracer.interrupt().expect("an end");
    assert_eq!(ended.code, Some(130), "{}{}", ended.out, ended.err);
}

/// Rows of the flow tables.
fn flows(scenario: &Scenario) -> Vec<String> {
    let mut rows: Vec<String> = scenario.flows(0).expect("flows").iter().map(|row| format!("{row:?}")).collect();
    rows.sort();
    rows
}

#[test]
fn the_middle_of_a_flow_is_what_the_tables_say() {
    let scenario = build();
    let netns = scenario.netns("a").expect("a namespace");
    let line = "pod:default/a to svc:default/to-b 80/tcp";
    let answers = |traced: &Traced| -> Vec<String> {
        let lines = traced.lines().into_iter().filter(|line| line["t"] == "answer");
        lines.map(|line| format!("{} {} {}", line["delivered"], line["cause"], line["unknown"])).collect()
    };
    let runs = |traced: &Traced| -> Vec<String> {
        let word = |found: String| {
            found.split(": ").nth(1).unwrap_or_default().split(", to ").next().unwrap_or_default().to_owned()
        };
        found(traced, "dry run").into_iter().map(word).collect()
    };

    // Without a flow.
    let est = why(&scenario, &format!("{line} --ct est"));
    assert_eq!(
        (est.code, answers(&est)),
        (Some(1), vec![r#"false "dry run" []"#.to_owned(); 2]),
        "{}{}",
        est.out,
        est.err
    );
    assert_eq!(runs(&est), ["no_flow, drop"; 2], "{}", est.out);
    let direct = why(&scenario, "pod:default/a to pod:default/b 8080/tcp --ct est");
    assert_eq!(
        (direct.code, runs(&direct)),
        (Some(0), vec!["direct_new, pass".to_owned(); 4]),
        "{}{}",
        direct.out,
        direct.err
    );
    for stage in ["reply", "stale"] {
        let traced = why(&scenario, &format!("{line} --ct {stage}"));
        assert_eq!(
            (traced.code, answers(&traced)),
            (Some(4), vec![r#"true null ["flow"]"#.to_owned(); 2]),
            "{}",
            traced.out
        );
    }

    // Connections and datagrams in both families. The server closes a connection that says nothing for ten seconds; one that
    // has said what it wants may be idle.
    let connect = |name: &str, to: SocketAddr| {
        Flow::open(&scenario.netns(name).expect("a namespace"), to, 0, ANSWERED_WITHIN).expect("connected")
    };
    let streams = Family::BOTH.map(|family| connect("a", vip("b", family)));
    let datagrams = Family::BOTH.map(|family| {
        let any: IpAddr =
            if family == Family::V4 { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let ask = || {
            let socket = UdpSocket::bind((any, 0))?;
            socket.set_read_timeout(Some(ANSWERED_WITHIN))?;
            socket.send_to(b"a", vip("b", family))?;
            socket.recv_from(&mut [0; 2000]).map(|_| socket)
        };
        netns.run(ask).expect("a namespace").expect("an answer")
    });
    let before = flows(&scenario);
    assert_eq!(before.len(), 4, "{before:#?}");
    let udp = "pod:default/a to svc:default/to-b 80/udp";
    for (line, stage, expected) in [
        (line, "new", ["service_new, redirect", "direct_new, pass"]),
        (line, "est", ["service, redirect", "seen, pass"]),
        (line, "reply", ["reply, redirect", "seen, pass"]),
        (udp, "est", ["service, redirect", "seen, pass"]),
        (udp, "reply", ["reply, redirect", "seen, pass"]),
    ] {
        let traced = why(&scenario, &format!("{line} --ct {stage}"));
        let said = format!("{line} {stage}: {}{}", traced.out, traced.err);
        assert_eq!((traced.code, answers(&traced)), (Some(0), vec!["true null []".to_owned(); 2]), "{said}");
        assert_eq!(runs(&traced), [expected, expected].concat(), "{said}");
        if stage != "new" {
            let rows = found(&traced, "flow");
            assert!(rows.len() == 2 && rows.iter().all(|row| row.contains("of Service default/to-b:")), "{said}");
            assert_eq!(found(&traced, "socket").len(), 2, "{said}");
        }
    }
    assert_eq!(flows(&scenario), before, "nothing is written");

    // A process of the node, and a receiver that is elsewhere.
    acquaint(&scenario);
    let more = Family::BOTH.map(|family| (connect("node1", vip("b", family)), connect("a", vip("d", family))));
    let (node, far) = ("node to svc:default/to-b 80/tcp", "pod:default/a to svc:default/to-d 80/tcp");
    for (line, stage, code, unknown, run) in [
        (node, "est", 0, "[]", "direct, pass"),
        (node, "reply", 0, "[]", "direct, pass"),
        (far, "est", 4, r#"["ingress","socket"]"#, "service, pass"),
        (far, "reply", 4, r#"["ingress"]"#, "reply, pass"),
    ] {
        let traced = why(&scenario, &format!("{line} --ct {stage}"));
        let said = format!("{line} {stage}: {}{}", traced.out, traced.err);
        assert_eq!((traced.code, answers(&traced)), (Some(code), vec![format!("true null {unknown}"); 2]), "{said}");
        assert_eq!(runs(&traced), [run; 2], "{said}");
    }
    drop(more);

    let none = why(&scenario, &format!("{line} --ct stale"));
    assert_eq!(none.code, Some(4), "{}", none.out);
    assert!(found(&none, "flow")[0].contains("names a backend that is gone (1 in the tables)"), "{}", none.out);

    // Their backend goes: TCP stays, UDP does not.
    scenario.set_endpoints(&scenario::service("to-b", service_host("b")), &[]).expect("written");
    scenario.wait_endpoints(0, "to-b", Some(0)).expect("known");
    let tcp = why(&scenario, &format!("{line} --ct stale"));
    assert_eq!((tcp.code, answers(&tcp)), (Some(0), vec!["true null []".to_owned(); 2]), "{}{}", tcp.out, tcp.err);
    assert_eq!(runs(&tcp), ["service, redirect", "seen, pass", "service, redirect", "seen, pass"], "{}", tcp.out);
    assert!(
        found(&tcp, "flow")[0].ends_with("its backend is gone: a connection stays with it until it closes"),
        "{}",
        tcp.out
    );
    let udp = why(&scenario, &format!("{udp} --ct stale"));
    assert_eq!(
        (udp.code, answers(&udp)),
        (Some(1), vec![r#"false "dry run" []"#.to_owned(); 2]),
        "{}{}",
        udp.out,
        udp.err
    );
    assert_eq!(runs(&udp), ["no_backend, refuse"; 2], "{}", udp.out);
    drop((streams, datagrams));
}

/// The number of a Service's addresses, as the scenario has published it.
fn service_host(server: &str) -> u16 {
    let first = scenario::vip(Family::V4, 0);
    let (IpAddr::V4(found), IpAddr::V4(first)) = (matrix::vip_of(server, Family::V4).expect("a Service"), first) else {
        panic!("no addresses of IPv4");
    };
    u16::try_from(u32::from(found) - u32::from(first)).expect("a number")
}

#[test]
fn what_cannot_be_is_refused_with_what_can() {
    let scenario = build();
    let outside = scenario.ip(OUTSIDE, Family::V4).expect("an address");
    for (line, words) in [
        ("pod:default/a to pod:default/b --inject --watch 5s".to_owned(), "'--inject' cannot be used with '--watch"),
        ("pod:default/a to pod:default/b --inject --ct est".to_owned(), "'--inject' cannot be used with '--ct"),
        (
            "pod:default/a to pod:default/b --inject --source 10.0.0.1".to_owned(),
            "'--inject' cannot be used with '--source",
        ),
        ("pod:default/a to pod:default/b --watch 0s".to_owned(), "nothing comes within no time; give 60s or 5m"),
        ("pod:default/a to pod:default/b --watch soon".to_owned(), "a time is 500ms, 30s or 5m"),
        ("pod:default/a to pod:default/b --ct old".to_owned(), "[possible values: new, est, reply, stale]"),
        (
            "pod:default/aa to pod:default/b --inject".to_owned(),
            "no pod default/aa on this node; there is pod:default/a",
        ),
        (
            format!("{outside} to pod:default/b 80/tcp --inject"),
            "is neither: ask on its own node, or wait for its next packet with --watch",
        ),
    ] {
        let traced = why(&scenario, &line);
        assert_eq!((traced.code, traced.out.as_str()), (Some(2), ""), "{line}: {}", traced.err);
        assert!(traced.err.contains(words), "{line}: {}", traced.err);
    }
    let large = why(&scenario, "pod:default/a to pod:default/b 8080/udp --size 3000 --inject");
    let all: Vec<Value> = reals(&large).iter().map(|real| real["result"].clone()).collect();
    assert_eq!((large.code, all), (Some(5), vec![json!("not-sent"); 2]), "{}{}", large.out, large.err);
    assert!(large.out.contains("carries 1500 bytes, so the pod sends nothing larger"), "{}", large.out);
    let sctp = why(&scenario, "pod:default/a to pod:default/b 9/sctp --inject");
    assert_eq!(sctp.code, Some(5), "{}{}", sctp.out, sctp.err);
    let first = Tracer::start(scenario.node(0), &["pod:default/a", "--for", "20s"]).expect("a trace");
    let second = why(&scenario, "pod:default/a to pod:default/b --inject");
    assert_eq!(second.code, Some(5), "{}{}", second.out, second.err);
    assert!(second.err.contains("another trace runs on this node"), "{}", second.err);
    drop(first);
    let away = tracer::run(scenario.node(1), &["why", "node", "to", "pod:default/d", "8080/tcp", "--inject"]);
    assert_eq!(away.expect("an answer").code, Some(0));
}
