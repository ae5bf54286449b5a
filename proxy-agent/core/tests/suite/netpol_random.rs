//! Whatever the cluster and whatever changes: the compiled maps say what the oracle says, on every step of the way.
//!
//! `NETPOL_CASES` sets how many changed clusters are compared (100,000 when it is absent); `NETPOL_SEED` is the first
//! seed. A failure names its seed.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Instant;

use proxy_abi::policy::{BlockEntry, RuleRef, SlotWord};
use proxy_core::netpol::engine::{Engine, Limits, Transition};
use proxy_core::netpol::spec::{Change, Pod};
use proxy_core::netpol::tables::PolicyTables;
use proxy_ebpf::policy::{Cause, Judgement, Question, judge};
use proxy_oracle::dice::{Dice, NODE, number};
use proxy_oracle::row::Row;
use proxy_oracle::verdict::Side;

use crate::netpol_maps::{Maps, Node, is_switch, question, within};

/// Changes of one cluster.
const EDITS: u64 = 20;

/// What a random cluster and its changes have reached.
#[derive(Clone, Copy, Debug, Default)]
struct Reached {
    /// Changed clusters with a flow that a rule allows and one that is denied.
    cases: u64,
    /// Other ones.
    void: u64,
    sides: u64,
    allowed: u64,
    denied: u64,
}

/// Runs clusters in all threads until so many cases count, or one fails.
fn run(cases: u64, one: impl Fn(u64) -> Result<Reached, String> + Sync) -> Result<Reached, String> {
    let next = AtomicU64::new(number("NETPOL_SEED", 0));
    let counted = AtomicU64::new(0);
    let worker = || {
        let mut sum = Reached::default();
        while counted.load(Ordering::Relaxed) < cases {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            let reached = one(seed).map_err(|problem| {
                counted.store(cases, Ordering::Relaxed);
                format!("seed {seed}: {problem}")
            })?;
            counted.fetch_add(reached.cases, Ordering::Relaxed);
            sum.cases += reached.cases;
            sum.void += reached.void;
            sum.sides += reached.sides;
            sum.allowed += reached.allowed;
            sum.denied += reached.denied;
        }
        Ok::<_, String>(sum)
    };
    let threads = thread::available_parallelism().map_or(1, usize::from);
    let sums: Vec<_> = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().map(|handle| handle.join().expect("no thread panics")).collect()
    });
    sums.into_iter().try_fold(Reached::default(), |a, b| {
        let b = b?;
        Ok(Reached {
            cases: a.cases + b.cases,
            void: a.void + b.void,
            sides: a.sides + b.sides,
            allowed: a.allowed + b.allowed,
            denied: a.denied + b.denied,
        })
    })
}

/// Limits under which rules are merged and sets are cut, by seed.
fn limits(seed: u64) -> Limits {
    let (merge_above, rules_per_set) = match seed % 4 {
        0 => (2, 64),
        1 => (256, 3),
        _ => (256, 256),
    };
    Limits { merge_above, rules_per_set, ..Limits::default() }
}

/// A few sides of every pod of the node.
fn sides(node: &Node, dice: &mut Dice, peers: usize, ports: usize) -> Vec<(Pod, Side)> {
    let pods: Vec<Pod> = node.cluster.subjects().cloned().collect();
    let of =
        |pod: Pod| dice.sides(&pod, peers, ports).into_iter().map(move |side| (pod.clone(), side)).collect::<Vec<_>>();
    pods.into_iter().flat_map(of).collect()
}

/// Compares a cluster and its changes with the oracle.
fn equals_oracle(seed: u64, broken: Option<Row>) -> Result<Reached, String> {
    let mut dice = Dice::new(seed);
    let mut node = Node::new(limits(seed));
    let mut reached = Reached::default();
    for edit in 0..EDITS {
        let changes = if edit == 0 { dice.cluster() } else { dice.edit(&node.cluster) };
        node.change(changes);
        let (mut allowed, mut denied) = (0, 0);
        for (index, (pod, side)) in sides(&node, &mut dice, 14, 3).iter().enumerate() {
            // Cut sets that are too long lock the pod, which the test for limits is about.
            if node.engine.subjects().get(&pod.name).is_some_and(|subject| subject.locked.is_some()) {
                continue;
            }
            let verdict =
                node.compare(broken, pod, side, !seed.is_multiple_of(4)).map_err(|p| format!("edit {edit}: {p}"))?;
            reached.sides += 1;
            allowed += u64::from(!verdict.rules.is_empty());
            denied += u64::from(!verdict.allowed);
            if index % 16 == 0 && broken.is_none() && !verdict.isolating.is_empty() {
                let explained = node.explained(pod, side);
                if explained != verdict.rules {
                    return Err(format!("edit {edit}: {} {side:?}: {explained:?}, not {verdict:?}", pod.name));
                }
            }
        }
        reached.allowed += allowed;
        reached.denied += denied;
        if allowed > 0 && denied > 0 {
            reached.cases += 1;
        } else {
            reached.void += 1;
        }
    }
    if node.maps != *node.engine.tables() {
        return Err("the maps are not what the compiler takes them for".to_owned());
    }
    Ok(reached)
}

