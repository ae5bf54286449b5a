//! A real packet beside the answer: one that is sent (`--inject`), or the next that comes by (`--watch`).
//!
//! ```text
//!   probes ─▶ reader ─▶ journeys of this packet, of its answer, of what ends it ─▶ stories ─▶ real: does it agree?
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proxy_abi::trace::TraceFilter;
use proxy_abi::{Hook, Proto, Reason};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, Interval, interval};

use super::super::drops;
use super::super::expect::Outcome;
use super::super::expression::Expression;
use super::super::journey::{Decision, Ending, Journey, Place, Point, Sight};
use super::super::names::Names;
use super::super::reader::{EVERY, Reader};
use super::super::rules::Rules;
use super::super::story::{Context, Story};
use super::super::{boot_epoch, live, output, record, sockets, tree};
use super::check::Answer;
use super::ground::Ground;
use super::mark::Mark;
use super::question::{Kind, Question};
use super::real::{Fate, How, Real, differences, open};
use super::send::{Shot, Unsent};
use super::service::Frontend;
use crate::dataplane::pins::{Maps, Pins};
use crate::trace::packet::Packet;
use crate::trace::{TraceError, monotonic};

/// How often the rings are read, and after how many of these times the programs hear that somebody still does.
const TICK: Duration = Duration::from_millis(20);
const KEEP: u32 = 50;
/// A packet of which nothing was seen for so long has ended.
const QUIET: u64 = 250_000_000;
/// Mebibytes of the buffer for events.
const BUFFER: u32 = 8;
/// The longest wait for a packet that was sent: longer than it takes to find that a neighbour does not answer.
const SENT: Duration = Duration::from_secs(4);
/// The longest wait for an answer: of what has to answer, of UDP.
const ANSWER: Duration = Duration::from_secs(2);
const ANSWER_UDP: Duration = Duration::from_secs(1);
/// How long later journeys are waited for that belong to one whose end is known.
const REST: Duration = Duration::from_millis(300);

/// What follows packets.
pub struct Eye<'a> {
    reader: Reader,
    names: &'a Names,
    maps: &'a Maps,
    rules: Rules,
    journeys: BTreeMap<u64, Journey>,
    ticks: Interval,
    tick: u32,
    interrupt: Signal,
    terminate: Signal,
}

/// Journeys that belong together, by their numbers.
#[derive(Clone, Copy, Debug, Default)]
struct Parts {
    request: Option<u64>,
    answer: Option<u64>,
    reset: Option<u64>,
}

impl<'a> Eye<'a> {
    /// Loads the probes. Must be called within a runtime.
    ///
    /// # Errors
    /// [`TraceError::Types`], [`TraceError::Probes`]: also while another trace runs.
    pub fn open(pins: &Pins, names: &'a Names, maps: &'a Maps) -> Result<Self, TraceError> {
        let wait = |kind| signal(kind).map_err(|source| TraceError::File { path: "signal".to_owned(), source });
        Ok(Self {
            reader: Reader::open(Some(pins), BUFFER)?,
            names,
            maps,
            rules: Rules::new(pins.root().to_owned()),
            journeys: BTreeMap::new(),
            ticks: interval(TICK),
            tick: 0,
            interrupt: wait(SignalKind::interrupt())?,
            terminate: wait(SignalKind::terminate())?,
        })
    }

    fn follow(&mut self, expression: &str) -> Result<(), TraceError> {
        let expression: Expression = expression.parse()?;
        self.journeys.clear();
        let filter = TraceFilter { flags: TraceFilter::ANY_A | TraceFilter::ANY_B, ..EVERY };
        self.reader.follow(&filter, &[], &expression.rows())
    }

    /// Lets a moment pass and takes in what was seen; false when somebody interrupts.
    async fn tick(&mut self) -> Result<bool, TraceError> {
        tokio::select! {
            _ = self.ticks.tick() => {}
            _ = self.interrupt.recv() => return Ok(false),
            _ = self.terminate.recv() => return Ok(false),
        }
        let now = monotonic();
        self.reader.read(self.names, now);
        for journey in self.reader.take_quiet(now, QUIET) {
            // One that waits (for a neighbour) is quiet and goes on.
            let known =
                self.journeys.entry(journey.id).or_insert_with(|| Journey { id: journey.id, steps: Vec::new() });
            known.steps.extend(journey.steps);
        }
        self.tick = self.tick.wrapping_add(1);
        if self.tick.is_multiple_of(KEEP) {
            self.reader.keep(now)?;
        }
        Ok(true)
    }

