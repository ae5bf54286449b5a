//! What the operator decides about Services: kube-proxy's configuration, as far as it changes what the maps hold.

use std::net::IpAddr;

use ipnet::IpNet;

/// Settings of the compiler. They hold from start to end: another configuration is another start.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Addresses of the node on which NodePorts are served (`nodePortAddresses`); one that matches any of these is.
    pub node_port_addresses: Vec<NodePortAddresses>,
    /// Sockets of the node find NodePorts on 127.0.0.1 and ::1, too (`iptables.localhostNodePorts`).
    pub localhost_node_ports: bool,
    /// The source of all traffic to cluster addresses becomes an address of the node (`masqueradeAll`).
    pub masquerade_all: bool,
    /// Which sources count as pods of the cluster when they come from outside the node.
    pub detect_local: DetectLocal,
    /// `clusterCIDR`, for [`DetectLocal::ClusterCidr`].
    pub cluster_cidrs: Vec<IpNet>,
    /// What becomes of `spec.externalIPs`.
    pub external_ips: ExternalIps,
}

/// One entry of `nodePortAddresses`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// The first `InternalIP` of each family in the Node object.
    Primary,
    /// Loopback addresses.
    Localhost,
    /// All addresses of the node but loopback.
    All,
    /// Those in a range.
    Range(IpNet),
}

/// `detectLocalMode`. What comes out of a pod's veth of this node is a pod's in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DetectLocal {
    /// Nothing else (`BridgeInterface`, `InterfaceNamePrefix`).
    #[default]
    Interface,
    /// Sources in `clusterCIDR`.
    ClusterCidr,
    /// Sources in the pod ranges of this Node.
    NodeCidr,
}

/// What becomes of `spec.externalIPs`: they let whoever may write a Service take over any address (CVE-2020-8554).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ExternalIps {
    /// Served, except where the address is one of the cluster or the node.
    #[default]
    All,
    /// Served when in one of these ranges.
    Within(Vec<IpNet>),
    /// Not served.
    None,
}

impl Default for Policy {
    /// As kube-proxy in nftables mode, with localhost.
    fn default() -> Self {
        Self {
            node_port_addresses: vec![NodePortAddresses::Primary],
            localhost_node_ports: true,
            masquerade_all: false,
            detect_local: DetectLocal::default(),
            cluster_cidrs: Vec::new(),
            external_ips: ExternalIps::default(),
        }
    }
}

impl ExternalIps {
    /// May this address be served?
    pub fn allow(&self, ip: IpAddr) -> bool {
        match self {
            Self::All => true,
            Self::Within(ranges) => ranges.iter().any(|range| range.contains(&ip)),
            Self::None => false,
        }
    }
}
