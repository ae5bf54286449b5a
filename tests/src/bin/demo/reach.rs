//! Who reaches what, from where, through which hooks.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, bail};
use proxy_abi::{Hook, Reason};
use proxy_tests::traffic::{UdpOptions, tcp_exchange, udp_exchange};
use proxy_tests::{Family, Netns};

use crate::hooks::{Counters, Expected, Hooks};
use crate::narrator::Narrator;
use crate::stage::{NODES, Stage};

/// A backend is chosen at random: so often is asked until the one of interest answers.
const TRIES: usize = 128;
/// Bytes each way of a TCP exchange.
const BYTES: u64 = 256 * 1024;
/// Bytes of a UDP request: the usual one, and one that comes in fragments.
const DATAGRAMS: [usize; 2] = [64, 5_000];

/// One kind of path through the node.
struct Path {
    title: &'static str,
    from: &'static str,
    service: &'static str,
    port: &'static str,
    server: &'static str,
    /// Which address the server sees.
    seen: Seen,
    expected: &'static [Expected<'static>],
}

/// The client's address as its server sees it: what kube-proxy would show.
#[derive(Clone, Copy)]
enum Seen {
    /// The pod's own.
    Pod,
    /// The bridge's, which is the gateway of the pod.
    Bridge,
    /// The node's.
    Node,
}

/// What one exchange showed.
struct Shown {
    server: String,
    client_seen: IpAddr,
    answered_from: SocketAddr,
}

const fn at(node: &str, hook: Hook, reason: Reason) -> Expected<'_> {
    Expected { node, hook, reason, happens: true }
}

const fn never(node: &str, hook: Hook, reason: Reason) -> Expected<'_> {
    Expected { node, hook, reason, happens: false }
}

const FIRST: &str = NODES[0];
const OTHER: &str = NODES[1];

/// Both directions at the pods' own veths; the IP stack of the node is passed by.
const BESIDE_THE_STACK: &[Expected<'_>] = &[
    at(FIRST, Hook::FromPod, Reason::ServiceNew),
    at(FIRST, Hook::FromPod, Reason::Reply),
    never(FIRST, Hook::ToPod, Reason::Reply),
];

/// Routed there and back; the reply is translated where it reaches the client. The other node sees a plain flow.
const THROUGH_THE_STACK: &[Expected<'_>] = &[
    at(FIRST, Hook::FromPod, Reason::ServiceNew),
    at(FIRST, Hook::ToPod, Reason::Reply),
    never(FIRST, Hook::FromPod, Reason::Reply),
    at(OTHER, Hook::ToPod, Reason::DirectNew),
    never(OTHER, Hook::FromPod, Reason::ServiceNew),
];

/// The socket is told the backend's address: no packet is touched.
const AT_THE_SOCKET: &[Expected<'_>] = &[
    at(FIRST, Hook::Connect, Reason::Socket),
    never(FIRST, Hook::FromPod, Reason::ServiceNew),
    never(FIRST, Hook::FromPod, Reason::Reply),
    never(FIRST, Hook::ToPod, Reason::Reply),
];

const PATHS: [Path; 7] = [
    Path {
        title: "A pod of the same node answers: from veth to veth, past bridge and IP stack",
        from: "client",
        service: "web",
        port: "http",
        server: "web-1",
        seen: Seen::Pod,
        expected: BESIDE_THE_STACK,
    },
    Path {
        title: "A pod of the other node answers: routed there and back",
        from: "client",
        service: "web",
        port: "http",
        server: "web-2",
        seen: Seen::Pod,
        expected: THROUGH_THE_STACK,
    },
    Path {
        title: "A pod reaches itself through its Service (hairpin; the bridge port has hairpin mode off)",
        from: "web-1",
        service: "web",
        port: "http",
        server: "web-1",
        seen: Seen::Bridge,
        expected: BESIDE_THE_STACK,
    },
    Path {
        title: "A process of the node reaches a pod of the node",
        from: FIRST,
        service: "web",
        port: "http",
        server: "web-1",
        seen: Seen::Bridge,
        expected: AT_THE_SOCKET,
    },
    Path {
        title: "A process of the node reaches a pod of the other node",
        from: FIRST,
        service: "web",
        port: "http",
        server: "web-2",
        seen: Seen::Node,
        expected: AT_THE_SOCKET,
    },
    Path {
        title: "UDP, as a DNS client sends it: a pod of the same node answers, small and in fragments",
        from: "client",
        service: "dns",
        port: "dns",
        server: "dns-1",
        seen: Seen::Pod,
        expected: BESIDE_THE_STACK,
    },
    Path {
        title: "UDP: a pod of the other node answers, small and in fragments",
        from: "client",
        service: "dns",
        port: "dns",
        server: "dns-2",
        seen: Seen::Pod,
        expected: THROUGH_THE_STACK,
    },
];

/// Every path, over both families.
pub(crate) fn play(narrator: &mut Narrator, stage: &Stage) -> Result<()> {
    let hooks = stage.hooks()?;
    for path in &PATHS {
        narrator.step(path.title);
        for family in Family::BOTH {
            play_path(narrator, stage, &hooks, path, family)?;
        }
    }
    Ok(())
}

fn play_path(n: &mut Narrator, stage: &Stage, hooks: &Hooks, path: &Path, family: Family) -> Result<()> {
    let vip = stage.service(path.service)?.at(family, path.port)?;
    let netns = stage.netns(path.from)?;
    let seen = match path.seen {
        Seen::Pod => stage.pod_ip(path.from, family)?,
        Seen::Bridge => stage.node(FIRST)?.bridge_ip(family),
        Seen::Node => stage.node(FIRST)?.ip(family),
    };
    let kinds: Vec<Option<usize>> = if path.port == "dns" { DATAGRAMS.map(Some).to_vec() } else { vec![None] };
    for datagram in kinds {
        let (shown, counted) = until_answered(hooks, &netns, vip, path.server, datagram)?;
        let what = datagram.map_or("256 KiB each way".to_owned(), |size| format!("{size} bytes"));
        n.check(
            shown.client_seen == seen && shown.answered_from == vip,
            format!(
                "{family}, {what}: {} asked {vip}; {} answered, from {}; it saw the client as {}{}",
                path.from,
                shown.server,
                shown.answered_from,
                shown.client_seen,
                if shown.client_seen == seen { String::new() } else { format!(", not as {seen}") },
            ),
        );
        n.check(
            counted.agree(path.expected) && counted.drops() == 0,
            "the hooks that must have seen it, and no other:",
        );
        n.detail(&counted);
    }
    Ok(())
}

/// Asks until `server` is the one that is chosen.
fn until_answered(
    hooks: &Hooks,
    netns: &Netns,
    vip: SocketAddr,
    server: &str,
    datagram: Option<usize>,
) -> Result<(Shown, Counters)> {
    for _ in 0..TRIES {
        let before = hooks.settled()?;
        let shown = match datagram {
            None => {
                let report = tcp_exchange(netns, vip, BYTES, BYTES)?;
                let client_seen = report.peer_seen_by_server.ip();
                Shown { server: report.server_name, client_seen, answered_from: report.peer }
            }
            Some(size) => {
                let report = udp_exchange(netns, vip, &UdpOptions { size, ..UdpOptions::default() })?;
                let client_seen = report.peer_seen_by_server.ip();
                Shown { server: report.server_name, client_seen, answered_from: report.reply_from }
            }
        };
        if shown.server == server {
            return Ok((shown, hooks.settled()?.since(&before)));
        }
    }
    bail!("{server} did not answer one of {TRIES} requests to {vip}")
}
