//! The agents end, clean up, and nothing of them is left.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use proxy_tests::lease::{BPFFS, ROOT};
use proxy_tests::traffic::{TcpOptions, tcp_exchange, tcp_exchange_with};
use proxy_tests::{Family, netns};

use crate::narrator::Narrator;
use crate::stage::{NODES, Stage};
use crate::traces::{Loaded, Surface, programmed};

/// Stops the agents and cleans up; compares with `before`.
pub(crate) fn play(n: &mut Narrator, stage: &mut Stage, before: &BTreeMap<&str, Surface>) -> Result<()> {
    n.step("The agents end (SIGTERM); the kernel goes on; then `proxy-agent cleanup` on each node");
    let client = stage.netns("client")?;
    let vip = stage.service("web")?.at(Family::V4, "http")?;
    let mut loaded = Loaded::default();
    for name in NODES {
        let pid = stage.agent(name)?.pid().context("the agent runs")?;
        loaded.extend(Loaded::of(pid)?);
        let status = stage.agent_mut(name)?.stop()?;
        n.check(
            status.is_some_and(|status| status.success()),
            format!("{name}: {}", status.map_or("did not end by itself".to_owned(), |s| format!("ended, {s}"))),
        );
    }
    let report = tcp_exchange(&client, vip, 1024, 1024)?;
    n.check(true, format!("no agent runs; {} answers at {}", report.server_name, report.peer));
    for name in NODES {
        let removed = stage.agent(name)?.cleanup()?;
        let count = |word: &str| removed.lines().filter(|line| line.starts_with(word)).count();
        n.say(format!("{name}: cleanup removed {} links and {} maps", count("link"), count("map")));
    }
    loaded.until_gone()?;
    n.check(
        !loaded.programs.is_empty() && !loaded.maps.is_empty(),
        format!("the kernel has freed all of their {} programs and {} maps", loaded.programs.len(), loaded.maps.len()),
    );
    let started: BTreeSet<String> = stage.cluster.pods().iter().map(|pod| pod.host_veth().name.clone()).collect();
    for name in NODES {
        let node = stage.node(name)?;
        let with_program = programmed(node)?;
        let after = Surface::of(node)?;
        let differences = before.get(name).map_or_else(
            || vec!["nothing to compare with".to_owned()],
            |surface| surface.differences(&after, &started),
        );
        n.check(
            with_program.is_empty() && !node.pin_root().exists() && differences.is_empty(),
            format!(
                "{name}: no pin, no interface with a program; interfaces, routes, netfilter and {} sysctls are as before \
                 the agent{}",
                after.settings(),
                if differences.is_empty() { String::new() } else { format!(", but: {}", differences.join("; ")) }
            ),
        );
    }
    let options = TcpOptions { timeout: Duration::from_millis(300), ..TcpOptions::default() };
    let refused = tcp_exchange_with(&client, vip, &options).is_err();
    n.check(refused, format!("{vip} does not answer any more"));
    Ok(())
}

/// Ends pods and nodes; nothing with their prefix is left on the machine.
pub(crate) fn strike(narrator: &mut Narrator, stage: Stage) -> Result<()> {
    let prefix = stage.cluster.prefix().to_owned();
    drop(stage);
    let mut left = Vec::new();
    for place in [netns::DIR, BPFFS, ROOT] {
        for entry in fs::read_dir(Path::new(place)).with_context(|| place.to_owned())? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name == prefix || name.starts_with(&format!("{prefix}-")) {
                left.push(format!("{place}/{name}"));
            }
        }
    }
    narrator.check(
        left.is_empty(),
        format!(
            "nodes and pods are gone; left on this machine: {}",
            if left.is_empty() { "nothing".to_owned() } else { left.join(" ") }
        ),
    );
    Ok(())
}
