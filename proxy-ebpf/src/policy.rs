//! The verdict of network policy on one side of a new flow. The maps are drawn in `proxy_abi::policy`.
//!
//! ```text
//!   look-ups         epoch 2, slot 1, block 1, address 1 (a prefix when it is no pod's), page 1
//!   and for a tier   set 1, bits 2; again for each further 256 rules, at most [`MAX_CHAIN`] times
//! ```
//!
//! The number of policies, pods and port ranges is not in there.

use proxy_abi::policy::{Bits, BitsKey, BlockEntry, CellWord, MAX_CHAIN, PortPage, RuleRef, SetEntry, SlotWord};
use proxy_abi::policy::{Direction, cell, tier};
use proxy_abi::{IpBytes, PortBe, Proto};

/// The maps. `None` where there is no entry; an array has one for every index below its size.
pub trait Lookup {
    /// `policy_epoch`. Read from memory each time.
    fn epoch(&self) -> u32;
    /// `policy_slot`.
    fn slot(&self, index: u32) -> Option<SlotWord>;
    /// `policy_block`.
    fn block(&self, block: u32) -> Option<&BlockEntry>;
    /// `policy_set`.
    fn set(&self, set: u32) -> Option<&SetEntry>;
    /// `policy_ip`.
    fn ip(&self, ip: &IpBytes) -> Option<CellWord>;
    /// `policy_prefix`, longest match.
    fn prefix(&self, ip: &IpBytes) -> Option<CellWord>;
    /// `policy_page`.
    fn page(&self, index: u32) -> Option<&PortPage>;
    /// `policy_bits`.
    fn bits(&self, key: BitsKey) -> Option<&Bits>;

    /// The block that stands beside another one; 0 = none. In the kernel a function of which the verifier forgets how it
    /// came to its answer.
    fn shadow(&self, block: u32) -> u32 {
        self.block(block).map_or(0, |block| block.shadow)
    }

    /// [`peer_cell`], which in the kernel is a function with a stack of its own.
    fn peer_cell(&self, ip: &IpBytes, side: u32) -> u32 {
        peer_cell(self, ip, side)
    }

    /// [`judge_set`], which in the kernel is a function that the verifier looks at once, for all its callers.
    fn judge_set(&self, first: u32, peer: u32, port: u32) -> Found {
        judge_set(self, first, peer, port)
    }
}

/// One side of a flow, in the direction of its initiator, after translation of Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Question {
    /// The pod whose policy is asked.
    pub slot: u16,
    /// Whether the pod is the initiator.
    pub direction: Direction,
    /// The other end.
    pub peer: IpBytes,
    /// Protocol.
    pub proto: Proto,
    /// Destination port, whichever end the pod is.
    pub port: PortBe,
    /// [`Question::FROM_NODE`] and others.
    pub flags: u8,
}

impl Question {
    /// The node itself began the flow: never refused at a pod of its own.
    pub const FROM_NODE: u8 = 1;
    /// The pod reaches itself through a Service: no matter of NetworkPolicy.
    pub const HAIRPIN: u8 = 2;
    /// The port is not known (a fragment whose first part was not seen): rules with ports do not match.
    pub const NO_PORT: u8 = 4;
    /// Asked of a flow that the pod's own policies allow: would it be allowed if those that are only audited were enforced?
    pub const SHADOW: u8 = 8;
}

/// Why a flow may pass or not.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Cause {
    /// No policy has a say.
    Open,
    /// It comes from the pod's own node.
    LocalNode,
    /// A rule says so.
    Rule,
    /// Policies isolate the pod and no rule of theirs matches.
    Isolated,
    /// The pod's policy does not fit into the maps.
    Locked,
    /// The pod's policy is not there yet: nothing passes but what its node begins.
    Unready,
    /// A map names what is not there.
    Broken,
    /// The policy changed twice while it was asked.
    Moving,
}

/// The answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// May it pass?
    pub allowed: bool,
    /// Why.
    pub cause: Cause,
    /// Revision of the pod's policy: the answer holds as long as it is the same.
    pub revision: u32,
    /// The rule, or the set in which none matched.
    pub rule: RuleRef,
    /// Cell of the peer's address.
    pub peer: u32,
    /// Cell of the port.
    pub port: u32,
}

impl Judgement {
    const fn of(allowed: bool, cause: Cause, revision: u32) -> Self {
        Self { allowed, cause, revision, rule: RuleRef::NONE, peer: cell::NONE, port: cell::NONE }
    }
}

/// How often a flow is judged when the policy changes meanwhile.
const TRIES: u32 = 2;

/// Judges one side of a new flow.
#[inline(always)]
pub fn judge<L: Lookup + ?Sized>(maps: &L, question: &Question) -> Judgement {
    let mut tries = 0;
    while tries < TRIES {
        let epoch = maps.epoch();
        let judgement = judge_on(maps, question, epoch & 1);
        if maps.epoch() == epoch {
            return judgement;
        }
        tries += 1;
    }
    Judgement::of(false, Cause::Moving, 0)
}

/// The revision that a stamp must have to hold.
#[inline(always)]
pub fn revision<L: Lookup + ?Sized>(maps: &L, slot: u16) -> u32 {
    match maps.slot(SlotWord::index(slot, maps.epoch())) {
        Some(word) => word.revision,
        None => 0,
    }
}

