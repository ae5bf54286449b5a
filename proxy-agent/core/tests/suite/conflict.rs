//! Frontends that two want, and Services that change what they are.

use proxy_core::event::Event;
use proxy_core::service::{Protocol, Service, ServicePort};

use crate::cluster::{ip, name, number, port, service, web, web_slice};
use crate::node::TestNode;

fn with_node_port(service: Service, protocol: Protocol, node_port: u16) -> Service {
    let ports = vec![ServicePort { node_port: Some(number(node_port)), ..port("", protocol, 80) }];
    Service { ports, ..service }
}

#[test]
fn the_holder_keeps_a_frontend_of_whatever_kind() {
    let end = "the port is not served there; use another address or port, or delete the other one";
    let external = |n: &str, cluster: &str| Service { external_ips: vec![ip("203.0.113.1")], ..web(n, cluster) };
    let balancer = |n: &str, cluster: &str| Service { load_balancer_ips: vec![ip("203.0.113.1")], ..web(n, cluster) };
    let node_port = |n: &str, cluster: &str| with_node_port(web(n, cluster), Protocol::Tcp, 30_080);
    let local = |service: Service| Service { external_local: true, ..service };
    let rows = [
        (
            "node port",
            node_port("b", "10.96.0.2"),
            node_port("a", "10.96.0.1"),
            "frontend 0.0.0.0:30080/TCP service ",
            "Service default/a spec.ports[0].nodePort: node port 30080/TCP belongs to Service default/b; the port is not \
             served there; use another node port, or delete the other one"
                .to_owned(),
        ),
        (
            "node port, the loser with policy Local",
            node_port("b", "10.96.0.2"),
            local(node_port("a", "10.96.0.1")),
            "frontend 0.0.0.0:30080/TCP service ",
            "Service default/a spec.ports[0].nodePort: node port 30080/TCP belongs to Service default/b; the port is not \
             served there; use another node port, or delete the other one"
                .to_owned(),
        ),
        (
            "external address",
            external("b", "10.96.0.2"),
            external("a", "10.96.0.1"),
            "frontend 203.0.113.1:80/TCP service ",
            format!("Service default/a spec.externalIPs: 203.0.113.1 port 80/TCP belongs to Service default/b; {end}"),
        ),
        (
            "external address of one, load balancer's of the other, both with policy Local",
            local(external("b", "10.96.0.2")),
            local(balancer("a", "10.96.0.1")),
            "frontend 203.0.113.1:80/TCP service ",
            format!(
                "Service default/a status.loadBalancer.ingress: 203.0.113.1 port 80/TCP belongs to Service default/b; {end}"
            ),
        ),
    ];
    for (row, first, second, frontend, finding) in rows {
        let mut node = TestNode::started([Event::Service(first), Event::Slice(web_slice("b", &["10.244.0.2"]))]);
        node.change([Event::Service(second), Event::Slice(web_slice("a", &["10.244.0.1"]))]);
        assert_eq!(node.diagnostics(), [finding.as_str()], "{row}");
        let owner = |node: &TestNode, text: &str| {
            let text = node.text().lines().find(|line| line.starts_with(text)).map(str::to_owned).expect("a frontend");
            text[frontend.len()..].split(' ').next().expect("an id").to_owned()
        };
        assert_eq!(owner(&node, frontend), "1", "{row}");
        let outside = |node: &TestNode| node.text().matches("from outside service 2").count();
        assert_eq!(outside(&node), 0, "{row}: nor half of it");
        node.restart();
        assert_eq!((node.settle(), node.diagnostics()), (0, vec![finding]), "{row}: after a restart");
        // The rest of the loser is served, and it takes over when the holder goes.
        assert!(node.text().contains("frontend 10.96.0.1:80/TCP service 2 "), "{row}");
        node.change([Event::ServiceGone(name("b"))]);
        assert_eq!((owner(&node, frontend).as_str(), node.diagnostics()), ("2", Vec::new()), "{row}");
        node.change([Event::ServiceGone(name("a"))]);
        assert_eq!(node.text(), "", "{row}");
    }
}

#[test]
fn one_number_for_three_protocols_is_no_conflict() {
    let all = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];
    let services = all.iter().zip(["a", "b", "c"]).zip(["10.96.0.1", "10.96.0.2", "10.96.0.3"]);
    let node = TestNode::started(
        services.map(|((protocol, n), address)| Event::Service(with_node_port(web(n, address), *protocol, 30_080))),
    );
    assert_eq!(node.diagnostics(), [""; 0]);
    for protocol in ["TCP", "UDP", "SCTP"] {
        assert!(node.text().contains(&format!("frontend 0.0.0.0:30080/{protocol} service ")));
    }
}

