//! What is told, and what was expected: every line that claims something is a check.

use std::fmt::Display;
use std::io::{self, IsTerminal as _};
use std::time::{Duration, Instant};

/// Columns that no line is wider than, if words allow.
const WIDTH: usize = 100;
/// Where the text of a step begins.
const INDENT: usize = 4;
/// Where the text of a check begins.
const CHECK: usize = 10;

/// Tells the steps on stdout and keeps count.
#[derive(Debug)]
pub(crate) struct Narrator {
    colours: bool,
    start: Instant,
    steps: u32,
    passed: u32,
    failed: Vec<String>,
}

/// How a line looks on a terminal.
#[derive(Clone, Copy, Debug)]
enum Look {
    Plain,
    Title,
    Good,
    Bad,
    Quiet,
}

impl Look {
    const fn code(self) -> &'static str {
        match self {
            Self::Plain => "0",
            Self::Title => "1",
            Self::Good => "32",
            Self::Bad => "1;31",
            Self::Quiet => "2",
        }
    }
}

impl Narrator {
    /// Colours only where somebody sees them.
    pub(crate) fn new() -> Self {
        let colours = io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        Self { colours, start: Instant::now(), steps: 0, passed: 0, failed: Vec::new() }
    }

    /// Begins a step.
    pub(crate) fn step(&mut self, title: &str) {
        self.steps += 1;
        let clock = format!("{:.1} s", self.start.elapsed().as_secs_f64());
        let head = format!("{:>2}  {title}", self.steps);
        let gap = WIDTH.saturating_sub(head.chars().count() + clock.len()).max(1);
        println!("\n{}{:gap$}{}", self.painted(Look::Title, &head), "", self.painted(Look::Quiet, &clock));
    }

    /// Tells something that needs no check.
    pub(crate) fn say(&self, text: impl Display) {
        self.lines(Look::Plain, INDENT, &text.to_string());
    }

    /// Tells a detail: counters, tables.
    pub(crate) fn detail(&self, text: impl Display) {
        self.lines(Look::Quiet, CHECK, &text.to_string());
    }

    /// A table as a program printed it: indented, not wrapped; what is too wide ends with an ellipsis.
    pub(crate) fn table(&self, text: &str) {
        for line in text.lines().map(str::trim_end) {
            let room = WIDTH - INDENT;
            let mut shown: String = line.chars().take(room).collect();
            if line.chars().count() > room {
                shown.pop();
                shown.push('…');
            }
            println!("{:INDENT$}{}", "", self.painted(Look::Quiet, &shown));
        }
    }

    /// Claims something; `holds` says whether it is so.
    pub(crate) fn check(&mut self, holds: bool, claim: impl Display) -> bool {
        let claim = claim.to_string();
        let mark = if holds { self.painted(Look::Good, "ok") } else { self.painted(Look::Bad, "FAIL") };
        let pad = CHECK - INDENT - if holds { 2 } else { 4 };
        let mut lines = wrapped(&claim, WIDTH - CHECK).into_iter();
        println!("{:INDENT$}{mark}{:pad$}{}", "", "", lines.next().unwrap_or_default());
        for line in lines {
            println!("{:CHECK$}{line}", "");
        }
        if holds {
            self.passed += 1;
        } else {
            self.failed.push(format!("step {}: {claim}", self.steps));
        }
        holds
    }

    /// A step's own error is a failed check.
    pub(crate) fn outcome(&mut self, outcome: anyhow::Result<()>) {
        if let Err(error) = outcome {
            self.check(false, format!("{error:#}"));
        }
    }

    /// The last lines; true when every check held.
    pub(crate) fn finish(&self) -> bool {
        let (passed, failed) = (self.passed, self.failed.len());
        let time = self.start.elapsed().as_secs_f64();
        let good = failed == 0;
        let sum = format!("{passed} checks passed, {failed} failed, in {time:.1} s");
        println!("\n{}", self.painted(if good { Look::Good } else { Look::Bad }, &sum));
        for failure in &self.failed {
            self.lines(Look::Bad, INDENT, failure);
        }
        good
    }

    fn lines(&self, look: Look, indent: usize, text: &str) {
        for line in text.lines().flat_map(|line| wrapped(line, WIDTH - indent)) {
            println!("{:indent$}{}", "", self.painted(look, &line));
        }
    }

    fn painted(&self, look: Look, text: &str) -> String {
        if self.colours { format!("\x1b[{}m{text}\x1b[0m", look.code()) } else { text.to_owned() }
    }
}

/// `1.2 ms` of a duration, with what a reader can use of it.
pub(crate) fn time(duration: Duration) -> String {
    let ms = duration.as_secs_f64() * 1000.0;
    if ms < 10.0 {
        format!("{ms:.1} ms")
    } else if ms < 10_000.0 {
        format!("{ms:.0} ms")
    } else {
        format!("{:.1} s", ms / 1000.0)
    }
}

/// Breaks a text between words.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    let mut line = String::new();
    for word in text.split(' ') {
        if !line.is_empty() && line.chars().count() + 1 + word.chars().count() > width {
            lines.push(std::mem::take(&mut line));
        }
        if !line.is_empty() {
            line.push(' ');
        }
        line.push_str(word);
    }
    lines.push(line);
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_break_between_words() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("longerthanthat a", 4), ["longerthanthat", "a"]);
        assert_eq!(wrapped("", 4), [""]);
    }

    #[test]
    fn times_have_a_fitting_unit() {
        let shown = [1_234, 45_678, 12_345_678].map(|us| time(Duration::from_micros(us)));
        assert_eq!(shown, ["1.2 ms", "46 ms", "12.3 s"]);
    }
}
