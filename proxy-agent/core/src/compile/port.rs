//! One service port: its id, its backends, its frontends.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use proxy_abi::{BackendEntry, FrontendEntry, FrontendKey, IpBytes, NameBytes, PortBe, Proto, ServiceEntry};

use crate::address::Family;
use crate::diagnostic::Diagnostic;
use crate::ids::SlotRange;
use crate::name::{ObjectName, ServicePortName};
use crate::plan::TableDeltas;
use crate::select::{Locality, Target, select};
use crate::service::{Protocol, Service, ServicePort};
use crate::state::ClusterState;

use super::{Compiler, Pools, cluster_address_fault, error};

/// What a backend is within its service port.
pub(super) type BackendKey = (IpBytes, PortBe, Proto);

/// What a service port was compiled to; the rest is in the desired rows under these numbers.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) id: u32,
    pub(super) backends: BTreeMap<BackendKey, u32>,
    pub(super) frontends: BTreeSet<FrontendKey>,
}

/// A service port and where it stands.
pub(super) struct Place<'a> {
    pub(super) state: &'a ClusterState,
    pub(super) service: &'a Service,
    pub(super) index: usize,
    pub(super) port: &'a ServicePort,
}

/// A frontend that the port may have, and the endpoints of its family.
struct Wanted {
    key: FrontendKey,
    targets: Vec<Target>,
}

/// What there is no room for.
#[derive(Clone, Copy, Debug)]
struct Exhausted(&'static str);

/// Numbers taken from the pools for one port; given back as a whole when one is missing.
#[derive(Default)]
struct Grant {
    service: Option<u32>,
    backends: Vec<u32>,
    ranges: Vec<SlotRange>,
}

/// A port as it shall be: complete before the first row is touched.
struct Draft {
    port: Port,
    /// Selected backends of each frontend, and its new range when they changed (`None`: no slots).
    frontends: BTreeMap<FrontendKey, Slots>,
    local: BTreeSet<u32>,
}

enum Slots {
    Kept,
    Changed(Vec<u32>, Option<SlotRange>),
}

impl Place<'_> {
    fn name(&self) -> ServicePortName {
        ServicePortName { service: self.service.name.clone(), port: Arc::clone(&self.port.name) }
    }

    fn finding(&self, field: &str, problem: String, fix: &str) -> Diagnostic {
        let field = if field.is_empty() {
            format!("spec.ports[{}]", self.index)
        } else {
            format!("spec.ports[{}].{field}", self.index)
        };
        error(format!("Service {}", self.service.name), field, problem, fix)
    }

    fn keys(&self) -> BTreeMap<FrontendKey, IpAddr> {
        keys(self.service, self.port).collect()
    }
}

/// The frontends that a port asks for, with their addresses.
fn keys(service: &Service, port: &ServicePort) -> impl Iterator<Item = (FrontendKey, IpAddr)> {
    let (number, proto) = (PortBe::new(port.port.get()), port.protocol.number());
    let scope = FrontendKey::SCOPE_CLUSTER;
    service.cluster_ips.iter().map(move |ip| (FrontendKey { ip: IpBytes::from(*ip), port: number, proto, scope }, *ip))
}

impl Compiler {
    /// Frees the frontends that a Service no longer asks for, without touching a row. All that changed do so before the
    /// first of them is compiled: then two that exchange frontends find them free and never lose theirs, nor their ids.
    pub(super) fn leave_frontends(&mut self, state: &ClusterState, name: &ObjectName, tables: &mut TableDeltas) {
        let service = state.service(name);
        let mut left = Vec::new();
        for (port, compiled) in self.services.get(name).into_iter().flatten() {
            let wanted = service.and_then(|service| Some((service, service.ports.iter().find(|p| p.name == *port)?)));
            let wanted: BTreeSet<_> = wanted.into_iter().flat_map(|(s, p)| keys(s, p)).map(|(key, _)| key).collect();
            let own = |holder: &ServicePortName| holder.service == *name && holder.port == *port;
            let held = compiled.frontends.difference(&wanted).filter(|key| self.claims.holder(key).is_some_and(own));
            left.extend(held.copied());
        }
        for key in left {
            self.release_claim(&key, tables);
        }
    }

    /// Compiles one port from what it was. `None` when it has no frontend.
    pub(super) fn compile_port(
        &mut self,
        place: &Place<'_>,
        old: Option<Port>,
        tables: &mut TableDeltas,
        findings: &mut Vec<Diagnostic>,
    ) -> Option<Port> {
        let name = place.name();
        let wanted = self.wanted(place, &name, findings);
        let Some(entry) = service_entry(&name).filter(|_| !wanted.is_empty()) else {
            if !wanted.is_empty() {
                let problem = format!("{name} is longer than 144 bytes; the port is not served");
                findings.push(place.finding("name", problem, "shorten the names"));
            }
            if let Some(old) = old {
                self.retire_port(&name, &old, tables);
            }
            return None;
        };
        match self.draft(old.as_ref(), &wanted, tables) {
            Ok(draft) => Some(self.commit(&name, entry, old, draft, tables)),
            Err(Exhausted(what)) => {
                self.starved.insert(name.service.clone());
                let kept = if old.is_some() { "the port stays as it was" } else { "the port is not served" };
                let problem = format!("no room for more {what}; {kept}");
                findings.push(place.finding("", problem, "remove Services or endpoints, or raise the capacity"));
                for key in old.iter().flat_map(|old| &old.frontends) {
                    if self.claims.holder(key).is_none() {
                        self.claim(*key, &name, tables);
                    }
                }
                old
            }
        }
    }

