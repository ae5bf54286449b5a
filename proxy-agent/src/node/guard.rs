//! Keeps veths silent that have no programs: a pod that starts while the agent is away, or before the agent has seen it.
//!
//! ```text
//!   table bridge proxy_agent_guard          stays in the kernel when the agent goes
//!     set programmed                        host ends of pods that have programs: kept by the agent
//!     prerouting   from a pod bridge, from veth*, not in the set ─▶ drop
//!     postrouting  to a pod bridge, to veth*, not in the set ─▶ drop
//! ```
//!
//! Only where NetworkPolicies are in force, and only when asked for. It is the one thing here that uses netfilter, and the
//! bridge's own hooks: `br_netfilter` has nothing to do with it. It touches pod bridges alone: a kernel that cannot name
//! the bridge of a frame (`nft_meta_bridge`) gets the guard only as long as no other bridge of the node has veths.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use proxy_core::diagnostic::{Diagnostic, Severity};

use super::NodeDevices;
use super::classify::Role;

/// Name of the table, in the family of bridges.
pub const TABLE: &str = "proxy_agent_guard";
/// What the host ends of pods are called by every CNI of bridges.
const VETH: &str = "veth";

/// What the guard is to know.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Pod bridges.
    bridges: BTreeSet<Arc<str>>,
    /// Host ends that have programs.
    programmed: BTreeSet<Arc<str>>,
    /// A veth of another bridge, when there is one.
    foreign: Option<Arc<str>>,
}

/// What the kernel has of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
enum Kept {
    /// Nobody knows: at the start, when an agent before may have left one, and after a failure.
    #[default]
    Unknown,
    /// No table.
    Nothing,
    /// The table, as it was wanted.
    Table(Wanted),
}

/// The guard of this network namespace.
#[derive(Debug, Default)]
pub struct Guard {
    /// [`Kept::Table`] also where it has to give way.
    kept: Kept,
    /// What it could not be made, and when that is tried again.
    failed: Option<(Kept, Instant)>,
    /// When to look whether the table is still there: who flushes the rules of a node flushes this, too.
    look_at: Option<Instant>,
    /// Can the kernel name the bridge of a frame? Not known before it was tried.
    names_bridges: Option<bool>,
}

/// How long after a failure it is tried again, though nothing else is wanted.
const PAUSE: Duration = Duration::from_secs(2);
/// How often it is looked for.
const LOOK: Duration = Duration::from_secs(10);

/// Why there is no guard.
#[derive(Debug, thiserror::Error)]
pub enum GuardError {
    /// No such program.
    #[error("nft cannot be run: {0}")]
    NoNft(#[from] std::io::Error),
    /// It, or the kernel, refuses.
    #[error("nft refuses: {0}")]
    Refused(String),
    /// The guard would silence what is none of ours.
    #[error(
        "this kernel cannot tell frames of pod bridges from others (nft_meta_bridge), and {0} is on another bridge"
    )]
    Foreign(Arc<str>),
}

impl Wanted {
    /// For these interfaces of the node, of which these have programs.
    pub fn of(devices: &NodeDevices, programmed: BTreeSet<Arc<str>>) -> Self {
        let named = |role| {
            let all = devices.devices.iter().filter(move |device| device.role == role);
            all.map(|device| Arc::clone(&device.name))
        };
        let foreign = named(Role::Port).find(|name| name.starts_with(VETH));
        Self { bridges: named(Role::PodBridge).collect(), programmed, foreign }
    }

    /// The whole table anew, in one transaction.
    fn script(&self, names_bridges: bool) -> String {
        let list =
            |names: &BTreeSet<Arc<str>>| names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        let elements = if self.programmed.is_empty() {
            String::new()
        } else {
            format!(" elements = {{ {} }};", list(&self.programmed))
        };
        let mut script = format!(
            "add table bridge {TABLE}\ndelete table bridge {TABLE}\ntable bridge {TABLE} {{\n  set programmed {{ type \
             ifname;{elements} }}\n"
        );
        for (chain, hook, priority, bridge, device) in [
            ("from_pods", "prerouting", "-300", "ibrname", "iifname"),
            ("to_pods", "postrouting", "300", "obrname", "oifname"),
        ] {
            let on =
                if names_bridges { format!("meta {bridge} {{ {} }} ", list(&self.bridges)) } else { String::new() };
            // Writing to a String does not fail.
            let _ = writeln!(
                script,
                "  chain {chain} {{ type filter hook {hook} priority {priority}; policy accept; {on}{device} \"{VETH}*\" \
                 {device} != @programmed counter drop; }}"
            );
        }
        script + "}\n"
    }
}

