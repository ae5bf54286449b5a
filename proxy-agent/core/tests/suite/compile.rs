//! What objects become, as the text of the tables.

use proxy_abi::NameBytes;
use proxy_core::event::{Event, LinkPath, Node, PodLink};
use proxy_core::service::{Endpoint, Protocol, Service};

use crate::cluster::{
    self, ip, link, meaning, name, port, ready, service, slice, terminating, unready, web, web_slice,
};
use crate::node::{TestNode, small};

#[track_caller]
fn check(node: &TestNode, expected: &str) {
    let expected: String = expected.trim().lines().flat_map(|line| [line.trim(), "\n"]).collect();
    let actual = node.text();
    assert!(actual == expected, "expected\n{expected}\nfound\n{actual}");
}

fn with_affinity(service: Service) -> Service {
    Service { affinity_seconds: Some(10_800), ..service }
}

#[test]
fn dual_stack_service_with_two_ports_and_named_target_ports() {
    let ports = [port("http", Protocol::Tcp, 80), port("dns", Protocol::Udp, 53)];
    let here = |address| Endpoint { node: Some("node-a".into()), ..ready(address) };
    let node = TestNode::started([
        Event::Service(service("web", &["10.96.0.9", "fd00:96::9"], &ports)),
        Event::Slice(slice(
            "v4-a",
            "web",
            &[("http", Protocol::Tcp, 8080), ("dns", Protocol::Udp, 5353)],
            vec![ready("10.244.1.2"), here("10.244.0.2")],
        )),
        Event::Slice(slice("v4-b", "web", &[("http", Protocol::Tcp, 9090)], vec![terminating("10.244.1.3")])),
        Event::Slice(slice("v6", "web", &[("http", Protocol::Tcp, 8080)], vec![here("fd00:244::2")])),
    ]);
    check(
        &node,
        "service 1 default/web:http
         service 2 default/web:dns
         backend 1 10.244.0.2:8080/TCP service 1 generation 1 local in-cluster in-local
         backend 2 10.244.1.2:8080/TCP service 1 generation 2 in-cluster
         backend 3 10.244.1.3:9090/TCP service 1 generation 3
         backend 4 [fd00:244::2]:8080/TCP service 1 generation 4 local in-cluster in-local
         backend 5 10.244.0.2:5353/UDP service 2 generation 5 local in-cluster in-local
         backend 6 10.244.1.2:5353/UDP service 2 generation 6 in-cluster
         slot 1 backend 1
         slot 2 backend 2
         slot 3 backend 4
         slot 4 backend 5
         slot 5 backend 6
         frontend 10.96.0.9 address reject
         frontend 10.96.0.9:53/UDP service 2 slots 4-5 generation 1 masquerade-outside
         frontend 10.96.0.9:80/TCP service 1 slots 1-2 generation 1 masquerade-outside
         frontend fd00:96::9 address reject
         frontend [fd00:96::9]:53/UDP service 2 no slots generation 1 masquerade-outside
         frontend [fd00:96::9]:80/TCP service 1 slot 3 generation 1 masquerade-outside",
    );
    assert_eq!(node.diagnostics(), [""; 0]);
}

#[test]
fn a_changed_set_takes_a_new_range_and_the_rest_keeps_its_numbers() {
    let mut node = TestNode::started([
        Event::Service(web("a", "10.96.0.1")),
        Event::Slice(web_slice("a", &["10.244.0.1", "10.244.0.2"])),
        Event::Service(web("b", "10.96.0.2")),
        Event::Slice(web_slice("b", &["10.244.0.3"])),
    ]);
    node.handle([Event::Slice(web_slice("a", &["10.244.0.2", "10.244.0.4"]))]);
    node.sync();
    check(
        &node,
        "service 1 default/a
         service 2 default/b
         backend 2 10.244.0.2:8080/TCP service 1 generation 2 in-cluster
         backend 3 10.244.0.3:8080/TCP service 2 generation 3 in-cluster
         backend 4 10.244.0.4:8080/TCP service 1 generation 4 in-cluster
         slot 1 backend 1
         slot 2 backend 2
         slot 3 backend 3
         slot 4 backend 2
         slot 5 backend 4
         frontend 10.96.0.1 address reject
         frontend 10.96.0.1:80/TCP service 1 slots 4-5 generation 2 masquerade-outside
         frontend 10.96.0.2 address reject
         frontend 10.96.0.2:80/TCP service 2 slot 3 generation 1 masquerade-outside",
    );
    node.settle();
    node.change([Event::Slice(web_slice("b", &[])), Event::Slice(web_slice("a", &["10.244.0.2"]))]);
    node.change([Event::Slice(web_slice("b", &["10.244.0.3"]))]);
    check(
        &node,
        "service 1 default/a
         service 2 default/b
         backend 1 10.244.0.3:8080/TCP service 2 generation 5 in-cluster
         backend 2 10.244.0.2:8080/TCP service 1 generation 2 in-cluster
         slot 1 backend 2
         slot 2 backend 1
         frontend 10.96.0.1 address reject
         frontend 10.96.0.1:80/TCP service 1 slot 1 generation 3 masquerade-outside
         frontend 10.96.0.2 address reject
         frontend 10.96.0.2:80/TCP service 2 slot 2 generation 3 masquerade-outside",
    );
}

