//! Network namespaces with a name.
//!
//! A closure enters a namespace on a thread of its own, so no other thread ever moves. Programs enter with
//! `nsenter --net`; `ip netns exec` would also hide `/sys/fs/bpf`, because it mounts a new `/sys`.

use std::fs::{self, File};
use std::io;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use crate::command;
use crate::error::{Context as _, Result};

/// Where `ip netns` looks for names.
pub const DIR: &str = "/run/netns";

/// A named network namespace; clones name the same one. It is removed when the last clone goes, or by
/// [`Netns::remove`].
#[derive(Clone, Debug)]
pub struct Netns {
    named: Arc<Named>,
}

#[derive(Debug)]
struct Named {
    name: String,
    path: PathBuf,
    removed: AtomicBool,
}

/// A thread inside a namespace, made by [`Netns::spawn`].
#[derive(Debug)]
pub struct Inside<T>(JoinHandle<Option<T>>);

impl<T> Inside<T> {
    /// Waits for the thread's result; a panic of the thread continues here.
    pub fn join(self) -> T {
        let result = self.0.join().unwrap_or_else(|panic| resume_unwind(panic));
        result.expect("a thread that could not enter its namespace is never handed out")
    }
}

impl Netns {
    /// Makes an empty namespace (`lo` is down) under `name`, which must be free.
    ///
    /// # Errors
    /// When the kernel refuses (not root), or the name is taken.
    pub fn create(name: &str) -> Result<Self> {
        ensure_dir()?;
        let path = Path::new(DIR).join(name);
        File::create_new(&path).context(|| format!("create {}", path.display()))?;
        // From here on the name exists and must go with this value, whatever fails next.
        let netns = Self { named: Arc::new(Named { name: name.to_owned(), path, removed: AtomicBool::new(false) }) };
        let path = netns.path();
        thread::scope(|scope| {
            let made = scope.spawn(|| {
                unshare(CloneFlags::CLONE_NEWNET).context(|| "unshare network namespace".to_owned())?;
                let none = None::<&str>;
                mount(Some("/proc/thread-self/ns/net"), path, none, MsFlags::MS_BIND, none)
                    .context(|| format!("mount a namespace on {}", path.display()))
            });
            made.join().unwrap_or_else(|panic| resume_unwind(panic))
        })?;
        Ok(netns)
    }

