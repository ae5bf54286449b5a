//! Rule sets in use, each once, cut into pieces of at most 256 rules.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use proxy_abi::policy::{Bits, MAX_CHAIN, SetEntry};

use super::super::digest;
use super::super::partition::{Cell, Kind};
use super::super::predicate::{Element, Question, Questions};
use super::super::rules::RuleSet;
use super::hits::Counted;
use crate::ids::IdPool;

/// Why there is no set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum SetFault {
    /// More rules than a chain of pieces holds.
    Rules,
    /// No number left.
    Ids,
}

/// A piece of a set: one entry of `policy_set`.
#[derive(Clone, Debug)]
pub(super) struct Piece {
    /// The entry.
    pub(super) entry: SetEntry,
    /// Question → rules that match who answers yes.
    pub(super) answers: BTreeMap<Element, Bits>,
    /// What each of its rules is known by: what it says, and where it was written.
    pub(super) lines: Vec<[u64; 2]>,
    /// The same of no rule, in the first piece: by the policies that isolate.
    pub(super) nothing: Option<[u64; 2]>,
}

impl Piece {
    /// The rules that match without asking.
    pub(super) const fn any(&self, kind: Kind) -> Bits {
        match kind {
            Kind::Address => self.entry.any_address,
            Kind::Pod => self.entry.any_pod,
            Kind::Port(_) => self.entry.any_port,
        }
    }

    /// The rules that match a cell.
    pub(super) fn bits(&self, cell: &Cell) -> Bits {
        let asked = cell.vector.iter().filter_map(|element| self.answers.get(element));
        asked.fold(self.any(cell.kind), |bits, more| bits.or(*more))
    }
}

#[derive(Clone, Debug)]
struct Chain {
    rules: Arc<RuleSet>,
    pieces: Vec<u32>,
    users: u32,
}

/// All sets. A set is known by its first piece.
#[derive(Clone, Debug)]
pub(super) struct Sets {
    by_content: BTreeMap<Arc<RuleSet>, u32>,
    chains: BTreeMap<u32, Chain>,
    pieces: BTreeMap<u32, Piece>,
    unused: BTreeSet<u32>,
    pool: IdPool,
    found: BTreeMap<[u64; 2], u32>,
    /// What was counted of pieces that are swept, as long as the maps hold them.
    retired: BTreeMap<u32, Vec<Counted>>,
}

impl Sets {
    pub(super) fn new(capacity: u32) -> Self {
        Self {
            by_content: BTreeMap::new(),
            chains: BTreeMap::new(),
            pieces: BTreeMap::new(),
            unused: BTreeSet::new(),
            // A rule's reference has 23 bits for the set.
            pool: IdPool::new(capacity.min(1 << 23)),
            found: BTreeMap::new(),
            retired: BTreeMap::new(),
        }
    }

    /// Takes note of a set that the maps hold.
    pub(super) fn find(&mut self, id: u32, digest: [u64; 2]) {
        if !self.pieces.contains_key(&id) && self.pool.reserve(id) {
            self.found.insert(digest, id);
        }
    }

