//! The agent against a real kube-apiserver and etcd.
//!
//! ```text
//!   stage    a cluster with a control plane and the objects of deploy/rbac.yaml; a vigil over `service list`
//!   rights   the agent with exactly the rights of deploy/, and with one verb less
//!   login    kubeconfigs, servers that are refused, a token that is rotated
//!   objects  Services and EndpointSlices as people change them; bookmarks
//!   policies NetworkPolicies: what is watched, and when; rights that lack for them
//!   watch    long lists, restarts under traffic, a server that was away, failover
//! ```

mod login;
mod objects;
mod policies;
mod rights;
mod stage;
mod watch;
