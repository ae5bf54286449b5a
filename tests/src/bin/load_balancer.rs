//! A load balancer for a cluster of network namespaces: what a cloud gives to Services of type LoadBalancer, as far as
//! Kubernetes' own tests look at it.
//!
//! ```text
//!   Service of type LoadBalancer ── an address of --range for each family ──▶ status.loadBalancer.ingress
//!                                └─ the finalizer service.kubernetes.io/load-balancer-cleanup, while there is an address
//!   --netns (the host outside): a route to the address by way of a node; with externalTrafficPolicy Local, of a node
//!   whose healthCheckNodePort answers 200, asked twice a second
//! ```
//!
//! It runs until it is ended, and then leaves the routes, which go with the namespace.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, Result};
use clap::Parser;
use proxy_tests::agent::http_get_within;
use proxy_tests::kube_server::{Identity, KubeClient};
use proxy_tests::{Deadline, Netns};
use serde_json::{Value, json};

/// Gives addresses to Services of type LoadBalancer.
#[derive(Debug, Parser)]
struct Arguments {
    /// URL of the API server.
    #[arg(long)]
    url: String,
    /// PEM of the authority of its certificate.
    #[arg(long)]
    authority: PathBuf,
    /// PEM of the client's certificate.
    #[arg(long)]
    certificate: PathBuf,
    /// PEM of its key.
    #[arg(long)]
    key: PathBuf,
    /// Name of the network namespace of the host outside (in /run/netns).
    #[arg(long)]
    netns: String,
    /// The first address that is given, of each family.
    #[arg(long, value_delimiter = ',', required = true)]
    range: Vec<IpAddr>,
    /// Addresses of the host outside that its packets to the load balancer come from: outside of the nodes' network, or
    /// Kubernetes' tests take a client's own address for a node's. The nodes need a way back to them.
    #[arg(long, value_delimiter = ',')]
    source: Vec<IpAddr>,
}

const FINALIZER: &str = "service.kubernetes.io/load-balancer-cleanup";
const ROUND: Duration = Duration::from_millis(500);
/// For each step of a node's answer: one that is silent must not hold up the round.
const HEALTHY_WITHIN: Duration = Duration::from_secs(2);

