//! One row per rule of endpoint selection.

use proxy_core::address::Family;
use proxy_core::select::{Locality, Target, select};
use proxy_core::service::{Endpoint, EndpointSlice, Protocol, ServicePort};

use crate::cluster::{port, ready, slice, terminating, unready};

const HERE: Locality<'static> = Locality { node: "node-a", zone: Some("zone-a") };

fn zone(zones: &[&str], endpoint: Endpoint) -> Endpoint {
    Endpoint { for_zones: zones.iter().map(|zone| (*zone).into()).collect(), ..endpoint }
}

fn hint(nodes: &[&str], endpoint: Endpoint) -> Endpoint {
    Endpoint { for_nodes: nodes.iter().map(|node| (*node).into()).collect(), ..endpoint }
}

fn on(node: &str, endpoint: Endpoint) -> Endpoint {
    Endpoint { node: Some(node.into()), ..endpoint }
}

/// `address:port`, `!` when local, `-` when it takes no new flows.
fn text(targets: &[Target]) -> String {
    let show = |target: &Target| {
        let local = if target.local { "!" } else { "" };
        let selected = if target.cluster { "" } else { "-" };
        format!("{selected}{}:{}{local}", target.address, target.port)
    };
    targets.iter().map(show).collect::<Vec<_>>().join(" ")
}

fn selected(slices: &[EndpointSlice], port: &ServicePort, family: Family, here: Locality<'_>) -> String {
    text(&select(slices.iter(), port, family, here))
}

#[test]
fn conditions_and_hints() {
    // Ready by the controller's word, as with publishNotReadyAddresses.
    let published = |address| Endpoint { serving: false, terminating: true, ..ready(address) };
    let [a, b, c] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
    let no_zone = Locality { zone: None, ..HERE };
    let nowhere = Locality { node: "", zone: None };
    let rows: Vec<(&str, Locality<'_>, Vec<Endpoint>, &str)> = vec![
        ("no endpoint", HERE, vec![], ""),
        ("ready ones", HERE, vec![ready(b), ready(a)], "10.0.0.1:8080 10.0.0.2:8080"),
        ("neither ready nor serving", HERE, vec![unready(a)], ""),
        (
            "ready hides terminating, which keeps its flows",
            HERE,
            vec![ready(a), terminating(b)],
            "10.0.0.1:8080 -10.0.0.2:8080",
        ),
        ("terminating when none is ready", HERE, vec![terminating(a), unready(b)], "10.0.0.1:8080"),
        ("serving alone is not enough", HERE, vec![Endpoint { ready: false, ..ready(a) }], "-10.0.0.1:8080"),
        ("terminating but not serving", HERE, vec![Endpoint { serving: false, ..terminating(a) }], ""),
        ("ready although terminating", HERE, vec![published(a), terminating(b)], "10.0.0.1:8080 -10.0.0.2:8080"),
        ("local", HERE, vec![on("node-a", ready(a)), on("node-b", ready(b))], "10.0.0.1:8080! 10.0.0.2:8080"),
        ("own name unknown", nowhere, vec![on("", ready(a)), hint(&[""], ready(b))], "10.0.0.1:8080 10.0.0.2:8080"),
        ("zone", HERE, vec![zone(&["zone-a"], ready(a)), zone(&["zone-b"], ready(b))], "10.0.0.1:8080 -10.0.0.2:8080"),
        (
            "one of several zones",
            HERE,
            vec![zone(&["zone-b", "zone-a"], ready(a)), zone(&["zone-b"], ready(b))],
            "10.0.0.1:8080 -10.0.0.2:8080",
        ),
        (
            "one ready endpoint without a zone hint",
            HERE,
            vec![zone(&["zone-a"], ready(a)), zone(&["zone-b"], ready(b)), ready(c)],
            "10.0.0.1:8080 10.0.0.2:8080 10.0.0.3:8080",
        ),
        (
            "an unready one without a hint does not count",
            HERE,
            vec![zone(&["zone-a"], ready(a)), zone(&["zone-b"], ready(b)), terminating(c)],
            "10.0.0.1:8080 -10.0.0.2:8080 -10.0.0.3:8080",
        ),
        (
            "no hint for this zone",
            HERE,
            vec![zone(&["zone-b"], ready(a)), zone(&["zone-c"], ready(b))],
            "10.0.0.1:8080 10.0.0.2:8080",
        ),
        (
            "zone of the node unknown",
            no_zone,
            vec![zone(&["zone-a"], ready(a)), zone(&["zone-b"], ready(b))],
            "10.0.0.1:8080 10.0.0.2:8080",
        ),
        (
            "node before zone",
            HERE,
            vec![hint(&["node-a"], zone(&["zone-a"], ready(a))), hint(&["node-b"], zone(&["zone-a"], ready(b)))],
            "10.0.0.1:8080 -10.0.0.2:8080",
        ),
        (
            "zone when no node hint names this node",
            HERE,
            vec![hint(&["node-b"], zone(&["zone-a"], ready(a))), hint(&["node-b"], zone(&["zone-b"], ready(b)))],
            "10.0.0.1:8080 -10.0.0.2:8080",
        ),
        (
            "zone when one has no node hint",
            HERE,
            vec![hint(&["node-a"], zone(&["zone-b"], ready(a))), zone(&["zone-a"], ready(b))],
            "-10.0.0.1:8080 10.0.0.2:8080",
        ),
        (
            "hints do not apply to the terminating",
            HERE,
            vec![zone(&["zone-a"], terminating(a)), zone(&["zone-b"], terminating(b))],
            "10.0.0.1:8080 10.0.0.2:8080",
        ),
    ];
    for (rule, here, endpoints, expected) in rows {
        let slices = [slice("s", "web", &[("", Protocol::Tcp, 8080)], endpoints)];
        assert_eq!(selected(&slices, &port("", Protocol::Tcp, 80), Family::V4, here), expected, "{rule}");
    }
}

