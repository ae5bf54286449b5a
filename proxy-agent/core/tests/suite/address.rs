//! Which addresses are served, what an address is to the node, interfaces and ranges.

use std::net::IpAddr;

use proxy_abi::{DeviceEntry, FrontendEntry, FrontendKey};
use proxy_core::event::{Event, NetDevice, Node, PodLink};
use proxy_core::policy::{DetectLocal, ExternalIps, NodePortAddresses, Policy};
use proxy_core::reconcile::Settings;
use proxy_core::service::{Protocol, Service, ServicePort};

use crate::cluster::{self, device, ip, link, name, number, port, web, web_slice};
use crate::node::TestNode;

fn with_policy(policy: Policy, events: Vec<Event>) -> TestNode {
    let mut node = TestNode::new(Settings { policy, ..Settings::default() });
    node.start(events);
    node
}

/// Addresses with a mark, as `address` and the letters of its flags: Reject, node Port, Node, Loopback.
fn marks(node: &TestNode) -> Vec<String> {
    let letters = [
        (FrontendEntry::ADDRESS_REJECT, 'R'),
        (FrontendEntry::ADDRESS_NODE_PORT, 'P'),
        (FrontendEntry::ADDRESS_NODE, 'N'),
        (FrontendEntry::ADDRESS_LOOPBACK, 'L'),
    ];
    let rows = node.tables().frontends.iter().filter(|(key, _)| **key == FrontendKey::address(key.ip));
    let mut marks: Vec<(IpAddr, String)> = rows
        .map(|(key, entry)| {
            let set = letters.iter().filter(|(flag, _)| entry.flags & flag != 0);
            (IpAddr::from(key.ip), set.map(|(_, letter)| *letter).collect())
        })
        .collect();
    marks.sort();
    marks.into_iter().map(|(ip, flags)| format!("{ip} {flags}")).collect()
}

#[test]
fn marks_by_node_port_addresses() {
    let range = |text: &str| NodePortAddresses::Range(text.parse().expect("a range"));
    let events = || {
        let bridge = NetDevice { attach: false, pod_bridge: true, ..device(3, &["10.244.0.1"]) };
        vec![
            Event::Device(device(2, &["192.168.0.1", "192.168.5.1", "fd00:99::1", "fd00:99::2"])),
            Event::Device(bridge),
            Event::Device(NetDevice { name: "lo".into(), attach: false, ..device(1, &["127.0.0.1", "::1"]) }),
            Event::Service(web("a", "10.96.0.1")),
        ]
    };
    let by = |selectors: Vec<NodePortAddresses>, localhost_node_ports: bool| Policy {
        node_port_addresses: selectors,
        localhost_node_ports,
        ..Policy::default()
    };
    // 1: 10.96.0.1, 2: 10.244.0.1, 3: 127.0.0.1, 4: 192.168.0.1, 5: 192.168.5.1, 6: ::1, 7: fd00:99::1, 8: fd00:99::2
    let rows = [
        ("primary and localhost", by(vec![NodePortAddresses::Primary], true), "R N PNL PN N PNL PN N"),
        ("primary alone", by(vec![NodePortAddresses::Primary], false), "R N N PN N N PN N"),
        ("localhost by name", by(vec![NodePortAddresses::Localhost], false), "R N PNL N N PNL N N"),
        ("all", by(vec![NodePortAddresses::All], false), "R PN N PN PN N PN PN"),
        ("a range", by(vec![range("192.168.5.0/24")], false), "R N N N PN N N N"),
        ("a range with a bridge", by(vec![range("10.0.0.0/8")], false), "R PN N N N N N N"),
        ("a range of everything", by(vec![range("0.0.0.0/0")], false), "R PN N PN PN N N N"),
        ("a range of loopback", by(vec![range("127.0.0.0/8")], false), "R N PNL N N N N N"),
        ("several", by(vec![NodePortAddresses::Primary, range("fd00:99::2/128")], false), "R N N PN N N PN PN"),
        ("none", by(vec![], false), "R N N N N N N N"),
    ];
    let addresses =
        ["10.96.0.1", "10.244.0.1", "127.0.0.1", "192.168.0.1", "192.168.5.1", "::1", "fd00:99::1", "fd00:99::2"];
    for (row, policy, expected) in rows {
        let mut node = with_policy(policy, events());
        let expected: Vec<String> =
            addresses.iter().zip(expected.split(' ')).map(|(ip, flags)| format!("{ip} {flags}")).collect();
        assert_eq!(marks(&node), expected, "{row}");
        node.restart();
        assert_eq!(node.settle(), 0, "{row}");
    }
}

