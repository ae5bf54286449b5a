//! Address ranges: those that cluster addresses are taken from, those of pods, those of allowed sources.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use ipnet::{IpNet, Ipv6Net};
use proxy_abi::{IpBytes, PrefixKey};

use crate::address::Family;
use crate::plan::TableDeltas;
use crate::policy::{DetectLocal, Policy};
use crate::service::Service;
use crate::state::ClusterState;

use super::Compiler;

/// Ranges that belong to no service port.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    rows: BTreeSet<PrefixKey>,
}

/// Which sources of one family a load balancer's address is open to.
#[derive(Debug)]
pub(super) struct Sources<'a> {
    ranges: Vec<&'a IpNet>,
    /// An address of this node is among them.
    pub(super) node_allowed: bool,
}

impl Ranges {
    /// One that a former agent wrote.
    pub(super) fn restore(&mut self, key: PrefixKey) {
        self.rows.insert(key);
    }
}

impl<'a> Sources<'a> {
    /// `None` when all sources of the family are let in: none is named, or a range of all is.
    pub(super) fn of(state: &ClusterState, service: &'a Service, family: Family) -> Option<Self> {
        let of_family = |range: &&IpNet| Family::of(range.addr()) == family;
        let ranges: Vec<&IpNet> = service.source_ranges.iter().filter(of_family).collect();
        if ranges.is_empty() || ranges.iter().any(|range| range.prefix_len() == 0) {
            return None;
        }
        let node_allowed = state.node().addresses.iter().any(|ip| ranges.iter().any(|range| range.contains(ip)));
        Some(Self { ranges, node_allowed })
    }

    /// As rows of a service port. Where the node may come, so may what it sends to the address itself.
    pub(super) fn rows(&self, service: u32, vip: IpAddr) -> impl Iterator<Item = PrefixKey> {
        let own = self.node_allowed.then(|| PrefixKey::exact(service, IpBytes::from(vip)));
        self.ranges.iter().flat_map(move |range| rows(service, **range)).chain(own)
    }
}

impl Compiler {
    /// Compiles the ranges that belong to no service port.
    pub(super) fn compile_ranges(&mut self, state: &ClusterState, tables: &mut TableDeltas) {
        let mut wanted: BTreeSet<PrefixKey> = global(state, &self.policy).collect();
        if state.unreadable() {
            // What names a range may be what cannot be read.
            wanted.extend(&self.ranges.rows);
        }
        for key in self.ranges.rows.difference(&wanted) {
            tables.prefixes.unwant(key);
        }
        for key in &wanted {
            tables.prefixes.want(*key, 1);
        }
        self.ranges.rows = wanted;
    }
}

fn global<'a>(state: &'a ClusterState, policy: &'a Policy) -> impl Iterator<Item = PrefixKey> + 'a {
    let services = state.service_cidrs().flat_map(|(_, ranges)| ranges);
    let local: &[IpNet] = match policy.detect_local {
        DetectLocal::Interface => &[],
        DetectLocal::ClusterCidr => &policy.cluster_cidrs,
        DetectLocal::NodeCidr => &state.node().pod_cidrs,
    };
    let services = services.flat_map(|range| rows(PrefixKey::SERVICE_CIDR, *range));
    services.chain(local.iter().flat_map(|range| rows(PrefixKey::LOCAL_SOURCE, *range)))
}

/// A range as rows: one, except that an IPv6 range around `::ffff:0:0/96` leaves that out, because the maps hold IPv4
/// there.
fn rows(scope: u32, range: IpNet) -> Vec<PrefixKey> {
    let range = range.trunc();
    let key = |range: IpNet| PrefixKey::range(scope, IpBytes::from(range.network()), range.prefix_len());
    let mapped = u128::from(Ipv6Addr::new(0, 0, 0, 0, 0, 0xffff, 0, 0));
    match range {
        IpNet::V6(v6) if v6.prefix_len() < 96 && v6.contains(&Ipv6Addr::from(mapped)) => (v6.prefix_len()..96)
            .filter_map(|bits| {
                // What differs from it first in this bit.
                let sibling = mapped ^ (1 << (127 - bits));
                Ipv6Net::new(Ipv6Addr::from(sibling), bits + 1).ok().map(|net| key(IpNet::V6(net.trunc())))
            })
            .collect(),
        IpNet::V4(_) | IpNet::V6(_) => vec![key(range)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(range: &str) -> Vec<String> {
        let rows = rows(7, range.parse().expect("a range"));
        rows.iter().map(|key| format!("{}/{}", key.ip, key.length - 32)).collect()
    }

    #[test]
    fn a_range_is_one_row_unless_ipv4_lies_in_it() {
        let rows: [(&str, &[&str]); 6] = [
            ("10.1.2.3/8", &["10.0.0.0/104"]),
            ("0.0.0.0/0", &["0.0.0.0/96"]),
            ("fd00::7/64", &["fd00::/64"]),
            ("::/94", &["::/94"]),
            ("::fffe:0:0/95", &["::fffe:0:0/96"]),
            ("::fffc:0:0/94", &["::fffc:0:0/95", "::fffe:0:0/96"]),
        ];
        for (range, expected) in rows {
            assert_eq!(text(range), expected, "{range}");
        }
        let all = text("::/0");
        assert_eq!((all.len(), all[0].as_str()), (96, "8000::/1"), "one for each bit");
    }
}
