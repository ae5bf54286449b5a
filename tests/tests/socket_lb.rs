//! `--socket-lb=all`: a pod's socket is led to a backend before there is a packet, and everything else is as without it.

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use proxy_tests::cluster::{ClusterSpec, NodeSpec, PodSpec};
use proxy_tests::manifests::Service;
use proxy_tests::policy_manifest::{PodObject, network_policy};
use proxy_tests::scenario::{SERVICE_PORT, Scenario, TARGET_PORT, service, vip};
use proxy_tests::tracer::Tracer;
use proxy_tests::traffic::flow::ping_all;
use proxy_tests::traffic::socket::udp_client;
use proxy_tests::traffic::wire::UdpReply;
use proxy_tests::traffic::{
    ANSWERED_WITHIN, Answer, Flow, TcpServer, Transport, UdpOptions, probe, tcp_exchange, udp_exchange,
};
use proxy_tests::{AgentOptions, Deadline, Driver, Family, Netns, PodCgroup, agent};
use serde_json::json;

const ALL: [&str; 2] = ["--socket-lb", "all"];
/// What is dropped is waited for so long.
const SILENCE: Duration = Duration::from_millis(600);
const NODE_PORT: u16 = 30_080;
const ANNOTATION: &str = "proxy-agent.io/socket-lb";

/// Asked for by `trace` of a pod that asks a Service.
const TRACE: [&str; 10] =
    ["pod:default/a", "to", "svc:default/near", "-c", "1", "--for", "10s", "--first-of-flow", "-o", "ndjson"];

/// Pods `a`, `b` and `c` on the first node, `d` on the second, each with servers. `a` and `c` have cgroups.
struct Stage {
    a: PodCgroup,
    c: PodCgroup,
    scenario: Scenario,
}

impl Stage {
    fn build() -> Self {
        Self::of(
            &ClusterSpec::default()
                .node(NodeSpec::new("node1").hostile(true).pods(["a", "b", "c"]))
                .node(NodeSpec::new("node2").hostile(true).pods(["d"])),
        )
    }

    fn of(spec: &ClusterSpec) -> Self {
        let mut scenario = Scenario::build(spec).expect("scenario");
        let pods: Vec<String> = scenario.cluster().pods().iter().map(|pod| pod.name().to_owned()).collect();
        for pod in pods {
            let object = PodObject::of(&scenario.cluster().pod(&pod).expect("a pod"));
            scenario.manifests().write(&object).expect("written");
            scenario.serve_pod(&pod).expect("servers");
        }
        let cgroup = |name, driver| PodCgroup::make(&scenario.cluster().pod(name).expect("a pod"), driver);
        let (a, c) = (cgroup("a", Driver::Systemd), cgroup("c", Driver::Cgroupfs));
        let (a, c) = (a.expect("a cgroup"), c.expect("a cgroup"));
        scenario.start_agents(&ALL).expect("agents");
        Self { a, c, scenario }
    }

    fn publish(&self, name: &str, host: u16, behind: &[&str]) -> Service {
        self.serve(&service(name, host), behind)
    }

    fn serve(&self, service: &Service, behind: &[&str]) -> Service {
        self.scenario.publish_service(service, behind).expect("published");
        self.scenario.wait_endpoints(0, &service.name, Some(behind.len() as u64)).expect("in the maps");
        service.clone()
    }

    /// Waits until so many pods of the first node are translated at their sockets.
    fn wait_translated(&self, pods: u64) {
        let translated = || self.scenario.status(0).is_ok_and(|status| status.used("cgroup_pod") == pods);
        Deadline::secs(60)
            .until(&format!("{pods} pods are translated at their sockets"), translated)
            .expect("they are");
    }

    fn netns(&self, name: &str) -> Netns {
        self.scenario.netns(name).expect("a namespace")
    }

    /// Rows of flows from a pod of the first node to an address.
    fn flows(&self, from: &str, to: SocketAddr) -> usize {
        let from = self.scenario.ip(from, Family::of(to.ip())).expect("a pod");
        let flows = self.scenario.flows(0).expect("flows");
        flows.iter().filter(|flow| flow.source.ip() == from && flow.destination == to).count()
    }

