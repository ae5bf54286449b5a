//! Services and EndpointSlices as people and controllers change them.

use std::time::{Duration, Instant};

use proxy_tests::cluster::NodeSpec;
use proxy_tests::kube_server::ApiOptions;
use proxy_tests::kube_server::client::path_of;
use proxy_tests::manifests::{Conditions, Object, Service};
use proxy_tests::{Agent, Cluster, Deadline, Family};
use serde_json::{Value, json};

use crate::stage::{ARRIVES, Stage, Vigil, deployed_account, dual, label, rows, slice};

const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const HEADLESS: &str = "service.kubernetes.io/headless";

/// Bookmarks come once a minute.
const BOOKMARK: Duration = Duration::from_secs(100);
/// Between the agent's watch and one whose bookmarks come after the agent's.
const LATER: Duration = Duration::from_secs(5);

/// Writes a Service and waits until the agent has these endpoints for it.
fn check(stage: &Stage, agent: &Agent, service: &Service, hosts: &[u16]) {
    stage.apply(service);
    Stage::wait_rows(agent, &prefix(service), &rows(service, hosts));
}

fn check_gone(agent: &Agent, service: &Service) {
    Stage::wait_rows(agent, &prefix(service), &[]);
}

fn prefix(service: &Service) -> String {
    format!("{}/{}:", service.namespace, service.name)
}

/// A name for another Service; it has no address.
fn external(service: &Service) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": { "namespace": service.namespace, "name": service.name },
        "spec": { "type": "ExternalName", "externalName": "other.example" },
    })
}

fn check_families(stage: &Stage, agent: &Agent) {
    let both = dual("both", 20);
    stage.publish(&both);
    Stage::wait_rows(agent, "default/both:", &rows(&both, &[20]));
    for (name, family) in [("four", Family::V4), ("six", Family::V6)] {
        let mut one = dual(name, 21);
        one.cluster_ips.retain(|&ip| Family::of(ip) == family);
        stage.publish(&one);
        Stage::wait_rows(agent, &prefix(&one), &rows(&one, &[20]));
    }
    // From one family to both: the second address is added to a running Service.
    let mut grown = dual("grown", 22);
    let second = grown.cluster_ips.split_off(1);
    stage.publish(&grown);
    Stage::wait_rows(agent, "default/grown:", &rows(&grown, &[20]));
    grown.cluster_ips.extend(second);
    stage.publish(&grown);
    Stage::wait_rows(agent, "default/grown:", &rows(&grown, &[20]));

    // A headless Service has endpoints and no address; one with the label has neither for us.
    let mut headless = dual("headless", 0);
    headless.cluster_ips.clear();
    stage.apply(&headless);
    stage.apply(&slice(&headless, Family::V4, "", &[20]));
    let assigned = Service { cluster_ips: Vec::new(), ..dual("assigned", 0) };
    let mut object = assigned.to_json();
    object["spec"] = json!({ "ports": object["spec"]["ports"] });
    let address = stage.apply(&object)["spec"]["clusterIP"].as_str().expect("assigned").parse().expect("an address");
    let assigned = Service { cluster_ips: vec![address], ..assigned };
    Stage::wait_rows(agent, "default/assigned:", &rows(&assigned, &[]));
    // What came later is there, so that the headless one was seen as well.
    check_gone(agent, &headless);
}

fn check_types(stage: &Stage, agent: &Agent) {
    let service = dual("typed", 30);
    stage.publish(&service);
    Stage::wait_rows(agent, "default/typed:", &rows(&service, &[20]));
    for _ in 0..2 {
        stage.apply(&external(&service));
        check_gone(agent, &service);
        check(stage, agent, &service, &[20]);
    }
    stage.delete(&service);
    check_gone(agent, &service);
}

fn check_labels(stage: &Stage, agent: &Agent) {
    let service = dual("labelled", 31);
    stage.publish(&service);
    let whole = rows(&service, &[20]);
    Stage::wait_rows(agent, "default/labelled:", &whole);
    let client = stage.server.client();
    for name in [PROXY_NAME, HEADLESS] {
        for value in ["", "other"] {
            let path = path_of(&service.to_json());
            client.patch(&path, &label(name, &value.into())).expect("labelled");
            check_gone(agent, &service);
            client.patch(&path, &label(name, &Value::Null)).expect("label removed");
            Stage::wait_rows(agent, "default/labelled:", &whole);
        }
        // The slices alone: the Service stays, without endpoints.
        let slices = Family::BOTH.map(|family| path_of(&slice(&service, family, "", &[]).to_json()));
        for path in &slices {
            client.patch(path, &label(name, &"x".into())).expect("labelled");
        }
        Stage::wait_rows(agent, "default/labelled:", &rows(&service, &[]));
        for path in &slices {
            client.patch(path, &label(name, &Value::Null)).expect("label removed");
        }
        Stage::wait_rows(agent, "default/labelled:", &whole);
    }
}

