//! Policy maps in memory that are as strict as the programs that read them would like the kernel to be.
//!
//! They refuse what would let a packet meet a half-made policy, so a test that uses them checks the order of operations
//! without saying so; and they fail on demand, before or after the operation has taken effect.

use std::fmt;

use proxy_abi::policy::{BlockEntry, PortPage, RuleRef, SlotWord, cell};

use super::dataplane::PolicyDataplane;
use super::engine::Limits;
use super::tables::{Op, PolicyTables, Start, prefix_net};
pub use crate::fake::When;

/// The fake.
pub struct FakePolicyMaps {
    tables: PolicyTables,
    limits: Limits,
    /// Operations asked for, failed ones included.
    pub asked: u64,
    /// How often everything was read.
    pub loads: u64,
    /// The next reading fails.
    pub fail_load: bool,
    /// What rows of interfaces say; they are not among these maps.
    pub enforced: bool,
    fault: Fault,
}

/// Decides whether the operation of that number fails.
type Fault = Box<dyn FnMut(u64, &Op) -> Option<When> + Send>;

/// Why an operation failed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FakePolicyError {
    /// It was told to.
    #[error("injected failure of {0:?}")]
    Injected(Op),
    /// It was told to fail at reading.
    #[error("injected failure of load")]
    InjectedLoad,
    /// The map is full.
    #[error("no room for {0:?}")]
    Full(Op),
    /// The operation breaks a rule: a fault of the caller.
    #[error("{op:?} refused: {rule}")]
    Refused {
        /// The operation.
        op: Op,
        /// The rule.
        rule: &'static str,
    },
}

impl FakePolicyMaps {
    /// Empty.
    pub fn new(limits: Limits) -> Self {
        Self::with_tables(limits, PolicyTables::default())
    }

    /// With content, however broken.
    pub fn with_tables(limits: Limits, tables: PolicyTables) -> Self {
        Self { tables, limits, asked: 0, loads: 0, fail_load: false, enforced: false, fault: Box::new(|_, _| None) }
    }

    /// What they hold.
    pub const fn tables(&self) -> &PolicyTables {
        &self.tables
    }

    /// Asks `fault` from now on whether an operation fails; it is given the number of the operation, from 1.
    pub fn fail_with(&mut self, fault: impl FnMut(u64, &Op) -> Option<When> + Send + 'static) {
        self.fault = Box::new(fault);
    }

    /// Nothing fails from now on.
    pub fn heal(&mut self) {
        self.fail_with(|_, _| None);
    }

    /// The word of a slot on the side that counts.
    pub fn word(&self, slot: u16) -> SlotWord {
        let index = SlotWord::index(slot, self.tables.epoch);
        self.tables.slots.get(&index).copied().unwrap_or(NO_WORD)
    }

    fn side(&self) -> u32 {
        self.tables.epoch & 1
    }

    fn is_named_set(&self, set: u32) -> bool {
        let firsts = self.tables.blocks.values().flat_map(|block| block.ingress.into_iter().chain(block.egress));
        firsts.filter(|first| *first != 0).any(|first| self.chain(first).any(|id| id == set))
    }

