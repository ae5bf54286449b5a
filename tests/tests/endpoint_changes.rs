//! Endpoints and Services change while traffic runs.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use proxy_tests::cluster::Links;
use proxy_tests::manifests::{Service, ServicePort};
use proxy_tests::scenario::matrix::{self, Setting};
use proxy_tests::scenario::{SERVICE_PORT, Scenario, TARGET_PORT, vip};
use proxy_tests::traffic::{
    ANSWERED_WITHIN, BusyFlows, Flow, Steady, SteadyOptions, TcpOptions, TcpReport, UdpOptions, tcp_exchange_with,
    udp_exchange,
};
use proxy_tests::{Deadline, Family, Netns, Result};

const SETTING: Setting = Setting { links: Links::Routed, hostile: true, rp_filter: true };
/// Number of the addresses of the Service that changes.
const HOST: u16 = 200;
const SECOND: Duration = Duration::from_secs(1);
/// How long a change may take on a machine that is busy with other tests. What it took is printed.
const GENEROUS: Duration = Duration::from_secs(10);

fn target(family: Family) -> SocketAddr {
    SocketAddr::new(vip(family, HOST), SERVICE_PORT)
}

/// A Service `web` with these endpoints, known to the first node.
fn scenario(behind: &[&str]) -> (Scenario, Service) {
    let scenario = matrix::scenario(SETTING, &[]).expect("scenario");
    let service = scenario.publish("web", HOST, behind).expect("published");
    scenario.wait_endpoints(0, "web", Some(behind.len() as u64)).expect("known");
    (scenario, service)
}

fn tcp(client: &Netns, target: SocketAddr, timeout: Duration) -> Result<TcpReport> {
    tcp_exchange_with(client, target, &TcpOptions { up: 1000, down: 1000, timeout, ..TcpOptions::default() })
}

#[test]
fn udp_clients_reach_a_living_backend_at_once() {
    let (scenario, service) = scenario(&["b"]);
    let [a, node1] = ["a", "node1"].map(|name| scenario.netns(name).expect("namespace"));
    let clients = [
        ("pod", &a, Family::V4, false),
        ("pod", &a, Family::V6, false),
        ("pod, connected", &a, Family::V4, true),
        ("node process", &node1, Family::V4, false),
        ("node process", &node1, Family::V6, false),
    ];
    let mut port = 30_000;
    let mut worst = Duration::ZERO;
    for (from, to) in [("b", "d"), ("d", "b"), ("b", "a"), ("a", "b")] {
        let senders = clients.map(|(_, netns, family, connected)| {
            port += 1;
            let options = SteadyOptions { rate: 1000, source_port: port, connected, ..SteadyOptions::default() };
            Steady::start(netns, target(family), options).expect("sender")
        });
        let seen = scenario.answered(from);
        let enough = || scenario.answered(from) > seen + 500;
        Deadline::secs(30).until("the first backend answers", enough).expect("answers");
        let changed = Instant::now();
        scenario.set_endpoints(&service, &[to]).expect("written");
        let seen = scenario.answered(to);
        let enough = || scenario.answered(to) > seen + 2000;
        Deadline::secs(30).until("the second backend answers", enough).expect("answers");
        for ((client, _, family, _), sender) in clients.iter().zip(senders) {
            let offset = changed - sender.started();
            let report = sender.stop();
            assert_eq!(
                (report.lost(), report.strangers, report.damaged),
                (0, 0, 0),
                "{client} {family} {from} to {to}"
            );
            let last = report.last_answered_by(from).expect("it did").saturating_sub(offset);
            let first = report.first_answered_by(to, Duration::ZERO).expect("it does").saturating_sub(offset);
            eprintln!("{client} {family}: first answer of {to} {first:?} after the change, last of {from} {last:?}");
            worst = worst.max(first).max(last);
        }
    }
    eprintln!("UDP clients moved within {worst:?}");
    assert!(worst < GENEROUS, "{worst:?}");
}

#[test]
fn tcp_flows_live_on_when_their_backend_is_removed() {
    let (scenario, service) = scenario(&["b"]);
    let [a, node1] = ["a", "node1"].map(|name| scenario.netns(name).expect("namespace"));
    let ms = Duration::from_millis(2);
    let flows = [(&a, Family::V4, 6), (&a, Family::V6, 6), (&node1, Family::V4, 4)]
        .map(|(netns, family, count)| BusyFlows::start(netns, target(family), count, ms, 5 * SECOND).expect("flows"));
    assert_eq!(scenario.open_connections("b"), 16);
    scenario.set_endpoints(&service, &["d"]).expect("written");
    let moved = || {
        scenario.backends(0).is_ok_and(|rows| {
            rows.iter().filter(|row| row.service.as_deref().is_some_and(|s| s.starts_with("default/web"))).all(|row| {
                row.address.ip() == scenario.cluster().pod("d").expect("pod").ip(Family::V4)
                    || row.address.ip() == scenario.cluster().pod("d").expect("pod").ip(Family::V6)
            })
        })
    };
    Deadline::secs(10).until("the maps name the new backend only", moved).expect("moved");
    for netns in [&a, &node1] {
        for family in Family::BOTH {
            assert_eq!(tcp(netns, target(family), 5 * SECOND).expect("new connection").server_name, "d");
        }
    }
    // They also outlive the Service.
    for family in Family::BOTH {
        scenario.manifests().remove(&scenario.slice(&service, family, &[]).expect("slice")).expect("removed");
    }
    scenario.manifests().remove(&service).expect("removed");
    scenario.wait_endpoints(0, "web", None).expect("gone");
    assert_eq!(scenario.open_connections("b"), 16, "none has ended");
    for flows in flows {
        let report = flows.stop().check("flows of the removed backend").expect("whole");
        assert!(report.sent > 10, "{report:?}");
    }
    Deadline::secs(5).until("closed", || scenario.open_connections("b") == 0).expect("closed by the client");
}

