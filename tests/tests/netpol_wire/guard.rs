//! `--bridge-guard`: a pod that starts while the agent is away says nothing and hears nothing.

use std::fs;
use std::io::{Write as _, stderr};
use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::cluster::PodSpec;
use proxy_tests::policy_manifest::PodObject;
use proxy_tests::traffic::{Answer, Transport, UdpServer, probe};
use proxy_tests::{Deadline, Family, Netns, Pod};
use serde_json::json;

use crate::stage::Stage;

const TABLE: &str = "proxy_agent_guard";

fn table(stage: &Stage) -> String {
    stage.scenario.node(0).run("nft", &["list", "ruleset"]).expect("nft")
}

/// How long an answer may take that is to come, on a busy machine.
fn patient() -> Deadline {
    Deadline::secs(20)
}

/// Does the other one answer?
fn reaches(from: &Pod, to: &Pod) -> [bool; 2] {
    Family::BOTH.map(|family| {
        let target = SocketAddr::new(to.ip(family), 80);
        let answer = probe(from.netns(), target, Transport::Udp, Duration::from_millis(400)).expect("namespace");
        matches!(answer, Answer::From { .. })
    })
}

/// Can this kernel name the bridge of a frame? Asked of the kernel, changing nothing.
fn names_bridges(stage: &Stage) -> bool {
    let rule = "add table bridge t; add chain bridge t c { type filter hook prerouting priority 0; }; add rule bridge t c meta ibrname x drop";
    stage.scenario.node(0).run("nft", &["--check", rule]).is_ok()
}

/// Says so where it is read even when the test passes.
fn not_run(what: &str, why: &str) {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    writeln!(stderr(), "NOT RUN: {what}: Linux {} {why}", release.trim()).expect("stderr");
}

/// A bridge of the node that is none of the pods'; the node has its first address.
struct ForeignBridge<'n> {
    node: &'n Netns,
    name: &'static str,
    subnet: &'static str,
}

/// Who hangs on such a bridge, with its address. Each answers on UDP port 80 under its veth's name.
struct Guests(Vec<(UdpServer, SocketAddr, Netns)>);

impl<'n> ForeignBridge<'n> {
    fn make(node: &'n Netns, name: &'static str, subnet: &'static str) -> Self {
        let lines = format!("link add {name} type bridge\naddr add {subnet}.1/24 dev {name}\nlink set {name} up\n");
        node.ip(&lines).expect("a bridge");
        Self { node, name, subnet }
    }

    /// Each by a veth of this name on the node, with this number in the subnet.
    fn join(&self, guests: &[(&str, u8)]) -> Guests {
        let Self { node, name, subnet } = self;
        let guest = |(veth, number): &(&str, u8)| {
            let ip = format!("{subnet}.{number}");
            let netns = Netns::create(&format!("{}-{veth}", node.name())).expect("a namespace");
            let inner = netns.name();
            let outer =
                format!("link add {veth} type veth peer name eth0 netns {inner}\nlink set {veth} master {name} up\n");
            node.ip(&outer).expect("a veth");
            let own = format!("link set lo up\naddr add {ip}/24 dev eth0\nlink set eth0 up\n");
            netns.ip(&own).expect("an address");
            let server = UdpServer::start(&netns, veth, 80).expect("server");
            (server, SocketAddr::new(ip.parse().expect("an address"), 80), netns)
        };
        Guests(guests.iter().map(guest).collect())
    }
}

impl Guests {
    /// Does each reach each other one?
    fn reach(&self, others: &Self) -> bool {
        let reach = |from: &Netns, to: SocketAddr| {
            let answer = probe(from, to, Transport::Udp, Duration::from_millis(400)).expect("namespace");
            matches!(answer, Answer::From { .. })
        };
        let pairs = self.0.iter().flat_map(|from| others.0.iter().map(move |to| (from, to)));
        pairs.filter(|(from, to)| from.1 != to.1).all(|(from, to)| reach(&from.2, to.1) && reach(&to.2, from.1))
    }
}

