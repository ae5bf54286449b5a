//! Packet logic without a kernel: parsing, checksum differences, the life of a flow, the choice of a backend.
//!
//! ```text
//!                    ┌────────────── bin/dataplane (BPF target) ───────────────┐
//!   packet ─▶ ctx ─▶ │ packet::parse ─▶ look up flow ─▶ conntrack::step        │ ─▶ exit(verdict, reason)
//!                    │        new flow: look up frontend ─▶ balance::pick      │
//!                    │        rewrite::difference ─▶ write                     │
//!                    └─────────────────────────────────────────────────────────┘
//! ```
//!
//! Everything in this library works on values that were already looked up; it has no maps, no helpers and no `unsafe`,
//! and runs in ordinary unit tests. The programs in `bin/dataplane` do the looking up.
#![no_std]
#![forbid(unsafe_code)]
#![expect(
    clippy::cast_possible_truncation,
    reason = "header fields are taken out of wider numbers, which have been masked"
)]

pub mod balance;
pub mod conntrack;
pub mod frame;
pub mod packet;
pub mod policy;
pub mod rewrite;
pub mod sctp;