    /// The first journey of which this is true, in the order of beginning.
    fn first(&self, is: impl Fn(&Journey) -> bool) -> Option<u64> {
        let found = self.journeys.values().filter(|journey| journey.here().next().is_some() && is(journey));
        found.min_by_key(|journey| journey.began()).map(|journey| journey.id)
    }

    /// A packet that waited for long (for a neighbour) was forgotten by the probes, which know its end as another's.
    fn join(&mut self, mark: &Mark) {
        let Some(first) = self.first(|journey| mark.is_sent(journey)) else { return };
        let is_end = |journey: &Journey| {
            let begins = journey.sights().next().is_some_and(|sight| sight.point == Point::Drop);
            journey.id != first && begins && mark.is_sent(journey)
        };
        let Some(end) = self.first(is_end).and_then(|id| self.journeys.remove(&id)) else { return };
        if let Some(journey) = self.journeys.get_mut(&first) {
            journey.steps.extend(end.steps);
        }
    }

    fn parts(&self, mark: &Mark) -> Parts {
        Parts {
            request: self.first(|journey| mark.is_sent(journey)),
            answer: self.first(|journey| mark.is_answered_by(journey)),
            reset: self.first(|journey| mark.is_reset(journey)),
        }
    }

    fn ending(&self, id: Option<u64>) -> Option<Ending> {
        self.journeys.get(&id?).map(|journey| journey.ending(self.names, &self.reader.kernel))
    }

    /// Did a reset get to its receiver's kernel? That frees it, and calls it dropped.
    fn is_received(&self, id: Option<u64>) -> bool {
        let Some(journey) = id.and_then(|id| self.journeys.get(&id)) else { return false };
        if journey.decisions().any(Decision::is_drop) {
            return false;
        }
        let at_pod = |sight: &Sight| sight.point == Point::Receive && matches!(sight.place, Place::Pod(..));
        match journey.ending(self.names, &self.reader.kernel) {
            Ending::Delivered | Ending::LeftNode => true,
            Ending::Dropped => journey.sights().any(at_pod) || drops::cause(journey, &self.reader.kernel).class == "l4",
            Ending::Consumed | Ending::Unknown => false,
        }
    }

    /// Waits for the end of the packet, where it is known already of this one, and for what answers it; false when somebody
    /// interrupts.
    async fn wait(
        &mut self,
        mark: &Mark,
        request: Option<u64>,
        of_pod: bool,
        longest: Duration,
    ) -> Result<bool, TraceError> {
        let begun = Instant::now();
        let (mut known, mut answered) = (None, None);
        loop {
            if !self.tick().await? {
                return Ok(false);
            }
            self.join(mark);
            let parts = self.parts(mark);
            // What asks for a neighbour uses up a copy of the packet, which itself waits.
            let is_open = |ending: &Ending| matches!(ending, Ending::Unknown | Ending::Consumed);
            let ending = self.ending(request.or(parts.request)).filter(|ending| !is_open(ending));
            let Some(ending) = ending else {
                if begun.elapsed() > longest {
                    return Ok(true);
                }
                continue;
            };
            let known = known.get_or_insert_with(Instant::now).elapsed();
            let refused = parts.answer.and_then(|id| self.journeys.get(&id)).is_some_and(|answer| mark.refuses(answer));
            let rest = match (ending, parts.answer) {
                (Ending::Dropped, _) => REST.saturating_sub(known),
                (_, None) if mark.proto == Proto::UDP => ANSWER_UDP.saturating_sub(known),
                (_, None) => ANSWER.saturating_sub(known),
                // The kernel of a pod that knows of no connection ends it, unless that was refused.
                (_, Some(_)) if of_pod && mark.proto == Proto::TCP && !refused && parts.reset.is_none() => {
                    REST.saturating_sub(answered.get_or_insert_with(Instant::now).elapsed())
                }
                (_, Some(_)) => Duration::ZERO,
            };
            if rest.is_zero() {
                return Ok(true);
            }
        }
    }

