//! The cluster and the node as last reported. Knows what changed; knows nothing of maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_abi::{CgroupPodEntry, DeviceEntry};

use crate::diagnostic::Diagnostic;
use crate::event::{Enforcement, Event, Listing, NetDevice, Node, PodLink, Source};
use crate::name::ObjectName;
use crate::service::{EndpointSlice, Service};

/// Current state of everything the proxy follows, with the indexes that make one change cost one object's work.
#[derive(Clone, Debug, Default)]
pub struct ClusterState {
    services: BTreeMap<ObjectName, Service>,
    slices: BTreeMap<ObjectName, EndpointSlice>,
    node: Node,
    links: BTreeMap<u32, PodLink>,
    devices: BTreeMap<u32, NetDevice>,
    service_cidrs: BTreeMap<Arc<str>, Vec<IpNet>>,
    enforcement: Enforcement,
    cgroup_pods: Option<BTreeMap<u64, CgroupPodEntry>>,
    findings: BTreeMap<String, Vec<Diagnostic>>,
    listed: BTreeSet<Source>,
    unreadable: bool,
    /// Service → its slices.
    slices_of: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    /// Cluster address → Services that name it.
    services_at: BTreeMap<IpAddr, BTreeSet<ObjectName>>,
    /// External address or that of a load balancer → Services that name it.
    outside_at: BTreeMap<IpAddr, BTreeSet<ObjectName>>,
    /// Services that let in only some sources.
    ranged: BTreeSet<ObjectName>,
    /// Pod address → interfaces that have it; the first one holds it.
    links_at: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// Address of a bridge → interfaces whose pods have it for a gateway.
    gateway_of: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// Address of another interface → those that have it.
    devices_at: BTreeMap<IpAddr, BTreeSet<u32>>,
}

/// What an event changed: the objects whose meaning may now be another. Empty when the event said nothing new.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each says that one kind of thing changed; any may be together")]
pub struct Changed {
    /// Services, by their own change or that of a slice, an address or the node.
    pub services: BTreeSet<ObjectName>,
    /// Interfaces, pods' and others.
    pub links: BTreeSet<u32>,
    /// Addresses of the node.
    pub addresses: bool,
    /// Address ranges: of Services, of this node's pods.
    pub ranges: bool,
    /// Pods whose sockets are translated.
    pub cgroup_pods: bool,
    /// Findings of the sources.
    pub findings: bool,
    /// A source has been listed for the first time.
    pub listed: bool,
    /// Everything can be read by now: what was held back is to be compiled.
    pub readable: bool,
}

impl Changed {
    /// Nothing changed.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Both.
    pub fn merge(&mut self, other: Self) {
        self.services.extend(other.services);
        self.links.extend(other.links);
        self.addresses |= other.addresses;
        self.ranges |= other.ranges;
        self.cgroup_pods |= other.cgroup_pods;
        self.findings |= other.findings;
        self.listed |= other.listed;
        self.readable |= other.readable;
    }
}

// === reading ===

impl ClusterState {
    /// Every source has been listed in full once. Before that, what is missing is unknown, not absent.
    pub fn synced(&self) -> bool {
        Source::ALL.iter().all(|source| self.listed.contains(source))
    }

    /// Sources that have not been listed yet.
    pub fn missing(&self) -> impl Iterator<Item = Source> {
        Source::ALL.into_iter().filter(|source| !self.listed.contains(source))
    }

    /// Some objects cannot be read and never could be: what is missing may be among them.
    pub const fn unreadable(&self) -> bool {
        self.unreadable
    }

    /// A Service.
    pub fn service(&self, name: &ObjectName) -> Option<&Service> {
        self.services.get(name)
    }

    /// All Services.
    pub fn services(&self) -> impl Iterator<Item = &Service> {
        self.services.values()
    }

    /// Slices of a Service, in the order of their names.
    pub fn slices_of(&self, service: &ObjectName) -> impl Iterator<Item = &EndpointSlice> + Clone {
        self.slices_of.get(service).into_iter().flatten().filter_map(|name| self.slices.get(name))
    }

    /// All slices.
    pub fn slices(&self) -> impl Iterator<Item = &EndpointSlice> {
        self.slices.values()
    }

