//! The loop of NetworkPolicy: nothing before all is listed, failures, restarts, numbers that rest.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;

use proxy_abi::policy::BlockEntry;
use proxy_core::name::ObjectName;
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::fake::{FakePolicyError, FakePolicyMaps, When};
use proxy_core::netpol::reconcile::{
    PolicyListing, PolicyReconciler, PolicyReport, PolicySettings, PolicySource, Regime,
};
use proxy_core::netpol::spec::{
    BlockSpec, Change, Labels, Namespace, PeerSpec, Pod, PolicySpec, PortNumber, PortSpec, RuleSpec, SelectorSpec,
};
use proxy_core::netpol::tables::Op;
use proxy_oracle::dice::{Dice, NODE};
use proxy_oracle::verdict::Cluster;

/// The loop with its maps, and the clock.
pub(crate) struct Stage {
    pub(crate) reconciler: PolicyReconciler,
    maps: FakePolicyMaps,
    now: u64,
}

type Report = PolicyReport<FakePolicyError>;

impl Stage {
    fn new(limits: Limits) -> Self {
        let settings = PolicySettings { limits, ..PolicySettings::new(NODE) };
        Self { reconciler: PolicyReconciler::new(settings), maps: FakePolicyMaps::new(limits), now: 1_000 }
    }

    /// Everything listed.
    pub(crate) fn started(changes: impl IntoIterator<Item = Change>) -> Self {
        let mut stage = Self::new(Limits::default());
        stage.handle(changes);
        stage.list_all();
        stage.settle();
        stage
    }

    pub(crate) fn handle(&mut self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            self.reconciler.handle(change);
        }
    }

    /// Lists what is known.
    pub(crate) fn list_all(&mut self) {
        let world = self.reconciler.engine().world();
        let policies = world.policy_names().collect();
        let pods = world.members().map(|(name, _)| name.clone()).collect();
        let namespaces = world.namespaces().map(|(name, _)| Arc::clone(name)).collect();
        self.reconciler.listed(PolicyListing::Policies(policies));
        self.reconciler.listed(PolicyListing::Pods(pods));
        self.reconciler.listed(PolicyListing::Namespaces(namespaces));
    }

    pub(crate) fn sync(&mut self) -> Report {
        let report = self.reconciler.sync(&mut self.maps, self.now);
        // As interfaces are told.
        self.maps.enforced = self.reconciler.enforces();
        report
    }

    /// Until nothing is left, waiting out every pause. The maps refuse what a packet must not meet.
    pub(crate) fn settle(&mut self) -> usize {
        let mut applied = 0;
        for _ in 0..200 {
            let report = self.sync();
            applied += report.applied;
            assert!(!matches!(report.failed, Some((_, FakePolicyError::Refused { .. }))), "{report:?}");
            match report.retry_at {
                Some(at) if !self.reconciler.settled() => self.now = at,
                _ => return applied,
            }
        }
        panic!("it does not settle");
    }

    pub(crate) fn slot(&self, pod: &str) -> Option<u16> {
        self.reconciler.slot(&format!("uid-{pod}"))
    }

    /// A new agent over the same maps.
    pub(crate) fn restart(&mut self) {
        let settings = PolicySettings::new(NODE);
        self.reconciler = PolicyReconciler::new(settings);
    }
}

pub(crate) fn name(name: &str) -> ObjectName {
    ObjectName::new("default", name)
}

fn namespace() -> Change {
    Change::Namespace(Namespace { name: "default".into(), labels: Labels::new(), terminating: false })
}

fn pod(pod: &str, ip: &str) -> Change {
    Change::Pod(Pod {
        name: name(pod),
        uid: format!("uid-{pod}").into(),
        labels: Labels::from([("app".into(), pod.into())]),
        node: Some(NODE.into()),
        host_network: false,
        finished: false,
        deleting: false,
        socket_lb: true,
        created: 0,
        ips: vec![ip.parse::<IpAddr>().expect("a literal")],
        ports: Vec::new(),
    })
}