#[test]
fn ports_match_by_name_and_protocol() {
    let slices = [
        slice("a", "web", &[("http", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 5353)], vec![ready("10.0.0.1")]),
        slice("b", "web", &[("http", Protocol::Tcp, 9090)], vec![ready("10.0.0.2")]),
        slice("c", "web", &[("http", Protocol::Udp, 7070)], vec![ready("10.0.0.3")]),
        slice("d", "web", &[("", Protocol::Tcp, 6060)], vec![ready("10.0.0.4")]),
    ];
    let rows = [
        (port("http", Protocol::Tcp, 80), "10.0.0.1:8080 10.0.0.2:9090"),
        (port("http", Protocol::Udp, 80), "10.0.0.3:7070"),
        (port("dns", Protocol::Udp, 53), "10.0.0.1:5353"),
        (port("dns", Protocol::Tcp, 53), ""),
        (port("", Protocol::Tcp, 80), "10.0.0.4:6060"),
    ];
    for (port, expected) in rows {
        assert_eq!(selected(&slices, &port, Family::V4, HERE), expected, "{port:?}");
    }
}

#[test]
fn only_usable_addresses_of_the_family() {
    let bad =
        ["127.0.0.1", "169.254.1.1", "224.0.0.1", "0.0.0.0", "::1", "fe80::1", "ff02::1", "::", "::ffff:10.0.0.9"];
    let mut endpoints: Vec<_> = bad.iter().map(|address| ready(address)).collect();
    endpoints.extend([ready("10.0.0.1"), ready("fd00::1")]);
    let slices = [slice("s", "web", &[("", Protocol::Tcp, 8080)], endpoints)];
    let web = port("", Protocol::Tcp, 80);
    assert_eq!(selected(&slices, &web, Family::V4, HERE), "10.0.0.1:8080");
    assert_eq!(selected(&slices, &web, Family::V6, HERE), "fd00::1:8080");
}

