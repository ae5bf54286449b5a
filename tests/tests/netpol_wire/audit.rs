//! A policy on trial: nothing is refused, everything is told; and what rules have decided.

use std::fs;
use std::net::SocketAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proxy_abi::ABI_VERSION;
use proxy_abi::policy::map;
use proxy_tests::tracer::Tracer;
use proxy_tests::traffic::{Answer, Transport, probe_all};
use proxy_tests::{Deadline, Family};
use serde_json::{Value, json};

use crate::stage::{Expect, Stage};

/// A list of the command line.
fn items(stage: &Stage, words: &[&str]) -> Vec<Value> {
    let (code, text) = stage.run(0, &[words, &["-o", "json"]].concat());
    assert!(code == 0 || code == 2, "{text}");
    let list: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    list["items"].as_array().expect("items").clone()
}

/// The row of x-a's interface.
fn row(stage: &Stage) -> Value {
    let all = stage.endpoints(0);
    all.into_iter().find(|row| row["pod"] == "x/x-a").unwrap_or_default()
}

/// Asks x-a once from a pod, by address.
fn reaches(stage: &Stage, from: &str, port: u16) -> bool {
    let netns = stage.scenario.netns(from).expect("namespace");
    let target = SocketAddr::new(stage.ip("x-a", Family::V4), port);
    let answers = probe_all(&netns, &[(target, Transport::Tcp)], Duration::from_secs(2)).expect("asked");
    matches!(answers[0], Answer::From { .. })
}

#[test]
fn a_policy_on_trial_and_then_in_force() {
    let mut stage = Stage::build();
    let spec = json!({
        "podSelector": { "matchLabels": { "pod": "a" } },
        "policyTypes": ["Ingress"],
        "ingress": [
            { "from": [{ "podSelector": { "matchLabels": { "pod": "b" } } }], "ports": [{ "port": 80 }] },
            { "from": [{ "podSelector": { "matchLabels": { "pod": "nobody" } } }], "ports": [{ "port": 80 }] },
        ],
    });
    stage.audit("x", "web", &spec);
    stage.settle();
    let pod = stage.scenario.cluster().pod("x-a").expect("a pod");
    stage.wait_endpoint(0, &pod, "audited");
    // Nobody is refused anything, on either node, by address or Service.
    let all = |rules| Expect { transport: Transport::Tcp, port: 80, rules };
    stage.check("only audited", &[all(vec![])]);

    // Everybody but x-b would have been, and the trace tells it.
    let before = row(&stage)["audited"].as_u64().expect("a number");
    assert!(before > 0 && row(&stage)["refused"] == 0, "{}", row(&stage));
    let words = ["pod:y/y-a", "to", "pod:x/x-a:80/tcp", "-o", "ndjson"];
    let tracer = Tracer::start(stage.scenario.node(0), &words).expect("trace");
    assert!(reaches(&stage, "y-a", 80) && reaches(&stage, "x-b", 80));
    let told = || tracer.written().contains("policy_audit");
    Deadline::secs(20)
        .until("the trace tells it", told)
        .unwrap_or_else(|error| panic!("{error}: {}", tracer.written()));
    let traced = tracer.interrupt().expect("ended");
    let told = |line: &&Value| line["t"] == "decision" && line["reason"] == "policy_audit";
    let told: Vec<Value> = traced.lines().iter().filter(told).cloned().collect();
    let verdicts: Vec<_> =
        told.iter().map(|line| format!("{} {} {}", line["hook"], line["verdict"], line["pod"])).collect();
    assert_eq!(verdicts, [r#""to_pod" "pass" "x/x-a""#], "{}\n{}", traced.out, traced.err);
    assert_eq!(row(&stage)["audited"], before + 1, "once for a connection");

    // What explains it.
    let (code, text) = stage.run(0, &["explain", "y/y-a", "x/x-a", "80/tcp"]);
    assert!(code == 0 && text.contains("would be denied by audit of x/web"), "{code} {text}");
    let audit =
        |from: &str| items(&stage, &["explain", from, "x/x-a", "80/tcp"])[0]["sides"][1]["denied_by_audit"].clone();
    assert_eq!((audit("y/y-a"), audit("x/x-b")), (json!(["x/web"]), Value::Null));
    let policy = items(&stage, &["policy", "list"]).remove(0);
    let hits = |at: usize| policy["ingress_hits"][at]["count"].as_u64();
    assert_eq!((policy["mode"].as_str(), hits(1)), (Some("audited"), Some(0)), "{policy}");
    assert!(hits(0) > Some(0) && policy["refused"].as_u64() > Some(0), "{policy}");
    let unused: Vec<_> = items(&stage, &["policy", "list", "--unused"])
        .iter()
        .map(|row| format!("{} {} {}", row["policy"], row["rule"], row["unused_since"].as_u64() > Some(1_600_000_000)))
        .collect();
    assert_eq!(unused, [r#""x/web" "ingress[1]" true"#]);

    // It is all there after a restart, and while the agent is away.
    stage.scenario.agent_mut(0).restart().expect("healthy");
    stage.settle();
    let counted =
        || items(&stage, &["policy", "list"]).first().and_then(|row| row["hits"].as_u64()) >= policy["hits"].as_u64();
    Deadline::secs(20).until("counts are kept", counted).expect("kept");
    stage.check("only audited, after a restart", &[all(vec![])]);

    // In force: what was told of happens.
    stage.apply("x", "web", &spec);
    stage.check("enforced", &[all(vec![("*", "x/a", false), ("x/b", "x/a", true)])]);
    let refused = row(&stage);
    assert!(refused["refused"].as_u64() > Some(0) && refused["policy"] == "ingress", "{refused}");

    // Over the pins of a version that did not count: what is in force stays so, and counting begins.
    let agent = stage.scenario.agent_mut(0);
    let version = |number: u32| agent.pin_root().join(format!("v{number}"));
    let (now, older) = (version(ABI_VERSION), version(ABI_VERSION - 1));
    agent.stop().expect("stopped");
    fs::rename(&now, &older).expect("renamed");
    for map in [map::HITS, map::POD_HITS] {
        fs::remove_file(older.join("maps").join(map)).expect("removed");
    }
    let begin = SystemTime::now().duration_since(UNIX_EPOCH).expect("a time").as_secs();
    stage.scenario.agent_mut(0).restart().expect("healthy");
    stage.settle();
    assert!(now.exists() && !older.exists());
    stage.check("over older pins", &[all(vec![("*", "x/a", false), ("x/b", "x/a", true)])]);
    let policy = items(&stage, &["policy", "list"]).remove(0);
    let rule = &policy["ingress_hits"][0];
    assert!(rule["count"].as_u64() > Some(0) && rule["since"].as_u64() >= Some(begin), "{policy}");
}
