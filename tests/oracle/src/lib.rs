//! What NetworkPolicy means, written down a second time: object by object and row by row, with no thought of speed.
//!
//! [`verdict`] judges one side of a flow. Its functions are named after the rows of the semantics table; each can be
//! broken on purpose ([`row::Row`]), so that the tests which compare the compiler with this can be tested themselves.
//! [`dice`] makes random clusters and changes of them.
//!
//! Sources: the comments of `networking/v1/types.go` (types), `pkg/apis/networking/v1/defaults.go` (defaults),
//! `pkg/apis/networking/validation/validation.go` (validation), the concept page "Network Policies" (concepts), the
//! end-to-end tests `test/e2e/network/netpol` (e2e).
#![forbid(unsafe_code)]

pub mod dice;
pub mod row;
pub mod verdict;
