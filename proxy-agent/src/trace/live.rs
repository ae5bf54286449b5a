//! `trace live`: follows packets until enough were seen.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use proxy_abi::trace::{TraceFilter, count};
use serde_json::json;

use super::condition::Condition;
use super::expect::{Expectations, Outcome};
use super::expression::Expression;
use super::journey::{Ending, Journey};
use super::names::Names;
use super::output::Output;
use super::packet::{Packet, flag};
use super::reader::{self, Reader};
use super::rules::Rules;
use super::selection::Selection;
use super::story::{Context, Story};
use super::{TraceError, boot_epoch, maps, monotonic, record, sockets};
use crate::dataplane::pins::Maps;
use crate::dataplane::probes::{Cost, Probes};

/// What to follow, and for how long.
#[derive(Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
pub struct Options {
    /// The agent's pins.
    pub pin_root: PathBuf,
    /// The CNI's records.
    pub cni: PathBuf,
    /// Words of the selection.
    pub words: Vec<String>,
    /// Expression.
    pub expression: Option<String>,
    /// Packets to show.
    pub packets: usize,
    /// At most so long.
    pub limit: Duration,
    /// No replies.
    pub no_replies: bool,
    /// Of each flow and direction the first packet alone; `None` = where the selection names a Service.
    pub first_of_flow: Option<bool>,
    /// Dropped packets alone.
    pub drops: bool,
    /// One flow of so many.
    pub sample: u32,
    /// Packets to begin each second; 0 = any number.
    pub rate: u32,
    /// Packets that took less are not shown, nanoseconds.
    pub least: u64,
    /// What the story of a packet that is shown fulfils.
    pub condition: Option<Condition>,
    /// Percent of one CPU that the probes may take; 0 = not measured.
    pub most_cpu: u64,
    /// Mebibytes of the ring.
    pub buffer: u32,
    /// Packets of every namespace of this machine.
    pub all_namespaces: bool,
    /// Everything may be followed.
    pub all: bool,
    /// What must be seen.
    pub expectations: Expectations,
}

/// Flags of what answers a request to open a connection.
const ANSWER: u8 = flag::SYN | flag::ACK;
/// How often the rings are read.
const TICK: Duration = Duration::from_millis(20);
/// A packet of which nothing was seen for so long has ended.
const QUIET: u64 = 250_000_000;
/// Of each of these ticks the last few are measured.
const MEASURE_EVERY: u64 = 50;
const MEASURE_FOR: u64 = 5;

/// What a packet is in its flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// From the one that began it.
    Request,
    /// The answer to the request of this number.
    ReplyTo(u64),
    /// The answer to one that was not seen.
    Reply,
}

/// Numbers packets, and finds the request that a reply belongs to.
#[derive(Debug, Default)]
struct Numbers {
    next: u64,
    /// Number of the last request, by protocol, source and destination.
    forward: BTreeMap<(u8, SocketAddr, SocketAddr), u64>,
}

impl Numbers {
    /// Is it a reply, and to which request?
    fn part(&self, journey: &Journey, selection: &Selection, names: &Names) -> Part {
        let seen: Vec<&Packet> = [journey.first(), journey.last()].into_iter().flatten().collect();
        let key = |packet: &Packet| (packet.proto.0, packet.source(), packet.destination());
        let back = |packet: &Packet| (packet.proto.0, packet.destination(), packet.source());
        if let Some(number) = seen.iter().find_map(|packet| self.forward.get(&back(packet))) {
            return Part::ReplyTo(*number);
        }
        let known = seen.iter().any(|packet| self.forward.contains_key(&key(packet)));
        let answers = seen.iter().any(|packet| packet.flags & ANSWER == ANSWER);
        let opens = seen.iter().any(|packet| packet.opens());
        let backward = seen.first().is_some_and(|packet| !selection.is_forward(packet, names) && !selection.is_all());
        if !known && (answers || backward && !opens) { Part::Reply } else { Part::Request }
    }

    /// The number to show: of a reply that of its request, else the next.
    fn number(&mut self, journey: &Journey, part: Part) -> u64 {
        if let Part::ReplyTo(number) = part {
            return number;
        }
        self.next += 1;
        if part == Part::Request {
            for packet in [journey.first(), journey.last()].into_iter().flatten() {
                self.forward.insert((packet.proto.0, packet.source(), packet.destination()), self.next);
            }
        }
        self.next
    }
}

