//! The content of the policy maps, and what may be done to it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use proxy_abi::policy::{Bits, BitsKey, BlockEntry, CellEntry, CellWord, PodDigest, PortPage, SetEntry, SlotWord};
use proxy_abi::{IpBytes, PrefixKey};

/// All content. The value of a key in an array map that is not named here is zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PolicyTables {
    /// Epoch.
    pub epoch: u32,
    /// Slot and side → block.
    pub slots: BTreeMap<u32, SlotWord>,
    /// Slot → pod.
    pub pods: BTreeMap<u32, PodDigest>,
    /// Block → sets.
    pub blocks: BTreeMap<u32, BlockEntry>,
    /// Set → rules.
    pub sets: BTreeMap<u32, SetEntry>,
    /// Pod address → cell.
    pub ips: BTreeMap<IpBytes, CellWord>,
    /// Range → cell.
    pub prefixes: BTreeMap<PrefixKey, CellWord>,
    /// Page and side → cells of ports.
    pub pages: BTreeMap<u32, PortPage>,
    /// Cell → what it is.
    pub cells: BTreeMap<u32, CellEntry>,
    /// Set and cell → rules.
    pub bits: BTreeMap<BitsKey, Bits>,
    /// Rules that are counted, each a [`proxy_abi::policy::RuleRef`]. How often they decided is not for the compiler.
    pub hits: BTreeSet<u32>,
}

/// Where the count of a rule begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start {
    /// At nothing.
    Zero,
    /// At what another rule, which says the same and is about to go, has counted so far.
    Of(u32),
}

/// One map operation; `None` deletes, or zeroes an entry of an array. Each may run twice with the same result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Op {
    /// The switch.
    Epoch(u32),
    /// A slot.
    Slot(u32, Option<SlotWord>),
    /// The pod of a slot.
    Pod(u32, Option<PodDigest>),
    /// A block.
    Block(u32, Option<BlockEntry>),
    /// A set.
    Set(u32, Option<Box<SetEntry>>),
    /// A pod address.
    Ip(IpBytes, Option<CellWord>),
    /// A range.
    Prefix(PrefixKey, Option<CellWord>),
    /// A page.
    Page(u32, Option<Box<PortPage>>),
    /// A cell.
    Cell(u32, Option<CellEntry>),
    /// Rules of a set that match a cell.
    Bits(BitsKey, Option<Bits>),
    /// A rule, by its [`proxy_abi::policy::RuleRef`], is counted from now on.
    Hits(u32, Option<Start>),
}

impl Op {
    /// Does it take an entry out of a map that may be too small?
    pub(crate) const fn makes_room(&self) -> bool {
        matches!(
            self,
            Self::Set(_, None) | Self::Ip(_, None) | Self::Prefix(_, None) | Self::Cell(_, None) | Self::Bits(_, None)
        )
    }
}

fn put<K: Ord, V>(map: &mut BTreeMap<K, V>, key: K, value: Option<V>) {
    match value {
        Some(value) => drop(map.insert(key, value)),
        None => drop(map.remove(&key)),
    }
}

impl PolicyTables {
    /// Does one operation.
    pub fn apply(&mut self, op: &Op) {
        match op {
            Op::Epoch(epoch) => self.epoch = *epoch,
            Op::Slot(key, value) => put(&mut self.slots, *key, *value),
            Op::Pod(key, value) => put(&mut self.pods, *key, *value),
            Op::Block(key, value) => put(&mut self.blocks, *key, *value),
            Op::Set(key, value) => put(&mut self.sets, *key, value.as_deref().copied()),
            Op::Ip(key, value) => put(&mut self.ips, *key, *value),
            Op::Prefix(key, value) => put(&mut self.prefixes, *key, *value),
            Op::Page(key, value) => put(&mut self.pages, *key, value.as_deref().copied()),
            Op::Cell(key, value) => put(&mut self.cells, *key, *value),
            Op::Bits(key, value) => put(&mut self.bits, *key, *value),
            Op::Hits(rule, Some(_)) => drop(self.hits.insert(*rule)),
            Op::Hits(rule, None) => drop(self.hits.remove(rule)),
        }
    }

    /// The longest range that holds a range and is shorter than it.
    pub fn enclosing(&self, net: IpNet) -> Option<CellWord> {
        std::iter::successors(net.supernet(), IpNet::supernet)
            .find_map(|net| self.prefixes.get(&prefix_key(net)).copied())
    }

    /// The cell of an address on one side, as the programs find it.
    pub fn cell(&self, ip: IpAddr, side: u32) -> u32 {
        match self.ips.get(&ip.into()).map_or(0, |word| word.side(side)) {
            0 => self.range_cell(ip, side),
            cell => cell,
        }
    }

    /// The cell of the longest range that holds an address.
    pub fn range_cell(&self, ip: IpAddr, side: u32) -> u32 {
        let own = self.prefixes.get(&prefix_key(IpNet::from(ip))).copied();
        own.or_else(|| self.enclosing(ip.into())).map_or(0, |word| word.side(side))
    }

    /// Entries of the maps that are no arrays: addresses, ranges, cells, bits, pods, rules.
    pub fn entries(&self) -> usize {
        self.ips.len() + self.prefixes.len() + self.cells.len() + self.bits.len() + self.pods.len() + self.hits.len()
    }
}

/// A range as a key.
pub fn prefix_key(net: IpNet) -> PrefixKey {
    let ip = IpBytes::from(net.network());
    PrefixKey::range(u32::from(ip.family()), ip, net.prefix_len())
}

/// The range of a key; `None` when it is none.
pub fn prefix_net(key: &PrefixKey) -> Option<IpNet> {
    let bits = key.length.checked_sub(32 + if key.ip.is_v4() { 96 } else { 0 })?;
    IpNet::new(key.ip.into(), u8::try_from(bits).ok()?).ok()
}
