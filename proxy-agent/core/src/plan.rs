//! From the difference of two tables to operations, in an order that is safe after each one of them.
//!
//! ```text
//!   set:     service ─▶ backend ─▶ slot    device ─▶ local_pod    prefix    then frontend: the switch
//!   delete:  frontend ─▶ prefix    slot ─▶ backend    local_pod ─▶ device    service last
//! ```
//!
//! `cgroup_pod` depends on nothing.
//!
//! Of two frontends that belong together, the one for traffic from outside is set before the one that points to it, and
//! goes after it.
//!
//! What refers comes after what it refers to, and goes before it. A frontend is not switched while a slot or backend of
//! its range, or its service, is not certain to be written; nothing is deleted that a row in doubt may still refer to.
//!
//! A device comes before the pod's address and goes after it: other pods redirect to an address as soon as it is bound,
//! and the answer has to meet the program on the interface.

use std::collections::BTreeSet;

use proxy_abi::{
    BackendEntry, CgroupPodEntry, DeviceEntry, FrontendEntry, FrontendKey, IpBytes, LocalPodEntry, PrefixKey,
    ServiceEntry,
};

use crate::delta::Delta;
use crate::ids::SlotRange;
use crate::tables::{Op, Row, Tables};

/// Desired tables and their difference from what the dataplane holds.
#[derive(Clone, Debug, Default)]
pub struct TableDeltas {
    /// Service id → name.
    pub services: Delta<u32, ServiceEntry>,
    /// Backend id → address.
    pub backends: Delta<u32, BackendEntry>,
    /// Slot → backend id.
    pub slots: Delta<u32, u32>,
    /// Frontend → range of slots.
    pub frontends: Delta<FrontendKey, FrontendEntry>,
    /// Interface index → interface.
    pub devices: Delta<u32, DeviceEntry>,
    /// Pod address → pod interface.
    pub local_pods: Delta<IpBytes, LocalPodEntry>,
    /// Address range under a scope → 1.
    pub prefixes: Delta<PrefixKey, u32>,
    /// Cgroup id → pod whose sockets are translated. Refers to nothing: who is not found in a map is served by packets.
    pub cgroup_pods: Delta<u64, CgroupPodEntry>,
}

/// One kind of operation. Those of one phase do not depend on each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Phase {
    /// Names.
    SetServices,
    /// Backends.
    SetBackends,
    /// Slots.
    SetSlots,
    /// Interfaces.
    SetDevices,
    /// Pod addresses.
    SetLocalPods,
    /// Address ranges.
    SetPrefixes,
    /// Frontends for traffic from outside.
    SetOutsideFrontends,
    /// The switch.
    SetFrontends,
    /// Pods whose sockets are translated. Those that go make room.
    DeleteCgroupPods,
    /// The same.
    SetCgroupPods,
    /// Frontends.
    DeleteFrontends,
    /// Frontends for traffic from outside.
    DeleteOutsideFrontends,
    /// Address ranges.
    DeletePrefixes,
    /// Slots.
    DeleteSlots,
    /// Backends.
    DeleteBackends,
    /// Pod addresses.
    DeleteLocalPods,
    /// Interfaces.
    DeleteDevices,
    /// Names.
    DeleteServices,
}

impl Phase {
    /// All, in the safe order.
    pub const ALL: [Self; 18] = [
        Self::SetServices,
        Self::SetBackends,
        Self::SetSlots,
        Self::SetDevices,
        Self::SetLocalPods,
        Self::SetPrefixes,
        Self::SetOutsideFrontends,
        Self::SetFrontends,
        Self::DeleteCgroupPods,
        Self::SetCgroupPods,
        Self::DeleteFrontends,
        Self::DeleteOutsideFrontends,
        Self::DeletePrefixes,
        Self::DeleteSlots,
        Self::DeleteBackends,
        Self::DeleteLocalPods,
        Self::DeleteDevices,
        Self::DeleteServices,
    ];
}

/// Operations that lead from `actual` to `desired` when each succeeds.
pub fn plan(desired: &Tables, actual: &Tables) -> Vec<Op> {
    let mut deltas = TableDeltas::new(desired.clone(), actual.clone());
    let mut ops = Vec::new();
    for phase in Phase::ALL {
        let ready = deltas.ready(phase);
        for op in &ready {
            deltas.succeeded(op);
        }
        ops.extend(ready);
    }
    ops
}

