//! The agent is killed in the middle of transfers, stays away for a while, and comes back.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use proxy_tests::traffic::{BusyFlows, Steady, SteadyOptions, TcpOptions, tcp_exchange, tcp_exchange_with};
use proxy_tests::{Deadline, Family};
use serde_json::Value;

use crate::narrator::{Narrator, time};
use crate::stage::{NODES, Stage};

/// How long transfers run before the agent is killed, and how long it stays away.
const BEFORE: Duration = Duration::from_millis(500);
const AWAY: Duration = Duration::from_millis(1_500);
/// How long the bulk transfer is to last, by what a short one showed; but a busy machine may become faster meanwhile.
const BULK: Duration = Duration::from_secs(6);
const TRIAL: u64 = 32 << 20;
const LEAST: u64 = 1536 << 20;
const MOST: u64 = 6 << 30;
/// When it has failed.
const LIMIT: Duration = Duration::from_mins(2);
/// Datagrams per second.
const RATE: u32 = 4_000;
/// Connections that exchange small messages all the time.
const FLOWS: usize = 8;

const MIB: f64 = (1 << 20) as f64;

/// Rows of one of the agent's lists.
fn rows(stage: &Stage, what: &str) -> Result<Vec<Value>> {
    let text = stage.agent(NODES[0])?.cli(&[what, "list", "-o", "json"])?;
    let mut listing: Value = serde_json::from_str(&text)?;
    let mut rows = listing["items"].take().as_array().cloned().with_context(|| format!("{what} list has no items"))?;
    rows.sort_by_key(Value::to_string);
    Ok(rows)
}

/// What must be the same after a restart: ids, generations, services with their backends.
fn state(stage: &Stage) -> Result<[Vec<Value>; 2]> {
    Ok([rows(stage, "backend")?, rows(stage, "service")?])
}

#[expect(clippy::cast_precision_loss, reason = "bytes, for a reader")]
fn mib(bytes: u64) -> String {
    format!("{:.0} MiB", bytes as f64 / MIB)
}

/// kill -9 in mid-transfer.
pub(crate) fn play(narrator: &mut Narrator, stage: &mut Stage) -> Result<()> {
    narrator.step("kill -9 of the agent on node1 in the middle of transfers");
    let client = stage.netns("client")?;
    let [web4, web6] = Family::BOTH.map(|family| stage.service("web").and_then(|web| web.at(family, "http")));
    let (web4, web6, dns) = (web4?, web6?, stage.service("dns")?.at(Family::V4, "dns")?);
    let trial = tcp_exchange(&client, web4, TRIAL, TRIAL)?.duration;
    // Other traffic will slow it down; that only makes it longer.
    let size = u64::try_from(u128::from(TRIAL) * BULK.as_millis() / trial.as_millis().max(1)).unwrap_or(TRIAL);
    let size = size.clamp(LEAST, MOST);
    let before = state(stage)?;

    let steady = Steady::start(&client, dns, SteadyOptions { rate: RATE, ..SteadyOptions::default() })?;
    let busy = BusyFlows::start(&client, web6, FLOWS, Duration::from_millis(1), Duration::from_secs(2))?;
    let bulk = {
        let client = client.clone();
        let options = TcpOptions { up: size, down: size, timeout: LIMIT, ..TcpOptions::default() };
        std::thread::spawn(move || {
            let report = tcp_exchange_with(&client, web4, &options);
            (report, Instant::now())
        })
    };
    let passed =
        |start: Instant, limit: Duration| Deadline::after(limit * 2).until("time", || start.elapsed() >= limit);
    passed(Instant::now(), BEFORE)?;
    let killed = Instant::now();
    stage.agent_mut(NODES[0])?.kill9()?;
    narrator.say(format!(
        "{} up and down by TCP over IPv4, {FLOWS} busy connections over IPv6 and {RATE} datagrams per second run \
         meanwhile.",
        mib(size)
    ));
    let down = stage.agent(NODES[0])?.cli(&["status", "-o", "json"])?;
    let down: Value = serde_json::from_str(&down)?;
    narrator.check(down["agent"] == "down", "the agent is down; its command line reads the pinned maps without it:");
    narrator.say("$ proxy-agent service list");
    narrator.table(&stage.agent(NODES[0])?.cli(&["service", "list"])?);
    let flows = stage.agent(NODES[0])?.cli(&["flow", "list"])?;
    let (head, body) = flows.split_once('\n').unwrap_or((&flows, ""));
    let established: Vec<_> = body.lines().filter(|line| line.contains("ESTABLISHED")).collect();
    narrator.say(format!(
        "$ proxy-agent flow list    ({} flows; the established ones to Service web)",
        body.lines().count()
    ));
    let web: Vec<&str> = established.iter().copied().filter(|line| line.contains("/web")).collect();
    narrator.table(&[&[head], &web[..web.len().min(3)]].concat().join("\n"));
    narrator
        .check(web.len() > FLOWS, format!("{} of them are there: the transfer and the busy connections", web.len()));
    let fresh = tcp_exchange(&client, web6, 1 << 20, 1 << 20)?;
    narrator.check(
        fresh.peer == web6,
        format!("a new connection to {web6} while it is down: {} answered", fresh.server_name),
    );
    passed(killed, AWAY)?;
    let restarting = Instant::now();
    stage.agent_mut(NODES[0])?.restart()?;
    let back = Instant::now();
    narrator.check(
        true,
        format!(
            "it was away for {} and healthy {} after its restart",
            time(restarting - killed),
            time(back - restarting)
        ),
    );
    let kept = state(stage)? == before;
    let count = before[0].len();
    narrator.check(kept, format!("it took over what it had left: {count} backends with the same ids and generations"));

    let (report, ended) = bulk.join().map_err(|_| anyhow::anyhow!("the transfer's thread failed"))?;
    let (busy, steady) = (busy.stop(), steady.stop());
    let report = report.context("the bulk transfer")?;
    narrator.check(
        ended > back,
        format!(
            "the transfer by {} outlived it: {} each way in {}, every byte compared",
            report.server_name,
            mib(report.up),
            time(report.duration)
        ),
    );
    narrator.check(
        busy.is_whole(),
        format!(
            "the busy connections: {} messages sent, {} echoed, {} reset; longest wait {}",
            busy.sent,
            busy.echoed,
            busy.reset,
            time(busy.slowest)
        ),
    );
    let strange = steady.strangers + steady.damaged + steady.duplicates;
    narrator.check(
        steady.lost() == 0 && strange == 0 && steady.errors.is_empty(),
        format!("the datagrams: {} sent, {} answered, {} lost", steady.sent(), steady.answered(), steady.lost()),
    );
    Ok(())
}