impl Guard {
    /// Makes it what is wanted; `None` = there is to be none. Gives nothing when it is that already, or when that has failed
    /// just now.
    pub fn keep(&mut self, wanted: Option<Wanted>, now: Instant) -> Option<Result<(), GuardError>> {
        let wanted = match wanted {
            // Which bridges are the pods' is known a moment after the start: until then what an agent before left stays.
            Some(wanted) if wanted.bridges.is_empty() && self.kept == Kept::Unknown => {
                self.failed = None;
                return None;
            }
            Some(wanted) if !wanted.bridges.is_empty() => Kept::Table(wanted),
            _ => Kept::Nothing,
        };
        let has_failed = |(failed, again): &(Kept, Instant)| *failed == wanted && now < *again;
        if self.failed.as_ref().is_some_and(has_failed) {
            return None;
        }
        if self.kept == wanted {
            self.look_at.filter(|at| now >= *at)?;
            self.look_at = Some(now + LOOK);
            // Without an answer nothing is known.
            if is_there().unwrap_or(true) {
                return None;
            }
            tracing::warn!("nftables table bridge {TABLE} was removed by somebody: it is made anew");
        }
        let made = if let Kept::Table(wanted) = &wanted { self.make(wanted) } else { remove() };
        // A guard that must give way does so until something else is wanted.
        let is_certain = matches!(made, Ok(()) | Err(GuardError::Foreign(_)));
        self.look_at = (made.is_ok() && wanted != Kept::Nothing).then(|| now + LOOK);
        (self.kept, self.failed) =
            if is_certain { (wanted, None) } else { (Kept::Unknown, Some((wanted, now + PAUSE))) };
        Some(made)
    }

    /// When to call [`Self::keep`] again though nothing has changed.
    pub fn next(&self) -> Option<Instant> {
        self.failed.as_ref().map(|(_, again)| *again).or(self.look_at)
    }

    fn make(&mut self, wanted: &Wanted) -> Result<(), GuardError> {
        if self.names_bridges != Some(false) {
            match nft(&[], &wanted.script(true)) {
                Ok(()) => {
                    self.names_bridges = Some(true);
                    return Ok(());
                }
                // A kernel that takes it without the names of bridges lacks just those; what it refuses at all, it refuses
                // for another reason, which may pass.
                Err(GuardError::Refused(_))
                    if self.names_bridges.is_none() && nft(&["--check"], &wanted.script(false)).is_ok() =>
                {
                    self.names_bridges = Some(false);
                }
                Err(error) => return Err(error),
            }
        }
        if let Some(foreign) = &wanted.foreign {
            remove()?;
            return Err(GuardError::Foreign(Arc::clone(foreign)));
        }
        nft(&[], &wanted.script(false))
    }
}

/// Removes the table; what is not there is removed already.
pub fn remove() -> Result<(), GuardError> {
    nft(&[], &format!("add table bridge {TABLE}\ndelete table bridge {TABLE}\n"))
}

/// Removes the table where there is one; a line that says so.
///
/// # Errors
/// Without `nft`, which alone can tell; or what it refused.
pub fn remove_if_there() -> Result<Option<String>, GuardError> {
    if !is_there()? {
        return Ok(None);
    }
    remove()?;
    Ok(Some(format!("nftables table bridge {TABLE}")))
}

fn is_there() -> Result<bool, GuardError> {
    // Of all tables of the family, because the error of one that is not there looks like any other.
    let output = Command::new("nft").args(["list", "tables", "bridge"]).output()?;
    if !output.status.success() {
        return Err(refused(&output));
    }
    let line = format!("table bridge {TABLE}");
    Ok(String::from_utf8_lossy(&output.stdout).lines().any(|found| found.trim() == line))
}

