//! Discovery of the node from netlink alone: its interfaces, the pods' veths, and which addresses are whose.
//!
//! ```text
//!   notifications (links, addresses, traffic control) ─┐ hints            ┌─ addresses and MAC of a pod's end, asked for
//!   notifications of other namespaces, if permitted ───┤                  │  by namespace id (IFA_TARGET_NETNSID): no
//!   every `sweep`: everything ─────────────────────────┼─▶ view ◀─────────┘  setns, no /proc, CAP_NET_ADMIN only
//!   new pod interface: 1, 2, 5, 10 ... ms ─────────────┘    │
//!   cni: the CNI's records ───────────── known ◀────────────┤ which pod's
//!                                      classify ◀───────────┤ which veth is a pod's
//!                                      binding  ◀───────────┤ which of the addresses that it shows are its own
//!                                      path     ◀───────────┘ who else has programs there
//!                                         │
//!                                      report ─▶ Event::{Link, LinkGone, Diagnostics, Listed}: differences only
//! ```
//!
//! One thread with its own runtime does all this, in the network namespace of the thread that calls [`spawn`]. When
//! its channel is full it waits; notifications that are lost meanwhile lead to a new full listing, and an
//! [`Event::Listed`] after it.
//!
//! Which pod a veth belongs to is said by the CNI's record alone, and once said it holds as long as the veth lives.
//!
//! Deliberately absent: nothing here enters a namespace, reads `/sys/class/net`, learns from traffic, or changes a
//! setting.

pub mod binding;
pub mod cgroup;
pub mod check;
pub mod classify;
pub mod cni;
pub mod conntrack;
pub mod guard;
pub mod netlink;
pub mod path;
mod report;
pub mod socket_diag;
mod view;
pub mod way;
pub mod wire;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use ipnet::IpNet;
use proxy_abi::MacBytes;
use proxy_core::diagnostic::Diagnostic;
use proxy_core::event::{Event, NetDevice, Node, PodLink};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

use binding::{Bindings, Claim, Previous, Time, Trusted};
use classify::{NamePattern, PodNetwork, Role};
use cni::{Attachment, Records};
use netlink::{Hints, NetlinkError, Notifications, Requests, Scope};
use path::ForeignTcx;
use report::Report;
use view::View;

/// How discovery works.
#[derive(Clone, Debug)]
pub struct Config {
    /// When not empty: only bridges of these names are pod bridges.
    pub pod_bridges: Vec<NamePattern>,
    /// How long after its first address a pod's further ones are accepted.
    pub window: Duration,
    /// Time between two looks at everything.
    pub sweep: Duration,
    /// Receive buffer of the notification sockets in bytes.
    pub receive_buffer: usize,
    /// Also listen to notifications of the pods' namespaces, where `CAP_NET_BROADCAST` permits it.
    pub listen_to_peers: bool,
}

/// What discovery is told by others.
pub struct Inputs {
    /// This node; its default as long as it is not known.
    pub node: watch::Receiver<Node>,
    /// What the CNI's records say.
    pub records: watch::Receiver<Records>,
    /// The address bindings that stand in the pinned maps.
    pub previous: BTreeMap<IpAddr, Previous>,
    /// Tells of tcx programs that are not ours.
    pub foreign_tcx: Box<dyn ForeignTcx>,
}

/// The node's interfaces, ordered by index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeDevices {
    /// All of them.
    pub devices: Vec<NodeDevice>,
}

/// One interface of the node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeDevice {
    /// Index.
    pub ifindex: u32,
    /// Name.
    pub name: Arc<str>,
    /// Kind as drivers call it (`veth`, `vxlan`), empty for hardware.
    pub kind: Arc<str>,
    /// What it is to us.
    pub role: Role,
    /// Ethernet address; zero where there is none.
    pub mac: MacBytes,
    /// MTU in bytes.
    pub mtu: u32,
    /// Is switched on.
    pub up: bool,
    /// The node's addresses of global scope on it.
    pub addresses: Vec<IpNet>,
}

/// Discovery at work. It ends when this is dropped.
#[derive(Debug)]
pub struct Handle {
    devices: watch::Receiver<NodeDevices>,
    stop: Option<oneshot::Sender<()>>,
    end: Option<oneshot::Receiver<Result<(), NodeError>>>,
    thread: Option<JoinHandle<()>>,
}

