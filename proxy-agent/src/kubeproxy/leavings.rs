//! Which rules on a node are kube-proxy's, from what the tools print: no I/O.
//!
//! kubelet and others have chains named `KUBE-` too: `KUBE-FIREWALL`, `KUBE-MARK-*`, `KUBE-KUBELET-CANARY` and
//! `KUBE-IPTABLES-HINT` stay (KEP-3178). A chain of kube-proxy that is left is emptied and removed; before that, every
//! rule elsewhere that jumps there goes, because a chain that is jumped to cannot be removed. Nothing else is touched.

use std::collections::BTreeSet;

/// Names that kube-proxy gives its chains, in the tables `nat`, `filter` and `mangle`.
const CHAINS: [&str; 14] = [
    "KUBE-SERVICES",
    "KUBE-EXTERNAL-SERVICES",
    "KUBE-NODEPORTS",
    "KUBE-NODE-PORT",
    "KUBE-POSTROUTING",
    "KUBE-FORWARD",
    "KUBE-PROXY-FIREWALL",
    "KUBE-PROXY-CANARY",
    "KUBE-LOAD-BALANCER",
    "KUBE-SOURCE-RANGES-FIREWALL",
    "KUBE-IPVS-FILTER",
    "KUBE-IPVS-OUT-FILTER",
    "KUBE-HEALTHCHECK-NODEPORT",
    "KUBE-NODEPORT",
];

/// How the names of its chains for one Service or endpoint begin.
const PREFIXES: [&str; 6] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-EXT-", "KUBE-FW-", "KUBE-XLB-", "KUBE-SEP-"];

/// Is a chain kube-proxy's?
fn is_chain(table: &str, chain: &str) -> bool {
    let prefixed = PREFIXES.iter().any(|prefix| chain.starts_with(prefix));
    // In `filter` this one is kubelet's; in `nat` it is that of IPVS mode.
    CHAINS.contains(&chain) || prefixed || (table == "nat" && chain == "KUBE-FIREWALL")
}

/// What to remove with one variant of iptables.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    /// Input of `iptables-restore --noflush`; empty when there is nothing.
    pub restore: String,
    /// The same for people: `table nat: rule …`, `table nat: chain …`.
    pub removed: Vec<String>,
}

/// From the output of `iptables-save`.
pub fn rules(save: &str) -> Rules {
    let mut found = Rules::default();
    let mut table = None::<Table<'_>>;
    for line in save.lines() {
        if let Some(name) = line.strip_prefix('*') {
            table = Some(Table { name, chains: BTreeSet::new(), rules: Vec::new() });
        } else if line == "COMMIT" {
            if let Some(table) = table.take() {
                table.write(&mut found);
            }
        } else if let Some(table) = &mut table {
            if let Some(chain) = line.strip_prefix(':') {
                let chain = chain.split_ascii_whitespace().next().unwrap_or_default();
                if is_chain(table.name, chain) {
                    table.chains.insert(chain);
                }
            } else {
                // Counters, when the node's tool prints them.
                let rule = line.strip_prefix('[').and_then(|rest| rest.split_once("] ")).map_or(line, |(_, rule)| rule);
                if let Some(rule) = rule.strip_prefix("-A ") {
                    table.rules.push(rule);
                }
            }
        }
    }
    found
}

struct Table<'a> {
    name: &'a str,
    /// kube-proxy's.
    chains: BTreeSet<&'a str>,
    /// All, as `CHAIN MATCHES -j TARGET`.
    rules: Vec<&'a str>,
}

impl Table<'_> {
    fn write(&self, found: &mut Rules) {
        if self.chains.is_empty() {
            return;
        }
        let name = self.name;
        let mut lines = vec![format!("*{name}")];
        // A chain that is named anew is emptied.
        lines.extend(self.chains.iter().map(|chain| format!(":{chain} - [0:0]")));
        for rule in &self.rules {
            let chain = rule.split_ascii_whitespace().next().unwrap_or_default();
            if !self.chains.contains(chain) && target(rule).is_some_and(|target| self.chains.contains(target)) {
                lines.push(format!("-D {rule}"));
                found.removed.push(format!("table {name}: rule {rule}"));
            }
        }
        for chain in &self.chains {
            lines.push(format!("-X {chain}"));
            found.removed.push(format!("table {name}: chain {chain}"));
        }
        lines.push("COMMIT\n".to_owned());
        found.restore.push_str(&lines.join("\n"));
    }
}

