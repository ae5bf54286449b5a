//! The difference between what is derived and what the maps hold, as a transition.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_abi::IpBytes;
use proxy_abi::policy::{
    Bits, BitsKey, CellEntry, CellWord, PAGES, PORT_PROTOCOLS, PodDigest, PortPage, SlotWord, cell,
};

use super::super::digest;
use super::super::partition::Kind;
use super::super::predicate::Element;
use super::super::tables::{Op, PolicyTables, prefix_key, prefix_net};
use super::sets::Piece;
use super::{Engine, Transition};

/// Keys of `held` that `wanted` has not.
fn gone<'a, K: Ord + Copy, V>(
    held: &'a BTreeMap<K, V>,
    wanted: impl Fn(&K) -> bool + 'a,
) -> impl Iterator<Item = K> + 'a {
    held.keys().copied().filter(move |key| !wanted(key))
}

/// Entries of the maps that may be too small.
fn room_taken(tables: &PolicyTables) -> [usize; 5] {
    [tables.sets.len(), tables.cells.len(), tables.bits.len(), tables.prefixes.len(), tables.ips.len()]
}

/// A word in which one side has this cell and the other keeps what it has.
const fn half(side: u32, cell: u32, other: u32) -> CellWord {
    CellWord { cell: if side & 1 == 0 { [cell, other] } else { [other, cell] } }
}

impl Engine {
    /// The side that does not count yet.
    const fn next_side(&self) -> u32 {
        (self.tables.epoch & 1) ^ 1
    }

    /// What leads from the maps to what is derived.
    pub(super) fn emit(&self) -> Transition {
        let mut out = Transition::default();
        for (number, state) in self.partition.iter() {
            let entry = CellEntry { digest: state.digest };
            if self.tables.cells.get(&number) != Some(&entry) {
                out.prepare.push(Op::Cell(number, Some(entry)));
            }
        }
        let uncounted = self.emit_hits(&mut out);
        for (id, piece) in self.sets.pieces() {
            if self.tables.sets.get(id) != Some(&piece.entry) {
                out.prepare.push(Op::Set(*id, Some(Box::new(piece.entry))));
            }
        }
        let stale = self.emit_bits(&mut out);
        // A block comes before the one whose shadow it is, and goes after it.
        let mut blocks: Vec<_> = self.blocks.iter().collect();
        blocks.sort_by_key(|(_, entry)| entry.shadow != 0);
        for (id, entry) in blocks {
            if self.tables.blocks.get(&id) != Some(&entry) {
                out.prepare.push(Op::Block(id, Some(entry)));
            }
        }
        for subject in self.subjects.values() {
            let (slot, pod) = (u32::from(subject.slot), PodDigest { digest: digest::of(&subject.uid) });
            if self.tables.pods.get(&slot) != Some(&pod) {
                out.prepare.push(Op::Pod(slot, Some(pod)));
            }
        }
        let written = out.prepare.len();
        let affected = self.emit_ips(&mut out);
        if self.full || self.work.ranges {
            self.emit_ranges(&mut out);
        }
        if self.full || self.work.ports {
            self.emit_pages(&mut out);
        }
        let epoch = match self.tables.epoch.wrapping_add(1) {
            0 => 2,
            epoch => epoch,
        };
        self.emit_slots(&mut out, &affected, epoch);
        // So far only words are settled. Those of the side to come may have been written by a transition that was cut.
        if out.prepare.len() > written || !out.settle.is_empty() {
            out.switch = Some(Op::Epoch(epoch));
        }
        let mut blocks: Vec<_> = gone(&self.tables.blocks, |id| self.blocks.contains(*id)).collect();
        blocks.sort_by_key(|id| self.tables.blocks.get(id).is_some_and(|entry| entry.shadow == 0));
        out.settle.extend(blocks.into_iter().map(|id| Op::Block(id, None)));
        out.settle.extend(uncounted.into_iter().map(|rule| Op::Hits(rule, None)));
        out.settle.extend(stale.into_iter().map(|key| Op::Bits(key, None)));
        out.settle
            .extend(gone(&self.tables.sets, |id| self.sets.pieces().contains_key(id)).map(|id| Op::Set(id, None)));
        out.settle
            .extend(gone(&self.tables.cells, |id| self.partition.get(*id).is_some()).map(|id| Op::Cell(id, None)));
        let slots: BTreeSet<u32> = self.subjects.values().map(|subject| subject.slot.into()).collect();
        out.settle.extend(gone(&self.tables.pods, |slot| slots.contains(slot)).map(|slot| Op::Pod(slot, None)));
        out
    }

