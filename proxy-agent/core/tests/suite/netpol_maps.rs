//! The policy maps as the programs see them, and one node that is compiled and judged.

use proxy_abi::policy::{Bits, BitsKey, BlockEntry, CellWord, Direction, PortPage, SetEntry, SlotWord, prefix_of};
use proxy_abi::{IpBytes, PortBe, PrefixKey, Proto};
use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::{Engine, Limits, Transition};
use proxy_core::netpol::explain::Reason;
use proxy_core::netpol::spec::{Change, Pod};
use proxy_core::netpol::tables::{Op, PolicyTables};
use proxy_ebpf::policy::{Cause, Judgement, Lookup, Question, judge};
use proxy_oracle::dice::NODE;
use proxy_oracle::row::Row;
use proxy_oracle::verdict::{Cluster, Oracle, Side, Verdict};

/// Map content behind the kernel's look-ups. The longest match is found by looking at every range.
pub(crate) struct Maps<'a>(pub(crate) &'a PolicyTables);

impl Lookup for Maps<'_> {
    fn epoch(&self) -> u32 {
        self.0.epoch
    }

    fn slot(&self, index: u32) -> Option<SlotWord> {
        Some(self.0.slots.get(&index).copied().unwrap_or(SlotWord { block: 0, revision: 0 }))
    }

    fn block(&self, block: u32) -> Option<&BlockEntry> {
        self.0.blocks.get(&block)
    }

    fn set(&self, set: u32) -> Option<&SetEntry> {
        self.0.sets.get(&set)
    }

    fn ip(&self, ip: &IpBytes) -> Option<CellWord> {
        self.0.ips.get(ip).copied()
    }

    fn prefix(&self, ip: &IpBytes) -> Option<CellWord> {
        let number = |ip: IpBytes| ip.0.iter().fold(0_u128, |sum, word| sum << 32 | u128::from(u32::from_be(*word)));
        let wanted = prefix_of(*ip);
        let holds = |key: &PrefixKey| {
            let shift = 160 - key.length;
            key.scope == wanted.scope && (number(key.ip) ^ number(*ip)).checked_shr(shift).unwrap_or(0) == 0
        };
        let best = self.0.prefixes.iter().filter(|(key, _)| holds(key)).max_by_key(|(key, _)| key.length);
        best.map(|(_, word)| *word)
    }

    fn page(&self, index: u32) -> Option<&PortPage> {
        Some(self.0.pages.get(&index).unwrap_or(&PortPage::ZERO))
    }

    fn bits(&self, key: BitsKey) -> Option<&Bits> {
        self.0.bits.get(&key)
    }
}

/// The question that a program asks for one side of a flow.
pub(crate) fn question(slot: u16, side: &Side) -> Question {
    let mut flags = 0;
    for (set, flag) in [
        (side.from_node, Question::FROM_NODE),
        (side.hairpin, Question::HAIRPIN),
        (side.port.is_none(), Question::NO_PORT),
    ] {
        flags |= if set { flag } else { 0 };
    }
    Question {
        slot,
        direction: if side.ingress { Direction::Ingress } else { Direction::Egress },
        peer: side.peer.into(),
        proto: Proto(side.proto),
        port: PortBe::new(side.port.unwrap_or(0)),
        flags,
    }
}

/// A node: objects, compiler, maps.
pub(crate) struct Node {
    pub(crate) cluster: Cluster,
    pub(crate) engine: Engine,
    pub(crate) maps: PolicyTables,
}

impl Node {
    pub(crate) fn new(limits: Limits) -> Self {
        let engine = Engine::new(NODE, limits, PolicyTables::default());
        Self { cluster: Cluster::empty(), engine, maps: PolicyTables::default() }
    }

    /// With these objects.
    pub(crate) fn with(changes: impl IntoIterator<Item = Change>) -> Self {
        let mut node = Self::new(Limits::default());
        node.change(changes);
        node
    }

    /// What the changes lead to; the maps stay as they are.
    pub(crate) fn plan(&mut self, changes: impl IntoIterator<Item = Change>) -> Transition {
        for change in changes {
            self.cluster.apply(change.clone());
            self.engine.apply(change);
        }
        self.engine.commit()
    }

    /// Changes objects and maps.
    pub(crate) fn change(&mut self, changes: impl IntoIterator<Item = Change>) -> Transition {
        let transition = self.plan(changes);
        transition.ops().for_each(|op| self.maps.apply(op));
        transition
    }

    pub(crate) fn slot(&self, pod: &Pod) -> Option<u16> {
        Some(self.engine.subjects().get(&pod.name)?.slot)
    }

