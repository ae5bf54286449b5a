//! `explain`: may this pod reach that one, and which rule says so.
//!
//! ```text
//!   names ── agent ──▶ addresses ── local_pod ──▶ slots ── policy maps, by the programs' own code ──▶ verdict, rule number
//!                                                                                       agent ──▶ policy, rule, near misses
//! ```
//!
//! The verdict is that of the maps as they are; without the agent it is there all the same, in numbers.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::ControlFlow;
use std::path::Path;
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail};
use proxy_abi::policy::{
    Bits, BitsKey, BlockEntry, CellWord, Direction, MAX_CHAIN, PortPage, RuleRef, SetEntry, SlotWord, prefix_of,
};
use proxy_abi::{DeviceEntry, FrontendEntry, FrontendKey, IpBytes, PortBe, Proto};
use proxy_core::netpol::tables::PolicyTables;
use proxy_ebpf::policy::{Cause, Judgement, Lookup, Question as Asking, judge};
use serde_json::{Value, json};

use super::{Format, VERSION, open, write};
use crate::ask::{Answer, AskError, Asked, PodInfo, Question, ReasonInfo, ask};
use crate::dataplane;
use crate::dataplane::describe::{self, Description};
use crate::dataplane::pins::{Maps, Pins};

/// The exit code when something forbids it.
const DENIED: u8 = 2;
/// The word for the node itself.
const NODE: &str = "node";

/// Destination port and protocol: `80/tcp`, `53/UDP`, `icmp`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    port: Option<u16>,
    proto: Proto,
}

/// Neither port nor protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("write PORT/PROTOCOL, as in 80/tcp, or a protocol without ports, as in icmp")]
pub struct TargetError;

/// One end of the flow, at one of its addresses.
#[derive(Clone, Debug)]
struct End {
    /// Name, where it is known.
    name: Option<String>,
    ip: IpAddr,
    /// The pod's slot, when it is on this node.
    slot: Option<u16>,
    /// Its node, where it is known to be another one.
    elsewhere: Option<String>,
    is_node: bool,
}

/// What is behind a destination: the Service that it is of, and where its packets go.
type Behind = (Option<String>, Vec<(End, Target)>);

/// What one pod has to say.
#[derive(Clone, Debug)]
pub(crate) struct Say {
    /// Of which of its sides.
    pub(crate) direction: Direction,
    /// Name or address.
    pub(crate) pod: String,
    slot: u16,
    /// The verdict of the maps.
    pub(crate) judgement: Judgement,
    tier: Option<&'static str>,
    /// The policy behind it; `None` without the agent, and where no rule has a say.
    pub(crate) reason: Option<ReasonInfo>,
    /// The policies would refuse it, and the agent was told to let pods reach their own node.
    node_open: bool,
    /// Policies that are only audited would refuse it: the names of those that isolate the pod, as far as the agent tells.
    audit: Option<Vec<String>>,
}

impl Target {
    /// A port of a protocol.
    pub(crate) const fn new(port: Option<u16>, proto: Proto) -> Self {
        Self { port, proto }
    }
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let named = |text: &str| {
            let known = [Proto::TCP, Proto::UDP, Proto::SCTP, Proto::ICMP, Proto::ICMPV6];
            let known = known.into_iter().find(|proto| proto.to_string().eq_ignore_ascii_case(text));
            known.or_else(|| text.parse().ok().map(Proto)).ok_or(TargetError)
        };
        match text.split_once('/') {
            Some((port, proto)) => {
                let port = port.parse().ok().filter(|port| *port != 0).ok_or(TargetError)?;
                Ok(Self { port: Some(port), proto: named(proto)? })
            }
            // A number alone would be taken for a port by some and for a protocol by others.
            None if text.bytes().all(|b| b.is_ascii_digit()) => Err(TargetError),
            None => Ok(Self { port: None, proto: named(text)? }),
        }
    }
}

/// Explains a flow, for every pair of addresses of one family.
pub fn explain(pin_root: &Path, format: Format, from: &str, to: &str, target: Target) -> Result<ExitCode> {
    let maps = open(pin_root)?;
    let held = Held::read(pin_root, &maps)?;
    let (sources, destinations) = (ends(pin_root, &maps, from)?, ends(pin_root, &maps, to)?);
    let mut items = Vec::new();
    let mut denied = false;
    for source in &sources {
        for destination in destinations.iter().filter(|end| end.ip.is_ipv4() == source.ip.is_ipv4()) {
            let (service, behind) = translated(pin_root, &maps, destination, target)?;
            for (end, target) in behind {
                let says = says(pin_root, &held, source, &end, target)?;
                denied |= says.iter().any(|say| !say.allowed());
                items.push(
                    Flow { source, destination: &end.clone(), target, service: service.clone(), says }.show(format),
                );
            }
        }
    }
    if items.is_empty() {
        bail!("{from} and {to} have no addresses of one family");
    }
    let text = match format {
        Format::Json => serde_json::to_string_pretty(&json!({ "version": VERSION, "items": items }))?,
        Format::Table => items.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("\n\n"),
    };
    write(&text)?;
    Ok(if denied { ExitCode::from(DENIED) } else { ExitCode::SUCCESS })
}

