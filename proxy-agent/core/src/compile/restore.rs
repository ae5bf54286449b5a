//! Adoption of what a former agent left in the maps.
//!
//! Rows that make sense become the compiler's own last result, so the first compilation finds them as it would find its
//! own: the same numbers stay, what changed meanwhile is changed, what is gone is retired. Rows that make no sense are
//! not desired, so they are deleted; until then their numbers are taken.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::{BackendEntry, FrontendEntry, FrontendKey, PrefixKey};

use crate::ids::{Generations, SlotRange};
use crate::name::ServicePortName;
use crate::plan::TableDeltas;
use crate::tables::Tables;

use super::Compiler;
use super::claims::is_of_cluster_address;
use super::port::{Port, range_of};

impl Compiler {
    /// Takes over the content of the maps; `self` and `tables` are new. Interfaces need no restoring: they have no
    /// numbers of ours.
    pub fn restore(&mut self, actual: &Tables, tables: &mut TableDeltas, now: u64) {
        tables.load(actual.clone());
        for (id, entry) in &actual.cgroup_pods {
            tables.cgroup_pods.want(*id, *entry);
        }
        self.pools.generations = Generations::restored(actual.backends.values().map(|entry| entry.generation));
        let names = self.restore_services(actual, tables);
        let mut ports: BTreeMap<u32, Port> = names
            .keys()
            .map(|id| {
                let port = Port {
                    id: *id,
                    backends: BTreeMap::new(),
                    frontends: BTreeSet::new(),
                    sources: BTreeSet::new(),
                    lacks_internal: false,
                    lacks_external: false,
                };
                (*id, port)
            })
            .collect();
        self.marks.restore(actual);
        self.restore_backends(actual, &mut ports, tables);
        self.restore_prefixes(actual, &mut ports, tables);
        self.restore_frontends(actual, &names, &mut ports, tables);
        self.restore_leftover_slots(actual, tables, now);
        for (id, name) in names {
            if let Some(port) = ports.remove(&id) {
                self.services.entry(name.service).or_default().insert(name.port, port);
            }
        }
    }

    fn restore_services(&mut self, actual: &Tables, tables: &mut TableDeltas) -> BTreeMap<u32, ServicePortName> {
        let mut names = BTreeMap::new();
        let mut taken = BTreeSet::new();
        for (id, entry) in &actual.services {
            let valid = self.pools.services.reserve(*id);
            let name = ServicePortName::parse(entry.name.as_str()).filter(|name| valid && taken.insert(name.clone()));
            if let Some(name) = name {
                tables.services.want(*id, *entry);
                names.insert(*id, name);
            } else if valid {
                self.retired.service(*id);
            }
        }
        names
    }

    fn restore_backends(&mut self, actual: &Tables, ports: &mut BTreeMap<u32, Port>, tables: &mut TableDeltas) {
        for (id, entry) in &actual.backends {
            let valid = self.pools.backends.reserve(*id);
            let key = (entry.ip, entry.port, entry.proto);
            let port = ports.get_mut(&entry.service).filter(|port| {
                valid && entry.generation != 0 && entry.reserved == 0 && !port.backends.contains_key(&key)
            });
            if let Some(port) = port {
                port.backends.insert(key, *id);
                tables.backends.want(*id, *entry);
            } else if valid {
                self.retired.backend(*id);
            }
        }
    }

    fn restore_frontends(
        &mut self,
        actual: &Tables,
        names: &BTreeMap<u32, ServicePortName>,
        ports: &mut BTreeMap<u32, Port>,
        tables: &mut TableDeltas,
    ) {
        for (key, entry) in &actual.frontends {
            let parts = range_of(entry).map(|range| self.pools.slots.reserve(range)).unwrap_or_default();
            let owned = parts.iter().map(|part| part.count).sum::<u32>() == entry.count;
            let slots = parts.iter().flat_map(|part| part.slots()).filter_map(|slot| actual.slots.get_key_value(&slot));
            for (slot, backend) in slots {
                tables.slots.want(*slot, *backend);
            }
            let inner = FrontendKey { scope: FrontendKey::SCOPE_CLUSTER, ..*key };
            let name = names.get(&entry.service).filter(|_| owned && is_whole(key, entry, actual, tables));
            let port = ports.get_mut(&entry.service).filter(|port| *key == inner || port.frontends.contains(&inner));
            if let (Some(name), Some(port)) = (name, port) {
                port.frontends.insert(*key);
                tables.frontends.want(*key, *entry);
                self.claim(*key, name, is_of_cluster_address(entry), tables);
            } else {
                for part in parts {
                    self.retired.range(*key, part);
                }
            }
        }
    }

    fn restore_prefixes(&mut self, actual: &Tables, ports: &mut BTreeMap<u32, Port>, tables: &mut TableDeltas) {
        for key in actual.prefixes.keys() {
            match key.scope {
                PrefixKey::SERVICE_CIDR | PrefixKey::LOCAL_SOURCE => self.ranges.restore(*key),
                service => {
                    let Some(port) = ports.get_mut(&service) else { continue };
                    port.sources.insert(*key);
                }
            }
            tables.prefixes.want(*key, 1);
        }
    }

    /// Slots that the former agent had retired, and had no time to zero: the restart does not shorten the grace.
    fn restore_leftover_slots(&mut self, actual: &Tables, tables: &mut TableDeltas, now: u64) {
        for (slot, backend) in &actual.slots {
            for part in self.pools.slots.reserve(SlotRange { first: *slot, count: 1 }) {
                tables.slots.want(*slot, *backend);
                self.pools.slots.quarantine(part, now);
                // Whoever read the slot may still look for this backend.
                if self.pools.backends.reserve(*backend) {
                    self.pools.backends.quarantine(*backend, now);
                }
            }
        }
    }
}

/// Is it a frontend of ours over backends of its own service port, all of them adopted?
fn is_whole(key: &FrontendKey, entry: &FrontendEntry, actual: &Tables, tables: &TableDeltas) -> bool {
    let fits = |backend: &BackendEntry| {
        (backend.service, backend.proto, backend.ip.family()) == (entry.service, key.proto, key.ip.family())
    };
    let served = |slot: u32| {
        let backend = actual.slots.get(&slot).and_then(|id| tables.backends.desired().get(id));
        backend.is_some_and(fits)
    };
    [FrontendKey::SCOPE_CLUSTER, FrontendKey::SCOPE_EXTERNAL].contains(&key.scope)
        && key.port.get() != 0
        && range_of(entry).is_none_or(|range| range.slots().all(served))
}
