//! The five kinds of ways through a node, traced: every step in its order, with br_netfilter and without, in both families.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use proxy_tests::scenario::matrix;
use proxy_tests::scenario::{SERVICE_PORT, Scenario};
use proxy_tests::tracer::{TracedPacket, Tracer};
use proxy_tests::traffic::{TcpServer, tcp_exchange};
use proxy_tests::{ClusterSpec, Family, Netns, NodeSpec};

#[test]
fn explore() {
    let spec = ClusterSpec::default()
        .node(NodeSpec::new("node1").pods(["a", "b"]))
        .node(NodeSpec::new("node2").pods(["d"]));
    let scenario = matrix::scenario_of(&spec, &[]).expect("scenario");
    for on in [false, true] {
        scenario.node(0).set_br_netfilter(on).expect("set");
        for (client, server) in [("a", "b"), ("a", "d")] {
            let netns = scenario.netns(client).expect("netns");
            let target = SocketAddr::new(matrix::vip_of(server, Family::V4).expect("vip"), SERVICE_PORT);
            for form in ["tree", "ndjson"] {
                let svc = format!("svc:default/to-{server}");
                let tracer = Tracer::start(scenario.node(0), &["pod:default/a", "to", &svc, "--for", "1500ms", "-o", form]).expect("tracer");
                tcp_exchange(&netns, target, 1000, 1000).expect("exchange");
                let traced = tracer.finish(Duration::from_secs(10)).expect("ended");
                println!("=== {client}->{server} br={on} code {:?}\n{}\n{}", traced.code, traced.out, traced.err);
            }
        }
    }
}