/// A pod's name, an address, or the node.
fn ends(pin_root: &Path, maps: &Maps, text: &str) -> Result<Vec<End>> {
    if text == NODE {
        let unspecified = [IpAddr::from([0; 4]), IpAddr::from([0_u16; 8])];
        let node = |ip| End { name: Some("the node".to_owned()), ip, slot: None, elsewhere: None, is_node: true };
        return Ok(unspecified.map(node).into());
    }
    if let Ok(ip) = text.parse::<IpAddr>() {
        let known = match ask(pin_root, &Question::Pods { names: Vec::new(), ips: vec![ip] }) {
            Ok(Answer::Pods { found, .. }) => found.into_iter().next(),
            Ok(_) | Err(_) => None,
        };
        return Ok(vec![end(maps, known.as_ref(), ip)?]);
    }
    let question = Question::Pods { names: vec![text.to_owned()], ips: Vec::new() };
    let answer = ask(pin_root, &question).with_context(|| format!("{text} is no address, and whose it is"))?;
    let Answer::Pods { found, similar } = answer else { bail!("no answer to who {text} is") };
    let Some(pod) = found.first() else {
        let similar: Vec<String> = similar.into_iter().flat_map(|(_, names)| names).collect();
        let hint = if similar.is_empty() { String::new() } else { format!("; there is {}", similar.join(", ")) };
        bail!(
            "no running pod is called {text} (write NAMESPACE/NAME; before the first NetworkPolicy none is known){hint}"
        );
    };
    if pod.ips.is_empty() {
        bail!("{} has no address yet", pod.name);
    }
    pod.ips.iter().map(|ip| end(maps, Some(pod), *ip)).collect()
}

fn end(maps: &Maps, pod: Option<&PodInfo>, ip: IpAddr) -> Result<End> {
    let slot = maps.local_pod.get(&ip.into())?.map(|entry| entry.slot);
    let elsewhere = pod.filter(|pod| !pod.local).map(|pod| pod.node.clone().unwrap_or_else(|| "none yet".to_owned()));
    Ok(End { name: pod.map(|pod| pod.name.clone()), ip, slot, elsewhere, is_node: false })
}

/// Policy is asked after translation: what is behind an address of a Service, with its name.
fn translated(pin_root: &Path, maps: &Maps, end: &End, target: Target) -> Result<Behind> {
    let itself = (None, vec![(end.clone(), target)]);
    let Some(port) = target.port else { return Ok(itself) };
    let key = FrontendKey {
        ip: end.ip.into(),
        port: PortBe::new(port),
        proto: target.proto,
        scope: FrontendKey::SCOPE_CLUSTER,
    };
    let Some(entry) = maps.frontend.get(&key)? else { return Ok(itself) };
    let mut behind = Vec::new();
    for slot in entry.first..entry.first.saturating_add(entry.count) {
        let backend = maps.slot.get(&slot)?.map(|id| maps.backend.get(&id)).transpose()?.flatten();
        if let Some(backend) = backend {
            let ip = IpAddr::from(backend.ip);
            let found = ends(pin_root, maps, &ip.to_string())?;
            let target = Target { port: Some(backend.port.get()), proto: target.proto };
            behind.extend(found.into_iter().map(|end| (end, target)));
        }
    }
    let name = maps.service.get(&entry.service)?.map(|service| service.name.as_str().to_owned());
    let name = name.unwrap_or_else(|| format!("#{}", entry.service));
    if behind.is_empty() {
        bail!("{}:{port} is of Service {name}, which has no endpoints", end.ip);
    }
    Ok((Some(name), behind))
}

