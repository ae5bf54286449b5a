//! Blocks in use: pods with equal sets share one.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::policy::BlockEntry;

use crate::ids::IdPool;

/// All blocks, the two fixed ones among them.
#[derive(Clone, Debug)]
pub(super) struct Blocks {
    by_content: BTreeMap<BlockEntry, u32>,
    entries: BTreeMap<u32, (BlockEntry, u32)>,
    unused: BTreeSet<u32>,
    pool: IdPool,
    found: BTreeMap<BlockEntry, u32>,
}

impl Blocks {
    pub(super) fn new(capacity: u32) -> Self {
        let locked = BlockEntry { flags: BlockEntry::LOCKED, ..BlockEntry::OPEN };
        let mut pool = IdPool::new(capacity);
        pool.reserve(BlockEntry::OPEN_ID);
        pool.reserve(BlockEntry::LOCKED_ID);
        Self {
            by_content: BTreeMap::new(),
            entries: BTreeMap::from([
                (BlockEntry::OPEN_ID, (BlockEntry::OPEN, 1)),
                (BlockEntry::LOCKED_ID, (locked, 1)),
            ]),
            unused: BTreeSet::new(),
            pool,
            found: BTreeMap::new(),
        }
    }

    /// Takes note of a block that the maps hold.
    pub(super) fn find(&mut self, id: u32, entry: BlockEntry) {
        if !self.entries.contains_key(&id) && self.pool.reserve(id) {
            self.found.insert(entry, id);
        }
    }

    /// Uses a block once more; `None` when there is no number left.
    pub(super) fn acquire(&mut self, entry: BlockEntry) -> Option<u32> {
        let id = match self.by_content.get(&entry) {
            Some(id) => *id,
            None => self.found.remove(&entry).or_else(|| self.pool.allocate())?,
        };
        self.by_content.insert(entry, id);
        self.entries.entry(id).or_insert((entry, 0)).1 += 1;
        self.unused.remove(&id);
        Some(id)
    }

    /// Uses a block once less. The fixed ones stay.
    pub(super) fn release(&mut self, id: u32) {
        if id == BlockEntry::OPEN_ID || id == BlockEntry::LOCKED_ID {
            return;
        }
        if let Some((_, users)) = self.entries.get_mut(&id) {
            *users = users.saturating_sub(1);
            if *users == 0 {
                self.unused.insert(id);
            }
        }
    }

    /// Forgets the blocks that nobody uses. Numbers that the maps know stay taken until [`Blocks::free`].
    pub(super) fn sweep(&mut self, known: impl Fn(u32) -> bool) {
        for id in std::mem::take(&mut self.unused) {
            if let Some((entry, _)) = self.entries.remove(&id) {
                self.by_content.remove(&entry);
                if !known(id) {
                    self.pool.give_back(id);
                }
            }
        }
    }

    /// Gives a swept number back: it rests from now on.
    pub(super) fn free(&mut self, id: u32, now: u64) {
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

    /// All blocks.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, BlockEntry)> + '_ {
        self.entries.iter().map(|(id, (entry, _))| (*id, *entry))
    }

    /// Is it in use?
    pub(super) fn contains(&self, id: u32) -> bool {
        self.entries.contains_key(&id)
    }
}
