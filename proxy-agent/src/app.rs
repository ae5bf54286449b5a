//! Wiring: who sends what to whom, and in which order it starts and ends.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use proxy_abi::policy::PodHits;
use proxy_abi::{Hook, Reason};
use proxy_core::event::{Event, Node};
use proxy_core::facts::Facts;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::ask::listen::{Inquiry, answer_questions};
use crate::dataplane::pins::{Maps, Pins};
use crate::dataplane::sweep::monotonic;
use crate::dataplane::{self, Bpf, SocketLb};
use crate::k8s::{self, PodWatch, SourceConfig};
use crate::kubeproxy::reload::Reload;
use crate::kubeproxy::{Settings, sysctl};
use crate::node::binding::Previous;
use crate::node::classify::NamePattern;
use crate::node::cni::Records;
use crate::node::{self, Inputs, cni, conntrack, guard};
use crate::serve::hits::Numbers;
use crate::serve::listen::{self, Own};
use crate::serve::metrics::Packets;
use crate::serve::service::Addresses;
use crate::serve::{Health, Metrics, Notices, health, service, status};

mod answer;
mod cgroup_pods;
mod policies;
mod rounds;
mod world;

use cgroup_pods::CgroupPods;
use policies::Policies;
use rounds::Rounds;
use world::World;

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
    /// Where the CNI's records are.
    pub cni_results: PathBuf,
    /// Keep veths without programs silent.
    pub bridge_guard: bool,
    /// Where the kernel's settings of conntrack are; `None` leaves them.
    pub conntrack_settings: Option<PathBuf>,
    /// What kube-proxy's configuration decides.
    pub settings: Settings,
    /// The file that it came from.
    pub reload: Option<Reload>,
}

/// Events that may wait for the reconciler: one list of a large cluster, so that a source seldom waits.
const EVENTS: usize = 4_096;
/// Questions that may wait for an answer.
const QUESTIONS: usize = 16;

/// The two servers of the agent itself.
const HEALTH_SERVER: Own =
    Own { what: "health server", flag: "--healthz-bind-address", reason: "FailedToStartProxierHealthcheck" };
const METRICS_SERVER: Own =
    Own { what: "metrics server", flag: "--metrics-bind-address", reason: "FailedToStartMetricsServer" };

/// Runs until SIGTERM or SIGINT, or until the configuration has changed. Nothing is detached then: the kernel goes on.
pub async fn run(config: Config) -> Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let Config {
        source,
        node_name,
        dataplane,
        pod_bridges,
        cni_results,
        bridge_guard,
        conntrack_settings,
        settings,
        reload,
    } = config;
    if let Some(directory) = &conntrack_settings {
        sysctl::apply(directory, &sysctl::wanted(&settings));
    }
    adjust_oom_score(settings.oom_score_adj);
    let bpf = Bpf::open(&dataplane)?;
    tracing::info!(
        pins = %dataplane.pin_root.display(),
        attach = ?bpf.way(),
        cgroup = ?dataplane.cgroup,
        socket_lb = ?dataplane.socket_lb,
        node = node_name,
        source = %source,
        "programs are loaded"
    );
    take_over(&bpf);
    let metrics = Arc::new(Metrics::default());
    let maps = Pins::new(&dataplane.pin_root).open()?;
    let maps = Arc::new(maps);
    let of_packets = Arc::clone(&maps);
    metrics.read_packets(Box::new(move || packets(&of_packets)));
    metrics.read_numbers(Box::new(move || numbers(&maps)));
    let (notices, mut recorder) = recorder(&source, &node_name, &settings).await?;
    let health = Arc::new(Health::new(settings.health_timeout));
    serve_own(&settings, &node_name, &health, &metrics, &notices)?;
    let (facts, facts_rx) = watch::channel(Facts::default());
    let (addresses, addresses_rx) = watch::channel(Addresses::Only(Vec::new()));
    let checks = service::run(facts_rx, addresses_rx, Arc::clone(&health), node_name.clone(), notices.clone());
    tokio::spawn(checks);

    let (events, mut inbox) = mpsc::channel(EVENTS);
    let (node_tx, node_rx) = watch::channel(Node::default());
    let records = records(&cni_results, &events);
    let own = bpf.interface_program_ids();
    let inputs = Inputs {
        node: node_rx,
        records: records.clone(),
        previous: previous_bindings(&bpf)?,
        foreign_tcx: Box::new(move |ifindex| dataplane::has_foreign_tcx(ifindex, &own)),
    };
    let discovery = node::Config { pod_bridges, ..node::Config::default() };
    let mut links = node::spawn(discovery, inputs, events.clone())?;
    let cgroup_pods = match dataplane.socket_lb {
        SocketLb::All => dataplane.cgroup.clone().map(CgroupPods::new),
        SocketLb::Node => None,
    };
    let pods = if cgroup_pods.is_some() { PodWatch::Always } else { PodWatch::ForPolicies };
    let mut source = k8s::spawn_with(source, &node_name, pods, events).await?;
    metrics.watches(Arc::clone(source.metrics()));

    let inquiries = inquiries(&dataplane.pin_root);
    let world = World { node: node_tx, facts, addresses, devices: BTreeMap::new(), health, metrics, notices };
    let policies = Policies::new(&node_name, bpf.maps().policy.limits(), records);
    let guarded = bridge_guard.then(|| links.devices());
    // Without `nft` there was no guard either.
    if let Some(Ok(Some(removed))) = (!bridge_guard).then(guard::remove_if_there) {
        tracing::info!("{removed} is removed: --bridge-guard is not given");
    }
    let rounds = Rounds::new(bpf, world, policies, cgroup_pods, settings, guarded);
    let mut reconciler = tokio::spawn(async move { rounds.run(&mut inbox, inquiries).await });
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

/// What the CNI's records say. Without inotify there are none, and where policies are in force, pods are held.
fn records(folder: &Path, events: &mpsc::Sender<Event>) -> watch::Receiver<Records> {
    cni::spawn(folder, events.clone()).unwrap_or_else(|error| {
        tracing::warn!(%error, "no inotify for the CNI's records; raise fs.inotify.max_user_instances");
        let problem = Some(format!("inotify is not available: {error}").into());
        watch::channel(Records { problem, ..Records::default() }).1
    })
}

/// Questions of the command line. Without them the agent works as well.
fn inquiries(pin_root: &Path) -> mpsc::Receiver<Inquiry> {
    let (tx, rx) = mpsc::channel(QUESTIONS);
    if let Err(error) = answer_questions(pin_root, tx) {
        tracing::warn!(%error, "the command line will not learn names from this agent");
    }
    rx
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

/// What policies decided. What cannot be read is left out: it comes with the next scrape.
fn numbers(maps: &Maps) -> Numbers {
    let rules = maps.policy.hits.read().unwrap_or_default();
    let pods = maps.policy.pod_hits.read().unwrap_or_default();
    Numbers {
        rules: rules.into_iter().collect(),
        pods: pods.into_iter().filter(|(_, hits)| *hits != PodHits::ZERO).collect(),
    }
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
