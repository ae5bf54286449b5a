//! Every metric, in one place: kube-proxy's names, on which dashboards and SLOs depend, beside our own.
//!
//! Labels never name a pod, a Service or an address: their number does not grow with the cluster.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, SystemTime};

use proxy_abi::{ABI_VERSION, Hook, Reason};
use proxy_core::event::Event;
use proxy_core::facts::Facts;

use super::clock::unix_seconds;
use super::exposition::{Exposition, Kind, float};
use super::hits::{Counted, Numbers, NumbersOf, ReadNumbers};
use super::process::Process;
use crate::histogram::Histogram;
use crate::k8s::{Requests, SourceMetrics, Trouble, WatchMetrics};

/// Packets that left a hook for a reason, over all CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packets {
    /// Where.
    pub hook: Hook,
    /// Why.
    pub reason: Reason,
    /// How many.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Reads the packet counters of the kernel.
pub type ReadPackets = Box<dyn Fn() -> Vec<Packets> + Send + Sync>;

/// How full a map is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Usage {
    /// Entries.
    pub entries: u64,
    /// Room.
    pub capacity: u64,
}

/// One round of the reconciler that had something to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// How long it took.
    pub took: Duration,
    /// Operations on maps that succeeded.
    pub applied: usize,
    /// Operations that failed.
    pub failed: usize,
    /// Every row is as desired.
    pub settled: bool,
    /// It was the first that wrote everything.
    pub full: bool,
}

/// One look through the established flows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sweep {
    /// How long it took.
    pub took: Duration,
    /// Entries removed; `None` when it failed.
    pub removed: Option<usize>,
}

/// One round of NetworkPolicy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyRound {
    /// How long it took.
    pub took: Duration,
    /// Operations on maps that succeeded.
    pub applied: usize,
    /// Operations, or attempts to read the maps, that failed.
    pub failed: usize,
    /// NetworkPolicies of the cluster.
    pub policies: usize,
    /// Pods of this node that have a slot.
    pub pods: usize,
    /// Those among them whose policy does not fit into the maps.
    pub locked: usize,
    /// Interfaces that are held, because nobody knows what their pods may do.
    pub held: usize,
    /// Epoch of the policy in force.
    pub revision: u32,
    /// The maps hold what the objects mean.
    pub settled: bool,
}

/// What is counted.
#[derive(Debug)]
pub struct Metrics {
    full: Histogram,
    partial: Histogram,
    all: Histogram,
    programming: Histogram,
    sweeps: Histogram,
    policy: Histogram,
    policy_operations: [AtomicU64; 2],
    service_changes: Changes,
    endpoint_changes: Changes,
    failed_rounds: AtomicU64,
    healthz: Codes,
    livez: Codes,
    operations: [AtomicU64; 2],
    swept: AtomicU64,
    failed_sweeps: AtomicU64,
    state: Mutex<State>,
    packets: OnceLock<PacketsOf>,
    numbers: OnceLock<NumbersOf>,
    watches: OnceLock<Arc<SourceMetrics>>,
}

#[derive(Debug, Default)]
struct Changes {
    total: AtomicU64,
    pending: AtomicU64,
}

/// Answers by status: 200, 503.
#[derive(Debug, Default)]
struct Codes([AtomicU64; 2]);

struct PacketsOf(ReadPackets);

impl fmt::Debug for PacketsOf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("PacketsOf")
    }
}

#[derive(Clone, Debug, Default)]
struct State {
    facts: Facts,
    maps: BTreeMap<&'static str, Usage>,
    policy: PolicyRound,
    counted: Counted,
    queued: Option<SystemTime>,
    synced: Option<SystemTime>,
}

/// What is read at a scrape.
#[derive(Clone, Debug, Default)]
struct Seen {
    process: Process,
    tasks: u64,
    packets: Vec<Packets>,
    numbers: Numbers,
}