#[test]
fn a_service_comes_back() {
    let (scenario, service) = scenario(&["b"]);
    let a = scenario.netns("a").expect("namespace");
    for round in 0..3 {
        for family in Family::BOTH {
            assert_eq!(tcp(&a, target(family), 5 * SECOND).expect("TCP").server_name, "b", "round {round}");
            let options = UdpOptions { source_port: 31_000, ..UdpOptions::default() };
            assert_eq!(udp_exchange(&a, target(family), &options).expect("UDP").server_name, "b", "round {round}");
        }
        scenario.manifests().remove(&service).expect("removed");
        scenario.wait_endpoints(0, "web", None).expect("gone");
        tcp(&a, target(Family::V4), SECOND / 2).expect_err("nobody serves it");
        let options = UdpOptions { source_port: 31_000, timeout: SECOND / 4, ..UdpOptions::default() };
        udp_exchange(&a, target(Family::V4), &options).expect_err("nobody serves it");
        scenario.manifests().write(&service).expect("written");
        scenario.wait_endpoints(0, "web", Some(1)).expect("known");
    }
}

#[test]
fn a_port_changes() {
    let (scenario, mut service) = scenario(&["b"]);
    let a = scenario.netns("a").expect("namespace");
    let mut flow = Flow::open(&a, target(Family::V4), 0, ANSWERED_WITHIN).expect("flow");
    service.ports = vec![ServicePort::tcp("tcp", 81, TARGET_PORT), ServicePort::udp("udp", 81, TARGET_PORT)];
    scenario.manifests().write(&service).expect("written");
    let on_81 = || {
        let rows = scenario.services(0).unwrap_or_default();
        let web = rows.iter().filter(|row| row.service.as_deref().is_some_and(|s| s.starts_with("default/web")));
        web.map(|row| row.address.port()).collect::<Vec<_>>() == [81; 4]
    };
    Deadline::secs(10).until("both families and protocols are on port 81", on_81).expect("changed");
    for family in Family::BOTH {
        let new = SocketAddr::new(vip(family, HOST), 81);
        assert_eq!(tcp(&a, new, 5 * SECOND).expect("TCP").server_name, "b");
        assert_eq!(udp_exchange(&a, new, &UdpOptions::default()).expect("UDP").server_name, "b");
        tcp(&a, target(family), SECOND / 2).expect_err("the old port is closed");
    }
    assert!(
        matches!(flow.ping(ANSWERED_WITHIN), proxy_tests::traffic::flow::Ping::Echoed(_)),
        "a flow of the old port lives on"
    );
}

#[test]
fn endpoints_from_one_to_none_to_one() {
    let (scenario, service) = scenario(&["b"]);
    let [a, node1] = ["a", "node1"].map(|name| scenario.netns(name).expect("namespace"));
    let fixed = |source_port, timeout| UdpOptions { source_port, timeout, ..UdpOptions::default() };
    for round in 0..3 {
        let behind = ["b", "d", "a"][round];
        scenario.set_endpoints(&service, &[behind]).expect("written");
        let there = || {
            let pod = scenario.cluster().pod(behind).expect("pod");
            scenario.services(0).is_ok_and(|rows| {
                let mut web =
                    rows.iter().filter(|row| row.service.as_deref().is_some_and(|s| s.starts_with("default/web")));
                web.all(|row| row.backends.len() == 1 && [pod.ip4(), pod.ip6()].contains(&row.backends[0].ip()))
            })
        };
        Deadline::secs(10).until("one endpoint", there).expect("one");
        for family in Family::BOTH {
            for (client, port) in [(&a, 31_001), (&node1, 31_002)] {
                assert_eq!(tcp(client, target(family), 5 * SECOND).expect("TCP").server_name, behind);
                let report = udp_exchange(client, target(family), &fixed(port, ANSWERED_WITHIN)).expect("UDP");
                assert_eq!(report.server_name, behind);
            }
        }
        scenario.set_endpoints(&service, &[]).expect("written");
        scenario.wait_endpoints(0, "web", Some(0)).expect("none");
        let before = scenario.counters(0).expect("counters");
        let uplink = scenario.counters(1).expect("counters");
        for family in Family::BOTH {
            tcp(&a, target(family), SECOND / 4).expect_err("nobody is behind it");
            udp_exchange(&a, target(family), &fixed(31_001, SECOND / 4)).expect_err("nobody is behind it");
            tcp(&node1, target(family), SECOND / 4).expect_err("nobody is behind it");
            udp_exchange(&node1, target(family), &fixed(31_002, SECOND / 4)).expect_err("nobody is behind it");
        }
        let added = scenario.counters(0).expect("counters").since(&before);
        assert!(added.get("from_pod", "no_backend") >= 4, "{added}");
        assert!(added.get("connect", "no_backend") >= 2 && added.get("sendmsg", "no_backend") >= 2, "{added}");
        assert_eq!(scenario.counters(1).expect("counters").since(&uplink).rewrites().names(), Vec::<String>::new());
    }
}
