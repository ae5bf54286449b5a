//! The command line.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use proxy_abi::capacity;
use proxy_core::netpol::engine::Limits;
use tracing_subscriber::EnvFilter;

use crate::dataplane::{self, AttachMode, SocketLb, sizing};
use crate::k8s::SourceConfig;
use crate::kubeproxy::cleanup::Cleanup;
use crate::kubeproxy::config::ConfigFile;
use crate::kubeproxy::reload::Reload;
use crate::kubeproxy::value::{ExternalIps, LogFormat};
use crate::kubeproxy::{Flags, Settings};
use crate::node::classify::NamePattern;
use crate::node::{cni, guard};
use crate::trace::command::TraceArgs;
use crate::view::explain::{Target, explain};
use crate::view::flow::{self, FlowFilter};
use crate::view::{self, Format};
use crate::{app, check};

/// Kubernetes Services on a bridge, in eBPF: translates at each pod's own veth.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Watch the cluster and keep the kernel's maps equal to it. Ends on SIGTERM; the kernel goes on forwarding.
    Run(Box<RunArgs>),
    /// Tell what this kernel and node can do, what is missing and how to mend it.
    Check(CheckArgs),
    /// Tell what is loaded and attached, how full the maps are, and what became of the packets.
    Status(ViewArgs),
    /// Services.
    Service(ListArgs),
    /// Backends.
    Backend(ListArgs),
    /// Flows.
    Flow(FlowArgs),
    /// Pod interfaces.
    Device(ListArgs),
    /// NetworkPolicies.
    Policy(PolicyArgs),
    /// Pods of this node, with the policy that is in force for them.
    Endpoint(ListArgs),
    /// Tell whether a pod may reach another one, and which rule of which NetworkPolicy says so, from the maps as they are.
    /// The exit code is 0 when it may and 2 when it may not.
    Explain(ExplainArgs),
    /// Packets on their way through the node: what was decided, what netfilter did, where and why they were dropped.
    Trace(Box<TraceArgs>),
    /// Detach everything and remove every pin. Connections through Services end. With --kube-proxy: remove what
    /// kube-proxy left, and nothing of this agent.
    Cleanup(CleanupArgs),
}

#[derive(Debug, Args)]
struct PinArgs {
    /// Where maps and links are pinned; must be on a bpf file system.
    #[arg(long, default_value = "/sys/fs/bpf/proxy-agent", env = "PROXY_AGENT_PIN_ROOT")]
    pin_root: PathBuf,
}

#[derive(Debug, Args)]
struct ViewArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// How to show it.
    #[arg(short, long, value_enum, default_value_t = Format::Table)]
    output: Format,
}

#[derive(Debug, Args)]
struct ListArgs {
    #[command(subcommand)]
    verb: ListVerb,
}

#[derive(Debug, Subcommand)]
enum ListVerb {
    /// Show all of them, from the pinned maps: works while the agent is down.
    List(ViewArgs),
}

#[derive(Debug, Args)]
struct PolicyArgs {
    #[command(subcommand)]
    verb: PolicyVerb,
}

#[derive(Debug, Subcommand)]
enum PolicyVerb {
    /// Show all of them, as the agent knows them, with what they decided on this node: each judgement of a flow is a hit of
    /// the rule that allowed it, or a refusal of the policies none of whose rules did.
    List {
        /// Only rules without a hit, and since when they are counted.
        #[arg(long)]
        unused: bool,
        #[command(flatten)]
        view: ViewArgs,
    },
    /// Tell which policies can be read and yet hardly do what was meant: selectors that match nothing, names of ports that no
    /// pod has, rules that add nothing. The exit code is 0 when there is nothing to tell and 2 when there is.
    Lint {
        /// Only this one.
        #[arg(value_name = "NAMESPACE/NAME")]
        policy: Option<String>,
        #[command(flatten)]
        view: ViewArgs,
    },
}

#[derive(Debug, Args)]
struct ExplainArgs {
    /// Who begins: a pod (NAMESPACE/NAME), an address, or `node` for the node itself.
    #[arg(value_name = "POD|IP|node")]
    from: String,
    /// Who is to be reached: a pod, an address, or one of a Service.
    #[arg(value_name = "POD|IP")]
    to: String,
    /// Destination port and protocol: `80/tcp`, `53/udp`, or `icmp`.
    #[arg(value_name = "PORT/PROTOCOL")]
    target: Target,
    #[command(flatten)]
    view: ViewArgs,
}

#[derive(Debug, Args)]
struct FlowArgs {
    #[command(subcommand)]
    verb: FlowVerb,
}