impl Default for Metrics {
    fn default() -> Self {
        let steps = |first: f64, step: f64, count: u32| (0..count).map(move |n| first + step * f64::from(n));
        let programming = steps(0.25, 0.25, 2).chain(steps(1.0, 1.0, 59)).chain(steps(60.0, 5.0, 12));
        let programming = programming.chain(steps(120.0, 30.0, 7)).collect();
        let sync = || Histogram::doubling(0.001, 15);
        Self {
            full: sync(),
            partial: sync(),
            all: sync(),
            programming: Histogram::new(programming),
            sweeps: sync(),
            policy: sync(),
            policy_operations: Default::default(),
            service_changes: Changes::default(),
            endpoint_changes: Changes::default(),
            failed_rounds: AtomicU64::default(),
            healthz: Codes::default(),
            livez: Codes::default(),
            operations: Default::default(),
            swept: AtomicU64::default(),
            failed_sweeps: AtomicU64::default(),
            state: Mutex::default(),
            packets: OnceLock::new(),
            numbers: OnceLock::new(),
            watches: OnceLock::new(),
        }
    }
}

// === What is told ===

impl Metrics {
    /// Reads packet counters from here on, at each scrape.
    pub fn read_packets(&self, read: ReadPackets) {
        if self.packets.set(PacketsOf(read)).is_err() {
            tracing::debug!("packet counters were given twice");
        }
    }

    /// Shows the counters of these watches, too.
    pub fn watches(&self, watches: Arc<SourceMetrics>) {
        if self.watches.set(watches).is_err() {
            tracing::debug!("watches were given twice");
        }
    }

    /// An event has come and waits to be written.
    pub fn event(&self, event: &Event) {
        let changes = match event {
            Event::Service(_) | Event::ServiceGone(_) => &self.service_changes,
            Event::Slice(_) | Event::SliceGone(_) => &self.endpoint_changes,
            _ => return,
        };
        changes.total.fetch_add(1, Ordering::Relaxed);
        changes.pending.fetch_add(1, Ordering::Relaxed);
        if let Ok(mut state) = self.state.lock() {
            state.queued = Some(SystemTime::now());
        }
    }

    /// A round of the reconciler has ended.
    pub fn round(&self, round: Round) {
        self.all.observe(round.took);
        (if round.full { &self.full } else { &self.partial }).observe(round.took);
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        self.operations[0].fetch_add(count(round.applied), Ordering::Relaxed);
        self.operations[1].fetch_add(count(round.failed), Ordering::Relaxed);
        if round.failed > 0 {
            self.failed_rounds.fetch_add(1, Ordering::Relaxed);
        }
        if round.settled {
            self.service_changes.pending.store(0, Ordering::Relaxed);
            self.endpoint_changes.pending.store(0, Ordering::Relaxed);
            if let Ok(mut state) = self.state.lock() {
                state.synced = Some(SystemTime::now());
            }
        }
    }

    /// From the change of an endpoint's pod to the maps.
    pub fn programmed(&self, took: Duration) {
        self.programming.observe(took);
    }

    /// What Services without local endpoints there are.
    pub fn facts(&self, facts: &Facts) {
        if let Ok(mut state) = self.state.lock() {
            state.facts.clone_from(facts);
        }
    }

    /// How full a map is.
    pub fn map(&self, name: &'static str, usage: Usage) {
        if let Ok(mut state) = self.state.lock() {
            state.maps.insert(name, usage);
        }
    }

    /// A round of NetworkPolicy has ended.
    pub fn policy(&self, round: PolicyRound) {
        let count = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        if round.applied + round.failed > 0 {
            self.policy.observe(round.took);
        }
        self.policy_operations[0].fetch_add(count(round.applied), Ordering::Relaxed);
        self.policy_operations[1].fetch_add(count(round.failed), Ordering::Relaxed);
        if let Ok(mut state) = self.state.lock() {
            state.policy = round;
        }
    }

    /// Whom the numbers of policies are about, from now on.
    pub fn counted(&self, counted: Counted) {
        if let Ok(mut state) = self.state.lock() {
            state.counted = counted;
        }
    }

    /// Where the numbers of policies are read.
    pub fn read_numbers(&self, read: ReadNumbers) {
        if self.numbers.set(NumbersOf(read)).is_err() {
            tracing::debug!("numbers of policies were given twice");
        }
    }

