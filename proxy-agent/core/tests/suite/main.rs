//! What the core promises, tested through its public face.

mod address;
mod cluster;
mod compile;
mod conflict;
mod facts;
mod local;
mod netpol_hits;
mod netpol_lint;
mod netpol_maps;
mod netpol_random;
mod netpol_reconcile;
mod netpol_rows;
mod node;
mod properties;
mod reconcile;
mod select;
mod state;
mod tracer;
mod verdict;
