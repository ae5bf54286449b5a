//! What one check found.

use serde_json::{Value, json};

use super::dry::Ran;
use super::real::Real;

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// Nothing here is in the way.
    Good,
    /// This is why it does not arrive.
    Cause,
    /// Nothing is known of this from here.
    Unknown,
    /// It may matter later, or to other packets.
    Note,
}

impl State {
    /// The word in outputs for programs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Cause => "cause",
            Self::Unknown => "unknown",
            Self::Note => "note",
        }
    }

    /// The mark in outputs for people.
    pub const fn mark(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Cause => "✗",
            Self::Unknown => "?",
            Self::Note => "⚠",
        }
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Check {
    /// What was looked at: `endpoints`, `route`.
    pub what: &'static str,
    /// How it came out.
    pub state: State,
    /// What was found.
    pub found: String,
    /// What to do; empty where nothing is.
    pub fix: String,
    /// More of it, line by line.
    pub details: Vec<String>,
}

impl Check {
    fn new(what: &'static str, state: State, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self { what, state, found: found.into(), fix: fix.into(), details: Vec::new() }
    }

    /// Nothing is in the way.
    pub fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self::new(what, State::Good, found, "")
    }

    /// Why it does not arrive, and what to do.
    pub fn cause(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, State::Cause, found, fix)
    }

    /// Not known, and where it can be learnt.
    pub fn unknown(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, State::Unknown, found, fix)
    }

    /// May matter, and what could be done.
    pub fn note(what: &'static str, found: impl Into<String>, fix: impl Into<String>) -> Self {
        Self::new(what, State::Note, found, fix)
    }

    /// For programs.
    pub fn json(&self, order: usize) -> Value {
        json!({
            "t": "check", "n": order, "check": self.what, "state": self.state.name(), "found": self.found,
            "fix": self.fix, "details": self.details,
        })
    }
}

/// What was asked, and all checks in the order in which a packet meets them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// Sender: name and address.
    pub from: String,
    /// Receiver: name and address.
    pub to: String,
    /// `tcp`, `icmp`.
    pub proto: String,
    /// Checks.
    pub checks: Vec<Check>,
    /// What the programs did in dry runs, in their order.
    pub rans: Vec<Ran>,
    /// A real packet of it, where one was asked for.
    pub real: Option<Real>,
}

impl Answer {
    /// Takes in a dry run.
    pub fn add(&mut self, dry: Option<(Check, Option<Ran>)>) {
        let Some((check, ran)) = dry else { return };
        self.checks.push(check);
        self.rans.extend(ran);
    }

    /// The first check that says why not.
    pub fn cause(&self) -> Option<&Check> {
        self.checks.iter().find(|check| check.state == State::Cause)
    }

    /// Is there no check that could not be made?
    pub fn is_complete(&self) -> bool {
        self.checks.iter().all(|check| check.state != State::Unknown)
    }

    /// For people: first whether a real packet agrees, then the cause, then everything in its order, then the packet.
    pub fn text(&self) -> String {
        let verdict = match (self.cause(), self.is_complete()) {
            (Some(_), _) => "would NOT be delivered",
            (None, true) => "would be delivered",
            (None, false) => "nothing found that is in its way",
        };
        let mut lines: Vec<String> = self.real.iter().map(Real::headline).collect();
        lines.push(format!("{} → {}  {}: {verdict}", self.from, self.to, self.proto));
        if let Some(cause) = self.cause() {
            lines.push(format!("✗ {}: {}", cause.what, cause.found));
            lines.extend(cause.details.iter().map(|line| format!("    {line}")));
            lines.push(format!("  fix: {}", cause.fix));
        }
        let unknown: Vec<&str> =
            self.checks.iter().filter(|check| check.state == State::Unknown).map(|check| check.what).collect();
        if !unknown.is_empty() {
            lines.push(format!("? not known from here: {}", unknown.join(", ")));
        }
        let last = self.checks.len().saturating_sub(1);
        for (n, check) in self.checks.iter().enumerate() {
            let (branch, stem) = if n == last { ("└─", "  ") } else { ("├─", "│ ") };
            lines.push(format!("{branch} {:<2} {:<10} {}", check.state.mark(), check.what, check.found));
            // The cause's stand above.
            if self.cause() != Some(check) {
                lines.extend(check.details.iter().map(|line| format!("{stem}               {line}")));
                if !check.fix.is_empty() {
                    lines.push(format!("{stem}               → {}", check.fix));
                }
            }
        }
        lines.extend(self.real.iter().filter_map(|real| real.reset.as_ref()).map(|reset| format!("→ {reset}")));
        lines.extend(self.real.iter().filter(|real| !real.text.is_empty()).map(|real| real.text.trim_end().to_owned()));
        lines.join("\n")
    }

    /// For programs: one line to begin, one for each check, one to end; then the real packet.
    pub fn lines(&self) -> Vec<String> {
        let begin = json!({ "t": "why", "v": 1, "from": self.from, "to": self.to, "proto": self.proto });
        let cause = self.cause();
        let end = json!({
            "t": "answer", "delivered": cause.is_none(), "complete": self.is_complete(), "cause": cause.map(|check| check.what),
            "found": cause.map(|check| &check.found), "fix": cause.map(|check| &check.fix),
            "details": cause.map(|check| &check.details),
            "unknown": self.checks.iter().filter(|check| check.state == State::Unknown).map(|check| check.what).collect::<Vec<_>>(),
        });
        let checks = self.checks.iter().enumerate().map(|(n, check)| check.json(n + 1));
        let real = self.real.iter().flat_map(|real| std::iter::once(real.json()).chain(real.lines.iter().cloned()));
        std::iter::once(begin).chain(checks).chain([end]).chain(real).map(|line| line.to_string()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cause_stands_first() {
        let mut policy = Check::cause("policy", "denied", "allow it");
        policy.details.push("near: a rule".to_owned());
        let answer = Answer {
            from: "a".to_owned(),
            to: "b".to_owned(),
            proto: "tcp".to_owned(),
            checks: vec![
                Check::good("names", "known"),
                policy,
                Check::cause("route", "none", "add one"),
                Check::unknown("listener", "in the pod", "ss -ltn"),
            ],
            ..Answer::default()
        };
        let expected = "\
a → b  tcp: would NOT be delivered
✗ policy: denied
    near: a rule
  fix: allow it
? not known from here: listener
├─ ok names      known
├─ ✗  policy     denied
├─ ✗  route      none
│                → add one
└─ ?  listener   in the pod
                 → ss -ltn";
        assert_eq!(answer.text(), expected);
        let lines: Vec<Value> = answer.lines().iter().map(|line| serde_json::from_str(line).expect("JSON")).collect();
        assert_eq!(lines.len(), 6);
        let end = json!({
            "t": "answer", "delivered": false, "complete": false, "cause": "policy", "found": "denied", "fix": "allow it",
            "details": ["near: a rule"], "unknown": ["listener"],
        });
        assert_eq!(lines.last(), Some(&end));
    }
}
