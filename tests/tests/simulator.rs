//! The simulator itself: without any proxy, everything that must work works, and nothing is left behind.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use proxy_tests::lease::{self, BPFFS};
use proxy_tests::netfilter::{INVALID_DROP, MASQUERADE4, MASQUERADE6, Rule};
use proxy_tests::packet::named::VIP_ONE;
use proxy_tests::packet::{Arp, Body, Checksums, Frame, L4, L4Sum, Mac, verify_checksums};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::traffic::flow::ping_all;
use proxy_tests::traffic::{
    ANSWERED_WITHIN, BusyFlows, Closer, Flow, Serving, Steady, SteadyOptions, TcpServer, UdpOptions, UdpServer,
    busy_during, connect_rate, tcp_bulk, tcp_exchange, tcp_rr, udp_exchange, udp_rr,
};
use proxy_tests::{
    Agent, AgentOptions, Cluster, ClusterSpec, Deadline, Error, Family, Links, Netns, NodeSpec, PodSpec,
};

const PORT: u16 = 8080;
const MIB: u64 = 1 << 20;

/// Two nodes with three pods each.
fn two_nodes(links: Links, setting: Setting) -> ClusterSpec {
    let node = |name: &str, pods: [&str; 3]| {
        let Setting { br_netfilter, rp_filter, hostile } = setting;
        NodeSpec::new(name).br_netfilter(br_netfilter).rp_filter(rp_filter).hostile(hostile).pods(pods)
    };
    Cluster::builder().links(links).node(node("node1", ["a", "b", "c"])).node(node("node2", ["d", "e", "f"]))
}

#[derive(Clone, Copy, Debug)]
struct Setting {
    br_netfilter: bool,
    rp_filter: bool,
    hostile: bool,
}

const SETTINGS: [Setting; 4] = [
    Setting { br_netfilter: false, rp_filter: false, hostile: false },
    Setting { br_netfilter: true, rp_filter: false, hostile: false },
    Setting { br_netfilter: false, rp_filter: true, hostile: true },
    Setting { br_netfilter: true, rp_filter: true, hostile: true },
];

/// Who asks whom, with the address that the server must see.
struct Path2<'a> {
    name: &'static str,
    client: &'a Netns,
    server: &'a Netns,
    target: IpAddr,
    seen: IpAddr,
}

/// TCP with 1 MiB each way and UDP of three sizes, with and without connect.
fn check_traffic(path: &Path2<'_>) -> Result<(), Error> {
    let target = SocketAddr::new(path.target, PORT);
    let tcp_server = TcpServer::start(path.server, path.name, PORT)?;
    let udp_server = UdpServer::start(path.server, path.name, PORT)?;
    let report = tcp_exchange(path.client, target, MIB, MIB)?;
    assert_eq!(
        (report.server_name.as_str(), report.peer_seen_by_server.ip(), report.peer, report.up, report.down),
        (path.name, path.seen, target, MIB, MIB)
    );
    let mut asked = 0;
    for size in [10, 1400, 5000] {
        for connected in [false, true] {
            let options = UdpOptions { size, connected, ..UdpOptions::default() };
            let report = udp_exchange(path.client, target, &options)?;
            assert_eq!(
                (report.server_name.as_str(), report.peer_seen_by_server.ip(), report.reply_from, report.size),
                (path.name, path.seen, target, size)
            );
            asked += 1;
        }
    }
    assert_eq!((tcp_server.accepted(), udp_server.answered()), (1, asked));
    Ok(())
}

