//! What each interface of the node is: a pure function of what netlink listed.
//!
//! ```text
//!   veth, peer in another namespace ──┬─ port of a pod bridge ──────────────── Pod (bridge, flannel, kubenet)
//!                                     ├─ port of another bridge ────────────── Port (docker0, virbr0)
//!                                     └─ no master ──┬─ host route, no default route, no subnet of its own ── Pod (ptp)
//!                                                    └─ else ─────────────────────────────────────────────── Uplink
//! ```
//! The last line is what tells a pod from a node that is itself a namespace: its uplink is a veth with a peer in
//! another namespace too, but it carries the node's subnet or default route.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_abi::MacBytes;

use super::wire::{Address, Link, Route};

/// Kinds of interfaces whose packets travel inside other packets.
const TUNNELS: [&str; 15] = [
    "vxlan",
    "geneve",
    "wireguard",
    "ipip",
    "sit",
    "gre",
    "gretap",
    "erspan",
    "ip6tnl",
    "ip6gre",
    "ip6gretap",
    "ip6erspan",
    "vti",
    "xfrm",
    "tun",
];
/// Kinds that carry nothing from or to the outside, whatever addresses they have.
const INERT: [&str; 4] = ["dummy", "ifb", "nlmon", "vrf"];

/// What an interface of the node is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// The loopback interface.
    Loopback,
    /// Host side of a pod's veth pair.
    Pod,
    /// A bridge on which pods hang.
    PodBridge,
    /// Another bridge.
    Bridge,
    /// Leads out of the node.
    Uplink,
    /// Leads out of the node inside other packets.
    Tunnel,
    /// Belongs to a bridge or bond, and has no layer 3 of its own.
    Port,
    /// None of these: dummies, devices without an address.
    Other,
}

/// What netlink listed of the node's own namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Interfaces by index.
    pub links: BTreeMap<u32, Link>,
    /// Addresses by interface index.
    pub addresses: BTreeMap<u32, Vec<Address>>,
    /// Routes of the main table by the interface they lead out of; only for veths that belong to no bridge.
    pub routes: BTreeMap<u32, Vec<Route>>,
}

/// Which bridges are the pods'.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PodNetwork {
    /// When not empty: only bridges that match one of these, whatever their addresses.
    pub bridges: Vec<NamePattern>,
    /// The node's pod CIDRs; empty when they are not known.
    pub cidrs: Vec<IpNet>,
}

/// An interface name in which `*` stands for any characters and `?` for one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamePattern(String);

/// Why a text is no pattern of an interface name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an interface name has 1 to 15 characters, none of them a blank or '/'")]
pub struct NamePatternError;

// === impl Host ===

impl Host {
    /// Role of every interface.
    pub fn roles(&self, network: &PodNetwork) -> BTreeMap<u32, Role> {
        let mut pod_bridges = BTreeSet::new();
        let mut roles: BTreeMap<u32, Role> = BTreeMap::new();
        for link in self.links.values() {
            let role = match self.pod_ranges(network, link) {
                Some(_) => {
                    pod_bridges.extend(link.master);
                    Role::Pod
                }
                None => self.other_role(link),
            };
            roles.insert(link.index, role);
        }
        roles.extend(pod_bridges.into_iter().map(|index| (index, Role::PodBridge)));
        roles
    }

    /// Where the addresses of the pod behind an interface lie. `None` when it is no pod interface.
    pub fn pod_ranges(&self, network: &PodNetwork, link: &Link) -> Option<Vec<IpNet>> {
        if !link.is_veth_to_another_namespace() {
            return None;
        }
        match link.master {
            Some(bridge) if link.bridge_port => self.bridge_ranges(network, self.links.get(&bridge)?),
            Some(_) => None,
            None => self.routed_ranges(network, link),
        }
    }

    /// All addresses of the node itself, of any scope.
    pub fn own_addresses(&self) -> BTreeSet<IpAddr> {
        self.addresses.values().flatten().map(|address| address.net.addr()).collect()
    }