#[test]
fn a_serving_endpoint_keeps_its_backend_when_it_takes_no_new_flows() {
    let endpoints = |endpoints: Vec<Endpoint>| Event::Slice(slice("s", "a", &[("", Protocol::Tcp, 8080)], endpoints));
    let [a, b] = ["10.244.0.1", "10.244.0.2"];
    let mut node = TestNode::started([Event::Service(web("a", "10.96.0.1")), endpoints(vec![ready(a), ready(b)])]);
    let rows = [
        ("draining", vec![ready(a), terminating(b)], vec![a, b], vec![a]),
        ("not ready, still serving", vec![ready(a), Endpoint { ready: false, ..ready(b) }], vec![a, b], vec![a]),
        ("no longer serving", vec![ready(a), unready(b)], vec![a], vec![a]),
        ("all draining", vec![terminating(a), terminating(b)], vec![a, b], vec![a, b]),
        ("gone", vec![], vec![], vec![]),
    ];
    for (what, now, backends, selected) in rows {
        node.change([endpoints(now)]);
        let meaning = meaning(node.tables());
        let found: Vec<_> = meaning.backends.iter().map(|(_, backend)| backend.0).collect();
        assert_eq!(found, backends.iter().map(|a| ip(a)).collect::<Vec<_>>(), "{what}");
        let (_, _, found) = meaning.frontends.values().find(|(owner, ..)| owner == "default/a").expect("the frontend");
        assert_eq!(
            found.iter().map(|backend| backend.0).collect::<Vec<_>>(),
            selected.iter().map(|a| ip(a)).collect::<Vec<_>>(),
            "{what}"
        );
    }
}

#[test]
fn a_local_flag_changes_in_place() {
    let at = |n: &str| {
        let endpoint = Endpoint { node: Some(n.into()), ..ready("10.244.0.1") };
        Event::Slice(slice("s", "a", &[("", Protocol::Tcp, 8080)], vec![endpoint]))
    };
    let mut node = TestNode::started([Event::Service(web("a", "10.96.0.1")), at("node-b")]);
    assert_eq!(node.change([at("node-a")]), 1);
    assert!(node.text().contains("backend 1 10.244.0.1:8080/TCP service 1 generation 1 local in-cluster in-local\n"));
    assert_eq!(node.change([Event::Node(Node { name: "node-c".into(), ..cluster::node() })]), 1);
    assert!(node.text().contains("backend 1 10.244.0.1:8080/TCP service 1 generation 1 in-cluster\n"));
}

#[test]
fn everything_goes_with_the_service() {
    let mut node = TestNode::started([
        Event::Service(web("a", "10.96.0.1")),
        Event::Slice(web_slice("a", &["10.244.0.1"])),
        Event::Link(link(7, &["10.244.0.1"])),
    ]);
    node.change([Event::ServiceGone(name("a")), Event::LinkGone(7)]);
    check(&node, "");
}

#[test]
fn a_renamed_port_keeps_its_frontend_without_a_gap() {
    let named = |n: &str| Event::Service(service("a", &["10.96.0.1"], &[port(n, Protocol::Tcp, 80)]));
    let both = [("old", Protocol::Tcp, 8080), ("new", Protocol::Tcp, 8080)];
    let mut node = TestNode::started([named("old"), Event::Slice(slice("s", "a", &both, vec![ready("10.244.0.1")]))]);
    node.handle([named("new")]);
    node.sync();
    for step in &node.steps {
        let served = step.frontends.values().filter(|(owner, ..)| !owner.is_empty());
        assert_eq!(served.count(), 1, "{step:?}");
    }
    node.settle();
    check(
        &node,
        "service 2 default/a:new
         backend 2 10.244.0.1:8080/TCP service 2 generation 2 in-cluster
         slot 2 backend 2
         frontend 10.96.0.1 address reject
         frontend 10.96.0.1:80/TCP service 2 slot 2 generation 2 masquerade-outside",
    );
}