fn check_cluster(links: Links, setting: Setting) {
    let cluster = two_nodes(links, setting).build().expect("cluster");
    let [a, b, d] = ["a", "b", "d"].map(|name| cluster.pod(name).expect("pod"));
    let node1 = cluster.node("node1").expect("node");
    for family in Family::BOTH {
        let outside = cluster.outside_ip(family);
        // Behind the CNI's masquerade rule a pod has its node's address for everything that is no pod.
        let seen_outside = if setting.hostile { node1.ip(family) } else { a.ip(family) };
        let path = |name, client, server, target, seen| Path2 { name, client, server, target, seen };
        let paths = [
            path("same node", a.netns(), b.netns(), b.ip(family), a.ip(family)),
            path("other node", a.netns(), d.netns(), d.ip(family), a.ip(family)),
            path("itself", a.netns(), a.netns(), a.ip(family), a.ip(family)),
            path("node to pod", node1.netns(), a.netns(), a.ip(family), node1.bridge_ip(family)),
            path("outside to pod", cluster.outside(), a.netns(), a.ip(family), outside),
            path("pod to outside", a.netns(), cluster.outside(), outside, seen_outside),
        ];
        for path in paths {
            check_traffic(&path)
                .unwrap_or_else(|error| panic!("{links:?} {setting:?} {family} {}: {error}", path.name));
        }
    }
}

#[test]
fn routed_cluster_carries_traffic() {
    for setting in SETTINGS {
        check_cluster(Links::Routed, setting);
    }
}

#[test]
fn vxlan_cluster_carries_traffic() {
    for setting in SETTINGS {
        check_cluster(Links::Vxlan, setting);
    }
}

#[test]
fn settings_are_those_of_the_description() {
    for (links, mtu) in [(Links::Routed, "1500"), (Links::Vxlan, "1450")] {
        let setting = Setting { br_netfilter: true, rp_filter: true, hostile: false };
        let cluster = two_nodes(links, setting).build().expect("cluster");
        let node = cluster.node("node2").expect("node");
        let d = cluster.pod("d").expect("pod");
        let veth = &d.host_veth().name;
        let filters = ["all", "default", "eth0", "cni0", veth]
            .map(|device| node.netns().read_sysctl(&format!("net/ipv4/conf/{device}/rp_filter")).expect("sysctl"));
        assert_eq!(filters, ["1"; 5]);
        let call = |family| node.netns().read_sysctl(&format!("net/bridge/bridge-nf-call-{family}")).expect("sysctl");
        assert_eq!(["iptables", "ip6tables"].map(call), ["1", "1"]);
        node.set_br_netfilter(false).expect("switched");
        assert_eq!(["iptables", "ip6tables"].map(call), ["0", "0"]);
        let shown = d.netns().output("ip", &["-o", "link", "show", "eth0"]).expect("ip link");
        assert!(shown.contains(&format!(" mtu {mtu} ")) && shown.contains(&d.mac().to_string()), "{shown}");
        for family in Family::BOTH {
            let service = proxy_tests::address::service_cidr(family).host(10).to_string();
            let route = node.run("ip", &["route", "get", &service]).expect("a route to every ClusterIP");
            assert!(route.contains("via") && route.contains("dev eth0"), "by the default route only: {route}");
        }
        assert_eq!(node.netfilter_rules().expect("listing"), []);
    }
}