/// Why discovery cannot begin or go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The kernel could not be asked.
    #[error(transparent)]
    Netlink(#[from] NetlinkError),
    /// The thread or its runtime could not be made.
    #[error("cannot start the thread for netlink")]
    Thread(#[source] std::io::Error),
    /// The thread is gone without a result.
    #[error("the thread for netlink has panicked")]
    Panicked,
}

/// Starts discovery of the network namespace of the calling thread. Its first events are all pod interfaces, then
/// `Event::Listed(Source::Links, ..)`.
pub fn spawn(config: Config, inputs: Inputs, events: mpsc::Sender<Event>) -> Result<Handle, NodeError> {
    let requests = Requests::open()?;
    let (told, devices) = watch::channel(NodeDevices::default());
    let (stop, stopped) = oneshot::channel();
    let (ended, end) = oneshot::channel();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(NodeError::Thread)?;
    let sockets = {
        let _in_runtime = runtime.enter();
        Sockets::open(&config)?
    };
    let discovery = Discovery::new(config, inputs, requests, events, told);
    let work = move || {
        let result = runtime.block_on(async move {
            tokio::select! {
                result = discovery.run(sockets) => result,
                _ = stopped => Ok(()),
            }
        });
        if let Err(error) = &result {
            tracing::error!(error = error as &dyn std::error::Error, "discovery of interfaces ends");
        }
        // Nobody waits for the result when the handle is gone.
        drop(ended.send(result));
    };
    let thread = std::thread::Builder::new().name("netlink".into()).spawn(work).map_err(NodeError::Thread)?;
    Ok(Handle { devices, stop: Some(stop), end: Some(end), thread: Some(thread) })
}

/// The notification sockets.
struct Sockets {
    node: Notifications,
    peers: Option<Notifications>,
}

/// Everything the thread owns.
struct Discovery {
    config: Config,
    node: watch::Receiver<Node>,
    records: watch::Receiver<Records>,
    view: View,
    /// Veths with a record: their names, and what it said.
    known: BTreeMap<u32, (Arc<str>, Arc<Attachment>)>,
    bindings: Bindings,
    report: Report,
    events: mpsc::Sender<Event>,
    devices: watch::Sender<NodeDevices>,
    start: Instant,
    /// When to look at everything again.
    sweep: Time,
    /// A full listing is to be announced after the next look at everything that succeeds.
    announce: bool,
}

// === impl Config ===

impl Default for Config {
    fn default() -> Self {
        Self {
            pod_bridges: Vec::new(),
            window: Duration::from_secs(5),
            sweep: Duration::from_secs(10),
            // 2 MiB were seen to hold about 150 new interfaces while nobody reads, 16 MiB more than 1,000.
            receive_buffer: 16 << 20,
            listen_to_peers: true,
        }
    }
}

// === impl Handle ===

impl Handle {
    /// The node's interfaces, as they are and as they change.
    pub fn devices(&self) -> watch::Receiver<NodeDevices> {
        self.devices.clone()
    }

    /// Waits until discovery ends: by an error, which is told once, or because nobody receives its events any more.
    pub async fn ended(&mut self) -> Result<(), NodeError> {
        let Some(end) = &mut self.end else { return Ok(()) };
        let result = end.await.unwrap_or(Err(NodeError::Panicked));
        self.end = None;
        result
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        // The thread is at an await point almost always; a look at everything takes milliseconds.
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been reported by `ended`, or nobody asks.
            drop(thread.join());
        }
    }
}

// === impl Sockets ===

impl Sockets {
    fn open(config: &Config) -> Result<Self, NetlinkError> {
        let denied = || NetlinkError::Refused { operation: "send notifications", source: nix::errno::Errno::EPERM };
        let node = Notifications::open(Scope::Node, config.receive_buffer)?.ok_or_else(denied)?;
        let peers =
            if config.listen_to_peers { Notifications::open(Scope::Peers, config.receive_buffer)? } else { None };
        if peers.is_none() {
            tracing::debug!("no notifications of the pods' namespaces: their addresses are asked for");
        }
        Ok(Self { node, peers })
    }

    /// Hints about the node, or about the far ends.
    async fn next(&mut self) -> Result<Result<Hints, Hints>, NetlinkError> {
        match &mut self.peers {
            None => Ok(Ok(self.node.next().await?)),
            Some(peers) => tokio::select! {
                hints = self.node.next() => Ok(Ok(hints?)),
                hints = peers.next() => Ok(Err(hints?)),
            },
        }
    }
}

// === impl Discovery ===

