//! Tables and properties of the binding rules.

use proptest::prelude::*;

use super::*;

const WINDOW: Duration = Duration::from_secs(5);

fn at(milliseconds: u64) -> Time {
    Duration::from_millis(milliseconds)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(index: u32) -> MacBytes {
    MacBytes([2, 0, 0, 0, 0, index.to_le_bytes()[0]])
}

fn claim(index: u32, addresses: Option<Vec<IpAddr>>) -> (u32, Claim) {
    let ranges = ["10.1.0.0/24", "fd00:1::/64"].map(|net| net.parse().unwrap()).to_vec();
    (index, Claim { name: format!("veth{index}").into(), mac: mac(index), addresses, ranges })
}

/// `(index, "a b c")` is an interface with these addresses, `(index, "?")` one that could not be read.
fn claims(links: &[(u32, &str)]) -> BTreeMap<u32, Claim> {
    let parse = |text: &str| (text != "?").then(|| text.split_whitespace().map(ip).collect());
    links.iter().map(|(index, text)| claim(*index, parse(text))).collect()
}

fn own() -> BTreeSet<IpAddr> {
    BTreeSet::from([ip("10.1.0.1"), ip("fd00:1::1"), ip("192.168.0.2")])
}

/// Bound and refused of every interface, as text.
fn state(bindings: &Bindings) -> Vec<String> {
    let line = |index: &u32| {
        let bound = bindings.bound(*index).into_iter().map(|ip| format!(" {ip}"));
        let refused = bindings.refused(*index).map(|(ip, why)| format!(" {ip}:{why:?}"));
        format!("{index}:{}", bound.chain(refused).collect::<String>())
    };
    bindings.links.keys().map(line).collect()
}

/// One update: when, what is claimed, what must be the state after it.
type Step<'a> = (u64, &'a [(u32, &'a str)], &'a [&'a str]);

fn check(mut bindings: Bindings, trusted: &Trusted, steps: &[Step<'_>]) {
    for (n, (now, links, expected)) in steps.iter().enumerate() {
        bindings.update(at(*now), &own(), trusted, &claims(links));
        assert_eq!(state(&bindings), *expected, "step {n}");
    }
}

fn fresh() -> Bindings {
    Bindings::new(WINDOW, BTreeMap::new())
}

#[test]
fn both_families_of_a_new_pod() {
    check(
        fresh(),
        &Trusted::new(),
        &[
            (0, &[(5, "?")], &["5:"]),
            (5, &[(5, "")], &["5:"]),
            (9_000, &[(5, "10.1.0.5")], &["5: 10.1.0.5"]),
            (9_020, &[(5, "10.1.0.5 fd00:1::5")], &["5: 10.1.0.5 fd00:1::5"]),
            (60_000, &[(5, "?")], &["5: 10.1.0.5 fd00:1::5"]),
            (61_000, &[], &[]),
        ],
    );
}

#[test]
fn what_comes_after_the_window_is_late() {
    check(
        fresh(),
        &Trusted::new(),
        &[
            (0, &[(5, "10.1.0.5")], &["5: 10.1.0.5"]),
            (5_001, &[(5, "10.1.0.5 fd00:1::5")], &["5: 10.1.0.5 fd00:1::5:Late"]),
        ],
    );
}

#[test]
fn never_bound() {
    let addresses = "10.1.0.1 192.168.0.2 fd00:1::1 10.2.0.5 127.0.0.1 169.254.1.1 224.0.0.1 255.255.255.255 fe80::1 \
                     ff02::1 ::1 ::ffff:10.1.0.5";
    let mut bindings = fresh();
    let mut links = claims(&[(5, addresses)]);
    // Even where everything is within the ranges.
    links.get_mut(&5).unwrap().ranges = ["0.0.0.0/0", "::/0"].map(|net| net.parse().unwrap()).to_vec();
    bindings.update(at(0), &own(), &Trusted::new(), &links);
    assert_eq!(
        state(&bindings),
        ["5: 10.2.0.5 10.1.0.1:Node 127.0.0.1:OutOfRange 169.254.1.1:OutOfRange 192.168.0.2:Node \
          224.0.0.1:OutOfRange 255.255.255.255:OutOfRange ::1:OutOfRange ::ffff:10.1.0.5:OutOfRange fd00:1::1:Node \
          fe80::1:OutOfRange ff02::1:OutOfRange"]
    );
    check(
        fresh(),
        &Trusted::new(),
        &[(
            0,
            &[(5, addresses)],
            &["5: 10.1.0.1:Node 10.2.0.5:OutOfRange \
        127.0.0.1:OutOfRange 169.254.1.1:OutOfRange 192.168.0.2:Node 224.0.0.1:OutOfRange \
        255.255.255.255:OutOfRange ::1:OutOfRange ::ffff:10.1.0.5:OutOfRange fd00:1::1:Node fe80::1:OutOfRange \
        ff02::1:OutOfRange"],
        )],
    );
}

#[test]
fn a_pod_that_adds_anothers_address() {
    check(
        fresh(),
        &Trusted::new(),
        &[
            (0, &[(5, "10.1.0.5"), (6, "10.1.0.6")], &["5: 10.1.0.5", "6: 10.1.0.6"]),
            (1, &[(5, "10.1.0.5 10.1.0.6"), (6, "10.1.0.6")], &["5: 10.1.0.5 10.1.0.6:Second", "6: 10.1.0.6"]),
            // Instead of its own.
            (2, &[(5, "10.1.0.6"), (6, "10.1.0.6")], &["5: 10.1.0.6:Second", "6: 10.1.0.6"]),
            // When its owner is gone, too.
            (3, &[(5, "10.1.0.6")], &["5: 10.1.0.6:Second"]),
            // And a new pod gets it.
            (4, &[(5, "10.1.0.6"), (7, "10.1.0.6")], &["5: 10.1.0.6:Second", "7: 10.1.0.6"]),
            // Its own comes back to it.
            (5, &[(5, "10.1.0.6 10.1.0.5"), (7, "10.1.0.6")], &["5: 10.1.0.5 10.1.0.6:Second", "7: 10.1.0.6"]),
        ],
    );
}

#[test]
fn an_address_is_handed_over_when_it_is_free() {
    check(
        fresh(),
        &Trusted::new(),
        &[
            (0, &[(5, "10.1.0.5")], &["5: 10.1.0.5"]),
            (1, &[(5, "10.1.0.5"), (6, "10.1.0.5")], &["5: 10.1.0.5", "6: 10.1.0.5:Taken(\"veth5\")"]),
            (2, &[(5, "?"), (6, "10.1.0.5")], &["5: 10.1.0.5", "6: 10.1.0.5:Taken(\"veth5\")"]),
            (9_000, &[(6, "10.1.0.5")], &["6: 10.1.0.5"]),
        ],
    );
    check(
        fresh(),
        &Trusted::new(),
        &[
            (0, &[(5, "10.1.0.5"), (6, "10.1.0.5")], &["5: 10.1.0.5", "6: 10.1.0.5:Taken(\"veth5\")"]),
            (1, &[(5, ""), (6, "10.1.0.5")], &["5:", "6: 10.1.0.5"]),
            (2, &[(5, "10.1.0.5"), (6, "10.1.0.5")], &["5: 10.1.0.5:Taken(\"veth6\")", "6: 10.1.0.5"]),
        ],
    );
}

#[test]
fn after_a_restart_what_was_bound_stays_bound() {
    let previous = |index: u32, mac: MacBytes| Previous { ifindex: index, mac };
    let bindings = || {
        let entries = [
            (ip("10.1.0.6"), previous(6, mac(6))),
            (ip("10.1.0.7"), previous(7, mac(99))),
            (ip("10.1.0.8"), previous(8, mac(8))),
        ];
        Bindings::new(WINDOW, BTreeMap::from(entries))
    };
    check(
        bindings(),
        &Trusted::new(),
        &[
            // 5 is older than 6; the MAC of 7 is another one, so the older of 5 and 7 has it; 8 is gone.
            (
                0,
                &[(5, "10.1.0.6"), (6, "10.1.0.6"), (7, "10.1.0.8")],
                &["5: 10.1.0.6:Taken(\"veth6\")", "6: 10.1.0.6", "7: 10.1.0.8"],
            ),
            (1, &[(5, "10.1.0.6"), (7, "10.1.0.8")], &["5: 10.1.0.6", "7: 10.1.0.8"]),
        ],
    );
    check(
        bindings(),
        &Trusted::new(),
        &[
            // Not yet readable: kept.
            (0, &[(5, "10.1.0.6"), (6, "?")], &["5: 10.1.0.6:Taken(\"veth6\")", "6: 10.1.0.6"]),
            // What was added while the agent was away is second; a missing family still comes.
            (1, &[(6, "10.1.0.9 10.1.0.6 fd00:1::6")], &["6: 10.1.0.6 fd00:1::6 10.1.0.9:Second"]),
        ],
    );
    check(
        fresh(),
        &Trusted::new(),
        &[(0, &[(6, "10.1.0.5"), (5, "10.1.0.5")], &["5: 10.1.0.5", "6: 10.1.0.5:Taken(\"veth5\")"])],
    );
}

#[test]
fn records_of_the_cni_decide() {
    let trusted = Trusted::from([(6, BTreeSet::from([ip("10.1.0.6"), ip("10.1.0.66")]))]);
    check(
        fresh(),
        &trusted,
        &[
            (0, &[(5, "10.1.0.6"), (6, "")], &["5: 10.1.0.6:NotOfCni", "6:"]),
            (1, &[(5, "10.1.0.6"), (6, "10.1.0.7")], &["5: 10.1.0.6:NotOfCni", "6: 10.1.0.7:NotOfCni"]),
            (9_000, &[(6, "10.1.0.6 10.1.0.66 fd00:1::6")], &["6: 10.1.0.6 10.1.0.66 fd00:1::6:NotOfCni"]),
        ],
    );
    // Records that come late take the address from whoever has it.
    let mut bindings = fresh();
    bindings.update(at(0), &own(), &Trusted::new(), &claims(&[(5, "10.1.0.6"), (6, "10.1.0.6")]));
    bindings.update(at(1), &own(), &trusted, &claims(&[(5, "10.1.0.6"), (6, "10.1.0.6")]));
    assert_eq!(state(&bindings), ["5: 10.1.0.6:NotOfCni", "6: 10.1.0.6"]);
}

#[test]
fn a_pod_that_cannot_be_read_at_the_start_keeps_its_address() {
    let previous = BTreeMap::from([(ip("10.1.0.6"), Previous { ifindex: 6, mac: mac(6) })]);
    let mut bindings = Bindings::new(WINDOW, previous);
    let mut links = claims(&[(5, "10.1.0.6"), (6, "?")]);
    links.get_mut(&6).unwrap().mac = MacBytes::default();
    bindings.update(at(0), &own(), &Trusted::new(), &links);
    assert_eq!(state(&bindings), ["5: 10.1.0.6:Taken(\"veth6\")", "6: 10.1.0.6"]);
}

#[test]
fn ranges_that_come_to_be_known() {
    let mut bindings = fresh();
    let mut links = claims(&[(5, "10.1.0.5 10.1.0.200")]);
    bindings.update(at(0), &own(), &Trusted::new(), &links);
    assert_eq!(state(&bindings), ["5: 10.1.0.5 10.1.0.200:Second"]);
    links.get_mut(&5).unwrap().ranges = vec!["10.1.0.128/25".parse().unwrap()];
    bindings.update(at(1), &own(), &Trusted::new(), &links);
    assert_eq!(state(&bindings), ["5: 10.1.0.200 10.1.0.5:OutOfRange"]);
}

#[test]
fn settled_when_all_families_are_there_or_the_window_is_over() {
    let both: Vec<IpNet> = claim(5, None).1.ranges;
    let mut bindings = fresh();
    bindings.update(at(0), &own(), &Trusted::new(), &claims(&[(4, ""), (5, "10.1.0.5"), (6, "10.1.0.6 fd00:1::6")]));
    let settled = |now| [4, 5, 6, 7].map(|index| bindings.settled(at(now), index, &both));
    assert_eq!(settled(5_000), [false, false, true, false]);
    assert_eq!(settled(5_001), [false, true, true, false]);
    assert!(bindings.settled(at(0), 5, &both[..1]));
}

/// What a pod may do. Its CNI has given it the address of its number before it runs.
#[derive(Clone, Debug)]
enum Act {
    Start(u32),
    Stop(u32),
    Add(u32, u32),
    Remove(u32, u32),
    Unreadable(u32),
    Pass(u64),
}

fn acts() -> impl Strategy<Value = Vec<Act>> {
    let pod = || 1..6_u32;
    prop::collection::vec(
        prop_oneof![
            3 => pod().prop_map(Act::Start),
            1 => pod().prop_map(Act::Stop),
            4 => (pod(), pod()).prop_map(|(pod, of)| Act::Add(pod, of)),
            2 => (pod(), pod()).prop_map(|(pod, of)| Act::Remove(pod, of)),
            1 => pod().prop_map(Act::Unreadable),
            1 => (0..6_000_u64).prop_map(Act::Pass),
        ],
        0..60,
    )
}

fn address(pod: u32) -> IpAddr {
    IpAddr::from([10, 1, 0, 100 + pod.to_le_bytes()[0]])
}

proptest! {
    /// In any order of events, with restarts of the agent anywhere: an interface has its CNI's address while it shows
    /// it, and never another one; so no address is on two interfaces, and no pod has what is another's.
    #[test]
    fn nobody_gets_what_is_not_his(acts in acts(), restart in prop::collection::vec(any::<prop::sample::Index>(), 0..3)) {
        let mut bindings = fresh();
        let mut now = 0;
        // Shown addresses by pod, oldest first; interface index 10 + pod, and reused as no kernel would.
        let mut pods: BTreeMap<u32, (Vec<IpAddr>, bool)> = BTreeMap::new();
        let restarts: BTreeSet<_> = restart.iter().map(|at| at.index(acts.len().max(1))).collect();
        for (n, act) in acts.iter().enumerate() {
            for (_, readable) in pods.values_mut() {
                *readable = true;
            }
            match act {
                Act::Start(pod) => {
                    pods.entry(*pod).or_insert_with(|| (vec![address(*pod)], true));
                }
                Act::Stop(pod) => {
                    pods.remove(pod);
                }
                Act::Add(pod, of) => {
                    if let Some((shown, _)) = pods.get_mut(pod) && !shown.contains(&address(*of)) {
                        shown.push(address(*of));
                    }
                }
                Act::Remove(pod, of) => {
                    if let Some((shown, _)) = pods.get_mut(pod) {
                        shown.retain(|ip| *ip != address(*of));
                    }
                }
                Act::Unreadable(pod) => {
                    if let Some((_, readable)) = pods.get_mut(pod) {
                        *readable = false;
                    }
                }
                Act::Pass(time) => now += time,
            }
            if restarts.contains(&n) {
                // An interface without a binding counts as new. If its pod has taken down its own address meanwhile, or
                // made it the younger one, nothing but the CNI's records can tell: such pods are left out.
                let owned = |pod: &u32| bindings.owners.get(&address(*pod)) == Some(&(10 + *pod));
                pods.retain(|pod, (shown, _)| {
                    shown.first() == Some(&address(*pod)) || (owned(pod) && shown.contains(&address(*pod)))
                });
                let bound = bindings.owners.iter();
                let previous = bound.map(|(ip, index)| (*ip, Previous { ifindex: *index, mac: mac(*index) })).collect();
                bindings = Bindings::new(WINDOW, previous);
            }
            let links = pods.iter().map(|(pod, (shown, readable))| claim(10 + pod, readable.then(|| shown.clone())));
            bindings.update(at(now), &own(), &Trusted::new(), &links.collect());
            for (pod, (shown, readable)) in &pods {
                let expected = if shown.contains(&address(*pod)) { vec![address(*pod)] } else { vec![] };
                let bound = bindings.bound(10 + pod);
                if *readable {
                    prop_assert_eq!(bound, expected, "pod {} after {:?}", pod, act);
                } else {
                    prop_assert!(bound.iter().all(|ip| *ip == address(*pod)), "pod {} after {:?}", pod, act);
                }
            }
            let all: Vec<_> = pods.keys().flat_map(|pod| bindings.bound(10 + pod)).collect();
            prop_assert_eq!(all.iter().collect::<BTreeSet<_>>().len(), all.len());
        }
    }

    /// Whatever is claimed, by anyone, in any order: an address is on one interface at most, and only if it claims it.
    #[test]
    fn one_address_one_interface(
        steps in prop::collection::vec(prop::collection::btree_map(1..8_u32, prop::collection::vec(1..12_u32, 0..4), 0..8), 1..20),
        trusted in prop::collection::btree_map(1..8_u32, prop::collection::btree_set(1..12_u32, 0..3), 0..3),
    ) {
        let trusted = trusted.into_iter().map(|(index, ips)| (index, ips.into_iter().map(address).collect())).collect();
        let mut bindings = fresh();
        for (n, step) in steps.into_iter().enumerate() {
            let claims: BTreeMap<_, _> =
                step.into_iter().map(|(index, ips)| claim(index, Some(ips.into_iter().map(address).collect()))).collect();
            bindings.update(at(700 * n as u64), &own(), &trusted, &claims);
            let mut seen = BTreeSet::new();
            for (index, claim) in &claims {
                for ip in bindings.bound(*index) {
                    prop_assert!(claim.addresses.as_ref().unwrap().contains(&ip));
                    prop_assert!(seen.insert(ip), "{ip} is bound twice");
                }
            }
        }
    }
}
