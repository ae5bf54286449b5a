//! What each event changes.

use std::collections::BTreeSet;

use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::{Event, Listing, NetDevice, Node, Source};
use proxy_core::name::ObjectName;
use proxy_core::service::Service;
use proxy_core::state::{Changed, ClusterState};

use crate::cluster::{device, ip, link, name, node, web, web_slice};

fn services(names: &[&str]) -> Changed {
    Changed { services: names.iter().map(|n| name(n)).collect(), ..Changed::default() }
}

fn links(indices: &[u32]) -> Changed {
    Changed { links: indices.iter().copied().collect(), ..Changed::default() }
}

fn ranged(names: &[&str]) -> Changed {
    Changed { ranges: true, ..services(names) }
}

fn range(name: &str, ranges: &[&str]) -> Event {
    Event::ServiceCidr(name.into(), ranges.iter().map(|range| range.parse().expect("a range")).collect())
}

fn objects(names: &[&str]) -> Listing {
    Listing::Objects(names.iter().map(|n| name(n)).collect::<BTreeSet<ObjectName>>())
}

#[test]
fn events_change_what_they_say_and_what_depends_on_it() {
    let finding = Diagnostic {
        severity: Severity::Error,
        object: "Service default/x".to_owned(),
        field: String::new(),
        problem: "broken".to_owned(),
        fix: "mend it".to_owned(),
    };
    let findings = |findings: &[Diagnostic]| Event::Diagnostics {
        object: "Service default/x".to_owned(),
        findings: findings.to_vec(),
    };
    let found = Changed { findings: true, ..Changed::default() };
    let mut moved = web_slice("a", &["10.0.0.1"]);
    moved.service = name("b");
    let rows: Vec<(&str, Event, Changed)> = vec![
        ("a Service", Event::Service(web("a", "10.96.0.1")), services(&["a"])),
        ("the same again", Event::Service(web("a", "10.96.0.1")), Changed::default()),
        ("another", Event::Service(web("b", "10.96.0.2")), services(&["b"])),
        ("a slice", Event::Slice(web_slice("a", &["10.0.0.1"])), services(&["a"])),
        ("the same again", Event::Slice(web_slice("a", &["10.0.0.1"])), Changed::default()),
        ("a slice that moves to another Service", Event::Slice(moved), services(&["a", "b"])),
        ("this node", Event::Node(node()), Changed { addresses: true, ..services(&["a", "b"]) }),
        ("the same again", Event::Node(node()), Changed::default()),
        (
            "its pod ranges",
            Event::Node(Node { pod_cidrs: vec!["10.244.0.0/24".parse().expect("a range")], ..node() }),
            Changed { ranges: true, ..Changed::default() },
        ),
        (
            "an address that is a Service's",
            Event::Node(Node { addresses: vec![ip("10.96.0.2")], ..node() }),
            Changed { addresses: true, ranges: true, ..services(&["b"]) },
        ),
        (
            "its zone",
            Event::Node(Node { zone: Some("zone-a".into()), ..node() }),
            Changed { addresses: true, ..services(&["a", "b"]) },
        ),
        (
            "a pod, the first behind its bridge",
            Event::Link(link(5, &["10.244.0.5"])),
            Changed { addresses: true, ..links(&[5]) },
        ),
        ("the same again", Event::Link(link(5, &["10.244.0.5"])), Changed::default()),
        ("a pod with its address", Event::Link(link(6, &["10.244.0.5"])), links(&[5, 6])),
        (
            "a pod with a Service's address",
            Event::Link(link(7, &["10.96.0.1"])),
            Changed { links: [7].into(), ..services(&["a"]) },
        ),
        ("a pod goes", Event::LinkGone(5), links(&[5, 6])),
        ("it is gone", Event::LinkGone(5), Changed::default()),
        ("another interface", Event::Device(device(2, &["192.168.0.1"])), Changed { addresses: true, ..links(&[2]) }),
        ("the same again", Event::Device(device(2, &["192.168.0.1"])), Changed::default()),
        ("its MTU", Event::Device(NetDevice { mtu: 1400, ..device(2, &["192.168.0.1"]) }), links(&[2])),
        (
            "it gets a Service's address",
            Event::Device(device(2, &["192.168.0.1", "10.96.0.1"])),
            Changed { addresses: true, links: [2].into(), ..services(&["a"]) },
        ),
        (
            "another address of the node: what leaves there may be masqueraded with it",
            Event::Node(Node { zone: Some("zone-a".into()), addresses: vec![ip("192.168.0.2")], ..node() }),
            Changed { addresses: true, ..links(&[2]) },
        ),
        (
            "it goes, and two addresses",
            Event::DeviceGone(2),
            Changed { addresses: true, links: [2].into(), ..services(&["a"]) },
        ),
        ("it is gone", Event::DeviceGone(2), Changed::default()),
        (
            "a Service with addresses from outside",
            Event::Service(Service {
                external_ips: vec![ip("203.0.113.1"), ip("10.96.0.9")],
                load_balancer_ips: vec![ip("198.51.100.1")],
                source_ranges: vec!["192.168.0.0/24".parse().expect("a range")],
                ..web("x", "10.96.0.7")
            }),
            services(&["x"]),
        ),
        ("a Service with one of them", Event::Service(web("y", "10.96.0.9")), services(&["x", "y"])),
        ("a range with one of them", range("a", &["198.51.100.0/24"]), ranged(&["x"])),
        ("the same again", range("a", &["198.51.100.0/24"]), Changed::default()),
        ("another range", range("b", &["172.16.0.0/12"]), ranged(&[])),
        ("the first one changes", range("a", &["203.0.113.0/24", "198.51.0.0/16"]), ranged(&["x"])),
        (
            "a pod with one of them",
            Event::Link(link(8, &["203.0.113.1"])),
            Changed { links: [8].into(), ..services(&["x"]) },
        ),
        ("it goes", Event::LinkGone(8), Changed { links: [8].into(), ..services(&["x"]) }),
        (
            "an address of the node among those that may come",
            Event::Node(Node { zone: Some("zone-a".into()), addresses: vec![ip("192.168.0.5")], ..node() }),
            Changed { addresses: true, ..services(&["x"]) },
        ),
        (
            "pod ranges with one of them",
            Event::Node(Node {
                zone: Some("zone-a".into()),
                addresses: vec![ip("192.168.0.5")],
                pod_cidrs: vec!["203.0.113.0/24".parse().expect("a range")],
                ..node()
            }),
            ranged(&["x"]),
        ),
        (
            "a listing without the first range",
            Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(["b".into()].into())),
            Changed { listed: true, ..ranged(&["x"]) },
        ),
        ("the other goes", Event::ServiceCidrGone("b".into()), ranged(&[])),
        ("it is gone", Event::ServiceCidrGone("b".into()), Changed::default()),
        ("that Service goes", Event::ServiceGone(name("x")), services(&["x"])),
        ("and the other", Event::ServiceGone(name("y")), services(&["y"])),
        ("findings", findings(std::slice::from_ref(&finding)), found.clone()),
        ("the same again", findings(&[finding]), Changed::default()),
        ("it is well", findings(&[]), found),
        ("it is still well", findings(&[]), Changed::default()),
        ("a slice goes", Event::SliceGone(name("a")), services(&["b"])),
        ("a Service goes", Event::ServiceGone(name("b")), services(&["b"])),
        ("it is gone", Event::ServiceGone(name("b")), Changed::default()),
        (
            "a listing without a Service",
            Event::Listed(Source::Services, objects(&["c"])),
            Changed { listed: true, ..services(&["a"]) },
        ),
        ("the same again", Event::Listed(Source::Services, objects(&["c"])), Changed::default()),
        (
            "a listing without a pod",
            Event::Listed(Source::Links, Listing::Links([6].into())),
            Changed { listed: true, ..links(&[7]) },
        ),
        ("an interface", Event::Device(device(3, &[])), links(&[3])),
        ("a listing without it", Event::Listed(Source::Links, Listing::Links([6].into())), links(&[3])),
    ];
    let mut state = ClusterState::default();
    for (what, event, expected) in rows {
        assert_eq!(state.apply(event), expected, "{what}");
    }
    assert_eq!(state.missing().collect::<Vec<_>>(), [Source::EndpointSlices, Source::Node]);
}

#[test]
fn synced_after_one_full_listing_of_each_source() {
    let mut state = ClusterState::default();
    state.apply(Event::Service(web("a", "10.96.0.1")));
    // A listing of the wrong kind is none.
    for (source, listing) in [
        (Source::Services, Listing::Node),
        (Source::EndpointSlices, Listing::Links(BTreeSet::new())),
        (Source::Node, objects(&[])),
        (Source::Links, objects(&[])),
        (Source::ServiceCidrs, objects(&[])),
    ] {
        assert_eq!(state.apply(Event::Listed(source, listing)), Changed::default());
    }
    assert_eq!(state.services().count(), 1);
    for (source, listing) in [
        (Source::Services, objects(&["a"])),
        (Source::EndpointSlices, objects(&[])),
        (Source::Node, Listing::Node),
        (Source::Links, Listing::Links(BTreeSet::new())),
        (Source::ServiceCidrs, Listing::ServiceCidrs(BTreeSet::new())),
    ] {
        assert!(!state.synced(), "{source:?} is missing");
        state.apply(Event::Listed(source, listing));
    }
    assert!(state.synced());
}