#[derive(Debug, Subcommand)]
enum FlowVerb {
    /// Show flows, from the pinned maps: works while the agent is down.
    List {
        #[command(flatten)]
        view: ViewArgs,
        #[command(flatten)]
        filter: FlowFilter,
        /// At most so many: the first that are found.
        #[arg(long)]
        limit: Option<usize>,
    },
    /// Forget flows, and say how many. UDP chooses a backend anew with its next packet; a TCP connection through a
    /// Service ends.
    Flush {
        #[command(flatten)]
        view: ViewArgs,
        #[command(flatten)]
        filter: FlowFilter,
        /// Every flow, where nothing else chooses.
        #[arg(long)]
        all: bool,
    },
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Where maps and links would be pinned.
    #[command(flatten)]
    pins: PinArgs,
    /// As in `run`.
    #[arg(long, default_value = "auto")]
    cgroup: CgroupArg,
    /// A folder of manifests: also tell what is the matter with the NetworkPolicies in it, as far as that can be told
    /// without a cluster.
    #[arg(long, value_name = "FOLDER")]
    policies: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[expect(clippy::struct_excessive_bools, reason = "each is a flag of the command line")]
struct CleanupArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// Remove kube-proxy's chains of iptables (legacy and nft), its nftables tables, ipsets and the link kube-ipvs0.
    /// Nothing else is touched. Only when the agent serves and kube-proxy does not run.
    #[arg(long)]
    kube_proxy: bool,
    /// Take no new flows, and keep those that are there. Start kube-proxy beside the agent, stop the agent, run this; then,
    /// when the connections have ended, `cleanup` without it.
    #[arg(long, conflicts_with = "kube_proxy")]
    keep_flows: bool,
    /// Only tell what would be removed.
    #[arg(long, requires = "kube_proxy")]
    dry_run: bool,
    /// Do not ask whether the agent serves and kube-proxy runs.
    #[arg(long, requires = "kube_proxy")]
    force: bool,
    /// Health server of the agent.
    #[arg(long, requires = "kube_proxy", default_value = "127.0.0.1:10256", value_name = "IP:PORT")]
    healthz: SocketAddr,
}

/// `auto`, `none` or a path.
#[derive(Clone, Debug, PartialEq, Eq)]
enum CgroupArg {
    Auto,
    None,
    Path(PathBuf),
}

impl std::str::FromStr for CgroupArg {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(match text {
            "auto" => Self::Auto,
            "none" => Self::None,
            path => Self::Path(path.into()),
        })
    }
}

