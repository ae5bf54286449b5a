//! Everything that can change the cluster state: a closed list.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_abi::{CgroupPodEntry, MacBytes};

use crate::diagnostic::Diagnostic;
use crate::name::ObjectName;
use crate::netpol::reconcile::PolicyListing;
use crate::netpol::spec::Change;
use crate::service::{EndpointSlice, Service};

/// A source whose first full list must be complete before anything is deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Source {
    /// Services.
    Services,
    /// Endpoint slices.
    EndpointSlices,
    /// This node's Node object.
    Node,
    /// Interfaces of the node, from netlink: those of pods and all others.
    Links,
    /// ServiceCIDR objects; listed as empty where the API server has no such kind (before Kubernetes 1.33).
    ServiceCidrs,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Services, Self::EndpointSlices, Self::Node, Self::Links, Self::ServiceCidrs];
}

/// One change.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A Service is as given.
    Service(Service),
    /// A Service is gone, or is none of ours (headless, another proxy's, invalid).
    ServiceGone(ObjectName),
    /// An endpoint slice is as given.
    Slice(EndpointSlice),
    /// An endpoint slice is gone, or is none of ours.
    SliceGone(ObjectName),
    /// This node is as given.
    Node(Node),
    /// A pod interface is as given.
    Link(PodLink),
    /// An interface is gone, or is no pod interface any more.
    LinkGone(u32),
    /// An interface of the node that is not a pod's is as given.
    Device(NetDevice),
    /// Such an interface is gone, or has become a pod's.
    DeviceGone(u32),
    /// A ServiceCIDR (networking.k8s.io/v1) is as given: its name and ranges.
    ServiceCidr(Arc<str>, Vec<IpNet>),
    /// A ServiceCIDR is gone.
    ServiceCidrGone(Arc<str>),
    /// Findings about one object replace the earlier ones under the same key; empty when it is well.
    Diagnostics {
        /// `Kind namespace/name`.
        object: String,
        /// The findings.
        findings: Vec<Diagnostic>,
    },
    /// Some objects cannot be read and never could be since the agent started (true), or all can be by now (false).
    /// Comes before `Listed`: what the maps hold from before the start and no object speaks of is not gone then, but
    /// unknown, and stays.
    Unreadable(bool),
    /// A source has been listed in full, in the events before this one. What it did not name is gone. Comes again
    /// after each new listing (a relist after 410 Gone, a netlink resync).
    Listed(Source, Listing),
    /// A NetworkPolicy, Namespace or Pod is as given, or gone. None of them matters to Services.
    NetworkPolicy(Change),
    /// NetworkPolicies, Namespaces or Pods have been listed in full, as by `Listed`. Namespaces and Pods are listed when
    /// there is a NetworkPolicy, or never.
    NetworkPolicyListed(PolicyListing),
    /// Whether policies are in force, and for which pods.
    Enforcement(Enforcement),
    /// Exactly these pods' sockets are translated, by the ids of their cgroups. As long as this has not come nobody knows
    /// which: what the maps hold of it stays.
    CgroupPods(BTreeMap<u64, CgroupPodEntry>),
}

/// Whether policies are in force on this node. Comes from the reconciler of policies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Enforcement {
    /// There are none: no packet is asked about.
    #[default]
    Off,
    /// There are some, and the maps hold them for these pods: UID → slot. The interface of any other pod, and one whose
    /// pod is not known, is held.
    On(BTreeMap<Arc<str>, u16>),
    /// There are some, and all of them are only audited: these pods are judged, and nothing is refused to anybody.
    Audited(BTreeMap<Arc<str>, u16>),
}

/// What a full listing named: everything of that source that is not in it is gone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listing {
    /// Names of Services or slices.
    Objects(BTreeSet<ObjectName>),
    /// Indices of all interfaces, pods' and others.
    Links(BTreeSet<u32>),
    /// Names of ServiceCIDR objects.
    ServiceCidrs(BTreeSet<Arc<str>>),
    /// The node itself.
    Node,
}

/// What the proxy needs of its own Node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Node {
    /// Name.
    pub name: Arc<str>,
    /// Label `topology.kubernetes.io/zone`.
    pub zone: Option<Arc<str>>,
    /// `spec.podCIDRs`.
    pub pod_cidrs: Vec<IpNet>,
    /// Addresses of type `InternalIP`.
    pub addresses: Vec<IpAddr>,
    /// Has the taint `ToBeDeletedByClusterAutoscaler` or a deletion timestamp.
    pub leaving: bool,
}

/// An interface of the node that is not a pod's: uplink, tunnel, bridge, loopback. Comes from netlink alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetDevice {
    /// Interface index in the node's network namespace.
    pub ifindex: u32,
    /// Interface name.
    pub name: Arc<str>,
    /// Ethernet address; zero where there is none.
    pub mac: MacBytes,
    /// MTU in bytes.
    pub mtu: u32,
    /// The node's own addresses on it, of any scope but link-local.
    pub addresses: Vec<IpAddr>,
    /// Packets from outside the node come in here: it gets programs.
    pub attach: bool,
    /// Carries the pods' bridge addresses: NodePorts are served there only under `all` or a range that names them, as by
    /// kube-proxy.
    pub pod_bridge: bool,
}

/// A host-side veth of a pod, with what may be done on it. Comes from netlink, and whose it is from the CNI's record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodLink {
    /// Interface index in the node's network namespace.
    pub ifindex: u32,
    /// Interface name.
    pub name: Arc<str>,
    /// MAC of the pod's end.
    pub pod_mac: MacBytes,
    /// MAC of the bridge, or of the interface itself when it is not a bridge port.
    pub gateway_mac: MacBytes,
    /// Index of the bridge; 0 when it is not a bridge port.
    pub bridge: u32,
    /// The pod's global addresses, as bound by the rules of `binding`: never two links with one address.
    pub addresses: Vec<IpAddr>,
    /// The bridge's own global addresses, at most one of each family is used: what a pod sees as the source when it
    /// reaches itself through a Service. Fills `DeviceEntry::gateway_ip4` and `gateway_ip6`.
    pub gateways: Vec<IpAddr>,
    /// Which way packets between two pods of the bridge may take.
    pub path: LinkPath,
    /// MTU of the veth in bytes; 0 = not known.
    pub mtu: u32,
    /// UID of its pod, by the CNI's record; `None` = not known. Once known it never changes.
    pub pod: Option<Arc<str>>,
}

/// Which way packets may take from and to a pod interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LinkPath {
    /// Redirect from veth to veth.
    Redirect,
    /// Through the bridge, switched: somebody else's program on the veth must see every packet.
    Switch,
    /// Through the bridge and the IP stack: port isolation or VLAN filtering keeps ports apart.
    Stack,
}
