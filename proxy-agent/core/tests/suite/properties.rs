//! Whatever the cluster and whatever fails: the tables arrive, and are whole on every step of the way.

use std::collections::{BTreeMap, BTreeSet};

use proptest::collection::{btree_map, vec};
use proptest::prelude::*;
use proptest::sample::Index;

use proxy_abi::{BackendEntry, FrontendEntry, FrontendKey, IpBytes, LocalPodEntry, PortBe, PrefixKey, Proto};
use proxy_core::event::{Event, LinkPath, Node, PodLink};
use proxy_core::fake::When;
use proxy_core::plan::plan;
use proxy_core::service::{Endpoint, Protocol, Service, ServicePort};
use proxy_core::state::ClusterState;
use proxy_core::tables::Tables;

use crate::cluster::{self, Meaning, link, meaning, name, port, ready, service, slice};
use crate::node::{TestNode, everything, listings};

/// A whole cluster; generated small, so that objects meet.
#[derive(Clone, Debug)]
struct World {
    services: BTreeMap<u8, ServiceShape>,
    slices: BTreeMap<u8, SliceShape>,
    pods: BTreeMap<u8, PodShape>,
    zone: Option<u8>,
    /// Bits: addresses of other interfaces. One of them is a pod's at other times.
    devices: u8,
    /// Bits: two ServiceCIDRs, the range of the node's pods.
    ranges: u8,
}

#[derive(Clone, Debug)]
struct ServiceShape {
    address: u8,
    families: u8,
    ports: u8,
    /// Bits: NodePort, external address, load balancer, its sources, internal and external policy Local, affinity.
    kind: u8,
    /// Last number of the external address and of the load balancer's, added to the NodePort.
    outside: (u8, u8),
}

#[derive(Clone, Debug)]
struct SliceShape {
    service: u8,
    v6: bool,
    target: u8,
    endpoints: Vec<(u8, u8, u8, u8)>,
}

#[derive(Clone, Debug)]
struct PodShape {
    address: u8,
    path: u8,
}

/// May two Services want one address, and a pod a Service's?
#[derive(Clone, Copy, PartialEq)]
enum Conflicts {
    Allowed,
    Avoided,
}

fn worlds(conflicts: Conflicts) -> impl Strategy<Value = World> {
    let services = btree_map(0..4_u8, (0..2_u8, 1..4_u8, 1..8_u8, any::<u8>(), (0..6_u8, 0..6_u8)), 0..4);
    let endpoint = (1..6_u8, 0..6_u8, 0..3_u8, 0..4_u8);
    let slices = btree_map(0..6_u8, (0..4_u8, any::<bool>(), 0..2_u8, vec(endpoint, 0..4)), 0..6);
    let pods = btree_map(5..9_u8, (1..6_u8, 0..3_u8), 0..4);
    let node = (proptest::option::of(0..2_u8), 0..32_u8, 0..8_u8);
    (services, slices, pods, node).prop_map(move |(services, slices, pods, (zone, devices, ranges))| World {
        services: services
            .into_iter()
            .map(|(id, (address, families, ports, kind, outside))| {
                let allowed = conflicts == Conflicts::Allowed;
                let (address, outside) = if allowed { (address, outside) } else { (10 + id, (10 + id, 20 + id)) };
                (id, ServiceShape { address, families, ports, kind, outside })
            })
            .collect(),
        slices: slices
            .into_iter()
            .map(|(id, (service, v6, target, endpoints))| (id, SliceShape { service, v6, target, endpoints }))
            .collect(),
        pods: pods
            .into_iter()
            .map(|(id, (address, path))| {
                let address = if conflicts == Conflicts::Allowed { address } else { id };
                (id, PodShape { address, path })
            })
            .collect(),
        zone,
        devices,
        ranges,
    })
}

/// Addresses from outside: some that anybody may have, some that are a Service's, a pod's, the node's, or in a range.
fn outside(number: u8, v6: bool) -> std::net::IpAddr {
    let strange = [("10.96.0.1", "fd00:96::1"), ("10.244.0.5", "fd00:244::5"), ("192.168.0.1", "fd00:99::1")];
    cluster::ip(&match strange.get(usize::from(number)) {
        Some((v4, _)) if !v6 => (*v4).to_owned(),
        Some((_, v6)) => (*v6).to_owned(),
        None if v6 => format!("fd00:203::{number:x}"),
        None => format!("203.0.113.{number}"),
    })
}