#[test]
fn hostile_rules_are_listed_and_count() {
    let setting = Setting { br_netfilter: false, rp_filter: false, hostile: true };
    let cluster = two_nodes(Links::Routed, setting).build().expect("cluster");
    let node = cluster.node("node1").expect("node");
    let rule = |table: &str, chain: &str, text: &str| Rule {
        table: table.to_owned(),
        chain: chain.to_owned(),
        text: text.to_owned(),
        packets: Some(0),
    };
    let mut rules = node.netfilter_rules().expect("listing");
    for rule in &mut rules {
        rule.packets = rule.packets.map(|_| 0);
    }
    assert_eq!(
        rules,
        [
            rule("ip hostile", "forward", INVALID_DROP),
            rule("ip hostile", "postrouting", MASQUERADE4),
            rule("ip6 hostile", "forward", INVALID_DROP),
            rule("ip6 hostile", "postrouting", MASQUERADE6),
        ]
    );
    let a = cluster.pod("a").expect("pod");
    let before = [MASQUERADE4, MASQUERADE6].map(|rule| node.netfilter_packets(rule).expect("listing"));
    let server = UdpServer::start(cluster.outside(), "outside", PORT).expect("server");
    for family in Family::BOTH {
        let target = SocketAddr::new(cluster.outside_ip(family), PORT);
        udp_exchange(a.netns(), target, &UdpOptions::default()).expect("masqueraded");
    }
    let after = [MASQUERADE4, MASQUERADE6].map(|rule| node.netfilter_packets(rule).expect("listing"));
    assert_eq!(after, before.map(|packets| packets + 1), "one new flow each");
    assert_eq!(server.answered(), 2);

    // A segment in the middle of a connection that nobody opened is invalid... to a strict conntrack only.
    node.netns().sysctl(&[("net/netfilter/nf_conntrack_tcp_loose", "0")]).expect("sysctl");
    let frame = Frame::ip(
        (a.mac(), a.ip4()),
        (node.bridge_mac(), cluster.outside_ip(Family::V4)),
        L4::Tcp(proxy_tests::packet::Tcp {
            src: 1,
            dst: 2,
            seq: 3,
            ack: 4,
            flags: 16,
            window: 5,
            ..Default::default()
        }),
    );
    let dropped = node.netfilter_packets(INVALID_DROP).expect("listing");
    RawSocket::open(a.netns(), "eth0").expect("socket").send(&frame.build()).expect("sent");
    let counted = || node.netfilter_packets(INVALID_DROP).is_ok_and(|packets| packets == dropped + 1);
    Deadline::secs(30).until("the invalid segment is counted", counted).expect("dropped");

    // Last: it would run before the others.
    let legacy = ["-A", "FORWARD", "-m", "conntrack", "--ctstate", "INVALID", "-j", "DROP"];
    node.run("iptables-legacy", &legacy).expect("legacy rule");
    let rules = node.netfilter_rules().expect("listing");
    assert_eq!(
        (rules.len(), &rules[4].table, &rules[4].text),
        (5, &"iptables-legacy".to_owned(), &"-m conntrack --ctstate INVALID -j DROP".to_owned())
    );
}

#[test]
fn pods_come_and_go() {
    let cluster = Cluster::builder().node(NodeSpec::new("node1").pods(["a"])).build().expect("cluster");
    let node = cluster.node("node1").expect("node");
    let a = cluster.pod("a").expect("pod");
    let b = cluster.add_pod("node1", PodSpec::new("b").namespace("shop").isolated(true)).expect("pod");
    assert_eq!([a.ip4(), b.ip4()].map(|ip| ip.to_string()), ["10.244.0.2", "10.244.0.3"]);
    assert!(matches!(cluster.add_pod("node1", "b"), Err(Error::Name(_))), "the name is taken");
    assert!(matches!(cluster.add_pod("node1", PodSpec::new("x").host(2)), Err(Error::Name(_))), "a has it");
    assert!(matches!(cluster.add_pod("node9", "x"), Err(Error::Name(_))), "no such node");

    let link = node.run("ip", &["-d", "-o", "link", "show", "dev", &b.host_veth().name]).expect("its host end");
    assert!(link.starts_with(&format!("{}: {}@", b.host_veth().ifindex, b.host_veth().name)), "{link}");
    assert!(link.contains("isolated on") && link.contains("hairpin off"), "{link}");
    b.set_isolated(false).expect("switched");
    b.set_hairpin(true).expect("switched");
    let link = node.run("ip", &["-d", "-o", "link", "show", "dev", &b.host_veth().name]).expect("its host end");
    assert!(link.contains("isolated off") && link.contains("hairpin on"), "{link}");

    let record = fs::read_to_string(b.cni_result()).expect("CNI result");
    let record: serde_json::Value = serde_json::from_str(&record).expect("JSON");
    let field = |pointer: &str| record.pointer(pointer).and_then(serde_json::Value::as_str).map(str::to_owned);
    assert_eq!(field("/kind").as_deref(), Some("cniCacheV1"));
    assert_eq!(field("/cniArgs/1/1").as_deref(), Some("shop"));
    assert_eq!(field("/cniArgs/4/1").as_deref(), Some(b.uid()));
    assert_eq!(field("/result/interfaces/1/name").as_ref(), Some(&b.host_veth().name));
    assert_eq!(field("/result/ips/1/address"), Some(format!("{}/64", b.ip6())));

    let second = "10.244.0.77".parse().expect("address");
    b.add_address(second).expect("added");
    let server = UdpServer::start_on(b.netns(), "second", SocketAddr::new(second, PORT)).expect("server");
    let report = udp_exchange(a.netns(), server.address(), &UdpOptions::default()).expect("at its second address");
    assert_eq!(report.server_name, "second");
    b.remove_address(second).expect("removed");

    let veth = b.host_veth().name.clone();
    let (path, record) = (b.netns().path().to_owned(), b.cni_result().to_owned());
    node.remove_pod("b").expect("removed");
    assert_eq!([path.exists(), record.exists()], [false, false]);
    node.run("ip", &["link", "show", "dev", &veth]).expect_err("its host end is gone");
    let again = cluster.add_pod("node1", PodSpec::new("b2").host(3)).expect("the address is free again");
    assert_eq!(again.ip4(), b.ip4());
    assert_ne!(again.uid(), b.uid());
}

