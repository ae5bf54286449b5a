//! Network policy: who may reach a pod, and whom a pod may reach.
//!
//! ```text
//!   policy_epoch  ARRAY     0               4   u32        4   its lowest bit says which side of every word counts
//!   policy_slot   ARRAY     slot × 2 + side 4   SlotWord   8   a pod of this node → block, revision
//!   policy_pod    HASH      slot            4   PodDigest 16   whose slot it is, so that it survives the agent
//!   policy_block  ARRAY     block           4   BlockEntry 32  the sets of a pod, by direction and tier
//!   policy_set    ARRAY     set             4   SetEntry 184   up to 256 rules
//!   policy_ip     HASH      IpBytes        16   CellWord   8   address of a pod → cell
//!   policy_prefix LPM_TRIE  PrefixKey      24   CellWord   8   any other address → cell; the scope is the family
//!   policy_page   ARRAY     page            4   PortPage 512   port → cell, 256 ports to a page
//!   policy_cell   HASH      cell            4   CellEntry 16   what a cell is, so that it survives the agent
//!   policy_bits   HASH      BitsKey         8   Bits      32   rules of a set that match a cell
//!   policy_hits   HASH      RuleRef         4   HitsEntry 16   how often a rule decided
//!   policy_pod_hits ARRAY   slot            4   PodHits   32   what was refused to a pod, and what would have been
//! ```
//!
//! A **cell** is a class of addresses, or of ports, that no rule tells apart. A rule matches a packet when it matches
//! both the cell of the peer's address and the cell of the destination port: two bit strings and one AND, however many
//! rules there are.
//!
//! ```text
//!   epoch ──▶ side                 slot ──▶ block ──▶ set of a tier ─┐
//!   peer's address ──▶ cell a (policy_ip, else policy_prefix)        ├─▶ bits(set, a) AND bits(set, p) ──▶ first rule
//!   destination port ──▶ cell p (policy_page)                        ┘
//! ```
//!
//! Every word that changes (slots, cells of addresses, pages) has two sides. A change writes the side that does not
//! count, then `policy_epoch`, then the other side: all flows of the node go from the old policy to the new one in one
//! store, and no program ever sees a mixture. A program that finds the epoch moved while it was judging judges again.
//!
//! **Hits.** Each judgement of a flow adds one to the row of the rule that decided, or of the set in which none matched: a
//! new flow, one that is judged anew, and each packet of what is refused, which leaves no flow. Packets of a flow whose
//! stamp holds count nothing. A rule only ever accepts or only ever denies (`SetEntry::accept`, `deny`), so one number for
//! each is enough. The agent makes a set's rows before anything can reach the set, and removes them with it: a number that
//! is given away again begins at 0. A rule without a row is not counted.
//!
//! **Shadow.** A block may name another one, [`BlockEntry::shadow`]: what the pod's policies would be with those that are
//! only audited. It is asked of a flow that the block allows; what it refuses passes, and is counted.

use crate::{IpBytes, PrefixKey, Proto};

abi! {
    /// The policy of a pod. All zero: not known yet, so nothing passes.
    pub struct SlotWord [8] {
        /// Index in `policy_block`; 0 = none.
        pub block: u32,
        /// The epoch since which this pod's verdicts are as they are: a flow judged under another one is judged again.
        pub revision: u32,
    }

    /// The sets of one or more pods. Never changes while a slot names it.
    pub struct BlockEntry [32] {
        /// What may reach the pod, by tier: [`tier`]; 0 = no policy of that tier.
        pub ingress: [u32; 3],
        /// What the pod may reach, by tier.
        pub egress: [u32; 3],
        /// [`BlockEntry::LOCKED`].
        pub flags: u32,
        /// Block that is judged beside this one without effect: with the policies that are only audited; 0 = none.
        pub shadow: u32,
    }

    /// 256 bits, one for each rule of a set; rule 0 is the lowest bit of the first word.
    pub struct Bits [32] {
        /// The words.
        pub words: [u64; 4],
    }

    /// Rules of one tier and direction. Never changes while a block names it.
    pub struct SetEntry [184] {
        /// Rules that match every pod: they count for a pod's cell without an entry in `policy_bits`.
        pub any_pod: Bits,
        /// Rules that match every address.
        pub any_address: Bits,
        /// Rules that match every protocol and port.
        pub any_port: Bits,
        /// Rules that accept.
        pub accept: Bits,
        /// Rules that deny. Those that neither accept nor deny pass the packet to the next tier.
        pub deny: Bits,
        /// Digest of what the rules are, so that the agent finds the set again.
        pub digest: [u64; 2],
        /// The set with the rules after these; 0 = there are no more.
        pub next: u32,
        /// 0.
        pub reserved: u32,
    }

    /// The cell of an address on each side of the epoch.
    pub struct CellWord [8] {
        /// By side; [`cell::NONE`] in `policy_ip` = ask `policy_prefix`.
        pub cell: [u32; 2],
    }

    /// The cells of 256 ports: number without [`cell::PORT`], 0 = no rule names the port.
    pub struct PortPage [512] {
        /// By the low byte of the port.
        pub cells: [u16; 256],
    }

    /// Digest of what a cell matches.
    pub struct CellEntry [16] {
        /// Digest.
        pub digest: [u64; 2],
    }

    /// Digest of a pod's UID.
    pub struct PodDigest [16] {
        /// Digest.
        pub digest: [u64; 2],
    }

    /// What a rule decided, or a set in which no rule matched. Programs add to it, on any CPU.
    pub struct HitsEntry [16] {
        /// Judgements.
        pub count: u64,
        /// When counting began, in seconds since 1970.
        pub since: u64,
    }

    /// Judgements of a pod's flows that did not simply pass, since the pod has its slot. Programs add to it, on any CPU.
    pub struct PodHits [32] {
        /// Refused by a rule, or because none matched: towards the pod, and from it.
        pub refused: [u64; 2],
        /// Passed, and would have been refused if audited policies were enforced: towards the pod, and from it.
        pub audited: [u64; 2],
    }

    /// A cell, as seen by a set.
    pub struct BitsKey [8] {
        /// Index in `policy_set`.
        pub set: u32,
        /// Cell.
        pub cell: u32,
    }
}

