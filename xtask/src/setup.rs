//! `cargo xtask setup`: what building and testing need, installed where it is missing.
//!
//! | what | why | from |
//! | --- | --- | --- |
//! | rustfmt, clippy | `check` | rustup |
//! | sources of `core` | the BPF target is tier 3: its `core` is built with the programs | rustup's `rust-src`, else apt |
//! | bpf-linker | makes the eBPF object | `cargo install`, with LLVM from apt |
//! | network tools | tests make nodes of namespaces, bridges, rules | apt |
//! | qemu, busybox, kmod | `vm`, which asks for them by itself | apt |
//! | kube-apiserver, etcd, kube-proxy | tests against the real ones | `KUBEBUILDER_ASSETS`, else Go |
//!
//! Every step looks first, so a second run does nothing and says so.

pub(crate) mod apt;
pub(crate) mod compiler;
pub(crate) mod kubernetes;
mod linker;
mod report;
mod tools;

use anyhow::{Result, bail};

use crate::privilege::Privilege;
use crate::process;
use crate::workspace::Workspace;
use apt::Apt;
pub(crate) use report::{Report, Row, State};

/// Options of `setup`.
#[derive(clap::Args, Debug, Default)]
pub(crate) struct Arguments {
    /// Also kube-apiserver, etcd and kube-proxy (about six minutes from an empty cache).
    #[arg(long)]
    kube: bool,
    /// Also cargo-deny, and all of `--kube`.
    #[arg(long)]
    full: bool,
}

/// Which habit asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Compiling, linting.
    Build,
    /// Running on simulated nodes.
    Node,
}

/// The command itself: the whole table is printed.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    let privilege = Privilege::detect();
    let mut report = base(workspace, privilege, Purpose::Node);
    if arguments.full {
        report.add(cargo_deny(workspace));
    }
    let go_present = kubernetes::go().is_some();
    report.add(match kubernetes::provide(workspace, arguments.kube || arguments.full) {
        Row { state: State::Missing, action, what } if !(arguments.kube || arguments.full) => {
            let hint =
                if go_present { "`cargo xtask setup --kube` builds them; `test` does it by itself" } else { &action };
            Row::left_out(&what, hint)
        }
        row => row,
    });
    print!("{report}");
    report.finish()
}

/// For other habits: one line when all is there, the table when not.
pub(crate) fn ensure(workspace: &Workspace, purpose: Purpose) -> Result<()> {
    let report = base(workspace, Privilege::detect(), purpose);
    if report.changed() || report.missing() > 0 {
        print!("{report}");
    }
    report.finish()
}

/// For `vm`: what machines with other kernels are made with. They run what has been built, so no compiler is asked for.
pub(crate) fn ensure_machine() -> Result<()> {
    let mut report = Report::default();
    report.add(tools::MACHINE.provide(Apt::find(Privilege::detect()).as_ref()));
    if report.changed() || report.missing() > 0 {
        print!("{report}");
        report.finish()?;
    }
    Ok(())
}

/// Everything but the Kubernetes programs and the optional tools.
fn base(workspace: &Workspace, privilege: Privilege, purpose: Purpose) -> Report {
    let apt = Apt::find(privilege);
    let mut report = Report::default();
    report.add(components(workspace));
    report.add(compiler::provide(workspace, apt.as_ref()));
    report.add(linker::provide(workspace, apt.as_ref()));
    if purpose == Purpose::Node {
        report.add(tools::NODE.provide(apt.as_ref()));
    }
    report
}

/// rustfmt and clippy.
fn components(workspace: &Workspace) -> Row {
    const WHAT: &str = "rustfmt, clippy";
    let present =
        || ["fmt", "clippy"].iter().all(|tool| process::succeeds(workspace.cargo().args([tool, "--version"])));
    if present() {
        return Row::present(WHAT, "");
    }
    let install = process::run(&mut compiler::rustup(["component", "add", "rustfmt", "clippy"]));
    match install {
        Ok(()) if present() => Row::installed(WHAT, "rustup component add rustfmt clippy"),
        _ => Row::missing(WHAT, "install them: `rustup component add rustfmt clippy`"),
    }
}

fn cargo_deny(workspace: &Workspace) -> Row {
    const WHAT: &str = "cargo-deny";
    if process::succeeds(workspace.cargo().args(["deny", "--version"])) {
        return Row::present(WHAT, "");
    }
    match process::run(workspace.cargo().args(["install", "--locked", WHAT])) {
        Ok(()) => Row::installed(WHAT, "cargo install --locked cargo-deny"),
        Err(error) => Row::missing(WHAT, &format!("{error:#}")),
    }
}

impl Report {
    /// An error when something is missing that no step could install.
    fn finish(&self) -> Result<()> {
        match self.missing() {
            0 if self.changed() => println!("setup: done"),
            0 => println!("setup: everything is there, nothing to do"),
            _ => bail!("setup: not everything could be installed; the table says what to do"),
        }
        Ok(())
    }
}
