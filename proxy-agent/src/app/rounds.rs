//! The rounds of the one task that owns the cluster state and writes to the kernel.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::Result;
use proxy_core::event::Event;
use proxy_core::facts::Facts;
use proxy_core::netpol::reconcile::{PolicyReport, Regime};
use proxy_core::reconcile::{self, Reconciler};
use tokio::sync::{mpsc, watch};

use super::answer::answer;
use super::cgroup_pods::CgroupPods;
use super::policies::Policies;
use super::world::World;
use crate::ask::listen::Inquiry;
use crate::dataplane::{self, Bpf};
use crate::kubeproxy::Settings;
use crate::node::NodeDevices;
use crate::node::guard::{self, Guard, Wanted};
use crate::serve::Notice;
use crate::serve::hits::Counted;
use crate::serve::metrics::PolicyRound;
use crate::sockets::StaleSockets;

/// Events that are taken in before the kernel is written to: a burst becomes one change.
const BURST: usize = 1_024;
/// How often established flows are looked through for those that nobody uses.
const SWEEP: Duration = Duration::from_mins(1);

/// What the rounds work on.
pub(super) struct Rounds {
    bpf: Bpf,
    world: World,
    policies: Policies,
    /// `None`: sockets of pods are left alone.
    cgroup_pods: Option<CgroupPods>,
    reconciler: Reconciler,
    settings: Settings,
    start: Instant,
    /// When the last source had been read: what is measured from there is ours.
    listed: Option<Instant>,
    /// Findings that were said and still hold.
    said: BTreeMap<String, Option<Notice>>,
    stale: StaleSockets,
    /// Something waits to be written.
    waiting: bool,
    /// It does not wait for the pause between two writes.
    urgent: bool,
    /// Findings may be others than those that were said.
    found: bool,
    /// No two writes are nearer to each other than was asked for.
    not_before: Instant,
    /// When Services are due again, as of their last round.
    services_due: Option<u64>,
    /// The node's interfaces, where veths without programs are to be kept silent.
    guarded: Option<watch::Receiver<NodeDevices>>,
    guard: Guard,
}

impl Rounds {
    pub(super) fn new(
        bpf: Bpf,
        world: World,
        policies: Policies,
        cgroup_pods: Option<CgroupPods>,
        settings: Settings,
        guarded: Option<watch::Receiver<NodeDevices>>,
    ) -> Self {
        let policy = settings.policy.clone();
        let start = Instant::now();
        let mut reconciler = Reconciler::new(reconcile::Settings { policy, ..reconcile::Settings::default() });
        if cgroup_pods.is_none() {
            reconciler.handle(Event::CgroupPods(BTreeMap::new()));
        }
        Self {
            bpf,
            world,
            policies,
            cgroup_pods,
            reconciler,
            settings,
            start,
            listed: None,
            said: BTreeMap::new(),
            stale: StaleSockets::default(),
            waiting: false,
            urgent: false,
            found: false,
            not_before: start,
            services_due: None,
            guarded,
            guard: Guard::default(),
        }
    }

    /// Goes on until no source sends any more.
    pub(super) async fn run(
        mut self,
        inbox: &mut mpsc::Receiver<Event>,
        mut inquiries: mpsc::Receiver<Inquiry>,
    ) -> Result<()> {
        let mut next_sweep = self.start + SWEEP;
        let mut retry_at = None;
        let mut burst = Vec::with_capacity(BURST);
        self.world.publish(&Facts::default());
        loop {
            // Where the maps of policy cannot be read, nothing is written before `retry_at`, however much waits.
            let put_off = (self.waiting && self.policies.known()).then_some(self.not_before);
            let cgroups = self.cgroup_pods.as_ref().and_then(CgroupPods::next);
            let guard = self.guard.next().filter(|_| self.knows_guard());
            let others = [retry_at, put_off, self.policies.next_finding(), cgroups, guard];
            let wake = others.into_iter().flatten().fold(next_sweep, Instant::min);
            tokio::select! {
                count = inbox.recv_many(&mut burst, BURST) => {
                    if count == 0 {
                        return Ok(());
                    }
                }
                Some(inquiry) = inquiries.recv() => {
                    let (services, policies) = (&self.reconciler, self.policies.reconciler());
                    let answer = answer(&inquiry.question, services, policies, &self.bpf.maps().policy);
                    // Who asked may have gone.
                    drop(inquiry.reply.send(answer));
                    continue;
                }
                () = changed(&mut self.guarded) => {}
                () = tokio::time::sleep_until(wake.into()) => {}
            }
            for event in burst.drain(..) {
                self.take(event);
            }
            if Instant::now() >= next_sweep {
                next_sweep = Instant::now() + SWEEP;
                self.world.sweep(self.bpf.maps(), &self.settings);
            }
            let policy_due = self.sync_policy();
            self.look_at_cgroups();
            self.sync_services();
            self.keep_guard();
            let due = [policy_due, self.services_due].into_iter().flatten().min();
            retry_at = due.map(|at| self.start + Duration::from_millis(at));
        }
    }

