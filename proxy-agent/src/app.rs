//! Wiring: who sends what to whom, and in which order it starts and ends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, bail};
use proxy_abi::{Hook, Reason, map};
use proxy_core::event::{Event, Listing, NetDevice, Node};
use proxy_core::facts::Facts;
use proxy_core::reconcile::{self, Reconciler, SyncReport};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::dataplane::pins::{Maps, Pins};
use crate::dataplane::sweep::{monotonic, sweep};
use crate::dataplane::{self, Bpf};
use crate::k8s::{self, SourceConfig};
use crate::kubeproxy::reload::Reload;
use crate::kubeproxy::{Settings, sysctl};
use crate::node::binding::Previous;
use crate::node::classify::NamePattern;
use crate::node::conntrack;
use crate::node::{self, Inputs};
use crate::serve::listen::{self, Own};
use crate::serve::metrics::{Packets, Round, Sweep, Usage};
use crate::serve::service::Addresses;
use crate::serve::{Health, Metrics, Notice, Notices, health, service, status};
use crate::sockets::StaleSockets;

/// Everything the agent is told at its start.
#[derive(Debug)]
pub struct Config {
    /// Where objects come from.
    pub source: SourceConfig,
    /// Name of the Node object.
    pub node_name: String,
    /// The kernel side.
    pub dataplane: dataplane::Config,
    /// Names of pod bridges; empty for all.
    pub pod_bridges: Vec<NamePattern>,
    /// Where the kernel's settings of conntrack are; `None` leaves them.
    pub conntrack_settings: Option<PathBuf>,
    /// What kube-proxy's configuration decides.
    pub settings: Settings,
    /// The file that it came from.
    pub reload: Option<Reload>,
}

/// Events that may wait for the reconciler: one list of a large cluster, so that a source seldom waits.
const EVENTS: usize = 4_096;
/// Events that are taken in before the kernel is written to: a burst becomes one change.
const BURST: usize = 1_024;
/// How often established flows are looked through for those that nobody uses.
const SWEEP: Duration = Duration::from_mins(1);

/// The two servers of the agent itself.
const HEALTH_SERVER: Own =
    Own { what: "health server", flag: "--healthz-bind-address", reason: "FailedToStartProxierHealthcheck" };
const METRICS_SERVER: Own =
    Own { what: "metrics server", flag: "--metrics-bind-address", reason: "FailedToStartMetricsServer" };

