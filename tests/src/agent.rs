//! The real node agent inside a simulated node.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::mount::{MsFlags, mount};
use nix::sys::signal::{Signal, kill};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::unistd::Pid;

use crate::command;
use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::lease::{BPFFS, remove_tree};
use crate::netns::Netns;
use crate::node::Node;
use crate::traffic::socket::tcp_connect;

/// Environment variable with the path of the agent's binary.
pub const BINARY_VARIABLE: &str = "PROXY_AGENT";
/// How long an agent may take to end by itself, stopped or with nothing to do.
const PATIENCE: Duration = Duration::from_mins(1);
/// For each step of a `GET` of one who is there.
const ANSWERS: Duration = Duration::from_secs(15);

/// How to run an agent.
#[derive(Clone, Debug)]
pub struct AgentOptions {
    /// `--source`.
    pub source: String,
    /// More arguments of `run`.
    pub args: Vec<String>,
    /// More environment.
    pub env: Vec<(String, String)>,
    /// The binary; `None` looks for it.
    pub binary: Option<PathBuf>,
    /// Address of its health endpoint, as seen from the node.
    pub health: SocketAddr,
    /// How long it may take to be healthy.
    pub ready_within: Duration,
}

impl AgentOptions {
    /// An agent that reads a folder of manifests.
    pub fn dir(source: &Path) -> Self {
        Self {
            source: format!("dir:{}", source.display()),
            args: Vec::new(),
            env: Vec::new(),
            binary: None,
            health: SocketAddr::from(([127, 0, 0, 1], 10256)),
            ready_within: Duration::from_secs(20),
        }
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<A: Into<String>>(mut self, args: impl IntoIterator<Item = A>) -> Self {
        self.args.extend(args.into_iter().map(Into::into));
        self
    }
}

/// An agent of one node. Dropping it ends the process and removes what it left in the kernel.
#[derive(Debug)]
pub struct Agent {
    netns: Netns,
    node: String,
    binary: PathBuf,
    options: AgentOptions,
    pin_root: PathBuf,
    cni_results: PathBuf,
    log: PathBuf,
    pid_file: PathBuf,
    child: Option<Child>,
}

impl Agent {
    /// Starts the agent and waits until it is healthy.
    ///
    /// # Errors
    /// [`Error::Name`] without a binary, [`Error::Timeout`] with the end of its log when it is not healthy in time or
    /// ends.
    pub fn start(node: &Node, options: AgentOptions) -> Result<Self> {
        let mut agent = Self::prepare(node, options)?;
        agent.launch()?;
        agent.wait_healthy()?;
        Ok(agent)
    }

    /// Starts the agent and does not wait: for agents that are not to become healthy.
    pub fn start_unchecked(node: &Node, options: AgentOptions) -> Result<Self> {
        let mut agent = Self::prepare(node, options)?;
        agent.launch()?;
        Ok(agent)
    }

    fn prepare(node: &Node, options: AgentOptions) -> Result<Self> {
        ensure_bpffs()?;
        let binary = options.binary.clone().map_or_else(find_binary, Ok)?;
        // Pid files are where the sweep of dead clusters looks for them.
        let state = node.state_dir().parent().unwrap_or(node.state_dir());
        Ok(Self {
            netns: node.netns().clone(),
            node: node.name().to_owned(),
            binary,
            pin_root: node.pin_root(),
            cni_results: node.cni_results_dir(),
            log: node.state_dir().join("agent.log"),
            pid_file: state.join(format!("{}.pid", node.name())),
            options,
            child: None,
        })
    }

    fn launch(&mut self) -> Result<()> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.context(|| format!("open {}", self.log.display()))?;
        let errors = log.try_clone().context(|| format!("open {}", self.log.display()))?;
        let mut command = self.netns.command(&self.binary.to_string_lossy());
        command.args(["run", "--source", &self.options.source, "--node-name", &self.node, "--pin-root"]);
        command.arg(&self.pin_root).arg("--cni-results").arg(&self.cni_results);
        command.args(&self.options.args).envs(self.options.env.iter().cloned());
        command.stdin(Stdio::null()).stdout(log).stderr(errors);
        let child = command.spawn().map_err(|source| Error::Spawn { command: command::shown(&command), source })?;
        // nsenter becomes the program, so this is the agent's pid.
        let pid = child.id();
        self.child = Some(child);
        fs::write(&self.pid_file, pid.to_string()).context(|| format!("write {}", self.pid_file.display()))
    }

