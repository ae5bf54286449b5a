//! A Rust compiler with the sources of `core`, for the BPF sub-build.
//!
//! The agent's build script takes the first of these that has the sources; the order here is the same:
//! `$BPF_TOOLCHAIN`, the current toolchain, rustup's nightly, `/usr/bin/rustc`.

use std::env;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::apt::Apt;
use super::report::Row;
use crate::process;
use crate::workspace::{RUST_VERSION, Workspace};

/// How long rustup may try: behind a wall it hangs rather than fails.
const DOWNLOAD: Duration = Duration::from_mins(2);

/// Compiler and sources as Debian packages them: the first is kept current within stable releases.
const PACKAGES: [[&str; 2]; 2] = [["rustc-web", "rust-web-src"], ["rustc", "rust-src"]];

const WHAT: &str = "Rust with core sources";

/// What `rustc -vV` says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Compiler {
    /// The command that runs it.
    pub(crate) command: String,
    /// Major and minor version.
    pub(crate) version: (u32, u32),
    /// Major version of its LLVM; bpf-linker's must not be older.
    pub(crate) llvm: u32,
}

impl Compiler {
    /// The compiler behind `command`, if it has the sources of `core`.
    fn with_sources(command: &[&str]) -> Option<Self> {
        let (program, arguments) = command.split_first()?;
        let ask = |question: &str| process::read(Command::new(program).args(arguments).args(question.split(' '))).ok();
        let sysroot = ask("--print sysroot")?;
        let sources = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !sources.exists() {
            return None;
        }
        Self::parse(&command.join(" "), &ask("-vV")?)
    }

    fn parse(command: &str, verbose: &str) -> Option<Self> {
        let field = |name: &str| process::version(verbose.lines().find_map(|line| line.strip_prefix(name))?);
        Some(Self { command: command.to_owned(), version: field("release:")?, llvm: field("LLVM version:")?.0 })
    }

    /// The one that the build script takes.
    pub(crate) fn chosen() -> Option<Self> {
        if let Ok(named) = env::var("BPF_TOOLCHAIN") {
            let own = format!("{named}/rustc");
            let command =
                if named.starts_with('/') { vec![own.as_str()] } else { vec!["rustup", "run", &named, "rustc"] };
            return Self::with_sources(&command);
        }
        let current = env::var("RUSTC").unwrap_or_else(|_| "rustc".to_owned());
        let order: [&[&str]; 3] = [&[&current], &["rustup", "run", "nightly", "rustc"], &["/usr/bin/rustc"]];
        order.into_iter().find_map(Self::with_sources)
    }

    fn shown(&self) -> String {
        format!("`{}` {}.{}, LLVM {}", self.command, self.version.0, self.version.1, self.llvm)
    }
}

/// Finds or installs it.
pub(super) fn provide(workspace: &Workspace, apt: Option<&Apt>) -> Row {
    let oldest = process::version(RUST_VERSION).unwrap_or_default();
    let chosen = || Compiler::chosen().filter(|compiler| compiler.version >= oldest);
    if env::var_os("BPF_OBJECT").is_some() {
        return Row::present(WHAT, "not needed: BPF_OBJECT names an object that is already built");
    }
    if let Some(compiler) = chosen() {
        return Row::present(WHAT, &compiler.shown());
    }
    if env::var_os("BPF_TOOLCHAIN").is_some() {
        return Row::missing(
            WHAT,
            &format!("BPF_TOOLCHAIN names none of version {RUST_VERSION} or later: mend or unset it"),
        );
    }
    // Without rustup, or without a way to its servers, the distribution's compiler does as well.
    if process::find("rustup").is_some() {
        let _ = process::run(rustup(["component", "add", "rust-src"]).current_dir(workspace.root()));
        if let Some(compiler) = chosen() {
            return Row::installed(WHAT, &format!("rustup component add rust-src: {}", compiler.shown()));
        }
    }
    let advice =
        format!("`rustup component add rust-src`, or a rustc of {RUST_VERSION} or later with its sources in /usr");
    let Some(apt) = apt else { return Row::missing(WHAT, &advice) };
    let new_enough = |pair: &&[&str; 2]| pair.iter().all(|package| apt.candidate(package) >= Some(oldest));
    let Some(packages) = PACKAGES.iter().find(new_enough) else { return Row::missing(WHAT, &advice) };
    match (apt.install(packages), chosen()) {
        (Ok(()), Some(compiler)) => Row::installed(WHAT, &format!("apt: {}: {}", packages.join(" "), compiler.shown())),
        (Ok(()), None) => Row::missing(WHAT, &advice),
        (Err(error), _) => Row::missing(WHAT, &format!("{error:#}\n{advice}")),
    }
}

/// `rustup` with arguments, bounded in time.
pub(crate) fn rustup<const N: usize>(arguments: [&str; N]) -> Command {
    let mut command = process::bounded(DOWNLOAD, "rustup");
    command.args(arguments);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compiler_is_read_from_its_verbose_version() {
        let verbose = "rustc 1.96.0 (ac68faa20 2026-05-25)\nbinary: rustc\nhost: x86_64-unknown-linux-gnu\n\
                       release: 1.96.0\nLLVM version: 22.1.8\n";
        let expected = Compiler { command: "/usr/bin/rustc".to_owned(), version: (1, 96), llvm: 22 };
        assert_eq!(Compiler::parse("/usr/bin/rustc", verbose), Some(expected));
        assert_eq!(Compiler::parse("rustc", "release: unknown\n"), None);
    }
}
