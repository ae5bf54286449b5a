//! Who asks whom through a Service, with which load; and what every hook of every node must have counted.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use super::views::Counters;
use super::{SERVICE_PORT, Scenario, TARGET_PORT, vip};
use crate::address::Family;
use crate::cluster::{ClusterSpec, Links, NodeSpec};
use crate::deadline::Deadline;
use crate::error::{Error, Result};
use crate::traffic::socket::tcp_sockets;
use crate::traffic::{TcpOptions, UdpOptions, tcp_exchange_with, udp_exchange};

/// Bytes of a TCP cell, each way.
pub const TCP_BYTES: u64 = 8 << 20;
/// Bytes of the UDP cells: small, nearly an MTU, and in fragments.
pub const UDP_SIZES: [usize; 3] = [10, 1400, 5000];

/// A way from a client to the server behind a Service. Names are of [`cluster`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Way {
    /// What it is called in reports.
    pub name: &'static str,
    /// Pod or node that asks; on the first node.
    pub client: &'static str,
    /// Pod or node that answers.
    pub server: &'static str,
    /// Who translates.
    pub by: By,
    /// The client as the server sees it.
    pub seen: Seen,
}

/// Who translates the packets of a flow, and its replies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum By {
    /// `from_pod` of the client, and `from_pod` of the server's pod.
    BothVeths,
    /// `from_pod` of the client, and `to_pod` of the client.
    ClientVeth,
    /// The socket programs.
    Socket,
}

/// Which address of the client the server sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seen {
    /// The client pod's own.
    Pod,
    /// The first node's bridge.
    Bridge,
    /// The first node's uplink.
    Node,
    /// The first node's tunnel.
    Tunnel,
    /// The client pod's own, or behind the CNI's masquerade rule the first node's.
    Masqueraded,
}

/// What is sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// [`TCP_BYTES`] up, then down.
    Tcp,
    /// A datagram and its echo.
    Udp {
        /// Bytes.
        size: usize,
        /// On a connected socket.
        connected: bool,
    },
}

/// Settings of the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setting {
    /// How nodes are joined.
    pub links: Links,
    /// FORWARD drops what is invalid, POSTROUTING masquerades.
    pub hostile: bool,
    /// Strict reverse path filter.
    pub rp_filter: bool,
}

/// A failed cell.
#[derive(Debug)]
pub struct Failure {
    /// Which.
    pub cell: String,
    /// How.
    pub error: Error,
}

/// A [`Way`].
pub const fn way(name: &'static str, client: &'static str, server: &'static str, by: By, seen: Seen) -> Way {
    Way { name, client, server, by, seen }
}

/// Ways in a cluster with routes between the nodes.
pub const ROUTED: [Way; 9] = [
    way("same bridge", "a", "b", By::BothVeths, Seen::Pod),
    way("other node routed", "a", "d", By::ClientVeth, Seen::Pod),
    way("hairpin", "a", "a", By::BothVeths, Seen::Bridge),
    way("node process to its pod", "node1", "b", By::Socket, Seen::Bridge),
    way("node process to a pod of another node", "node1", "d", By::Socket, Seen::Node),
    way("hostNetwork backend of the node", "a", "node1", By::ClientVeth, Seen::Pod),
    way("hostNetwork backend of another node", "a", "node2", By::ClientVeth, Seen::Masqueraded),
    way("hostNetwork pod to a backend like it", "node1", "node1", By::Socket, Seen::Node),
    way("hostNetwork pod to one of another node", "node1", "node2", By::Socket, Seen::Node),
];

/// Ways that differ in a cluster with tunnels between the nodes.
pub const VXLAN: [Way; 2] = [
    way("other node VXLAN", "a", "d", By::ClientVeth, Seen::Pod),
    way("node process to a pod of another node, VXLAN", "node1", "d", By::Socket, Seen::Tunnel),
];

/// Every load, the one that leaves trailing packets last.
pub fn loads() -> Vec<Load> {
    let udp = UDP_SIZES.iter().flat_map(|&size| [false, true].map(|connected| Load::Udp { size, connected }));
    udp.chain([Load::Tcp]).collect()
}

