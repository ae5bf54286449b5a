//! What can go wrong in the simulator.

use std::fmt::{self, Display};
use std::io;
use std::time::Duration;

use nix::errno::Errno;

/// A failed step; each variant says which one.
#[derive(thiserror::Error)]
pub enum Error {
    /// The effective user is not root.
    #[error("network namespaces need root: run this as root (effective uid is {0})")]
    NotRoot(u32),
    /// A command ended with an error.
    #[error("`{command}` failed ({status}): {stderr}{input}")]
    Command {
        /// Program and arguments.
        command: String,
        /// Exit status as text.
        status: String,
        /// What it wrote to stderr.
        stderr: String,
        /// What it was given on stdin, after a line break; empty when nothing.
        input: String,
    },
    /// A command could not be started, or its pipes broke.
    #[error("cannot run `{command}`: {source}")]
    Spawn {
        /// Program and arguments.
        command: String,
        /// Why.
        source: io::Error,
    },
    /// A file or socket operation failed.
    #[error("{what}: {source}")]
    Io {
        /// Operation and object.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// A system call without a wrapper in std failed.
    #[error("{what}: {errno}")]
    Sys {
        /// Operation and object.
        what: String,
        /// Why.
        errno: Errno,
    },
    /// A condition did not come true in time.
    #[error("not within {waited:?}: {what}")]
    Timeout {
        /// The condition, with the last state seen.
        what: String,
        /// How long it was waited for.
        waited: Duration,
    },
    /// The other side answered something that it must not.
    #[error("{what}: expected {expected}, got {got}")]
    Mismatch {
        /// What was compared.
        what: String,
        /// Expected value.
        expected: String,
        /// Value seen.
        got: String,
    },
    /// Output of a tool that cannot be read.
    #[error("cannot read {what}: {source}")]
    Json {
        /// Which tool or file.
        what: String,
        /// Why.
        source: serde_json::Error,
    },
    /// No node, pod or program of that name, or the name is taken.
    #[error("{0}")]
    Name(String),
}

/// Result with the simulator's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// As `Display`: tests show errors through `expect`, and what to do about them must be readable there.
impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl Error {
    /// A mismatch of two displayable values.
    pub fn mismatch(what: impl Into<String>, expected: impl Display, got: impl Display) -> Self {
        Self::Mismatch { what: what.into(), expected: format!("{expected}"), got: format!("{got}") }
    }
}

/// Names the operation of a failed result.
pub trait Context<T> {
    /// Wraps the error, with `what` evaluated only on failure.
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io { what: what(), source })
    }
}

impl<T> Context<T> for nix::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|errno| Error::Sys { what: what(), errno })
    }
}

impl<T> Context<T> for serde_json::Result<T> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Json { what: what(), source })
    }
}
