//! Pod interfaces and the addresses behind them.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::{DeviceEntry, IpBytes, LocalPodEntry};

use crate::address::Family;
use crate::diagnostic::Diagnostic;
use crate::event::{LinkPath, PodLink};
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
            if state.link(*ifindex).is_none() {
                tables.devices.unwant(ifindex);
            }
        }
        let mut changed = false;
        for ifindex in dirty {
            let mut findings = Vec::new();
            if let Some(link) = state.link(ifindex) {
                self.compile_link(state, link, tables, &mut findings);
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
        let full = |length: usize, capacity: u32| u32::try_from(length).is_ok_and(|length| length >= capacity);
        let devices = tables.devices.desired();
        if !devices.contains_key(&link.ifindex) && full(devices.len(), self.capacity.devices) {
            self.links.starved.insert(link.ifindex);
            let problem = "no room for more interfaces; Services do not work for its pod".to_owned();
            findings.push(error(object, String::new(), problem, "run fewer pods on the node"));
            return;
        }
        let mut bound = Vec::new();
        let mut first_of = BTreeMap::new();
        let flags = flags_of(link.path);
        let pod = LocalPodEntry { ifindex: link.ifindex, mac: link.pod_mac, slot: 0, flags };
        for address in &link.addresses {
            if let Some(holder) = state.holder(*address).filter(|holder| *holder != link.ifindex) {
                let problem = format!("{address} is bound to interface {holder}; it is not bound to this one");
                findings.push(error(object.clone(), "addresses".to_owned(), problem, "give each pod its own address"));
                continue;
            }
            let ip = IpBytes::from(*address);
            if !tables.local_pods.desired().contains_key(&ip)
                && full(tables.local_pods.desired().len(), self.capacity.local_pods)
            {
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
            flags,
            slot: 0,
            reserved: 0,
            since: 0,
            mtu: 0,
        };
        tables.devices.want(link.ifindex, device);
        self.links.bound.insert(link.ifindex, bound);
    }
}

const fn flags_of(path: LinkPath) -> u32 {
    match path {
        LinkPath::Redirect => DeviceEntry::REDIRECT | DeviceEntry::SWITCH,
        LinkPath::Switch => DeviceEntry::SWITCH,
        LinkPath::Stack => 0,
    }
}
