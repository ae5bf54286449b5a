//! Numbers that lie in maps: who has which, and when a freed one may be used again.
//!
//! ```text
//!   allocate ─▶ in use ─▶ quarantine(now) ─▶ grace ─▶ free, smallest first
//! ```
//!
//! A program that read a slot or an id an instant ago may still act on it, so a freed number waits. There is no clock in
//! here: `now` is any number of milliseconds that never goes back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Ids `1..capacity`; 0 means "none" in every map.
#[derive(Clone, Debug)]
pub struct IdPool {
    capacity: u32,
    /// Every id from here on has never been used.
    next: u32,
    free: BTreeSet<u32>,
    quarantine: VecDeque<(u64, u32)>,
}

impl IdPool {
    /// For a map with that many entries.
    pub const fn new(capacity: u32) -> Self {
        Self { capacity, next: 1, free: BTreeSet::new(), quarantine: VecDeque::new() }
    }

    /// Marks an id as used. False when it is out of range or used already.
    pub fn reserve(&mut self, id: u32) -> bool {
        if id == 0 || id >= self.capacity {
            return false;
        }
        if id < self.next {
            return self.free.remove(&id);
        }
        self.free.extend(self.next..id);
        self.next = id + 1;
        true
    }

    /// The smallest free id; `None` when there is none.
    pub fn allocate(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        (self.next < self.capacity).then(|| {
            let id = self.next;
            self.next += 1;
            id
        })
    }

    /// Frees an id that no map has seen.
    pub fn give_back(&mut self, id: u32) {
        self.free.insert(id);
    }

    /// Frees an id after the grace.
    pub fn quarantine(&mut self, id: u32, now: u64) {
        self.quarantine.push_back((now, id));
    }

    /// Frees what has been in quarantine for the grace. True when there was something.
    pub fn release(&mut self, now: u64, grace: u64) -> bool {
        let mut released = false;
        while let Some((_, id)) = self.quarantine.front().copied().filter(|(t, _)| t.saturating_add(grace) <= now) {
            self.quarantine.pop_front();
            self.free.insert(id);
            released = true;
        }
        released
    }

    /// When [`Self::release`] will next find something.
    pub fn next_release(&self, grace: u64) -> Option<u64> {
        self.quarantine.front().map(|(since, _)| since.saturating_add(grace))
    }
}

/// A range of slots; empty ranges are not made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SlotRange {
    /// First slot.
    pub first: u32,
    /// Number of slots.
    pub count: u32,
}

impl SlotRange {
    /// One past the last slot.
    pub const fn end(self) -> u32 {
        self.first.saturating_add(self.count)
    }

    /// The slots.
    pub const fn slots(self) -> std::ops::Range<u32> {
        self.first..self.end()
    }
}

/// Ranges within slots `1..capacity`; slot 0 is never used, so that a zeroed frontend points at nothing.
#[derive(Clone, Debug)]
pub struct RangePool {
    /// First slot → count of each free stretch; stretches never touch.
    free: BTreeMap<u32, u32>,
    quarantine: VecDeque<(u64, SlotRange)>,
}

impl RangePool {
    /// For an array with that many entries.
    pub fn new(capacity: u32) -> Self {
        let count = capacity.saturating_sub(1);
        let free = if count == 0 { BTreeMap::new() } else { BTreeMap::from([(1, count)]) };
        Self { free, quarantine: VecDeque::new() }
    }

    /// Marks a range as used and returns those parts of it that were free until now: the whole, when all is well.
    pub fn reserve(&mut self, range: SlotRange) -> Vec<SlotRange> {
        let start = self.free.range(..=range.first).next_back().map_or(range.first, |(first, _)| *first);
        let touched: Vec<_> = self.free.range(start..range.end().max(start)).map(|(f, c)| (*f, *c)).collect();
        let mut taken = Vec::new();
        for (first, count) in touched {
            let end = first + count;
            let (from, to) = (first.max(range.first), end.min(range.end()));
            if from >= to {
                continue;
            }
            self.free.remove(&first);
            if first < from {
                self.free.insert(first, from - first);
            }
            if to < end {
                self.free.insert(to, end - to);
            }
            taken.push(SlotRange { first: from, count: to - from });
        }
        taken
    }

    /// The first stretch that is long enough; `None` when there is none, or `count` is 0.
    pub fn allocate(&mut self, count: u32) -> Option<SlotRange> {
        if count == 0 {
            return None;
        }
        let (first, length) = self.free.iter().find(|(_, length)| **length >= count).map(|(f, l)| (*f, *l))?;
        self.free.remove(&first);
        if length > count {
            self.free.insert(first + count, length - count);
        }
        Some(SlotRange { first, count })
    }

    /// Frees a range that no map has seen.
    pub fn give_back(&mut self, range: SlotRange) {
        let mut merged = range;
        if let Some((first, count)) = self.free.range(..range.first).next_back().map(|(f, c)| (*f, *c))
            && first + count == range.first
        {
            self.free.remove(&first);
            merged = SlotRange { first, count: count + merged.count };
        }
        if let Some(count) = self.free.remove(&range.end()) {
            merged.count += count;
        }
        self.free.insert(merged.first, merged.count);
    }

