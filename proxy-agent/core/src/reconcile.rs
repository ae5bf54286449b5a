//! The loop without its I/O: events in, operations out.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::{BackendEntry, FrontendEntry, FrontendKey};

use crate::compile::{Capacity, Compiler};
use crate::dataplane::Dataplane;
use crate::diagnostic::Diagnostic;
use crate::event::{Event, Source};
use crate::facts::Facts;
use crate::name::ObjectName;
use crate::plan::{Phase, TableDeltas};
use crate::policy::Policy;
use crate::state::{Changed, ClusterState};
use crate::tables::{Op, Row, Tables};

/// What the reconciler lives by; times in milliseconds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Number of entries of each map.
    pub capacity: Capacity,
    /// What the operator decided about Services.
    pub policy: Policy,
    /// How long a program may act on what it read: ids and slots wait this long before they are used again. Programs
    /// run for microseconds.
    pub grace: u64,
    /// Pause after the first failure of an operation; doubled with each further one.
    pub first_retry: u64,
    /// The longest pause.
    pub last_retry: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            capacity: Capacity::default(),
            policy: Policy::default(),
            grace: 500,
            first_retry: 50,
            last_retry: 10_000,
        }
    }
}

/// Owns the cluster state, what it was compiled to, and what the dataplane is known to hold.
#[derive(Clone, Debug)]
pub struct Reconciler {
    settings: Settings,
    state: ClusterState,
    compiler: Compiler,
    tables: TableDeltas,
    dirty: Changed,
    phase: Adoption,
    /// Rows whose last operation failed.
    retries: BTreeMap<Row, Retry>,
    load_retry: Option<Retry>,
    /// Changes of slices that are not certain to be in the dataplane: the Service, and when each began.
    triggered: Vec<(ObjectName, u64)>,
    service_changes: u64,
    endpoint_changes: u64,
}

/// How far the reconciler has come with what it found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Adoption {
    /// Nothing was read: nothing may be written.
    Pending,
    /// Ids are restored.
    Done,
    /// Somebody else may have written: read again before the next operation.
    Reload,
}

#[derive(Clone, Copy, Debug)]
struct Retry {
    failures: u32,
    at: u64,
}

/// What one [`Reconciler::sync`] did.
#[derive(Debug)]
pub struct SyncReport<E> {
    /// Operations that succeeded.
    pub applied: usize,
    /// Operations that failed, each with its error. They are tried again.
    pub failed: Vec<(Op, E)>,
    /// Why the dataplane could not be read; nothing else was done then.
    pub load_error: Option<E>,
    /// Rows that are not certain to be as desired: failed, waiting for their pause to end, or for another row.
    pub pending: usize,
    /// When to call again if no event comes before; `None` = nothing is left to do.
    pub retry_at: Option<u64>,
    /// [`Reconciler::diagnostics`] gives another result than before this call and the events before it.
    pub diagnostics_changed: bool,
    /// [`Reconciler::facts`] gives another result than before this call.
    pub facts_changed: bool,
    /// When changes began that the dataplane holds in full as of this call, in milliseconds since 1970: the
    /// [`triggered`](crate::service::EndpointSlice::triggered) of their slices. What was there at the start is not told:
    /// nobody knows when it was done.
    pub programmed: Vec<u64>,
    /// Changes of Services that this call took up.
    pub service_changes: u64,
    /// Changes of slices that this call took up.
    pub endpoint_changes: u64,
}

impl Reconciler {
    /// Knows nothing yet.
    pub fn new(settings: Settings) -> Self {
        let compiler = Compiler::new(settings.capacity, settings.policy.clone());
        Self {
            settings,
            state: ClusterState::default(),
            compiler,
            tables: TableDeltas::default(),
            dirty: Changed::default(),
            phase: Adoption::Pending,
            retries: BTreeMap::new(),
            load_retry: None,
            triggered: Vec::new(),
            service_changes: 0,
            endpoint_changes: 0,
        }
    }

    /// Takes an event in. True when it changed something, and a [`Self::sync`] is due.
    pub fn handle(&mut self, event: Event) -> bool {
        let known = self.state.counts();
        let (of_service, of_slice) = match &event {
            Event::Service(_) | Event::ServiceGone(_) => (true, false),
            Event::Slice(_) | Event::SliceGone(_) => (false, true),
            _ => (false, false),
        };
        let trigger = match &event {
            Event::Slice(slice) if self.phase != Adoption::Pending => {
                slice.triggered.map(|at| (slice.service.clone(), at))
            }
            _ => None,
        };
        let changed = self.state.apply(event);
        let due = !changed.is_empty();
        if due {
            // A listing changes as many as it says are gone.
            let gone = |before: usize, after: usize| u64::try_from(before.saturating_sub(after)).unwrap_or(u64::MAX);
            let now = self.state.counts();
            self.service_changes += if of_service { 1 } else { gone(known.0, now.0) };
            self.endpoint_changes += if of_slice { 1 } else { gone(known.1, now.1) };
            self.triggered.extend(trigger);
        }
        self.dirty.merge(changed);
        due
    }