    /// This node.
    pub const fn node(&self) -> &Node {
        &self.node
    }

    /// A pod interface.
    pub fn link(&self, ifindex: u32) -> Option<&PodLink> {
        self.links.get(&ifindex)
    }

    /// All pod interfaces.
    pub fn links(&self) -> impl Iterator<Item = &PodLink> {
        self.links.values()
    }

    /// Does a pod interface name its slot only so that its flows are audited?
    pub fn is_audited(&self, link: &PodLink) -> bool {
        matches!(self.enforcement, Enforcement::Audited(_)) && self.slot(link) != 0
    }

    /// The policy slot that a pod interface is to name: 0 without policies, [`DeviceEntry::HELD`] as long as nobody knows
    /// what its pod may do.
    pub fn slot(&self, link: &PodLink) -> u16 {
        match &self.enforcement {
            Enforcement::Off => 0,
            Enforcement::Audited(slots) => link.pod.as_ref().and_then(|uid| slots.get(uid)).copied().unwrap_or(0),
            Enforcement::On(slots) => {
                link.pod.as_ref().and_then(|uid| slots.get(uid)).copied().unwrap_or(DeviceEntry::HELD)
            }
        }
    }

    /// The interface that holds a pod address: the lowest index of those that have it, which is the oldest.
    pub fn holder(&self, address: IpAddr) -> Option<u32> {
        self.links_at.get(&address).and_then(BTreeSet::first).copied()
    }

    /// An interface that is not a pod's.
    pub fn device(&self, ifindex: u32) -> Option<&NetDevice> {
        self.devices.get(&ifindex)
    }

    /// All interfaces that are not pods'.
    pub fn devices(&self) -> impl Iterator<Item = &NetDevice> {
        self.devices.values()
    }

    /// Is it an address of this node: one that the Node object names, or that of a pods' bridge?
    ///
    /// Not those of other interfaces: kube-proxy in IPVS mode, and a DNS cache of the node, put cluster addresses on
    /// interfaces of their own.
    pub fn is_of_node(&self, address: IpAddr) -> bool {
        self.node.addresses.contains(&address) || self.gateway_of.contains_key(&address)
    }

    /// As [`Self::is_of_node`], or the address of any interface of the node that is not a pod's.
    pub fn is_on_node(&self, address: IpAddr) -> bool {
        self.is_of_node(address) || self.devices_at.contains_key(&address)
    }

    /// All of them, each once.
    pub fn node_addresses(&self) -> BTreeSet<IpAddr> {
        let named = self.node.addresses.iter();
        named.chain(self.gateway_of.keys()).chain(self.devices_at.keys()).copied().collect()
    }

    /// A Service that has this cluster address.
    pub fn cluster_address_of(&self, address: IpAddr) -> Option<&ObjectName> {
        self.services_at.get(&address).and_then(BTreeSet::first)
    }

    /// All ranges that cluster addresses are taken from, by the name of their ServiceCIDR.
    pub fn service_cidrs(&self) -> impl Iterator<Item = (&Arc<str>, &[IpNet])> {
        self.service_cidrs.iter().map(|(name, ranges)| (name, ranges.as_slice()))
    }

    /// Pods whose sockets are translated, by cgroup; `None` = not known yet.
    pub const fn cgroup_pods(&self) -> Option<&BTreeMap<u64, CgroupPodEntry>> {
        self.cgroup_pods.as_ref()
    }

    /// Number of Services, and of slices.
    pub fn counts(&self) -> (usize, usize) {
        (self.services.len(), self.slices.len())
    }

    /// Findings of the sources, by object.
    pub fn findings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.findings.values().flatten()
    }
}

// === changing ===

