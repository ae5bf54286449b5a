//! The `proxy-agent` binary: everything is in the library.

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
