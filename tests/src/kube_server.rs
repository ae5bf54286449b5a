//! A real kube-apiserver over a real etcd, for the nodes of a simulated cluster.
//!
//! ```text
//!   namespace `switch`:  etcd 127.0.0.1:2379 ◀── kube-apiserver, port 6443 ◀── agents on the nodes
//!                                                       ▲
//!                                                       └── KubeClient of the test, as cluster administrator
//! ```
//!
//! There are no controllers: what is in the API is what the test wrote, but for the few objects that the API server
//! makes by itself. The processes end with this value, and with the thread that started them if that is killed.

pub mod account;
pub mod audit;
pub mod client;
pub mod pki;
mod program;

use std::env;
use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::address::{Family, SWITCH_HOST, service_cidr, underlay};
use crate::cluster::Cluster;
use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::lease::remove_tree;
use crate::netns::Netns;
use audit::Request;
pub use client::KubeClient;
use pki::Authority;
pub use pki::Identity;
use program::Program;

/// The variable that names a directory with kube-apiserver and etcd (the convention of controller-runtime's envtest).
pub const ASSETS_VARIABLE: &str = "KUBEBUILDER_ASSETS";
/// Port that agents are told.
pub const PORT: u16 = 6443;
/// Port for times in which the API changes and agents cannot see it.
pub const HIDDEN_PORT: u16 = 7443;

const ETCD: &str = "http://127.0.0.1:2379";
/// Longest start of a program, on a busy machine.
const START_SECS: u64 = 90;

/// How an API server is started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ApiOptions {
    /// Port on all addresses of the switch.
    pub port: u16,
    /// Whether watches are served from the API server's memory. Without it etcd serves them, and says itself which
    /// versions it has forgotten.
    pub watch_cache: bool,
}

impl Default for ApiOptions {
    fn default() -> Self {
        Self { port: PORT, watch_cache: true }
    }
}

/// A running control plane. Drop it before its cluster.
#[derive(Debug)]
pub struct KubeServer {
    // Dropped in this order.
    api: Option<Program>,
    etcd: Option<Program>,
    client: KubeClient,
    authority: Authority,
    admin: Identity,
    netns: Netns,
    binaries: PathBuf,
    dir: PathBuf,
}