    /// Writes the Pod `a` with an annotation.
    fn annotate(&self, value: &str) {
        let object = PodObject::of(&self.scenario.cluster().pod("a").expect("a pod")).annotation(ANNOTATION, value);
        self.scenario.manifests().write(&object).expect("written");
    }
}

fn through(family: Family, host: u16) -> SocketAddr {
    SocketAddr::new(vip(family, host), SERVICE_PORT)
}

/// TCP and UDP through a Service by its backend; both clients compare what they are shown as their peer. What went past the
/// sockets has rows of flows to the Service.
fn exchange(stage: &Stage, from: &str, target: SocketAddr, backend: &str) -> (usize, usize) {
    let netns = stage.netns(from);
    let own = stage.scenario.ip(from, Family::of(target.ip())).expect("a pod");
    let before = stage.flows(from, target);
    let tcp = tcp_exchange(&netns, target, 10_000, 10_000).expect("TCP");
    assert_eq!((tcp.server_name.as_str(), tcp.peer, tcp.peer_seen_by_server.ip()), (backend, target, own));
    let after_tcp = stage.flows(from, target);
    for _ in 0..3 {
        let udp = udp_exchange(&netns, target, &UdpOptions::default()).expect("UDP");
        assert_eq!((udp.server_name.as_str(), udp.reply_from, udp.peer_seen_by_server.ip()), (backend, target, own));
    }
    (after_tcp - before, stage.flows(from, target) - after_tcp)
}

#[test]
fn sockets_of_pods_are_led_to_backends_and_no_packet_is_translated() {
    let stage = Stage::build();
    stage.publish("near", 31, &["b"]);
    stage.publish("far", 32, &["d"]);
    stage.publish("both", 33, &["b", "d"]);
    stage.wait_translated(2);
    let direct =
        |backend: &str, family| SocketAddr::new(stage.scenario.ip(backend, family).expect("a pod"), TARGET_PORT);
    for on in [false, true] {
        for node in stage.scenario.cluster().nodes() {
            node.set_br_netfilter(on).expect("switched");
        }
        for (cgroup, pod) in [(&stage.a, "a"), (&stage.c, "c")] {
            for (family, (host, backend)) in Family::BOTH.into_iter().flat_map(|f| [(f, (31, "b")), (f, (32, "d"))]) {
                let target = through(family, host);
                let before = stage.scenario.counters(0).expect("counters");
                let rows = cgroup.run(|| exchange(&stage, pod, target, backend)).expect("in the cgroup");
                let what = format!("{pod} {target} br_netfilter {on}");
                assert_eq!(rows, (0, 0), "{what}: flows through the Service");
                assert!(stage.flows(pod, direct(backend, family)) > 0, "{what}: no direct flow");
                let added = stage.scenario.counters(0).expect("counters").since(&before).rewrites();
                let at = |hook| added.get(hook, "socket") + added.get(hook, "socket_reply");
                let hooks = ["connect", "sendmsg", "recvmsg", "getpeername"].map(at);
                assert_eq!(hooks, [1, 3, 3, 1], "{what}: {added}");
                for hook in ["from_pod", "to_pod"] {
                    assert_eq!(added.get(hook, "service_new") + added.get(hook, "reply"), 0, "{what}: {added}");
                }
                // Who is in no cgroup that is known to be a pod's: by packets, as ever.
                let rows = exchange(&stage, pod, target, backend);
                assert!(rows.0 > 0 && rows.1 > 0, "{what}, outside of the cgroup: {rows:?}");
            }
        }
    }
    // A connected UDP socket could not be moved when its backend goes: its packets can.
    for family in Family::BOTH {
        let target = through(family, 31);
        let options = UdpOptions { connected: true, ..UdpOptions::default() };
        let before = stage.flows("a", target);
        let report = stage.a.run(|| udp_exchange(&stage.netns("a"), target, &options)).expect("in the cgroup");
        assert_eq!(report.expect("UDP").server_name, "b");
        assert!(stage.flows("a", target) > before, "{family:?}: connected UDP is left to packets");
    }
    // So it is for what it sends to an address all the same: it hears nobody but the Service.
    for family in Family::BOTH {
        let target = through(family, 33);
        let socket =
            stage.netns("a").run(|| udp_client(target, 0, ANSWERED_WITHIN)).expect("namespace").expect("socket");
        stage.a.run(|| socket.connect(target)).expect("in the cgroup").expect("connected");
        for _ in 0..4 {
            stage.a.run(|| ask_by(&socket, target)).expect("in the cgroup").expect("an answer");
        }
    }
    // IPv4 by a socket of IPv6.
    let target: SocketAddr = match through(Family::V4, 31) {
        SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), v4.port()).into(),
        SocketAddr::V6(_) => unreachable!("asked for IPv4"),
    };
    let connect = || stage.netns("a").run(|| TcpStream::connect(target).and_then(|stream| stream.peer_addr()));
    let before = stage.scenario.counters(0).expect("counters");
    let peer = stage.a.run(connect).expect("in the cgroup").expect("in the namespace").expect("connected");
    assert_eq!(peer, target);
    let added = stage.scenario.counters(0).expect("counters").since(&before);
    assert_eq!((added.get("connect", "socket"), added.get("getpeername", "socket_reply")), (1, 1), "{added}");
}