#[test]
fn long_flows_and_steady_streams_report_what_happened() {
    let cluster = Cluster::builder().node(NodeSpec::new("node1").pods(["a", "b"])).build().expect("cluster");
    let [a, b] = ["a", "b"].map(|name| cluster.pod(name).expect("pod"));
    let server = TcpServer::start(b.netns(), "b", PORT).expect("server");
    let target = SocketAddr::new(b.ip6(), PORT);
    let mut idle: Vec<_> = (0..4).map(|_| Flow::open(a.netns(), target, 0, ANSWERED_WITHIN).expect("flow")).collect();
    let fixed = Flow::open(a.netns(), target, 40_000, ANSWERED_WITHIN).expect("flow");
    let address = SocketAddr::new(a.ip6(), 40_000);
    assert_eq!(
        (fixed.server_name(), fixed.local(), fixed.peer_seen_by_server(), fixed.peer()),
        ("b", address, address, target)
    );
    let busy = BusyFlows::start(a.netns(), target, 3, Duration::from_millis(1), ANSWERED_WITHIN).expect("flows");
    assert_eq!(server.open(), 8);

    let udp_target = SocketAddr::new(b.ip4(), PORT);
    let udp_server = UdpServer::start(b.netns(), "before", PORT).expect("server");
    let options = SteadyOptions { rate: 2000, ..SteadyOptions::default() };
    let steady = Steady::start(a.netns(), udp_target, options).expect("sender");
    Deadline::secs(30).until("200 answers", || udp_server.answered() >= 200).expect("answers");
    drop(udp_server);
    let changed = steady.started().elapsed();
    let udp_server = UdpServer::start(b.netns(), "after", PORT).expect("server");
    Deadline::secs(30).until("200 more", || udp_server.answered() >= 200).expect("answers");
    let report = steady.stop_unanswered();
    assert_eq!(report.servers, ["before", "after"]);
    assert!(report.last_answered_by("before").expect("it did") <= changed);
    assert!(report.first_answered_by("after", Duration::ZERO).expect("it did") >= report.samples[200].sent);
    assert_eq!(report.answered() + report.lost(), report.sent());
    assert_eq!((report.duplicates, report.strangers, report.damaged), (0, 0, 0));

    let whole = ping_all(&mut idle, ANSWERED_WITHIN).check("idle flows").expect("whole");
    assert_eq!((whole.flows, whole.sent), (4, 4));
    let busy = busy.stop().check("busy flows").expect("whole");
    assert!(busy.flows == 3 && busy.echoed > 3, "{busy:?}");

    drop(server);
    let ended = ping_all(&mut idle, ANSWERED_WITHIN);
    assert_eq!((ended.echoed, ended.reset + ended.broken), (0, 4), "the server is gone: {ended:?}");
    let refused = Flow::open(a.netns(), target, 0, ANSWERED_WITHIN).expect_err("nobody listens");
    assert!(matches!(refused, Error::Io { source, .. } if source.kind() == std::io::ErrorKind::ConnectionRefused));
}