impl CgroupArg {
    fn resolve(&self) -> Result<Option<PathBuf>> {
        match self {
            Self::None => Ok(None),
            Self::Path(path) => Ok(Some(path.clone())),
            Self::Auto => check::find_cgroup2().map(Some).context(
                "no cgroup v2 hierarchy is mounted: mount one (mount -t cgroup2 none /sys/fs/cgroup/unified) and give \
                 --cgroup PATH, or --cgroup none, with which processes of the node itself do not reach Services",
            ),
        }
    }
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// `kube` (an API server) or `dir:PATH` (a folder of manifests, watched).
    #[arg(long, default_value = "kube")]
    source: String,
    /// URLs of API servers, with commas: used with the ServiceAccount's token in place of the in-cluster address, which
    /// is a ClusterIP and works only once this agent runs.
    #[arg(long, env = "PROXY_AGENT_APISERVER")]
    apiserver: Option<String>,
    /// Name of this node's Node object, unless --hostname-override or the file gives one; the host name if not given.
    #[arg(long, env = "NODE_NAME")]
    node_name: Option<String>,
    /// Directory of the kernel's `nf_conntrack_*` settings, to be set as kube-proxy sets them (`/proc/sys/net/netfilter`, or
    /// where it is mounted in a container). Without it they stay as they are.
    #[arg(long, env = "PROXY_AGENT_CONNTRACK_SETTINGS")]
    conntrack_settings: Option<PathBuf>,
    /// How programs are attached to interfaces.
    #[arg(long, value_enum, default_value_t = AttachMode::Auto)]
    attach: AttachMode,
    /// Root of the cgroup v2 hierarchy, whose sockets reach Services without packet translation: a path, `auto` or
    /// `none`.
    #[arg(long, default_value = "auto")]
    cgroup: CgroupArg,
    /// Whose sockets are led to a Service's backend before there is a packet: those of the node and hostNetwork pods, or those
    /// of all pods, but for pods with the annotation proxy-agent.io/socket-lb: "disabled".
    #[arg(long, value_enum, default_value_t = SocketLb::Node, env = "PROXY_AGENT_SOCKET_LB")]
    socket_lb: SocketLb,
    /// Only bridges of these names (`*` and `?` allowed) carry pods; by default every bridge with an address does.
    #[arg(long)]
    pod_bridge: Vec<NamePattern>,
    /// Where libcni keeps its records of which interface is which pod's. Where there are NetworkPolicies, nothing reaches a
    /// pod without one.
    #[arg(long, env = "PROXY_AGENT_CNI_RESULTS", default_value = cni::RESULTS)]
    cni_results: PathBuf,
    /// Let pods reach their own node whatever their NetworkPolicies say. By default a policy decides about the node as about
    /// any other address.
    #[arg(long)]
    allow_pods_to_node: bool,
    /// Where NetworkPolicies are in force: keep veths of pod bridges silent that have no programs yet, by a table of nftables
    /// that stays while the agent is away. Needs `nft`.
    #[arg(long)]
    bridge_guard: bool,
    /// What becomes of externalIPs of Services: all, none, or only those in these ranges.
    #[arg(long, value_name = "all|none|CIDR[,CIDR]")]
    external_ips: Option<ExternalIps>,
    /// Entries for established TCP flows; two for each that is translated. Applies when the map is first made. Twice
    /// what --conntrack-max-per-core and --conntrack-min ask for, if either is given; otherwise by the node's memory:
    /// one for each 32 KiB up to 262144, and from 16 GiB on one for each 64 KiB, which takes less than 1 % of it when full.
    #[arg(long, value_parser = clap::value_parser!(u32).range(256..=16_777_216))]
    flow_live_entries: Option<u32>,
    /// Entries for handshakes, closing TCP and UDP. Applies when the map is first made. By default a
    /// quarter of what memory gives for established flows (8 GiB: 65536).
    #[arg(long, value_parser = clap::value_parser!(u32).range(256..=16_777_216))]
    flow_brief_entries: Option<u32>,
    /// Established flows through Services that one pod may have begun; further connections of it are refused. Of direct ones
    /// as many are kept from being evicted, and none is refused. 0 for any number. By default as many as fill half of the
    /// entries.
    #[arg(long)]
    pod_flow_quota: Option<u32>,
    #[command(flatten)]
    kube_proxy: Flags,
}

