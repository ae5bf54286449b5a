//! The policy maps behind the port [`PolicyDataplane`].

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use proxy_abi::policy::{
    Bits, BitsKey, BlockEntry, CellEntry, CellWord, HitsEntry, PodDigest, PodHits, PortPage, SetEntry, SlotWord,
    map as name,
};
use proxy_abi::{DeviceEntry, IpBytes, PrefixKey};
use proxy_core::netpol::dataplane::PolicyDataplane;
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::tables::{Op, PolicyTables, Start};

use super::map::{Layout, Map};
use super::pins::LAYOUTS;
use super::{Bpf, Error};

/// All policy maps, open.
#[derive(Debug)]
#[expect(missing_docs, reason = "each is named after its map; see proxy_abi::policy")]
pub struct PolicyMaps {
    pub epoch: Map<u32, u32>,
    pub slot: Map<u32, SlotWord>,
    pub pod: Map<u32, PodDigest>,
    pub block: Map<u32, BlockEntry>,
    pub set: Map<u32, SetEntry>,
    pub ip: Map<IpBytes, CellWord>,
    pub prefix: Map<PrefixKey, CellWord>,
    pub page: Map<u32, PortPage>,
    pub cell: Map<u32, CellEntry>,
    pub bits: Map<BitsKey, Bits>,
    pub hits: Map<u32, HitsEntry>,
    pub pod_hits: Map<u32, PodHits>,
}

