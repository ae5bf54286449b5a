//! The agent of an imagined next version, whose flows have another layout: what the test of upgrades upgrades to.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxy_agent::cli::main()
}
