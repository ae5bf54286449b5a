//! `--ct`: the packet in another state of its flow than the first, for which the tables are looked at.
//!
//! ```text
//!   new     the packet opens a flow: everything that the other modules ask
//!   est     a flow of these two is in the tables: its next packet; without one, what a segment meets that no flow knows
//!   reply   the answer of such a flow, from the responder's interface back
//!   stale   a flow whose backend is gone: its next packet
//! ```
//!
//! A dry run writes nothing, so it can make no flow: what is not in the tables is not made up.

use std::net::{IpAddr, SocketAddr};

use proxy_abi::flow::state;
use proxy_abi::policy::Direction;
use proxy_abi::{FlowEntry, IpBytes, PortBe, Proto};

use super::check::{Answer, Check};
use super::dry::{Expected, Ran};
use super::frame::{Frame, Part};
use super::ground::Ground;
use super::question::{Kind, Place, Question};
use super::service::Frontend;
use super::{POLICY, begin, is_cause};
use crate::trace::TraceError;
use crate::trace::names::Names;

/// In which state of its flow the packet is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Stage {
    /// It opens one.
    #[default]
    New,
    /// It belongs to one that is in the tables.
    Est,
    /// It answers, from the responder's side.
    Reply,
    /// It belongs to one whose backend is gone.
    Stale,
}

/// A flow of the tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its row, under the key of the original tuple.
    pub entry: FlowEntry,
    /// Its protocol.
    pub proto: Proto,
    /// Table that it is in.
    pub table: &'static str,
    /// Nanoseconds since it was last seen, as far as the table tells.
    pub idle: u64,
    /// The backend that it names is gone, or is another one by now.
    pub is_stale: bool,
}

/// An end of a tuple. Of an echo the sender of the request has the identifier, the other none.
fn end(ip: IpBytes, port: PortBe, proto: Proto, asks: bool) -> SocketAddr {
    let is_echo = matches!(proto, Proto::ICMP | Proto::ICMPV6);
    SocketAddr::new(IpAddr::from(ip), if is_echo && !asks { 0 } else { port.get() })
}

impl Known {
    /// As the initiator sends.
    pub fn original(&self) -> (SocketAddr, SocketAddr) {
        let tuple = &self.entry.original;
        (end(tuple.src, tuple.src_port, self.proto, true), end(tuple.dst, tuple.dst_port, self.proto, false))
    }

    /// As the responder receives.
    pub fn translated(&self) -> (SocketAddr, SocketAddr) {
        let tuple = &self.entry.translated;
        (end(tuple.src, tuple.src_port, self.proto, true), end(tuple.dst, tuple.dst_port, self.proto, false))
    }

    /// The row in words.
    pub fn check(&self, names: &Names) -> Check {
        let ((from, to), (_, backend)) = (self.original(), self.translated());
        let by = if backend == to { String::new() } else { format!(" by way of {backend}") };
        let of = if self.entry.service == 0 {
            String::new()
        } else {
            format!(" of Service {}", names.service(self.entry.service))
        };
        let (state, idle) = (state::name(self.entry.state), self.idle / 1_000_000_000);
        let found = format!("{from} → {to}{by}{of} is in {}: {state}, idle {idle} s", self.table);
        if !self.is_stale {
            return Check::good("flow", found);
        }
        let fate = if self.proto == Proto::TCP {
            "a connection stays with it until it closes"
        } else {
            "the next packet chooses another"
        };
        Check::note("flow", format!("{found}; its backend is gone: {fate}"), "")
    }
}

/// What is said where the tables have no such flow.
fn lacking(question: &Question, stage: Stage, flows: usize) -> Check {
    let who = format!("{} to {}", question.from.shown(), question.to.shown());
    let again = "ask again while such a connection lives: `proxy-agent flow list` shows those that there are";
    match stage {
        Stage::Stale if flows > 0 => Check::unknown(
            "flow",
            format!("no flow from {who} names a backend that is gone ({flows} in the tables)"),
            again,
        ),
        Stage::Est if question.proto == Proto::TCP => Check::note(
            "flow",
            format!(
                "the tables have no flow from {who}: what follows is what a segment meets that no connection knows"
            ),
            "if it passes to a pod, the kernel there answers it with a reset",
        ),
        Stage::Est => {
            Check::note("flow", format!("the tables have no flow from {who}: its next packet begins one"), "")
        }
        Stage::New | Stage::Reply | Stage::Stale => Check::unknown(
            "flow",
            format!("the tables have no flow from {who}, and a dry run, which writes nothing, makes none"),
            again,
        ),
    }
}

