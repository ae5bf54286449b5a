//! Connected UDP sockets of the node itself do not outlive their backend.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use proxy_tests::cluster::{ClusterSpec, NodeSpec};
use proxy_tests::scenario::{SERVICE_PORT, Scenario, TARGET_PORT, vip};
use proxy_tests::traffic::flow::ping_all;
use proxy_tests::traffic::socket::{timed_out, udp_client};
use proxy_tests::traffic::wire::UdpReply;
use proxy_tests::traffic::{ANSWERED_WITHIN, Flow};
use proxy_tests::{Deadline, Family, Netns};

fn connected(netns: &Netns, target: SocketAddr) -> UdpSocket {
    let socket = netns.run(|| udp_client(target, 0, ANSWERED_WITHIN)).expect("namespace").expect("socket");
    socket.connect(target).expect("connected");
    socket
}

/// One datagram and who answered it.
fn ask(socket: &UdpSocket) -> io::Result<String> {
    ask_by(socket, |request| socket.send(request))
}

/// The same, sent in this way. An answer to an earlier one may still lie in the socket.
fn ask_by(socket: &UdpSocket, send: impl FnOnce(&[u8]) -> io::Result<usize>) -> io::Result<String> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let mut request = [0; 64];
    request[..8].copy_from_slice(&NUMBER.fetch_add(1, Ordering::Relaxed).to_ne_bytes());
    let mut answer = [0; 2048];
    send(&request)?;
    loop {
        let length = socket.recv(&mut answer)?;
        let (reply, _, _) = UdpReply::read(&answer[..length]).expect("a reply");
        if reply.tag == UdpReply::tag(&request) {
            return Ok(reply.server);
        }
    }
}

#[test]
fn a_connected_socket_is_ended_with_its_backend() {
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").hostile(true).pods(["b", "c"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    for pod in ["b", "c"] {
        scenario.serve_pod(pod).expect("servers");
    }
    let moving = scenario.publish("moving", 31, &["b"]).expect("published");
    scenario.publish("staying", 32, &["b"]).expect("published");
    scenario.start_agents(&[]).expect("agents");
    let node = scenario.netns("node1").expect("namespace");
    let pod = scenario.cluster().pod("b").expect("pod");
    for family in Family::BOTH {
        let through = |host| SocketAddr::new(vip(family, host), SERVICE_PORT);
        let direct = SocketAddr::new(pod.ip(family), TARGET_PORT);
        scenario.set_endpoints(&moving, &["b"]).expect("written");
        let on_b = || ask(&connected(&node, through(31))).is_ok_and(|server| server == "b");
        Deadline::secs(60).until("b serves", on_b).expect("it does");
        // The same address through another Service, without any, and TCP to the Service itself: nobody ends those.
        let others = [connected(&node, through(32)), connected(&node, direct)];
        let mut tcp = [Flow::open(&node, through(31), 0, ANSWERED_WITHIN).expect("flow")];
        let ends = connected(&node, through(31));
        for socket in others.iter().chain([&ends]) {
            assert_eq!(ask(socket).expect("answered"), "b");
        }

        scenario.set_endpoints(&moving, &["c"]).expect("written");
        let mut said = None;
        let aborted = || {
            // An answer that is late says nothing of the socket.
            said = ask(&ends).err().filter(|error| !timed_out(error));
            said.is_some()
        };
        Deadline::secs(60).until("the socket is ended", aborted).expect("ended");
        // Whether it was sending or waiting: the kernel aborts and disconnects the socket.
        let said = said.expect("an error");
        let expected = [Errno::ECONNABORTED as i32, Errno::EDESTADDRREQ as i32];
        assert!(said.raw_os_error().is_some_and(|errno| expected.contains(&errno)), "{family:?}: {said}");
        for socket in &others {
            assert_eq!(ask(socket).expect("goes on"), "b", "{family:?}");
        }
        ping_all(&mut tcp, ANSWERED_WITHIN).check("TCP").expect("goes on");
        // What the application does then.
        ends.take_error().expect("asked");
        ends.connect(through(31)).expect("connected");
        assert_eq!(ask(&ends).expect("answered"), "c", "{family:?}");
    }
    let log = scenario.agent(0).log_text();
    assert!(log.contains("connected over UDP to backends that are gone"), "{log}");
}

/// Such a socket hears nobody but the backend that `connect` chose.
#[test]
fn a_connected_socket_that_names_its_service_again_stays_on_its_backend() {
    let spec = ClusterSpec::default().node(NodeSpec::new("node1").pods(["b", "c"]));
    let mut scenario = Scenario::build(&spec).expect("scenario");
    for pod in ["b", "c"] {
        scenario.serve_pod(pod).expect("servers");
    }
    scenario.publish("both", 31, &["b", "c"]).expect("published");
    scenario.start_agents(&[]).expect("agents");
    let node = scenario.netns("node1").expect("namespace");
    for family in Family::BOTH {
        let service = SocketAddr::new(vip(family, 31), SERVICE_PORT);
        Deadline::secs(60).until("it serves", || ask(&connected(&node, service)).is_ok()).expect("it does");
        let asked: Vec<_> = (0..20)
            .map(|_| {
                let socket = connected(&node, service);
                let first = ask(&socket).expect("an answer");
                let again = ask_by(&socket, |request| socket.send_to(request, service)).expect("an answer again");
                (first, again)
            })
            .collect();
        assert!(asked.iter().all(|(first, again)| first == again), "{asked:?}");
    }
}