/// What was given out so far.
#[derive(Default)]
struct Balancer {
    /// By namespace and name.
    addresses: BTreeMap<(String, String), Vec<IpAddr>>,
    given: u32,
    /// Address → node.
    routes: BTreeMap<IpAddr, IpAddr>,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(never) => match never {},
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<std::convert::Infallible> {
    let read = |path: &PathBuf| fs::read_to_string(path).with_context(|| path.display().to_string());
    let identity = Identity { certificate: read(&arguments.certificate)?, key: read(&arguments.key)? };
    let netns = Netns::existing(&arguments.netns)?;
    let client = KubeClient::new(&netns, &arguments.url, &read(&arguments.authority)?, &identity)?;
    let mut balancer = Balancer::default();
    loop {
        if let Err(error) = balancer.round(&client, &netns, arguments) {
            eprintln!("{error:#}");
        }
        // A pause, no wait for anything: the world is looked at again.
        drop(Deadline::after(ROUND).until("a pause", || false));
    }
}

impl Balancer {
    fn round(&mut self, client: &KubeClient, netns: &Netns, arguments: &Arguments) -> Result<()> {
        let nodes = nodes(&client.get("/api/v1/nodes")?);
        let services = client.get("/api/v1/services")?;
        let mut seen = BTreeSet::new();
        for service in services["items"].as_array().into_iter().flatten() {
            let meta = &service["metadata"];
            let name = |field: &str| meta[field].as_str().unwrap_or_default().to_owned();
            let key = (name("namespace"), name("name"));
            let path = format!("/api/v1/namespaces/{}/services/{}", key.0, key.1);
            let finalizers: Vec<&str> =
                meta["finalizers"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
            let wanted = service["spec"]["type"] == "LoadBalancer" && meta["deletionTimestamp"].is_null();
            let has_status = !service["status"]["loadBalancer"]["ingress"].is_null();
            if wanted {
                if !finalizers.contains(&FINALIZER) {
                    let all: Vec<_> = finalizers.iter().copied().chain([FINALIZER]).collect();
                    client.patch(&path, &json!({ "metadata": { "finalizers": all } }))?;
                }
                let addresses = self.addresses(&key, service, &arguments.range);
                let ingress: Vec<_> = addresses.iter().map(|ip| json!({ "ip": ip, "ipMode": "VIP" })).collect();
                if service["status"]["loadBalancer"]["ingress"] != Value::from(ingress.clone()) {
                    client.patch(
                        &format!("{path}/status"),
                        &json!({ "status": { "loadBalancer": { "ingress": ingress } } }),
                    )?;
                }
                for ip in addresses {
                    seen.insert(ip);
                    self.route(netns, ip, target(netns, &nodes, service, ip), &arguments.source)?;
                }
                continue;
            }
            self.addresses.remove(&key);
            if has_status && meta["deletionTimestamp"].is_null() {
                client.patch(&format!("{path}/status"), &json!({ "status": { "loadBalancer": null } }))?;
            }
            if finalizers.contains(&FINALIZER) {
                let rest: Vec<_> = finalizers.iter().copied().filter(|f| *f != FINALIZER).collect();
                client.patch(&path, &json!({ "metadata": { "finalizers": rest } }))?;
            }
        }
        let stale: Vec<_> = self.routes.keys().copied().filter(|ip| !seen.contains(ip)).collect();
        stale.into_iter().try_for_each(|ip| self.route(netns, ip, None, &[]))
    }

    /// The addresses of a Service: one for each of its families, the same as long as it is there.
    fn addresses(&mut self, key: &(String, String), service: &Value, range: &[IpAddr]) -> Vec<IpAddr> {
        if let Some(known) = self.addresses.get(key) {
            return known.clone();
        }
        let families = service["spec"]["ipFamilies"].as_array().cloned().unwrap_or_default();
        let number = self.given;
        self.given += 1;
        let of = |family: &Value| {
            let first = range.iter().find(|ip| ip.is_ipv4() == (family == "IPv4"))?;
            Some(match first {
                IpAddr::V4(ip) => IpAddr::from(std::net::Ipv4Addr::from_bits(ip.to_bits() + number)),
                IpAddr::V6(ip) => IpAddr::from(std::net::Ipv6Addr::from_bits(ip.to_bits() + u128::from(number))),
            })
        };
        let addresses: Vec<IpAddr> = families.iter().filter_map(of).collect();
        self.addresses.insert(key.clone(), addresses.clone());
        addresses
    }

    /// Sends what goes to an address by way of a node; `None`: nowhere.
    fn route(&mut self, netns: &Netns, ip: IpAddr, node: Option<IpAddr>, sources: &[IpAddr]) -> Result<()> {
        if self.routes.get(&ip).copied() == node {
            return Ok(());
        }
        let (ip_text, family) = (ip.to_string(), if ip.is_ipv4() { "-4" } else { "-6" });
        if let Some(node) = node {
            let source = sources.iter().find(|source| source.is_ipv4() == ip.is_ipv4()).map(ToString::to_string);
            let node_text = node.to_string();
            let mut words = vec![family, "route", "replace", &ip_text, "via", &node_text];
            words.extend(source.iter().flat_map(|source| ["src", source.as_str()]));
            netns.output("ip", &words)?;
            self.routes.insert(ip, node);
        } else {
            netns.output("ip", &[family, "route", "del", &ip_text])?;
            self.routes.remove(&ip);
        }
        println!("{ip} by way of {node:?}");
        Ok(())
    }
}

/// Internal addresses of all nodes.
fn nodes(list: &Value) -> Vec<Vec<IpAddr>> {
    let of = |node: &Value| {
        let addresses = node["status"]["addresses"].as_array().into_iter().flatten();
        let internal = addresses.filter(|address| address["type"] == "InternalIP");
        internal.filter_map(|address| address["address"].as_str()?.parse().ok()).collect()
    };
    list["items"].as_array().into_iter().flatten().map(of).collect()
}

/// The node that an address is sent to: with Local policy the first that says it has an endpoint.
fn target(netns: &Netns, nodes: &[Vec<IpAddr>], service: &Value, ip: IpAddr) -> Option<IpAddr> {
    let of_family = |node: &Vec<IpAddr>| node.iter().copied().find(|address| address.is_ipv4() == ip.is_ipv4());
    if service["spec"]["externalTrafficPolicy"] != "Local" {
        return nodes.iter().find_map(of_family);
    }
    let port = u16::try_from(service["spec"]["healthCheckNodePort"].as_u64()?).ok()?;
    let healthy = |node: &&Vec<IpAddr>| {
        let address = node.iter().copied().find(IpAddr::is_ipv4).or_else(|| node.first().copied());
        address.is_some_and(|address| {
            let answer = http_get_within(netns, SocketAddr::new(address, port), "/healthz", HEALTHY_WITHIN);
            answer.is_ok_and(|(status, _)| status == 200)
        })
    };
    nodes.iter().filter(healthy).find_map(of_family)
}