    /// Sends one packet of the question and tells beside the answer what became of it; false when somebody interrupts.
    ///
    /// # Errors
    /// When a map or the probes cannot be used.
    pub async fn inject(
        &mut self,
        question: &Question,
        ground: &Ground<'_>,
        answer: &mut Answer,
    ) -> Result<bool, TraceError> {
        let real = |fate, answer: &Answer| {
            let differs = differences(answer, &fate, &[], true);
            Real { differs, open: open(answer), ran: !answer.rans.is_empty(), ..Real::without(How::Sent, fate) }
        };
        let unsent = |unsent: Unsent| match unsent {
            Unsent::Lacking(why) => Fate::NotSent(why),
            Unsent::Refused(error) => Fate::Refused(format!("by the node's own kernel: {error}")),
        };
        let shot = match Shot::new(question, ground)? {
            Ok(shot) => shot,
            Err(why) => {
                answer.real = Some(real(unsent(why), answer));
                return Ok(true);
            }
        };
        let sent = match shot.expression() {
            Ok(expression) => {
                self.follow(&expression)?;
                shot.send(&mut self.reader.probes)
            }
            Err(why) => Err(why),
        };
        let mark = match sent {
            Ok(mark) => mark,
            Err(why) => {
                answer.real = Some(real(unsent(why), answer));
                return Ok(true);
            }
        };
        let goes_on = self.wait(&mark, None, shot.is_of_pod(), SENT).await?;
        let reset = self.reset(&mark, &shot).await?;
        let parts = self.parts(&mark);
        let mut real = self.conclude(How::Sent, &mark, parts, answer, true)?;
        if let Fate::Unseen(within) = &mut real.fate {
            *within = tree::duration(u64::try_from(SENT.as_nanos()).unwrap_or(0));
        }
        real.reset = reset;
        answer.real = Some(real);
        // A socket of the node is closed here.
        drop(shot);
        Ok(goes_on)
    }

    /// Makes sure that no half-open connection is left: how it was ended.
    async fn reset(&mut self, mark: &Mark, shot: &Shot) -> Result<Option<String>, TraceError> {
        if mark.proto != Proto::TCP {
            return Ok(None);
        }
        let parts = self.parts(mark);
        let refused = parts.answer.and_then(|id| self.journeys.get(&id)).is_some_and(|answer| mark.refuses(answer));
        if refused || self.ending(parts.request) == Some(Ending::Dropped) {
            return Ok(None);
        }
        if !shot.is_of_pod() {
            return Ok(Some("the node's socket was closed with a reset".to_owned()));
        }
        if self.is_received(parts.reset) {
            return Ok(Some("the pod's own kernel has ended it with a reset".to_owned()));
        }
        if let Some(id) = parts.reset {
            // That one did not arrive: what is looked for is the next.
            self.journeys.remove(&id);
        }
        if shot.reset(&mut self.reader.probes).is_err() {
            return Ok(Some("NOT ended: no reset could be sent".to_owned()));
        }
        let begun = Instant::now();
        while self.parts(mark).reset.is_none() && begun.elapsed() < ANSWER_UDP && self.tick().await? {}
        let sent = self.parts(mark).reset;
        let text = match self.ending(sent) {
            _ if self.is_received(sent) => "ended with a reset that was sent after it",
            Some(Ending::Dropped) => "a reset was sent after it, and dropped: its receiver gives up by itself",
            _ => "a reset was sent after it, and was not seen to arrive",
        };
        Ok(Some(text.to_owned()))
    }

