//! What tracing does on bad input, beside another trace, without an agent, after a kill.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::agent::find_binary;
use proxy_tests::scenario::{SERVICE_PORT, Scenario, matrix};
use proxy_tests::tracer::{self, Tracer};
use proxy_tests::traffic::{UdpOptions, tcp_exchange, tcp_rr, udp_exchange};
use proxy_tests::{ClusterSpec, Deadline, Family, NodeSpec};

fn build() -> Scenario {
    let spec =
        ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b"])).node(NodeSpec::new("node2").pods(["d"]));
    matrix::scenario_of(&spec, &[]).expect("scenario")
}

fn target(server: &str) -> SocketAddr {
    SocketAddr::new(matrix::vip_of(server, Family::V4).expect("a Service"), SERVICE_PORT)
}

fn ask(scenario: &Scenario, server: &str) {
    tcp_exchange(&scenario.netns("a").expect("a namespace"), target(server), 100, 100).expect("an exchange");
}

/// Ids of the programs and maps that a process holds: the first and the second.
fn held(pid: u32) -> [BTreeSet<u32>; 2] {
    let mut held = [BTreeSet::new(), BTreeSet::new()];
    for entry in std::fs::read_dir(format!("/proc/{pid}/fdinfo")).expect("a process").flatten() {
        // A descriptor may be closed between the two steps.
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        for line in text.lines() {
            for (ids, field) in held.iter_mut().zip(["prog_id:", "map_id:"]) {
                ids.extend(line.strip_prefix(field).and_then(|rest| rest.trim().parse::<u32>().ok()));
            }
        }
    }
    held
}

/// Those that the kernel has.
fn loaded() -> [BTreeSet<u32>; 2] {
    let programs = aya::programs::loaded_programs().flatten().map(|info| info.id()).collect();
    [programs, aya::maps::loaded_maps().flatten().map(|info| info.id()).collect()]
}

#[test]
fn bad_input_is_told_apart() {
    let scenario = build();
    let cases: [(&[&str], i32, &str); 15] = [
        (&[], 2, "what is to be followed?"),
        (&["pod:default/c"], 2, "no pod default/c on this node; there is pod:default/a, pod:default/b"),
        (&["svc:default/to-x"], 2, "no Service default/to-x on this node; there is svc:default/to-"),
        (&["pod:default/a", "and", "pod:default/b"], 2, "a selection is one side, or two with `to` between them"),
        (&["any", "-f", "tcp prot 80"], 2, "\n      ^"),
        (&["any", "--where", "drop.reason =="], 2, "is no condition: 1:15: "),
        (
            &["any", "--where", "hops.exists(hop, hop.device == \"br0\")"],
            2,
            "there is no field device; there is decision: ",
        ),
        (&["any", "--where", "pkt.dport > \"80\""], 2, "cannot be answered"),
        (&["label:app"], 2, "labels are `label:KEY=VALUE`"),
        (&["label:app=none"], 2, "no pod with the labels app=none is known; the running agent knows labels"),
        (&["any", "--for", "soon"], 2, "a time is 500ms, 30s or 5m"),
        (&["10.255.255.1", "--for", "300ms"], 3, "following 10.255.255.1"),
        (&["show", "/nonexistent"], 2, "/nonexistent"),
        (&["drops", "--pin-root", "/nonexistent", "--once", "--for", "10ms"], 2, "cannot be used multiple times"),
        (&["hooks", "--netns", "5"], 2, "no task lives in that network namespace"),
    ];
    for (args, code, said) in cases {
        let traced = tracer::run(scenario.node(0), args).expect("an end");
        assert_eq!(traced.code, Some(code), "{args:?}: {} {}", traced.out, traced.err);
        assert!(traced.err.contains(said), "{args:?}: {}", traced.err);
    }
}

#[test]
fn one_trace_at_a_time_and_each_node_its_own() {
    let scenario = build();
    let first = Tracer::start(scenario.node(0), &["pod:default/a", "--for", "20s"]).expect("a trace");
    let second = tracer::run(scenario.node(0), &["pod:default/a"]).expect("an end");
    assert_eq!(second.code, Some(5), "{}", second.err);
    assert!(second.err.contains("another trace runs on this node"), "{}", second.err);
    let other = Tracer::start(scenario.node(1), &["pod:default/d", "--for", "20s", "-c", "1", "-o", "ndjson"])
        .expect("a trace");
    ask(&scenario, "d");
    assert_eq!(other.finish(Duration::from_secs(10)).expect("an end").code, Some(0));
    let first = first.interrupt().expect("an end");
    assert_eq!(first.code, Some(130), "{}", first.err);
    assert!(first.out.contains("delivered") || first.out.contains("left-node"), "{}", first.out);
}

