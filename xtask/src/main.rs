//! One command per habit, the same for a developer and for CI.
//!
//! ```text
//!   setup   what building and testing need          demo    the node dataplane at work, narrated
//!   check   rustfmt, tidy, clippy, docs, deny       bench   ratios against plain bridging and kube-proxy
//!   test    every test, with one line at the end    dist    static binary, manifests, image
//!   tidy    the repository's own rules                    trace   packets on their way, on this host or a simulated node
//!   vm      one command on another kernel, in qemu
//! ```
//!
//! `check`, `test`, `demo`, `bench`, `dist` and `trace` call `setup` first.

mod artefact;
mod bench;
mod check;
mod demo;
mod dist;
mod image;
mod privilege;
mod process;
mod setup;
mod test;
mod tidy;
mod trace;
mod vm;
mod workspace;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::workspace::Workspace;

/// The habits of this repository.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    habit: Habit,
}

#[derive(Subcommand)]
enum Habit {
    /// Installs what building and testing need; does nothing where it is there.
    Setup(setup::Arguments),
    /// Format, repository rules, lints, documentation, dependencies.
    Check,
    /// Builds and runs the tests.
    Test(test::Arguments),
    /// The repository's own rules.
    Tidy(tidy::Arguments),
    /// Shows the dataplane on simulated nodes.
    Demo(demo::Arguments),
    /// Measures it against plain bridging and kube-proxy.
    Bench(bench::Arguments),
    /// Builds what is shipped.
    Dist(dist::Arguments),
    /// Follows packets: `proxy-agent trace` on this host, or on a simulated node.
    Trace(trace::Arguments),
    /// Runs one command on another kernel, in qemu, with this machine's files.
    Vm(vm::Arguments),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let workspace = Workspace::find();
    let done = match arguments.habit {
        Habit::Setup(arguments) => setup::run(&workspace, &arguments),
        Habit::Check => check::run(&workspace),
        // It has said what failed in its last lines, which stay the last.
        Habit::Test(arguments) => match test::run(&workspace, &arguments) {
            Ok(false) => return ExitCode::FAILURE,
            passed => passed.map(|_| ()),
        },
        Habit::Tidy(arguments) => tidy::run(&workspace, &arguments),
        Habit::Demo(arguments) => demo::run(&workspace, &arguments),
        Habit::Bench(arguments) => bench::run(&workspace, &arguments),
        Habit::Dist(arguments) => dist::run(&workspace, &arguments),
        Habit::Trace(arguments) => trace::run(&workspace, &arguments),
        // The exit code is the command's.
        Habit::Vm(arguments) => match vm::run(&arguments) {
            Ok(code) => return ExitCode::from(code),
            failed => failed.map(|_| ()),
        },
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
