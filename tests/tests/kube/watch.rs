//! Lists and watches in good and bad days of the API server.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_tests::address::service_cidr;
use proxy_tests::cluster::NodeSpec;
use proxy_tests::kube_server::account::Mounted;
use proxy_tests::kube_server::{ApiOptions, HIDDEN_PORT};
use proxy_tests::manifests::{Object, Service, ServicePort};
use proxy_tests::traffic::{BusyFlows, Steady, SteadyOptions, TcpServer, UdpServer};
use proxy_tests::{Agent, Cluster, Deadline, Family};
use serde_json::{Value, json};

use crate::stage::{ARRIVES, PORT, Stage, TARGET_PORT, Vigil, deployed_account, dual, quiet, rows, slice};

/// More than two pages of a list.
const MANY: u16 = 1_200;
/// How long the server is away at least.
const AWAY: Duration = Duration::from_secs(20);

fn one_node() -> Stage {
    Stage::build(&Cluster::builder().node(NodeSpec::new("node0").pods(["client", "backend"])))
}

#[test]
fn long_first_lists_come_in_pages() {
    let stage = one_node();
    let first = 256;
    let services: Vec<Service> = (0..MANY)
        .map(|n| {
            let ip = service_cidr(Family::V4).host(first + n);
            Service::new(&format!("many-{n}"), &[ip], vec![ServicePort::tcp("tcp", PORT, TARGET_PORT)])
        })
        .collect();
    let objects = services.iter().map(Object::to_json);
    let slices = services.iter().map(|service| slice(service, Family::V4, "", &[20]).to_json());
    stage.server.client().create_all(&objects.chain(slices).collect::<Vec<_>>()).expect("created");

    let agent = stage.start(0);
    let expected: Vec<_> = services.iter().flat_map(|service| rows(service, &[20])).collect();
    Stage::wait_rows(&agent, "default/many-", &expected);
    let requests = stage.server.requests().expect("audit log");
    for resource in ["services", "endpointslices"] {
        let pages: Vec<_> = requests
            .iter()
            .filter(|r| r.verb == "list" && r.resource == resource)
            .map(|r| (r.parameter("limit"), r.parameter("continue").is_empty(), r.code))
            .collect();
        // 1,200 of ours and the server's own: three pages.
        assert_eq!(pages, [("500", true, 200), ("500", false, 200), ("500", false, 200)], "{resource}");
    }
}

#[test]
fn traffic_does_not_notice_restarts_of_the_server() {
    let mut stage = one_node();
    let [client, backend] = ["client", "backend"].map(|name| stage.cluster.pod(name).expect("pod"));
    let service = dual("web", 10);
    for family in Family::BOTH {
        stage.apply(&service.slice(family, std::slice::from_ref(&backend)));
    }
    stage.apply(&service);
    let agent = stage.start(0);
    Deadline::after(ARRIVES)
        .until("both pods are known, and the Service has its endpoint", || {
            let devices: Value =
                serde_json::from_str(&agent.cli(&["device", "list", "-o", "json"]).expect("device list"))
                    .expect("JSON");
            let known = |pod: &proxy_tests::Pod| {
                devices["items"].as_array().is_some_and(|items| {
                    let ips = (json!(pod.ip4().to_string()), json!(pod.ip6().to_string()));
                    items.iter().any(|item| item["ipv4"] == ips.0 && item["ipv6"] == ips.1)
                })
            };
            let web = Stage::services(&agent).into_iter().filter(|row| row.selected == 1).count();
            known(&client) && known(&backend) && web == rows(&service, &[20]).len()
        })
        .unwrap_or_else(|error| panic!("{error}\n{}", agent.log_text()));
    let vigil = Vigil::start(stage.node(0), &agent, "default/web:");

    let _tcp = TcpServer::start(backend.netns(), "backend", TARGET_PORT).expect("server");
    let _udp = UdpServer::start(backend.netns(), "backend", TARGET_PORT).expect("server");
    let targets = Family::BOTH.map(|family| SocketAddr::new(service_cidr(family).host(10), PORT));
    let (interval, late) = (Duration::from_millis(5), Duration::from_secs(5));
    let flows = targets.map(|to| BusyFlows::start(client.netns(), to, 2, interval, late).expect("flows"));
    let streams = targets.map(|to| Steady::start(client.netns(), to, SteadyOptions::default()).expect("stream"));

    stage.server.kill_api().expect("killed");
    stage.server.start_api(ApiOptions::default()).expect("ready");
    stage.check_follows(&agent, "after-kill", 11);
    stage.server.stop_api().expect("stopped");
    stage.server.start_api(ApiOptions::default()).expect("ready");
    stage.check_follows(&agent, "after-stop", 12);

    for flows in flows {
        let report = flows.stop().check("TCP flows over restarts of the API server").expect("whole");
        assert!(report.echoed > 200, "{report:?}");
    }
    for stream in streams {
        let report = stream.stop();
        assert!(report.sent() > 2_000, "{} sent", report.sent());
        assert_eq!(
            (report.lost(), report.duplicates, report.strangers, report.damaged, &report.errors),
            (0, 0, 0, 0, &std::collections::BTreeMap::new()),
            "of {} datagrams",
            report.sent()
        );
    }
    vigil.end(10);
}

