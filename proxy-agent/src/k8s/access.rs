//! Addresses and credentials of API servers: read, checked, made into clients.
//!
//! A server is always verified, because whoever answers in its place rewrites every Service of the node.

use std::env;
use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::Uri;
use hyper_util::client::legacy;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use kube::client::ConfigExt;
use kube::config::{AuthInfo, Cluster, KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use tower::{BoxError, ServiceBuilder};

use super::{KubeConfig, SourceError};

/// An idle connection is probed after this long, then every [`PROBE`]; a watch is idle most of the time.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Between probes.
const PROBE: Duration = Duration::from_secs(5);
/// Probes without an answer until the connection is given up: a dead server is noticed within 35 s.
const PROBES: u32 = 3;

/// One API server, with credentials.
#[derive(Clone)]
pub(super) struct Server {
    pub(super) url: String,
    /// Host and port, without scheme and path.
    pub(super) host: String,
    pub(super) client: Client,
}

/// Logs in to all servers: reads the files that the configuration names and builds a client for each server.
pub(super) async fn login(config: &KubeConfig) -> Result<Vec<Server>, SourceError> {
    let clients = configs(config).await?;
    let answer = config.timing.answer;
    // Exec plugins run in here.
    let built = tokio::task::spawn_blocking(move || {
        let server = |config: Config| {
            let client = client(&config, answer)?;
            let url = config.cluster_url.to_string().trim_end_matches('/').to_owned();
            let host = config.cluster_url.authority().map(ToString::to_string).unwrap_or_default();
            Ok(Server { url, host, client })
        };
        clients.into_iter().map(server).collect::<Result<Vec<_>, kube::Error>>()
    });
    let credentials = |message| SourceError::Credentials { message };
    built.await.map_err(|error| credentials(error.to_string()))?.map_err(|error| credentials(error.to_string()))
}

/// A number that changes with the content of any file that [`login`] reads. Secrets go into a hash and nowhere else.
pub(super) fn fingerprint(config: &KubeConfig) -> u64 {
    let mut hasher = DefaultHasher::new();
    for path in files(config) {
        path.hash(&mut hasher);
        fs::read(&path).ok().hash(&mut hasher);
    }
    hasher.finish()
}

fn files(config: &KubeConfig) -> Vec<PathBuf> {
    let Some(kubeconfig) = &config.kubeconfig else {
        return vec![config.service_account.join("token"), config.service_account.join("ca.crt")];
    };
    let mut files = vec![kubeconfig.clone()];
    if let Ok(read) = Kubeconfig::read_from(kubeconfig) {
        let clusters = read.clusters.iter().filter_map(|named| named.cluster.as_ref());
        files.extend(clusters.filter_map(|cluster| cluster.certificate_authority.clone()).map(PathBuf::from));
        for user in read.auth_infos.iter().filter_map(|named| named.auth_info.as_ref()) {
            let named = [&user.client_certificate, &user.client_key, &user.token_file];
            files.extend(named.into_iter().flatten().map(PathBuf::from));
        }
    }
    files
}

/// Client configurations, one for each server.
async fn configs(config: &KubeConfig) -> Result<Vec<Config>, SourceError> {
    let base = match (&config.kubeconfig, config.apiservers.first()) {
        (Some(path), _) => from_kubeconfig(path).await?,
        (None, Some(url)) => from_service_account(parse_url(url)?, &config.service_account)?,
        (None, None) => from_service_account(in_cluster_url()?, &config.service_account)?,
    };
    let mut urls = config.apiservers.iter().map(|url| parse_url(url)).collect::<Result<Vec<_>, _>>()?;
    if urls.is_empty() {
        urls.push(base.cluster_url.clone());
    }
    urls.into_iter()
        .map(|url| {
            check_url(&url)?;
            let mut config = base.clone();
            config.cluster_url = url;
            Ok(config)
        })
        .collect()
}

async fn from_kubeconfig(path: &Path) -> Result<Config, SourceError> {
    let broken = |message: String| SourceError::Kubeconfig { path: path.to_owned(), message };
    let read = Kubeconfig::read_from(path).map_err(|error| broken(error.to_string()))?;
    if let Some(cluster) = current_cluster(&read) {
        if cluster.insecure_skip_tls_verify == Some(true) {
            return Err(SourceError::Unverified { path: path.to_owned() });
        }
        if cluster.proxy_url.as_deref().is_some_and(|url| !url.is_empty()) {
            return Err(SourceError::HttpProxy { path: path.to_owned() });
        }
    }
    let config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default()).await;
    let config = config.map_err(|error| broken(error.to_string()))?;
    // Checked above too; this one guards against the library reading the file differently.
    if config.accept_invalid_certs { Err(SourceError::Unverified { path: path.to_owned() }) } else { Ok(config) }
}

