//! What a large cluster costs the agent: cold start, one change, memory.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use proxy_abi::{FrontendKey, IpBytes, PortBe, Proto};
use proxy_agent::dataplane::pins::{Maps, Pins};
use proxy_tests::manifests::Endpoint;
use proxy_tests::{Agent, AgentOptions, Cluster, Deadline, Manifests, NodeSpec};
use serde_json::{Value, json};

use crate::contender::Scene;
use crate::objects::{self, FAMILY, Port};
use crate::stats::{Budget, Estimate, median, quantile};

/// When one change gives up.
const LIMIT: Duration = Duration::from_secs(5);
/// The agent's line when its maps are in line with the first full lists.
const IN_SYNC: &str = "in sync";

/// Measures with so many Services of two backends, one file each; cold starts and changes as often as told.
pub(crate) fn run(services: u16, starts: usize, changes: usize) -> Result<Value> {
    println!("\n== {services} Services × 2 backends in a folder, one file each: cold start, one change, memory");
    let cluster = Cluster::builder().node(NodeSpec::new("node1").pods(["client", "server"])).build()?;
    let (node, server) = (cluster.node("node1")?, cluster.pod("server")?);
    let folder = Manifests::open(&cluster.manifest_dir())?;
    folder.write(&node)?;
    let [service, slice] = objects::measured(&server, Scene::SameNode);
    folder.write(&service)?;
    folder.write(&slice)?;
    for number in 1..services {
        folder.write_all(&format!("filler-{number}.yaml"), &objects::filler(number))?;
    }

    let (mut whole, mut synced, mut written) = (Vec::new(), Vec::new(), Vec::new());
    let mut agent = None;
    for _ in 0..starts {
        // The one before removes what it pinned: every start is cold.
        drop(agent.take());
        let start = Instant::now();
        let started = Agent::start(node, AgentOptions::dir(folder.dir()))?;
        whole.push(start.elapsed().as_secs_f64());
        // It is healthy a moment before it says so. The log has one line for each start until now.
        let line = || sync_times(&started.log_text()).get(synced.len()).copied();
        let time = Deadline::secs(5).poll("the agent's log says `in sync`", || Ok(line()))?;
        synced.push(time.after.as_secs_f64());
        written.push(time.written.as_secs_f64());
        agent = Some(started);
    }
    let agent = agent.context("at least one start")?;
    let cold = Estimate::of(&written);
    let budget = Budget::AtMost(2.0);
    println!(
        "cold start: process start to healthy {:.3} s; of it reading the folder and writing the maps {:.3} s, and of\n\
         that what comes after the last object was read {:.3} s (medians of {starts}; worst {:.3} s); budget for the\n\
         last {budget} s: {}",
        median(&whole),
        median(&synced),
        median(&written),
        quantile(&written, 1.0),
        cold.against(budget),
    );

    let maps = Pins::new(&node.pin_root()).open()?;
    let pid = agent.pid().context("the agent runs")?;
    let loaded = memory(pid)?;
    let latencies = change_latencies(&folder, &maps, changes)?;
    let [p50, p99, worst] = [0.5, 0.99, 1.0].map(|share| quantile(&latencies, share));
    let verdict = if p99 <= 10.0 { "met" } else { "MISSED" };
    println!(
        "one change, file written to map content: p50 {p50:.2} ms, p99 {p99:.2} ms, worst {worst:.2} ms over {changes} \
         changes;\nbudget p99 ≤ 10 ms: {verdict}"
    );
    let after = memory(pid)?;
    println!(
        "agent RSS: {:.1} MiB after the load (peak {:.1}), {:.1} MiB after {changes} changes; budget, with pods and\n\
         policies too, ≤ 64 MiB",
        loaded.rss, loaded.peak, after.rss
    );
    let total: f64 = after.maps.values().sum();
    println!("maps, buckets included: {total:.1} MiB");
    for (name, mib) in &after.maps {
        println!("  {name:14} {mib:8.2} MiB");
    }
    Ok(json!({
        "services": services,
        "cold_start_seconds": { "process_to_healthy": whole, "in_sync": synced, "written": written, "budget": budget, "verdict": cold.against(budget) },
        "change_ms": { "p50": p50, "p99": p99, "worst": worst, "all": latencies, "budget_p99": 10.0, "verdict": verdict },
        "rss_mib": { "loaded": loaded.rss, "peak": loaded.peak, "after_changes": after.rss },
        "maps_mib": after.maps,
    }))
}

