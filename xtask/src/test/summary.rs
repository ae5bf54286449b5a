//! The sum of all runs, and what was left out.

use std::collections::BTreeMap;
use std::fmt;

use super::binary::TestBinary;
use super::level::Level;
use super::libtest::Outcome;

/// What `test` says at its end.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    total: Outcome,
    by_package: BTreeMap<String, usize>,
    left_out: Vec<(Level, String)>,
}

impl Summary {
    /// Adds a run. `filtered`: a selection by name, under which a binary may have nothing to do.
    pub(crate) fn add(&mut self, binary: &TestBinary, outcome: &Outcome, filtered: bool) {
        self.count(&binary.name, outcome);
        *self.by_package.entry(binary.package.clone()).or_default() += outcome.passed + outcome.failed;
        if binary.is_test_file && !filtered && outcome.passed + outcome.failed == 0 {
            self.fail(&binary.name, "ran no test");
        }
    }

    /// Adds the examples in the documentation, of which there may be none.
    pub(crate) fn add_examples(&mut self, outcome: &Outcome) {
        self.count("documentation", outcome);
    }

    fn count(&mut self, name: &str, outcome: &Outcome) {
        self.total.passed += outcome.passed;
        self.total.failed += outcome.failed;
        self.total.failures.extend(outcome.failures.iter().map(|failure| format!("{name}: {failure}")));
    }

    /// A failure that is not one of a test.
    pub(crate) fn fail(&mut self, what: &str, why: &str) {
        self.total.failed += 1;
        self.total.failures.push(format!("{what}: {why}"));
    }

    /// A level that could not be run, and what to do about it.
    pub(crate) fn leave_out(&mut self, level: Level, advice: &str) {
        self.left_out.push((level, advice.to_owned()));
    }

    /// Each of these packages must have run at least one test.
    pub(crate) fn expect_tests_in(&mut self, packages: &[&str]) {
        for package in packages {
            if self.by_package.get(*package).is_none_or(|&tests| tests == 0) {
                self.fail(package, "ran no test");
            }
        }
    }

    /// Whether nothing ran and nothing was left out for a reason.
    pub(crate) fn is_empty(&self) -> bool {
        self.total.passed + self.total.failed == 0 && self.left_out.is_empty()
    }

    pub(crate) fn failed(&self) -> usize {
        self.total.failed
    }
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for failure in &self.total.failures {
            writeln!(f, "failed: {failure}")?;
        }
        for (level, advice) in &self.left_out {
            writeln!(f, "left out: level {level}: {advice}")?;
        }
        writeln!(f, "test result: {}", self.total)?;
        writeln!(f, "{}", self.total)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn binary(package: &str, is_test_file: bool) -> TestBinary {
        TestBinary {
            package: package.to_owned(),
            name: package.to_owned(),
            level: Level::Unit,
            is_test_file,
            executable: "x".into(),
            directory: "x".into(),
        }
    }

    #[test]
    fn summary_ends_with_the_sum_twice() {
        let mut summary = Summary::default();
        assert!(summary.is_empty());
        summary.add(&binary("a", true), &Outcome { passed: 2, failed: 1, failures: vec!["x::y".to_owned()] }, false);
        summary.add(&binary("b", true), &Outcome::default(), false);
        summary.add(&binary("c", true), &Outcome::default(), true);
        summary.add(&binary("d", false), &Outcome::default(), false);
        summary.expect_tests_in(&["a", "d"]);
        summary.leave_out(Level::Kube, "install Go");
        let expected = "\
failed: a: x::y
failed: b: ran no test
failed: d: ran no test
left out: level kube: install Go
test result: 2 passed, 3 failed
2 passed, 3 failed
";
        assert_eq!(summary.to_string(), expected);
    }
}