#[test]
fn compiled_maps_say_what_the_oracle_says() {
    let cases = number("NETPOL_CASES", 100_000);
    let start = Instant::now();
    let reached = run(cases, |seed| equals_oracle(seed, None)).unwrap_or_else(|problem| panic!("{problem}"));
    println!("{reached:?} in {:.1?}", start.elapsed());
    assert!(reached.cases >= cases && reached.allowed > cases && reached.denied > cases, "{reached:?}");
}

#[test]
fn every_row_is_missed_when_it_is_broken() {
    let unseen: Vec<_> =
        Row::ALL.into_iter().filter(|row| run(4_000, |seed| equals_oracle(seed, Some(*row))).is_ok()).collect();
    assert_eq!(unseen, [], "these rows may be broken without anybody noticing");
}

/// Every flow after every single write: as before up to the switch, as after from it on. Then the same from a state in
/// which the agent may have died, or given up.
fn steps_are_old_or_new(seed: u64) -> Result<Reached, String> {
    let mut dice = Dice::new(seed);
    let mut node = Node::new(limits(seed));
    let mut reached = Reached::default();
    let mut history: Vec<Change> = Vec::new();
    for edit in 0..6 {
        let changes = if edit == 0 { dice.cluster() } else { dice.edit(&node.cluster) };
        history.extend(changes.clone());
        let asked = |node: &Node, dice: &mut Dice| -> Vec<Question> {
            let sides = sides(node, dice, 8, 3);
            let own = sides.iter().filter_map(|(pod, side)| Some(question(node.slot(pod)?, side)));
            own.flat_map(|own| [own, Question { flags: own.flags | Question::SHADOW, ..own }]).collect()
        };
        let mut questions = asked(&node, &mut dice);
        let transition = node.plan(changes);
        questions.extend(asked(&node, &mut dice));
        let count = transition.ops().count();
        let half = (edit, dice.below(count + 1));
        let mut left = node.maps.clone();
        transition.ops().take(half.1).for_each(|op| left.apply(op));
        let (old, new) = walk(&mut node.maps, &transition, &questions).map_err(|p| format!("edit {edit}: {p}"))?;
        if transition.switch.is_none() && old != new {
            return Err(format!("edit {edit}: something changed without a switch"));
        }
        recover(&node, &left, &history, limits(seed), &mut dice).map_err(|p| format!("(edit, cut) {half:?}: {p}"))?;
        reached.sides += (questions.len() * count) as u64;
        let denied = new.iter().filter(|told| !told.0).count() as u64;
        reached.denied += denied;
        reached.allowed += new.len() as u64 - denied;
        reached.cases += u64::from(denied > 0 && denied < new.len() as u64);
    }
    Ok(reached)
}

/// Does a transition step by step: every answer is the old one until the switch and the new one from then on.
fn walk(
    maps: &mut PolicyTables,
    transition: &Transition,
    questions: &[Question],
) -> Result<(Vec<Told>, Vec<Told>), String> {
    let all = |maps: &PolicyTables| questions.iter().map(|q| told(&judge(&Maps(maps), q))).collect::<Vec<_>>();
    let old = all(maps);
    let mut end = maps.clone();
    transition.ops().for_each(|op| end.apply(op));
    let new = all(&end);
    let mut switched = false;
    for op in transition.ops() {
        maps.apply(op);
        switched |= is_switch(op);
        let (now, expected) = (all(maps), if switched { &new } else { &old });
        if let Some(place) = now.iter().zip(expected).position(|(a, b)| a != b) {
            let (now, expected) = (now[place], expected[place]);
            return Err(format!("after {op:?}: {:?}: {now:?}, not {expected:?}", questions[place]));
        }
    }
    Ok((old, new))
}

