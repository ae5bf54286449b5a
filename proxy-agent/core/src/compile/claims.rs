//! Who holds which frontend. The first holder keeps it; the others wait.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::{FrontendEntry, FrontendKey, IpBytes};

use crate::name::{ObjectName, ServicePortName};

/// Holders, and those that would like to be.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    holders: BTreeMap<FrontendKey, Holder>,
    waiting: BTreeMap<FrontendKey, BTreeSet<ObjectName>>,
    /// Reverse of `waiting`.
    waits_for: BTreeMap<ObjectName, BTreeSet<FrontendKey>>,
    /// Held frontends of a cluster address; never 0.
    cluster: BTreeMap<IpBytes, u32>,
}

#[derive(Clone, Debug)]
struct Holder {
    name: ServicePortName,
    /// Is it one of a cluster address?
    cluster: bool,
}

/// Is it the entry of a cluster address? No other has this flag, and every such one has it.
pub(super) const fn is_of_cluster_address(entry: &FrontendEntry) -> bool {
    entry.flags & FrontendEntry::MASQUERADE_OUTSIDE != 0
}

impl Claims {
    /// Who holds it.
    pub(super) fn holder(&self, key: &FrontendKey) -> Option<&ServicePortName> {
        self.holders.get(key).map(|holder| &holder.name)
    }

    /// Does any service port hold a frontend of this cluster address?
    pub(super) fn holds_cluster_address(&self, ip: IpBytes) -> bool {
        self.cluster.contains_key(&ip)
    }

    /// Frontends held, and the marks of their addresses.
    pub(super) fn len(&self) -> usize {
        self.holders.len() + self.cluster.len()
    }

    /// `name` holds a frontend that is free, or its own. True when the mark of its address may be another by that.
    pub(super) fn hold(&mut self, key: FrontendKey, name: ServicePortName, cluster: bool) -> bool {
        let was_cluster = self.holders.insert(key, Holder { name, cluster }).is_some_and(|old| old.cluster);
        match (was_cluster, cluster) {
            (false, true) => *self.cluster.entry(key.ip).or_default() += 1,
            (true, false) => self.uncount(key.ip),
            (true, true) | (false, false) => {}
        }
        was_cluster != cluster
    }

    /// A frontend becomes free. Returns those who waited for it.
    pub(super) fn release(&mut self, key: &FrontendKey) -> BTreeSet<ObjectName> {
        if self.holders.remove(key).is_some_and(|old| old.cluster) {
            self.uncount(key.ip);
        }
        self.waiting.get(key).cloned().unwrap_or_default()
    }

    fn uncount(&mut self, ip: IpBytes) {
        if let Some(count) = self.cluster.get_mut(&ip) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.cluster.remove(&ip);
            }
        }
    }

    /// `service` would like a frontend that another one holds.
    pub(super) fn wait(&mut self, key: FrontendKey, service: &ObjectName) {
        self.waiting.entry(key).or_default().insert(service.clone());
        self.waits_for.entry(service.clone()).or_default().insert(key);
    }

    /// `service` waits for nothing any more.
    pub(super) fn forget_waiting(&mut self, service: &ObjectName) {
        for key in self.waits_for.remove(service).unwrap_or_default() {
            if let Some(waiting) = self.waiting.get_mut(&key) {
                waiting.remove(service);
                if waiting.is_empty() {
                    self.waiting.remove(&key);
                }
            }
        }
    }
}
