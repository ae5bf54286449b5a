//! What each event changes.

use std::collections::BTreeSet;

use proxy_core::diagnostic::{Diagnostic, Severity};
use proxy_core::event::{Event, Listing, Node, Source};
use proxy_core::name::ObjectName;
use proxy_core::state::{Changed, ClusterState};

use crate::cluster::{ip, link, name, node, web, web_slice};

fn services(names: &[&str]) -> Changed {
    Changed { services: names.iter().map(|n| name(n)).collect(), ..Changed::default() }
}

fn links(indices: &[u32]) -> Changed {
    Changed { links: indices.iter().copied().collect(), ..Changed::default() }
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
        ("this node", Event::Node(node()), services(&["a", "b"])),
        ("the same again", Event::Node(node()), Changed::default()),
        (
            "its pod ranges",
            Event::Node(Node { pod_cidrs: vec!["10.244.0.0/24".parse().expect("a range")], ..node() }),
            Changed::default(),
        ),
        (
            "an address that is a Service's",
            Event::Node(Node { addresses: vec![ip("10.96.0.2")], ..node() }),
            services(&["b"]),
        ),
        ("its zone", Event::Node(Node { zone: Some("zone-a".into()), ..node() }), services(&["a", "b"])),
        ("a pod", Event::Link(link(5, &["10.244.0.5"])), links(&[5])),
        ("the same again", Event::Link(link(5, &["10.244.0.5"])), Changed::default()),
        ("a pod with its address", Event::Link(link(6, &["10.244.0.5"])), links(&[5, 6])),
        (
            "a pod with a Service's address",
            Event::Link(link(7, &["10.96.0.1"])),
            Changed { links: [7].into(), ..services(&["a"]) },
        ),
        ("a pod goes", Event::LinkGone(5), links(&[5, 6])),
        ("it is gone", Event::LinkGone(5), Changed::default()),
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
    ] {
        assert_eq!(state.apply(Event::Listed(source, listing)), Changed::default());
    }
    assert_eq!(state.services().count(), 1);
    for (source, listing) in [
        (Source::Services, objects(&["a"])),
        (Source::EndpointSlices, objects(&[])),
        (Source::Node, Listing::Node),
        (Source::Links, Listing::Links(BTreeSet::new())),
    ] {
        assert!(!state.synced(), "{source:?} is missing");
        state.apply(Event::Listed(source, listing));
    }
    assert!(state.synced());
}
