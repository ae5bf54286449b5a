//! Where Kubernetes objects come from: an API server or a folder of manifests.
//!
//! ```text
//!   kube:  access ──▶ transport ──▶ api (watches) ──┐
//!                                                   ├─ convert ──▶ Event ──▶ the reconciler's queue
//!   dir:   dir (inotify) ──▶ folder ◀── manifest ───┘
//! ```
//!
//! Kubernetes' own types end here: what leaves is [`proxy_core::event::Event`]. Neither source ever ends by itself, and
//! neither deletes on account of something it could not read: see the module of each.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use proxy_core::event::Event;
use tokio::sync::mpsc::Sender;
use tokio::task::JoinSet;

mod access;
mod address;
mod api;
pub mod convert;
mod dir;
mod folder;
mod manifest;
mod metrics;
pub mod recorder;
mod requests;
mod transport;
mod trouble;

pub use address::{parse_cidr, parse_ip};
pub use folder::{Manifests, read_policies};
pub use metrics::{SourceMetrics, WatchMetrics};
pub use requests::{RequestKind, Requests};
pub use trouble::Trouble;

/// Where a pod finds its ServiceAccount's `token` and `ca.crt`.
const SERVICE_ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

/// A source, as the command line names it: `kube` or `dir:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SourceConfig {
    /// An API server.
    Kube(KubeConfig),
    /// A folder of manifests.
    Dir(PathBuf),
}

/// From when on Pods are of interest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PodWatch {
    /// When a NetworkPolicy has been seen.
    #[default]
    ForPolicies,
    /// Always: their annotations matter.
    Always,
}

/// How to reach and convince an API server.
///
/// | `kubeconfig` | `apiservers` | addresses | credentials |
/// | --- | --- | --- | --- |
/// | none | none | `KUBERNETES_SERVICE_HOST`, `_PORT`: a ClusterIP, which works only where a proxy runs already | ServiceAccount |
/// | none | some | those, in turn | ServiceAccount |
/// | some | none | the file's | the file's |
/// | some | some | those, in turn | the file's |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KubeConfig {
    /// A kubeconfig file; its current context is used.
    pub kubeconfig: Option<PathBuf>,
    /// URLs of API servers of one cluster, in order of preference.
    pub apiservers: Vec<String>,
    /// Folder with `token` and `ca.crt`.
    pub service_account: PathBuf,
    /// Waits and limits.
    pub timing: Timing,
}

/// Waits and limits of the conversation with an API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timing {
    /// First wait after a failure; doubles up to `retry_max`, with jitter.
    pub retry_min: Duration,
    /// Longest wait after failures.
    pub retry_max: Duration,
    /// Longest wait for a connection and the head of an answer.
    pub answer: Duration,
    /// Longest silence inside a list.
    pub silence: Duration,
    /// Between two looks at the credential files.
    pub credentials: Duration,
    /// At least this long between two new logins that refusals (401, TLS) ask for.
    pub login_gap: Duration,
}

impl Default for Timing {
    fn default() -> Self {
        Self {
            retry_min: Duration::from_millis(800),
            retry_max: Duration::from_secs(30),
            answer: Duration::from_secs(15),
            silence: Duration::from_secs(30),
            credentials: Duration::from_mins(1),
            login_gap: Duration::from_secs(5),
        }
    }
}

impl Default for KubeConfig {
    fn default() -> Self {
        Self {
            kubeconfig: None,
            apiservers: Vec::new(),
            service_account: SERVICE_ACCOUNT.into(),
            timing: Timing::default(),
        }
    }
}

/// Why a source cannot be used. Each says what to do.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// Neither `kube` nor `dir:PATH`.
    #[error("source {0:?} is unknown; write kube or dir:PATH")]
    UnknownSource(String),
    /// Flags of the other source.
    #[error("--kubeconfig and --apiserver are for --source kube; leave them out with --source dir:{}", .0.display())]
    MixedFlags(PathBuf),
    /// The folder cannot be read.
    #[error("folder {} cannot be read: {source}; create it, or name another with --source dir:PATH", .path.display())]
    Folder {
        /// The folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The path is something else.
    #[error("{} is no folder; name the folder that holds the manifests", .path.display())]
    NotAFolder {
        /// The path.
        path: PathBuf,
    },
    /// No inotify instance.
    #[error("inotify is not available: {source}; raise fs.inotify.max_user_instances")]
    Inotify {
        /// What the kernel said.
        source: io::Error,
    },
    /// A server URL that is none.
    #[error("API server {url:?} is no URL; write https://HOST:PORT")]
    ServerUrl {
        /// The text given.
        url: String,
    },
    /// Plain HTTP to another machine.
    #[error(
        "API server {url} would be spoken to without TLS; use https (http is allowed to this machine's loopback only)"
    )]
    PlainText {
        /// The URL.
        url: String,
    },
    /// The kubeconfig asks not to verify the server.
    #[error(
        "{} sets insecure-skip-tls-verify; whoever answers could then rewrite all Services: remove it and set \
         certificate-authority",
        .path.display()
    )]
    Unverified {
        /// The kubeconfig.
        path: PathBuf,
    },
    /// The kubeconfig asks for an HTTP proxy.
    #[error("{} sets proxy-url, which is not supported; give a direct address with --apiserver", .path.display())]
    HttpProxy {
        /// The kubeconfig.
        path: PathBuf,
    },
    /// The kubeconfig cannot be used.
    #[error("kubeconfig {} cannot be used: {message}; mend it, or name another with --kubeconfig", .path.display())]
    Kubeconfig {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        message: String,
    },
    /// No ServiceAccount is mounted.
    #[error(
        "{} cannot be read: {source}; run in a pod with a mounted ServiceAccount, or use --kubeconfig",
        .path.display()
    )]
    ServiceAccount {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// `ca.crt` holds no certificate.
    #[error("{} holds no usable certificate; it must be the cluster's CA in PEM", .path.display())]
    CertificateAuthority {
        /// The file.
        path: PathBuf,
    },
    /// Not in a cluster, and no other way named.
    #[error("no API server is known: KUBERNETES_SERVICE_HOST is not set; use --kubeconfig or --apiserver")]
    NoServer,
    /// Credentials that can be read and not used.
    #[error("credentials cannot be used: {message}; check certificates, keys and exec plugin")]
    Credentials {
        /// What is wrong.
        message: String,
    },
}

