//! Running other programs, with errors that say what was run.

use std::env;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

/// Directories that a user's `PATH` may lack and that hold the tools of network administration.
const SYSTEM: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Program and arguments as one line.
pub(crate) fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// Says what is run, runs it with our own output; an exit status other than 0 is an error.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    println!("$ {}", shown(command));
    let status = command.status().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !status.success() {
        bail!("`{}`: {status}", shown(command));
    }
    Ok(())
}

/// Runs it and returns its stdout; an exit status other than 0 is an error that carries its stderr.
pub(crate) fn read(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("cannot start `{}`", shown(command)))?;
    if !output.status.success() {
        bail!("`{}`: {}\n{}", shown(command), output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether it starts and succeeds; its output is of no interest.
pub(crate) fn succeeds(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|s| s.success())
}

/// `program`, ended when it runs longer than `limit` (exit status 124). `timeout` of coreutils does it, because it
/// reaches the program's children, and works under sudo.
pub(crate) fn bounded(limit: Duration, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("timeout");
    command.arg("--kill-after=10").arg(limit.as_secs().to_string()).arg(program);
    command
}

/// The first executable file of that name on `PATH` or in the system directories.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let mut directories = env::split_paths(&path).chain(SYSTEM.map(PathBuf::from));
    directories.find_map(|directory| executable(&directory.join(program)))
}

/// `file`, if it can be executed.
pub(crate) fn executable(file: &Path) -> Option<PathBuf> {
    let metadata = file.metadata().ok()?;
    (metadata.is_file() && metadata.permissions().mode() & 0o111 != 0).then(|| file.to_path_buf())
}

/// Where user programs keep what they can make again: `$XDG_CACHE_HOME`, else `~/.cache`.
pub(crate) fn cache() -> Result<PathBuf> {
    if let Some(named) = env::var_os("XDG_CACHE_HOME").filter(|named| !named.is_empty()) {
        return Ok(named.into());
    }
    Ok(PathBuf::from(env::var_os("HOME").context("neither XDG_CACHE_HOME nor HOME is set")?).join(".cache"))
}

/// Where `cargo install` puts programs.
pub(crate) fn cargo_bin() -> Option<PathBuf> {
    let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cargo"));
    env::var_os("CARGO_HOME").map(PathBuf::from).or_else(home).map(|cargo| cargo.join("bin"))
}

/// The first `major.minor` in `text`, as of `rustc 1.95.0 (…)`, `1:22.1.8-1~deb12u1` or `go1.26.8`; an epoch is no
/// part of it.
pub(crate) fn version(text: &str) -> Option<(u32, u32)> {
    let mut words = text.split(|c: char| !(c.is_ascii_digit() || c == '.')).filter(|word| word.contains('.'));
    words.find_map(|word| {
        let mut numbers = word.split('.');
        Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_found_in_what_programs_print() {
        let cases = [
            ("rustc 1.95.0 (59807616e 2026-04-14)", Some((1, 95))),
            ("bpf-linker 0.13.0", Some((0, 13))),
            ("1:22.1.8-1~deb12u1", Some((22, 1))),
            ("go version go1.26.8 linux/amd64", Some((1, 26))),
            ("1.95", Some((1, 95))),
            ("(none)", None),
        ];
        assert_eq!(cases.map(|(text, _)| version(text)), cases.map(|(_, expected)| expected));
    }

    #[test]
    fn a_program_that_runs_too_long_is_ended() {
        let status = bounded(Duration::from_secs(1), "sleep").arg("60").status().expect("coreutils");
        assert_eq!(status.code(), Some(124));
    }
}