impl TableDeltas {
    /// Between two tables.
    pub fn new(desired: Tables, actual: Tables) -> Self {
        Self {
            services: Delta::new(desired.services, actual.services),
            backends: Delta::new(desired.backends, actual.backends),
            slots: Delta::new(desired.slots, actual.slots),
            frontends: Delta::new(desired.frontends, actual.frontends),
            devices: Delta::new(desired.devices, actual.devices),
            local_pods: Delta::new(desired.local_pods, actual.local_pods),
            prefixes: Delta::new(desired.prefixes, actual.prefixes),
            cgroup_pods: Delta::new(desired.cgroup_pods, actual.cgroup_pods),
        }
    }

    /// The dataplane is now known to hold exactly this.
    pub fn load(&mut self, actual: Tables) {
        let Tables { services, backends, slots, frontends, devices, local_pods, prefixes, cgroup_pods } = actual;
        self.services.load(services);
        self.backends.load(backends);
        self.slots.load(slots);
        self.frontends.load(frontends);
        self.devices.load(devices);
        self.local_pods.load(local_pods);
        self.prefixes.load(prefixes);
        self.cgroup_pods.load(cgroup_pods);
    }

    /// A copy of the desired rows.
    pub fn desired(&self) -> Tables {
        Tables {
            services: self.services.desired().clone(),
            backends: self.backends.desired().clone(),
            slots: self.slots.desired().clone(),
            frontends: self.frontends.desired().clone(),
            devices: self.devices.desired().clone(),
            local_pods: self.local_pods.desired().clone(),
            prefixes: self.prefixes.desired().clone(),
            cgroup_pods: self.cgroup_pods.desired().clone(),
        }
    }

    /// Rows that are not certain to be as desired.
    pub fn pending_len(&self) -> usize {
        self.services.pending_len()
            + self.backends.pending_len()
            + self.slots.pending_len()
            + self.frontends.pending_len()
            + self.devices.pending_len()
            + self.local_pods.pending_len()
            + self.prefixes.pending_len()
            + self.cgroup_pods.pending_len()
    }

    /// Service ports with a frontend or backend that is not certain to be as desired.
    pub fn open_services(&self) -> BTreeSet<u32> {
        let mut open = self.doubtful_services();
        open.extend(self.frontends.pending().filter_map(|(_, entry)| Some(entry?.service)));
        open.extend(self.backends.unsettled().map(|entry| entry.service));
        open.extend(self.backends.pending().filter_map(|(_, entry)| Some(entry?.service)));
        open
    }

    /// Operations of a phase whose referents are in place. Costs what is pending, not what is there.
    pub fn ready(&self, phase: Phase) -> Vec<Op> {
        match phase {
            Phase::SetServices => set(&self.services, |_, _| true, Op::SetService),
            Phase::SetBackends => {
                set(&self.backends, |_, backend| self.services.present(&backend.service), Op::SetBackend)
            }
            Phase::SetSlots => set(&self.slots, |_, backend| self.backends.present(backend), Op::SetSlot),
            Phase::SetDevices => set(&self.devices, |_, _| true, Op::SetDevice),
            Phase::SetLocalPods => set(&self.local_pods, |_, pod| self.devices.present(&pod.ifindex), Op::SetLocalPod),
            Phase::SetPrefixes => {
                let owned = |key: &PrefixKey, _: &u32| !is_of_service(key) || self.services.present(&key.scope);
                set(&self.prefixes, owned, Op::SetPrefix)
            }
            Phase::SetOutsideFrontends => self.ready_frontends(true),
            Phase::SetFrontends => self.ready_frontends(false),
            Phase::SetCgroupPods => set(&self.cgroup_pods, |_, _| true, Op::SetCgroupPod),
            Phase::DeleteCgroupPods => delete(&self.cgroup_pods, |_| true, Op::DeleteCgroupPod),
            Phase::DeleteFrontends => self.doomed_frontends(),
            Phase::DeleteOutsideFrontends => {
                let split = |entry: &FrontendEntry| entry.flags & FrontendEntry::EXTERNAL_SPLIT != 0;
                let unused = |key: &FrontendKey| is_outside(key) && !self.frontends.possible(&inside(key)).any(split);
                delete(&self.frontends, unused, Op::DeleteFrontend)
            }
            Phase::DeletePrefixes => {
                let doubtful = self.doubtful_services();
                delete(&self.prefixes, |key| !doubtful.contains(&key.scope), Op::DeletePrefix)
            }
            Phase::DeleteSlots => {
                let doubtful = self.doubtful_ranges();
                delete(&self.slots, |slot| !doubtful.iter().any(|r| r.slots().contains(slot)), Op::DeleteSlot)
            }
            Phase::DeleteBackends => {
                let doubtful = self.doubtful_services();
                let unused = |id: &u32| self.backends.possible(id).all(|b| !doubtful.contains(&b.service));
                delete(&self.backends, unused, Op::DeleteBackend)
            }
            Phase::DeleteLocalPods => delete(&self.local_pods, |_| true, Op::DeleteLocalPod),
            Phase::DeleteDevices => {
                let doubtful: BTreeSet<u32> = self.local_pods.unsettled().map(|pod| pod.ifindex).collect();
                delete(&self.devices, |ifindex| !doubtful.contains(ifindex), Op::DeleteDevice)
            }
            Phase::DeleteServices => {
                let mut doubtful = self.doubtful_services();
                doubtful.extend(self.backends.unsettled().map(|backend| backend.service));
                doubtful.extend(self.prefixes.pending().map(|(key, _)| key.scope));
                delete(&self.services, |id| !doubtful.contains(id), Op::DeleteService)
            }
        }
    }