fn check_slices(stage: &Stage, agent: &Agent) {
    let service = dual("sliced", 32);
    stage.apply(&service);
    Stage::wait_rows(agent, "default/sliced:", &rows(&service, &[]));
    for family in Family::BOTH {
        stage.apply(&slice(&service, family, "-a", &[1, 2]));
        stage.apply(&slice(&service, family, "-b", &[3]));
        // The same endpoint in two slices, as while they are rebalanced: it counts once.
        stage.apply(&slice(&service, family, "-c", &[2, 3, 4]));
    }
    Stage::wait_rows(agent, "default/sliced:", &rows(&service, &[1, 2, 3, 4]));

    // A slice of names is nobody's endpoint, and hurts nobody. Another Service's slice is not ours.
    let mut names = slice(&service, Family::V4, "-names", &[]).to_json();
    names["addressType"] = "FQDN".into();
    names["endpoints"] = json!([{ "addresses": ["a.example"], "conditions": { "ready": true } }]);
    stage.apply(&names);
    let mut foreign = slice(&service, Family::V4, "-foreign", &[9]);
    "other".clone_into(&mut foreign.service);
    stage.apply(&foreign);
    let mut nobodys = slice(&service, Family::V4, "-nobodys", &[9]).to_json();
    nobodys["metadata"]["labels"] = json!({});
    stage.apply(&nobodys);

    // One endpoint moves, one ends, one is not ready.
    for family in Family::BOTH {
        let mut moved = slice(&service, family, "-c", &[4, 5, 6]);
        moved.endpoints[1].conditions = Conditions::TERMINATING;
        moved.endpoints[2].conditions = Conditions::NOT_READY;
        stage.apply(&moved);
        stage.delete(&slice(&service, family, "-b", &[]));
    }
    Stage::wait_rows(agent, "default/sliced:", &rows(&service, &[1, 2, 4]));
    for family in Family::BOTH {
        for suffix in ["-a", "-c"] {
            stage.delete(&slice(&service, family, suffix, &[]));
        }
    }
    Stage::wait_rows(agent, "default/sliced:", &rows(&service, &[]));
}

/// Changes that matter, over a minute in which nothing happens to this Node: after a restart of the server the watch
/// on it goes on from the version that a bookmark gave.
#[test]
fn changes_arrive_and_bookmarks_are_kept() {
    let mut stage = Stage::build(&Cluster::builder().node(NodeSpec::new("node0")).node(NodeSpec::new("node1")));
    let kept = dual("kept", 10);
    stage.publish(&kept);
    let agent = stage.start(0);
    Stage::wait_rows(&agent, "default/kept:", &rows(&kept, &[20]));
    let vigil = Vigil::start(stage.node(0), &agent, "default/kept:");
    let user = deployed_account().user();
    let own_node = |stage: &Stage| {
        let requests = stage.server.requests().expect("audit log").into_iter();
        let watches = requests.filter(|r| r.user == user && r.verb == "watch" && r.resource == "nodes");
        watches.map(|r| r.parameter("resourceVersion").parse::<u64>().expect("a version")).collect::<Vec<_>>()
    };
    let mut begun = Vec::new();
    Deadline::after(ARRIVES)
        .until("the watch on the Node", || {
            begun = own_node(&stage);
            !begun.is_empty()
        })
        .expect("begun");
    let start = Instant::now();

    // Another Node changes all the time: the server's versions move on.
    let path = "/api/v1/nodes?fieldSelector=metadata.name%3Dnode0";
    let version = begun[0].to_string();
    let bookmark = std::thread::scope(|scope| {
        // It begins so much later than the agent's watch that its bookmark comes later too: the server hands them out
        // about once a second to all whose minute is over.
        Deadline::after(ARRIVES).until("time passes", || start.elapsed() >= LATER).expect("it does");
        let waiting = scope.spawn(|| stage.server.client().watch_until(path, &version, "BOOKMARK", BOOKMARK));
        for (round, step) in [check_families, check_types, check_labels, check_slices].into_iter().enumerate() {
            let patch = label("round", &round.to_string().into());
            stage.server.client().patch("/api/v1/nodes/node1", &patch).expect("labelled");
            step(&stage, &agent);
        }
        waiting.join().expect("no panic").expect("a bookmark")
    });
    let bookmark: u64 = bookmark["metadata"]["resourceVersion"].as_str().and_then(|v| v.parse().ok()).expect("version");
    assert!(bookmark > begun[0], "the other Node's changes moved the version");

    // A cache would begin with the newest version and refuse all older ones; etcd has every version.
    stage.server.kill_api().expect("killed");
    stage.server.start_api(ApiOptions { watch_cache: false, ..ApiOptions::default() }).expect("ready");
    stage.check_follows(&agent, "after", 12);
    let mut since = Vec::new();
    let carried_on = Deadline::after(ARRIVES).until("the Node is watched again", || {
        since = own_node(&stage);
        since.len() > begun.len()
    });
    carried_on.unwrap_or_else(|error| panic!("{error}: {since:?}\n{}", agent.log_text()));
    // This Node did not change: only a bookmark can have moved the version that its watch goes on from.
    assert!(
        since.last() > begun.last(),
        "from {since:?}, begun from {begun:?}; another watch's bookmark gave {bookmark}"
    );
    let lists = stage.server.requests().expect("audit log").into_iter();
    let lists = lists.filter(|r| r.user == user && r.verb == "list").map(|r| r.resource).collect::<Vec<_>>();
    // Services, slices, Nodes, ServiceCIDRs, NetworkPolicies.
    assert_eq!(lists.len(), 5, "each kind was listed once, at the start: {lists:?}");
    vigil.end(20);
}
