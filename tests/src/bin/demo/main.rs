//! The node dataplane at work: two simulated nodes, pods, the real agent, ordinary Kubernetes objects, real traffic.
//!
//! ```text
//!   opening   nodes, pods, servers; the objects of deploy/examples; nothing answers yet
//!   reach     agents start; every kind of path, over IPv4 and IPv6, with the hooks that saw it
//!   change    endpoints and ports change under traffic
//!   restart   kill -9 in the middle of transfers
//!   ending    cleanup, and nothing is left
//! ```
//!
//! Every claim that is told is a check; one that does not hold makes the exit status 1. The agent does not know that
//! this is a demo: it is started as on any node.
#![forbid(unsafe_code)]

mod change;
mod controller;
mod ending;
mod hooks;
mod narrator;
mod reach;
mod restart;
mod stage;
mod traces;

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use proxy_tests::traffic::{TcpOptions, tcp_exchange_with};
use proxy_tests::{Family, agent, interrupt};

use crate::narrator::{Narrator, time};
use crate::stage::{NODES, Stage};
use crate::traces::Surface;

/// Where the examples are, seen from this package.
const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../deploy/examples");

/// Shows the node dataplane at work, and checks everything that it tells.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask demo --", max_term_width = 100)]
struct Arguments {
    /// Keep the cluster until Enter is pressed, to look around in it.
    #[arg(long)]
    keep: bool,
    /// Folder with the Services.
    #[arg(long, default_value = EXAMPLES)]
    examples: PathBuf,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    interrupt::swept_after(|| {
        let mut narrator = Narrator::new();
        let played = play(&mut narrator, &arguments);
        narrator.outcome(played);
        if narrator.finish() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    })
}

fn play(n: &mut Narrator, arguments: &Arguments) -> Result<()> {
    n.step("Two nodes with a bridge each, six pods, servers in them; the objects of deploy/examples");
    let mut stage = Stage::build(&arguments.examples)?;
    let surfaces = opening(n, &stage)?;
    n.step("The agent starts on each node");
    start_agents(n, &mut stage)?;

    // A step that breaks off is told as a failed check; what comes after it still has its nodes.
    let reached = reach::play(n, &stage);
    n.outcome(reached);
    let unaided = netfilter_still_empty(n, &stage);
    n.outcome(unaided);
    for change in [change::scale_up, |n: &mut Narrator, s: &mut Stage| change::scale_down(n, s)] {
        let changed = change(n, &mut stage);
        n.outcome(changed);
    }
    let switched = change::udp_switch(n, &stage);
    n.outcome(switched);
    let edited = change::edit_port(n, &mut stage);
    n.outcome(edited);
    let restarted = restart::play(n, &mut stage);
    n.outcome(restarted);
    if arguments.keep {
        keep(n, &stage)?;
    }
    let ended = ending::play(n, &mut stage, &surfaces);
    n.outcome(ended);
    ending::strike(n, stage)
}

/// What there is before any agent runs.
fn opening(n: &mut Narrator, stage: &Stage) -> Result<BTreeMap<&'static str, Surface>> {
    for node in stage.cluster.nodes() {
        let pods: Vec<_> = node.pods().iter().map(|pod| format!("{} {}", pod.name(), pod.ip4())).collect();
        let [ip4, ip6] = Family::BOTH.map(|family| node.ip(family));
        n.say(format!("{}   {ip4}, {ip6}   {}", node.name(), pods.join(", ")));
    }
    for service in stage.services.values() {
        let ports: Vec<_> =
            service.ports()?.iter().map(|p| format!("{}/{}→{}", p.number, p.protocol, p.target)).collect();
        let [ip4, ip6] = Family::BOTH.map(|family| service.address(family));
        let (name, file) = (service.name(), service.file());
        n.say(format!("Service {name} ({file})   {}, {}   {}", ip4?, ip6?, ports.join(", ")));
    }
    let mut surfaces = BTreeMap::new();
    for name in NODES {
        let node = stage.node(name)?;
        let filters = ["iptables", "ip6tables", "arptables"]
            .map(|kind| node.netns().read_sysctl(&format!("net/bridge/bridge-nf-call-{kind}")));
        // Absent where br_netfilter is not loaded, which is as good.
        let off = filters.iter().all(|value| value.as_ref().map_or(true, |value| value == "0"));
        let rules = node.netfilter_rules()?.len();
        let (off_or_on, many) = (if off { "off" } else { "ON" }, rules);
        n.check(off && rules == 0, format!("{name}: br_netfilter is {off_or_on}; {many} netfilter rules"));
        surfaces.insert(name, Surface::of(node)?);
    }
    let vip = stage.service("web")?.at(Family::V4, "http")?;
    let options = TcpOptions { timeout: Duration::from_millis(300), ..TcpOptions::default() };
    let nobody = tcp_exchange_with(&stage.netns("client")?, vip, &options).is_err();
    n.check(nobody, format!("nobody answers at {vip} yet"));
    Ok(surfaces)
}

fn start_agents(n: &mut Narrator, stage: &mut Stage) -> Result<()> {
    n.say(format!("{} run --source dir:MANIFESTS --node-name NODE", agent::find_binary()?.display()));
    let start = Instant::now();
    stage.start_agents()?;
    let took = start.elapsed();
    for name in NODES {
        let status: serde_json::Value = serde_json::from_str(&stage.agent(name)?.cli(&["status", "-o", "json"])?)?;
        let (healthy, _) = stage.agent(name)?.get("/healthz")?;
        n.check(
            status["agent"] == "running" && healthy == 200,
            format!("{name}: healthy, {} links pinned under {}", status["links"], shown(stage.agent(name)?.pin_root())),
        );
    }
    n.say(format!("both within {}", time(took)));
    Ok(())
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

/// No path needed netfilter.
fn netfilter_still_empty(n: &mut Narrator, stage: &Stage) -> Result<()> {
    n.step("None of this needed netfilter");
    for name in NODES {
        let node = stage.node(name)?;
        let rules = node.netfilter_rules()?.len();
        let filter = node.netns().read_sysctl("net/bridge/bridge-nf-call-iptables");
        let filter = filter.unwrap_or_else(|_| "absent".to_owned());
        n.check(
            rules == 0 && filter != "1",
            format!("{name}: {rules} netfilter rules, bridge-nf-call-iptables {filter}"),
        );
    }
    Ok(())
}

/// Waits for Enter.
fn keep(n: &Narrator, stage: &Stage) -> Result<()> {
    n.say("\nThe cluster is kept until you press Enter. From another shell, as root:");
    for name in NODES {
        let node = stage.node(name)?;
        let (path, pins) = (shown(node.netns().path()), shown(&node.pin_root()));
        n.say(format!("  nsenter --net={path} proxy-agent status --pin-root {pins}"));
    }
    let pod = stage.netns("client")?;
    n.say(format!("  nsenter --net={} bash     # inside pod client", shown(pod.path())));
    n.say(format!("  {}     # the objects; changes apply", shown(stage.folder.dir())));
    io::stdin().read_line(&mut String::new()).context("waiting for Enter").map(drop)
}