#[test]
fn a_pod_opts_out_and_in_again_while_it_runs() {
    let stage = Stage::build();
    stage.publish("near", 31, &["b"]);
    stage.wait_translated(2);
    let ask = |family| stage.a.run(|| exchange(&stage, "a", through(family, 31), "b")).expect("in the cgroup");
    let mut before = Flow::open(&stage.netns("a"), through(Family::V4, 31), 0, ANSWERED_WITHIN).expect("by packets");
    let mut inside = stage.a.run(|| Flow::open(&stage.netns("a"), through(Family::V4, 31), 0, ANSWERED_WITHIN));
    let inside = inside.as_mut().expect("in the cgroup").as_mut().expect("at the socket");
    for round in 0..2 {
        stage.annotate("disabled");
        stage.wait_translated(1);
        for family in Family::BOTH {
            let rows = ask(family);
            assert!(rows.0 > 0 && rows.1 > 0, "round {round} {family:?}: {rows:?}");
        }
        stage.annotate("enabled");
        stage.wait_translated(2);
        for family in Family::BOTH {
            assert_eq!(ask(family), (0, 0), "round {round} {family:?}");
        }
    }
    // What is neither is said, and counts as if it were not there.
    stage.annotate("off");
    let said = stage.scenario.wait_logged(0, &["default/a", ANNOTATION, "\"off\"", "\"enabled\"", "\"disabled\""]);
    said.expect("the agent names the pod and what may be written");
    stage.wait_translated(2);
    assert_eq!(ask(Family::V4), (0, 0));
    for flow in [&mut before, inside] {
        ping_all(std::slice::from_mut(flow), ANSWERED_WITHIN).check("a connection over all of it").expect("lives");
    }
}

#[test]
fn affinity_is_by_the_pod_and_the_same_by_packets() {
    let stage = Stage::build();
    stage.wait_translated(2);
    for host in 33..37 {
        stage.serve(&service(&format!("sticky{host}"), host).affinity(600), &["b", "c", "d"]);
    }
    for (family, host) in Family::BOTH.into_iter().flat_map(|family| (33..37).map(move |host| (family, host))) {
        for (cgroup, pod) in [(&stage.a, "a"), (&stage.c, "c")] {
            let target = through(family, host);
            let ask = || tcp_exchange(&stage.netns(pod), target, 10, 10).expect("TCP").server_name;
            let mut servers = BTreeSet::new();
            for _ in 0..4 {
                servers.insert(cgroup.run(ask).expect("in the cgroup"));
                servers.insert(ask());
            }
            assert_eq!(servers.len(), 1, "{pod} {target}: {servers:?}");
        }
    }
}

