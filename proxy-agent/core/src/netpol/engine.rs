//! Keeps the policy maps equal to what the objects mean: one change in, one transition of the maps out.
//!
//! ```text
//!   apply(change)   world ─▶ what was touched
//!   commit()        pods of this node ─▶ sets ─▶ questions ─▶ pods, ranges, ports ─▶ cells ─▶ transition
//! ```
//!
//! Everything after the world is derived from it; what a commit derives depends on the objects alone, numbers aside.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use ipnet::IpNet;
use proxy_abi::policy::{Bits, BlockEntry, PodDigest, capacity, cell};
use proxy_abi::{DeviceEntry, Proto};

use self::blocks::Blocks;
use self::sets::Sets;
use self::subject::Without;
pub use self::subject::{Firsts, LockCause, Shadow, Subject};
use super::partition::{Cell, Partition};
use super::predicate::{Question, Questions};
use super::rules::RuleSet;
use super::spec::Change;
use super::tables::{Op, PolicyTables};
use super::world::{Touched, World};
use crate::diagnostic::{Diagnostic, Severity};
use crate::ids::IdPool;
use crate::name::ObjectName;

mod blocks;
mod derive;
mod emit;
mod hits;
mod sets;
mod subject;

/// Room in the maps, in entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Pods of this node.
    pub slots: u32,
    /// Blocks.
    pub blocks: u32,
    /// Sets.
    pub sets: u32,
    /// Addresses of pods.
    pub ips: u32,
    /// Address ranges.
    pub prefixes: u32,
    /// Cells.
    pub cells: u32,
    /// Rules by set and cell.
    pub bits: u32,
    /// Rules that are counted; those beyond are not.
    pub hits: u32,
    /// More rules than this for one pod and direction are merged by their ports.
    pub merge_above: usize,
    /// Rules of one set, at most 256; a pod has at most [`proxy_abi::policy::MAX_CHAIN`] times as many in a direction.
    pub rules_per_set: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            slots: capacity::SLOT,
            blocks: capacity::BLOCK,
            sets: capacity::SET,
            ips: capacity::IP,
            prefixes: capacity::PREFIX,
            cells: capacity::CELL,
            bits: capacity::BITS,
            hits: capacity::HITS,
            merge_above: 256,
            rules_per_set: 256,
        }
    }
}

/// Operations that lead from one policy to the next, in this order. An operation that fails is tried again before the
/// next one; until the switch the old policy holds, and after it the new one.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Transition {
    /// Writes what nothing reaches yet.
    pub prepare: Vec<Op>,
    /// Makes it count, in one store.
    pub switch: Option<Op>,
    /// Brings the other side in line and removes what nothing reaches any more.
    pub settle: Vec<Op>,
}

impl Transition {
    /// All operations in their order.
    pub fn ops(&self) -> impl Iterator<Item = &Op> {
        self.prepare.iter().chain(&self.switch).chain(&self.settle)
    }

    /// Nothing to do?
    pub fn is_empty(&self) -> bool {
        self.ops().next().is_none()
    }
}

/// The compiler with its state.
#[derive(Clone, Debug)]
pub struct Engine {
    limits: Limits,
    world: World,
    touched: Touched,
    questions: Questions,
    partition: Partition,
    sets: Sets,
    blocks: Blocks,
    subjects: BTreeMap<ObjectName, Subject>,
    slots: IdPool,
    /// Slots found in the maps and not used since, by the digest of the pod.
    found_slots: BTreeMap<PodDigest, u16>,
    /// Pods of this node for which there is no slot.
    unslotted: BTreeSet<ObjectName>,
    /// Address → its cell.
    ips: BTreeMap<IpAddr, u32>,
    /// Addresses whose cell has no room: they count as pods that no rule names.
    unplaced: BTreeMap<IpAddr, u32>,
    /// Range → how many blocks change there, its cell.
    ranges: BTreeMap<IpNet, (u32, u32)>,
    /// First port → cell, up to the next.
    ports: BTreeMap<Proto, BTreeMap<u16, u32>>,
    /// What the maps hold when the transitions so far are done.
    tables: PolicyTables,
    /// Cell → sets that have bits for it in the maps.
    bits_of: BTreeMap<u32, BTreeSet<u32>>,
    /// Compare everything, not only what was touched.
    full: bool,
    /// Something did not fit, and the last transition made room.
    retry: bool,
    /// Who did without something after the last transition, and why.
    lacking: BTreeMap<ObjectName, (Option<LockCause>, Option<LockCause>)>,
    /// Somebody lacks a number: no shadow takes any.
    crowded: bool,
    work: Work,
}

