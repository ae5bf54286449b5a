//! The real `proxy-agent trace` in a simulated node.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;
use std::time::Duration;

use jsonschema::Validator;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proxy_agent::trace::condition::SCHEMA;
use serde_json::{Value, json};

use crate::agent::find_binary;
use crate::command;
use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::node::Node;

/// A running trace. Dropping it kills it.
#[derive(Debug)]
pub struct Tracer {
    child: Child,
    out: PathBuf,
    err: PathBuf,
}

/// What a trace said.
#[derive(Clone, Debug)]
pub struct Traced {
    /// Exit code; `None` when a signal ended it.
    pub code: Option<i32>,
    /// Its standard output.
    pub out: String,
    /// Its standard error.
    pub err: String,
}

/// A packet of a trace in the form `ndjson`.
#[derive(Clone, Debug)]
pub struct TracedPacket {
    /// Number, with `r` for a reply.
    pub flow: String,
    /// All of its lines.
    pub lines: Vec<Value>,
}

impl Tracer {
    /// Starts `proxy-agent trace ARGS` in the node, with its pins and CNI results, and waits until packets are followed.
    ///
    /// # Errors
    /// [`Error::Timeout`] with what it said, when it is not ready in thirty seconds.
    pub fn start(node: &Node, args: &[&str]) -> Result<Self> {
        let mut tracer = Self::launch(node, args)?;
        let ready = || {
            let said = fs::read_to_string(&tracer.err).unwrap_or_default();
            said.lines().any(|line| line.starts_with("following") || line.starts_with("counting"))
        };
        let mut ended = None;
        let waited = Deadline::secs(30).until("trace is ready", || {
            ended = tracer.child.try_wait().ok().flatten();
            ready() || ended.is_some()
        });
        if waited.is_err() || ended.is_some() && !ready() {
            let said = fs::read_to_string(&tracer.err).unwrap_or_default();
            return Err(Error::Name(format!("trace {args:?} is not ready: {said}")));
        }
        Ok(tracer)
    }

