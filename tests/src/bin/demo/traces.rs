//! What an agent leaves on a node and in the kernel: looked at before the first one starts, and again after the last.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use proxy_agent::dataplane::has_foreign_tcx;
use proxy_tests::{Deadline, Node};
use serde_json::Value;

/// What can be seen of a node from outside of BPF.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Surface {
    /// Interfaces.
    links: BTreeSet<String>,
    /// Routing rules and routes of every table.
    routes: BTreeSet<String>,
    /// Netfilter rules.
    netfilter: usize,
    /// Network sysctls that are settings.
    sysctls: BTreeMap<String, String>,
}

/// Ids of what an agent has loaded.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Loaded {
    pub(crate) programs: BTreeSet<u32>,
    pub(crate) maps: BTreeSet<u32>,
}

impl Surface {
    /// Of a node now.
    pub(crate) fn of(node: &Node) -> Result<Self> {
        let names = |json: &str| -> Result<BTreeSet<String>> {
            let links: Vec<Value> = serde_json::from_str(json)?;
            Ok(links.iter().filter_map(|link| link["ifname"].as_str()).map(str::to_owned).collect())
        };
        let mut routes = BTreeSet::new();
        for args in [["-4", "rule"], ["-6", "rule"]] {
            routes.extend(node.run("ip", &args)?.lines().map(str::to_owned));
        }
        for family in ["-4", "-6"] {
            // Neighbours come and go; the addresses of routes do not.
            let shown = node.run("ip", &[family, "route", "show", "table", "all"])?;
            routes.extend(shown.lines().map(|line| line.trim_end().to_owned()));
        }
        Ok(Self {
            links: names(&node.run("ip", &["-j", "link"])?)?,
            routes,
            netfilter: node.netfilter_rules()?.len(),
            sysctls: node.netns().run(|| {
                let mut settings = BTreeMap::new();
                read_settings(Path::new("/proc/sys/net"), &mut settings);
                settings
            })?,
        })
    }

    /// What is in one of them only, or differs. Interfaces (and what belongs to them) of pods that started or ended
    /// meanwhile do not count: `pods` are their names.
    pub(crate) fn differences(&self, later: &Self, pods: &BTreeSet<String>) -> Vec<String> {
        let of_pod = |text: &str| pods.iter().any(|pod| text.contains(pod.as_str()));
        let mut found: Vec<String> = Vec::new();
        for (name, before, after) in [("interface", &self.links, &later.links), ("route", &self.routes, &later.routes)]
        {
            let changed = before.symmetric_difference(after).filter(|text| !of_pod(text));
            found.extend(changed.map(|text| format!("{name} {text}")));
        }
        if self.netfilter != later.netfilter {
            found.push(format!("{} netfilter rules, {} before", later.netfilter, self.netfilter));
        }
        let keys: BTreeSet<&String> = self.sysctls.keys().chain(later.sysctls.keys()).collect();
        for key in keys.into_iter().filter(|key| !of_pod(key)) {
            let (before, after) = (self.sysctls.get(key), later.sysctls.get(key));
            if before != after {
                found.push(format!("sysctl {key}: {before:?} became {after:?}"));
            }
        }
        found
    }

    /// Settings that were compared.
    pub(crate) fn settings(&self) -> usize {
        self.sysctls.len()
    }
}

/// Every readable file below, but for counts that change by themselves.
fn read_settings(dir: &Path, settings: &mut BTreeMap<String, String>) {
    let Ok(entries) = fs::read_dir(dir) else { return };
    for path in entries.flatten().map(|entry| entry.path()) {
        if path.is_dir() {
            read_settings(&path, settings);
        } else if !path.ends_with("nf_conntrack_count")
            && let Ok(value) = fs::read_to_string(&path)
        {
            settings.insert(path.display().to_string(), value.trim().to_owned());
        }
    }
}

impl Loaded {
    /// By a running process, from its open descriptors; its pinned links hold the same programs.
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let dir = format!("/proc/{pid}/fdinfo");
        let mut loaded = Self::default();
        for entry in fs::read_dir(&dir).with_context(|| dir.clone())? {
            // A descriptor may be closed between the two steps.
            let Ok(text) = fs::read_to_string(entry?.path()) else { continue };
            for line in text.lines() {
                let id = |field: &str| line.strip_prefix(field).and_then(|rest| rest.trim().parse::<u32>().ok());
                loaded.programs.extend(id("prog_id:"));
                loaded.maps.extend(id("map_id:"));
            }
        }
        Ok(loaded)
    }

    /// Joins two.
    pub(crate) fn extend(&mut self, other: Self) {
        self.programs.extend(other.programs);
        self.maps.extend(other.maps);
    }

    /// Waits until the kernel has none of them any more. It frees them after the last packet that may use them.
    pub(crate) fn until_gone(&self) -> Result<()> {
        let gone = || {
            let programs = aya::programs::loaded_programs().flatten().map(|info| info.id());
            let maps = aya::maps::loaded_maps().flatten().map(|info| info.id());
            !programs.into_iter().any(|id| self.programs.contains(&id))
                && !maps.into_iter().any(|id| self.maps.contains(&id))
        };
        Ok(Deadline::secs(10).until("the kernel has freed all programs and maps", gone)?)
    }
}

/// Interfaces of a node that have a tcx program, whosever.
pub(crate) fn programmed(node: &Node) -> Result<Vec<u32>> {
    let text = node.run("ip", &["-j", "link"])?;
    let links: Vec<Value> = serde_json::from_str(&text)?;
    let indices: Vec<u32> =
        links.iter().filter_map(|link| link["ifindex"].as_u64().and_then(|index| u32::try_from(index).ok())).collect();
    let none = BTreeSet::new();
    Ok(node.netns().run(|| indices.into_iter().filter(|&index| has_foreign_tcx(index, &none)).collect())?)
}
