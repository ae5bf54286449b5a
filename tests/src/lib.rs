//! Simulated Kubernetes nodes on one Linux machine, and real traffic between them.
//!
//! ```text
//!   outside ──┐ underlay: namespace `switch` with one bridge, 172.18.0.0/24 and fc00:f853:ccd::/64
//!             │
//!        br0 ─┼──────────────┬───────────────┐
//!             │ eth0         │ eth0          │ eth0          node: routes to the other nodes' pods directly
//!          node1          node2           node3              (routed) or through flannel.1 (VXLAN)
//!           cni0           cni0            cni0              bridge: 10.244.N.1/24, fd00:10:244:N::1/64
//!          │    │            │
//!      vethX   vethY       vethZ                             host ends, named as the bridge plugin names them
//!       eth0    eth0        eth0                             pods: namespaces of their own
//! ```
//!
//! Reading order: [`cluster`] builds it from a [`ClusterSpec`]; [`node`] and [`pod`] are the handles; [`traffic`] are
//! the servers and clients; [`agent`] runs the real node agent inside a node, fed by [`manifests`]; [`packet`] and
//! [`rawsock`] make and see single frames. Everything needs root, and everything is removed on drop; what a killed
//! process left behind is removed by the next one ([`lease`]).
#![forbid(unsafe_code)]

pub mod address;
pub mod agent;
pub mod bpf;
pub mod cgroup;
pub mod cluster;
pub mod cni;
pub mod command;
pub mod deadline;
pub mod error;
pub mod interrupt;
pub mod kube_manifest;
pub mod kube_server;
pub mod lease;
mod link;
pub mod manifests;
pub mod netfilter;
pub mod netns;
pub mod node;
pub mod packet;
pub mod pod;
pub mod policy_manifest;
pub mod rawsock;
pub mod scenario;
pub mod tracer;
pub mod traffic;
pub mod underlay;

pub use address::{Family, Network};
pub use agent::{Agent, AgentOptions};
pub use cgroup::{Driver, PodCgroup};
pub use cluster::{Cluster, ClusterSpec, Links, NodeSpec, PodSpec};
pub use deadline::Deadline;
pub use error::{Error, Result};
pub use manifests::Manifests;
pub use netns::Netns;
pub use node::Node;
pub use pod::Pod;
pub use scenario::Scenario;