#[test]
fn policy_judges_what_a_socket_was_led_to() {
    let stage = Stage::build();
    let label = |pod: &str| {
        let object = PodObject::of(&stage.scenario.cluster().pod(pod).expect("a pod")).label("pod", pod);
        stage.scenario.manifests().write(&object).expect("written");
    };
    ["a", "b", "c", "d"].into_iter().for_each(label);
    for (host, behind) in [(31, "b"), (32, "d"), (33, "c")] {
        stage.publish(&format!("to-{behind}"), host, &[behind]);
    }
    stage.wait_translated(2);
    let peer = |pod: &str| json!({ "podSelector": { "matchLabels": { "pod": pod } } });
    let policies = [
        // a may talk to b and c; b lets a in, c lets nobody in.
        network_policy(
            "default",
            "egress",
            &json!({ "podSelector": { "matchLabels": { "pod": "a" } },
            "policyTypes": ["Egress"], "egress": [{ "to": [peer("b"), peer("c")] }] }),
        ),
        network_policy(
            "default",
            "ingress-b",
            &json!({ "podSelector": { "matchLabels": { "pod": "b" } },
            "policyTypes": ["Ingress"], "ingress": [{ "from": [peer("a")] }] }),
        ),
        network_policy(
            "default",
            "ingress-c",
            &json!({ "podSelector": { "matchLabels": { "pod": "c" } },
            "policyTypes": ["Ingress"] }),
        ),
    ];
    stage.scenario.manifests().write_all("policies.yaml", &policies).expect("written");
    let ask = |cgroup: &PodCgroup, pod: &str, host, family, patience| {
        let netns = stage.netns(pod);
        cgroup.run(|| probe(&netns, through(family, host), Transport::Tcp, patience)).expect("in it").expect("asked")
    };
    let cut = || ask(&stage.a, "a", 32, Family::V4, SILENCE) == Answer::Silent;
    Deadline::secs(20).until("the policy is in force", cut).expect("it is");
    let before = stage.scenario.counters(0).expect("counters");
    for family in Family::BOTH {
        let own = |pod| stage.scenario.ip(pod, family).expect("a pod");
        let from = |server: &str, pod| Answer::From { server: server.to_owned(), seen: own(pod) };
        assert_eq!(ask(&stage.a, "a", 31, family, ANSWERED_WITHIN), from("b", "a"), "allowed on both sides");
        assert_eq!(ask(&stage.a, "a", 32, family, SILENCE), Answer::Silent, "a's egress");
        assert_eq!(ask(&stage.a, "a", 33, family, SILENCE), Answer::Silent, "c's ingress");
        assert_eq!(ask(&stage.c, "c", 31, family, SILENCE), Answer::Silent, "b's ingress, by c's own address");
        assert_eq!(ask(&stage.c, "c", 32, family, ANSWERED_WITHIN), from("d", "c"), "nobody forbids it");
    }
    let added = stage.scenario.counters(0).expect("counters").since(&before);
    assert!(added.get("from_pod", "policy_egress") >= 2, "{added}");
    assert!(added.get("to_pod", "policy_ingress") >= 4, "{added}");
    assert_eq!(added.get("from_pod", "service_new"), 0, "{added}");
}