    /// Deletes everything of a port.
    pub(super) fn retire_port(&mut self, name: &ServicePortName, port: &Port, tables: &mut TableDeltas) {
        for key in &port.frontends {
            self.retire_frontend(name, key, tables);
        }
        for id in port.backends.values() {
            tables.backends.unwant(id);
            self.retired.backend(*id);
        }
        tables.services.unwant(&port.id);
        self.retired.service(port.id);
    }

    /// Deletes a frontend, unless it has passed to another service port by now.
    fn retire_frontend(&mut self, name: &ServicePortName, key: &FrontendKey, tables: &mut TableDeltas) {
        if self.claims.holder(key).is_some_and(|holder| holder != name) {
            return;
        }
        if let Some(range) = tables.frontends.desired().get(key).and_then(range_of) {
            self.retired.range(*key, range);
        }
        tables.frontends.unwant(key);
        self.release_claim(key, tables);
    }

    /// The frontends that the port may have.
    fn wanted(&mut self, place: &Place<'_>, name: &ServicePortName, findings: &mut Vec<Diagnostic>) -> Vec<Wanted> {
        match place.port.protocol {
            Protocol::Tcp | Protocol::Udp => {}
            Protocol::Sctp => {
                let problem = "SCTP is not supported; the port is not served".to_owned();
                findings.push(place.finding("protocol", problem, "use TCP or UDP"));
                return Vec::new();
            }
        }
        let mut wanted = Vec::new();
        for (key, ip) in place.keys() {
            if cluster_address_fault(place.state, ip).is_some() {
                continue;
            }
            if let Some(holder) = self.claims.holder(&key).filter(|holder| *holder != name) {
                let problem = format!(
                    "{ip} port {}/{} belongs to Service {holder}; the port is not served there",
                    place.port.port, key.proto
                );
                findings.push(place.finding("port", problem, "use another address or port, or delete the other one"));
                self.claims.wait(key, &name.service);
                continue;
            }
            let node = place.state.node();
            let here = Locality { node: &node.name, zone: node.zone.as_deref() };
            let slices = place.state.slices_of(&place.service.name);
            wanted.push(Wanted { key, targets: select(slices, place.port, Family::of(ip), here) });
        }
        wanted
    }

    /// Takes all numbers that the port needs, or none.
    fn draft(&mut self, old: Option<&Port>, wanted: &[Wanted], tables: &TableDeltas) -> Result<Draft, Exhausted> {
        let fresh = wanted.iter().filter(|w| self.claims.holder(&w.key).is_none()).count();
        // Each may need a mark of its own.
        let most = self.claims.len() + 2 * fresh;
        if fresh > 0 && u32::try_from(most).is_ok_and(|most| most > self.capacity.frontends) {
            return Err(Exhausted("frontends"));
        }
        let mut grant = Grant::default();
        let draft = grant.draft(&mut self.pools, old, wanted, tables);
        if draft.is_err() {
            grant.give_back(&mut self.pools);
        }
        draft
    }

    /// Writes the desired rows of a port and lets go of what it was.
    fn commit(
        &mut self,
        name: &ServicePortName,
        entry: ServiceEntry,
        old: Option<Port>,
        draft: Draft,
        tables: &mut TableDeltas,
    ) -> Port {
        let Draft { port, frontends, local } = draft;
        tables.services.want(port.id, entry);
        for (key, id) in &port.backends {
            let generation = match tables.backends.desired().get(id) {
                Some(entry) => entry.generation,
                None => self.pools.generations.next(),
            };
            // Only `flags` ever changes in place, and no program reads it together with another field.
            let flags = if local.contains(id) { BackendEntry::LOCAL } else { 0 };
            let (ip, to, proto) = *key;
            let entry = BackendEntry { ip, service: port.id, generation, port: to, proto, reserved: 0, flags };
            tables.backends.want(*id, entry);
        }
        for (key, slots) in frontends {
            self.point(key, port.id, &slots, tables);
            self.claim(key, name, tables);
        }
        if let Some(old) = old {
            for key in old.frontends.difference(&port.frontends) {
                self.retire_frontend(name, key, tables);
            }
            for (_, id) in old.backends.iter().filter(|(key, _)| !port.backends.contains_key(*key)) {
                tables.backends.unwant(id);
                self.retired.backend(*id);
            }
        }
        port
    }