#[test]
fn ports_that_swap_numbers_within_a_service() {
    let ports = |a: u16, b: u16| {
        Event::Service(service("a", &["10.96.0.1"], &[port("x", Protocol::Tcp, a), port("y", Protocol::Tcp, b)]))
    };
    let mut node = TestNode::started([ports(80, 81)]);
    node.change([ports(81, 80)]);
    check(
        &node,
        "service 1 default/a:x
         service 2 default/a:y
         frontend 10.96.0.1 address reject
         frontend 10.96.0.1:80/TCP service 2 no slots generation 2 masquerade-outside
         frontend 10.96.0.1:81/TCP service 1 no slots generation 2 masquerade-outside",
    );
    assert_eq!(node.diagnostics(), [""; 0]);
}

#[test]
fn the_first_holder_of_a_frontend_keeps_it_until_it_goes() {
    let mut node =
        TestNode::started([Event::Service(web("b", "10.96.0.1")), Event::Slice(web_slice("b", &["10.244.0.2"]))]);
    node.change([Event::Service(web("a", "10.96.0.1")), Event::Slice(web_slice("a", &["10.244.0.1"]))]);
    let held = "service 1 default/b
         backend 1 10.244.0.2:8080/TCP service 1 generation 1 in-cluster
         slot 1 backend 1
         frontend 10.96.0.1 address reject
         frontend 10.96.0.1:80/TCP service 1 slot 1 generation 1 masquerade-outside";
    check(&node, held);
    let conflict =
        ["Service default/a spec.ports[0].port: 10.96.0.1 port 80/TCP belongs to Service default/b; the port is not \
         served there; use another address or port, or delete the other one"];
    assert_eq!(node.diagnostics(), conflict);
    node.restart();
    assert_eq!(node.settle(), 0);
    check(&node, held);
    assert_eq!(node.diagnostics(), conflict);
    node.change([Event::ServiceGone(name("b"))]);
    check(
        &node,
        "service 2 default/a
         backend 2 10.244.0.1:8080/TCP service 2 generation 262146 in-cluster
         slot 2 backend 2
         frontend 10.96.0.1 address reject
         frontend 10.96.0.1:80/TCP service 2 slot 2 generation 2 masquerade-outside",
    );
    assert_eq!(node.diagnostics(), [""; 0]);
}

#[test]
fn of_two_that_come_together_the_first_name_gets_the_frontend() {
    let events = [Event::Service(web("b", "10.96.0.1")), Event::Service(web("a", "10.96.0.1"))];
    let owner = |events: Vec<Event>| TestNode::started(events).text();
    let expected = "service 1 default/a
frontend 10.96.0.1 address reject
frontend 10.96.0.1:80/TCP service 1 no slots generation 1 masquerade-outside
";
    assert_eq!(owner(events.to_vec()), expected);
    assert_eq!(owner(events.iter().rev().cloned().collect()), expected);
}

#[test]
fn objects_that_cannot_be_served_get_a_finding_and_leave_the_rest_alone() {
    let good = [Event::Service(web("z", "10.96.0.99")), Event::Slice(web_slice("z", &["10.244.0.99"]))];
    let served = TestNode::started(good.clone()).text();
    let long = "x".repeat(NameBytes([0; 144]).0.len());
    let rows: Vec<(Vec<Event>, Vec<String>)> =
        vec![
        (
            vec![Event::Service(web("a", "192.168.0.1"))],
            vec!["Service default/a spec.clusterIPs[0]: 192.168.0.1 is an address of this node; it is not served; take \
                  it from one of the two".to_owned()],
        ),
        (
            vec![Event::Service(web("a", "127.0.0.1"))],
            vec!["Service default/a spec.clusterIPs[0]: 127.0.0.1 is a loopback address; it is not served; use an \
                  address of the cluster's service range".to_owned()],
        ),
        (
            vec![Event::Service(web("a", "::ffff:10.96.0.99"))],
            vec!["Service default/a spec.clusterIPs[0]: ::ffff:10.96.0.99 is an IPv4-mapped address; it is not served; \
                  use an address of the cluster's service range".to_owned()],
        ),
        (
            vec![Event::Service(web(&long, "10.96.0.1"))],
            vec![format!(
                "Service default/{long} spec.ports[0].name: default/{long} is longer than 144 bytes; the port is not \
                 served; shorten the names"
            )],
        ),
    ];
    for (events, expected) in rows {
        let node = TestNode::started(good.iter().cloned().chain(events));
        assert_eq!(node.diagnostics(), expected);
        assert_eq!(node.text(), served);
    }
}