#[test]
fn what_only_packets_can_do_is_left_to_them() {
    let stage = Stage::build();
    stage.publish("itself", 31, &["a"]);
    let masqueraded = service("masqueraded", 32).node_port(NODE_PORT);
    stage.serve(&masqueraded, &["b"]);
    stage.serve(&service("kept", 33).node_port(NODE_PORT + 1).external_local(), &["b"]);
    let balancer: [IpAddr; 2] = ["203.0.113.34", "2001:db8:113::34"].map(|ip| ip.parse().expect("an address"));
    let ranges = service("elsewhere", 34).load_balancer(&balancer);
    stage.serve(&ranges.with("loadBalancerSourceRanges", json!(["192.0.2.0/24", "2001:db8:2::/64"])), &["b"]);
    stage.wait_translated(2);
    let node = stage.scenario.node(0);
    for (family, balancer) in Family::BOTH.into_iter().zip(balancer) {
        let ask = |target| {
            let netns = stage.netns("a");
            let asked = Transport::BOTH.map(|transport| {
                stage
                    .a
                    .run(|| probe(&netns, target, transport, ANSWERED_WITHIN))
                    .expect("in the cgroup")
                    .expect("asked")
            });
            let [tcp, udp] = asked;
            assert_eq!(tcp, udp, "{target}");
            tcp
        };
        let seen = |target| match ask(target) {
            Answer::From { seen, .. } => seen,
            other => panic!("{target}: {other}"),
        };
        let own = stage.scenario.ip("a", family).expect("a pod");
        // A pod that is its own backend sees the bridge's address, by datagrams without connect too.
        assert_eq!(seen(through(family, 31)), node.bridge_ip(family));
        let udp = stage.a.run(|| udp_exchange(&stage.netns("a"), through(family, 31), &UdpOptions::default()));
        assert_eq!(udp.expect("in the cgroup").expect("UDP").peer_seen_by_server.ip(), node.bridge_ip(family));
        // A frontend that masquerades, and one that does not.
        let by = |port| SocketAddr::new(node.ip(family), port);
        assert_ne!(seen(by(NODE_PORT)), own, "kube-proxy masquerades here");
        assert_eq!(seen(by(NODE_PORT + 1)), own);
        // The loopback address is the pod's own, and so is no address.
        let (local, any): (IpAddr, IpAddr) = match family {
            Family::V4 => ([127, 0, 0, 1].into(), [0, 0, 0, 0].into()),
            Family::V6 => ("::1".parse().expect("an address"), "::".parse().expect("an address")),
        };
        for ip in [local, any] {
            assert_eq!(ask(SocketAddr::new(ip, NODE_PORT)), Answer::Refused, "{ip}");
        }
        let server = TcpServer::start(&stage.netns("a"), "own", NODE_PORT).expect("a server in the pod");
        for ip in [local, any] {
            let target = SocketAddr::new(ip, NODE_PORT);
            let asked = stage.a.run(|| probe(&stage.netns("a"), target, Transport::Tcp, ANSWERED_WITHIN));
            let Answer::From { server, .. } = asked.expect("in the cgroup").expect("asked") else { panic!("{ip}") };
            assert_eq!(server, "own", "{ip}");
        }
        drop(server);
        // A source that the Service does not let in is dropped, not told.
        let target = SocketAddr::new(balancer, SERVICE_PORT);
        let asked = stage.a.run(|| probe(&stage.netns("a"), target, Transport::Tcp, SILENCE));
        assert_eq!(asked.expect("in the cgroup").expect("asked"), Answer::Silent);
    }
    let counters = stage.scenario.counters(0).expect("counters");
    assert!(counters.get("connect", "packet_path") > 0 && counters.get("sendmsg", "packet_path") > 0, "{counters}");
}

#[test]
fn who_asks_for_nothing_hears_so_from_the_call_itself() {
    let stage = Stage::build();
    stage.publish("void", 31, &[]);
    stage.publish("near", 32, &["b"]);
    stage.wait_translated(2);
    for family in Family::BOTH {
        for target in [through(family, 31), SocketAddr::new(vip(family, 32), 81)] {
            let calls = || {
                let tcp = TcpStream::connect_timeout(&target, ANSWERED_WITHIN).map(drop).map_err(|error| error.kind());
                let socket = udp_client(target, 0, ANSWERED_WITHIN).expect("a socket");
                (tcp, socket.send_to(b"anybody?", target).map(drop).map_err(|error| error.kind()))
            };
            let before = stage.scenario.counters(0).expect("counters");
            let said = stage.a.run(|| stage.netns("a").run(calls)).expect("in the cgroup").expect("in the namespace");
            assert_eq!(said, (Err(ErrorKind::ConnectionRefused), Err(ErrorKind::ConnectionRefused)), "{target}");
            let added = stage.scenario.counters(0).expect("counters").since(&before);
            let refused =
                ["connect", "sendmsg"].map(|hook| added.get(hook, "no_backend") + added.get(hook, "no_such_port"));
            assert_eq!(refused, [1, 1], "{target}: {added}");
        }
    }
}