    /// Reads the dataplane again before the next operation: somebody else may have written to it.
    pub fn reload(&mut self) {
        if self.phase == Adoption::Done {
            self.phase = Adoption::Reload;
        }
    }

    /// Brings the dataplane nearer to the cluster state. Does nothing until every source has been listed once.
    /// `now` is in milliseconds and never goes back.
    ///
    /// Rows whose operation failed wait for their pause to end; all others go on.
    pub fn sync<D: Dataplane>(&mut self, dataplane: &mut D, now: u64) -> SyncReport<D::Error> {
        let mut report = SyncReport {
            applied: 0,
            failed: Vec::new(),
            load_error: None,
            pending: 0,
            retry_at: None,
            diagnostics_changed: std::mem::take(&mut self.dirty.findings),
            facts_changed: false,
            programmed: Vec::new(),
            service_changes: 0,
            endpoint_changes: 0,
        };
        if !self.state.synced() {
            return report;
        }
        if self.phase != Adoption::Done {
            if let Some(retry) = self.load_retry.filter(|retry| now < retry.at) {
                report.retry_at = Some(retry.at);
                return report;
            }
            match dataplane.load() {
                Ok(actual) => self.adopt(actual, now),
                Err(error) => {
                    let retry = self.settings.after_failure(self.load_retry, now);
                    self.load_retry = Some(retry);
                    report.load_error = Some(error);
                    report.retry_at = Some(retry.at);
                    return report;
                }
            }
        }
        if self.dirty.readable {
            self.everything_is_dirty();
        }
        self.compiler.release(&mut self.tables, now, self.settings.grace);
        let dirty = std::mem::take(&mut self.dirty);
        let compiled = self.compiler.compile(&self.state, &dirty, &mut self.tables);
        report.diagnostics_changed |= compiled.findings;
        report.facts_changed = compiled.facts;
        report.service_changes = std::mem::take(&mut self.service_changes);
        report.endpoint_changes = std::mem::take(&mut self.endpoint_changes);
        for phase in Phase::ALL {
            self.run(phase, dataplane, now, &mut report);
        }
        self.compiler.settle(&self.tables, now);
        report.pending = self.tables.pending_len();
        report.programmed = self.programmed();
        report.retry_at = self.next_due(now);
        report
    }

    /// What servers and metrics tell of Services: as of the last [`Self::sync`].
    pub fn facts(&self) -> Facts {
        self.compiler.facts().clone()
    }

    /// The desired tables, as a copy.
    pub fn tables(&self) -> Tables {
        self.tables.desired()
    }

    /// Everything that is wrong with objects now: findings of the sources, then of the compiler.
    pub fn diagnostics(&self) -> impl Iterator<Item = &Diagnostic> {
        self.state.findings().chain(self.compiler.findings())
    }

    /// Every source has been listed in full once.
    pub fn synced(&self) -> bool {
        self.state.synced()
    }

    /// Sources that have not been listed yet.
    pub fn missing(&self) -> impl Iterator<Item = Source> {
        self.state.missing()
    }

    /// Every row is certain to be as desired, and nothing waits to be compiled.
    pub fn settled(&self) -> bool {
        self.phase == Adoption::Done && self.dirty.is_empty() && self.tables.pending_len() == 0
    }

    /// The maps have been read, and the node's interfaces listed: [`Self::is_programmed`] can tell.
    pub fn knows_links(&self) -> bool {
        self.phase == Adoption::Done && self.missing().all(|source| source != Source::Links)
    }

    /// Has this interface its row for certain, and its programs with it? What the row says may be about to change.
    pub fn is_programmed(&self, ifindex: u32) -> bool {
        self.tables.devices.held(&ifindex)
    }