/// From maps that are half written: the same compiler, told so, and a new one, both bring them to the right end, step
/// by step. A new one that finds them whole does nothing.
fn recover(
    node: &Node,
    left: &PolicyTables,
    history: &[Change],
    limits: Limits,
    dice: &mut Dice,
) -> Result<(), String> {
    let sizes = |t: &PolicyTables| {
        let PolicyTables { ips, prefixes, cells, bits, sets, blocks, hits, .. } = t;
        [ips.len(), prefixes.len(), cells.len(), bits.len(), sets.len(), blocks.len(), hits.len()]
    };
    let mut told = node.engine.clone();
    told.adopt(left.clone());
    let started = |maps: &PolicyTables| {
        let mut engine = Engine::new(NODE, limits, maps.clone());
        for change in history {
            engine.apply(change.clone());
        }
        engine
    };
    for (who, engine) in [("told", told), ("new", started(left))] {
        let mut other = Node { cluster: node.cluster.clone(), engine, maps: left.clone() };
        let transition = other.engine.commit();
        let sides = sides(&other, dice, 6, 2);
        let asked = sides.iter().filter_map(|(pod, side)| Some(question(other.slot(pod)?, side)));
        let questions: Vec<_> = asked.collect();
        walk(&mut other.maps, &transition, &questions).map_err(|p| format!("{who}: {p}"))?;
        for (pod, side) in &sides {
            if other.engine.subjects().get(&pod.name).is_some_and(|subject| subject.locked.is_none()) {
                other.compare(None, pod, side, false).map_err(|p| format!("{who}: {p}"))?;
            }
        }
        if other.maps != *other.engine.tables() || sizes(&other.maps) != sizes(&node.maps) {
            return Err(format!("{who}: {:?} entries, not {:?}", sizes(&other.maps), sizes(&node.maps)));
        }
        let rest = started(&other.maps).commit();
        if !rest.is_empty() {
            return Err(format!("{who}: a restart writes {rest:?}"));
        }
    }
    Ok(())
}

/// What of a judgement a flow keeps.
type Told = (bool, Cause, u32, RuleRef);

fn told(judgement: &Judgement) -> Told {
    (judgement.allowed, judgement.cause, judgement.revision, judgement.rule)
}

#[test]
fn every_single_write_leaves_old_or_new_verdicts() {
    let reached =
        run(number("NETPOL_STEPS", 1_500), steps_are_old_or_new).unwrap_or_else(|problem| panic!("{problem}"));
    println!("{reached:?}");
}

/// A pod's revision moves when a verdict of it does, and only for a reason.
fn revisions_are_exact(seed: u64) -> Result<Reached, String> {
    let mut dice = Dice::new(seed);
    let mut node = Node::new(limits(seed));
    node.change(dice.cluster());
    let mut reached = Reached::default();
    for edit in 0..EDITS {
        let asked = sides(&node, &mut dice, 10, 3);
        let answers = |node: &Node| -> Vec<_> {
            asked.iter().map(|(pod, side)| Some((node.slot(pod)?, node.judge(pod, side)?))).collect()
        };
        let words = |node: &Node| -> BTreeMap<u16, SlotWord> {
            let slots = node.engine.subjects().values().map(|subject| subject.slot);
            let word = |slot| node.maps.slots.get(&SlotWord::index(slot, node.maps.epoch)).copied();
            slots.filter_map(|slot| Some((slot, word(slot)?))).collect()
        };
        let (old, old_words, old_maps) = (answers(&node), words(&node), node.maps.clone());
        node.change(dice.edit(&node.cluster));
        let (new, new_words) = (answers(&node), words(&node));
        for ((old, new), (pod, side)) in old.iter().zip(&new).zip(&asked) {
            let (Some((old_slot, old)), Some((slot, new))) = (old, new) else { continue };
            if old_slot != slot || old.revision != new.revision {
                continue;
            }
            if (old.allowed, old.rule, old.cause) != (new.allowed, new.rule, new.cause) {
                return Err(format!("edit {edit}: {} {side:?}: {old:?}, {new:?} under one revision", pod.name));
            }
            reached.sides += 1;
        }
        for (slot, new) in &new_words {
            let Some(old) = old_words.get(slot) else { continue };
            if old.block == new.block && old.revision != new.revision && !told_apart(&old_maps, &node.maps, new.block) {
                return Err(format!("edit {edit}: slot {slot} has another revision without a reason"));
            }
        }
        reached.cases += 1;
    }
    Ok(reached)
}

