//! Wiring: who sends what to whom, and in which order it starts and ends.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use proxy_core::event::{Event, Node};
use proxy_core::reconcile::{Reconciler, Settings};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};

use crate::dataplane::sweep::{Timeouts, monotonic, sweep};
use crate::dataplane::{self, Bpf};
use crate::k8s::{self, SourceConfig};
use crate::node::binding::Previous;
use crate::node::classify::NamePattern;
use crate::node::{self, Inputs};
use crate::serve::{self, Health};

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
    /// Address of the health server.
    pub healthz: Option<SocketAddr>,
}

/// Events that may wait for the reconciler: one list of a large cluster, so that a source seldom waits.
const EVENTS: usize = 4_096;
/// Events that are taken in before the kernel is written to: a burst becomes one change.
const BURST: usize = 1_024;
/// How often established flows are looked through for those that nobody uses.
const SWEEP: Duration = Duration::from_mins(1);

/// Runs until SIGTERM or SIGINT. Nothing is detached then: the kernel goes on.
pub async fn run(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let bpf = Bpf::open(&config.dataplane)?;
    tracing::info!(
        pins = %config.dataplane.pin_root.display(),
        attach = ?bpf.way(),
        cgroup = ?config.dataplane.cgroup,
        node = config.node_name,
        source = %config.source,
        "programs are loaded"
    );
    let health = Arc::new(Health::default());
    if let Some(address) = config.healthz {
        serve::spawn(address, Arc::clone(&health))
            .await
            .with_context(|| format!("--healthz-bind-address {address}"))?;
    }
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
    let discovery = node::Config { pod_bridges: config.pod_bridges, ..node::Config::default() };
    let mut links = node::spawn(discovery, inputs, events.clone())?;
    let mut source = k8s::spawn(config.source, &config.node_name, events).await?;

    let mut reconciler = tokio::spawn(async move { reconcile(bpf, &mut inbox, &node_tx, &health).await });
    tokio::select! {
        _ = terminate.recv() => tracing::info!("SIGTERM: the kernel goes on without the agent"),
        _ = interrupt.recv() => tracing::info!("SIGINT: the kernel goes on without the agent"),
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
    Ok(())
}

/// Who has which address, as the agent left it: it outlives a restart, so that no pod takes another's address then.
fn previous_bindings(bpf: &Bpf) -> Result<BTreeMap<IpAddr, Previous>> {
    let rows = bpf.maps().local_pod.read()?;
    Ok(rows.into_iter().map(|(ip, pod)| (ip.into(), Previous { ifindex: pod.ifindex, mac: pod.mac })).collect())
}

/// The one task that owns the cluster state and writes to the kernel.
async fn reconcile(
    mut bpf: Bpf,
    inbox: &mut mpsc::Receiver<Event>,
    node: &watch::Sender<Node>,
    health: &Health,
) -> Result<()> {
    let mut reconciler = Reconciler::new(Settings::default());
    let start = Instant::now();
    let now = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    let mut retry_at = None;
    let mut said = std::collections::BTreeSet::new();
    let mut next_sweep = start + SWEEP;
    // When the last source had been read: what is measured from there is ours.
    let mut listed = None;
    let mut burst = Vec::with_capacity(BURST);
    loop {
        let retry = retry_at.map(|at| start + Duration::from_millis(at));
        let wake = retry.map_or(next_sweep, |retry| retry.min(next_sweep));
        tokio::select! {
            count = inbox.recv_many(&mut burst, BURST) => {
                if count == 0 {
                    return Ok(());
                }
            }
            () = tokio::time::sleep_until(wake.into()) => {}
        }
        for event in burst.drain(..) {
            if let Event::Node(is) = &event {
                node.send_if_modified(|was| {
                    let changed = was != is;
                    was.clone_from(is);
                    changed
                });
            }
            reconciler.handle(event);
        }
        if Instant::now() >= next_sweep {
            next_sweep = Instant::now() + SWEEP;
            match sweep(&bpf.maps().flow_live, &Timeouts::default(), monotonic()) {
                Ok((all, removed)) => tracing::debug!(all, removed, "looked through the established flows"),
                Err(error) => tracing::warn!(error = &error as &dyn std::error::Error, "established flows"),
            }
        }
        if reconciler.synced() {
            listed.get_or_insert_with(Instant::now);
        }
        let report = reconciler.sync(&mut bpf, now());
        retry_at = report.retry_at;
        if let Some(error) = &report.load_error {
            tracing::error!(error = error as &dyn std::error::Error, "pinned maps cannot be read; tried again");
        }
        for (op, error) in report.failed.iter().filter(|(_, e)| !e.is_interface_gone()) {
            tracing::error!(?op, error = error as &dyn std::error::Error, "map operation failed; tried again");
        }
        if report.diagnostics_changed {
            let are: std::collections::BTreeSet<String> = reconciler.diagnostics().map(ToString::to_string).collect();
            for new in are.difference(&said) {
                tracing::warn!("{new}");
            }
            for gone in said.difference(&are) {
                tracing::info!("no more: {gone}");
            }
            said = are;
        }
        let first = health.sync(reconciler.synced(), report.pending == 0);
        if first {
            let written = listed.map(|at| at.elapsed()).unwrap_or_default();
            tracing::info!(after = ?start.elapsed(), ?written, operations = report.applied, "in sync");
        }
        if report.applied > 0 {
            tracing::debug!(applied = report.applied, pending = report.pending, "synced");
        }
    }
}
