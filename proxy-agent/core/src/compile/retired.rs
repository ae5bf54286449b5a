//! Numbers that are desired no more, until the dataplane is certain not to use them.

use proxy_abi::FrontendKey;

use crate::ids::SlotRange;
use crate::plan::TableDeltas;

use super::Pools;

/// Waiting for the operation that makes them unreachable to succeed.
#[derive(Clone, Debug, Default)]
pub(super) struct Retired {
    /// Range, and the frontend that may still point at it.
    ranges: Vec<(FrontendKey, SlotRange)>,
    backends: Vec<u32>,
    services: Vec<u32>,
}

impl Retired {
    pub(super) fn range(&mut self, key: FrontendKey, range: SlotRange) {
        self.ranges.push((key, range));
    }

    pub(super) fn backend(&mut self, id: u32) {
        self.backends.push(id);
    }

    pub(super) fn service(&mut self, id: u32) {
        self.services.push(id);
    }

    /// Sends into quarantine what is no longer reachable. A settled frontend points at what is desired, which is never
    /// a retired range; a settled id that is retired is deleted.
    pub(super) fn settle(&mut self, pools: &mut Pools, tables: &TableDeltas, now: u64) {
        self.ranges.retain(|(key, range)| {
            let settled = tables.frontends.settled(key);
            if settled {
                pools.slots.quarantine(*range, now);
            }
            !settled
        });
        self.backends.retain(|id| {
            let settled = tables.backends.settled(id);
            if settled {
                pools.backends.quarantine(*id, now);
            }
            !settled
        });
        self.services.retain(|id| {
            let settled = tables.services.settled(id);
            if settled {
                pools.services.quarantine(*id, now);
            }
            !settled
        });
    }
}
