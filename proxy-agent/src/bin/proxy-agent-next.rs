//! The agent of an imagined next version, whose flows have another layout: what the test of upgrades upgrades to.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    match proxy_agent::cli::Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the last word of a failed command")]
            {
                eprintln!("proxy-agent: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}
