//! `trace why FROM to TO`: would a packet arrive, and if not, why: the first cause, and what to do.
//!
//! ```text
//!   words ─▶ question ─▶ ground: maps, netlink, sysctls, hooks ─▶ seat, service, policy, path: checks in the order of a
//!             (names)     (everything that is looked up)                packet's way ─▶ answer: the first cause first
//!                          the programs, in a dry run ─────────────▶ dry: does what they do agree with the maps?
//!                          flow tables, with --ct ─────────────────▶ flow: the packet in the middle of its flow
//!            send (--inject), or the next one (--watch) ─▶ follow ──▶ real: does a real packet agree with all that?
//! ```
//!
//! Nothing is written, and nothing sent but for `--inject`.

pub mod check;
pub mod dry;
pub mod flow;
pub mod follow;
pub mod frame;
pub mod ground;
pub mod mark;
pub mod model;
pub mod path;
pub mod policy;
pub mod question;
pub mod real;
pub mod seat;
pub mod send;
pub mod service;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use check::{Answer, Check, State};
use dry::Expected;
use flow::Stage;
use follow::Eye;
use ground::{Ground, expected};
use proxy_abi::Reason;
use proxy_abi::policy::Direction;
use question::{Kind, Place, Question};
use service::Frontend;

use super::TraceError;
use super::expect::Outcome;
use super::names::Names;
use super::selection::SelectionError;
use crate::ask::{Answer as Said, Question as Asking, ask};

/// Backends of one Service that are looked at.
const BACKENDS: usize = 8;

/// What is asked.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where maps are pinned.
    pub pin_root: PathBuf,
    /// Folder of the CNI's results.
    pub cni: PathBuf,
    /// `FROM to TO [PORT/PROTOCOL]`.
    pub words: Vec<String>,
    /// The source that the sender's packets carry, where it is not its own.
    pub source: Option<IpAddr>,
    /// Bytes of the packet from its IP header on; 0 = no more than its headers.
    pub size: u16,
    /// Lines for programs, not for people.
    pub is_json: bool,
    /// In which state of its flow the packet is.
    pub stage: Stage,
    /// A real packet is sent.
    pub inject: bool,
    /// The next real one is waited for, at most so long.
    pub watch: Option<Duration>,
}

/// The text of the answers, and how the command ends: [`Outcome::Failed`] when one of the packets would not arrive,
/// [`Outcome::Incomplete`] when that cannot be told to the end, [`Outcome::Unavailable`] without an agent's maps. Where there
/// is a real packet, what became of it counts. Must be called within a runtime.
///
/// # Errors
/// [`TraceError`]: the words, a name that nobody has, maps or netlink; for a real packet also the probes.
pub async fn run(options: &Options) -> Result<(String, Outcome), TraceError> {
    let opened = super::maps(&options.pin_root)?;
    let names = Names::read(opened.as_ref().map(|(_, maps)| maps), &options.cni)?;
    let mut questions = questions(options, &names)?;
    let Some((pins, maps)) = &opened else {
        let answers: Vec<Answer> = questions.iter().map(|question| without_maps(question, options)).collect();
        return Ok((text(&answers, options.is_json), Outcome::Unavailable));
    };
    let mut ground = Ground::read(pins, maps, &names)?;
    let mut answers = Vec::new();
    for question in &mut questions {
        if options.inject && question.from.kind == Kind::Pod {
            ground.reserve(question)?;
        }
        let mut more = Vec::new();
        let known = match options.stage {
            Stage::New => None,
            stage => flow::answer(question, stage, &mut ground, &names, &mut more)?,
        };
        answers.push(match known {
            Some(known) => known,
            None => answer(question, more, &mut ground, &names)?,
        });
    }
    let model = if answers.iter().any(|answer| answer.cause().is_some()) {
        Outcome::Failed
    } else if answers.iter().all(Answer::is_complete) {
        Outcome::Good
    } else {
        Outcome::Incomplete
    };
    let mut goes_on = true;
    if options.inject {
        let mut eye = Eye::open(pins, &names, maps)?;
        for (question, answer) in questions.iter().zip(&mut answers) {
            goes_on = goes_on && eye.inject(question, &ground, answer).await?;
        }
    } else if let Some(limit) = options.watch {
        let mut asked = Vec::new();
        for question in questions {
            let (frontend, _) = ground.frontend(&question)?;
            asked.push((question, frontend));
        }
        let opens = options.stage == Stage::New;
        goes_on = Eye::open(pins, &names, maps)?.watch(&asked, &mut answers, limit, opens).await?;
    }
    let outcome = if goes_on { follow::outcome(&answers, model).unwrap_or(model) } else { Outcome::Interrupted };
    Ok((text(&answers, options.is_json), outcome))
}