/// What a commit has derived anew.
#[derive(Clone, Debug, Default)]
struct Work {
    ips: BTreeSet<IpAddr>,
    ranges: bool,
    ports: bool,
    /// Pods whose sets are others than before.
    subjects: BTreeSet<ObjectName>,
    /// Cells that the maps still hold and that nothing is in any more.
    gone: BTreeMap<u32, Cell>,
}

impl Engine {
    /// For a node and its maps. Nothing is written before the first [`Engine::commit`], which should come after every
    /// source has been listed.
    pub fn new(node: impl Into<Arc<str>>, limits: Limits, actual: PolicyTables) -> Self {
        let mut engine = Self {
            world: World::new(node),
            touched: Touched::default(),
            questions: Questions::default(),
            partition: Partition::new(limits.cells),
            sets: Sets::new(limits.sets),
            blocks: Blocks::new(limits.blocks),
            subjects: BTreeMap::new(),
            slots: IdPool::new(limits.slots.min(DeviceEntry::HELD.into())),
            found_slots: BTreeMap::new(),
            unslotted: BTreeSet::new(),
            ips: BTreeMap::new(),
            unplaced: BTreeMap::new(),
            ranges: BTreeMap::new(),
            ports: BTreeMap::new(),
            tables: PolicyTables::default(),
            bits_of: BTreeMap::new(),
            full: true,
            retry: false,
            lacking: BTreeMap::new(),
            crowded: false,
            work: Work::default(),
            limits,
        };
        engine.adopt(actual);
        engine
    }

    /// The maps hold this: after the start, after a write that failed for good, or when somebody else may have written.
    /// The next commit compares everything.
    pub fn adopt(&mut self, actual: PolicyTables) {
        // What rests may be in the maps nevertheless; then it is found there.
        self.release(u64::MAX, 0);
        for (number, entry) in &actual.cells {
            self.partition.find(*number, entry.digest);
        }
        for (id, entry) in &actual.sets {
            self.sets.find(*id, entry.digest);
        }
        for (id, entry) in &actual.blocks {
            self.blocks.find(*id, *entry);
        }
        for (slot, pod) in &actual.pods {
            if let Ok(number) = u16::try_from(*slot)
                && !self.subjects.values().any(|subject| subject.slot == number)
                && self.slots.reserve(*slot)
            {
                self.found_slots.insert(*pod, number);
            }
        }
        self.bits_of.clear();
        for key in actual.bits.keys() {
            self.bits_of.entry(key.cell).or_default().insert(key.set);
        }
        self.tables = actual;
        self.full = true;
    }

    /// Takes a change of the cluster.
    pub fn apply(&mut self, change: Change) {
        self.world.apply(change, &mut self.touched);
    }

    /// Is there something for [`Engine::commit`] to do?
    pub fn is_dirty(&self) -> bool {
        self.full || self.retry || !self.touched.is_empty()
    }

    /// What leads from the maps as they are to what all changes so far mean. The caller does it all; when it cannot,
    /// it calls [`Engine::adopt`].
    pub fn commit(&mut self) -> Transition {
        self.commit_at(0, 0)
    }