impl Discovery {
    fn new(
        config: Config,
        inputs: Inputs,
        requests: Requests,
        events: mpsc::Sender<Event>,
        devices: watch::Sender<NodeDevices>,
    ) -> Self {
        let Inputs { node, records, previous, foreign_tcx } = inputs;
        let network = PodNetwork { bridges: config.pod_bridges.clone(), cidrs: Vec::new() };
        Self {
            bindings: Bindings::new(config.window, previous),
            view: View::new(requests, foreign_tcx, network),
            report: Report::default(),
            config,
            node,
            records,
            known: BTreeMap::new(),
            events,
            devices,
            start: Instant::now(),
            sweep: Time::ZERO,
            announce: true,
        }
    }

    /// Works until nobody receives the events any more.
    async fn run(mut self, mut sockets: Sockets) -> Result<(), NodeError> {
        self.take_inputs();
        self.view.list(self.now())?;
        self.sweep = self.now() + self.config.sweep;
        loop {
            if !self.tell().await {
                return Ok(());
            }
            let wake = self.view.next_look().map_or(self.sweep, |next| next.min(self.sweep));
            tokio::select! {
                hints = sockets.next() => match hints? {
                    Ok(hints) => {
                        self.announce |= hints.lost;
                        if hints.lost {
                            tracing::warn!("notifications of the kernel were lost; all interfaces are listed anew");
                        }
                        let result = self.view.follow(&hints, self.now());
                        self.retry_soon(result);
                    }
                    Err(hints) => self.view.follow_peers(&hints, self.now()),
                },
                () = changed(&mut self.node) => self.take_inputs(),
                () = changed(&mut self.records) => {}
                () = tokio::time::sleep_until(self.start + wake) => {}
            }
            if self.now() >= self.sweep {
                self.sweep = self.now() + self.config.sweep;
                let result = self.view.list(self.now());
                self.retry_soon(result);
            }
            self.view.poll(self.now());
        }
    }

    fn now(&self) -> Time {
        self.start.elapsed()
    }

    fn take_inputs(&mut self) {
        self.view.network.cidrs.clone_from(&self.node.borrow_and_update().pod_cidrs);
    }

    /// A request that failed leaves a view that may be old in part: everything is looked at again before long.
    fn retry_soon(&mut self, result: Result<(), NetlinkError>) {
        if let Err(error) = result {
            tracing::warn!(error = &error as &dyn std::error::Error, "cannot look at the node's interfaces");
            self.sweep = self.now() + Duration::from_secs(1);
        }
    }