    /// The established flows were looked through.
    pub fn sweep(&self, sweep: Sweep) {
        self.sweeps.observe(sweep.took);
        match sweep.removed {
            Some(removed) => self.swept.fetch_add(u64::try_from(removed).unwrap_or(u64::MAX), Ordering::Relaxed),
            None => self.failed_sweeps.fetch_add(1, Ordering::Relaxed),
        };
    }

    /// `/healthz` was answered.
    pub fn healthz(&self, code: u16) {
        self.healthz.count(code);
    }

    /// `/livez` was answered.
    pub fn livez(&self, code: u16) {
        self.livez.count(code);
    }

    /// `/metrics`. Reads the kernel's counters: call it where blocking is allowed, in a runtime.
    pub fn scrape(&self) -> String {
        let tasks = tokio::runtime::Handle::try_current().map_or(0, |handle| handle.metrics().num_alive_tasks());
        self.text(&Seen {
            process: Process::now(),
            tasks: u64::try_from(tasks).unwrap_or_default(),
            packets: self.packets.get().map(|read| read.0()).unwrap_or_default(),
            numbers: self.numbers.get().map(|read| read.0()).unwrap_or_default(),
        })
    }
}

impl Codes {
    fn count(&self, code: u16) {
        self.0[usize::from(code != 200)].fetch_add(1, Ordering::Relaxed);
    }

    fn write(&self, out: &mut Exposition, name: &str, help: &str) {
        out.family(name, Kind::Counter, help);
        for (code, count) in ["200", "503"].into_iter().zip(&self.0) {
            out.sample(name, &[("code", code)], load(count));
        }
    }
}

fn load(count: &AtomicU64) -> f64 {
    float(count.load(Ordering::Relaxed))
}

// === How it is shown ===

impl Metrics {
    fn text(&self, seen: &Seen) -> String {
        let state = self.state.lock().map(|state| state.clone()).unwrap_or_default();
        let mut out = Exposition::default();
        self.kube_proxy(&mut out, &state, &seen.packets);
        process(&mut out, seen);
        self.own(&mut out, &state, &seen.packets);
        state.counted.write(&mut out, &seen.numbers);
        if let Some(watches) = self.watches.get() {
            watched(&mut out, watches);
            requested(&mut out, &watches.requests);
        }
        out.into_text()
    }

    fn kube_proxy(&self, out: &mut Exposition, state: &State, packets: &[Packets]) {
        let time = |time: Option<SystemTime>| time.map(unix_seconds).unwrap_or_default();
        let sync = "kubeproxy_sync_proxy_rules";
        out.histogram(
            &format!("{sync}_duration_seconds"),
            "Time of a round that writes changes to the maps",
            &self.all,
        );
        out.histogram(
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "Time of a round that writes all maps",
            &self.full,
        );
        out.histogram(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "Time of a round that writes what changed",
            &self.partial,
        );
        out.histogram(
            "kubeproxy_network_programming_duration_seconds",
            "Time from the change of a pod to the maps",
            &self.programming,
        );
        for (name, help, value) in [
            ("last_timestamp_seconds", "When all maps were last known to be as desired", time(state.synced)),
            ("last_queued_timestamp_seconds", "When a change last came", time(state.queued)),
            ("endpoint_changes_pending", "EndpointSlice changes not written yet", load(&self.endpoint_changes.pending)),
            ("service_changes_pending", "Service changes not written yet", load(&self.service_changes.pending)),
        ] {
            out.single(&format!("{sync}_{name}"), Kind::Gauge, help, value);
        }
        let failed = load(&self.failed_rounds);
        for (name, help, value) in [
            ("endpoint_changes_total", "EndpointSlice changes", load(&self.endpoint_changes.total)),
            ("service_changes_total", "Service changes", load(&self.service_changes.total)),
            ("nftables_sync_failures_total", "Rounds in which a map could not be written", failed),
            ("iptables_restore_failures_total", "Rounds in which a map could not be written", failed),
        ] {
            out.single(&format!("{sync}_{name}"), Kind::Counter, help, value);
        }
        let name = format!("{sync}_no_local_endpoints_total");
        out.family(&name, Kind::Gauge, "Service ports of traffic policy Local without an endpoint on this node");
        out.sample(&name, &[("traffic_policy", "external")], f64::from(state.facts.no_local_external));
        out.sample(&name, &[("traffic_policy", "internal")], f64::from(state.facts.no_local_internal));
        let invalid = packets.iter().filter(|row| row.reason == Reason::NoFlow).map(|row| row.packets).sum();
        out.single(
            "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
            Kind::Counter,
            "TCP segments to a Service dropped because no connection of theirs is known",
            float(invalid),
        );
        out.histogram(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Time of a look through the established flows",
            &self.sweeps,
        );
        self.healthz.write(out, "kubeproxy_proxy_healthz_total", "Answers of /healthz by status");
        self.livez.write(out, "kubeproxy_proxy_livez_total", "Answers of /livez by status");
    }