fn text(answers: &[Answer], is_json: bool) -> String {
    if is_json {
        answers.iter().flat_map(Answer::lines).collect::<Vec<_>>().join("\n")
    } else {
        answers.iter().map(Answer::text).collect::<Vec<_>>().join("\n\n")
    }
}

/// What the words ask, with all names resolved.
fn questions(options: &Options, names: &Names) -> Result<Vec<Question>, TraceError> {
    let elsewhere = |name: &str| {
        let asked = Asking::Pods { names: vec![name.to_owned()], ips: Vec::new() };
        match ask(&options.pin_root, &asked) {
            Ok(Said::Pods { found, .. }) => found.into_iter().flat_map(|pod| pod.ips).collect::<Vec<IpAddr>>(),
            // Unknown here, and nobody to ask: the name stays unknown.
            Ok(_) | Err(_) => Vec::new(),
        }
    };
    let mut questions =
        question::read(&options.words, names, &elsewhere).map_err(|error| pointed(error, &options.words))?;
    for question in &mut questions {
        question.size = options.size;
        question.claims = options.source;
    }
    if let Some(source) = options.source {
        questions.retain(|question| question.from.ip.is_ipv4() == source.is_ipv4());
        if questions.is_empty() || questions.iter().any(|question| question.from.kind != Kind::Pod) {
            return Err(TraceError::Usage(format!(
                "--source {source}: the sender is to be a pod of this node, and both sides are to have an address of that family"
            )));
        }
    }
    if let Some(question) = questions.iter().find(|question| options.inject && question.from.kind == Kind::Other) {
        return Err(TraceError::Usage(format!(
            "--inject sends from a pod of this node or from the node, and {} is neither: ask on its own node, or wait for \
             its next packet with --watch",
            question.from.shown()
        )));
    }
    Ok(questions)
}

/// With the place of the word that cannot be read.
fn pointed(error: SelectionError, words: &[String]) -> TraceError {
    let SelectionError::Unreadable { word, .. } = &error else { return error.into() };
    let line = words.join(" ");
    let before = words.iter().take_while(|known| *known != word).map(|known| known.chars().count() + 1).sum::<usize>();
    let width = before.min(line.chars().count() + 1) + 1;
    TraceError::Usage(format!("{error}\n  {line}\n  {:>width$}", "^"))
}

fn begin(question: &Question) -> Answer {
    let to = match question.port {
        Some(port) => format!("{}, port {port}", question.to.shown()),
        None => question.to.shown(),
    };
    let mut answer = Answer {
        from: question.from.shown(),
        to,
        proto: question.proto.to_string().to_lowercase(),
        ..Answer::default()
    };
    let whose = |place: &Place| match place.kind {
        Kind::Pod => format!("{} is a pod of this node", place.shown()),
        Kind::Node => format!("{} is the node", place.ip),
        Kind::Other => place.shown(),
    };
    answer.checks.push(Check::good("names", format!("{}; {}", whose(&question.from), whose(&question.to))));
    answer
}

fn without_maps(question: &Question, options: &Options) -> Answer {
    let mut answer = begin(question);
    answer.checks.push(Check::cause(
        "maps",
        format!(
            "no agent has run with the pin directory {}: nothing translates or judges here",
            options.pin_root.display()
        ),
        "start the agent, or name its directory with --pin-root",
    ));
    answer
}

/// Reasons for which programs drop what a policy forbids.
const POLICY: [Reason; 5] =
    [Reason::PolicyEgress, Reason::PolicyIngress, Reason::PolicyCut, Reason::PolicyUnready, Reason::PolicyHeld];
/// Reasons for which they do not translate.
const SERVICE: [Reason; 6] = [
    Reason::NoBackend,
    Reason::NoLocalBackend,
    Reason::NoSuchPort,
    Reason::Unallocated,
    Reason::SourceNotAllowed,
    Reason::BackendMissing,
];

/// Checks of every receiver, apart by their place on the packet's way.
#[derive(Default)]
struct Parts {
    egress: Vec<Check>,
    path: Vec<Check>,
    ingress: Vec<Check>,
    listener: Vec<Check>,
    /// The receiver's side by its address.
    verdicts: Vec<(IpAddr, Check)>,
}