    /// The same, at a time: numbers that the maps forget are used again only after the grace. `now` never goes back.
    pub fn commit_at(&mut self, now: u64, grace: u64) -> Transition {
        if self.release(now, grace) && self.wants_number() {
            self.retry = true;
        }
        if !self.is_dirty() {
            return Transition::default();
        }
        self.work = Work::default();
        self.retry = false;
        let touched = std::mem::take(&mut self.touched);
        let mut subjects = touched.subjects;
        for (name, subject) in &self.subjects {
            if subject.lacks() || !touched.names.is_disjoint(&subject.names) {
                subjects.insert(name.clone());
            }
        }
        subjects.extend(std::mem::take(&mut self.unslotted));
        self.work.ips.extend(touched.ips);
        self.work.ips.extend(std::mem::take(&mut self.unplaced).into_keys());
        let mut members = touched.members;
        let mut without: BTreeMap<ObjectName, Without> = BTreeMap::new();
        loop {
            while !subjects.is_empty() {
                for name in std::mem::take(&mut subjects) {
                    self.derive_subject(&name, without.get(&name).copied().unwrap_or_default());
                }
                self.sets.sweep(&mut self.questions, |id| self.tables.sets.contains_key(&id));
                self.blocks.sweep(|id| self.tables.blocks.contains_key(&id));
                subjects = self.crowd();
            }
            self.derive_questions(std::mem::take(&mut members));
            self.derive_ips();
            if self.work.ports {
                self.derive_ports();
            }
            for (number, cell) in self.partition.sweep() {
                if self.tables.cells.contains_key(&number) {
                    self.work.gone.insert(number, cell);
                } else {
                    self.partition.free(number);
                }
            }
            let transition = self.emit();
            match self.overflow(&transition) {
                None => {
                    self.install(&transition, now);
                    return transition;
                }
                Some(Overflow::Subject(name)) => {
                    without.entry(name.clone()).or_default().policies = true;
                    subjects.insert(name);
                }
                Some(Overflow::Shadow(name)) => {
                    without.entry(name.clone()).or_default().shadow = true;
                    subjects.insert(name);
                }
                Some(Overflow::Ips(ips)) => {
                    self.work.ips.extend(ips.iter().map(|(ip, _)| *ip));
                    self.unplaced.extend(ips);
                }
            }
        }
    }

    /// Frees the numbers that have rested for the grace. True when one of a slot, set or block was among them.
    fn release(&mut self, now: u64, grace: u64) -> bool {
        self.partition.release_numbers(now, grace);
        let freed = [
            self.slots.release(now, grace),
            self.sets.release_numbers(now, grace),
            self.blocks.release_numbers(now, grace),
        ];
        freed.contains(&true)
    }

    /// Is there somebody who does without a number?
    fn wants_number(&self) -> bool {
        let wants = |subject: &Subject| subject.locked.or(subject.unaudited).is_some_and(LockCause::is_number);
        !self.unslotted.is_empty() || self.subjects.values().any(wants)
    }

    /// When a commit may give numbers to those who do without one; `None` = nobody does, or none rests.
    pub fn next_release(&self, grace: u64) -> Option<u64> {
        let numbers = [self.slots.next_release(grace), self.sets.next_release(grace), self.blocks.next_release(grace)];
        if self.wants_number() { numbers.into_iter().flatten().min() } else { None }
    }

    /// Who must do without, so that the transition fits into the maps.
    fn overflow(&self, transition: &Transition) -> Option<Overflow> {
        let (mut ips, mut prefixes, mut cells, mut bits) = (Vec::new(), 0, 0, 0);
        for op in &transition.prepare {
            match op {
                Op::Ip(ip, Some(_)) if !self.tables.ips.contains_key(ip) => ips.push(IpAddr::from(*ip)),
                Op::Prefix(key, Some(_)) if !self.tables.prefixes.contains_key(key) => prefixes += 1,
                Op::Cell(number, Some(_)) if !self.tables.cells.contains_key(number) => cells += 1,
                Op::Bits(key, Some(_)) if !self.tables.bits.contains_key(key) => bits += 1,
                _ => {}
            }
        }
        let room = |limit: u32, held: usize| (limit as usize).saturating_sub(held);
        let room_for_ips = room(self.limits.ips, self.tables.ips.len());
        if ips.len() > room_for_ips {
            let surplus = ips.into_iter().skip(room_for_ips).map(|ip| (ip, cell::NONE));
            return Some(Overflow::Ips(surplus.collect()));
        }
        let fits = prefixes <= room(self.limits.prefixes, self.tables.prefixes.len())
            && cells <= room(self.limits.cells, self.tables.cells.len())
            && bits <= room(self.limits.bits, self.tables.bits.len());
        if fits {
            return None;
        }
        let size = |subject: &Subject| {
            let pieces = subject.firsts().flat_map(|first| self.sets.chain(first));
            pieces.filter_map(|id| self.sets.pieces().get(id)).map(|piece| piece.answers.len()).sum::<usize>()
        };
        let changed = self.work.subjects.iter().filter_map(|name| Some((name, self.subjects.get(name)?)));
        // What is only audited gives way first: of those that are new, or of all.
        let audited = |(_, subject): &(&ObjectName, &Subject)| subject.shadow.is_some();
        let shadows = changed.clone().filter(audited).max_by_key(|(_, subject)| size(subject));
        let shadows = shadows.or_else(|| self.subjects.iter().filter(audited).max_by_key(|(_, subject)| size(subject)));
        if let Some((name, _)) = shadows {
            return Some(Overflow::Shadow(name.clone()));
        }
        let open = changed.filter(|(_, subject)| subject.locked.is_none() && subject.block != BlockEntry::OPEN_ID);
        if let Some((name, _)) = open.max_by_key(|(_, subject)| size(subject)) {
            return Some(Overflow::Subject(name.clone()));
        }
        let born = |ip: &IpAddr| {
            self.ips.get(ip).is_some_and(|cell| !self.tables.cells.contains_key(cell) && *cell != cell::ANY_POD)
        };
        let ips: Vec<_> = self.work.ips.iter().filter(|ip| born(ip)).map(|ip| (*ip, cell::ANY_POD)).collect();
        if !ips.is_empty() {
            return Some(Overflow::Ips(ips));
        }
        // What is left comes from rules that have not changed, and of which fewer may stay for now.
        let open = self.subjects.iter().filter(|(_, s)| s.locked.is_none() && s.block != BlockEntry::OPEN_ID);
        open.max_by_key(|(_, subject)| size(subject)).map(|(name, _)| Overflow::Subject(name.clone()))
    }

