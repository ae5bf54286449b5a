//! Becoming root for what needs it.

use std::fs;
use std::io::{IsTerminal as _, stdin};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use crate::process;

/// How this user does what only root may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Privilege {
    /// Is root.
    Root,
    /// By sudo, without a password or with somebody there to type it.
    Sudo,
    /// Not at all.
    None,
}

impl Privilege {
    /// What this process has.
    pub(crate) fn detect() -> Self {
        // The owner of /proc/self is the effective user.
        if fs::metadata("/proc/self").is_ok_and(|own| own.uid() == 0) {
            return Self::Root;
        }
        let sudo = process::find("sudo").is_some()
            && (process::succeeds(Command::new("sudo").args(["-n", "true"])) || stdin().is_terminal());
        if sudo { Self::Sudo } else { Self::None }
    }

    /// `program` as root with the environment of this process, `PATH` included; `None` without privilege.
    pub(crate) fn command(self, program: impl AsRef<Path>) -> Option<Command> {
        match self {
            Self::Root => Some(Command::new(program.as_ref())),
            Self::Sudo => {
                let mut command = Command::new("sudo");
                // sudo replaces PATH even with -E; env(1) puts it back.
                command.args(["-E", "env"]);
                if let Some(path) = std::env::var_os("PATH") {
                    let mut assignment = std::ffi::OsString::from("PATH=");
                    assignment.push(path);
                    command.arg(assignment);
                }
                command.arg(program.as_ref());
                Some(command)
            }
            Self::None => None,
        }
    }
}