#[test]
fn marks_follow_the_addresses_and_touch_no_service() {
    let mut node = TestNode::started([
        Event::Service(web("a", "10.96.0.1")),
        Event::Service(Service {
            ports: vec![ServicePort { node_port: Some(number(30_080)), ..port("", Protocol::Tcp, 80) }],
            ..web("b", "10.96.0.2")
        }),
    ]);
    let first = ["10.96.0.1 R", "10.96.0.2 R", "127.0.0.1 PNL", "192.168.0.1 PN", "::1 PNL", "fd00:99::1 PN"];
    assert_eq!(marks(&node), first, "localhost too, though no interface names it");
    assert_eq!(node.change([Event::Device(device(2, &["192.168.0.1", "192.168.5.1"]))]), 2, "a device and a mark");
    assert!(marks(&node).contains(&"192.168.5.1 N".to_owned()));
    assert_eq!(node.change([Event::Device(device(2, &["192.168.0.1", "192.168.6.1"]))]), 2, "one goes, one comes");
    // Another primary address: two marks change, and the source of what leaves for IPv6 stays the node's.
    let moved = Node { addresses: vec![ip("192.168.6.1"), ip("192.168.0.1"), ip("fd00:99::1")], ..cluster::node() };
    assert_eq!(node.change([Event::Node(moved)]), 2);
    assert!(marks(&node).contains(&"192.168.6.1 PN".to_owned()));
    assert_eq!(node.change([Event::Node(cluster::node()), Event::DeviceGone(2)]), 3);
    assert_eq!(marks(&node), first);
    // The gateway of pods is an address of the node as long as there is such a pod.
    let behind = |index| Event::Link(PodLink { gateways: vec![ip("10.244.0.1")], ..link(index, &[]) });
    node.change([behind(7), behind(8)]);
    assert!(marks(&node).contains(&"10.244.0.1 N".to_owned()));
    node.change([Event::LinkGone(7)]);
    assert!(marks(&node).contains(&"10.244.0.1 N".to_owned()));
    node.change([Event::LinkGone(8)]);
    assert_eq!(marks(&node), first);
    // A cluster address on an interface, as kube-proxy in IPVS mode leaves it, goes on being served.
    node.change([Event::Device(device(4, &["10.96.0.1"]))]);
    assert!(marks(&node).contains(&"10.96.0.1 RN".to_owned()));
    assert_eq!(node.diagnostics(), [""; 0]);
}

#[test]
fn addresses_from_outside_that_are_not_served() {
    let base = || {
        vec![
            Event::Node(Node { pod_cidrs: vec!["10.244.0.0/24".parse().expect("a range")], ..cluster::node() }),
            Event::Service(web("z", "10.96.0.9")),
            Event::ServiceCidr("kubernetes".into(), vec!["172.30.0.0/16".parse().expect("a range")]),
            Event::Device(device(2, &["192.168.0.1", "192.168.5.1"])),
            Event::Link(link(7, &["10.99.0.7"])),
        ]
    };
    let outside = "use an address that leads to the cluster from outside";
    let service_range = "use an address outside the service range";
    // Address; why it is no external address; why it is no load balancer's (`None`: the same reason).
    let rows: [(&str, String, Option<&str>); 13] = [
        ("203.0.113.1", String::new(), None),
        ("127.0.0.1", format!("127.0.0.1 is a loopback address; it is not served; {outside}"), None),
        ("169.254.1.1", format!("169.254.1.1 is a link-local address; it is not served; {outside}"), None),
        ("224.0.0.5", format!("224.0.0.5 is a multicast address; it is not served; {outside}"), None),
        ("0.0.0.0", format!("0.0.0.0 is an unspecified address; it is not served; {outside}"), None),
        ("255.255.255.255", format!("255.255.255.255 is a broadcast address; it is not served; {outside}"), None),
        (
            "10.96.0.9",
            format!(
                "10.96.0.9 is the cluster address of Service default/z; it is not served for this field; {service_range}"
            ),
            None,
        ),
        (
            "10.96.0.1",
            format!(
                "10.96.0.1 is the cluster address of Service default/a; it is not served for this field; {service_range}"
            ),
            None,
        ),
        (
            "172.30.0.1",
            format!(
                "172.30.0.1 is in 172.30.0.0/16, the range of ServiceCIDR kubernetes; it is not served; {service_range}"
            ),
            None,
        ),
        (
            "10.244.0.77",
            "10.244.0.77 is in 10.244.0.0/24, this node's range of pod addresses; it is not served; use an address \
             outside the pod range"
                .to_owned(),
            None,
        ),
        (
            "10.99.0.7",
            "10.99.0.7 is the address of the pod behind veth7; it is not served; use an address that no pod has"
                .to_owned(),
            None,
        ),
        (
            "192.168.0.1",
            "192.168.0.1 is an address of this node; it is not served; use a NodePort, or an address that no node has"
                .to_owned(),
            Some(""),
        ),
        (
            "192.168.5.1",
            "192.168.5.1 is an address of this node; it is not served; use a NodePort, or an address that no node has"
                .to_owned(),
            Some(""),
        ),
    ];
    for (address, external, balancer) in rows {
        let balancer = balancer.unwrap_or(&external);
        let kinds = [
            (
                "spec.externalIPs",
                external.as_str(),
                Service { external_ips: vec![ip(address)], ..web("a", "10.96.0.1") },
            ),
            (
                "status.loadBalancer.ingress",
                balancer,
                Service { load_balancer_ips: vec![ip(address)], ..web("a", "10.96.0.1") },
            ),
        ];
        for (field, reason, service) in kinds {
            let node = TestNode::started(base().into_iter().chain([Event::Service(service)]));
            let expected: Vec<String> =
                if reason.is_empty() { Vec::new() } else { vec![format!("Service default/a {field}: {reason}")] };
            assert_eq!(node.diagnostics(), expected, "{address} {field}");
            let cluster = address.starts_with("10.96.0.");
            assert_eq!(
                node.text().contains(&format!("frontend {address}:80")),
                reason.is_empty() || cluster,
                "{address}"
            );
        }
    }
    // Of a family that the Service has not: nobody's business.
    let node =
        TestNode::started([Event::Service(Service { external_ips: vec![ip("fe80::1")], ..web("a", "10.96.0.1") })]);
    assert_eq!(node.diagnostics(), [""; 0]);
}

