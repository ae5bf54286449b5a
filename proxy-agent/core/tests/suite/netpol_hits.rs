//! What is counted, and what is only audited: rows of rules over changes, reuse of numbers and restarts.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::policy::Direction;
use proxy_abi::policy::{BlockEntry, HitsEntry, RuleRef};
use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::{Engine, Limits, LockCause};
use proxy_core::netpol::hits::Hits;
use proxy_core::netpol::reconcile::Regime;
use proxy_core::netpol::rules::Origin;
use proxy_core::netpol::spec::{Change, PolicySpec};
use proxy_core::netpol::tables::{Op, PolicyTables, Start};
use proxy_oracle::dice::NODE;

use crate::netpol_maps::Node;
use crate::netpol_reconcile::{Stage, isolate, name, two_pods};

fn audited(change: Change) -> Change {
    match change {
        Change::Policy(spec) => Change::Policy(PolicySpec { audit: Some("true".into()), ..spec }),
        other => other,
    }
}

/// A second policy for a pod.
fn also(change: Change, called: &str) -> Change {
    match change {
        Change::Policy(spec) => Change::Policy(PolicySpec { name: name(called), ..spec }),
        other => other,
    }
}

/// How the rows of rules change, by the rule's set and place; `None` in place of the place: no rule matched.
fn counted(ops: &[Op]) -> Vec<(u32, Option<u32>, Option<Start>)> {
    let of = |op: &Op| match op {
        Op::Hits(rule, start) => {
            let rule = RuleRef(*rule);
            Some((rule.set(), (!rule.is_isolated()).then(|| rule.bit()), *start))
        }
        _ => None,
    };
    ops.iter().filter_map(of).collect()
}

fn change(node: &mut Node, changes: impl IntoIterator<Item = Change>) -> Vec<Op> {
    node.change(changes).ops().cloned().collect()
}

#[test]
fn rows_come_with_their_set_and_go_with_it() {
    let mut node = Node::new(Limits::default());
    let ranges = [("10.0.0.0/8", 80), ("10.0.0.0/8", 81)];
    let ops = change(&mut node, two_pods().into_iter().chain([isolate("a", &ranges)]));
    let zero = Some(Start::Zero);
    assert_eq!(counted(&ops), [(1, Some(0), zero), (1, Some(1), zero), (1, None, zero)]);
    let place = |wanted: fn(&Op) -> bool| ops.iter().position(wanted);
    let (row, set) = (place(|op| matches!(op, Op::Hits(..))), place(|op| matches!(op, Op::Set(..))));
    assert!(row < set, "a row is there before what it counts: {ops:?}");
    // Another policy of the same pod: what a rule has counted goes along, and the new one begins at nothing. That no rule
    // matches says something else now.
    let ops = change(&mut node, [also(isolate("a", &[("11.0.0.0/8", 80)]), "more")]);
    let of = |bit| Some(Start::Of(RuleRef::rule(1, bit).0));
    let want = [
        (2, Some(0), of(0)),
        (2, Some(1), of(1)),
        (2, Some(2), zero),
        (2, None, zero),
        (1, Some(0), None),
        (1, Some(1), None),
        (1, None, None),
    ];
    assert_eq!(counted(&ops), want);
    // The second rule is another one now; that none matches is the same as before.
    let ops = change(&mut node, [isolate("a", &[("10.0.0.0/8", 80), ("10.0.0.0/8", 82)])]);
    let of_two = |bit| Some(Start::Of(RuleRef::rule(2, bit).0));
    let begun: Vec<_> = counted(&ops).into_iter().filter(|(_, _, start)| start.is_some()).collect();
    let nothing = Some(Start::Of(RuleRef::isolated(2).0));
    assert_eq!(begun, [(1, Some(0), of_two(0)), (1, Some(1), zero), (1, Some(2), of_two(2)), (1, None, nothing)]);
    // A number that is given away again begins at nothing, and at the end there is no row.
    change(&mut node, ["for-a", "more"].map(|policy| Change::PolicyGone(name(policy))));
    assert_eq!(node.maps.hits, BTreeSet::new());
    let ops = change(&mut node, [isolate("b", &[("10.0.0.0/8", 80)])]);
    assert_eq!(counted(&ops), [(1, Some(0), zero), (1, None, zero)]);
}

#[test]
fn a_restart_keeps_the_rows_and_makes_those_that_lack() {
    let objects: Vec<Change> = two_pods().into_iter().chain([isolate("a", &[("10.0.0.0/8", 80)])]).collect();
    let node = Node::with(objects.clone());
    let again = |maps| {
        let mut engine = Engine::new(NODE, Limits::default(), maps);
        objects.iter().cloned().for_each(|change| engine.apply(change));
        engine.commit().ops().cloned().collect::<Vec<_>>()
    };
    assert_eq!(again(node.maps.clone()), []);
    // From a version that did not count: nothing but the rows is written, and nothing is switched.
    let mut without = node.maps.clone();
    without.hits.clear();
    let zero = Some(Start::Zero);
    let rows = [Op::Hits(RuleRef::rule(1, 0).0, zero), Op::Hits(RuleRef::isolated(1).0, zero)];
    assert_eq!(again(without), rows);
}