#[test]
fn rates_are_measured() {
    let cluster = Cluster::builder().node(NodeSpec::new("node1").pods(["a", "b"])).build().expect("cluster");
    let [a, b] = ["a", "b"].map(|name| cluster.pod(name).expect("pod"));
    let any = SocketAddr::from(([0_u16; 8], PORT));
    let short = TcpServer::start_on(b.netns(), "short", any, Serving::Inline(4)).expect("server");
    let long = TcpServer::start(b.netns(), "long", PORT + 1).expect("server");
    let udp = UdpServer::start(b.netns(), "udp", PORT).expect("server");
    let time = Duration::from_millis(300);
    let at = |port| SocketAddr::new(b.ip4(), port);

    let (report, cpu) = busy_during(|| connect_rate(a.netns(), at(PORT), 4, time, Closer::Client)).expect("cpu time");
    let connections = report.expect("connections");
    assert_eq!((connections.operations, connections.errors), (short.accepted(), 0), "{connections}");
    assert!(cpu.wall >= time && cpu.busy() > Duration::ZERO, "{cpu:?}");
    let tcp = tcp_rr(a.netns(), at(PORT + 1), 2, time).expect("round trips");
    let datagrams = udp_rr(a.netns(), at(PORT), 1, 64, time).expect("round trips");
    assert_eq!((tcp.errors, datagrams.errors, datagrams.operations), (0, 0, udp.answered()));
    for report in [&connections, &tcp, &datagrams] {
        assert!(report.p50() > Duration::ZERO && report.p50() <= report.p99() && report.duration >= time, "{report}");
        assert_eq!(report.latency.len(), report.operations);
    }
    let bulk = tcp_bulk(a.netns(), at(PORT + 1), 2, time).expect("bytes");
    assert!(bulk.bytes > MIB && bulk.duration >= time, "{bulk:?}");
    assert_eq!(long.accepted(), 4);
    tcp_rr(a.netns(), at(PORT + 2), 1, time).expect_err("nobody listens");
}

#[test]
fn raw_frames_cross_the_bridge_unchanged() {
    let cluster = Cluster::builder().node(NodeSpec::new("node1").pods(["a", "b"])).build().expect("cluster");
    let [a, b] = ["a", "b"].map(|name| cluster.pod(name).expect("pod"));
    let [from, to] = [&a, &b].map(|pod| RawSocket::open(pod.netns(), "eth0").expect("socket"));

    let body = Body::Other { ether_type: 0x88b5, bytes: (0..100).collect() };
    let unknown = Frame { dst: b.mac(), src: a.mac(), vlans: Vec::new(), body };
    let (IpAddr::V4(sender_ip), IpAddr::V4(target_ip)) = (a.ip4(), b.ip4()) else { unreachable!("IPv4") };
    let arp = Arp { operation: 1, sender_mac: a.mac(), sender_ip, target_mac: Mac::default(), target_ip };
    let arp = Frame { dst: Mac::BROADCAST, body: Body::Arp(arp), ..unknown.clone() };
    for frame in [unknown, arp] {
        from.send(&frame.build()).expect("sent");
        let got = to.receive(ANSWERED_WITHIN, |got| got.starts_with(&frame.build()[..14])).expect("received");
        assert_eq!(Frame::parse(&got).as_ref(), Ok(&frame));
    }
    let reply = from.receive(ANSWERED_WITHIN, |got| Frame::parse(got).is_ok_and(|f| matches!(f.body, Body::Arp(_))));
    let reply = Frame::parse(&reply.expect("the other pod's stack answers")).expect("ARP");
    assert!(matches!(reply.body, Body::Arp(arp) if arp.sender_mac == b.mac() && arp.operation == 2));

    // Nothing answers for a ClusterIP here: the frame goes to the node and no further.
    let vip = Frame::ip(
        (a.mac(), a.ip4()),
        (cluster.nodes()[0].bridge_mac(), VIP_ONE.ip(Family::V4)),
        L4::Udp(proxy_tests::packet::Udp { src: 1000, dst: 53, checksum: true, payload: vec![1, 2, 3] }),
    );
    let right = Checksums { ipv4_header: true, l4: L4Sum::Right };
    assert_eq!(verify_checksums(&vip.build()), Ok(right));
    let uplink = RawSocket::open(cluster.underlay().switch(), "node1").expect("socket");
    from.send(&vip.build()).expect("sent");
    let to_vip =
        |got: &[u8]| Frame::parse(got).is_ok_and(|got| got.as_ip().is_some_and(|ip| ip.dst == VIP_ONE.ip(Family::V4)));
    let routed = uplink.receive(ANSWERED_WITHIN, to_vip).expect("routed by the node");
    assert_eq!(verify_checksums(&routed), Ok(right));
    let routed = Frame::parse(&routed).expect("whole");
    assert_eq!(routed.as_ip().map(|ip| (ip.dst, ip.ttl)), Some((VIP_ONE.ip(Family::V4), 63)));
    let none = to.collect(Duration::from_millis(50), to_vip, |got| !got.is_empty());
    assert_eq!(none.expect("socket works"), Vec::<Vec<u8>>::new());
}

