//! Netfilter rules of a node: the hostile ones that other software leaves behind, and counting what is there.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde::Deserialize;

use crate::address::{Family, cluster_cidr, pod_cidr};
use crate::error::{Context as _, Result};
use crate::netns::Netns;

/// Comment of the FORWARD rule that drops what conntrack calls invalid.
pub const INVALID_DROP: &str = "forward invalid drop";
/// Comment of the CNI's MASQUERADE rule for IPv4; the IPv6 one is [`MASQUERADE6`].
pub const MASQUERADE4: &str = "cni masquerade 4";
/// Comment of the CNI's MASQUERADE rule for IPv6.
pub const MASQUERADE6: &str = "cni masquerade 6";

/// One rule as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// `family table` of nftables, or the program that shows it (`iptables-legacy`).
    pub table: String,
    /// Chain.
    pub chain: String,
    /// Comment, or the rule's text where it has none.
    pub text: String,
    /// Packets that matched; `None` without a counter.
    pub packets: Option<u64>,
}

/// Rules that kube-proxy and CNI plugins leave on nodes: everything invalid is dropped on its way through, and what
/// pods send to anything but pods gets the node's address.
pub fn install_hostile(netns: &Netns, node: u8) -> Result<()> {
    let mut text = String::new();
    for (nft, family, masquerade) in [("ip", Family::V4, MASQUERADE4), ("ip6", Family::V6, MASQUERADE6)] {
        let (pods, all, multicast) = match family {
            Family::V4 => (pod_cidr(family, node), cluster_cidr(family), "224.0.0.0/4"),
            Family::V6 => (pod_cidr(family, node), cluster_cidr(family), "ff00::/8"),
        };
        let _ = write!(
            text,
            "table {nft} hostile {{
               chain forward {{
                 type filter hook forward priority filter; policy accept;
                 ct state invalid counter drop comment \"{INVALID_DROP}\"
               }}
               chain postrouting {{
                 type nat hook postrouting priority srcnat; policy accept;
                 {nft} saddr {pods} {nft} daddr != {{ {all}, {multicast} }} counter masquerade comment \"{masquerade}\"
               }}
             }}\n"
        );
    }
    netns.feed("nft", &["-f", "-"], &text).map(drop)
}

/// Every netfilter rule of the namespace: nftables (iptables-nft is that too) and legacy iptables.
pub fn rules(netns: &Netns) -> Result<Vec<Rule>> {
    let mut rules = nft_rules(&netns.output("nft", &["-j", "list", "ruleset"])?)?;
    for (names, save) in [("ip_tables_names", "iptables-legacy-save"), ("ip6_tables_names", "ip6tables-legacy-save")] {
        // Absent without legacy iptables in the kernel; the program itself would create the tables that it shows.
        let path = Path::new("/proc/thread-self/net").join(names);
        let tables = netns.run(|| fs::read_to_string(&path))?.unwrap_or_default();
        if !tables.trim().is_empty() {
            rules.extend(legacy_rules(save, &netns.output(save, &["-c"])?));
        }
    }
    Ok(rules)
}

#[derive(Deserialize)]
struct Listing {
    nftables: Vec<Item>,
}

#[derive(Deserialize)]
struct Item {
    rule: Option<NftRule>,
}

#[derive(Deserialize)]
struct NftRule {
    family: String,
    table: String,
    chain: String,
    comment: Option<String>,
    expr: Vec<serde_json::Value>,
}

fn nft_rules(json: &str) -> Result<Vec<Rule>> {
    let listing: Listing = serde_json::from_str(json).context(|| "output of `nft -j list ruleset`".to_owned())?;
    let rules = listing.nftables.into_iter().filter_map(|item| item.rule);
    Ok(rules
        .map(|rule| Rule {
            packets: rule.expr.iter().find_map(|part| part.get("counter")?.get("packets")?.as_u64()),
            text: rule.comment.unwrap_or_else(|| serde_json::Value::from(rule.expr).to_string()),
            table: format!("{} {}", rule.family, rule.table),
            chain: rule.chain,
        })
        .collect())
}

/// Reads `[packets:bytes] -A CHAIN …` lines.
fn legacy_rules(program: &str, text: &str) -> Vec<Rule> {
    let rule = |line: &str| {
        let (counters, rest) = line.strip_prefix('[')?.split_once("] -A ")?;
        let (chain, text) = rest.split_once(' ').unwrap_or((rest, ""));
        Some(Rule {
            table: program.trim_end_matches("-save").to_owned(),
            chain: chain.to_owned(),
            text: text.to_owned(),
            packets: counters.split(':').next()?.parse().ok(),
        })
    };
    text.lines().filter_map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_nft_json() {
        let json = r#"{"nftables":[{"metainfo":{"version":"1.0.6"}},{"table":{"family":"ip","name":"t","handle":1}},
            {"rule":{"family":"ip","table":"t","chain":"c","handle":3,"comment":"drop them",
                     "expr":[{"counter":{"packets":7,"bytes":420}},{"drop":null}]}},
            {"rule":{"family":"ip","table":"t","chain":"c","handle":4,"expr":[{"accept":null}]}}]}"#;
        let rule = |text: &str, packets| Rule { table: "ip t".into(), chain: "c".into(), text: text.into(), packets };
        assert_eq!(nft_rules(json).expect("valid"), [rule("drop them", Some(7)), rule(r#"[{"accept":null}]"#, None)]);
    }

    #[test]
    fn reads_legacy_listing() {
        let text =
            "*filter\n:FORWARD ACCEPT [1:2]\n[5:300] -A FORWARD -m conntrack --ctstate INVALID -j DROP\nCOMMIT\n";
        let rule = Rule {
            table: "iptables-legacy".into(),
            chain: "FORWARD".into(),
            text: "-m conntrack --ctstate INVALID -j DROP".into(),
            packets: Some(5),
        };
        assert_eq!(legacy_rules("iptables-legacy-save", text), [rule]);
    }
}
