//! Removes what kube-proxy left on the node, with the tools of the node.
//!
//! Only on request, and only when this agent serves: kube-proxy's rules are what the node has until then.

use std::io::{self, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use std::{env, fs};

use super::leavings::{ipsets, nft_tables, rules};

/// The interface on which IPVS mode holds the Services' addresses.
const IPVS_DEVICE: &str = "kube-ipvs0";
/// How long the agent may take to answer.
const ANSWER: Duration = Duration::from_secs(5);

/// Why nothing, or not everything, was removed.
#[derive(Debug, thiserror::Error)]
pub enum CleanupError {
    /// No agent serves.
    #[error(
        "the agent does not answer at {address} that all Services are in the maps ({found}); nothing was removed. Wait \
         until it is ready, give its address with --healthz, or use --force"
    )]
    NotServing {
        /// Its health server.
        address: SocketAddr,
        /// What was found there.
        found: String,
    },
    /// kube-proxy would write its rules again.
    #[error("kube-proxy runs (process {0}); stop it first, or use --force: it writes its rules again")]
    Running(u32),
    /// A tool failed.
    #[error("{command}: {problem}")]
    Tool {
        /// Command line.
        command: String,
        /// What it said.
        problem: String,
    },
}

/// What to do.
#[derive(Clone, Copy, Debug)]
pub struct Cleanup {
    /// Address of the agent's health server.
    pub healthz: SocketAddr,
    /// Do not ask it, and do not look for kube-proxy.
    pub force: bool,
    /// Only tell.
    pub dry_run: bool,
}

impl Cleanup {
    /// Does it; returns what was removed, or would be.
    pub fn run(self) -> Result<Vec<String>, CleanupError> {
        if !self.force {
            serving(self.healthz)?;
            if let Some(pid) = kube_proxy() {
                return Err(CleanupError::Running(pid));
            }
        }
        let mut removed = Vec::new();
        for variant in variants() {
            self.iptables(&variant, &mut removed)?;
        }
        if let Some(nft) = find("nft") {
            for table in nft_tables(&output(&nft, &["list", "tables"])?) {
                removed.push(format!("nftables: table {table}"));
                self.change(&nft, &[&["delete", "table"], &*table.split(' ').collect::<Vec<_>>()].concat(), None)?;
            }
        }
        // Sets after the rules that match them.
        if let Some(ipset) = find("ipset") {
            for set in ipsets(&output(&ipset, &["list", "-n"])?) {
                removed.push(format!("ipset: {set}"));
                self.change(&ipset, &["destroy", &set], None)?;
            }
        }
        // Not by /sys, which shows the namespace of whoever mounted it.
        if nix::net::if_::if_nametoindex(IPVS_DEVICE).is_ok()
            && let Some(ip) = find("ip")
        {
            removed.push(format!("link: {IPVS_DEVICE}"));
            self.change(&ip, &["link", "delete", IPVS_DEVICE], None)?;
        }
        Ok(removed)
    }

    fn iptables(self, variant: &Variant, removed: &mut Vec<String>) -> Result<(), CleanupError> {
        let found = rules(&output(&variant.save, &[])?);
        if found.removed.is_empty() {
            return Ok(());
        }
        removed.extend(found.removed.iter().map(|what| format!("{}: {what}", variant.name)));
        self.change(&variant.restore, &["--noflush", "-w", "5"], Some(&found.restore))
    }

    fn change(self, tool: &Path, arguments: &[&str], input: Option<&str>) -> Result<(), CleanupError> {
        if self.dry_run { Ok(()) } else { call(tool, arguments, input).map(|_| ()) }
    }
}

/// One of the iptables of a node: they do not see each other's rules.
struct Variant {
    name: String,
    save: PathBuf,
    restore: PathBuf,
}

/// Both backends by their own names; where there are none, whichever has the plain name.
fn variants() -> Vec<Variant> {
    let of = |name: String| {
        let (save, restore) = (find(&format!("{name}-save"))?, find(&format!("{name}-restore"))?);
        Some(Variant { name, save, restore })
    };
    let mut all = Vec::new();
    for family in ["iptables", "ip6tables"] {
        let both: Vec<_> = ["legacy", "nft"].iter().filter_map(|backend| of(format!("{family}-{backend}"))).collect();
        if both.is_empty() { all.extend(of(family.to_owned())) } else { all.extend(both) }
    }
    all
}

/// Looks in `PATH`, and where administrators' tools are if it does not say.
fn find(tool: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let places = env::split_paths(&path).chain(["/usr/sbin", "/sbin"].map(PathBuf::from));
    places.map(|folder| folder.join(tool)).find(|path| path.is_file())
}

fn output(tool: &Path, arguments: &[&str]) -> Result<String, CleanupError> {
    call(tool, arguments, None)
}

fn call(tool: &Path, arguments: &[&str], input: Option<&str>) -> Result<String, CleanupError> {
    let command = || format!("{} {}", tool.display(), arguments.join(" ")).trim_end().to_owned();
    let failed = |problem: String| CleanupError::Tool { command: command(), problem };
    let run = || -> io::Result<std::process::Output> {
        let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
        let mut child =
            Command::new(tool).args(arguments).stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        if let (Some(mut pipe), Some(input)) = (child.stdin.take(), input) {
            pipe.write_all(input.as_bytes())?;
        }
        child.wait_with_output()
    };
    let done = run().map_err(|error| failed(error.to_string()))?;
    if !done.status.success() {
        return Err(failed(format!("{}; {}", done.status, String::from_utf8_lossy(&done.stderr).trim())));
    }
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

/// Fails unless our agent answers that it is ready: kube-proxy has no such path on that port.
fn serving(address: SocketAddr) -> Result<(), CleanupError> {
    let not = |found: String| CleanupError::NotServing { address, found };
    for path in ["/readyz", "/healthz"] {
        let answer = get(address, path).map_err(|error| not(error.to_string()))?;
        let status = answer.lines().next().unwrap_or_default();
        let ours = path != "/readyz" || answer.contains(r#""agent": "proxy-agent""#);
        if status.split(' ').nth(1) != Some("200") || !ours {
            return Err(not(format!("{path} says {status:?}")));
        }
    }
    Ok(())
}

fn get(address: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.set_write_timeout(Some(ANSWER))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut answer = String::new();
    stream.take(64 * 1024).read_to_string(&mut answer)?;
    Ok(answer)
}

/// A process called `kube-proxy` in our network namespace, as far as processes can be seen.
fn kube_proxy() -> Option<u32> {
    let own = fs::read_link("/proc/self/ns/net").ok()?;
    fs::read_dir("/proc").ok()?.filter_map(Result::ok).find_map(|entry| {
        let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
        let name = fs::read_to_string(entry.path().join("comm")).ok()?;
        let same = fs::read_link(entry.path().join("ns/net")).ok()? == own;
        (same && name.trim() == "kube-proxy").then_some(pid)
    })
}
