//! The loop: nothing before all is listed, failures, pauses, restarts.

use std::collections::BTreeSet;

use proxy_abi::{BackendEntry, FrontendEntry, FrontendKey, IpBytes, NameBytes, PortBe, Proto, ServiceEntry};
use proxy_core::compile::Capacity;
use proxy_core::event::{Event, Listing, Source};
use proxy_core::fake::{FakeDataplane, FakeError, When};
use proxy_core::reconcile::Settings;
use proxy_core::tables::{Op, Tables};

use crate::cluster::{ip, link, meaning, name, web, web_slice};
use crate::node::{TestNode, everything, listings};

fn two_services() -> Vec<Event> {
    vec![
        Event::Service(web("a", "10.96.0.1")),
        Event::Slice(web_slice("a", &["10.244.0.1", "10.244.0.2"])),
        Event::Service(web("b", "10.96.0.2")),
        Event::Slice(web_slice("b", &["10.244.0.3"])),
        Event::Link(link(7, &["10.244.0.1"])),
    ]
}

#[test]
fn partial_is_unknown_never_empty() {
    let mut node = TestNode::started(two_services());
    let (before, asked) = (node.tables().clone(), node.fake.asked);
    let state = node.reconciler.state().clone();
    // Each source in turn never finishes its first list, having named nothing.
    for left_out in 0..5 {
        node.restart_with(
            listings(&proxy_core::state::ClusterState::default())
                .into_iter()
                .enumerate()
                .filter_map(|(index, event)| (index != left_out).then_some(event)),
        );
        let report = node.sync();
        assert_eq!((report.applied, report.pending, report.retry_at), (0, 0, None));
        node.handle([Event::Service(web("c", "10.96.0.3"))]);
        node.sync();
        assert_eq!((node.tables(), node.fake.asked), (&before, asked));
    }
    // Later, a list that breaks off names nothing gone either.
    node.restart_with(everything(&state).into_iter().chain(listings(&state)));
    assert_eq!(node.settle(), 0);
    node.handle([Event::Service(web("a", "10.96.0.1"))]);
    assert_eq!(node.settle(), 0);
    // One that ends does.
    node.change([Event::Listed(Source::Services, Listing::Objects([name("a")].into()))]);
    assert_eq!(meaning(node.tables()).services, ["default/a".to_owned()].into());
}

#[test]
fn what_could_never_be_read_is_unknown_not_gone() {
    let mut node = TestNode::started(two_services());
    let before = node.tables().clone();
    // Of all objects only the interface and Service a are readable at the start; a's slice is not.
    let a = Event::Service(web("a", "10.96.0.1"));
    let read = [a.clone(), Event::Link(link(7, &["10.244.0.1"]))];
    let mut state = proxy_core::state::ClusterState::default();
    for event in &read {
        state.apply(event.clone());
    }
    node.restart_with(read.into_iter().chain([Event::Unreadable(true)]).chain(listings(&state)));
    assert_eq!(node.settle(), 0);
    assert_eq!(node.tables(), &before, "neither b nor the backends of a are gone");
    // What is new comes in meanwhile.
    node.change([Event::Service(web("c", "10.96.0.3")), Event::Slice(web_slice("c", &["10.244.0.4"]))]);
    let services = |names: &[&str]| names.iter().map(|name| format!("default/{name}")).collect::<BTreeSet<_>>();
    assert_eq!(meaning(node.tables()).services, services(&["a", "b", "c"]));
    // a's slice is mended, b turns out to be gone.
    node.change([Event::Slice(web_slice("a", &["10.244.0.1", "10.244.0.2"])), Event::Unreadable(false)]);
    assert_eq!(meaning(node.tables()).services, services(&["a", "c"]));
}

#[test]
fn unchanged_input_is_no_work() {
    let mut node = TestNode::started(two_services());
    let asked = node.fake.asked;
    for event in two_services() {
        assert!(!node.reconciler.handle(event.clone()), "{event:?}");
    }
    assert_eq!((node.settle(), node.fake.asked), (0, asked));
}

#[test]
fn one_change_costs_its_own_operations() {
    let mut node = TestNode::started(two_services());
    // A backend, two slots and the switch, and the old backend; later, both old slots zeroed.
    node.handle([Event::Slice(web_slice("a", &["10.244.0.2", "10.244.0.4"]))]);
    assert_eq!(node.sync().applied, 1 + 2 + 1 + 1);
    assert_eq!(node.settle(), 2);
}

