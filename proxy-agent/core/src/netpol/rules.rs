//! The rules of one pod in one direction: what all policies that select it say together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_abi::policy::Direction;

use super::policy::{Namespaces, Peer, Peers, Policy, Port, PortName, PortRange, Ports};
use super::predicate::{Predicate, exposed};
use super::selector::Selector;
use super::spec::Pod;
use crate::name::ObjectName;

/// Where a rule was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// Policy.
    pub policy: ObjectName,
    /// Index in its `ingress` or `egress`.
    pub rule: usize,
}

/// All rules of a direction. Equal ones are shared between pods, so everything that distinguishes verdicts or their
/// reasons is in here.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleSet {
    /// Direction.
    pub direction: Direction,
    /// The policies that isolate the pod, by name.
    pub policies: Vec<ObjectName>,
    /// The rules, in the order of their first origins.
    pub rules: Vec<Line>,
}

/// What one bit stands for: ports, and who may use them.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Line {
    /// Ports; `None` = every protocol and port.
    pub ports: Option<BTreeSet<PortRange>>,
    /// Who, and where it says so; in order. More than one where rules were equal, or there were too many of them.
    pub entries: Vec<Entry>,
}

/// One rule's peers.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Entry {
    /// Peers.
    pub peers: PeerTest,
    /// The rule.
    pub origin: Origin,
}

/// Who matches: anyone who matches one part.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PeerTest {
    /// Every address.
    pub any_address: bool,
    /// Every pod.
    pub any_pod: bool,
    /// Whoever satisfies one of these.
    pub predicates: BTreeSet<Predicate>,
}

impl PeerTest {
    fn is_nobody(&self) -> bool {
        !self.any_address && !self.any_pod && self.predicates.is_empty()
    }
}

/// What the rules of a pod follow from.
#[derive(Clone, Copy, Debug)]
pub struct Subject<'a> {
    /// The pod.
    pub pod: &'a Pod,
    /// Policies that select it, by name.
    pub policies: &'a [Arc<Policy>],
    /// Numbers that pods of the cluster give to a name.
    pub numbers: &'a BTreeMap<PortName, BTreeMap<u16, usize>>,
    /// More lines than this are merged by their ports.
    pub merge_above: usize,
}

impl Subject<'_> {
    /// The rules; `None` when no policy isolates the pod in this direction.
    pub fn rules(&self, direction: Direction) -> Option<RuleSet> {
        let mut set = RuleSet { direction, policies: Vec::new(), rules: Vec::new() };
        let mut lines: BTreeMap<(Option<BTreeSet<PortRange>>, PeerTest), usize> = BTreeMap::new();
        for policy in self.policies {
            let Some(rules) = (match direction {
                Direction::Ingress => &policy.ingress,
                Direction::Egress => &policy.egress,
            }) else {
                continue;
            };
            set.policies.push(policy.name.clone());
            for (index, rule) in rules.iter().enumerate() {
                for (ports, peers) in self.expand(direction, &rule.ports, &rule.peers) {
                    let entry = Entry { peers, origin: Origin { policy: policy.name.clone(), rule: index } };
                    let line = *lines.entry((ports.clone(), entry.peers.clone())).or_insert(set.rules.len());
                    match set.rules.get_mut(line) {
                        Some(line) => line.entries.push(entry),
                        None => set.rules.push(Line { ports, entries: vec![entry] }),
                    }
                }
            }
        }
        if set.policies.is_empty() {
            return None;
        }
        if set.rules.len() > self.merge_above {
            set.merge();
        }
        Some(set)
    }

    /// Ports and peers of a rule. Several, where a name stands for different numbers of different destinations.
    fn expand(
        &self,
        direction: Direction,
        ports: &Ports,
        peers: &Peers,
    ) -> Vec<(Option<BTreeSet<PortRange>>, PeerTest)> {
        let items = match ports {
            Ports::Any => return vec![(None, test(peers, None))].into_iter().filter(|(_, p)| !p.is_nobody()).collect(),
            Ports::Some(items) => items,
        };
        let mut ranges = Vec::new();
        let mut named = BTreeSet::new();
        for item in items {
            match item {
                Port::Range(range) => ranges.push(*range),
                Port::Named(name) if direction == Direction::Ingress => {
                    let own = exposed(self.pod).filter(|(own, _)| own == name);
                    ranges.extend(own.map(|(_, number)| PortRange::one(name.proto, number)));
                }
                Port::Named(name) => {
                    let numbers = self.numbers.get(name).into_iter().flat_map(BTreeMap::keys);
                    named.extend(numbers.map(|number| (name.clone(), *number)));
                }
            }
        }
        let mut expanded = Vec::new();
        if !ranges.is_empty() {
            expanded.push((Some(PortRange::merged(ranges)), test(peers, None)));
        }
        for exposed in named {
            let range = PortRange::one(exposed.0.proto, exposed.1);
            expanded.push((Some(BTreeSet::from([range])), test(peers, Some(&exposed))));
        }
        expanded.retain(|(_, peers)| !peers.is_nobody());
        expanded
    }

    /// Names of ports that the egress rules need the numbers of.
    pub fn names(&self) -> BTreeSet<PortName> {
        let rules = self.policies.iter().filter_map(|policy| policy.egress.as_ref()).flatten();
        let items = rules.flat_map(|rule| match &rule.ports {
            Ports::Some(items) => items.as_slice(),
            Ports::Any => &[],
        });
        items
            .filter_map(|item| match item {
                Port::Named(name) => Some(name.clone()),
                Port::Range(_) => None,
            })
            .collect()
    }
}

/// The test for peers, of pods that expose a port.
fn test(peers: &Peers, exposes: Option<&(PortName, u16)>) -> PeerTest {
    let everywhere = || Peer::Pods { namespaces: Namespaces::Matching(Selector::default()), pods: Selector::default() };
    let list = match peers {
        Peers::Some(list) => list.clone(),
        Peers::Any if exposes.is_some() => vec![everywhere()],
        Peers::Any => return PeerTest { any_address: true, ..PeerTest::default() },
    };
    let mut test = PeerTest::default();
    for peer in list {
        if exposes.is_none() && peer == everywhere() {
            test.any_pod = true;
        } else {
            test.predicates.insert(Predicate { peer, exposes: exposes.cloned() });
        }
    }
    test
}

impl RuleSet {
    /// One line for all rules with the same ports.
    fn merge(&mut self) {
        let mut lines: BTreeMap<Option<BTreeSet<PortRange>>, usize> = BTreeMap::new();
        let mut merged: Vec<Line> = Vec::new();
        for line in std::mem::take(&mut self.rules) {
            let place = *lines.entry(line.ports.clone()).or_insert(merged.len());
            match merged.get_mut(place) {
                Some(earlier) => earlier.entries.extend(line.entries),
                None => merged.push(line),
            }
        }
        for line in &mut merged {
            line.entries.sort_by(|a, b| a.origin.cmp(&b.origin));
        }
        self.rules = merged;
    }
}
