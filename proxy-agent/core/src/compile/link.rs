//! Interfaces of the node, and the pods' addresses behind some of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use proxy_abi::{DeviceEntry, IpBytes, LocalPodEntry};

use crate::address::Family;
use crate::diagnostic::Diagnostic;
use crate::event::{LinkPath, NetDevice, PodLink};
use crate::plan::TableDeltas;
use crate::state::ClusterState;

use super::{Compiler, error};

/// What interfaces were compiled to.
#[derive(Clone, Debug, Default)]
pub(super) struct Links {
    /// Addresses bound to each compiled interface.
    bound: BTreeMap<u32, Vec<IpBytes>>,
    findings: BTreeMap<u32, Vec<Diagnostic>>,
    /// Interfaces that found no room.
    starved: BTreeSet<u32>,
}

impl Links {
    pub(super) fn findings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.findings.values().flatten()
    }
}

impl Compiler {
    /// Compiles interfaces. True when findings changed.
    pub(super) fn compile_links(
        &mut self,
        state: &ClusterState,
        dirty: &BTreeSet<u32>,
        tables: &mut TableDeltas,
    ) -> bool {
        if dirty.is_empty() {
            return false;
        }
        let dirty: BTreeSet<u32> = dirty.union(&std::mem::take(&mut self.links.starved)).copied().collect();
        // First everything is unbound, then bound again: an address that moves from one interface to another is one
        // change of its row.
        for ifindex in &dirty {
            for ip in self.links.bound.remove(ifindex).unwrap_or_default() {
                tables.local_pods.unwant(&ip);
            }
            let device = state.device(*ifindex).filter(|device| !is_loopback(device));
            if state.link(*ifindex).is_none() && device.is_none() {
                tables.devices.unwant(ifindex);
            }
        }
        let mut changed = false;
        for ifindex in dirty {
            let mut findings = Vec::new();
            if let Some(link) = state.link(ifindex) {
                self.compile_link(state, link, tables, &mut findings);
            } else if let Some(device) = state.device(ifindex).filter(|device| !is_loopback(device)) {
                self.compile_device(state, device, tables, &mut findings);
            }
            let previous = if findings.is_empty() {
                self.links.findings.remove(&ifindex)
            } else {
                self.links.findings.insert(ifindex, findings)
            };
            changed |= previous.as_ref() != self.links.findings.get(&ifindex);
        }
        changed
    }

    fn compile_link(
        &mut self,
        state: &ClusterState,
        link: &PodLink,
        tables: &mut TableDeltas,
        findings: &mut Vec<Diagnostic>,
    ) {
        let object = format!("Interface {}", link.name);
        if self.finds_no_room(link.ifindex, tables) {
            let problem = "no room for more interfaces; Services do not work for its pod".to_owned();
            findings.push(error(object, String::new(), problem, "run fewer pods on the node"));
            return;
        }
        let mut bound = Vec::new();
        let mut first_of = BTreeMap::new();
        let flags = flags_of(link.path);
        let slot = state.slot(link);
        let pod = LocalPodEntry { ifindex: link.ifindex, mac: link.pod_mac, slot, flags };
        for address in &link.addresses {
            if let Some(holder) = state.holder(*address).filter(|holder| *holder != link.ifindex) {
                let problem = format!("{address} is bound to interface {holder}; it is not bound to this one");
                findings.push(error(object.clone(), "addresses".to_owned(), problem, "give each pod its own address"));
                continue;
            }
            let ip = IpBytes::from(*address);
            let pods = tables.local_pods.desired();
            if !pods.contains_key(&ip) && is_full(pods.len(), self.capacity.local_pods) {
                self.links.starved.insert(link.ifindex);
                let problem = format!("no room for {address}; it is reached through the stack");
                findings.push(error(object.clone(), "addresses".to_owned(), problem, "run fewer pods on the node"));
                continue;
            }
            first_of.entry(Family::of(*address)).or_insert(ip);
            bound.push(ip);
            tables.local_pods.want(ip, pod);
        }
        let gateway = |family| link.gateways.iter().find(|ip| Family::of(**ip) == family).map(|ip| IpBytes::from(*ip));
        let or_none = |ip: Option<IpBytes>| ip.unwrap_or(IpBytes::UNSPECIFIED);
        let device = DeviceEntry {
            ip4: or_none(first_of.get(&Family::V4).copied()),
            ip6: or_none(first_of.get(&Family::V6).copied()),
            gateway_ip4: or_none(gateway(Family::V4)),
            gateway_ip6: or_none(gateway(Family::V6)),
            pod_mac: link.pod_mac,
            gateway_mac: link.gateway_mac,
            bridge: link.bridge,
            flags: flags | if state.is_audited(link) { DeviceEntry::AUDITED } else { 0 },
            slot,
            reserved: 0,
            since: 0,
            mtu: link.mtu,
        };
        tables.devices.want(link.ifindex, device);
        self.links.bound.insert(link.ifindex, bound);
    }

