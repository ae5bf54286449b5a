//! One service port: its id, its backends, its frontends.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_abi::{BackendEntry, FrontendEntry, FrontendKey, IpBytes, NameBytes, PortBe, PrefixKey, Proto, ServiceEntry};

use crate::address::Family;
use crate::diagnostic::Diagnostic;
use crate::ids::SlotRange;
use crate::name::{ObjectName, ServicePortName};
use crate::plan::TableDeltas;
use crate::select::{Locality, Target, select};
use crate::service::{Service, ServicePort};
use crate::state::ClusterState;

use super::claims::is_of_cluster_address;
use super::place::{Addresses, Asked, Kind};
use super::ranges::Sources;
use super::{Compiler, Pools, error};

/// What a backend is within its service port.
pub(super) type BackendKey = (IpBytes, PortBe, Proto);

/// What a service port was compiled to; the rest is in the desired rows under these numbers.
#[derive(Clone, Debug)]
pub(super) struct Port {
    pub(super) id: u32,
    pub(super) backends: BTreeMap<BackendKey, u32>,
    pub(super) frontends: BTreeSet<FrontendKey>,
    /// Address ranges of the clients that its load balancers serve.
    pub(super) sources: BTreeSet<PrefixKey>,
    /// It has endpoints, but none for traffic from inside, because that must stay on this node.
    pub(super) lacks_internal: bool,
    /// The same for traffic from outside.
    pub(super) lacks_external: bool,
}

/// A service port and where it stands.
pub(super) struct Place<'a> {
    pub(super) state: &'a ClusterState,
    pub(super) service: &'a Service,
    pub(super) index: usize,
    pub(super) port: &'a ServicePort,
    pub(super) addresses: &'a Addresses,
}

/// What a port may have.
#[derive(Default)]
struct Wanted<'a> {
    frontends: Vec<WantedFrontend>,
    /// Endpoints of each family.
    targets: BTreeMap<Family, Vec<Target>>,
    /// The addresses of load balancers that are not open to all.
    filtered: Vec<(std::net::IpAddr, Sources<'a>)>,
}

struct WantedFrontend {
    key: FrontendKey,
    family: Family,
    flags: u32,
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
    /// Selected backends of each frontend, and its new range when they changed (`None`: no slots); and its flags.
    frontends: BTreeMap<FrontendKey, (Slots, u32)>,
    /// Flags of each backend.
    backends: BTreeMap<u32, u32>,
}

enum Slots {
    Kept,
    Changed(Vec<u32>, Option<SlotRange>),
}

impl Place<'_> {
    fn name(&self) -> ServicePortName {
        ServicePortName { service: self.service.name.clone(), port: Arc::clone(&self.port.name) }
    }

    fn finding(&self, field: String, problem: String, fix: &str) -> Diagnostic {
        error(format!("Service {}", self.service.name), field, problem, fix)
    }

    fn field(&self, tail: &str) -> String {
        format!("spec.ports[{}]{tail}", self.index)
    }
}

