//! What is told beside the maps: health checks, missing local endpoints, and how far changes have come.

use std::collections::BTreeMap;

use proxy_core::event::{Event, Node};
use proxy_core::facts::{Facts, HealthCheck};
use proxy_core::fake::When;
use proxy_core::service::{Endpoint, EndpointSlice, Protocol, Service, ServicePort};
use proxy_core::tables::Op;

use crate::cluster::{self, ip, name, number, port, ready, service, slice, terminating, web, web_slice};
use crate::node::TestNode;

fn here(endpoint: Endpoint) -> Endpoint {
    Endpoint { node: Some("node-a".into()), ..endpoint }
}

fn checked() -> Service {
    let ports = [port("http", Protocol::Tcp, 80), port("dns", Protocol::Udp, 53)];
    Service {
        load_balancer_ips: vec![ip("203.0.113.1")],
        external_local: true,
        health_check_node_port: Some(number(32_000)),
        ..service("a", &["10.96.0.1", "fd00:96::1"], &ports)
    }
}

#[test]
fn health_checks_count_ready_endpoints_of_this_node_once() {
    let both = [("http", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 5353)];
    let rows: [(&str, Vec<EndpointSlice>, u32); 6] = [
        ("none", vec![], 0),
        ("elsewhere", vec![slice("s", "a", &both, vec![ready("10.244.1.1")])], 0),
        ("one for both ports", vec![slice("s", "a", &both, vec![here(ready("10.244.0.1")), ready("10.244.1.1")])], 1),
        (
            "one port in each of two slices",
            vec![
                slice("s", "a", &both[..1], vec![here(ready("10.244.0.1"))]),
                slice("t", "a", &both[1..], vec![here(ready("10.244.0.1")), here(ready("10.244.0.2"))]),
            ],
            2,
        ),
        (
            "two families of one pod",
            vec![
                slice("s", "a", &both, vec![here(ready("10.244.0.1"))]),
                slice("t", "a", &both, vec![here(ready("fd00:244::1"))]),
            ],
            1,
        ),
        ("draining", vec![slice("s", "a", &both, vec![here(terminating("10.244.0.1"))])], 0),
    ];
    for (row, slices, local_endpoints) in rows {
        let mut node = TestNode::started(slices.into_iter().map(Event::Slice).chain([Event::Service(checked())]));
        let check = HealthCheck { port: number(32_000), local_endpoints };
        assert_eq!(node.reconciler.facts().health_checks, BTreeMap::from([(name("a"), check)]), "{row}");
        node.change([Event::Service(Service { health_check_node_port: None, ..checked() })]);
        assert_eq!(node.reconciler.facts().health_checks, BTreeMap::new(), "{row}");
    }
}

/// Local endpoints of the health checks, ports without local ones for traffic from inside and from outside.
type Told = (Vec<u32>, u32, u32);

#[test]
fn facts_follow_changes_and_say_so() {
    let both = [("http", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 5353)];
    let away = || Event::Slice(slice("s", "a", &both, vec![ready("10.244.1.1")]));
    let local = || Event::Slice(slice("s", "a", &both, vec![here(ready("10.244.0.1"))]));
    let mut node = TestNode::started([Event::Service(Service { internal_local: true, ..checked() })]);
    let facts = |node: &TestNode| {
        let Facts { health_checks, no_local_internal, no_local_external } = node.reconciler.facts();
        (
            health_checks.values().map(|check| check.local_endpoints).collect::<Vec<_>>(),
            no_local_internal,
            no_local_external,
        )
    };
    assert_eq!(facts(&node), (vec![0], 0, 0), "no endpoints at all is no lack of local ones");
    let rows: Vec<(&str, Event, Told)> = vec![
        ("endpoints elsewhere: two ports lack them", away(), (vec![0], 2, 2)),
        ("a local one", local(), (vec![1], 0, 0)),
        ("this node is another", Event::Node(Node { name: "node-b".into(), ..cluster::node() }), (vec![0], 2, 2)),
        ("and itself again", Event::Node(cluster::node()), (vec![1], 0, 0)),
        ("away again", away(), (vec![0], 2, 2)),
        ("policy Cluster inside", Event::Service(checked()), (vec![0], 0, 2)),
        (
            "another port only",
            Event::Service(Service { ports: vec![port("http", Protocol::Tcp, 80)], ..checked() }),
            (vec![0], 0, 1),
        ),
        ("gone", Event::ServiceGone(name("a")), (vec![], 0, 0)),
    ];
    for (row, event, expected) in rows {
        node.handle([event.clone()]);
        assert!(node.sync().facts_changed, "{row}");
        assert_eq!(facts(&node), expected, "{row}");
        assert!(!node.sync().facts_changed, "{row}: told once");
        node.settle();
    }
    // A change of something else is none of facts.
    node.handle([Event::Service(web("z", "10.96.0.9"))]);
    assert!(!node.sync().facts_changed);
}