/// Runs until SIGTERM or SIGINT, or until the configuration has changed. Nothing is detached then: the kernel goes on.
pub async fn run(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let Config { source, node_name, dataplane, pod_bridges, conntrack_settings, settings, reload } = config;
    if let Some(directory) = &conntrack_settings {
        sysctl::apply(directory, &sysctl::wanted(&settings));
    }
    adjust_oom_score(settings.oom_score_adj);
    let bpf = Bpf::open(&dataplane)?;
    tracing::info!(
        pins = %dataplane.pin_root.display(),
        attach = ?bpf.way(),
        cgroup = ?dataplane.cgroup,
        node = node_name,
        source = %source,
        "programs are loaded"
    );
    take_over(&bpf);
    let metrics = Arc::new(Metrics::default());
    let maps = Pins::new(&dataplane.pin_root).open()?;
    metrics.read_packets(Box::new(move || packets(&maps)));
    let (notices, mut recorder) = recorder(&source, &node_name, &settings).await?;
    let health = Arc::new(Health::new(settings.health_timeout));
    serve_own(&settings, &node_name, &health, &metrics, &notices)?;
    let (facts, facts_rx) = watch::channel(Facts::default());
    let (addresses, addresses_rx) = watch::channel(Addresses::Only(Vec::new()));
    let checks = service::run(facts_rx, addresses_rx, Arc::clone(&health), node_name.clone(), notices.clone());
    tokio::spawn(checks);

    let (events, mut inbox) = mpsc::channel(EVENTS);
    let (node_tx, node_rx) = watch::channel(Node::default());
    let (_trusted_tx, trusted) = watch::channel(BTreeMap::new());
    let own = bpf.interface_program_ids();
    let inputs = Inputs {
        node: node_rx,
        trusted,
        previous: previous_bindings(&bpf)?,
        foreign_tcx: Box::new(move |ifindex| dataplane::has_foreign_tcx(ifindex, &own)),
    };
    let discovery = node::Config { pod_bridges, ..node::Config::default() };
    let mut links = node::spawn(discovery, inputs, events.clone())?;
    let mut source = k8s::spawn(source, &node_name, events).await?;
    metrics.watches(Arc::clone(source.metrics()));

    let world = World { node: node_tx, facts, addresses, devices: BTreeMap::new(), health, metrics, notices };
    let mut reconciler = tokio::spawn(async move { reconcile(bpf, &mut inbox, world, &settings).await });
    let reloaded = async {
        match reload {
            Some(reload) => reload.changed().await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: the kernel goes on without the agent"),
        _ = interrupt.recv() => tracing::info!("SIGINT: the kernel goes on without the agent"),
        () = reloaded => {}
        ended = links.ended() => {
            ended.context("discovery of interfaces")?;
            bail!("discovery of interfaces ended");
        }
        () = source.ended() => bail!("the source of objects ended"),
        ended = &mut reconciler => {
            ended.context("the reconciler")??;
            bail!("the reconciler ended");
        }
    }
    recorder.abort_all();
    Ok(())
}

/// Leaves the connections of another proxy to it, which translates them by the kernel's connection tracking. Before any
/// interface gets a program. Without it they end; that is no reason not to start.
fn take_over(bpf: &Bpf) {
    let connections = match conntrack::translated() {
        Ok(connections) => connections,
        Err(error) => {
            let error = &error as &dyn std::error::Error;
            tracing::warn!(error, "connections of another proxy cannot be listed; those through Services may end");
            return;
        }
    };
    match dataplane::adopt(bpf.maps(), &connections, monotonic()) {
        Ok(0) => {}
        Ok(adopted) => {
            tracing::info!(adopted, "connections that the kernel's connection tracking translates stay there");
        }
        Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "connections of another proxy may end"),
    }
}

/// Whom the kernel should kill last. Without the right to say so, it stays as it was.
fn adjust_oom_score(score: Option<i32>) {
    let Some(score) = score else { return };
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        tracing::warn!(%error, score, "oomScoreAdj cannot be set; it needs CAP_SYS_RESOURCE to be lowered");
    }
}

/// The way to Events: to the API server that the objects come from.
async fn recorder(source: &SourceConfig, node: &str, settings: &Settings) -> Result<(Notices, JoinSet<()>)> {
    match source {
        SourceConfig::Kube(kube) => {
            let (notices, queue) = Notices::channel();
            let limits = (settings.qps, settings.burst);
            Ok((notices, k8s::recorder::spawn(kube.clone(), node, queue, limits).await?))
        }
        SourceConfig::Dir(_) => Ok((Notices::none(), JoinSet::new())),
    }
}

fn serve_own(
    settings: &Settings,
    node: &str,
    health: &Arc<Health>,
    metrics: &Arc<Metrics>,
    notices: &Notices,
) -> Result<()> {
    let keep = |own: Own, address, router| {
        listen::keep(own, address, router, settings.bind_hard_fail, node, notices)
            .with_context(|| format!("{} {address}", own.flag))
    };
    if let Some(address) = settings.healthz {
        keep(HEALTH_SERVER, address, health::router(health, metrics))?;
    }
    if let Some(address) = settings.metrics {
        let about = status::About {
            mode: settings.mode.to_string(),
            configz: settings.configz().to_string(),
            profiling: settings.profiling,
        };
        keep(METRICS_SERVER, address, status::router(metrics, about))?;
    }
    Ok(())
}

/// Packet counters over all CPUs. A row that cannot be read is left out: it comes with the next scrape.
fn packets(maps: &Maps) -> Vec<Packets> {
    let all = Hook::ALL.iter().flat_map(|hook| Reason::ALL.iter().map(|reason| (*hook, *reason)));
    all.filter_map(|(hook, reason)| {
        let cpus = maps.counter.get_per_cpu(&reason.index(hook)).ok()?;
        let (packets, bytes) = (cpus.iter().map(|cpu| cpu.packets).sum(), cpus.iter().map(|cpu| cpu.bytes).sum());
        Some(Packets { hook, reason, packets, bytes })
    })
    .collect()
}

