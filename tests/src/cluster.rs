//! A cluster from its description.

use std::net::IpAddr;
use std::path::{Path, PathBuf};

use crate::address::{Family, OUTSIDE_HOST, underlay};
use crate::error::{Error, Result};
use crate::lease::Lease;
use crate::netns::Netns;
use crate::node::Node;
use crate::pod::Pod;
use crate::underlay::{self, Underlay};

/// What to build.
#[derive(Clone, Debug, Default)]
pub struct ClusterSpec {
    /// How nodes reach each other's pods.
    pub links: Links,
    /// The nodes; their order fixes their addresses. At most 90.
    pub nodes: Vec<NodeSpec>,
}

/// How nodes reach each other's pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Links {
    /// Routes through the underlay (flannel's host-gw).
    #[default]
    Routed,
    /// A VXLAN tunnel (flannel's vxlan); pods have the smaller MTU.
    Vxlan,
}

/// One node.
#[expect(clippy::struct_excessive_bools, reason = "independent switches of a node, each with its own meaning")]
#[derive(Clone, Debug, Default)]
pub struct NodeSpec {
    /// Name: also its namespace's and its switch port's, so at most 15 bytes.
    pub name: String,
    /// `net.bridge.bridge-nf-call-iptables` and `-ip6tables`.
    pub br_netfilter: bool,
    /// Strict `rp_filter` on all devices.
    pub rp_filter: bool,
    /// The rules of [`crate::netfilter::install_hostile`].
    pub hostile: bool,
    /// VLAN filtering on the bridge.
    pub vlan_filtering: bool,
    /// Pods it starts with.
    pub pods: Vec<PodSpec>,
}

/// One pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodSpec {
    /// Kubernetes namespace.
    pub namespace: String,
    /// Name, unique on its node.
    pub name: String,
    /// Host number in the node's pod ranges; `None` takes the next one that was never used.
    pub host: Option<u16>,
    /// Bridge port isolation.
    pub isolated: bool,
    /// Labels of its object.
    pub labels: Vec<(String, String)>,
}

impl NodeSpec {
    /// A node without pods, netfilter rules, br_netfilter and rp_filter.
    pub fn new(name: impl Into<String>) -> Self {
        Self { name: name.into(), ..Self::default() }
    }

    /// Sets `br_netfilter`.
    #[must_use]
    pub fn br_netfilter(mut self, on: bool) -> Self {
        self.br_netfilter = on;
        self
    }

    /// Sets `rp_filter`.
    #[must_use]
    pub fn rp_filter(mut self, on: bool) -> Self {
        self.rp_filter = on;
        self
    }

    /// Sets `hostile`.
    #[must_use]
    pub fn hostile(mut self, on: bool) -> Self {
        self.hostile = on;
        self
    }

    /// Sets `vlan_filtering`.
    #[must_use]
    pub fn vlan_filtering(mut self, on: bool) -> Self {
        self.vlan_filtering = on;
        self
    }

    /// Adds pods.
    #[must_use]
    pub fn pods<P: Into<PodSpec>>(mut self, pods: impl IntoIterator<Item = P>) -> Self {
        self.pods.extend(pods.into_iter().map(Into::into));
        self
    }
}

impl PodSpec {
    /// A pod of the namespace `default`.
    pub fn new(name: impl Into<String>) -> Self {
        Self { namespace: "default".to_owned(), name: name.into(), host: None, isolated: false, labels: Vec::new() }
    }

    /// Sets the namespace.
    #[must_use]
    pub fn namespace(mut self, namespace: impl Into<String>) -> Self {
        self.namespace = namespace.into();
        self
    }

    /// Adds a label.
    #[must_use]
    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Sets the host number.
    #[must_use]
    pub fn host(mut self, host: u16) -> Self {
        self.host = Some(host);
        self
    }

    /// Sets port isolation.
    #[must_use]
    pub fn isolated(mut self, on: bool) -> Self {
        self.isolated = on;
        self
    }
}

impl From<&str> for PodSpec {
    fn from(name: &str) -> Self {
        Self::new(name)
    }
}

impl ClusterSpec {
    /// Sets the links.
    #[must_use]
    pub fn links(mut self, links: Links) -> Self {
        self.links = links;
        self
    }

    /// Adds a node.
    #[must_use]
    pub fn node(mut self, node: NodeSpec) -> Self {
        self.nodes.push(node);
        self
    }