    /// Bits of new sets and new cells. Returns the keys that are to go.
    fn emit_bits(&self, out: &mut Transition) -> BTreeSet<BitsKey> {
        let mut keys = BTreeSet::new();
        let mut stale = BTreeSet::new();
        for (set, piece) in self.sets.pieces() {
            if self.full || !self.tables.sets.contains_key(set) {
                let cells = piece.answers.keys().flat_map(|element| self.partition.of_element(*element));
                keys.extend(cells.map(|cell| BitsKey { set: *set, cell }));
            }
        }
        for (number, state) in self.partition.iter() {
            if !self.tables.cells.contains_key(&number) {
                let sets = state.vector.iter().flat_map(|element| self.questions.sets(*element));
                keys.extend(sets.map(|set| BitsKey { set, cell: number }));
            }
        }
        for key in &keys {
            let (Some(piece), Some(state)) = (self.sets.pieces().get(&key.set), self.partition.get(key.cell)) else {
                continue;
            };
            let bits = piece.bits(state);
            let wanted = (bits != piece.any(state.kind)).then_some(bits);
            if self.tables.bits.get(key) == wanted.as_ref() {
                continue;
            }
            match wanted {
                Some(bits) => out.prepare.push(Op::Bits(*key, Some(bits))),
                None => drop(stale.insert(*key)),
            }
        }
        if self.full {
            stale.extend(self.tables.bits.keys().filter(|key| !keys.contains(key)));
            return stale;
        }
        for set in gone(&self.tables.sets, |id| self.sets.pieces().contains_key(id)) {
            let all = BitsKey { set, cell: 0 }..=BitsKey { set, cell: u32::MAX };
            stale.extend(self.tables.bits.range(all).map(|(key, _)| *key));
        }
        for cell in gone(&self.tables.cells, |id| self.partition.get(*id).is_some()) {
            let sets = self.bits_of.get(&cell).into_iter().flatten();
            stale.extend(sets.map(|set| BitsKey { set: *set, cell }));
        }
        stale
    }

    /// Addresses of pods. Returns the sets that tell the old cell of one from its new one.
    fn emit_ips(&self, out: &mut Transition) -> BTreeSet<u32> {
        let (next, now) = (self.next_side(), self.tables.epoch & 1);
        let all: BTreeSet<IpAddr>;
        let ips = if self.full {
            let held = self.tables.ips.keys().map(|ip| IpAddr::from(*ip));
            all = self.ips.keys().copied().chain(held).collect();
            &all
        } else {
            &self.work.ips
        };
        let mut moves = BTreeSet::new();
        for ip in ips {
            let key = IpBytes::from(*ip);
            let held = self.tables.ips.get(&key).copied();
            let wanted = self.ips.get(ip).copied().unwrap_or(cell::NONE);
            let word = held.unwrap_or(CellWord { cell: [cell::NONE; 2] });
            if word.side(next) != wanted {
                out.prepare.push(Op::Ip(key, Some(half(next, wanted, word.side(now)))));
            }
            if word.side(now) != wanted || (wanted == cell::NONE && held.is_some()) {
                let settled = (wanted != cell::NONE).then_some(CellWord { cell: [wanted; 2] });
                out.settle.push(Op::Ip(key, settled));
                let new = if wanted == cell::NONE { self.range_cell(*ip) } else { wanted };
                moves.insert((self.tables.cell(*ip, now), new));
            }
        }
        let mut affected = BTreeSet::new();
        for (old, new) in moves.into_iter().filter(|(old, new)| old != new) {
            for set in self.told_apart(old, new) {
                let Some(piece) = self.sets.pieces().get(&set).filter(|_| self.tables.sets.contains_key(&set)) else {
                    continue;
                };
                if self.bits(set, piece, old) != self.bits(set, piece, new) {
                    affected.insert(set);
                }
            }
        }
        affected
    }

