//! `proxy-agent check`: what this kernel and node can do, tried out and not guessed.

use std::fs;
use std::path::{Path, PathBuf};

use proxy_core::diagnostic::Diagnostic;
use proxy_core::netpol::engine::Limits;
use proxy_core::netpol::lint::without_cluster;
use proxy_ebpf::conntrack::UdpIdle;

use crate::ask::LintInfo;
use crate::dataplane::attach::Way;
use crate::dataplane::{self, AttachMode, Bpf};
use crate::k8s::{Manifests, read_policies};
use crate::node::check::{Finding, Level, findings, is_bpffs, read_sysctl};

/// The mounted root of the cgroup v2 hierarchy. In a container the usual place shows the container's own cgroup, which
/// has a `cgroup.type`; the root has none (cgroups(7)).
pub fn find_cgroup2() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    cgroup2_mounts(&mounts).find(|path| !path.join("cgroup.type").exists())
}

fn cgroup2_mounts(mounts: &str) -> impl Iterator<Item = PathBuf> {
    mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let path = words.nth(1)?;
        (words.next() == Some("cgroup2")).then(|| PathBuf::from(path))
    })
}

/// All findings, with a trial load of every program under a pin directory of its own, which is removed again.
pub fn report(pin_root: &Path, cgroup: Option<&Path>) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut say = |level, subject: &str, state: String, fix: &str| {
        found.push(Finding { level, subject: subject.to_owned(), state, fix: fix.to_owned() });
    };
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    say(Level::Good, "kernel", format!("Linux {release}"), "");
    match capabilities() {
        Some(effective) => {
            for (bit, name) in [(12, "CAP_NET_ADMIN"), (38, "CAP_PERFMON"), (39, "CAP_BPF")] {
                // CAP_SYS_ADMIN (21) implies the last two.
                let has = effective >> bit & 1 == 1 || bit >= 38 && effective >> 21 & 1 == 1;
                if has {
                    say(Level::Good, name, "held".to_owned(), "");
                } else {
                    say(Level::Problem, name, "missing".to_owned(), "run as root, or add the capability");
                }
            }
        }
        None => say(Level::Warning, "capabilities", "cannot be read".to_owned(), "mount /proc"),
    }
    match cgroup {
        Some(path) => say(Level::Good, "cgroup v2", path.display().to_string(), ""),
        None => say(
            Level::Warning,
            "cgroup v2",
            "not mounted: processes of the node itself do not reach Services".to_owned(),
            "mount -t cgroup2 none /sys/fs/cgroup/unified, or give --cgroup PATH",
        ),
    }
    match Way::choose(AttachMode::Auto) {
        Ok(Way::Tcx) => say(Level::Good, "tcx", "programs are attached by tcx links".to_owned(), ""),
        Ok(Way::Clsact) => say(
            Level::Good,
            "clsact",
            "this kernel has no tcx (Linux 6.6): programs are attached as clsact filters".to_owned(),
            "",
        ),
        Err(error) => {
            say(Level::Problem, "tcx", full(&error), "run as root, or add CAP_BPF, CAP_PERFMON and CAP_NET_ADMIN");
        }
    }
    let trial = pin_root.with_file_name(format!("proxy-agent-check-{}", std::process::id()));
    let config = dataplane::Config {
        pin_root: trial.clone(),
        attach: AttachMode::Auto,
        cgroup: None,
        socket_lb: dataplane::SocketLb::Node,
        flow_live: 1024,
        flow_brief: 1024,
        pod_quota: 0,
        node_open: false,
        udp_idle: UdpIdle::DEFAULT,
        policy: Limits::default(),
    };
    match Bpf::open(&config) {
        Ok(bpf) => {
            let most = bpf.verified_instructions().into_iter().map(|(_, count)| count).max().unwrap_or(0);
            say(Level::Good, "programs", format!("all load; the longest took {most} verified instructions"), "");
        }
        Err(error) => {
            say(
                Level::Problem,
                "programs",
                full(&error),
                "Linux 6.1 or later with CONFIG_BPF_SYSCALL and CONFIG_NET_CLS_ACT",
            );
        }
    }
    // What was pinned for the trial; it attached nothing.
    if let Err(error) = dataplane::cleanup(&trial) {
        say(Level::Warning, "trial pins", full(&error), "remove them by hand");
    }
    let above = pin_root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let bridges = bridges();
    let names: Vec<&str> = bridges.iter().map(String::as_str).collect();
    found.extend(findings(&names, read_sysctl, is_bpffs(above)));
    found
}

/// What is the matter with the NetworkPolicies of a folder, as far as that can be told without a cluster.
pub fn policies(folder: &Path) -> Vec<Finding> {
    let Manifests { policies, problems } = read_policies(folder);
    let finding = |subject, state, fix| Finding { level: Level::Warning, subject, state, fix };
    let mut found: Vec<_> = problems
        .into_iter()
        .map(|Diagnostic { object, field, problem, fix, .. }| {
            finding(if field.is_empty() { object } else { format!("{object} {field}") }, problem, fix)
        })
        .collect();
    found.extend(without_cluster(&policies).into_iter().map(|found| {
        let LintInfo { policy, rule, problem, fix, .. } = LintInfo::from(found);
        let rule = rule.map(|rule| format!(" {rule}")).unwrap_or_default();
        finding(format!("NetworkPolicy {policy}{rule}"), problem, fix)
    }));
    if found.is_empty() {
        let state = format!("{}: nothing is the matter with them", policies.len());
        found.push(Finding { level: Level::Good, subject: "NetworkPolicies".to_owned(), state, fix: String::new() });
    }
    found
}

/// Can the agent work here?
pub fn is_fit(report: &[Finding]) -> bool {
    report.iter().all(|finding| finding.level != Level::Problem)
}

fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let line = error.to_string();
        // A verifier's log fills the screen; what matters is its first line and the one before its statistics.
        let mut lines = line.lines();
        text.push_str(": ");
        text.push_str(lines.next().unwrap_or_default());
        let statistics = ["verification time", "stack depth", "processed "];
        if let Some(last) = lines.rfind(|l| !l.trim().is_empty() && !statistics.iter().any(|s| l.starts_with(s))) {
            text.push_str(" … ");
            text.push_str(last.trim());
        }
        source = error.source();
    }
    text
}

fn capabilities() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(line.trim(), 16).ok()
}

/// Bridges of this network namespace, by their settings: what netlink would say needs no privilege here.
fn bridges() -> Vec<String> {
    let Ok(interfaces) = nix::net::if_::if_nameindex() else { return Vec::new() };
    interfaces
        .iter()
        .filter_map(|interface| interface.name().to_str().ok().map(str::to_owned))
        .filter(|name| Path::new("/sys/class/net").join(name).join("bridge").exists())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_among_the_mounts() {
        let mounts = "proc /proc proc rw 0 0\ncgroup2 /sys/fs/cgroup cgroup2 rw,nsdelegate 0 0\n\
                      cgroup /sys/fs/cgroup/cpu cgroup rw,cpu 0 0\nnone /host/cgroup/unified cgroup2 rw 0 0\n";
        let found: Vec<PathBuf> = cgroup2_mounts(mounts).collect();
        assert_eq!(found, [PathBuf::from("/sys/fs/cgroup"), PathBuf::from("/host/cgroup/unified")]);
    }
}