#[test]
fn an_operation_waits_for_its_referent_and_the_others_do_not() {
    let mut node = TestNode::started(two_services());
    let before = node.tables().clone();
    node.fake.fail_with(|_, op| matches!(op, Op::SetBackend(..)).then_some(When::Before));
    node.handle([
        Event::Slice(web_slice("a", &["10.244.0.9"])),
        Event::Service(web("c", "10.96.0.3")),
        Event::ServiceGone(name("b")),
    ]);
    let report = node.sync();
    let failed: Vec<_> = report.failed.iter().map(|(op, error)| (op.row(), error.to_string())).collect();
    assert_eq!(failed.len(), 1, "{failed:?}");
    let a = FrontendKey { ip: ip("10.96.0.1").into(), port: PortBe::new(80), proto: Proto::TCP, scope: 0 };
    assert_eq!(node.tables().frontends.get(&a), before.frontends.get(&a), "not switched");
    let both = |tables: &Tables| tables.backends.values().filter(|backend| backend.service == 1).count();
    assert_eq!(both(node.tables()), 2, "nor are its old backends zeroed");
    let services = meaning(node.tables()).services;
    assert_eq!(services, ["default/a".to_owned(), "default/c".to_owned()].into(), "the others went on");
    assert_eq!(report.retry_at, Some(node.now + node.settings.first_retry));
    node.fake.heal();
    node.settle();
    assert_eq!(meaning(node.tables()).backends.iter().map(|(_, b)| b.0).collect::<Vec<_>>(), [ip("10.244.0.9")]);
}

#[test]
fn pauses_double_up_to_the_longest() {
    let mut node = TestNode::new(Settings { first_retry: 10, last_retry: 65, ..Settings::default() });
    node.fake.fail_with(|_, op| matches!(op, Op::SetService(..)).then_some(When::Before));
    node.start_unsettled([Event::Service(web("a", "10.96.0.1"))]);
    let mut pauses = Vec::new();
    for _ in 0..5 {
        let report = node.sync();
        assert_eq!(report.failed.len(), 1);
        let at = report.retry_at.expect("a time to retry");
        pauses.push(at - node.now);
        let asked = node.fake.asked;
        node.now = at - 1;
        assert_eq!((node.sync().retry_at, node.fake.asked), (Some(at), asked), "not before its time");
        node.now = at;
    }
    assert_eq!(pauses, [10, 20, 40, 65, 65]);
}

#[test]
fn a_row_that_waits_for_another_does_not_ask_to_be_called() {
    let mut node = TestNode::new(Settings { first_retry: 10, last_retry: 1_000, ..Settings::default() });
    node.start_unsettled(two_services());
    node.settle();
    // The name of one service fails; then a frontend of the other one, whose name has to wait for it.
    node.fake.fail_with(|_, op| matches!(op, Op::DeleteService(_)).then_some(When::Before));
    node.handle([Event::ServiceGone(name("b"))]);
    node.sync();
    node.handle([Event::ServiceGone(name("a"))]);
    node.fake.fail_with(|_, op| matches!(op, Op::DeleteFrontend(_) | Op::DeleteService(_)).then_some(When::Before));
    for _ in 0..20 {
        let at = node.sync().retry_at.expect("a time to retry");
        assert!(at > node.now, "{at} has passed");
        node.now = at;
    }
    node.fake.heal();
    node.settle();
    assert_eq!(meaning(node.tables()).services, BTreeSet::new());
}

#[test]
fn a_failure_after_the_effect_is_not_taken_for_none() {
    let mut node = TestNode::started(two_services());
    let before = node.tables().clone();
    node.fake.fail_with(|_, op| matches!(op, Op::SetFrontend(..)).then_some(When::After));
    node.handle([Event::Slice(web_slice("a", &["10.244.0.1"]))]);
    node.sync();
    // Back to what it was, before the failed switch is known to have happened.
    node.fake.heal();
    node.handle([Event::Slice(web_slice("a", &["10.244.0.1", "10.244.0.2"]))]);
    node.settle();
    assert_eq!(meaning(node.tables()), meaning(&before));
}

#[test]
fn a_dataplane_that_cannot_be_read_is_not_written() {
    let mut node = TestNode::new(Settings::default());
    node.fake.fail_load = true;
    node.start_unsettled(two_services());
    let report = node.sync();
    assert_eq!(report.load_error, Some(FakeError::InjectedLoad));
    assert_eq!((node.fake.asked, report.retry_at), (0, Some(node.now + node.settings.first_retry)));
    assert!(!node.reconciler.settled());
    node.settle();
    assert!(node.reconciler.settled());
    assert_eq!(meaning(node.tables()).services.len(), 2);
}

#[test]
fn what_somebody_else_wrote_is_undone_after_a_reload() {
    let mut node = TestNode::started(two_services());
    let right = node.tables().clone();
    let mut wrong = right.clone();
    wrong.frontends.pop_last();
    wrong.local_pods.clear();
    wrong
        .services
        .insert(77, ServiceEntry { name: NameBytes::new("x/y").expect("short"), reserved: 0, affinity_seconds: 0 });
    node.fake = FakeDataplane::with_tables(Capacity::default(), wrong);
    node.reconciler.reload();
    node.settle();
    assert_eq!(*node.tables(), right);
}