/// The answer for a packet in the middle of a flow; `None`: as for one that opens a flow, with the check in `more` besides.
///
/// # Errors
/// When the kernel or a map cannot be asked.
pub fn answer(
    question: &mut Question,
    stage: Stage,
    ground: &mut Ground<'_>,
    names: &Names,
    more: &mut Vec<Check>,
) -> Result<Option<Answer>, TraceError> {
    let (frontend, _) = ground.frontend(question)?;
    let flows = ground.flows(question, frontend.as_ref())?;
    let wanted = flows.iter().find(|flow| stage != Stage::Stale || flow.is_stale);
    let Some(known) = wanted else {
        let check = lacking(question, stage, flows.len());
        if stage != Stage::Est {
            let mut answer = begin(question);
            answer.checks.push(check);
            return Ok(Some(answer));
        }
        more.push(check);
        if question.proto == Proto::TCP {
            question.part = Part::GoesOn;
        }
        return Ok(None);
    };
    let answer = if stage == Stage::Reply {
        back(question, known, ground, names)?
    } else {
        forth(question, known, ground, names, frontend.as_ref())?
    };
    Ok(Some(answer))
}

/// What the policies of both ends say of the flow.
fn policies(question: &Question, known: &Known, ground: &Ground<'_>, names: &Names) -> Vec<(Direction, Check)> {
    let (_, to) = known.translated();
    let port = question.port.map(|_| to.port());
    ground.policies(question, &Place::at(to.ip(), names), port)
}

/// The next packet of the initiator.
fn forth(
    question: &Question,
    known: &Known,
    ground: &mut Ground<'_>,
    names: &Names,
    frontend: Option<&Frontend>,
) -> Result<Answer, TraceError> {
    let mut answer = begin(question);
    let (original, translated) = (known.original(), known.translated());
    let receiver = Place::at(translated.1.ip(), names);
    answer.checks.push(known.check(names));
    answer.checks.extend(ground.seat(&question.from, known.entry.service != 0)?);
    let (egress, ingress): (Vec<_>, Vec<_>) = policies(question, known, ground, names)
        .into_iter()
        .partition(|(direction, _)| *direction == Direction::Egress);
    answer.checks.extend(egress.into_iter().map(|(_, check)| check));
    answer.checks.extend(ground.path(question, &receiver, frontend)?.checks());
    // The sender's program gets what the sender sends, the receiver's alone what the node has made of it.
    let ends = if question.from.kind == Kind::Pod { original } else { translated };
    let frame = Ground::frame_of(question, ends, Part::GoesOn);
    run(&mut answer, ground, &question.from, &frame, question.port.map(|_| translated.1.port()))?;
    answer.checks.extend(ingress.into_iter().map(|(_, check)| check));
    if !known.is_stale {
        answer.checks.extend(socket(ground, &receiver, translated, question.proto));
    }
    Ok(answer)
}

/// What the responder answers.
fn back(question: &Question, known: &Known, ground: &mut Ground<'_>, names: &Names) -> Result<Answer, TraceError> {
    let (original, translated) = (known.original(), known.translated());
    let responder = Place::at(translated.1.ip(), names);
    let turned =
        Question { from: responder.clone(), to: question.from.clone(), port: None, claims: None, ..question.clone() };
    let mut answer = begin(&turned);
    answer.checks.push(known.check(names));
    answer.checks.extend(ground.seat(&responder, known.entry.service != 0)?);
    // A flow that may pass may be answered: what is asked is about the flow, not about its answer.
    answer.checks.extend(policies(question, known, ground, names).into_iter().map(|(_, check)| check));
    let (frontend, _) = ground.frontend(question)?;
    answer.checks.extend(ground.path(&turned, &question.from, frontend.as_ref())?.checks());
    let part = if known.entry.state == state::SYN_SENT { Part::Answers } else { Part::GoesBack };
    let frame = Ground::frame_of(question, (translated.1, translated.0), part);
    run(&mut answer, ground, &responder, &frame, question.port.map(|_| translated.1.port()))?;
    answer.checks.extend(socket(ground, &question.from, (original.1, original.0), question.proto));
    Ok(answer)
}

