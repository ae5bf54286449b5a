//! Restart is the normal case: what runs through Services goes on without the agent, and finds itself again after it.

use std::fs;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proxy_agent::check::find_cgroup2;
use proxy_agent::dataplane::sysbpf;
use proxy_tests::agent::run_refused;
use proxy_tests::cluster::{ClusterSpec, Links, NodeSpec};
use proxy_tests::scenario::footprint::{Footprint, link_exists, link_ids, pins};
use proxy_tests::scenario::matrix::{self, Setting, vip_of};
use proxy_tests::scenario::views::DeviceRow;
use proxy_tests::scenario::{SERVICE_PORT, Scenario};
use proxy_tests::traffic::flow::ping_all;
use proxy_tests::traffic::{
    ANSWERED_WITHIN, BusyFlows, Flow, Steady, SteadyOptions, TcpOptions, UdpOptions, tcp_exchange, tcp_exchange_with,
    udp_exchange,
};
use proxy_tests::{AgentOptions, Deadline, Family, Netns};

const SECOND: Duration = Duration::from_secs(1);
const PLAIN: Setting = Setting { links: Links::Routed, hostile: true, rp_filter: true };

fn target(server: &str, family: Family) -> SocketAddr {
    SocketAddr::new(vip_of(server, family).expect("a Service"), SERVICE_PORT)
}

/// One new connection and one datagram to a Service.
fn ask(client: &Netns, server: &str, family: Family) {
    let target = target(server, family);
    let report = tcp_exchange(client, target, 10_000, 10_000).expect("TCP");
    assert_eq!(report.server_name, server);
    let report = udp_exchange(client, target, &UdpOptions::default()).expect("UDP");
    assert_eq!(report.server_name, server);
}

/// From a pod and from the node itself, to a pod of the same and of the other node.
fn ask_all(scenario: &Scenario) {
    for client in ["a", "node1"] {
        let netns = scenario.netns(client).expect("namespace");
        for server in ["b", "d"] {
            for family in Family::BOTH {
                ask(&netns, server, family);
            }
        }
    }
}

#[test]
fn twenty_kills_lose_nothing() {
    let mut scenario = matrix::scenario(PLAIN, &[]).expect("scenario");
    let [a, b, node1] = ["a", "b", "node1"].map(|name| scenario.netns(name).expect("namespace"));
    let ms = Duration::from_millis(1);
    let timeout = 5 * SECOND;
    let flows = [
        BusyFlows::start(&a, target("b", Family::V4), 4, ms, timeout),
        BusyFlows::start(&a, target("d", Family::V6), 4, ms, timeout),
        BusyFlows::start(&a, target("a", Family::V4), 2, ms, timeout),
        BusyFlows::start(&node1, target("d", Family::V4), 2, ms, timeout),
    ]
    .map(|flows| flows.expect("flows"));
    let mut idle: Vec<_> = Family::BOTH
        .iter()
        .flat_map(|&family| ["b", "d"].map(|server| target(server, family)))
        .map(|target| Flow::open(&a, target, 0, ANSWERED_WITHIN).expect("flow"))
        .collect();
    let udp = |netns: &Netns, server, family, rate, connected| {
        let options = SteadyOptions { rate, connected, ..SteadyOptions::default() };
        Steady::start(netns, target(server, family), options).expect("sender")
    };
    let steady = [
        udp(&a, "b", Family::V4, 4000, false),
        udp(&b, "d", Family::V6, 500, true),
        udp(&node1, "b", Family::V4, 200, false),
    ];
    let stop = AtomicBool::new(false);
    let kept = |scenario: &Scenario| {
        let pinned = pins(scenario.agent(0).pin_root()).expect("pins");
        (scenario.services(0).expect("services"), scenario.backends(0).expect("backends"), pinned)
    };
    let before = kept(&scenario);
    assert!(!before.0.is_empty() && !before.1.is_empty() && before.2.len() > 20, "{before:?}");
    let started = Instant::now();
    let transfers = thread::scope(|scope| {
        let bulk = scope.spawn(|| {
            let mut transfers = 0;
            while !stop.load(Ordering::Relaxed) {
                let family = Family::BOTH[transfers % 2];
                let options = TcpOptions { up: 8 << 20, down: 8 << 20, timeout: 120 * SECOND, ..TcpOptions::default() };
                tcp_exchange_with(&a, target("b", family), &options).expect("bulk transfer");
                transfers += 1;
            }
            transfers
        });
        for round in 0..20 {
            scenario.agent_mut(0).kill9().expect("killed");
            if round == 0 {
                assert_eq!(scenario.status(0).expect("status").agent, "down");
            }
            scenario.agent_mut(0).restart().unwrap_or_else(|error| panic!("restart {round}: {error}"));
            assert_eq!(kept(&scenario), before, "after restart {round}");
        }
        stop.store(true, Ordering::Relaxed);
        bulk.join().expect("bulk")
    });
    let took = started.elapsed();
    for flows in flows {
        let report = flows.stop().check("busy flows").expect("whole");
        eprintln!("busy flows: {report:?}");
    }
    ping_all(&mut idle, ANSWERED_WITHIN).check("idle flows").expect("whole");
    for steady in steady {
        steady.stop().assert_whole();
    }
    eprintln!("20 restarts in {took:?}, {transfers} bulk transfers of 8 MiB each way meanwhile");
    assert!(transfers > 0);
}