/// Has an address moved between cells that a set of the block tells apart?
fn told_apart(old: &PolicyTables, new: &PolicyTables, block: u32) -> bool {
    let Some(block) = new.blocks.get(&block) else { return false };
    let ips: BTreeSet<_> = old.ips.keys().chain(new.ips.keys()).collect();
    let shadow = new.blocks.get(&block.shadow).map_or(BlockEntry::OPEN, |shadow| *shadow);
    let firsts = [block.ingress, block.egress, shadow.ingress, shadow.egress].into_iter().flatten();
    let mut sets: Vec<u32> = firsts.filter(|set| *set != 0).collect();
    for index in 0.. {
        let Some(next) = sets.get(index).map(|set| new.sets.get(set).map_or(0, |entry| entry.next)) else { break };
        if next != 0 {
            sets.push(next);
        }
    }
    let bits = |maps: &PolicyTables, set: u32, ip: std::net::IpAddr| {
        let cell = maps.cell(ip, maps.epoch & 1);
        let any = maps.sets.get(&set).map(|s| if cell >> 31 == 1 { s.any_pod } else { s.any_address });
        maps.bits.get(&proxy_abi::policy::BitsKey { set, cell }).copied().or(any)
    };
    sets.iter().any(|set| ips.iter().any(|ip| bits(old, *set, (**ip).into()) != bits(new, *set, (**ip).into())))
}

#[test]
fn revisions_move_with_verdicts_and_not_otherwise() {
    let reached =
        run(number("NETPOL_STEPS", 1_500) * 4, revisions_are_exact).unwrap_or_else(|problem| panic!("{problem}"));
    assert!(reached.sides > 0);
}

/// With too little room nothing passes that should not, no map holds more than it may, and what locked a pod is told;
/// with room again all is well.
fn too_little_room(seed: u64) -> Result<Reached, String> {
    let mut dice = Dice::new(seed);
    let mut tight = Limits::default();
    match seed % 8 {
        0 => tight.slots = 3,
        1 => tight.blocks = 4,
        2 => tight.sets = 4,
        3 => tight.ips = 5,
        4 => tight.prefixes = 3,
        5 => tight.cells = 8,
        6 => tight.bits = 12,
        _ => tight.hits = 3,
    }
    let mut node = Node::new(tight);
    let mut reached = Reached::default();
    for edit in 0..EDITS {
        let changes = if edit == 0 { dice.cluster() } else { dice.edit(&node.cluster) };
        let transition = node.plan(changes);
        for op in transition.ops() {
            node.maps.apply(op);
            if !within(&node.maps, &tight) {
                return Err(format!("edit {edit}: overfull after {op:?}"));
            }
        }
        let oracle = proxy_oracle::verdict::Oracle { cluster: &node.cluster, broken: None };
        let exact = node.engine.diagnostics().iter().all(|d| d.object.starts_with("NetworkPolicy"));
        for (pod, side) in sides(&node, &mut dice, 8, 2) {
            let Some(judgement) = node.judge(&pod, &side) else {
                if node.engine.diagnostics().iter().any(|d| d.object == format!("Pod {}", pod.name)) {
                    reached.denied += 1;
                    continue;
                }
                return Err(format!("edit {edit}: {} has no slot and no diagnostic", pod.name));
            };
            let wanted = oracle.judge(&pod, &side).allowed;
            if (judgement.allowed && !wanted) || (exact && judgement.allowed != wanted) {
                return Err(format!("edit {edit}: {} {side:?}: {judgement:?}, not {wanted}", pod.name));
            }
            reached.sides += 1;
            reached.denied += u64::from(!judgement.allowed && wanted);
        }
        reached.cases += u64::from(!exact);
        reached.void += u64::from(exact);
    }
    let names: Vec<_> = node.cluster.pods.keys().cloned().collect();
    node.change(names.into_iter().map(Change::PodGone));
    node.change([]);
    if node.engine.diagnostics().iter().any(|d| d.object.starts_with("Pod")) || !node.maps.bits.is_empty() {
        return Err(format!("nothing is left but {:?} {:?}", node.engine.diagnostics(), node.maps.bits));
    }
    Ok(reached)
}

#[test]
fn too_little_room_never_opens_anything() {
    let reached = run(number("NETPOL_STEPS", 1_500) * 2, too_little_room).unwrap_or_else(|problem| panic!("{problem}"));
    println!("{reached:?}");
    assert!(reached.denied > 0, "the limits were never felt: {reached:?}");
}