    /// A namespace that somebody else made and will remove.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn existing(name: &str) -> Result<Self> {
        let path = Path::new(DIR).join(name);
        File::open(&path).context(|| format!("open {}", path.display()))?;
        Ok(Self { named: Arc::new(Named { name: name.to_owned(), path, removed: AtomicBool::new(true) }) })
    }

    /// Name, as `ip netns list` shows it.
    pub fn name(&self) -> &str {
        &self.named.name
    }

    /// `/run/netns/NAME`.
    pub fn path(&self) -> &Path {
        &self.named.path
    }

    /// Runs `work` inside the namespace, on a thread of its own, and waits for it. Sockets it makes stay in the
    /// namespace wherever they are used later. A panic of `work` continues in the caller.
    ///
    /// # Errors
    /// When the namespace cannot be entered (it was removed).
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        let file = self.open()?;
        thread::scope(|scope| {
            let inside = scope.spawn(move || enter(&file).map(|()| work()));
            inside.join().unwrap_or_else(|panic| resume_unwind(panic))
        })
        .context(|| format!("enter {}", self.path().display()))
    }

    /// Starts a thread inside the namespace; returns once it is inside.
    ///
    /// # Errors
    /// When the namespace cannot be entered or the thread cannot be made.
    pub fn spawn<T: Send + 'static>(
        &self,
        thread_name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Inside<T>> {
        let file = self.open()?;
        let (entered, wait) = mpsc::channel();
        let thread = thread::Builder::new().name(thread_name.to_owned()).spawn(move || {
            let inside = enter(&file);
            // The receiver waits below and lives until it has this.
            let _ = entered.send(inside);
            inside.is_ok().then(work)
        });
        let thread = thread.context(|| format!("start thread {thread_name}"))?;
        wait.recv()
            .unwrap_or(Err(Errno::ESRCH))
            .context(|| format!("enter {} on thread {thread_name}", self.path().display()))?;
        Ok(Inside(thread))
    }

    /// A command that runs `program` inside the namespace.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Runs a program inside the namespace and returns its stdout.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        // The child inherits the namespace of the thread that starts it: one exec less than nsenter.
        self.run(|| command::output(Command::new(program).args(args)))?
    }

    /// Runs a program inside the namespace with `input` on its stdin and returns its stdout.
    pub fn feed(&self, program: &str, args: &[&str], input: &str) -> Result<String> {
        self.run(|| command::feed(Command::new(program).args(args), input))?
    }

    /// Runs lines of `ip` commands, as one batch; the first that fails ends it.
    pub fn ip(&self, batch: &str) -> Result<()> {
        self.feed("ip", &["-batch", "-"], batch).map(drop)
    }

    /// Sets sysctls given as paths below `/proc/sys` (`net/ipv4/ip_forward`).
    pub fn sysctl(&self, settings: &[(&str, &str)]) -> Result<()> {
        self.run(|| {
            settings.iter().try_for_each(|(key, value)| {
                fs::write(format!("/proc/sys/{key}"), value).context(|| format!("set sysctl {key}={value}"))
            })
        })?
    }

    /// Value of a sysctl given as a path below `/proc/sys`.
    pub fn read_sysctl(&self, key: &str) -> Result<String> {
        let text = self.run(|| fs::read_to_string(format!("/proc/sys/{key}")))?;
        text.map(|text| text.trim().to_owned()).context(|| format!("read sysctl {key}"))
    }

    /// Takes the name away now. The kernel ends the namespace with its last socket, thread and process.
    pub fn remove(&self) -> Result<()> {
        if self.named.removed.swap(true, Ordering::Relaxed) { Ok(()) } else { remove_path(&self.named.path) }
    }

    fn open(&self) -> Result<File> {
        File::open(self.path()).context(|| format!("open {}", self.path().display()))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        if !self.removed.load(Ordering::Relaxed) {
            // Nobody is left to tell; the next sweep tries again.
            let _ = remove_path(&self.path);
        }
    }
}

/// Moves the calling thread into the namespace.
fn enter(file: &File) -> nix::Result<()> {
    setns(file, CloneFlags::CLONE_NEWNET)
}

/// Unmounts and deletes a name; an absent one is removed already.
pub(crate) fn remove_path(path: &Path) -> Result<()> {
    match umount2(path, MntFlags::MNT_DETACH) {
        // EINVAL: a name on which nothing was mounted yet.
        Ok(()) | Err(Errno::ENOENT | Errno::EINVAL) => {}
        Err(errno) => return Err(errno).context(|| format!("unmount {}", path.display())),
    }
    match fs::remove_file(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(source).context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

/// Makes `/run/netns` a shared mount, as `ip netns add` does. Otherwise the first `ip netns add` would mount it over
/// itself, and names made before could no longer be removed.
fn ensure_dir() -> Result<()> {
    let mounted = || {
        fs::read_to_string("/proc/self/mountinfo")
            .context(|| "read /proc/self/mountinfo".to_owned())
            .map(|table| table.lines().any(|line| line.split(' ').nth(4) == Some(DIR)))
    };
    if mounted()? {
        return Ok(());
    }
    fs::create_dir_all(DIR).context(|| format!("create {DIR}"))?;
    let turn = File::open(DIR).context(|| format!("open {DIR}"))?;
    turn.lock().context(|| format!("lock {DIR}"))?;
    if mounted()? {
        return Ok(());
    }
    let none = None::<&str>;
    mount(Some(DIR), DIR, none, MsFlags::MS_BIND | MsFlags::MS_REC, none).context(|| format!("bind {DIR}"))?;
    mount(Some(""), DIR, none, MsFlags::MS_SHARED | MsFlags::MS_REC, none).context(|| format!("share {DIR}"))
}