    pub(crate) fn judge(&self, pod: &Pod, side: &Side) -> Option<Judgement> {
        Some(judge(&Maps(&self.maps), &question(self.slot(pod)?, side)))
    }

    /// The engine's verdict, in the oracle's words: with the first rule alone, and all policies that isolate.
    pub(crate) fn verdict(&self, pod: &Pod, side: &Side) -> Result<(bool, Named), String> {
        let judgement = self.judge(pod, side).ok_or("the pod has no slot")?;
        let reason = || self.engine.reason(judgement.rule, side.peer).ok_or(format!("{judgement:?} names no rule"));
        let named = match judgement.cause {
            Cause::Open | Cause::LocalNode => Named::Nothing,
            Cause::Rule | Cause::Isolated => match reason()? {
                Reason::Rule(origin) => Named::Rule(origin.policy, origin.rule),
                Reason::Isolated(policies) => Named::Isolated(policies),
            },
            cause => return Err(format!("{cause:?}")),
        };
        Ok((judgement.allowed, named))
    }

    /// Compares one side with the oracle. `strict`: the rule named is the first of all that match.
    pub(crate) fn compare(&self, broken: Option<Row>, pod: &Pod, side: &Side, strict: bool) -> Result<Verdict, String> {
        let oracle = Oracle { cluster: &self.cluster, broken };
        let wanted = oracle.judge(pod, side);
        let (allowed, named) = self.verdict(pod, side)?;
        let fits = match &named {
            Named::Nothing => wanted.allowed && wanted.isolating.is_empty(),
            Named::Isolated(policies) => !allowed && *policies == wanted.isolating,
            Named::Rule(policy, rule) if strict => wanted.rules.first().is_some_and(|(p, r)| p == policy && r == rule),
            Named::Rule(policy, rule) => wanted.rules.iter().any(|(p, r)| p == policy && r == rule),
        };
        if allowed != wanted.allowed || !fits {
            return Err(format!("{} {side:?}:\n  compiled {allowed} {named:?}\n  oracle   {wanted:?}", pod.name));
        }
        // The shadow is asked of what is allowed.
        if allowed && self.engine.subjects().get(&pod.name).is_some_and(|subject| subject.unaudited.is_none()) {
            let question = question(self.slot(pod).ok_or("no slot")?, side);
            let shadow = judge(&Maps(&self.maps), &Question { flags: question.flags | Question::SHADOW, ..question });
            let wanted = oracle.shadow(pod, side);
            let reason = || self.engine.reason(shadow.rule, side.peer);
            let fits = match (shadow.cause, &wanted) {
                (Cause::Open | Cause::LocalNode, None) => shadow.allowed,
                (Cause::Isolated, Some(wanted)) => {
                    !wanted.allowed && reason() == Some(Reason::Isolated(wanted.isolating.clone()))
                }
                (Cause::Rule, Some(wanted)) => wanted.allowed,
                _ => false,
            };
            if !fits {
                return Err(format!("{} {side:?}:\n  shadow {shadow:?}\n  oracle {wanted:?}", pod.name));
            }
        }
        Ok(wanted)
    }

    /// All rules that allow a side, by the explanation.
    pub(crate) fn explained(&self, pod: &Pod, side: &Side) -> Vec<(ObjectName, usize)> {
        let Some(judgement) = self.judge(pod, side) else { return Vec::new() };
        let matches = self.engine.matches(judgement.rule, side.peer, Proto(side.proto), side.port);
        let both = matches.into_iter().filter(|m| m.peer && m.port);
        both.map(|m| (m.origin.policy, m.origin.rule)).collect()
    }
}

/// What a verdict names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Named {
    /// No policy.
    Nothing,
    /// The rule that allows.
    Rule(ObjectName, usize),
    /// The policies that isolate.
    Isolated(Vec<ObjectName>),
}

/// No map holds more than it may.
pub(crate) fn within(maps: &PolicyTables, limits: &Limits) -> bool {
    maps.ips.len() <= limits.ips as usize
        && maps.prefixes.len() <= limits.prefixes as usize
        && maps.cells.len() <= limits.cells as usize
        && maps.bits.len() <= limits.bits as usize
        && maps.hits.len() <= limits.hits as usize
        && maps.sets.keys().all(|id| *id < limits.sets)
        && maps.blocks.keys().all(|id| *id < limits.blocks)
        && maps.slots.keys().all(|index| *index < 2 * limits.slots)
}

/// The switch, if there is one.
pub(crate) fn is_switch(op: &Op) -> bool {
    matches!(op, Op::Epoch(_))
}
