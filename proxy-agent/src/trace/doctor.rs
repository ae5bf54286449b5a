//! `trace doctor`: what this kernel allows, and what tracing is without.

use std::path::Path;

use crate::dataplane::probes::{Probes, Probing};
use crate::node::check::{Finding, Level, read_sysctl};

use super::btf::Btf;
use super::kernel::Kernel;
use super::symbols::Symbols;
use super::{layout, maps};

/// Tracepoints that following needs.
const TRACEPOINTS: [&str; 5] = ["netif_receive_skb", "net_dev_queue", "net_dev_start_xmit", "kfree_skb", "consume_skb"];

/// All findings, with a trial load of every probe.
pub fn report(pin_root: &Path) -> Vec<Finding> {
    let mut found = Vec::new();
    let mut say = |level, subject: &str, state: String, fix: &str| {
        found.push(Finding { level, subject: subject.to_owned(), state, fix: fix.to_owned() });
    };
    let release = nix::sys::utsname::uname().map(|u| u.release().to_string_lossy().into_owned()).unwrap_or_default();
    say(Level::Good, "kernel", format!("Linux {release}"), "");
    let lockdown = std::fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
    if lockdown.contains("[confidentiality]") {
        let fix = "boot with lockdown=integrity: programs may not read the kernel's memory under confidentiality";
        say(Level::Problem, "lockdown", "confidentiality".to_owned(), fix);
    }
    let btf = match Btf::of_kernel() {
        Ok(btf) => btf,
        Err(error) => {
            say(Level::Problem, "types", error.to_string(), "a kernel with CONFIG_DEBUG_INFO_BTF");
            return found;
        }
    };
    for name in TRACEPOINTS {
        if !btf.has_tracepoint(name) {
            say(Level::Problem, name, "this kernel has no such tracepoint".to_owned(), "Linux 6.1 or later");
        }
    }
    let symbols = Symbols::of_kernel();
    let (hidden, asking) = (symbols.is_empty(), symbols.is_asking());
    let kernel = Kernel::new(&btf, symbols);
    if kernel.reasons() < 3 {
        let fix = "Linux 5.17 or later";
        say(Level::Warning, "drop reasons", "this kernel does not tell why it drops".to_owned(), fix);
    } else {
        let first = kernel.first_drop();
        say(
            Level::Good,
            "drop reasons",
            format!("{} have names; {first} is the first that means a drop", kernel.reasons()),
            "",
        );
    }
    if hidden {
        let state = "addresses of functions are hidden: places of drops are numbers".to_owned();
        say(Level::Warning, "symbols", state, "sysctl kernel.kptr_restrict=0 or 1, and CAP_SYSLOG");
    } else if asking {
        let state = "addresses of functions are hidden from this process; the kernel is asked for each name".to_owned();
        say(Level::Good, "symbols", state, "");
    }
    let offsets = match layout::offsets(&btf) {
        Ok((offsets, missing)) => {
            say(Level::Good, "types", format!("{} offsets resolved", offsets.len()), "");
            for field in missing {
                let state = format!("{field} is not here: what needs it is left out");
                say(Level::Warning, "types", state, "");
            }
            offsets
        }
        Err(error) => {
            say(Level::Problem, "types", error.to_string(), "");
            return found;
        }
    };
    for (what, name) in [(Probing::Packets, "probes"), (Probing::Drops, "probe of drops")] {
        match Probes::open(None, &offsets, 4096, what) {
            Ok(mut probes) => {
                say(Level::Good, name, "load and attach".to_owned(), "");
                if what == Probing::Packets {
                    match probes.hooks() {
                        Ok(rows) => {
                            let namespaces = rows.iter().filter(|(key, _)| key.hook == u32::MAX).count();
                            say(
                                Level::Good,
                                "netfilter hooks",
                                format!("can be listed, in {namespaces} network namespaces"),
                                "",
                            );
                        }
                        Err(error) => {
                            let state = format!("cannot be listed: {}", full(&error));
                            say(Level::Warning, "netfilter hooks", state, "`nft list hooks` may know more");
                        }
                    }
                }
            }
            Err(error @ crate::dataplane::probes::ProbeError::Busy) => say(Level::Warning, name, error.to_string(), ""),
            Err(error) => say(Level::Problem, name, full(&error), "CAP_BPF and CAP_PERFMON"),
        }
    }
    match maps(pin_root) {
        Ok(Some((pins, _))) => {
            let has = proxy_abi::trace::map::ALL.iter().all(|name| pins.maps().join(name).exists());
            if has {
                say(Level::Good, "decisions", "the dataplane here tells its decisions".to_owned(), "");
            } else {
                say(Level::Warning, "decisions", "this agent's programs cannot tell them".to_owned(), "a newer agent");
            }
        }
        Ok(None) => {
            let state =
                format!("nothing is pinned at {}: tracepoints alone, without decisions and names", pin_root.display());
            say(Level::Warning, "decisions", state, "start the agent, or give its --pin-root");
        }
        Err(error) => say(Level::Warning, "decisions", full(&error), ""),
    }
    for name in ["net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables"] {
        let state = match read_sysctl(name).as_deref().map(str::trim) {
            Some("1") => "1: frames on bridges go through the hooks of IP",
            Some("0") => "0",
            Some(_) | None => "not here",
        };
        say(Level::Good, name, state.to_owned(), "");
    }
    found
}

fn full(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(": ");
        text.push_str(error.to_string().lines().next().unwrap_or_default());
        source = error.source();
    }
    text
}