fn current_cluster(read: &Kubeconfig) -> Option<&Cluster> {
    let context = read.current_context.as_ref()?;
    let context = read.contexts.iter().find(|named| &named.name == context)?.context.as_ref()?;
    read.clusters.iter().find(|named| named.name == context.cluster)?.cluster.as_ref()
}

fn from_service_account(url: Uri, folder: &Path) -> Result<Config, SourceError> {
    let token = folder.join("token");
    let authority = folder.join("ca.crt");
    let read =
        |path: &Path| fs::read(path).map_err(|source| SourceError::ServiceAccount { path: path.to_owned(), source });
    read(&token)?;
    let mut config = Config::new(url);
    config.auth_info = AuthInfo { token_file: Some(token.display().to_string()), ..AuthInfo::default() };
    if config.cluster_url.scheme_str() == Some("https") {
        let pem = read(&authority)?;
        let certificates: Vec<Vec<u8>> =
            CertificateDer::pem_slice_iter(&pem).filter_map(Result::ok).map(|der| der.as_ref().to_vec()).collect();
        if certificates.is_empty() {
            return Err(SourceError::CertificateAuthority { path: authority });
        }
        config.root_cert = Some(certificates);
    }
    Ok(config)
}

fn in_cluster_url() -> Result<Uri, SourceError> {
    let host = env::var("KUBERNETES_SERVICE_HOST").ok().filter(|host| !host.is_empty()).ok_or(SourceError::NoServer)?;
    let port = env::var("KUBERNETES_SERVICE_PORT").ok().filter(|port| !port.is_empty());
    let host = if host.contains(':') { format!("[{host}]") } else { host };
    parse_url(&format!("https://{host}:{}", port.as_deref().unwrap_or("443")))
}

fn parse_url(text: &str) -> Result<Uri, SourceError> {
    let url = text.parse::<Uri>().ok();
    let complete = |url: &Uri| url.host().is_some() && matches!(url.scheme_str(), Some("http" | "https"));
    url.filter(complete).ok_or_else(|| SourceError::ServerUrl { url: text.to_owned() })
}

fn check_url(url: &Uri) -> Result<(), SourceError> {
    let host = url.host().unwrap_or_default().trim_matches(['[', ']']);
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback());
    if url.scheme_str() == Some("https") || loopback {
        Ok(())
    } else {
        Err(SourceError::PlainText { url: url.to_string() })
    }
}

/// The library's default client, with dead connections noticed and without its HTTP proxies from the environment.
fn client(config: &Config, connect: Duration) -> Result<Client, kube::Error> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    http.set_connect_timeout(Some(connect));
    http.set_keepalive(Some(KEEPALIVE));
    http.set_keepalive_interval(Some(PROBE));
    http.set_keepalive_retries(Some(PROBES));
    let https = config.rustls_https_connector_with_connector(http)?;
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(legacy::Client::builder(TokioExecutor::new()).build(https));
    Ok(Client::new(service, "default"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_that_are_verified() {
        let plain = |url: &str| SourceError::PlainText { url: url.to_owned() }.to_string();
        let none = |url: &str| SourceError::ServerUrl { url: url.to_owned() }.to_string();
        let rows = [
            ("https://10.0.0.1:6443", String::new()),
            ("https://api.example", String::new()),
            ("https://[fd00::1]:6443", String::new()),
            ("http://127.0.0.1:8001", String::new()),
            ("http://[::1]:8001", String::new()),
            ("http://localhost:8001", String::new()),
            ("http://10.0.0.1:8080", plain("http://10.0.0.1:8080/")),
            ("http://localhost.example:8080", plain("http://localhost.example:8080/")),
            ("http://127.0.0.1.example", plain("http://127.0.0.1.example/")),
            ("10.0.0.1:6443", none("10.0.0.1:6443")),
            ("ftp://10.0.0.1", none("ftp://10.0.0.1")),
            ("https://", none("https://")),
            ("", none("")),
        ];
        for (url, want) in rows {
            let got = parse_url(url).and_then(|url| check_url(&url));
            assert_eq!(got.err().map_or_else(String::new, |error| error.to_string()), want, "{url}");
        }
    }
}
