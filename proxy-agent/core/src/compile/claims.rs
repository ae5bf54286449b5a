//! Who holds which frontend. The first holder keeps it; the others wait.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::{FrontendEntry, FrontendKey, IpBytes};

use crate::name::{ObjectName, ServicePortName};

/// The entry under [`FrontendKey::address`]: it leads nowhere and belongs to no one service port.
pub(super) const MARK: FrontendEntry =
    FrontendEntry { first: 0, count: 0, service: 0, flags: 0, affinity_seconds: 0, generation: 0 };

/// Holders, and those that would like to be.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    holders: BTreeMap<FrontendKey, ServicePortName>,
    waiting: BTreeMap<FrontendKey, BTreeSet<ObjectName>>,
    /// Reverse of `waiting`.
    waits_for: BTreeMap<ObjectName, BTreeSet<FrontendKey>>,
    /// Held frontends of an address; never 0.
    addresses: BTreeMap<IpBytes, u32>,
}

impl Claims {
    /// Who holds it.
    pub(super) fn holder(&self, key: &FrontendKey) -> Option<&ServicePortName> {
        self.holders.get(key)
    }

    /// Does any service port hold a frontend of this address?
    pub(super) fn holds_address(&self, ip: IpBytes) -> bool {
        self.addresses.contains_key(&ip)
    }

    /// Frontends held, marks included.
    pub(super) fn len(&self) -> usize {
        self.holders.len() + self.addresses.len()
    }

    /// `name` holds a frontend that is free, or its own.
    pub(super) fn hold(&mut self, key: FrontendKey, name: ServicePortName) {
        if self.holders.insert(key, name).is_none() {
            *self.addresses.entry(key.ip).or_default() += 1;
        }
    }

    /// A frontend becomes free. Returns those who waited for it.
    pub(super) fn release(&mut self, key: &FrontendKey) -> BTreeSet<ObjectName> {
        if self.holders.remove(key).is_some()
            && let Some(count) = self.addresses.get_mut(&key.ip)
        {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.addresses.remove(&key.ip);
            }
        }
        self.waiting.get(key).cloned().unwrap_or_default()
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