    /// The questions to which a cell answers yes; `None` when it is a number of the maps that nobody knows.
    fn vector(&self, number: u32) -> Option<&[Element]> {
        if number == cell::NONE || number == cell::ANY_POD {
            return Some(&[]);
        }
        let known = self.partition.get(number).or_else(|| self.work.gone.get(&number));
        known.map(|state| &*state.vector)
    }

    /// Rules of a set that match a cell of addresses.
    fn bits(&self, set: u32, piece: &Piece, number: u32) -> Bits {
        let any = piece.any(Kind::of(number));
        match self.vector(number) {
            Some(vector) => {
                vector.iter().filter_map(|element| piece.answers.get(element)).fold(any, |bits, more| bits.or(*more))
            }
            None => self.tables.bits.get(&BitsKey { set, cell: number }).copied().unwrap_or(any),
        }
    }

    /// Sets that may tell two cells apart.
    fn told_apart(&self, old: u32, new: u32) -> BTreeSet<u32> {
        let (Some(a), Some(b)) = (self.vector(old), self.vector(new)) else {
            return self.sets.pieces().keys().copied().collect();
        };
        let differing = a.iter().filter(|e| !b.contains(e)).chain(b.iter().filter(|e| !a.contains(e)));
        let mut sets: BTreeSet<u32> = differing.flat_map(|element| self.questions.sets(*element)).collect();
        if Kind::of(old) != Kind::of(new) {
            let pieces = self.sets.pieces().iter();
            sets.extend(pieces.filter(|(_, p)| p.entry.any_pod != p.entry.any_address).map(|(set, _)| *set));
        }
        sets
    }

    /// The cell of the longest range that is to hold an address.
    fn range_cell(&self, ip: IpAddr) -> u32 {
        let nets = std::iter::successors(Some(IpNet::from(ip)), IpNet::supernet);
        nets.into_iter().find_map(|net| self.ranges.get(&net)).map_or(cell::NONE, |(_, cell)| *cell)
    }

    fn emit_ranges(&self, out: &mut Transition) {
        let (next, now) = (self.next_side(), self.tables.epoch & 1);
        let held = self.tables.prefixes.keys().filter_map(prefix_net);
        let nets: BTreeSet<IpNet> = self.ranges.keys().copied().chain(held).collect();
        for net in nets {
            let key = prefix_key(net);
            let wanted = self.ranges.get(&net).map(|(_, cell)| *cell);
            // A range that comes or goes has, on the side where it is not, the cell of the one around it.
            let coming = wanted.unwrap_or_else(|| {
                let around = std::iter::successors(net.supernet(), IpNet::supernet);
                around.into_iter().find_map(|net| self.ranges.get(&net)).map_or(cell::NONE, |(_, cell)| *cell)
            });
            let held = self.tables.prefixes.get(&key).copied();
            let current = held.or_else(|| self.tables.enclosing(net)).map_or(cell::NONE, |word| word.side(now));
            if held.is_none_or(|word| word.side(next) != coming) {
                out.prepare.push(Op::Prefix(key, Some(half(next, coming, current))));
            }
            let settled = wanted.map(|cell| CellWord { cell: [cell; 2] });
            if settled.is_none() || current != coming {
                out.settle.push(Op::Prefix(key, settled));
            }
        }
    }

