//! Netfilter's hooks: what is registered where, and which of it a packet passed.

use std::collections::{BTreeMap, BTreeSet};

use proxy_abi::trace::{TraceHookEntry, TraceHookKey};

use super::symbols::Symbols;

/// Family of a hook.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    Ip,
    /// IPv6.
    Ip6,
    /// ARP.
    Arp,
    /// Frames on a bridge.
    Bridge,
}

impl Family {
    /// All, by their number in [`TraceHookKey`].
    pub const ALL: [Self; 4] = [Self::Ip, Self::Ip6, Self::Arp, Self::Bridge];

    /// The word in outputs.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ip => "ip",
            Self::Ip6 => "ip6",
            Self::Arp => "arp",
            Self::Bridge => "bridge",
        }
    }

    /// Name of one of its hooks.
    pub fn hook(self, number: u32) -> &'static str {
        let names: &[&'static str] = match self {
            Self::Arp => &["IN", "OUT", "FORWARD"],
            _ => &["PRE", "IN", "FWD", "OUT", "POST"],
        };
        names.get(number as usize).copied().unwrap_or("?")
    }
}

/// Numbers of the hooks of all families but ARP.
pub mod number {
    /// Before the routing decision.
    pub const PRE: u32 = 0;
    /// To this host.
    pub const IN: u32 = 1;
    /// Through this host.
    pub const FWD: u32 = 2;
    /// From this host.
    pub const OUT: u32 = 3;
    /// After the routing decision.
    pub const POST: u32 = 4;
}

/// A registered function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HookEntry {
    /// Name of the function.
    pub function: String,
    /// The lower, the earlier.
    pub priority: i32,
    /// `table/chain` of nftables.
    pub chain: Option<String>,
}

/// Functions of br_netfilter, which pass on at once what they are not to look at.
const PASSING: [&str; 5] =
    ["br_nf_pre_routing", "br_nf_forward", "br_nf_forward_ip", "br_nf_post_routing", "ip_sabotage_in"];

impl HookEntry {
    /// Only there for br_netfilter, and without effect where that is off?
    pub fn is_passing(&self) -> bool {
        PASSING.contains(&self.function.as_str())
            || self.function == "br_nf_local_in"
            || self.function == "br_nf_forward_arp"
    }

    /// Function or chain.
    pub fn name(&self) -> String {
        self.chain.as_ref().map_or_else(|| self.function.clone(), |chain| format!("nft {chain}"))
    }
}

/// Entries by family and number of the hook.
pub type Hooks = BTreeMap<(Family, u32), Vec<HookEntry>>;

/// A network namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespace {
    /// A task in it.
    pub pid: u32,
    /// What is registered.
    pub hooks: Hooks,
}

/// All namespaces that a task lives in, by inode number.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inventory(pub BTreeMap<u32, Namespace>);

impl Inventory {
    /// From what the kernel's iterator found.
    pub fn new(rows: &[(TraceHookKey, TraceHookEntry)], symbols: &Symbols) -> Self {
        let text = |bytes: &[u8]| {
            let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
            String::from_utf8_lossy(bytes.get(..end).unwrap_or_default()).into_owned()
        };
        let mut all: BTreeMap<u32, Namespace> = BTreeMap::new();
        let mut rows: Vec<_> = rows.iter().collect();
        rows.sort_unstable();
        for (key, entry) in rows {
            let namespace = all.entry(key.netns).or_default();
            if key.hook == u32::MAX {
                namespace.pid = entry.pid;
                continue;
            }
            let Some(family) = Family::ALL.get(key.family as usize) else { continue };
            let (table, chain) = (text(&entry.table), text(&entry.chain));
            namespace.hooks.entry((*family, key.hook)).or_default().push(HookEntry {
                function: symbols.function(entry.function),
                priority: entry.priority.cast_signed(),
                chain: (!chain.is_empty()).then(|| format!("{table}/{chain}")),
            });
        }
        Self(all)
    }
}

/// Which hooks a packet passed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Passed {
    /// Family and number.
    pub hooks: BTreeSet<(Family, u32)>,
    /// Those of IP that br_netfilter called from a bridge.
    pub by_bridge: BTreeSet<u32>,
}

impl Passed {
    /// Entries that may have looked at the packet: not those that pass on at once.
    pub fn touched<'a>(&self, hooks: &'a Hooks, bridge_nf: bool) -> Vec<(Family, u32, &'a HookEntry)> {
        let passed = self.hooks.iter().filter_map(|hook| hooks.get(hook).map(|entries| (*hook, entries)));
        passed
            .flat_map(|((family, number), entries)| entries.iter().map(move |entry| (family, number, entry)))
            .filter(|(family, _, entry)| !entry.is_passing() || bridge_nf && *family == Family::Bridge)
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_become_an_inventory() {
        let symbols = Symbols::parse("ffff000000001000 t nft_do_chain_ipv4\nffff000000002000 t ip_sabotage_in\n");
        let entry = |function, priority: i32, chain: &str| {
            let mut entry = TraceHookEntry {
                function,
                priority: priority.cast_unsigned(),
                kind: 0,
                table: [0; 32],
                chain: [0; 32],
                pid: 0,
                reserved: 0,
            };
            entry.chain.iter_mut().zip(chain.bytes()).for_each(|(to, from)| *to = from);
            entry
                .table
                .iter_mut()
                .zip(b"filter")
                .take(if chain.is_empty() { 0 } else { 6 })
                .for_each(|(to, from)| *to = *from);
            entry
        };
        let key = |netns, family, hook, index| TraceHookKey { netns, family, hook, index };
        let rows = [
            (key(5, 0, 2, 1), entry(0xffff_0000_0000_1004, 0, "FORWARD")),
            (key(5, 0, 2, 0), entry(0xffff_0000_0000_2000, -5, "")),
            (key(6, 0, u32::MAX, 0), TraceHookEntry { pid: 42, ..entry(0, 0, "") }),
        ];
        let inventory = Inventory::new(&rows, &symbols);
        let sabotage = HookEntry { function: "ip_sabotage_in".to_owned(), priority: -5, chain: None };
        let nft = HookEntry {
            function: "nft_do_chain_ipv4".to_owned(),
            priority: 0,
            chain: Some("filter/FORWARD".to_owned()),
        };
        let hooks: Hooks = [((Family::Ip, 2), vec![sabotage, nft.clone()])].into();
        let expected =
            [(5, Namespace { pid: 0, hooks: hooks.clone() }), (6, Namespace { pid: 42, hooks: Hooks::new() })];
        assert_eq!(inventory, Inventory(expected.into()));
        let passed =
            Passed { hooks: [(Family::Ip, number::FWD), (Family::Ip, number::PRE)].into(), ..Passed::default() };
        assert_eq!(passed.touched(&hooks, false), [(Family::Ip, number::FWD, &nft)]);
    }
}