impl Compiler {
    /// Frees the frontends that a Service no longer asks for, without touching a row. All that changed do so before the
    /// first of them is compiled: then two that exchange frontends find them free and never lose theirs, nor their ids.
    pub(super) fn leave_frontends(&mut self, state: &ClusterState, name: &ObjectName, tables: &mut TableDeltas) {
        if !self.services.contains_key(name) {
            return;
        }
        let service = state.service(name);
        let addresses = service.map(|service| Addresses::of(state, &self.policy, service));
        let mut left = Vec::new();
        for (port, compiled) in self.services.get(name).into_iter().flatten() {
            let asked = service.and_then(|service| service.ports.iter().find(|p| p.name == *port));
            let wanted = asked.zip(addresses.as_ref()).map(|(port, addresses)| addresses.keys(port));
            let wanted = wanted.unwrap_or_default();
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
        let entry = service_entry(&name, place.service.affinity_seconds);
        let Some(entry) = entry.filter(|_| !wanted.frontends.is_empty()) else {
            if !wanted.frontends.is_empty() {
                let problem = format!("{name} is longer than 144 bytes; the port is not served");
                findings.push(place.finding(place.field(".name"), problem, "shorten the names"));
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
                let fix = "remove Services or endpoints, or raise the capacity";
                findings.push(place.finding(place.field(""), problem, fix));
                old.map(|old| self.stay(&name, old, tables))
            }
        }
    }

    /// Leaves a port as it was, as far as nobody else has taken its frontends meanwhile.
    fn stay(&mut self, name: &ServicePortName, mut old: Port, tables: &mut TableDeltas) -> Port {
        let inner = |key: &FrontendKey| FrontendKey { scope: FrontendKey::SCOPE_CLUSTER, ..*key };
        let lost = |claims: &super::claims::Claims, key: &FrontendKey| {
            claims.holder(&inner(key)).is_some_and(|holder| holder != name)
        };
        // Of two that belong together, one alone is of no use.
        let (gone, kept) = old.frontends.into_iter().partition(|key| lost(&self.claims, key));
        old.frontends = kept;
        let gone: BTreeSet<FrontendKey> = gone;
        for key in &gone {
            self.retire_frontend(name, key, tables);
        }
        for key in &old.frontends {
            if let Some(entry) = tables.frontends.desired().get(key).filter(|_| self.claims.holder(key).is_none()) {
                let cluster = is_of_cluster_address(entry);
                self.claim(*key, name, cluster, tables);
            }
        }
        old
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
        for key in &port.sources {
            tables.prefixes.unwant(key);
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
    fn wanted<'a>(&mut self, place: &Place<'a>, name: &ServicePortName, findings: &mut Vec<Diagnostic>) -> Wanted<'a> {
        let mut wanted = Wanted::default();
        for asked in place.addresses.asked(place.port) {
            if let Some(holder) = self.claims.holder(&asked.key).filter(|holder| *holder != name) {
                findings.push(conflict(place, &asked, holder));
                self.claims.wait(asked.key, &name.service);
                continue;
            }
            let family = Family::of(asked.ip);
            let targets = wanted.targets.entry(family).or_insert_with(|| {
                let node = place.state.node();
                let here = Locality { node: &node.name, zone: node.zone.as_deref() };
                select(place.state.slices_of(&place.service.name), place.port, family, here)
            });
            let sources = match asked.kind {
                Kind::LoadBalancer => Sources::of(place.state, place.service, family),
                Kind::Cluster | Kind::NodePort | Kind::External => None,
            };
            let (inner, outer) = self.flags(place.service, &asked, targets, sources.as_ref());
            wanted.frontends.push(WantedFrontend { key: asked.key, family, flags: inner });
            if let Some(flags) = outer {
                wanted.frontends.push(WantedFrontend { key: asked.outside(), family, flags });
            }
            wanted.filtered.extend(sources.map(|sources| (asked.ip, sources)));
        }
        wanted
    }

    /// Flags of a frontend, and of the one beside it for traffic from outside.
    fn flags(
        &self,
        service: &Service,
        asked: &Asked,
        targets: &[Target],
        sources: Option<&Sources<'_>>,
    ) -> (u32, Option<u32>) {
        let lacks_local = targets.iter().any(|t| t.cluster) && !targets.iter().any(|t| t.local_set);
        let local = FrontendEntry::LOCAL_SET | if lacks_local { FrontendEntry::DROP_EMPTY } else { 0 };
        if asked.kind == Kind::Cluster {
            let all = if self.policy.masquerade_all { FrontendEntry::MASQUERADE } else { 0 };
            let internal = if service.internal_local { local } else { 0 };
            return (FrontendEntry::MASQUERADE_OUTSIDE | all | internal, None);
        }
        let filter = sources.map_or(0, |sources| {
            let node = if sources.node_allowed { FrontendEntry::NODE_ALLOWED } else { 0 };
            FrontendEntry::SOURCE_RANGES | node
        });
        if asked.split {
            (FrontendEntry::EXTERNAL_SPLIT | filter, Some(local | filter))
        } else {
            (FrontendEntry::MASQUERADE | filter, None)
        }
    }

    /// Takes all numbers that the port needs, or none.
    fn draft(&mut self, old: Option<&Port>, wanted: &Wanted<'_>, tables: &TableDeltas) -> Result<Draft, Exhausted> {
        let exceeds = |most: usize, capacity: u32| u32::try_from(most).is_ok_and(|most| most > capacity);
        let fresh = wanted.frontends.iter().filter(|w| self.claims.holder(&w.key).is_none());
        // Each cluster address may need a mark of its own.
        let rows = |w: &WantedFrontend| 1 + usize::from(w.flags & FrontendEntry::MASQUERADE_OUTSIDE != 0);
        let fresh: usize = fresh.map(rows).sum();
        if fresh > 0 && exceeds(self.claims.len() + self.marks.len() + fresh, self.capacity.frontends) {
            return Err(Exhausted("frontends"));
        }
        let mut grant = Grant::default();
        let draft = grant.draft(&mut self.pools, old, wanted, tables).and_then(|draft| {
            let held = tables.prefixes.desired();
            let fresh = draft.port.sources.iter().filter(|key| !held.contains_key(key)).count();
            let full = fresh > 0 && exceeds(held.len() + fresh, self.capacity.prefixes);
            if full { Err(Exhausted("address ranges")) } else { Ok(draft) }
        });
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
        let Draft { port, frontends, backends } = draft;
        tables.services.want(port.id, entry);
        for (key, id) in &port.backends {
            let generation = match tables.backends.desired().get(id) {
                Some(entry) => entry.generation,
                None => self.pools.generations.next(),
            };
            // Only `flags` ever changes in place, and no program reads it together with another field.
            let flags = backends.get(id).copied().unwrap_or(0);
            let (ip, to, proto) = *key;
            let entry = BackendEntry { ip, service: port.id, generation, port: to, proto, reserved: 0, flags };
            tables.backends.want(*id, entry);
        }
        for key in &port.sources {
            tables.prefixes.want(*key, 1);
        }
        for (key, (slots, flags)) in frontends {
            let entry = FrontendEntry {
                first: 0,
                count: 0,
                service: port.id,
                flags,
                affinity_seconds: entry.affinity_seconds,
                generation: 0,
            };
            self.point(key, entry, &slots, tables);
            self.claim(key, name, is_of_cluster_address(&entry), tables);
        }
        if let Some(old) = old {
            for key in old.frontends.difference(&port.frontends) {
                self.retire_frontend(name, key, tables);
            }
            for (_, id) in old.backends.iter().filter(|(key, _)| !port.backends.contains_key(*key)) {
                tables.backends.unwant(id);
                self.retired.backend(*id);
            }
            for key in old.sources.difference(&port.sources) {
                tables.prefixes.unwant(key);
            }
        }
        port
    }

    /// Points a frontend at its slots; the rest of its entry is as given.
    fn point(&mut self, key: FrontendKey, entry: FrontendEntry, slots: &Slots, tables: &mut TableDeltas) {
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
        let same = FrontendEntry { first, count, ..entry };
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
        wanted: &Wanted<'_>,
        tables: &TableDeltas,
    ) -> Result<Draft, Exhausted> {
        let id = match old {
            Some(old) => old.id,
            None => *self.service.insert(pools.services.allocate().ok_or(Exhausted("service ports"))?),
        };
        let proto = wanted.frontends.first().map_or(Proto(0), |w| w.key.proto);
        let mut backends = BTreeMap::new();
        let mut flags = BTreeMap::new();
        let mut selected: BTreeMap<Family, (Vec<u32>, Vec<u32>)> = BTreeMap::new();
        for (family, targets) in &wanted.targets {
            let (cluster, local) = selected.entry(*family).or_default();
            for target in targets {
                let backend = (IpBytes::from(target.address), PortBe::new(target.port.get()), proto);
                let known = old.and_then(|old| old.backends.get(&backend)).copied();
                let id = match known {
                    Some(id) => id,
                    None => self.backend(pools)?,
                };
                backends.insert(backend, id);
                flags.insert(id, flags_of(target));
                if target.cluster {
                    cluster.push(id);
                }
                if target.local_set {
                    local.push(id);
                }
            }
        }
        let mut frontends = BTreeMap::new();
        for WantedFrontend { key, family, flags } in &wanted.frontends {
            let both = selected.get(family);
            let pick = |(cluster, local): &(Vec<u32>, Vec<u32>)| {
                if flags & FrontendEntry::LOCAL_SET == 0 { cluster.clone() } else { local.clone() }
            };
            let selected = both.map(pick).unwrap_or_default();
            let held = old.is_some_and(|old| old.frontends.contains(key));
            let slots = match tables.frontends.desired().get(key).filter(|_| held) {
                Some(entry) if leads_to(entry, &selected, tables) => Slots::Kept,
                Some(_) | None => {
                    let range = self.range(pools, selected.len())?;
                    Slots::Changed(selected, range)
                }
            };
            frontends.insert(*key, (slots, *flags));
        }
        let lacks = |outside: bool| {
            let of_kind = |w: &&WantedFrontend| (w.key.scope == FrontendKey::SCOPE_EXTERNAL) == outside;
            wanted.frontends.iter().filter(of_kind).any(|w| w.flags & FrontendEntry::DROP_EMPTY != 0)
        };
        let port = Port {
            id,
            backends,
            frontends: frontends.keys().copied().collect(),
            sources: wanted.filtered.iter().flat_map(|(vip, sources)| sources.rows(id, *vip)).collect(),
            lacks_internal: lacks(false),
            lacks_external: lacks(true),
        };
        Ok(Draft { port, frontends, backends: flags })
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

const fn flags_of(target: &Target) -> u32 {
    let local = if target.local { BackendEntry::LOCAL } else { 0 };
    let in_cluster = if target.cluster { BackendEntry::IN_CLUSTER } else { 0 };
    let in_local = if target.local_set { BackendEntry::IN_LOCAL } else { 0 };
    local | in_cluster | in_local
}

/// Another service port holds what is asked for.
fn conflict(place: &Place<'_>, asked: &Asked, holder: &ServicePortName) -> Diagnostic {
    let Asked { key, kind, ip, .. } = asked;
    let end = format!("{}/{}", key.port, key.proto);
    let (problem, fix) = match kind {
        Kind::NodePort => (
            format!("node port {end} belongs to Service {holder}; the port is not served there"),
            "use another node port, or delete the other one",
        ),
        Kind::Cluster | Kind::External | Kind::LoadBalancer => (
            format!("{ip} port {end} belongs to Service {holder}; the port is not served there"),
            "use another address or port, or delete the other one",
        ),
    };
    place.finding(kind.field(place.index), problem, fix)
}

/// `None` when the name is too long.
fn service_entry(name: &ServicePortName, affinity_seconds: Option<u32>) -> Option<ServiceEntry> {
    let affinity_seconds = affinity_seconds.unwrap_or(0);
    Some(ServiceEntry { name: NameBytes::new(&name.to_string())?, reserved: 0, affinity_seconds })
}