/// Everything that a running trace has.
struct Session {
    options: Options,
    selection: Selection,
    expression: Option<Expression>,
    names: Names,
    reader: Reader,
    numbers: Numbers,
    rules: Rules,
    /// Those of the agent, where there is one.
    maps: Option<Maps>,
    flows_seen: BTreeSet<(u8, SocketAddr, SocketAddr)>,
    output: Output,
    shown: usize,
    beside: usize,
    endings: BTreeMap<&'static str, usize>,
    reasons: BTreeMap<String, usize>,
    failures: Vec<String>,
    cost: Cost,
    measured: u64,
    measured_time: u64,
}

/// Runs until enough was seen, the time is over or a signal comes.
///
/// # Errors
/// [`TraceError`]: nothing was followed then.
pub async fn run(options: Options, output: Output, node: &str) -> Result<Outcome, TraceError> {
    let pinned = maps(&options.pin_root)?;
    let mut names = Names::read(pinned.as_ref().map(|(_, maps)| maps), &options.cni)?;
    names.ask_for(&options.pin_root, &options.words);
    let names = names;
    let selection = if options.words.is_empty() { Selection::all() } else { Selection::new(&options.words, &names)? };
    let expression: Option<Expression> = options.expression.as_ref().map(|text| text.parse()).transpose()?;
    if selection.is_all() && expression.is_none() && !options.all {
        return Err(TraceError::Usage(
            "what is to be followed? Name a pod (pod:NS/NAME), a Service (svc:NS/NAME), an address, an interface \
             (dev:NAME) or an expression (-f), or give --all"
                .to_owned(),
        ));
    }
    let (flags, ends) = selection.ends()?;
    let rows = expression.as_ref().map(Expression::rows).unwrap_or_default();
    let reader = Reader::open(pinned.as_ref().map(|(pins, _)| pins), options.buffer)?;
    let namespaces = if options.all_namespaces { TraceFilter::ALL_NAMESPACES } else { 0 };
    let filter = TraceFilter {
        flags: flags | namespaces,
        ifindex: selection.ifindex.unwrap_or(0),
        proto: selection.proto.map_or(0, |proto| proto.0.into()),
        sample: options.sample,
        rate: options.rate,
        ..reader::EVERY
    };
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    let mut text = selection.text.clone();
    if let Some(expression) = &options.expression {
        text = format!("{text}; {expression}");
    }
    let rules = Rules::new(options.pin_root.clone());
    let mut session = Session {
        options,
        selection,
        expression,
        names,
        reader,
        numbers: Numbers::default(),
        rules,
        maps: pinned.map(|(_, maps)| maps),
        flows_seen: BTreeSet::new(),
        output,
        shown: 0,
        beside: 0,
        endings: BTreeMap::new(),
        reasons: BTreeMap::new(),
        failures: Vec::new(),
        cost: Cost::default(),
        measured: 0,
        measured_time: 0,
    };
    let decisions = session.reader.probes.has_decisions();
    session.write(|output| output.begin(record::meta(&text, node, &release, boot_epoch(), decisions)))?;
    session.reader.follow(&filter, &ends, &rows)?;
    tracing::debug!(filter = text, "following");
    eprintln_ready(&text, decisions);
    let outcome = session.follow().await?;
    session.end(outcome)
}

/// Tells on standard error that packets are followed from now on: what waits for that can begin.
pub(super) fn eprintln_ready(text: &str, decisions: bool) {
    let more = if decisions { "" } else { " (no agent's pins here: tracepoints alone)" };
    #[expect(clippy::print_stderr, reason = "a word to whoever waits, apart from the trace itself")]
    {
        eprintln!("following {text}{more}");
    }
}