    /// Starts it and does not wait.
    pub fn launch(node: &Node, args: &[&str]) -> Result<Self> {
        let unique = fastrand::u64(..);
        let file = |kind: &str| node.state_dir().join(format!("trace-{unique:016x}.{kind}"));
        let (out, err) = (file("out"), file("err"));
        let make = |path: &Path| File::create(path).context(|| format!("create {}", path.display()));
        let (stdout, stderr) = (make(&out)?, make(&err)?);
        let mut command = Command::new(find_binary()?);
        command.arg("trace").args(args);
        // Where the command knows of a node.
        if !matches!(args.first(), Some(&("hooks" | "show" | "graph" | "diff"))) {
            command.arg("--pin-root").arg(node.pin_root());
        }
        if !matches!(args.first(), Some(&("hooks" | "show" | "graph" | "diff" | "doctor"))) {
            command.arg("--cni-results").arg(node.cni_results_dir());
        }
        command.stdin(Stdio::null()).stdout(stdout).stderr(stderr);
        let spawned = node.netns().run(|| command.spawn())?;
        let child = spawned.map_err(|source| Error::Spawn { command: command::shown(&command), source })?;
        Ok(Self { child, out, err })
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself.
    pub fn finish(mut self, within: Duration) -> Result<Traced> {
        let deadline = Deadline::after(within);
        let what = "trace ends";
        let status = deadline.poll(what, || self.child.try_wait().context(|| what.to_owned()))?;
        let read = |path: &Path| fs::read_to_string(path).context(|| format!("read {}", path.display()));
        let traced = Traced { code: status.code(), out: read(&self.out)?, err: read(&self.err)? };
        traced.lines().iter().filter(|line| line["t"].is_string()).try_for_each(is_as_promised)?;
        Ok(traced)
    }

    /// Ends it as Ctrl-C does, and waits.
    pub fn interrupt(self) -> Result<Traced> {
        kill(Pid::from_raw(self.child.id().cast_signed()), Signal::SIGINT)
            .context(|| "interrupt a trace".to_owned())?;
        self.finish(Duration::from_secs(10))
    }

    /// Kills it with SIGKILL.
    pub fn kill9(mut self) -> Result<()> {
        self.child.kill().context(|| "kill a trace".to_owned())?;
        self.child.wait().map(drop).context(|| "wait for a trace".to_owned())
    }

    /// What it has written so far.
    pub fn written(&self) -> String {
        fs::read_to_string(&self.out).unwrap_or_default()
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Is a line of `-o ndjson` what `trace schema` says of lines of its kind?
fn is_as_promised(line: &Value) -> Result<()> {
    static KINDS: LazyLock<BTreeMap<String, Validator>> = LazyLock::new(|| {
        let schema: Value = serde_json::from_str(SCHEMA).expect("the schema is JSON");
        let kinds = schema["$defs"].as_object().into_iter().flatten().map(|(kind, _)| {
            let one = json!({ "$ref": format!("#/$defs/{kind}"), "$defs": schema["$defs"] });
            (kind.clone(), jsonschema::validator_for(&one).expect("a schema"))
        });
        kinds.collect()
    });
    let wrong = match line["t"].as_str().and_then(|kind| KINDS.get(kind)) {
        None => "no such kind of line".to_owned(),
        Some(kind) => {
            kind.iter_errors(line).map(|e| format!("{}: {e}", e.instance_path())).collect::<Vec<_>>().join("; ")
        }
    };
    if wrong.is_empty() { Ok(()) } else { Err(Error::Name(format!("{line} is not in the schema: {wrong}"))) }
}

/// Runs a trace that ends by itself.
pub fn run(node: &Node, args: &[&str]) -> Result<Traced> {
    Tracer::launch(node, args)?.finish(Duration::from_secs(40))
}

impl Traced {
    /// Its lines, where they are JSON.
    pub fn lines(&self) -> Vec<Value> {
        self.out.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Its packets, in their order.
    pub fn packets(&self) -> Vec<TracedPacket> {
        let mut packets: Vec<(String, TracedPacket)> = Vec::new();
        for line in self.lines() {
            let Some(id) = line["id"].as_str().map(str::to_owned) else { continue };
            if line["t"] == "pkt" {
                let flow = line["flow"].as_str().unwrap_or_default().to_owned();
                packets.push((id.clone(), TracedPacket { flow, lines: Vec::new() }));
            }
            if let Some((_, packet)) = packets.iter_mut().find(|(known, _)| *known == id) {
                packet.lines.push(line);
            }
        }
        packets.into_iter().map(|(_, packet)| packet).collect()
    }

    /// The only line of a kind.
    pub fn one(&self, kind: &str) -> Value {
        self.lines().into_iter().find(|line| line["t"] == kind).unwrap_or_default()
    }
}

impl TracedPacket {
    /// Lines of a kind.
    pub fn all(&self, kind: &str) -> Vec<&Value> {
        self.lines.iter().filter(|line| line["t"] == kind).collect()
    }

    /// The last line: how it ended.
    pub fn end(&self) -> Value {
        self.all("end").first().copied().cloned().unwrap_or_default()
    }

    /// Is it a reply?
    pub fn is_reply(&self) -> bool {
        self.flow.ends_with('r')
    }

    /// Its steps as words, with `rename` for devices: `queue a:eth0`, `from_pod service_new redirect @veth-a`, …
    pub fn steps(&self, rename: impl Fn(&str) -> String) -> Vec<String> {
        let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let steps = self.lines.iter().filter_map(|line| match line["t"].as_str()? {
            "hop" => {
                let device = rename(&word(&line["dev"]));
                let netns = word(&line["netns_ref"]);
                let place = netns.strip_prefix("pod default/").map_or(device.clone(), |pod| format!("{pod}:{device}"));
                let point = match line["point"].as_str()? {
                    "netif_receive_skb" => "receive",
                    "net_dev_queue" => "queue",
                    "net_dev_start_xmit" => "transmit",
                    "kfree_skb" => "drop",
                    _ => return None,
                };
                let way = word(&line["way"]);
                Some(format!("{point} {place} {way}"))
            }
            "decision" => {
                let (hook, reason, verdict) = (word(&line["hook"]), word(&line["reason"]), word(&line["verdict"]));
                Some(format!("{hook} {} {reason} {verdict}", rename(&word(&line["dev"]))))
            }
            _ => None,
        });
        steps.collect()
    }
}