    /// How many rows each map is to have.
    pub fn row_counts(&self) -> [(&'static str, usize); 6] {
        use proxy_abi::map;
        [
            (map::SERVICE, self.tables.services.desired().len()),
            (map::BACKEND, self.tables.backends.desired().len()),
            (map::BACKEND_SLOT, self.tables.slots.desired().len()),
            (map::FRONTEND, self.tables.frontends.desired().len()),
            (map::DEVICE, self.tables.devices.desired().len()),
            (map::LOCAL_POD, self.tables.local_pods.desired().len()),
        ]
    }

    /// What a frontend is to be: its row, and the backends that its slots name, in their order.
    pub fn frontend(&self, key: &FrontendKey) -> Option<(FrontendEntry, Vec<BackendEntry>)> {
        let entry = *self.tables.frontends.desired().get(key)?;
        let backends = self.tables.backends.desired();
        let slots = self.tables.slots.desired().range(entry.first..entry.first.saturating_add(entry.count));
        Some((entry, slots.filter_map(|(_, id)| backends.get(id).copied()).collect()))
    }

    /// The cluster state.
    pub const fn state(&self) -> &ClusterState {
        &self.state
    }

    /// Service port ids with their names.
    pub fn service_names(&self) -> impl Iterator<Item = (u32, &str)> {
        self.tables.services.desired().iter().map(|(id, entry)| (*id, entry.name.as_str()))
    }

    fn adopt(&mut self, actual: Tables, now: u64) {
        match self.phase {
            Adoption::Pending => {
                self.compiler.restore(&actual, &mut self.tables, now);
                if self.state.unreadable() {
                    // What the maps hold may be what cannot be read: it stays as it is, and only what is new is added.
                    let held: BTreeSet<ObjectName> = self.compiler.compiled().cloned().collect();
                    let all = self.state.services().map(|service| service.name.clone());
                    self.dirty.services = all.filter(|name| !held.contains(name)).collect();
                } else {
                    self.everything_is_dirty();
                }
                self.dirty.ranges = true;
                self.dirty.addresses = true;
                self.dirty.cgroup_pods = true;
                self.dirty.links.extend(self.state.links().map(|link| link.ifindex));
                self.dirty.links.extend(self.state.devices().map(|device| device.ifindex));
            }
            Adoption::Done | Adoption::Reload => self.tables.load(actual),
        }
        self.phase = Adoption::Done;
        self.load_retry = None;
    }

    /// Services of the state and those that only the maps know, ranges and addresses.
    fn everything_is_dirty(&mut self) {
        self.dirty.ranges = true;
        self.dirty.addresses = true;
        self.dirty.services.extend(self.state.services().map(|service| service.name.clone()));
        self.dirty.services.extend(self.compiler.compiled().cloned());
    }

    /// Takes out the triggers of those changes that are in the dataplane for certain.
    fn programmed(&mut self) -> Vec<u64> {
        if self.triggered.is_empty() {
            return Vec::new();
        }
        let open = self.tables.open_services();
        let compiler = &self.compiler;
        let done = |service: &ObjectName| {
            !compiler.is_starved(service) && compiler.ids_of(service).all(|id| !open.contains(&id))
        };
        let (done, waiting) = std::mem::take(&mut self.triggered).into_iter().partition(|(service, _)| done(service));
        self.triggered = waiting;
        let done: Vec<(ObjectName, u64)> = done;
        done.into_iter().map(|(_, at)| at).collect()
    }

    fn run<D: Dataplane>(&mut self, phase: Phase, dataplane: &mut D, now: u64, report: &mut SyncReport<D::Error>) {
        let mut ops = self.tables.ready(phase);
        if !self.retries.is_empty() {
            ops.retain(|op| self.retries.get(&op.row()).is_none_or(|retry| retry.at <= now));
        }
        if ops.is_empty() {
            return;
        }
        let mut results = dataplane.apply_batch(&ops).into_iter();
        for op in ops {
            match results.next() {
                Some(Ok(())) => {
                    self.tables.succeeded(&op);
                    self.retries.remove(&op.row());
                    report.applied += 1;
                }
                Some(Err(error)) => {
                    self.put_off(&op, now);
                    report.failed.push((op, error));
                }
                // No word about it: nobody knows.
                None => self.put_off(&op, now),
            }
        }
    }

    fn put_off(&mut self, op: &Op, now: u64) {
        self.tables.failed(op);
        let row = op.row();
        let retry = self.settings.after_failure(self.retries.get(&row).copied(), now);
        self.retries.insert(row, retry);
    }

    fn next_due(&self, now: u64) -> Option<u64> {
        // A row whose pause is over and that was not tried waits for another row, which has a pause of its own.
        let retries = self.retries.values().map(|retry| retry.at).filter(|at| *at > now);
        let release = self.compiler.next_release(self.settings.grace);
        let starved = self.compiler.wants_retry().then_some(now);
        let due = retries.chain(release).chain(starved).min();
        due.or_else(|| (self.tables.pending_len() > 0).then(|| now.saturating_add(self.settings.last_retry)))
    }
}

impl Settings {
    fn after_failure(&self, last: Option<Retry>, now: u64) -> Retry {
        let failures = last.map_or(0, |retry| retry.failures).saturating_add(1);
        let factor = 1_u64.checked_shl(failures - 1).unwrap_or(u64::MAX);
        let pause = self.first_retry.saturating_mul(factor).min(self.last_retry);
        Retry { failures, at: now.saturating_add(pause) }
    }
}