#[test]
fn findings_that_do_not_keep_a_service_from_working() {
    let duplicate = [port("x", Protocol::Tcp, 80), port("x", Protocol::Tcp, 81)];
    let bad = ["127.0.0.1", "10.244.0.1", "169.254.169.254", "224.0.0.1"];
    let node = TestNode::started([
        Event::Service(with_affinity(service("a", &["10.96.0.1"], &duplicate))),
        Event::Slice(slice("s", "a", &[("x", Protocol::Tcp, 8080)], bad.iter().map(|a| ready(a)).collect())),
    ]);
    check(
        &node,
        "service 1 default/a:x
         backend 1 10.244.0.1:8080/TCP service 1 generation 1 in-cluster
         slot 1 backend 1
         frontend 10.96.0.1 address reject
         frontend 10.96.0.1:80/TCP service 1 slot 1 generation 1 affinity 10800s masquerade-outside",
    );
    assert_eq!(
        node.diagnostics(),
        [
            "EndpointSlice default/s endpoints[0].addresses[0]: 127.0.0.1 is a loopback address and is left out (and 2 \
             more like it); name an address that every node can reach",
            "Service default/a spec.ports[1].name: name \"x\" is that of another port; the port is not served; give \
             each port a name of its own",
        ]
    );
}

#[test]
fn a_cluster_address_that_is_a_pods_is_served_only_while_it_is_not() {
    let mut node = TestNode::started([Event::Service(web("a", "10.96.0.1"))]);
    let served = node.text();
    assert!(node.handle_due([Event::Link(link(7, &["10.96.0.1"]))]));
    node.settle();
    check(
        &node,
        "device 7 pod 02:00:00:00:00:07 10.96.0.1 gateway 02:00:00:00:01:00 10.244.0.1 fd00:244::1 bridge 3 path redirect policy 0
         local_pod 10.96.0.1 device 7 pod 02:00:00:00:00:07 path redirect policy 0",
    );
    assert_eq!(
        node.diagnostics(),
        ["Service default/a spec.clusterIPs[0]: 10.96.0.1 is the address of the pod behind veth7; it is not served; \
          keep the pod range and the service range apart"]
    );
    node.change([Event::LinkGone(7)]);
    assert_eq!(node.text().replace("service 2", "service 1").replace("generation 2", "generation 1"), served);
    node.change([Event::Link(PodLink { gateways: vec![ip("10.96.0.1")], ..link(8, &[]) })]);
    assert!(!node.text().contains("service"), "nor when it is a bridge's");
}

#[test]
fn pods_and_their_interfaces() {
    let path = |ifindex, addresses: &[&str], path| Event::Link(PodLink { path, ..link(ifindex, addresses) });
    let mut node = TestNode::started([
        path(5, &["10.244.0.5", "fd00:244::5", "10.244.1.5"], LinkPath::Redirect),
        path(6, &["fd00:244::6"], LinkPath::Switch),
        path(7, &["10.244.0.5", "10.244.0.7"], LinkPath::Stack),
    ]);
    let shared = "Interface veth7 addresses: 10.244.0.5 is bound to interface 5; it is not bound to this one; give each \
                  pod its own address";
    assert_eq!(node.diagnostics(), [shared]);
    check(
        &node,
        "device 5 pod 02:00:00:00:00:05 10.244.0.5 fd00:244::5 gateway 02:00:00:00:01:00 10.244.0.1 fd00:244::1 bridge 3 path redirect policy 0
         device 6 pod 02:00:00:00:00:06 fd00:244::6 gateway 02:00:00:00:01:00 10.244.0.1 fd00:244::1 bridge 3 path switch policy 0
         device 7 pod 02:00:00:00:00:07 10.244.0.7 gateway 02:00:00:00:01:00 10.244.0.1 fd00:244::1 bridge 3 path stack policy 0
         local_pod 10.244.0.5 device 5 pod 02:00:00:00:00:05 path redirect policy 0
         local_pod 10.244.0.7 device 7 pod 02:00:00:00:00:07 path stack policy 0
         local_pod 10.244.1.5 device 5 pod 02:00:00:00:00:05 path redirect policy 0
         local_pod fd00:244::5 device 5 pod 02:00:00:00:00:05 path redirect policy 0
         local_pod fd00:244::6 device 6 pod 02:00:00:00:00:06 path switch policy 0",
    );
    // The address passes on; what stays is not written again: one row set, one device set, two rows and a device gone.
    assert_eq!(node.change([Event::LinkGone(5)]), 5);
    assert!(node.text().contains("local_pod 10.244.0.5 device 7 pod 02:00:00:00:00:07 path stack policy 0\n"));
    assert_eq!(node.diagnostics(), [""; 0]);
}

