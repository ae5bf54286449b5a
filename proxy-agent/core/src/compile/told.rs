//! What is told of Services beside the maps, kept up to date one Service at a time.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::address::{AddressFault, Family};
use crate::facts::{Facts, HealthCheck};
use crate::name::ObjectName;
use crate::service::Service;
use crate::state::ClusterState;

use super::port::Port;

/// The sum, and what each Service adds to it.
#[derive(Clone, Debug, Default)]
pub(super) struct Told {
    facts: Facts,
    /// Service → ports that lack local endpoints for traffic from inside, from outside; never both 0.
    lacking: BTreeMap<ObjectName, (u32, u32)>,
}

impl Told {
    pub(super) const fn facts(&self) -> &Facts {
        &self.facts
    }

    /// A Service was compiled to these ports; `None`: it is gone. True when something is to be told anew.
    pub(super) fn tell(
        &mut self,
        state: &ClusterState,
        name: &ObjectName,
        service: Option<&Service>,
        ports: &BTreeMap<Arc<str>, Port>,
    ) -> bool {
        let count = |lacks: fn(&Port) -> bool| {
            u32::try_from(ports.values().filter(|port| lacks(port)).count()).unwrap_or(u32::MAX)
        };
        let now = (count(|port| port.lacks_internal), count(|port| port.lacks_external));
        let before = if now == (0, 0) { self.lacking.remove(name) } else { self.lacking.insert(name.clone(), now) };
        let before = before.unwrap_or_default();
        let Facts { no_local_internal, no_local_external, health_checks } = &mut self.facts;
        *no_local_internal = no_local_internal.saturating_add(now.0).saturating_sub(before.0);
        *no_local_external = no_local_external.saturating_add(now.1).saturating_sub(before.1);
        let check = service.and_then(|service| {
            let port = service.health_check_node_port?;
            Some(HealthCheck { port, local_endpoints: local_endpoints(state, name) })
        });
        let old = match check {
            Some(check) => health_checks.insert(name.clone(), check),
            None => health_checks.remove(name),
        };
        now != before || old != check
    }
}

/// Ready endpoints on this node. A pod of two families has an endpoint in each, so the family with more counts.
fn local_endpoints(state: &ClusterState, name: &ObjectName) -> u32 {
    let here = &state.node().name;
    let slices = state.slices_of(name).filter(|slice| !slice.ports.is_empty());
    let endpoints = slices.flat_map(|slice| &slice.endpoints);
    let local = endpoints.filter(|e| e.ready && !here.is_empty() && e.node.as_ref() == Some(here));
    let usable: BTreeSet<IpAddr> = local.map(|e| e.address).filter(|ip| AddressFault::of(*ip).is_none()).collect();
    let count = |family| usable.iter().filter(|ip| Family::of(**ip) == family).count();
    u32::try_from(count(Family::V4).max(count(Family::V6))).unwrap_or(u32::MAX)
}