fn set(bits: u8, bit: u8) -> bool {
    bits & (1 << bit) != 0
}

fn service_of(id: u8, shape: &ServiceShape) -> Service {
    let ports = [("http", Protocol::Tcp, 80), ("dns", Protocol::Udp, 53), ("alt", Protocol::Tcp, 81)];
    let node_port = |bit: u16| 30_000 + 8 * u16::from(shape.outside.0) + bit;
    let ports: Vec<_> = (0_u8..)
        .zip(ports)
        .filter(|(bit, _)| set(shape.ports, *bit))
        .map(|(bit, (name, protocol, number))| ServicePort {
            node_port: set(shape.kind, 0).then(|| cluster::number(node_port(u16::from(bit)))),
            ..port(name, protocol, number)
        })
        .collect();
    let (v4, v6) = (format!("10.96.0.{}", shape.address), format!("fd00:96::{}", shape.address));
    let ips = [(0, &v4), (1, &v6)].into_iter().filter(|(bit, _)| set(shape.families, *bit));
    let ips: Vec<&str> = ips.map(|(_, ip)| ip.as_str()).collect();
    let both = |bit: u8, number: u8| {
        let wanted = set(shape.kind, bit);
        [false, true].into_iter().filter(move |_| wanted).map(move |v6| outside(number, v6)).collect::<Vec<_>>()
    };
    let sources = ["192.0.2.0/24", "192.168.0.0/24", "fd00:2::/64", "::/3"];
    let sources =
        (0_u8..).zip(sources).filter(|(bit, _)| set(shape.kind, 3) && set(shape.outside.1 | shape.ports, *bit));
    Service {
        affinity_seconds: set(shape.kind, 6).then_some(60),
        external_ips: both(1, shape.outside.0),
        load_balancer_ips: both(2, shape.outside.1),
        source_ranges: sources.map(|(_, range)| range.parse().expect("a range")).collect(),
        internal_local: set(shape.kind, 4),
        external_local: set(shape.kind, 5),
        health_check_node_port: set(shape.kind, 7).then(|| cluster::number(32_000)),
        ..service(&format!("s{id}"), &ips, &ports)
    }
}

impl World {
    fn state(&self) -> ClusterState {
        let mut state = ClusterState::default();
        let range = |text: &str| text.parse().expect("a range");
        let pod_cidrs = if set(self.ranges, 2) { vec![range("10.244.0.0/24")] } else { Vec::new() };
        let zone = self.zone.map(|zone| format!("zone-{zone}").into());
        state.apply(Event::Node(Node { zone, pod_cidrs, ..cluster::node() }));
        let cidrs = [("a", vec![range("10.96.0.0/16")]), ("b", vec![range("203.0.113.8/29"), range("fd00:203::/64")])];
        for (_, (name, ranges)) in (0_u8..).zip(cidrs).filter(|(bit, _)| set(self.ranges, *bit)) {
            state.apply(Event::ServiceCidr(name.into(), ranges));
        }
        let addresses =
            [(2, "192.168.0.1"), (2, "fd00:99::7"), (3, "203.0.113.10"), (3, "10.96.0.1"), (6, "192.168.7.1")];
        let addresses: Vec<_> =
            (0_u8..).zip(addresses).filter(|(bit, _)| set(self.devices, *bit)).map(|(_, device)| device).collect();
        for index in [2, 3, 6] {
            let own: Vec<&str> = addresses.iter().filter(|(i, _)| *i == index).map(|(_, ip)| *ip).collect();
            if !own.is_empty() && !self.pods.contains_key(&u8::try_from(index).expect("small")) {
                state.apply(Event::Device(cluster::device(index, &own)));
            }
        }
        for (id, shape) in &self.services {
            state.apply(Event::Service(service_of(*id, shape)));
        }
        for (id, shape) in &self.slices {
            let target = 8080 + u16::from(shape.target);
            let ports = [("http", Protocol::Tcp, target), ("dns", Protocol::Udp, 5353), ("alt", Protocol::Tcp, 8081)];
            let endpoints = shape.endpoints.iter().map(|endpoint| endpoint_of(shape.v6, *endpoint)).collect();
            let owner = format!("s{}", shape.service);
            state.apply(Event::Slice(slice(&format!("slice{id}"), &owner, &ports, endpoints)));
        }
        for (id, shape) in &self.pods {
            // Address 1 of the service range is sometimes a pod's.
            let address =
                if shape.address == 1 { "10.96.0.1".to_owned() } else { format!("10.244.0.{}", shape.address) };
            let path = [LinkPath::Redirect, LinkPath::Switch, LinkPath::Stack][usize::from(shape.path)];
            state.apply(Event::Link(PodLink { path, ..link(u32::from(*id), &[&address]) }));
        }
        state
    }
}

