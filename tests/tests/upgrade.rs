//! From one version of the layouts to the next and back: what runs through Services goes on, and no flow is lost.

use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use proxy_tests::agent::find_binary;
use proxy_tests::cluster::Links;
use proxy_tests::scenario::matrix::{self, Setting, vip_of};
use proxy_tests::scenario::{SERVICE_PORT, Scenario};
use proxy_tests::traffic::flow::ping_all;
use proxy_tests::traffic::{
    ANSWERED_WITHIN, BusyFlows, Flow, Steady, SteadyOptions, TcpOptions, connect_steadily_while, tcp_exchange_with,
};
use proxy_tests::{Deadline, Family, Netns};

const SECOND: Duration = Duration::from_secs(1);
const PLAIN: Setting = Setting { links: Links::Routed, hostile: true, rp_filter: true };
/// Version of the layouts of the agent built with `layout-next`.
const NEXT: &str = "v1000";
/// New connections that are made over the changes at least.
const CONNECTIONS: u64 = 1_000;

fn target(server: &str, family: Family) -> SocketAddr {
    SocketAddr::new(vip_of(server, family).expect("a Service"), SERVICE_PORT)
}

/// The agent as it is, and the one of the imagined next version.
fn binaries() -> (PathBuf, PathBuf) {
    let now = find_binary().expect("an agent");
    let next = now.with_file_name("proxy-agent-next");
    assert!(
        next.exists(),
        "{} is missing: cargo build -p proxy-agent --features layout-next --bin proxy-agent-next",
        next.display()
    );
    (now, next)
}

