//! What a test binary says on its stdout.

use std::collections::BTreeSet;
use std::fmt;
use std::process::ExitStatus;

/// What one run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// Tests that passed.
    pub(crate) passed: usize,
    /// Tests that failed. A run that ended without saying what came out counts as one.
    pub(crate) failed: usize,
    /// Names of those that failed, or why the run ended.
    pub(crate) failures: Vec<String>,
}

/// Collects the lines of one run.
#[derive(Debug, Default)]
pub(crate) struct Reader {
    outcome: Outcome,
    results: usize,
    /// The names under the last `failures:`; the list with the names comes after the one with the outputs.
    names: BTreeSet<String>,
    in_list: bool,
}

impl Reader {
    /// Takes the next line.
    pub(crate) fn line(&mut self, line: &str) {
        if line == "failures:" {
            self.in_list = true;
            self.names.clear();
        } else if let Some(counts) = line.strip_prefix("test result: ") {
            self.results += 1;
            self.in_list = false;
            self.outcome.passed += count(counts, " passed");
            self.outcome.failed += count(counts, " failed");
            self.outcome.failures.extend(std::mem::take(&mut self.names));
        } else if self.in_list
            && let Some(name) = line.strip_prefix("    ")
        {
            self.names.insert(name.to_owned());
        }
    }

    /// What came out, given how the process ended.
    pub(crate) fn finish(self, status: ExitStatus) -> Outcome {
        let mut outcome = self.outcome;
        // A crash or the time limit leaves no result line; a failing harness may leave one that shows no failure.
        if self.results == 0 || (!status.success() && outcome.failed == 0) {
            let late = if status.code() == Some(124) { " (it ran too long)" } else { "" };
            outcome.failed += 1;
            outcome.failures.push(format!("the run ended with {status}{late}"));
        }
        outcome
    }
}

/// The number before ` passed` in `ok. 5 passed; 0 failed; …`.
fn count(counts: &str, what: &str) -> usize {
    let field = counts.split(';').find_map(|field| field.trim().strip_suffix(what));
    field.and_then(|field| field.rsplit(' ').next()?.parse().ok()).unwrap_or(0)
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    /// Wait statuses: `exit(n)` is n << 8, a signal is its number.
    fn read(output: &str, wait_status: i32) -> Outcome {
        let mut reader = Reader::default();
        output.lines().for_each(|line| reader.line(line));
        reader.finish(ExitStatus::from_raw(wait_status))
    }

    #[test]
    fn results_are_summed_and_failures_named_once() {
        let output = "
running 3 tests
test a ... ok
test b ... FAILED

failures:

---- b stdout ----
    thread 'b' panicked

failures:
    b
    c::d

test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 4 filtered out; finished in 0.01s

test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s
";
        let failures = vec!["b".to_owned(), "c::d".to_owned()];
        assert_eq!(read(output, 101 << 8), Outcome { passed: 6, failed: 2, failures });
    }

    #[test]
    fn a_run_without_a_result_is_a_failure() {
        let crashed = read("running 1 test\n", 11);
        assert_eq!((crashed.passed, crashed.failed), (0, 1));
        let late = read("running 1 test\n", 124 << 8);
        assert!(late.failures[0].ends_with("(it ran too long)"), "{:?}", late.failures);
        let ok = "test result: ok. 5 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out\n";
        assert_eq!((read(ok, 0).failed, read(ok, 1 << 8).failed), (0, 1));
    }
}