fn endpoint_of(v6: bool, (address, condition, node, hint): (u8, u8, u8, u8)) -> Endpoint {
    let address = if v6 { format!("fd00:244::{address}") } else { format!("10.244.0.{address}") };
    let (ready_now, serving, terminating) = [
        (true, true, false),
        (true, true, false),
        (true, true, false),
        (false, true, true),
        (false, false, true),
        (false, false, false),
    ][usize::from(condition)];
    Endpoint {
        ready: ready_now,
        serving,
        terminating,
        node: (node > 0).then(|| ["node-a", "node-b"][usize::from(node) - 1].into()),
        for_zones: if hint > 1 { vec![format!("zone-{}", hint - 2).into()] } else { Vec::new() },
        ..ready(&address)
    }
}

/// What leads from one state to another.
fn between(old: &ClusterState, new: &ClusterState) -> Vec<Event> {
    let mut events: Vec<Event> = everything(new);
    let named: BTreeSet<_> = new.slices().map(|slice| slice.name.clone()).collect();
    events.extend(new.slices().cloned().map(Event::Slice));
    events.extend(old.slices().filter(|s| !named.contains(&s.name)).map(|s| Event::SliceGone(s.name.clone())));
    let gone = old.services().filter(|s| new.service(&s.name).is_none());
    events.extend(gone.map(|s| Event::ServiceGone(s.name.clone())));
    events.extend(old.links().filter(|l| new.link(l.ifindex).is_none()).map(|l| Event::LinkGone(l.ifindex)));
    events.extend(old.devices().filter(|d| new.device(d.ifindex).is_none()).map(|d| Event::DeviceGone(d.ifindex)));
    let known: BTreeSet<_> = new.service_cidrs().map(|(name, _)| name).collect();
    let gone = old.service_cidrs().filter(|(name, _)| !known.contains(name));
    events.extend(gone.map(|(name, _)| Event::ServiceCidrGone(std::sync::Arc::clone(name))));
    events
}

/// Everything, slices without a Service too.
fn all(state: &ClusterState) -> Vec<Event> {
    between(&ClusterState::default(), state)
}

fn permuted(mut events: Vec<Event>, order: &[Index]) -> Vec<Event> {
    for (position, index) in order.iter().enumerate().take(events.len()) {
        let other = index.index(events.len());
        events.swap(position, other);
    }
    events
}

/// A node brought up with this cluster.
fn node_with(state: &ClusterState) -> TestNode {
    let mut node = TestNode::new(proxy_core::reconcile::Settings::default());
    node.handle(all(state).into_iter().chain(listings(state)));
    node.settle();
    node
}