    fn emit_pages(&self, out: &mut Transition) {
        let (next, now) = (self.next_side(), self.tables.epoch & 1);
        for (place, proto) in (0_u32..).zip(PORT_PROTOCOLS) {
            let steps = self.ports.get(&proto);
            for high in 0..256_u32 {
                let page = steps.map_or(PortPage::ZERO, |steps| {
                    let mut page = PortPage::ZERO;
                    for (low, cell) in page.cells.iter_mut().enumerate() {
                        let port = u16::try_from(high << 8 | u32::try_from(low).unwrap_or(0)).unwrap_or(0);
                        let number = steps.range(..=port).next_back().map_or(cell::NONE, |(_, cell)| *cell);
                        *cell = u16::try_from(number & !cell::PORT).unwrap_or(0);
                    }
                    page
                });
                let index = |side: u32| side * PAGES + place * 256 + high;
                let write = |index: u32| Op::Page(index, (page != PortPage::ZERO).then(|| Box::new(page)));
                let held = |index: u32| self.tables.pages.get(&index).copied().unwrap_or(PortPage::ZERO);
                if held(index(next)) != page {
                    out.prepare.push(write(index(next)));
                }
                if held(index(now)) != page {
                    out.settle.push(write(index(now)));
                }
            }
        }
    }

    fn emit_slots(&self, out: &mut Transition, affected: &BTreeSet<u32>, epoch: u32) {
        let (next, now) = (self.next_side(), self.tables.epoch & 1);
        let none = SlotWord { block: 0, revision: 0 };
        let held = |index: u32| self.tables.slots.get(&index).copied().unwrap_or(none);
        let mut wanted = BTreeMap::new();
        for slot in self.tables.slots.keys().filter_map(|index| u16::try_from(index >> 1).ok()) {
            wanted.insert(slot, none);
        }
        for subject in self.subjects.values() {
            let old = held(SlotWord::index(subject.slot, now));
            let mut sets = subject.firsts().flat_map(|first| self.sets.chain(first));
            let same = old.block == subject.block && !sets.any(|set| affected.contains(set));
            wanted.insert(subject.slot, if same { old } else { SlotWord { block: subject.block, revision: epoch } });
        }
        let mut settle = Vec::new();
        for (slot, word) in wanted {
            let write = |index: u32| Op::Slot(index, (word != none).then_some(word));
            let (coming, current) = (SlotWord::index(slot, next), SlotWord::index(slot, now));
            if held(coming) != word {
                out.prepare.push(write(coming));
            }
            if held(current) != word {
                settle.push(write(current));
            }
        }
        out.settle.extend(settle);
    }

    /// Takes a transition as done. The numbers that it removes from the maps rest from now on.
    pub(super) fn install(&mut self, transition: &Transition, now: u64) {
        let before = room_taken(&self.tables);
        for op in transition.ops() {
            match op {
                Op::Bits(key, Some(_)) => drop(self.bits_of.entry(key.cell).or_default().insert(key.set)),
                Op::Bits(key, None) => {
                    if let Some(sets) = self.bits_of.get_mut(&key.cell) {
                        sets.remove(&key.set);
                        if sets.is_empty() {
                            self.bits_of.remove(&key.cell);
                        }
                    }
                }
                Op::Set(id, None) => self.sets.free(*id, now),
                Op::Block(id, None) => self.blocks.free(*id, now),
                Op::Cell(number, None) => self.partition.rest(*number, now),
                Op::Pod(slot, None) => self.slots.quarantine(*slot, now),
                _ => {}
            }
            self.tables.apply(op);
        }
        self.sets.forget_found();
        self.blocks.forget_found();
        self.partition.take_found();
        self.found_slots.clear();
        self.full = false;
        let lacks = self.subjects.iter().filter(|(_, subject)| subject.lacks());
        let lacking: BTreeMap<_, _> =
            lacks.map(|(name, subject)| (name.clone(), (subject.locked, subject.unaudited))).collect();
        let locked = !lacking.is_empty() || !self.unplaced.is_empty();
        // Less than before, and not only other numbers for the same: or what does not fit would be tried for ever. What was
        // removed last made no room for those who came with it, so these are tried once more.
        let made_room = room_taken(&self.tables).into_iter().zip(before).any(|(now, before)| now < before);
        let late = lacking != self.lacking && transition.settle.iter().any(Op::makes_room);
        self.retry = locked && (made_room || late);
        self.lacking = lacking;
    }
}
