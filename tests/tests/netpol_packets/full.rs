//! Each map of policy filled to the last entry, in the kernel: who does not fit is locked, visibly, and nobody else; when there
//! is room again, it heals.

use proxy_core::netpol::engine::Engine;
use proxy_core::netpol::tables::PolicyTables;

use super::*;

/// Entries, or the highest number and one, that a map needs.
type Needs = fn(&PolicyTables) -> usize;

/// Makes it that large.
type Size = fn(&mut Limits, u32);

/// What becomes of the pod whose policy has no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// Nothing passes but what the node begins.
    Locked,
    /// It has no slot: its interface is held.
    Held,
    /// Its address matches no rule that names pods.
    Stranger,
    /// Its rules are in force and not counted.
    Uncounted,
}

fn highest<V>(map: &std::collections::BTreeMap<u32, V>) -> usize {
    map.last_key_value().map_or(0, |(id, _)| *id as usize + 1)
}

/// Each map: what it needs, how it is made that large, and what becomes of the pod that comes last.
fn maps() -> [(&'static str, Needs, Size, Fate); 8] {
    [
        ("slot", |t| highest(&t.pods), |limits, room| limits.slots = room, Fate::Held),
        ("block", |t| highest(&t.blocks), |limits, room| limits.blocks = room, Fate::Locked),
        ("set", |t| highest(&t.sets), |limits, room| limits.sets = room, Fate::Locked),
        ("prefix", |t| t.prefixes.len(), |limits, room| limits.prefixes = room, Fate::Locked),
        ("cell", |t| t.cells.len(), |limits, room| limits.cells = room, Fate::Locked),
        ("bits", |t| t.bits.len(), |limits, room| limits.bits = room, Fate::Locked),
        ("ip", |t| t.ips.len(), |limits, room| limits.ips = room, Fate::Stranger),
        ("hits", |t| t.hits.len(), |limits, room| limits.hits = room, Fate::Uncounted),
    ]
}

/// Pods one and three, and the policy that fills the map: one may be reached from outside at a port.
fn first() -> Vec<Change> {
    let pods = [("one", &POD_ONE), ("three", &POD_THREE)].map(|(name, host)| Change::Pod(pod(name, host, NODE)));
    let outside: &[(&str, u16)] = &[("172.18.0.0/16", TARGET), ("fc00:f853:ccd::/64", TARGET)];
    [namespace("default")].into_iter().chain(pods).chain([policy("one", Some(outside), None)]).collect()
}

/// The pod that comes last, and its policy: it may be reached from outside at another port.
fn last() -> [Change; 2] {
    let outside: &[(&str, u16)] = &[("172.18.0.0/17", PORT), ("fc00:f853:ccd::/65", PORT)];
    [policy("two", Some(outside), None), Change::Pod(pod("two", &POD_TWO, NODE))]
}

/// Objects and maps of a node, without a kernel.
fn compiled(changes: Vec<Change>) -> PolicyTables {
    let mut engine = Engine::new(NODE, Limits::default(), PolicyTables::default());
    for change in changes {
        engine.apply(change);
    }
    engine.commit();
    engine.tables().clone()
}

/// How many entries the kernel's map of this name has, and how many fit.
fn held(bench: &Bench, map: &str) -> Result<(usize, u32)> {
    let name = format!("policy_{map}");
    let usage = bench.bpf().maps().usage()?;
    let found = usage.iter().find(|usage| usage.map == name).with_context(|| name.clone())?;
    Ok((found.used, found.capacity))
}

#[test]
fn each_map_filled_to_the_last_entry() -> Result<()> {
    for (map, needs, set, fate) in maps() {
        let need = u32::try_from(needs(&compiled(first())))?;
        let mut room = Limits::default();
        set(&mut room, need);
        Bench::run(Tables { policy: Some(room), ..ROOMY }, |bench| filled(bench, map, fate))??;
    }
    Ok(())
}

fn filled(bench: &Bench, map: &str, fate: Fate) -> Result<()> {
    let limits = bench.bpf().maps().policy.limits();
    let mut policed = Policed::start(bench, limits, first())?;
    policed.place_pod(&POD_ONE, "one")?;
    policed.place_pod(&POD_THREE, "three")?;
    // Full: of maps by number the number 0 is nobody's, and of slots there are two words each.
    let (used, capacity) = held(bench, map)?;
    let full = match map {
        "slot" => (capacity as usize - 2, capacity),
        "block" | "set" => (capacity as usize - 1, capacity),
        _ => (capacity as usize, capacity),
    };
    assert_eq!((used, capacity), full, "{map}");
    for talk in TALKS {
        let client = (&OUTSIDE, CLIENT);
        let wanted = |policed: &Policed<'_>| -> Result<()> {
            to(policed, &POD_ONE, &talk.frame(client, (&POD_ONE, TARGET), SYN), Reason::DirectNew)?;
            to(policed, &POD_ONE, &talk.frame(client, (&POD_ONE, PORT), SYN), Reason::PolicyIngress)?;
            to(policed, &POD_THREE, &talk.frame(client, (&POD_THREE, 1), SYN), Reason::DirectNew)?;
            bench.forget_flows()
        };
        wanted(&policed)?;

        // One more. Whatever becomes of it, nobody else feels it.
        policed.change(last())?;
        let findings = policed.reconciler().engine().diagnostics();
        let told: Vec<_> = findings.iter().map(|finding| finding.object.as_str()).collect();
        let slot = policed.reconciler().slot("uid-two");
        policed.place(&POD_TWO, slot.unwrap_or(DeviceEntry::HELD))?;
        wanted(&policed)?;
        let (used, capacity) = held(bench, map)?;
        assert!(used <= capacity as usize, "{map}: {used} of {capacity}");
        let may = talk.frame(client, (&POD_TWO, PORT), SYN);
        let (sends, answers) = (talk.frame((&POD_TWO, 1), (&OUTSIDE, 2), SYN), Reason::DirectNew);
        match fate {
            Fate::Locked | Fate::Held => {
                assert_eq!(told, ["Pod default/two"], "{map}: {findings:?}");
                let why = if fate == Fate::Held { Reason::PolicyHeld } else { Reason::PolicyUnready };
                to(&policed, &POD_TWO, &may, why)?;
                from(&policed, &POD_TWO, &sends, why)?;
                let locked =
                    policed.reconciler().engine().subjects().values().filter(|subject| subject.locked.is_some());
                assert_eq!(locked.count(), usize::from(fate == Fate::Locked), "{map}");
            }
            Fate::Stranger => {
                assert_eq!(told, ["Pod default/two"; 2], "{map}: {findings:?}");
                to(&policed, &POD_TWO, &may, answers)?;
            }
            Fate::Uncounted => {
                assert_eq!(told, [""; 0], "{map}: {findings:?}");
                to(&policed, &POD_TWO, &may, answers)?;
                to(&policed, &POD_TWO, &talk.frame(client, (&POD_TWO, TARGET), SYN), Reason::PolicyIngress)?;
            }
        }
        bench.forget_flows()?;

        // Room: the first policy goes, and its pod where a slot or an address lacks.
        policed.change([Change::PolicyGone(ObjectName::new("default", "for-one"))])?;
        if matches!(fate, Fate::Held | Fate::Stranger) {
            policed.change([Change::PodGone(ObjectName::new("default", "one"))])?;
        }
        // Numbers rest for a while.
        policed.change([])?;
        policed.change([])?;
        assert_eq!(policed.reconciler().engine().diagnostics(), [], "{map}: it heals");
        policed.place_pod(&POD_TWO, "two")?;
        to(&policed, &POD_TWO, &may, Reason::DirectNew)?;
        to(&policed, &POD_TWO, &talk.frame(client, (&POD_TWO, TARGET), SYN), Reason::PolicyIngress)?;
        from(&policed, &POD_TWO, &sends, Reason::DirectNew)?;
        // As in the beginning.
        let gone = ObjectName::new("default", "two");
        policed.change([Change::PolicyGone(ObjectName::new("default", "for-two")), Change::PodGone(gone)])?;
        policed.change([])?;
        policed.change(first())?;
        policed.change([])?;
        policed.place_pod(&POD_ONE, "one")?;
        bench.forget_flows()?;
    }
    Ok(())
}