impl ClusterState {
    /// Takes an event in and tells what it changed.
    pub fn apply(&mut self, event: Event) -> Changed {
        let mut changed = Changed::default();
        match event {
            Event::Service(service) => self.set_service(service, &mut changed),
            Event::ServiceGone(name) => self.remove_service(&name, &mut changed),
            Event::Slice(slice) => self.set_slice(slice, &mut changed),
            Event::SliceGone(name) => self.remove_slice(&name, &mut changed),
            Event::Node(node) => self.set_node(node, &mut changed),
            Event::Link(link) => self.set_link(link, &mut changed),
            Event::LinkGone(ifindex) => self.remove_link(ifindex, &mut changed),
            Event::Device(device) => self.set_device(device, &mut changed),
            Event::DeviceGone(ifindex) => self.remove_device(ifindex, &mut changed),
            Event::ServiceCidr(name, ranges) => self.set_service_cidr(name, ranges, &mut changed),
            Event::ServiceCidrGone(name) => self.remove_service_cidr(&name, &mut changed),
            Event::Diagnostics { object, findings } => self.set_findings(&object, findings, &mut changed),
            Event::Unreadable(unreadable) => {
                changed.readable = self.unreadable && !unreadable;
                self.unreadable = unreadable;
            }
            Event::Listed(source, listing) => self.list(source, &listing, &mut changed),
            Event::Enforcement(enforcement) => self.set_enforcement(enforcement, &mut changed),
            Event::CgroupPods(pods) => {
                changed.cgroup_pods = self.cgroup_pods.as_ref() != Some(&pods);
                self.cgroup_pods = Some(pods);
            }
            Event::NetworkPolicy(_) | Event::NetworkPolicyListed(_) => {}
        }
        changed
    }

    fn set_service(&mut self, service: Service, changed: &mut Changed) {
        if self.services.get(&service.name) == Some(&service) {
            return;
        }
        self.remove_service(&service.name, changed);
        for ip in &service.cluster_ips {
            self.services_at.entry(*ip).or_default().insert(service.name.clone());
            self.touch_outside(*ip, changed);
        }
        for ip in service.external_ips.iter().chain(&service.load_balancer_ips) {
            self.outside_at.entry(*ip).or_default().insert(service.name.clone());
        }
        if !service.source_ranges.is_empty() {
            self.ranged.insert(service.name.clone());
        }
        changed.services.insert(service.name.clone());
        self.services.insert(service.name.clone(), service);
    }

    fn remove_service(&mut self, name: &ObjectName, changed: &mut Changed) {
        let Some(service) = self.services.remove(name) else { return };
        for ip in &service.cluster_ips {
            unindex(&mut self.services_at, ip, name);
            self.touch_outside(*ip, changed);
        }
        for ip in service.external_ips.iter().chain(&service.load_balancer_ips) {
            unindex(&mut self.outside_at, ip, name);
        }
        self.ranged.remove(name);
        changed.services.insert(service.name);
    }

    fn set_slice(&mut self, slice: EndpointSlice, changed: &mut Changed) {
        if self.slices.get(&slice.name) == Some(&slice) {
            return;
        }
        self.remove_slice(&slice.name, changed);
        self.slices_of.entry(slice.service.clone()).or_default().insert(slice.name.clone());
        changed.services.insert(slice.service.clone());
        self.slices.insert(slice.name.clone(), slice);
    }

    fn remove_slice(&mut self, name: &ObjectName, changed: &mut Changed) {
        let Some(slice) = self.slices.remove(name) else { return };
        unindex(&mut self.slices_of, &slice.service, name);
        changed.services.insert(slice.service);
    }

    fn set_node(&mut self, node: Node, changed: &mut Changed) {
        let old = std::mem::replace(&mut self.node, node);
        if old.name != self.node.name || old.zone != self.node.zone {
            // Which endpoints are local, and which hints apply, may be another for every Service.
            changed.services.extend(self.services.keys().cloned());
        }
        if old.addresses != self.node.addresses {
            // Their order matters too: the first one is primary.
            changed.addresses = true;
            changed.links.extend(self.devices.keys());
            let before: BTreeSet<_> = old.addresses.into_iter().collect();
            let after: BTreeSet<_> = self.node.addresses.iter().copied().collect();
            for address in before.symmetric_difference(&after) {
                self.touch_services(*address, changed);
                self.touch_ranged(*address, changed);
            }
        }
        if old.pod_cidrs != self.node.pod_cidrs {
            changed.ranges = true;
            for range in old.pod_cidrs.iter().chain(&self.node.pod_cidrs) {
                self.touch_outside_in(range, changed);
            }
        }
    }

