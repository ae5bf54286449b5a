//! A node with a reconciler and a fake dataplane, and a clock that only it moves.

use std::sync::Arc;

use proxy_core::compile::Capacity;
use proxy_core::dataplane::Dataplane;
use proxy_core::event::{Event, Listing, Source};
use proxy_core::fake::{FakeDataplane, FakeError};
use proxy_core::reconcile::{Reconciler, Settings, SyncReport};
use proxy_core::state::ClusterState;
use proxy_core::tables::{Op, Tables};

use crate::cluster::{self, Meaning, meaning, settled_meaning};

pub(crate) struct TestNode {
    pub(crate) reconciler: Reconciler,
    pub(crate) fake: FakeDataplane,
    pub(crate) now: u64,
    pub(crate) settings: Settings,
    /// What the tables meant after every single operation of the last sync.
    pub(crate) steps: Vec<Meaning>,
}

impl TestNode {
    /// Nothing listed yet.
    pub(crate) fn new(settings: Settings) -> Self {
        let mut fake = FakeDataplane::new(settings.capacity);
        fake.grace = settings.grace;
        Self { reconciler: Reconciler::new(settings.clone()), fake, now: 1_000, settings, steps: Vec::new() }
    }

    /// Everything listed, synced and settled.
    pub(crate) fn started(events: impl IntoIterator<Item = Event>) -> Self {
        let mut node = Self::new(Settings::default());
        node.start(events);
        node
    }

    pub(crate) fn start(&mut self, events: impl IntoIterator<Item = Event>) {
        self.start_unsettled(events);
        self.settle();
    }

    /// Everything listed, nothing synced.
    pub(crate) fn start_unsettled(&mut self, events: impl IntoIterator<Item = Event>) {
        self.reconciler.handle(Event::Node(cluster::node()));
        self.handle(events);
        self.list_all();
    }

    pub(crate) fn handle(&mut self, events: impl IntoIterator<Item = Event>) {
        for event in events {
            self.reconciler.handle(event);
        }
    }

    /// As [`Self::handle`]; did any of them change something?
    pub(crate) fn handle_due(&mut self, events: impl IntoIterator<Item = Event>) -> bool {
        events.into_iter().fold(false, |due, event| self.reconciler.handle(event) | due)
    }

    /// Lists every source with what is known.
    pub(crate) fn list_all(&mut self) {
        for event in listings(&self.reconciler.state().clone()) {
            self.reconciler.handle(event);
        }
    }

    /// As [`Self::settle`], from tables that mean nothing.
    pub(crate) fn settle_broken(&mut self) {
        self.fake.now = self.now;
        let report = self.reconciler.sync(&mut self.fake, self.now);
        assert_eq!(report.failed.len(), 0, "{:?}", report.failed);
        self.settle();
    }

    pub(crate) fn sync(&mut self) -> SyncReport<FakeError> {
        self.fake.now = self.now;
        self.steps.clear();
        let mut stepped = Stepped { fake: &mut self.fake, steps: &mut self.steps };
        let report = self.reconciler.sync(&mut stepped, self.now);
        for (op, error) in &report.failed {
            assert!(!matches!(error, FakeError::Refused { .. }), "{op:?}: {error}");
        }
        report
    }

    /// Syncs until nothing is left to do, quarantines included. Returns the number of operations.
    pub(crate) fn settle(&mut self) -> usize {
        let mut applied = 0;
        for _ in 0..10_000 {
            let report = self.sync();
            applied += report.applied;
            let Some(at) = report.retry_at else {
                assert_eq!(report.pending, 0, "pending without a time to retry");
                assert_eq!(*self.fake.tables(), self.reconciler.tables());
                settled_meaning(self.fake.tables());
                return applied;
            };
            self.now = at.max(self.now + 1);
        }
        panic!("does not settle: {:?}", self.sync());
    }