/// Entries of the maps that hold so much. A slot has two words, and pods have as many rows as there are slots.
pub(super) fn entries(limits: &Limits) -> [(&'static str, u32); 10] {
    [
        (name::SLOT, limits.slots.saturating_mul(2)),
        (name::POD, limits.slots),
        (name::POD_HITS, limits.slots),
        (name::BLOCK, limits.blocks),
        (name::SET, limits.sets),
        (name::IP, limits.ips),
        (name::PREFIX, limits.prefixes),
        (name::CELL, limits.cells),
        (name::BITS, limits.bits),
        (name::HITS, limits.hits),
    ]
}

const NO_WORD: SlotWord = SlotWord { block: 0, revision: 0 };

impl PolicyMaps {
    /// Opens them in a directory of pins.
    pub(super) fn open(directory: &Path) -> Result<Self, Error> {
        fn layout(name: &'static str) -> Result<Layout, Error> {
            let found = LAYOUTS.into_iter().find(|layout| layout.name == name);
            found.ok_or_else(|| Error::NotRunning { path: name.into() })
        }
        Ok(Self {
            epoch: Map::open(directory, layout(name::EPOCH)?)?,
            slot: Map::open(directory, layout(name::SLOT)?)?,
            pod: Map::open(directory, layout(name::POD)?)?,
            block: Map::open(directory, layout(name::BLOCK)?)?,
            set: Map::open(directory, layout(name::SET)?)?,
            ip: Map::open(directory, layout(name::IP)?)?,
            prefix: Map::open(directory, layout(name::PREFIX)?)?,
            page: Map::open(directory, layout(name::PAGE)?)?,
            cell: Map::open(directory, layout(name::CELL)?)?,
            bits: Map::open(directory, layout(name::BITS)?)?,
            hits: Map::open(directory, layout(name::HITS)?)?,
            pod_hits: Map::open(directory, layout(name::POD_HITS)?)?,
        })
    }

    /// Room in them, as they are.
    pub fn limits(&self) -> Limits {
        Limits {
            slots: self.pod.capacity().min(self.slot.capacity() / 2),
            blocks: self.block.capacity(),
            sets: self.set.capacity(),
            ips: self.ip.capacity(),
            prefixes: self.prefix.capacity(),
            cells: self.cell.capacity(),
            bits: self.bits.capacity(),
            hits: self.hits.capacity(),
            ..Limits::default()
        }
    }

    /// Reads everything back. Rows of array maps that are zero are not named; the one block that is zero by its meaning
    /// is, where the other fixed block shows that it was written.
    pub fn tables(&self) -> Result<PolicyTables, Error> {
        let blocks = self.block.read()?;
        let written = blocks.iter().any(|(id, block)| *id == BlockEntry::LOCKED_ID && *block != BlockEntry::OPEN);
        let fixed = written.then_some((BlockEntry::OPEN_ID, BlockEntry::OPEN));
        Ok(PolicyTables {
            epoch: self.epoch.get(&0)?.unwrap_or(0),
            slots: self.slot.read()?.into_iter().filter(|(_, word)| *word != NO_WORD).collect(),
            pods: self.pod.read()?.into_iter().collect(),
            blocks: blocks.into_iter().filter(|(_, block)| *block != BlockEntry::OPEN).chain(fixed).collect(),
            sets: self.set.read()?.into_iter().filter(|(_, set)| *set != SetEntry::EMPTY).collect(),
            ips: self.ip.read()?.into_iter().collect(),
            prefixes: self.prefix.read()?.into_iter().collect(),
            pages: self.page.read()?.into_iter().filter(|(_, page)| *page != PortPage::ZERO).collect(),
            cells: self.cell.read()?.into_iter().collect(),
            bits: self.bits.read()?.into_iter().collect(),
            hits: self.hits.read()?.into_iter().map(|(rule, _)| rule).collect(),
        })
    }

    /// Does one operation.
    pub fn apply(&self, op: &Op) -> Result<(), Error> {
        fn row<K: aya::Pod + std::fmt::Debug, V: aya::Pod>(
            map: &Map<K, V>,
            key: &K,
            value: Option<&V>,
        ) -> Result<(), Error> {
            match value {
                Some(value) => map.set(key, value),
                None => map.delete(key).map(|_| ()),
            }
        }
        match op {
            Op::Epoch(epoch) => self.epoch.set(&0, epoch),
            Op::Slot(index, word) => self.slot.set(index, &word.unwrap_or(NO_WORD)),
            Op::Pod(slot, pod) => {
                if pod.is_some() {
                    // Another pod's are not this one's.
                    self.pod_hits.set(slot, &PodHits::ZERO)?;
                }
                row(&self.pod, slot, pod.as_ref())
            }
            Op::Block(id, block) => self.block.set(id, &block.unwrap_or(BlockEntry::OPEN)),
            Op::Set(id, set) => self.set.set(id, set.as_deref().unwrap_or(&SetEntry::EMPTY)),
            Op::Ip(ip, word) => row(&self.ip, ip, word.as_ref()),
            Op::Prefix(key, word) => row(&self.prefix, key, word.as_ref()),
            Op::Page(index, page) => self.page.set(index, page.as_deref().unwrap_or(&PortPage::ZERO)),
            Op::Cell(number, entry) => row(&self.cell, number, entry.as_ref()),
            Op::Bits(key, bits) => row(&self.bits, key, bits.as_ref()),
            Op::Hits(rule, start) => row(&self.hits, rule, start.map(|start| self.begin(start)).as_ref()),
        }
    }

    /// What a rule has counted when it begins.
    fn begin(&self, start: Start) -> HitsEntry {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
        let zero = HitsEntry { since, ..HitsEntry::ZERO };
        match start {
            Start::Zero => zero,
            // A count that cannot be read is not worth a policy.
            Start::Of(rule) => self.hits.get(&rule).ok().flatten().unwrap_or(zero),
        }
    }

    /// Writes the longest stretch of operations at the beginning that one map can take in one call: how many they are, and
    /// a result for each. `None`: there is no such stretch.
    fn apply_stretch(&self, ops: &[Op]) -> Option<Vec<Result<(), Error>>> {
        macro_rules! stretch {
            ($map:ident, $variant:ident, $value:expr) => {{
                let rows = ops.iter().map_while(|op| match op {
                    Op::$variant(key, Some(value)) => Some((*key, $value(value))),
                    _ => None,
                });
                let (keys, values): (Vec<_>, Vec<_>) = rows.unzip();
                return (keys.len() > 1).then(|| self.$map.set_all(&keys, &values));
            }};
        }
        match ops.first()? {
            Op::Ip(_, Some(_)) => stretch!(ip, Ip, |word: &CellWord| *word),
            Op::Bits(_, Some(_)) => stretch!(bits, Bits, |bits: &Bits| *bits),
            Op::Cell(_, Some(_)) => stretch!(cell, Cell, |entry: &CellEntry| *entry),
            Op::Prefix(_, Some(_)) => stretch!(prefix, Prefix, |word: &CellWord| *word),
            Op::Set(_, Some(_)) => stretch!(set, Set, |set: &SetEntry| *set),
            Op::Hits(_, Some(_)) => stretch!(hits, Hits, |start: &Start| self.begin(*start)),
            Op::Page(_, Some(_)) => stretch!(page, Page, |page: &PortPage| *page),
            _ => None,
        }
    }
}

impl PolicyDataplane for Bpf {
    type Error = Error;

    fn load_policy(&mut self) -> Result<PolicyTables, Error> {
        self.maps().policy.tables()
    }

    fn enforced(&mut self) -> Result<bool, Error> {
        let other = DeviceEntry::NETDEV | DeviceEntry::PLAIN | DeviceEntry::AUDITED;
        let rows = self.maps().device.read()?;
        Ok(rows.iter().any(|(_, entry)| entry.flags & other == 0 && entry.slot != 0))
    }

    fn apply_policy(&mut self, op: &Op) -> Result<(), Error> {
        self.maps().policy.apply(op)
    }

    fn apply_policies(&mut self, ops: &[Op]) -> (usize, Option<Error>) {
        let maps = &self.maps().policy;
        let mut done = 0;
        while let Some(rest) = ops.get(done..).filter(|rest| !rest.is_empty()) {
            let results = maps.apply_stretch(rest);
            let results = results.unwrap_or_else(|| rest.iter().take(1).map(|op| maps.apply(op)).collect());
            for result in results {
                if let Err(error) = result {
                    return (done, Some(error));
                }
                done += 1;
            }
        }
        (done, None)
    }
}