    fn compile_device(
        &mut self,
        state: &ClusterState,
        device: &NetDevice,
        tables: &mut TableDeltas,
        findings: &mut Vec<Diagnostic>,
    ) {
        if self.finds_no_room(device.ifindex, tables) {
            let problem = "no room for more interfaces; traffic from outside is not translated there".to_owned();
            findings.push(error(format!("Interface {}", device.name), String::new(), problem, "remove interfaces"));
            return;
        }
        // What leaves there is masqueraded with an address of the device, or of the node.
        let source = |family| {
            let addresses = device.addresses.iter().chain(&state.node().addresses);
            let found = addresses.copied().find(|ip| Family::of(*ip) == family && !ip.is_unspecified());
            found.map_or(IpBytes::UNSPECIFIED, IpBytes::from)
        };
        let entry = DeviceEntry {
            ip4: source(Family::V4),
            ip6: source(Family::V6),
            gateway_ip4: IpBytes::UNSPECIFIED,
            gateway_ip6: IpBytes::UNSPECIFIED,
            pod_mac: device.mac,
            gateway_mac: device.mac,
            bridge: 0,
            flags: if device.attach { DeviceEntry::NETDEV } else { DeviceEntry::PLAIN },
            slot: 0,
            reserved: 0,
            since: 0,
            mtu: device.mtu,
        };
        tables.devices.want(device.ifindex, entry);
    }

    /// Compiles which pods' sockets are translated. Those that find no room are served by their packets.
    pub(super) fn compile_cgroup_pods(&self, state: &ClusterState, tables: &mut TableDeltas) {
        let Some(pods) = state.cgroup_pods() else { return };
        let room = usize::try_from(self.capacity.cgroup_pods).unwrap_or(usize::MAX);
        let wanted: BTreeMap<_, _> = pods.iter().take(room).map(|(id, entry)| (*id, *entry)).collect();
        let gone: Vec<u64> =
            tables.cgroup_pods.desired().keys().filter(|id| !wanted.contains_key(id)).copied().collect();
        for id in gone {
            tables.cgroup_pods.unwant(&id);
        }
        for (id, entry) in wanted {
            tables.cgroup_pods.want(id, entry);
        }
    }

    /// Is there no room for this interface? It is tried again when another one goes.
    fn finds_no_room(&mut self, ifindex: u32, tables: &TableDeltas) -> bool {
        let devices = tables.devices.desired();
        let starved = !devices.contains_key(&ifindex) && is_full(devices.len(), self.capacity.devices);
        if starved {
            self.links.starved.insert(ifindex);
        }
        starved
    }
}

fn is_full(length: usize, capacity: u32) -> bool {
    u32::try_from(length).is_ok_and(|length| length >= capacity)
}

/// Its packets never leave the node, and sockets are translated before they send any.
fn is_loopback(device: &NetDevice) -> bool {
    *device.name == *"lo" || device.addresses.iter().any(IpAddr::is_loopback)
}

const fn flags_of(path: LinkPath) -> u32 {
    match path {
        LinkPath::Redirect => DeviceEntry::REDIRECT | DeviceEntry::SWITCH,
        LinkPath::Switch => DeviceEntry::SWITCH,
        LinkPath::Stack => 0,
    }
}
