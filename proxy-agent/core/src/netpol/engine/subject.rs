//! The pods of this node: the sets that their policies make, and the block that names these.
//!
//! ```text
//!   enforced policies ─────────────▶ sets ─▶ block ──shadow──▶ block ◀─ sets ◀─ enforced and audited ones together
//! ```
//!
//! What is only audited never takes room from what is enforced: where something does not fit, shadows go first.

use std::collections::BTreeSet;
use std::sync::Arc;

use proxy_abi::policy::{BlockEntry, Direction, PodDigest, tier};

use super::super::digest;
use super::super::policy::{Policy, PortName};
use super::super::rules::{self, RuleSet};
use super::super::spec::Pod;
use super::Engine;
use super::sets::SetFault;
use crate::name::ObjectName;

/// First sets by which NetworkPolicies isolate a pod, ingress and egress.
pub type Firsts = [Option<u32>; 2];

/// A pod of this node.
#[derive(Clone, Debug)]
pub struct Subject {
    /// Its slot.
    pub slot: u16,
    /// Its UID.
    pub uid: Arc<str>,
    /// Index of its block.
    pub block: u32,
    /// Its sets.
    pub sets: Firsts,
    /// Why it is locked.
    pub locked: Option<LockCause>,
    /// What would be enforced with the policies that are only audited, where such select it.
    pub shadow: Option<Shadow>,
    /// Why policies that are only audited are not even that.
    pub unaudited: Option<LockCause>,
    pub(super) names: BTreeSet<PortName>,
}

/// What is judged beside a pod's policies, without effect.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shadow {
    /// Index of its block.
    pub block: u32,
    /// Its sets.
    pub sets: Firsts,
}

/// What does not fit.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, thiserror::Error)]
pub enum LockCause {
    /// Too many rules with different ports for one pod.
    #[error("its policies have too many rules with different ports")]
    Rules,
    /// No number left for a set.
    #[error("no room for its rules in {}", proxy_abi::policy::map::SET)]
    Sets,
    /// No number left for a block.
    #[error("no room in {}", proxy_abi::policy::map::BLOCK)]
    Blocks,
    /// No room for what its rules match.
    #[error("no room for what its rules match in the maps of cells, ranges and bits")]
    Entries,
}

/// What a pod must do without.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Without {
    /// Its policies: it is locked.
    pub(super) policies: bool,
    /// Its shadow.
    pub(super) shadow: bool,
}

impl LockCause {
    /// Is a number all that lacks? One may come free.
    pub(super) const fn is_number(self) -> bool {
        matches!(self, Self::Sets | Self::Blocks)
    }
}

impl Subject {
    /// First sets of both its blocks.
    pub(super) fn firsts(&self) -> impl Iterator<Item = u32> + '_ {
        self.sets.into_iter().chain(self.shadow.into_iter().flat_map(|shadow| shadow.sets)).flatten()
    }

    /// Does something of it not fit?
    pub(super) const fn lacks(&self) -> bool {
        self.locked.is_some() || self.unaudited.is_some()
    }
}

impl Engine {
    /// The rules of one pod of this node.
    pub(super) fn derive_subject(&mut self, name: &ObjectName, without: Without) {
        let member = self.world.member(name).filter(|member| self.world.is_local(&member.pod));
        let pod = member.map(|member| Arc::clone(&member.pod));
        if self.subjects.get(name).is_some_and(|subject| pod.as_ref().is_none_or(|pod| pod.uid != subject.uid)) {
            self.remove_subject(name);
        }
        let Some(pod) = pod else { return };
        let policies = self.world.policies(&pod.name.namespace, &pod.labels);
        let enforced: Vec<_> = policies.iter().filter(|policy| !policy.audited).cloned().collect();
        let names = self.facts(&pod, &policies).names();
        let wanted = self.rules(&pod, &enforced);
        let audits = enforced.len() < policies.len();
        let old = self.subjects.remove(name);
        let Some(slot) = old.as_ref().map(|old| old.slot).or_else(|| self.take_slot(&pod.uid)) else {
            self.unslotted.insert(name.clone());
            return;
        };
        let own = if without.policies { Err(LockCause::Entries) } else { self.take_sets(wanted) };
        let mut unaudited = None;
        let mut shadow = None;
        if audits && own.is_ok() {
            let made = if without.shadow {
                Err(LockCause::Entries)
            } else if self.crowded {
                Err(LockCause::Sets)
            } else {
                self.take_shadow(self.audited(&pod, &policies))
            };
            (shadow, unaudited) = (made.ok(), made.err());
        }
        let mut made = own.map(|sets| (sets, self.take_block(sets, shadow)));
        if let (Ok((sets, block @ None)), Some(beside)) = (&mut made, shadow) {
            self.release_shadow(&beside);
            (shadow, unaudited) = (None, Some(LockCause::Blocks));
            *block = self.take_block(*sets, None);
        }
        let (sets, block, locked) = match made {
            Ok((sets, Some(block))) => (sets, block, None),
            Ok((sets, None)) => {
                sets.into_iter().flatten().for_each(|set| self.sets.release(set));
                ([None; 2], BlockEntry::LOCKED_ID, Some(LockCause::Blocks))
            }
            Err(cause) => ([None; 2], BlockEntry::LOCKED_ID, Some(cause)),
        };
        unaudited = unaudited.filter(|_| locked.is_none());
        if old.as_ref().is_none_or(|old| old.block != block) {
            self.work.subjects.insert(name.clone());
        }
        let new = Subject { slot, uid: Arc::clone(&pod.uid), block, sets, locked, shadow, unaudited, names };
        self.subjects.insert(name.clone(), new);
        if let Some(old) = old {
            self.release_subject(&old);
        }
    }

