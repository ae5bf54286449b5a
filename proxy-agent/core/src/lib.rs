//! Cluster state, its compilation to map contents, and the difference between two of them.
//!
//! ```text
//!   Event ──▶ ClusterState ──▶ Compiler ──▶ desired Tables ─┐
//!                                                           ├─ plan ──▶ [Op], in safe order
//!                      Dataplane::load() ──▶ actual Tables ─┘
//! ```
//!
//! Nothing in here does I/O, reads a clock or an environment, or knows Kubernetes' or the kernel's libraries: see the
//! manifest. Bad input never fails: it gives a [`diagnostic::Diagnostic`] and is as if absent.
#![forbid(unsafe_code)]

pub mod address;
pub mod compile;
pub mod dataplane;
pub mod delta;
pub mod diagnostic;
pub mod event;
pub mod facts;
pub mod fake;
pub mod ids;
pub mod local;
pub mod name;
pub mod netpol;
pub mod plan;
pub mod policy;
pub mod reconcile;
pub mod select;
pub mod service;
pub mod state;
pub mod tables;