/// One datagram to a Service and who answered it.
fn ask_by(socket: &UdpSocket, target: SocketAddr) -> std::io::Result<String> {
    let request = fastrand::u128(..).to_ne_bytes().repeat(4);
    let mut answer = [0; 2048];
    socket.send_to(&request, target)?;
    loop {
        let (length, from) = socket.recv_from(&mut answer)?;
        let (reply, _, _) = UdpReply::read(&answer[..length]).expect("a reply");
        if reply.tag == UdpReply::tag(&request) {
            assert_eq!(from, target, "who the answer is from");
            return Ok(reply.server);
        }
    }
}

#[test]
fn a_socket_moves_with_its_endpoints_and_keeps_its_services_apart() {
    let stage = Stage::build();
    let moving = stage.publish("moving", 31, &["b"]);
    stage.publish("twin", 32, &["b"]);
    stage.publish("spread", 33, &["b", "c", "d"]);
    stage.wait_translated(2);
    for family in Family::BOTH {
        stage.scenario.set_endpoints(&moving, &["b"]).expect("written");
        let target = through(family, 31);
        let socket =
            stage.netns("a").run(|| udp_client(target, 0, ANSWERED_WITHIN)).expect("namespace").expect("socket");
        let ask = |host| stage.a.run(|| ask_by(&socket, through(family, host)).unwrap_or_default()).expect("in it");
        Deadline::secs(60).until("b answers", || ask(31) == "b").expect("it does");
        // Another Service over the same backend, by the same socket: both are shown as themselves.
        for _ in 0..3 {
            assert_eq!((ask(32), ask(31)), ("b".to_owned(), "b".to_owned()));
        }
        // One socket keeps its backend.
        let first = ask(33);
        assert!((0..8).all(|_| ask(33) == first), "{family:?}");
        let mut live =
            stage.a.run(|| Flow::open(&stage.netns("a"), target, 0, ANSWERED_WITHIN)).expect("in it").expect("TCP");
        stage.scenario.set_endpoints(&moving, &["c"]).expect("written");
        Deadline::secs(60).until("c answers", || ask(31) == "c").expect("it does");
        assert_eq!(ask(31), "c");
        ping_all(std::slice::from_mut(&mut live), ANSWERED_WITHIN).check("TCP stays").expect("lives");
        assert_eq!(live.server_name(), "b");
    }
}

#[test]
fn a_pod_behind_an_isolated_port_is_served_by_packets() {
    let pods = [PodSpec::new("a").isolated(true), PodSpec::new("b"), PodSpec::new("c")];
    let stage = Stage::of(&ClusterSpec::default().node(NodeSpec::new("node1").pods(pods)));
    stage.publish("near", 31, &["b"]);
    stage.publish("isolated", 32, &["a"]);
    stage.wait_translated(1);
    for family in Family::BOTH {
        let rows = stage.a.run(|| exchange(&stage, "a", through(family, 31), "b")).expect("in the cgroup");
        assert!(rows.0 > 0 && rows.1 > 0, "from an isolated port: {rows:?}");
        let rows = stage.c.run(|| exchange(&stage, "c", through(family, 32), "a")).expect("in the cgroup");
        assert!(rows.0 > 0 && rows.1 > 0, "to an isolated port: {rows:?}");
        let rows = stage.c.run(|| exchange(&stage, "c", through(family, 31), "b")).expect("in the cgroup");
        assert_eq!(rows, (0, 0), "between others");
    }
}

