//! The command line.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use proxy_abi::capacity;
use tracing_subscriber::EnvFilter;

use crate::dataplane::{self, AttachMode};
use crate::k8s::SourceConfig;
use crate::node::classify::NamePattern;
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
    Flow(ListArgs),
    /// Pod interfaces.
    Device(ListArgs),
    /// Detach everything and remove every pin. Connections through Services end.
    Cleanup(PinArgs),
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
struct CheckArgs {
    /// Where maps and links would be pinned.
    #[command(flatten)]
    pins: PinArgs,
    /// As in `run`.
    #[arg(long, default_value = "auto")]
    cgroup: CgroupArg,
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

/// How log lines are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Args)]
struct RunArgs {
    #[command(flatten)]
    pins: PinArgs,
    /// `kube` (an API server) or `dir:PATH` (a folder of manifests, watched).
    #[arg(long, default_value = "kube")]
    source: String,
    /// Kubeconfig file, for --source kube outside of a pod.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// URLs of API servers, with commas: used with the ServiceAccount's token in place of the in-cluster address, which
    /// is a ClusterIP and works only once this agent runs.
    #[arg(long, env = "PROXY_AGENT_APISERVER")]
    apiserver: Option<String>,
    /// Name of this node's Node object; the host name if not given.
    #[arg(long, env = "NODE_NAME")]
    node_name: Option<String>,
    /// How programs are attached to interfaces.
    #[arg(long, value_enum, default_value_t = AttachMode::Auto)]
    attach: AttachMode,
    /// Root of the cgroup v2 hierarchy, whose sockets reach Services without packet translation: a path, `auto` or
    /// `none`.
    #[arg(long, default_value = "auto")]
    cgroup: CgroupArg,
    /// Only bridges of these names (`*` and `?` allowed) carry pods; by default every bridge with an address does.
    #[arg(long)]
    pod_bridge: Vec<NamePattern>,
    /// Address of the health server; `none` for none.
    #[arg(long, default_value = "0.0.0.0:10256")]
    healthz_bind_address: String,
    /// Entries for established TCP flows; two for each that is translated. Applies when the map is first made.
    #[arg(long, default_value_t = capacity::FLOW_LIVE, value_parser = clap::value_parser!(u32).range(256..=16_777_216))]
    flow_live_entries: u32,
    /// Entries for handshakes, closing TCP and UDP. Applies when the map is first made.
    #[arg(long, default_value_t = capacity::FLOW_BRIEF, value_parser = clap::value_parser!(u32).range(256..=16_777_216))]
    flow_brief_entries: u32,
    /// Log lines for people or for programs.
    #[arg(long, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
}

impl Cli {
    /// Does what was asked for.
    pub fn run(self) -> Result<ExitCode> {
        match self.command {
            Command::Run(args) => run(*args).map(|()| ExitCode::SUCCESS),
            Command::Check(args) => {
                let cgroup = args.cgroup.resolve().ok().flatten();
                let report = check::report(&args.pins.pin_root, cgroup.as_deref());
                view::check(&report);
                Ok(if check::is_fit(&report) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
            }
            Command::Status(args) => show(&args, view::status),
            Command::Service(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::services),
            Command::Backend(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::backends),
            Command::Flow(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::flows),
            Command::Device(ListArgs { verb: ListVerb::List(args) }) => show(&args, view::devices),
            Command::Cleanup(args) => {
                view::lines(&dataplane::cleanup(&args.pin_root)?, "nothing of proxy-agent is here");
                Ok(ExitCode::SUCCESS)
            }
        }
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
        kubeconfig,
        apiserver,
        node_name,
        attach,
        cgroup,
        pod_bridge,
        healthz_bind_address,
        flow_live_entries,
        flow_brief_entries,
        log_format,
    } = args;
    log(log_format);
    let node_name = match node_name {
        Some(name) => name,
        None => nix::unistd::gethostname().context("host name; give --node-name")?.to_string_lossy().to_lowercase(),
    };
    let healthz = match healthz_bind_address.as_str() {
        "none" => None,
        address => Some(
            address.parse().with_context(|| format!("--healthz-bind-address {address}: write ADDRESS:PORT or none"))?,
        ),
    };
    let config = app::Config {
        source: SourceConfig::from_flags(&source, kubeconfig, apiserver.as_deref())?,
        node_name,
        dataplane: dataplane::Config {
            pin_root,
            attach,
            cgroup: cgroup.resolve()?,
            flow_live: flow_live_entries,
            flow_brief: flow_brief_entries,
        },
        pod_bridges: pod_bridge,
        healthz,
    };
    // Two threads: one for the reconciler, whose system calls block, one for everything that must go on meanwhile.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(app::run(config))
}

fn log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.with_ansi(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
}
