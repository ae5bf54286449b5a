//! `cargo xtask trace`: `proxy-agent trace` on this host, or on a simulated node with traffic of its own.

use anyhow::Result;

use crate::artefact;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;

/// Options of `trace`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// On a simulated node: pods default/a, default/b and default/d (on another node), a Service to-NAME in front of each,
    /// and requests from a to all of them and from outside.
    #[arg(long)]
    simulated: bool,
    /// With --simulated: bridge-nf-call-iptables is 1 there.
    #[arg(long, requires = "simulated")]
    br_netfilter: bool,
    /// Arguments of `proxy-agent trace`; `--help` after `--` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<String>,
}

/// The command itself: it becomes the program, so the exit code is that of the trace.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let mut all: Vec<String> = Vec::new();
    if arguments.simulated {
        setup::ensure(workspace, Purpose::Node)?;
        all.extend(arguments.br_netfilter.then(|| "--br-netfilter".to_owned()));
        all.push("--".to_owned());
        all.extend(arguments.rest.iter().cloned());
        return artefact::run(workspace, "simulated_trace", &all, None);
    }
    setup::ensure(workspace, Purpose::Build)?;
    all.push("trace".to_owned());
    all.extend(arguments.rest.iter().cloned());
    artefact::run(workspace, "proxy-agent", &all, None)
}
