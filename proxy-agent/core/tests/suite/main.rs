//! What the core promises, tested through its public face.

mod cluster;
mod compile;
mod node;
mod properties;
mod reconcile;
mod select;
mod state;