    fn facts<'a>(&'a self, pod: &'a Pod, policies: &'a [Arc<Policy>]) -> rules::Subject<'a> {
        rules::Subject { pod, policies, numbers: self.world.numbers(), merge_above: self.limits.merge_above }
    }

    fn rules(&self, pod: &Pod, policies: &[Arc<Policy>]) -> [Option<RuleSet>; 2] {
        let facts = self.facts(pod, policies);
        [facts.rules(Direction::Ingress), facts.rules(Direction::Egress)]
    }

    /// What both say together, in the directions that audited policies are about: in others the shadow has nothing to add.
    fn audited(&self, pod: &Pod, policies: &[Arc<Policy>]) -> [Option<RuleSet>; 2] {
        let audited = || policies.iter().filter(|policy| policy.audited);
        let [ingress, egress] = self.rules(pod, policies);
        [
            ingress.filter(|_| audited().any(|policy| policy.ingress.is_some())),
            egress.filter(|_| audited().any(|policy| policy.egress.is_some())),
        ]
    }

    fn take_slot(&mut self, uid: &str) -> Option<u16> {
        let found = self.found_slots.remove(&PodDigest { digest: digest::of(&uid) });
        found.or_else(|| self.slots.allocate().and_then(|slot| u16::try_from(slot).ok()))
    }

    /// All of them, or none.
    fn take_sets(&mut self, wanted: [Option<RuleSet>; 2]) -> Result<Firsts, LockCause> {
        let mut sets = [None; 2];
        for (set, rules) in sets.iter_mut().zip(wanted) {
            let Some(rules) = rules else { continue };
            match self.sets.acquire(rules, self.limits.rules_per_set, &mut self.questions) {
                Ok(id) => *set = Some(id),
                Err(fault) => {
                    sets.into_iter().flatten().for_each(|set| self.sets.release(set));
                    return Err(match fault {
                        SetFault::Rules => LockCause::Rules,
                        SetFault::Ids => LockCause::Sets,
                    });
                }
            }
        }
        Ok(sets)
    }

    fn take_shadow(&mut self, wanted: [Option<RuleSet>; 2]) -> Result<Shadow, LockCause> {
        let sets = self.take_sets(wanted)?;
        if let Some(block) = self.take_block(sets, None) {
            return Ok(Shadow { block, sets });
        }
        sets.into_iter().flatten().for_each(|set| self.sets.release(set));
        Err(LockCause::Blocks)
    }

    fn take_block(&mut self, [ingress, egress]: Firsts, shadow: Option<Shadow>) -> Option<u32> {
        if ingress.is_none() && egress.is_none() && shadow.is_none() {
            return Some(BlockEntry::OPEN_ID);
        }
        let mut entry = BlockEntry { shadow: shadow.map_or(0, |shadow| shadow.block), ..BlockEntry::OPEN };
        entry.ingress[tier::NETWORK_POLICY] = ingress.unwrap_or(0);
        entry.egress[tier::NETWORK_POLICY] = egress.unwrap_or(0);
        self.blocks.acquire(entry)
    }

    fn release_shadow(&mut self, shadow: &Shadow) {
        shadow.sets.into_iter().flatten().for_each(|set| self.sets.release(set));
        self.blocks.release(shadow.block);
    }

    fn release_subject(&mut self, subject: &Subject) {
        subject.sets.into_iter().flatten().for_each(|set| self.sets.release(set));
        self.blocks.release(subject.block);
        if let Some(shadow) = &subject.shadow {
            self.release_shadow(shadow);
        }
    }

    fn remove_subject(&mut self, name: &ObjectName) {
        if let Some(subject) = self.subjects.remove(name) {
            self.release_subject(&subject);
            // A slot that the maps know is free when they have forgotten its pod.
            if !self.tables.pods.contains_key(&u32::from(subject.slot)) {
                self.slots.give_back(subject.slot.into());
            }
        }
    }

    /// Somebody lacks a number, and shadows hold some: they go, and none is made until everybody has what is enforced.
    /// The pods to look at again, in that case.
    pub(super) fn crowd(&mut self) -> BTreeSet<ObjectName> {
        let lacks = |subject: &&Subject| subject.locked.is_some_and(LockCause::is_number);
        let crowded = self.subjects.values().any(|subject| lacks(&subject));
        let changed = std::mem::replace(&mut self.crowded, crowded) != crowded;
        let concerned = |subject: &Subject| {
            if crowded {
                subject.shadow.is_some() || lacks(&subject)
            } else {
                subject.unaudited == Some(LockCause::Sets)
            }
        };
        let all = self.subjects.iter().filter(|(_, subject)| changed && concerned(subject));
        all.map(|(name, _)| name.clone()).collect()
    }
}