#[test]
fn everything_works_while_the_agent_is_down() {
    let mut scenario = matrix::scenario(PLAIN, &[]).expect("scenario");
    let a = scenario.netns("a").expect("namespace");
    let mut flows: Vec<_> =
        Family::BOTH.iter().map(|&f| Flow::open(&a, target("b", f), 0, ANSWERED_WITHIN).expect("flow")).collect();
    let shown = (scenario.services(0).expect("list"), scenario.backends(0).expect("list"));
    let devices = scenario.devices(0).expect("list");
    scenario.agent_mut(0).kill9().expect("killed");
    assert_eq!(scenario.status(0).expect("status").agent, "down");
    assert_eq!((scenario.services(0).expect("list"), scenario.backends(0).expect("list")), shown);
    assert_eq!(scenario.devices(0).expect("list"), devices);
    ask_all(&scenario);
    ping_all(&mut flows, ANSWERED_WITHIN).check("flows of before").expect("whole");
    let listed = scenario.flows(0).expect("list");
    let mine = flows.iter().filter(|flow| {
        let is = |row: &&proxy_tests::scenario::views::FlowRow| row.source == flow.local() && row.table == "live";
        listed.iter().any(|row| is(&row) && row.destination == flow.peer())
    });
    assert_eq!(mine.count(), flows.len(), "{listed:#?}");

    // A pod that comes and a backend that goes meanwhile are found by the next agent.
    let b = scenario.cluster().pod("b").expect("pod").host_veth().ifindex;
    let late = scenario.cluster().add_pod("node1", "late").expect("pod");
    scenario.cluster().node("node1").expect("node").remove_pod("b").expect("removed");
    scenario.agent_mut(0).restart().expect("healthy");
    scenario.wait_pods(0).expect("the new pod is known");
    let is_there = |ifindex| move |row: &DeviceRow| row.ifindex == ifindex;
    let changed = || {
        let rows = scenario.devices(0).expect("list");
        rows.iter().any(is_there(late.host_veth().ifindex)) && !rows.iter().any(is_there(b))
    };
    Deadline::secs(10).until("late is there, b has gone", changed).expect("both");
    ask(late.netns(), "d", Family::V4);
    ask(late.netns(), "a", Family::V6);
}

