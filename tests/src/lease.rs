//! One name prefix per cluster, and the removal of what dead processes left under theirs.
//!
//! ```text
//!   /run/proxy-tests/lock              held while leases are given out and swept
//!   /run/proxy-tests/pt1a2-0/lock      held as long as the cluster lives: the kernel lets go when its process dies
//!   /run/proxy-tests/pt1a2-0/…         manifests, logs, CNI results, pids of agents
//!   /run/netns/pt1a2-0-node1           namespaces
//!   /sys/fs/bpf/pt1a2-0-node1          pins
//! ```
//!
//! A lock, not the pid in the name, tells a live owner from a dead one: pids are reused.

use std::collections::BTreeSet;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, Uid};

use crate::error::{Context as _, Error, Result};
use crate::netns;

/// Where leases and the state of live clusters are.
pub const ROOT: &str = "/run/proxy-tests";
/// Where the kernel's BPF file system is mounted.
pub const BPFFS: &str = "/sys/fs/bpf";

static COUNTER: AtomicU32 = AtomicU32::new(0);

/// A prefix for the names of everything a cluster makes, and its state directory. Both end with it.
#[derive(Debug)]
pub struct Lease {
    prefix: String,
    dir: PathBuf,
    /// Locked; closing it ends the lease.
    _lock: File,
}

impl Lease {
    /// Sweeps, then takes a new prefix.
    ///
    /// # Errors
    /// [`Error::NotRoot`], or what failed in the file system.
    pub fn take() -> Result<Self> {
        if !Uid::effective().is_root() {
            return Err(Error::NotRoot(Uid::effective().as_raw()));
        }
        let _giving = giving()?;
        sweep_locked()?;
        let prefix = format!("pt{}-{}", base36(process::id()), COUNTER.fetch_add(1, Ordering::Relaxed));
        let dir = Path::new(ROOT).join(&prefix);
        fs::create_dir(&dir).context(|| format!("create {}", dir.display()))?;
        let lock = open_lock(&dir.join("lock"))?;
        lock.lock().context(|| format!("lock {}", dir.display()))?;
        Ok(Self { prefix, dir, _lock: lock })
    }

    /// `pt<pid>-<n>`.
    pub fn prefix(&self) -> &str {
        &self.prefix
    }

    /// The state directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        // What cannot be removed now is swept by the next lease: the lock ends with this value.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// Removes what dead processes left: agents, pins, namespaces, state. Returns the prefixes that were removed.
pub fn sweep() -> Result<Vec<String>> {
    let _giving = giving()?;
    sweep_locked()
}

fn giving() -> Result<File> {
    fs::create_dir_all(ROOT).context(|| format!("create {ROOT}"))?;
    let lock = open_lock(&Path::new(ROOT).join("lock"))?;
    lock.lock().context(|| format!("lock {ROOT}"))?;
    Ok(lock)
}

fn open_lock(path: &Path) -> Result<File> {
    let open = File::options().create(true).truncate(false).write(true).open(path);
    open.context(|| format!("open {}", path.display()))
}

fn sweep_locked() -> Result<Vec<String>> {
    let places = [Path::new(ROOT), Path::new(netns::DIR), Path::new(BPFFS)];
    let mut prefixes = BTreeSet::new();
    for place in places {
        prefixes.extend(names(place)?.iter().filter_map(|name| prefix_of(name)).map(str::to_owned));
    }
    let mut removed = Vec::new();
    for prefix in prefixes {
        let dir = Path::new(ROOT).join(&prefix);
        if dir.join("lock").exists() {
            let lock = open_lock(&dir.join("lock"))?;
            match lock.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => continue,
                Err(TryLockError::Error(source)) => return Err(source).context(|| format!("lock {}", dir.display())),
            }
        }
        remove(&prefix, &dir)?;
        removed.push(prefix);
    }
    Ok(removed)
}

/// Removes everything under `prefix`: first who works there, then what holds their work, then the directory that
/// proves whose it was.
fn remove(prefix: &str, dir: &Path) -> Result<()> {
    let mine = |name: &String| prefix_of(name) == Some(prefix);
    for file in names(dir)?.iter().filter(|name| Path::new(name).extension().is_some_and(|end| end == "pid")) {
        end_process(&dir.join(file), &[format!("{BPFFS}/{prefix}-"), format!("{}/", dir.display())]);
    }
    for pin in names(Path::new(BPFFS))?.iter().filter(|name| mine(name)) {
        remove_tree(&Path::new(BPFFS).join(pin))?;
    }
    for namespace in names(Path::new(netns::DIR))?.iter().filter(|name| mine(name)) {
        netns::remove_path(&Path::new(netns::DIR).join(namespace))?;
    }
    remove_tree(dir)
}

/// Kills the process that a pid file names, if it is the one that was started: its command line names the cluster's
/// pins or files.
fn end_process(pid_file: &Path, marks: &[String]) {
    let Some(pid) = fs::read_to_string(pid_file).ok().and_then(|text| text.trim().parse::<i32>().ok()) else { return };
    let ours = fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| {
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        marks.iter().any(|mark| line.contains(mark))
    });
    if ours {
        // Gone between the two steps is as good as killed.
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
}

/// Removes a directory tree; an absent one is removed already.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(source).context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Names in a directory; none when it does not exist.
fn names(dir: &Path) -> Result<Vec<String>> {
    let entries = match fs::read_dir(dir) {
        Err(source) if source.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.context(|| format!("list {}", dir.display()))?,
    };
    Ok(entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect())
}

/// `pt1a2-0` of `pt1a2-0` and of `pt1a2-0-node1`; `None` for a name that no lease gave.
fn prefix_of(name: &str) -> Option<&str> {
    let (pid, rest) = name.strip_prefix("pt")?.split_once('-')?;
    let counter = rest.split('-').next()?;
    let base36 = |c: char| c.is_ascii_digit() || c.is_ascii_lowercase();
    let well_formed = !pid.is_empty()
        && pid.chars().all(base36)
        && !counter.is_empty()
        && counter.chars().all(|c| c.is_ascii_digit());
    well_formed.then(|| &name[..2 + pid.len() + 1 + counter.len()])
}

fn base36(mut number: u32) -> String {
    let mut digits = Vec::new();
    loop {
        digits.extend(char::from_digit(number % 36, 36));
        number /= 36;
        if number == 0 {
            return digits.iter().rev().collect();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefix_is_taken_from_own_names_only() {
        let cases = [
            ("pt1a2-0", Some("pt1a2-0")),
            ("pt1a2-17-node1", Some("pt1a2-17")),
            ("pt1a2-17-node-1", Some("pt1a2-17")),
            ("pt-0-node1", None),
            ("ptolemy", None),
            ("pt1A2-0", None),
            ("pt1a2-x-node1", None),
            ("lab-node1", None),
        ];
        assert_eq!(cases.map(|(name, _)| (name, prefix_of(name))), cases);
    }

    #[test]
    fn pids_in_base_36() {
        assert_eq!([0, 35, 36, 99_999].map(base36), ["0", "z", "10", "255r"]);
    }
}