impl KubeServer {
    /// Starts etcd and an API server, and waits until it is ready.
    ///
    /// # Errors
    /// [`Error::Name`] without the programs, with how to get them; [`Error::Timeout`] with the end of the log of what
    /// did not start.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let binaries = find_binaries()?;
        let dir = cluster.state_dir().join("kube");
        fs::create_dir(&dir).context(|| format!("create {}", dir.display()))?;
        let authority = Authority::new("cluster")?;
        let admin = authority.client("admin", Some("system:masters"))?;
        let netns = cluster.underlay().switch().clone();
        let client = KubeClient::new(&netns, &url(Family::V4, PORT), authority.pem(), &admin)?;
        let mut server = Self { api: None, etcd: None, client, authority, admin, netns, binaries, dir };
        server.write_pki()?;
        server.start_etcd()?;
        server.start_api(ApiOptions::default())?;
        Ok(server)
    }

    /// The administrator's client.
    pub fn client(&self) -> &KubeClient {
        &self.client
    }

    /// The authority that signed the server's certificate, and whose certificates the server accepts.
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// Folder for files of logins; removed with this value.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What agents are told.
    pub fn url(&self) -> String {
        url(Family::V4, PORT)
    }

    /// The same server under its IPv6 address.
    pub fn url6(&self) -> String {
        url(Family::V6, PORT)
    }

    /// Starts the API server, which must not be running, and waits until it is ready.
    pub fn start_api(&mut self, options: ApiOptions) -> Result<()> {
        let file = |name: &str| self.dir.join(name).display().to_string();
        let ranges = Family::BOTH.map(|family| service_cidr(family).to_string()).join(",");
        let port = options.port.to_string();
        let watch_cache = format!("--watch-cache={}", options.watch_cache);
        let args = [
            "--advertise-address",
            &underlay(Family::V4).host(SWITCH_HOST).to_string(),
            "--secure-port",
            &port,
            "--etcd-servers",
            ETCD,
            // Only the tests compact, so that a run does not depend on how long it takes.
            "--etcd-compaction-interval=0",
            "--service-cluster-ip-range",
            &ranges,
            // The object `kubernetes` stays as it is when the server is stopped: nobody else would bring it back.
            "--endpoint-reconciler-type=none",
            "--authorization-mode=RBAC",
            "--client-ca-file",
            &file("ca.crt"),
            "--tls-cert-file",
            &file("server.crt"),
            "--tls-private-key-file",
            &file("server.key"),
            "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
            "--service-account-key-file",
            &file("sa.pub"),
            "--service-account-signing-key-file",
            &file("sa.key"),
            "--audit-policy-file",
            &file("audit.yaml"),
            "--audit-log-path",
            &file("audit.log"),
            "--shutdown-watch-termination-grace-period=0s",
            &watch_cache,
        ];
        self.stop_api()?;
        let mut api = self.program("kube-apiserver", &args)?;
        self.client = KubeClient::new(&self.netns, &url(Family::V4, options.port), self.authority.pem(), &self.admin)?;
        let ready = || self.client.get("/readyz").is_ok();
        api.wait_until("kube-apiserver is ready", Deadline::secs(START_SECS), ready)?;
        self.api = Some(api);
        Ok(())
    }

    /// Ends the API server as a rollout does, with SIGTERM.
    pub fn stop_api(&mut self) -> Result<()> {
        self.api.take().map_or(Ok(()), Program::terminate)
    }

    /// Kills the API server with SIGKILL.
    pub fn kill_api(&mut self) -> Result<()> {
        self.api.take().map_or(Ok(()), |mut api| api.kill())
    }

    /// Makes etcd forget all versions but the newest.
    pub fn compact(&self) -> Result<u64> {
        let revision = |answer: &Value| answer["header"]["revision"].as_str().and_then(|text| text.parse().ok());
        let call = |path: &str, body: &Value| client::plain(&self.netns, &format!("{ETCD}{path}"), body);
        let range = call("/v3/kv/range", &json!({ "key": "AA==", "count_only": true }))?;
        let newest: u64 = revision(&range).ok_or_else(|| Error::mismatch("etcd's answer", "a revision", &range))?;
        call("/v3/kv/compaction", &json!({ "revision": newest, "physical": true }))?;
        Ok(newest)
    }

    /// Requests of all users but the administrator, in the order in which the server received them, as far as they
    /// were answered or, for watches, begun.
    pub fn requests(&self) -> Result<Vec<Request>> {
        audit::read(&self.dir.join("audit.log"))
    }

    fn start_etcd(&mut self) -> Result<()> {
        let data = self.dir.join("etcd").display().to_string();
        let peers = "http://127.0.0.1:2380";
        let cluster = format!("default={peers}");
        let args = [
            "--data-dir",
            &data,
            "--unsafe-no-fsync",
            "--log-level=warn",
            "--listen-client-urls",
            ETCD,
            "--advertise-client-urls",
            ETCD,
            "--listen-peer-urls",
            peers,
            "--initial-advertise-peer-urls",
            peers,
            "--initial-cluster",
            &cluster,
        ];
        let mut etcd = self.program("etcd", &args)?;
        let address = SocketAddr::from(([127, 0, 0, 1], 2379));
        let healthy = || {
            crate::agent::http_get(&self.netns, address, "/health")
                .is_ok_and(|(status, body)| status == 200 && body.contains("true"))
        };
        etcd.wait_until("etcd is healthy", Deadline::secs(START_SECS), healthy)?;
        self.etcd = Some(etcd);
        Ok(())
    }

    fn program(&self, name: &'static str, args: &[&str]) -> Result<Program> {
        Program::start(&self.netns, &self.binaries.join(name), name, &self.dir, args)
    }

    fn write_pki(&self) -> Result<()> {
        let addresses = Family::BOTH.map(|family| underlay(family).host(SWITCH_HOST).to_string());
        let server = self.authority.server("kube-apiserver", &addresses)?;
        let tokens = pki::key()?;
        let policy = json!({
            "apiVersion": "audit.k8s.io/v1",
            "kind": "Policy",
            "omitStages": ["RequestReceived"],
            "rules": [
                { "level": "None", "userGroups": ["system:masters"] },
                { "level": "None", "users": ["system:apiserver"] },
                { "level": "Metadata" },
            ],
        });
        let files = [
            ("ca.crt", self.authority.pem().to_owned()),
            ("server.crt", server.certificate),
            ("server.key", server.key),
            ("sa.key", tokens.serialize_pem()),
            ("sa.pub", tokens.public_key_pem()),
            ("audit.yaml", policy.to_string()),
        ];
        files.iter().try_for_each(|(name, text)| write_secret(&self.dir.join(name), text))
    }
}