/// Names in a directory that belong to a cluster.
fn names(dir: &str, prefix: &str) -> BTreeSet<String> {
    let entries =
        fs::read_dir(dir).into_iter().flatten().filter_map(|entry| entry.ok()?.file_name().into_string().ok());
    entries.filter(|name| name.starts_with(prefix)).collect()
}

#[test]
fn nothing_is_left_behind() {
    let start = Instant::now();
    let setting = Setting { br_netfilter: true, rp_filter: false, hostile: true };
    let cluster = two_nodes(Links::Vxlan, setting).build().expect("cluster");
    eprintln!("two nodes and six pods took {:?}", start.elapsed());
    let prefix = cluster.prefix().to_owned();
    let listed = std::process::Command::new("ip").args(["netns", "list"]).output().expect("ip netns");
    let listed = String::from_utf8_lossy(&listed.stdout).lines().filter(|line| line.starts_with(&prefix)).count();
    assert_eq!((listed, names(lease::ROOT, &prefix).len()), (10, 1), "6 pods, 2 nodes, switch, outside");
    let survivor = cluster.pod("a").expect("pod");
    drop(cluster);
    let left = [proxy_tests::netns::DIR, lease::ROOT, BPFFS].map(|dir| names(dir, &prefix));
    assert_eq!(left, [const { BTreeSet::new() }; 3]);
    assert!(survivor.netns().run(|| ()).is_err(), "a handle does not keep the namespace");
}

#[test]
fn leftovers_of_dead_processes_are_swept() {
    // Nobody sweeps while it is being laid out.
    fs::create_dir_all(lease::ROOT).expect("directory");
    let lock = Path::new(lease::ROOT).join("lock");
    let quiet = fs::File::options().create(true).truncate(false).write(true).open(lock).expect("lock");
    quiet.lock().expect("locked");
    // A name that no lease holds: its process is gone.
    let leftover = Netns::create("pt0zzzz-7-node1").expect("namespace");
    let state = Path::new(lease::ROOT).join("pt0zzzz-7");
    fs::create_dir_all(state.join("node1")).expect("state");
    fs::write(state.join("lock"), "").expect("lock");
    // The pid in it is this process's, whose command line has no such pin directory: it must not be killed.
    fs::write(state.join("node1.pid"), std::process::id().to_string()).expect("pid");
    drop(quiet);
    let cluster = Cluster::builder().node(NodeSpec::new("node1")).build().expect("cluster");
    assert_eq!([leftover.path().exists(), state.exists()], [false, false]);
    assert!(cluster.nodes()[0].netns().path().exists(), "what lives stays");
    assert!(!lease::sweep().expect("sweep").contains(&cluster.prefix().to_owned()));
}