#[test]
fn it_outlives_the_agent_and_ends_with_the_flag() {
    let mut stage = Stage::build();
    stage.publish("near", 31, &["b"]);
    stage.wait_translated(2);
    let target = through(Family::V4, 31);
    let socket = stage.netns("a").run(|| udp_client(target, 0, ANSWERED_WITHIN)).expect("namespace").expect("socket");
    let ask = |stage: &Stage| stage.a.run(|| ask_by(&socket, target)).expect("in it").expect("answered");
    let mut live =
        stage.a.run(|| Flow::open(&stage.netns("a"), target, 0, ANSWERED_WITHIN)).expect("in it").expect("TCP");
    stage.scenario.agent_mut(0).kill9().expect("killed");
    assert_eq!(ask(&stage), "b");
    assert_eq!(stage.a.run(|| exchange(&stage, "a", target, "b")).expect("in it"), (0, 0), "while the agent is away");
    stage.scenario.agent_mut(0).restart().expect("healthy");
    assert_eq!(ask(&stage), "b");
    stage.wait_translated(2);
    assert_eq!(stage.a.run(|| exchange(&stage, "a", target, "b")).expect("in it"), (0, 0), "after it");

    let options = stage.scenario.agent_mut(0).options_mut();
    options.args.retain(|arg| !ALL.contains(&arg.as_str()));
    stage.scenario.agent_mut(0).restart().expect("healthy");
    stage.wait_translated(0);
    let rows = stage.a.run(|| exchange(&stage, "a", target, "b")).expect("in it");
    assert!(rows.0 > 0 && rows.1 > 0, "without the flag: {rows:?}");
    assert_eq!(ask(&stage), "b");
    ping_all(std::slice::from_mut(&mut live), ANSWERED_WITHIN).check("TCP stays").expect("lives");
    let status = stage.scenario.status(0).expect("status");
    let sockets = status.maps.iter().find(|row| row.map == "pod_socket").map(|row| (row.used, row.capacity));
    assert_eq!(sockets, Some((0, 64)), "made anew, as small as can be");

    let node = stage.scenario.node(0);
    let options = AgentOptions::dir(stage.scenario.manifests().dir()).args([ALL[0], ALL[1], "--cgroup", "none"]);
    let refused = agent::run_refused(node, &[], &node.pin_root().with_extension("none"), &options).expect("ran");
    assert!(refused.said.contains("--socket-lb all and --cgroup none exclude each other"), "{}", refused.said);
}

#[test]
fn a_trace_by_the_name_of_the_service_finds_the_decision_of_the_socket() {
    let stage = Stage::build();
    stage.publish("near", 31, &["b"]);
    stage.wait_translated(2);
    for family in Family::BOTH {
        let tracer = Tracer::start(stage.scenario.node(0), &TRACE).expect("a trace");
        let rows = stage.a.run(|| exchange(&stage, "a", through(family, 31), "b")).expect("in the cgroup");
        assert_eq!(rows, (0, 0));
        let traced = tracer.finish(Duration::from_secs(20)).expect("the end");
        let packets = traced.packets();
        let decisions = packets.iter().flat_map(|packet| packet.steps(str::to_owned));
        let decisions: Vec<_> = decisions.filter(|step| step.ends_with(" pass")).take(1).collect();
        assert_eq!(decisions, ["connect pod socket pass"], "{family:?}: {} {}", traced.err, traced.out);
    }
}

#[test]
fn a_cgroup_may_come_late_and_that_there_is_none_is_said() {
    let mut scenario = Scenario::build(&ClusterSpec::default().node(NodeSpec::new("node1").pods(["a", "b"])));
    let scenario = scenario.as_mut().expect("scenario");
    let a = scenario.cluster().pod("a").expect("a pod");
    scenario.manifests().write(&PodObject::of(&a)).expect("written");
    scenario.start_agents(&ALL).expect("agents");
    let said = scenario.wait_logged(0, &["WARN", "Sockets of pods", "no pod's cgroup is found below"]);
    said.expect("the agent says so");
    let translated = |scenario: &Scenario| scenario.agent(0).cli(&["status"]).expect("status");
    assert!(translated(scenario).contains("sockets of the node, and of 0 pods"), "{}", translated(scenario));
    let cgroup = PodCgroup::make(&a, Driver::Systemd).expect("a cgroup");
    let known = || translated(scenario).contains("sockets of the node, and of 1 pods");
    Deadline::secs(90).until("its cgroup is found", known).expect("it is");
    scenario.wait_logged(0, &["no more", "no pod's cgroup is found below"]).expect("and that");
    // The pod goes, and its row with it.
    let object = PodObject::of(&a);
    scenario.manifests().remove(&object).expect("removed");
    let gone = || translated(scenario).contains("of 0 pods");
    Deadline::secs(15).until("it is forgotten", gone).expect("it is");
    drop(cgroup);
}