    /// Events, then settled. Returns the number of operations.
    pub(crate) fn change(&mut self, events: impl IntoIterator<Item = Event>) -> usize {
        self.handle(events);
        self.settle()
    }

    /// The agent dies and another one starts, which is told the same.
    pub(crate) fn restart(&mut self) {
        let state = self.reconciler.state().clone();
        self.restart_with(everything(&state).into_iter().chain(listings(&state)));
    }

    /// The agent dies and another one starts, which is told something else.
    pub(crate) fn restart_with(&mut self, events: impl IntoIterator<Item = Event>) {
        self.reconciler = Reconciler::new(self.settings.clone());
        self.handle(events);
    }

    pub(crate) fn tables(&self) -> &Tables {
        self.fake.tables()
    }

    /// The tables, but for the marks of this node's own addresses, which are the same in every test that does not ask
    /// for others.
    pub(crate) fn text(&self) -> String {
        let usual = [
            "frontend 127.0.0.1 address node-port node loopback",
            "frontend 192.168.0.1 address node-port node",
            "frontend 10.244.0.1 address node",
            "frontend ::1 address node-port node loopback",
            "frontend fd00:99::1 address node-port node",
            "frontend fd00:244::1 address node",
        ];
        let text = self.fake.tables().to_string();
        text.lines().filter(|line| !usual.contains(line)).flat_map(|line| [line, "\n"]).collect()
    }

    pub(crate) fn diagnostics(&self) -> Vec<String> {
        self.reconciler.diagnostics().map(ToString::to_string).collect()
    }
}

/// All that a state knows, as events.
pub(crate) fn everything(state: &ClusterState) -> Vec<Event> {
    let mut events = vec![Event::Node(state.node().clone())];
    events.extend(state.links().cloned().map(Event::Link));
    events.extend(state.devices().cloned().map(Event::Device));
    events.extend(state.service_cidrs().map(|(name, ranges)| Event::ServiceCidr(Arc::clone(name), ranges.to_vec())));
    events.extend(state.cgroup_pods().cloned().map(Event::CgroupPods));
    for service in state.services() {
        events.push(Event::Service(service.clone()));
        events.extend(state.slices_of(&service.name).cloned().map(Event::Slice));
    }
    events
}

/// A full listing of each source that names what the state has.
pub(crate) fn listings(state: &ClusterState) -> [Event; 5] {
    let services = state.services().map(|service| service.name.clone()).collect();
    let slices = state.slices().map(|slice| slice.name.clone()).collect();
    let links = state.links().map(|link| link.ifindex).chain(state.devices().map(|device| device.ifindex)).collect();
    let ranges = state.service_cidrs().map(|(name, _)| Arc::clone(name)).collect();
    [
        Event::Listed(Source::Services, Listing::Objects(services)),
        Event::Listed(Source::EndpointSlices, Listing::Objects(slices)),
        Event::Listed(Source::Node, Listing::Node),
        Event::Listed(Source::Links, Listing::Links(links)),
        Event::Listed(Source::ServiceCidrs, Listing::ServiceCidrs(ranges)),
    ]
}

/// Settings with few entries everywhere.
pub(crate) fn small(backends: u32, slots: u32, frontends: u32) -> Settings {
    let (devices, local_pods, prefixes, cgroup_pods) = (2, 3, 4, 2);
    let capacity = Capacity { services: 8, backends, slots, frontends, devices, local_pods, prefixes, cgroup_pods };
    Settings { capacity, ..Settings::default() }
}

/// Looks at the tables after each operation.
struct Stepped<'a> {
    fake: &'a mut FakeDataplane,
    steps: &'a mut Vec<Meaning>,
}

impl Dataplane for Stepped<'_> {
    type Error = FakeError;

    fn load(&mut self) -> Result<Tables, FakeError> {
        self.fake.load()
    }

    fn apply(&mut self, op: &Op) -> Result<(), FakeError> {
        let result = self.fake.apply(op);
        self.steps.push(meaning(self.fake.tables()));
        result
    }
}
