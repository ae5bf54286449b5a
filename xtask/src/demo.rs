//! `cargo xtask demo`: the dataplane at work on simulated nodes. The program itself is `demo` of package proxy-tests.

use anyhow::Result;

use crate::artefact;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// Options of `demo`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// Options of the demo itself; `-- --help` lists them.
    #[arg(trailing_var_arg = true)]
    arguments: Vec<String>,
}

/// The command itself.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    setup::ensure(workspace, Purpose::Node)?;
    artefact::run(workspace, "demo", &arguments.arguments, None)
}