/// One start, as the log tells of it: `in sync after=812.5ms written=310ms`.
#[derive(Clone, Copy, Debug, PartialEq)]
struct SyncTime {
    /// From the programs being loaded to the maps being in line.
    after: Duration,
    /// The part of it after the last object had been read.
    written: Duration,
}

/// Every start in a log.
fn sync_times(log: &str) -> Vec<SyncTime> {
    let lines = log.lines().filter(|line| line.contains(IN_SYNC));
    let field = |line: &str, name: &str| duration(line.split(name).nth(1)?.split_whitespace().next()?);
    lines
        .filter_map(|line| Some(SyncTime { after: field(line, "after=")?, written: field(line, "written=")? }))
        .collect()
}

/// Reads what `Duration`'s `Debug` writes.
fn duration(text: &str) -> Option<Duration> {
    let units = [("ns", 1e-9), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0)];
    let (number, scale) = units.iter().find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, scale)))?;
    Duration::try_from_secs_f64(number.parse::<f64>().ok()? * scale).ok()
}

/// Moves the measured Service's endpoint back and forth; milliseconds from the write to the map.
fn change_latencies(folder: &Manifests, maps: &Maps, changes: usize) -> Result<Vec<f64>> {
    let key = FrontendKey {
        ip: objects::vip().into(),
        port: PortBe::new(Port::Short.service()),
        proto: Proto::TCP,
        scope: FrontendKey::SCOPE_CLUSTER,
    };
    let service = objects::service();
    let ends: [IpAddr; 2] = [objects::elsewhere(0), objects::elsewhere(1)];
    (0..changes)
        .map(|number| {
            let end = ends[number % 2];
            let mut slice = service.slice(FAMILY, &[]);
            slice.endpoints = vec![Endpoint::at(end)];
            let start = Instant::now();
            folder.write(&slice)?;
            // No pause: the other CPU is the agent's.
            while backend_of(maps, &key)? != Some(end.into()) {
                if start.elapsed() > LIMIT {
                    bail!("change {number} is not in the map after {LIMIT:?}");
                }
            }
            Ok(start.elapsed().as_secs_f64() * 1000.0)
        })
        .collect()
}

/// Address of the first backend that a frontend selects.
fn backend_of(maps: &Maps, key: &FrontendKey) -> Result<Option<IpBytes>> {
    let Some(frontend) = maps.frontend.get(key)?.filter(|frontend| frontend.count > 0) else { return Ok(None) };
    let Some(id) = maps.slot.get(&frontend.first)? else { return Ok(None) };
    Ok(maps.backend.get(&id)?.map(|backend| backend.ip))
}

/// Memory of a process and of the maps it has open, in MiB.
pub(crate) struct Memory {
    pub(crate) rss: f64,
    pub(crate) peak: f64,
    pub(crate) maps: BTreeMap<String, f64>,
}

pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        let kib = line.and_then(|rest| rest.split_whitespace().next()).and_then(|number| number.parse::<f64>().ok());
        kib.map(|kib| kib / 1024.0).with_context(|| format!("/proc/{pid}/status has no {name}"))
    };
    let names: BTreeMap<u32, String> = aya::maps::loaded_maps()
        .flatten()
        .filter_map(|info| Some((info.id(), info.name_as_str()?.to_owned())))
        .collect();
    let mut maps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))? {
        // A descriptor may be closed between the two steps.
        let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
        let number = |name: &str| {
            text.lines().find_map(|line| line.strip_prefix(name)).and_then(|rest| rest.trim().parse::<u32>().ok())
        };
        if let (Some(id), Some(bytes)) = (number("map_id:"), number("memlock:")) {
            let name = names.get(&id).cloned().unwrap_or_else(|| format!("#{id}"));
            maps.insert(name, f64::from(bytes) / f64::from(1 << 20));
        }
    }
    Ok(Memory { rss: field("VmRSS:")?, peak: field("VmHWM:")?, maps })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_of_all_starts_are_read_from_the_log() {
        let log = "INFO x: in sync after=9.5s written=2s operations=1\n\
                   INFO x: in sync after=812.5ms written=310ms operations=40002\nINFO y\n";
        let time =
            |after, written| SyncTime { after: Duration::from_micros(after), written: Duration::from_micros(written) };
        assert_eq!(sync_times(log), [time(9_500_000, 2_000_000), time(812_500, 310_000)]);
        assert_eq!(
            ["3.25s", "17µs", "5"].map(duration),
            [Some(Duration::from_millis(3_250)), Some(Duration::from_micros(17)), None]
        );
    }
}
