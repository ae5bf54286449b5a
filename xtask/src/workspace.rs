//! Where the repository lies, and how cargo is called in it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use crate::process;

/// The oldest compiler that the workspace's manifest allows, as major and minor number.
pub(crate) const RUST_VERSION: &str = env!("CARGO_PKG_RUST_VERSION");

/// Variables that `cargo run` sets for this program. Build scripts that watch them would run again whenever cargo is
/// called from here instead of from a shell.
const OURS: [&str; 5] = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_", "CARGO_PRIMARY_"];

/// Is it one of these?
pub(crate) fn is_of_cargo(variable: &str) -> bool {
    OURS.iter().any(|prefix| variable.starts_with(prefix))
}

/// The repository's root.
#[derive(Clone, Debug)]
pub(crate) struct Workspace {
    root: PathBuf,
}

impl Workspace {
    /// The workspace that this package is part of.
    pub(crate) fn find() -> Self {
        let package =
            env::var_os("CARGO_MANIFEST_DIR").map_or_else(|| env!("CARGO_MANIFEST_DIR").into(), PathBuf::from);
        Self { root: package.parent().map_or_else(PathBuf::new, Path::to_path_buf) }
    }

    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Where cargo leaves what it builds.
    pub(crate) fn target(&self) -> PathBuf {
        self.root.join(env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into()))
    }

    /// `program`, started in the root without this program's own package variables.
    pub(crate) fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.current_dir(&self.root);
        for (name, _) in env::vars_os() {
            if is_of_cargo(&name.to_string_lossy()) {
                command.env_remove(name);
            }
        }
        command
    }

    /// The cargo that runs this program.
    pub(crate) fn cargo(&self) -> Command {
        self.command(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
    }

    /// `cargo metadata`; with `resolve` the whole dependency graph for this machine.
    pub(crate) fn metadata(&self, resolve: bool) -> Result<Value> {
        let mut command = self.cargo();
        command.args(["metadata", "--format-version", "1"]);
        if resolve {
            let verbose = process::read(self.command("rustc").arg("-vV"))?;
            let host =
                verbose.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc -vV names no host")?;
            command.args(["--filter-platform", host]);
        } else {
            command.arg("--no-deps");
        }
        Ok(serde_json::from_str(&process::read(&mut command)?)?)
    }
}