    /// Addresses of global scope of one interface.
    pub fn global_addresses(&self, index: u32) -> impl Iterator<Item = IpNet> {
        self.addresses.get(&index).into_iter().flatten().filter(|address| address.global).map(|address| address.net)
    }

    fn bridge_ranges(&self, network: &PodNetwork, bridge: &Link) -> Option<Vec<IpNet>> {
        let named = !network.bridges.is_empty();
        if named && !network.bridges.iter().any(|pattern| pattern.matches(&bridge.name)) {
            return None;
        }
        // The bridge's own address is the pods' gateway, so it lies where they lie. Asking whether the subnets overlap
        // would take a bridge into the office network for ours, when that is 10.0.0.0/8.
        let inside = |net: IpNet| network.cidrs.iter().any(|cidr| cidr.contains(&net.addr()));
        if self.global_addresses(bridge.index).any(inside) {
            return Some(network.cidrs.clone());
        }
        let subnets: Vec<_> = self.global_addresses(bridge.index).map(|net| net.trunc()).collect();
        match (named, network.cidrs.is_empty(), subnets.is_empty()) {
            (true, _, true) => Some(network.cidrs.clone()),
            (true, _, false) | (false, true, false) => Some(subnets),
            (false, false, _) | (false, true, true) => None,
        }
    }

    /// An interface without a bridge is a pod's when the node has routes to single hosts behind it, and nothing else.
    fn routed_ranges(&self, network: &PodNetwork, link: &Link) -> Option<Vec<IpNet>> {
        let is_host = |net: &IpNet| net.prefix_len() == net.max_prefix_len();
        let own: BTreeSet<_> = self.global_addresses(link.index).collect();
        let routes = self.routes.get(&link.index)?;
        if routes.iter().any(|route| route.to.prefix_len() == 0) || !own.iter().all(is_host) {
            return None;
        }
        let hosts: Vec<_> = routes
            .iter()
            .map(|route| route.to)
            .filter(|net| is_host(net) && !own.contains(net))
            .filter(|net| network.cidrs.is_empty() || network.cidrs.iter().any(|cidr| cidr.contains(net)))
            .collect();
        (!hosts.is_empty()).then_some(hosts)
    }

    fn other_role(&self, link: &Link) -> Role {
        let kind = &*link.kind;
        if link.loopback {
            Role::Loopback
        } else if link.master.and_then(|master| self.links.get(&master)).is_some_and(|master| &*master.kind != "vrf") {
            Role::Port
        } else if kind == "bridge" {
            Role::Bridge
        } else if TUNNELS.contains(&kind) {
            Role::Tunnel
        } else if INERT.contains(&kind) || !self.leads_out(link.index) {
            Role::Other
        } else {
            Role::Uplink
        }
    }

    fn leads_out(&self, index: u32) -> bool {
        self.global_addresses(index).next().is_some()
            || self.routes.get(&index).is_some_and(|routes| routes.iter().any(|route| route.to.prefix_len() == 0))
    }
}

/// Tunnels whose packets begin with their IP header: the programs look for an Ethernet header first.
const WITHOUT_ETHERNET: [&str; 9] = ["wireguard", "ipip", "sit", "gre", "ip6tnl", "ip6gre", "vti", "vti6", "xfrm"];

impl Link {
    /// Do its packets have an Ethernet header?
    pub fn is_ethernet(&self) -> bool {
        self.mac != MacBytes::default() && !WITHOUT_ETHERNET.contains(&&*self.kind)
    }

    /// The other end of the pair is in a network namespace that has an id in ours.
    pub fn is_veth_to_another_namespace(&self) -> bool {
        &*self.kind == "veth" && self.peer.is_some() && self.peer_nsid.is_some()
    }
}

// === impl NamePattern ===

impl std::str::FromStr for NamePattern {
    type Err = NamePatternError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let valid = (1..=15).contains(&text.len()) && !text.contains(|c: char| c.is_whitespace() || c == '/');
        valid.then(|| Self(text.to_owned())).ok_or(NamePatternError)
    }
}

impl NamePattern {
    /// Does a name match?
    pub fn matches(&self, name: &str) -> bool {
        matches(self.0.as_bytes(), name.as_bytes())
    }
}