/// Two nodes: pods `a`, `b` on `node1`, `d` on `node2`.
pub fn cluster(setting: Setting) -> ClusterSpec {
    let Setting { links, hostile, rp_filter } = setting;
    let node = |name: &str, pods: &[&str]| {
        NodeSpec::new(name).hostile(hostile).rp_filter(rp_filter).pods(pods.iter().copied())
    };
    ClusterSpec::default().links(links).node(node("node1", &["a", "b"])).node(node("node2", &["d"]))
}

/// Who has a server and a Service, each with the number of its service addresses.
const BACKENDS: [(&str, u16); 5] = [("a", 101), ("b", 102), ("d", 103), ("node1", 104), ("node2", 105)];

/// The service address that leads to this pod or node.
pub fn vip_of(server: &str, family: Family) -> Result<IpAddr> {
    let found = BACKENDS.iter().find(|(name, _)| *name == server);
    let (_, host) = found.ok_or_else(|| Error::Name(format!("no Service leads to {server}")))?;
    Ok(vip(family, *host))
}

/// A scenario over [`cluster`] with a server and a Service for each pod and node, and agents with these arguments.
pub fn scenario(setting: Setting, args: &[&str]) -> Result<Scenario> {
    scenario_of(&cluster(setting), args)
}

/// [`scenario`] over a description of one's own with the same names.
pub fn scenario_of(spec: &ClusterSpec, args: &[&str]) -> Result<Scenario> {
    let mut scenario = prepare(spec)?;
    scenario.start_agents(args)?;
    Ok(scenario)
}

/// [`scenario_of`] without agents.
pub fn prepare(spec: &ClusterSpec) -> Result<Scenario> {
    let mut scenario = Scenario::build(spec)?;
    for (name, host) in BACKENDS {
        if scenario.netns(name).is_err() {
            continue;
        }
        if scenario.cluster().node(name).is_ok() {
            scenario.serve_node(name)?;
        } else {
            scenario.serve_pod(name)?;
        }
        scenario.publish(&format!("to-{name}"), host, &[name])?;
    }
    Ok(scenario)
}

/// Runs cells and keeps count.
#[derive(Debug)]
pub struct Matrix<'a> {
    scenario: &'a Scenario,
    setting: Setting,
    /// What precedes the names of cells.
    pub label: String,
    /// Cells that ran.
    pub cells: usize,
    /// Those that failed.
    pub failures: Vec<Failure>,
    source_port: u16,
    last: Vec<Counters>,
}

impl<'a> Matrix<'a> {
    /// Over a scenario.
    pub fn new(scenario: &'a Scenario, setting: Setting) -> Result<Self> {
        let last = scenario.settled_counters()?;
        let label = setting.to_string();
        Ok(Self { scenario, setting, label, cells: 0, failures: Vec::new(), source_port: 20_000, last })
    }

    /// Runs every load in both families on every way.
    pub fn run(&mut self, ways: &[Way]) {
        for way in ways {
            for family in Family::BOTH {
                for load in loads() {
                    self.cell(way, family, load);
                }
            }
        }
    }

    /// Runs one cell.
    pub fn cell(&mut self, way: &Way, family: Family, load: Load) {
        self.cells += 1;
        if let Err(error) = self.check(way, family, load) {
            let cell = format!("{}, {}, {family}, {load}", self.label, way.name);
            self.failures.push(Failure { cell, error });
            // What the failed cell still sends is not the next one's.
            self.last = self.scenario.settled_counters().unwrap_or_default();
        }
    }

    /// All failures as one text; empty when there are none.
    pub fn report(&self) -> String {
        self.failures
            .iter()
            .fold(String::new(), |text, Failure { cell, error }| text + "\n  " + cell + ": " + &error.to_string())
    }