/// Who has which address, as the agent left it: it outlives a restart, so that no pod takes another's address then.
fn previous_bindings(bpf: &Bpf) -> Result<BTreeMap<IpAddr, Previous>> {
    let rows = bpf.maps().local_pod.read()?;
    Ok(rows.into_iter().map(|(ip, pod)| (ip.into(), Previous { ifindex: pod.ifindex, mac: pod.mac })).collect())
}

/// Whom the reconciler tells what.
struct World {
    /// Interface discovery.
    node: watch::Sender<Node>,
    /// Health check servers.
    facts: watch::Sender<Facts>,
    /// Where those listen.
    addresses: watch::Sender<Addresses>,
    /// Interfaces that are not pods', for their addresses.
    devices: BTreeMap<u32, NetDevice>,
    health: Arc<Health>,
    metrics: Arc<Metrics>,
    notices: Notices,
}

impl World {
    /// Passes on what an event means outside of the maps.
    fn tell(&mut self, event: &Event, settings: &Settings) {
        self.metrics.event(event);
        match event {
            Event::Node(is) => {
                self.health.node(is.leaving);
                self.node.send_if_modified(|was| {
                    let changed = was != is;
                    was.clone_from(is);
                    changed
                });
            }
            Event::Device(device) => {
                self.devices.insert(device.ifindex, device.clone());
            }
            Event::DeviceGone(ifindex) => {
                self.devices.remove(ifindex);
            }
            Event::Listed(_, Listing::Links(all)) => self.devices.retain(|ifindex, _| all.contains(ifindex)),
            _ => return,
        }
        let served = &settings.policy.node_port_addresses;
        let is = Addresses::of(served, &self.node.borrow(), &self.devices.values().collect::<Vec<_>>());
        self.addresses.send_if_modified(|was| {
            let changed = *was != is;
            *was = is;
            changed
        });
    }

    /// Tells what Services ask for beside the maps.
    fn publish(&self, facts: &Facts) {
        self.metrics.facts(facts);
        self.facts.send_if_modified(|was| {
            let changed = was != facts;
            was.clone_from(facts);
            changed
        });
    }

    /// Says what is wrong with objects, each finding once. `said` is what was said and still holds.
    fn findings(&self, reconciler: &Reconciler, said: &mut BTreeMap<String, Option<Notice>>) {
        let are: BTreeMap<String, Option<Notice>> =
            reconciler.diagnostics().map(|finding| (finding.to_string(), Notice::of(finding))).collect();
        for (text, notice) in are.iter().filter(|(text, _)| !said.contains_key(*text)) {
            tracing::warn!("{text}");
            if let Some(notice) = notice {
                self.notices.send(notice.clone());
            }
        }
        for gone in said.keys().filter(|text| !are.contains_key(*text)) {
            tracing::info!("no more: {gone}");
        }
        *said = are;
    }

    /// Counts what a round did.
    fn count(
        &self,
        reconciler: &Reconciler,
        maps: &Maps,
        report: &SyncReport<dataplane::Error>,
        took: Duration,
        full: bool,
    ) {
        let settled = reconciler.synced() && report.pending == 0 && report.load_error.is_none();
        let (applied, failed) = (report.applied, report.failed.len());
        self.metrics.round(Round { took, applied, failed, settled, full });
        for (name, rows) in reconciler.row_counts() {
            let capacity = match name {
                map::SERVICE => maps.service.capacity(),
                map::BACKEND => maps.backend.capacity(),
                map::BACKEND_SLOT => maps.slot.capacity(),
                map::FRONTEND => maps.frontend.capacity(),
                map::DEVICE => maps.device.capacity(),
                _ => maps.local_pod.capacity(),
            };
            self.metrics.map(name, usage(rows, capacity));
        }
    }

