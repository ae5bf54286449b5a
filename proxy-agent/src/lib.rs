//! The node agent: from the cluster's objects and the node's interfaces to eBPF maps.
//!
//! ```text
//!   k8s (API server or folder) ─┐                          ┌─▶ dataplane (aya): maps, programs, links
//!                               ├─ Event ─▶ app: reconciler ┤
//!   node (netlink) ─────────────┘      (proxy-core, pure)  └─▶ serve: health, metrics, Events
//!
//!   cli ─▶ kubeproxy: its configuration and flags, its leavings
//!   cli ─▶ view: tables for people and programs, from the pinned maps; names of policies and pods by ask, from the agent
//!   cli ─▶ trace: packets on their way, from probes that live as long as the command
//! ```

pub mod app;
pub mod ask;
pub mod check;
pub mod cli;
pub mod dataplane;
pub mod histogram;
pub mod k8s;
pub mod kubeproxy;
pub mod node;
pub mod serve;
pub mod sockets;
pub mod trace;
pub mod view;
