//! What the dataplane costs beside plain bridging and the real kube-proxy.
//!
//! ```text
//!   traffic   connections, requests, bytes: every contender on its own node, rounds interleaved
//!   load      the agent with many Services: cold start, one change, memory
//!   packet    one program, one packet
//!   policy    NetworkPolicy in a large cluster
//!   trace     tracing that is off, that is on and matches nothing, that looks for few packets in a flood
//! ```
//!
//! Only ratios and differences within one run say something about the code; the absolute numbers are this machine's.
//! Each has a 95 % interval over the rounds, and where that is wider than the margin to its budget, the verdict is
//! "undecided". CPU time is that of the whole machine (`/proc/stat`), softirq included: run it where nothing else does.
//! The socket programs of our agent sit on the root cgroup, where the clients and servers of every contender are too:
//! they cost each of them the same.
#![forbid(unsafe_code)]

mod contender;
mod empty;
mod kube_api;
mod kube_proxy;
mod load;
mod measure;
mod objects;
mod packet;
mod policy;
mod scenes;
mod stats;
mod tracing;
mod traffic;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use proxy_tests::interrupt;
use serde_json::{Value, json};

use crate::contender::{ALL, Contender, Scene, Way};
use crate::kube_proxy::Mode;
use crate::measure::Kind;
use crate::traffic::Plan;

/// Measures the node dataplane against plain bridging and kube-proxy.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench --", max_term_width = 100)]
struct Arguments {
    /// Numbers of Services, with commas; the largest is that of `load`.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1_000, 10_000], value_parser = clap::value_parser!(u16).range(1..=20_000))]
    services: Vec<u16>,
    /// Rounds of each measurement.
    #[arg(long, default_value_t = 20)]
    rounds: usize,
    /// Milliseconds of one measurement in one round.
    #[arg(long, default_value_t = 500)]
    time: u64,
    /// Changes that are timed.
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Only these parts; may be given several times or with commas.
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Part>,
    /// Only these contenders.
    #[arg(long, value_enum, value_delimiter = ',')]
    against: Vec<Against>,
    /// Few rounds, ten Services in `traffic`: minutes instead of an hour; most verdicts will be undecided.
    #[arg(long)]
    quick: bool,
    /// Where the numbers go, all of them.
    #[arg(long, default_value = "target/bench.json")]
    json: PathBuf,
}

/// Parts of the bench.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Connections per second.
    Connect,
    /// Requests on open connections and by UDP.
    Request,
    /// Bytes.
    Bulk,
    /// The agent with many Services.
    Load,
    /// Nanoseconds of one program.
    Packet,
    /// Across nodes, and from outside by NodePorts.
    Scenes,
    /// 30,000 Services against ten.
    Scale,
    /// Masqueraded connections of one client address, for minutes.
    Sustain,
    /// 5,000 NetworkPolicies and 50,000 pods.
    Policy,
    /// `trace`, off and on.
    Trace,
}

/// Contenders by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Against {
    /// Plain bridging and our ClusterIP with br_netfilter off.
    Plain,
    /// Both with br_netfilter on.
    BrNetfilter,
    /// kube-proxy in nftables mode.
    Nftables,
    /// kube-proxy in iptables mode.
    Iptables,
}

impl Arguments {
    fn has(&self, part: Part) -> bool {
        self.only.is_empty() || self.only.contains(&part)
    }

    fn kinds(&self) -> Vec<Kind> {
        let part = |kind: &Kind| match kind {
            Kind::Connect1 | Kind::Connect16 => Part::Connect,
            Kind::TcpRequest | Kind::UdpRequest => Part::Request,
            Kind::Bulk => Part::Bulk,
        };
        Kind::ALL.into_iter().filter(|kind| self.has(part(kind))).collect()
    }

    /// Ours with br_netfilter off is always among them.
    fn contenders(&self, kube_proxy: bool) -> Vec<Contender> {
        let named = |contender: &Contender| match contender.way {
            Way::KubeProxy(Mode::Nftables) => Against::Nftables,
            Way::KubeProxy(Mode::Iptables) => Against::Iptables,
            _ if contender.br_netfilter => Against::BrNetfilter,
            _ => Against::Plain,
        };
        let wanted = |contender: &Contender| {
            *contender == contender::OURS || self.against.is_empty() || self.against.contains(&named(contender))
        };
        let possible = |contender: &Contender| kube_proxy || !matches!(contender.way, Way::KubeProxy(_));
        ALL.into_iter().filter(|contender| wanted(contender) && possible(contender)).collect()
    }
}

