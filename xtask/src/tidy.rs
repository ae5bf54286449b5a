//! `cargo xtask tidy`: the rules of this repository that no other tool knows.
//!
//! A rule is a function from the files to findings; a finding says where, what, and what to do. Adding a rule means
//! adding it to [`RULES`], with a test that shows it a bad file.

mod dependency;
mod document;
mod fingerprint;
mod shape;
mod source;
mod wall;

use std::fmt;

use anyhow::{Result, bail};

use crate::workspace::Workspace;
use source::Repository;

/// Options of `tidy`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// Accept the present map layouts: writes their fingerprint anew.
    #[arg(long)]
    bless: bool,
}

/// One place that breaks a rule.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Finding {
    path: String,
    /// Counted from 1; 0 means the whole file.
    line: usize,
    /// What is wrong and what to do about it.
    message: String,
}

impl Finding {
    fn new(path: &str, line: usize, message: impl Into<String>) -> Self {
        Self { path: path.to_owned(), line, message: message.into() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.line {
            0 => write!(f, "{}: {}", self.path, self.message),
            line => write!(f, "{}:{line}: {}", self.path, self.message),
        }
    }
}

/// What a rule is: its name, and how it finds what breaks it.
type Rule = (&'static str, fn(&Repository) -> Vec<Finding>);

/// All rules, in the order in which they are reported.
const RULES: [Rule; 12] = [
    ("file-length", shape::file_length),
    ("module-doc", shape::module_doc),
    ("file-name", shape::file_name),
    ("words", shape::words),
    ("walls", wall::walls),
    ("sleep", wall::sleep),
    ("ignored-tests", wall::ignored_tests),
    ("manifests", dependency::manifests),
    ("lock-file", dependency::lock_file),
    ("abi-fingerprint", fingerprint::abi),
    ("architecture", document::architecture),
    ("links", document::links),
];

/// The command itself.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<()> {
    if arguments.bless {
        fingerprint::bless(workspace)?;
    }
    check(workspace)
}

/// Applies every rule and shows what it found.
pub(crate) fn check(workspace: &Workspace) -> Result<()> {
    let repository = Repository::read(workspace.root())?;
    let mut broken = 0;
    for (name, rule) in RULES {
        let mut findings = rule(&repository);
        findings.sort();
        for finding in &findings {
            println!("tidy {name}: {finding}");
        }
        broken += usize::from(!findings.is_empty());
    }
    if broken > 0 {
        bail!("tidy: {broken} of {} rules are broken", RULES.len());
    }
    println!("tidy: {} rules hold in {} files", RULES.len(), repository.len());
    Ok(())
}