/// The server is away for a while, and things change meanwhile. When it is back it has forgotten the agent's version.
#[test]
fn changes_of_a_time_away_come_with_a_new_list() {
    let mut stage = one_node();
    let services = [dual("kept", 10), dual("changed", 11), dual("deleted", 12)];
    for service in &services {
        stage.publish(service);
    }
    let [kept, changed, deleted] = services;
    let agent = stage.start(0);
    for service in [&kept, &changed, &deleted] {
        Stage::wait_rows(&agent, &format!("default/{}:", service.name), &rows(service, &[20]));
    }
    let vigil = Vigil::start(stage.node(0), &agent, "default/kept:");
    let until_back = Vigil::start(stage.node(0), &agent, "default/");

    let left = Instant::now();
    stage.server.kill_api().expect("killed");
    stage.server.start_api(ApiOptions { port: HIDDEN_PORT, ..ApiOptions::default() }).expect("ready");
    stage.delete(&deleted);
    for family in Family::BOTH {
        stage.delete(&slice(&deleted, family, "", &[]));
        stage.apply(&slice(&changed, family, "", &[21, 22]));
    }
    let new = dual("new", 13);
    stage.publish(&new);
    stage.server.compact().expect("compacted");
    Stage::wait_logged(&agent, 0, &["trouble=\"unreachable\"", "check --apiserver and the way there"]);
    Deadline::after(ARRIVES).until("the server was away long enough", || left.elapsed() >= AWAY).expect("time passes");
    assert_eq!(agent.get("/healthz").expect("its health").0, 200, "a server that is away makes no node unhealthy");
    // All that was there is there until the server says otherwise.
    until_back.end(10);

    // Without its cache the server asks etcd, which has forgotten the agent's version.
    stage.server.start_api(ApiOptions { watch_cache: false, ..ApiOptions::default() }).expect("ready");
    Stage::wait_rows(&agent, "default/new:", &rows(&new, &[20]));
    Stage::wait_rows(&agent, "default/changed:", &rows(&changed, &[21, 22]));
    Stage::wait_rows(&agent, "default/deleted:", &[]);
    Stage::wait_rows(&agent, "default/kept:", &rows(&kept, &[20]));
    for kind in ["Service", "EndpointSlice"] {
        Stage::wait_logged(&agent, 0, &["trouble=\"expired\"", &format!("kind=\"{kind}\"")]);
    }
    let user = deployed_account().user();
    let requests = stage.server.requests().expect("audit log");
    let lists = |resource: &str| {
        requests.iter().filter(|r| r.user == user && r.verb == "list" && r.resource == resource).count()
    };
    assert_eq!(["services", "endpointslices"].map(lists), [2, 2], "one list at the start, one after the 410");
    stage.check_follows(&agent, "after", 14);
    vigil.end(20);
}

#[test]
fn the_next_server_is_asked_when_one_does_not_answer() {
    let mut stage = one_node();
    let kept = dual("kept", 10);
    stage.publish(&kept);
    // The first address is dead from the start.
    let [first, second] = [stage.server.url().replace("6443", &HIDDEN_PORT.to_string()), stage.server.url6()];
    let token = deployed_account().token(&stage.server, None).expect("token");
    let mounted = Mounted::new(&stage.server, "account", &token).expect("folder of the account");
    let options = quiet(mounted.options(&format!("{first},{second}")));
    let agent = Agent::start(stage.node(0), options).expect("healthy");
    Stage::wait_rows(&agent, "default/kept:", &rows(&kept, &[20]));
    Stage::wait_logged(&agent, 0, &["switched to another API server", &second]);
    let vigil = Vigil::start(stage.node(0), &agent, "default/kept:");

    // Now the second is dead and the first one alive, and then the other way round again.
    for (port, url, name, host) in [(HIDDEN_PORT, &first, "first", 11), (6443, &second, "second", 12)] {
        let seen = agent.log_text().lines().count();
        stage.server.kill_api().expect("killed");
        stage.server.start_api(ApiOptions { port, ..ApiOptions::default() }).expect("ready");
        stage.check_follows(&agent, name, host);
        Stage::wait_logged(&agent, seen, &["switched to another API server", url]);
    }
    vigil.end(10);
}
