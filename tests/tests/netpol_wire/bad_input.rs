//! Objects that are wrong, or change all the time: no gap, and nobody else is disturbed.

use std::net::SocketAddr;

use proxy_tests::policy_manifest::PodObject;
use proxy_tests::traffic::{Steady, SteadyOptions, Transport};
use proxy_tests::{Deadline, Family};
use serde_json::{Value, json};

use crate::stage::{Expect, Stage};

fn on_80(transport: Transport, rules: Vec<(&'static str, &'static str, bool)>) -> Expect {
    Expect { transport, port: 80, rules }
}

/// `problems` of `policy list`, by policy.
fn problems(stage: &Stage) -> Vec<(String, usize)> {
    let (code, text) = stage.run(0, &["policy", "list", "-o", "json"]);
    assert_eq!(code, 0, "{text}");
    let list: Value = serde_json::from_str(&text).expect("JSON");
    let count = |row: &Value| {
        (row["policy"].as_str().unwrap_or_default().to_owned(), row["problems"].as_array().map_or(0, Vec::len))
    };
    list["items"].as_array().expect("items").iter().map(count).collect()
}

#[test]
fn what_cannot_be_read_narrows_and_is_told() {
    let mut stage = Stage::build();
    // Wrong items beside a right one: they match nothing, and the right one goes on.
    let odd = json!({
        "podSelector": { "matchLabels": { "pod": "a" } },
        "policyTypes": ["Ingress", "Sideways"],
        "ingress": [{ "from": [
            { "ipBlock": { "cidr": "10.244.0/24" } },
            { "ipBlock": { "cidr": "fd00:10:244::1/56", "except": ["fd00:10:244::/56"] } },
            { "podSelector": { "matchExpressions": [{ "key": "pod", "operator": "Equals", "values": ["c"] }] } },
            {},
            { "podSelector": { "matchLabels": { "pod": "b" } } },
        ], "ports": [{ "port": 80, "endPort": 79 }, { "port": "http", "endPort": 90 }, { "port": 80 }], "unknown": 1 }],
    });
    stage.apply("x", "odd", &odd);
    stage.settle();
    // An unknown type isolates both ways.
    let rules = vec![("*", "x/a", false), ("x/b", "x/a", true), ("x/a", "*", false)];
    stage.check("odd items", &[on_80(Transport::Tcp, rules)]);
    assert!(matches!(problems(&stage)[..], [(ref name, 6)] if name == "x/odd"), "{:?}", problems(&stage));
    stage.delete("x", "odd");

    // One that cannot be read at all, and never could be: its namespace, both ways, until it is mended.
    stage.apply(
        "y",
        "broken",
        &json!({ "podSelector": { "matchLabels": { "pod": "nobody" } }, "policyTypes": "Ingress" }),
    );
    stage.settle();
    stage.check("unreadable", &[on_80(Transport::Udp, vec![("*", "y/*", false), ("y/*", "*", false)])]);
    stage.scenario.wait_logged(0, &["NetworkPolicy y/broken spec.policyTypes", "expected a sequence"]).expect("logged");
    stage.apply("y", "broken", &json!({ "podSelector": { "matchLabels": { "pod": "nobody" } } }));
    stage.check("mended", &[on_80(Transport::Udp, vec![])]);
    // And one that was well stays as it was.
    stage.apply("y", "broken", &json!({ "podSelector": {}, "ingress": 7 }));
    stage.scenario.wait_logged(0, &["NetworkPolicy y/broken spec.ingress"]).expect("logged");
    stage.check("its last good version", &[on_80(Transport::Udp, vec![])]);
    stage.delete("y", "broken");

    // Pods of the node's own network are no pods: a policy that selects them changes nothing, for them and for others.
    let node = stage.scenario.node(0).ip(Family::V4).to_string();
    let host = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "namespace": "x", "name": "host", "uid": "u-host", "labels": { "pod": "host" } },
        "spec": { "nodeName": "node1", "hostNetwork": true, "containers": [] },
        "status": { "phase": "Running", "podIP": node, "podIPs": [{ "ip": node }] },
    });
    stage.scenario.manifests().write(&host).expect("written");
    stage.apply(
        "x",
        "host",
        &json!({ "podSelector": { "matchLabels": { "pod": "host" } }, "policyTypes": ["Ingress", "Egress"] }),
    );
    stage.settle();
    stage.check("hostNetwork", &[on_80(Transport::Tcp, vec![]), on_80(Transport::Udp, vec![])]);
    assert!(stage.endpoints(0).iter().all(|row| row["policy"] == "open"), "{:?}", stage.endpoints(0));
}

#[test]
fn labels_that_flap_open_nothing() {
    let mut stage = Stage::build();
    let only_friends = json!({
        "podSelector": { "matchLabels": { "pod": "a" } },
        "ingress": [{ "from": [{ "namespaceSelector": {}, "podSelector": { "matchLabels": { "friend": "yes" } } }] }],
    });
    stage.apply("x", "friends", &only_friends);
    stage.settle();
    stage.check("before", &[on_80(Transport::Udp, vec![("*", "x/a", false)])]);
    let before = stage.answered("x-a", 80);
    let outsider = stage.scenario.netns("z-b").expect("namespace");
    let target = SocketAddr::new(stage.ip("x-a", Family::V4), 80);
    let sender = Steady::start(&outsider, target, SteadyOptions::default()).expect("sender");
    let other = SocketAddr::new(stage.ip("x-b", Family::V4), 80);
    let allowed =
        Steady::start(&outsider, other, SteadyOptions { rate: 200, ..SteadyOptions::default() }).expect("sender");
    // Another pod's labels, and the subject's own other labels, as fast as files are written.
    let pods = ["x-c", "x-a"].map(|name| PodObject::of(&stage.scenario.cluster().pod(name).expect("pod")));
    for round in 0..2_000_u32 {
        let mood = if round % 2 == 0 { "yes" } else { "no" };
        let [friend, subject] = &pods;
        stage.scenario.manifests().write(&friend.clone().label("friend", mood)).expect("written");
        stage.scenario.manifests().write(&subject.clone().label("mood", mood)).expect("written");
    }
    stage.scenario.manifests().write(&pods[0].clone().label("friend", "yes")).expect("written");
    let reached =
        Expect { transport: Transport::Udp, port: 81, rules: vec![("*", "x/a", false), ("x/c", "x/a", true)] };
    stage.check("afterwards", &[reached]);
    let sent = sender.stop_unanswered().sent();
    assert_eq!(stage.answered("x-a", 80), before, "of {sent} packets");
    allowed.stop().assert_whole();
    let alive = Deadline::secs(60)
        .until("alive", || stage.scenario.agent(0).get("/healthz").is_ok_and(|(code, _)| code == 200));
    alive.expect("healthy");
}
