//! Which endpoints serve a service port on this node.
//!
//! ```text
//!   cluster = { ready, and named by the topology hints }   if none: { serving and terminating }, hints aside
//!   local   = { ready, on this node }                      if none: { serving and terminating, on this node }
//! ```
//!
//! The Service has endpoints at all (`hasAnyEndpoints`) exactly when the cluster set is not empty: a hint level that
//! applies leaves at least one ready endpoint.
//!
//! Hints (per service port, evaluated per node; `spec.trafficDistribution` is the controller's business):
//!
//! | every ready endpoint has | and one names | then only |
//! | --- | --- | --- |
//! | `hints.forNodes` | this node | those that name this node |
//! | `hints.forZones` | this node's zone | those that name this zone |
//! | otherwise | | no filter |

use std::cmp::Reverse;
use std::net::IpAddr;
use std::num::NonZeroU16;
use std::sync::Arc;

use crate::address::{AddressFault, Family};
use crate::service::{Endpoint, EndpointSlice, ServicePort};

/// Where the selection is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Locality<'a> {
    /// Name of this node; empty when it is not known.
    pub node: &'a str,
    /// Its zone.
    pub zone: Option<&'a str>,
}

/// An endpoint that a flow may be on. Those in no set take no new flows, but keep the ones they have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Target {
    /// Address.
    pub address: IpAddr,
    /// Target port of this endpoint: a named port may differ from endpoint to endpoint.
    pub port: NonZeroU16,
    /// The endpoint is on this node.
    pub local: bool,
    /// Member of the set for traffic policy `Cluster`.
    pub cluster: bool,
    /// Member of the set for traffic policy `Local`.
    pub local_set: bool,
}

/// Level of the topology hints that applies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Topology<'a> {
    Any,
    Node(&'a str),
    Zone(&'a str),
}

/// One endpoint under one target port.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    address: IpAddr,
    port: NonZeroU16,
    endpoint: &'a Endpoint,
}

/// Endpoints of one family that are ready or serving, in the order of address and port, each once.
///
/// A slice's port matches by name, and only when it has the service port's protocol.
pub fn select<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePort,
    family: Family,
    here: Locality<'_>,
) -> Vec<Target> {
    let candidates = candidates(slices, port, family);
    let topology = topology(&candidates, here);
    let ready = |c: &Candidate<'_>| c.endpoint.ready && names(topology, c.endpoint);
    let local = |c: &Candidate<'_>| !here.node.is_empty() && c.endpoint.node.as_deref() == Some(here.node);
    let draining = |c: &Candidate<'_>| c.endpoint.serving && c.endpoint.terminating;
    let any_ready = candidates.iter().any(ready);
    let any_ready_local = candidates.iter().any(|c| c.endpoint.ready && local(c));
    candidates
        .iter()
        .filter(|c| c.endpoint.ready || c.endpoint.serving)
        .map(|c| Target {
            address: c.address,
            port: c.port,
            local: local(c),
            cluster: if any_ready { ready(c) } else { draining(c) },
            local_set: local(c) && if any_ready_local { c.endpoint.ready } else { draining(c) },
        })
        .collect()
}

/// Every usable endpoint once. While slices are rebalanced an endpoint is in two of them, and one of the two may be
/// older. The slices carry no order that would survive a restart, so the better state wins: not terminating before
/// terminating, then ready, then serving. A pod that is gone from one slice is soon gone from the other as well.
fn candidates<'a>(
    slices: impl Iterator<Item = &'a EndpointSlice>,
    port: &ServicePort,
    family: Family,
) -> Vec<Candidate<'a>> {
    let mut candidates = Vec::new();
    for slice in slices {
        let Some(target) = slice.ports.iter().find(|p| p.name == port.name && p.protocol == port.protocol) else {
            continue;
        };
        candidates.extend(slice.endpoints.iter().filter_map(|endpoint| {
            let address = endpoint.address;
            let usable = Family::of(address) == family && AddressFault::of(address).is_none();
            usable.then_some(Candidate { address, port: target.port, endpoint })
        }));
    }
    candidates.sort_by_key(|c| {
        let state = (!c.endpoint.terminating, c.endpoint.ready, c.endpoint.serving);
        (c.address, c.port, Reverse(state))
    });
    candidates.dedup_by_key(|c| (c.address, c.port));
    candidates
}

fn topology<'a>(candidates: &[Candidate<'_>], here: Locality<'a>) -> Topology<'a> {
    let ready = || candidates.iter().map(|c| c.endpoint).filter(|e| e.ready);
    let level = |hints: fn(&Endpoint) -> &[Arc<str>], name: &str| {
        ready().all(|e| !hints(e).is_empty()) && ready().any(|e| hints(e).iter().any(|h| **h == *name))
    };
    if !here.node.is_empty() && level(|e| &e.for_nodes, here.node) {
        return Topology::Node(here.node);
    }
    match here.zone {
        Some(zone) if level(|e| &e.for_zones, zone) => Topology::Zone(zone),
        _ => Topology::Any,
    }
}

fn names(topology: Topology<'_>, endpoint: &Endpoint) -> bool {
    match topology {
        Topology::Any => true,
        Topology::Node(node) => endpoint.for_nodes.iter().any(|hint| **hint == *node),
        Topology::Zone(zone) => endpoint.for_zones.iter().any(|hint| **hint == *zone),
    }
}