#[test]
fn what_has_no_room_is_not_counted_and_holds_all_the_same() {
    let limits = Limits { hits: 2, ..Limits::default() };
    let mut node = Node::new(limits);
    let ops =
        change(&mut node, two_pods().into_iter().chain([isolate("a", &[("10.0.0.0/8", 80), ("11.0.0.0/8", 81)])]));
    assert_eq!(counted(&ops).len(), 2);
    assert!(node.engine.diagnostics().is_empty() && node.maps.sets.len() == 1, "{:?}", node.engine.diagnostics());
}

#[test]
fn counts_are_told_by_the_rules_as_written() {
    let node = Node::with(two_pods().into_iter().chain([
        isolate("a", &[("10.0.0.0/8", 80), ("11.0.0.0/8", 81)]),
        // The same rule in another policy: one bit for both.
        also(isolate("a", &[("11.0.0.0/8", 81)]), "same"),
        isolate("b", &[("10.0.0.0/8", 80)]),
        audited(also(isolate("b", &[("12.0.0.0/8", 82)]), "tried")),
    ]));
    let entry = |count, since| HitsEntry { count, since };
    let mut counts = BTreeMap::new();
    // Every row of every set in the maps, each with its own count.
    for (at, rule) in (1_u64..).zip(&node.maps.hits) {
        counts.insert(*rule, entry(at * at, 1_000 - at));
    }
    let report = node.engine.hits(&counts);
    let of = |policy: &str, rule| {
        report.rules.get(&(Direction::Ingress, Origin { policy: name(policy), rule })).map(|hits| hits.count)
    };
    let row = |set: u32, bit| counts[&RuleRef::rule(set, bit).0].count;
    let subject = |pod: &str| &node.engine.subjects()[&ObjectName::new("default", pod)];
    let (a, b) = (subject("a").sets[0].expect("a set"), subject("b").sets[0].expect("a set"));
    let tried = subject("b").shadow.expect("a shadow").sets[0].expect("a set");
    assert_eq!(
        [of("for-a", 0), of("for-a", 1), of("same", 0), of("for-b", 0), of("tried", 0), of("tried", 1)],
        [Some(row(a, 0)), Some(row(a, 1)), Some(row(a, 1)), Some(row(b, 0)), Some(row(tried, 1)), None]
    );
    let refused = |policy: &str| report.refused.get(&(Direction::Ingress, name(policy))).copied();
    let nothing = |set: u32| {
        let HitsEntry { count, since } = counts[&RuleRef::isolated(set).0];
        Some(Hits { count, since })
    };
    let found = ["for-a", "same", "for-b", "tried"].map(refused);
    assert_eq!(found, [nothing(a), nothing(a), nothing(b), nothing(tried)]);
}

#[test]
fn audited_policies_are_beside_and_in_nobodys_way() {
    let mut node = Node::with(two_pods().into_iter().chain([audited(isolate("a", &[]))]));
    let subject = |node: &Node, pod: &str| node.engine.subjects()[&name(pod)].clone();
    let a = subject(&node, "a");
    let shadow = a.shadow.expect("a shadow");
    let block = node.maps.blocks[&a.block];
    assert_eq!(block, BlockEntry { shadow: shadow.block, ..BlockEntry::OPEN }, "nothing is enforced");
    assert_eq!(node.maps.blocks[&shadow.block].ingress[1], shadow.sets[0].expect("a set"));
    assert_eq!((subject(&node, "b").block, subject(&node, "b").shadow), (BlockEntry::OPEN_ID, None));
    // Enforced, it is a policy like any; audited again, it is not; gone, nothing is left of it.
    node.change([isolate("a", &[])]);
    assert!(subject(&node, "a").shadow.is_none() && subject(&node, "a").sets[0].is_some());
    node.change([audited(isolate("a", &[]))]);
    assert!(subject(&node, "a").shadow.is_some() && subject(&node, "a").sets[0].is_none());
    node.change([Change::PolicyGone(name("for-a"))]);
    assert_eq!((node.maps.sets.len(), node.maps.blocks.len()), (0, 2));
    // Another value than true and false: told, and enforced.
    let odd = match isolate("a", &[]) {
        Change::Policy(spec) => Change::Policy(PolicySpec { audit: Some("yes".into()), ..spec }),
        other => other,
    };
    node.change([odd]);
    let told: Vec<_> = node.engine.diagnostics().iter().map(ToString::to_string).collect();
    let want = "metadata.annotations[proxy-agent.io/audit]";
    assert!(told.len() == 1 && told[0].contains(want) && told[0].contains("enforced"), "{told:?}");
    assert!(subject(&node, "a").sets[0].is_some());
}