#[test]
fn a_full_map_leaves_the_old_state_and_everybody_else_alone() {
    let slice_of = |n: &str, count: u8| {
        let addresses: Vec<String> = (1..=count).map(|i| format!("10.244.0.{i}")).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        Event::Slice(web_slice(n, &addresses))
    };
    // 5 backends, 8 slots.
    let mut node = TestNode::new(small(6, 9, 64));
    node.start([Event::Service(web("a", "10.96.0.1")), slice_of("a", 2)]);
    node.change([Event::Service(web("b", "10.96.0.2")), slice_of("b", 1)]);
    let before = node.text();
    node.change([slice_of("a", 5)]);
    assert_eq!(node.text(), before);
    assert_eq!(
        node.diagnostics(),
        ["Service default/a spec.ports[0]: no room for more backends; the port stays as it was; remove Services or \
          endpoints, or raise the capacity"]
    );
    node.change([slice_of("b", 2)]);
    let b: Vec<_> = meaning(node.tables()).backends.into_iter().filter(|(owner, _)| owner == "default/b").collect();
    assert_eq!(b.len(), 2, "others go on");
    // With room, it is tried again without being told.
    node.change([Event::ServiceGone(name("b"))]);
    assert_eq!(meaning(node.tables()).backends.len(), 5);
    assert_eq!(node.diagnostics(), [""; 0]);
}

#[test]
fn full_frontends_slots_services_and_devices() {
    let services: Vec<Event> = (1..=3_u8)
        .flat_map(|i| {
            let n = format!("s{i}");
            [
                Event::Service(web(&n, &format!("10.96.0.{i}"))),
                Event::Slice(web_slice(&n, &["10.244.0.1", "10.244.0.2"])),
            ]
        })
        .collect();
    let rows = [(small(64, 64, 8), "frontends"), (small(64, 5, 64), "slots"), (small(5, 64, 64), "backends")];
    for (settings, what) in rows {
        let mut node = TestNode::new(settings);
        node.start(services.clone());
        assert_eq!(
            node.diagnostics(),
            [format!(
                "Service default/s3 spec.ports[0]: no room for more {what}; the port is not served; remove Services or \
                 endpoints, or raise the capacity"
            )]
        );
        assert_eq!(meaning(node.tables()).services.len(), 2);
        node.change([Event::ServiceGone(name("s1"))]);
        assert_eq!(node.diagnostics(), [""; 0], "{what}");
        assert_eq!(meaning(node.tables()).services, ["default/s2".to_owned(), "default/s3".to_owned()].into());
    }
    let mut node = TestNode::new(small(64, 64, 64));
    node.start([
        Event::Link(link(5, &["10.244.0.5", "fd00::5"])),
        Event::Link(link(6, &["10.244.0.6", "fd00::6"])),
        Event::Link(link(7, &["10.244.0.7"])),
    ]);
    assert_eq!(
        node.diagnostics(),
        [
            "Interface veth6 addresses: no room for fd00::6; it is reached through the stack; run fewer pods on the node",
            "Interface veth7: no room for more interfaces; Services do not work for its pod; run fewer pods on the node",
        ]
    );
    node.change([Event::LinkGone(5)]);
    assert_eq!(node.diagnostics(), [""; 0]);
    assert_eq!(node.tables().devices.keys().copied().collect::<Vec<_>>(), [6, 7]);
    assert_eq!(node.tables().local_pods.len(), 3);
}
