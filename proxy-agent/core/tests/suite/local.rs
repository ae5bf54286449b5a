//! Pods of this node: what policy is told of their addresses, and which slot their interfaces get.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use proxy_abi::{CgroupPodEntry, DeviceEntry, IpBytes};
use proxy_core::event::{Enforcement, Event, Listing, PodLink, Source};
use proxy_core::local::LocalPods;
use proxy_core::name::ObjectName;
use proxy_core::netpol::reconcile::PolicyListing;
use proxy_core::netpol::spec::{Change, Labels, Pod};

use crate::cluster::{self, ip, link};
use crate::node::{TestNode, small};

const HELD: u16 = DeviceEntry::HELD;

fn pod(name: &str, node: &str, ips: &[&str]) -> Pod {
    Pod {
        name: ObjectName::new("shop", name),
        uid: format!("u-{name}").into(),
        labels: Labels::new(),
        node: Some(node.into()),
        host_network: false,
        finished: false,
        deleting: false,
        socket_lb: true,
        created: 0,
        ips: ips.iter().map(|text| ip(text)).collect(),
        ports: vec![],
    }
}

fn owned(ifindex: u32, addresses: &[&str], pod: &str) -> PodLink {
    PodLink { pod: Some(format!("u-{pod}").into()), ..link(ifindex, addresses) }
}

/// What policy is told, in short.
fn told(pods: &mut LocalPods, event: &Event) -> Vec<String> {
    let show = |change: Change| match change {
        Change::Pod(pod) => format!("{} {:?}", pod.name.name, pod.ips),
        Change::PodGone(name) => format!("gone {}", name.name),
        other => format!("{other:?}"),
    };
    pods.handle(event).into_iter().map(show).collect()
}

#[test]
fn a_pod_has_the_addresses_of_its_interface_before_the_api_says_so() {
    let mut pods = LocalPods::new("node-a");
    let object = |pod| Event::NetworkPolicy(Change::Pod(pod));
    let gone = |name: &str| Event::NetworkPolicy(Change::PodGone(ObjectName::new("shop", name)));
    let links = |all: &[u32]| Event::Listed(Source::Links, Listing::Links(all.iter().copied().collect()));
    let steps: Vec<(Event, &[&str])> = vec![
        (object(pod("far", "node-b", &["10.244.9.9"])), &["far [10.244.9.9]"]),
        (object(pod("web", "node-a", &[])), &["web []"]),
        (Event::Link(link(7, &["10.244.0.7"])), &[]),
        (Event::Link(owned(7, &["10.244.0.7"], "web")), &["web [10.244.0.7]"]),
        (Event::Link(PodLink { mtu: 1400, ..owned(7, &["10.244.0.7"], "web") }), &[]),
        (Event::Link(owned(7, &["10.244.0.7", "fd00::7"], "web")), &["web [10.244.0.7, fd00::7]"]),
        (object(pod("web", "node-a", &["10.244.0.7"])), &["web [10.244.0.7, fd00::7]"]),
        // The interface of a pod that is not known yet.
        (Event::Link(owned(8, &["10.244.0.8"], "late")), &[]),
        (object(pod("late", "node-a", &[])), &["late [10.244.0.8]"]),
        // A pod of another node cannot have an interface here, whatever a record says.
        (Event::Link(owned(9, &["10.244.0.9"], "far")), &[]),
        (Event::LinkGone(7), &["web [10.244.0.7]"]),
        (Event::LinkGone(7), &[]),
        (links(&[9]), &["late []"]),
        (gone("late"), &["gone late"]),
        (Event::Link(owned(8, &["10.244.0.8"], "late")), &[]),
        (Event::NetworkPolicyListed(PolicyListing::Pods(BTreeSet::new())), &[]),
        (Event::Link(owned(7, &["10.244.0.7"], "web")), &[]),
        (Event::NetworkPolicy(Change::NamespaceGone("shop".into())), &["NamespaceGone(\"shop\")"]),
        (links(&[]), &[]),
    ];
    for (number, (event, want)) in steps.into_iter().enumerate() {
        assert_eq!(told(&mut pods, &event), want, "step {number}: {event:?}");
    }
}

#[test]
fn a_pod_made_anew_under_its_name_has_only_its_own_interface() {
    let mut pods = LocalPods::new("node-a");
    let again = Pod { uid: "u-again".into(), ..pod("web", "node-a", &[]) };
    let second = PodLink { pod: Some("u-again".into()), ..link(8, &["10.244.0.8"]) };
    told(&mut pods, &Event::NetworkPolicy(Change::Pod(pod("web", "node-a", &[]))));
    assert_eq!(told(&mut pods, &Event::Link(owned(7, &["10.244.0.7"], "web"))), ["web [10.244.0.7]"]);
    assert_eq!(told(&mut pods, &Event::NetworkPolicy(Change::Pod(again))), ["web []"]);
    assert_eq!(told(&mut pods, &Event::Link(second)), ["web [10.244.0.8]"]);
    assert_eq!((pods.pod("u-web"), pods.pod("u-again").map(|pod| &*pod.name.name)), (None, Some("web")));
}