/// A program in the agent's place: it notes its arguments, and runs until it is ended.
const STAND_IN: &str = "#!/bin/sh\necho \"$1 in $(readlink /proc/self/ns/net): $*\"\n[ \"$1\" = run ] || exit 0\n\
     [ -z \"$FAIL\" ] || { echo broken >&2; exit 7; }\nexec sleep 60\n";

#[test]
fn an_agent_runs_in_its_node_and_ends_with_its_handle() {
    let cluster = Cluster::builder().node(NodeSpec::new("node1")).build().expect("cluster");
    let node = cluster.node("node1").expect("node");
    let binary = node.state_dir().join("stand-in");
    fs::write(&binary, STAND_IN).expect("script");
    fs::set_permissions(&binary, fs::Permissions::from_mode(0o755)).expect("mode");
    let inside = node.netns().run(|| fs::read_link("/proc/thread-self/ns/net")).expect("entered").expect("link");

    let mut options = AgentOptions { binary: Some(binary), ..AgentOptions::dir(&cluster.manifest_dir()) };
    options.env.push(("FAIL".to_owned(), "1".to_owned()));
    let failed = Agent::start(node, options.clone()).expect_err("it ends at once");
    assert!(failed.to_string().contains("exit status: 7") && failed.to_string().contains("broken"), "{failed}");

    options.env.clear();
    options.ready_within = Duration::from_millis(50);
    let failed = Agent::start(node, options.clone()).expect_err("nobody answers for its health");
    assert!(matches!(failed, Error::Timeout { .. }), "{failed}");

    let listener = node.netns().run(|| TcpListener::bind(options.health)).expect("entered").expect("listener");
    let health = thread::spawn(move || {
        for answer in ["503 Service Unavailable", "200 OK", "200 OK", "200 OK"] {
            let (mut client, _) = listener.accept().expect("client");
            let mut request = [0; 1024];
            let len = client.read(&mut request).expect("request");
            assert!(request[..len].starts_with(b"GET /"), "{:?}", String::from_utf8_lossy(&request[..len]));
            client.write_all(format!("HTTP/1.1 {answer}\r\n\r\nbody").as_bytes()).expect("answered");
        }
    });
    options.ready_within = Duration::from_secs(10);
    let mut agent = Agent::start(node, options.args(["--extra", "x"])).expect("healthy at the second look");
    let (first, pins) = (agent.pid().expect("running"), agent.pin_root().to_owned());
    assert_eq!(agent.get("/metrics").expect("answer"), (200, "body".to_owned()));
    let arguments = format!(
        "run in {}: run --source dir:{} --node-name node1 --pin-root {} --cni-results {} --extra x",
        inside.display(),
        cluster.manifest_dir().display(),
        pins.display(),
        node.cni_results_dir().display()
    );
    // Its health is somebody else's here, so it is answered before the program has said a word.
    let noted = |agent: &Agent, times| {
        let noted = || agent.log_text().lines().filter(|line| *line == arguments).count() == times;
        Deadline::secs(30).until("it notes its arguments", noted).unwrap_or_else(|_| panic!("{}", agent.log_text()));
    };
    noted(&agent, 1);
    agent.restart().expect("healthy again");
    noted(&agent, 2);
    let second = agent.pid().expect("running");
    health.join().expect("four requests");
    let alive = |pid: u32| Path::new(&format!("/proc/{pid}")).exists();
    assert_eq!([alive(first), alive(second)], [false, true]);

    assert_eq!(agent.stop().expect("ended").and_then(|status| status.signal()), Some(15));
    agent.options_mut().ready_within = Duration::from_millis(50);
    agent.restart().expect_err("nobody answers for its health");
    let third = agent.pid().expect("running");
    let cleaned = agent.cleanup().expect("cleanup");
    assert!(cleaned.ends_with(&format!(": cleanup --pin-root {}\n", pins.display())), "{cleaned}");
    drop(agent);
    assert_eq!([alive(third), pins.exists()], [false, false]);
}
