//! What a node is made of as far as an agent could change it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::command;
use crate::error::{Context as _, Result};
use crate::netfilter::Rule;
use crate::node::Node;

/// Links, qdiscs, filters, programs, rules and settings of a node's network namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// `ip link`, a line each.
    pub links: Vec<String>,
    /// Addresses, routes and bridge ports, a line each.
    pub routes: Vec<String>,
    /// `tc qdisc`, a line each.
    pub qdiscs: Vec<String>,
    /// Filters of all clsact qdiscs, by device and direction.
    pub filters: BTreeMap<String, String>,
    /// Programs on interfaces.
    pub programs: Vec<String>,
    /// Netfilter rules without their counts.
    pub rules: Vec<Rule>,
    /// Sysctls below `net`.
    pub sysctls: BTreeMap<String, String>,
}

impl Footprint {
    /// As the node is now.
    pub fn of(node: &Node) -> Result<Self> {
        let lines = |text: String| text.lines().map(str::to_owned).collect::<Vec<_>>();
        let links = lines(node.run("ip", &["-o", "link", "show"])?);
        let mut filters = BTreeMap::new();
        for link in &links {
            let name = link.split(": ").nth(1).unwrap_or_default().split('@').next().unwrap_or_default();
            for direction in ["ingress", "egress"] {
                // Without a clsact qdisc there is nothing to show, which tc calls an error on some versions.
                let shown = node.run("tc", &["filter", "show", "dev", name, direction]).unwrap_or_default();
                if !shown.is_empty() {
                    filters.insert(format!("{name} {direction}"), shown);
                }
            }
        }
        let mut rules = node.netfilter_rules()?;
        for rule in &mut rules {
            rule.packets = None;
        }
        let routes = lines(node.run("ip", &["-o", "addr", "show"])?).into_iter();
        let routes = routes.chain(lines(node.run("ip", &["route", "show", "table", "all"])?));
        let routes = routes.chain(lines(node.run("bridge", &["-d", "link", "show"])?));
        Ok(Self {
            routes: routes.collect(),
            qdiscs: lines(node.run("tc", &["qdisc", "show"])?),
            filters,
            programs: programs(&node.run("bpftool", &["-j", "net", "show"])?)?,
            rules,
            sysctls: sysctls(&node.run("sysctl", &["--all", "--pattern", "^net\\."])?),
            links,
        })
    }

    /// Names of the parts that differ, each with what is new and what is gone.
    pub fn difference(&self, after: &Self) -> Vec<String> {
        let text = |part: &dyn std::fmt::Debug| format!("{part:#?}");
        let parts = [
            ("links", text(&self.links), text(&after.links)),
            ("routes", text(&self.routes), text(&after.routes)),
            ("qdiscs", text(&self.qdiscs), text(&after.qdiscs)),
            ("filters", text(&self.filters), text(&after.filters)),
            ("programs", text(&self.programs), text(&after.programs)),
            ("rules", text(&self.rules), text(&after.rules)),
            ("sysctls", text(&self.sysctls), text(&after.sysctls)),
        ];
        let differ = parts.iter().filter(|(_, before, after)| before != after);
        let only = |a: &str, b: &str| a.lines().filter(|line| !b.contains(line)).collect::<Vec<_>>().join("|");
        differ.map(|(name, a, b)| format!("{name}: gone [{}], new [{}]", only(a, b), only(b, a))).collect()
    }
}

fn programs(json: &str) -> Result<Vec<String>> {
    let all: Value = serde_json::from_str(json).context(|| "`bpftool net`".to_owned())?;
    let groups = all.as_array().into_iter().flatten().filter_map(Value::as_object).flatten();
    Ok(groups
        .flat_map(|(kind, list)| list.as_array().into_iter().flatten().map(move |program| format!("{kind} {program}")))
        .collect())
}

fn sysctls(text: &str) -> BTreeMap<String, String> {
    let pairs = text.lines().filter_map(|line| line.split_once(" = "));
    // Counts of what passes, and what is random by design.
    let settings = pairs.filter(|(key, _)| !key.ends_with("_count") && !key.ends_with("stable_secret"));
    settings.map(|(key, value)| (key.to_owned(), value.to_owned())).collect()
}

/// Inode of every pin below a directory, by path: a map or link that was made anew has another.
pub fn pins(dir: &Path) -> Result<BTreeMap<String, u64>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).context(|| format!("list {}", folder.display()))? {
            let path = entry.context(|| format!("list {}", folder.display()))?.path();
            let metadata = fs::symlink_metadata(&path).context(|| format!("stat {}", path.display()))?;
            if metadata.is_dir() {
                folders.push(path.clone());
            }
            found.insert(path.display().to_string(), metadata.ino());
        }
    }
    Ok(found)
}

/// Ids of the BPF links that are pinned below a directory, by path.
pub fn link_ids(dir: &Path) -> Result<BTreeMap<String, u64>> {
    let mut ids = BTreeMap::new();
    for pin in pins(dir)?.into_keys().filter(|pin| pin.contains("/links/") && !pin.contains("/clsact_")) {
        let shown = command::output(Command::new("bpftool").args(["-j", "link", "show", "pinned", &pin]))?;
        let shown: Value = serde_json::from_str(&shown).context(|| format!("`bpftool link show pinned {pin}`"))?;
        ids.extend(shown["id"].as_u64().map(|id| (pin, id)));
    }
    Ok(ids)
}

/// Is there a BPF link of this id?
pub fn link_exists(id: u64) -> bool {
    command::output(Command::new("bpftool").args(["-j", "link", "show", "id", &id.to_string()])).is_ok()
}