    /// An operation succeeded.
    pub fn succeeded(&mut self, op: &Op) {
        match op {
            Op::SetService(id, entry) => self.services.succeeded(id, Some(*entry)),
            Op::DeleteService(id) => self.services.succeeded(id, None),
            Op::SetBackend(id, entry) => self.backends.succeeded(id, Some(*entry)),
            Op::DeleteBackend(id) => self.backends.succeeded(id, None),
            Op::SetSlot(slot, backend) => self.slots.succeeded(slot, Some(*backend)),
            Op::DeleteSlot(slot) => self.slots.succeeded(slot, None),
            Op::SetFrontend(key, entry) => self.frontends.succeeded(key, Some(*entry)),
            Op::DeleteFrontend(key) => self.frontends.succeeded(key, None),
            Op::SetDevice(ifindex, entry) => self.devices.succeeded(ifindex, Some(*entry)),
            Op::DeleteDevice(ifindex) => self.devices.succeeded(ifindex, None),
            Op::SetLocalPod(ip, entry) => self.local_pods.succeeded(ip, Some(*entry)),
            Op::DeleteLocalPod(ip) => self.local_pods.succeeded(ip, None),
            Op::SetPrefix(key, value) => self.prefixes.succeeded(key, Some(*value)),
            Op::DeletePrefix(key) => self.prefixes.succeeded(key, None),
            Op::SetCgroupPod(id, entry) => self.cgroup_pods.succeeded(id, Some(*entry)),
            Op::DeleteCgroupPod(id) => self.cgroup_pods.succeeded(id, None),
        }
    }

    /// An operation failed: it may have taken effect or not.
    pub fn failed(&mut self, op: &Op) {
        match op {
            Op::SetService(id, entry) => self.services.failed(id, Some(*entry)),
            Op::DeleteService(id) => self.services.failed(id, None),
            Op::SetBackend(id, entry) => self.backends.failed(id, Some(*entry)),
            Op::DeleteBackend(id) => self.backends.failed(id, None),
            Op::SetSlot(slot, backend) => self.slots.failed(slot, Some(*backend)),
            Op::DeleteSlot(slot) => self.slots.failed(slot, None),
            Op::SetFrontend(key, entry) => self.frontends.failed(key, Some(*entry)),
            Op::DeleteFrontend(key) => self.frontends.failed(key, None),
            Op::SetDevice(ifindex, entry) => self.devices.failed(ifindex, Some(*entry)),
            Op::DeleteDevice(ifindex) => self.devices.failed(ifindex, None),
            Op::SetLocalPod(ip, entry) => self.local_pods.failed(ip, Some(*entry)),
            Op::DeleteLocalPod(ip) => self.local_pods.failed(ip, None),
            Op::SetPrefix(key, value) => self.prefixes.failed(key, Some(*value)),
            Op::DeletePrefix(key) => self.prefixes.failed(key, None),
            Op::SetCgroupPod(id, entry) => self.cgroup_pods.failed(id, Some(*entry)),
            Op::DeleteCgroupPod(id) => self.cgroup_pods.failed(id, None),
        }
    }