/// Isolates a pod but for these ranges and ports.
pub(crate) fn isolate(pod: &str, from: &[(&str, u16)]) -> Change {
    let port = |number: u16| PortSpec { protocol: None, port: Some(PortNumber::Number(number.into())), end_port: None };
    let rule = |(cidr, number): &(&str, u16)| RuleSpec {
        peers: Some(vec![PeerSpec {
            block: Some(BlockSpec { cidr: (*cidr).into(), except: vec![] }),
            ..PeerSpec::default()
        }]),
        ports: Some(vec![port(*number)]),
    };
    Change::Policy(PolicySpec {
        name: name(&format!("for-{pod}")),
        audit: None,
        pod_selector: Some(SelectorSpec { labels: [("app".into(), pod.into())].into(), ..SelectorSpec::default() }),
        policy_types: None,
        ingress: Some(from.iter().map(rule).collect()),
        egress: None,
    })
}

pub(crate) fn two_pods() -> Vec<Change> {
    vec![namespace(), pod("a", "10.0.0.1"), pod("b", "10.0.0.2")]
}

#[test]
fn nothing_is_written_before_all_is_listed() {
    for left_out in PolicySource::ALL {
        let mut stage = Stage::new(Limits::default());
        stage.handle(two_pods().into_iter().chain([isolate("a", &[])]));
        let names = |names: &[&str]| names.iter().map(|n| name(n)).collect::<BTreeSet<_>>();
        let listings = [
            (PolicySource::Policies, PolicyListing::Policies(names(&["for-a"]))),
            (PolicySource::Pods, PolicyListing::Pods(names(&["a", "b"]))),
            (PolicySource::Namespaces, PolicyListing::Namespaces(["default".into()].into())),
        ];
        for (source, listing) in listings.clone() {
            if source != left_out {
                stage.reconciler.listed(listing);
            }
        }
        let report = stage.sync();
        assert_eq!((report.applied, report.retry_at, stage.maps.asked), (0, None, 0), "{left_out:?}");
        assert_eq!(stage.reconciler.missing().collect::<Vec<_>>(), [left_out]);
        assert_eq!((stage.reconciler.enforces(), stage.slot("a"), stage.reconciler.settled()), (false, None, false));
        for (_, listing) in listings.into_iter().filter(|(source, _)| *source == left_out) {
            stage.reconciler.listed(listing);
        }
        let report = stage.sync();
        assert!(report.applied > 0 && report.slots_changed && report.switched, "{report:?}");
        assert_eq!((stage.reconciler.enforces(), stage.reconciler.settled()), (true, true));
        assert!(stage.slot("a").is_some_and(|slot| stage.maps.word(slot).block != BlockEntry::OPEN_ID));
        assert!(stage.slot("b").is_some_and(|slot| stage.maps.word(slot).block == BlockEntry::OPEN_ID));
    }
}

#[test]
fn a_cluster_without_policies_costs_nothing() {
    let mut stage = Stage::new(Limits::default());
    stage.reconciler.listed(PolicyListing::Policies(BTreeSet::new()));
    assert_eq!((stage.settle(), stage.maps.asked, stage.reconciler.settled()), (0, 0, true));
    stage.handle(two_pods());
    stage.list_all();
    assert_eq!((stage.settle(), stage.maps.asked, stage.reconciler.enforces()), (0, 0, false));
    // The first policy, and the last.
    stage.handle([isolate("a", &[])]);
    assert!(stage.settle() > 0 && stage.reconciler.enforces());
    let slot = stage.slot("a");
    stage.handle([Change::PolicyGone(name("for-a"))]);
    stage.settle();
    assert_eq!((stage.reconciler.enforces(), stage.slot("a")), (false, slot));
    assert_eq!(stage.maps.word(slot.expect("a slot")).block, BlockEntry::OPEN_ID);
}

