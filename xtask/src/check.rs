//! `cargo xtask check`: all that needs no running program. Every stage runs, whatever the one before it said.

use std::env;
use std::time::Instant;

use anyhow::{Result, bail};

use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{process, tidy};

/// The command itself.
pub(crate) fn run(workspace: &Workspace) -> Result<()> {
    setup::ensure(workspace, Purpose::Build)?;
    let cargo = |arguments: &[&str]| process::run(workspace.cargo().args(arguments));
    let documentation = || {
        let flags = format!("{} -D warnings", env::var("RUSTDOCFLAGS").unwrap_or_default());
        let mut command = workspace.cargo();
        process::run(command.args(["doc", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", flags.trim()))
    };
    let lints = ["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"];
    let deny_present = process::succeeds(workspace.cargo().args(["deny", "--version"]));
    let deny = || {
        if deny_present {
            // Advisories need the network and change by themselves; they are no property of this commit.
            return cargo(&["deny", "check", "bans", "licenses", "sources"]);
        }
        println!(
            "left out: cargo-deny is not installed (`cargo xtask setup --full`); tidy has checked bans and sources"
        );
        Ok(())
    };
    let stages: [(&str, &dyn Fn() -> Result<()>); 5] = [
        ("format", &|| cargo(&["fmt", "--all", "--check"])),
        ("tidy", &|| tidy::check(workspace)),
        ("clippy", &|| cargo(&lints)),
        ("documentation", &documentation),
        ("dependencies", &deny),
    ];
    let mut failed = Vec::new();
    for (name, stage) in stages {
        let start = Instant::now();
        let outcome = stage();
        let verdict = if outcome.is_ok() { "ok" } else { "FAILED" };
        println!("check {name}: {verdict} ({} s)", start.elapsed().as_secs());
        if let Err(error) = outcome {
            eprintln!("{error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("check: {} failed", failed.join(", "));
    }
    println!("check: ok");
    Ok(())
}
