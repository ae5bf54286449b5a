//! Kubernetes objects to core types: one row for each rule.

mod node;
mod pod;
mod policy;
mod service;
mod slice;

use proxy_agent::k8s::convert::Converted;
use proxy_core::diagnostic::{Diagnostic, Severity};

pub(crate) fn findings(diagnostics: &[Diagnostic]) -> Vec<String> {
    let severity = |finding: &Diagnostic| match finding.severity {
        Severity::Warning => "warning",
        Severity::Error => "error",
    };
    diagnostics.iter().map(|finding| format!("{} {}: {}", severity(finding), finding.field, finding.problem)).collect()
}

/// What is expected of one object: its text, or `-` for none of ours, and its findings.
pub(crate) type Want<'a> = (&'a str, &'a [&'a str]);

pub(crate) fn check<T>(row: &str, got: &Converted<T>, show: impl Fn(&T) -> String, want: Want<'_>) {
    let outcome = got.outcome.as_ref().map_or_else(|| "-".to_owned(), show);
    let found = findings(&got.diagnostics);
    let found: Vec<&str> = found.iter().map(String::as_str).collect();
    assert_eq!((outcome.as_str(), &found[..]), want, "{row}");
}
