//! NetworkPolicy: from the objects as written to the content of the policy maps.
//!
//! ```text
//!   spec (as written) ─▶ policy (parsed) ─┐
//!   Namespaces, Pods ────────────────────▶│ world ─▶ rules of each pod of this node ─▶ sets ─▶ predicates, port ranges
//!                                         └──────────────────────────────────────────────────────┐
//!   tables ◀─ transition: prepare, switch, settle ◀─ cells of addresses and ports ◀──────────────┘
//! ```
//!
//! The maps and the idea of cells are described in `proxy_abi::policy`; the decision in `proxy_ebpf::policy`.
//!
//! **Transitions.** All changes that one [`engine::Engine::commit`] makes become visible in one store to the epoch.
//! What `prepare` writes no program can reach before it, and what `settle` removes no program can reach after it. So:
//! a set, block or cell never changes while something names it; what is named is written before what names it; every
//! state in between gives each flow the verdict of before or of after; isolation comes with what it allows; and a
//! write that fails leaves the old policy in force.
//!
//! **Rulings** where the API leaves a choice:
//! - A policy whose subject cannot be read isolates all pods of its namespace; a peer or port item that cannot be read
//!   matches nothing. Unknown policy types isolate in both directions.
//! - hostNetwork pods are no pods here: their addresses are the node's.
//! - Of several running pods with one address, the address belongs to one that is not being deleted, then to the newest.
//! - A pod of a namespace that is not known matches no namespace selector but the empty one.
//! - Policies deleted from a terminating namespace hold until its last pod has gone (CVE-2024-7598).
//! - A policy that is only audited (annotation `proxy-agent.io/audit: "true"`) isolates nobody; what is enforced is as if it were
//!   not there. A pod that only such policies select is like one that none selects. Any other value than `true` and `false`
//!   is an error, and the policy is enforced.
//! - The node may always reach its own pods; a pod may reach its node only as its policy says; a pod reaching itself
//!   through a Service is no matter of NetworkPolicy.

pub mod block;
pub mod dataplane;
pub mod digest;
pub mod engine;
pub mod explain;
pub mod fake;
pub mod hits;
pub mod lint;
pub mod parse;
pub mod partition;
pub mod policy;
pub mod predicate;
pub mod reconcile;
pub mod rules;
pub mod selector;
pub mod spec;
pub mod tables;
pub mod text;
pub mod world;