    fn set_link(&mut self, link: PodLink, changed: &mut Changed) {
        let ifindex = link.ifindex;
        let old = self.links.get(&ifindex);
        if old == Some(&link) {
            return;
        }
        let gateways = old.into_iter().flat_map(|old| &old.gateways).chain(&link.gateways).copied();
        let before: BTreeMap<IpAddr, bool> = gateways.map(|ip| (ip, self.gateway_of.contains_key(&ip))).collect();
        self.unindex_link(ifindex, changed);
        for address in &link.addresses {
            self.links_at.entry(*address).or_default().insert(ifindex);
            self.touch_address(*address, changed);
        }
        for gateway in &link.gateways {
            self.gateway_of.entry(*gateway).or_default().insert(ifindex);
        }
        for (gateway, known) in before {
            if known != self.gateway_of.contains_key(&gateway) {
                self.touch_node_address(gateway, changed);
            }
        }
        changed.links.insert(ifindex);
        self.links.insert(ifindex, link);
    }

    fn remove_link(&mut self, ifindex: u32, changed: &mut Changed) {
        let gateways = self.links.get(&ifindex).map(|link| link.gateways.clone()).unwrap_or_default();
        if self.unindex_link(ifindex, changed) {
            changed.links.insert(ifindex);
        }
        for gateway in gateways {
            if !self.gateway_of.contains_key(&gateway) {
                self.touch_node_address(gateway, changed);
            }
        }
    }

    /// Takes an interface out of the indexes of addresses. True when it was there.
    fn unindex_link(&mut self, ifindex: u32, changed: &mut Changed) -> bool {
        let Some(link) = self.links.remove(&ifindex) else { return false };
        for address in &link.addresses {
            self.touch_address(*address, changed);
            unindex(&mut self.links_at, address, &ifindex);
        }
        for gateway in &link.gateways {
            unindex(&mut self.gateway_of, gateway, &ifindex);
        }
        true
    }

    fn set_device(&mut self, device: NetDevice, changed: &mut Changed) {
        let ifindex = device.ifindex;
        if self.devices.get(&ifindex) == Some(&device) {
            return;
        }
        self.move_device(ifindex, &device.addresses, changed);
        self.devices.insert(ifindex, device);
        changed.links.insert(ifindex);
    }

    fn remove_device(&mut self, ifindex: u32, changed: &mut Changed) {
        self.move_device(ifindex, &[], changed);
        if self.devices.remove(&ifindex).is_some() {
            changed.links.insert(ifindex);
        }
    }

    /// Gives an interface that is not a pod's other addresses in the index.
    fn move_device(&mut self, ifindex: u32, addresses: &[IpAddr], changed: &mut Changed) {
        let old: BTreeSet<IpAddr> =
            self.devices.get(&ifindex).into_iter().flat_map(|device| &device.addresses).copied().collect();
        let new: BTreeSet<IpAddr> = addresses.iter().copied().collect();
        for gone in old.difference(&new) {
            unindex(&mut self.devices_at, gone, &ifindex);
            self.touch_node_address(*gone, changed);
        }
        for come in new.difference(&old) {
            self.devices_at.entry(*come).or_default().insert(ifindex);
            self.touch_node_address(*come, changed);
        }
    }

    fn set_service_cidr(&mut self, name: Arc<str>, ranges: Vec<IpNet>, changed: &mut Changed) {
        if self.service_cidrs.get(&name) == Some(&ranges) {
            return;
        }
        self.remove_service_cidr(&name, changed);
        changed.ranges = true;
        for range in &ranges {
            self.touch_outside_in(range, changed);
        }
        self.service_cidrs.insert(name, ranges);
    }

    fn remove_service_cidr(&mut self, name: &str, changed: &mut Changed) {
        let Some(ranges) = self.service_cidrs.remove(name) else { return };
        changed.ranges = true;
        for range in &ranges {
            self.touch_outside_in(range, changed);
        }
    }

    fn set_enforcement(&mut self, enforcement: Enforcement, changed: &mut Changed) {
        if self.enforcement == enforcement {
            return;
        }
        let now = |state: &Self, link: &PodLink| (state.slot(link), state.is_audited(link));
        let before: Vec<_> = self.links.values().map(|link| (link.ifindex, now(self, link))).collect();
        self.enforcement = enforcement;
        let differs =
            |(ifindex, was): &(u32, (u16, bool))| self.links.get(ifindex).map(|link| now(self, link)) != Some(*was);
        changed.links.extend(before.into_iter().filter(differs).map(|(ifindex, _)| ifindex));
    }