#[test]
fn the_last_state_stays_while_the_source_is_away() {
    let mut scenario = matrix::scenario(PLAIN, &[]).expect("scenario");
    let kept = |scenario: &Scenario| {
        (scenario.services(0).expect("list"), scenario.backends(0).expect("list"), scenario.devices(0).expect("list"))
    };
    let before = kept(&scenario);
    let folder = scenario.manifests().dir().to_owned();
    let away = folder.with_extension("away");

    // The folder goes while the agent runs.
    fs::rename(&folder, &away).expect("moved");
    scenario.wait_logged(0, &["WARN", &folder.display().to_string()]).expect("it says so");
    assert_eq!(kept(&scenario), before);
    ask_all(&scenario);

    // An agent that starts without its source changes nothing, whether it stays or ends.
    scenario.agent_mut(0).options_mut().ready_within = 2 * SECOND;
    let error = scenario.agent_mut(0).restart().expect_err("it has no source");
    assert!(error.to_string().contains(&folder.display().to_string()), "{error}");
    assert_eq!(kept(&scenario), before);
    ask_all(&scenario);

    // Back again, everything is as it was.
    fs::rename(&away, &folder).expect("moved");
    scenario.agent_mut(0).options_mut().ready_within = 20 * SECOND;
    scenario.agent_mut(0).restart().expect("healthy");
    assert_eq!(kept(&scenario), before);

    // Objects that cannot be read any more are not gone.
    let names: Vec<_> = fs::read_dir(&folder).expect("list").map(|entry| entry.expect("entry").file_name()).collect();
    let names: Vec<_> = names.iter().map(|name| name.to_str().expect("a name")).collect();
    let texts: Vec<_> = names.iter().map(|name| fs::read_to_string(folder.join(name)).expect("manifest")).collect();
    for (name, text) in names.iter().zip(&texts) {
        scenario.manifests().write_text(name, &format!("{text}\n  broken: [\n")).expect("written");
        // Of other nodes' objects it has nothing to say.
        if !name.starts_with("node.") {
            scenario.wait_logged(0, &["WARN", name, "broken"]).expect("it says so");
        }
    }
    assert_eq!(kept(&scenario), before);
    ask_all(&scenario);

    // Nor are those that an agent finds unreadable when it starts.
    scenario.agent_mut(0).restart().expect("healthy");
    assert_eq!(kept(&scenario), before);
    ask_all(&scenario);

    // A folder that is read and empty is an answer.
    for name in &names {
        fs::remove_file(folder.join(name)).expect("removed");
    }
    let gone = || scenario.services(0).is_ok_and(|rows| rows.is_empty());
    Deadline::secs(10).until("deleted objects leave the kernel", gone).expect("deleted");
}

fn check_cleanup(args: &[&str]) {
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").hostile(true).pods(["a", "b"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    scenario.serve_pod("b").expect("servers");
    scenario.publish("to-b", 102, &["b"]).expect("published");
    let before = Footprint::of(scenario.node(0)).expect("footprint");
    scenario.start_agents(args).expect("agents");
    ask(&scenario.netns("a").expect("namespace"), "b", Family::V4);
    ask(&scenario.netns("node1").expect("namespace"), "b", Family::V6);
    let running = Footprint::of(scenario.node(0)).expect("footprint");
    assert_eq!(running.rules, before.rules, "no netfilter rule of ours");
    let root = scenario.agent(0).pin_root().to_owned();
    let links = link_ids(&root).expect("links");
    assert!(links.len() >= 8, "at least the socket programs: {links:?}");
    assert!(links.values().all(|&id| link_exists(id)));
    let attached = links.keys().any(|pin| pin.contains("/links/from_pod_")) || running.filters != before.filters;
    assert!(attached, "nothing is on the interfaces: {links:?} {running:?}");
    scenario.agent_mut(0).kill9().expect("killed");
    let said = scenario.agent(0).cleanup().expect("cleanup");
    assert!(said.contains("links/connect4") && said.contains("maps/frontend"), "{said}");
    assert!(!root.exists(), "{}", root.display());
    // The kernel frees links and programs after a grace period, which is longer where it is busy.
    let (mut differs, mut left) = (Vec::new(), Vec::new());
    let as_before = || {
        differs = before.difference(&Footprint::of(scenario.node(0)).expect("footprint"));
        left = links.iter().filter(|(_, id)| link_exists(**id)).collect();
        differs.is_empty() && left.is_empty()
    };
    let freed = Deadline::secs(20).until("as before", as_before);
    assert_eq!(differs, Vec::<String>::new());
    assert!(left.is_empty(), "links that outlive their pins: {left:?}");
    freed.expect("as before");
    let again = scenario.agent(0).cleanup().expect("cleanup of nothing");
    assert!(again.contains("nothing of proxy-agent is here"), "{again}");
}