    fn now(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn take(&mut self, event: Event) {
        self.world.tell(&event, &self.settings);
        self.found |= self.policies.handle(&event);
        if let Some(pods) = &mut self.cgroup_pods {
            pods.handle(&event);
        }
        // An interface that nobody may use as it is does not wait.
        let of_interface = matches!(&event, Event::Link(_) | Event::LinkGone(_));
        let due = self.reconciler.handle(event);
        self.waiting |= due;
        self.urgent |= due && of_interface && self.policies.enforces();
    }

    /// Policy comes first: a slot is in force before an interface names it. Gives the time at which it is due again.
    fn sync_policy(&mut self) -> Option<u64> {
        let begin = Instant::now();
        let now = self.now();
        let report = self.policies.sync(&mut self.bpf, now);
        let enforcement = self.policies.enforcement(self.reconciler.state());
        let changed = self.reconciler.handle(Event::Enforcement(enforcement));
        self.waiting |= changed;
        self.urgent |= changed;
        for finding in self.policies.findings(self.reconciler.state(), begin) {
            self.waiting |= self.reconciler.handle(finding);
        }
        self.found |= report.switched || report.slots_changed || changed;
        if report.applied > 0 || report.failed.is_some() {
            tracing::debug!(applied = report.applied, pending = report.pending, "policy synced");
        }
        if self.found || report.applied > 0 || report.failed.is_some() || report.load_error.is_some() {
            self.count_policy(&report, begin.elapsed());
        }
        report.retry_at
    }

    /// Which pods' sockets are translated.
    fn look_at_cgroups(&mut self) {
        let Some(pods) = &mut self.cgroup_pods else { return };
        for event in pods.update(self.reconciler.state(), self.policies.local(), Instant::now()) {
            self.waiting |= self.reconciler.handle(event);
        }
    }

    fn count_policy(&self, report: &PolicyReport<dataplane::Error>, took: Duration) {
        let reconciler = self.policies.reconciler();
        let engine = reconciler.engine();
        if report.switched || report.slots_changed {
            let pods = engine.subjects().iter().map(|(name, subject)| (subject.slot.into(), name.clone()));
            self.world.metrics.counted(Counted { rules: engine.counted(), pods: pods.collect() });
        }
        self.world.metrics.policy(PolicyRound {
            took,
            applied: report.applied,
            failed: usize::from(report.failed.is_some() || report.load_error.is_some()),
            policies: engine.world().policy_names().count(),
            pods: if reconciler.regime() == Regime::Off { 0 } else { engine.subjects().len() },
            locked: engine.subjects().values().filter(|subject| subject.locked.is_some()).count(),
            held: self.policies.held(),
            revision: reconciler.epoch(),
            settled: reconciler.settled(),
        });
    }

    /// Is it known which interfaces there are, and whether there are policies? Before, what the agent before left stays.
    fn knows_guard(&self) -> bool {
        self.reconciler.knows_links() && (self.policies.enforces() || self.policies.listed())
    }

    /// Veths that have no programs yet are silent. An interface that cannot be written keeps no other one waiting.
    fn keep_guard(&mut self) {
        let Some(devices) = self.guarded.as_ref().filter(|_| self.knows_guard()) else { return };
        let links = self.reconciler.state().links().filter(|link| self.reconciler.is_programmed(link.ifindex));
        let programmed = links.map(|link| Arc::clone(&link.name)).collect();
        let wanted = self.policies.enforces().then(|| Wanted::of(&devices.borrow(), programmed));
        let is_wanted = wanted.is_some();
        let Some(kept) = self.guard.keep(wanted, Instant::now()) else { return };
        let findings = kept.err().iter().map(|error| guard::diagnostic(error, is_wanted)).collect();
        self.waiting |= self.reconciler.handle(Event::Diagnostics { object: guard::object(), findings });
    }

    /// Services and interfaces.
    fn sync_services(&mut self) {
        if !self.policies.known() {
            return;
        }
        if self.reconciler.synced() {
            self.listed.get_or_insert_with(Instant::now);
        }
        let begin = Instant::now();
        if begin < self.not_before && !self.urgent {
            return;
        }
        let changed = std::mem::take(&mut self.waiting);
        self.urgent = false;
        let now = self.now();
        let report = self.reconciler.sync(&mut self.bpf, now);
        self.services_due = report.retry_at;
        if let Some(error) = &report.load_error {
            tracing::error!(error = error as &dyn std::error::Error, "pinned maps cannot be read; tried again");
        }
        for (op, error) in report.failed.iter().filter(|(_, e)| !e.is_interface_gone()) {
            tracing::error!(?op, error = error as &dyn std::error::Error, "map operation failed; tried again");
        }
        self.stale.end(&self.bpf.take_ended(), self.bpf.maps());
        if report.facts_changed {
            self.world.publish(&self.reconciler.facts());
        }
        for triggered in &report.programmed {
            self.world.metrics.programmed(since(*triggered));
        }
        if report.diagnostics_changed | std::mem::take(&mut self.found) {
            let policies = self.policies.engine().diagnostics();
            self.world.findings(self.reconciler.diagnostics().chain(&policies), &mut self.said);
        }
        let synced = self.reconciler.synced();
        let first = self.world.health.sync(synced, report.pending == 0);
        if synced && (first || changed || report.applied > 0 || !report.failed.is_empty()) {
            self.not_before = begin + self.settings.min_sync;
            self.world.count(&self.reconciler, self.bpf.maps(), &report, begin.elapsed(), first);
        }
        if first {
            let written = self.listed.map(|at| at.elapsed()).unwrap_or_default();
            tracing::info!(after = ?self.start.elapsed(), ?written, operations = report.applied, "in sync");
        }
        if report.applied > 0 {
            tracing::debug!(applied = report.applied, pending = report.pending, "synced");
        }
    }
}

/// Waits until the interfaces are others, where anybody asks.
async fn changed(devices: &mut Option<watch::Receiver<NodeDevices>>) {
    let changed = match devices {
        Some(devices) => devices.changed().await.is_ok(),
        None => false,
    };
    if !changed {
        std::future::pending::<()>().await;
    }
}

/// How long ago a time of the API server was, in milliseconds since 1970. 0 when its clock is ahead of ours.
fn since(triggered: u64) -> Duration {
    let then = SystemTime::UNIX_EPOCH + Duration::from_millis(triggered);
    SystemTime::now().duration_since(then).unwrap_or_default()
}
