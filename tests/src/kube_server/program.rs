//! One process of the control plane.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::command;
use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// How long it may take to end by itself.
const PATIENCE_SECS: u64 = 20;
/// Lines of its log that an error shows.
const TAIL: usize = 15;

/// A running process. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Program {
    name: &'static str,
    child: Child,
    log: PathBuf,
    pid_file: PathBuf,
}

impl Program {
    /// Starts `binary` in the namespace. The kernel kills it when the calling thread ends, however that ends.
    pub(super) fn start(netns: &Netns, binary: &Path, name: &'static str, dir: &Path, args: &[&str]) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        let open = || File::options().create(true).append(true).open(&log);
        let (out, err) = (open(), open());
        let (out, err) = (out.context(|| format!("open {}", log.display()))?, err.context(|| name.to_owned())?);
        // Each of these becomes the next, so that the pid is the program's; the signal stays set.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter"]).arg(format!("--net={}", netns.path().display())).arg("--");
        command.arg(binary).args(args).stdin(Stdio::null()).stdout(out).stderr(err);
        let child = command.spawn().map_err(|source| Error::Spawn { command: command::shown(&command), source })?;
        // Where the sweep of dead clusters looks for processes that outlived them.
        let pid_file = dir.parent().unwrap_or(dir).join(format!("{name}.pid"));
        let program = Self { name, child, log, pid_file };
        let pid = program.child.id().to_string();
        fs::write(&program.pid_file, pid).context(|| format!("write {}", program.pid_file.display()))?;
        Ok(program)
    }

    /// Waits until `ready`; an error when the process ends before that.
    pub(super) fn wait_until(&mut self, what: &str, deadline: Deadline, ready: impl Fn() -> bool) -> Result<()> {
        let child = &mut self.child;
        let done = deadline.poll(what, || {
            if let Some(status) = child.try_wait().context(|| what.to_owned())? {
                return Err(deadline.missed(format!("{what}: it ended ({status})")));
            }
            Ok(ready().then_some(()))
        });
        done.map_err(|error| match error {
            Error::Timeout { what, waited } => {
                Error::Timeout { what: format!("{what}; its log ends with{}", self.log_tail()), waited }
            }
            other => other,
        })
    }

    /// Ends it with SIGTERM and waits; kills it when it takes too long.
    pub(super) fn terminate(mut self) -> Result<()> {
        let what = format!("{} ends", self.name);
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGTERM).context(|| what.clone())?;
        let child = &mut self.child;
        let ended = Deadline::secs(PATIENCE_SECS)
            .poll(&what, || child.try_wait().context(|| what.clone()).map(|status| status.map(drop)));
        ended.or_else(|_| self.kill())
    }

    /// Kills it with SIGKILL and waits.
    pub(super) fn kill(&mut self) -> Result<()> {
        let what = || format!("kill {}", self.name);
        self.child.kill().context(what)?;
        self.child.wait().map(drop).context(what)
    }

    fn log_tail(&self) -> String {
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let tail: Vec<_> = log.lines().rev().take(TAIL).collect();
        tail.iter().rev().fold(String::new(), |text, line| text + "\n  " + line)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.kill();
        let _ = fs::remove_file(&self.pid_file);
    }
}