/// The whole program: reads the command line, does what it says, and tells why it could not.
pub fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(code) => code,
        Err(error) => {
            #[expect(clippy::print_stderr, reason = "the last word of a failed command")]
            {
                eprintln!("proxy-agent: {error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

impl Cli {
    /// Does what was asked for.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Run(args) => run(*args).map(|()| ExitCode::SUCCESS),
            Command::Check(args) => {
                let cgroup = args.cgroup.resolve().ok().flatten();
                let mut report = check::report(&args.pins.pin_root, cgroup.as_deref());
                report.extend(args.policies.as_deref().map(check::policies).unwrap_or_default());
                view::check(&report);
                Ok(if check::is_fit(&report) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            }
            Command::Status(args) => show(&args, view::status),
            Command::Service(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::services),
            Command::Backend(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::backends),
            Command::Flow(FlowArgs { verb: FlowVerb::List { view, filter, limit } }) => {
                flow::list(&view.pins.pin_root, view.output, &filter, limit).map(|()| ExitCode::SUCCESS)
            }
            Command::Flow(FlowArgs { verb: FlowVerb::Flush { view, filter, all } }) => {
                flow::flush(&view.pins.pin_root, view.output, &filter, all).map(|()| ExitCode::SUCCESS)
            }
            Command::Device(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::devices),
            Command::Policy(PolicyArgs { verb: PolicyVerb::List { unused, view } }) => {
                show(&view, if unused { view::unused } else { view::policies })
            }
            Command::Policy(PolicyArgs { verb: PolicyVerb::Lint { policy, view } }) => {
                view::lint(&view.pins.pin_root, view.output, policy.as_deref())
            }
            Command::Endpoint(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::endpoints),
            Command::Explain(ExplainArgs { from, to, target, view }) => {
                explain(&view.pins.pin_root, view.output, &from, &to, target)
            }
            Command::Trace(args) => Ok(args.run()),
            Command::Cleanup(CleanupArgs { kube_proxy: true, dry_run, force, healthz, pins: _, keep_flows: _ }) => {
                view::lines(&Cleanup { healthz, force, dry_run }.run()?, "nothing of kube-proxy is here");
                Ok(ExitCode::SUCCESS)
            }
            Command::Cleanup(args) if args.keep_flows => {
                let (mut removed, left) = dataplane::retire(&args.pins.pin_root)?;
                // From now on nobody gives programs to a new pod.
                unguard(&mut removed);
                removed.push(format!("established connections that go on: {left}"));
                view::lines(&removed, "nothing of proxy-agent is here");
                Ok(ExitCode::SUCCESS)
            }
            Command::Cleanup(args) => {
                let mut removed = dataplane::cleanup(&args.pins.pin_root)?;
                unguard(&mut removed);
                view::lines(&removed, "nothing of proxy-agent is here");
                Ok(ExitCode::SUCCESS)
            }
        }
    }
}

/// Removes the guard of bridges, or says what whoever asked for it has to do.
fn unguard(removed: &mut Vec<String>) {
    match guard::remove_if_there() {
        Ok(found) => removed.extend(found),
        Err(error) => eprintln!(
            "proxy-agent: {error}. Where the agent ran with --bridge-guard, new pods stay silent until \
             `nft delete table bridge {}` is run in this network namespace",
            guard::TABLE
        ),
    }
}

fn show(args: &ViewArgs, view: fn(&Path, Format) -> Result<()>) -> Result<ExitCode> {
    view(&args.pins.pin_root, args.output).map(|()| ExitCode::SUCCESS)
}

fn run(args: RunArgs) -> Result<()> {
    // Named one by one: a flag that nobody uses does not compile.
    let RunArgs {
        pins: PinArgs { pin_root },
        source,
        apiserver,
        node_name,
        attach,
        conntrack_settings,
        cgroup,
        socket_lb,
        pod_bridge,
        cni_results,
        allow_pods_to_node,
        bridge_guard,
        external_ips,
        flow_live_entries,
        flow_brief_entries,
        pod_flow_quota,
        kube_proxy: flags,
    } = args;
    let cgroup = cgroup.resolve()?;
    anyhow::ensure!(
        cgroup.is_some() || socket_lb == SocketLb::Node,
        "--socket-lb all and --cgroup none exclude each other: sockets are reached at the root of the cgroup v2 hierarchy; \
         give --cgroup PATH, or leave --socket-lb out"
    );
    let external_ips = external_ips.map(|ExternalIps(which)| which);
    let file = flags.config.as_deref().map(ConfigFile::read).transpose()?;
    let (settings, ignored) = Settings::new(file.as_ref(), &flags, external_ips.as_ref())?;
    log(&settings);
    for field in ignored {
        tracing::warn!(field = field.field, "set, and without effect: {}", field.why);
    }
    let node_name = match settings.node_name.clone().or(node_name) {
        Some(name) => name,
        None => nix::unistd::gethostname().context("host name; give --node-name")?.to_string_lossy().to_lowercase(),
    };
    // A folder needs no server: what the file says of one does not matter then, what a flag says is a mistake.
    let kubeconfig = if source == "kube" { settings.kubeconfig.clone() } else { flags.kubeconfig.clone() };
    let apiserver = flags.master.as_deref().or(apiserver.as_deref());
    let flows = settings.flows.map(|flows| flows.saturating_mul(2).clamp(sizing::FEWEST, sizing::MOST));
    let sized = sizing::memory().map_or(
        sizing::Entries { live: capacity::FLOW_LIVE, brief: capacity::FLOW_BRIEF },
        sizing::Entries::for_memory,
    );
    let flow_live = flow_live_entries.or(flows).unwrap_or(sized.live);
    let config = app::Config {
        source: SourceConfig::from_flags(&source, kubeconfig, apiserver)?,
        node_name,
        dataplane: dataplane::Config {
            pin_root,
            attach,
            cgroup,
            socket_lb,
            flow_live,
            flow_brief: flow_brief_entries.unwrap_or(sized.brief),
            // A flow through a Service has two entries.
            pod_quota: pod_flow_quota.unwrap_or(flow_live / 4),
            node_open: allow_pods_to_node,
            udp_idle: settings.timeouts.udp_idle(),
            policy: Limits::default(),
        },
        pod_bridges: pod_bridge,
        cni_results,
        bridge_guard,
        conntrack_settings,
        reload: file.map(|file| Reload::new(file, flags, external_ips, settings.clone())),
        settings,
    };
    // Two threads: one for the reconciler, whose system calls block, one for everything that must go on meanwhile.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(app::run(config))
}

fn log(settings: &Settings) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(settings.log_filter()));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match settings.log_format {
        LogFormat::Text => subscriber.with_ansi(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
}