#[test]
fn ports_of_one_service_that_want_one_node_port() {
    let both =
        |n: &str, number_: u16| ServicePort { node_port: Some(number(30_080)), ..port(n, Protocol::Tcp, number_) };
    let node = TestNode::started([Event::Service(service("a", &["10.96.0.1"], &[both("x", 80), both("y", 81)]))]);
    assert_eq!(
        node.diagnostics(),
        [
            "Service default/a spec.ports[1].nodePort: node port 30080/TCP belongs to Service default/a:x; the port is not \
          served there; use another node port, or delete the other one"
        ]
    );
}

#[test]
fn an_address_that_is_external_and_a_load_balancers_is_the_latter() {
    let one = vec![ip("203.0.113.1")];
    let service = Service {
        external_ips: one.clone(),
        load_balancer_ips: [one.clone(), one].concat(),
        source_ranges: vec!["192.0.2.0/24".parse().expect("a range")],
        ..web("a", "10.96.0.1")
    };
    let node = TestNode::started([Event::Service(service)]);
    assert_eq!(node.diagnostics(), [""; 0]);
    assert!(
        node.text().contains("frontend 203.0.113.1:80/TCP service 1 no slots generation 1 masquerade source-ranges\n")
    );
}

#[test]
fn a_service_that_changes_its_type_keeps_its_numbers() {
    let slices = || Event::Slice(web_slice("a", &["10.244.0.1", "10.244.0.2"]));
    let cluster = Event::Service(web("a", "10.96.0.1"));
    let node_port = Event::Service(with_node_port(web("a", "10.96.0.1"), Protocol::Tcp, 30_080));
    let mut node = TestNode::started([cluster.clone(), slices()]);
    let before = node.tables().clone();
    // ClusterIP to NodePort: two slots and a frontend; nothing else is written.
    assert_eq!(node.change([node_port.clone()]), 3);
    let wide = node.text();
    assert!(wide.contains("frontend 0.0.0.0:30080/TCP service 1 slots 3-4 generation 1 masquerade\n"), "{wide}");
    // And back: the frontend, and later both slots.
    assert_eq!(node.change([cluster.clone()]), 3);
    assert_eq!(*node.tables(), before);
    // To ExternalName, which is none of ours, and from there to NodePort.
    node.change([Event::ServiceGone(name("a"))]);
    assert_eq!(node.text(), "");
    node.change([node_port]);
    assert!(node.text().contains("frontend 0.0.0.0:30080/TCP") && node.text().contains("frontend 10.96.0.1:80/TCP"));
    node.restart();
    assert_eq!(node.settle(), 0);
}

#[test]
fn a_policy_that_flips_moves_only_what_it_governs() {
    let base = with_node_port(web("a", "10.96.0.1"), Protocol::Tcp, 30_080);
    let here =
        |address| proxy_core::service::Endpoint { node: Some("node-a".into()), ..crate::cluster::ready(address) };
    let endpoints = vec![here("10.244.0.1"), crate::cluster::ready("10.244.1.1")];
    let slice = crate::cluster::slice("a", "a", &[("", Protocol::Tcp, 8080)], endpoints);
    let mut node = TestNode::started([Event::Service(base.clone()), Event::Slice(slice)]);
    let line = |node: &TestNode, start: &str| {
        node.text().lines().find(|line| line.starts_with(start)).map(str::to_owned).unwrap_or_default()
    };
    let cluster = line(&node, "frontend 10.96.0.1:80");
    let backends = node.tables().backends.clone();
    // externalTrafficPolicy Local: a slot and a frontend for outside, and the other one's flags.
    assert_eq!(node.change([Event::Service(Service { external_local: true, ..base.clone() })]), 3);
    assert_eq!(
        [line(&node, "frontend 0.0.0.0:30080/TCP service"), line(&node, "frontend 0.0.0.0:30080/TCP from")],
        [
            "frontend 0.0.0.0:30080/TCP service 1 slots 3-4 generation 2 external-split",
            "frontend 0.0.0.0:30080/TCP from outside service 1 slot 5 generation 1 local-set",
        ]
    );
    assert_eq!(line(&node, "frontend 10.96.0.1:80"), cluster);
    assert_eq!(node.change([Event::Service(base.clone())]), 3);
    // internalTrafficPolicy Local: another range for the cluster address alone.
    node.change([Event::Service(Service { internal_local: true, ..base.clone() })]);
    let changed = line(&node, "frontend 10.96.0.1:80");
    assert!(changed.ends_with("generation 2 masquerade-outside local-set") && changed.contains("slot "), "{changed}");
    // Affinity is on all of them.
    node.change([Event::Service(Service { affinity_seconds: Some(60), ..base })]);
    assert_eq!(node.text().matches(" affinity 60s ").count(), 2);
    assert_eq!(node.tables().services[&1].affinity_seconds, 60);
    assert_eq!(node.tables().backends, backends, "no backend is another by that");
}
