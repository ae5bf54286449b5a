//! From numbers in a verdict back to the names of policies and rules.

use std::net::IpAddr;

use proxy_abi::Proto;
use proxy_abi::policy::{Direction, RuleRef};

use super::engine::Engine;
use super::policy::PortRange;
use super::rules::{Entry, Line, Origin, PeerTest, RuleSet};
use crate::name::ObjectName;

/// Why a verdict is as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// This rule allows it.
    Rule(Origin),
    /// These policies isolate the pod, and none of their rules matches.
    Isolated(Vec<ObjectName>),
}

/// How far a rule of the pod's policies matches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RuleMatch {
    /// The rule.
    pub origin: Origin,
    /// Does the peer match?
    pub peer: bool,
    /// Does the port match?
    pub port: bool,
}

impl Engine {
    /// What a verdict's rule stands for, for a peer; `None` when its set is not in use any more.
    pub fn reason(&self, rule: RuleRef, peer: IpAddr) -> Option<Reason> {
        let (set, line) = self.line(rule)?;
        if rule.is_isolated() {
            return Some(Reason::Isolated(set.policies.clone()));
        }
        let matching = line?.entries.iter().find(|entry| self.matches_peer(&entry.peers, peer))?;
        Some(Reason::Rule(matching.origin.clone()))
    }

    /// Which way the rules of a verdict's set are about; `None` when the set is not in use any more.
    pub fn direction(&self, rule: RuleRef) -> Option<Direction> {
        self.line(rule).map(|(set, _)| set.direction)
    }

    /// How far each rule matches a flow: those that allow it match in both, those that match in one were near it. For
    /// the set that `rule` is of. `port` is `None` when it is not known, or the protocol has none.
    pub fn matches(&self, rule: RuleRef, peer: IpAddr, proto: Proto, port: Option<u16>) -> Vec<RuleMatch> {
        let Some((set, _)) = self.line(rule) else { return Vec::new() };
        let mut found: Vec<RuleMatch> = Vec::new();
        for Line { ports, entries } in &set.rules {
            let in_range = |range: &PortRange| {
                range.proto == proto && port.is_some_and(|port| range.first <= port && port <= range.last)
            };
            let port = ports.as_ref().is_none_or(|ranges| ranges.iter().any(in_range));
            for Entry { peers, origin } in entries {
                found.push(RuleMatch { origin: origin.clone(), peer: self.matches_peer(peers, peer), port });
            }
        }
        // A rule whose named port stands for several numbers has several lines: the best one counts.
        found.sort_by(|a, b| a.origin.cmp(&b.origin).then_with(|| (b.peer && b.port).cmp(&(a.peer && a.port))));
        found.dedup_by(|later, earlier| later.origin == earlier.origin);
        found
    }

    /// The set of a rule, and its line unless none matched.
    fn line(&self, rule: RuleRef) -> Option<(&RuleSet, Option<&Line>)> {
        let (set, piece) = self.rules_of_piece(rule.set())?;
        let bit = piece * self.rules_per_set() + rule.bit() as usize;
        Some((set, set.rules.get(bit).filter(|_| !rule.is_isolated())))
    }

    fn matches_peer(&self, test: &PeerTest, ip: IpAddr) -> bool {
        let owner = self.world().owner(ip);
        let asked = test.predicates.iter().any(|predicate| {
            if !predicate.matches_ip(ip) {
                return false;
            }
            let Some(member) = owner else { return !predicate.asks_pod() };
            predicate.matches_pod(&member.pod, self.world().namespace(&member.pod.name.namespace))
        });
        test.any_address || (test.any_pod && owner.is_some()) || asked
    }
}
