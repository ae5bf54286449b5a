//! `cargo xtask bench`: what the dataplane costs beside plain bridging and kube-proxy. The program itself is `bench` of
//! package proxy-tests.

use anyhow::Result;

use crate::artefact;
use crate::setup::{self, Purpose, Row, State, kubernetes};
use crate::workspace::Workspace;

/// Options of `bench`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// Options of the bench itself; `-- --help` lists them.
    #[arg(trailing_var_arg = true)]
    arguments: Vec<String>,
}

/// The command itself.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    setup::ensure(workspace, Purpose::Node)?;
    let assets = match kubernetes::provide(workspace, true) {
        Row { state: State::Missing, action, .. } => {
            println!("left out: kube-proxy, to compare with: {action}");
            None
        }
        _ => Some(kubernetes::locate(workspace)?),
    };
    artefact::run(workspace, "bench", &arguments.arguments, assets.as_deref())
}
