//! A program that makes clusters, and Ctrl-C: nothing is left behind.
//!
//! A signal ends a program without its drops, and what holds back signals in a program holds them back in all that it
//! starts. So there are two processes of one program: the first only waits; the second works, and whatever ends it, the
//! first sweeps what it left ([`crate::lease`]).

use std::env;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, Command, ExitCode, ExitStatus};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::{Pid, Uid};

use crate::error::{Context as _, Result};
use crate::lease;

/// Set for the process that works.
const WORKER: &str = "PROXY_TESTS_WORKER";

/// Runs `work` in a process of its own, started with the same arguments, and returns its exit status. To be called by
/// `main` before any thread is made.
pub fn swept_after(work: impl FnOnce() -> ExitCode) -> ExitCode {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGCHLD]);
    if env::var_os(WORKER).is_some() {
        return match signals.thread_unblock() {
            Ok(()) => work(),
            Err(errno) => failed(&format!("signals: {errno}")),
        };
    }
    let ended = watch(&signals);
    // A worker that ended in order has left nothing; for any other this is the end of its cluster. Without root there
    // has never been one.
    if Uid::effective().is_root()
        && let Err(error) = lease::sweep()
    {
        return failed(&format!("what was made is not all removed: {error}; the next run tries again"));
    }
    match ended {
        // As shells give it: 130 for SIGINT.
        Ok(status) => status
            .code()
            .or_else(|| Some(128 + status.signal()?))
            .map_or(ExitCode::FAILURE, |code| u8::try_from(code).map_or(ExitCode::FAILURE, ExitCode::from)),
        Err(error) => failed(&error.to_string()),
    }
}

fn failed(why: &str) -> ExitCode {
    eprintln!("error: {why}");
    ExitCode::FAILURE
}

/// Starts the worker and waits for its end. A signal to end is passed on; from a terminal the worker has it too.
fn watch(signals: &SigSet) -> Result<ExitStatus> {
    // Held back until they are waited for; the worker lets them through again.
    signals.thread_block().context(|| "hold back signals".to_owned())?;
    let me = env::current_exe().context(|| "find the running program".to_owned())?;
    let mut command = Command::new(&me);
    command.args(env::args_os().skip(1)).env(WORKER, "1");
    let mut worker = command.spawn().context(|| format!("start {}", me.display()))?;
    loop {
        let signal = signals.wait().context(|| "wait for signals".to_owned())?;
        if let Some(status) = worker.try_wait().context(|| format!("wait for {}", me.display()))? {
            return Ok(status);
        }
        if signal != Signal::SIGCHLD {
            end(&worker);
        }
    }
}

fn end(worker: &Child) {
    // Gone already is as good.
    let _ = kill(Pid::from_raw(worker.id().cast_signed()), Signal::SIGTERM);
}
