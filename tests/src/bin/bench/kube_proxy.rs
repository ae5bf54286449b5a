//! The real kube-proxy in a simulated node.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::{env, fmt};

use anyhow::{Context as _, Result, bail};
use proxy_tests::address::cluster_cidr;
use proxy_tests::agent::http_get;
use proxy_tests::manifests::Object as _;
use proxy_tests::{Deadline, Family, Node};
use serde_json::{Value, json};

use crate::kube_api::FakeApi;

/// How long it may take to write its rules, in seconds.
const READY: u64 = 300;
/// Names its binary.
const VARIABLE: &str = "KUBE_PROXY";

/// How kube-proxy writes its rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Mode {
    Nftables,
    Iptables,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        })
    }
}

/// A running kube-proxy and its API server. Its rules go with the node's namespace.
#[derive(Debug)]
pub(crate) struct KubeProxy {
    child: Child,
    _api: FakeApi,
}

/// The binary: `KUBE_PROXY`, else in `KUBEBUILDER_ASSETS`, else where `cargo xtask setup` builds it.
pub(crate) fn find() -> Option<PathBuf> {
    if let Some(named) = env::var_os(VARIABLE).filter(|named| !named.is_empty()) {
        return Some(named.into());
    }
    let assets = env::var_os("KUBEBUILDER_ASSETS").map(|dir| PathBuf::from(dir).join("kube-proxy"));
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
    let cache = cache.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")));
    let versions = cache.and_then(|cache| fs::read_dir(cache.join("proxy-agent/kube")).ok());
    let mut built: Vec<_> = versions.into_iter().flatten().flatten().map(|e| e.path().join("kube-proxy")).collect();
    built.sort();
    assets.into_iter().chain(built.into_iter().rev()).find(|path| path.is_file())
}

/// What `kube-proxy --version` says.
pub(crate) fn version(binary: &Path) -> Result<String> {
    let output = Command::new(binary).arg("--version").output().with_context(|| binary.display().to_string())?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

impl KubeProxy {
    /// Starts it in a node and waits until it is healthy, which it is with its first rules written. To be called from a
    /// thread that lives as long as the value: kube-proxy ends with it.
    pub(crate) fn start(binary: &Path, node: &Node, mode: Mode, objects: &[[Value; 2]]) -> Result<Self> {
        let (services, slices) = objects.iter().map(|[service, slice]| (service.clone(), slice.clone())).unzip();
        let api = FakeApi::start(node.netns(), services, slices, vec![node.to_json()])?;
        let dir = node.state_dir();
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "bench",
            "clusters": [{ "name": "bench", "cluster": { "server": format!("http://{}", api.address()) } }],
            "users": [{ "name": "bench", "user": {} }],
            "contexts": [{ "name": "bench", "context": { "cluster": "bench", "user": "bench" } }],
        });
        let cidrs = Family::BOTH.map(|family| cluster_cidr(family).to_string()).join(",");
        let config = json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
            "mode": mode.to_string(),
            "clientConnection": {
                "kubeconfig": dir.join("kubeconfig"),
                "acceptContentTypes": "application/json", "contentType": "application/json",
            },
            "hostnameOverride": node.name(),
            "clusterCIDR": cidrs,
            // nf_conntrack_max belongs to the machine.
            "conntrack": { "maxPerCore": 0, "min": 0 },
        });
        fs::write(dir.join("kubeconfig"), kubeconfig.to_string())?;
        fs::write(dir.join("kube-proxy.json"), config.to_string())?;
        let log_path = dir.join("kube-proxy.log");
        let log = File::create(&log_path)?;
        // Whatever ends this program ends it too: the namespace would live as long as it does.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "nsenter"]).arg(format!("--net={}", node.netns().path().display()));
        command.arg("--").arg(binary).arg("--config").arg(dir.join("kube-proxy.json")).arg("--v=1");
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().context("setpriv (package util-linux)")?;
        let mut proxy = Self { child, _api: api };
        let health = SocketAddr::from(([127, 0, 0, 1], 10256));
        let tail = || {
            let text = fs::read_to_string(&log_path).unwrap_or_default();
            let lines: Vec<_> = text.lines().rev().take(10).collect();
            lines.iter().rev().fold(String::new(), |all, line| all + "\n  " + line)
        };
        let ready = Deadline::secs(READY).poll("kube-proxy is healthy", || {
            let ended = proxy.child.try_wait().ok().flatten().is_some();
            let healthy = http_get(node.netns(), health, "/healthz").is_ok_and(|(status, _)| status == 200);
            Ok((ended || healthy).then_some(healthy))
        });
        match ready {
            Ok(true) => Ok(proxy),
            Ok(false) => bail!("kube-proxy {mode} ended; its log:{}", tail()),
            Err(error) => bail!("kube-proxy {mode}: {error}; its log:{}", tail()),
        }
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        // One that has ended by itself is gone already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
