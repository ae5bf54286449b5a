//! What the agent's command line says, as values. It reads the pinned maps, so it also works while the agent is down.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, SocketAddr};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::agent::Agent;
use crate::error::{Context as _, Result};

/// A row of `service list`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct ServiceRow {
    /// `namespace/name:port`.
    pub service: Option<String>,
    /// Frontend.
    pub address: SocketAddr,
    /// Protocol.
    pub protocol: String,
    /// Endpoints that new flows may get.
    pub selected: u64,
    /// Those endpoints.
    pub backends: Vec<SocketAddr>,
}

/// A row of `backend list`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct BackendRow {
    /// Id.
    pub id: u32,
    /// Service.
    pub service: Option<String>,
    /// Address.
    pub address: SocketAddr,
    /// Protocol.
    pub protocol: String,
    /// Generation.
    pub generation: u64,
    /// On this node?
    pub local: bool,
    /// Do new flows get it?
    pub selected: bool,
}

/// A row of `flow list`.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct FlowRow {
    /// Protocol.
    pub protocol: String,
    /// Who opened it.
    pub source: SocketAddr,
    /// Whom it asked.
    pub destination: SocketAddr,
    /// Who answers, where that is another.
    pub backend: Option<SocketAddr>,
    /// The source as the backend sees it, where that is another.
    pub seen_as: Option<SocketAddr>,
    /// Service.
    pub service: Option<String>,
    /// `redirect`, `switch` or `stack`.
    pub path: String,
    /// State.
    pub state: String,
    /// `live` or `brief`.
    pub table: String,
}

/// A row of `device list`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct DeviceRow {
    /// Interface.
    pub ifindex: u32,
    /// Its name in the namespace that was asked.
    pub name: Option<String>,
    /// Bound IPv4 address.
    pub ipv4: Option<IpAddr>,
    /// Bound IPv6 address.
    pub ipv6: Option<IpAddr>,
    /// `redirect`, `switch` or `stack`.
    pub path: String,
}

/// `status`.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Status {
    /// `running` or `down`.
    pub agent: String,
    /// Pinned links.
    pub links: u64,
    /// Use of the maps.
    pub maps: Vec<MapUse>,
    /// Non-zero counters.
    counters: Vec<CounterRow>,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MapUse {
    /// Name.
    pub map: String,
    /// Entries in use.
    pub used: u64,
    /// Entries that fit.
    pub capacity: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct CounterRow {
    hook: String,
    reason: String,
    drop: bool,
    packets: u64,
}

/// Packets by hook and reason; what is not there is 0.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    packets: BTreeMap<(String, String), Count>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    packets: u64,
    drop: bool,
}

/// Reasons that mean a rewritten packet or socket address, in whatever hook.
const REWRITES: [&str; 6] = ["service_new", "service", "reply", "port_remapped", "socket", "socket_reply"];

impl Status {
    /// The counters.
    pub fn counters(&self) -> Counters {
        let count = |row: &CounterRow| Count { packets: row.packets, drop: row.drop };
        let packets = self.counters.iter().map(|row| ((row.hook.clone(), row.reason.clone()), count(row))).collect();
        Counters { packets }
    }

    /// Entries in use of a map.
    pub fn used(&self, map: &str) -> u64 {
        self.maps.iter().find(|row| row.map == map).map_or(0, |row| row.used)
    }
}

impl Counters {
    /// Packets of one hook and reason.
    pub fn get(&self, hook: &str, reason: &str) -> u64 {
        self.packets.get(&(hook.to_owned(), reason.to_owned())).map_or(0, |count| count.packets)
    }

    /// Only rewrites and drops: other counters also see what the host itself sends (neighbour discovery, other
    /// sockets).
    #[must_use]
    pub fn rewrites(&self) -> Self {
        let wanted = |reason: &str, count: &Count| count.drop || REWRITES.contains(&reason);
        let packets = self.packets.iter().filter(|((_, reason), count)| wanted(reason, count));
        Self { packets: packets.map(|(key, count)| (key.clone(), *count)).collect() }
    }

    /// What was added since `before`.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let added = self.packets.iter().map(|(key, count)| {
            let before = before.packets.get(key).copied().unwrap_or_default();
            (key.clone(), Count { packets: count.packets - before.packets, drop: count.drop })
        });
        Self { packets: added.filter(|(_, count)| count.packets > 0).collect() }
    }

    /// Packets dropped, for whatever reason.
    pub fn drops(&self) -> u64 {
        self.packets.values().filter(|count| count.drop).map(|count| count.packets).sum()
    }

    /// Reasons for which packets were dropped or refused, in whatever hook.
    pub fn drop_reasons(&self) -> BTreeSet<String> {
        let drops = self.packets.iter().filter(|(_, count)| count.drop && count.packets > 0);
        drops.map(|((_, reason), _)| reason.clone()).collect()
    }

    /// `hook.reason` of all that is not zero, in order.
    pub fn names(&self) -> Vec<String> {
        self.packets.keys().map(|(hook, reason)| format!("{hook}.{reason}")).collect()
    }
}

impl fmt::Display for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all: Vec<_> =
            self.packets.iter().map(|((hook, reason), count)| format!("{hook}.{reason}={}", count.packets)).collect();
        f.write_str(&all.join(" "))
    }
}

#[derive(Deserialize)]
struct Listing<T> {
    items: Vec<T>,
}

/// `KIND list` of an agent's pins.
pub(crate) fn rows<T: DeserializeOwned>(agent: &Agent, kind: &str) -> Result<Vec<T>> {
    let listing: Listing<T> = parse(kind, &agent.cli(&[kind, "list", "-o", "json"])?)?;
    Ok(listing.items)
}

/// JSON of a command.
pub(crate) fn parse<T: DeserializeOwned>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).context(|| format!("`{what} -o json`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_subtract_and_keep_rewrites() {
        let status = |rows: &[(&str, &str, bool, u64)]| Status {
            agent: "running".to_owned(),
            links: 0,
            maps: Vec::new(),
            counters: rows
                .iter()
                .map(|&(hook, reason, drop, packets)| CounterRow {
                    hook: hook.to_owned(),
                    reason: reason.to_owned(),
                    drop,
                    packets,
                })
                .collect(),
        };
        let before = status(&[("from_pod", "service", false, 3), ("to_pod", "seen", false, 9)]).counters();
        let after = status(&[
            ("from_pod", "service", false, 5),
            ("to_pod", "seen", false, 19),
            ("from_pod", "no_backend", true, 2),
            ("to_pod", "reply", false, 1),
        ])
        .counters();
        let added = after.since(&before);
        assert_eq!(added.to_string(), "from_pod.no_backend=2 from_pod.service=2 to_pod.reply=1 to_pod.seen=10");
        assert_eq!((added.drops(), added.get("to_pod", "seen"), added.get("to_pod", "none")), (2, 10, 0));
        assert_eq!(added.rewrites().names(), ["from_pod.no_backend", "from_pod.service", "to_pod.reply"]);
    }
}