/// What is enforced gets the last number of a set or block, whoever came first.
#[test]
fn audits_give_way() {
    let rules = [("10.0.0.0/8", 80), ("11.0.0.0/8", 81)];
    let tight = [
        (Limits { sets: 3, ..Limits::default() }, LockCause::Sets),
        (Limits { blocks: 5, ..Limits::default() }, LockCause::Blocks),
    ];
    for (limits, cause) in tight {
        let mut node = Node::new(limits);
        let tried = [audited(isolate("a", &[("12.0.0.0/8", 82)]))];
        node.change(two_pods().into_iter().chain(tried));
        let state = |node: &Node, pod: &str| {
            let subject = &node.engine.subjects()[&name(pod)];
            (subject.locked, subject.unaudited, subject.shadow.is_some())
        };
        assert_eq!(state(&node, "a"), (None, None, true), "{limits:?}");
        // Both pods get policies of their own.
        node.change([also(isolate("a", &rules), "own"), isolate("b", &[("13.0.0.0/8", 83)])]);
        // Numbers that went rest until the next commit here.
        node.change([]);
        node.change([]);
        let found = [state(&node, "a"), state(&node, "b")];
        assert_eq!(found, [(None, Some(cause), false), (None, None, false)], "{limits:?}");
        let told = node.engine.diagnostics();
        assert!(told.len() == 1 && told[0].problem.contains("audited"), "{limits:?}: {told:?}");
        node.change([Change::PolicyGone(name("for-b")), Change::PolicyGone(name("own"))]);
        node.change([]);
        node.change([]);
        assert_eq!(state(&node, "a"), (None, None, true), "{limits:?}: it heals");
    }
}

/// Who is locked in the end is the same as without the audited policy, however small a map is.
#[test]
fn audits_lock_nobody() {
    type Kind = (&'static str, fn(&mut Limits, u32), fn(&PolicyTables) -> usize);
    let kinds: [Kind; 4] = [
        ("ips", |limits, room| limits.ips = room, |tables| tables.ips.len()),
        ("prefixes", |limits, room| limits.prefixes = room, |tables| tables.prefixes.len()),
        ("cells", |limits, room| limits.cells = room, |tables| tables.cells.len()),
        ("bits", |limits, room| limits.bits = room, |tables| tables.bits.len()),
    ];
    let run = |limits: Limits, with_audit: bool| {
        let mut node = Node::new(limits);
        let tried = with_audit.then(|| audited(isolate("a", &[("12.0.0.0/8", 82)])));
        node.change(two_pods().into_iter().chain(tried));
        let rules = [("10.0.0.0/8", 80), ("11.0.0.0/8", 81)];
        node.change([also(isolate("a", &rules), "own"), isolate("b", &[("13.0.0.0/8", 83)])]);
        for _ in 0..4 {
            node.change([]);
        }
        node
    };
    let locked = |node: &Node| ["a", "b"].map(|pod| node.engine.subjects()[&name(pod)].locked);
    for (kind, set, of) in kinds {
        let need = u32::try_from(of(run(Limits::default(), true).engine.tables())).expect("few");
        for room in 0..=need {
            let mut limits = Limits::default();
            set(&mut limits, room);
            let (with, without) = (run(limits, true), run(limits, false));
            assert_eq!(locked(&with), locked(&without), "{kind}: {room} of {need}");
        }
    }
}

#[test]
fn policies_that_are_all_audited_enforce_nothing() {
    let objects: Vec<Change> = two_pods().into_iter().chain([audited(isolate("a", &[]))]).collect();
    let mut stage = Stage::started(objects.clone());
    let regime = |stage: &Stage| stage.reconciler.regime();
    assert_eq!((regime(&stage), stage.reconciler.enforces()), (Regime::Audited, false));
    let slots = [stage.slot("a"), stage.slot("b")];
    assert!(slots[0].is_some() && slots[1].is_some(), "{slots:?}");
    // A restart finds the same.
    stage.restart();
    stage.sync();
    assert_eq!((regime(&stage), [stage.slot("a"), stage.slot("b")]), (Regime::Audited, slots));
    stage.handle(objects.clone());
    stage.list_all();
    assert_eq!((stage.settle(), regime(&stage)), (0, Regime::Audited));
    // One that is enforced, of pods that are not here: it counts, though no block of this node shows it, also after a restart.
    stage.handle([isolate("elsewhere", &[])]);
    stage.settle();
    assert_eq!(regime(&stage), Regime::Enforced);
    stage.restart();
    stage.sync();
    assert_eq!((regime(&stage), [stage.slot("a"), stage.slot("b")]), (Regime::Enforced, slots));
    stage.handle(objects.clone());
    stage.list_all();
    stage.settle();
    assert_eq!(regime(&stage), Regime::Audited);
    // One that is enforced, of somebody here.
    stage.handle([isolate("b", &[])]);
    stage.settle();
    assert_eq!(regime(&stage), Regime::Enforced);
    stage.restart();
    stage.sync();
    assert_eq!(regime(&stage), Regime::Enforced);
    stage.handle(two_pods());
    stage.list_all();
    stage.settle();
    assert_eq!(regime(&stage), Regime::Off);
}
