//! `--bridge-guard`: a pod that starts while the agent is away says nothing and hears nothing.

use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::cluster::PodSpec;
use proxy_tests::policy_manifest::PodObject;
use proxy_tests::traffic::{Answer, Transport, UdpServer, probe};
use proxy_tests::{Deadline, Family, Pod};
use serde_json::json;

use crate::stage::Stage;

const TABLE: &str = "proxy_agent_guard";

fn table(stage: &Stage) -> String {
    stage.scenario.node(0).run("nft", &["list", "ruleset"]).expect("nft")
}

/// Does the other one answer?
fn reaches(from: &Pod, to: &Pod) -> [bool; 2] {
    Family::BOTH.map(|family| {
        let target = SocketAddr::new(to.ip(family), 80);
        let answer = probe(from.netns(), target, Transport::Udp, Duration::from_millis(400)).expect("namespace");
        matches!(answer, Answer::From { .. })
    })
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
    assert_eq!(reaches(&other, &open), [true; 2], "those with programs");

    stage.scenario.agent_mut(0).kill9().expect("killed");
    let new = stage.scenario.cluster().add_pod("node1", PodSpec::new("y-new").namespace("y")).expect("pod");
    let _server = UdpServer::start(new.netns(), "y-new", 80).expect("server");
    assert_eq!((reaches(&new, &open), reaches(&open, &new)), ([false; 2], [false; 2]), "while the agent is away");
    assert_eq!(reaches(&other, &open), [true; 2], "and the others go on");

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

    // Veths of another bridge, on a kernel that cannot name bridges: it gives way, and says so.
    let node = stage.scenario.node(0);
    let named = node.run("nft", &["-c", "add table bridge t; add chain bridge t c { type filter hook input priority 0; }; add rule bridge t c meta ibrname x drop"]);
    node.netns()
        .ip("link add docker0 type bridge\naddr add 172.17.0.1/16 dev docker0\nlink set docker0 up\n")
        .expect("a bridge");
    let foreign = node.netns().ip("link add vethdock type veth peer name inner\nlink set vethdock master docker0 up\n");
    foreign.expect("a veth");
    let gives_way = || stage.scenario.agent(0).log_text().contains("and vethdock is on another bridge");
    if named.is_err() {
        Deadline::secs(20).until("it gives way", gives_way).expect("said");
        assert!(!table(&stage).contains(TABLE));
        stage.scenario.node(0).netns().ip("link del docker0\nlink del vethdock\n").expect("gone");
        let again = || table(&stage).contains(TABLE);
        Deadline::secs(20).until("it comes back", again).expect("made");
    }

    stage.delete("z", "deny");
    stage.settle();
    Deadline::secs(20).until("no guard", || !table(&stage).contains(TABLE)).expect("removed");
}