    fn own(&self, out: &mut Exposition, state: &State, packets: &[Packets]) {
        out.family("proxy_agent_build_info", Kind::Gauge, "Version of the agent and of the map layouts");
        let abi = ABI_VERSION.to_string();
        out.sample("proxy_agent_build_info", &[("version", env!("CARGO_PKG_VERSION")), ("abi", &abi)], 1.0);
        let seen = || packets.iter().filter(|row| row.packets > 0);
        for (name, help, of) in [
            (
                "proxy_agent_packets_total",
                "Packets by hook and by what became of them",
                (|row| row.packets) as fn(&Packets) -> u64,
            ),
            ("proxy_agent_bytes_total", "Bytes by hook and by what became of them", |row| row.bytes),
        ] {
            out.family(name, Kind::Counter, help);
            for row in seen() {
                let drop = if row.reason.is_drop() { "true" } else { "false" };
                let labels = [("hook", row.hook.name()), ("reason", row.reason.name()), ("drop", drop)];
                out.sample(name, &labels, float(of(row)));
            }
        }
        let pressure =
            |usage: &Usage| if usage.capacity == 0 { 0.0 } else { float(usage.entries) / float(usage.capacity) };
        for (name, help, of) in [
            (
                "proxy_agent_map_entries",
                "Entries of a map; of flow maps at the last sweep",
                (|usage| float(usage.entries)) as fn(&Usage) -> f64,
            ),
            ("proxy_agent_map_capacity", "Entries that a map has room for", |usage| float(usage.capacity)),
            ("proxy_agent_map_pressure", "Entries of a map by its capacity", pressure),
        ] {
            out.family(name, Kind::Gauge, help);
            for (map, usage) in &state.maps {
                out.sample(name, &[("map", map)], of(usage));
            }
        }
        let name = "proxy_agent_map_operations_total";
        out.family(name, Kind::Counter, "Operations on maps, interfaces included");
        for (outcome, count) in ["success", "failure"].into_iter().zip(&self.operations) {
            out.sample(name, &[("outcome", outcome)], load(count));
        }
        out.single(
            "proxy_agent_flow_sweep_removed_total",
            Kind::Counter,
            "Idle flow entries removed",
            load(&self.swept),
        );
        out.single(
            "proxy_agent_flow_sweep_failures_total",
            Kind::Counter,
            "Sweeps that failed",
            load(&self.failed_sweeps),
        );
        out.single(
            "proxy_agent_health_check_servers",
            Kind::Gauge,
            "Services with a healthCheckNodePort",
            float(u64::try_from(state.facts.health_checks.len()).unwrap_or_default()),
        );
        self.policies(out, &state.policy);
    }

