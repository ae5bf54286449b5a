//! The decision on maps made by hand: what no compiler makes yet, and what none should.

extern crate std;

use core::cell::Cell;
use core::net::Ipv4Addr;

use proxy_abi::policy::{Bits, BitsKey, BlockEntry, CellWord, Direction, PortPage, RuleRef, SetEntry, SlotWord};
use proxy_abi::{IpBytes, PortBe, Proto};

use super::{Cause, Judgement, Lookup, Question, judge, revision};

/// Slot 1 has block 3; sets are numbered by their place.
struct Maps {
    epochs: std::vec::Vec<u32>,
    asked: Cell<usize>,
    block: BlockEntry,
    sets: std::vec::Vec<SetEntry>,
}

/// A set with one rule for everybody, at this bit.
fn rule(bit: usize, accept: bool, deny: bool) -> SetEntry {
    let mut set = SetEntry::EMPTY;
    set.any_pod.set(bit);
    set.any_address.set(bit);
    set.any_port.set(bit);
    if accept {
        set.accept.set(bit);
    }
    if deny {
        set.deny.set(bit);
    }
    set
}

impl Lookup for Maps {
    fn epoch(&self) -> u32 {
        let asked = self.asked.get();
        self.asked.set(asked + 1);
        self.epochs.get(asked).or(self.epochs.last()).copied().unwrap_or(0)
    }

    fn slot(&self, index: u32) -> Option<SlotWord> {
        let known = index == SlotWord::index(1, 0) || index == SlotWord::index(1, 1);
        Some(if known { SlotWord { block: 3, revision: 7 } } else { SlotWord { block: 0, revision: 0 } })
    }

    fn block(&self, block: u32) -> Option<&BlockEntry> {
        (block == 3).then_some(&self.block)
    }

    fn set(&self, set: u32) -> Option<&SetEntry> {
        self.sets.get(set as usize)
    }

    fn ip(&self, _: &IpBytes) -> Option<CellWord> {
        None
    }

    fn prefix(&self, _: &IpBytes) -> Option<CellWord> {
        None
    }

    fn page(&self, _: u32) -> Option<&PortPage> {
        None
    }

    fn bits(&self, _: BitsKey) -> Option<&Bits> {
        None
    }
}

fn question(flags: u8) -> Question {
    Question {
        slot: 1,
        direction: Direction::Ingress,
        peer: Ipv4Addr::new(10, 0, 0, 1).into(),
        proto: Proto::TCP,
        port: PortBe::new(80),
        flags,
    }
}

fn ask(ingress: [u32; 3], sets: &[SetEntry], flags: u8) -> Judgement {
    let block = BlockEntry { ingress, ..BlockEntry::OPEN };
    let maps = Maps { epochs: std::vec![4], asked: Cell::new(0), block, sets: sets.into() };
    judge(&maps, &question(flags))
}

#[test]
fn tiers_are_judged_in_their_order() {
    let (accept, deny, pass) = (rule(65, true, false), rule(66, false, true), rule(67, false, false));
    let sets = [SetEntry::EMPTY, accept, deny, pass, SetEntry::EMPTY];
    let told = |tiers, flags| {
        let Judgement { allowed, cause, rule, .. } = ask(tiers, &sets, flags);
        (allowed, cause, rule)
    };
    let cases = [
        ([0, 0, 0], 0, (true, Cause::Open, RuleRef::NONE)),
        ([1, 4, 2], 0, (true, Cause::Rule, RuleRef::rule(1, 65))),
        ([2, 1, 1], 0, (false, Cause::Rule, RuleRef::rule(2, 66))),
        ([3, 1, 2], 0, (true, Cause::Rule, RuleRef::rule(1, 65))),
        ([3, 4, 1], 0, (false, Cause::Isolated, RuleRef::isolated(4))),
        ([4, 0, 2], 0, (false, Cause::Rule, RuleRef::rule(2, 66))),
        ([3, 0, 4], 0, (true, Cause::Open, RuleRef::NONE)),
        // A pod that reaches itself is judged by the tiers around NetworkPolicy alone.
        ([3, 4, 1], Question::HAIRPIN, (true, Cause::Rule, RuleRef::rule(1, 65))),
        ([2, 1, 0], Question::HAIRPIN, (false, Cause::Rule, RuleRef::rule(2, 66))),
        ([2, 4, 2], Question::FROM_NODE, (true, Cause::LocalNode, RuleRef::NONE)),
    ];
    for (tiers, flags, expected) in cases {
        assert_eq!(told(tiers, flags), expected, "{tiers:?} {flags}");
    }
}

#[test]
fn sets_hang_together_and_end() {
    let next = |next| SetEntry { next, ..SetEntry::EMPTY };
    let cause = |sets: &[SetEntry]| ask([0, 1, 0], sets, 0).cause;
    assert_eq!(cause(&[SetEntry::EMPTY, next(2), next(3), rule(0, true, false)]), Cause::Rule);
    assert_eq!(cause(&[SetEntry::EMPTY, next(2), SetEntry::EMPTY]), Cause::Isolated);
    assert_eq!(cause(&[SetEntry::EMPTY, next(1)]), Cause::Broken, "a ring");
    assert_eq!(cause(&[SetEntry::EMPTY, next(9)]), Cause::Broken, "a set that is not there");
}