impl Session {
    fn write(&mut self, with: impl FnOnce(&mut Output) -> std::io::Result<()>) -> Result<(), TraceError> {
        match with(&mut self.output) {
            // Somebody closed the pipe (`| head`): enough was seen.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => {
                self.options.packets = self.shown;
                Ok(())
            }
            other => other.map_err(|source| TraceError::File { path: "output".to_owned(), source }),
        }
    }

    async fn follow(&mut self) -> Result<Outcome, TraceError> {
        let mut ticks = tokio::time::interval(TICK);
        let end = tokio::time::Instant::now() + self.options.limit;
        let signal = |kind| {
            tokio::signal::unix::signal(kind).map_err(|source| TraceError::File { path: "signal".to_owned(), source })
        };
        let mut interrupt = signal(tokio::signal::unix::SignalKind::interrupt())?;
        let mut terminate = signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut tick: u64 = 0;
        let mut window = None;
        loop {
            tokio::select! {
                _ = ticks.tick() => {}
                _ = interrupt.recv() => return Ok(Outcome::Interrupted),
                _ = terminate.recv() => return Ok(Outcome::Interrupted),
            }
            tick += 1;
            let now = monotonic();
            self.reader.read(&self.names, now);
            self.show(now, QUIET)?;
            if self.shown >= self.options.packets {
                return Ok(Outcome::Good);
            }
            if tokio::time::Instant::now() >= end {
                // What is on its way comes to its end.
                self.show(u64::MAX, 0)?;
                return Ok(Outcome::Good);
            }
            if tick.is_multiple_of(MEASURE_EVERY) {
                self.reader.keep(now)?;
            }
            if self.options.most_cpu > 0 {
                match tick % MEASURE_EVERY {
                    phase if phase == MEASURE_EVERY - MEASURE_FOR => {
                        window = Probes::measure().map(|fd| (fd, self.reader.probes.cost(), now));
                    }
                    0 => {
                        if let Some((_, before, since)) = window.take()
                            && self.is_too_dear(before, now.saturating_sub(since))
                        {
                            return Ok(Outcome::Stopped);
                        }
                    }
                    _ => {}
                }
            }
        }
    }

    /// Adds up a window of measurement; true when the probes took more than they may.
    fn is_too_dear(&mut self, before: Cost, window: u64) -> bool {
        let after = self.reader.probes.cost();
        self.cost.runs += after.runs.saturating_sub(before.runs);
        let spent = after.run_time.saturating_sub(before.run_time);
        self.cost.run_time += spent;
        self.measured += window;
        self.measured_time = window;
        window > 0 && spent * 100 / window > self.options.most_cpu
    }

    /// Is it what was asked for? The kernel's answer was rough.
    fn is_wanted(&self, journey: &Journey, part: Part) -> bool {
        let (service, _) = journey.service();
        let mut packets = journey.sights().filter_map(|sight| sight.packet.as_ref());
        if part != Part::Request && self.options.no_replies || journey.total() < self.options.least {
            return false;
        }
        // What answers a request that was meant is meant, whoever translated it.
        let answers = matches!(part, Part::ReplyTo(_));
        packets.any(|packet| {
            (answers || self.selection.joins(packet, service, &self.names))
                && self.expression.as_ref().is_none_or(|expression| expression.holds(packet))
        })
    }

    /// Is it the first packet of its flow and direction?
    fn is_first_of_flow(&mut self, journey: &Journey) -> bool {
        let wanted = self.options.first_of_flow.unwrap_or_else(|| !self.selection.services().is_empty());
        let Some(packet) = journey.first().filter(|packet| wanted && packet.has_ports()) else { return true };
        self.flows_seen.insert((packet.proto.0, packet.source(), packet.destination()))
    }

    fn show(&mut self, now: u64, quiet: u64) -> Result<(), TraceError> {
        for mut journey in self.reader.take_quiet(now, quiet) {
            if self.shown >= self.options.packets {
                break;
            }
            let elsewhere = journey.here().next().is_none();
            if let Some(maps) = &self.maps {
                sockets::tell_of(&mut journey, &self.names, maps)?;
            }
            let part = self.numbers.part(&journey, &self.selection, &self.names);
            let is_reply = part != Part::Request;
            if elsewhere || !self.is_wanted(&journey, part) {
                self.beside += 1;
                continue;
            }
            if !self.is_first_of_flow(&journey) {
                continue;
            }
            let number = self.numbers.number(&journey, part);
            self.rules.tell(&mut journey, &self.names, monotonic());
            self.tell(&journey, number, is_reply)?;
        }
        Ok(())
    }

    fn tell(&mut self, journey: &Journey, number: u64, is_reply: bool) -> Result<(), TraceError> {
        let Self { names, reader: Reader { kernel, hooks, .. }, output, .. } = self;
        let context = Context { names, kernel, hooks: hooks.as_ref() };
        let story = Story::new(journey, is_reply, context);
        if self.options.drops && story.ending != Ending::Dropped {
            return Ok(());
        }
        let label = format!("{number}{}", if is_reply { "r" } else { "" });
        if let Some(condition) = &self.options.condition {
            let lines = record::lines(&label, &story, context);
            if !condition.holds(&lines.iter().collect::<Vec<_>>()) {
                self.beside += 1;
                return Ok(());
            }
        }
        for failure in self.options.expectations.failures(&story, hooks.as_ref()) {
            self.failures.push(format!("#{label}: {failure}"));
        }
        *self.endings.entry(story.ending.name()).or_default() += 1;
        if let Some(cause) = &story.cause {
            *self.reasons.entry(cause.reason.clone()).or_default() += 1;
        }
        let written = output.packet(&label, &story, context);
        self.shown += 1;
        self.write(|_| written)
    }

    fn end(mut self, outcome: Outcome) -> Result<Outcome, TraceError> {
        let (lost, missing) = self.reader.lost()?;
        let counts = self.reader.probes.counts()?;
        let counted = |which: u32| counts.get(which as usize).copied().unwrap_or(0);
        let outcome = match outcome {
            Outcome::Good if self.shown == 0 => Outcome::NoPacket,
            Outcome::Good if !self.failures.is_empty() => Outcome::Failed,
            Outcome::Good if missing => Outcome::Incomplete,
            other => other,
        };
        let per_cent = (self.measured > 0).then(|| self.cost.run_time * 1000 / self.measured);
        let per_run = self.cost.run_time.checked_div(self.cost.runs);
        let paths: Vec<_> = self
            .output
            .paths()
            .iter()
            .map(|path| {
                json!({
                    "who": path.who, "sig": path.steps, "result": path.ending, "count": path.times.len(),
                    "p50_ns": path.quantile(500), "p99_ns": path.quantile(990),
                })
            })
            .collect();
        let mut summary = json!({
            "t": "summary", "packets": self.shown, "results": self.endings, "paths": paths, "top_drops": self.reasons,
            "failures": self.failures, "followed": counted(count::STARTED), "events": counted(count::EVENTS),
            "looked_at": counted(count::LOOKED_AT), "beside": self.beside, "complete": !missing,
            "overhead": { "cpu_permille": per_cent, "ns_per_probe": per_run },
        });
        if let serde_json::Value::Object(fields) = &mut summary {
            fields.insert("outcome".to_owned(), json!(outcome as u8));
            fields.insert("stopped_by".to_owned(), json!((outcome == Outcome::Stopped).then_some("max_cpu")));
        }
        let mut text = String::new();
        for failure in &self.failures {
            text.push_str("expectation failed  ");
            text.push_str(failure);
            text.push('\n');
        }
        let lost_text: Vec<String> = lost.iter().map(|(name, count)| format!("{name} {count}")).collect();
        let head = if missing { "INCOMPLETE" } else { "complete" };
        let cost = per_cent.map_or_else(String::new, |share| {
            format!(" · probes took {}.{}% of a CPU, {} ns a run", share / 10, share % 10, per_run.unwrap_or(0))
        });
        let stopped = if outcome == Outcome::Stopped {
            format!(
                "\nstopped: more of a CPU than --max-cpu {} allows; follow less, or fewer packets (--rate, --sample)",
                self.options.most_cpu
            )
        } else {
            String::new()
        };
        let endings: Vec<String> = self.endings.iter().map(|(name, count)| format!("{count} {name}")).collect();
        let endings = if endings.is_empty() { "no packet".to_owned() } else { endings.join(", ") };
        let (events, lost_text) = (counted(count::EVENTS), lost_text.join(", "));
        let _ = write!(text, "{head}: {endings}; {events} events; lost: {lost_text}{cost}{stopped}");
        let lost = record::lost(&lost);
        self.write(|output| output.end(&lost, &summary, &text))?;
        Ok(outcome)
    }
}
