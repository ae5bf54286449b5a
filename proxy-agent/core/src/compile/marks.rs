//! What an address is, whatever the port: the entries under [`FrontendKey::address`].
//!
//! Two reasons lay their flags over each other: a cluster address that is served refuses its other ports, and an
//! address of the node serves NodePorts or not.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proxy_abi::{FrontendEntry, FrontendKey, IpBytes};

use crate::address::Family;
use crate::plan::TableDeltas;
use crate::policy::{NodePortAddresses, Policy};
use crate::state::ClusterState;
use crate::tables::Tables;

use super::Compiler;

/// Flags of the addresses of the node.
#[derive(Clone, Debug, Default)]
pub(super) struct Marks {
    node: BTreeMap<IpBytes, u32>,
}

/// The flags that an address has for being one of the node.
const OF_NODE: u32 = FrontendEntry::ADDRESS_NODE | FrontendEntry::ADDRESS_NODE_PORT | FrontendEntry::ADDRESS_LOOPBACK;

impl Marks {
    pub(super) fn len(&self) -> usize {
        self.node.len()
    }

    /// Those that a former agent made.
    pub(super) fn restore(&mut self, actual: &Tables) {
        let marks = actual.frontends.iter().filter(|(key, _)| **key == FrontendKey::address(key.ip));
        let of_node = marks.map(|(key, entry)| (key.ip, entry.flags & OF_NODE));
        self.node = of_node.filter(|(_, flags)| *flags != 0).collect();
    }
}

impl Compiler {
    /// Compiles the addresses of the node.
    pub(super) fn compile_marks(&mut self, state: &ClusterState, tables: &mut TableDeltas) {
        let mut marks = node_marks(state, &self.policy);
        if state.unreadable() && state.node().addresses.is_empty() {
            // The Node object may be what cannot be read: which addresses serve NodePorts is unknown then.
            for (ip, flags) in &self.marks.node {
                *marks.entry(*ip).or_default() |= flags;
            }
        }
        let old = std::mem::replace(&mut self.marks.node, marks);
        let touched: BTreeSet<IpBytes> = old.into_keys().chain(self.marks.node.keys().copied()).collect();
        for ip in touched {
            self.mark(ip, tables);
        }
    }

    /// Writes the mark of one address, or takes it away.
    pub(super) fn mark(&self, ip: IpBytes, tables: &mut TableDeltas) {
        let reject = if self.claims.holds_cluster_address(ip) { FrontendEntry::ADDRESS_REJECT } else { 0 };
        let flags = reject | self.marks.node.get(&ip).copied().unwrap_or(0);
        let key = FrontendKey::address(ip);
        if flags == 0 {
            tables.frontends.unwant(&key);
        } else {
            let entry = FrontendEntry { first: 0, count: 0, service: 0, flags, affinity_seconds: 0, generation: 0 };
            tables.frontends.want(key, entry);
        }
    }
}

fn node_marks(state: &ClusterState, policy: &Policy) -> BTreeMap<IpBytes, u32> {
    let localhost = policy.localhost_node_ports || policy.node_port_addresses.contains(&NodePortAddresses::Localhost);
    let primary = |family| state.node().addresses.iter().find(|ip| Family::of(**ip) == family);
    let primary = [primary(Family::V4), primary(Family::V6)];
    let serves = |ip: IpAddr| {
        policy.node_port_addresses.iter().any(|selector| match selector {
            NodePortAddresses::Primary => primary.contains(&Some(&ip)),
            NodePortAddresses::All => !ip.is_loopback(),
            NodePortAddresses::Localhost => false,
            // A range of everything does not mean loopback; one within it does.
            NodePortAddresses::Range(range) => {
                range.contains(&ip) && (!ip.is_loopback() || range.network().is_loopback())
            }
        })
    };
    let own = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let mut addresses = state.node_addresses();
    addresses.retain(|ip| !ip.is_unspecified());
    addresses.extend(own.into_iter().filter(|ip| localhost || serves(*ip)));
    let mark = |ip: IpAddr| {
        let served = serves(ip) || localhost && own.contains(&ip);
        let node_port = if served { FrontendEntry::ADDRESS_NODE_PORT } else { 0 };
        let loopback = if served && ip.is_loopback() { FrontendEntry::ADDRESS_LOOPBACK } else { 0 };
        (IpBytes::from(ip), FrontendEntry::ADDRESS_NODE | node_port | loopback)
    };
    addresses.into_iter().map(mark).collect()
}
