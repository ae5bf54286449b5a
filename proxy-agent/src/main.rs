//! The `proxy-agent` binary: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    proxy_agent::cli::main()
}