    /// Waits until `GET /healthz` answers 200.
    pub fn wait_healthy(&mut self) -> Result<()> {
        let deadline = Deadline::after(self.options.ready_within);
        let what = format!("agent of {} is healthy", self.node);
        let healthy = deadline.poll(&what, || {
            if let Some(status) = self.exited()? {
                return Err(deadline.missed(format!("{what}: it ended ({status})")));
            }
            Ok(self.get("/healthz").is_ok_and(|(status, _)| status == 200).then_some(()))
        });
        healthy.map_err(|error| match error {
            Error::Timeout { what, waited } => {
                let log = self.log_text();
                let tail: Vec<_> = log.lines().rev().take(20).collect();
                let tail = tail.iter().rev().fold(String::new(), |text, line| text + "\n  " + line);
                Error::Timeout { what: format!("{what}; its log ends with{tail}"), waited }
            }
            other => other,
        })
    }

    /// Starts it over its pins without waiting; nothing may run.
    pub fn launch_unchecked(&mut self) -> Result<()> {
        self.launch()
    }

    /// `GET` of a path at its health endpoint: status and body.
    pub fn get(&self, path: &str) -> Result<(u16, String)> {
        http_get(&self.netns, self.options.health, path)
    }

    /// Runs the agent's binary in the node with these arguments (`status`, `flow list`) and returns its stdout. Its
    /// pin root is added.
    pub fn cli(&self, args: &[&str]) -> Result<String> {
        let mut command = self.netns.command(&self.binary.to_string_lossy());
        command.args(args).arg("--pin-root").arg(&self.pin_root);
        command::output(&mut command)
    }

    /// Pid of the process; `None` when it is not running.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// Directory of its pins.
    pub fn pin_root(&self) -> &Path {
        &self.pin_root
    }

    /// All it has logged, over restarts.
    pub fn log_text(&self) -> String {
        fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Path of the log.
    pub fn log_path(&self) -> &Path {
        &self.log
    }

    /// Its options, to change them before a restart.
    pub fn options_mut(&mut self) -> &mut AgentOptions {
        &mut self.options
    }

    /// Another binary from the next start on: an upgrade.
    pub fn set_binary(&mut self, binary: PathBuf) {
        self.binary = binary;
    }

    /// Exit status, when it ended by itself.
    fn exited(&mut self) -> Result<Option<ExitStatus>> {
        let Some(child) = &mut self.child else { return Ok(None) };
        let status = child.try_wait().context(|| format!("wait for the agent of {}", self.node))?;
        if status.is_some() {
            self.child = None;
        }
        Ok(status)
    }

    /// Waits until the process ends by itself; `Ok(None)` when none is running.
    pub fn wait_exit(&mut self, timeout: Duration) -> Result<Option<ExitStatus>> {
        if self.child.is_none() {
            return Ok(None);
        }
        let what = format!("agent of {} ends", self.node);
        Deadline::after(timeout).poll(&what, || self.exited()).map(Some)
    }

    /// Kills it with SIGKILL; its pins stay.
    pub fn kill9(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        child.kill().context(|| format!("kill the agent of {}", self.node))?;
        child.wait().map(drop).context(|| format!("wait for the agent of {}", self.node))
    }

    /// Ends it with SIGTERM, as kubelet does; its pins stay. After a minute it is killed.
    pub fn stop(&mut self) -> Result<Option<ExitStatus>> {
        let Some(pid) = self.pid() else { return Ok(None) };
        kill(Pid::from_raw(pid.cast_signed()), Signal::SIGTERM)
            .context(|| format!("end the agent of {}", self.node))?;
        match self.wait_exit(PATIENCE) {
            Err(Error::Timeout { .. }) => self.kill9().map(|()| None),
            ended => ended,
        }
    }

    /// Kills it if it runs, starts it again over its pins, and waits until it is healthy.
    pub fn restart(&mut self) -> Result<()> {
        self.kill9()?;
        self.launch()?;
        self.wait_healthy()
    }

    /// Removes what it put into the kernel, by its own `cleanup`.
    pub fn cleanup(&self) -> Result<String> {
        // A cluster that went first took the namespace along; links and pins are removed without it.
        let mut command = if self.netns.path().exists() {
            self.netns.command(&self.binary.to_string_lossy())
        } else {
            Command::new(&self.binary)
        };
        command::output(command.arg("cleanup").arg("--pin-root").arg(&self.pin_root))
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.kill9();
        let _ = self.cleanup();
        // Unpinning detaches what a failed cleanup left.
        let _ = remove_tree(&self.pin_root);
        let _ = fs::remove_file(&self.pid_file);
    }
}

/// How an agent ended that was not to work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// Exit status; `None` when it was killed, because it went on.
    pub status: Option<ExitStatus>,
    /// All it said.
    pub said: String,
}

/// Runs an agent that is expected to refuse its work, and waits for its end. `wrapper` are words before the program
/// (`setpriv` and its options). Unlike [`Agent`] it cleans nothing up: the pins may belong to another.
pub fn run_refused(node: &Node, wrapper: &[&str], pin_root: &Path, options: &AgentOptions) -> Result<Refused> {
    run_until(node, wrapper, pin_root, options, |_| false)
}

