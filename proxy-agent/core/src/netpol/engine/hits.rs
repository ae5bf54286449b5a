//! Which rules are counted: a row for each rule of a set, and one for the set in which none matches.
//!
//! Rows are written before the set that they are about, and removed with it. A rule whose set goes because something else
//! about its pod has changed goes on counting where it was: it is known by what it says and where it was written.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::policy::RuleRef;

use super::super::tables::{Op, Start};
use super::sets::Piece;
use super::{Engine, Transition};

/// A rule that is counted, and what it is known by.
pub(super) type Counted = (u32, [u64; 2]);

impl Piece {
    /// What is counted of it, under its number.
    pub(super) fn counted(&self, id: u32) -> impl Iterator<Item = Counted> + '_ {
        let rules = (0_u32..).zip(&self.lines).map(move |(bit, digest)| (RuleRef::rule(id, bit).0, *digest));
        rules.chain(self.nothing.map(|digest| (RuleRef::isolated(id).0, digest)))
    }
}

impl Engine {
    /// Rows of new sets, as far as there is room. Returns the rows that are to go.
    pub(super) fn emit_hits(&self, out: &mut Transition) -> Vec<u32> {
        let held = &self.tables.hits;
        let mut going: BTreeMap<[u64; 2], u32> = BTreeMap::new();
        for (rule, digest) in self.sets.retired().filter(|(rule, _)| held.contains(rule)) {
            going.entry(*digest).or_insert(*rule);
        }
        let mut room = (self.limits.hits as usize).saturating_sub(held.len());
        let mut wanted = BTreeSet::new();
        for (id, piece) in self.sets.pieces() {
            let new = self.tables.sets.get(id) != Some(&piece.entry);
            if !new && !self.full {
                continue;
            }
            for (rule, digest) in piece.counted(*id) {
                wanted.insert(rule);
                let counts = held.contains(&rule);
                if (counts && !new) || (!counts && room == 0) {
                    continue;
                }
                room -= usize::from(!counts);
                let start = going.remove(&digest).filter(|other| *other != rule).map_or(Start::Zero, Start::Of);
                out.prepare.push(Op::Hits(rule, Some(start)));
            }
        }
        if self.full {
            return held.iter().copied().filter(|rule| !wanted.contains(rule)).collect();
        }
        let gone = self.tables.sets.keys().filter(|id| !self.sets.pieces().contains_key(id));
        gone.flat_map(|id| {
            let rules = RuleRef::rule(*id, 0).0..=RuleRef::rule(*id, 255).0;
            held.range(rules).copied().chain(held.get(&RuleRef::isolated(*id).0).copied())
        })
        .collect()
    }
}
