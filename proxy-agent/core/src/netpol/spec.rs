//! Objects as they were written: nothing defaulted, nothing checked, absent and empty kept apart.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use crate::name::ObjectName;

/// Labels of an object.
pub type Labels = BTreeMap<Arc<str>, Arc<str>>;

/// `LabelSelector`.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SelectorSpec {
    /// `matchLabels`.
    pub labels: Labels,
    /// `matchExpressions`.
    pub expressions: Vec<ExpressionSpec>,
}

/// One of `matchExpressions`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ExpressionSpec {
    /// Label.
    pub key: Arc<str>,
    /// `In`, `NotIn`, `Exists`, `DoesNotExist`.
    pub operator: Arc<str>,
    /// Values.
    pub values: Vec<Arc<str>>,
}

/// The annotation of a NetworkPolicy that says whether it is only audited: `true` or `false`.
pub const AUDIT: &str = "proxy-agent.io/audit";

/// The annotation of a Pod that says whether `--socket-lb=all` is for it: `enabled`, as without it, or `disabled`.
pub const SOCKET_LB: &str = "proxy-agent.io/socket-lb";

/// `NetworkPolicy`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PolicySpec {
    /// Name.
    pub name: ObjectName,
    /// Its annotation [`AUDIT`].
    pub audit: Option<Arc<str>>,
    /// `spec.podSelector`.
    pub pod_selector: Option<SelectorSpec>,
    /// `spec.policyTypes`.
    pub policy_types: Option<Vec<Arc<str>>>,
    /// `spec.ingress`.
    pub ingress: Option<Vec<RuleSpec>>,
    /// `spec.egress`.
    pub egress: Option<Vec<RuleSpec>>,
}

/// One of `ingress` or `egress`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RuleSpec {
    /// `from` or `to`.
    pub peers: Option<Vec<PeerSpec>>,
    /// `ports`.
    pub ports: Option<Vec<PortSpec>>,
}

/// One of `from` or `to`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerSpec {
    /// `podSelector`.
    pub pods: Option<SelectorSpec>,
    /// `namespaceSelector`.
    pub namespaces: Option<SelectorSpec>,
    /// `ipBlock`.
    pub block: Option<BlockSpec>,
}

/// `ipBlock`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockSpec {
    /// `cidr`.
    pub cidr: Arc<str>,
    /// `except`.
    pub except: Vec<Arc<str>>,
}

/// One of `ports`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PortSpec {
    /// `protocol`.
    pub protocol: Option<Arc<str>>,
    /// `port`.
    pub port: Option<PortNumber>,
    /// `endPort`.
    pub end_port: Option<i32>,
}

/// `IntOrString`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PortNumber {
    /// A number.
    Number(i32),
    /// The name of a container's port.
    Name(Arc<str>),
}

/// `Namespace`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Namespace {
    /// Name.
    pub name: Arc<str>,
    /// Labels.
    pub labels: Labels,
    /// Has a deletion timestamp.
    pub terminating: bool,
}

/// `Pod`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Pod {
    /// Name.
    pub name: ObjectName,
    /// UID.
    pub uid: Arc<str>,
    /// Labels.
    pub labels: Labels,
    /// `spec.nodeName`.
    pub node: Option<Arc<str>>,
    /// `spec.hostNetwork`.
    pub host_network: bool,
    /// `status.phase` is `Succeeded` or `Failed`: no container runs, or will.
    pub finished: bool,
    /// Has a deletion timestamp.
    pub deleting: bool,
    /// Creation, in seconds of any epoch.
    pub created: u64,
    /// `status.podIPs`, or what the node's CNI result says.
    pub ips: Vec<IpAddr>,
    /// Ports of all containers.
    pub ports: Vec<ContainerPort>,
    /// Its sockets may be translated: false with the annotation [`SOCKET_LB`] `disabled`.
    pub socket_lb: bool,
}

/// A named port of a container.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct ContainerPort {
    /// Name.
    pub name: Arc<str>,
    /// Protocol; absent = TCP.
    pub protocol: Option<Arc<str>>,
    /// `containerPort`.
    pub port: u16,
    /// What kind of container.
    pub container: Container,
}

/// Kinds of containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Container {
    /// One of `containers`.
    Main,
    /// One of `initContainers` with `restartPolicy: Always`: runs beside the main ones, so its ports count.
    Sidecar,
    /// Another one of `initContainers`: its ports do not count.
    Init,
}

/// One change of the cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A Namespace is as given.
    Namespace(Namespace),
    /// A Namespace is gone.
    NamespaceGone(Arc<str>),
    /// A Pod is as given.
    Pod(Pod),
    /// A Pod is gone.
    PodGone(ObjectName),
    /// A NetworkPolicy is as given.
    Policy(PolicySpec),
    /// A NetworkPolicy is gone.
    PolicyGone(ObjectName),
}