/// [`run_refused`] for an agent that may as well go on: it is killed when it has said `words`.
pub fn run_until_said(node: &Node, pin_root: &Path, options: &AgentOptions, words: &str) -> Result<Refused> {
    run_until(node, &[], pin_root, options, |said| said.contains(words))
}

fn run_until(
    node: &Node,
    wrapper: &[&str],
    pin_root: &Path,
    options: &AgentOptions,
    enough: impl Fn(&str) -> bool,
) -> Result<Refused> {
    ensure_bpffs()?;
    let binary = options.binary.clone().map_or_else(find_binary, Ok)?;
    let log = node.state_dir().join("refused.log");
    let file = File::create(&log).context(|| format!("create {}", log.display()))?;
    let words: Vec<_> = wrapper.iter().map(|&word| word.to_owned()).chain([binary.display().to_string()]).collect();
    let mut command = node.netns().command(&words[0]);
    command.args(&words[1..]).args(["run", "--source", &options.source, "--node-name", node.name(), "--pin-root"]);
    command.arg(pin_root).args(&options.args).envs(options.env.iter().cloned());
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
    let mut child = command.spawn().map_err(|source| Error::Spawn { command: command::shown(&command), source })?;
    let what = "the agent refuses";
    let read = || fs::read_to_string(&log).context(|| format!("read {}", log.display()));
    let ended = Deadline::after(PATIENCE).poll(what, || {
        let status = child.try_wait().context(|| what.to_owned())?;
        Ok((status.is_some() || enough(&read()?)).then_some(status))
    });
    let status = match ended {
        Err(Error::Timeout { .. }) => None,
        ended => ended?,
    };
    if status.is_none() {
        child.kill().context(|| what.to_owned())?;
        child.wait().context(|| what.to_owned())?;
    }
    Ok(Refused { status, said: read()? })
}

/// The agent's binary: from [`BINARY_VARIABLE`], or beside the running program, or one directory above it (test
/// binaries lie in `deps`).
pub fn find_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os(BINARY_VARIABLE) {
        return Ok(path.into());
    }
    let me = std::env::current_exe().context(|| "find the running program".to_owned())?;
    let profile = me.ancestors().skip(1).take(2);
    // A debug test may stand beside a release agent: `target/debug/deps/x` also looks into `target/release`.
    let target = me.ancestors().find(|dir| dir.join("CACHEDIR.TAG").exists());
    let profiles = target.into_iter().flat_map(|dir| ["release", "debug"].map(|profile| dir.join(profile)));
    let mut places = profile.map(Path::to_owned).chain(profiles).map(|dir| dir.join("proxy-agent"));
    places.find(|path| path.is_file()).ok_or_else(|| {
        Error::Name(format!("no proxy-agent beside {}: build it, or set {BINARY_VARIABLE}", me.display()))
    })
}

/// Mounts the BPF file system where it belongs, if it is not: as every init system does.
///
/// One thread at a time: two mounts on top of each other would hide the pins below.
fn ensure_bpffs() -> Result<()> {
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let kind = statfs(BPFFS).context(|| format!("statfs {BPFFS}"))?.filesystem_type();
    if kind == BPF_FS_MAGIC {
        return Ok(());
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700")).context(|| format!("mount {BPFFS}"))
}

/// One HTTP/1.1 GET inside a namespace: status and body. Enough for a server that closes or gives a length.
pub fn http_get(netns: &Netns, address: SocketAddr, path: &str) -> Result<(u16, String)> {
    http_get_within(netns, address, path, ANSWERS)
}

/// [`http_get`] where each step may take so long.
pub fn http_get_within(netns: &Netns, address: SocketAddr, path: &str, limit: Duration) -> Result<(u16, String)> {
    let what = || format!("GET http://{address}{path} in {}", netns.name());
    let mut connection = netns.run(|| tcp_connect(address, 0, limit))?.context(what)?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).context(what)?;
    let mut answer = Vec::new();
    match connection.read_to_end(&mut answer) {
        // A server may reset after its whole answer.
        Err(error) if error.kind() != ErrorKind::ConnectionReset || answer.is_empty() => Err(error).context(what),
        _ => parse_answer(&String::from_utf8_lossy(&answer))
            .ok_or_else(|| Error::mismatch(what(), "an HTTP answer", String::from_utf8_lossy(&answer))),
    }
}

fn parse_answer(answer: &str) -> Option<(u16, String)> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    Some((status, body.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_status_and_body() {
        let answer = "HTTP/1.1 503 Service Unavailable\r\nContent-Length: 3\r\n\r\nno\n";
        assert_eq!(parse_answer(answer), Some((503, "no\n".to_owned())));
        assert_eq!(parse_answer("SSH-2.0"), None);
    }
}