    /// A pod got or lost this address: its other claimants and the Services at this address may mean another thing.
    fn touch_address(&self, address: IpAddr, changed: &mut Changed) {
        changed.links.extend(self.links_at.get(&address).into_iter().flatten());
        self.touch_services(address, changed);
    }

    /// The node got or lost this address.
    fn touch_node_address(&self, address: IpAddr, changed: &mut Changed) {
        changed.addresses = true;
        self.touch_services(address, changed);
    }

    /// Services at this address.
    fn touch_services(&self, address: IpAddr, changed: &mut Changed) {
        changed.services.extend(self.services_at.get(&address).into_iter().flatten().cloned());
        self.touch_outside(address, changed);
    }

    /// Services that are reached from outside by this address.
    fn touch_outside(&self, address: IpAddr, changed: &mut Changed) {
        changed.services.extend(self.outside_at.get(&address).into_iter().flatten().cloned());
    }

    /// The same for a range.
    fn touch_outside_in(&self, range: &IpNet, changed: &mut Changed) {
        let within = self.outside_at.range(range.network()..=range.broadcast());
        changed.services.extend(within.flat_map(|(_, names)| names).cloned());
    }

    /// Services that let in some sources, this address among them.
    fn touch_ranged(&self, address: IpAddr, changed: &mut Changed) {
        let allows = |name: &&ObjectName| {
            let service = self.services.get(*name);
            service.is_some_and(|service| service.source_ranges.iter().any(|range| range.contains(&address)))
        };
        changed.services.extend(self.ranged.iter().filter(allows).cloned());
    }

    fn set_findings(&mut self, object: &str, findings: Vec<Diagnostic>, changed: &mut Changed) {
        let old = if findings.is_empty() {
            self.findings.remove(object)
        } else {
            self.findings.insert(object.to_owned(), findings)
        };
        changed.findings |= old.as_ref() != self.findings.get(object);
    }

    fn list(&mut self, source: Source, listing: &Listing, changed: &mut Changed) {
        match (source, listing) {
            (Source::Services, Listing::Objects(named)) => {
                let gone: Vec<_> = self.services.keys().filter(|name| !named.contains(*name)).cloned().collect();
                for name in gone {
                    self.remove_service(&name, changed);
                }
            }
            (Source::EndpointSlices, Listing::Objects(named)) => {
                let gone: Vec<_> = self.slices.keys().filter(|name| !named.contains(*name)).cloned().collect();
                for name in gone {
                    self.remove_slice(&name, changed);
                }
            }
            (Source::Links, Listing::Links(named)) => {
                let gone: Vec<_> = self.links.keys().filter(|index| !named.contains(*index)).copied().collect();
                for ifindex in gone {
                    self.remove_link(ifindex, changed);
                }
                let gone: Vec<_> = self.devices.keys().filter(|index| !named.contains(*index)).copied().collect();
                for ifindex in gone {
                    self.remove_device(ifindex, changed);
                }
            }
            (Source::Node, Listing::Node) => {}
            (Source::ServiceCidrs, Listing::ServiceCidrs(named)) => {
                let gone: Vec<_> = self.service_cidrs.keys().filter(|name| !named.contains(*name)).cloned().collect();
                for name in gone {
                    self.remove_service_cidr(&name, changed);
                }
            }
            // A listing of another kind says nothing about this source: it stays unlisted, and nothing goes.
            (Source::Services | Source::EndpointSlices | Source::Links | Source::Node | Source::ServiceCidrs, _) => {
                return;
            }
        }
        changed.listed |= self.listed.insert(source);
    }
}

/// Takes one member out of an index, and the key with its last member.
fn unindex<K: Ord, V: Ord>(index: &mut BTreeMap<K, BTreeSet<V>>, key: &K, member: &V) {
    if let Some(members) = index.get_mut(key) {
        members.remove(member);
        if members.is_empty() {
            index.remove(key);
        }
    }
}