#[test]
fn what_stands_in_the_way_comes_and_goes() {
    let served = |node: &TestNode| node.text().contains("frontend 203.0.113.9:80/TCP service 1 ");
    let mut node = TestNode::started([
        Event::Service(Service { external_ips: vec![ip("203.0.113.9")], ..web("a", "10.96.0.1") }),
        Event::Slice(web_slice("a", &["10.244.0.5"])),
    ]);
    assert!(served(&node));
    let range = vec!["203.0.113.0/24".parse().expect("a range")];
    let pairs = [
        (Event::ServiceCidr("x".into(), range.clone()), Event::ServiceCidrGone("x".into())),
        (Event::Device(device(2, &["203.0.113.9"])), Event::DeviceGone(2)),
        (Event::Link(link(7, &["203.0.113.9"])), Event::LinkGone(7)),
        (Event::Service(web("b", "203.0.113.9")), Event::ServiceGone(name("b"))),
        (Event::Node(Node { pod_cidrs: range, ..cluster::node() }), Event::Node(cluster::node())),
        (Event::Node(Node { addresses: vec![ip("203.0.113.9")], ..cluster::node() }), Event::Node(cluster::node())),
    ];
    for (comes, goes) in pairs {
        node.change([comes.clone()]);
        assert!(!served(&node), "{comes:?}");
        assert_eq!(node.diagnostics().len(), 1, "{comes:?}");
        node.change([goes.clone()]);
        assert!(served(&node), "{goes:?}");
        assert_eq!(node.diagnostics(), [""; 0], "{goes:?}");
    }
}

#[test]
fn external_addresses_are_the_operators_to_allow() {
    let within = ExternalIps::Within(vec!["203.0.113.0/24".parse().expect("a range")]);
    let rows = [(ExternalIps::All, [true, true]), (within, [true, false]), (ExternalIps::None, [false, false])];
    for (external_ips, expected) in rows {
        let addresses = ["203.0.113.1", "198.51.100.1"];
        let service = Service {
            external_ips: addresses.map(ip).to_vec(),
            load_balancer_ips: vec![ip("192.0.2.1")],
            ..web("a", "10.96.0.1")
        };
        let node = with_policy(
            Policy { external_ips: external_ips.clone(), ..Policy::default() },
            vec![Event::Service(service)],
        );
        let served = addresses.map(|address| node.text().contains(&format!("frontend {address}:80")));
        assert_eq!(served, expected, "{external_ips:?}");
        assert_eq!(node.diagnostics().len(), expected.iter().filter(|served| !**served).count(), "{external_ips:?}");
        assert!(node.text().contains("frontend 192.0.2.1:80"), "a load balancer's is not meant");
    }
}