/// Rows without sense, to be cleaned away.
fn junk() -> impl Strategy<Value = Tables> {
    let id = 0..12_u32;
    let address = (1..6_u8, any::<bool>())
        .prop_map(|(n, service)| cluster::ip(&if service { format!("10.96.0.{n}") } else { format!("10.244.0.{n}") }));
    let name = (0..4_u8).prop_map(|n| proxy_abi::ServiceEntry {
        name: proxy_abi::NameBytes::new(&format!("default/s{n}:http")).expect("short"),
        reserved: 0,
        affinity_seconds: 0,
    });
    let backend = (address.clone(), id.clone(), 0..9_u32).prop_map(|(ip, service, generation)| BackendEntry {
        ip: ip.into(),
        service,
        generation,
        port: PortBe::new(8080),
        proto: Proto::TCP,
        reserved: 0,
        flags: 0,
    });
    let key = (address.clone(), prop_oneof![Just(0), Just(80), Just(81)], 0..2_u8)
        .prop_map(|(ip, port, scope)| FrontendKey { ip: ip.into(), port: PortBe::new(port), proto: Proto::TCP, scope });
    let frontend = (id.clone(), 0..4_u32, id.clone(), 0..128_u32).prop_map(|(first, count, service, flags)| {
        FrontendEntry { first, count, service, flags, affinity_seconds: 0, generation: 1 }
    });
    let prefix = (address.clone(), id.clone(), 0..40_u8, any::<bool>()).prop_map(|(ip, service, bits, global)| {
        let scope = if global { PrefixKey::SERVICE_CIDR } else { service };
        PrefixKey::range(scope, ip.into(), bits.min(32))
    });
    let pod = id.clone().prop_map(|ifindex| LocalPodEntry {
        ifindex,
        mac: proxy_abi::MacBytes::default(),
        slot: 0,
        flags: 0,
    });
    (
        btree_map(id.clone(), name, 0..6),
        btree_map(id.clone(), backend, 0..8),
        btree_map(id.clone(), id, 0..8),
        btree_map(key, frontend, 0..5),
        btree_map(address.prop_map(IpBytes::from), pod, 0..4),
        btree_map(prefix, Just(1), 0..4),
    )
        .prop_map(|(services, backends, slots, frontends, local_pods, prefixes)| Tables {
            services,
            backends,
            slots,
            frontends,
            local_pods,
            prefixes,
            ..Tables::default()
        })
}

fn after(mut tables: Tables, desired: &Tables) -> Tables {
    for op in plan(desired, &tables) {
        tables.apply(&op);
    }
    tables
}

/// Every version of every frontend that was ever meant.
#[derive(Default)]
struct History(BTreeMap<FrontendKey, Vec<(String, u32, Vec<cluster::BackendMeaning>)>>);

impl History {
    fn add(&mut self, meaning: &Meaning) {
        for (key, version) in &meaning.frontends {
            let versions = self.0.entry(*key).or_default();
            if !versions.contains(version) {
                versions.push(version.clone());
            }
        }
    }