/// What the pods at both ends say, as far as they are on this node.
fn says(pin_root: &Path, held: &Held, source: &End, destination: &End, target: Target) -> Result<Vec<Say>> {
    let sides = [(Direction::Egress, source, destination), (Direction::Ingress, destination, source)];
    let mut says = Vec::new();
    for (direction, pod, peer) in sides {
        let Some(slot) = pod.slot.filter(|slot| *slot != 0) else { continue };
        let mut flags = 0;
        for (set, flag) in [
            (peer.is_node, Asking::FROM_NODE),
            (pod.ip == peer.ip, Asking::HAIRPIN),
            (target.port.is_none(), Asking::NO_PORT),
        ] {
            flags |= if set { flag } else { 0 };
        }
        let port = PortBe::new(target.port.unwrap_or(0));
        let question = Asking { slot, direction, peer: peer.ip.into(), proto: target.proto, port, flags };
        let judgement = judge(held, &question);
        let why = |rule: RuleRef| {
            let asked = Asked { rule: rule.0, peer: peer.ip, proto: target.proto.0, port: target.port };
            match (rule.set() != 0).then(|| ask(pin_root, &Question::Reason(asked))) {
                Some(Ok(Answer::Reason(reason))) => Ok(Some(reason)),
                None | Some(Ok(_) | Err(AskError::Away(_))) => Ok(None),
                Some(Err(error)) => Err(error),
            }
        };
        let reason = why(judgement.rule)?;
        // As the programs have it: what is allowed is asked of the shadow, and the way to the node may be open.
        let is_judged = |cause| matches!(cause, Cause::Rule | Cause::Isolated);
        let open = held.node_open && direction == Direction::Egress && held.is_node(peer.ip);
        let beside = judge(held, &Asking { flags: question.flags | Asking::SHADOW, ..question });
        let audited = judgement.allowed && !beside.allowed && is_judged(beside.cause) && !open;
        let audit = if audited { Some(why(beside.rule)?.unwrap_or_default().audited) } else { None };
        let node_open = !judgement.allowed && is_judged(judgement.cause) && open;
        let tier = tier(&held.tables, slot, direction, judgement.rule.set());
        let pod = pod.name.clone().unwrap_or_else(|| pod.ip.to_string());
        says.push(Say { direction, pod, slot, judgement, tier, reason, node_open, audit });
    }
    Ok(says)
}

/// What the pods at both ends of a flow say, as far as they are on this node. `None` in place of an address: the node.
pub(crate) fn verdicts(
    pin_root: &Path,
    maps: &Maps,
    held: &Held,
    (source, destination): (Option<IpAddr>, Option<IpAddr>),
    target: Target,
) -> Result<Vec<Say>> {
    let find = |ip: Option<IpAddr>, other: Option<IpAddr>| match ip {
        Some(ip) => ends(pin_root, maps, &ip.to_string()),
        None => Ok(ends(pin_root, maps, NODE)?
            .into_iter()
            .filter(|end| other.is_none_or(|ip| ip.is_ipv4() == end.ip.is_ipv4()))
            .collect()),
    };
    let (source_end, destination_end) = (find(source, destination)?, find(destination, source)?);
    match (source_end.first(), destination_end.first()) {
        (Some(source), Some(destination)) => says(pin_root, held, source, destination, target),
        _ => Ok(Vec::new()),
    }
}

/// The tier that a set belongs to.
fn tier(tables: &PolicyTables, slot: u16, direction: Direction, wanted: u32) -> Option<&'static str> {
    let word = tables.slots.get(&SlotWord::index(slot, tables.epoch))?;
    let block = tables.blocks.get(&word.block)?;
    let sets = match direction {
        Direction::Ingress => block.ingress,
        Direction::Egress => block.egress,
    };
    let chain = |first: u32| {
        let next = |set: &u32| tables.sets.get(set).map(|entry| entry.next).filter(|next| *next != 0);
        std::iter::successors(Some(first), next).take(MAX_CHAIN as usize)
    };
    let names = ["Admin", "NetworkPolicy", "Baseline"];
    let mut tiers = sets.into_iter().zip(names).filter(|(first, _)| *first != 0 && wanted != 0);
    tiers.find(|(first, _)| chain(*first).any(|set| set == wanted)).map(|(_, name)| name)
}

// === The maps as the programs see them ===

/// The maps of policy, read once.
#[derive(Debug)]
pub(crate) struct Held {
    tables: PolicyTables,
    /// Addresses of the node.
    node: BTreeSet<IpAddr>,
    /// Does the agent let pods reach their own node whatever their policies say?
    node_open: bool,
}