    /// Removes idle flows.
    fn sweep(&self, maps: &Maps, settings: &Settings) {
        let start = Instant::now();
        let removed = match sweep(maps, &settings.timeouts, monotonic()) {
            Ok((all, removed)) => {
                tracing::debug!(all, removed, "looked through the established flows");
                self.metrics.map(map::FLOW_LIVE, usage(all.saturating_sub(removed), maps.flow_live.capacity()));
                Some(removed)
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "established flows");
                None
            }
        };
        self.metrics.sweep(Sweep { took: start.elapsed(), removed });
        match maps.flow_brief.read() {
            Ok(all) => self.metrics.map(map::FLOW_BRIEF, usage(all.len(), maps.flow_brief.capacity())),
            Err(error) => tracing::debug!(error = &error as &dyn std::error::Error, "brief flows"),
        }
    }
}

fn usage(entries: usize, capacity: u32) -> Usage {
    Usage { entries: u64::try_from(entries).unwrap_or(u64::MAX), capacity: capacity.into() }
}

/// The one task that owns the cluster state and writes to the kernel.
async fn reconcile(
    mut bpf: Bpf,
    inbox: &mut mpsc::Receiver<Event>,
    mut world: World,
    settings: &Settings,
) -> Result<()> {
    let policy = settings.policy.clone();
    let mut reconciler = Reconciler::new(reconcile::Settings { policy, ..reconcile::Settings::default() });
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut retry_at = None;
    let mut said = BTreeMap::new();
    let mut next_sweep = start + SWEEP;
    // No two writes are nearer to each other than was asked for.
    let mut not_before = start;
    let mut waiting = false;
    // When the last source had been read: what is measured from there is ours.
    let mut listed = None;
    let mut burst = Vec::with_capacity(BURST);
    let mut stale = StaleSockets::default();
    world.publish(&Facts::default());
    loop {
        let retry = retry_at.map(|at| start + Duration::from_millis(at));
        let put_off = waiting.then_some(not_before);
        let wake = [retry, put_off].into_iter().flatten().fold(next_sweep, Instant::min);
        tokio::select! {
            count = inbox.recv_many(&mut burst, BURST) => {
                if count == 0 {
                    return Ok(());
                }
            }
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        for event in burst.drain(..) {
            world.tell(&event, settings);
            waiting |= reconciler.handle(event);
        }
        if Instant::now() >= next_sweep {
            next_sweep = Instant::now() + SWEEP;
            world.sweep(bpf.maps(), settings);
        }
        if reconciler.synced() {
            listed.get_or_insert_with(Instant::now);
        }
        let begin = Instant::now();
        if begin < not_before {
            continue;
        }
        let changed = std::mem::take(&mut waiting);
        let report = reconciler.sync(&mut bpf, now());
        retry_at = report.retry_at;
        if let Some(error) = &report.load_error {
            tracing::error!(error = error as &dyn std::error::Error, "pinned maps cannot be read; tried again");
        }
        for (op, error) in report.failed.iter().filter(|(_, e)| !e.is_interface_gone()) {
            tracing::error!(?op, error = error as &dyn std::error::Error, "map operation failed; tried again");
        }
        stale.end(&bpf.take_ended(), bpf.maps());
        if report.facts_changed {
            world.publish(&reconciler.facts());
        }
        for triggered in &report.programmed {
            world.metrics.programmed(since(*triggered));
        }
        if report.diagnostics_changed {
            world.findings(&reconciler, &mut said);
        }
        let first = world.health.sync(reconciler.synced(), report.pending == 0);
        if reconciler.synced() && (first || changed || report.applied > 0 || !report.failed.is_empty()) {
            not_before = begin + settings.min_sync;
            world.count(&reconciler, bpf.maps(), &report, begin.elapsed(), first);
        }
        if first {
            let written = listed.map(|at| at.elapsed()).unwrap_or_default();
            tracing::info!(after = ?start.elapsed(), ?written, operations = report.applied, "in sync");
        }
        if report.applied > 0 {
            tracing::debug!(applied = report.applied, pending = report.pending, "synced");
        }
    }
}

/// How long ago a time of the API server was, in milliseconds since 1970. 0 when its clock is ahead of ours.
fn since(triggered: u64) -> Duration {
    let then = SystemTime::UNIX_EPOCH + Duration::from_millis(triggered);
    SystemTime::now().duration_since(then).unwrap_or_default()
}