/// The order of tiers; indices into [`BlockEntry::ingress`].
pub mod tier {
    /// Policies of the cluster's administrator, judged first.
    pub const ADMIN: usize = 0;
    /// NetworkPolicy objects. A set, even an empty one, isolates.
    pub const NETWORK_POLICY: usize = 1;
    /// What holds for pods that no NetworkPolicy isolates.
    pub const BASELINE: usize = 2;
    /// How many there are.
    pub const COUNT: usize = 3;
}

/// Which way, as the pod sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    /// The flow was begun towards the pod.
    Ingress,
    /// The flow was begun by the pod.
    Egress,
}

/// Numbers of cells.
pub mod cell {
    /// An address or port that no rule names.
    pub const NONE: u32 = 0;
    /// Set in the cells of pods' addresses.
    pub const POD: u32 = 1 << 31;
    /// Set in the cells of ports.
    pub const PORT: u32 = 1 << 30;
    /// A pod that no rule names.
    pub const ANY_POD: u32 = POD;
}

/// `policy_page` has this many pages on each side: 256 for each protocol with ports.
pub const PAGES: u32 = 3 * 256;

/// Sets that may hang together by [`SetEntry::next`].
pub const MAX_CHAIN: u32 = 4;

/// Which protocols have ports in `policy_page`, in its order.
pub const PORT_PROTOCOLS: [Proto; 3] = [Proto::TCP, Proto::UDP, Proto::SCTP];

impl SlotWord {
    /// Index in `policy_slot`.
    #[inline(always)]
    pub const fn index(slot: u16, side: u32) -> u32 {
        (slot as u32) << 1 | side & 1
    }
}

impl BlockEntry {
    /// Index of the block of pods that no policy selects: everything passes.
    pub const OPEN_ID: u32 = 1;
    /// Index of the block of pods whose policy does not fit: nothing passes but the node itself.
    pub const LOCKED_ID: u32 = 2;
    /// Nothing passes but the node itself.
    pub const LOCKED: u32 = 1;
    /// No policy.
    pub const OPEN: Self = Self { ingress: [0; 3], egress: [0; 3], flags: 0, shadow: 0 };
}

impl HitsEntry {
    /// Nothing yet.
    pub const ZERO: Self = Self { count: 0, since: 0 };
}

impl PodHits {
    /// Nothing yet.
    pub const ZERO: Self = Self { refused: [0; 2], audited: [0; 2] };
}

impl SetEntry {
    /// No rule.
    pub const EMPTY: Self = Self {
        any_pod: Bits::ZERO,
        any_address: Bits::ZERO,
        any_port: Bits::ZERO,
        accept: Bits::ZERO,
        deny: Bits::ZERO,
        digest: [0; 2],
        next: 0,
        reserved: 0,
    };
}

impl Bits {
    /// How many.
    pub const COUNT: usize = 256;
    /// No bit.
    pub const ZERO: Self = Self { words: [0; 4] };

    /// Sets a bit; one past the end is no bit.
    pub const fn set(&mut self, bit: usize) {
        if bit < Self::COUNT {
            self.words[bit >> 6] |= 1 << (bit & 63);
        }
    }