#[test]
fn what_a_listing_does_not_name_is_gone() {
    let mut stage = Stage::started(two_pods().into_iter().chain([isolate("a", &[]), isolate("b", &[])]));
    stage.reconciler.listed(PolicyListing::Policies([name("for-b")].into()));
    stage.settle();
    let block = |stage: &Stage, pod| stage.maps.word(stage.slot(pod).expect("a slot")).block;
    assert_eq!(block(&stage, "a"), BlockEntry::OPEN_ID);
    assert_ne!(block(&stage, "b"), BlockEntry::OPEN_ID);
    stage.reconciler.listed(PolicyListing::Pods([name("b")].into()));
    stage.settle();
    assert_eq!((stage.slot("a"), stage.slot("b").is_some()), (None, true));
    stage.reconciler.listed(PolicyListing::Namespaces(BTreeSet::new()));
    stage.settle();
    assert_eq!(stage.reconciler.engine().world().namespace("default"), None);
}

#[test]
fn slots_are_told_after_the_switch_and_not_before() {
    let mut stage = Stage::started(two_pods().into_iter().chain([isolate("a", &[])]));
    stage.handle([pod("c", "10.0.0.3"), isolate("c", &[])]);
    stage.maps.fail_with(|_, op| matches!(op, Op::Epoch(_)).then_some(When::Before));
    let report = stage.sync();
    assert!(matches!(report.failed, Some((Op::Epoch(_), FakePolicyError::Injected(_)))), "{report:?}");
    assert!(report.pending > 0 && !report.slots_changed && !report.switched);
    assert_eq!((stage.slot("c"), report.retry_at), (None, Some(stage.now + 50)));
    // Too early: nothing is tried.
    let asked = stage.maps.asked;
    assert_eq!((stage.sync().retry_at, stage.maps.asked), (Some(stage.now + 50), asked));
    stage.maps.heal();
    stage.settle();
    assert!(stage.slot("c").is_some_and(|slot| stage.maps.word(slot).block != 0));
}

#[test]
fn pauses_grow_and_the_maps_are_read_again() {
    let mut stage = Stage::started(two_pods().into_iter().chain([isolate("a", &[])]));
    let loads = stage.maps.loads;
    stage.maps.fail_with(|_, _| Some(When::Before));
    stage.handle([isolate("b", &[])]);
    let mut pauses = Vec::new();
    for _ in 0..9 {
        let at = stage.sync().retry_at.expect("a pause");
        pauses.push(at - stage.now);
        stage.now = at;
    }
    assert_eq!(pauses, [50, 100, 200, 400, 800, 1_600, 3_200, 6_400, 10_000]);
    assert_eq!(stage.maps.loads - loads, 2);
    // What was changed meanwhile comes with it.
    stage.handle([isolate("b", &[("10.0.0.0/8", 80)])]);
    stage.maps.heal();
    stage.settle();
    assert_eq!(stage.maps.tables(), stage.reconciler.engine().tables());
}

#[test]
fn a_restart_holds_what_is_there_and_writes_nothing() {
    let objects: Vec<Change> = two_pods().into_iter().chain([isolate("a", &[("10.0.0.0/8", 80)])]).collect();
    let mut stage = Stage::started(objects.clone());
    let (slots, held) = ([stage.slot("a"), stage.slot("b")], stage.maps.tables().clone());
    stage.restart();
    stage.maps.fail_load = true;
    let report = stage.sync();
    assert_eq!((report.load_error, report.retry_at), (Some(FakePolicyError::InjectedLoad), Some(stage.now + 50)));
    stage.now += 50;
    // Before anything is listed the pods are found by their UIDs.
    let report = stage.sync();
    assert!(report.slots_changed && report.applied == 0, "{report:?}");
    assert_eq!(([stage.slot("a"), stage.slot("b")], stage.reconciler.enforces()), (slots, true));
    stage.handle(objects);
    assert_eq!(stage.sync().applied, 0);
    stage.list_all();
    assert_eq!((stage.settle(), stage.reconciler.settled()), (0, true));
    assert_eq!(([stage.slot("a"), stage.slot("b")], stage.maps.tables()), (slots, &held));
    // All policies were deleted while nobody watched; the other sources are not even asked for.
    stage.restart();
    stage.sync();
    assert!(stage.reconciler.enforces());
    stage.reconciler.listed(PolicyListing::Policies(BTreeSet::new()));
    assert!(stage.sync().slots_changed);
    assert_eq!((stage.reconciler.enforces(), stage.slot("a"), stage.maps.tables()), (false, None, &held));
}