/// Where a rule jumps or goes to. Words inside quotes, as in comments, do not count.
fn target(rule: &str) -> Option<&str> {
    let mut quoted = false;
    let mut jump = false;
    for word in rule.split_ascii_whitespace() {
        if jump {
            return Some(word);
        }
        let quotes = word.matches('"').count() - word.matches("\\\"").count();
        if !quoted && quotes == 0 {
            jump = matches!(word, "-j" | "-g" | "--jump" | "--goto");
        }
        quoted ^= quotes % 2 == 1;
    }
    None
}

/// kube-proxy's tables of nftables, from `nft list tables`: `ip kube-proxy`, `ip6 kube-proxy`.
pub fn nft_tables(list: &str) -> Vec<&'static str> {
    let ours = ["ip kube-proxy", "ip6 kube-proxy"];
    ours.into_iter().filter(|table| list.lines().any(|line| line.trim() == format!("table {table}"))).collect()
}

/// kube-proxy's sets, from `ipset list -n`.
pub fn ipsets(list: &str) -> Vec<String> {
    list.lines().map(str::trim).filter(|name| name.starts_with("KUBE-")).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn jumps_are_found_and_comments_are_not() {
        let rows = [
            ("PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES", Some("KUBE-SERVICES")),
            ("INPUT -m comment --comment \"not -j KUBE-SERVICES\" -j ACCEPT", Some("ACCEPT")),
            ("INPUT -m comment --comment \"a \\\" -j X\" -j LOG --log-prefix \"-j Y\"", Some("LOG")),
            ("FORWARD -g KUBE-FORWARD", Some("KUBE-FORWARD")),
            ("INPUT -p tcp", None),
        ];
        for (rule, want) in rows {
            assert_eq!(target(rule), want, "{rule}");
        }
    }

    #[test]
    fn what_is_kube_proxys_goes_and_what_is_not_stays() {
        let save = "\
# Generated by iptables-save
*mangle
:PREROUTING ACCEPT [5:300]
:KUBE-IPTABLES-HINT - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
:KUBE-PROXY-CANARY - [0:0]
COMMIT
*nat
:PREROUTING ACCEPT [0:0]
:DOCKER - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-SEP-AAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBB - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
[7:9] -A DOCKER -d 10.9.9.9/32 -j KUBE-SVC-BBB
-A KUBE-SERVICES -d 10.96.0.1/32 -j KUBE-SVC-BBB
-A KUBE-SVC-BBB -j KUBE-SEP-AAA
-A KUBE-SEP-AAA -p tcp -j DNAT --to-destination 10.0.0.1:80
COMMIT
*filter
:INPUT ACCEPT [0:0]
:KUBE-FIREWALL - [0:0]
-A INPUT -j KUBE-FIREWALL
COMMIT
";
        let found = rules(save);
        let restore = "\
*mangle
:KUBE-PROXY-CANARY - [0:0]
-X KUBE-PROXY-CANARY
COMMIT
*nat
:KUBE-SEP-AAA - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-BBB - [0:0]
-D PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-D DOCKER -d 10.9.9.9/32 -j KUBE-SVC-BBB
-X KUBE-SEP-AAA
-X KUBE-SERVICES
-X KUBE-SVC-BBB
COMMIT
";
        assert_eq!(found.restore, restore);
        assert_eq!(
            found.removed,
            [
                "table mangle: chain KUBE-PROXY-CANARY",
                "table nat: rule PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES",
                "table nat: rule DOCKER -d 10.9.9.9/32 -j KUBE-SVC-BBB",
                "table nat: chain KUBE-SEP-AAA",
                "table nat: chain KUBE-SERVICES",
                "table nat: chain KUBE-SVC-BBB",
            ]
        );
        assert_eq!(rules("*nat\n:PREROUTING ACCEPT [0:0]\nCOMMIT\n"), Rules::default());
        assert_eq!(nft_tables("table inet filter\ntable ip kube-proxy\ntable ip6 kube-proxy-x\n"), ["ip kube-proxy"]);
        assert_eq!(ipsets("mine\nKUBE-CLUSTER-IP\n"), ["KUBE-CLUSTER-IP"]);
    }
}