    /// Points a frontend at its slots.
    fn point(&mut self, key: FrontendKey, service: u32, slots: &Slots, tables: &mut TableDeltas) {
        let current = tables.frontends.desired().get(&key).copied();
        let range = match slots {
            Slots::Kept => current.as_ref().and_then(range_of),
            Slots::Changed(backends, range) => {
                if let Some(old) = current.as_ref().and_then(range_of) {
                    self.retired.range(key, old);
                }
                for (slot, backend) in range.iter().flat_map(|range| range.slots()).zip(backends) {
                    tables.slots.want(slot, *backend);
                }
                *range
            }
        };
        let (first, count) = range.map_or((0, 0), |range| (range.first, range.count));
        let same = FrontendEntry { first, count, service, flags: 0, affinity_seconds: 0, generation: 0 };
        // Counted on from what the dataplane may hold, so that a frontend that passes from one Service to another
        // changes its generation too.
        let seen = current.iter().chain(tables.frontends.possible(&key)).map(|entry| entry.generation).max();
        let generation = match current {
            Some(entry) if FrontendEntry { generation: 0, ..entry } == same => entry.generation,
            _ => seen.unwrap_or(0).checked_add(1).unwrap_or(1),
        };
        tables.frontends.want(key, FrontendEntry { generation, ..same });
    }
}

impl Grant {
    fn draft(
        &mut self,
        pools: &mut Pools,
        old: Option<&Port>,
        wanted: &[Wanted],
        tables: &TableDeltas,
    ) -> Result<Draft, Exhausted> {
        let id = match old {
            Some(old) => old.id,
            None => *self.service.insert(pools.services.allocate().ok_or(Exhausted("service ports"))?),
        };
        let mut backends = BTreeMap::new();
        let mut frontends = BTreeMap::new();
        let mut local = BTreeSet::new();
        for Wanted { key, targets } in wanted {
            let mut selected = Vec::new();
            for target in targets {
                let backend = (IpBytes::from(target.address), PortBe::new(target.port.get()), key.proto);
                let known = backends.get(&backend).or_else(|| old.and_then(|old| old.backends.get(&backend)));
                let id = match known.copied() {
                    Some(id) => id,
                    None => self.backend(pools)?,
                };
                backends.insert(backend, id);
                if target.local {
                    local.insert(id);
                }
                if target.cluster {
                    selected.push(id);
                }
            }
            let held = old.is_some_and(|old| old.frontends.contains(key));
            let slots = match tables.frontends.desired().get(key).filter(|_| held) {
                Some(entry) if leads_to(entry, &selected, tables) => Slots::Kept,
                Some(_) | None => {
                    let range = self.range(pools, selected.len())?;
                    Slots::Changed(selected, range)
                }
            };
            frontends.insert(*key, slots);
        }
        let port = Port { id, backends, frontends: frontends.keys().copied().collect() };
        Ok(Draft { port, frontends, local })
    }

    fn backend(&mut self, pools: &mut Pools) -> Result<u32, Exhausted> {
        let id = pools.backends.allocate().ok_or(Exhausted("backends"))?;
        self.backends.push(id);
        Ok(id)
    }

    fn range(&mut self, pools: &mut Pools, length: usize) -> Result<Option<SlotRange>, Exhausted> {
        if length == 0 {
            return Ok(None);
        }
        let range = u32::try_from(length).ok().and_then(|count| pools.slots.allocate(count));
        let range = range.ok_or(Exhausted("slots"))?;
        self.ranges.push(range);
        Ok(Some(range))
    }

    fn give_back(self, pools: &mut Pools) {
        self.service.into_iter().for_each(|id| pools.services.give_back(id));
        self.backends.into_iter().for_each(|id| pools.backends.give_back(id));
        self.ranges.into_iter().for_each(|range| pools.slots.give_back(range));
    }
}

/// The range of a frontend that has one.
pub(super) fn range_of(entry: &FrontendEntry) -> Option<SlotRange> {
    (entry.count > 0).then_some(SlotRange { first: entry.first, count: entry.count })
}

/// Does the frontend lead to exactly these backends, in whatever order?
fn leads_to(entry: &FrontendEntry, backends: &[u32], tables: &TableDeltas) -> bool {
    let Some(range) = range_of(entry) else { return backends.is_empty() };
    if usize::try_from(range.count).is_ok_and(|count| count != backends.len()) {
        return false;
    }
    let mut current: Vec<u32> = tables.slots.desired().range(range.slots()).map(|(_, id)| *id).collect();
    let mut wanted = backends.to_vec();
    current.sort_unstable();
    wanted.sort_unstable();
    current == wanted
}

/// `None` when the name is too long.
fn service_entry(name: &ServicePortName) -> Option<ServiceEntry> {
    Some(ServiceEntry { name: NameBytes::new(&name.to_string())?, reserved: 0, affinity_seconds: 0 })
}