    /// Sends what has changed; false when nobody receives it.
    async fn tell(&mut self) -> bool {
        let now = self.now();
        let ranges = self.bind(now);
        let bindings = &self.bindings;
        let settled = |index| ranges.get(&index).is_none_or(|ranges| bindings.settled(now, index, ranges));
        self.view.plan(now, self.config.window, settled);
        let mut events = self.report.update(self.pod_links(&ranges), self.net_devices(), self.findings(&ranges));
        if std::mem::take(&mut self.announce) {
            events.push(self.report.listed());
        }
        let devices = self.node_devices();
        self.devices.send_if_modified(|told| {
            let differs = *told != devices;
            *told = devices;
            differs
        });
        for event in events {
            if self.events.send(event).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Decides on the claims of all pod interfaces. Returns the interfaces, each with the ranges of its addresses.
    fn bind(&mut self, now: Time) -> BTreeMap<u32, Vec<IpNet>> {
        let mut ranges = BTreeMap::new();
        let mut claims = BTreeMap::new();
        for (index, peer) in &self.view.peers {
            let Some(link) = self.view.host.links.get(index) else { continue };
            let Some(within) = self.view.host.pod_ranges(&self.view.network, link) else { continue };
            let (name, addresses) = (Arc::clone(&link.name), peer.addresses.clone());
            claims.insert(*index, Claim { name, mac: peer.mac, addresses, ranges: within.clone() });
            ranges.insert(*index, within);
        }
        let mut own = self.view.host.own_addresses();
        own.extend(&self.node.borrow().addresses);
        self.identify(&ranges);
        // A CNI without IPAM gives no address: what the interface shows counts then, as where there is no record.
        let named = self.known.iter().filter(|(_, (_, attachment))| !attachment.addresses.is_empty());
        let trusted: Trusted = named.map(|(index, (_, known))| (*index, known.addresses.clone())).collect();
        self.bindings.update(now, &own, &trusted, &claims);
        ranges
    }

    /// Finds the record of each pod interface that has none yet, and forgets interfaces that are gone.
    fn identify(&mut self, pods: &BTreeMap<u32, Vec<IpNet>>) {
        let links = &self.view.host.links;
        self.known.retain(|index, (name, _)| links.get(index).is_some_and(|link| link.name == *name));
        let records = self.records.borrow_and_update();
        for index in pods.keys().filter(|index| !self.known.contains_key(*index)).copied().collect::<Vec<_>>() {
            let Some(link) = links.get(&index) else { continue };
            if let Some(attachment) = records.of(&link.name, link.mac) {
                self.known.insert(index, (Arc::clone(&link.name), Arc::clone(attachment)));
            }
        }
    }

    fn pod_links(&self, pods: &BTreeMap<u32, Vec<IpNet>>) -> BTreeMap<u32, PodLink> {
        let host = &self.view.host;
        let one = |(index, ranges): (&u32, &Vec<IpNet>)| {
            let (link, peer) = (host.links.get(index)?, self.view.peers.get(index)?);
            let bridge = link.master.and_then(|master| host.links.get(&master));
            let mut gateways: Vec<IpAddr> =
                host.global_addresses(bridge.unwrap_or(link).index).map(|net| net.addr()).collect();
            // One of each family is used: rather one of the pods' network than another the bridge happens to have.
            gateways.sort_by_key(|ip| !ranges.iter().any(|net| net.contains(ip)));
            let pod_link = PodLink {
                ifindex: *index,
                name: Arc::clone(&link.name),
                pod_mac: peer.mac,
                gateway_mac: bridge.unwrap_or(link).mac,
                bridge: link.master.unwrap_or(0),
                addresses: self.bindings.bound(*index),
                gateways,
                path: path::path(link, bridge, peer.foreign),
                mtu: link.mtu,
                pod: self.known.get(index).map(|(_, attachment)| Arc::clone(&attachment.uid)),
            };
            Some((*index, pod_link))
        };
        pods.iter().filter_map(one).collect()
    }

    fn findings(&self, pods: &BTreeMap<u32, Vec<IpNet>>) -> BTreeMap<String, Vec<Diagnostic>> {
        let one = |index: &u32| {
            let name = &self.view.host.links.get(index)?.name;
            let refused = self.bindings.refused(*index);
            let findings: Vec<_> = refused.map(|(ip, why)| report::diagnostic(name, ip, why)).collect();
            (!findings.is_empty()).then(|| (report::object(name), findings))
        };
        pods.keys().filter_map(one).collect()
    }

    /// All interfaces that are not a pod's and have a layer 3 of their own.
    fn net_devices(&self) -> BTreeMap<u32, NetDevice> {
        let host = &self.view.host;
        let device = |(index, role): (u32, Role)| {
            let link = host.links.get(&index)?;
            let has_addresses = host.addresses.get(&index).is_some_and(|addresses| !addresses.is_empty());
            if matches!(role, Role::Pod | Role::Port) || !has_addresses {
                return None;
            }
            let addresses = host.addresses.get(&index).into_iter().flatten().map(|address| address.net.addr());
            let device = NetDevice {
                ifindex: index,
                name: Arc::clone(&link.name),
                mac: link.mac,
                mtu: link.mtu,
                addresses: addresses.filter(|ip| !is_link_local6(*ip)).collect(),
                attach: matches!(role, Role::Uplink | Role::Tunnel | Role::Bridge) && link.is_ethernet(),
                pod_bridge: role == Role::PodBridge,
            };
            Some((index, device))
        };
        host.roles(&self.view.network).into_iter().filter_map(device).collect()
    }

    fn node_devices(&self) -> NodeDevices {
        let host = &self.view.host;
        let device = |(index, role): (u32, Role)| {
            let link = host.links.get(&index)?;
            Some(NodeDevice {
                ifindex: index,
                name: Arc::clone(&link.name),
                kind: Arc::clone(&link.kind),
                role,
                mac: link.mac,
                mtu: link.mtu,
                up: link.up,
                addresses: host.global_addresses(index).collect(),
            })
        };
        NodeDevices { devices: host.roles(&self.view.network).into_iter().filter_map(device).collect() }
    }
}

/// Every interface has one of these; none is the node's own among others.
const fn is_link_local6(ip: IpAddr) -> bool {
    matches!(ip, IpAddr::V6(ip) if ip.segments()[0] & 0xffc0 == 0xfe80)
}

/// Waits for a new value; for ever when there will be none.
async fn changed<T>(input: &mut watch::Receiver<T>) {
    if input.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}
