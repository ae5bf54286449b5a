//! A cgroup for a pod, under a name that kubelet would give it.
//!
//! A simulated pod is a network namespace; who works in it is a thread of the test. The cgroup is a threaded one, so that
//! such a thread can be in it, with the threads that it makes. In the hierarchy of version 2, below the process's own cgroup.

use std::fs;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::pod::Pod;

/// Which of kubelet's drivers names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// `kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID.slice`.
    Systemd,
    /// `kubepods/podUID`: a guaranteed pod.
    Cgroupfs,
}

/// A pod's cgroup. Dropping it removes it.
#[derive(Debug)]
pub struct PodCgroup {
    /// Every folder that was made, the outermost first.
    folders: Vec<PathBuf>,
}

impl PodCgroup {
    /// Makes it.
    ///
    /// # Errors
    /// When there is no hierarchy of version 2, or nothing may be made in it.
    pub fn make(pod: &Pod, driver: Driver) -> Result<Self> {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let own = own()?;
        sweep(&own);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let uid = pod.uid();
        let inner = match driver {
            Driver::Systemd => {
                let name = format!("kubepods-burstable-pod{}.slice", uid.replace('-', "_"));
                vec!["kubepods.slice".to_owned(), "kubepods-burstable.slice".to_owned(), name]
            }
            Driver::Cgroupfs => vec!["kubepods".to_owned(), format!("pod{uid}")],
        };
        let mut path = own;
        let mut made = Self { folders: Vec::new() };
        for name in [format!("pt{}-{count}", std::process::id())].into_iter().chain(inner) {
            path.push(name);
            fs::create_dir(&path).context(|| format!("make cgroup {}", path.display()))?;
            made.folders.push(path.clone());
            let kind = path.join("cgroup.type");
            fs::write(&kind, "threaded").context(|| format!("write {}", kind.display()))?;
        }
        Ok(made)
    }

    /// Runs `work` on a thread in the cgroup, and waits for it. A panic of `work` continues in the caller.
    ///
    /// # Errors
    /// When the thread cannot be moved there.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let threads = self.folders.last().map(|folder| folder.join("cgroup.threads")).unwrap_or_default();
        thread::scope(|scope| {
            // 0 stands for the thread that writes.
            let inside = scope.spawn(|| fs::write(&threads, "0").map(|()| work()));
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
        .context(|| format!("move a thread into {}", threads.display()))
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        for folder in self.folders.iter().rev() {
            // A thread is in its cgroup until the kernel has forgotten it, a moment after it was joined.
            let removed = || fs::remove_dir(folder).is_ok();
            // The next one sweeps.
            let _ = Deadline::secs(2).until("the cgroup is empty", removed);
        }
    }
}

/// The process's own cgroup of version 2, where it is mounted.
fn own() -> Result<PathBuf> {
    let read = |path: &str| fs::read_to_string(path).context(|| format!("read {path}"));
    let (mounts, cgroups) = (read("/proc/self/mounts")?, read("/proc/self/cgroup")?);
    let mount = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next() == Some("cgroup2")).then_some(path)
    });
    let path = cgroups.lines().find_map(|line| line.strip_prefix("0::/"));
    match (mount, path) {
        (Some(mount), Some(path)) => Ok(Path::new(mount).join(path)),
        _ => Err(Error::Name("no cgroup v2 hierarchy".to_owned())),
    }
}

/// Removes what killed processes left.
fn sweep(own: &Path) {
    for entry in fs::read_dir(own).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let pid = name.to_str().and_then(|name| name.strip_prefix("pt")?.split_once('-')).map(|(pid, _)| pid);
        if pid.is_some_and(|pid| pid.parse::<u32>().is_ok() && !Path::new("/proc").join(pid).exists()) {
            remove_tree(&entry.path());
        }
    }
}

fn remove_tree(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_tree(&entry.path());
        }
    }
    // What cannot be removed now is left to the next sweep.
    let _ = fs::remove_dir(folder);
}
