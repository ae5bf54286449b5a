//! What of the node's own settings matters to the proxy. Only reported: the settings are the operator's.

use std::path::Path;

/// How much a finding matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// As it should be.
    Good,
    /// Works, with a disadvantage.
    Warning,
    /// Does not work.
    Problem,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How much it matters.
    pub level: Level,
    /// What was looked at.
    pub subject: String,
    /// How it is, and what follows from it.
    pub state: String,
    /// What to do; empty when nothing is to be done.
    pub fix: String,
}

/// The text of a setting below `/proc/sys`, as in `net/ipv4/ip_forward`; `None` when the kernel has no such.
pub fn read_sysctl(name: &str) -> Option<String> {
    let text = std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?;
    Some(text.trim().to_owned())
}

/// Is there a BPF file system at a path?
pub fn is_bpffs(path: &Path) -> bool {
    nix::sys::statfs::statfs(path).is_ok_and(|found| found.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

/// Findings about forwarding, bridge filtering, reverse path filtering, ICMP redirects and the BPF file system.
/// `sysctl` is [`read_sysctl`], `bpffs` the answer of [`is_bpffs`].
pub fn findings(pod_bridges: &[&str], sysctl: impl Fn(&str) -> Option<String>, bpffs: bool) -> Vec<Finding> {
    let mut found = vec![forwarding("net/ipv4/ip_forward", "IPv4", &sysctl)];
    if sysctl("net/ipv6/conf/all/forwarding").is_some() {
        found.push(forwarding("net/ipv6/conf/all/forwarding", "IPv6", &sysctl));
    }
    found.push(bridge_netfilter(&sysctl));
    for bridge in pod_bridges {
        found.push(reverse_path(bridge, &sysctl));
        found.push(redirects(bridge, &sysctl));
    }
    found.push(if bpffs {
        finding(Level::Good, "/sys/fs/bpf", "a BPF file system is mounted", "")
    } else {
        finding(
            Level::Problem,
            "/sys/fs/bpf",
            "no BPF file system: what is pinned there would not outlive the agent",
            "mount -t bpf bpf /sys/fs/bpf, and mount the host's /sys/fs/bpf into the agent's container",
        )
    });
    found
}

fn finding(level: Level, subject: impl Into<String>, state: impl Into<String>, fix: impl Into<String>) -> Finding {
    Finding { level, subject: subject.into(), state: state.into(), fix: fix.into() }
}

fn forwarding(name: &str, family: &str, sysctl: &impl Fn(&str) -> Option<String>) -> Finding {
    let subject = format!("{family} forwarding");
    if sysctl(name).is_some_and(|value| value != "0") {
        finding(Level::Good, subject, "on", "")
    } else {
        let state = "off: pods reach nothing beyond their bridge";
        finding(Level::Problem, subject, state, format!("sysctl -w {}=1", name.replace('/', ".")))
    }
}

fn bridge_netfilter(sysctl: &impl Fn(&str) -> Option<String>) -> Finding {
    let state = match sysctl("net/bridge/bridge-nf-call-iptables").as_deref() {
        None => "br_netfilter is not loaded; it is not needed",
        Some("0") => "off; it is not needed",
        Some(_) => "on: bridged packets pass netfilter; it is not needed, and costs time",
    };
    finding(Level::Good, "bridge filtering", state, "")
}

/// The kernel uses the larger of the setting for all interfaces and the interface's own.
fn reverse_path(bridge: &str, sysctl: &impl Fn(&str) -> Option<String>) -> Finding {
    let value = |name: &str| sysctl(&format!("net/ipv4/conf/{name}/rp_filter")).and_then(|value| value.parse().ok());
    let state = match value("all").max(value(bridge)).unwrap_or(0_u8) {
        0 => "off",
        1 => "strict; translated packets pass it",
        _ => "loose",
    };
    finding(Level::Good, format!("reverse path filter of {bridge}"), state, "")
}

/// The kernel sends redirects when either setting is on.
fn redirects(bridge: &str, sysctl: &impl Fn(&str) -> Option<String>) -> Finding {
    let is_on = |name: &str| sysctl(&format!("net/ipv4/conf/{name}/send_redirects")).is_some_and(|value| value != "0");
    let subject = format!("ICMP redirects from {bridge}");
    if is_on("all") || is_on(bridge) {
        finding(
            Level::Warning,
            subject,
            "on: where packets between two pods take the IP stack, the node tells pods of shorter ways that are none",
            format!("sysctl -w net.ipv4.conf.all.send_redirects=0 net/ipv4/conf/{bridge}/send_redirects=0"),
        )
    } else {
        finding(Level::Good, subject, "off", "")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn levels(settings: &[(&str, &str)], bpffs: bool) -> Vec<(Level, String)> {
        let sysctl =
            |name: &str| settings.iter().find(|(known, _)| *known == name).map(|(_, value)| (*value).to_owned());
        findings(&["cni0"], sysctl, bpffs)
            .into_iter()
            .map(|f| (f.level, format!("{}: {}", f.subject, f.state)))
            .collect()
    }

    #[test]
    fn a_node_as_it_should_be() {
        let settings = [
            ("net/ipv4/ip_forward", "1"),
            ("net/ipv6/conf/all/forwarding", "1"),
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/cni0/rp_filter", "1"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/cni0/send_redirects", "0"),
        ];
        let expected = [
            "IPv4 forwarding: on",
            "IPv6 forwarding: on",
            "bridge filtering: br_netfilter is not loaded; it is not needed",
            "reverse path filter of cni0: strict; translated packets pass it",
            "ICMP redirects from cni0: off",
            "/sys/fs/bpf: a BPF file system is mounted",
        ];
        assert_eq!(levels(&settings, true), expected.map(|text| (Level::Good, text.to_owned())));
    }

    #[test]
    fn a_node_with_everything_wrong() {
        let settings = [
            ("net/ipv4/ip_forward", "0"),
            ("net/ipv6/conf/all/forwarding", "0"),
            ("net/bridge/bridge-nf-call-iptables", "1"),
            ("net/ipv4/conf/all/rp_filter", "2"),
            ("net/ipv4/conf/all/send_redirects", "1"),
            ("net/ipv4/conf/cni0/send_redirects", "0"),
        ];
        let found: Vec<_> = levels(&settings, false).into_iter().map(|(level, _)| level).collect();
        assert_eq!(found, [Level::Problem, Level::Problem, Level::Good, Level::Good, Level::Warning, Level::Problem]);
    }
}
