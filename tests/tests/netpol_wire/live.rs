//! Connections that live when the policy changes.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_tests::traffic::flow::Ping;
use proxy_tests::traffic::{BusyFlows, Flow};
use proxy_tests::{Deadline, Family};
use serde_json::{Value, json};

use crate::stage::Stage;

const SECOND: Duration = Duration::from_secs(1);
/// An echo on a simulated node takes less than a tenth of it, but on a machine that does something else.
const SOON: Duration = Duration::from_millis(100);

/// A policy for x-a that lets this in.
fn policy(ingress: &Value) -> Value {
    json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Ingress"], "ingress": ingress })
}

#[test]
fn a_denied_flow_stops_and_an_allowed_one_goes_on() {
    let mut stage = Stage::build();
    stage.apply("x", "policy", &policy(&json!([{}])));
    stage.settle();
    // By address and by Service, on one node and across both.
    let mut flows = Vec::new();
    for from in ["x-b", "y-c"] {
        for family in Family::BOTH {
            for ip in [stage.ip("x-a", family), stage.vip("x-a", family)] {
                let netns = stage.scenario.netns(from).expect("namespace");
                let target = SocketAddr::new(ip, 80);
                let flow = Flow::open(&netns, target, 0, Duration::from_secs(5)).expect("open");
                flows.push((format!("{from} → x-a at {target}"), flow));
            }
        }
    }
    let other = stage.scenario.netns("y-a").expect("namespace");
    let busy: Vec<BusyFlows> = Family::BOTH
        .iter()
        .map(|&family| {
            let target = SocketAddr::new(stage.ip("x-b", family), 80);
            BusyFlows::start(&other, target, 2, Duration::from_millis(2), Duration::from_secs(5)).expect("busy")
        })
        .collect();
    for (name, flow) in &mut flows {
        assert!(matches!(flow.ping(SECOND), Ping::Echoed(_)), "{name} before");
    }

    let begin = Instant::now();
    stage.apply("x", "policy", &policy(&json!([])));
    let (first, flow) = &mut flows[0];
    let mut last = begin.elapsed();
    let cut = || {
        let sent = begin.elapsed();
        let late = flow.ping(SOON) == Ping::Late;
        last = if late { last } else { sent };
        late
    };
    Deadline::secs(10).until("cut", cut).expect("a flow that is denied stops");
    println!("{first} had its last echo {last:?} after the policy was written");
    stage.settle();
    for (name, flow) in &mut flows {
        let cut = || flow.ping(SOON) == Ping::Late;
        Deadline::secs(10).until("cut", cut).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    // What it has sent comes through when it may: nothing was reset.
    stage.apply("x", "policy", &policy(&json!([{}])));
    for (name, flow) in &mut flows {
        let back = || matches!(flow.ping(SECOND), Ping::Echoed(_));
        Deadline::secs(30).until("goes on", back).unwrap_or_else(|error| panic!("{name}: {error}"));
    }
    for flows in busy {
        flows.stop().check("flows that no policy is about").expect("whole");
    }
}