    /// Each step has only whole versions. A backend's flags change in place, so they are not compared.
    fn check(&self, steps: &[Meaning]) {
        let bare = |(owner, flags, backends): &(String, u32, Vec<cluster::BackendMeaning>)| {
            (
                owner.clone(),
                *flags,
                backends.iter().map(|(ip, port, proto, _)| (*ip, *port, *proto)).collect::<Vec<_>>(),
            )
        };
        for (key, version) in steps.iter().flat_map(|step| &step.frontends) {
            let known = self.0.get(key).is_some_and(|versions| versions.iter().any(|v| bare(v) == bare(version)));
            assert!(known, "{key:?} leads to {version:?}, which was never meant");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_leads_where_it_should(a in worlds(Conflicts::Allowed), b in worlds(Conflicts::Allowed), junk in junk()) {
        let (a, b) = (node_with(&a.state()).tables().clone(), node_with(&b.state()).tables().clone());
        prop_assert_eq!(&after(a.clone(), &b), &b);
        prop_assert_eq!(&after(junk, &b), &b);
        prop_assert_eq!(plan(&b, &b), vec![]);
        prop_assert_eq!(&after(a, &Tables::default()), &Tables::default());
    }

    #[test]
    fn the_order_of_events_before_the_first_sync_does_not_matter(
        world in worlds(Conflicts::Allowed),
        order in vec(any::<Index>(), 0..40),
    ) {
        let state = world.state();
        let mut node = TestNode::new(proxy_core::reconcile::Settings::default());
        node.handle(permuted(all(&state), &order).into_iter().chain(listings(&state)));
        node.settle();
        let straight = node_with(&state);
        prop_assert_eq!(node.tables(), straight.tables());
        prop_assert_eq!(node.diagnostics(), straight.diagnostics());
    }

    #[test]
    fn the_order_of_changes_does_not_matter(
        a in worlds(Conflicts::Avoided),
        b in worlds(Conflicts::Avoided),
        order in vec(any::<Index>(), 0..40),
        pauses in any::<u32>(),
    ) {
        let (a, b) = (a.state(), b.state());
        let mut node = node_with(&a);
        for (number, event) in permuted(between(&a, &b), &order).into_iter().enumerate() {
            node.handle([event]);
            if pauses & (1 << (number % 32)) != 0 {
                node.sync();
                node.now += 100;
            }
        }
        node.settle();
        prop_assert_eq!(meaning(node.tables()), meaning(node_with(&b).tables()));
    }

    #[test]
    fn failures_delay_but_never_break(
        worlds in vec(worlds(Conflicts::Allowed), 1..5),
        seed in any::<u64>(),
        share in 1..600_u64,
    ) {
        let mut node = TestNode::new(proxy_core::reconcile::Settings::default());
        let mut state = ClusterState::default();
        let mut history = History::default();
        node.fake.fail_by_seed(seed, share);
        for world in worlds {
            let next = world.state();
            node.handle(between(&state, &next).into_iter().chain(listings(&next)));
            state = next;
            for _ in 0..3 {
                let report = node.sync();
                history.add(&meaning(&node.reconciler.tables()));
                history.check(&node.steps);
                node.now = report.retry_at.unwrap_or(node.now).max(node.now + 1);
            }
        }
        // They go on failing: it ends nevertheless.
        node.settle();
        prop_assert_eq!(node.tables(), &node.reconciler.tables());
        node.fake.heal();
        node.restart_with(all(&state).into_iter().chain(listings(&state)));
        prop_assert_eq!(node.settle(), 0);
    }

    #[test]
    fn a_restart_anywhere_renumbers_nothing(
        a in worlds(Conflicts::Allowed),
        b in worlds(Conflicts::Allowed),
        crash in 0..60_u64,
        order in vec(any::<Index>(), 0..40),
    ) {
        let (a, b) = (a.state(), b.state());
        let mut node = node_with(&a);
        node.handle(between(&a, &b));
        let first = node.fake.asked;
        node.fake.fail_with(move |number, _| (number > first + crash).then_some(When::Before));
        node.sync();
        node.fake.heal();
        let before = node.tables().clone();
        node.restart_with(permuted(all(&b), &order).into_iter().chain(listings(&b)));
        let mut history = History::default();
        history.add(&meaning(&before));
        let report = node.sync();
        prop_assert_eq!(report.failed.len(), 0);
        history.add(&meaning(&node.reconciler.tables()));
        history.check(&node.steps);
        let now = node.tables().clone();
        let same_id = |old: &Tables, new: &Tables| {
            for (id, entry) in &old.services {
                if let Some((found, _)) = new.services.iter().find(|(_, e)| e.name == entry.name) {
                    assert_eq!(found, id, "{} was renumbered", entry.name.as_str());
                }
            }
            for (id, entry) in &old.backends {
                let same = |e: &&BackendEntry| (e.service, e.ip, e.port, e.proto) == (entry.service, entry.ip, entry.port, entry.proto);
                if let Some(found) = new.backends.values().find(same) {
                    assert_eq!((new.backends.get(id), found.generation), (Some(found), entry.generation), "renumbered");
                }
            }
        };
        same_id(&before, &now);
        node.settle();
        same_id(&now, node.tables());
        node.restart();
        node.handle(all(&b));
        let settled = node.tables().clone();
        prop_assert_eq!(node.settle(), 0);
        prop_assert_eq!(node.tables(), &settled);
        prop_assert_eq!(node.reconciler.service_names().count(), settled.services.len());
    }

    #[test]
    fn what_was_not_listed_to_the_end_is_not_deleted(
        a in worlds(Conflicts::Allowed),
        b in worlds(Conflicts::Allowed),
        left_out in 0..5_usize,
    ) {
        let (a, b) = (a.state(), b.state());
        let mut node = node_with(&a);
        let before = node.tables().clone();
        let listed = listings(&b).into_iter().enumerate().filter(|(index, _)| *index != left_out);
        node.restart_with(all(&b).into_iter().chain(listed.map(|(_, event)| event)));
        let asked = node.fake.asked;
        let report = node.sync();
        prop_assert_eq!((report.applied, report.retry_at, node.fake.asked), (0, None, asked));
        prop_assert_eq!(node.tables(), &before);
        prop_assert!(!node.reconciler.handle(Event::ServiceGone(name("unknown"))));
    }
}