fn at(triggered: u64, service: &str, addresses: &[&str]) -> Event {
    Event::Slice(EndpointSlice { triggered: Some(triggered), ..web_slice(service, addresses) })
}

#[test]
fn a_change_is_programmed_when_the_dataplane_holds_it() {
    let mut node = TestNode::new(proxy_core::reconcile::Settings::default());
    node.start_unsettled([
        Event::Service(web("a", "10.96.0.1")),
        at(1, "a", &["10.244.0.1"]),
        Event::Service(web("b", "10.96.0.2")),
        at(2, "b", &["10.244.0.2"]),
    ]);
    assert_eq!(node.sync().programmed, [0; 0], "nobody knows when that was done");
    node.settle();
    // Two changes of one slice, and one of another, which cannot be written.
    node.fake.fail_with(|_, op| {
        let b = |backend: &proxy_abi::BackendEntry| std::net::IpAddr::from(backend.ip) == cluster::ip("10.244.0.9");
        matches!(op, Op::SetBackend(_, backend) if b(backend)).then_some(When::Before)
    });
    node.handle([at(10, "a", &["10.244.0.3"]), at(11, "a", &["10.244.0.4"]), at(12, "b", &["10.244.0.9"])]);
    let report = node.sync();
    assert_eq!((report.programmed, report.endpoint_changes, report.service_changes), (vec![10, 11], 3, 0));
    node.fake.heal();
    node.now += 1_000;
    let report = node.sync();
    assert_eq!((report.programmed, report.endpoint_changes), (vec![12], 0));
    // An old backend that cannot be taken away is not done either.
    node.settle();
    node.fake.fail_with(|_, op| matches!(op, Op::DeleteBackend(_)).then_some(When::Before));
    node.handle([at(13, "a", &["10.244.0.5"])]);
    assert_eq!(node.sync().programmed, [0; 0]);
    node.fake.heal();
    node.now += 1_000;
    assert_eq!(node.sync().programmed, [13]);
    // The same again is no change; a new time for the same endpoints is one, done at once; so is one of no Service.
    node.handle([at(13, "a", &["10.244.0.5"]), at(14, "a", &["10.244.0.5"]), at(15, "nobody", &["10.244.0.7"])]);
    let report = node.sync();
    assert_eq!((report.programmed, report.endpoint_changes, report.applied), (vec![14, 15], 2, 0));
}

#[test]
fn changes_are_counted_when_they_change_something() {
    let mut node = TestNode::started([Event::Service(web("a", "10.96.0.1")), Event::Service(web("b", "10.96.0.2"))]);
    let node_port = ServicePort { node_port: Some(number(30_080)), ..port("", Protocol::Tcp, 80) };
    node.handle([
        Event::Service(web("a", "10.96.0.1")),
        Event::Service(service("a", &["10.96.0.1"], &[node_port])),
        Event::ServiceGone(name("x")),
        Event::Slice(web_slice("a", &["10.244.0.1"])),
        Event::Slice(web_slice("b", &["10.244.0.1"])),
        Event::Listed(proxy_core::event::Source::Services, proxy_core::event::Listing::Objects([name("a")].into())),
        Event::Listed(proxy_core::event::Source::EndpointSlices, proxy_core::event::Listing::Objects([].into())),
    ]);
    let report = node.sync();
    assert_eq!((report.service_changes, report.endpoint_changes), (2, 4));
    let report = node.sync();
    assert_eq!((report.service_changes, report.endpoint_changes), (0, 0));
}