#[test]
fn interfaces_name_the_slots_of_their_pods() {
    let mut node = TestNode::started([
        Event::Link(owned(5, &["10.244.0.5"], "a")),
        Event::Link(owned(6, &["10.244.0.6"], "b")),
        Event::Link(link(7, &["10.244.0.7", "fd00::7"])),
    ]);
    let slots = |node: &TestNode| {
        let tables = node.tables();
        let devices: BTreeMap<u32, u16> = tables.devices.iter().map(|(index, entry)| (*index, entry.slot)).collect();
        for (address, entry) in &tables.local_pods {
            assert_eq!(entry.slot, devices[&entry.ifindex], "{:?} and its interface", IpAddr::from(*address));
        }
        devices
    };
    let on = |slots: &[(&str, u16)]| {
        let slots = slots.iter().map(|(pod, slot)| (Arc::from(format!("u-{pod}")), *slot)).collect();
        Event::Enforcement(Enforcement::On(slots))
    };
    assert_eq!(slots(&node), [(5, 0), (6, 0), (7, 0)].into());
    // One row for the interface and one for each address.
    assert_eq!(node.change([on(&[("a", 3)])]), 2 + 2 + 3);
    assert_eq!(slots(&node), [(5, 3), (6, HELD), (7, HELD)].into());
    assert_eq!(node.change([on(&[("a", 3)])]), 0);
    assert_eq!(node.change([on(&[("a", 3), ("b", 4)])]), 2);
    assert_eq!(node.change([Event::Link(owned(7, &["10.244.0.7", "fd00::7"], "c"))]), 0, "not known to policy");
    assert_eq!(node.change([on(&[("a", 3), ("b", 4), ("c", 9)])]), 3);
    assert_eq!(slots(&node), [(5, 3), (6, 4), (7, 9)].into());
    node.change([Event::Link(owned(8, &["10.244.0.8"], "a"))]);
    assert_eq!(slots(&node), [(5, 3), (6, 4), (7, 9), (8, 3)].into(), "a second interface of a pod");
    // A restarted agent is told anew before it writes.
    let links = [
        owned(5, &["10.244.0.5"], "a"),
        owned(6, &["10.244.0.6"], "b"),
        owned(7, &["10.244.0.7", "fd00::7"], "c"),
        owned(8, &["10.244.0.8"], "a"),
    ];
    node.restart_with([Event::Node(cluster::node()), on(&[("a", 3), ("b", 4), ("c", 9)])]);
    node.handle(links.map(Event::Link));
    node.list_all();
    assert_eq!(node.settle(), 0);
    node.change([Event::Enforcement(Enforcement::Off)]);
    assert_eq!(slots(&node), [(5, 0), (6, 0), (7, 0), (8, 0)].into());
}

#[test]
fn pods_whose_sockets_are_translated_are_those_that_were_named_last() {
    let entry =
        |ifindex, ip4: &str| CgroupPodEntry { ip4: ip(ip4).into(), ip6: IpBytes::UNSPECIFIED, ifindex, reserved: 0 };
    let (five, six) = (entry(5, "10.244.0.5"), entry(6, "10.244.0.6"));
    let pods = |pods: &[(u64, CgroupPodEntry)]| Event::CgroupPods(pods.iter().copied().collect());
    let rows = |node: &TestNode| node.tables().cgroup_pods.clone().into_iter().collect::<Vec<_>>();
    let mut node = TestNode::started([]);
    assert_eq!(node.change([pods(&[(70, five), (71, six)])]), 2);
    assert_eq!(rows(&node), [(70, five), (71, six)]);
    assert!(node.text().contains("cgroup_pod 70 device 5 10.244.0.5\n"), "{}", node.text());
    assert_eq!(node.change([pods(&[(70, five), (71, six)])]), 0);
    assert_eq!(node.change([pods(&[(70, six)])]), 2);
    assert_eq!(rows(&node), [(70, six)]);
    // An agent that starts anew leaves them until it knows.
    node.restart_with([Event::Node(cluster::node())]);
    node.list_all();
    assert_eq!((node.settle(), rows(&node)), (0, vec![(70, six)]));
    assert_eq!(node.change([pods(&[(72, five)])]), 2);
    node.change([pods(&[])]);
    assert_eq!(rows(&node), []);
    // Those that find no room are left out.
    let mut node = TestNode::new(small(4, 4, 40));
    node.start([pods(&[(70, five), (71, six), (72, five)])]);
    assert_eq!(rows(&node), [(70, five), (71, six)]);
    node.change([pods(&[(71, six), (72, five)])]);
    assert_eq!(rows(&node), [(71, six), (72, five)]);
}
