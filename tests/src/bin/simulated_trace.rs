//! `proxy-agent trace` on a simulated node, with requests to look at: pods `a` and `b`, a Service `to-NAME` in front of
//! each pod and node, and somebody outside who asks a NodePort.
#![forbid(unsafe_code)]

use std::net::SocketAddr;
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use proxy_tests::agent::find_binary;
use proxy_tests::scenario::{self, SERVICE_PORT, Scenario, matrix};
use proxy_tests::traffic::tcp_exchange;
use proxy_tests::{ClusterSpec, Deadline, Family, Netns, NodeSpec};

/// Traces on a simulated node.
#[derive(Debug, Parser)]
struct Arguments {
    /// bridge-nf-call-iptables is 1.
    #[arg(long)]
    br_netfilter: bool,
    /// Arguments of `proxy-agent trace`.
    #[arg(last = true)]
    trace: Vec<String>,
}

const NODE_PORT: u16 = 30_081;
/// Between two rounds of requests.
const PAUSE: Duration = Duration::from_millis(200);

fn main() -> Result<ExitCode> {
    let arguments = Arguments::parse();
    let spec = ClusterSpec::default()
        .node(NodeSpec::new("node1").br_netfilter(arguments.br_netfilter).pods(["a", "b"]))
        .node(NodeSpec::new("node2").pods(["d"]));
    let scenario = matrix::scenario_of(&spec, &[])?;
    scenario.publish_service(&scenario::service("port", 120).node_port(NODE_PORT), &["b"])?;
    scenario.wait_endpoints(0, "port", Some(1))?;
    let node = scenario.node(0);
    let mut command = Command::new(find_binary()?);
    command.arg("trace").args(&arguments.trace);
    let verb = arguments.trace.first().map(String::as_str).unwrap_or_default();
    if !["hooks", "show", "graph", "diff"].contains(&verb) {
        command.arg("--pin-root").arg(node.pin_root());
        if verb != "doctor" {
            command.arg("--cni-results").arg(node.cni_results_dir());
        }
    }
    let stop = AtomicBool::new(false);
    let asks = asks(&scenario)?;
    let status = thread::scope(|scope| -> Result<_> {
        let mut child = node.netns().run(|| command.spawn())?.context("start proxy-agent")?;
        scope.spawn(|| {
            while !stop.load(Ordering::Relaxed) {
                for (from, target) in &asks {
                    // What does not arrive is for the trace to tell.
                    let _ = tcp_exchange(from, *target, 1_000, 1_000);
                }
                let _ = Deadline::after(PAUSE).until("the next round", || stop.load(Ordering::Relaxed));
            }
        });
        let status = child.wait();
        stop.store(true, Ordering::Relaxed);
        Ok(status?)
    })?;
    let code = status.code().and_then(|code| u8::try_from(code).ok());
    Ok(code.map_or(ExitCode::FAILURE, ExitCode::from))
}

/// Who asks, and where.
fn asks(scenario: &Scenario) -> Result<Vec<(Netns, SocketAddr)>> {
    let mut asks = Vec::new();
    let a = scenario.netns("a")?;
    for family in Family::BOTH {
        for server in ["b", "d"] {
            asks.push((a.clone(), SocketAddr::new(matrix::vip_of(server, family)?, SERVICE_PORT)));
        }
        let port = SocketAddr::new(scenario.node(0).ip(family), NODE_PORT);
        asks.push((scenario.cluster().outside().clone(), port));
    }
    Ok(asks)
}
