//! The cluster and the node as last reported. Knows what changed; knows nothing of maps.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;

use crate::diagnostic::Diagnostic;
use crate::event::{Event, Listing, NetDevice, Node, PodLink, Source};
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
    findings: BTreeMap<String, Vec<Diagnostic>>,
    listed: BTreeSet<Source>,
    unreadable: bool,
    /// Service → its slices.
    slices_of: BTreeMap<ObjectName, BTreeSet<ObjectName>>,
    /// Cluster address → Services that name it.
    services_at: BTreeMap<IpAddr, BTreeSet<ObjectName>>,
    /// Pod address → interfaces that have it; the first one holds it.
    links_at: BTreeMap<IpAddr, BTreeSet<u32>>,
    /// Address of a bridge → interfaces whose pods have it for a gateway.
    gateway_of: BTreeMap<IpAddr, BTreeSet<u32>>,
}

/// What an event changed: the objects whose meaning may now be another. Empty when the event said nothing new.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changed {
    /// Services, by their own change or that of a slice, an address or the node.
    pub services: BTreeSet<ObjectName>,
    /// Interfaces.
    pub links: BTreeSet<u32>,
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

    /// The interface that holds a pod address: the lowest index of those that have it, which is the oldest.
    pub fn holder(&self, address: IpAddr) -> Option<u32> {
        self.links_at.get(&address).and_then(BTreeSet::first).copied()
    }

    /// Is it an address of this node: one that the Node object names, or that of a bridge?
    pub fn is_of_node(&self, address: IpAddr) -> bool {
        self.node.addresses.contains(&address) || self.gateway_of.contains_key(&address)
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
            Event::Device(device) => {
                self.devices.insert(device.ifindex, device);
            }
            Event::DeviceGone(ifindex) => {
                self.devices.remove(&ifindex);
            }
            Event::ServiceCidr(name, ranges) => {
                self.service_cidrs.insert(name, ranges);
            }
            Event::ServiceCidrGone(name) => {
                self.service_cidrs.remove(&name);
            }
            Event::Diagnostics { object, findings } => self.set_findings(&object, findings, &mut changed),
            Event::Unreadable(unreadable) => {
                changed.readable = self.unreadable && !unreadable;
                self.unreadable = unreadable;
            }
            Event::Listed(source, listing) => self.list(source, &listing, &mut changed),
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
        }
        changed.services.insert(service.name.clone());
        self.services.insert(service.name.clone(), service);
    }

    fn remove_service(&mut self, name: &ObjectName, changed: &mut Changed) {
        let Some(service) = self.services.remove(name) else { return };
        for ip in &service.cluster_ips {
            unindex(&mut self.services_at, ip, name);
        }
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
        } else {
            let old: BTreeSet<_> = old.addresses.into_iter().collect();
            let new: BTreeSet<_> = self.node.addresses.iter().copied().collect();
            for address in old.symmetric_difference(&new) {
                self.touch_services(*address, changed);
            }
        }
    }

    fn set_link(&mut self, link: PodLink, changed: &mut Changed) {
        if self.links.get(&link.ifindex) == Some(&link) {
            return;
        }
        self.remove_link(link.ifindex, changed);
        for address in &link.addresses {
            self.links_at.entry(*address).or_default().insert(link.ifindex);
            self.touch_address(*address, changed);
        }
        for gateway in &link.gateways {
            self.gateway_of.entry(*gateway).or_default().insert(link.ifindex);
            self.touch_services(*gateway, changed);
        }
        changed.links.insert(link.ifindex);
        self.links.insert(link.ifindex, link);
    }

    fn remove_link(&mut self, ifindex: u32, changed: &mut Changed) {
        let Some(link) = self.links.remove(&ifindex) else { return };
        for address in &link.addresses {
            self.touch_address(*address, changed);
            unindex(&mut self.links_at, address, &ifindex);
        }
        for gateway in &link.gateways {
            self.touch_services(*gateway, changed);
            unindex(&mut self.gateway_of, gateway, &ifindex);
        }
        changed.links.insert(ifindex);
    }

    /// A pod got or lost this address: its other claimants and the Services at this address may mean another thing.
    fn touch_address(&self, address: IpAddr, changed: &mut Changed) {
        changed.links.extend(self.links_at.get(&address).into_iter().flatten());
        self.touch_services(address, changed);
    }

    fn touch_services(&self, address: IpAddr, changed: &mut Changed) {
        changed.services.extend(self.services_at.get(&address).into_iter().flatten().cloned());
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
            }
            (Source::Node, Listing::Node) => {}
            // A listing of another kind says nothing about this source: it stays unlisted, and nothing goes.
            (Source::ServiceCidrs, Listing::ServiceCidrs(named)) => {
                self.service_cidrs.retain(|name, _| named.contains(name));
            }
            (Source::Services | Source::EndpointSlices, _)
            | (Source::Links | Source::Node | Source::ServiceCidrs, _) => return,
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