    /// A set and those that hang on it, as far as they are there.
    fn chain(&self, first: u32) -> impl Iterator<Item = u32> + '_ {
        let next = |id: &u32| self.tables.sets.get(id).map(|set| set.next).filter(|next| *next != 0);
        std::iter::successors(Some(first), next)
    }

    fn is_named_block(&self, block: u32) -> bool {
        self.tables.slots.values().any(|word| word.block == block)
    }

    fn is_named_cell(&self, number: u32) -> bool {
        if number & cell::PORT != 0 && number & cell::POD == 0 {
            return self
                .tables
                .pages
                .values()
                .flat_map(|page| page.cells)
                .any(|low| cell::PORT | u32::from(low) == number);
        }
        let words = self.tables.ips.values().chain(self.tables.prefixes.values());
        words.into_iter().any(|word| word.cell.contains(&number))
    }

    /// The rule that an operation breaks, if any.
    fn broken_rule(&self, op: &Op) -> Option<&'static str> {
        let (tables, now) = (&self.tables, self.side());
        match op {
            Op::Epoch(epoch) => first_broken([(*epoch != 0, "epoch 0")]),
            Op::Slot(index, word) => {
                let (word, held) = (word.unwrap_or(NO_WORD), tables.slots.get(index).copied().unwrap_or(NO_WORD));
                first_broken([
                    (index >> 1 != 0 && index >> 1 < self.limits.slots, "slot out of range"),
                    (index & 1 != now || word == held, "a slot changed on the side that counts"),
                    (word.block == 0 || tables.blocks.contains_key(&word.block), "a slot names an absent block"),
                    (word.block == 0 || tables.pods.contains_key(&(index >> 1)), "a slot of no pod"),
                ])
            }
            Op::Pod(slot, Some(_)) => first_broken([(*slot != 0 && *slot < self.limits.slots, "slot out of range")]),
            Op::Pod(slot, None) => {
                let words = [0, 1].map(|side| tables.slots.get(&(slot << 1 | side)).copied().unwrap_or(NO_WORD));
                first_broken([(words == [NO_WORD; 2], "a slot that counts lost its pod")])
            }
            Op::Block(id, Some(entry)) => {
                let mut sets = entry.ingress.into_iter().chain(entry.egress).filter(|set| *set != 0);
                let beside = entry.shadow == 0 || tables.blocks.contains_key(&entry.shadow);
                let whole = sets.all(|first| self.chain(first).all(|id| tables.sets.contains_key(&id)));
                first_broken([
                    (*id != 0 && *id < self.limits.blocks, "block out of range"),
                    (whole, "a block names an absent set"),
                    (beside, "a block has an absent shadow"),
                    (tables.blocks.get(id) == Some(entry) || !self.is_named_block(*id), "a block changed while in use"),
                ])
            }
            Op::Block(id, None) => first_broken([
                (*id != BlockEntry::OPEN_ID && *id != BlockEntry::LOCKED_ID, "one of the fixed blocks removed"),
                (!self.is_named_block(*id), "a block removed while in use"),
                (tables.blocks.values().all(|block| block.shadow != *id), "a shadow removed while in use"),
            ]),
            Op::Set(id, Some(entry)) => first_broken([
                (*id != 0 && *id < self.limits.sets, "set out of range"),
                (tables.sets.get(id) == Some(&**entry) || !self.is_named_set(*id), "a set changed while in use"),
            ]),
            Op::Set(id, None) => first_broken([(!self.is_named_set(*id), "a set removed while in use")]),
            Op::Ip(ip, word) => {
                let ip = (*ip).into();
                let range = tables.range_cell(ip, now);
                let coming = word.map_or(cell::NONE, |word| word.side(now));
                let coming = if coming == cell::NONE { range } else { coming };
                let known = word.is_none_or(|word| word.cell.iter().all(|cell| self.is_cell(*cell)));
                first_broken([
                    (tables.cell(ip, now) == coming, "an address changed on the side that counts"),
                    (known, "an address in an absent cell"),
                ])
            }
            Op::Prefix(key, word) => {
                let Some(net) = prefix_net(key) else { return Some("a range of no length") };
                let around = || tables.enclosing(net).map_or(cell::NONE, |word| word.side(now));
                let held = tables.prefixes.get(key).map_or_else(around, |word| word.side(now));
                let coming = word.map_or_else(around, |word| word.side(now));
                let known = word.is_none_or(|word| word.cell.iter().all(|cell| self.is_cell(*cell)));
                first_broken([
                    (held == coming, "a range changed on the side that counts"),
                    (known, "a range in an absent cell"),
                ])
            }
            Op::Page(index, page) => {
                let held = tables.pages.get(index).copied().unwrap_or(PortPage::ZERO);
                let coming = page.as_deref().copied().unwrap_or(PortPage::ZERO);
                let counts = index / proxy_abi::policy::PAGES == now;
                let named = coming.cells.iter().filter(|low| **low != 0);
                let known = named.into_iter().all(|low| self.is_cell(cell::PORT | u32::from(*low)));
                first_broken([
                    (!counts || held == coming, "a page changed on the side that counts"),
                    (known, "a port in an absent cell"),
                ])
            }
            Op::Cell(number, None) => first_broken([(!self.is_named_cell(*number), "a cell removed while in use")]),
            Op::Bits(key, Some(_)) => first_broken([
                (tables.sets.contains_key(&key.set), "rules of an absent set"),
                (self.is_cell(key.cell), "rules for an absent cell"),
            ]),
            Op::Hits(rule, Some(start)) => {
                let is_kept = |other| tables.hits.contains(&other);
                first_broken([
                    (
                        !is_kept(*rule) || !self.is_named_set(RuleRef(*rule).set()),
                        "a rule's count begins anew while in use",
                    ),
                    (!matches!(start, Start::Of(other) if !is_kept(*other)), "a count goes on from none"),
                ])
            }
            Op::Hits(rule, None) => {
                first_broken([(!self.is_named_set(RuleRef(*rule).set()), "a rule in use is counted no more")])
            }
            Op::Cell(_, Some(_)) | Op::Bits(_, None) => None,
        }
    }

    fn is_cell(&self, number: u32) -> bool {
        number == cell::NONE || number == cell::ANY_POD || self.tables.cells.contains_key(&number)
    }

    fn is_full(&self, op: &Op) -> bool {
        let (tables, limits) = (&self.tables, &self.limits);
        match op {
            Op::Ip(ip, Some(_)) => !tables.ips.contains_key(ip) && tables.ips.len() >= limits.ips as usize,
            Op::Prefix(key, Some(_)) => {
                !tables.prefixes.contains_key(key) && tables.prefixes.len() >= limits.prefixes as usize
            }
            Op::Cell(id, Some(_)) => !tables.cells.contains_key(id) && tables.cells.len() >= limits.cells as usize,
            Op::Hits(rule, Some(_)) => !tables.hits.contains(rule) && tables.hits.len() >= limits.hits as usize,
            Op::Bits(key, Some(_)) => !tables.bits.contains_key(key) && tables.bits.len() >= limits.bits as usize,
            _ => false,
        }
    }
}