    fn check(&mut self, way: &Way, family: Family, load: Load) -> Result<()> {
        let client = self.scenario.netns(way.client)?;
        let target = SocketAddr::new(vip_of(way.server, family)?, SERVICE_PORT);
        // One that no earlier cell used: every cell is a new flow.
        self.source_port += 1;
        let source_port = self.source_port;
        let (server, seen, peer) = match load {
            Load::Tcp => {
                let timeout = Duration::from_secs(20);
                let options = TcpOptions { up: TCP_BYTES, down: TCP_BYTES, source_port, timeout };
                let report = tcp_exchange_with(&client, target, &options)?;
                // The last packet of a connection is what lets its server's kernel forget it: none comes after that.
                let (server, peer) = (self.scenario.netns(way.server)?, report.peer_seen_by_server.port());
                Deadline::secs(30).poll("the server has closed", || {
                    let open = self.scenario.open_connections(way.server) + tcp_sockets(&server, TARGET_PORT, peer)?;
                    Ok((open == 0).then_some(()))
                })?;
                (report.server_name, report.peer_seen_by_server, report.peer)
            }
            Load::Udp { size, connected } => {
                let options = UdpOptions { size, source_port, connected, ..UdpOptions::default() };
                let report = udp_exchange(&client, target, &options)?;
                (report.server_name, report.peer_seen_by_server, report.reply_from)
            }
        };
        let told = format!("{server} answered from {peer} and saw {}", seen.ip());
        let expected = format!("{} answered from {target} and saw {}", way.server, self.seen(way, family)?);
        if told != expected {
            return Err(Error::mismatch("who answered", expected, told));
        }
        let now = match load {
            Load::Tcp => self.scenario.settled_counters()?,
            Load::Udp { .. } => {
                (0..self.last.len()).map(|node| Ok(self.scenario.counters(node)?.rewrites())).collect::<Result<_>>()?
            }
        };
        let before = std::mem::replace(&mut self.last, now);
        for (node, (now, before)) in self.last.iter().zip(&before).enumerate() {
            let added = now.since(before);
            let expected = if node == 0 { rewriting(way.by, load) } else { Vec::new() };
            let flows = added.get("from_pod", "service_new");
            let new = u64::from(node == 0 && way.by != By::Socket);
            if added.names() != expected || flows != new {
                let what = format!("rewriting hooks of node {node}");
                return Err(Error::mismatch(what, format!("{expected:?} and {new} new flows"), added));
            }
        }
        Ok(())
    }

    fn seen(&self, way: &Way, family: Family) -> Result<IpAddr> {
        let node = self.scenario.node(0);
        Ok(match way.seen {
            Seen::Masqueraded if self.setting.hostile => node.ip(family),
            Seen::Pod | Seen::Masqueraded => self.scenario.cluster().pod(way.client)?.ip(family),
            Seen::Bridge => node.bridge_ip(family),
            Seen::Node => node.ip(family),
            Seen::Tunnel => node.pod_cidr(family).host(0),
        })
    }
}

/// Counters of the first node that must have grown, and no others: those of rewrites and drops, in order.
fn rewriting(by: By, load: Load) -> Vec<String> {
    let one_packet = matches!(load, Load::Udp { size, .. } if size < 1450);
    let names: &[&str] = match (by, load) {
        (By::BothVeths, _) if one_packet => &["from_pod.reply", "from_pod.service_new"],
        (By::BothVeths, _) => &["from_pod.reply", "from_pod.service", "from_pod.service_new"],
        (By::ClientVeth, _) if one_packet => &["from_pod.service_new", "to_pod.reply"],
        (By::ClientVeth, _) => &["from_pod.service", "from_pod.service_new", "to_pod.reply"],
        (By::Socket, Load::Tcp) => &["connect.socket", "getpeername.socket_reply"],
        (By::Socket, Load::Udp { connected: true, .. }) => &["connect.socket", "recvmsg.socket_reply"],
        (By::Socket, Load::Udp { connected: false, .. }) => &["recvmsg.socket_reply", "sendmsg.socket"],
    };
    names.iter().map(|&name| name.to_owned()).collect()
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let netfilter = if self.hostile { "INVALID=DROP and MASQUERADE" } else { "no netfilter" };
        let filter = if self.rp_filter { ", rp_filter=1" } else { "" };
        write!(f, "{:?}, {netfilter}{filter}", self.links)
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp => write!(f, "TCP {} MiB each way", TCP_BYTES >> 20),
            Self::Udp { size, connected: true } => write!(f, "UDP {size} bytes, connected"),
            Self::Udp { size, connected: false } => write!(f, "UDP {size} bytes"),
        }
    }
}