    fn policies(&self, out: &mut Exposition, round: &PolicyRound) {
        out.histogram("proxy_agent_policy_sync_duration_seconds", "Time of a round that writes policy", &self.policy);
        let name = "proxy_agent_policy_operations_total";
        out.family(name, Kind::Counter, "Operations on the maps of policy");
        for (outcome, count) in ["success", "failure"].into_iter().zip(&self.policy_operations) {
            out.sample(name, &[("outcome", outcome)], load(count));
        }
        let count = |n: usize| float(u64::try_from(n).unwrap_or(u64::MAX));
        for (name, help, value) in [
            ("policies", "NetworkPolicies of the cluster", count(round.policies)),
            ("policy_pods", "Pods of this node whose policy is in the maps", count(round.pods)),
            ("policy_locked_pods", "Pods whose policy does not fit: only their node reaches them", count(round.locked)),
            ("policy_held_interfaces", "Pod interfaces held: nobody knows what they may do", count(round.held)),
            ("policy_revision", "Epoch of the policy in force", float(round.revision.into())),
            ("policy_settled", "The maps hold what the objects mean", f64::from(u8::from(round.settled))),
        ] {
            out.single(&format!("proxy_agent_{name}"), Kind::Gauge, help, value);
        }
    }
}

fn process(out: &mut Exposition, Seen { process, tasks, .. }: &Seen) {
    out.single("process_cpu_seconds_total", Kind::Counter, "User and system time in seconds", process.cpu);
    for (name, help, value) in [
        ("process_max_fds", "File descriptors that may be open", process.max_fds),
        ("process_open_fds", "Open file descriptors", process.open_fds),
        ("process_resident_memory_bytes", "Resident memory in bytes", process.resident),
        ("process_start_time_seconds", "Start since 1970 in seconds", process.start),
        ("process_virtual_memory_bytes", "Virtual memory in bytes", process.virt),
        ("go_goroutines", "Tasks of the runtime, under the name that dashboards of kube-proxy ask for", float(*tasks)),
    ] {
        out.single(name, Kind::Gauge, help, value);
    }
}

fn watched(out: &mut Exposition, all: &SourceMetrics) {
    let watches = all.watches();
    for (name, help, of) in [
        (
            "proxy_agent_watch_listings_total",
            "Full lists begun",
            (|watch| load(&watch.listings)) as fn(&WatchMetrics) -> f64,
        ),
        ("proxy_agent_watch_events_total", "Objects listed, changed or deleted", |watch| load(&watch.events)),
    ] {
        out.family(name, Kind::Counter, help);
        for (kind, watch) in watches {
            out.sample(name, &[("kind", kind)], of(watch));
        }
    }
    let name = "proxy_agent_watch_errors_total";
    out.family(name, Kind::Counter, "Failures of a watch, by their kind");
    for (kind, watch) in watches {
        for trouble in Trouble::ALL {
            let count = watch.errors(trouble);
            if count > 0 {
                out.sample(name, &[("kind", kind), ("trouble", trouble.name())], float(count));
            }
        }
    }
    let name = "proxy_agent_watch_last_event_timestamp_seconds";
    out.family(name, Kind::Gauge, "When a watch last told something");
    for (kind, watch) in watches {
        out.sample(name, &[("kind", kind)], load(&watch.last_event_ms) / 1e3);
    }
    out.single("proxy_agent_logins_total", Kind::Counter, "Logins with new credentials", load(&all.logins));
    out.single("proxy_agent_failovers_total", Kind::Counter, "Switches between API servers", load(&all.failovers));
}

fn requested(out: &mut Exposition, requests: &Requests) {
    let name = "rest_client_requests_total";
    out.family(name, Kind::Counter, "Requests to the API servers by status, method and host");
    for (kind, count) in requests.counts() {
        out.sample(name, &[("code", &kind.code), ("host", &kind.host), ("method", &kind.method)], float(count));
    }
    let durations = requests.durations();
    let labels: Vec<_> = durations.iter().map(|((verb, host), _)| [("host", &**host), ("verb", &**verb)]).collect();
    out.histograms(
        "rest_client_request_duration_seconds",
        "Time until the headers of an answer came",
        labels.iter().zip(&durations).map(|(labels, (_, histogram))| (&labels[..], &**histogram)),
    );
}

#[cfg(test)]
#[path = "metrics_tests.rs"]
mod tests;
