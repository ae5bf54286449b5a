//! Cells: classes of addresses, or of ports, that give the same answers to all questions asked.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::Proto;
use proxy_abi::policy::cell;

use super::predicate::Element;
use crate::ids::IdPool;

/// What a cell is a class of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// Addresses of no pod.
    Address,
    /// Addresses of pods.
    Pod,
    /// Ports of a protocol.
    Port(Proto),
}

impl Kind {
    /// The kind that a cell's number tells; the protocol of a port is not in it.
    pub const fn of(number: u32) -> Self {
        if number & cell::POD != 0 {
            Self::Pod
        } else if number & cell::PORT != 0 {
            Self::Port(Proto(0))
        } else {
            Self::Address
        }
    }

    /// The bit that marks it in a cell's number.
    pub const fn mark(self) -> u32 {
        match self {
            Self::Address => 0,
            Self::Pod => cell::POD,
            Self::Port(_) => cell::PORT,
        }
    }

    /// The digest of a cell of this kind.
    const fn tagged(self, [a, b]: [u64; 2]) -> [u64; 2] {
        match self {
            Self::Address => [a, b],
            Self::Pod => [a, b ^ 1],
            Self::Port(proto) => [a, b ^ (2 | (proto.0 as u64) << 8)],
        }
    }

    const fn pool(self) -> usize {
        match self {
            Self::Address => 0,
            Self::Pod => 1,
            Self::Port(_) => 2,
        }
    }
}

/// A cell in use.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Kind.
    pub kind: Kind,
    /// The questions to which it answers yes, ascending.
    pub vector: Box<[Element]>,
    /// Digest of kind and questions.
    pub digest: [u64; 2],
    users: u32,
}

/// All cells. One without any yes has no number of its own: [`cell::NONE`] or [`cell::ANY_POD`].
#[derive(Clone, Debug)]
pub struct Partition {
    by_content: BTreeMap<(Kind, Box<[Element]>), u32>,
    cells: BTreeMap<u32, Cell>,
    of_element: BTreeMap<Element, BTreeSet<u32>>,
    unused: BTreeSet<u32>,
    pools: [IdPool; 3],
    /// Cells found in the maps and not used since.
    found: BTreeMap<[u64; 2], u32>,
}

impl Partition {
    /// With room for so many cells of addresses, so many of pods, and 65,535 of ports.
    pub fn new(capacity: u32) -> Self {
        let ids = capacity.min(cell::PORT).saturating_add(1);
        Self {
            by_content: BTreeMap::new(),
            cells: BTreeMap::new(),
            of_element: BTreeMap::new(),
            unused: BTreeSet::new(),
            pools: [IdPool::new(ids), IdPool::new(ids), IdPool::new(ids.min(1 << 16))],
            found: BTreeMap::new(),
        }
    }

    /// Takes note of a cell that the maps hold.
    pub fn find(&mut self, number: u32, digest: [u64; 2]) {
        let kind = Kind::of(number);
        if !self.cells.contains_key(&number) && self.pools[kind.pool()].reserve(number & !kind.mark()) {
            self.found.insert(digest, number);
        }
    }

    /// Uses the cell with these answers once more; `None` when there is no number left.
    pub fn acquire(
        &mut self,
        kind: Kind,
        vector: Vec<Element>,
        digest: impl FnOnce(&[Element]) -> [u64; 2],
    ) -> Option<u32> {
        if vector.is_empty() {
            return Some(if kind == Kind::Pod { cell::ANY_POD } else { cell::NONE });
        }
        let content = (kind, vector.into_boxed_slice());
        if let Some(number) = self.by_content.get(&content).copied() {
            if let Some(cell) = self.cells.get_mut(&number) {
                cell.users += 1;
                self.unused.remove(&number);
            }
            return Some(number);
        }
        let digest = kind.tagged(digest(&content.1));
        let fitting = self.found.get(&digest).copied().filter(|number| Kind::of(*number).mark() == kind.mark());
        let number = match fitting {
            Some(number) => {
                self.found.remove(&digest);
                number
            }
            None => self.pools[kind.pool()].allocate()? | kind.mark(),
        };
        for element in &content.1 {
            self.of_element.entry(*element).or_default().insert(number);
        }
        self.cells.insert(number, Cell { kind, vector: content.1.clone(), digest, users: 1 });
        self.by_content.insert(content, number);
        Some(number)
    }

    /// A question is not asked any more. A cell that nothing else now distinguishes from another one stays, and loses
    /// its users as they ask again; any other cell keeps number and users and answers one question less.
    pub fn forget(&mut self, element: Element, digest: impl Fn(&[Element]) -> [u64; 2]) {
        for number in self.of_element.get(&element).cloned().unwrap_or_default() {
            let Some(cell) = self.cells.get_mut(&number) else { continue };
            let rest: Box<[Element]> = cell.vector.iter().copied().filter(|e| *e != element).collect();
            let content = (cell.kind, rest);
            if content.1.is_empty() || self.by_content.contains_key(&content) {
                continue;
            }
            cell.digest = cell.kind.tagged(digest(&content.1));
            let old = std::mem::replace(&mut cell.vector, content.1.clone());
            self.by_content.remove(&(cell.kind, old));
            self.by_content.insert(content, number);
            if let Some(numbers) = self.of_element.get_mut(&element) {
                numbers.remove(&number);
            }
        }
    }

    /// Uses a cell once less.
    pub fn release(&mut self, number: u32) {
        if let Some(cell) = self.cells.get_mut(&number) {
            cell.users = cell.users.saturating_sub(1);
            if cell.users == 0 {
                self.unused.insert(number);
            }
        }
    }

    /// Forgets the cells that nothing uses. Their numbers stay taken until [`Partition::free`].
    pub fn sweep(&mut self) -> Vec<(u32, Cell)> {
        let mut swept = Vec::new();
        for number in std::mem::take(&mut self.unused) {
            let Some(cell) = self.cells.remove(&number) else { continue };
            for element in &cell.vector {
                if let Some(numbers) = self.of_element.get_mut(element) {
                    numbers.remove(&number);
                    if numbers.is_empty() {
                        self.of_element.remove(element);
                    }
                }
            }
            self.by_content.remove(&(cell.kind, cell.vector.clone()));
            swept.push((number, cell));
        }
        swept
    }

    /// Gives a swept number back.
    pub fn free(&mut self, number: u32) {
        let kind = Kind::of(number);
        self.pools[kind.pool()].give_back(number & !kind.mark());
    }

    /// Gives a swept number back that the maps have forgotten: it rests from now on.
    pub fn rest(&mut self, number: u32, now: u64) {
        let kind = Kind::of(number);
        self.pools[kind.pool()].quarantine(number & !kind.mark(), now);
    }

    /// Frees the numbers that have rested for the grace.
    pub fn release_numbers(&mut self, now: u64, grace: u64) {
        for pool in &mut self.pools {
            pool.release(now, grace);
        }
    }

    /// Numbers that the maps held and that nothing uses.
    pub fn take_found(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.found).into_values().collect()
    }

    /// A cell.
    pub fn get(&self, number: u32) -> Option<&Cell> {
        self.cells.get(&number)
    }

    /// All cells.
    pub fn iter(&self) -> impl Iterator<Item = (u32, &Cell)> {
        self.cells.iter().map(|(number, cell)| (*number, cell))
    }

    /// Cells that answer yes to a question.
    pub fn of_element(&self, element: Element) -> impl Iterator<Item = u32> + '_ {
        self.of_element.get(&element).into_iter().flatten().copied()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.cells.len()
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.cells.is_empty()
    }
}