fn matches(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=name.len()).any(|skipped| matches(rest, &name[skipped..])),
        ([b'?', rest @ ..], [_, name @ ..]) => matches(rest, name),
        ([p, rest @ ..], [n, name @ ..]) => p == n && matches(rest, name),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: u32 = 10;
    const BRIDGE: u32 = 4;

    fn link(index: u32, name: &str, kind: &str) -> Link {
        Link { index, name: name.into(), kind: kind.into(), up: true, ..Link::default() }
    }

    fn veth(index: u32, name: &str) -> Link {
        Link { peer: Some(2), peer_nsid: Some(0), ..link(index, name, "veth") }
    }

    fn port(index: u32, name: &str, bridge: u32) -> Link {
        Link { master: Some(bridge), bridge_port: true, ..veth(index, name) }
    }

    fn host(links: &[Link], addresses: &[(u32, &str)], routes: &[(u32, &str)]) -> Host {
        let mut host = Host { links: links.iter().map(|l| (l.index, l.clone())).collect(), ..Host::default() };
        for (index, net) in addresses {
            let net: IpNet = net.parse().unwrap();
            let global = !net.addr().is_loopback() && !net.to_string().starts_with("fe80");
            host.addresses.entry(*index).or_default().push(Address { index: *index, net, global, created: 0 });
        }
        for (index, to) in routes {
            let to = to.parse().unwrap();
            host.routes.entry(*index).or_default().push(Route { to, via: *index });
        }
        host
    }

    fn network(bridges: &[&str], cidrs: &[&str]) -> PodNetwork {
        PodNetwork {
            bridges: bridges.iter().map(|b| b.parse().unwrap()).collect(),
            cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        }
    }

    fn nets(nets: &[&str]) -> Vec<IpNet> {
        nets.iter().map(|net| net.parse().unwrap()).collect()
    }

    /// A case: its name, addresses and routes of the interface that decides, what is configured, and the ranges of
    /// the pod's addresses when it is a pod's interface.
    type Case<'a> = (&'a str, &'a [&'a str], &'a [&'a str], &'a PodNetwork, Option<&'a [&'a str]>);

    #[test]
    fn ports_of_bridges() {
        let one = |bridge_addresses: &[&str], network: &PodNetwork| {
            let addresses: Vec<_> = bridge_addresses.iter().map(|net| (BRIDGE, *net)).collect();
            let host = host(&[link(BRIDGE, "cni0", "bridge"), port(POD, "veth1", BRIDGE)], &addresses, &[]);
            host.pod_ranges(network, &host.links[&POD])
        };
        let unknown = network(&[], &[]);
        let known = network(&[], &["10.244.1.0/24", "fd00:1::/64"]);
        let cases: &[Case<'_>] = &[
            ("subnets stand in", &["10.244.1.1/24", "fe80::1/64"], &[], &unknown, Some(&["10.244.1.0/24"])),
            ("no address yet", &["fe80::1/64"], &[], &unknown, None),
            ("in the pod CIDR", &["10.244.1.1/24"], &[], &known, Some(&["10.244.1.0/24", "fd00:1::/64"])),
            ("docker0", &["172.17.0.1/16"], &[], &known, None),
            ("a wide network around the pod CIDR", &["10.0.0.1/8"], &[], &known, None),
            ("named", &["172.17.0.1/16"], &[], &network(&["cni?"], &["10.244.1.0/24"]), Some(&["172.17.0.0/16"])),
            ("named, no address", &[], &[], &network(&["cni0"], &["10.244.1.0/24"]), Some(&["10.244.1.0/24"])),
            ("another is named", &["10.244.1.1/24"], &[], &network(&["cbr*"], &["10.244.1.0/24"]), None),
        ];
        for (case, addresses, _, network, expected) in cases {
            assert_eq!(one(addresses, network), expected.map(nets), "{case}");
        }
    }

    #[test]
    fn veths_without_a_bridge() {
        let one = |own: &[&str], routes: &[&str], network: &PodNetwork| {
            let host = host(
                &[veth(POD, "veth1")],
                &own.iter().map(|net| (POD, *net)).collect::<Vec<_>>(),
                &routes.iter().map(|net| (POD, *net)).collect::<Vec<_>>(),
            );
            host.pod_ranges(network, &host.links[&POD])
        };
        let unknown = network(&[], &[]);
        let known = network(&[], &["10.244.1.0/24"]);
        let cases: &[Case<'_>] = &[
            ("ptp", &["10.244.1.1/32"], &["10.244.1.7/32"], &unknown, Some(&["10.244.1.7/32"])),
            ("no address of its own", &[], &["10.244.1.7/32"], &known, Some(&["10.244.1.7/32"])),
            ("outside the pod CIDR", &[], &["192.0.2.1/32"], &known, None),
            ("uplink of a node in a namespace", &["192.168.0.2/24"], &["0.0.0.0/0", "192.168.0.0/24"], &unknown, None),
            ("uplink with a host route", &["192.168.0.2/24"], &["192.168.0.9/32"], &unknown, None),
            ("uplink with a host address", &["192.168.0.2/32"], &["0.0.0.0/0", "192.168.0.1/32"], &unknown, None),
            ("its own IPv6 address is in the table", &["fd00::1/128"], &["fd00::1/128"], &unknown, None),
            ("no route", &[], &[], &unknown, None),
        ];
        for (case, own, routes, network, expected) in cases {
            assert_eq!(one(own, routes, network), expected.map(nets), "{case}");
        }
    }

    #[test]
    fn roles_of_a_whole_node() {
        let links = [
            Link { loopback: true, ..link(1, "lo", "") },
            link(2, "ens3", ""),
            veth(3, "eth0"),
            link(BRIDGE, "cni0", "bridge"),
            link(5, "flannel.1", "vxlan"),
            link(6, "docker0", "bridge"),
            link(7, "nodelocaldns", "dummy"),
            link(8, "ens4", ""),
            link(9, "bond0", "bond"),
            port(POD, "veth1", BRIDGE),
            port(11, "veth2", 6),
            Link { master: Some(9), ..link(12, "ens5", "") },
            Link { peer: Some(14), ..link(13, "veth-a", "veth") },
            Link { master: Some(BRIDGE), bridge_port: true, peer: Some(13), ..link(14, "veth-b", "veth") },
            Link { master: Some(9), ..veth(15, "veth3") },
        ];
        let addresses = [
            (1, "127.0.0.1/8"),
            (2, "203.0.113.5/24"),
            (3, "192.168.0.2/24"),
            (BRIDGE, "10.244.1.1/24"),
            (5, "10.244.1.0/32"),
            (6, "172.17.0.1/16"),
            (7, "169.254.20.10/32"),
            (9, "198.51.100.1/24"),
        ];
        let host = host(&links, &addresses, &[(3, "0.0.0.0/0")]);
        let expected = BTreeMap::from([
            (1, Role::Loopback),
            (2, Role::Uplink),
            (3, Role::Uplink),
            (BRIDGE, Role::PodBridge),
            (5, Role::Tunnel),
            (6, Role::Bridge),
            (7, Role::Other),
            (8, Role::Other),
            (9, Role::Uplink),
            (POD, Role::Pod),
            (11, Role::Port),
            (12, Role::Port),
            (13, Role::Other),
            (14, Role::Port),
            (15, Role::Port),
        ]);
        assert_eq!(host.roles(&network(&[], &["10.244.1.0/24"])), expected);
    }

    #[test]
    fn patterns() {
        let cases = [
            ("cni0", "cni0", true),
            ("cni0", "cni01", false),
            ("cni*", "cni", true),
            ("*br*", "vmbr0", true),
            ("?br0", "cbr0", true),
            ("?br0", "br0", false),
            ("*", "", true),
        ];
        for (pattern, name, expected) in cases {
            assert_eq!(pattern.parse::<NamePattern>().unwrap().matches(name), expected, "{pattern} {name}");
        }
        for bad in ["", "a b", "a/b", "sixteen-letters-"] {
            assert_eq!(bad.parse::<NamePattern>(), Err(NamePatternError), "{bad}");
        }
    }
}