    /// The bits of both.
    #[must_use]
    pub const fn or(self, other: Self) -> Self {
        let (a, b) = (self.words, other.words);
        Self { words: [a[0] | b[0], a[1] | b[1], a[2] | b[2], a[3] | b[3]] }
    }

    /// The bits in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        let (a, b) = (self.words, other.words);
        Self { words: [a[0] & b[0], a[1] & b[1], a[2] & b[2], a[3] & b[3]] }
    }

    /// Is the bit set?
    pub const fn has(self, bit: usize) -> bool {
        bit < Self::COUNT && self.words[bit >> 6] >> (bit & 63) & 1 == 1
    }
}

impl CellWord {
    /// On one side.
    #[inline(always)]
    pub const fn side(self, side: u32) -> u32 {
        if side & 1 == 0 { self.cell[0] } else { self.cell[1] }
    }
}

impl PortPage {
    /// No rule names any of these ports.
    pub const ZERO: Self = Self { cells: [0; 256] };

    /// Index in `policy_page`; `None` for a protocol that has no ports there.
    #[inline(always)]
    pub const fn index(proto: Proto, port: u16, side: u32) -> Option<u32> {
        let protocol = match proto {
            Proto::TCP => 0,
            Proto::UDP => 1,
            Proto::SCTP => 2,
            _ => return None,
        };
        Some((side & 1) * PAGES + protocol * 256 + (port >> 8) as u32)
    }
}

/// The key of a single address in `policy_prefix`.
#[inline(always)]
pub const fn prefix_of(ip: IpBytes) -> PrefixKey {
    PrefixKey::exact(ip.family() as u32, ip)
}

/// A rule, as a flow remembers it: the set and the rule's place in it.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RuleRef(pub u32);

impl RuleRef {
    /// No rule: no policy selects the pod, or the packet is the node's own.
    pub const NONE: Self = Self(0);
    const ISOLATED: u32 = 1 << 31;

    /// Rule `bit` of a set.
    #[inline(always)]
    pub const fn rule(set: u32, bit: u32) -> Self {
        Self((set & 0x007f_ffff) << 8 | bit & 0xff)
    }

    /// No rule of a set whose policies isolate the pod.
    #[inline(always)]
    pub const fn isolated(set: u32) -> Self {
        Self(Self::ISOLATED | (set & 0x007f_ffff) << 8)
    }

    /// Did the set deny because none of its rules matched?
    pub const fn is_isolated(self) -> bool {
        self.0 & Self::ISOLATED != 0
    }

    /// The set; 0 = none.
    pub const fn set(self) -> u32 {
        self.0 >> 8 & 0x007f_ffff
    }

    /// The rule's place in it.
    pub const fn bit(self) -> u32 {
        self.0 & 0xff
    }
}

/// Names of the pinned maps.
pub mod map {
    /// Epoch.
    pub const EPOCH: &str = "policy_epoch";
    /// Slot and side → block.
    pub const SLOT: &str = "policy_slot";
    /// Slot → pod.
    pub const POD: &str = "policy_pod";
    /// Block → sets.
    pub const BLOCK: &str = "policy_block";
    /// Set → rules.
    pub const SET: &str = "policy_set";
    /// Pod address → cell.
    pub const IP: &str = "policy_ip";
    /// Other address → cell.
    pub const PREFIX: &str = "policy_prefix";
    /// Port → cell.
    pub const PAGE: &str = "policy_page";
    /// Cell → what it is.
    pub const CELL: &str = "policy_cell";
    /// Set and cell → rules that match.
    pub const BITS: &str = "policy_bits";
    /// Rule → how often it decided.
    pub const HITS: &str = "policy_hits";
    /// Slot → what was refused.
    pub const POD_HITS: &str = "policy_pod_hits";
}

/// Default capacities, in entries. Idle, these maps take about 8 MiB: computed from their buckets and arrays.
pub mod capacity {
    /// Pods of this node: `policy_slot` has two words for each.
    pub const SLOT: u32 = 1_024;
    /// Different combinations of sets.
    pub const BLOCK: u32 = 4_096;
    /// Sets.
    pub const SET: u32 = 8_192;
    /// Addresses of pods of the cluster.
    pub const IP: u32 = 131_072;
    /// Address ranges.
    pub const PREFIX: u32 = 65_536;
    /// Cells of addresses and ports.
    pub const CELL: u32 = 65_536;
    /// Rules by set and cell.
    pub const BITS: u32 = 131_072;
    /// Rules that are counted.
    pub const HITS: u32 = 32_768;
}
