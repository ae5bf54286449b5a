//! What is wrong with an object, for the person who can mend it.

use std::fmt;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Severity {
    /// The object works, but not all of it as written.
    Warning,
    /// The object, or the named part of it, is treated as absent.
    Error,
}

/// One finding. `object` and `field` say where, `problem` what is wrong, `fix` what to do.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Diagnostic {
    /// Severity.
    pub severity: Severity,
    /// `Kind namespace/name`, with `file` in front when it came from one.
    pub object: String,
    /// Path of the field, as in `spec.ports[2].port`; empty when the whole object is meant.
    pub field: String,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub fix: String,
}

impl fmt::Display for Diagnostic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.object)?;
        if !self.field.is_empty() {
            write!(f, " {}", self.field)?;
        }
        write!(f, ": {}; {}", self.problem, self.fix)
    }
}