    /// Builds it; on failure nothing is left.
    ///
    /// # Errors
    /// [`Error::NotRoot`], or the step that failed.
    pub fn build(&self) -> Result<Cluster> {
        let lease = Lease::take()?;
        let count = u8::try_from(self.nodes.len()).ok().filter(|&count| count <= 90);
        let count = count.ok_or_else(|| Error::Name(format!("{} nodes are too many", self.nodes.len())))?;
        let namespaces = (0..count)
            .zip(&self.nodes)
            .map(|(_, spec)| Netns::create(&format!("{}-{}", lease.prefix(), spec.name)))
            .collect::<Result<Vec<_>>>()?;
        for (spec, netns) in self.nodes.iter().zip(&namespaces) {
            crate::node::prepare(netns, spec)?;
        }
        let ports: Vec<_> = self.nodes.iter().map(|spec| spec.name.as_str()).zip(&namespaces).collect();
        let underlay = Underlay::create(&lease, self.links, &ports)?;
        let nodes = (0..count)
            .zip(self.nodes.iter().zip(namespaces))
            .map(|(index, (spec, netns))| {
                let node = Node::create(&lease, netns, spec, index, self.links)?;
                underlay::link_node(node.netns(), self.links, index, count)?;
                Ok(node)
            })
            .collect::<Result<Vec<_>>>()?;
        let ports: Vec<_> = nodes.iter().map(|node| (node.name(), node.netns())).collect();
        underlay.wait_carrying(&ports)?;
        let cluster = Cluster { nodes, underlay, lease };
        for (spec, node) in self.nodes.iter().zip(&cluster.nodes) {
            for pod in &spec.pods {
                node.add_pod(pod)?;
            }
        }
        Ok(cluster)
    }
}

/// A running cluster. Dropping it removes every namespace and file; handles of pods and nodes that outlive it fail.
#[derive(Debug)]
pub struct Cluster {
    nodes: Vec<Node>,
    underlay: Underlay,
    /// Last: its end gives the names free.
    lease: Lease,
}

impl Cluster {
    /// An empty description.
    pub fn builder() -> ClusterSpec {
        ClusterSpec::default()
    }

    /// The nodes, by index.
    pub fn nodes(&self) -> &[Node] {
        &self.nodes
    }

    /// The node of that name.
    ///
    /// # Errors
    /// [`Error::Name`].
    pub fn node(&self, name: &str) -> Result<&Node> {
        self.nodes.iter().find(|node| node.name() == name).ok_or_else(|| Error::Name(format!("no node {name}")))
    }

    /// The pod of that name, on whichever node.
    ///
    /// # Errors
    /// [`Error::Name`].
    pub fn pod(&self, name: &str) -> Result<Pod> {
        let found = self.nodes.iter().find_map(|node| node.pod(name).ok());
        found.ok_or_else(|| Error::Name(format!("no pod {name}")))
    }

    /// All pods, by node and name.
    pub fn pods(&self) -> Vec<Pod> {
        self.nodes.iter().flat_map(Node::pods).collect()
    }

    /// Starts a pod on a running node.
    pub fn add_pod(&self, node: &str, pod: impl Into<PodSpec>) -> Result<Pod> {
        self.node(node)?.add_pod(&pod.into())
    }

    /// The namespace of the host that is no node.
    pub fn outside(&self) -> &Netns {
        &self.underlay.outside
    }

    /// Address of the host that is no node.
    pub fn outside_ip(&self, family: Family) -> IpAddr {
        underlay(family).host(OUTSIDE_HOST)
    }

    /// The underlay.
    pub fn underlay(&self) -> &Underlay {
        &self.underlay
    }

    /// Prefix of every name of this cluster, unique on the machine.
    pub fn prefix(&self) -> &str {
        self.lease.prefix()
    }

    /// Folder for the state of whatever serves this cluster; removed with it.
    pub fn state_dir(&self) -> &Path {
        self.lease.dir()
    }

    /// Folder for Kubernetes manifests, shared by all agents; [`crate::Manifests`] writes it.
    pub fn manifest_dir(&self) -> PathBuf {
        self.lease.dir().join("manifests")
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // Clones of these handles may live on; the names must not. What fails is swept by the next lease.
        for node in &self.nodes {
            for pod in node.pods() {
                let _ = pod.netns().remove();
            }
            let _ = node.netns().remove();
        }
        let _ = self.underlay.outside.remove();
        let _ = self.underlay.switch().remove();
    }
}
