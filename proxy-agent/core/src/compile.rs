//! From cluster state to desired map content, one Service at a time.
//!
//! ```text
//!   Service port ── id ──▶ ServiceEntry
//!     │  every endpoint that is ready or serving ── id, generation ──▶ BackendEntry   (flows on it stay valid)
//!     │  those selected for new flows ──▶ a range of slots
//!     │    cluster set, local set: see `select`
//!     └─ each cluster address, external address, address of a load balancer, NodePort ──▶ FrontendEntry over a range of
//!          its own; a second one for traffic from outside under externalTrafficPolicy Local
//!   address ──▶ mark    interface ──▶ DeviceEntry    ServiceCIDR, pod ranges, allowed sources ──▶ PrefixKey
//! ```
//!
//! What stays the same keeps its numbers: a backend keeps id and generation while service port, address, port and
//! protocol stay; a frontend keeps its range while the set of selected backends stays. A changed set gets a new range
//! and the frontend one update; the old range keeps its content until no program can be reading it any more, then it is
//! zeroed and may be used again. Zeroing costs one write per slot, off the path of the change; in return the maps hold
//! exactly what is meant, and a reader with a wrong range would find backend 0 and drop instead of reaching a stranger.
//! Backends that serve no more are zeroed at once, because that is what moves UDP; a program that read the slot just
//! before finds generation 0 and reads the frontend once more.
//!
//! A restarted compiler takes what the maps hold for its own last result, so restoring is no special case.

mod claims;
mod link;
mod marks;
mod place;
mod port;
mod ranges;
mod restore;
mod retired;
mod told;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_abi::capacity;

use crate::address::AddressFault;
use crate::diagnostic::{Diagnostic, Severity};
use crate::facts::Facts;
use crate::ids::{Generations, IdPool, RangePool};
use crate::name::{ObjectName, ServicePortName};
use crate::plan::TableDeltas;
use crate::policy::Policy;
use crate::service::Service;
use crate::state::{Changed, ClusterState};

use claims::Claims;
use link::Links;
use marks::Marks;
use place::{Addresses, article};
use port::Port;
use ranges::Ranges;
use retired::Retired;
use told::Told;

/// Number of entries of each map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Service ports.
    pub services: u32,
    /// Backends; index 0 is not used.
    pub backends: u32,
    /// Slots; index 0 is not used.
    pub slots: u32,
    /// Frontends, address marks included.
    pub frontends: u32,
    /// Interfaces.
    pub devices: u32,
    /// Pod addresses.
    pub local_pods: u32,
    /// Address ranges.
    pub prefixes: u32,
    /// Pods whose sockets are translated.
    pub cgroup_pods: u32,
}

/// What a compilation changed beside the tables.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Compiled {
    /// [`Compiler::findings`] gives another result.
    pub findings: bool,
    /// [`Compiler::facts`] gives another result.
    pub facts: bool,
}

impl Default for Capacity {
    fn default() -> Self {
        Self {
            services: capacity::SERVICE,
            backends: capacity::BACKEND,
            slots: capacity::BACKEND_SLOT,
            frontends: capacity::FRONTEND,
            devices: capacity::DEVICE,
            local_pods: capacity::LOCAL_POD,
            prefixes: capacity::PREFIX,
            cgroup_pods: capacity::CGROUP_POD,
        }
    }
}

/// Keeps what each Service and interface was compiled to. Writes desired rows; reads actual ones only to restore.
#[derive(Clone, Debug)]
pub struct Compiler {
    capacity: Capacity,
    policy: Policy,
    pools: Pools,
    claims: Claims,
    marks: Marks,
    ranges: Ranges,
    told: Told,
    retired: Retired,
    services: BTreeMap<ObjectName, BTreeMap<Arc<str>, Port>>,
    links: Links,
    findings: BTreeMap<ObjectName, Vec<Diagnostic>>,
    /// Services that found no room; tried again when there is some.
    starved: BTreeSet<ObjectName>,
    /// Services to compile again in this run.
    again: BTreeSet<ObjectName>,
    /// Room was made since the starved were last tried.
    room: bool,
}