#[test]
fn other_bridges_are_none_of_its_business() {
    let mut stage = Stage::with(&["--bridge-guard"]);
    if !names_bridges(&stage) {
        not_run("the guard names the bridges of pods", "lacks nft_meta_bridge");
        return;
    }
    let node = stage.scenario.node(0).netns().clone();
    // As Docker and libvirt make them, and with veths that are called as those of pods are.
    let docker0 = ForeignBridge::make(&node, "docker0", "172.17.0");
    let virbr0 = ForeignBridge::make(&node, "virbr0", "192.168.122");
    let docker = docker0.join(&[("vethdocka", 2), ("vethdockb", 3)]);
    let libvirt = virbr0.join(&[("vethvirta", 2), ("vnet0", 3)]);
    let all_reach = || docker.reach(&docker) && libvirt.reach(&libvirt);
    Deadline::secs(20).until("they reach each other without a guard", all_reach).expect("reached");

    stage.apply("z", "deny", &json!({ "podSelector": {} }));
    stage.settle();
    Deadline::secs(20)
        .until("the guard", || table(&stage).contains(TABLE))
        .unwrap_or_else(|error| panic!("{error}\n{}", stage.scenario.agent(0).log_text()));
    let rules = table(&stage);
    for named in ["ibrname \"cni0\"", "obrname \"cni0\""] {
        assert!(rules.contains(named), "{named}: {rules}");
    }
    patient().until("with the guard", all_reach).unwrap_or_else(|error| panic!("{error}: {}", table(&stage)));

    stage.scenario.agent_mut(0).kill9().expect("killed");
    let later = [docker0.join(&[("vethdockc", 4)]), virbr0.join(&[("vethvirtc", 4)])];
    let new = stage.scenario.cluster().add_pod("node1", PodSpec::new("y-new").namespace("y")).expect("pod");
    let _server = UdpServer::start(new.netns(), "y-new", 80).expect("server");
    let open = stage.scenario.cluster().pod("y-a").expect("pod");
    let reached = || docker.reach(&later[0]) && libvirt.reach(&later[1]);
    Deadline::secs(20).until("guests that come while the agent is away reach the others", reached).expect("reached");
    patient().until("while the agent is away", all_reach).unwrap_or_else(|error| panic!("{error}: {}", table(&stage)));
    assert_eq!((reaches(&new, &open), reaches(&open, &new)), ([false; 2], [false; 2]), "a pod that came then");

    // It is the guard that keeps the pod silent.
    stage.scenario.node(0).run("nft", &["delete", "table", "bridge", TABLE]).expect("deleted");
    let both = || reaches(&new, &open) == [true; 2] && reaches(&open, &new) == [true; 2];
    Deadline::secs(30).until("they reach each other without it", both).expect("reached");
    stage.scenario.manifests().write(&PodObject::of(&new)).expect("written");
    stage.scenario.agent_mut(0).launch_unchecked().expect("started");
    stage.scenario.agent_mut(0).wait_healthy().expect("healthy");
    let free = || table(&stage).contains(TABLE) && both();
    Deadline::secs(20).until("free", free).unwrap_or_else(|error| panic!("{error}\n{}", table(&stage)));
    patient()
        .until("with the agent back", || all_reach() && reached())
        .unwrap_or_else(|error| panic!("{error}: {}", table(&stage)));
    let log = stage.scenario.agent(0).log_text();
    assert!(!log.contains("is on another bridge"), "{log}");
}