#[test]
fn cleanup_leaves_nothing() {
    check_cleanup(&[]);
}

#[test]
fn cleanup_leaves_nothing_of_clsact() {
    check_cleanup(&["--attach", "clsact"]);
}

#[test]
fn a_change_of_attach_leaves_one_set_of_programs() {
    let mut scenario = matrix::scenario(PLAIN, &["--attach", "clsact"]).expect("scenario");
    let veth = scenario.cluster().pod("a").expect("pod").host_veth().clone();
    let filters = |scenario: &Scenario| {
        let footprint = Footprint::of(scenario.node(0)).expect("footprint");
        footprint.filters.keys().filter(|key| key.starts_with(&veth.name)).count()
    };
    let links = |scenario: &Scenario| {
        let links = link_ids(scenario.agent(0).pin_root()).expect("links");
        links.keys().filter(|pin| pin.ends_with(&format!("_pod_{}", veth.ifindex))).count()
    };
    let a = scenario.netns("a").expect("namespace");
    let mut flow = Flow::open(&a, target("d", Family::V4), 0, ANSWERED_WITHIN).expect("flow");
    for (mode, expected) in [("clsact", (2, 0)), ("tcx", (0, 2)), ("clsact", (2, 0)), ("auto", (0, 2))] {
        scenario.agent_mut(0).options_mut().args = vec!["--attach".to_owned(), mode.to_owned()];
        scenario.agent_mut(0).restart().expect("healthy");
        assert_eq!((filters(&scenario), links(&scenario)), expected, "--attach {mode}");
        ping_all(std::slice::from_mut(&mut flow), 3 * SECOND).check(mode).expect("the flow lives");
        ask_all(&scenario);
    }
}

/// A cgroup that goes with its scope.
struct Cgroup(PathBuf);

impl Drop for Cgroup {
    fn drop(&mut self) {
        // It is empty, and links on it do not keep it.
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_change_of_cgroup_leaves_one_set_of_programs() {
    let mut scenario = matrix::scenario(PLAIN, &[]).expect("scenario");
    let root = find_cgroup2().expect("cgroup v2");
    let own = Cgroup(root.join(format!("{}-cgroup", scenario.node(0).netns().name())));
    fs::create_dir(&own.0).expect("a cgroup");
    let pins = scenario.agent(0).pin_root().to_owned();
    // Of each pinned link to a cgroup: which.
    let attached = || {
        let links = link_ids(&pins).expect("links");
        let info = |pin: &String| {
            let link = sysbpf::obj_get(pin.as_ref()).expect("a link");
            sysbpf::link_info(link.as_fd()).expect("a link").cgroup
        };
        links.keys().map(info).filter(|cgroup| *cgroup != 0).collect::<Vec<_>>()
    };
    let id = |path: &Path| path.metadata().expect("a folder").ino();
    let (everywhere, here) = (vec![id(&root); 8], vec![id(&own.0); 8]);
    assert_eq!(attached(), everywhere);
    for (cgroup, expected) in [
        (own.0.display().to_string(), &here),
        ("none".to_owned(), &vec![]),
        (own.0.display().to_string(), &here),
        ("auto".to_owned(), &everywhere),
    ] {
        scenario.agent_mut(0).options_mut().args = vec!["--cgroup".to_owned(), cgroup.clone()];
        scenario.agent_mut(0).restart().expect("healthy");
        assert_eq!(attached(), *expected, "--cgroup {cgroup}");
    }
    ask_all(&scenario);
}

#[test]
fn a_second_agent_on_the_same_pins_is_refused() {
    let scenario = matrix::scenario(PLAIN, &[]).expect("scenario");
    let options: AgentOptions = scenario.options().args(["--healthz-bind-address", "none"]);
    let root = scenario.agent(0).pin_root();
    let refused = run_refused(scenario.node(0), &[], root, &options).expect("it ends");
    assert_eq!(refused.status.and_then(|status| status.code()), Some(1), "{refused:?}");
    assert!(refused.said.contains(&format!("another agent holds {}", root.display())), "{}", refused.said);
    assert_eq!(scenario.status(0).expect("status").agent, "running");
    ask_all(&scenario);
}