/// The programs on the packet's way, after all that the maps say.
fn run(
    answer: &mut Answer,
    ground: &mut Ground<'_>,
    from: &Place,
    frame: &Frame,
    port: Option<u16>,
) -> Result<(), TraceError> {
    let denied = answer.checks.iter().any(|check| is_cause(check) && matches!(check.what, "egress" | "ingress"));
    let all = ground.along(from, frame, port)?;
    let dropped = all.iter().flatten().any(Ran::is_drop);
    let last = all.len().saturating_sub(1);
    for (n, ran) in all.into_iter().enumerate() {
        match ran {
            Ok(ran) => {
                // Which of the two drops what a policy forbids depends on whose policy it is.
                let drops = denied && (ran.is_drop() || n == last && !dropped);
                let expected = if drops { Expected::Drops(POLICY.to_vec()) } else { Expected::Open };
                answer.checks.push(ran.check(&expected));
                answer.rans.push(ran);
            }
            Err(unknown) => answer.checks.push(unknown),
        }
    }
    Ok(())
}

/// Is there a socket for it at the end? An established connection has one of its own.
fn socket(ground: &mut Ground<'_>, at: &Place, ends: (SocketAddr, SocketAddr), proto: Proto) -> Option<Check> {
    let place = at.shown();
    let found = ground.has_socket(at, ends.0, ends.1, proto);
    Some(match found {
        Some(true) => Check::good("socket", format!("{place} has a socket for {} → {}", ends.0, ends.1)),
        Some(false) => Check::cause(
            "socket",
            format!("{place} has no socket for {} → {}: its kernel answers with a refusal", ends.0, ends.1),
            "that end has closed: the connection is to be opened again",
        ),
        None if matches!(proto, Proto::TCP | Proto::UDP) => Check::unknown(
            "socket",
            format!("whether {place} has a socket for it is not known from here"),
            "there: `ss -an`",
        ),
        None => return None,
    })
}

#[cfg(test)]
mod tests {
    use proxy_abi::Tuple;

    use super::super::super::names::tests::names;
    use super::super::check::State;
    use super::*;

    #[test]
    fn a_flow_is_told_in_words() {
        let tuple = |src: &str, dst: &str| {
            let (src, dst): (SocketAddr, SocketAddr) = (src.parse().expect("an end"), dst.parse().expect("an end"));
            Tuple {
                src: src.ip().into(),
                dst: dst.ip().into(),
                src_port: PortBe::new(src.port()),
                dst_port: PortBe::new(dst.port()),
            }
        };
        let original = tuple("10.1.0.2:4000", "10.96.0.7:80");
        let entry = FlowEntry {
            original,
            translated: tuple("10.1.0.2:4000", "10.1.0.3:8080"),
            service: 7,
            state: state::ESTABLISHED,
            ..FlowEntry::NONE
        };
        let known = Known { entry, proto: Proto::TCP, table: "flow_live", idle: 3_500_000_000, is_stale: false };
        let words = "10.1.0.2:4000 → 10.96.0.7:80 by way of 10.1.0.3:8080 of Service shop/api:http is in flow_live: ESTABLISHED, idle 3 s";
        assert_eq!(known.check(&names()), Check::good("flow", words));
        let stale = Known { is_stale: true, ..known }.check(&names());
        assert_eq!(stale.state, State::Note);
        assert!(
            stale.found.ends_with("its backend is gone: a connection stays with it until it closes"),
            "{}",
            stale.found
        );
        let udp = Known { is_stale: true, proto: Proto::UDP, ..known }.check(&names());
        assert!(udp.found.ends_with("the next packet chooses another"), "{}", udp.found);
        // Identifier and type of an echo.
        let echo = FlowEntry { original: tuple("10.1.0.2:9", "10.1.0.3:8"), ..FlowEntry::NONE };
        let echo = Known { entry: echo, proto: Proto::ICMP, table: "flow_brief", idle: 0, is_stale: false };
        assert_eq!(echo.original(), ("10.1.0.2:9".parse().expect("an end"), "10.1.0.3:0".parse().expect("an end")));
    }
}