#[test]
fn a_pod_that_starts_while_the_agent_is_away_is_silent() {
    let mut stage = Stage::with(&["--bridge-guard"]);
    assert!(!table(&stage).contains(TABLE), "without policies");
    stage.apply("z", "deny", &json!({ "podSelector": {} }));
    stage.settle();
    Deadline::secs(20)
        .until("the guard", || table(&stage).contains(TABLE))
        .unwrap_or_else(|error| panic!("{error}\n{}", stage.scenario.agent(0).log_text()));
    let open = stage.scenario.cluster().pod("y-a").expect("pod");
    let other = stage.scenario.cluster().pod("x-a").expect("pod");
    patient().until("those with programs", || reaches(&other, &open) == [true; 2]).expect("reached");

    stage.scenario.agent_mut(0).kill9().expect("killed");
    let new = stage.scenario.cluster().add_pod("node1", PodSpec::new("y-new").namespace("y")).expect("pod");
    let _server = UdpServer::start(new.netns(), "y-new", 80).expect("server");
    assert_eq!((reaches(&new, &open), reaches(&open, &new)), ([false; 2], [false; 2]), "while the agent is away");
    patient().until("and the others go on", || reaches(&other, &open) == [true; 2]).expect("reached");

    // It is the guard that keeps it silent.
    stage.scenario.node(0).run("nft", &["delete", "table", "bridge", TABLE]).expect("deleted");
    let both = || reaches(&new, &open) == [true; 2] && reaches(&open, &new) == [true; 2];
    Deadline::secs(30).until("they reach each other without it", both).expect("reached");

    stage.scenario.manifests().write(&PodObject::of(&new)).expect("written");
    stage.scenario.agent_mut(0).launch_unchecked().expect("started");
    stage.scenario.agent_mut(0).wait_healthy().expect("healthy");
    let free =
        || table(&stage).contains(TABLE) && reaches(&new, &open) == [true; 2] && reaches(&open, &new) == [true; 2];
    Deadline::secs(20).until("free", free).unwrap_or_else(|error| panic!("{error}\n{}", table(&stage)));

    // Somebody loads the rules of the node anew.
    stage.scenario.node(0).run("nft", &["flush", "ruleset"]).expect("flushed");
    Deadline::secs(40).until("the guard comes back", || table(&stage).contains(TABLE)).expect("made anew");
    patient()
        .until("and lets in whom it let in before", free)
        .unwrap_or_else(|error| panic!("{error}: {}", table(&stage)));

    // Veths of another bridge: where the kernel cannot name bridges the guard gives way, and says so.
    if names_bridges(&stage) {
        not_run("the guard gives way to veths of other bridges", "has nft_meta_bridge");
    } else {
        let node = stage.scenario.node(0).netns();
        let guests = ForeignBridge::make(node, "docker0", "172.17.0").join(&[("vethdock", 2)]);
        let gives_way = || stage.scenario.agent(0).log_text().contains("and vethdock is on another bridge");
        Deadline::secs(20).until("it gives way", gives_way).expect("said");
        assert!(!table(&stage).contains(TABLE));
        drop(guests);
        node.ip("link del docker0\n").expect("gone");
        let again = || table(&stage).contains(TABLE);
        Deadline::secs(20).until("it comes back", again).expect("made");
    }

    stage.delete("z", "deny");
    stage.settle();
    Deadline::secs(20).until("no guard", || !table(&stage).contains(TABLE)).expect("removed");

    // The policy goes while the agent is away: nobody would let new pods in any more.
    stage.apply("z", "deny", &json!({ "podSelector": {} }));
    Deadline::secs(20).until("the guard", || table(&stage).contains(TABLE)).expect("made");
    stage.scenario.agent_mut(0).kill9().expect("killed");
    stage.delete("z", "deny");
    assert!(table(&stage).contains(TABLE), "it stays when the agent goes");
    stage.scenario.agent_mut(0).launch_unchecked().expect("started");
    stage.scenario.agent_mut(0).wait_healthy().expect("healthy");
    Deadline::secs(20).until("no guard", || !table(&stage).contains(TABLE)).expect("removed");

    // Whoever takes over gives no programs to new pods.
    stage.apply("z", "deny", &json!({ "podSelector": {} }));
    Deadline::secs(20).until("the guard", || table(&stage).contains(TABLE)).expect("made");
    stage.scenario.agent_mut(0).stop().expect("stopped");
    assert!(table(&stage).contains(TABLE), "it stays when the agent goes");
    let (code, said) = stage.run(0, &["cleanup", "--keep-flows"]);
    assert_eq!((code, said.contains(TABLE), table(&stage).contains(TABLE)), (0, true, false), "{said}");
}
