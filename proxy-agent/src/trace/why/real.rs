//! A real packet beside the model: what became of it, and whether that is what was said beforehand.

use proxy_abi::{Hook, Reason};
use serde_json::{Value, json};

use super::super::expect::Outcome;
use super::check::{Answer, State};

/// How there came to be a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// `--inject`.
    Sent,
    /// `--watch`.
    Seen,
}

/// What became of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It could not be sent, for this reason.
    NotSent(String),
    /// None was seen, within this time.
    Unseen(String),
    /// Its receiver's kernel has it, and has not refused it.
    Delivered,
    /// It went out of the node.
    LeftNode,
    /// It was dropped: reason and place.
    Dropped(String),
    /// The receiver, or the sender's own kernel, refused it: with what.
    Refused(String),
    /// Nothing more was seen of it.
    Unknown,
}

/// A packet and its story.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Real {
    /// Sent or seen.
    pub how: How,
    /// What became of it.
    pub fate: Fate,
    /// What answered it: `SYN ACK`, `port unreachable`.
    pub answer: Option<String>,
    /// How the connection that it began was ended again, where it began one.
    pub reset: Option<String>,
    /// Where model or dry run said something else.
    pub differs: Vec<String>,
    /// Checks that the model could not make, where none of the others said anything.
    pub open: Vec<&'static str>,
    /// Was the programs' part run beforehand?
    pub ran: bool,
    /// Something was lost on the way to the reader: there may have been more.
    pub lost: bool,
    /// The stories, for people.
    pub text: String,
    /// The same for programs.
    pub lines: Vec<Value>,
}

impl Fate {
    /// Did it get as far as can be seen from here? `None`: that cannot be told.
    pub const fn passes(&self) -> Option<bool> {
        match self {
            Self::Delivered | Self::LeftNode => Some(true),
            Self::Dropped(_) | Self::Refused(_) => Some(false),
            Self::NotSent(_) | Self::Unseen(_) | Self::Unknown => None,
        }
    }

    /// The word in outputs for programs.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::NotSent(_) => "not-sent",
            Self::Unseen(_) => "unseen",
            Self::Delivered => "delivered",
            Self::LeftNode => "left-node",
            Self::Dropped(_) => "dropped",
            Self::Refused(_) => "refused",
            Self::Unknown => "unknown",
        }
    }

    fn detail(&self) -> Option<&str> {
        match self {
            Self::NotSent(text) | Self::Unseen(text) | Self::Dropped(text) | Self::Refused(text) => Some(text),
            Self::Delivered | Self::LeftNode | Self::Unknown => None,
        }
    }
}

/// Where the packet shows something else than what was said before it was sent. `decided`: by which of our programs it
/// went, and why as it did; `exact`: it is just the packet that was run dry, so that reasons have to be the same.
pub fn differences(answer: &Answer, fate: &Fate, decided: &[(Hook, Reason)], exact: bool) -> Vec<String> {
    let mut all = Vec::new();
    let model = answer.checks.iter().find(|check| check.state == State::Cause && check.what != "dry run");
    match (fate.passes(), model) {
        (Some(true), Some(cause)) => all.push(format!("the model says that it is not delivered ({})", cause.what)),
        (Some(false), None) if answer.cause().is_none() && answer.is_complete() => {
            all.push("the model says that it is delivered".to_owned());
        }
        _ => {}
    }
    for ran in &answer.rans {
        let (Some(said), Some((hook, met))) = (ran.reason, decided.iter().find(|(hook, _)| *hook == ran.hook)) else {
            continue;
        };
        // A dry run makes no flow that the second program could find.
        let same = exact && *hook == Hook::FromPod;
        if said.is_drop() != met.is_drop() || same && said != *met {
            all.push(format!("the dry run of {} says {}, the packet met {}", hook.name(), said.name(), met.name()));
        }
    }
    all
}

/// Checks that could not be made, where nothing else is the matter.
pub fn open(answer: &Answer) -> Vec<&'static str> {
    if answer.cause().is_some() {
        return Vec::new();
    }
    answer.checks.iter().filter(|check| check.state == State::Unknown).map(|check| check.what).collect()
}

impl Real {
    /// Nothing of a packet.
    pub fn without(how: How, fate: Fate) -> Self {
        Self {
            how,
            fate,
            answer: None,
            reset: None,
            differs: Vec::new(),
            open: Vec::new(),
            ran: false,
            lost: false,
            text: String::new(),
            lines: Vec::new(),
        }
    }