/// Numbers to give out.
#[derive(Clone, Debug)]
struct Pools {
    services: IdPool,
    backends: IdPool,
    slots: RangePool,
    generations: Generations,
}

impl Compiler {
    /// With nothing compiled.
    pub fn new(capacity: Capacity, policy: Policy) -> Self {
        Self {
            capacity,
            policy,
            pools: Pools {
                services: IdPool::new(capacity.services),
                backends: IdPool::new(capacity.backends),
                slots: RangePool::new(capacity.slots),
                generations: Generations::new(),
            },
            claims: Claims::default(),
            marks: Marks::default(),
            ranges: Ranges::default(),
            told: Told::default(),
            retired: Retired::default(),
            services: BTreeMap::new(),
            links: Links::default(),
            findings: BTreeMap::new(),
            starved: BTreeSet::new(),
            again: BTreeSet::new(),
            room: false,
        }
    }

    /// Names that something is compiled for.
    pub fn compiled(&self) -> impl Iterator<Item = &ObjectName> {
        self.services.keys()
    }

    /// Ids of the ports that a Service is compiled to.
    pub fn ids_of(&self, service: &ObjectName) -> impl Iterator<Item = u32> {
        self.services.get(service).into_iter().flatten().map(|(_, port)| port.id)
    }

    /// Did a Service find no room for all that it asks for?
    pub fn is_starved(&self, service: &ObjectName) -> bool {
        self.starved.contains(service)
    }

    /// What is told beside the tables.
    pub const fn facts(&self) -> &Facts {
        self.told.facts()
    }

    /// Compiles what changed, and what depends on it.
    ///
    /// Services with an id go first, by id, then the others by name: of two that want one frontend the older gets it,
    /// whatever the order of events, if none of them holds it yet.
    pub fn compile(&mut self, state: &ClusterState, dirty: &Changed, tables: &mut TableDeltas) -> Compiled {
        if dirty.ranges {
            self.compile_ranges(state, tables);
        }
        if dirty.addresses {
            self.compile_marks(state, tables);
        }
        if dirty.cgroup_pods {
            self.compile_cgroup_pods(state, tables);
        }
        let findings = self.compile_links(state, &dirty.links, tables);
        let mut changed = Compiled { findings, facts: false };
        for name in &dirty.services {
            self.leave_frontends(state, name, tables);
        }
        let waiting = std::mem::take(&mut self.again);
        let mut queue: BTreeSet<_> = dirty.services.union(&waiting).map(|name| self.ranked(name)).collect();
        if std::mem::take(&mut self.room) {
            queue.extend(self.starved.iter().map(|name| self.ranked(name)));
        }
        while let Some((_, name)) = queue.pop_first() {
            self.compile_service(state, &name, tables, &mut changed);
            for waiting in std::mem::take(&mut self.again) {
                queue.insert(self.ranked(&waiting));
            }
        }
        changed
    }

    /// Findings about Services and their slices, then about interfaces.
    pub fn findings(&self) -> impl Iterator<Item = &Diagnostic> {
        self.findings.values().flatten().chain(self.links.findings())
    }

    /// Moves what the dataplane certainly no longer uses into quarantine. Call after operations were applied.
    pub fn settle(&mut self, tables: &TableDeltas, now: u64) {
        self.retired.settle(&mut self.pools, tables, now);
    }

    /// Frees what has been in quarantine for the grace. Call before [`Self::compile`].
    pub fn release(&mut self, tables: &mut TableDeltas, now: u64, grace: u64) {
        let ranges = self.pools.slots.release(now, grace);
        for slot in ranges.iter().flat_map(|range| range.slots()) {
            tables.slots.unwant(&slot);
        }
        let backends = self.pools.backends.release(now, grace);
        let services = self.pools.services.release(now, grace);
        self.room |= !ranges.is_empty() || backends || services;
    }