#[test]
fn decisions_are_told_while_the_agent_is_down() {
    let mut scenario = build();
    scenario.agent_mut(0).kill9().expect("killed");
    let args = [
        "pod:default/a",
        "to",
        "svc:default/to-b",
        "-c",
        "2",
        "--for",
        "10s",
        "--expect",
        "delivered",
        "--expect-no",
        "nf,conntrack,br_netfilter,snat,flood",
    ];
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    ask(&scenario, "b");
    let traced = tracer.finish(Duration::from_secs(20)).expect("an end");
    assert_eq!(traced.code, Some(0), "{} {}", traced.out, traced.err);
    for words in
        ["from_pod: service_new redirect", "default/to-b:tcp →", "default/b, on this node", "complete: 2 delivered"]
    {
        assert!(traced.out.contains(words), "{words}: {}", traced.out);
    }
}

#[test]
fn packets_are_chosen_by_what_their_story_says() {
    let scenario = build();
    let condition =
        r#"end.result == "left-node" && decisions.exists(d, d.service.name == "to-d" && d.reason == "service_new")"#;
    let path = scenario.node(0).state_dir().join("trace.ndjson").display().to_string();
    let args = ["pod:default/a", "-c", "1", "--for", "20s", "--where", condition, "-o", "ndjson"];
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    for server in ["b", "d"] {
        ask(&scenario, server);
    }
    let traced = tracer.finish(Duration::from_secs(30)).expect("an end");
    assert_eq!(traced.code, Some(0), "{} {}", traced.out, traced.err);
    let packets = traced.packets();
    let services = packets.iter().flat_map(|packet| packet.all("decision")).map(|line| &line["service"]["name"]);
    assert!(packets.len() == 1 && services.clone().count() > 0, "{}", traced.out);
    assert!(services.clone().all(|name| name == "to-d"), "{}", traced.out);

    // The same of a recording.
    let args = ["pod:default/a", "-c", "4", "--for", "20s", "--first-of-flow", "-o", "ndjson", "-w", &path];
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    for server in ["b", "d"] {
        ask(&scenario, server);
    }
    assert_eq!(tracer.finish(Duration::from_secs(30)).expect("an end").code, Some(0));
    let shown = |condition: &str| {
        let traced =
            tracer::run(scenario.node(0), &["show", &path, "-o", "tree", "--where", condition]).expect("an end");
        assert_eq!(traced.code, Some(0), "{}", traced.err);
        traced.out.lines().filter(|line| line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(shown("true").len(), 4);
    let left = shown(r#"end.result == "left-node""#);
    assert!(left.len() == 1 && left[0].contains("service default/to-d"), "{left:?}");
}

#[test]
fn expectations_fail_with_what_was_seen() {
    let scenario = build();
    let args = [
        "pod:default/a",
        "to",
        "svc:default/to-d",
        "--no-replies",
        "-c",
        "1",
        "--for",
        "10s",
        "--expect",
        "dropped:NO_SOCKET",
    ];
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    ask(&scenario, "d");
    let traced = tracer.finish(Duration::from_secs(20)).expect("an end");
    assert_eq!(traced.code, Some(1), "{} {}", traced.out, traced.err);
    assert!(traced.out.contains("expected dropped for NO_SOCKET, it is left-node"), "{}", traced.out);
}

#[test]
fn a_killed_trace_leaves_nothing() {
    let scenario = build();
    let shared = loaded();
    let tracer = Tracer::start(scenario.node(0), &["--all", "--for", "60s"]).expect("a trace");
    let [programs, maps] = held(tracer.pid());
    let own: [BTreeSet<u32>; 2] = [&programs - &shared[0], &maps - &shared[1]];
    assert!(own[0].len() >= 5 && own[1].len() >= 5, "{own:?}");
    tracer.kill9().expect("killed");
    let gone = || loaded().iter().zip(&own).all(|(now, own)| now.is_disjoint(own));
    Deadline::secs(10).until("the kernel has freed the probes", gone).expect("gone");
    // Nothing holds the lock, and what it left in the pinned maps is no trouble for the next one.
    let args = ["pod:default/a", "to", "svc:default/to-b", "-c", "2", "--for", "10s"];
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    ask(&scenario, "b");
    let traced = tracer.finish(Duration::from_secs(20)).expect("an end");
    assert_eq!(traced.code, Some(0), "{} {}", traced.out, traced.err);
}

#[test]
fn a_record_becomes_a_capture_a_graph_and_a_comparison() {
    let scenario = build();
    let directory = scenario.node(0).state_dir().to_owned();
    let file = |name: &str| directory.join(name).display().to_string();
    for (name, on) in [("off", false), ("on", true)] {
        scenario.node(0).set_br_netfilter(on).expect("set");
        let path = file(name);
        let args = ["pod:default/a", "to", "svc:default/to-d", "-c", "2", "--for", "10s", "-o", "ndjson", "-w", &path];
        let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
        ask(&scenario, "d");
        assert_eq!(tracer.finish(Duration::from_secs(20)).expect("an end").code, Some(0));
    }
    let show = |args: &[&str]| tracer::run(scenario.node(0), args).expect("an end");
    let (off, on, capture) = (file("off"), file("on"), file("trace.pcapng"));
    let graph = show(&["graph", &off]);
    assert!(
        graph.out.starts_with("flowchart LR\n") && graph.out.contains("from_pod: service_new pass"),
        "{}",
        graph.out
    );
    let picture = show(&["show", &off, "-o", "svg"]);
    assert!(picture.out.starts_with("<svg ") && picture.out.ends_with("</svg>\n"), "{}", picture.out);
    let text = show(&["show", &off, "-o", "tree"]);
    assert!(text.out.contains("└─ left-node"), "{}", text.out);
    assert_eq!(show(&["show", &off, "-o", "pcapng", "-w", &capture]).code, Some(0));
    let bytes = std::fs::read(&capture).expect("a capture");
    assert_eq!(bytes.get(..4), Some(&[0x0a, 0x0d, 0x0d, 0x0a][..]));
    // Not a step more or less: br_netfilter's part is in the hooks, not in the places.
    let same = show(&["diff", &off, &on]);
    assert_eq!(same.code, Some(0), "{}", same.out);
    assert!(same.out.contains("    eth0 net_dev_queue (forward)"), "{}", same.out);
}

#[test]
fn few_matches_are_found_in_a_flood() {
    let scenario = build();
    let a = scenario.netns("a").expect("a namespace");
    let args = ["pod:default/a", "to", "svc:default/to-b", "-f", "udp", "--all-of-flow", "--no-replies", "-c", "8"];
    let args = [&args[..], &["--for", "20s", "--rate", "0", "-o", "ndjson"]].concat();
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    let load = std::thread::scope(|scope| {
        let load = scope.spawn(|| tcp_rr(&a, target("b"), 4, Duration::from_secs(4)).expect("load"));
        for _ in 0..8 {
            // Each on a socket of its own: a flow of one request.
            udp_exchange(&a, target("b"), &UdpOptions::default()).expect("an exchange");
            let _ = Deadline::after(Duration::from_millis(300)).until("the next one", || load.is_finished());
        }
        load.join().expect("load")
    });
    let traced = tracer.finish(Duration::from_secs(30)).expect("an end");
    let summary = traced.one("summary");
    eprintln!("{:.0} exchanges a second beside {summary}", load.per_second());
    // All of them; or it says that something was lost.
    if traced.code != Some(4) {
        assert_eq!((traced.code, traced.packets().len()), (Some(0), 8), "{summary}");
    }
}

#[test]
fn a_trace_that_takes_too_much_of_a_cpu_stops() {
    let scenario = build();
    let a = scenario.netns("a").expect("a namespace");
    let args = ["pod:default/a", "-c", "100000", "--rate", "500", "--max-cpu", "1", "--for", "30s", "-o", "ndjson"];
    let tracer = Tracer::start(scenario.node(0), &args).expect("a trace");
    tcp_rr(&a, target("b"), 4, Duration::from_secs(4)).expect("load");
    let traced = tracer.finish(Duration::from_secs(10)).expect("an end");
    let summary = traced.one("summary");
    assert_eq!(traced.code, Some(6), "{summary} {}", traced.err);
    assert!(summary["overhead"]["cpu_permille"].as_u64().is_some_and(|share| share >= 10), "{summary}");
}

#[test]
fn functions_have_names_where_addresses_are_hidden() {
    let scenario = build();
    let node = scenario.node(0).netns();
    let agent = find_binary().expect("the agent").display().to_string();
    let hooks = |program: &str, first: &[&str]| {
        let output = node.command(program).args(first).args(["trace", "hooks"]).output().expect("run");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        // The first line names a task: the command itself.
        text.lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    // The capabilities of deploy/: without CAP_SYSLOG, /proc/kallsyms shows addresses of 0.
    let rights = ["--inh-caps=-all", "--bounding-set=-all,+bpf,+net_admin,+perfmon", "--no-new-privs"];
    let [read, asked] = [hooks(&agent, &[]), hooks("setpriv", &[&rights[..], &[&*agent]].concat())];
    assert!(read.iter().any(|line| line.contains("ip_sabotage_in")), "{read:?}");
    assert_eq!(asked, read);
}
