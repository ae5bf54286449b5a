//! The API by its REST paths, with objects as JSON.

use std::io::{BufRead as _, BufReader};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use ureq::http::{self, Method, StatusCode};
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};

use super::pki::Identity;
use crate::deadline::Deadline;
use crate::error::{Context as _, Error, Result};
use crate::netns::Netns;

/// For one request.
const TIMEOUT: Duration = Duration::from_secs(30);
/// Requests at a time when there are many.
const PARALLEL: usize = 8;
/// Longest answer in bytes.
const ANSWER_MAX: u64 = 64 << 20;
/// Who owns the fields that [`KubeClient::apply`] writes.
const FIELD_MANAGER: &str = "proxy-tests";

/// A client with a certificate.
#[derive(Debug)]
pub struct KubeClient {
    netns: Netns,
    url: String,
    agent: ureq::Agent,
}

impl KubeClient {
    /// Connects when it is asked for something. `authority` is the PEM that the server is verified by.
    pub fn new(netns: &Netns, url: &str, authority: &str, identity: &Identity) -> Result<Self> {
        let tls = || -> std::result::Result<TlsConfig, ureq::Error> {
            let certificate = Certificate::from_pem(identity.certificate.as_bytes())?;
            let key = PrivateKey::from_pem(identity.key.as_bytes())?;
            let root = Certificate::from_pem(authority.as_bytes())?;
            let client = ClientCert::new_with_certs(&[certificate], key);
            Ok(TlsConfig::builder().client_cert(Some(client)).root_certs(RootCerts::new_with_certs(&[root])).build())
        };
        let tls = tls().map_err(ureq::Error::into_io).context(|| format!("client of {url}"))?;
        let config = ureq::Agent::config_builder().tls_config(tls).max_idle_connections_per_host(PARALLEL);
        Ok(Self { netns: netns.clone(), url: url.to_owned(), agent: agent(config) })
    }

    /// The object at a path.
    pub fn get(&self, path: &str) -> Result<Value> {
        self.request(&Method::GET, path, "", None)
    }

    /// Makes an object; it must not exist. Returns it as the server has it.
    pub fn create(&self, object: &Value) -> Result<Value> {
        self.netns.run(|| self.create_here(object))?
    }

    /// Makes many objects, several at a time.
    pub fn create_all(&self, objects: &[Value]) -> Result<()> {
        let share = objects.len().div_ceil(PARALLEL).max(1);
        thread::scope(|scope| {
            let shares = objects.chunks(share).map(|share| {
                let create = move || share.iter().try_for_each(|object| self.create_here(object).map(drop));
                scope.spawn(move || self.netns.run(create)?)
            });
            let workers: Vec<_> = shares.collect();
            workers
                .into_iter()
                .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })
    }

    /// Makes an object or changes it to this one: a field that an earlier call wrote and this one leaves out is removed
    /// (server-side apply).
    pub fn apply(&self, object: &Value) -> Result<Value> {
        let path = format!("{}?force=true&fieldManager={FIELD_MANAGER}", path_of(object));
        self.request(&Method::PATCH, &path, "application/apply-patch+yaml", Some(object))
    }

    /// Merges a patch into the object at a path; `null` removes a field.
    pub fn patch(&self, path: &str, patch: &Value) -> Result<Value> {
        self.request(&Method::PATCH, path, "application/merge-patch+json", Some(patch))
    }

    /// Sends a body to a path, which may be a subresource.
    pub fn post(&self, path: &str, body: &Value) -> Result<Value> {
        self.request(&Method::POST, path, JSON, Some(body))
    }

    /// Deletes an object; it must exist.
    pub fn delete(&self, object: &Value) -> Result<()> {
        self.request(&Method::DELETE, &path_of(object), "", None).map(drop)
    }