#[test]
fn what_is_not_known_does_not_pass() {
    let mut maps = Maps { epochs: std::vec![4], asked: Cell::new(0), block: BlockEntry::OPEN, sets: std::vec![] };
    assert_eq!(judge(&maps, &Question { slot: 2, ..question(0) }).cause, Cause::Unready);
    assert_eq!(judge(&maps, &Question { slot: 2, ..question(Question::FROM_NODE) }).cause, Cause::LocalNode);
    let away = Question { direction: Direction::Egress, slot: 2, ..question(Question::FROM_NODE) };
    assert_eq!(judge(&maps, &away).cause, Cause::Unready, "what a pod sends is not the node's");
    assert_eq!((revision(&maps, 1), revision(&maps, 2)), (7, 0));
    maps.block.flags = BlockEntry::LOCKED;
    assert!(judge(&maps, &question(Question::FROM_NODE)).allowed);
    assert_eq!(judge(&maps, &question(0)).cause, Cause::Locked);
}

#[test]
fn a_flow_is_judged_again_when_the_policy_moves_meanwhile() {
    let moving = |epochs: &[u32]| {
        let maps = Maps { epochs: epochs.into(), asked: Cell::new(0), block: BlockEntry::OPEN, sets: std::vec![] };
        judge(&maps, &question(0)).cause
    };
    assert_eq!(moving(&[4, 5, 5]), Cause::Open);
    assert_eq!(moving(&[4, 5, 5, 6]), Cause::Moving);
}

#[test]
fn the_shadow_says_what_audited_policies_would() {
    let sets = [SetEntry::EMPTY, rule(0, true, false), SetEntry::EMPTY, rule(5, true, false)];
    let told = |own: [u32; 3], beside: [u32; 3], flags| {
        let block = BlockEntry { ingress: own, shadow: if beside == [0; 3] { 0 } else { 3 }, ..BlockEntry::OPEN };
        let shadow = BlockEntry { ingress: beside, ..BlockEntry::OPEN };
        let maps =
            Beside { maps: Maps { epochs: std::vec![4], asked: Cell::new(0), block, sets: sets.into() }, shadow };
        let Judgement { allowed, cause, rule, .. } = judge(&maps, &question(flags));
        (allowed, cause, rule)
    };
    let none = RuleRef::NONE;
    let cases = [
        // What is enforced knows nothing of the shadow.
        ([0, 0, 0], [0, 2, 0], 0, (true, Cause::Open, none)),
        ([0, 1, 0], [0, 2, 0], 0, (true, Cause::Rule, RuleRef::rule(1, 0))),
        ([0, 0, 0], [0, 2, 0], Question::SHADOW, (false, Cause::Isolated, RuleRef::isolated(2))),
        ([0, 2, 0], [0, 3, 0], Question::SHADOW, (true, Cause::Rule, RuleRef::rule(3, 5))),
        // There is none.
        ([0, 2, 0], [0, 0, 0], Question::SHADOW, (true, Cause::Open, none)),
        ([0, 0, 0], [0, 2, 0], Question::SHADOW | Question::HAIRPIN, (true, Cause::Open, none)),
        ([0, 0, 0], [0, 2, 0], Question::SHADOW | Question::FROM_NODE, (true, Cause::LocalNode, none)),
    ];
    for (own, beside, flags, expected) in cases {
        assert_eq!(told(own, beside, flags), expected, "{own:?} {beside:?} {flags}");
    }
}

/// The same maps, where slot 1's block 4 is as given and block 3 stands beside it.
struct Beside {
    maps: Maps,
    shadow: BlockEntry,
}

impl Lookup for Beside {
    fn epoch(&self) -> u32 {
        self.maps.epoch()
    }

    fn slot(&self, index: u32) -> Option<SlotWord> {
        let SlotWord { block, revision } = self.maps.slot(index)?;
        Some(SlotWord { block: if block == 3 { 4 } else { block }, revision })
    }

    fn block(&self, block: u32) -> Option<&BlockEntry> {
        match block {
            4 => Some(&self.maps.block),
            3 => Some(&self.shadow),
            _ => None,
        }
    }

    fn set(&self, set: u32) -> Option<&SetEntry> {
        self.maps.set(set)
    }

    fn ip(&self, ip: &IpBytes) -> Option<CellWord> {
        self.maps.ip(ip)
    }

    fn prefix(&self, ip: &IpBytes) -> Option<CellWord> {
        self.maps.prefix(ip)
    }

    fn page(&self, index: u32) -> Option<&PortPage> {
        self.maps.page(index)
    }

    fn bits(&self, key: BitsKey) -> Option<&Bits> {
        self.maps.bits(key)
    }
}