impl Drop for KubeServer {
    fn drop(&mut self) {
        // In this order: an API server without its etcd only complains.
        drop(self.api.take());
        drop(self.etcd.take());
        let _ = remove_tree(&self.dir);
    }
}

fn url(family: Family, port: u16) -> String {
    format!("https://{}", SocketAddr::new(underlay(family).host(SWITCH_HOST), port))
}

/// Writes a file that only its owner may read.
pub(crate) fn write_secret(path: &Path, text: &str) -> Result<()> {
    let write = || {
        fs::write(path, text)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o600))
    };
    write().context(|| format!("write {}", path.display()))
}

/// Directory with kube-apiserver and etcd: from [`ASSETS_VARIABLE`], else where `cargo xtask setup --kube` puts them.
///
/// # Errors
/// [`Error::Name`] with how to get them.
pub fn find_binaries() -> Result<PathBuf> {
    let places = match env::var_os(ASSETS_VARIABLE).filter(|named| !named.is_empty()) {
        Some(named) => vec![PathBuf::from(named)],
        None => cached(),
    };
    let complete = |dir: &PathBuf| ["kube-apiserver", "etcd"].iter().all(|name| is_executable(&dir.join(name)));
    places.iter().rev().find(|dir| complete(dir)).cloned().ok_or_else(|| {
        let places: Vec<_> = places.iter().map(|dir| dir.display().to_string()).collect();
        let places = if places.is_empty() { "the cache".to_owned() } else { places.join(", ") };
        Error::Name(format!(
            "no kube-apiserver and etcd in {places}: run `cargo xtask setup --kube` (it needs Go 1.21 or later), or set \
             {ASSETS_VARIABLE} to a directory that has both"
        ))
    })
}

/// The versions in the cache, the newest last.
fn cached() -> Vec<PathBuf> {
    let home = || env::var_os("HOME").map(|home| PathBuf::from(home).join(".cache"));
    let cache = env::var_os("XDG_CACHE_HOME").map(PathBuf::from).filter(|path| path.is_absolute()).or_else(home);
    let Some(cache) = cache else { return Vec::new() };
    let entries = fs::read_dir(cache.join("proxy-agent/kube")).into_iter().flatten();
    // What is being built has a longer name, `v1.2.3.new-4`.
    let version = |path: &PathBuf| {
        let name = path.file_name()?.to_str()?.strip_prefix('v')?;
        name.split('.').map(|part| part.parse::<u32>().ok()).collect::<Option<Vec<_>>>()
    };
    let paths = entries.filter_map(|entry| entry.ok().map(|entry| entry.path()));
    let mut versions: Vec<_> = paths.filter_map(|path| version(&path).map(|version| (version, path))).collect();
    versions.sort();
    versions.into_iter().map(|(_, path)| path).collect()
}

fn is_executable(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
}