    /// Watches a path from this version on until an event of this type comes, and returns its object.
    pub fn watch_until(&self, path: &str, version: &str, kind: &str, within: Duration) -> Result<Value> {
        let what = || format!("watch of {path} sees {kind}");
        let deadline = Deadline::after(within);
        let join = if path.contains('?') { '&' } else { '?' };
        let url = format!(
            "{}{path}{join}watch=true&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={}",
            self.url,
            within.as_secs()
        );
        let response = self.netns.run(|| {
            let request = self.agent.get(&url).config().timeout_global(Some(within + TIMEOUT));
            request.build().call()
        })?;
        let response = response.map_err(ureq::Error::into_io).context(what)?;
        if response.status() != StatusCode::OK {
            return Err(Error::mismatch(what(), StatusCode::OK, response.status()));
        }
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let event: Value = serde_json::from_str(&line.context(what)?).context(what)?;
            if event["type"] == kind {
                return Ok(event["object"].clone());
            }
        }
        Err(deadline.missed(what()))
    }

    /// From a thread that is in the namespace already.
    fn create_here(&self, object: &Value) -> Result<Value> {
        self.request_here(&Method::POST, &collection_of(object), JSON, Some(object))
    }

    fn request(&self, method: &Method, path: &str, content: &str, body: Option<&Value>) -> Result<Value> {
        self.netns.run(|| self.request_here(method, path, content, body))?
    }

    fn request_here(&self, method: &Method, path: &str, content: &str, body: Option<&Value>) -> Result<Value> {
        request(&self.agent, method, &format!("{}{path}", self.url), content, body)
    }
}

const JSON: &str = "application/json";

/// A POST without TLS: for etcd.
pub(super) fn plain(netns: &Netns, url: &str, body: &Value) -> Result<Value> {
    netns.run(|| request(&agent(ureq::Agent::config_builder()), &Method::POST, url, JSON, Some(body)))?
}

fn agent(config: ureq::config::ConfigBuilder<ureq::typestate::AgentScope>) -> ureq::Agent {
    config.http_status_as_error(false).proxy(None).timeout_global(Some(TIMEOUT)).build().into()
}

fn request(agent: &ureq::Agent, method: &Method, url: &str, content: &str, body: Option<&Value>) -> Result<Value> {
    let what = || format!("{method} {url}");
    let request = http::Request::builder().method(method).uri(url);
    let send = || -> std::result::Result<(StatusCode, String), ureq::Error> {
        let mut response = match body {
            Some(body) => agent.run(request.header("content-type", content).body(body.to_string())?)?,
            None => agent.run(request.body(())?)?,
        };
        let text = response.body_mut().with_config().limit(ANSWER_MAX).read_to_string()?;
        Ok((response.status(), text))
    };
    let (status, text) = send().map_err(ureq::Error::into_io).context(what)?;
    if !status.is_success() {
        return Err(Error::mismatch(what(), "success", format!("{status}: {text}")));
    }
    // Paths like /readyz answer with plain text.
    Ok(serde_json::from_str(&text).unwrap_or_else(|_| json!(text)))
}

/// `/api/v1/namespaces/default/services/web`.
pub fn path_of(object: &Value) -> String {
    let name = object["metadata"]["name"].as_str().unwrap_or_default();
    format!("{}/{name}", collection_of(object))
}

/// `/api/v1/namespaces/default/services`.
fn collection_of(object: &Value) -> String {
    let field = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let version = field(&object["apiVersion"]);
    let root = if version.contains('/') { "/apis" } else { "/api" };
    let kind = field(&object["kind"]).to_lowercase();
    let plural = kind.strip_suffix('y').map_or_else(|| format!("{kind}s"), |stem| format!("{stem}ies"));
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{root}/{version}/namespaces/{namespace}/{plural}"),
        None => format!("{root}/{version}/{plural}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_follow_from_the_object() {
        let object = |version: &str, kind: &str, metadata: Value| json!({ "apiVersion": version, "kind": kind, "metadata": metadata });
        let cases = [
            (
                object("v1", "Service", json!({ "namespace": "default", "name": "web" })),
                "/api/v1/namespaces/default/services/web",
            ),
            (
                object("discovery.k8s.io/v1", "EndpointSlice", json!({ "namespace": "a", "name": "b" })),
                "/apis/discovery.k8s.io/v1/namespaces/a/endpointslices/b",
            ),
            (
                object("networking.k8s.io/v1", "NetworkPolicy", json!({ "namespace": "a", "name": "b" })),
                "/apis/networking.k8s.io/v1/namespaces/a/networkpolicies/b",
            ),
            (
                object("rbac.authorization.k8s.io/v1", "ClusterRole", json!({ "name": "r" })),
                "/apis/rbac.authorization.k8s.io/v1/clusterroles/r",
            ),
        ];
        for (object, path) in cases {
            assert_eq!(path_of(&object), path);
        }
    }
}
