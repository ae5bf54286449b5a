//! A dataplane in memory that is as strict as the kernel's readers would like the kernel to be.
//!
//! It refuses every operation after which a packet could meet a half-made row, so a test that uses it checks the order
//! of operations without saying so; and it fails on demand, before or after the operation has taken effect.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use proxy_abi::{BackendEntry, FrontendEntry, FrontendKey, IpBytes, LocalPodEntry, PrefixKey};

use crate::compile::Capacity;
use crate::dataplane::Dataplane;
use crate::ids::SlotRange;
use crate::tables::{Op, Tables};

/// The fake.
pub struct FakeDataplane {
    tables: Tables,
    capacity: Capacity,
    /// Time, in the milliseconds of the reconciler.
    pub now: u64,
    /// How long a slot that a frontend left must keep its content.
    pub grace: u64,
    /// Operations asked for, failed ones included.
    pub asked: u64,
    /// Next answer to `load` is an error.
    pub fail_load: bool,
    fault: Fault,
    /// First slot → range of each frontend with slots; ranges never overlap.
    covered: BTreeMap<u32, SlotRange>,
    /// Backend → slots that name it.
    named_by: BTreeMap<u32, BTreeSet<u32>>,
    /// Slot → when a frontend left it.
    left: BTreeMap<u32, u64>,
}

/// Decides whether the operation of that number fails.
type Fault = Box<dyn FnMut(u64, &Op) -> Option<When> + Send>;

/// When an injected failure strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// The operation has no effect.
    Before,
    /// The operation takes effect, and fails nevertheless.
    After,
}

/// Why an operation failed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FakeError {
    /// It was told to.
    #[error("injected failure of {0:?}")]
    Injected(Op),
    /// It was told to fail at reading.
    #[error("injected failure of load")]
    InjectedLoad,
    /// The map is full.
    #[error("no room for {0:?}")]
    Full(Op),
    /// The operation breaks a rule: a fault of the caller.
    #[error("{op:?} refused: {rule}")]
    Refused {
        /// The operation.
        op: Op,
        /// The rule.
        rule: &'static str,
    },
}

impl FakeDataplane {
    /// Empty.
    pub fn new(capacity: Capacity) -> Self {
        Self {
            tables: Tables::default(),
            capacity,
            now: 0,
            grace: 0,
            asked: 0,
            fail_load: false,
            fault: Box::new(|_, _| None),
            covered: BTreeMap::new(),
            named_by: BTreeMap::new(),
            left: BTreeMap::new(),
        }
    }

    /// With content, however broken.
    pub fn with_tables(capacity: Capacity, tables: Tables) -> Self {
        let mut fake = Self::new(capacity);
        for (slot, backend) in &tables.slots {
            fake.named_by.entry(*backend).or_default().insert(*slot);
        }
        for range in tables.frontends.values().filter_map(range_of) {
            fake.covered.insert(range.first, range);
        }
        fake.tables = tables;
        fake
    }

    /// What it holds.
    pub const fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Asks `fault` from now on whether an operation fails; it is given the number of the operation, from 1.
    pub fn fail_with(&mut self, fault: impl FnMut(u64, &Op) -> Option<When> + Send + 'static) {
        self.fault = Box::new(fault);
    }

    /// Every `n`th operation fails.
    pub fn fail_every(&mut self, n: u64, when: When) {
        self.fail_with(move |number, _| (n != 0 && number.is_multiple_of(n)).then_some(when));
    }

    /// About `per_thousand` of a thousand operations fail, half before and half after their effect; the same ones for
    /// the same seed.
    pub fn fail_by_seed(&mut self, seed: u64, per_thousand: u64) {
        let mut state = seed;
        self.fail_with(move |_, _| {
            // SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut x = state;
            x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            x ^= x >> 31;
            let when = if x & 1 == 0 { When::Before } else { When::After };
            ((x >> 1) % 1000 < per_thousand).then_some(when)
        });
    }

    /// Nothing fails from now on.
    pub fn heal(&mut self) {
        self.fail_with(|_, _| None);
    }

    /// The frontend whose range a slot is in, if any.
    fn cover(&self, slot: u32) -> Option<SlotRange> {
        self.covered.range(..=slot).next_back().map(|(_, range)| *range).filter(|range| range.slots().contains(&slot))
    }