    /// Uses the set with these rules once more.
    pub(super) fn acquire(&mut self, rules: RuleSet, size: usize, questions: &mut Questions) -> Result<u32, SetFault> {
        if let Some(first) = self.by_content.get(&rules).copied() {
            if let Some(chain) = self.chains.get_mut(&first) {
                chain.users += 1;
                self.unused.remove(&first);
            }
            return Ok(first);
        }
        let size = size.clamp(1, Bits::COUNT);
        let count = rules.rules.len().div_ceil(size).max(1);
        if count > MAX_CHAIN as usize {
            return Err(SetFault::Rules);
        }
        let digests: Vec<_> = (0..count).map(|piece| digest::of(&(&rules, piece, size))).collect();
        let mut ids = Vec::new();
        for digest in &digests {
            let Some(id) = self.found.remove(digest).or_else(|| self.pool.allocate()) else {
                for id in ids {
                    self.pool.give_back(id);
                }
                return Err(SetFault::Ids);
            };
            ids.push(id);
        }
        for (index, id) in ids.iter().copied().enumerate() {
            let nothing = (index == 0).then(|| digest::of(&(rules.direction, &rules.policies)));
            let mut piece = Piece { entry: SetEntry::EMPTY, answers: BTreeMap::new(), lines: Vec::new(), nothing };
            piece.entry.digest = digests.get(index).copied().unwrap_or_default();
            piece.entry.next = ids.get(index + 1).copied().unwrap_or(0);
            for (bit, line) in rules.rules.iter().skip(index * size).take(size).enumerate() {
                piece.entry.accept.set(bit);
                piece.lines.push(digest::of(&(rules.direction, line)));
                let mut answer = |element| piece.answers.entry(element).or_insert(Bits::ZERO).set(bit);
                match &line.ports {
                    None => piece.entry.any_port.set(bit),
                    Some(ranges) => {
                        for range in ranges {
                            answer(questions.ask(&Question::Ports(*range), id));
                        }
                    }
                }
                for peers in line.entries.iter().map(|entry| &entry.peers) {
                    for predicate in &peers.predicates {
                        answer(questions.ask(&Question::Peer(predicate.clone()), id));
                    }
                    if peers.any_address {
                        piece.entry.any_address.set(bit);
                    }
                    if peers.any_address || peers.any_pod {
                        piece.entry.any_pod.set(bit);
                    }
                }
            }
            self.pieces.insert(id, piece);
        }
        let first = ids.first().copied().unwrap_or(0);
        let rules = Arc::new(rules);
        self.by_content.insert(Arc::clone(&rules), first);
        self.chains.insert(first, Chain { rules, pieces: ids, users: 1 });
        Ok(first)
    }

    /// Uses a set once less.
    pub(super) fn release(&mut self, first: u32) {
        if let Some(chain) = self.chains.get_mut(&first) {
            chain.users = chain.users.saturating_sub(1);
            if chain.users == 0 {
                self.unused.insert(first);
            }
        }
    }

    /// Forgets the sets that nobody uses. Numbers that the maps know stay taken until [`Sets::free`].
    pub(super) fn sweep(&mut self, questions: &mut Questions, known: impl Fn(u32) -> bool) {
        for first in std::mem::take(&mut self.unused) {
            let Some(chain) = self.chains.remove(&first) else { continue };
            self.by_content.remove(&chain.rules);
            for id in chain.pieces {
                let Some(piece) = self.pieces.remove(&id) else { continue };
                piece.answers.keys().for_each(|element| questions.forget(*element, id));
                if known(id) {
                    self.retired.insert(id, piece.counted(id).collect());
                } else {
                    self.pool.give_back(id);
                }
            }
        }
    }

    /// What was counted of pieces that are swept and not yet freed.
    pub(super) fn retired(&self) -> impl Iterator<Item = &Counted> {
        self.retired.values().flatten()
    }

    /// Gives a swept number back: it rests from now on.
    pub(super) fn free(&mut self, id: u32, now: u64) {
        self.retired.remove(&id);
        self.pool.quarantine(id, now);
    }

    /// Frees the numbers that have rested for the grace. True when there was one.
    pub(super) fn release_numbers(&mut self, now: u64, grace: u64) -> bool {
        self.pool.release(now, grace)
    }

    /// When that will next find something.
    pub(super) fn next_release(&self, grace: u64) -> Option<u64> {
        self.pool.next_release(grace)
    }

    /// Forgets what was found in the maps and not used since.
    pub(super) fn forget_found(&mut self) {
        self.found.clear();
    }

    /// All pieces.
    pub(super) const fn pieces(&self) -> &BTreeMap<u32, Piece> {
        &self.pieces
    }

    /// The rules of all sets.
    pub(super) fn rules(&self) -> impl Iterator<Item = &RuleSet> {
        self.chains.values().map(|chain| &*chain.rules)
    }

    /// All sets, with their pieces.
    pub(super) fn chains(&self) -> impl Iterator<Item = (&RuleSet, &[u32])> {
        self.chains.values().map(|chain| (&*chain.rules, chain.pieces.as_slice()))
    }

    /// The pieces of a set.
    pub(super) fn chain(&self, first: u32) -> &[u32] {
        self.chains.get(&first).map_or(&[], |chain| &chain.pieces)
    }

    /// The rules of a set, and its pieces, by any of its pieces.
    pub(super) fn of_piece(&self, id: u32) -> Option<(&RuleSet, usize)> {
        self.chains.values().find_map(|chain| {
            let place = chain.pieces.iter().position(|piece| *piece == id)?;
            Some((&*chain.rules, place))
        })
    }
}