impl SourceConfig {
    /// From the command line's `--source`, `--kubeconfig` and `--apiserver` (URLs, commas between them).
    pub fn from_flags(
        source: &str,
        kubeconfig: Option<PathBuf>,
        apiservers: Option<&str>,
    ) -> Result<Self, SourceError> {
        match Self::parse(source)? {
            Self::Kube(config) => {
                let servers = apiservers.unwrap_or_default().split(',').map(str::trim).filter(|url| !url.is_empty());
                Ok(Self::Kube(KubeConfig { kubeconfig, apiservers: servers.map(str::to_owned).collect(), ..config }))
            }
            Self::Dir(path) if kubeconfig.is_some() || apiservers.is_some() => Err(SourceError::MixedFlags(path)),
            Self::Dir(path) => Ok(Self::Dir(path)),
        }
    }

    /// From the text of `--source`.
    pub fn parse(text: &str) -> Result<Self, SourceError> {
        match text.split_once(':') {
            None if text == "kube" => Ok(Self::Kube(KubeConfig::default())),
            Some(("dir", path)) if !path.is_empty() => Ok(Self::Dir(path.into())),
            _ => Err(SourceError::UnknownSource(text.to_owned())),
        }
    }
}

impl FromStr for SourceConfig {
    type Err = SourceError;

    fn from_str(text: &str) -> Result<Self, SourceError> {
        Self::parse(text)
    }
}

impl fmt::Display for SourceConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Kube(_) => f.write_str("kube"),
            Self::Dir(path) => write!(f, "dir:{}", path.display()),
        }
    }
}

/// A running source. It stops when this is dropped.
#[derive(Debug)]
pub struct SourceHandle {
    metrics: Arc<SourceMetrics>,
    tasks: JoinSet<()>,
}

impl SourceHandle {
    /// Counters of the watches; all zero for a folder.
    pub fn metrics(&self) -> &Arc<SourceMetrics> {
        &self.metrics
    }

    /// Waits until a task of the source ends, which happens only when the receiver of its events is gone.
    pub async fn ended(&mut self) {
        self.tasks.join_next().await;
    }
}

/// Starts a source. `node_name` says which Node is this one.
///
/// Events are sent in this order for each kind of object: the objects that there are, `Listed` with their names, then
/// changes as they come. After a new listing `Listed` comes again; until then nothing of an interrupted one is deleted.
/// Fails on what waiting cannot mend: flags, missing files, unverified TLS. An unreachable server is waited for.
pub async fn spawn(config: SourceConfig, node_name: &str, tx: Sender<Event>) -> Result<SourceHandle, SourceError> {
    spawn_with(config, node_name, PodWatch::default(), tx).await
}

/// As [`spawn`], with a word on Pods.
///
/// # Errors
/// As [`spawn`].
pub async fn spawn_with(
    config: SourceConfig,
    node_name: &str,
    pods: PodWatch,
    tx: Sender<Event>,
) -> Result<SourceHandle, SourceError> {
    let metrics = Arc::new(SourceMetrics::default());
    let mut tasks = JoinSet::new();
    match config {
        SourceConfig::Kube(config) => api::start(config, node_name, pods, &tx, &metrics, &mut tasks).await?,
        SourceConfig::Dir(path) => {
            let source = dir::DirSource::open(Path::new(&path), node_name, pods, tx)?;
            tasks.spawn(source.run());
        }
    }
    Ok(SourceHandle { metrics, tasks })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags() {
        let kube = |kubeconfig: Option<&str>, servers: &[&str]| {
            format!(
                "{:?}",
                SourceConfig::Kube(KubeConfig {
                    kubeconfig: kubeconfig.map(PathBuf::from),
                    apiservers: servers.iter().map(|&url| url.to_owned()).collect(),
                    ..KubeConfig::default()
                })
            )
        };
        let unknown = |text: &str| format!("source {text:?} is unknown; write kube or dir:PATH");
        let mixed =
            "--kubeconfig and --apiserver are for --source kube; leave them out with --source dir:/m".to_owned();
        let rows = [
            ("kube", None, None, kube(None, &[])),
            ("kube", Some("/k"), None, kube(Some("/k"), &[])),
            ("kube", None, Some("https://a:1, https://b:2,"), kube(None, &["https://a:1", "https://b:2"])),
            ("dir:/m", None, None, format!("{:?}", SourceConfig::Dir("/m".into()))),
            ("dir:a:b", None, None, format!("{:?}", SourceConfig::Dir("a:b".into()))),
            ("dir:/m", Some("/k"), None, mixed.clone()),
            ("dir:/m", None, Some("https://a"), mixed),
            ("dir:", None, None, unknown("dir:")),
            ("kubernetes", None, None, unknown("kubernetes")),
            ("kube:x", None, None, unknown("kube:x")),
        ];
        for (source, kubeconfig, apiservers, want) in rows {
            let got = SourceConfig::from_flags(source, kubeconfig.map(PathBuf::from), apiservers);
            let got = got.map_or_else(|error| error.to_string(), |config| format!("{config:?}"));
            assert_eq!(got, want, "{source} {kubeconfig:?} {apiservers:?}");
        }
    }
}