    fn is_served(&self, backend: u32) -> bool {
        self.named_by.get(&backend).into_iter().flatten().any(|slot| self.cover(*slot).is_some())
    }

    /// The rule that an operation breaks, if any.
    fn broken_rule(&self, op: &Op) -> Option<&'static str> {
        let tables = &self.tables;
        match op {
            Op::SetService(id, entry) => first_broken([
                (*id != 0 && *id < self.capacity.services, "id out of range"),
                (!entry.name.as_str().is_empty(), "service without a name"),
            ]),
            Op::SetBackend(id, entry) => self.broken_backend(*id, entry),
            Op::SetSlot(slot, backend) => {
                let same = tables.slots.get(slot) == Some(backend);
                let in_grace = self.left.get(slot).is_some_and(|left| self.now < left.saturating_add(self.grace));
                first_broken([
                    (*slot != 0 && *slot < self.capacity.slots, "slot out of range"),
                    (tables.backends.contains_key(backend), "slot names an absent backend"),
                    (same || self.cover(*slot).is_none(), "slot changed under a frontend"),
                    (same || !in_grace, "slot changed within the grace"),
                ])
            }
            Op::SetFrontend(key, entry) => self.broken_frontend(key, entry),
            Op::SetDevice(ifindex, _) => first_broken([(*ifindex != 0, "interface 0")]),
            Op::SetLocalPod(ip, entry) => first_broken([
                (*ip != IpBytes::UNSPECIFIED, "unspecified pod address"),
                (self.device_fits(entry), "pod address on an absent or another device"),
            ]),
            Op::DeleteSlot(slot) => {
                let in_grace = self.left.get(slot).is_some_and(|left| self.now < left.saturating_add(self.grace));
                first_broken([
                    (self.cover(*slot).is_none(), "slot zeroed under a frontend"),
                    (!in_grace, "slot zeroed within the grace"),
                ])
            }
            Op::DeleteBackend(id) => first_broken([(!self.is_served(*id), "backend zeroed under a frontend")]),
            Op::DeleteService(id) => first_broken([
                (*id == 0 || !tables.frontends.values().any(|f| f.service == *id), "a frontend leads to the service"),
                (!tables.backends.values().any(|b| b.service == *id), "a backend belongs to the service"),
                (!self.has_ranges(*id), "an address range belongs to the service"),
            ]),
            Op::DeleteDevice(ifindex) => first_broken([(
                !tables.local_pods.values().any(|pod| pod.ifindex == *ifindex),
                "a pod address is bound to the device",
            )]),
            Op::SetPrefix(key, value) => first_broken([
                (*value == 1, "address range with another value than 1"),
                (prefix_bits(key).is_some(), "address range of no length"),
                (is_global(key) || tables.services.contains_key(&key.scope), "address range of an absent service"),
            ]),
            Op::DeletePrefix(key) => {
                let last = tables.prefixes.contains_key(key) && self.ranges(key.scope).count() == 1;
                let filtered = |f: &FrontendEntry| {
                    f.service == key.scope && f.flags & FrontendEntry::SOURCE_RANGES != 0 && !is_global(key)
                };
                first_broken([(!last || !tables.frontends.values().any(filtered), "the last range of a frontend")])
            }
            Op::DeleteFrontend(key) => {
                let inner = tables.frontends.get(&FrontendKey { scope: FrontendKey::SCOPE_CLUSTER, ..*key });
                let split = inner.is_some_and(|f| f.flags & FrontendEntry::EXTERNAL_SPLIT != 0);
                first_broken([(
                    key.scope != FrontendKey::SCOPE_EXTERNAL || !split,
                    "another frontend points to the one for traffic from outside",
                )])
            }
            Op::SetCgroupPod(id, _) => first_broken([(*id != 0, "cgroup 0")]),
            Op::DeleteLocalPod(_) | Op::DeleteCgroupPod(_) => None,
        }
    }

    /// Address ranges of a scope.
    fn ranges(&self, scope: u32) -> impl Iterator<Item = &PrefixKey> {
        self.tables.prefixes.keys().filter(move |key| key.scope == scope)
    }

    fn has_ranges(&self, scope: u32) -> bool {
        self.ranges(scope).next().is_some()
    }

    fn broken_backend(&self, id: u32, entry: &BackendEntry) -> Option<&'static str> {
        let old = self.tables.backends.get(&id);
        let same_use = |old: &BackendEntry| BackendEntry { flags: entry.flags, ..*old } == *entry;
        let used_again = |old: &BackendEntry| old.generation != entry.generation && !self.is_served(id);
        first_broken([
            (id != 0 && id < self.capacity.backends, "backend id out of range"),
            (entry.generation != 0, "backend of generation 0"),
            (entry.ip != IpBytes::UNSPECIFIED && entry.port.get() != 0, "backend without address or port"),
            (self.tables.services.contains_key(&entry.service), "backend of an absent service"),
            (old.is_none_or(|old| same_use(old) || used_again(old)), "backend changed while in use"),
        ])
    }

    fn broken_frontend(&self, key: &FrontendKey, entry: &FrontendEntry) -> Option<&'static str> {
        let tables = &self.tables;
        if *key == FrontendKey::address(key.ip) {
            let empty = entry.count == 0 && entry.first == 0 && entry.service == 0;
            return first_broken([
                (empty, "address mark that leads somewhere"),
                (entry.flags & MARKS != 0 && entry.flags & !MARKS == 0, "address mark with other flags"),
            ]);
        }
        let range = SlotRange { first: entry.first, count: entry.count };
        let fits = |slot| {
            let backend = tables.slots.get(&slot).and_then(|id| tables.backends.get(id));
            backend.is_some_and(|b| (b.service, b.proto, b.ip.family()) == (entry.service, key.proto, key.ip.family()))
        };
        let old = tables.frontends.get(key);
        let moved =
            old.is_some_and(|old| (old.first, old.count, old.service) != (entry.first, entry.count, entry.service));
        let own = old.and_then(range_of);
        let free = range.slots().all(|slot| self.cover(slot).is_none_or(|cover| Some(cover) == own));
        first_broken([
            (key.port.get() != 0 && key.proto.0 != 0, "frontend without port or protocol"),
            (tables.services.contains_key(&entry.service), "frontend of an absent service"),
            (range.count == 0 || range.first != 0, "frontend over slot 0"),
            (range.count == 0 || range.end() <= self.capacity.slots, "frontend over slots out of range"),
            (range.slots().all(fits), "frontend over slots without a fitting backend"),
            (!moved || free, "frontend over another frontend's slots"),
            (!moved || old.is_none_or(|old| old.generation != entry.generation), "switch without a new generation"),
            (entry.flags & MARKS == 0, "frontend with the flags of an address mark"),
            (
                entry.flags & FrontendEntry::EXTERNAL_SPLIT == 0
                    || tables.frontends.contains_key(&FrontendKey { scope: FrontendKey::SCOPE_EXTERNAL, ..*key }),
                "no frontend for traffic from outside",
            ),
            (
                entry.flags & FrontendEntry::SOURCE_RANGES == 0 || self.has_ranges(entry.service),
                "frontend for sources that nobody named",
            ),
        ])
    }

    fn device_fits(&self, pod: &LocalPodEntry) -> bool {
        self.tables.devices.get(&pod.ifindex).is_some_and(|device| device.pod_mac == pod.mac)
    }

    fn is_full(&self, op: &Op) -> bool {
        let full = |present: bool, length: usize, capacity: u32| {
            !present && u32::try_from(length).is_ok_and(|length| length >= capacity)
        };
        let (tables, capacity) = (&self.tables, &self.capacity);
        match op {
            Op::SetService(id, _) => full(tables.services.contains_key(id), tables.services.len(), capacity.services),
            Op::SetFrontend(key, _) => {
                full(tables.frontends.contains_key(key), tables.frontends.len(), capacity.frontends)
            }
            Op::SetDevice(i, _) => full(tables.devices.contains_key(i), tables.devices.len(), capacity.devices),
            Op::SetLocalPod(ip, _) => {
                full(tables.local_pods.contains_key(ip), tables.local_pods.len(), capacity.local_pods)
            }
            Op::SetPrefix(key, _) => full(tables.prefixes.contains_key(key), tables.prefixes.len(), capacity.prefixes),
            Op::SetCgroupPod(id, _) => {
                full(tables.cgroup_pods.contains_key(id), tables.cgroup_pods.len(), capacity.cgroup_pods)
            }
            // Arrays have every index from the start.
            Op::SetBackend(..)
            | Op::SetSlot(..)
            | Op::DeleteService(_)
            | Op::DeleteBackend(_)
            | Op::DeleteSlot(_)
            | Op::DeleteFrontend(_)
            | Op::DeleteDevice(_)
            | Op::DeleteLocalPod(_)
            | Op::DeletePrefix(_)
            | Op::DeleteCgroupPod(_) => false,
        }
    }

    fn perform(&mut self, op: &Op) {
        match op {
            Op::SetSlot(slot, _) | Op::DeleteSlot(slot) => {
                if let Some(old) = self.tables.slots.get(slot)
                    && let Some(slots) = self.named_by.get_mut(old)
                {
                    slots.remove(slot);
                }
                if let Op::SetSlot(slot, backend) = op {
                    self.named_by.entry(*backend).or_default().insert(*slot);
                }
            }
            Op::SetFrontend(key, _) | Op::DeleteFrontend(key) => {
                if let Some(old) = self.tables.frontends.get(key).and_then(range_of) {
                    self.covered.remove(&old.first);
                    self.left.extend(old.slots().map(|slot| (slot, self.now)));
                }
                if let Op::SetFrontend(_, entry) = op
                    && let Some(range) = range_of(entry)
                {
                    self.covered.insert(range.first, range);
                    self.left.retain(|slot, _| !range.slots().contains(slot));
                }
            }
            Op::SetService(..)
            | Op::SetBackend(..)
            | Op::SetDevice(..)
            | Op::SetLocalPod(..)
            | Op::SetPrefix(..)
            | Op::SetCgroupPod(..)
            | Op::DeleteService(_)
            | Op::DeleteBackend(_)
            | Op::DeleteDevice(_)
            | Op::DeleteLocalPod(_)
            | Op::DeletePrefix(_)
            | Op::DeleteCgroupPod(_) => {}
        }
        self.tables.apply(op);
    }
}

