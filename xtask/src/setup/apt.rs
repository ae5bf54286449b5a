//! Debian's package manager.

use std::cell::Cell;
use std::process::Command;

use anyhow::{Context as _, Result};

use crate::privilege::Privilege;
use crate::process;

/// apt, where it is there and may be used.
pub(crate) struct Apt {
    privilege: Privilege,
    updated: Cell<bool>,
}

impl Apt {
    /// `None` where packages are managed otherwise, or this user cannot become root.
    pub(crate) fn find(privilege: Privilege) -> Option<Self> {
        process::find("apt-get")?;
        (privilege != Privilege::None).then(|| Self { privilege, updated: Cell::new(false) })
    }

    /// The version that an install would give. Asks for fresh package lists, once, before it says that there is none.
    pub(crate) fn candidate(&self, package: &str) -> Option<(u32, u32)> {
        let listed = || {
            let policy = process::read(Command::new("apt-cache").args(["policy", package])).ok()?;
            process::version(policy.lines().find_map(|line| line.trim().strip_prefix("Candidate:"))?)
        };
        listed().or_else(|| {
            self.update().ok()?;
            listed()
        })
    }

    /// Installs packages; with fresh lists if those at hand name files that are gone.
    pub(crate) fn install(&self, packages: &[&str]) -> Result<()> {
        let install = || {
            let mut command = self.apt_get()?;
            process::run(command.args(["install", "--yes", "--no-install-recommends"]).args(packages))
        };
        if self.updated.get() {
            return install();
        }
        install().or_else(|_| {
            self.update()?;
            install()
        })
    }

    /// Fetches the package lists, at most once.
    fn update(&self) -> Result<()> {
        if !self.updated.replace(true) {
            process::run(self.apt_get()?.arg("update"))?;
        }
        Ok(())
    }

    fn apt_get(&self) -> Result<Command> {
        let mut command = self.privilege.command("env").context("apt-get needs root")?;
        command.args(["DEBIAN_FRONTEND=noninteractive", "apt-get", "--quiet", "-o", "DPkg::Lock::Timeout=120"]);
        Ok(command)
    }
}