/// Directories of versions that are pinned.
fn versions(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).expect("pins").map(|entry| entry.expect("entry").file_name());
    let mut names: Vec<_> = entries.map(|name| name.to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

/// What is said of these flows: everything but how long they are idle.
fn rows(scenario: &Scenario, idle: &[Flow]) -> BTreeSet<String> {
    let mine: BTreeSet<_> = idle.iter().map(|flow| (flow.local(), flow.peer())).collect();
    let rows = scenario.flows(0).expect("flows").into_iter();
    rows.filter(|row| mine.contains(&(row.source, row.destination))).map(|row| format!("{row:?}")).collect()
}

fn idle_flows(client: &Netns, count: usize) -> Vec<Flow> {
    let targets = Family::BOTH.map(|family| ["a", "b", "d"].map(|server| target(server, family))).concat();
    (0..count).map(|n| Flow::open(client, targets[n % targets.len()], 0, ANSWERED_WITHIN).expect("flow")).collect()
}

fn change(scenario: &mut Scenario, binary: &Path) {
    let agent = scenario.agent_mut(0);
    agent.stop().expect("stopped");
    agent.set_binary(binary.to_owned());
    agent.restart().expect("healthy");
}

#[test]
fn flows_go_on_over_an_upgrade_and_back() {
    let (now, next) = binaries();
    let mut scenario = matrix::scenario(PLAIN, &[]).expect("scenario");
    let [a, b, node1] = ["a", "b", "node1"].map(|name| scenario.netns(name).expect("namespace"));
    let mut idle = idle_flows(&a, 1000);
    let busy = [
        BusyFlows::start(&a, target("b", Family::V4), 4, Duration::from_millis(1), 5 * SECOND),
        BusyFlows::start(&a, target("d", Family::V6), 4, Duration::from_millis(1), 5 * SECOND),
        BusyFlows::start(&node1, target("d", Family::V4), 2, Duration::from_millis(1), 5 * SECOND),
    ]
    .map(|flows| flows.expect("flows"));
    let udp = |netns: &Netns, server, family, rate, connected| {
        let options = SteadyOptions { rate, connected, ..SteadyOptions::default() };
        Steady::start(netns, target(server, family), options).expect("sender")
    };
    let steady = [
        udp(&a, "b", Family::V4, 2000, false),
        udp(&b, "d", Family::V6, 500, true),
        udp(&node1, "b", Family::V4, 200, false),
    ];
    let before = rows(&scenario, &idle);
    assert_eq!(before.len(), idle.len());
    let root = scenario.agent(0).pin_root().to_owned();
    let first = versions(&root);
    assert_eq!(first.len(), 1, "{first:?}");
    let kept = |scenario: &Scenario| {
        (
            scenario.services(0).expect("services"),
            scenario.backends(0).expect("backends"),
            scenario.devices(0).expect("devices"),
        )
    };
    let tables = kept(&scenario);
    let stop = Arc::new(AtomicBool::new(false));
    let (stopped, limit) = (Arc::clone(&stop), Deadline::secs(120));
    let go_on = move |made| limit.left().is_some() && (made < CONNECTIONS || !stopped.load(Ordering::Relaxed));
    let (transfers, connections) = thread::scope(|scope| {
        // Its errors are bounded, not none: a connection may be made in the moment that the two versions do not share.
        let connecting =
            scope.spawn(|| connect_steadily_while(&a, target("b", Family::V4), 16, 200, go_on).expect("connections"));
        let bulk = scope.spawn(|| {
            let mut transfers = 0;
            while !stop.load(Ordering::Relaxed) {
                // One connection that lives over the change, and is as large as it takes.
                let family = Family::BOTH[transfers % 2];
                let options =
                    TcpOptions { up: 64 << 20, down: 64 << 20, timeout: 120 * SECOND, ..TcpOptions::default() };
                tcp_exchange_with(&a, target("b", family), &options).expect("bulk transfer");
                transfers += 1;
            }
            transfers
        });
        for (binary, version) in [(&next, vec![NEXT.to_owned()]), (&now, first.clone())] {
            change(&mut scenario, binary);
            assert_eq!(versions(&root), version);
            assert_eq!(rows(&scenario, &idle), before, "flows under {version:?}");
            assert_eq!(kept(&scenario), tables, "tables under {version:?}");
        }
        stop.store(true, Ordering::Relaxed);
        (bulk.join().expect("bulk"), connecting.join().expect("connections"))
    });
    eprintln!("new connections meanwhile: {connections}, slowest {:?}", connections.quantile(1.0));
    assert!(connections.operations >= CONNECTIONS, "{} of {CONNECTIONS}: {connections}", connections.operations);
    assert!(connections.errors * 100 <= connections.operations, "{connections}: {:?}", connections.first_error);
    for flows in busy {
        let report = flows.stop().check("busy flows").expect("whole");
        eprintln!("busy flows: {report:?}");
    }
    ping_all(&mut idle, ANSWERED_WITHIN).check("idle flows").expect("whole");
    for steady in steady {
        steady.stop().assert_whole();
    }
    let log = scenario.agent(0).log_text();
    for line in log.lines().filter(|line| line.contains("another version")) {
        eprintln!("{line}");
    }
    assert!(!log.contains("could not be carried over"), "{log}");
    assert!(transfers > 0);
}

/// Killed as soon as it has begun, the next agent, of either version, goes on with it.
#[test]
fn an_upgrade_that_is_killed_is_continued() {
    let (now, next) = binaries();
    let mut scenario = matrix::scenario(PLAIN, &[]).expect("scenario");
    let a = scenario.netns("a").expect("namespace");
    let mut idle = idle_flows(&a, 100);
    let before = rows(&scenario, &idle);
    assert_eq!(before.len(), idle.len());
    let root = scenario.agent(0).pin_root().to_owned();
    let first = versions(&root);
    // How far it is to get: its directory, all its maps, the first of its links.
    let begun = ["maps", "maps/pod_flows", "links/connect4"].map(|pin| root.join(NEXT).join(pin));
    for (round, pin) in begun.iter().enumerate() {
        let agent = scenario.agent_mut(0);
        agent.stop().expect("stopped");
        agent.set_binary(next.clone());
        agent.launch_unchecked().expect("started");
        Deadline::secs(60).until("the upgrade has begun", || pin.exists()).expect("begun");
        agent.kill9().expect("killed");
        ping_all(&mut idle, ANSWERED_WITHIN).check("flows without an agent").expect("whole");
        let (binary, version) = if round == 1 { (&next, vec![NEXT.to_owned()]) } else { (&now, first.clone()) };
        change(&mut scenario, binary);
        assert_eq!(versions(&root), version, "round {round}");
        assert_eq!(rows(&scenario, &idle), before, "round {round}");
        ping_all(&mut idle, ANSWERED_WITHIN).check("flows").expect("whole");
        change(&mut scenario, &now);
        assert_eq!(rows(&scenario, &idle), before, "round {round}");
    }
    scenario.agent_mut(0).kill9().expect("killed");
    let said = scenario.agent(0).cleanup().expect("cleanup");
    assert!(said.contains("links/connect4"), "{said}");
    assert!(!root.exists(), "{}", root.display());
}
