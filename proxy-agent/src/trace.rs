//! `proxy-agent trace`: packets on their way through the node, each as one story.
//!
//! ```text
//!   command ─▶ selection, expression ─▶ the kernel's filter (rough)
//!                                              │
//!   dataplane::probes: tracepoints ── sights ──┤
//!                      our programs ─ decisions ┴▶ reader ─▶ journey ─▶ (selection, expression: exact) ─▶ story
//!                                                                                             │
//!       names: pinned maps, CNI's records        tree, line, record ◀── expect ◀──────────────┘
//!       kernel: types, reasons, symbols            record ─▶ recorded ─▶ capture (pcapng), graph, difference
//! ```
//!
//! Everything that is told of here is read: nothing is pinned, no setting is changed, and what becomes of a packet does
//! not depend on whether somebody looks. One packet alone is sent, where `trace why --inject` asks for it.

pub mod btf;
pub mod capture;
pub mod command;
pub mod condition;
pub mod difference;
pub mod doctor;
pub mod drops;
pub mod expect;
pub mod expression;
pub mod graph;
pub mod hooks;
pub mod inventory;
pub mod journey;
pub mod kernel;
pub mod layout;
pub mod line;
pub mod live;
pub mod names;
pub mod output;
pub mod packet;
pub mod picture;
pub mod reader;
pub mod record;
pub mod recorded;
pub mod rules;
pub mod selection;
pub mod sockets;
pub mod story;
pub mod symbols;
pub mod top;
pub mod tree;
pub mod why;

use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use crate::dataplane::pins::{Maps, Pins};
use crate::dataplane::probes::ProbeError;

/// Why there is no trace.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The selection.
    #[error(transparent)]
    Selection(#[from] selection::SelectionError),
    /// The expression.
    #[error(transparent)]
    Expression(#[from] expression::ExpressionError),
    /// The condition.
    #[error(transparent)]
    Condition(#[from] condition::ConditionError),
    /// Something else on the command line.
    #[error("{0}")]
    Usage(String),
    /// The kernel's types.
    #[error(transparent)]
    Types(#[from] btf::BtfError),
    /// The probes.
    #[error(transparent)]
    Probes(#[from] ProbeError),
    /// The pinned maps.
    #[error(transparent)]
    Maps(#[from] crate::dataplane::Error),
    /// Routes, neighbours or chains.
    #[error(transparent)]
    Netlink(#[from] crate::node::netlink::NetlinkError),
    /// A file.
    #[error("{path}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A file that is no trace.
    #[error("{path}, line {line}: {message}")]
    Malformed {
        /// Which.
        path: String,
        /// Where.
        line: usize,
        /// What is wrong.
        message: String,
    },
}

impl TraceError {
    /// How the command ends with it.
    pub const fn outcome(&self) -> expect::Outcome {
        match self {
            Self::Selection(_)
            | Self::Expression(_)
            | Self::Condition(_)
            | Self::Usage(_)
            | Self::File { .. }
            | Self::Malformed { .. } => expect::Outcome::Usage,
            Self::Types(_) | Self::Probes(_) | Self::Maps(_) | Self::Netlink(_) => expect::Outcome::Unavailable,
        }
    }
}

/// Inode number of this thread's network namespace.
fn own_namespace() -> u32 {
    let inode = File::open("/proc/thread-self/ns/net").and_then(|file| file.metadata()).map(|meta| meta.ino());
    inode.ok().and_then(|inode| u32::try_from(inode).ok()).unwrap_or(0)
}

/// CLOCK_MONOTONIC, nanoseconds.
fn monotonic() -> u64 {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC).map_or(0, nanoseconds)
}

/// Nanoseconds of CLOCK_REALTIME at which CLOCK_MONOTONIC was 0.
fn boot_epoch() -> u64 {
    let real = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME).map_or(0, nanoseconds);
    real.saturating_sub(monotonic())
}

fn nanoseconds(time: nix::sys::time::TimeSpec) -> u64 {
    let part = |number: i64| u64::try_from(number).unwrap_or(0);
    part(time.tv_sec()) * 1_000_000_000 + part(time.tv_nsec())
}

/// The agent's pins and maps; `None` where no agent has run.
fn maps(pin_root: &Path) -> Result<Option<(Pins, Maps)>, crate::dataplane::Error> {
    let pins = Pins::new(pin_root);
    match pins.open() {
        Ok(maps) => Ok(Some((pins, maps))),
        Err(crate::dataplane::Error::NotRunning { .. }) => Ok(None),
        Err(error) => Err(error),
    }
}