fn is_cause(check: &Check) -> bool {
    check.state == State::Cause
}

/// The answer for a packet that opens a flow. `more`: checks that come first.
fn answer(question: &Question, more: Vec<Check>, ground: &mut Ground<'_>, names: &Names) -> Result<Answer, TraceError> {
    let mut answer = begin(question);
    answer.checks.extend(more);
    let source = ground.source(question)?;
    answer.checks.extend(source.clone());
    let (frontend, before) = ground.frontend(question)?;
    let model = ground.model(question, frontend.as_ref())?;
    answer.checks.push(model.clone());
    answer.checks.extend(before.iter().cloned());
    let mut receivers = vec![(question.to.clone(), question.port)];
    let mut service = before;
    if let Some(frontend) = &frontend {
        service = frontend.checks();
        answer.checks.extend(service.iter().cloned());
        receivers = frontend
            .candidates()
            .into_iter()
            .map(|backend| (Place::at(backend.ip(), names), Some(backend.port())))
            .collect();
    }
    answer.checks.extend(ground.seat(&question.from, frontend.is_some())?);
    let failing = source.iter().chain([&model]).chain(&service).find(|check| is_cause(check)).cloned();
    if let Some(cause) = failing {
        // There is no receiver.
        let reasons = if cause.what == "source" { &[Reason::FrameSource][..] } else { &SERVICE[..] };
        // What the maps do not know as a Service's passes as anybody's.
        let expected = if cause == model && frontend.is_none() {
            Expected::Open
        } else {
            expected(Some(&cause), reasons, Vec::new())
        };
        let ran = ground.dry(question, true, (&question.to, question.port), &expected)?;
        answer.add(ran);
        return Ok(answer);
    }
    let left = receivers.len().saturating_sub(BACKENDS);
    let parts = receivers_of(question, ground, frontend.as_ref(), receivers.get(..BACKENDS).unwrap_or(&receivers))?;
    let denied = parts.egress.iter().filter(|check| is_cause(check)).count();
    let obstructed = parts.path.iter().any(is_cause);
    let backends = frontend.as_ref().map(Frontend::candidates).unwrap_or_default();
    let says = match denied {
        // Where the route fails, or some backends may be reached, it is for the program to say.
        0 if obstructed => Expected::Open,
        0 => expected(None, &[], backends),
        _ if denied == parts.egress.len() => Expected::Drops(POLICY.to_vec()),
        _ => Expected::Open,
    };
    let ran = ground.dry(question, true, (&question.to, question.port), &says)?;
    answer.checks.extend(parts.egress);
    answer.checks.extend(parts.path);
    let chosen = ran.as_ref().and_then(|(_, ran)| ran.as_ref()?.backend);
    answer.add(ran);
    answer.checks.extend(parts.ingress);
    let receiver = match chosen {
        Some(backend) => Some((Place::at(backend.ip(), names), Some(backend.port()))),
        None => receivers.first().cloned(),
    };
    if let Some((to, port)) = receiver.filter(|_| denied == 0 && !obstructed) {
        let verdict = parts.verdicts.iter().find(|(ip, _)| *ip == to.ip).map(|(_, check)| check);
        let ran = ground.dry(question, false, (&to, port), &expected(verdict, &POLICY, Vec::new()))?;
        answer.add(ran);
    }
    answer.checks.extend(parts.listener);
    if left > 0 {
        answer.checks.push(Check::note("backends", format!("{left} more endpoints were not looked at"), ""));
    }
    Ok(answer)
}

/// The checks of all receivers, each of which may be taken.
fn receivers_of(
    question: &Question,
    ground: &mut Ground<'_>,
    frontend: Option<&Frontend>,
    receivers: &[(Place, Option<u16>)],
) -> Result<Parts, TraceError> {
    let mut parts = Parts::default();
    for (to, port) in receivers {
        let name = |mut check: Check| {
            if receivers.len() > 1 {
                check.found = format!("{}: {}", to.shown(), check.found);
            }
            check
        };
        for (direction, check) in ground.policies(question, to, *port) {
            match direction {
                Direction::Egress => parts.egress.push(name(check)),
                Direction::Ingress => {
                    parts.verdicts.push((to.ip, check.clone()));
                    parts.ingress.push(name(check));
                }
            }
        }
        parts.path.extend(ground.path(question, to, frontend)?.checks().into_iter().map(name));
        if let Some(port) = port {
            parts.listener.push(name(ground.listener(question, to, *port)));
        }
    }
    Ok(parts)
}
