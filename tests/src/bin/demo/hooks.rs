//! Which hook did what: the counters of the nodes' pinned maps, and what they grew by.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Context as _, Result};
use proxy_abi::{Hook, Reason};
use proxy_agent::dataplane::pins::{Maps, Pins};
use proxy_tests::{Deadline, Node};

/// Looks in a row that must show the same, 2 ms apart, until nothing is on its way.
const LOOKS: u32 = 5;

/// The open maps of some nodes.
#[derive(Debug)]
pub(crate) struct Hooks {
    nodes: Vec<(String, Maps)>,
}

/// Packets by node, hook and reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Counters(BTreeMap<(String, Hook, Reason), u64>);

/// Counted there at least once, or never.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Expected<'a> {
    /// Name of the node.
    pub(crate) node: &'a str,
    /// Where.
    pub(crate) hook: Hook,
    /// What.
    pub(crate) reason: Reason,
    /// At least once, or never.
    pub(crate) happens: bool,
}

impl Hooks {
    /// Opens the maps that the nodes' agents have pinned.
    pub(crate) fn open(nodes: &[Node]) -> Result<Self> {
        let open = |node: &Node| {
            let maps = Pins::new(&node.pin_root()).open();
            Ok((node.name().to_owned(), maps.with_context(|| format!("pinned maps of {}", node.name()))?))
        };
        Ok(Self { nodes: nodes.iter().map(open).collect::<Result<_>>()? })
    }

    /// The maps of one node.
    pub(crate) fn maps(&self, node: &str) -> Result<&Maps> {
        let found = self.nodes.iter().find(|(name, _)| name == node);
        found.map(|(_, maps)| maps).with_context(|| format!("no maps of {node}"))
    }

    /// All counters as they are now.
    pub(crate) fn read(&self) -> Result<Counters> {
        let mut counters = BTreeMap::new();
        for (node, maps) in &self.nodes {
            for (&hook, &reason) in Hook::ALL.iter().flat_map(|hook| Reason::ALL.iter().map(move |r| (hook, r))) {
                let per_cpu = maps.counter.get_per_cpu(&reason.index(hook))?;
                let packets = per_cpu.iter().map(|counter| counter.packets).sum();
                if packets > 0 {
                    counters.insert((node.clone(), hook, reason), packets);
                }
            }
        }
        Ok(Counters(counters))
    }

    /// All counters once nothing is on its way any more: the last segments of a connection may come after its report.
    pub(crate) fn settled(&self) -> Result<Counters> {
        let mut last = self.read()?;
        let mut same = 0;
        Deadline::secs(5).until("packets of earlier connections have passed", || {
            let Ok(now) = self.read() else { return false };
            same = if now.told().eq(last.told()) { same + 1 } else { 0 };
            last = now;
            same == LOOKS
        })?;
        Ok(last)
    }
}

impl Counters {
    /// Those of packets that a Service could be part of, on these nodes: other namespaces of this machine have sockets
    /// too.
    fn told(&self) -> impl Iterator<Item = (&(String, Hook, Reason), &u64)> {
        let aside = [Reason::NotIp, Reason::OtherProtocol, Reason::NotThisNode];
        self.0.iter().filter(move |((_, _, reason), _)| !aside.contains(reason))
    }

    /// What was counted since an earlier look.
    pub(crate) fn since(&self, earlier: &Self) -> Self {
        let grown = self.0.iter().filter_map(|(key, packets)| {
            let more = packets - earlier.0.get(key).copied().unwrap_or_default();
            (more > 0).then(|| (key.clone(), more))
        });
        Self(grown.collect())
    }

    /// Packets of one hook and reason.
    pub(crate) fn packets(&self, node: &str, hook: Hook, reason: Reason) -> u64 {
        self.0.get(&(node.to_owned(), hook, reason)).copied().unwrap_or_default()
    }

    /// Packets that were dropped, anywhere.
    pub(crate) fn drops(&self) -> u64 {
        self.0.iter().filter(|((_, _, reason), _)| reason.is_drop()).map(|(_, packets)| packets).sum()
    }

    /// Is it as expected?
    pub(crate) fn agree(&self, expected: &[Expected<'_>]) -> bool {
        expected.iter().all(|e| (self.packets(e.node, e.hook, e.reason) > 0) == e.happens)
    }
}

impl fmt::Display for Counters {
    /// `node1 from_pod: service_new 1, service 5, reply 4; …`, without packets that no Service is part of.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut last = None;
        for ((node, hook, reason), packets) in self.told() {
            match last {
                Some(place) if place == (node, hook) => write!(f, ", ")?,
                Some((before, _)) if before == node => write!(f, "; {hook}: ")?,
                Some(_) => write!(f, "\n{node} {hook}: ")?,
                None => write!(f, "{node} {hook}: ")?,
            }
            write!(f, "{reason} {packets}")?;
            last = Some((node, hook));
        }
        if last.is_none() { f.write_str("no hook saw it") } else { Ok(()) }
    }
}