    /// What the maps hold when all transitions so far are done.
    pub const fn tables(&self) -> &PolicyTables {
        &self.tables
    }

    /// Pods of this node, with their slots.
    pub const fn subjects(&self) -> &BTreeMap<ObjectName, Subject> {
        &self.subjects
    }

    /// The rules that an entry of `policy_set` is a piece of, and which piece.
    pub(super) fn rules_of_piece(&self, id: u32) -> Option<(&RuleSet, usize)> {
        self.sets.of_piece(id)
    }

    /// The rules that pods of this node have, each set once.
    pub(super) fn rule_sets(&self) -> impl Iterator<Item = &RuleSet> {
        self.sets.rules()
    }

    /// The same, with the entries of `policy_set` that each is cut into.
    pub(super) fn chains(&self) -> impl Iterator<Item = (&RuleSet, &[u32])> {
        self.sets.chains()
    }

    /// The cells that answer yes to a question.
    pub(super) fn cells(&self, question: &Question) -> impl Iterator<Item = u32> + '_ {
        self.questions.element(question).into_iter().flat_map(|element| self.partition.of_element(element))
    }

    pub(super) fn rules_per_set(&self) -> usize {
        self.limits.rules_per_set.clamp(1, Bits::COUNT)
    }

    /// The objects.
    pub const fn world(&self) -> &World {
        &self.world
    }

    /// What is wrong, and with which object.
    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        let mut all: Vec<_> = self.world.findings().cloned().collect();
        let locked = |name: &ObjectName, problem: String| Diagnostic {
            severity: Severity::Error,
            object: format!("Pod {name}"),
            field: String::new(),
            problem,
            fix: "nothing but its own node reaches it, and it reaches nothing, until there is room".to_owned(),
        };
        for (name, subject) in &self.subjects {
            all.extend(subject.locked.map(|cause| locked(name, cause.to_string())));
            all.extend(subject.unaudited.map(|cause| Diagnostic {
                severity: Severity::Warning,
                object: format!("Pod {name}"),
                field: String::new(),
                problem: format!("its audited policies are not judged: {cause}"),
                fix: "what they would refuse is not counted until there is room".to_owned(),
            }));
        }
        all.extend(self.unslotted.iter().map(|name| locked(name, "no slot left for it".to_owned())));
        for ip in self.unplaced.keys() {
            let name = self.world.owner(*ip).map(|member| &member.pod.name);
            all.extend(name.map(|name| Diagnostic {
                severity: Severity::Warning,
                object: format!("Pod {name}"),
                field: format!("status.podIPs {ip}"),
                problem: "no room for it in the maps".to_owned(),
                fix: "rules that name pods do not match it until there is room".to_owned(),
            }));
        }
        all
    }
}

/// What does not fit.
enum Overflow {
    /// The rules of this pod: it is locked.
    Subject(ObjectName),
    /// The policies of this pod that are only audited.
    Shadow(ObjectName),
    /// These addresses: they get a cell of which there is always one, or none.
    Ips(Vec<(IpAddr, u32)>),
}