impl Dataplane for FakeDataplane {
    type Error = FakeError;

    fn load(&mut self) -> Result<Tables, FakeError> {
        if std::mem::take(&mut self.fail_load) {
            return Err(FakeError::InjectedLoad);
        }
        Ok(self.tables.clone())
    }

    fn apply(&mut self, op: &Op) -> Result<(), FakeError> {
        self.asked += 1;
        let fault = (self.fault)(self.asked, op);
        if fault == Some(When::Before) {
            return Err(FakeError::Injected(op.clone()));
        }
        if let Some(rule) = self.broken_rule(op) {
            return Err(FakeError::Refused { op: op.clone(), rule });
        }
        if self.is_full(op) {
            return Err(FakeError::Full(op.clone()));
        }
        self.perform(op);
        if fault == Some(When::After) {
            return Err(FakeError::Injected(op.clone()));
        }
        Ok(())
    }
}

impl fmt::Debug for FakeDataplane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakeDataplane").field("now", &self.now).field("tables", &self.tables).finish_non_exhaustive()
    }
}

/// The flags of address marks.
const MARKS: u32 = FrontendEntry::ADDRESS_REJECT
    | FrontendEntry::ADDRESS_NODE_PORT
    | FrontendEntry::ADDRESS_NODE
    | FrontendEntry::ADDRESS_LOOPBACK;

/// Does the range belong to no service port?
const fn is_global(key: &PrefixKey) -> bool {
    key.scope == PrefixKey::SERVICE_CIDR || key.scope == PrefixKey::LOCAL_SOURCE
}

/// Significant bits of the address of a range; `None` when its length is none of its family.
const fn prefix_bits(key: &PrefixKey) -> Option<u32> {
    let before = if key.ip.is_v4() { 128 } else { 32 };
    if key.length < before || key.length > 160 { None } else { Some(key.length - before) }
}

/// The range of a frontend that has one.
fn range_of(entry: &FrontendEntry) -> Option<SlotRange> {
    (entry.count > 0).then_some(SlotRange { first: entry.first, count: entry.count })
}

fn first_broken<const N: usize>(rules: [(bool, &'static str); N]) -> Option<&'static str> {
    rules.into_iter().find(|(kept, _)| !kept).map(|(_, rule)| rule)
}