const NO_WORD: SlotWord = SlotWord { block: 0, revision: 0 };

fn first_broken<const N: usize>(rules: [(bool, &'static str); N]) -> Option<&'static str> {
    rules.into_iter().find(|(kept, _)| !kept).map(|(_, rule)| rule)
}

impl PolicyDataplane for FakePolicyMaps {
    type Error = FakePolicyError;

    fn load_policy(&mut self) -> Result<PolicyTables, FakePolicyError> {
        self.loads += 1;
        if std::mem::take(&mut self.fail_load) {
            return Err(FakePolicyError::InjectedLoad);
        }
        Ok(self.tables.clone())
    }

    fn enforced(&mut self) -> Result<bool, FakePolicyError> {
        Ok(self.enforced)
    }

    fn apply_policy(&mut self, op: &Op) -> Result<(), FakePolicyError> {
        self.asked += 1;
        let fault = (self.fault)(self.asked, op);
        if fault == Some(When::Before) {
            return Err(FakePolicyError::Injected(op.clone()));
        }
        if let Some(rule) = self.broken_rule(op) {
            return Err(FakePolicyError::Refused { op: op.clone(), rule });
        }
        if self.is_full(op) {
            return Err(FakePolicyError::Full(op.clone()));
        }
        self.tables.apply(op);
        if fault == Some(When::After) {
            return Err(FakePolicyError::Injected(op.clone()));
        }
        Ok(())
    }
}

impl fmt::Debug for FakePolicyMaps {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FakePolicyMaps")
            .field("asked", &self.asked)
            .field("tables", &self.tables)
            .finish_non_exhaustive()
    }
}
