//! Forbidden packets, all the time: none of them arrives.

use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::cluster::PodSpec;
use proxy_tests::policy_manifest::PodObject;
use proxy_tests::traffic::{Answer, Steady, SteadyOptions, Transport, UdpServer, probe};
use proxy_tests::{Deadline, Family};
use serde_json::{Value, json};

use crate::stage::{Expect, Stage};

/// Packets a second of one sender; there are six of them at once.
const RATE: u32 = 1_000;

/// Namespace x talks to namespace y, and to nobody else.
pub(crate) fn only_y() -> Value {
    let y = json!([{ "namespaceSelector": { "matchLabels": { "ns": "y" } } }]);
    json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [{ "from": y }], "egress": [{ "to": y }] })
}

pub(crate) fn expected() -> Expect {
    let rules = vec![("*", "x/*", false), ("x/*", "*", false), ("y/*", "x/*", true), ("x/*", "y/*", true)];
    Expect { transport: Transport::Udp, port: 80, rules }
}

#[test]
fn nothing_forbidden_passes_while_agents_die_and_policies_change() {
    let mut stage = Stage::build();
    stage.apply("x", "only-y", &only_y());
    stage.settle();
    stage.check("before", &[expected()]);
    // In: on one node, from the other one, by Service. Out: the same.
    let ways = [
        ("z-b", "x-a", Family::V4, false),
        ("z-a", "x-a", Family::V6, false),
        ("z-c", "x-b", Family::V4, true),
        ("x-a", "z-b", Family::V6, false),
        ("x-b", "z-a", Family::V4, false),
        ("x-c", "z-c", Family::V6, true),
    ];
    let targets = ["x-a", "x-b", "z-a", "z-b", "z-c"];
    let before = targets.map(|pod| stage.answered(pod, 80));
    let senders: Vec<Steady> = ways
        .iter()
        .map(|&(from, to, family, by_service)| {
            let ip = if by_service { stage.vip(to, family) } else { stage.ip(to, family) };
            let netns = stage.scenario.netns(from).expect("namespace");
            let options = SteadyOptions { rate: RATE, connected: false, ..SteadyOptions::default() };
            Steady::start(&netns, SocketAddr::new(ip, 80), options).expect("sender")
        })
        .collect();
    let allowed: Vec<Steady> = [("y-a", Family::V4), ("y-b", Family::V6)]
        .iter()
        .map(|&(from, family)| {
            let netns = stage.scenario.netns(from).expect("namespace");
            let target = SocketAddr::new(stage.vip("x-a", family), 81);
            Steady::start(&netns, target, SteadyOptions { rate: 200, ..SteadyOptions::default() }).expect("sender")
        })
        .collect();
    // Time is told by what is allowed: about a second.
    let a_while = |stage: &Stage| {
        let enough = stage.answered("x-a", 81) + 400;
        Deadline::secs(60).until("traffic goes on", || stage.answered("x-a", 81) >= enough).expect("allowed traffic");
    };
    a_while(&stage);
    for round in 0..3 {
        for node in 0..2 {
            stage.scenario.agent_mut(node).kill9().expect("killed");
        }
        a_while(&stage);
        // What changes while nobody looks: another policy, and another rule of this one.
        stage.apply("z", "other", &json!({ "podSelector": { "matchLabels": { "pod": format!("p{round}") } } }));
        for node in 0..2 {
            stage.scenario.agent_mut(node).launch_unchecked().expect("started");
        }
        for node in 0..2 {
            stage.scenario.agent_mut(node).wait_healthy().expect("healthy");
        }
        stage.settle();
        a_while(&stage);
    }
    for round in 0..20 {
        let port = 9_000 + round;
        let extra = json!({ "podSelector": {}, "ingress": [{ "ports": [{ "port": port, "protocol": "UDP" }] }] });
        stage.apply("x", "extra", &extra);
        stage.apply("z", "other", &json!({ "podSelector": {}, "ingress": [{}] }));
        stage.settle();
        stage.delete("x", "extra");
        stage.delete("z", "other");
        stage.settle();
    }
    a_while(&stage);
    let (mut sent, mut answered) = (0, 0);
    for sender in senders {
        let report = sender.stop_unanswered();
        sent += report.sent();
        answered += report.answered();
    }
    println!("{sent} forbidden packets were sent");
    assert_eq!((targets.map(|pod| stage.answered(pod, 80)), answered), (before, 0), "of {sent} forbidden packets");
    assert!(sent > 10_000, "{sent}");
    for sender in allowed {
        sender.stop().assert_whole();
    }
    stage.check("afterwards", &[expected()]);
}

#[test]
fn a_new_pod_is_isolated_from_its_first_instant() {
    // The guard, because a netlink message may come later than a pod's first packet where the machine is busy.
    let mut stage = Stage::with(&["--bridge-guard"]);
    let deny = json!({ "podSelector": { "matchLabels": { "isolated": "yes" } }, "policyTypes": ["Ingress", "Egress"] });
    stage.apply("x", "deny", &deny);
    stage.settle();
    let node = stage.scenario.cluster().nodes()[0].name().to_owned();
    let cidr = stage.scenario.cluster().nodes()[0].pod_cidr(Family::V4);
    let options = SteadyOptions { rate: RATE, ..SteadyOptions::default() };
    let outside = stage.scenario.netns("z-b").expect("namespace");
    let mut arrived = Vec::new();
    for number in 0..10_u16 {
        let target = SocketAddr::new(cidr.host(200 + number), 80);
        let inward = Steady::start(&outside, target, options).expect("sender");
        let before = stage.answered("z-b", 80);
        let name = format!("x-n{number}");
        let spec = PodSpec::new(&name).namespace("x").label("isolated", "yes").host(200 + number);
        let pod = stage.scenario.cluster().add_pod(&node, spec).expect("pod");
        let server = UdpServer::start(pod.netns(), &name, 80).expect("server");
        let to_outside = SocketAddr::new(stage.ip("z-b", Family::V4), 80);
        let outward = Steady::start(pod.netns(), to_outside, options).expect("sender");
        stage.wait_endpoint(0, &pod, "held");
        stage.scenario.manifests().write(&PodObject::of(&pod).without_addresses()).expect("written");
        stage.wait_endpoint(0, &pod, "ingress, egress");
        let sent = (inward.stop_unanswered().sent(), outward.stop_unanswered().sent());
        arrived.push((server.answered(), stage.answered("z-b", 80) - before));
        assert!(sent.0 > 0 && sent.1 > 0, "{sent:?}");
    }
    assert_eq!(arrived, [(0, 0); 10]);

    // One that no policy is for is free as soon as the API server has told of it.
    let spec = PodSpec::new("y-new").namespace("y").host(230);
    let pod = stage.scenario.cluster().add_pod(&node, spec).expect("pod");
    let _server = UdpServer::start(pod.netns(), "y-new", 80).expect("server");
    stage.wait_endpoint(0, &pod, "held");
    stage.scenario.manifests().write(&PodObject::of(&pod)).expect("written");
    for family in Family::BOTH {
        let target = SocketAddr::new(pod.ip(family), 80);
        let reached = || {
            let answer = probe(&outside, target, Transport::Udp, Duration::from_millis(300));
            matches!(answer, Ok(Answer::From { .. }))
        };
        Deadline::secs(20).until("reached", reached).expect("free");
    }
}
