//! What joins the nodes: a switch, and routes or tunnels between the pods of different nodes.

use std::fmt::Write as _;

use crate::address::{Family, Mac, OUTSIDE_HOST, SWITCH_HOST, node_host, pod_cidr, underlay};
use crate::cluster::Links;
use crate::error::Result;
use crate::lease::Lease;
use crate::link::wait_carrying;
use crate::netns::Netns;

/// MTU of the underlay.
pub const MTU: u16 = 1500;
/// MTU of the tunnel and of pods behind it: less an outer IPv4, UDP, VXLAN and inner Ethernet header.
pub const VXLAN_MTU: u16 = MTU - 50;
/// MTU of pods.
pub const fn pod_mtu(links: Links) -> u16 {
    match links {
        Links::Routed => MTU,
        Links::Vxlan => VXLAN_MTU,
    }
}

/// The tunnel device, as flannel names it.
pub const TUNNEL: &str = "flannel.1";

/// Sysctls of every namespace: addresses are usable at once, and ports of closed connections again after a second.
pub const COMMON_SYSCTLS: [(&str, &str); 3] =
    [("net/ipv6/conf/all/accept_dad", "0"), ("net/ipv6/conf/default/accept_dad", "0"), ("net/ipv4/tcp_tw_reuse", "1")];

/// Sysctls of namespaces that are only clients and servers: nearly all ports, for many connections per second.
pub const CLIENT_SYSCTLS: [(&str, &str); 1] = [("net/ipv4/ip_local_port_range", "1024 65535")];

/// The namespaces between and beside the nodes.
#[derive(Debug)]
pub struct Underlay {
    switch: Netns,
    /// A host on the underlay that is no node: it has routes to the pods.
    pub outside: Netns,
}

impl Underlay {
    /// The switch with one port `eth0` in every node and in the outside. `nodes` are (port name, namespace) by index.
    pub fn create(lease: &Lease, links: Links, nodes: &[(&str, &Netns)]) -> Result<Self> {
        let switch = Netns::create(&format!("{}-switch", lease.prefix()))?;
        let outside = Netns::create(&format!("{}-outside", lease.prefix()))?;
        switch.sysctl(&COMMON_SYSCTLS)?;
        switch.sysctl(&[
            ("net/bridge/bridge-nf-call-iptables", "0"),
            ("net/bridge/bridge-nf-call-ip6tables", "0"),
            ("net/bridge/bridge-nf-call-arptables", "0"),
        ])?;
        outside.sysctl(&COMMON_SYSCTLS)?;
        outside.sysctl(&CLIENT_SYSCTLS)?;

        let mut batch = format!("link set lo up\nlink add br0 mtu {MTU} type bridge\nlink set br0 up\n");
        for family in Family::BOTH {
            let _ = writeln!(batch, "{}", address_line(family, SWITCH_HOST, "br0"));
        }
        for (port, netns) in nodes.iter().copied().chain([("outside", &outside)]) {
            let netns = netns.name();
            let _ = writeln!(batch, "link add {port} mtu {MTU} type veth peer name eth0 mtu {MTU} netns {netns}");
            let _ = writeln!(batch, "link set {port} master br0 up");
        }
        switch.ip(&batch)?;

        let mut batch = uplink_lines(OUTSIDE_HOST);
        for (index, _) in (0..).zip(nodes) {
            for family in Family::BOTH {
                let _ = writeln!(batch, "{}", direct_route_line(family, index));
            }
        }
        outside.ip(&batch)?;
        // No IPv6 router fragments: without this the first large packet to a pod would only teach the path's MTU.
        outside.sysctl(&[("net/ipv6/conf/eth0/mtu", &pod_mtu(links).to_string())])?;
        Ok(Self { switch, outside })
    }

    /// Waits until every node and the outside can be reached.
    pub(crate) fn wait_carrying(&self, nodes: &[(&str, &Netns)]) -> Result<()> {
        wait_carrying(&self.outside, &["eth0"])?;
        for (_, netns) in nodes {
            wait_carrying(netns, &["eth0"])?;
        }
        let ports: Vec<_> = nodes.iter().map(|(port, _)| *port).chain(["outside"]).collect();
        wait_carrying(&self.switch, &ports).map(drop)
    }

    /// The namespace of the switch: it forwards frames, no packets.
    pub fn switch(&self) -> &Netns {
        &self.switch
    }
}

/// Lines that bring up `lo` and `eth0` with the addresses of an underlay host and default routes to the switch. The
/// switch forwards nothing: the default route is there so that packets to a ClusterIP have a route at all.
pub(crate) fn uplink_lines(host: u16) -> String {
    let mut lines = "link set lo up\nlink set eth0 up\n".to_owned();
    for family in Family::BOTH {
        let gateway = underlay(family).host(SWITCH_HOST);
        let _ = writeln!(lines, "{}\nroute add default via {gateway}", address_line(family, host, "eth0"));
    }
    lines
}

fn address_line(family: Family, host: u16, device: &str) -> String {
    let range = underlay(family);
    let nodad = if family == Family::V6 { " nodad" } else { "" };
    format!("addr add {}/{} dev {device}{nodad}", range.host(host), range.len)
}

fn direct_route_line(family: Family, to: u8) -> String {
    format!("route add {} via {}", pod_cidr(family, to), underlay(family).host(node_host(to)))
}

/// Gives node `index` of `count` its way to the pods of the others.
pub(crate) fn link_node(netns: &Netns, links: Links, index: u8, count: u8) -> Result<()> {
    let others = (0..count).filter(|&other| other != index);
    match links {
        Links::Routed => {
            let lines = others.flat_map(|other| Family::BOTH.map(|family| direct_route_line(family, other) + "\n"));
            netns.ip(&lines.collect::<String>())
        }
        Links::Vxlan => link_tunnel(netns, index, others),
    }
}

/// As flannel does it: one tunnel device that learns nothing, and for every other node a static forwarding entry, a
/// permanent neighbour and an on-link route. Pods of both families use the one tunnel, which runs over IPv4.
fn link_tunnel(netns: &Netns, index: u8, others: impl Iterator<Item = u8>) -> Result<()> {
    let local = underlay(Family::V4).host(node_host(index));
    let mac = tunnel_mac(index);
    let mut batch = format!(
        "link add {TUNNEL} address {mac} mtu {VXLAN_MTU} type vxlan id 1 local {local} dev eth0 dstport 8472 nolearning\n\
         addr add {}/32 dev {TUNNEL}\naddr add {}/128 dev {TUNNEL} nodad\nlink set {TUNNEL} up\n",
        pod_cidr(Family::V4, index).ip,
        pod_cidr(Family::V6, index).ip,
    );
    let mut forwarding = String::new();
    for other in others {
        let mac = tunnel_mac(other);
        let node = underlay(Family::V4).host(node_host(other));
        let _ = writeln!(forwarding, "fdb add {mac} dev {TUNNEL} dst {node} self permanent");
        for family in Family::BOTH {
            let range = pod_cidr(family, other);
            let _ = writeln!(batch, "neigh add {} lladdr {mac} dev {TUNNEL} nud permanent", range.ip);
            let _ = writeln!(batch, "route add {range} via {} dev {TUNNEL} onlink", range.ip);
        }
    }
    netns.ip(&batch)?;
    if forwarding.is_empty() { Ok(()) } else { netns.feed("bridge", &["-batch", "-"], &forwarding).map(drop) }
}

fn tunnel_mac(index: u8) -> Mac {
    Mac([0x0a, 0x59, 10, 244, index, 0])
}