    /// When [`Self::release`] will next free something.
    pub fn next_release(&self, grace: u64) -> Option<u64> {
        let Pools { services, backends, slots, generations: _ } = &self.pools;
        [services.next_release(grace), backends.next_release(grace), slots.next_release(grace)]
            .into_iter()
            .flatten()
            .min()
    }

    /// A Service found no room, and some has been made since.
    pub fn wants_retry(&self) -> bool {
        self.room && !self.starved.is_empty()
    }

    /// Place of a Service in the order of compilation.
    fn ranked(&self, name: &ObjectName) -> (u32, ObjectName) {
        let ids = self.services.get(name).into_iter().flat_map(|ports| ports.values().map(|port| port.id));
        (ids.min().unwrap_or(u32::MAX), name.clone())
    }

    /// Compiles one Service.
    fn compile_service(
        &mut self,
        state: &ClusterState,
        name: &ObjectName,
        tables: &mut TableDeltas,
        changed: &mut Compiled,
    ) {
        self.claims.forget_waiting(name);
        self.starved.remove(name);
        let mut findings = Vec::new();
        let mut old = self.services.remove(name).unwrap_or_default();
        let mut new = BTreeMap::new();
        if let Some(service) = state.service(name) {
            let mut addresses = Addresses::of(state, &self.policy, service);
            findings.append(&mut addresses.findings);
            findings.extend(bad_endpoints(state, service));
            for (index, port) in service.ports.iter().enumerate() {
                if service.ports.iter().take(index).any(|p| p.name == port.name) {
                    findings.push(error(
                        format!("Service {name}"),
                        format!("spec.ports[{index}].name"),
                        format!("name {:?} is that of another port; the port is not served", port.name),
                        "give each port a name of its own",
                    ));
                    continue;
                }
                let place = port::Place { state, service, index, port, addresses: &addresses };
                let compiled = self.compile_port(&place, old.remove(&port.name), tables, &mut findings);
                if let Some(compiled) = compiled {
                    new.insert(Arc::clone(&port.name), compiled);
                }
            }
        }
        for (port, compiled) in old {
            self.retire_port(&ServicePortName { service: name.clone(), port }, &compiled, tables);
        }
        changed.facts |= self.told.tell(state, name, state.service(name), &new);
        if !new.is_empty() {
            self.services.insert(name.clone(), new);
        }
        let previous =
            if findings.is_empty() { self.findings.remove(name) } else { self.findings.insert(name.clone(), findings) };
        changed.findings |= previous.as_ref() != self.findings.get(name);
    }

    /// Lets a frontend go; whoever waited for it is compiled again.
    fn release_claim(&mut self, key: &proxy_abi::FrontendKey, tables: &mut TableDeltas) {
        self.again.extend(self.claims.release(key));
        self.mark(key.ip, tables);
        self.room = true;
    }

    fn claim(&mut self, key: proxy_abi::FrontendKey, name: &ServicePortName, cluster: bool, tables: &mut TableDeltas) {
        if self.claims.hold(key, name.clone(), cluster) {
            self.mark(key.ip, tables);
        }
    }
}

/// Findings about the endpoints of a Service.
fn bad_endpoints(state: &ClusterState, service: &Service) -> Vec<Diagnostic> {
    let mut findings = Vec::new();
    for slice in state.slices_of(&service.name) {
        let mut bad = slice.endpoints.iter().enumerate().filter_map(|(index, endpoint)| {
            AddressFault::of(endpoint.address).map(|fault| (index, endpoint.address, fault))
        });
        if let Some((index, address, fault)) = bad.next() {
            let others = match bad.count() {
                0 => String::new(),
                more => format!(" (and {more} more like it)"),
            };
            findings.push(error(
                format!("EndpointSlice {}", slice.name),
                format!("endpoints[{index}].addresses[0]"),
                format!("{address} is {} {fault} address and is left out{others}", article(fault)),
                "name an address that every node can reach",
            ));
        }
    }
    findings
}

fn error(object: String, field: String, problem: String, fix: &str) -> Diagnostic {
    Diagnostic { severity: Severity::Error, object, field, problem, fix: fix.to_owned() }
}