#[test]
fn a_restart_renumbers_nothing_and_does_not_shorten_the_grace() {
    let mut node = TestNode::started(two_services());
    node.handle([Event::Slice(web_slice("a", &["10.244.0.2"])), Event::ServiceGone(name("b"))]);
    node.sync();
    let before = node.tables().clone();
    node.restart();
    let report = node.sync();
    assert_eq!((report.applied, report.pending), (0, 0), "nothing changed, nothing is done");
    assert_eq!(*node.tables(), before);
    assert_eq!(report.retry_at, Some(node.now + node.settings.grace), "old slots are zeroed after the grace");
    node.handle([Event::Slice(web_slice("a", &["10.244.0.2", "10.244.0.8"]))]);
    node.settle();
    let next = node.tables().backends.values().map(|backend| backend.generation).max();
    assert!(next > before.backends.values().map(|backend| backend.generation).max());
}

#[test]
fn a_generation_is_not_used_again_after_a_restart() {
    let mut node = TestNode::started(two_services());
    // The newest backend goes, and with it the highest generation.
    let gone: BTreeSet<u32> = node.tables().backends.values().map(|backend| backend.generation).collect();
    node.change([Event::ServiceGone(name("b"))]);
    node.restart();
    node.change([Event::Service(web("c", "10.96.0.3")), Event::Slice(web_slice("c", &["10.244.0.3"]))]);
    let (id, backend) = node.tables().backends.iter().next_back().expect("the new one");
    assert_eq!(*id, 3, "its id is used again");
    assert!(!gone.contains(&backend.generation));
}

#[test]
fn rows_that_make_no_sense_are_deleted_and_their_numbers_are_safe() {
    let named =
        |text: &str| ServiceEntry { name: NameBytes::new(text).expect("short"), reserved: 0, affinity_seconds: 0 };
    let backend = |service, address: &str, generation| BackendEntry {
        ip: ip(address).into(),
        service,
        generation,
        port: PortBe::new(8080),
        proto: Proto::TCP,
        reserved: 0,
        flags: 0,
    };
    let flags = FrontendEntry::MASQUERADE_OUTSIDE;
    let frontend =
        |first, count, service| FrontendEntry { first, count, service, flags, affinity_seconds: 0, generation: 5 };
    let key =
        |address: &str| FrontendKey { ip: ip(address).into(), port: PortBe::new(80), proto: Proto::TCP, scope: 0 };
    let broken = Tables {
        services: [(1, named("default/a")), (2, named("default/a")), (3, named("nonsense")), (0, named("default/b"))]
            .into(),
        backends: [
            (1, backend(1, "10.244.0.1", 3)),
            (2, backend(1, "10.244.0.1", 4)),
            (3, backend(9, "10.244.0.2", 5)),
            (4, backend(1, "10.244.0.2", u32::MAX)),
        ]
        .into(),
        slots: [(1, 1), (2, 4), (3, 3), (4, 99), (9, 2)].into(),
        frontends: [
            (key("10.96.0.1"), frontend(1, 2, 1)),
            (key("10.96.0.2"), frontend(2, 3, 1)),
            (key("10.96.0.3"), frontend(700_000, 4, 1)),
            (key("10.96.0.4"), frontend(6, 2, 3)),
            (FrontendKey::address(IpBytes::from(ip("10.96.0.7"))), frontend(0, 0, 0)),
        ]
        .into(),
        ..Tables::default()
    };
    let mut node = TestNode::new(Settings::default());
    node.fake = FakeDataplane::with_tables(node.settings.capacity, broken);
    node.start_unsettled(two_services());
    node.settle_broken();
    let clean = TestNode::started(two_services());
    assert_eq!(meaning(node.tables()), meaning(clean.tables()));
    let a = node.tables().frontends.get(&key("10.96.0.1"));
    assert_eq!(a, Some(&frontend(1, 2, 1)), "what makes sense keeps its numbers and is not written");
    assert_eq!(node.settle(), 0);
}

#[test]
fn failures_by_number_by_seed_and_by_kind() {
    let mut fake = FakeDataplane::new(Capacity::default());
    let op = |id| {
        Op::SetService(
            id,
            ServiceEntry { name: NameBytes::new("a/b").expect("short"), reserved: 0, affinity_seconds: 0 },
        )
    };
    let run = |fake: &mut FakeDataplane| -> Vec<bool> {
        use proxy_core::dataplane::Dataplane;
        let ops: Vec<Op> = (1..=12).map(op).collect();
        fake.apply_batch(&ops).iter().map(Result::is_ok).collect()
    };
    fake.fail_every(3, When::After);
    assert_eq!(run(&mut fake), [true, true, false, true, true, false, true, true, false, true, true, false]);
    assert_eq!(fake.tables().services.len(), 12, "after the effect");
    fake.fail_by_seed(1, 500);
    let first = run(&mut fake);
    fake.fail_by_seed(1, 500);
    assert_eq!(run(&mut fake), first, "the same seed fails the same");
    assert!(first.contains(&true) && first.contains(&false), "{first:?}");
    fake.heal();
    assert_eq!(run(&mut fake), [true; 12]);
}
