//! `cargo xtask test`: builds every test, runs it at its level, and says in one line what came out.
//!
//! Test binaries are run from here and not by `cargo test`, because most of them need root and one thread, the build
//! needs neither, and the sum of all is wanted.

mod binary;
mod level;
mod libtest;
mod summary;

use std::collections::BTreeSet;
use std::io::{BufRead as _, BufReader, Write as _, stdout};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};

use crate::privilege::Privilege;
use crate::process;
use crate::setup::{self, Purpose, Row, State, kubernetes};
use crate::workspace::Workspace;
use binary::TestBinary;
use level::Level;
use libtest::Outcome;
use summary::Summary;

/// How long one binary may run: a test that hangs must not hide what the others found.
const LIMIT: Duration = Duration::from_mins(20);

/// Names the agent to the simulator, which would otherwise look for one that may be older.
pub(crate) const AGENT: &str = "PROXY_AGENT";

/// Options of `test`.
#[derive(clap::Args, Debug)]
pub(crate) struct Arguments {
    /// Only these levels; may be given several times.
    #[arg(long, value_enum, value_name = "LEVEL")]
    level: Vec<Level>,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// The command itself. Whether all passed; the sum is printed in either case.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<bool> {
    let privilege = Privilege::detect();
    let mut wanted: BTreeSet<Level> = arguments.level.iter().copied().collect();
    let everything = wanted.is_empty();
    if everything {
        wanted.extend(Level::ALL);
    }
    let node = wanted.iter().any(|level| level.needs_root());
    setup::ensure(workspace, if node { Purpose::Node } else { Purpose::Build })?;

    let mut summary = Summary::default();
    let mut assets = None;
    if wanted.contains(&Level::Kube) {
        match kubernetes::provide(workspace, true) {
            Row { state: State::Missing, action, .. } => {
                wanted.remove(&Level::Kube);
                summary.leave_out(Level::Kube, &action);
            }
            _ => assets = Some(kubernetes::locate(workspace)?),
        }
    }
    if privilege == Privilege::None {
        for level in wanted.extract_if(.., |level| level.needs_root()) {
            summary.leave_out(level, "run this as root, or as a user who may use sudo");
        }
    }

    let binaries = match binary::build(workspace) {
        Ok(binaries) => binaries,
        Err(error) => {
            summary.fail("build", &format!("{error:#}"));
            print!("{summary}");
            return Ok(false);
        }
    };
    for &level in &wanted {
        let mut at_level = binaries.iter().filter(|binary| binary.level == level).peekable();
        if at_level.peek().is_none() && level.is_expected() {
            summary.fail(&format!("level {level}"), "has no test binary");
        }
        for binary in at_level {
            let command = command(workspace, binary, privilege, assets.as_deref(), arguments.filter.as_deref())?;
            let (outcome, seconds) = observe(command, &format!("[{level}] {}", binary.name))?;
            println!("[{level}] {}: {outcome}, {seconds} s\n", binary.name);
            summary.add(binary, &outcome, arguments.filter.is_some());
        }
        if level == Level::Unit {
            let mut documentation = workspace.cargo();
            documentation.args(["test", "--doc", "--workspace", "--locked", "--"]).args(arguments.filter.as_deref());
            let (outcome, _) = observe(documentation, "[unit] examples in the documentation")?;
            summary.add_examples(&outcome);
        }
    }
    // Without root the simulator's own tests are left out, and that is said.
    if everything && arguments.filter.is_none() && privilege != Privilege::None {
        summary.expect_tests_in(&binary::WITH_TESTS);
    }
    if summary.is_empty() {
        summary.fail("selection", "no test was run");
    }
    print!("{summary}");
    stdout().flush()?;
    Ok(summary.failed() == 0)
}

/// How one binary is started: where cargo would start it, as the user its level needs, bounded in time.
fn command(
    workspace: &Workspace,
    binary: &TestBinary,
    privilege: Privilege,
    assets: Option<&Path>,
    filter: Option<&str>,
) -> Result<Command> {
    let timeout = process::find("timeout").context("`timeout` of coreutils is not there")?;
    let mut command = if binary.level.needs_root() {
        privilege.command(timeout).context("a test that needs root was not left out")?
    } else {
        Command::new(timeout)
    };
    command.arg("--kill-after=10").arg(LIMIT.as_secs().to_string()).arg(&binary.executable).args(filter);
    if binary.level.needs_root() {
        // Nodes are made of what the kernel has once: cgroup hooks, pinned maps, both processors.
        command.arg("--test-threads=1");
    }
    command.current_dir(&binary.directory).env("CARGO_MANIFEST_DIR", &binary.directory);
    command.env(AGENT, workspace.target().join("debug/proxy-agent"));
    if let Some(assets) = assets {
        command.env(kubernetes::ASSETS, assets);
    }
    Ok(command)
}

/// Runs it, shows its output as it comes, and reads from it what happened. Also the seconds it took.
fn observe(mut command: Command, title: &str) -> Result<(Outcome, u64)> {
    println!("{title}");
    let start = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start `{}`", process::shown(&command)))?;
    let mut reader = libtest::Reader::default();
    let mut screen = stdout().lock();
    if let Some(output) = child.stdout.take() {
        for line in BufReader::new(output).split(b'\n') {
            let line = String::from_utf8_lossy(&line?).into_owned();
            writeln!(screen, "{line}")?;
            reader.line(&line);
        }
    }
    let status = child.wait()?;
    Ok((reader.finish(status), start.elapsed().as_secs()))
}