#[test]
fn a_freed_slot_rests() {
    let mut stage = Stage::started(two_pods().into_iter().chain([isolate("a", &[])]));
    let slot = stage.slot("a");
    stage.handle([Change::PodGone(name("a")), pod("c", "10.0.0.3")]);
    stage.settle();
    stage.handle([pod("d", "10.0.0.4")]);
    stage.settle();
    assert!(stage.slot("c").is_some() && stage.slot("c") != slot && stage.slot("d") != slot);
    stage.now += 500;
    stage.handle([pod("e", "10.0.0.5")]);
    stage.settle();
    assert_eq!(stage.slot("e"), slot);
}

#[test]
fn who_finds_no_slot_gets_one_when_it_has_rested() {
    let mut stage = Stage::new(Limits { slots: 3, ..Limits::default() });
    stage.handle(two_pods().into_iter().chain([isolate("a", &[])]));
    stage.list_all();
    stage.settle();
    stage.handle([pod("c", "10.0.0.3")]);
    stage.settle();
    assert_eq!((stage.slot("c"), stage.reconciler.engine().diagnostics().len()), (None, 1));
    let gone = stage.now;
    stage.handle([Change::PodGone(name("b"))]);
    let report = stage.sync();
    assert_eq!((report.retry_at, stage.slot("c")), (Some(gone + 500), None));
    stage.now = gone + 500;
    stage.settle();
    assert_eq!((stage.slot("c").is_some(), stage.reconciler.engine().diagnostics()), (true, Vec::new()));
}

/// Whatever fails, and whenever: in the end the maps are what the objects mean, and at no time did they break a rule.
#[test]
fn faults_of_all_kinds_are_survived() {
    for seed in 0..150 {
        let mut dice = Dice::new(seed);
        let mut cluster = Cluster::empty();
        let mut stage = Stage::new(Limits::default());
        let first = dice.cluster();
        for change in &first {
            cluster.apply(change.clone());
        }
        stage.handle(first);
        stage.list_all();
        let mut state = seed;
        stage.maps.fail_with(move |number, _| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(number | 1);
            match state >> 58 {
                0 => Some(When::Before),
                1 => Some(When::After),
                _ => None,
            }
        });
        for edit in 0..6 {
            let changes = dice.edit(&cluster);
            for change in &changes {
                cluster.apply(change.clone());
            }
            stage.handle(changes);
            let report = stage.sync();
            assert!(!matches!(report.failed, Some((_, FakePolicyError::Refused { .. }))), "{seed} {edit}: {report:?}");
            stage.now = report.retry_at.unwrap_or(stage.now + 100);
        }
        stage.maps.heal();
        stage.settle();
        if !cluster.policies.is_empty() {
            assert_eq!(stage.maps.tables(), stage.reconciler.engine().tables(), "seed {seed}");
        }
        let enforced = |(policy, _): &(PolicySpec, bool)| policy.audit.as_deref() != Some("true");
        let regime = match (cluster.policies.values().any(enforced), cluster.policies.is_empty()) {
            (true, _) => Regime::Enforced,
            (false, false) => Regime::Audited,
            (false, true) => Regime::Off,
        };
        assert_eq!(stage.reconciler.regime(), regime, "seed {seed}");
        for pod in cluster.subjects().filter(|_| regime != Regime::Off) {
            assert!(stage.reconciler.slot(&pod.uid).is_some(), "seed {seed}: {}", pod.name);
        }
    }
}

#[test]
fn what_does_not_fit_settles() {
    let limits = Limits { bits: 20, ..Limits::default() };
    let mut stage = Stage::new(limits);
    let many: Vec<(String, u16)> = (0..9).map(|n| (format!("10.244.{n}.0/24"), 1000 + n)).collect();
    let many: Vec<(&str, u16)> = many.iter().map(|(range, port)| (range.as_str(), *port)).collect();
    stage.handle(two_pods().into_iter().chain([isolate("a", &[("10.0.0.0/8", 80)]), isolate("b", &many)]));
    stage.list_all();
    let settled = (0..10).find(|_| stage.sync().applied == 0);
    assert_eq!((settled.is_some(), stage.reconciler.engine().diagnostics().len()), (true, 1));
}