    /// Waits for the next packet of one of the questions, and tells of it beside that one's answer; beside all of them that
    /// none came. False when somebody interrupts. `exact`: what was run dry opens a flow, as the packet may do.
    ///
    /// # Errors
    /// When a map or the probes cannot be used.
    pub async fn watch(
        &mut self,
        questions: &[(Question, Option<Frontend>)],
        answers: &mut [Answer],
        limit: Duration,
        exact: bool,
    ) -> Result<bool, TraceError> {
        let targets: Vec<Target> =
            questions.iter().map(|(question, frontend)| Target::new(question, frontend.as_ref())).collect();
        let expression: Vec<String> = targets.iter().map(Target::expression).collect();
        self.follow(&expression.join(" or "))?;
        let text: Vec<String> = questions
            .iter()
            .map(|(question, _)| format!("{} → {}", question.from.shown(), question.to.shown()))
            .collect();
        live::eprintln_ready(&text.join(", "), self.reader.probes.has_decisions());
        // What came in time may take a moment to be told.
        let end = Instant::now() + limit + REST;
        let names = self.names;
        let which = |journey: &Journey| targets.iter().position(|target| target.is(journey, names));
        let request = loop {
            if let Some(id) = self.first(|journey| which(journey).is_some()) {
                break id;
            }
            // What is none of it is not kept: others may talk for long.
            self.journeys.clear();
            if Instant::now() >= end {
                for answer in answers.iter_mut() {
                    answer.real = Some(Real::without(How::Seen, Fate::Unseen(format!("{limit:?}"))));
                }
                return Ok(true);
            }
            if !self.tick().await? {
                return Ok(false);
            }
        };
        let Some(journey) = self.journeys.get(&request) else { return Ok(true) };
        let (Some(answer), Some(mark)) = (which(journey).and_then(|which| answers.get_mut(which)), Mark::of(journey))
        else {
            return Ok(true);
        };
        let goes_on = self.wait(&mark, Some(request), false, REST).await?;
        // A connection of others is not this command's to end.
        let parts = Parts { request: Some(request), reset: None, ..self.parts(&mark) };
        answer.real = Some(self.conclude(How::Seen, &mark, parts, answer, exact && mark.sequence.is_some())?);
        Ok(goes_on)
    }

    /// What the journeys amount to, beside the answer.
    fn conclude(
        &mut self,
        how: How,
        mark: &Mark,
        parts: Parts,
        answer: &Answer,
        exact: bool,
    ) -> Result<Real, TraceError> {
        let mut real = Real {
            open: open(answer),
            ran: !answer.rans.is_empty(),
            ..Real::without(how, Fate::Unseen(String::new()))
        };
        let received = self.is_received(parts.reset);
        let Self { reader, names, maps, rules, journeys, .. } = self;
        let context = Context { names, kernel: &reader.kernel, hooks: reader.hooks.as_ref() };
        let mut decided: Vec<(Hook, Reason)> = Vec::new();
        for (label, id) in [("1", parts.request), ("1r", parts.answer), ("2", parts.reset)] {
            let Some(journey) = id.and_then(|id| journeys.get_mut(&id)) else { continue };
            sockets::tell_of(journey, names, maps)?;
            rules.tell(journey, names, monotonic());
            let story = Story::new(journey, label == "1r", context);
            let clock = output::clock(boot_epoch() + journey.began(), false);
            let block = tree::block(label, &clock, &story, context);
            // What was sent is answered to nobody; and who is reset frees what tells of it.
            let meant = match label {
                _ if how == How::Seen || story.ending != Ending::Dropped => None,
                "1r" if story.cause.as_ref().is_some_and(|cause| cause.class == "l4") => {
                    Some("as meant: no process of the sender waits for it")
                }
                "2" if received => Some("as meant: its receiver knows of no connection any more"),
                _ => None,
            };
            match meant {
                None => real.text.push_str(&block),
                Some(meant) => {
                    let advice = block.rfind("   fix: ").unwrap_or(block.len());
                    real.text.push_str(block.get(..advice).unwrap_or_default());
                    real.text.extend(["   ", meant, "\n"]);
                }
            }
            real.lines.extend(record::lines(label, &story, context));
            match label {
                "1" => {
                    decided = journey.decisions().filter_map(|step| Some((step.hook?, step.reason?))).collect();
                    real.fate = match (story.ending, &story.cause) {
                        (Ending::Delivered, _) => Fate::Delivered,
                        (Ending::LeftNode, _) => Fate::LeftNode,
                        (Ending::Dropped, Some(cause)) => Fate::Dropped(format!("{} at {}", cause.reason, cause.place)),
                        (Ending::Dropped, None) => Fate::Dropped("for no reason that is known".to_owned()),
                        (Ending::Consumed | Ending::Unknown, _) => Fate::Unknown,
                    };
                }
                "1r" => {
                    let kind = journey.first().map(Packet::kind).unwrap_or_default();
                    let kind = if kind.is_empty() { "a datagram".to_owned() } else { kind };
                    if mark.refuses(journey) && real.fate.passes() == Some(true) {
                        real.fate = Fate::Refused(kind.clone());
                    }
                    real.answer = Some(kind);
                }
                _ => {}
            }
        }
        real.differs = differences(answer, &real.fate, &decided, exact);
        real.lost = reader.lost()?.1;
        Ok(real)
    }
}

