//! `explain`, `policy list`, `policy lint`, `endpoint list`: from the maps as they are, with and without the agent.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy_tests::tracer::Tracer;
use proxy_tests::traffic::{Answer, Transport, probe_all};
use proxy_tests::{Deadline, Family};
use serde_json::{Value, json};

use crate::stage::Stage;

/// What `explain` says in JSON, whatever its exit code.
fn explain(stage: &Stage, node: usize, words: [&str; 3]) -> (i32, Vec<Value>) {
    let (code, text) = stage.run(node, &[&["explain"], &words[..], &["-o", "json"]].concat());
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    (code, value["items"].as_array().expect("items").clone())
}

/// What was decided at each side, and by which rule or which policies.
fn sides(item: &Value) -> Vec<String> {
    let all = item["sides"].as_array().expect("sides").iter();
    all.map(|side| {
        let reason = &side["reason"];
        let why = match (reason["rule"]["policy"].as_str(), reason["isolated_by"].as_array()) {
            (Some(policy), _) => format!("{policy} {}", reason["rule"]["rule"].as_str().unwrap_or_default()),
            (None, Some(policies)) if !policies.is_empty() => format!("isolated by {}", Value::from(policies.clone())),
            _ => side["cause"].as_str().unwrap_or_default().to_owned(),
        };
        let near = reason["near"].as_array().map_or(0, Vec::len);
        format!(
            "{} {} {} {why} near {near}",
            side["direction"].as_str().unwrap_or_default(),
            side["pod"],
            side["allowed"]
        )
    })
    .collect()
}