#[inline(always)]
fn judge_on<L: Lookup + ?Sized>(maps: &L, question: &Question, side: u32) -> Judgement {
    let word = maps.slot(SlotWord::index(question.slot, side)).unwrap_or(SlotWord { block: 0, revision: 0 });
    let mut judgement = Judgement::of(true, Cause::Open, word.revision);
    if question.flags & Question::FROM_NODE != 0 && matches!(question.direction, Direction::Ingress) {
        judgement.cause = Cause::LocalNode;
        return judgement;
    }
    if word.block == 0 {
        return Judgement::of(false, Cause::Unready, word.revision);
    }
    let mut id = word.block;
    if question.flags & Question::SHADOW != 0 {
        id = maps.shadow(id);
        if id == 0 {
            return judgement;
        }
    }
    let Some(block) = maps.block(id) else {
        return Judgement::of(false, Cause::Broken, word.revision);
    };
    if block.flags & BlockEntry::LOCKED != 0 {
        return Judgement::of(false, Cause::Locked, word.revision);
    }
    let sets = match question.direction {
        Direction::Ingress => &block.ingress,
        Direction::Egress => &block.egress,
    };
    if sets[0] | sets[1] | sets[2] == 0 {
        return judgement;
    }
    judgement.peer = maps.peer_cell(&question.peer, side);
    judgement.port = port_cell(maps, question, side);
    let mut tier = 0;
    while tier < tier::COUNT {
        let set = sets[tier];
        let skipped = tier == tier::NETWORK_POLICY && question.flags & Question::HAIRPIN != 0;
        if set != 0 && !skipped {
            match maps.judge_set(set, judgement.peer, judgement.port) {
                Found::Accept(rule) => {
                    (judgement.rule, judgement.cause) = (rule, Cause::Rule);
                    return judgement;
                }
                Found::Deny(rule) => {
                    (judgement.allowed, judgement.rule, judgement.cause) = (false, rule, Cause::Rule);
                    return judgement;
                }
                Found::Nothing if tier == tier::NETWORK_POLICY => {
                    (judgement.allowed, judgement.rule) = (false, RuleRef::isolated(set));
                    judgement.cause = Cause::Isolated;
                    return judgement;
                }
                Found::Nothing | Found::Pass => {}
                Found::Broken => return Judgement::of(false, Cause::Broken, word.revision),
            }
        }
        tier += 1;
    }
    judgement
}

/// The cell of an address.
#[inline(always)]
pub fn peer_cell<L: Lookup + ?Sized>(maps: &L, ip: &IpBytes, side: u32) -> u32 {
    if let Some(word) = maps.ip(ip) {
        let cell = word.side(side);
        if cell != cell::NONE {
            return cell;
        }
    }
    match maps.prefix(ip) {
        Some(word) => word.side(side),
        None => cell::NONE,
    }
}

/// The cell of a port.
#[inline(always)]
fn port_cell<L: Lookup + ?Sized>(maps: &L, question: &Question, side: u32) -> u32 {
    if question.flags & Question::NO_PORT != 0 {
        return cell::NONE;
    }
    let port = question.port.get();
    let Some(index) = PortPage::index(question.proto, port, side) else { return cell::NONE };
    match maps.page(index) {
        Some(page) => match page.cells[(port & 0xff) as usize] {
            0 => cell::NONE,
            number => cell::PORT | u32::from(number),
        },
        None => cell::NONE,
    }
}

/// What a set says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// The first rule that matches accepts.
    Accept(RuleRef),
    /// It denies.
    Deny(RuleRef),
    /// It leaves the matter to the next tier.
    Pass,
    /// No rule matches.
    Nothing,
    /// The set, or one that hangs on it, is not there.
    Broken,
}

impl Found {
    /// As one number: all that a function in the kernel can return.
    #[inline(always)]
    pub const fn pack(self) -> u64 {
        match self {
            Self::Accept(rule) => (rule.0 as u64) << 32 | 1,
            Self::Deny(rule) => (rule.0 as u64) << 32 | 2,
            Self::Pass => 3,
            Self::Nothing => 4,
            Self::Broken => 0,
        }
    }

    /// From that number.
    #[inline(always)]
    pub const fn unpack(packed: u64) -> Self {
        let rule = RuleRef((packed >> 32) as u32);
        match packed & 7 {
            1 => Self::Accept(rule),
            2 => Self::Deny(rule),
            3 => Self::Pass,
            4 => Self::Nothing,
            _ => Self::Broken,
        }
    }
}

/// What a set and those that hang on it say of the cells of a peer's address and of a port.
#[inline(always)]
pub fn judge_set<L: Lookup + ?Sized>(maps: &L, first: u32, peer: u32, port: u32) -> Found {
    let mut id = first;
    let mut length = 0;
    while length < MAX_CHAIN {
        let Some(set) = maps.set(id) else { return Found::Broken };
        let everyone = if peer & cell::POD != 0 { &set.any_pod } else { &set.any_address };
        let peers = maps.bits(BitsKey { set: id, cell: peer }).unwrap_or(everyone);
        let ports = maps.bits(BitsKey { set: id, cell: port }).unwrap_or(&set.any_port);
        let mut word = 0;
        while word < 4 {
            let matching = peers.words[word] & ports.words[word];
            if matching != 0 {
                let lowest = matching & matching.wrapping_neg();
                let rule = RuleRef::rule(id, word as u32 * 64 + matching.trailing_zeros());
                return if set.accept.words[word] & lowest != 0 {
                    Found::Accept(rule)
                } else if set.deny.words[word] & lowest != 0 {
                    Found::Deny(rule)
                } else {
                    Found::Pass
                };
            }
            word += 1;
        }
        if set.next == 0 {
            return Found::Nothing;
        }
        id = set.next;
        length += 1;
    }
    Found::Broken
}

#[cfg(test)]
#[path = "policy_tests.rs"]
mod tests;