impl Held {
    pub(crate) fn read(pin_root: &Path, maps: &Maps) -> Result<Self, dataplane::Error> {
        let settings = Description::read(&Pins::new(pin_root).maps())?.unwrap_or_default().settings;
        let node_open = settings.get(describe::NODE_OPEN).is_some_and(|open| *open != 0);
        let mut node = BTreeSet::new();
        maps.frontend.scan(|key, mark| {
            if *key == FrontendKey::address(key.ip) && mark.flags & FrontendEntry::ADDRESS_NODE != 0 {
                node.insert(IpAddr::from(key.ip));
            }
            ControlFlow::Continue(())
        })?;
        Ok(Self { tables: maps.policy.tables()?, node, node_open })
    }

    /// Which side of each cell counts.
    pub(crate) const fn epoch(&self) -> u32 {
        self.tables.epoch
    }

    fn is_node(&self, ip: IpAddr) -> bool {
        self.node.contains(&ip)
    }
}

impl Lookup for Held {
    fn epoch(&self) -> u32 {
        self.tables.epoch
    }

    fn slot(&self, index: u32) -> Option<SlotWord> {
        self.tables.slots.get(&index).copied()
    }

    fn block(&self, block: u32) -> Option<&BlockEntry> {
        self.tables.blocks.get(&block)
    }

    fn set(&self, set: u32) -> Option<&SetEntry> {
        self.tables.sets.get(&set)
    }

    fn ip(&self, ip: &IpBytes) -> Option<CellWord> {
        self.tables.ips.get(ip).copied()
    }

    fn prefix(&self, ip: &IpBytes) -> Option<CellWord> {
        let own = self.tables.prefixes.get(&prefix_of(*ip)).copied();
        own.or_else(|| self.tables.enclosing(IpAddr::from(*ip).into()))
    }

    fn page(&self, index: u32) -> Option<&PortPage> {
        Some(self.tables.pages.get(&index).unwrap_or(&PortPage::ZERO))
    }

    fn bits(&self, key: BitsKey) -> Option<&Bits> {
        self.tables.bits.get(&key)
    }
}

// === How it is shown ===

struct Flow<'a> {
    source: &'a End,
    destination: &'a End,
    target: Target,
    service: Option<String>,
    says: Vec<Say>,
}

impl Flow<'_> {
    fn show(&self, format: Format) -> Value {
        match format {
            Format::Json => self.json(),
            Format::Table => json!(self.text()),
        }
    }

    fn allowed(&self) -> bool {
        self.says.iter().all(Say::allowed)
    }

    fn json(&self) -> Value {
        let end = |end: &End| json!({ "name": end.name, "ip": end.ip, "node": end.elsewhere, "slot": end.slot });
        let says: Vec<Value> = self.says.iter().map(Say::json).collect();
        json!({
            "from": end(self.source),
            "to": end(self.destination),
            "protocol": self.target.proto.to_string(),
            "port": self.target.port,
            "service": self.service,
            "allowed": self.allowed(),
            "sides": says,
        })
    }

    fn text(&self) -> String {
        let end = |end: &End| match &end.name {
            Some(name) if end.is_node => name.clone(),
            Some(name) => format!("{name} ({})", end.ip),
            None => end.ip.to_string(),
        };
        let port = self.target.port.map_or(String::new(), |port| format!("/{port}"));
        let through = self.service.as_ref().map_or(String::new(), |name| format!(" through Service {name}"));
        let mut lines = vec![format!(
            "{} → {} {}{port}{through}: {}",
            end(self.source),
            end(self.destination),
            self.target.proto,
            if self.allowed() { "allowed" } else { "DENIED" }
        )];
        for (direction, at) in [(Direction::Egress, self.source), (Direction::Ingress, self.destination)] {
            match self.says.iter().find(|say| say.direction == direction) {
                Some(say) => lines.extend(say.text()),
                None => lines.push(format!("  {:<8} {}", word(direction), silence(at))),
            }
        }
        lines.join("\n")
    }
}

pub(crate) const fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Ingress => "ingress",
        Direction::Egress => "egress",
    }
}

/// A rule that nobody names.
pub(crate) fn numbered(rule: RuleRef) -> String {
    if rule.is_isolated() {
        format!("no rule of set {}", rule.set())
    } else {
        format!("rule {} of set {}", rule.bit(), rule.set())
    }
}

/// Why an end says nothing.
fn silence(end: &End) -> String {
    match end {
        End { is_node: true, .. } => "the node is no pod".to_owned(),
        End { elsewhere: Some(node), .. } => format!("is for node {node} to say: ask there"),
        End { slot: Some(_), .. } => "no policy is in force on this node".to_owned(),
        End { slot: None, .. } => "no pod of this node has this address".to_owned(),
    }
}

impl Say {
    pub(crate) const fn allowed(&self) -> bool {
        self.judgement.allowed || self.node_open
    }

