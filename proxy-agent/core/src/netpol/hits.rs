//! What was counted in the maps, by the policies and rules as they are written.
//!
//! ```text
//!   policy_hits: set and place ─▶ Counts::rules ─▶ line of the set ─▶ where it was written (several, where rules are equal)
//! ```
//!
//! A rule that several pods of the node have is in several sets: its counts add up. Of several rules of one pod that match a
//! flow the first one counts it. An audited policy is in the sets of shadows alone; an enforced one may be in these too, where
//! it is not counted.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::policy::{Direction, HitsEntry, RuleRef};

use super::engine::Engine;
use super::rules::{Origin, RuleSet};
use crate::name::ObjectName;

/// What the map `policy_hits` holds, by [`RuleRef`].
pub type Counts = BTreeMap<u32, HitsEntry>;

/// What rules of one policy have decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hits {
    /// Judgements of flows.
    pub count: u64,
    /// Since when, in seconds since 1970: of the pod that has the rule for the longest time.
    pub since: u64,
}

/// Everything that was counted, in words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// By rule. What no pod of this node has is not here.
    pub rules: BTreeMap<(Direction, Origin), Hits>,
    /// Flows that a pod's policies refused because no rule of theirs matched, by each of these policies. For an audited
    /// policy: that would be refused.
    pub refused: BTreeMap<(Direction, ObjectName), Hits>,
}

/// Whom a row of `policy_hits` is about, for those who only add up: policies, and whether it allows.
pub type Names = BTreeMap<u32, (bool, Vec<ObjectName>)>;

impl Hits {
    const fn add(&mut self, entry: &HitsEntry) {
        self.count = self.count.saturating_add(entry.count);
        if entry.since < self.since {
            self.since = entry.since;
        }
    }
}

fn add<K: Ord>(to: &mut BTreeMap<K, Hits>, key: K, entry: &HitsEntry) {
    to.entry(key).or_insert(Hits { count: 0, since: u64::MAX }).add(entry);
}

impl Engine {
    /// What was counted, by policies and rules.
    pub fn hits(&self, counts: &Counts) -> Report {
        let mut report = Report::default();
        for (rules, pieces) in self.chains() {
            let counted = self.counted_in(rules);
            for (at, line) in rules.rules.iter().enumerate() {
                let Some(entry) = self.rule_of(pieces, at).and_then(|rule| counts.get(&rule.0)) else { continue };
                let origins: BTreeSet<_> = line.entries.iter().map(|entry| &entry.origin).collect();
                for origin in origins.into_iter().filter(|origin| counted.contains(&&origin.policy)) {
                    add(&mut report.rules, (rules.direction, origin.clone()), entry);
                }
            }
            let nothing = pieces.first().and_then(|first| counts.get(&RuleRef::isolated(*first).0));
            for policy in counted.into_iter().filter(|_| nothing.is_some()) {
                if let Some(entry) = nothing {
                    add(&mut report.refused, (rules.direction, policy.clone()), entry);
                }
            }
        }
        report
    }

    /// Whom the rows of `policy_hits` are about.
    pub fn counted(&self) -> Names {
        let mut names = Names::new();
        for (rules, pieces) in self.chains() {
            let counted = self.counted_in(rules);
            for (at, line) in rules.rules.iter().enumerate() {
                let Some(rule) = self.rule_of(pieces, at) else { continue };
                let policies: BTreeSet<_> = line.entries.iter().map(|entry| &entry.origin.policy).collect();
                let policies = policies.into_iter().filter(|policy| counted.contains(policy)).cloned().collect();
                names.insert(rule.0, (true, policies));
            }
            if let Some(first) = pieces.first() {
                names.insert(RuleRef::isolated(*first).0, (false, counted.into_iter().cloned().collect()));
            }
        }
        names
    }

    /// The policies of a set that are counted there: in a shadow's those that are only audited.
    fn counted_in<'a>(&self, rules: &'a RuleSet) -> BTreeSet<&'a ObjectName> {
        let is_audited = |name: &&ObjectName| self.world().policy(name).is_some_and(|policy| policy.audited);
        let audited: BTreeSet<_> = rules.policies.iter().filter(is_audited).collect();
        if audited.is_empty() { rules.policies.iter().collect() } else { audited }
    }

    /// The number of a rule of a set.
    fn rule_of(&self, pieces: &[u32], at: usize) -> Option<RuleRef> {
        let size = self.rules_per_set();
        Some(RuleRef::rule(*pieces.get(at / size)?, u32::try_from(at % size).ok()?))
    }
}
