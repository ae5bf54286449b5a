//! What setup found and did, as a table.

use std::fmt;

/// Where one requirement stands at the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// Was there.
    Present,
    /// Is there now.
    Installed,
    /// Is not there, and is needed.
    Missing,
    /// Is not there, and is optional.
    LeftOut,
}

/// One requirement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// The requirement.
    pub(crate) what: String,
    /// Where it stands.
    pub(crate) state: State,
    /// What was found, what was done, or what a person has to do.
    pub(crate) action: String,
}

impl Row {
    fn new(state: State, what: &str, action: &str) -> Self {
        Self { what: what.to_owned(), state, action: action.to_owned() }
    }

    pub(crate) fn present(what: &str, found: &str) -> Self {
        Self::new(State::Present, what, found)
    }

    pub(crate) fn installed(what: &str, done: &str) -> Self {
        Self::new(State::Installed, what, done)
    }

    pub(crate) fn missing(what: &str, advice: &str) -> Self {
        Self::new(State::Missing, what, advice)
    }

    pub(crate) fn left_out(what: &str, advice: &str) -> Self {
        Self::new(State::LeftOut, what, advice)
    }
}

/// All requirements, in the order in which they were looked at.
#[derive(Clone, Debug, Default)]
pub(crate) struct Report(Vec<Row>);

impl Report {
    pub(crate) fn add(&mut self, row: Row) {
        self.0.push(row);
    }

    /// Whether anything was installed.
    pub(crate) fn changed(&self) -> bool {
        self.0.iter().any(|row| row.state == State::Installed)
    }

    /// How many needed things are not there.
    pub(crate) fn missing(&self) -> usize {
        self.0.iter().filter(|row| row.state == State::Missing).count()
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Present => "present",
            Self::Installed => "installed",
            Self::Missing => "MISSING",
            Self::LeftOut => "left out",
        })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.iter().map(|row| row.what.chars().count()).max().unwrap_or(0).max(4);
        writeln!(f, "{:width$}  {:9}  action", "what", "state")?;
        for Row { what, state, action } in &self.0 {
            // A longer action (an error with a program's output) continues under its column.
            let action = action.trim().replace('\n', &format!("\n{:indent$}", "", indent = width + 13));
            writeln!(f, "{}", format!("{what:width$}  {state:9}  {action}").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_has_a_line_for_each_requirement() {
        let mut report = Report::default();
        report.add(Row::present("linker", "bpf-linker 0.13"));
        assert_eq!((report.changed(), report.missing()), (false, 0));
        report.add(Row::installed("core sources", "rustup component add rust-src"));
        report.add(Row::missing("ip", "install iproute2\nthen again"));
        report.add(Row::left_out("etcd", ""));
        assert_eq!((report.changed(), report.missing()), (true, 1));
        let expected = "\
what          state      action
linker        present    bpf-linker 0.13
core sources  installed  rustup component add rust-src
ip            MISSING    install iproute2
                         then again
etcd          left out
";
        assert_eq!(report.to_string(), expected);
    }
}