fn main() -> ExitCode {
    let mut arguments = Arguments::parse();
    if arguments.quick {
        arguments.rounds = arguments.rounds.min(3);
        arguments.time = arguments.time.min(300);
        arguments.changes = arguments.changes.min(50);
    }
    interrupt::swept_after(|| match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    })
}

fn run(arguments: &Arguments) -> Result<()> {
    let kube_proxy = kube_proxy::find();
    let version = kube_proxy.as_deref().map(kube_proxy::version).transpose()?;
    let about = about(version.as_deref())?;
    println!("{}", serde_json::to_string_pretty(&about)?);
    if kube_proxy.is_none() {
        println!("no kube-proxy: its rows are left out (set KUBE_PROXY, or run `cargo xtask setup` with Go installed)");
    }
    let mut result = json!({ "version": 1, "about": about });
    let kinds = arguments.kinds();
    if !kinds.is_empty() {
        let plan = Plan {
            contenders: arguments.contenders(kube_proxy.is_some()),
            kinds,
            rounds: arguments.rounds,
            time: Duration::from_millis(arguments.time),
            kube_proxy: kube_proxy.as_deref(),
        };
        let counts = if arguments.quick { &arguments.services[..1] } else { &arguments.services[..] };
        let mut traffic = Vec::new();
        for &services in counts {
            traffic.push(traffic::run(&plan, services)?);
            result["traffic"] = Value::from(traffic.clone());
            write(arguments, &result)?;
        }
    }
    if arguments.has(Part::Load) {
        let services = arguments.services.iter().copied().max().unwrap_or(1);
        let starts = if arguments.quick { 3 } else { 10 };
        result["load"] = load::run(services, starts, arguments.changes)?;
        write(arguments, &result)?;
    }
    let time = Duration::from_millis(arguments.time);
    if arguments.has(Part::Scenes) {
        let mut scenes = Vec::new();
        let contenders = arguments.contenders(kube_proxy.is_some());
        for scene in Scene::OTHERS {
            scenes.push(scenes::scene(scene, &contenders, arguments.rounds, time, kube_proxy.as_deref())?);
            result["scenes"] = Value::from(scenes.clone());
            write(arguments, &result)?;
        }
    }
    if arguments.has(Part::Scale) {
        let many = if arguments.quick { 3_000 } else { 30_000 };
        result["scale"] = scenes::scale(many, arguments.rounds, time)?;
        write(arguments, &result)?;
    }
    if arguments.has(Part::Sustain) {
        let beside = arguments.contenders(kube_proxy.is_some()).contains(&contender::NFTABLES);
        let whole = Duration::from_secs(if arguments.quick { 20 } else { 300 });
        result["sustain"] = scenes::sustain(whole, kube_proxy.as_deref().filter(|_| beside))?;
        write(arguments, &result)?;
    }
    if arguments.has(Part::Policy) {
        let (pods, policies) = if arguments.quick { (5_000, 500) } else { (50_000, 5_000) };
        result["policy"] = policy::run(pods, policies, arguments.changes, arguments.rounds)?;
        write(arguments, &result)?;
    }
    if arguments.has(Part::Trace) {
        result["trace"] = tracing::run(arguments.rounds, time)?;
        write(arguments, &result)?;
    }
    if arguments.has(Part::Packet) {
        result["packet"] = packet::run(arguments.rounds)?;
        write(arguments, &result)?;
    }
    println!("\nall numbers: {}", arguments.json.display());
    Ok(())
}

/// After every part, so that an interrupted run leaves what it has.
fn write(arguments: &Arguments, result: &Value) -> Result<()> {
    let text = serde_json::to_string_pretty(result)? + "\n";
    fs::write(&arguments.json, text).with_context(|| arguments.json.display().to_string())
}

/// Where this was measured.
fn about(kube_proxy: Option<&str>) -> Result<Value> {
    let uname = nix::sys::utsname::uname()?;
    let cpus = std::thread::available_parallelism()?.get();
    let load = fs::read_to_string("/proc/loadavg")?;
    let model = fs::read_to_string("/proc/cpuinfo")?;
    let model = model.lines().find_map(|line| line.strip_prefix("model name")).unwrap_or_default();
    Ok(json!({
        "kernel": uname.release().to_string_lossy(),
        "cpu": model.trim_start_matches([' ', '\t', ':']),
        "cpus": cpus,
        "load_average_at_start": load.split(' ').next(),
        "kube_proxy": kube_proxy,
    }))
}
