//! Findings about one object, as they are made.

use proxy_core::diagnostic::{Diagnostic, Severity};

/// Findings about one object beyond this many are only counted: a slice has up to 1,000 endpoints.
const FINDINGS_MAX: usize = 20;

/// Findings about one object, as they are made.
pub(super) struct Report {
    object: String,
    pub(super) from_file: bool,
    found: Vec<Diagnostic>,
    more: usize,
}

impl Report {
    pub(super) fn new(subject: &str, origin: Option<&str>) -> Self {
        let object = origin.map_or_else(|| subject.to_owned(), |origin| format!("{origin} {subject}"));
        Self { object, from_file: origin.is_some(), found: Vec::new(), more: 0 }
    }

    pub(super) fn warning(&mut self, field: impl Into<String>, problem: impl Into<String>, fix: &str) {
        self.add(Severity::Warning, field.into(), problem.into(), fix);
    }

    pub(super) fn error(&mut self, field: impl Into<String>, problem: impl Into<String>, fix: &str) {
        self.add(Severity::Error, field.into(), problem.into(), fix);
    }

    fn add(&mut self, severity: Severity, field: String, problem: String, fix: &str) {
        if self.found.len() == FINDINGS_MAX {
            self.more += 1;
            return;
        }
        self.found.push(Diagnostic { severity, object: self.object.clone(), field, problem, fix: fix.to_owned() });
    }

    pub(super) fn done(mut self) -> Vec<Diagnostic> {
        if self.more > 0 {
            let problem = format!("has {} more findings like these", self.more);
            self.found.push(Diagnostic {
                severity: Severity::Error,
                object: self.object,
                field: String::new(),
                problem,
                fix: "mend those named first".to_owned(),
            });
        }
        self.found
    }
}