/// What is to be said about a guard that cannot be, or that cannot be taken away (`wanted` is false).
pub fn diagnostic(error: &GuardError, wanted: bool) -> Diagnostic {
    let fix = if wanted {
        "a pod that starts while the agent is away is not isolated until it is back; see --bridge-guard".to_owned()
    } else {
        format!(
            "where `nft list tables bridge` shows {TABLE}, new pods have no network: `nft delete table bridge {TABLE}`"
        )
    };
    Diagnostic { severity: Severity::Warning, object: object(), field: String::new(), problem: error.to_string(), fix }
}

/// The name under which it is reported.
pub fn object() -> String {
    "Bridge guard".to_owned()
}

fn nft(options: &[&str], script: &str) -> Result<(), GuardError> {
    let mut child = Command::new("nft")
        .args(options)
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes())?;
    }
    let output = child.wait_with_output()?;
    if output.status.success() { Ok(()) } else { Err(refused(&output)) }
}

fn refused(output: &Output) -> GuardError {
    let said = String::from_utf8_lossy(&output.stderr);
    let first = said.lines().find(|line| !line.trim().is_empty()).unwrap_or("no reason given");
    GuardError::Refused(first.to_owned())
}

#[cfg(test)]
mod tests {
    use proxy_abi::MacBytes;

    use super::super::NodeDevice;
    use super::*;

    fn device(name: &str, role: Role) -> NodeDevice {
        NodeDevice {
            ifindex: 1,
            name: name.into(),
            kind: "veth".into(),
            role,
            mac: MacBytes::default(),
            mtu: 1500,
            up: true,
            addresses: vec![],
        }
    }

    fn names(names: &[&str]) -> BTreeSet<Arc<str>> {
        names.iter().map(|name| Arc::from(*name)).collect()
    }

    #[test]
    fn what_is_wanted_follows_from_the_interfaces() {
        let all = [
            ("cni0", Role::PodBridge),
            ("veth1", Role::Pod),
            ("docker0", Role::Bridge),
            ("tap0", Role::Port),
            ("veth9", Role::Port),
            ("eth0", Role::Uplink),
        ];
        let devices =
            |n: usize| NodeDevices { devices: all[..n].iter().map(|(name, role)| device(name, *role)).collect() };
        let wanted = |foreign: Option<&str>| Wanted {
            bridges: names(&["cni0"]),
            programmed: names(&["veth1"]),
            foreign: foreign.map(Arc::from),
        };
        assert_eq!(Wanted::of(&devices(4), names(&["veth1"])), wanted(None));
        assert_eq!(Wanted::of(&devices(6), names(&["veth1"])), wanted(Some("veth9")));
        assert_eq!(Wanted::of(&devices(0), BTreeSet::new()), Wanted::default());
    }

    #[test]
    fn what_was_left_stays_until_the_bridges_are_known() {
        let mut guard = Guard::default();
        assert!(guard.keep(Some(Wanted::default()), Instant::now()).is_none(), "nft would have answered");
        assert_eq!((guard.kept, guard.failed, guard.look_at), (Kept::Unknown, None, None));
    }

    #[test]
    fn the_table_is_made_in_one_transaction() {
        let wanted = Wanted { bridges: names(&["cni0"]), programmed: names(&["veth1", "veth2"]), foreign: None };
        let head = "add table bridge proxy_agent_guard\ndelete table bridge proxy_agent_guard\ntable bridge \
                    proxy_agent_guard {\n  set programmed { type ifname; elements = { \"veth1\", \"veth2\" }; }\n";
        let chain = |name: &str, hook: &str, priority: &str, on: &str, device: &str| {
            format!(
                "  chain {name} {{ type filter hook {hook} priority {priority}; policy accept; {on}{device} \"veth*\" \
                 {device} != @programmed counter drop; }}\n"
            )
        };
        let both = |i: &str, o: &str| {
            let chains = chain("from_pods", "prerouting", "-300", i, "iifname");
            format!("{head}{chains}{}}}\n", chain("to_pods", "postrouting", "300", o, "oifname"))
        };
        assert_eq!(wanted.script(false), both("", ""));
        assert_eq!(wanted.script(true), both("meta ibrname { \"cni0\" } ", "meta obrname { \"cni0\" } "));
        let none = Wanted { programmed: BTreeSet::new(), ..wanted };
        assert!(none.script(false).contains("set programmed { type ifname; }\n"));
    }
}
