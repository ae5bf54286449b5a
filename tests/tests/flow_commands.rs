//! `flow list` and `flow flush`, and what `status` says of the tables, on flows of real pods.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::scenario::{SERVICE_PORT, Scenario, vip};
use proxy_tests::traffic::flow::ping_all;
use proxy_tests::traffic::{Flow, UdpOptions, udp_exchange};
use proxy_tests::{Deadline, Family};
use serde_json::{Value, json};

const SECOND: Duration = Duration::from_secs(1);

fn json_of(scenario: &Scenario, args: &[&str]) -> Value {
    let args = [args, &["-o", "json"]].concat();
    let said = scenario.agent(0).cli(&args).unwrap_or_else(|error| panic!("{args:?}: {error}"));
    serde_json::from_str(&said).expect("JSON")
}

/// Sources of the flows that a command lists.
fn sources(scenario: &Scenario, filter: &[&str]) -> BTreeSet<SocketAddr> {
    let said = json_of(scenario, &[&["flow", "list"], filter].concat());
    let items = said["items"].as_array().expect("items").iter();
    items.map(|item| item["source"].as_str().expect("text").parse().expect("an address")).collect()
}

/// Their ends at the clients.
fn locals(flows: &[&[Flow]]) -> BTreeSet<SocketAddr> {
    flows.iter().flat_map(|flows| flows.iter().map(Flow::local)).collect()
}

#[test]
fn flows_are_chosen_and_flushed_by_filters() {
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").hostile(true).pods(["a", "b", "c"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    scenario.serve_pod("b").expect("servers");
    scenario.publish("first", 11, &["b"]).expect("published");
    scenario.publish("second", 12, &["b"]).expect("published");
    let entries = ["--flow-live-entries", "4096", "--flow-brief-entries", "4096", "--pod-flow-quota", "4"];
    scenario.start_agents(&entries).expect("agents");
    let [a, c] = ["a", "c"].map(|pod| scenario.cluster().pod(pod).expect("pod"));
    let open = |pod: &proxy_tests::Pod, host| {
        let targets = Family::BOTH.map(|family| SocketAddr::new(vip(family, host), SERVICE_PORT));
        targets.map(|target| Flow::open(pod.netns(), target, 0, SECOND).expect("flow"))
    };
    let (mut a_first, mut a_second, mut c_first) = (open(&a, 11), open(&a, 12), open(&c, 11));
    udp_exchange(c.netns(), SocketAddr::new(vip(Family::V4, 12), SERVICE_PORT), &UdpOptions::default()).expect("UDP");
    let (both, first, second) = (locals(&[&a_first, &a_second]), locals(&[&a_first, &c_first]), locals(&[&a_second]));
    let tcp = ["--proto", "tcp"];
    let name = |host: u16| {
        let rows = scenario.services(0).expect("services");
        let row = rows.iter().find(|row| row.address.ip() == vip(Family::V4, host) && row.protocol == "TCP");
        row.expect("a row").service.clone().expect("a name")
    };
    let (to_first, to_second) = (name(11), name(12));
    let whole = to_second.rsplit_once(':').expect("a port").0;
    let address = a.ip(Family::V4).to_string();
    let listed = |filter: &[&str]| sources(&scenario, filter);

    assert_eq!(listed(&["--service", &to_first]), first);
    assert_eq!(listed(&[&["--service", whole][..], &tcp].concat()), second);
    assert_eq!(listed(&[&["--pod", &address][..], &tcp].concat()), both, "of both families: it is the pod");
    assert_eq!(listed(&["--pod", &a.host_veth().name, "--state", "established"]), both);
    let v4: BTreeSet<_> = both.iter().copied().filter(SocketAddr::is_ipv4).collect();
    assert_eq!(listed(&["--address", &address]), v4);
    let port = a_first[1].local().port();
    assert!(listed(&["--port", &port.to_string()]).contains(&a_first[1].local()));
    assert_eq!(listed(&["--proto", "udp", "--pod", &c.host_veth().name]).len(), 1);
    assert_eq!(listed(&["--limit", "3"]).len(), 3);
    assert_eq!(listed(&["--proto", "sctp"]), BTreeSet::new());

    // The quota is 4: `a` holds as many.
    let status = json_of(&scenario, &["status"]);
    assert_eq!(status["pod_flow_quota"], 4);
    let at_quota = json!([{ "ifindex": a.host_veth().ifindex, "interface": a.host_veth().name, "flows": 4 }]);
    assert_eq!(status["pods_at_quota"], at_quota);
    let map = status["maps"].as_array().expect("maps").iter().find(|row| row["map"] == "flow_live").expect("a row");
    assert_eq!((&map["used"], &map["capacity"], &map["pressure"]), (&json!(12), &json!(4096), &json!(1)));

    // Nothing goes that was not asked for.
    let refused = scenario.agent(0).cli(&["flow", "flush"]).expect_err("it says no");
    assert!(refused.to_string().contains("--all"), "{refused}");
    let refused = scenario.agent(0).cli(&["flow", "flush", "--service", "default/none"]).expect_err("it says no");
    assert!(refused.to_string().contains("default/none"), "{refused}");
    let flushed = json_of(&scenario, &["flow", "flush", "--service", &to_first, "--pod", &a.host_veth().name]);
    assert_eq!(flushed["flows"], 2);
    assert!(flushed["entries"].as_u64() >= Some(4), "both entries of each: {flushed}");
    let left = locals(&[&c_first]);
    assert_eq!(listed(&["--service", &to_first]), left);
    ping_all(&mut a_second, SECOND).check("another Service's").expect("whole");
    ping_all(&mut c_first, SECOND).check("another pod's").expect("whole");
    // A connection through a Service is not to be guessed: without its flow it ends.
    assert!(ping_all(&mut a_first, SECOND).check("flushed").is_err());
    assert_eq!(json_of(&scenario, &["status"])["pods_at_quota"], json!([]), "it may open others at once");

    let said = scenario.agent(0).cli(&["flow", "flush", "--all"]).expect("flushed");
    assert!(said.starts_with("flows: "), "{said}");
    let none = || sources(&scenario, &["--state", "established"]).is_empty();
    Deadline::secs(5).until("no flow is left", none).expect("none");
}