    pub(crate) fn cause(&self) -> &'static str {
        if self.node_open {
            return "pods may reach their own node whatever their policies say (--allow-pods-to-node)";
        }
        if self.slot == DeviceEntry::HELD {
            return "held: nobody knows which pod this is";
        }
        match self.judgement.cause {
            Cause::Open => "no policy has a say",
            Cause::LocalNode => "its own node may always",
            Cause::Rule => "by a rule",
            Cause::Isolated => "isolated, and no rule matches",
            Cause::Locked => "locked: its policy does not fit into the maps",
            Cause::Unready => "its policy is not in the maps yet",
            Cause::Broken => "a map names what is not there",
            Cause::Moving => "the policy is changing",
        }
    }

    fn json(&self) -> Value {
        let Judgement { revision, rule, .. } = self.judgement;
        json!({
            "direction": word(self.direction),
            "pod": self.pod,
            "slot": self.slot,
            "allowed": self.allowed(),
            "cause": self.cause(),
            "tier": self.tier,
            "revision": revision,
            "set": rule.set(),
            "bit": if rule.is_isolated() { Value::Null } else { json!(rule.bit()) },
            "reason": self.reason,
            "denied_by_audit": self.audit,
        })
    }

    pub(crate) fn text(&self) -> Vec<String> {
        let verdict = if self.allowed() { "allowed" } else { "DENIED" };
        let tier = self.tier.map_or(String::new(), |tier| format!(", tier {tier}"));
        let mut lines = vec![format!(
            "  {:<8} {} {verdict}: {}{tier}, revision {}",
            word(self.direction),
            self.pod,
            self.cause(),
            self.judgement.revision
        )];
        match &self.audit {
            Some(names) if names.is_empty() => lines.push("    would be denied by audit".to_owned()),
            Some(names) => lines.push(format!("    would be denied by audit of {}", names.join(", "))),
            None => {}
        }
        let Some(reason) = &self.reason else {
            if self.judgement.rule.set() != 0 {
                lines.push(format!("    {}; the agent, which knows its name, is away", numbered(self.judgement.rule)));
            }
            return lines;
        };
        let rule = |rule: &crate::ask::RuleInfo| format!("{} {}: {}", rule.policy, rule.rule, rule.text);
        lines.extend(reason.rule.iter().map(|found| format!("    {}", rule(found))));
        if !reason.isolated_by.is_empty() {
            lines.push(format!("    isolated by {}", reason.isolated_by.join(", ")));
        }
        if !self.allowed() {
            let lacks =
                |peer| if peer { "the peer matches, the port does not" } else { "the port matches, the peer does not" };
            lines
                .extend(reason.near.iter().map(|near| format!("    near: {}; {}", rule(&near.rule), lacks(near.peer))));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets() {
        let rows = [
            ("80/tcp", Some((Some(80), Proto::TCP))),
            ("53/UDP", Some((Some(53), Proto::UDP))),
            ("9/132", Some((Some(9), Proto::SCTP))),
            ("icmp", Some((None, Proto::ICMP))),
            ("tcp", Some((None, Proto::TCP))),
            ("80", None),
            ("", None),
            ("0/tcp", None),
            ("65536/tcp", None),
            ("80/", None),
            ("80/quic", None),
            ("tcp/80", None),
        ];
        for (text, want) in rows {
            let want = want.map(|(port, proto)| Target { port, proto }).ok_or(TargetError);
            assert_eq!(text.parse(), want, "{text}");
        }
    }

    #[test]
    fn a_tier_is_found_by_any_set_of_its_chain() {
        let mut tables = PolicyTables { epoch: 1, ..PolicyTables::default() };
        tables.slots.insert(SlotWord::index(3, 1), SlotWord { block: 7, revision: 1 });
        tables.blocks.insert(7, BlockEntry { ingress: [0, 10, 0], egress: [4, 0, 5], ..BlockEntry::OPEN });
        let entry = |next| SetEntry { next, ..SetEntry::EMPTY };
        tables.sets = std::collections::BTreeMap::from([(10, entry(11)), (11, entry(0)), (4, entry(0)), (5, entry(0))]);
        let found = |direction, set| tier(&tables, 3, direction, set);
        assert_eq!(found(Direction::Ingress, 11), Some("NetworkPolicy"));
        assert_eq!((found(Direction::Egress, 4), found(Direction::Egress, 5)), (Some("Admin"), Some("Baseline")));
        assert_eq!((found(Direction::Egress, 10), found(Direction::Ingress, 0)), (None, None));
    }
}
