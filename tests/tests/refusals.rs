//! Refusals on the wire: whoever asks for nothing hears so at once, and what it hears has right checksums, whether the
//! sender left its own checksum to a device or not, and where the device that the answer leaves by computes none.
//!
//! The same expectations as Kubernetes' "should be rejected when no endpoints exist".

use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use proxy_tests::manifests::{Object as _, Service, ServicePort};
use proxy_tests::node::UPLINK;
use proxy_tests::packet::{Frame, L4, verify_checksums};
use proxy_tests::rawsock::RawSocket;
use proxy_tests::scenario::vip;
use proxy_tests::{Agent, AgentOptions, Cluster, Family, Manifests, Netns, NodeSpec};
use serde_json::json;

const PORT: u16 = 80;
const NODE_PORT: u16 = 30_080;
/// At once, for a machine that is busy with something else, too.
const WITHIN: Duration = Duration::from_secs(10);

/// Switches what devices compute on or off. Segmentation depends on it and follows.
fn offload(netns: &Netns, device: &str, on: bool) {
    let state = if on { "on" } else { "off" };
    netns.output("ethtool", &["-K", device, "tx", state]).expect("ethtool");
}

/// What a connected socket says to a Service without endpoints: refused, at once, by TCP and by UDP.
fn is_refused(netns: &Netns, target: SocketAddr) {
    let begin = Instant::now();
    let (tcp, udp) = netns
        .run(|| {
            let tcp = TcpStream::connect_timeout(&target, WITHIN).map(drop).map_err(|error| error.kind());
            let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
            let socket = UdpSocket::bind(any).expect("a socket");
            socket.connect(target).expect("UDP connects to anything");
            socket.set_read_timeout(Some(WITHIN)).expect("a deadline");
            socket.send(b"is anybody there, and if so, who?").expect("sent");
            let udp = socket.recv(&mut [0; 100]).map_err(|error| error.kind());
            (tcp, udp)
        })
        .expect("the namespace");
    assert_eq!((tcp, udp), (Err(ErrorKind::ConnectionRefused), Err(ErrorKind::ConnectionRefused)), "{target}");
    assert!(begin.elapsed() < WITHIN, "{target}: {:?}", begin.elapsed());
}

/// The answer that a frame is: a reset, or an error that says that a port is unreachable.
fn is_answer(frame: &[u8], from: IpAddr) -> bool {
    let Ok(frame) = Frame::parse(frame) else { return false };
    let Some(ip) = frame.as_ip().filter(|ip| ip.src == from) else { return false };
    match &ip.l4 {
        L4::Tcp(tcp) => tcp.flags & proxy_tests::packet::tcp_flag::RST != 0,
        L4::Icmp(icmp) => matches!((icmp.kind, icmp.code), (3, 3) | (1, 4)),
        _ => false,
    }
}

#[test]
fn refused_at_once_with_right_checksums_from_pods_and_from_outside() {
    let cluster = Cluster::builder().node(NodeSpec::new("node1").pods(["a"])).build().expect("a cluster");
    let node = cluster.node("node1").expect("node1");
    let pod = cluster.pod("a").expect("a");
    let manifests = Manifests::open(&cluster.manifest_dir()).expect("a folder");
    manifests.write(&node).expect("the Node");
    let ports = vec![ServicePort::tcp("tcp", PORT, 8080), ServicePort::udp("udp", PORT, 8080)];
    let mut service = Service::new("void", &Family::BOTH.map(|family| vip(family, 77)), ports)
        .with("type", json!("NodePort"))
        .with("ipFamilyPolicy", json!("RequireDualStack"))
        .to_json();
    for port in 0..2 {
        service["spec"]["ports"][port]["nodePort"] = NODE_PORT.into();
    }
    manifests.write_all("void.yaml", &[service]).expect("the Service");
    let agent = Agent::start(node, AgentOptions::dir(manifests.dir())).expect("an agent");
    // Answers leave by devices that compute no checksum.
    offload(node.netns(), UPLINK, false);
    offload(node.netns(), &pod.host_veth().name, false);

    let ways =
        [(pod.netns().clone(), "eth0".to_owned(), true), (cluster.outside().clone(), outside_device(&cluster), false)];
    for (netns, device, from_pod) in &ways {
        for family in Family::BOTH {
            let (ip, port) = if *from_pod { (vip(family, 77), PORT) } else { (node.ip(family), NODE_PORT) };
            for on in [true, false] {
                offload(netns, device, on);
                let wire = RawSocket::open(netns, device).expect("a packet socket");
                is_refused(netns, SocketAddr::new(ip, port));
                let answers = wire
                    .collect(WITHIN, |frame| is_answer(frame, ip), |frames| frames.len() >= 2)
                    .expect("the answers on the wire");
                assert_eq!(answers.len(), 2, "{family:?}, from a pod: {from_pod}, offload {on}");
                for answer in answers {
                    let sums = verify_checksums(&answer);
                    assert!(
                        sums.is_ok(),
                        "{family:?}, from a pod: {from_pod}, offload {on}: {sums:?} in {answer:02x?}"
                    );
                }
            }
        }
    }
    let status = agent.cli(&["status"]).expect("status");
    assert!(status.contains("no_backend"), "{status}");
}

/// The link of the host outside that leads to the nodes: the one with its address.
fn outside_device(cluster: &Cluster) -> String {
    let ip = cluster.outside_ip(Family::V4).to_string();
    let listed = cluster.outside().output("ip", &["-o", "-4", "address"]).expect("addresses");
    let line = listed.lines().find(|line| line.contains(&ip)).expect("a link with the address");
    line.split_whitespace().nth(1).expect("a name").to_owned()
}