    /// The dataplane holds this row for certain as desired.
    pub fn settled(&self, row: &Row) -> bool {
        match row {
            Row::Service(id) => self.services.settled(id),
            Row::Backend(id) => self.backends.settled(id),
            Row::Slot(slot) => self.slots.settled(slot),
            Row::Frontend(key) => self.frontends.settled(key),
            Row::Device(ifindex) => self.devices.settled(ifindex),
            Row::LocalPod(ip) => self.local_pods.settled(ip),
            Row::Prefix(key) => self.prefixes.settled(key),
            Row::CgroupPod(id) => self.cgroup_pods.settled(id),
        }
    }

    /// Frontends of either kind whose referents are in place. Address marks come last: a refusal alone makes its address
    /// refuse everything.
    fn ready_frontends(&self, outside: bool) -> Vec<Op> {
        let waiting: BTreeSet<u32> =
            self.prefixes.pending().filter(|(_, value)| value.is_some()).map(|(key, _)| key.scope).collect();
        let complete = |key: &FrontendKey, entry: &FrontendEntry| {
            if is_outside(key) != outside {
                return false;
            }
            let named = entry.service == 0 || self.services.present(&entry.service);
            let slots = SlotRange { first: entry.first, count: entry.count }.slots();
            let ranges = entry.flags & FrontendEntry::SOURCE_RANGES == 0 || !waiting.contains(&entry.service);
            let split = entry.flags & FrontendEntry::EXTERNAL_SPLIT == 0 || self.frontends.present(&twin(key));
            named && ranges && split && slots.into_iter().all(|slot| self.slot_is_complete(slot))
        };
        let mut ops = set(&self.frontends, complete, Op::SetFrontend);
        ops.sort_by_key(is_mark);
        ops
    }

    /// Address marks go before the frontends of their address, for the same reason.
    fn doomed_frontends(&self) -> Vec<Op> {
        let mut ops = delete(&self.frontends, |key| !is_outside(key), Op::DeleteFrontend);
        ops.sort_by_key(|op| !is_mark(op));
        ops
    }

    fn slot_is_complete(&self, slot: u32) -> bool {
        self.slots.settled(&slot) && self.slots.desired().get(&slot).is_some_and(|id| self.backends.present(id))
    }

    /// Service ports that a frontend in doubt may lead to.
    fn doubtful_services(&self) -> BTreeSet<u32> {
        self.frontends.unsettled().map(|entry| entry.service).collect()
    }

    /// Ranges that a frontend in doubt may lead to.
    fn doubtful_ranges(&self) -> Vec<SlotRange> {
        let ranges = self.frontends.unsettled().map(|entry| SlotRange { first: entry.first, count: entry.count });
        ranges.filter(|range| range.count > 0).collect()
    }
}

fn set<K: Ord + Copy, V: PartialEq + Copy>(
    delta: &Delta<K, V>,
    ready: impl Fn(&K, &V) -> bool,
    op: fn(K, V) -> Op,
) -> Vec<Op> {
    let rows = delta.pending().filter_map(|(key, value)| value.map(|value| (key, value)));
    rows.filter(|(key, value)| ready(key, value)).map(|(key, value)| op(*key, *value)).collect()
}

fn delete<K: Ord + Copy, V: PartialEq + Copy>(
    delta: &Delta<K, V>,
    ready: impl Fn(&K) -> bool,
    op: fn(K) -> Op,
) -> Vec<Op> {
    let rows = delta.pending().filter(|(_, value)| value.is_none()).map(|(key, _)| key);
    rows.filter(|key| ready(key)).map(|key| op(*key)).collect()
}

fn is_mark(op: &Op) -> bool {
    matches!(op.row(), Row::Frontend(key) if key == FrontendKey::address(key.ip))
}

/// Is it for traffic from outside alone?
const fn is_outside(key: &FrontendKey) -> bool {
    key.scope == FrontendKey::SCOPE_EXTERNAL
}

/// The frontend for traffic from outside beside one for all traffic.
const fn twin(key: &FrontendKey) -> FrontendKey {
    FrontendKey { scope: FrontendKey::SCOPE_EXTERNAL, ..*key }
}

/// The reverse of [`twin`].
const fn inside(key: &FrontendKey) -> FrontendKey {
    FrontendKey { scope: FrontendKey::SCOPE_CLUSTER, ..*key }
}

/// Does the range belong to a service port?
const fn is_of_service(key: &PrefixKey) -> bool {
    key.scope != PrefixKey::SERVICE_CIDR && key.scope != PrefixKey::LOCAL_SOURCE
}