#[test]
fn a_new_configuration_at_a_restart_keeps_the_numbers() {
    let service = Service {
        external_ips: vec![ip("203.0.113.1")],
        ports: vec![ServicePort { node_port: Some(number(30_080)), ..port("", Protocol::Tcp, 80) }],
        ..web("a", "10.96.0.1")
    };
    let mut node = TestNode::started([Event::Service(service), Event::Slice(web_slice("a", &["10.244.0.5"]))]);
    let before = node.tables().clone();
    node.settings.policy = Policy {
        masquerade_all: true,
        external_ips: ExternalIps::None,
        localhost_node_ports: false,
        detect_local: DetectLocal::ClusterCidr,
        cluster_cidrs: vec!["10.244.0.0/16".parse().expect("a range")],
        ..Policy::default()
    };
    node.restart();
    // A flag, three rows gone (a frontend, two marks), a range of sources, and a slot zeroed later.
    assert_eq!(node.settle(), 1 + 3 + 1 + 1);
    assert_eq!((&node.tables().services, &node.tables().backends), (&before.services, &before.backends));
    assert!(node.text().contains("prefix 10.244.0.0/16 local source\n"));
    node.settings.policy = Policy::default();
    node.restart();
    node.settle();
    assert_eq!(node.tables().backends, before.backends);
}

#[test]
fn interfaces_that_are_not_pods() {
    let mut node = TestNode::started([
        Event::Device(device(2, &["fd00:99::7", "192.168.5.1"])),
        Event::Device(NetDevice { attach: false, mtu: 1400, ..device(3, &["10.244.0.1"]) }),
        Event::Device(device(4, &[])),
        Event::Device(NetDevice { name: "lo".into(), ..device(1, &["127.0.0.1"]) }),
        Event::Link(PodLink { mtu: 1450, gateways: vec![], ..link(7, &["10.244.0.7"]) }),
    ]);
    let devices = |node: &TestNode| -> Vec<String> {
        node.text().lines().filter(|line| line.starts_with("device")).map(str::to_owned).collect()
    };
    let rest = [
        "device 3 02:00:00:00:02:03 10.244.0.1 fd00:99::1 programs none mtu 1400",
        "device 4 02:00:00:00:02:04 192.168.0.1 fd00:99::1 programs netdev mtu 1500",
        "device 7 pod 02:00:00:00:00:07 10.244.0.7 gateway 02:00:00:00:01:00 bridge 3 path redirect policy 0 mtu 1450",
    ];
    let uplink = "device 2 02:00:00:00:02:02 192.168.5.1 fd00:99::7 programs netdev mtu 1500";
    assert_eq!(devices(&node), [&[uplink], &rest[..]].concat());
    let entry = node.tables().devices[&2];
    assert_eq!((entry.flags, entry.bridge, entry.pod_mac), (DeviceEntry::NETDEV, 0, entry.gateway_mac));
    // A veth is seen before the pod behind it is known, and after it has gone; in whatever order that is told.
    node.change([Event::Link(link(2, &[])), Event::DeviceGone(2)]);
    assert!(devices(&node)[0].starts_with("device 2 pod "));
    node.change([Event::Device(device(2, &["fd00:99::7", "192.168.5.1"])), Event::LinkGone(2)]);
    assert_eq!(devices(&node)[0], uplink);
    node.change([Event::Node(Node { addresses: vec![ip("192.168.0.8")], ..cluster::node() })]);
    assert_eq!(devices(&node)[2], "device 4 02:00:00:00:02:04 192.168.0.8 programs netdev mtu 1500");
    node.change([2, 3, 4].map(Event::DeviceGone));
    assert_eq!(devices(&node), rest[2..]);
}

#[test]
fn service_ranges_are_rows() {
    let range = |text: &str| text.parse().expect("a range");
    let mut node = TestNode::started([
        Event::ServiceCidr("a".into(), vec![range("10.96.0.0/16"), range("fd00:96::/112")]),
        Event::ServiceCidr("b".into(), vec![range("10.96.0.0/16"), range("10.97.0.0/16")]),
    ]);
    let rows = |node: &TestNode| node.tables().to_string().lines().filter(|l| l.starts_with("prefix")).count();
    assert_eq!(rows(&node), 3);
    assert_eq!(node.change([Event::ServiceCidrGone("a".into())]), 1, "the one that both have stays");
    assert!(node.text().ends_with("prefix 10.96.0.0/16 service range\nprefix 10.97.0.0/16 service range\n"));
    node.restart();
    assert_eq!(node.settle(), 0);
    // What could not be read may have been a ServiceCIDR: its rows stay until everything can be read.
    node.restart_with([Event::Node(cluster::node()), Event::Unreadable(true)]);
    node.list_all();
    assert_eq!((node.settle(), rows(&node)), (0, 2));
    node.change([Event::Unreadable(false)]);
    assert_eq!(rows(&node), 0);
}