    /// Does the packet show what was said? `None`: there is nothing to compare.
    pub fn agrees(&self) -> Option<bool> {
        self.fate.passes().map(|_| self.differs.is_empty())
    }

    /// The first line of the answer.
    pub fn headline(&self) -> String {
        let packet = match self.how {
            How::Sent => "the packet that was sent",
            How::Seen => "the packet that came by",
        };
        let became = match &self.fate {
            Fate::NotSent(why) => return format!("NOT SENT: {why}"),
            Fate::Unseen(within) if self.how == How::Seen => {
                return format!("NO PACKET: none of it came within {within}");
            }
            Fate::Unseen(within) => {
                return format!("NOT SEEN: the packet was sent, and no probe saw it within {within}");
            }
            Fate::Unknown => return format!("LOST FROM SIGHT: {packet} was seen, but not where it ended"),
            Fate::Delivered => "was delivered".to_owned(),
            Fate::LeftNode => "left the node".to_owned(),
            Fate::Dropped(why) => format!("was dropped ({why})"),
            Fate::Refused(with) => format!("was refused ({with})"),
        };
        let answered = match &self.answer {
            Some(kind) if self.fate.passes() == Some(true) => format!(", and was answered ({kind})"),
            None if self.fate.passes() == Some(true) && self.how == How::Sent => ", and no answer was seen".to_owned(),
            _ => String::new(),
        };
        let by = if self.ran { "model and dry run" } else { "the model" };
        if !self.differs.is_empty() {
            return format!("DISAGREEMENT: {packet} {became}{answered}, but {}", self.differs.join("; "));
        }
        if self.open.is_empty() {
            format!("AGREED: {packet} {became}{answered}, as {by} said")
        } else {
            format!("AGREED: {packet} {became}{answered}, as far as {by} could say (unknown: {})", self.open.join(", "))
        }
    }

    /// How the command ends by it. `model`: how it would end without.
    pub fn outcome(&self, model: Outcome) -> Outcome {
        match &self.fate {
            Fate::NotSent(_) => Outcome::Unavailable,
            Fate::Unseen(_) => Outcome::NoPacket,
            _ if !self.differs.is_empty() => Outcome::Failed,
            Fate::Dropped(_) | Fate::Refused(_) => Outcome::Failed,
            Fate::Unknown => Outcome::Incomplete,
            _ if self.lost => Outcome::Incomplete,
            Fate::Delivered => Outcome::Good,
            Fate::LeftNode if self.answer.is_some() => Outcome::Good,
            // What becomes of it elsewhere is as open as it was.
            Fate::LeftNode => model,
        }
    }

