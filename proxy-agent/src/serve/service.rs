//! A server for each Service with a `healthCheckNodePort`: load balancers ask it whether this node has endpoints.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{HeaderName, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use proxy_core::event::{NetDevice, Node};
use proxy_core::facts::Facts;
use proxy_core::name::ObjectName;
use proxy_core::policy::NodePortAddresses;
use tokio::sync::watch;
use tokio::time::timeout;

use super::health::{Health, status};
use super::listen::{self, RETRY, Server};
use super::notice::{Notice, Notices};

/// Reason of the Event when a port is taken: kube-proxy's.
pub const PORT_TAKEN: &str = "FailedToStartServiceHealthcheck";
/// How many endpoints this node has, for load balancers that weigh.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// Addresses on which the servers listen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Addresses {
    /// All of the node.
    All,
    /// These.
    Only(Vec<IpAddr>),
}

impl Addresses {
    /// Those on which NodePorts are served.
    pub fn of(served: &[NodePortAddresses], node: &Node, devices: &[&NetDevice]) -> Self {
        let mut all = Vec::new();
        for one in served {
            match one {
                NodePortAddresses::All => return Self::All,
                // The whole of a family is no wildcard of one family alone: Go has none, and nor had kube-proxy.
                NodePortAddresses::Range(range) if range.prefix_len() == 0 => return Self::All,
                NodePortAddresses::Primary => {
                    let first = |v4: bool| node.addresses.iter().find(|ip| ip.is_ipv4() == v4);
                    all.extend([first(true), first(false)].into_iter().flatten());
                }
                NodePortAddresses::Localhost => {
                    all.extend([IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)]);
                }
                NodePortAddresses::Range(range) => {
                    all.extend(devices.iter().flat_map(|device| &device.addresses).filter(|ip| range.contains(*ip)));
                }
            }
        }
        all.sort_unstable();
        all.dedup();
        Self::Only(all)
    }

    fn sockets(&self, port: u16) -> Vec<SocketAddr> {
        match self {
            Self::All => vec![SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), port)],
            Self::Only(all) => all.iter().map(|ip| SocketAddr::new(*ip, port)).collect(),
        }
    }
}

/// What a server answers, to any method and path.
pub fn answer(service: &ObjectName, local_endpoints: u32, healthy: bool) -> Response {
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{}\",\n\t\t\"name\": \"{}\"\n\t}},\n\t\"localEndpoints\": \
         {local_endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
        service.namespace, service.name
    );
    let headers = [
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff")),
        (WEIGHT, HeaderValue::from(local_endpoints)),
    ];
    (status(local_endpoints > 0 && healthy), headers, body).into_response()
}

/// Keeps the servers equal to what the facts ask for. Ends with the sender of the facts.
pub async fn run(
    mut facts: watch::Receiver<Facts>,
    mut addresses: watch::Receiver<Addresses>,
    health: Arc<Health>,
    node: String,
    notices: Notices,
) {
    let mut running: BTreeMap<(ObjectName, SocketAddr), Server> = BTreeMap::new();
    loop {
        let wanted = wanted(&facts.borrow_and_update(), &addresses.borrow_and_update());
        running.retain(|key, _| wanted.contains(key));
        let mut failed = false;
        for (service, address) in wanted {
            let key = (service, address);
            if running.contains_key(&key) {
                continue;
            }
            match listen::bind(address) {
                Ok(listener) => {
                    let router = router(&key.0, facts.clone(), Arc::clone(&health));
                    running.insert(key, listen::serve(listener, router));
                }
                Err(error) => {
                    failed = true;
                    let (service, port) = (&key.0, address.port());
                    let text = format!("node {node} failed to start healthcheck \"{service}\" on port {port}: {error}");
                    tracing::warn!(%address, "{text}");
                    notices.send(Notice::service(service, PORT_TAKEN, text));
                }
            }
        }
        let changed = async {
            tokio::select! {
                changed = facts.changed() => changed,
                changed = addresses.changed() => changed,
            }
        };
        // Nobody tells when a port is free: what failed is tried again with the next change, or after a while.
        let limit = if failed { RETRY } else { Duration::MAX };
        if matches!(timeout(limit, changed).await, Ok(Err(_))) {
            return;
        }
    }
}

fn wanted(facts: &Facts, addresses: &Addresses) -> Vec<(ObjectName, SocketAddr)> {
    let all = facts.health_checks.iter();
    all.flat_map(|(name, check)| addresses.sockets(check.port.get()).into_iter().map(|address| (name.clone(), address)))
        .collect()
}

fn router(service: &ObjectName, facts: watch::Receiver<Facts>, health: Arc<Health>) -> Router {
    let service = service.clone();
    Router::new().fallback(move || {
        let found = facts.borrow().health_checks.get(&service).map(|check| check.local_endpoints);
        std::future::ready(match found {
            Some(local) => answer(&service, local, health.is_healthy()),
            // The Service has just gone, and its port goes with it.
            None => StatusCode::NOT_FOUND.into_response(),
        })
    })
}