    /// Frees a range after the grace.
    pub fn quarantine(&mut self, range: SlotRange, now: u64) {
        self.quarantine.push_back((now, range));
    }

    /// Frees what has been in quarantine for the grace, and returns it.
    pub fn release(&mut self, now: u64, grace: u64) -> Vec<SlotRange> {
        let mut released = Vec::new();
        while let Some((_, range)) = self.quarantine.front().copied().filter(|(t, _)| t.saturating_add(grace) <= now) {
            self.quarantine.pop_front();
            self.give_back(range);
            released.push(range);
        }
        released
    }

    /// When [`Self::release`] will next find something.
    pub fn next_release(&self, grace: u64) -> Option<u64> {
        self.quarantine.front().map(|(since, _)| since.saturating_add(grace))
    }
}

/// Generations of backends: one counter for all ids, so each use of an id has its own. Never 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Generations {
    last: u32,
}

impl Generations {
    /// Leap after a restart: twice the capacity of the backend map, rounded. A backend that was deleted has left no
    /// trace in the map, and its generation may be above every one that is still there; without the leap the next use
    /// of its id could get that very generation, and its forgotten UDP flows would come alive again.
    pub const LEAP: u32 = 1 << 18;

    /// No backend was ever made.
    pub const fn new() -> Self {
        Self { last: 0 }
    }

    /// Continues above the generations found in the map; starts afresh when there are none.
    pub fn restored(seen: impl Iterator<Item = u32>) -> Self {
        Self { last: seen.max().map_or(0, |max| max.wrapping_add(Self::LEAP)) }
    }

    /// A generation that differs from the ones before.
    pub const fn next(&mut self) -> u32 {
        self.last = self.last.wrapping_add(1);
        if self.last == 0 {
            self.last = 1;
        }
        self.last
    }
}

impl Default for Generations {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_smallest_first_and_wait_out_the_grace() {
        let mut pool = IdPool::new(4);
        assert_eq!([(); 4].map(|()| pool.allocate()), [Some(1), Some(2), Some(3), None]);
        pool.quarantine(2, 10);
        pool.quarantine(1, 20);
        assert_eq!((pool.release(109, 100), pool.allocate(), pool.next_release(100)), (false, None, Some(110)));
        assert_eq!((pool.release(110, 100), pool.allocate(), pool.allocate()), (true, Some(2), None));
        assert_eq!((pool.release(500, 100), pool.allocate(), pool.next_release(100)), (true, Some(1), None));
    }

    #[test]
    fn reserved_ids_are_not_given_out() {
        let mut pool = IdPool::new(8);
        assert_eq!([0, 5, 2, 2, 8].map(|id| pool.reserve(id)), [false, true, true, false, false]);
        assert_eq!([(); 6].map(|()| pool.allocate()), [Some(1), Some(3), Some(4), Some(6), Some(7), None]);
    }

    #[test]
    fn ranges_are_first_fit_merge_and_wait_out_the_grace() {
        let range = |first, count| SlotRange { first, count };
        let mut pool = RangePool::new(11);
        assert_eq!(pool.allocate(0), None);
        assert_eq!(pool.allocate(3), Some(range(1, 3)));
        assert_eq!(pool.allocate(3), Some(range(4, 3)));
        assert_eq!(pool.allocate(4), Some(range(7, 4)));
        assert_eq!(pool.allocate(1), None);
        pool.quarantine(range(1, 3), 0);
        pool.quarantine(range(4, 3), 1);
        assert_eq!(pool.release(9, 10), []);
        assert_eq!(pool.release(11, 10), [range(1, 3), range(4, 3)]);
        assert_eq!(pool.allocate(5), Some(range(1, 5)), "the two have become one");
        pool.give_back(range(7, 4));
        assert_eq!(pool.allocate(5), Some(range(6, 5)));
        assert_eq!(pool.allocate(1), None);
    }

    #[test]
    fn reserving_tells_what_was_free() {
        let range = |first, count| SlotRange { first, count };
        let mut pool = RangePool::new(20);
        assert_eq!(pool.reserve(range(5, 3)), [range(5, 3)]);
        assert_eq!(pool.reserve(range(3, 8)), [range(3, 2), range(8, 3)]);
        assert_eq!(pool.reserve(range(0, 2)), [range(1, 1)], "slot 0 is nobody's");
        assert_eq!(pool.reserve(range(18, 5)), [range(18, 2)], "nor is what lies past the end");
        assert_eq!(pool.reserve(range(30, 5)), []);
        assert_eq!(pool.reserve(range(u32::MAX, u32::MAX)), []);
        assert_eq!(pool.allocate(2), Some(range(11, 2)), "slot 2 alone is too short");
        assert_eq!(pool.allocate(1), Some(range(2, 1)));
    }

    #[test]
    fn generations_are_never_zero_and_leap_after_a_restart() {
        let mut first = Generations::new();
        assert_eq!([first.next(), first.next()], [1, 2]);
        assert_eq!(Generations::restored([].into_iter()), Generations::new());
        assert_eq!(Generations::restored([7, 3].into_iter()).next(), 8 + Generations::LEAP);
        assert_eq!(Generations { last: u32::MAX }.next(), 1);
    }
}