    /// For programs; the lines of the stories follow.
    pub fn json(&self) -> Value {
        json!({
            "t": "real", "how": if self.how == How::Sent { "sent" } else { "seen" }, "result": self.fate.name(),
            "detail": self.fate.detail(), "answer": self.answer, "reset": self.reset, "agrees": self.agrees(),
            "differs": self.differs, "open": self.open, "complete": !self.lost, "headline": self.headline(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::check::Check;
    use super::super::dry::Ran;
    use super::*;

    fn said(checks: Vec<Check>, ran: Option<Reason>) -> Answer {
        let ran = ran.map(|reason| Ran {
            hook: Hook::FromPod,
            device: "veth7".to_owned(),
            verdict: -1,
            reason: Some(reason),
            rule: None,
            backend: None,
        });
        Answer { checks, rans: ran.into_iter().collect(), ..Answer::default() }
    }

    #[test]
    fn a_packet_agrees_or_not() {
        /// What was said, what became of it, what the program said, whether it must be the same, what differs.
        type Case<'a> = (Answer, Fate, Vec<(Hook, Reason)>, bool, Vec<&'a str>);
        let good = || said(vec![Check::good("way", "by the bridge")], Some(Reason::DirectNew));
        let denied = || said(vec![Check::cause("ingress", "denied", "allow it")], Some(Reason::DirectNew));
        let open = || said(vec![Check::unknown("listener", "elsewhere", "ask there")], Some(Reason::ServiceNew));
        let ill = || said(vec![Check::cause("dry run", "no_flow", "report it")], Some(Reason::NoFlow));
        let dropped = || Fate::Dropped("policy_ingress at veth8".to_owned());
        let met = |reason| vec![(Hook::FromPod, reason)];
        let none: [&str; 0] = [];
        let second = |reason| {
            let mut answer = good();
            answer.rans.iter_mut().for_each(|ran| ran.hook = Hook::ToPod);
            (answer, vec![(Hook::ToPod, reason)])
        };
        let ((seen, met_seen), (cut, met_cut)) = (second(Reason::Seen), second(Reason::PolicyIngress));
        let cases: [Case<'_>; 12] = [
            (seen, Fate::Delivered, met_seen, true, none.to_vec()),
            (
                cut,
                Fate::Delivered,
                met_cut,
                false,
                vec!["the dry run of to_pod says direct_new, the packet met policy_ingress"],
            ),
            (good(), Fate::Delivered, met(Reason::DirectNew), true, none.to_vec()),
            (good(), dropped(), met(Reason::DirectNew), true, vec!["the model says that it is delivered"]),
            (good(), Fate::Delivered, met(Reason::Direct), false, none.to_vec()),
            (
                good(),
                Fate::Delivered,
                met(Reason::Direct),
                true,
                vec!["the dry run of from_pod says direct_new, the packet met direct"],
            ),
            (denied(), dropped(), met(Reason::DirectNew), true, none.to_vec()),
            (
                denied(),
                Fate::Delivered,
                met(Reason::DirectNew),
                true,
                vec!["the model says that it is not delivered (ingress)"],
            ),
            (open(), Fate::Refused("RST".to_owned()), met(Reason::ServiceNew), true, none.to_vec()),
            (open(), Fate::LeftNode, Vec::new(), true, none.to_vec()),
            (ill(), dropped(), met(Reason::NoFlow), true, none.to_vec()),
            (good(), Fate::Unseen("4 s".to_owned()), Vec::new(), true, none.to_vec()),
        ];
        for (n, (answer, fate, decided, exact, expected)) in cases.into_iter().enumerate() {
            assert_eq!(differences(&answer, &fate, &decided, exact), expected, "case {n}");
        }
    }

    #[test]
    fn the_headline_and_the_exit_code_are_of_the_packet() {
        let real = |how, fate, answer: Option<&str>, differs: &[&str], open: &[&'static str]| Real {
            answer: answer.map(str::to_owned),
            differs: differs.iter().map(|text| (*text).to_owned()).collect(),
            open: open.to_vec(),
            ran: true,
            ..Real::without(how, fate)
        };
        let text = str::to_owned;
        let model = Outcome::Incomplete;
        let rows = [
            (
                real(How::Sent, Fate::Delivered, Some("SYN ACK"), &[], &[]),
                "AGREED: the packet that was sent was delivered, and was answered (SYN ACK), as model and dry run said",
                Outcome::Good,
            ),
            (
                real(How::Seen, Fate::Dropped(text("NO_SOCKET at b")), Some("RST"), &[], &[]),
                "AGREED: the packet that came by was dropped (NO_SOCKET at b), as model and dry run said",
                Outcome::Failed,
            ),
            (
                real(How::Sent, Fate::Delivered, None, &["the model says otherwise"], &[]),
                "DISAGREEMENT: the packet that was sent was delivered, and no answer was seen, but the model says otherwise",
                Outcome::Failed,
            ),
            (
                real(How::Sent, Fate::LeftNode, None, &[], &["listener"]),
                "AGREED: the packet that was sent left the node, and no answer was seen, as far as model and dry run could say (unknown: listener)",
                Outcome::Incomplete,
            ),
            (
                real(How::Sent, Fate::LeftNode, Some("SYN ACK"), &[], &["listener"]),
                "AGREED: the packet that was sent left the node, and was answered (SYN ACK), as far as model and dry run could say (unknown: listener)",
                Outcome::Good,
            ),
            (
                real(How::Seen, Fate::Unseen(text("5s")), None, &[], &[]),
                "NO PACKET: none of it came within 5s",
                Outcome::NoPacket,
            ),
            (
                real(How::Sent, Fate::NotSent(text("no interface")), None, &[], &[]),
                "NOT SENT: no interface",
                Outcome::Unavailable,
            ),
        ];
        for (real, headline, outcome) in rows {
            assert_eq!((real.headline().as_str(), real.outcome(model)), (headline, outcome));
        }
        let lost = Real { lost: true, ..real(How::Sent, Fate::Delivered, None, &[], &[]) };
        assert_eq!(lost.outcome(Outcome::Good), Outcome::Incomplete);
    }
}