#[test]
fn an_endpoint_in_two_slices_counts_once_in_its_better_state() {
    let web = port("", Protocol::Tcp, 80);
    let states = [ready("10.0.0.1"), terminating("10.0.0.1"), unready("10.0.0.1")];
    let published = Endpoint { terminating: true, ..ready("10.0.0.1") };
    let rows = [
        (&states[0], &states[1], "10.0.0.1:8080"),
        (&states[0], &states[2], "10.0.0.1:8080"),
        // Not terminating, and not ready: it will be, or it fails its probe; either way no new flow.
        (&states[1], &states[2], ""),
        (&published, &states[0], "10.0.0.1:8080"),
    ];
    for (one, other, expected) in rows {
        for (first, second) in [(one, other), (other, one)] {
            let slices = [
                slice("a", "web", &[("", Protocol::Tcp, 8080)], vec![first.clone()]),
                slice("b", "web", &[("", Protocol::Tcp, 8080)], vec![second.clone()]),
            ];
            assert_eq!(selected(&slices, &web, Family::V4, HERE), expected, "{first:?} {second:?}");
        }
    }
    let slices = [
        slice("a", "web", &[("", Protocol::Tcp, 8080)], vec![ready("10.0.0.1")]),
        slice("b", "web", &[("", Protocol::Tcp, 8081)], vec![ready("10.0.0.1")]),
    ];
    assert_eq!(selected(&slices, &web, Family::V4, HERE), "10.0.0.1:8080 10.0.0.1:8081", "two ports are two endpoints");
}

#[test]
fn the_local_set_knows_no_hints_and_falls_back_by_itself() {
    let [a, b, c] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"];
    let here = |endpoint| on("node-a", endpoint);
    let there = |endpoint| on("node-b", endpoint);
    let serving = |address| Endpoint { ready: false, ..ready(address) };
    let nowhere = Locality { node: "", zone: None };
    // Rule, where, endpoints, cluster set, local set.
    let rows = [
        ("ready ones of this node", HERE, vec![here(ready(a)), there(ready(b)), ready(c)], vec![a, b, c], vec![a]),
        ("none of this node", HERE, vec![there(ready(a)), ready(b)], vec![a, b], vec![]),
        ("ready before draining", HERE, vec![here(ready(a)), here(terminating(b))], vec![a], vec![a]),
        ("draining ones when none is ready", HERE, vec![here(terminating(a)), there(ready(b))], vec![b], vec![a]),
        ("draining everywhere", HERE, vec![here(terminating(a)), there(terminating(b))], vec![a, b], vec![a]),
        ("neither ready nor serving", HERE, vec![here(unready(a)), there(ready(b))], vec![b], vec![]),
        ("serving, not ready, not draining", HERE, vec![here(serving(a))], vec![], vec![]),
        (
            "hints for another zone",
            HERE,
            vec![here(zone(&["zone-b"], ready(a))), there(zone(&["zone-a"], ready(b)))],
            vec![b],
            vec![a],
        ),
        (
            "hints for another node",
            HERE,
            vec![here(hint(&["node-b"], ready(a))), there(hint(&["node-a"], ready(b)))],
            vec![b],
            vec![a],
        ),
        ("node unknown", nowhere, vec![here(ready(a)), on("", ready(b))], vec![a, b], vec![]),
        ("none", HERE, vec![], vec![], vec![]),
    ];
    for (rule, locality, endpoints, cluster, local) in rows {
        let slices = [slice("s", "web", &[("", Protocol::Tcp, 8080)], endpoints)];
        let targets = select(slices.iter(), &port("", Protocol::Tcp, 80), Family::V4, locality);
        let of = |member: fn(&Target) -> bool| -> Vec<String> {
            targets.iter().filter(|target| member(target)).map(|target| target.address.to_string()).collect()
        };
        assert_eq!((of(|t| t.cluster), of(|t| t.local_set)), (strings(&cluster), strings(&local)), "{rule}");
    }
}

fn strings(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}