#[test]
fn who_may_reach_whom_and_why() {
    let mut stage = Stage::build();
    let web = json!({
        "podSelector": { "matchLabels": { "pod": "a" } },
        "policyTypes": ["Ingress"],
        "ingress": [
            { "from": [{ "podSelector": { "matchLabels": { "pod": "b" } } }], "ports": [{ "port": 80 }] },
            { "from": [{ "namespaceSelector": { "matchLabels": { "ns": "y" } } }], "ports": [{ "port": 81 }] },
        ],
    });
    stage.apply("x", "web", &web);
    stage.settle();
    let settled = |stage: &Stage| explain(stage, 0, ["x/x-b", "x/x-a", "80/tcp"]).1.len() == 2;
    Deadline::secs(20).until("in force", || settled(&stage)).expect("in force");

    let (code, items) = explain(&stage, 0, ["x/x-b", "x/x-a", "80/tcp"]);
    let said: Vec<_> = items.iter().map(sides).collect();
    let open = r#"egress "x/x-b" true no policy has a say near 0"#;
    let rule = r#"ingress "x/x-a" true x/web ingress[0] near 0"#;
    assert_eq!((code, said), (0, vec![vec![open.to_owned(), rule.to_owned()]; 2]), "both families");

    let (code, items) = explain(&stage, 0, ["x/x-b", "x/x-a", "81/tcp"]);
    let denied = r#"ingress "x/x-a" false isolated by ["x/web"] near 2"#;
    assert_eq!((code, sides(&items[0])[1].as_str()), (2, denied));
    let near: Vec<_> = items[0]["sides"][1]["reason"]["near"].as_array().expect("near").clone();
    let text = |near: &Value| format!("{} {} {} {}", near["rule"], near["peer"], near["port"], near["text"]);
    assert_eq!(
        near.iter().map(text).collect::<Vec<_>>(),
        [
            r#""ingress[0]" true false "pods with pod=b of namespace x, TCP 80""#,
            r#""ingress[1]" false true "all pods of namespaces with ns=y, TCP 81""#,
        ]
    );
    // Through its Service, from another node's pod, the node itself, and an address that is no pod's.
    let vip = stage.vip("x-a", Family::V4).to_string();
    let (code, items) = explain(&stage, 0, ["y/y-c", &vip, "81/tcp"]);
    assert_eq!((code, items[0]["service"].as_str()), (0, Some("default/x-a:tcp-81")));
    assert_eq!(sides(&items[0]), [r#"ingress "x/x-a" true x/web ingress[1] near 0"#]);
    assert_eq!(items[0]["from"]["node"], "node2");
    let (code, items) = explain(&stage, 0, ["node", "x/x-a", "22/tcp"]);
    assert_eq!(
        (code, sides(&items[0])),
        (0, vec![r#"ingress "x/x-a" true its own node may always near 0"#.to_owned()])
    );
    let (code, _) = explain(&stage, 0, ["192.0.2.1", "x/x-a", "80/tcp"]);
    assert_eq!(code, 2);
    // Wrong words.
    let (code, text) = stage.run(0, &["explain", "x/x-d", "x/x-a", "80/tcp"]);
    assert!(code == 1 && text.contains("no running pod is called x/x-d") && text.contains("x/x-a"), "{code} {text}");
    let (code, text) = stage.run(0, &["explain", "x/x-b", "x/x-a", "80"]);
    assert!(code == 2 && text.contains("write PORT/PROTOCOL"), "{code} {text}");

    let endpoints = |stage: &Stage| stage.endpoints(0);
    let shown: Vec<_> =
        endpoints(&stage).iter().map(|row| format!("{} {} {}", row["pod"], row["policy"], row["by"])).collect();
    let mut want =
        [r#""x/x-a" "ingress" ["x/web"]"#, r#""x/x-b" "open" []"#, r#""y/y-a" "open" []"#, r#""z/z-b" "open" []"#];
    want.sort_unstable();
    let mut sorted = shown.clone();
    sorted.sort();
    assert_eq!(sorted, want);
    let revision = |stage: &Stage| {
        let rows = endpoints(stage);
        rows.iter().find(|row| row["policy"] == "ingress").map(|row| row["revision"].clone())
    };
    let before = revision(&stage);
    stage.apply("z", "other", &json!({ "podSelector": { "matchLabels": { "pod": "nobody" } } }));
    stage.settle();
    assert_eq!(revision(&stage), before, "another namespace's policy");

    // What is the matter: with the second policy, and nothing with the first.
    let lint = |stage: &Stage, words: &[&str]| {
        let (code, text) = stage.run(0, &[&["policy", "lint"], words, &["-o", "json"]].concat());
        let rows: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
        let row = |row: &Value| format!("{} {} {}", row["policy"], row["rule"], row["kind"]);
        (code, rows["items"].as_array().expect("items").iter().map(row).collect::<Vec<_>>())
    };
    let told = (2, vec![r#""z/other" null "selects-nobody""#.to_owned()]);
    assert_eq!([lint(&stage, &[]), lint(&stage, &["z/other"])], [told.clone(), told]);
    assert_eq!(lint(&stage, &["x/web"]), (0, vec![]));
    let (code, text) = stage.run(0, &["policy", "lint", "x/none"]);
    assert!(code == 1 && text.contains("no NetworkPolicy is called x/none"), "{code} {text}");
    let (_, text) = stage.run(0, &["policy", "list", "-o", "json"]);
    let list: Value = serde_json::from_str(&text).expect("JSON");
    let counts =
        list["items"].as_array().expect("items").iter().map(|row| format!("{} {}", row["policy"], row["lint"]));
    assert_eq!(counts.collect::<Vec<_>>(), [r#""x/web" 0"#, r#""z/other" 1"#]);

    // Without the agent: the same verdict, in numbers.
    let ip = |pod| stage.ip(pod, Family::V4).to_string();
    let (from, to) = (ip("x-b"), ip("x-a"));
    stage.scenario.agent_mut(0).kill9().expect("killed");
    let (code, items) = explain(&stage, 0, [&from, &to, "81/tcp"]);
    assert_eq!((code, items[0]["sides"][1]["cause"].as_str()), (2, Some("isolated, and no rule matches")));
    let (code, text) = stage.run(0, &["explain", "x/x-b", "x/x-a", "80/tcp"]);
    assert!(code == 1 && text.contains("the agent does not answer"), "{code} {text}");
    let away: Vec<_> = endpoints(&stage).iter().map(|row| row["policy"].clone()).collect();
    assert_eq!(away.iter().filter(|policy| **policy == "ingress").count(), 1);
}

/// The flag counts for `explain` as for packets: for the pod's own node, and for nobody else.
#[test]
fn the_way_to_the_node_is_explained_as_it_is() {
    for (args, own) in [(&[][..], 2), (&["--allow-pods-to-node"][..], 0)] {
        let mut stage = Stage::with(args);
        let closed =
            json!({ "podSelector": { "matchLabels": { "pod": "a" } }, "policyTypes": ["Egress"], "egress": [] });
        stage.apply("x", "closed", &closed);
        stage.settle();
        let pod = stage.scenario.cluster().pod("x-a").expect("a pod");
        stage.wait_endpoint(0, &pod, "egress");
        for family in Family::BOTH {
            let node = stage.scenario.node(0).bridge_ip(family).to_string();
            let (code, items) = explain(&stage, 0, ["x/x-a", &node, "22/tcp"]);
            let cause = items[0]["sides"][0]["cause"].as_str().unwrap_or_default().to_owned();
            assert_eq!((code, cause.contains("--allow-pods-to-node")), (own, own == 0), "{args:?} {node}: {cause}");
            let other = stage.scenario.node(1).bridge_ip(family).to_string();
            assert_eq!(explain(&stage, 0, ["x/x-a", &other, "22/tcp"]).0, 2, "{args:?} {other}");
        }
    }
}

#[test]
fn pods_are_followed_by_their_labels() {
    let mut stage = Stage::build();
    let everybody = json!({ "podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}] });
    stage.apply("x", "open", &everybody);
    stage.settle();
    let asked = |stage: &Stage, from: &str, ip: IpAddr| {
        let netns = stage.scenario.netns(from).expect("namespace");
        let target = SocketAddr::new(ip, 80);
        let answers = probe_all(&netns, &[(target, Transport::Tcp)], Duration::from_secs(10)).expect("asked");
        assert!(matches!(answers[0], Answer::From { .. }), "{from}: {answers:?}");
    };
    // x-c is on another node, where nobody here could read its name or its labels.
    let words = ["label:pod=c,proxy-tests.io/kind=server", "to", "label:pod=a:80/tcp", "-c", "1", "-o", "ndjson"];
    stage.label_pod("x-c", "proxy-tests.io/kind", "server");
    let mut tracer = None;
    // The label is on its way to the agent.
    let follows = || {
        tracer = Tracer::start(stage.scenario.node(0), &words).ok();
        tracer.is_some()
    };
    Deadline::secs(30).until("the label is known", follows).expect("followed");
    for from in ["y-b", "y-c", "x-c"] {
        asked(&stage, from, stage.ip("x-a", Family::V6));
    }
    let traced = tracer.expect("a trace").finish(Duration::from_secs(40)).expect("an end");
    assert_eq!(traced.code, Some(0), "{} {}", traced.out, traced.err);
    let (packet, ends) = (traced.one("pkt"), |side: &str| traced.one("pkt")[side]["name"].clone());
    assert_eq!((ends("src_ref"), ends("dst_ref")), (json!("x-c"), json!("x-a")), "{packet}");

    // A backend of another node is said to be there.
    let words =
        ["pod:x/x-a", "to", "label:pod=c,proxy-tests.io/kind=server", "--no-replies", "-c", "1", "--for", "60s"];
    let tracer = Tracer::start(stage.scenario.node(0), &words).expect("a trace");
    asked(&stage, "x-a", stage.vip("x-c", Family::V4));
    let traced = tracer.finish(Duration::from_secs(90)).expect("an end");
    assert!(traced.code == Some(0) && traced.out.contains("x/x-c, on another node"), "{} {}", traced.out, traced.err);
}