/// What `--watch` waits for.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Target {
    /// Sender; `None`: any address of the node.
    from: Option<IpAddr>,
    /// Receivers: as the sender asks for them, and of a process of the node as it sends to them.
    to: Vec<(IpAddr, Option<u16>)>,
    /// Ports that answers come from before they are translated back.
    back: Vec<u16>,
    proto: Proto,
}

impl Target {
    fn new(question: &Question, frontend: Option<&Frontend>) -> Self {
        let node = question.from.kind == Kind::Node;
        let mut to = vec![(question.to.ip, question.port)];
        let mut back: Vec<u16> = question.port.into_iter().collect();
        for at in frontend.map(Frontend::candidates).unwrap_or_default() {
            if node && to.len() <= super::BACKENDS {
                to.push((at.ip(), Some(at.port())));
            }
            if !back.contains(&at.port()) && back.len() < super::BACKENDS {
                back.push(at.port());
            }
        }
        Self { from: (!node).then(|| question.source()), to, back, proto: question.proto }
    }

    fn expression(&self) -> String {
        let v4 = self.to.iter().any(|(ip, _)| ip.is_ipv4());
        let family = if v4 { "ip" } else { "ip6" };
        let name = self.proto.to_string().to_lowercase();
        let name = if self.proto == Proto::ICMPV6 { "icmp6".to_owned() } else { name };
        let (sends, gets) = match self.from {
            Some(ip) => (format!(" and src host {ip}"), format!(" and dst host {ip}")),
            None => (String::new(), String::new()),
        };
        let forth = self.to.iter().map(|(ip, port)| {
            let port = port.map(|port| format!(" and dst port {port}")).unwrap_or_default();
            format!("({family} and {name} and dst host {ip}{port}{sends})")
        });
        // Of all that the node is sent, only what its receivers send: they are all named, as it has no address of a pod's.
        let node = self.to.iter().filter(|_| self.from.is_none()).map(|(ip, port)| {
            let port = port.map(|port| format!(" and src port {port}")).unwrap_or_default();
            format!("({family} and {name} and src host {ip}{port})")
        });
        let pod = self.from.iter().flat_map(|_| &self.back);
        let pod = pod.map(|port| format!("({family} and {name} and src port {port}{gets})"));
        let echoes = (self.from.is_some() && self.back.is_empty()).then(|| format!("({family} and {name}{gets})"));
        forth.chain(node).chain(pod).chain(echoes).collect::<Vec<_>>().join(" or ")
    }

    /// Is it a packet of the sender to the receiver?
    fn is(&self, journey: &Journey, names: &Names) -> bool {
        let Some(packet) = journey.first() else { return false };
        let from = match self.from {
            Some(ip) => ip == packet.src,
            None => names.own.contains(&packet.src),
        };
        let is_to =
            |(ip, port): &(IpAddr, Option<u16>)| *ip == packet.dst && port.is_none_or(|port| port == packet.dst_port);
        let asks = matches!(packet.icmp, None | Some((8 | 128, _)));
        from && packet.proto == self.proto && asks && self.to.iter().any(is_to)
    }
}

/// How the command ends by its answers' packets; `None` where none was asked for. `model`: how it would end without.
pub fn outcome(answers: &[Answer], model: Outcome) -> Option<Outcome> {
    let all = answers.iter().filter_map(|answer| answer.real.as_ref()).map(|real| real.outcome(model));
    // What cannot be is told before what failed, and that before what is open.
    let order = [Outcome::Unavailable, Outcome::Failed, Outcome::NoPacket, Outcome::Incomplete, Outcome::Good];
    let all: Vec<Outcome> = all.collect();
    order.into_iter().find(|outcome| all.contains(outcome))
}
